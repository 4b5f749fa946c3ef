"""The coordinator: scheduling, KV cache blocks and grammars. Plain Python and numpy."""
