"""What the coordinator and its workers say to each other, in shared memory: numpy only."""
