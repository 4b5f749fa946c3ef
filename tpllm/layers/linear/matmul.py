"""`x @ weight.T`, the product of every linear layer, by the algorithm that measured fastest.

`matmul_algorithms/` has a table for each kind of GPU, made by `launch/tune_matmuls.py`: for each
shape at which an algorithm of cuBLASLt is faster than the one cuBLAS chooses, that algorithm. Every
other product is torch's. A table, and not a race at each start: equal engines compute equal bits.

Roofline, N x K weights and M rows: the longer of 2 * N * K bytes and 2 * M * N * K operations. On
an H200 the products of a layer of 8B at 192 rows take 130 us instead of 148, where 95 would do.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from tpllm.layers.linear import cublaslt
from tpllm.layers.linear.cublaslt import Algorithm, Problem, Product
from tpllm.layers.linear.matmul_algorithms import table_path

Shape = tuple[int, int, int]  # M, N, K


class Matmul:
    """Products with weights, in one dtype on one device.

    Args:
        algorithms: by shape; a shape that is not there is torch's affair
        has_gemv: whether a single row goes through a kernel of our own, `tpllm.layers.linear.gemv`
    """

    def __init__(self, algorithms: dict[Shape, Algorithm], *, has_gemv: bool) -> None:
        self.has_gemv = has_gemv
        self._algorithms = algorithms
        self._products: dict[Shape, Product | None] = {}

    @property
    def name(self) -> str:
        """What computes products, for people."""
        parts = [f"{len(self._algorithms)} shapes by measured algorithms"] * bool(self._algorithms)
        parts += ["one row by our kernel"] * self.has_gemv
        return ", ".join([*parts, "torch"])

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """`x @ weight.T` of x [M, K] and weight [N, K]: [M, N], written to `out` where given."""
        shape = (x.shape[0], weight.shape[0], weight.shape[1])
        product = self._product(shape, x) if shape in self._algorithms else None
        if product is not None and x.is_contiguous():
            out = x.new_empty(shape[:2]) if out is None else out
            product(x, weight, out)
            return out
        if out is None:
            return F.linear(x, weight)
        return torch.mm(x, weight.t(), out=out)

    def _product(self, shape: Shape, x: Tensor) -> Product | None:
        if shape not in self._products:
            problem = Problem(*shape, x.dtype, x.device)
            self._products[shape] = problem.product(self._algorithms[shape])
        return self._products[shape]


def fast_matmul(dtype: torch.dtype, device: torch.device) -> Matmul:
    """The fastest products there are for a device."""
    algorithms = {}
    if device.type == "cuda" and dtype in cublaslt.DTYPES:
        algorithms = load_table(torch.cuda.get_device_name(device))
    return Matmul(algorithms, has_gemv=True)


plain_matmul = Matmul({}, has_gemv=False)


def load_table(gpu: str) -> dict[Shape, Algorithm]:
    """What was measured on GPUs of this name; nothing under another cuBLASLt than the one now."""
    path = table_path(gpu)
    if not path.exists():
        return {}
    table = json.loads(path.read_text())
    if table["cublaslt"] != cublaslt.version():
        return {}  # another version numbers and chooses differently
    return {(M, N, K): Algorithm(*settings) for M, N, K, *settings in table["products"]}


def save_table(gpu: str, algorithms: dict[Shape, Algorithm]) -> None:
    """Write what `load_table` reads."""
    rows = [[*shape, *algorithm] for shape, algorithm in sorted(algorithms.items())]
    head = {
        "gpu": gpu,
        "cublaslt": cublaslt.version(),
        "fields": ["M", "N", "K", *Algorithm._fields],
    }
    lines = ",\n    ".join(json.dumps(row) for row in rows)
    text = json.dumps(head, indent=2)[:-2] + f',\n  "products": [\n    {lines}\n  ]\n}}\n'
    path = table_path(gpu)
    path.write_text(text)
