"""Backends: NumPy (CPU) and CuPy (CUDA), and how a plain body gives way to a faster kernel.

The backend of a computation follows from its arrays; `get_backend` is where arrays are made. A
leaf: of the rest of COMET-NP it knows the class of its errors only.
"""

if __name__ != "comet_np.backends":
    # Under a second name every class here would exist twice and isinstance checks would fail.
    raise ImportError('import this package as "comet_np.backends", not as "backends"')

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from .base import BACKENDS, Array, Backend, BackendError, OutOfMemory, mask_fits

__all__ = ["OPERATIONS", "Backend", "BackendError", "OutOfMemory", "backend_of", "get_backend",
           "mask_fits", "overridable", "reference", "xp_of"]

OPERATIONS: dict[str, Any] = {}  # the register: every overridable body, by name
_kernels_on = os.environ.get("COMET_NP_REFERENCE", "0") in ("", "0")


def get_backend(name: str) -> Backend:
    """Return the backend called `name`, ``"numpy"`` or ``"cupy"``.

    Raises
    ------
    BackendError
        If the name is unknown, CuPy is not installed, or there is no usable GPU.
    """
    if name == "numpy":
        from .numpy_backend import NUMPY

        return NUMPY
    if name == "cupy":
        from .cupy_backend import load

        return load()
    raise BackendError(f'unknown backend "{name}": use "numpy" (CPU) or "cupy" (CUDA)')


def backend_of(*arrays: Array) -> Backend:
    """Return the one backend that all `arrays` belong to.

    Raises
    ------
    BackendError
        If an argument is not an array of a backend, or they belong to different ones.
    """
    found = {id(backend): backend for backend in map(_backend_of_one, arrays)}
    if len(found) != 1:
        names = " and ".join(sorted(backend.name for backend in found.values()))
        raise BackendError(f"arrays of two backends are mixed ({names}): bring them to one with "
                           "comet_np.backends.get_backend(name).asarray(array)")
    return next(iter(found.values()))


def _backend_of_one(array: Array) -> Backend:
    backend = BACKENDS.get(type(array))
    if backend is not None:
        return backend
    if isinstance(array, np.ndarray | np.generic):  # a memory map, or a scalar
        return get_backend("numpy")
    if type(array).__module__.split(".")[0] == "cupy":  # made by the user, before our first use
        return get_backend("cupy")
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    raise BackendError(f"expected a numpy.ndarray or cupy.ndarray, got {kind}: convert it with "
                       'comet_np.backends.get_backend("numpy").asarray(x)')


def xp_of(array: Array) -> ModuleType:
    """Return the namespace, ``numpy`` or ``cupy``, that `array` belongs to."""
    return _backend_of_one(array).xp


def overridable(body: Callable[..., Any] | None = None, *,
                cache: Callable[..., Any] | None = None) -> Any:
    """Make `body` an operation whose specification a backend may override by a faster kernel.

    The backend is that of the first argument. The body stays at hand as ``operation.body``, and is
    handed to the kernel as its first argument.

    Parameters
    ----------
    body : function
    cache : type, optional
        Of the forward half of a pair: the class of the cache that the body returns beside the
        output. A kernel, which knows no such class, returns its fields as a tuple.
    """
    if body is None:
        return functools.partial(overridable, cache=cache)
    name = body.__name__
    first_name = next(iter(inspect.signature(body).parameters))

    @functools.wraps(body)
    def operation(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get(first_name)
        kind = type(first)
        backend = BACKENDS.get(kind) or _backend_of_one(first)
        if len(args) > 1 and type(args[1]) is not kind and type(args[1]) in BACKENDS:
            backend_of(first, args[1])  # raises where the two are mixed
        kernel = backend.kernels.get(name) if _kernels_on else None
        if kernel is None:
            return body(*args, **kwargs)
        result = kernel(body, *args, **kwargs)
        if cache is None:
            return result
        y, kept = result
        return y, cache(*kept)

    operation.body = body  # type: ignore[attr-defined]
    OPERATIONS[name] = operation
    return operation


@contextmanager
def reference() -> Iterator[None]:
    """Turn every kernel off, so that the bodies, the specification, run themselves.

    The environment variable ``COMET_NP_REFERENCE=1`` does the same for a whole process.
    """
    global _kernels_on
    before, _kernels_on = _kernels_on, False
    try:
        yield
    finally:
        _kernels_on = before
