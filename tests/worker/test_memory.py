import pytest
import torch

from tpllm.worker.memory import explained_out_of_memory


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_running_out_of_memory_names_the_mend(error):
    with (
        pytest.raises(RuntimeError, match="ran out of memory in a step; lower num_kv_blocks"),
        explained_out_of_memory(torch.device("cpu"), "in a step"),
    ):
        raise error


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError), explained_out_of_memory(torch.device("cpu"), "in a step"):
        raise KeyError
