"""Sharded building blocks of a model. Each Triton kernel is in the file of its layer."""
