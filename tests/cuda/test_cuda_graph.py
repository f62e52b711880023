"""A whole training step as one CUDA graph: its products, its replays, and the same results."""

import ctypes
import importlib.util
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import BackendError, cublas, get_backend
from comet_np.backends.cublas import Cublas
from comet_np.backends.device_steps import DeviceSteps
from comet_np.experiments.training import Learner, Split, TrainConfig
from comet_np.schedules import schedule

from ..tolerances import assert_close
from .strict_cupy import StrictError
from .test_cuda_backend import MODEL, OPTIMIZERS, small_data

STEPS, BATCH = 6, 8


def operands(gpu, matrix):
    """Yield every (trans, a) with op(a) = matrix: rows, columns, transposes, and with gaps."""
    def swapped(a):
        return a.swapaxes(-1, -2)

    rows, columns = gpu.asarray(matrix), gpu.asarray(np.ascontiguousarray(swapped(matrix)))
    padded = gpu.asarray(np.concatenate([matrix, matrix], axis=-1))[..., :matrix.shape[-1]]
    apart = gpu.asarray(matrix.repeat(2, axis=-1))[..., ::2]
    return ((False, rows), (False, swapped(columns)), (True, columns), (True, swapped(rows)),
            (False, padded), (True, swapped(padded)), (False, apart))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("S", [(), (3,)])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 5, 4), (1, 1, 1), (1, 6, 2), (7, 1, 1), (4, 3, 1)])
def test_products_in_and_outside_a_graph(gpu, S, m, k, n, dtype):
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=(*S, *shape)).astype(dtype) for shape in ((m, k), (k, n)))
    cases = list(product(operands(gpu, left), operands(gpu, right), (0.0, 1.0)))
    outs = gpu.xp.ones((len(cases), *S, m, n), dtype=dtype)
    multiply = Cublas(gpu.xp).gemm

    def work():
        for i, ((trans_a, a), (trans_b, b), beta) in enumerate(cases):
            multiply(trans_a, trans_b, a, b, outs[i], beta, False)

    work, results = gpu.capture(work), []
    for _ in ("ordinary", "captured"):
        outs.fill(1)
        work()
        results.append(gpu.to_host(outs))
    np.testing.assert_array_equal(*results)
    for (*_, beta), out in zip(cases, results[0], strict=True):
        assert_close(out, left @ right + beta, "sum")


def test_a_matrix_serves_all_networks(gpu):
    x, W = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    ours = gpu.kernels["project"](gpu.asarray(x[0]), gpu.asarray(W))
    assert_close(gpu.to_host(ours), x[0] @ W.swapaxes(1, 2), "sum")


def test_tf32_reads_ten_bits_of_the_operands(gpu):
    """1 + 2^-11 has one bit too many for TF32; sums still are those of float32."""
    x = gpu.asarray(np.full((256, 256), 1 + 2**-11, "float32"))
    W = gpu.asarray(np.full((256, 256), 1 + 2**-10, "float32"))
    exact, rounded = (gpu.to_host(gpu.kernels["project"](x, W, tf32)) for tf32 in (False, True))
    assert_close(exact, np.full((256, 256), 256 * (1 + 2**-10) * (1 + 2**-11)), "sum")
    assert (np.abs(rounded - exact) > 256 * 2**-12).all()
    np.testing.assert_array_equal(gpu.to_host(gpu.kernels["project"](x, W)), exact)  # off again
    with pytest.raises(BackendError, match="one dtype of float32, got float64"):
        gpu.kernels["project"](x.astype("float64"), W.astype("float64"), True)


class Run:
    """A learner stepped by `DeviceSteps`; `python` counts how often Python ran the step."""

    def __init__(self, backend, config, task):
        data = small_data(task)
        self.backend, self.python = backend, 0
        self.learner = Learner(config, task, backend)
        self.split = Split(data.x_train, data.y_train, data, config, backend, self.learner.routing)
        self.steps = DeviceSteps(backend, self.step, STEPS, BATCH, 1,
                                 self.learner.precision.accumulate)

    def step(self, rows, lr, done):
        x, y, masks = self.split.batch(rows)
        learner, state = self.learner, self.learner.state
        learner.state = state._replace(step=done)
        loss = learner.step(x, y, lr, masks)
        learner.state = state
        self.python += 1
        return loss

    def train(self):
        """Take two epochs of steps; return the losses, the parameters and the moments."""
        losses = []
        for epoch in range(2):
            plan = np.random.default_rng(epoch).permutation(STEPS * BATCH).reshape(STEPS, BATCH)
            rates = [0.1 * schedule("cosine", epoch * STEPS + i, 2 * STEPS) for i in range(STEPS)]
            self.steps.begin(plan, np.array(rates), epoch * STEPS)
            for _ in range(STEPS):
                self.steps.run()
            losses.append(self.steps.losses(STEPS))
        state = (self.learner.flat, self.learner.state.first, self.learner.state.second)
        return [*losses, *(self.backend.to_host(a) for a in state if a is not None)]


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_captured_training_equals_numpy(gpu, name, task):
    config = TrainConfig(MODEL, OPTIMIZERS[name], precision="float64")
    captured, numpys = Run(gpu, config, task), Run(get_backend("numpy"), config, task)
    for ours, theirs in zip(captured.train(), numpys.train(), strict=True):
        assert_close(ours, theirs, "training")
    assert captured.python == 2  # once as it is, once recorded


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_without_graphs_is_bit_for_bit_the_same(gpu, monkeypatch, name):
    results = []
    for graphs in ("1", "0"):
        monkeypatch.setenv("COMET_NP_GRAPHS", graphs)
        results.append(Run(gpu, TrainConfig(MODEL, OPTIMIZERS[name]), "classification").train())
    for captured, ordinary in zip(*results, strict=True):
        np.testing.assert_array_equal(captured, ordinary)


def test_a_graph_gives_its_memory_back(machine):
    gpu = get_backend("cupy")
    x = gpu.asarray(np.ones(3))
    work = gpu.capture(lambda: x + 1)
    work()
    shared = gpu.xp.get_default_memory_pool()
    assert shared not in machine.freed
    work()
    assert machine.freed[-1] is shared  # of what the first call left there
    pool = work._pool
    del work
    assert machine.freed[-1] is pool


def test_captured_training_in_float32(gpu):
    config = TrainConfig(MODEL, OPTIMIZERS["adam"])
    for ours, theirs in zip(Run(gpu, config, "regression").train(),
                            Run(get_backend("numpy"), config, "regression").train(), strict=True):
        assert_close(ours, theirs, "sum")


def test_a_step_that_cannot_be_captured_says_why_and_leaves_the_backend_usable(machine):
    gpu = get_backend("cupy")
    x, W = gpu.asarray(np.ones((2, 3))), gpu.asarray(np.ones((4, 3)))
    work = gpu.capture(lambda: float(gpu.kernels["project"](x, W).sum()))
    assert work() == 24
    with pytest.raises(StrictError, match=r"float\(\) makes the host wait"):
        work()
    np.testing.assert_array_equal(gpu.to_host(gpu.kernels["project"](x, W)), np.full((2, 4), 3))


def test_a_failing_product_says_so(machine):
    gpu = get_backend("cupy")
    x = gpu.asarray(np.ones((2, 2)))
    with pytest.raises(BackendError, match="cublasDgemm_v2 of cuBLAS failed with status 1"):
        Cublas(gpu.xp).gemm(False, False, x[:0], x, x[:0], 0.0, False)


def header():
    """Return the header of cuBLAS from the wheel `nvidia-cublas`, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    return next((file for folder in folders for file in folder.glob("*/include/cublas_api.h")),
                None)


@pytest.mark.skipif(header() is None, reason="needs the header: pip install nvidia-cublas")
def test_the_binding_fits_the_header():
    text = header().read_text()
    for name, parameters in cublas.FUNCTIONS.items():
        declared = re.search(rf"cublasStatus_t CUBLASWINAPI {name}\((.*?)\);", text, re.DOTALL)[1]
        theirs = ["pointer" if re.search(r"\*|Handle_t|Stream_t", parameter) else
                  "size_t" if "size_t" in parameter else "long" if "long" in parameter else "int"
                  for parameter in declared.split(",")]
        names = {ctypes.c_int: "int", ctypes.c_size_t: "size_t", ctypes.c_longlong: "long"}
        ours = [names.get(argument, "pointer") for argument in parameters]
        assert ours == theirs, name
