"""A whole training step as one CUDA graph: its products, its replays, and the same results."""

import ctypes
import importlib.util
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import BackendError, cuda_graph, get_backend
from comet_np.backends.device_steps import DeviceSteps
from comet_np.experiments.training import Learner, Split, TrainConfig
from comet_np.schedules import schedule

from ..tolerances import assert_close
from .strict_cupy import StrictError
from .test_cuda_backend import MODEL, OPTIMIZERS, small_data

STEPS, BATCH = 6, 8


def operands(gpu, matrix):
    """Yield every (trans, a) with op(a) = matrix: row-major, column-major, and their transposes."""
    rows, columns = gpu.asarray(matrix), gpu.asarray(np.ascontiguousarray(matrix.T))
    return ("N", rows), ("N", columns.T), ("T", columns), ("T", rows.T)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("m", "k", "n"), [(3, 5, 4), (1, 1, 1), (1, 6, 2), (7, 1, 1), (4, 3, 1)])
def test_captured_products_are_those_of_cublas(gpu, m, k, n, dtype):
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=shape).astype(dtype) for shape in ((m, k), (k, n)))
    out = gpu.asarray(np.zeros((m, n), dtype))
    for (trans_a, a), (trans_b, b), beta in product(operands(gpu, left), operands(gpu, right),
                                                    (0.0, 1.0)):
        def multiply(trans_a=trans_a, trans_b=trans_b, a=a, b=b, beta=beta):
            gpu.gemm(trans_a, trans_b, a, b, out=out, alpha=0.5, beta=beta)

        work = gpu.capture(multiply)
        for _ in ("ordinary", "captured"):
            out.fill(1)
            work()
            assert_close(gpu.to_host(out), 0.5 * (left @ right) + beta, "sum")


@pytest.mark.parametrize("what", ["operand", "result", "dtype"])
def test_a_captured_product_refuses_other_layouts(gpu, what):
    xp = gpu.xp
    dtype = "complex128" if what == "dtype" else "float64"
    a = xp.ones((4, 8), dtype=dtype)[:, ::2] if what == "operand" else xp.ones((4, 4), dtype=dtype)
    dW = xp.ones((4, 4), dtype=dtype)
    work = gpu.capture(lambda: gpu.kernels["accumulate_outer"](
        a, a, dW.T if what == "result" else dW))
    work()
    with pytest.raises(BackendError, match="a captured matrix product"):
        work()


class Run:
    """A learner stepped by `DeviceSteps`; `python` counts how often Python ran the step."""

    def __init__(self, backend, config, task):
        data = small_data(task)
        self.backend, self.python = backend, 0
        self.learner = Learner(config, task, backend)
        self.split = Split(data.x_train, data.y_train, data, config, backend, self.learner.routing)
        self.steps = DeviceSteps(backend, self.step, STEPS, BATCH, config.dtype)

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
            order = np.random.default_rng(epoch).permutation(STEPS * BATCH)
            rates = [0.1 * schedule("cosine", epoch * STEPS + i, 2 * STEPS) for i in range(STEPS)]
            self.steps.begin(order, np.array(rates), epoch * STEPS)
            for _ in range(STEPS):
                self.steps.run()
            losses.append(self.steps.losses(STEPS))
        state = (self.learner.flat, self.learner.state.first, self.learner.state.second)
        return [*losses, *(self.backend.to_host(a) for a in state if a is not None)]


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_captured_training_equals_numpy(gpu, name, task):
    config = TrainConfig(MODEL, OPTIMIZERS[name], dtype="float64")
    captured, numpys = Run(gpu, config, task), Run(get_backend("numpy"), config, task)
    for ours, theirs in zip(captured.train(), numpys.train(), strict=True):
        assert_close(ours, theirs, "training")
    assert captured.python == 2  # once as it is, once recorded


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
    cublas = cuda_graph.Cublas(gpu.xp, gpu.xp.cuda.Stream(null=True))
    x = gpu.asarray(np.ones((2, 2)))
    with pytest.raises(BackendError, match="cublasDgemm_v2 of cuBLAS failed with status 1"):
        cublas.gemm("N", "N", x, x, x, 1.0, 0.0)


def header():
    """Return the header of cuBLAS from the wheel `nvidia-cublas`, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    return next((file for folder in folders for file in folder.glob("*/include/cublas_api.h")),
                None)


@pytest.mark.skipif(header() is None, reason="needs the header: pip install nvidia-cublas")
def test_the_binding_fits_the_header():
    text = header().read_text()
    for name, parameters in cuda_graph.FUNCTIONS.items():
        declared = re.search(rf"cublasStatus_t CUBLASWINAPI {name}\((.*?)\);", text, re.DOTALL)[1]
        theirs = ["pointer" if re.search(r"\*|Handle_t|Stream_t", parameter) else
                  "size_t" if "size_t" in parameter else "int" for parameter in declared.split(",")]
        ours = [{ctypes.c_int: "int", ctypes.c_size_t: "size_t"}.get(argument, "pointer")
                for argument in parameters]
        assert ours == theirs, name
