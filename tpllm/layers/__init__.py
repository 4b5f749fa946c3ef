"""Sharded building blocks of a model; a Triton kernel stands beside the layer that it serves."""
