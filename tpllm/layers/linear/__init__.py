"""Sharded linear layers and the matmuls behind them."""
