"""The coordinator's side: scheduling, cache blocks, worker processes. Plain Python and numpy."""
