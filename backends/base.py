"""What a backend is: the few things that NumPy and CuPy do not share, and its table of kernels."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
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

    def clear(self, array: Array) -> None:
        """Set the elements of a flat `array` to 0."""
        array.fill(0)

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


def is_array(value: Any) -> bool:
    """Return whether `value` is an array that operations take, be its backend loaded or not.

    Subclasses of NumPy's are none, as they would give their own meaning to what is computed with
    them; but a memory map is.
    """
    kind = type(value)
    return (kind in BACKENDS or kind is np.ndarray or isinstance(value, np.memmap)
            or kind.__module__.split(".")[0] == "cupy")


def mask_fits(m: Array, shape: tuple[int, ...]) -> bool:
    """Return whether m is a mask for activations of this shape, bool or bit-packed."""
    if not shape or not (type(m) in BACKENDS or is_array(m)):
        return False
    if m.dtype == bool:
        return bool(m.shape == shape)
    return bool(m.dtype == np.uint8 and m.shape == (*shape[:-1], -(-shape[-1] // 8)))


def layer_fits(x: Array, W: Array, b: Array | None) -> bool:
    """Return whether W x + b can be had: of x (..., N_in), W (N, N_in) and b (N,) or None."""
    shape = W.shape
    return (len(shape) == 2 and 0 not in shape and x.shape[-1:] == shape[1:]
            and (b is None or b.shape == shape[:1]))


def products_fit(a: Array, b: Array) -> bool:
    """Return whether a b can be had, matrix by matrix: of a (..., M, K) and b (..., K, N)."""
    return (min(a.ndim, b.ndim) >= 2 and a.shape[-1] == b.shape[-2]
            and a.shape[:-2] == b.shape[:-2])


def norm_fits(x: Array, gain: Array, bias: Array) -> bool:
    """Return whether gain and bias are as long as the last axis of x, at least 1."""
    width = x.shape[-1:]
    return bool(width and width != (0,) and gain.shape == width == bias.shape)


def heads_fit(qkv: Array, heads: int) -> bool:
    """Return whether qkv (..., T, 3 D) holds tokens' queries, keys and values of so many heads."""
    return (isinstance(heads, Integral) and heads >= 1 and qkv.ndim >= 2
            and 0 not in qkv.shape[-2:] and qkv.shape[-1] % (3 * heads) == 0)


def attention_fits(qkv: Array, heads: int, of_weights: Array | None) -> bool:
    """Return whether `heads_fit`, and the array, if any, has the shape of attention's weights."""
    return heads_fit(qkv, heads) and (of_weights is None
                                      or bool(of_weights.shape == weights_shape(qkv, heads)))


def weights_shape(qkv: Array, heads: int) -> tuple[int, ...]:
    """Return the shape (..., H, T, T) of attention's weights for qkv or x (..., T, any)."""
    *lead, T, _ = qkv.shape
    return (*lead, heads, T, T)


def tokens_fit(tokens: Array, table: Array, positions: Array, first: int) -> bool:
    """Return whether tokens (..., T) from a position on go with tables (V, D) and (P, D)."""
    return (tokens.dtype.kind in "iu" and tokens.ndim >= 1 and table.ndim == positions.ndim == 2
            and 0 not in table.shape and table.shape[1] == positions.shape[1]
            and isinstance(first, Integral) and first >= 0
            and first + tokens.shape[-1] <= len(positions))


def labels_fit(labels: Array, logits: Array) -> bool:
    """Return whether there is an integer label for each row of logits (..., C), C at least 1."""
    shape = logits.shape
    return bool(labels.dtype.kind in "iu" and labels.shape == shape[:-1] and shape and shape[-1])


def bits_fit(bits: Array, widths: Sequence[int]) -> bool:
    """Return whether `bits` are masks of layers of these widths, bit-packed side by side."""
    return bool(bits.dtype == np.uint8
                and bits.shape[-1:] == (sum(-(-N // 8) for N in widths),))


def check_unmasked(values: Any) -> None:
    """Raise a BackendError if `values` are a masked array: a plain copy would lose the mask."""
    if isinstance(values, np.ma.MaskedArray):
        raise BackendError("an array made of a masked one would lose its mask: make it with "
                           "x.filled(value)")


def writeable(array: Array) -> bool:
    """Return whether the array can be changed in place; CuPy's always can."""
    return getattr(array.flags, "writeable", True)


def update_fits(changed: Sequence[Array], g: Array) -> bool:
    """Return whether parameters and moments can be changed in place with the gradient g (n,)."""
    return (g.ndim == 1 and g.dtype.kind == "f"
            and all(a.shape == g.shape and a.dtype == g.dtype and writeable(a) for a in changed))


def described(array: Any) -> str:
    """Return what an argument is, for the message that refuses it."""
    if is_array(array):
        return f"{array.dtype} {array.shape}"
    return f"{type(array).__module__}.{type(array).__qualname__}"
