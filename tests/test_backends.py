"""The backend seam: which backend an array belongs to, mixing, and blocks over threads."""

import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from scipy.special import erf

from comet_np import backends, kwta_mask
from comet_np.backends import BackendError, backend_of, base, cpu, get_backend, overridable, xp_of
from comet_np.backends.cpu import BLOCK, over_blocks, threads
from comet_np.backends.numpy_backend import NumpyBackend
from comet_np.errors import UserError
from comet_np.functional.linear import Linear, LinearCache, linear_forward, project
from comet_np.functional.loss import mean_squared_error_forward, softmax_cross_entropy_forward
from comet_np.interop import mlp_from_torch, mlp_to_torch
from comet_np.models import mlp
from comet_np.tree import flatten, tree_map

ROOT = Path(__file__).resolve().parent.parent
NUMPY = get_backend("numpy")


class Foreign(np.ndarray):
    """Stands for the arrays of another backend."""


def foreign(array):
    return array.view(Foreign)


@pytest.fixture(autouse=True)
def second_backend(monkeypatch):
    """Register a second backend for the time of a test, and return it."""
    backend = NumpyBackend()
    backend.name, backend.kernels = "foreign", dict(NUMPY.kernels)
    monkeypatch.setitem(base.BACKENDS, Foreign, backend)
    return backend


# --- belonging and mixing -----------------------------------------------------------------------


def test_the_backend_follows_from_the_arrays(second_backend, tmp_path):
    a = np.ones(3)
    mapped = np.memmap(tmp_path / "map", "float64", "w+", shape=3)
    assert backend_of(a, mapped, a.sum()) is NUMPY
    assert backend_of(foreign(a)) is second_backend
    assert xp_of(a) is np
    np.testing.assert_array_equal(kwta_mask(mapped + a, 3), True)
    np.testing.assert_array_equal(kwta_mask(mapped, 3), True)


def test_another_backend_gets_its_own_kernel_or_the_body(second_backend):
    scores = np.array([1.0, 3.0, 2.0])
    np.testing.assert_array_equal(kwta_mask(foreign(scores), 1), [False, True, False])
    second_backend.kernels["kwta_mask"] = lambda body, scores, k, ties="strict": "its own"
    assert kwta_mask(foreign(scores), 1) == "its own"
    assert kwta_mask(scores=foreign(scores), k=1) == "its own"
    np.testing.assert_array_equal(kwta_mask(scores, 1), [False, True, False])


def test_a_kernel_is_handed_the_body_and_names_no_class_of_a_cache(second_backend):
    given = []

    def kernel(body, x, p, compute=None):
        given.append(body)
        return x, (p.weight,)

    second_backend.kernels["linear_forward"] = kernel
    x, W = foreign(np.ones((2, 3))), foreign(np.ones((4, 3)))
    y, cache = linear_forward(x, Linear(W, None))
    assert y is x and given == [linear_forward.body]
    assert type(cache) is LinearCache and cache.x is W


def test_an_operation_without_a_kernel_runs_its_body(monkeypatch):
    monkeypatch.setattr(backends, "OPERATIONS", {})

    @overridable
    def twice(x):
        return 2 * x

    assert twice(x=np.float64(3)) == twice.body(3.0) == 6
    assert list(backends.OPERATIONS.items()) == [("twice", twice)]


CONFIG = mlp.MLPConfig((4, 5, 3))
PARAMS, V = mlp.init(CONFIG)
X = np.ones((2, 4), "float32")
MIXED = {
    "backend_of": lambda: backend_of(X, foreign(X)),
    "operation": lambda: project(X, foreign(PARAMS[0].weight)),
    "input": lambda: mlp.forward(foreign(X), PARAMS, V, CONFIG),
    "weight": lambda: linear_forward(X, tree_map(foreign, PARAMS[0])),
    "bias": lambda: linear_forward(X, PARAMS[0]._replace(bias=foreign(PARAMS[0].bias))),
    "output layer": lambda: mlp.forward(X, (PARAMS[0], tree_map(foreign, PARAMS[1])), V,
                                        CONFIG),
    "routing": lambda: mlp.forward(X, PARAMS, tree_map(foreign, V), CONFIG),
    "labels": lambda: softmax_cross_entropy_forward(X, foreign(np.zeros(2, int))),
    "target": lambda: mean_squared_error_forward(X, foreign(X)),
    "flat buffer": lambda: flatten((X, foreign(X))),
    "names": lambda: mlp_from_torch(
        mlp_to_torch(PARAMS, V) | {"fc1.bias": foreign(PARAMS[0].bias)}, CONFIG),
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_mixed_backends_are_refused(mixed):
    with pytest.raises(BackendError, match=r"two backends are mixed \(foreign and numpy\): bring"):
        mixed()


def test_errors_of_backends_are_meant_for_users():
    assert issubclass(BackendError, UserError) and issubclass(base.OutOfMemory, BackendError)


def test_what_is_no_array_is_refused():
    for thing, kind in ([1.0], "builtins.list"), (None, "builtins.NoneType"), (1.0, "builtins.flo"):
        with pytest.raises(BackendError, match=rf"expected a numpy\.ndarray .* got {kind}"):
            backend_of(thing)


def test_unknown_names():
    with pytest.raises(BackendError, match='unknown backend "nunpy": use "numpy"'):
        get_backend("nunpy")


def test_the_numpy_backend():
    a = np.linspace(-2, 2, 5)
    assert NUMPY.xp is np
    assert NUMPY.asarray(a) is a
    assert NUMPY.asarray([1, 2], dtype="float32").dtype == "float32"
    assert NUMPY.to_host(a) is a
    np.testing.assert_array_equal(NUMPY.erf(a), erf(a))
    assert NUMPY.synchronize() is None and not NUMPY.waits
    with NUMPY.own_stream():
        assert NUMPY.capture(len) is len
    described = NUMPY.describe()
    assert described["backend"] == "numpy"
    assert described["threads"] == threads() >= 1
    assert described["numpy"] == np.__version__


# --- blocks over threads ------------------------------------------------------------------------


@pytest.fixture
def two_threads(monkeypatch):
    """Use two threads, whatever the machine has."""
    monkeypatch.setattr(cpu, "threads", lambda: 2)
    cpu._pool.cache_clear()
    yield
    cpu._pool().shutdown()
    cpu._pool.cache_clear()


@pytest.mark.parametrize(("length", "row_elements"), [
    (0, 10), (1, 1), (BLOCK, 1), (BLOCK + 1, 1), (8 * BLOCK + 1, 1), (100, BLOCK + 1), (7, 0),
    (20 * BLOCK + 3, 3)])
def test_blocks_cover_every_row_once(length, row_elements, two_threads):
    seen = np.zeros(length, int)

    def work(block):
        assert (block.stop - block.start) * row_elements <= BLOCK or block.stop - block.start == 1
        seen[block] += 1

    over_blocks(work, length, row_elements)
    np.testing.assert_array_equal(seen, 1)


def test_many_blocks_are_shared_and_few_are_not(two_threads):
    meeting = threading.Barrier(2, timeout=10)
    met = []

    def meet(block):
        if block.start < 2 * BLOCK:  # each thread takes one of the first two blocks
            meeting.wait()
            met.append(threading.get_ident())

    over_blocks(meet, 8 * BLOCK)
    assert len(set(met)) == 2
    workers = set()
    over_blocks(lambda block: workers.add(threading.get_ident()), 7 * BLOCK)
    assert workers == {threading.get_ident()}


def test_numbers_that_are_not_finite_are_met_in_every_thread_as_in_the_first(two_threads):
    """Where a gradient overflows, and its step is left out, nobody is warned."""
    meeting, sums = threading.Barrier(2, timeout=10), []

    def work(block):
        if block.start < 2 * BLOCK:
            meeting.wait()
            sums.append(np.full(2, np.inf) - np.inf)

    with np.errstate(invalid="ignore"):
        over_blocks(work, 8 * BLOCK)
    with pytest.raises(RuntimeWarning, match="invalid value"):
        over_blocks(work, 8 * BLOCK)
    assert len(sums) == 2


@pytest.mark.parametrize("length", [0, 7, 8 * BLOCK + 1])
def test_a_buffer_is_cleared_whole(length, two_threads):
    ones = np.ones(length + 2, "float32")
    get_backend("numpy").clear(ones[1:-1])
    np.testing.assert_array_equal(ones, [1, *np.zeros(length), 1])


@pytest.mark.parametrize("failing", [0, 5])
def test_an_error_in_a_block_is_raised(failing, two_threads):
    def work(block):
        if block.start == failing * BLOCK:
            raise ValueError("in a block")

    with pytest.raises(ValueError, match="in a block"):
        over_blocks(work, 10 * BLOCK)


@pytest.mark.parametrize(("told", "expected"), [
    ("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: P 9\nflags\t\t: fpu avx512f\n\nmodel\t: 1\n",
     ("P 9", "family 25, model 17, with AVX-512")),
    ("cpu family\t: 6\nmodel\t: 85\nmodel name\t: P 9\nflags\t: avx2\n",
     ("P 9", "family 6, model 85, without AVX-512")),
    ("processor\t: 0\nBogoMIPS\t: 50.00\n\n",
     (platform.processor() or platform.machine(), "unknown"))])
def test_the_kind_of_processor(told, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(cpu, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu, "_cpuinfo", cpu._cpuinfo.__wrapped__)
    assert (cpu.processor(), cpu.kind()) == expected


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("0", None), ("many", None)])
def test_the_number_of_threads(value, expected, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads.__wrapped__() == (expected or usable)


def run(program, **environment):
    """Run a Python program in the checkout and return what it printed."""
    return subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=ROOT, text=True,
                          env={**os.environ, **environment}, check=True, timeout=60,
                          capture_output=True).stdout.strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_has_threads_of_its_own():
    """The threads of a pool do not survive a fork: work given to them would never be done."""
    assert run("""if True:
        import os, signal, warnings
        import numpy as np
        from comet_np import kwta_mask
        scores = np.random.default_rng(0).normal(size=(2000, 1000))
        expected = kwta_mask(scores, 500)
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking with threads
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if (kwta_mask(scores, 500) == expected).all() else 1)
        print(os.waitpid(child, 0)[1])
        """, OMP_NUM_THREADS="2") == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is one of glibc")
def test_freed_memory_is_kept():
    """Arrays of a second step land on pages that are there already."""
    assert run("""if True:
        import resource
        import numpy as np
        from comet_np.backends.cpu import keep_freed_memory
        keep_freed_memory()
        def step():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.ones(1 << 24)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        step()
        print(step() < 100)
        """) == "True"


def test_importing_it_as_backends_is_refused():
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import backends"
    result = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True,
                            timeout=60)
    assert result.returncode == 1
    assert re.search(r'ImportError: import this package as "comet_np\.backends", not as "backends"',
                     result.stderr)
