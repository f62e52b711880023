"""Matrix products by cuBLAS through ctypes: the same in and outside a CUDA graph.

CuPy refuses cuBLAS during a capture, and offers no batched products without copies. One routine
with one workspace serves both the ordinary path and the graph, so that their results are equal.
"""

import ctypes
import os
from types import ModuleType
from typing import Any

import numpy as np

from .base import BackendError, OutOfMemory

Array = Any  # cupy.ndarray

NO_TRANSPOSE, TRANSPOSE = 0, 1  # cublasOperation_t
FULL, TF32 = 0, 3  # cublasMath_t
WORKSPACE = 32 << 20  # bytes, what NVIDIA recommends for Hopper; others need less
POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
REALS: dict[str, Any] = {"S": ctypes.c_float, "D": ctypes.c_double}  # by a routine's letter
LETTERS = {"f": "S", "d": "D"}  # by the letter of the dtype
NO_MEMORY = (1, 3)  # CUBLAS_STATUS_NOT_INITIALIZED, which cublasCreate returns, and ALLOC_FAILED


def _functions() -> dict[str, list[Any]]:
    """Return the parameters of the functions that are called here."""
    functions: dict[str, list[Any]] = {
        "cublasCreate_v2": [ctypes.POINTER(POINTER)],
        "cublasSetStream_v2": [POINTER, POINTER],
        "cublasSetWorkspace_v2": [POINTER, POINTER, ctypes.c_size_t],
        "cublasSetMathMode": [POINTER, INT],
    }
    for letter, real in REALS.items():
        number = ctypes.POINTER(real)
        functions[f"cublas{letter}gemm_v2"] = [
            POINTER, *5 * [INT], number, POINTER, INT, POINTER, INT, number, POINTER, INT]
        functions[f"cublas{letter}gemmStridedBatched"] = [
            POINTER, *5 * [INT], number, POINTER, INT, LONG, POINTER, INT, LONG, number, POINTER,
            INT, LONG, INT]
    return functions


FUNCTIONS = _functions()


def load_cublas(major: int) -> Any:
    """Return cuBLAS of this major version of CUDA, which CuPy has loaded already."""
    return ctypes.CDLL(f"cublas64_{major}.dll" if os.name == "nt" else f"libcublas.so.{major}")


class Cublas:
    """A handle of cuBLAS, with a workspace of its own, for the current stream of each call.

    It lasts as long as the process.
    """

    def __init__(self, cupy: ModuleType) -> None:
        self._library = load_cublas(cupy.cuda.runtime.runtimeGetVersion() // 1000)
        for name, parameters in FUNCTIONS.items():
            getattr(self._library, name).argtypes = parameters
        self._cupy = cupy
        self._handle = ctypes.c_void_p()
        self._workspace = cupy.empty(WORKSPACE, dtype=np.uint8)
        self._stream: int | None = None
        self._mode = FULL  # cuBLAS's default
        self._call("cublasCreate_v2", ctypes.byref(self._handle))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            kind = OutOfMemory if status in NO_MEMORY else BackendError
            raise kind(f"{name} of cuBLAS failed with status {status} (cublasStatus_t)")

    def gemm(self, trans_a: bool, trans_b: bool, a: Array, b: Array, out: Array, beta: float,
             tf32: bool) -> None:
        """out = op(a) op(b) + beta out, op the transpose or nothing, without copying transposes.

        Parameters
        ----------
        trans_a, trans_b : bool
        a, b : arrays, matrices or (S, rows, columns), of one dtype, float32 or float64
            A matrix serves all S products.
        out : C-contiguous array, a matrix or (S, rows, columns)
        beta : float
        tf32 : bool
            Whether operands of float32 may be read with 10 bits of mantissa.
        """
        self._set(self._cupy.cuda.get_current_stream().ptr, TF32 if tf32 else FULL)
        # out is row-major. cuBLAS is column-major and sees its transpose, so it is given
        # out^T = op(b)^T op(a)^T + beta out^T.
        (b, b_flag, b_pitch), (a, a_flag, a_pitch) = self._seen(b, trans_b), self._seen(a, trans_a)
        rows, columns = out.shape[-2:]
        inner = a.shape[-2 if trans_a else -1]
        letter = LETTERS[out.dtype.char]
        one, kept = REALS[letter](1), REALS[letter](beta)
        first = (self._handle, b_flag, a_flag, columns, rows, inner, one)
        if out.ndim == 2:
            self._call(f"cublas{letter}gemm_v2", *first, b.data.ptr, b_pitch, a.data.ptr, a_pitch,
                       kept, out.data.ptr, columns)
        else:
            self._call(f"cublas{letter}gemmStridedBatched", *first, b.data.ptr, b_pitch, _apart(b),
                       a.data.ptr, a_pitch, _apart(a), kept, out.data.ptr, columns, rows * columns,
                       len(out))

    def _set(self, stream: int, mode: int) -> None:
        if stream != self._stream:
            self._call("cublasSetStream_v2", self._handle, stream)  # resets the workspace
            self._call("cublasSetWorkspace_v2", self._handle, self._workspace.data.ptr, WORKSPACE)
            self._stream = stream
        if mode != self._mode:
            self._call("cublasSetMathMode", self._handle, mode)
            self._mode = mode

    def _seen(self, a: Array, trans: bool) -> tuple[Array, int, int]:
        """Return `a`, or a copy, and the flag and pitch with which cuBLAS reads op(a)^T in it."""
        (rows, columns), size = a.shape[-2:], a.itemsize
        down, along = a.strides[-2:]
        if columns == 1 or along == size:  # rows lie whole: column-major, this is a^T
            pitch = down // size if rows > 1 else columns
            if pitch >= columns and down % size == 0:
                return a, TRANSPOSE if trans else NO_TRANSPOSE, pitch
        if rows == 1 or down == size:
            pitch = along // size if columns > 1 else rows
            if pitch >= rows and along % size == 0:
                return a, NO_TRANSPOSE if trans else TRANSPOSE, pitch
        return self._seen(self._cupy.ascontiguousarray(a), trans)


def _apart(a: Array) -> int:
    """Return how many elements the matrices of `a` lie apart; 0 if there is one for all."""
    return int(a.strides[0]) // int(a.itemsize) if a.ndim == 3 else 0
