"""The tensor-parallel group and its collectives: the one home of torch.distributed."""
