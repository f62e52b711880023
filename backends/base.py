"""What a backend is: the few things that NumPy and CuPy do not share, and its table of kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import UserError

Array = Any  # numpy.ndarray or cupy.ndarray


class BackendError(UserError):
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
        Faster versions of overridable bodies, by the body's name. A kernel takes the body it
        replaces, then the body's arguments: it may call the body for what it does not support.
    waits : bool
        Whether to read a number makes the host wait until the device has computed it.
    """

    name: str
    xp: ModuleType
    kernels: dict[str, Callable[..., Any]]
    waits = False

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
        """Raise a UserError for what kernels found wrong since the last call, if anything.

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

    def keep_freed_memory(self) -> None:
        """Let freed memory wait for the next step, in a program that trains, where that helps."""

    @contextmanager
    def own_stream(self) -> Iterator[None]:
        """Let what this thread starts on the device run beside what other threads start."""
        yield

    def capture(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Return a function that does what `work` does, as one launch where the backend can.

        `work` must find its data where they were at the first call and change them in place, and
        numbers that change from call to call must lie on the device; what it returns is overwritten
        by the next call. On the CPU it is returned as it is.
        """
        return work

    def describe(self) -> dict[str, Any]:
        """Return the device, its threads or memory, and library versions, for a run's record."""
        raise NotImplementedError


BACKENDS: dict[type, Backend] = {}  # by the type of their arrays, as they are loaded


def register_backend(array_type: type, backend: Backend) -> None:
    """Let arrays of `array_type` be computed by `backend`."""
    BACKENDS[array_type] = backend


def mask_fits(m: Array, shape: tuple[int, ...]) -> bool:
    """Return whether m is a mask for activations of this shape, bool or bit-packed."""
    if m.dtype == bool:
        return bool(m.shape == shape)
    return bool(m.dtype == np.uint8 and m.shape == (*shape[:-1], -(-shape[-1] // 8)))
