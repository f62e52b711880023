"""A stand-in for cupy on the CPU that is stricter than cupy, for tests of GPU code without a GPU.

`strict_cupy()` installs it as the module ``cupy``. Its names and parameters are those of the real
package (`surface.py`), its arrays are NumPy arrays in disguise, and its CUDA kernels run through
`shim.py`. An error (`StrictError`) is whatever would fail, stall or silently differ on a GPU:

- a name, method, parameter or attribute that cupy does not have;
- an implicit conversion to NumPy, or an operation that mixes device and host arrays;
- assignment through duplicate indices, whose result is undefined;
- kernel arguments of another type than the kernel's parameters (cupy converts nothing), arrays
  that are not contiguous, and all that `shim_runtime.cpp` finds;
- waiting for the device (``float(x)``, ``if x:``, ``.get()``, boolean indexing ...) within
  `Machine.no_waiting`, and during the capture of a graph;
- during a capture also cuBLAS, uploads, and allocation outside a memory pool of one's own.

A captured graph is a list of operations. Nothing is computed while it is recorded, and fresh memory
is filled with NaN, here as in `empty`.
"""

import contextlib
import ctypes
import functools
import inspect
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import scipy.special

from comet_np.backends import base, cublas, cupy_backend, cupy_kernels
from comet_np.precision import bfloat16, rounded

from . import shim, surface

SURFACE = json.loads(surface.FILE.read_text(encoding="utf-8"))
SCALARS = (bool, int, float, complex, np.generic)
CUBLAS_MEMORY = 1000  # bytes that a handle needs; as the real ones, beside those of arrays
UFUNC_KEYWORDS = {"out", "dtype", "casting"}
WAITING_FUNCTIONS = {"argwhere", "array_repr", "array_str", "array2string", "bincount", "extract",
                     "flatnonzero", "histogram", "nonzero", "save", "savetxt", "savez", "unique"}
WAITING_METHODS = {"dump", "dumps", "item", "nonzero", "tobytes", "tofile", "tolist"}
SELF_OPERATORS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide,
                  "floordiv": np.floor_divide, "mod": np.remainder, "pow": np.power,
                  "matmul": np.matmul, "and": np.bitwise_and, "or": np.bitwise_or,
                  "xor": np.bitwise_xor, "lshift": np.left_shift, "rshift": np.right_shift}
COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
               "eq": np.equal, "ne": np.not_equal}
UNARY = {"neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}


class StrictError(TypeError):
    """What would fail, stall or differ on a GPU."""


class CUDARuntimeError(RuntimeError):
    """Stands for cupy.cuda.runtime.CUDARuntimeError."""


class OutOfMemoryError(MemoryError):
    """Stands for cupy.cuda.memory.OutOfMemoryError."""


class OfThread(threading.local):
    """What cupy keeps for each thread of the host.

    recording : the graph that is being captured, or None. stream : the current one. allocator :
    None for the pool that all share.
    """

    recording: list[Callable[[], Any]] | None = None
    stream: int = 0
    allocator: Any = None


@dataclass
class Machine:
    """The GPU that the stand-in pretends to have, and what it is doing.

    Attributes
    ----------
    devices, driver, runtime : int
        Number of GPUs; CUDA versions of the driver (0: none is installed) and of CuPy.
    memory : int
        Bytes that one array may have at most.
    watch : bool
        Whether kernels are watched for races, which makes them slow.
    seed : int
        Of the order in which the threads of a kernel run.
    """

    devices: int = 1
    driver: int = 13000
    runtime: int = 13000
    memory: int = 2**30
    watch: bool = True
    seed: int = 1
    waits: list[str] = field(default_factory=list)  # what the host waited for, in order
    waiting_forbidden: bool = False
    here: OfThread = field(default_factory=OfThread)
    launches: list[str] = field(default_factory=list)  # kernels, in order
    freed: list[Any] = field(default_factory=list)  # memory pools that were emptied, in order

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Make it an error to wait for the device."""
        self.waiting_forbidden = True
        try:
            yield
        finally:
            self.waiting_forbidden = False

    def wait(self, what: str) -> None:
        """Note that the host waits for the device."""
        self.waits.append(what)
        if self.waiting_forbidden or self.here.recording is not None:
            raise StrictError(f"{what} makes the host wait for the device")

    def allocate(self, array: np.ndarray) -> np.ndarray:
        """Count an array as allocated on the device."""
        if array.nbytes > self.memory:
            raise OutOfMemoryError(f"Out of memory allocating {array.nbytes:,} bytes")
        if self.here.recording is not None and self.here.allocator is None:
            raise StrictError("allocation from the shared pool during a capture: others would get "
                              "this memory while the graph still writes to it")
        return array

    def compute(self, operation: Callable[[], Any], *inputs: Any) -> Any:
        """Return what `operation` returns as device arrays; while recording, what it will be."""
        result = operation()
        if isinstance(result, tuple | list):
            return type(result)([self.compute(lambda part=part: part, *inputs) for part in result])
        if not isinstance(result, np.ndarray | np.generic):
            return result
        array = np.asarray(result)
        if any(isinstance(one, np.ndarray) and np.may_share_memory(one, array) for one in inputs):
            return ndarray(array)  # a view: no operation
        array = self.allocate(array)
        if self.here.recording is not None:
            self.here.recording.append(lambda: np.copyto(array, operation()))
            if array.dtype.kind in "iu":
                array.fill(0)  # it may be an index of what is recorded next
            else:
                poison(array)
        return ndarray(array)

    def change(self, operation: Callable[[], Any]) -> None:
        """Perform an operation that changes arrays in place; while recording, later."""
        if self.here.recording is not None:
            self.here.recording.append(operation)
        else:
            operation()


machine = Machine()  # replaced by strict_cupy


def poison(array: np.ndarray) -> np.ndarray:
    """Fill an array with NaN, or with the largest numbers where there is none (V is bfloat16)."""
    array.fill(np.nan if array.dtype.kind in "fcV" else True if array.dtype == bool
               else np.iinfo(array.dtype).max)
    return array


def plain(value: Any, context: str) -> Any:
    """Return `value` with device arrays in it replaced by the NumPy arrays that they hide."""
    if isinstance(value, ndarray):
        return value._a
    if isinstance(value, np.ndarray):
        raise StrictError(f"{context}: a NumPy array among device arrays")
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(plain(one, context) for one in value)
    return value


def flat(values: Any) -> Iterator[Any]:
    """Yield the values in nested tuples and lists."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from flat(value)
        else:
            yield value


@functools.cache
def signature(text: str) -> inspect.Signature:
    """Return the signature that surface.py wrote as `text`."""
    namespace: dict[str, Any] = {}
    exec(f"def function({text.replace('=', '=None')}): pass", namespace)
    return inspect.signature(namespace["function"])


def bind(name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise a StrictError unless the arguments fit the parameters of the real `name`."""
    try:
        signature(text).bind(*args, **kwargs)
    except TypeError as error:
        raise StrictError(f"cupy.{name}({text}): {error}") from None


def call(name: str, function: Callable[..., Any], args: tuple[Any, ...],
         kwargs: dict[str, Any]) -> Any:
    """Call NumPy's double of a function of cupy whose arguments have been checked."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    inner = plain(args, name)
    inner_kwargs = {key: plain(value, name) for key, value in kwargs.items()}
    if "out" in kwargs:
        machine.change(lambda: function(*inner, **inner_kwargs))
        return kwargs["out"]
    return machine.compute(lambda: function(*inner, **inner_kwargs), *flat(inner))


class ndarray:
    """Stands for cupy.ndarray."""

    __slots__ = ("_a",)
    __array_ufunc__ = None  # NumPy's operators leave it to ours, which refuse
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, array: np.ndarray) -> None:
        object.__setattr__(self, "_a", array)

    def __array__(self, *args: Any, **kwargs: Any) -> None:
        raise StrictError("implicit conversion of a device array to a NumPy array")

    def __array_function__(self, function: Any, *args: Any) -> None:
        raise StrictError(f"numpy.{function.__name__} of a device array: use xp_of(array)")

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            return SimpleNamespace(ptr=self._a.ctypes.data)
        if name in SURFACE["methods"]:
            return functools.partial(self._method, name)
        if name in SURFACE["attributes"]:
            value = getattr(self._a, name)
            return ndarray(value) if isinstance(value, np.ndarray) else value
        raise AttributeError(f"cupy.ndarray has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise StrictError(f"assignment to the attribute {name} of a device array")

    def _method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        bind(f"ndarray.{name}", SURFACE["methods"][name], (self, *args), kwargs)
        if name in WAITING_METHODS:
            machine.wait(f".{name}()")
        array = self._a
        if name in ("fill", "sort", "partition", "put"):
            inner = plain(args, name)
            machine.change(lambda: getattr(array, name)(*inner, **kwargs))
            return None
        return call(name, lambda a, *rest, **more: getattr(a, name)(*rest, **more),
                    (self, *args), kwargs)

    def get(self) -> np.ndarray:
        machine.wait(".get()")
        return self._a.copy()

    def __float__(self) -> float:
        machine.wait("float()")
        return float(self._a)

    def __int__(self) -> int:
        machine.wait("int()")
        return int(self._a)

    def __bool__(self) -> bool:
        machine.wait("bool()")
        return bool(self._a)

    __index__ = __int__

    def __format__(self, specification: str) -> str:
        machine.wait("format()")
        return format(self._a.item() if self._a.ndim == 0 else self._a, specification)

    def __repr__(self) -> str:
        return f"device array({self._a!r})"

    def __len__(self) -> int:
        return len(self._a)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def _index(self, index: Any) -> Any:
        inner = plain(index, "index")
        parts = inner if isinstance(inner, tuple) else (inner,)
        if any(isinstance(one, list) for one in parts):
            raise StrictError("a list as an index is uploaded at each use")
        return inner

    def __getitem__(self, index: Any) -> Any:
        inner = self._index(index)
        parts = inner if isinstance(inner, tuple) else (inner,)
        if any(isinstance(one, np.ndarray) and one.dtype == bool for one in parts):
            machine.wait("boolean indexing")
        array = self._a
        return machine.compute(lambda: array[inner], array)

    def __setitem__(self, index: Any, value: Any) -> None:
        inner, new, array = self._index(index), plain(value, "assignment"), self._a
        parts = inner if isinstance(inner, tuple) else (inner,)
        places = [one for one in parts if isinstance(one, np.ndarray) and one.dtype != bool]
        if places and np.ndim(new) and machine.here.recording is None:
            flat_places = np.stack([one.ravel() for one in np.broadcast_arrays(*places)])
            if np.unique(flat_places, axis=1).shape != flat_places.shape:
                raise StrictError("assignment through duplicate indices is undefined")
        machine.change(lambda: array.__setitem__(inner, new))


def _operators() -> None:
    """Give `ndarray` its operators."""
    def binary(ufunc: np.ufunc) -> tuple[Callable[..., Any], ...]:
        def known(other: Any) -> bool:
            if isinstance(other, np.ndarray):
                raise StrictError(f"{ufunc.__name__}: a NumPy array among device arrays")
            return isinstance(other, (ndarray, *SCALARS))

        def forward(self: ndarray, other: Any) -> Any:
            return run_ufunc(ufunc, (self, other), {}) if known(other) else NotImplemented

        def backward(self: ndarray, other: Any) -> Any:
            return run_ufunc(ufunc, (other, self), {}) if known(other) else NotImplemented

        def in_place(self: ndarray, other: Any) -> Any:
            return (run_ufunc(ufunc, (self, other), {"out": self}) if known(other)
                    else NotImplemented)

        return forward, backward, in_place

    for name, ufunc in SELF_OPERATORS.items():
        for prefix, method in zip(("", "r", "i"), binary(ufunc), strict=True):
            setattr(ndarray, f"__{prefix}{name}__", method)
    for name, ufunc in COMPARISONS.items():
        setattr(ndarray, f"__{name}__", binary(ufunc)[0])
    for name, ufunc in UNARY.items():
        setattr(ndarray, f"__{name}__",
                lambda self, ufunc=ufunc: run_ufunc(ufunc, (self,), {}))


def run_ufunc(ufunc: np.ufunc, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a ufunc as cupy would."""
    if set(kwargs) - UFUNC_KEYWORDS:
        raise StrictError(f"{ufunc.__name__}: cupy's ufuncs take only {UFUNC_KEYWORDS}")
    for arg in args:
        if not isinstance(arg, (ndarray, *SCALARS)):
            raise StrictError(f"{ufunc.__name__}: unsupported type {type(arg)}")
    dtypes = [arg._a.dtype for arg in args if isinstance(arg, ndarray)]
    if dtypes and (common := np.result_type(*dtypes)).kind in "iu":
        limits = np.iinfo(common)
        for arg in args:
            if type(arg) is int and not limits.min <= arg <= limits.max:
                raise StrictError(f"{ufunc.__name__}: {arg} does not fit {common}, and cupy "
                                  "converts it where NumPy compares its value")
    if ufunc is np.matmul and machine.here.recording is not None:
        raise StrictError("cuBLAS cannot be called during a capture")
    return call(ufunc.__name__, ufunc, args, kwargs)


_operators()
ndarray.__module__ = "cupy"


class RawModule:
    """Stands for cupy.RawModule, with source that shim.py can compile."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (),
                 name_expressions: tuple[str, ...]) -> None:
        if machine.here.recording is not None:
            raise StrictError("a kernel compiled during a capture")
        if options != cupy_kernels.OPTIONS:
            raise StrictError(f"kernels are tested with the options {cupy_kernels.OPTIONS}")
        self._code, self._names = code, name_expressions

    def get_function(self, name: str) -> Callable[..., None]:
        if name not in self._names:
            raise StrictError(f"{name} is not among the name expressions {self._names}")
        kernel = shim.kernel(self._code, name)
        return lambda grid, block, args: launch(name, kernel, grid, block, args)


def launch(name: str, kernel: shim.Kernel, grid: tuple[int, ...], block: tuple[int, ...],
           args: tuple[Any, ...]) -> None:
    """Run a kernel after checking its arguments against the types of its parameters."""
    if len(args) != len(kernel.parameters):
        raise StrictError(f"{name} takes {len(kernel.parameters)} arguments, got {len(args)}")
    values = []
    for i, (arg, (dtype, pointer)) in enumerate(zip(args, kernel.parameters, strict=True)):
        if pointer and isinstance(arg, ndarray):
            if arg.dtype != dtype and (arg.dtype, dtype) != (np.dtype(bool), "uint8"):
                raise StrictError(f"{name}: argument {i} points to {dtype}, got {arg.dtype}")
            # Masks come with the distance of their rows, so that these alone must lie whole.
            if not arg._a.flags.c_contiguous and not (dtype == "uint8" and arg._a.ndim > 1
                                                      and arg._a.strides[-1] == 1):
                raise StrictError(f"{name}: argument {i} is not contiguous")
            values.append(arg._a)
        elif isinstance(arg, np.generic) and arg.dtype == ("uint64" if pointer else dtype):
            if pointer and arg != 0:
                raise StrictError(f"{name}: argument {i} is a number where a pointer is needed")
            values.append(arg)
        else:
            raise StrictError(f"{name}: argument {i} is {'*' * pointer}{dtype}, got {type(arg)}")
    if min(grid) < 1 or max((*grid, 1)[1:]) > 65535 or not 1 <= np.prod(block) <= 1024:
        raise StrictError(f"{name}: grid {grid} or block {block} is out of CUDA's range")
    machine.launches.append(name)
    machine.change(lambda: kernel.launch(grid, block, values, machine.watch, machine.seed))


# What cuBLAS can do: operands, result (cudaDataType) and sums (cublasComputeType_t) by its manual.
PRODUCTS = {(0, 0, 68), (0, 0, 77), (1, 1, 70), (2, 0, 68), (14, 0, 68)}
BFLOAT16, FAST_TF32, SUMS_OF_64_BITS = 14, 77, 70


class Cublas:
    """Stands for the shared library of cuBLAS, by the parameter types of its header.

    A handle is for the thread that made it, and works where a stream is set, that of the call, and
    a workspace.
    """

    def __init__(self) -> None:
        self._handles: list[dict[str, Any]] = []
        bodies = {"cublasCreate_v2": self._create, "cublasSetStream_v2": self._set_stream,
                  "cublasSetWorkspace_v2": self._set_workspace, "cublasGemmEx": self._gemm,
                  "cublasGemmStridedBatchedEx": self._batched}
        for name, body in bodies.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *cublas.FUNCTIONS[name])(body))

    def _create(self, handle: Any) -> int:
        if machine.here.recording is not None or machine.memory < CUBLAS_MEMORY:
            return 1
        self._handles.append({"thread": threading.get_ident()})
        handle[0] = len(self._handles)
        return 0

    def _set_stream(self, handle: int, stream: int | None) -> int:
        self._handles[handle - 1] |= {"stream": stream or 0, "workspace": 0}
        return 0

    def _set_workspace(self, handle: int, place: int, size: int) -> int:
        others = [one.get("workspace") for one in self._handles if one["thread"] !=
                  threading.get_ident()]
        self._handles[handle - 1]["workspace"] = place
        return 7 * (place in others)

    def _gemm(self, handle: int, trans_a: int, trans_b: int, m: int, n: int, k: int, alpha: int,
              a: int, type_a: int, lda: int, b: int, type_b: int, ldb: int, beta: int, c: int,
              type_c: int, ldc: int, sums: int, algorithm: int) -> int:
        return self._batched(handle, trans_a, trans_b, m, n, k, alpha, a, type_a, lda, 0, b, type_b,
                             ldb, 0, beta, c, type_c, ldc, 0, 1, sums, algorithm)

    def _batched(self, handle: int, trans_a: int, trans_b: int, m: int, n: int, k: int, alpha: int,
                 a: int, type_a: int, lda: int, apart_a: int, b: int, type_b: int, ldb: int,
                 apart_b: int, beta: int, c: int, type_c: int, ldc: int, apart_c: int, count: int,
                 sums: int, algorithm: int) -> int:
        rows_a, rows_b = (k if trans_a else m), (n if trans_b else k)
        state = self._handles[handle - 1]
        if not (state["thread"] == threading.get_ident() and state.get("workspace")
                and state.get("stream") == machine.here.stream and algorithm == -1
                and type_a == type_b and (type_a, type_c, sums) in PRODUCTS
                and min(m, n, k, count) > 0 and lda >= rows_a and ldb >= rows_b and ldc >= m):
            return 7
        types = {0: np.float32, 1: np.float64, 2: np.float16}
        if type_a == BFLOAT16:
            types[BFLOAT16] = bfloat16()
        number = ctypes.c_double if sums == SUMS_OF_64_BITS else ctypes.c_float

        def matrix(place: int, kind: int, rows: int, columns: int, pitch: int) -> np.ndarray:
            dtype = np.dtype(types[kind])
            size = (pitch * (columns - 1) + rows) * dtype.itemsize
            memory = np.frombuffer((ctypes.c_char * size).from_address(place), dtype)
            return np.lib.stride_tricks.as_strided(memory, (rows, columns),
                                                   (dtype.itemsize, pitch * dtype.itemsize))

        def read(operand: np.ndarray, out: np.ndarray) -> np.ndarray:
            return rounded(operand.astype(out.dtype), "tf32" if sums == FAST_TF32 else None)

        factor, kept = number.from_address(alpha).value, number.from_address(beta).value
        for i in range(count):
            at = [place + i * apart * np.dtype(types[kind]).itemsize
                  for place, apart, kind in ((a, apart_a, type_a), (b, apart_b, type_b),
                                             (c, apart_c, type_c))]
            left = matrix(at[0], type_a, *((k, m) if trans_a else (m, k)), lda)
            right = matrix(at[1], type_b, *((n, k) if trans_b else (k, n)), ldb)
            left, right = left.T if trans_a else left, right.T if trans_b else right
            out = matrix(at[2], type_c, m, n, ldc)
            machine.change(lambda left=left, right=right, out=out: np.copyto(
                out, factor * (read(left, out) @ read(right, out)) + (kept * out if kept else 0)))
        return 0


class Graph:
    """Stands for cupy.cuda.Graph."""

    def __init__(self, operations: list[Callable[[], Any]]) -> None:
        self._operations = operations

    def launch(self, stream: Any = None) -> None:
        for operation in self._operations:
            operation()


class Stream:
    """Stands for cupy.cuda.Stream."""

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr = 0 if null else id(self)
        self._before: list[int] = []

    def __enter__(self) -> "Stream":
        self._before.append(machine.here.stream)
        machine.here.stream = self.ptr
        return self

    def __exit__(self, *args: Any) -> None:
        machine.here.stream = self._before.pop()

    def synchronize(self) -> None:
        machine.wait("synchronize()")

    def begin_capture(self, mode: Any = None) -> None:
        if self.ptr == 0 or machine.here.recording is not None:
            raise StrictError("a capture on the default stream, or within another")
        machine.here.recording = []

    def end_capture(self) -> Graph:
        assert machine.here.recording is not None
        graph, machine.here.recording = Graph(machine.here.recording), None
        return graph


class Event:
    """Stands for cupy.cuda.Event: a moment, by the CPU's clock."""

    def __init__(self, block: bool = False, disable_timing: bool = False,
                 interprocess: bool = False) -> None:
        self.moment: float | None = None

    def record(self, stream: Any = None) -> None:
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        machine.wait("synchronize()")


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Stands for cupy.cuda.get_elapsed_time, in ms."""
    if start_event.moment is None or end_event.moment is None:
        raise StrictError("the time between events that were not recorded")
    return 1e3 * (end_event.moment - start_event.moment)


class MemoryPool:
    """Stands for cupy.cuda.MemoryPool."""

    def malloc(self, size: int) -> None:
        raise StrictError("only passed to using_allocator")

    def free_all_blocks(self, stream: Any = None) -> None:
        if machine.here.recording is not None:
            raise StrictError("memory freed during a capture")
        machine.freed.append(self)


@functools.cache
def get_default_memory_pool() -> MemoryPool:
    """Stands for cupy.get_default_memory_pool."""
    return MemoryPool()


@contextlib.contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    """Stands for cupy.cuda.using_allocator."""
    before, machine.here.allocator = machine.here.allocator, allocator
    try:
        yield
    finally:
        machine.here.allocator = before


def upload(name: str, value: Any, kwargs: dict[str, Any]) -> ndarray:
    """Return `value` as cupy.array or cupy.asarray would."""
    if isinstance(value, ndarray):
        return call(name, getattr(np, name), (value,), kwargs)
    if machine.here.recording is not None:
        raise StrictError("an upload during a capture")
    kwargs = {key: option for key, option in kwargs.items() if option is not None}
    return ndarray(machine.allocate(np.array(value, **kwargs)))


def function(name: str) -> Callable[..., Any]:
    """Return the stand-in of a function of cupy."""
    double = getattr(np, name)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        bind(name, SURFACE["functions"][name], args, kwargs)
        if name in WAITING_FUNCTIONS or (name == "where" and len(args) == 1):
            machine.wait(name)
        if name in ("array", "asarray", "asanyarray", "ascontiguousarray"):
            bound = signature(SURFACE["functions"][name]).bind(*args, **kwargs).arguments
            return upload(name, next(iter(bound.values())), dict(list(bound.items())[1:]))
        if name in ("empty", "empty_like"):
            return call(name, lambda *a, **k: poison(double(*a, **k)), args, kwargs)
        return call(name, double, args, kwargs)

    return stand_in


def asnumpy(a: Any, stream: Any = None, order: str = "C", out: Any = None, *,
            blocking: bool = True) -> np.ndarray:
    """Stands for cupy.asnumpy."""
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def modules(gpu: Machine) -> dict[str, ModuleType]:
    """Return the modules of the stand-in by name."""
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    special = ModuleType("cupyx.scipy.special")

    def device_count() -> int:
        if gpu.driver < gpu.runtime:
            raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is "
                                   "insufficient for CUDA runtime version")
        if not gpu.devices:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return gpu.devices

    cuda.__dict__.update(
        runtime=SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError, getDeviceCount=device_count, getDevice=lambda: 0,
            getDeviceProperties=lambda device: {"name": b"stand-in", "totalGlobalMem": gpu.memory},
            driverGetVersion=lambda: gpu.driver, runtimeGetVersion=lambda: gpu.runtime),
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        Stream=Stream, Graph=Graph, Event=Event, get_elapsed_time=get_elapsed_time,
        MemoryPool=MemoryPool, using_allocator=using_allocator,
        get_current_stream=lambda: SimpleNamespace(
            ptr=machine.here.stream, synchronize=Stream(null=True).synchronize))
    special.__dict__.update(erf=lambda *args, **kwargs: run_ufunc(scipy.special.erf, args, kwargs))
    cupy.__dict__.update(
        {name: functools.partial(lambda ufunc, *args, **kwargs: run_ufunc(ufunc, args, kwargs),
                                 getattr(np, name)) for name in SURFACE["ufuncs"]}
        | {name: function(name) for name in SURFACE["functions"]}
        | {name: getattr(np, name) for name in SURFACE["values"]}
        | {"ndarray": ndarray, "RawModule": RawModule, "asnumpy": asnumpy, "cuda": cuda,
           "get_default_memory_pool": get_default_memory_pool,
           "__version__": SURFACE["version"]})
    cupy.add.at = lambda a, indices, b: machine.change(
        lambda: np.add.at(*plain((a, indices, b), "add.at")))
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cublas": ModuleType("cupy.cublas"),
            "cupyx": ModuleType("cupyx"),
            "cupyx.scipy": ModuleType("cupyx.scipy"), "cupyx.scipy.special": special}


def stands_for(backend: base.Backend) -> bool:
    """Return whether the GPU of a CuPy backend is this stand-in."""
    return backend.xp.ndarray is ndarray


@contextlib.contextmanager
def strict_cupy(**settings: Any) -> Iterator[Machine]:
    """Let ``import cupy`` give the stand-in, on a `Machine` of these settings, and yield that."""
    global machine
    ours = modules(gpu := Machine(**settings))
    theirs = {name: module for name, module in sys.modules.items()
              if name.split(".")[0] in ("cupy", "cupyx")}
    before, machine = machine, gpu
    library = Cublas()
    load_cublas, cublas.load_cublas = cublas.load_cublas, lambda major: library
    for name in theirs:
        del sys.modules[name]
    sys.modules.update(ours)
    cupy_backend.load.cache_clear()
    try:
        yield gpu
    finally:
        machine, cublas.load_cublas = before, load_cublas
        for name in ours:
            del sys.modules[name]
        sys.modules.update(theirs)
        cupy_backend.load.cache_clear()
        base.BACKENDS.pop(ndarray, None)
