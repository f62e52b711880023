"""Work captured as a CUDA graph: from the third call on, one launch instead of hundreds.

CuPy refuses cuBLAS during a capture, so matrix products are recorded through the small binding
below, with the same routine and the same arguments as outside. Only its workspace is another one,
for which cuBLAS may choose another order of summation: results agree to rounding.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .base import BackendError

Array = Any  # cupy.ndarray

NO_TRANSPOSE, TRANSPOSE = 0, 1  # cublasOperation_t
WORKSPACE = 32 << 20  # bytes, what NVIDIA recommends for Hopper; others need less
GEMM = {"f": ("cublasSgemm_v2", ctypes.c_float), "d": ("cublasDgemm_v2", ctypes.c_double)}
POINTER, INT = ctypes.c_void_p, ctypes.c_int
FUNCTIONS: dict[str, list[Any]] = {  # the parameters of what is called here
    "cublasCreate_v2": [ctypes.POINTER(POINTER)],
    "cublasDestroy_v2": [POINTER],
    "cublasSetStream_v2": [POINTER, POINTER],
    "cublasSetWorkspace_v2": [POINTER, POINTER, ctypes.c_size_t],
    **{name: [POINTER, *5 * [INT], ctypes.POINTER(real), POINTER, INT, POINTER, INT,
              ctypes.POINTER(real), POINTER, INT] for name, real in GEMM.values()},
}


def load_cublas(major: int) -> Any:
    """Return cuBLAS of this major version of CUDA, which CuPy has loaded already."""
    return ctypes.CDLL(f"cublas64_{major}.dll" if os.name == "nt" else f"libcublas.so.{major}")


class Cublas:
    """A handle of cuBLAS for one stream, with a workspace of its own, in full precision."""

    def __init__(self, cupy: ModuleType, stream: Any) -> None:
        self._library = load_cublas(cupy.cuda.runtime.runtimeGetVersion() // 1000)
        for name, parameters in FUNCTIONS.items():
            getattr(self._library, name).argtypes = parameters
        self._handle = ctypes.c_void_p()
        self._workspace = cupy.empty(WORKSPACE, dtype=np.uint8)
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, stream.ptr)  # resets the workspace
        self._call("cublasSetWorkspace_v2", self._handle, self._workspace.data.ptr, WORKSPACE)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.cublasDestroy_v2(self._handle)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise BackendError(f"{name} of cuBLAS failed with status {status}: run without capture")

    def gemm(self, trans_a: str, trans_b: str, a: Array, b: Array, out: Array, alpha: float,
             beta: float) -> None:
        """out = alpha op(a) op(b) + beta out, with the parameters of cupy.cublas.gemm.

        out is row-major. cuBLAS is column-major and sees its transpose, so it is given
        ``out^T = alpha op(b)^T op(a)^T + beta out^T``.
        """
        if out.dtype.char not in GEMM or not out.flags.c_contiguous:
            raise BackendError("a captured matrix product goes into a C-contiguous array of "
                               f"float32 or float64, got {out.dtype}, strides {out.strides}")
        name, real = GEMM[out.dtype.char]
        (b_flag, b_pitch), (a_flag, a_pitch) = _operand(b, trans_b), _operand(a, trans_a)
        rows, columns = out.shape
        self._call(name, self._handle, b_flag, a_flag, columns, rows,
                   a.shape[1 if trans_a == "N" else 0], real(alpha), b.data.ptr, b_pitch,
                   a.data.ptr, a_pitch, real(beta), out.data.ptr, columns)


def _operand(a: Array, trans: str) -> tuple[int, int]:
    """Return the flag and the pitch with which cuBLAS reads ``op(a)^T`` where a lies."""
    if a.flags.c_contiguous:  # column-major, this is a^T
        return (NO_TRANSPOSE if trans == "N" else TRANSPOSE), a.shape[1]
    if a.flags.f_contiguous:
        return (TRANSPOSE if trans == "N" else NO_TRANSPOSE), a.shape[0]
    raise BackendError("a captured matrix product takes contiguous arrays or their transposes, got "
                       f"strides {a.strides} for shape {a.shape}")


class CapturedWork:
    """A function without arguments, replayed as a CUDA graph.

    The first call runs it as it is, so that kernels are compiled; the second records it, and it
    and all later ones launch the graph. What the function reads and writes must stay where it is;
    what it allocates comes from a pool of the graph's own and is overwritten by the next call.

    Parameters
    ----------
    backend : CupyBackend
        Its `gemm` is another one while the work is recorded.
    work : function () -> result
    """

    def __init__(self, backend: Any, work: Callable[[], Any]) -> None:
        self._backend, self._work = backend, work
        self._compiled = False
        self._graph: Any = None

    def __call__(self) -> Any:
        if not self._compiled:
            self._compiled = True
            return self._work()
        if self._graph is None:
            self._record()
        self._graph.launch()
        return self._result

    def _record(self) -> None:
        cupy, backend = self._backend.xp, self._backend
        stream = cupy.cuda.Stream(non_blocking=True)
        self._cublas = Cublas(cupy, stream)  # kept, as is the pool: the graph uses their memory
        self._pool = cupy.cuda.MemoryPool()
        ordinary, backend.gemm = backend.gemm, self._cublas.gemm
        try:
            with stream, cupy.cuda.using_allocator(self._pool.malloc):
                stream.begin_capture()
                try:
                    self._result = self._work()
                except BaseException:
                    with contextlib.suppress(Exception):  # the work's own error says more
                        stream.end_capture()
                    raise
                self._graph = stream.end_capture()
        finally:
            backend.gemm = ordinary
