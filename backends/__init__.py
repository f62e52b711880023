"""Backends: NumPy (CPU) and CuPy (CUDA). A leaf: imports nothing from the rest of COMET-NP.

The backend of a computation follows from its arrays; `get_backend` is where arrays are made.
"""

if __name__ != "comet_np.backends":
    # Under a second name every class here would exist twice and isinstance checks would fail.
    raise ImportError('import this package as "comet_np.backends", not as "backends"')

from .base import (
    OPERATIONS,
    Backend,
    BackendError,
    OutOfMemory,
    backend_of,
    get_backend,
    overridable,
    reference,
    xp_of,
)

__all__ = ["OPERATIONS", "Backend", "BackendError", "OutOfMemory", "backend_of", "get_backend",
           "overridable", "reference", "xp_of"]
