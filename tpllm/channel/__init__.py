"""Messages between the coordinator and its workers over shared memory. Needs numpy only."""
