"""What a backend is, and how a plain body (the specification) gives way to a faster kernel."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray
Body = TypeVar("Body", bound=Callable[..., Any])


class BackendError(ValueError):
    """A backend that is missing, unknown, or mixed with another one."""


class OutOfMemory(BackendError):
    """Too little memory: how much was needed, and how much there is."""


class Backend:
    """The few things that NumPy and CuPy do not share, and the table of fused kernels.

    Attributes
    ----------
    name : str
        ``"numpy"`` or ``"cupy"``.
    xp : module
        The array namespace, ``numpy`` or ``cupy``.
    kernels : dict of str to callable
        Faster versions of overridable bodies, by the body's name, with its signature.
    losses_at_once : int
        How many training steps to take before their losses are read: reading stalls a GPU.
    reads_packed_masks : bool
        Whether kernels take bit-packed masks as fast as unpacked ones.
    """

    name: str
    xp: ModuleType
    kernels: dict[str, Callable[..., Any]]
    losses_at_once = 1
    reads_packed_masks = False

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        """Return `values` as an array of this backend (copied to the device if it must be)."""
        raise NotImplementedError

    def to_host(self, array: Array) -> np.ndarray:
        """Return `array` as a NumPy array."""
        raise NotImplementedError

    def erf(self, a: Array) -> Array:
        """Return the error function of `a`, element by element."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until everything that was started on the device is done, then `check_errors`."""
        raise NotImplementedError

    def check_errors(self) -> None:
        """Raise a BackendError for what kernels found wrong since the last call, if anything.

        Kernels on a device note it there, since to tell at once would stall it: call this wherever
        results are read. On the CPU kernels raise by themselves.
        """

    def lacks_memory(self, error: Exception) -> bool:
        """Return whether `error` was raised because there is too little memory."""
        return isinstance(error, MemoryError | OutOfMemory)

    @contextmanager
    def memory_explained(self) -> Iterator[None]:
        """Let a lack of memory within be a BackendError that says how much was needed."""
        try:
            yield
        except Exception as error:
            if not self.lacks_memory(error):
                raise
            device = self.describe()
            size = f" has {device['memory']:,} bytes" if "memory" in device else ""
            raise OutOfMemory(f"too little memory ({str(error).rstrip('.')}; {device['device']}"
                              f"{size})") from error

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that does what `work` does, as one launch where the backend can.

        `work` must find its data where they were at the first call and change them in place, and
        numbers that change from call to call must lie on the device (as a learning rate may, but
        not a dropout key); what it returns is overwritten by the next call. On the CPU it is
        returned as it is.
        """
        return work

    def describe(self) -> dict[str, Any]:
        """Return the device, its threads or memory, and library versions, for a run's record."""
        raise NotImplementedError


OPERATIONS: dict[str, Any] = {}  # the register: every overridable body, by name
_BACKENDS: dict[type, Backend] = {}  # by the type of their arrays
_kernels_on = os.environ.get("COMET_NP_REFERENCE", "0") in ("", "0")


def register_backend(array_type: type, backend: Backend) -> None:
    """Let arrays of `array_type` be computed by `backend`."""
    _BACKENDS[array_type] = backend


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
    backend = _BACKENDS.get(type(array))
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


def overridable(body: Body) -> Body:
    """Make `body` an operation whose specification a backend may override by a faster kernel.

    The backend is that of the first argument. The body stays at hand as ``operation.body``.
    """
    name = body.__name__
    first_name = next(iter(inspect.signature(body).parameters))

    @functools.wraps(body)
    def operation(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get(first_name)
        kind = type(first)
        backend = _BACKENDS.get(kind) or _backend_of_one(first)
        if len(args) > 1 and type(args[1]) is not kind and type(args[1]) in _BACKENDS:
            backend_of(first, args[1])  # raises where the two are mixed
        kernel = backend.kernels.get(name) if _kernels_on else None
        return (kernel or body)(*args, **kwargs)

    operation.body = body  # type: ignore[attr-defined]
    OPERATIONS[name] = operation
    return operation  # type: ignore[return-value]


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
