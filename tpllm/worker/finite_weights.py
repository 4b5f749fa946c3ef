"""A check of loaded weights: a single NaN makes every output of a model useless."""

import torch
from torch import nn

from tpllm.architectures.spec import ModelSpec
from tpllm.errors import SettingError
from tpllm.layers.weights import WeightSource


@torch.inference_mode()
def check_weights_are_finite(
    model: nn.Module, weights: WeightSource, spec: ModelSpec, dtype: torch.dtype
) -> None:
    """Check that all loaded weights of this rank are finite, with one wait for the device.

    Raises:
        SettingError: some are not; the message names the checkpoint's tensor.
    """
    # a sum is not finite if one of its terms is not; it reads each weight once, without a copy
    sums = [parameter.sum(dtype=torch.float32) for parameter in model.parameters()]
    if bool(torch.isfinite(torch.stack(sums)).all()):
        return
    for name in spec.shapes():
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
