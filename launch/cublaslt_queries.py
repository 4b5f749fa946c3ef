"""What cuBLASLt says of its algorithms: its suggestions for a matmul, and their tile sizes."""

import ctypes
from ctypes import byref, c_int, c_size_t, c_uint16, c_void_p

from tpllm.layers.linear.cublaslt import (
    SHORT_FIELDS,
    WORKSPACE_BYTES,
    Algo,
    Algorithm,
    Heuristic,
    Problem,
    check,
    handle,
    library,
)

MAX_WORKSPACE = 1  # an attribute of a preference, from cublasLt.h
TILE_IDS = 6  # an attribute of an algorithm


def suggestions(problem: Problem) -> list[Algorithm]:
    """Return the algorithms that cuBLAS would try, its first choice first."""
    lt, max_algorithms = library(), 64
    preference, limit = c_void_p(), c_size_t(WORKSPACE_BYTES)
    check(lt.cublasLtMatmulPreferenceCreate(byref(preference)))
    check(
        lt.cublasLtMatmulPreferenceSetAttribute(
            preference, MAX_WORKSPACE, byref(limit), c_size_t(8)
        )
    )
    found, number = (Heuristic * max_algorithms)(), c_int()
    check(
        lt.cublasLtMatmulAlgoGetHeuristic(
            handle(), *problem.operands, preference, max_algorithms, found, byref(number)
        )
    )
    check(lt.cublasLtMatmulPreferenceDestroy(preference))
    return [_settings(found[i].algo) for i in range(number.value) if found[i].state == 0]


def tiles(problem: Problem, algorithm: Algorithm) -> list[int]:
    """Return the tile sizes of an algorithm."""
    found, num_bytes = (ctypes.c_uint32 * 1024)(), c_size_t()
    algo = problem.init(algorithm.id)
    check(
        library().cublasLtMatmulAlgoCapGetAttribute(
            byref(algo), TILE_IDS, found, c_size_t(ctypes.sizeof(found)), byref(num_bytes)
        )
    )
    return list(found[: num_bytes.value // 4])


def _settings(algo: Algo) -> Algorithm:
    """Read the settings out of cuBLASLt's opaque record."""
    lt, values = library(), []
    for attribute, field in enumerate(Algorithm._fields):
        number = c_uint16() if field in SHORT_FIELDS else ctypes.c_uint32()
        size, written = c_size_t(ctypes.sizeof(number)), c_size_t()
        check(
            lt.cublasLtMatmulAlgoConfigGetAttribute(
                byref(algo), attribute, byref(number), size, byref(written)
            )
        )
        values.append(number.value)
    return Algorithm(*values)
