"""Attention over the KV cache: of prompts, and of decode rows."""
