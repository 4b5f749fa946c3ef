"""Code behind `LLM`: calls that share the engine's steps, and beam search."""
