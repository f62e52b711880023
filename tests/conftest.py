"""What all tests share."""

import gc
import os
from contextlib import nullcontext

import pytest

# The tests' products are small, and so few cores are shared by several of them: threads of
# OpenBLAS, which reads this when NumPy is imported, would spin and wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from comet_np.backends import reference
from comet_np.experiments import figures
from comet_np.experiments.training import examples, loop
from comet_np.rng import stream


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Let a worker of pytest-xdist that has nothing left take tests from another."""
    if getattr(config.option, "dist", "no") == "load":  # what -n chooses
        config.option.dist = "worksteal"


def pytest_collection_finish():
    """Spare the garbage collector what lives to the end: modules (of PyTorch, of JAX) and tests.

    A search for cycles would take a third of a second, and each cell of a sweep asks for one.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep streams of tokens out of the home folder, in one that all workers of xdist share."""
    folder = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMET_CACHE", str(
            (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"))
        yield


@pytest.fixture
def draw(request):
    """Return a random stream of the test's own, so that a new test does not move its neighbours."""
    return stream(0, request.node.name)


@pytest.fixture
def bodies_or_kernels(request):
    """Turn kernels off for the tests that are asked for bodies."""
    callspec = getattr(request.node, "callspec", None)
    kernels = callspec is None or callspec.params.get("kernels", True)
    with nullcontext() if kernels else reference():
        yield


@pytest.fixture
def small_blocks(monkeypatch):
    """Let no block divide a set of `runs` that is evaluated, and no group of steps an epoch."""
    monkeypatch.setattr(examples, "BLOCK", 7)
    monkeypatch.setattr(loop, "STEPS_AHEAD", 3)


@pytest.fixture
def saved(monkeypatch):
    """Return the figures that are saved."""
    plt = pytest.importorskip("matplotlib.pyplot")
    saved = []
    monkeypatch.setattr(figures, "save", lambda figure, file: saved.append(figure) or file)
    yield saved
    for figure in saved:
        plt.close(figure)
