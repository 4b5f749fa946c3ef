"""Pytest marks that several test files use."""

import pytest
import torch

FOUR_GPUS = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs"),
]
