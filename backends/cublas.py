"""Matrix products by cuBLAS through ctypes: the same in and outside a CUDA graph.

CuPy refuses cuBLAS during a capture, and offers no batched products without copies. One routine
with one workspace serves both the ordinary path and the graph, so that their results are equal.
"""

import ctypes
import os
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .base import BackendError, OutOfMemory

Array = Any  # cupy.ndarray

NO_TRANSPOSE, TRANSPOSE = 0, 1  # cublasOperation_t
HEURISTIC = -1  # cublasGemmAlgo_t: the library chooses the algorithm
WORKSPACE = 32 << 20  # bytes, what NVIDIA recommends for Hopper; others need less
NO_MEMORY = (1, 3)  # CUBLAS_STATUS_NOT_INITIALIZED, which cublasCreate returns, and ALLOC_FAILED


class Format(NamedTuple):
    """Codes of how a product reads its operands, keeps its result, and sums.

    operands, result : cudaDataType. sums : cublasComputeType_t. factor : type of alpha and beta.
    """

    operands: int
    result: int
    sums: int
    factor: Any


FORMATS = {  # by the dtype of the result, and the format in which the operands shall be read
    ("f", None): Format(0, 0, 68, ctypes.c_float),
    ("f", "tf32"): Format(0, 0, 77, ctypes.c_float),
    ("f", "float16"): Format(2, 0, 68, ctypes.c_float),
    ("f", "bfloat16"): Format(14, 0, 68, ctypes.c_float),
    ("d", None): Format(1, 1, 70, ctypes.c_double),
}

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
_OPERANDS = [_POINTER, *5 * [_INT], _POINTER]  # handle, transposes, sizes, alpha
FUNCTIONS: dict[str, list[Any]] = {  # the parameters of those that are called here
    "cublasCreate_v2": [ctypes.POINTER(_POINTER)],
    "cublasSetStream_v2": [_POINTER, _POINTER],
    "cublasSetWorkspace_v2": [_POINTER, _POINTER, ctypes.c_size_t],
    "cublasGemmEx": [*_OPERANDS, *2 * [_POINTER, _INT, _INT], _POINTER, _POINTER, *4 * [_INT]],
    "cublasGemmStridedBatchedEx": [*_OPERANDS, *2 * [_POINTER, _INT, _INT, _LONG], _POINTER,
                                   _POINTER, _INT, _INT, _LONG, *3 * [_INT]],
}


def load_cublas(major: int) -> Any:
    """Return cuBLAS of this major version of CUDA, which CuPy has loaded already."""
    return ctypes.CDLL(f"cublas64_{major}.dll" if os.name == "nt" else f"libcublas.so.{major}")


class Cublas:
    """A handle of cuBLAS, with a workspace of its own, for the current stream of each call.

    It is for one thread, and lasts as long as the process.
    """

    def __init__(self, cupy: ModuleType) -> None:
        self._library = load_cublas(cupy.cuda.runtime.runtimeGetVersion() // 1000)
        for name, parameters in FUNCTIONS.items():
            getattr(self._library, name).argtypes = parameters
        self._cupy = cupy
        self._handle = ctypes.c_void_p()
        self._workspace = cupy.empty(WORKSPACE, dtype=np.uint8)
        self._stream: int | None = None
        self._call("cublasCreate_v2", ctypes.byref(self._handle))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            kind = OutOfMemory if status in NO_MEMORY else BackendError
            raise kind(f"{name} of cuBLAS failed with status {status} (cublasStatus_t)")

    def gemm(self, a: Array, b: Array, out: Array, beta: float, compute: str | None = None) -> None:
        """out = a b + beta out; operands that are transposed views are not copied.

        Parameters
        ----------
        a, b : arrays, matrices or (S, rows, columns), of one dtype, float32 or float64
            A matrix serves all S products.
        out : C-contiguous array, a matrix or (S, rows, columns)
        beta : float
        compute : {None, "tf32", "float16", "bfloat16"}
            The format in which operands of float32 are read; sums are of float32 all the same.
        """
        code = FORMATS[out.dtype.char, compute]
        self._use_current_stream()
        # out is row-major. cuBLAS is column-major and sees its transpose, so it is given
        # out^T = b^T a^T + beta out^T.
        b, b_flag, b_pitch = self._seen(_cast(b, compute))
        a, a_flag, a_pitch = self._seen(_cast(a, compute))
        rows, columns = out.shape[-2:]
        one, kept = ctypes.byref(code.factor(1)), ctypes.byref(code.factor(beta))
        first = (self._handle, b_flag, a_flag, columns, rows, a.shape[-1], one)
        if out.ndim == 2:
            self._call("cublasGemmEx", *first, b.data.ptr, code.operands, b_pitch, a.data.ptr,
                       code.operands, a_pitch, kept, out.data.ptr, code.result, columns, code.sums,
                       HEURISTIC)
        else:
            self._call("cublasGemmStridedBatchedEx", *first, b.data.ptr, code.operands, b_pitch,
                       _apart(b), a.data.ptr, code.operands, a_pitch, _apart(a), kept,
                       out.data.ptr, code.result, columns, rows * columns, len(out), code.sums,
                       HEURISTIC)

    def _use_current_stream(self) -> None:
        stream = self._cupy.cuda.get_current_stream().ptr
        if stream != self._stream:
            self._call("cublasSetStream_v2", self._handle, stream)  # resets the workspace
            self._call("cublasSetWorkspace_v2", self._handle, self._workspace.data.ptr, WORKSPACE)
            self._stream = stream

    def _seen(self, a: Array) -> tuple[Array, int, int]:
        """Return `a`, or a copy, and the flag and pitch with which cuBLAS reads a^T in it."""
        (rows, columns), size = a.shape[-2:], a.itemsize
        down, along = a.strides[-2:]
        if columns == 1 or along == size:  # rows lie whole: column-major, this is a^T
            pitch = down // size if rows > 1 else columns
            if pitch >= columns and down % size == 0:
                return a, NO_TRANSPOSE, pitch
        if rows == 1 or down == size:
            pitch = along // size if columns > 1 else rows
            if pitch >= rows and along % size == 0:
                return a, TRANSPOSE, pitch
        return self._seen(self._cupy.ascontiguousarray(a))


def _cast(a: Array, compute: str | None) -> Array:
    """Return the operand `a` in the format that cuBLAS is to read, unless it rounds itself."""
    if compute == "float16":
        return _as_it_lies(a, np.float16)
    if compute == "bfloat16":
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            raise BackendError("bfloat16 needs the package ml_dtypes: python -m pip install "
                               "ml_dtypes") from None
        return _as_it_lies(a, bfloat16)
    return a


def _as_it_lies(a: Array, dtype: Any) -> Array:
    """Return `a` in this dtype; CuPy casts a transposed view slowly, so what it views is cast."""
    there = a.swapaxes(-1, -2)
    return there.astype(dtype).swapaxes(-1, -2) if there.flags.c_contiguous else a.astype(dtype)


def _apart(a: Array) -> int:
    """Return how many elements the matrices of `a` lie apart; 0 if there is one for all."""
    return int(a.strides[0]) // int(a.itemsize) if a.ndim == 3 else 0
