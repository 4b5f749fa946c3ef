import pytest
import torch
from torch import nn

from tests.checkpoints import write_config
from tpllm.config.model_config import ModelConfig
from tpllm.errors import SettingError
from tpllm.worker.finite_weights import check_weights_are_finite

SIZES = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 16, "num_hidden_layers": 1}
NORM = "model.layers.0.post_attention_layernorm.weight"


class Weights:
    """A source of tensors of ones, except for one value of one tensor."""

    def __init__(self, config: ModelConfig, value: float) -> None:
        self._shapes = config.spec.shapes()
        self._value = value

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        tensor = torch.ones(self._shapes[name])
        if name == NORM:
            tensor[3] = self._value
        return tensor


def check(folder, value: float, dtype: torch.dtype) -> None:
    config = ModelConfig.from_folder(write_config(folder, **SIZES, eos_token_id=None))
    weights = Weights(config, value)
    model = nn.ParameterList(
        nn.Parameter(weights.read(name).to(dtype), requires_grad=False)
        for name in config.spec.shapes()
    )
    check_weights_are_finite(model, weights, config.spec, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_an_error_that_names_its_tensor(tmp_path, value, dtype):
    with pytest.raises(SettingError, match=f"tensor {NORM} holds NaN or infinity in 1 of 8 values"):
        check(tmp_path, value, dtype)


def test_a_weight_too_large_for_the_dtype_is_an_error_with_its_mend(tmp_path):
    with pytest.raises(SettingError, match=f"'float16' cannot hold 1 .*{NORM}.*'bfloat16'"):
        check(tmp_path, 1e5, torch.float16)


def test_large_weights_with_an_infinite_sum_are_accepted(tmp_path):
    check(tmp_path, 1.0, torch.float32)
    check(tmp_path, 3e38, torch.float32)
