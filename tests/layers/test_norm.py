from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tpllm.architectures.spec import NormSpec, WeightSpec
from tpllm.layers.context import LayerContext
from tpllm.layers.norm import RMSNorm, rms_norm_reference, rms_norm_triton
from tpllm.parallel.group import TPGroup

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Where = tuple[torch.device, torch.dtype]
EPS = 1e-6


def plain_rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return RMSNorm and the residual stream, with every operation in x's own dtype."""
    stream = x if residual is None else x + residual
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + EPS) * weight, stream


def random_inputs(num_rows: int, size: int, where: Where) -> tuple[Tensor, Tensor, Tensor]:
    device, dtype = where
    rng = torch.Generator().manual_seed(num_rows * 10_000 + size)
    x, residual = torch.randn(2, num_rows, size, generator=rng)
    weight = torch.rand(size, generator=rng) + 0.5
    return x.to(device, dtype), residual.to(device, dtype), weight.to(device, dtype)


@pytest.mark.parametrize("num_rows, size", [(1, 1), (1, 8), (7, 100), (3, 257), (2, 2560)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rms_norm", [rms_norm_triton, rms_norm_reference])
def test_rms_norm_is_as_accurate_as_plain_torch(
    rms_norm: Callable[..., Tensor],
    with_residual: bool,
    num_rows: int,
    size: int,
    device_and_dtype: Where,
    assert_as_accurate: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    x, stream, weight = random_inputs(num_rows, size, device_and_dtype)
    residual = stream if with_residual else None
    exact, _ = plain_rms_norm(
        x.double(), weight.double(), None if residual is None else residual.double()
    )
    plain, plain_stream = plain_rms_norm(x, weight, residual)

    normed = rms_norm(x, weight, EPS, residual)

    assert_as_accurate(normed, plain, exact)
    if residual is not None:
        assert torch.equal(residual, plain_stream)


def test_rms_norm_rounds_as_transformers_does(device_and_dtype: Where) -> None:
    """It rounds to x's dtype before the weight, so most elements agree in every bit."""
    x, residual, weight = random_inputs(5, 640, device_and_dtype)
    expected = rms_norm_reference(x, weight, EPS, residual.clone())
    normed = rms_norm_triton(x, weight, EPS, residual)
    if x.dtype == torch.float32:
        torch.testing.assert_close(normed, expected)
    else:
        assert (normed != expected).float().mean() < 0.01


def test_rms_norm_reads_strided_rows(device: torch.device) -> None:
    x, residual, weight = random_inputs(6, 96, (device, torch.float32))
    x_strided, residual_strided = x[::2, :33], residual[1::2, 4:37]
    expected = rms_norm_reference(x_strided, weight[:33], EPS, residual_strided.clone())
    untouched = residual[::2].clone()
    normed = rms_norm_triton(x_strided, weight[:33], EPS, residual_strided)
    torch.testing.assert_close(normed, expected)
    assert torch.equal(residual[::2], untouched)


def test_no_rows_give_no_rows(device: torch.device) -> None:
    x, _, weight = random_inputs(1, 16, (device, torch.float32))
    assert rms_norm_triton(x[:0], weight, EPS).shape == (0, 16)


class OneTensor:
    """A `WeightSource` with a single name."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        assert (name, rows, cols) == (self.name, None, None)
        return self.tensor


def test_layer_starts_and_continues_the_residual_stream(device: torch.device) -> None:
    x, update, weight = random_inputs(3, 40, (device, torch.float32))
    norm = RMSNorm(
        NormSpec(WeightSpec("model.norm.weight", (40,)), EPS),
        LayerContext(TPGroup.single(device), torch.float32),
    )
    norm.load(OneTensor("model.norm.weight", weight.cpu()))

    normed, stream = norm(x)
    assert stream is x
    torch.testing.assert_close(normed, plain_rms_norm(x, weight, None)[0])

    expected, expected_stream = plain_rms_norm(update, weight, stream)
    normed, summed = norm(update, stream)
    assert summed is stream
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(summed, expected_stream)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offsets_pass_two_to_the_31() -> None:
    stride = 2**31 + 64
    x = torch.empty(stride + 64, dtype=torch.bfloat16, device="cuda").as_strided(
        (2, 64), (stride, 1)
    )
    x.copy_(torch.arange(128).view(2, 64))
    weight = torch.ones(64, dtype=torch.bfloat16, device="cuda")
    expected = rms_norm_reference(x, weight, EPS)
    torch.testing.assert_close(rms_norm_triton(x, weight, EPS), expected)
