"""The kernels that are launched while the weights are read."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from tpllm.config.engine_config import EngineConfig
from tpllm.layers.attention.attention import SplitDecodeBackend
from tpllm.worker.warm_up import Kernels, KernelWarmUp


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_every_kernel_can_be_launched_alone(monkeypatch, rank: int, world_size: int) -> None:
    config = EngineConfig.resolve(device="cpu", skip_tokenizer_init=True, max_model_len=64)
    # in the interpreter, with steps that are large enough for micro-batches, and a prefill for them
    monkeypatch.setattr(SplitDecodeBackend, "prefill_capturable", True)
    config = replace(
        config, attention_backend="triton", max_num_batched_tokens=2**20, max_num_seqs=2**14
    )
    kernels = Kernels(config, rank, world_size, torch.device("cpu"))
    assert len(kernels.of_this_rank()) == (5 if world_size > 1 else 0)
    for launch in kernels.of_this_rank() + kernels.shared():
        launch()


@pytest.mark.gpu
def test_a_warm_up_ends_with_everything_launched() -> None:
    config = EngineConfig.resolve(device="cuda", skip_tokenizer_init=True, max_model_len=64)
    interval = sys.getswitchinterval()
    KernelWarmUp(config, 0, 1, torch.device("cuda", 0)).wait()
    assert sys.getswitchinterval() == interval


@pytest.mark.gpu
def test_an_error_of_a_kernel_is_raised(monkeypatch) -> None:
    config = EngineConfig.resolve(device="cuda", skip_tokenizer_init=True, max_model_len=64)
    monkeypatch.setattr(Kernels, "shared", lambda self: [partial(int, "no number")])
    with pytest.raises(ValueError, match="no number"):
        KernelWarmUp(config, 0, 1, torch.device("cuda", 0)).wait()
