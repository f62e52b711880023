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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import compress
from types import ModuleType
from typing import Any, get_args, get_type_hints

import numpy as np

from .base import (
    BACKENDS,
    Array,
    Backend,
    BackendError,
    OutOfMemory,
    bits_fit,
    described,
    heads_fit,
    is_array,
    labels_fit,
    mask_fits,
    norm_fits,
    products_fit,
    tokens_fit,
    update_fits,
    weights_shape,
    writeable,
)

__all__ = ["OPERATIONS", "Backend", "BackendError", "OutOfMemory", "backend_of", "bits_fit",
           "described", "get_backend", "heads_fit", "labels_fit", "mask_fits", "norm_fits",
           "overridable", "products_fit", "reference", "tokens_fit", "update_fits", "weights_shape",
           "writeable", "xp_of"]

OPERATIONS: dict[str, Any] = {}  # the register: every overridable body, by name
NUMBERS = frozenset(map(np.dtype, "?bBhHiIlLqQefdgFDG"))  # in the byte order of this machine
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
        If an argument is not an array of a backend, or they belong to different ones, or one is not
        of numbers in the byte order of this machine.
    """
    found = {id(backend): backend for backend in map(_backend_of_one, arrays)}
    for array in arrays:
        _check_numbers(array)
    if len(found) != 1:
        names = " and ".join(sorted(backend.name for backend in found.values()))
        raise BackendError(f"arrays of two backends are mixed ({names}): bring them to one with "
                           "comet_np.backends.get_backend(name).asarray(array)")
    return next(iter(found.values()))


def _backend_of_one(array: Array) -> Backend:
    backend = BACKENDS.get(type(array))
    if backend is not None:
        return backend
    if is_array(array) or isinstance(array, np.generic):  # before the first use of its backend
        return get_backend("numpy" if isinstance(array, np.ndarray | np.generic) else "cupy")
    module = type(array).__module__.split(".")[0]
    remedy = ("x.filled(value)" if isinstance(array, np.ma.MaskedArray) else
              "x.detach().cpu().numpy()" if module == "torch" else "numpy.asarray(x)")
    raise BackendError(f"expected a numpy.ndarray or cupy.ndarray, got {described(array)}: convert "
                       f"it with {remedy}")


def _check_numbers(array: Array) -> None:
    dtype = array.dtype
    if dtype not in NUMBERS:
        native = dtype.newbyteorder("=")
        raise BackendError(
            "expected an array of numbers in the byte order of this machine, got "
            f"{described(array)}: convert it with x.astype"
            f'("{native if native in NUMBERS else "float32"}")')


def _check_all(first: Array, kind: Any, values: Iterable[Any], masks: bool) -> None:
    """Raise a BackendError unless the arrays in `values` are what the first argument is.

    With `masks` one of them may be None or a function, as the mask of a layer.
    It runs at every call: nothing here may depend on how large an array is.
    """
    for value in values:
        if type(value) is kind:
            if value.dtype not in NUMBERS:
                _check_numbers(value)
        elif isinstance(value, tuple):
            for array in value:
                if type(array) is not kind:
                    if array is not None or value[0] is None:  # a bias or a mask may be left out
                        backend_of(first, array)
                elif array.dtype not in NUMBERS:
                    _check_numbers(array)
        elif not masks or (value is not None and not callable(value)):
            backend_of(first, value)


def _may_be_none(annotation: Any) -> bool:
    """Return whether a parameter is an array or None, or also a function, as a mask."""
    options = get_args(annotation)
    return Any in options and type(None) in options


def _holds_arrays(annotation: Any) -> bool:
    """Return whether a parameter is an array, a mask, or a NamedTuple of arrays."""
    if isinstance(annotation, type) and hasattr(annotation, "_fields"):
        return any(map(_holds_arrays, get_type_hints(annotation).values()))
    return annotation is Any or _may_be_none(annotation)


def xp_of(array: Array) -> ModuleType:
    """Return the namespace, ``numpy`` or ``cupy``, that `array` belongs to."""
    return _backend_of_one(array).xp


def overridable(body: Callable[..., Any] | None = None, *,
                cache: Callable[..., Any] | None = None) -> Any:
    """Make `body` an operation whose specification a backend may override by a faster kernel.

    The backend is that of the first argument, and of all other arrays: of the parameters that are
    annotated as such. The body stays at hand as ``operation.body``, and is handed to the kernel as
    its first argument.

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
    parameters = inspect.signature(body).parameters
    first_name = next(iter(parameters))
    annotations = [parameter.annotation for parameter in parameters.values()]
    places = [_holds_arrays(annotation) for annotation in annotations]
    names = frozenset(compress(parameters, places))
    masks = any(map(_may_be_none, annotations))

    @functools.wraps(body)
    def operation(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get(first_name)
        kind = type(first)
        backend = BACKENDS.get(kind) or _backend_of_one(first)
        _check_all(first, kind, compress(args, places), masks)
        if kwargs:
            _check_all(first, kind, (kwargs[one] for one in names & kwargs.keys()), masks)
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
