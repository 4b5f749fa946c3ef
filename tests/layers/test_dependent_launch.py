"""The steps whose kernels are launched early."""

import pytest
import torch

from tpllm.layers import dependent_launch as module
from tpllm.layers.dependent_launch import dependent_launch


def test_a_step_of_one_row_alone_is_launched_early(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert dependent_launch(device, 1) == {"PDL": False}
    monkeypatch.setattr(module, "_supports_dependent_launch", lambda device: True)
    assert dependent_launch(device, 1) == {"PDL": True, "launch_pdl": True}
    assert dependent_launch(device, 2) == {"PDL": False}
