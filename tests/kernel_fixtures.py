"""What the kernel tests share: where kernels run, poisoned memory, and the tolerance.

With a GPU the kernels are compiled and the "cuda" cases run; without one they run on CPU tensors in
Triton's interpreter (see tests/conftest.py), which has no bfloat16.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# `poisoned_memory` needs deterministic mode, in which cuBLAS asks for this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "cpu" and torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels are compiled for it")
    return torch.device(name)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run here: the CPU (interpreted) or a GPU."""
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
    """Where kernels run here, with each dtype they can run in."""
    name, dtype = request.param
    return _device(name), dtype


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN (floats) or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def assert_as_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Hold a result's error against `exact` to twice that of `plain`, torch in the result's dtype.

    Where plain torch happens to be luckier than its dtype allows, one rounding step is granted; in
    float32, where errors are sums of many tiny ones, a few.
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
