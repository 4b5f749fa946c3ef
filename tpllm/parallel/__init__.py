"""The tensor-parallel group and its collectives. Only this package uses torch.distributed."""
