"""The GPU backend: CuPy, and the kernels of `cupy_kernels`.

Kernels never make the host wait. What they find wrong they note on the device, and `check_errors`
raises it: `to_host` and `synchronize` call it, a training loop should whenever it reads its losses.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from .base import Array, Backend, BackendError, check_unmasked, register_backend
from .cuda_graph import CapturedWork
from .cupy_kernels import NO_ERROR, CupyKernels

OLDEST_CUDA = 12  # that there is an extra for


@functools.cache
def load() -> "CupyBackend":
    """Return the CuPy backend.

    Raises
    ------
    BackendError
        If CuPy, one of CUDA's libraries, the driver or a GPU is missing (the message says how to
        install it), or the driver is too old for this CuPy.
    """
    try:
        import cupy
    except ImportError as error:
        raise BackendError('the backend "cupy" needs CuPy: python -m pip install '
                           '"cupy-cuda13x[ctk]", or "cupy-cuda12x[ctk]" for a driver of CUDA 12'
                           ) from error
    check_device(cupy.cuda.runtime)
    try:
        import cupy.cublas
        from cupyx.scipy.special import erf
    except ImportError as error:
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        raise BackendError(f"CuPy cannot load a library of CUDA ({str(error).splitlines()[0]}): "
                           f'python -m pip install "cupy-cuda{major}x[ctk]"') from error
    backend = CupyBackend(cupy, erf)
    register_backend(cupy.ndarray, backend)
    return backend


def check_device(runtime: ModuleType) -> None:
    """Raise a BackendError unless `cupy.cuda.runtime` sees a GPU and a driver that fits it."""
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        built, driver = runtime.runtimeGetVersion() // 1000, runtime.driverGetVersion() // 1000
        if "cudaErrorNoDevice" in str(error):
            raise BackendError("CUDA sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES, or "
                               "use --backend numpy") from error
        if 0 < driver < OLDEST_CUDA:
            raise BackendError(f"the driver supports CUDA {driver}, and CuPy needs {OLDEST_CUDA} "
                               "or newer: update the driver, or use --backend numpy") from error
        if 0 < driver < built:
            raise BackendError(
                f"this CuPy was built for CUDA {built}, but the driver supports CUDA {driver}: "
                f"python -m pip uninstall cupy-cuda{built}x, then python -m pip install "
                f'"cupy-cuda{driver}x[ctk]"'
            ) from error
        raise BackendError(f"there is no usable NVIDIA driver ({error}): install it (on Ubuntu: "
                           "sudo ubuntu-drivers install), or use --backend numpy") from error


class CupyBackend(Backend):
    """CuPy on one NVIDIA GPU, the current device when it is loaded."""

    name = "cupy"
    waits = True

    def __init__(self, cupy: ModuleType, erf: Callable[[Array], Array]) -> None:
        self.xp = cupy
        self._erf = erf
        self.cuda = CupyKernels(cupy)
        self.kernels = self.cuda.table

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        check_unmasked(values)
        return self.xp.asarray(values, dtype=dtype)

    def to_host(self, array: Array) -> np.ndarray:
        self.check_errors()
        return self.xp.asnumpy(array)

    def erf(self, a: Array) -> Array:
        return self._erf(a)

    def synchronize(self) -> None:
        self.xp.cuda.get_current_stream().synchronize()
        self.check_errors()

    def check_errors(self) -> None:
        self.cuda.check_errors()

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        self.synchronize()  # what was made before may be read here
        with self.cuda.mine.stream as stream:
            try:
                yield
            except BaseException:
                self.cuda.mine.errors.fill(NO_ERROR)  # or the thread's next work would be blamed
                stream.synchronize()
                raise
            self.synchronize()  # what was made here may be read on any

    def describe(self) -> dict[str, Any]:
        runtime = self.xp.cuda.runtime
        device = runtime.getDeviceProperties(runtime.getDevice())
        return {"backend": self.name, "device": device["name"].decode(),
                "memory": device["totalGlobalMem"], "driver": runtime.driverGetVersion(),
                "cuda": runtime.runtimeGetVersion(), "cupy": self.xp.__version__,
                "numpy": np.__version__}

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        if os.environ.get("COMET_NP_GRAPHS", "1") == "0":
            return work
        return CapturedWork(self.xp, work)

    def lacks_memory(self, error: Exception) -> bool:
        return (super().lacks_memory(error)  # CuPy's own is a MemoryError
                or "cudaErrorMemoryAllocation" in str(error))
