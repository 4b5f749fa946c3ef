"""Matmuls by a chosen cuBLASLt algorithm, where torch uses cuBLAS's own choice.

cuBLAS chooses by a model of the GPU, and at 50 to 256 rows its choice is often not the fastest
algorithm: see `launch/tune_matmuls.py`. The library is the one that torch has loaded, called
through ctypes; constants are from cublasLt.h.
"""

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint16, c_uint64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20

_R_32F, _R_16F, _R_16BF = 0, 2, 14  # cudaDataType
_COMPUTE_32F = 68
_TRANSPOSE_A, _OP_T = 3, 1
DTYPES = {torch.float16: _R_16F, torch.bfloat16: _R_16BF}


class Algorithm(NamedTuple):
    """A cuBLASLt algorithm and its settings, as cuBLASLt numbers them."""

    id: int
    tile: int
    split_k: int
    reduction: int
    swizzle: int
    custom: int
    stages: int
    inner_shape: int
    cluster_shape: int


# The attributes are numbered in the order of the fields; these are 16 bits wide, the others 32.
SHORT_FIELDS = ("inner_shape", "cluster_shape")


class Algo(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class Heuristic(ctypes.Structure):
    _fields_ = [
        ("algo", Algo),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@cache
def library() -> ctypes.CDLL:
    assert torch.version.cuda is not None
    # A name without a path gives the library that torch has loaded.
    lt = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    lt.cublasLtGetVersion.restype = c_size_t
    lt.cublasLtMatmul.argtypes = [c_void_p] * 14 + [c_size_t, c_void_p]
    return lt


@cache
def handle() -> c_void_p:
    created = c_void_p()
    check(library().cublasLtCreate(byref(created)))
    return created


@cache
def _workspace(device: torch.device) -> Tensor:
    """Return the scratch memory of split-K matmuls; all share it, since they run on one stream."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def check(status: int) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt returned status {status}")


def version() -> int:
    """Return cuBLASLt's version, as major * 10000 + minor * 100 + patch."""
    return int(library().cublasLtGetVersion())


class Problem:
    """A matmul shape, `x @ weight.T` with contiguous operands.

    Args:
        M, N, K: sizes of x [M, K], weight [N, K] and the result [M, N]
        dtype: float16 or bfloat16; accumulation is in float32
    """

    def __init__(self, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
        lt = library()
        self._data_type = DTYPES[dtype]
        self._device = device
        self._desc = c_void_p()
        check(lt.cublasLtMatmulDescCreate(byref(self._desc), _COMPUTE_32F, _R_32F))
        transpose = c_int(_OP_T)
        check(
            lt.cublasLtMatmulDescSetAttribute(
                self._desc, _TRANSPOSE_A, byref(transpose), c_size_t(4)
            )
        )
        # cuBLAS is column-major: result' [N, M] = weight'' [N, K] x' [K, M].
        self._weight = self._layout(K, N)
        self._x = self._layout(K, M)
        self._result = self._layout(N, M)
        self.operands = (self._desc, self._weight, self._x, self._result, self._result)

    def _layout(self, rows: int, cols: int) -> c_void_p:
        layout = c_void_p()
        lt = library()
        sizes = c_uint64(rows), c_uint64(cols), c_int64(rows)
        check(lt.cublasLtMatrixLayoutCreate(byref(layout), self._data_type, *sizes))
        return layout

    def matmul(self, algorithm: Algorithm) -> "CublasLtMatmul | None":
        """Return the matmul by this algorithm, or None if the algorithm cannot do it here."""
        lt = library()
        algo = self.init(algorithm.id)
        for attribute, (field, value) in enumerate(algorithm._asdict().items()):
            if field == "id":
                continue
            number = c_uint16(value) if field in SHORT_FIELDS else ctypes.c_uint32(value)
            size = c_size_t(ctypes.sizeof(number))
            if lt.cublasLtMatmulAlgoConfigSetAttribute(byref(algo), attribute, byref(number), size):
                return None
        result = Heuristic()
        status = lt.cublasLtMatmulAlgoCheck(handle(), *self.operands, byref(algo), byref(result))
        if status or result.state or result.workspace_bytes > WORKSPACE_BYTES:
            return None
        return CublasLtMatmul(self, algo)

    def init(self, algorithm_id: int) -> Algo:
        """Return an algorithm with its default settings."""
        algo = Algo()
        types = [self._data_type] * 4
        check(
            library().cublasLtMatmulAlgoInit(
                handle(), _COMPUTE_32F, _R_32F, *types, algorithm_id, byref(algo)
            )
        )
        return algo


class CublasLtMatmul:
    """`out = x @ weight.T` of a problem's shape, by one algorithm, on the current stream."""

    def __init__(self, problem: Problem, algo: Algo) -> None:
        self._problem = problem  # keeps its descriptors alive
        self._algo = algo
        self._one, self._zero = c_float(1), c_float(0)
        self._matmul = library().cublasLtMatmul
        self._workspace = _workspace(problem._device)

    def __call__(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        problem = self._problem
        status = self._matmul(
            handle(),
            problem._desc,
            ctypes.addressof(self._one),
            weight.data_ptr(),
            problem._weight,
            x.data_ptr(),
            problem._x,
            ctypes.addressof(self._zero),
            out.data_ptr(),
            problem._result,
            out.data_ptr(),
            problem._result,
            ctypes.addressof(self._algo),
            self._workspace.data_ptr(),
            WORKSPACE_BYTES,
            torch.cuda.current_stream().cuda_stream,
        )
        check(status)
