"""Refuses weights that are not numbers: one NaN makes every answer of a model nonsense."""

import torch
from torch import nn

from tpllm.config.model_config import ModelConfig
from tpllm.errors import SettingError
from tpllm.layers.weights import WeightSource


@torch.inference_mode()
def refuse_unnatural_weights(
    model: nn.Module, weights: WeightSource, config: ModelConfig, dtype: torch.dtype
) -> None:
    """Check that all loaded weights of this rank are finite; one look, and one wait for the device.

    Raises:
        SettingError: some are not; names the checkpoint's tensor.
    """
    # a sum is NaN or infinite if a term is: it reads each weight once, and needs no memory
    sums = [parameter.sum(dtype=torch.float32) for parameter in model.parameters()]
    if bool(torch.isfinite(torch.stack(sums)).all()):
        return
    for name in config.tensor_shapes():
        read = weights.read(name)
        wrong = int((~torch.isfinite(read)).sum())
        if wrong:
            raise SettingError(
                f"the checkpoint's tensor {name} holds NaN or infinity in {wrong} of "
                f"{read.numel()} values; the file is damaged: fetch it again"
            )
        wrong = int((~torch.isfinite(read.to(dtype))).sum())
        if wrong:
            kind = str(dtype).removeprefix("torch.")
            raise SettingError(
                f"dtype={kind!r} cannot hold {wrong} values of the checkpoint's tensor {name}: "
                "they are too large; use dtype='bfloat16' or dtype='float32'"
            )
