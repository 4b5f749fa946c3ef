"""Attention over the KV cache, for prefill chunks and decode rows."""
