"""The CPU backend: NumPy, and the kernels of `numpy_kernels`."""

from typing import Any

import numpy as np
import scipy
from scipy.special import erf

from .base import Array, Backend, check_unmasked, register_backend
from .cpu import keep_freed_memory, over_blocks, processor, threads
from .numpy_kernels import KERNELS


class NumpyBackend(Backend):
    """NumPy on the CPU."""

    name = "numpy"
    xp = np
    kernels = KERNELS

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        check_unmasked(values)
        return np.asarray(values, dtype=dtype)

    def to_host(self, array: Array) -> np.ndarray:
        return np.asarray(array)

    def erf(self, a: Array) -> Array:
        return erf(a)

    def synchronize(self) -> None:
        return

    def clear(self, array: Array) -> None:
        over_blocks(lambda block: array[block].fill(0), len(array))

    def keep_freed_memory(self) -> None:
        keep_freed_memory()

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "device": processor(),
                "threads": threads(), "numpy": np.__version__, "scipy": scipy.__version__}


NUMPY = NumpyBackend()
register_backend(np.ndarray, NUMPY)
