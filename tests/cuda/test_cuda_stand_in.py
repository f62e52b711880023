"""The stand-in for cupy: it refuses what would fail on a GPU, and imitates only what cupy has."""

import importlib.util
import inspect
import json
import threading
from operator import attrgetter

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.backends.cupy_kernels import NULL, source

from . import surface
from .strict_cupy import MemoryPool, Stream, StrictError

FROZEN = json.loads(surface.FILE.read_text(encoding="utf-8"))


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs cupy")
def test_the_frozen_surface_is_that_of_cupy():
    real = surface.read()
    if real["version"].split(".")[0] != FROZEN["version"].split(".")[0]:
        pytest.skip(f"cupy {real['version']} is here, {FROZEN['version']} was frozen")
    assert real == FROZEN | {"version": real["version"]}


@pytest.mark.parametrize("name", FROZEN["extras"])
def test_what_the_stand_in_has_besides_takes_the_parameters_of_cupy(machine, name):
    import cupy

    theirs = [part.strip() for part in FROZEN["extras"][name].split(",") if part.strip() != "*"]
    ours = inspect.signature(attrgetter(name)(cupy)).parameters
    assert set(ours) <= {part.rstrip("=") for part in theirs}
    assert {part for part in theirs if part and not part.endswith("=")} <= set(ours)


# What works on NumPy and not, or not well, on a GPU. x is float32 (3, 4), i is [0, 0, 2].
REFUSED = {
    "NumPy operand": lambda xp, x, i: x + np.ones(4, "float32"),
    "NumPy operand on the left": lambda xp, x, i: np.ones(4, "float32") * x,
    "NumPy operand in place": lambda xp, x, i: x.__iadd__(np.ones(4, "float32")),
    "NumPy argument": lambda xp, x, i: xp.maximum(x, np.zeros(4)),
    "NumPy array among others": lambda xp, x, i: xp.concatenate([x, np.zeros((1, 4))]),
    "NumPy array assigned": lambda xp, x, i: x.__setitem__(0, np.zeros(4)),
    "NumPy array as an index": lambda xp, x, i: x[np.array([0, 1])],
    "list as an index": lambda xp, x, i: x[[0, 1]],
    "NumPy function": lambda xp, x, i: np.sum(x),
    "NumPy ufunc": lambda xp, x, i: np.exp(x),
    "implicit conversion": lambda xp, x, i: np.asarray(x),
    "errstate": lambda xp, x, i: xp.errstate(over="ignore"),
    "float128": lambda xp, x, i: xp.longdouble,
    "where= of a ufunc": lambda xp, x, i: xp.add(x, x, where=x > 0),
    "where= of a sum": lambda xp, x, i: xp.sum(x, where=x > 0),
    "initial= of a maximum": lambda xp, x, i: x.max(initial=0),
    "correction= of a variance": lambda xp, x, i: xp.var(x, correction=1),
    "stable= of a sort": lambda xp, x, i: xp.sort(x, stable=True),
    "list as an operand": lambda xp, x, i: xp.add([1.0, 2.0], x[0, :2]),
    "Python integer beyond the dtype": lambda xp, x, i: i.astype("uint32") < 2**32,
    "attribute that cupy lacks": lambda xp, x, i: x.ctypes,
    "shape assigned": lambda xp, x, i: setattr(x, "shape", (4, 3)),
    "duplicate indices": lambda xp, x, i: x.__setitem__(i, x),
    "float()": lambda xp, x, i: float(x[0, 0]),
    "int()": lambda xp, x, i: int(i[0]),
    "index from the device": lambda xp, x, i: range(10)[i[0]],
    "if": lambda xp, x, i: 1 if x[0, 0] else 0,
    "f-string": lambda xp, x, i: f"{x[0, 0]:.3f}",
    "item": lambda xp, x, i: x[0, 0].item(),
    "get": lambda xp, x, i: x.get(),
    "asnumpy": lambda xp, x, i: xp.asnumpy(x),
    "tolist": lambda xp, x, i: x.tolist(),
    "boolean indexing": lambda xp, x, i: x[x > 0],
    "nonzero": lambda xp, x, i: xp.nonzero(x),
    "where of one argument": lambda xp, x, i: xp.where(x > 0),
    "unique": lambda xp, x, i: xp.unique(x),
    "too much memory": lambda xp, x, i: xp.zeros(10**9),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(machine, what):
    import cupy

    x, i = cupy.ones((3, 4), dtype="float32"), cupy.asarray(np.array([0, 0, 2]))
    with machine.no_waiting(), pytest.raises((TypeError, AttributeError, MemoryError)):
        REFUSED[what](cupy, x, i)


def test_does_what_cupy_does(machine):
    import cupy

    x = cupy.asarray(np.arange(6, dtype="float32").reshape(2, 3))
    assert type(x).__module__ == "cupy"
    with machine.no_waiting():
        assert x.sum().shape == ()  # reductions give arrays
        assert (2 * x + np.float32(1)).dtype == "float32"
        assert (x * cupy.asarray(1.0)).dtype == "float64"  # a 0-d array is no Python number
        y = x.copy()
        y[0] += x[1]
        y[cupy.asarray(np.array([0, 1])), 1] = 7.0
        y[y > 8] = 0.0
        cupy.clip(y, 0, 6, out=y)
    np.testing.assert_array_equal(y.get(), [[3, 6, 6], [3, 6, 5]])
    assert machine.waits == [".get()"]
    assert np.isnan(cupy.empty(3).get()).all()


# A wrong argument of squared_norm<float>(const float* g, double* parts, long long n).
WRONG_ARGUMENTS = {
    "an array of float64 for float32": lambda g, parts, n: (g.astype("float64"), parts, n),
    "a Python number": lambda g, parts, n: (g, parts, 8),
    "int32 for int64": lambda g, parts, n: (g, parts, np.int32(8)),
    "float for int64": lambda g, parts, n: (g, parts, np.float64(8)),
    "too few": lambda g, parts, n: (g, parts),
    "a strided array": lambda g, parts, n: (g[::2], parts, n),
    "a number for a pointer": lambda g, parts, n: (np.uint64(8), parts, n),
    "a NumPy array": lambda g, parts, n: (np.ones(8, "float32"), parts, n),
}


@pytest.mark.parametrize("what", WRONG_ARGUMENTS)
def test_refuses_wrong_kernel_arguments(machine, what):
    import cupy

    arguments = cupy.ones(8, dtype="float32"), cupy.empty(1), np.int64(8)
    gpu = get_backend("cupy")
    kernel = ("optimizer", "squared_norm<float>", (1,), (256,))
    gpu.cuda.launch(*kernel, *arguments)
    with pytest.raises(StrictError):
        gpu.cuda.launch(*kernel, *WRONG_ARGUMENTS[what](*arguments))


def test_refuses_a_float_passed_as_a_double(machine):
    """CuPy sends a Python float as 64 bits, and a `float` parameter reads half of them."""
    gpu = get_backend("cupy")
    factor = gpu.xp.empty(4, dtype="float32")
    arguments = (factor, np.int64(4), NULL, np.int64(0), np.uint64(0), np.uint64(0), np.uint64(0))
    for kept, passes in ((np.float32(2), True), (np.float64(2), False), (2.0, False)):
        if passes:
            gpu.cuda.launch("dropout", "dropout_factor<float>", (1,), (256,), *arguments, kept)
            np.testing.assert_array_equal(gpu.to_host(factor), np.full(4, 2, "float32"))
        else:
            with pytest.raises(StrictError, match="argument 7 is float32"):
                gpu.cuda.launch("dropout", "dropout_factor<float>", (1,), (256,), *arguments, kept)


# --- captures -----------------------------------------------------------------------------------


def captured(cupy, work, own_pool=True):
    """Return the graph of `work`, and what it returned."""
    stream = Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(MemoryPool().malloc if own_pool else None):
        stream.begin_capture()
        try:
            result = work()
        finally:
            graph = stream.end_capture()
    return graph, result


def test_a_graph_computes_when_it_is_launched(machine):
    import cupy

    x, total = cupy.ones(3), cupy.zeros(3)

    def work():
        y = 2 * x[1:]
        total[1:] += y
        x.fill(5)
        return y

    graph, y = captured(cupy, work)
    np.testing.assert_array_equal(total.get(), [0, 0, 0])
    assert np.isnan(y.get()).all()
    for expected in ([0, 2, 2], [0, 12, 12]):
        graph.launch()
        np.testing.assert_array_equal(total.get(), expected)
    np.testing.assert_array_equal(y.get(), [10, 10])


REFUSED_IN_A_CAPTURE = {
    "waiting": lambda xp: float(xp.ones(1)[0]),
    "cuBLAS": lambda xp: xp.ones((2, 2)) @ xp.ones((2, 2)),
    "an upload": lambda xp: xp.asarray(np.ones(3)),
    "compilation": lambda xp: xp.RawModule(code=source("loss"), name_expressions=("x",)),
}


@pytest.mark.parametrize("what", REFUSED_IN_A_CAPTURE)
def test_refuses_in_a_capture(machine, what):
    import cupy

    with pytest.raises(StrictError):
        captured(cupy, lambda: REFUSED_IN_A_CAPTURE[what](cupy))


def test_refuses_the_shared_pool_in_a_capture(machine):
    import cupy

    x = cupy.ones(3)
    with pytest.raises(StrictError, match="shared pool"):
        captured(cupy, lambda: x + 1, own_pool=False)
    captured(cupy, lambda: x.fill(1), own_pool=False)


def test_other_threads_are_not_in_a_capture(machine):
    import cupy

    stream, waited = Stream(non_blocking=True), []
    with stream:
        stream.begin_capture()
        other = threading.Thread(target=lambda: waited.append(float(cupy.ones(1)[0])))
        other.start()
        other.join()
        assert cupy.cuda.get_current_stream().ptr == stream.ptr
        stream.end_capture()
    assert waited == [1.0]
