"""The CuPy backend as a whole: its errors in one sentence, arrays, threads beside each other."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from comet_np import kwta_mask
from comet_np.backends import BackendError, OutOfMemory, get_backend
from comet_np.errors import UserError
from comet_np.functional.linear import project
from comet_np.gates import Comet
from comet_np.models import mlp
from comet_np.tree import tree_map

from ..tolerances import assert_close
from . import strict_cupy as strict_cupy_module
from .conftest import real_gpu
from .strict_cupy import strict_cupy

# --- errors -------------------------------------------------------------------------------------

MACHINES = {
    "no driver": ({"driver": 0}, r"no usable NVIDIA driver .*ubuntu-drivers install"),
    "old driver": ({"driver": 12040},
                   r'for CUDA 13, but .* CUDA 12: .*pip install "cupy-cuda12x\[ctk'),
    "a very old driver": ({"driver": 11080}, "supports CUDA 11, and CuPy needs 12 or newer"),
    "no GPU": ({"devices": 0}, "CUDA sees no GPU: check nvidia-smi"),
}


@pytest.mark.parametrize("what", MACHINES)
def test_a_missing_gpu_is_said_in_one_sentence(what):
    settings, message = MACHINES[what]
    with strict_cupy(**settings), pytest.raises(BackendError, match=message):
        get_backend("cupy")


@pytest.mark.parametrize(("missing", "message"), [
    ("cupy", r'needs CuPy: python -m pip install "cupy-cuda13x\[ctk\]"'),
    ("cupy.cublas", r'cannot load a library of CUDA .*pip install "cupy-cuda13x\[ctk\]"')])
def test_a_missing_package_is_said_with_its_command(monkeypatch, missing, message):
    with strict_cupy(), monkeypatch.context() as patch:
        patch.setitem(sys.modules, missing, None)
        with pytest.raises(BackendError, match=message):
            get_backend("cupy")


def test_memory_that_cublas_lacks_is_too_little_memory(machine, monkeypatch):
    monkeypatch.setattr(strict_cupy_module, "CUBLAS_MEMORY", 2**40)
    gpu = get_backend("cupy")
    x = gpu.asarray(np.ones((2, 2)))
    with pytest.raises(OutOfMemory, match=r"cublasCreate_v2 .* status 1"), gpu.memory_explained():
        project(x, x)


@pytest.mark.parametrize("B", [1, 3])
def test_the_winners_alone_are_computed(gpu, B):
    config = mlp.MLPConfig((12, 40, 30, 4), gate=Comet(0.2))
    params, fixed = mlp.init(config)
    x = np.random.default_rng(0).standard_normal((B, 12), dtype="float32")
    got = mlp.infer(*(tree_map(gpu.asarray, each) for each in (x, params, fixed)), config)
    assert_close(gpu.to_host(got), mlp.forward(x, params, fixed, config)[0], "sum")


def test_describe(gpu):
    assert {"backend", "device", "memory", "driver", "cuda", "cupy"} <= set(gpu.describe())


def test_arrays_go_and_come_back(gpu):
    for values in (np.arange(6.0).reshape(2, 3).T, [1, 2], 3.5):
        array = gpu.asarray(values)
        assert isinstance(array, gpu.xp.ndarray)
        np.testing.assert_array_equal(gpu.to_host(array), values)
    assert gpu.asarray([1, 2], dtype="float32").dtype == "float32"
    gpu.synchronize()


@pytest.mark.parametrize(("required", "outcome"), [("0", pytest.skip), ("1", pytest.fail)])
def test_a_switch_requires_a_gpu(monkeypatch, required, outcome):
    monkeypatch.setenv("COMET_NP_REQUIRE_GPU", required)
    with strict_cupy(devices=0), pytest.raises(outcome.Exception, match="CUDA sees no GPU"):
        real_gpu()


# --- threads, each with a stream of its own -----------------------------------------------------


def in_two_threads(work):
    """Return what ``work(0)`` and ``work(1)`` return, run beside each other."""
    with ThreadPoolExecutor(2) as pool:
        return [done.result() for done in [pool.submit(work, i) for i in range(2)]]


def nan_scores(gpu):
    scores = np.ones((2, 9))
    scores[1, 4] = np.nan
    return gpu.asarray(scores)


def test_threads_have_streams_handles_and_error_buffers_of_their_own(gpu):
    meeting = threading.Barrier(2, timeout=60)
    x, W = np.random.default_rng(0).normal(size=(2, 4, 5))
    on_device = gpu.asarray(x), gpu.asarray(W)  # made on the stream that all share

    def work(i):
        with gpu.own_stream():
            product, mine = project(*on_device), gpu.cuda.mine
            meeting.wait()
            return product, (gpu.xp.cuda.get_current_stream().ptr, mine.cublas._handle.value,
                             mine.cublas._workspace.data.ptr, mine.errors.data.ptr)

    (first, ours), (second, theirs) = in_two_threads(work)
    assert all(a != b for a, b in zip(ours, theirs, strict=True))
    assert gpu.xp.cuda.get_current_stream().ptr not in (ours[0], theirs[0])
    for product in first, second:  # read by a third thread
        assert_close(gpu.to_host(product), x @ W.T, "sum")


def test_a_thread_is_not_told_of_the_nan_of_another(gpu):
    meeting = threading.Barrier(2, timeout=60)

    def work(i):
        with gpu.own_stream():
            scores = nan_scores(gpu) if i == 0 else gpu.asarray(np.ones((2, 9)))
            kwta_mask(scores, 3)
            meeting.wait()
            if i == 1:
                gpu.check_errors()
            meeting.wait()
            try:
                gpu.check_errors()
            except UserError as error:
                return str(error)
            return ""

    told, not_told = in_two_threads(work)
    assert "score 4 of example 1 is NaN" in told and not_told == ""
    gpu.check_errors()


def test_what_went_wrong_on_a_stream_is_told_at_its_end_or_never(gpu):
    with pytest.raises(UserError, match="score 4 of example 1 is NaN"), gpu.own_stream():
        kwta_mask(nan_scores(gpu), 3)
    with pytest.raises(ZeroDivisionError), gpu.own_stream():
        kwta_mask(nan_scores(gpu), 3)
        raise ZeroDivisionError
    with gpu.own_stream():
        gpu.check_errors()


def test_graphs_are_captured_in_two_threads(gpu):
    meeting = threading.Barrier(2, timeout=60)
    x, W = np.random.default_rng(0).normal(size=(2, 4, 5))
    recording, most = 0, 0

    def work(i):
        nonlocal recording, most
        with gpu.own_stream():
            stream = gpu.xp.cuda.get_current_stream().ptr
            on_device, total = gpu.asarray((1 + i) * x), gpu.asarray(np.zeros((4, 4)))

            def step():
                nonlocal recording, most
                captured = gpu.xp.cuda.get_current_stream().ptr != stream
                recording += captured
                most = max(most, recording)
                time.sleep(0.1)  # so that the other would come in between
                gpu.xp.add(total, project(on_device, weights), out=total)
                recording -= captured

            weights = gpu.asarray(W)
            captured = gpu.capture(step)
            for _ in range(6):
                meeting.wait()
                captured()
            return gpu.to_host(total)

    for i, total in enumerate(in_two_threads(work)):
        assert_close(total, 6 * (1 + i) * x @ W.T, "sum")
    assert most == 1
