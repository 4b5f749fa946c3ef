"""Fixtures that kernel tests share: the device, poisoned memory, and the tolerance.

With a GPU the kernels are compiled and the "cuda" cases run. Without one they run on CPU tensors in
Triton's interpreter (see tests/conftest.py), which has no bfloat16.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# `poisoned_memory` needs deterministic mode, in which cuBLAS requires this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "cpu" and torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels are compiled for it")
    return torch.device(name)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that kernels run on: the CPU (interpreted) or a GPU."""
    return _device(request.param)


@pytest.fixture(
    params=[
        ("cpu", torch.float32),
        ("cpu", torch.float16),
        pytest.param(("cuda", torch.float32), marks=pytest.mark.gpu),
        pytest.param(("cuda", torch.float16), marks=pytest.mark.gpu),
        pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}".replace("torch.", ""),
)
def device_and_dtype(request: pytest.FixtureRequest) -> tuple[torch.device, torch.dtype]:
    """The device that kernels run on, with each dtype that they support there."""
    name, dtype = request.param
    return _device(name), dtype


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill the results of torch.empty and similar calls with NaN or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def assert_as_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Assert that a result's error against `exact` is at most twice that of `plain`.

    `plain` is torch's result in the same dtype. Its error may happen to be very small, so one
    rounding step is always allowed, and a few in float32, where errors are sums of many tiny ones.
    """

    def check(result: Tensor, plain: Tensor, exact: Tensor) -> None:
        assert result.dtype == plain.dtype
        assert result.shape == plain.shape == exact.shape
        plain_error = (plain.double() - exact.double()).abs().max().item()
        num_steps = 8 if result.dtype == torch.float32 else 1
        steps = num_steps * torch.finfo(result.dtype).eps * exact.abs().max().item()
        error = (result.double() - exact.double()).abs().max().item()
        assert error <= max(2 * plain_error, steps)  # false for NaN

    return check
