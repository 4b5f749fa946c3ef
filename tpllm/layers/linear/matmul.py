"""`x @ weight.T`, the matmul of every linear layer, by the algorithm that measured fastest.

`matmul_algorithms/` has a table for each kind of GPU, made by `launch/tune_matmuls.py`. It lists
the shapes at which some cuBLASLt algorithm is faster than cuBLAS's choice, with that algorithm.
torch computes every other matmul. The table is measured ahead, not at each start, so that equal
engines compute equal bits.

Roofline, N x K weights and M rows: the longer of 2 * N * K bytes and 2 * M * N * K operations. On
an H200 the matmuls of a layer of 8B at 192 rows take 130 us with the table and 148 without.
"""

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpllm.layers.linear import cublaslt
from tpllm.layers.linear.cublaslt import Algorithm, CublasLtMatmul, Problem
from tpllm.layers.linear.gemv import gemv_reference, gemv_triton
from tpllm.layers.linear.matmul_algorithms import table_path

Shape = tuple[int, int, int]  # M, N, K
GemvResult = tuple[Tensor, Tensor]  # see `gemv_triton`


class Matmul:
    """Matmuls with weights, in one dtype on one device.

    Args:
        algorithms: the algorithm of each shape; torch computes all other shapes
        gemv: our kernel for the single row of a linear layer; None if it is a row like others
    """

    def __init__(
        self, algorithms: dict[Shape, Algorithm], gemv: Callable[..., GemvResult] | None = None
    ) -> None:
        self.gemv = gemv
        self._algorithms = algorithms
        self._matmuls: dict[Shape, CublasLtMatmul | None] = {}

    @property
    def name(self) -> str:
        """What computes the matmuls, for people."""
        parts = [f"{len(self._algorithms)} shapes by measured algorithms"] * bool(self._algorithms)
        parts += ["one row by our kernel"] * (self.gemv is not None)
        return ", ".join([*parts, "torch"])

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Return `x @ weight.T` [M, N] of x [M, K] and weight [N, K], in `out` if it is given."""
        shape = (x.shape[0], weight.shape[0], weight.shape[1])
        matmul = self._cublaslt_matmul(shape, x) if shape in self._algorithms else None
        if matmul is not None and x.is_contiguous():
            out = x.new_empty(shape[:2]) if out is None else out
            matmul(x, weight, out)
            return out
        if out is None:
            return F.linear(x, weight)
        return torch.mm(x, weight.t(), out=out)

    def _cublaslt_matmul(self, shape: Shape, x: Tensor) -> CublasLtMatmul | None:
        if shape not in self._matmuls:
            problem = Problem(*shape, x.dtype, x.device)
            self._matmuls[shape] = problem.matmul(self._algorithms[shape])
        return self._matmuls[shape]


def fast_matmul(dtype: torch.dtype, device: torch.device) -> Matmul:
    """Return the fastest matmul for a device."""
    algorithms = {}
    if device.type == "cuda" and dtype in cublaslt.DTYPES:
        algorithms = load_table(torch.cuda.get_device_name(device))
    return Matmul(algorithms, gemv_triton if device.type == "cuda" else gemv_reference)


plain_matmul = Matmul({})


def load_table(gpu: str) -> dict[Shape, Algorithm]:
    """Return the algorithms measured on GPUs of this name.

    It is empty if there is no table, or if the table was measured with another cuBLASLt version.
    """
    path = table_path(gpu)
    if not path.exists():
        return {}
    table = json.loads(path.read_text())
    if table["cublaslt"] != cublaslt.version():
        return {}  # another version numbers its algorithms differently
    return {(M, N, K): Algorithm(*settings) for M, N, K, *settings in table["matmuls"]}


def save_table(gpu: str, algorithms: dict[Shape, Algorithm]) -> None:
    """Write the table that `load_table` reads."""
    rows = [[*shape, *algorithm] for shape, algorithm in sorted(algorithms.items())]
    head = {
        "gpu": gpu,
        "cublaslt": cublaslt.version(),
        "fields": ["M", "N", "K", *Algorithm._fields],
    }
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    text = json.dumps(head, indent=2)[:-2] + f',\n  "matmuls": [\n    {lines}\n  ]\n}}\n'
    path = table_path(gpu)
    path.write_text(text)
