"""Matrix products, and work as one CUDA graph: its replays, and the same results."""

import ctypes
import importlib.util
import re
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import BackendError, cublas, get_backend
from comet_np.backends.cublas import Cublas
from comet_np.functional.activations import activation
from comet_np.functional.dropout import dropout_forward
from comet_np.functional.hidden import hidden_forward
from comet_np.functional.linear import Linear, project
from comet_np.precision import rounded
from comet_np.rng import key
from comet_np.samples import formats

from ..tolerances import assert_close
from .strict_cupy import StrictError, stands_for

# --- products -----------------------------------------------------------------------------------


def operands(gpu, matrix):
    """Return arrays of these values: rows or columns whole, with gaps between them and within."""
    columns = gpu.asarray(np.ascontiguousarray(matrix.swapaxes(-1, -2))).swapaxes(-1, -2)
    padded = gpu.asarray(np.concatenate([matrix, matrix], axis=-1))[..., :matrix.shape[-1]]
    apart = gpu.asarray(matrix.repeat(2, axis=-1))[..., ::2]
    below = gpu.asarray(np.concatenate([matrix, matrix], axis=-2).swapaxes(-1, -2).copy())
    return (gpu.asarray(matrix), columns, padded, apart,
            below.swapaxes(-1, -2)[..., :matrix.shape[-2], :])


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
        for i, (a, b, beta) in enumerate(cases):
            multiply(a, b, outs[i], beta)

    work, results = gpu.capture(work), []
    for _ in ("ordinary", "captured"):
        outs.fill(1)
        work()
        results.append(gpu.to_host(outs))
    np.testing.assert_array_equal(*results)
    for (*_, beta), out in zip(cases, results[0], strict=True):
        assert_close(out, left @ right + beta, "sum")


def test_a_matrix_serves_all_products(gpu):
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    out = gpu.asarray(np.zeros((3, 4, 4)))
    Cublas(gpu.xp).gemm(gpu.asarray(a[0]), gpu.asarray(b), out, 0.0)
    assert_close(gpu.to_host(out), a[0] @ b, "sum")


def assert_rounded(gpu, ours, rounds, whole, compute):
    """Assert that a product is the one of rounded operands, and not that of whole ones."""
    if compute == "tf32" and not stands_for(gpu):  # who knows how cuBLAS rounds a tie
        error = np.abs(ours - whole).max() / np.abs(whole).max()
        assert 0 < error < 2**-10
    else:
        assert_close(ours, rounds, "sum")
        assert np.abs(ours - whole).max() / np.abs(whole).max() > 1e-5


@pytest.mark.parametrize("compute", formats())
@pytest.mark.parametrize("S", [(), (3,)])
def test_operands_are_read_in_a_format(gpu, S, compute):
    """Sums still are of float32, and the next product is whole again, in and outside a graph."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, *S, 64, 64)).astype("float32")
    out, whole = (gpu.xp.empty(a.shape, dtype="float32") for _ in range(2))
    left, right, multiply = gpu.asarray(a), gpu.asarray(b), Cublas(gpu.xp).gemm

    def work():
        multiply(left, right.swapaxes(-1, -2), out, 0.0, compute)
        multiply(left, right.swapaxes(-1, -2), whole, 0.0)

    captured = gpu.capture(work)
    for _ in ("ordinary", "captured"):
        captured()
        exact = gpu.to_host(whole)
        assert_close(exact, a.astype("d") @ b.astype("d").swapaxes(-1, -2), "sum")
        left_read, right_read = (rounded(one, compute).astype("d") for one in (a, b))
        expected = left_read @ right_read.swapaxes(-1, -2)
        assert_rounded(gpu, gpu.to_host(out), expected, exact, compute)


@pytest.mark.parametrize("compute", formats())
def test_a_hidden_layer_in_a_format_is_that_of_its_body(gpu, compute):
    rng, f = np.random.default_rng(0), activation("softplus")
    x, W = rng.normal(size=(2, 64, 64)).astype("float32")
    b, m = rng.normal(size=64).astype("float32"), rng.random((64, 64)) < 0.5
    h, cache = hidden_forward(gpu.asarray(x), Linear(gpu.asarray(W), gpu.asarray(b)),
                              gpu.asarray(m), f, compute)
    rounds, whole = (hidden_forward.body(x, Linear(W, b), m, f, how) for how in (compute, None))
    assert_rounded(gpu, gpu.to_host(h), rounds[0], whole[0], compute)
    assert_rounded(gpu, gpu.to_host(cache.a), rounds[1].a, whole[1].a, compute)


def test_bfloat16_without_its_package_says_what_to_install(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    gpu = get_backend("cupy")
    x = gpu.asarray(np.ones((2, 2), "float32"))
    with pytest.raises(BackendError, match="python -m pip install ml_dtypes"):
        Cublas(gpu.xp).gemm(x, x, x, 0.0, "bfloat16")


# --- graphs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_captured_dropout_draws_anew_at_every_step(gpu, dtype):
    x, name = np.ones((3, 45), dtype), key(0, "test graph")
    on_device, step = gpu.asarray(x), gpu.asarray(np.array(0))

    def work():
        y, _ = dropout_forward(on_device, 0.3, name, step)
        gpu.xp.add(step, 1, out=step)
        return y

    captured, seen = gpu.capture(work), set()
    for i in range(5):
        y = gpu.to_host(captured())
        np.testing.assert_array_equal(y, dropout_forward(x, 0.3, name, i)[0])
        seen.add(y.tobytes())
    assert len(seen) == 5


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


def test_a_step_that_cannot_be_captured_says_why_and_leaves_the_backend_usable(machine):
    gpu = get_backend("cupy")
    x, W = gpu.asarray(np.ones((2, 3))), gpu.asarray(np.ones((4, 3)))
    work = gpu.capture(lambda: float(project(x, W).sum()))
    assert work() == 24
    with pytest.raises(StrictError, match=r"float\(\) makes the host wait"):
        work()
    np.testing.assert_array_equal(gpu.to_host(project(x, W)), np.full((2, 4), 3))


def test_a_failing_product_says_so(machine):
    gpu = get_backend("cupy")
    x = gpu.asarray(np.ones((2, 2)))
    with pytest.raises(BackendError, match="cublasGemmEx of cuBLAS failed with status 7"):
        Cublas(gpu.xp).gemm(x[:0], x, x[:0], 0.0)


# --- the binding --------------------------------------------------------------------------------


def header(name):
    """Return the text of a header of CUDA from NVIDIA's wheels, or skip the test."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    found = [file for folder in folders for file in folder.glob(f"*/include/{name}")]
    if not found:
        pytest.skip(f"needs {name}: pip install nvidia-cublas nvidia-cuda-runtime")
    return found[0].read_text()


def test_the_binding_fits_the_header():
    text = header("cublas_api.h")
    for name, parameters in cublas.FUNCTIONS.items():
        declared = re.search(rf"cublasStatus_t CUBLASWINAPI\s+{name}\((.*?)\);", text, re.DOTALL)[1]
        theirs = ["pointer" if re.search(r"\*|Handle_t|Stream_t", parameter) else
                  "size_t" if "size_t" in parameter else "long" if "long" in parameter else "int"
                  for parameter in declared.split(",")]
        names = {ctypes.c_int: "int", ctypes.c_size_t: "size_t", ctypes.c_longlong: "long"}
        ours = [names.get(argument, "pointer") for argument in parameters]
        assert ours == theirs, name


WHOLE, DOUBLE, TF32, HALF, BRAIN = (cublas.FORMATS[key] for key in (
    ("f", None), ("d", None), ("f", "tf32"), ("f", "float16"), ("f", "bfloat16")))
CODES = {
    "library_types.h": {"CUDA_R_32F": WHOLE.operands, "CUDA_R_64F": DOUBLE.operands,
                        "CUDA_R_16F": HALF.operands, "CUDA_R_16BF": BRAIN.operands},
    "cublas_api.h": {"CUBLAS_COMPUTE_32F": WHOLE.sums, "CUBLAS_COMPUTE_64F": DOUBLE.sums,
                     "CUBLAS_COMPUTE_32F_FAST_TF32": TF32.sums, "CUBLAS_OP_N": cublas.NO_TRANSPOSE,
                     "CUBLAS_OP_T": cublas.TRANSPOSE, "CUBLAS_GEMM_DEFAULT": cublas.HEURISTIC,
                     "CUBLAS_STATUS_NOT_INITIALIZED": cublas.NO_MEMORY[0],
                     "CUBLAS_STATUS_ALLOC_FAILED": cublas.NO_MEMORY[1]},
}


@pytest.mark.parametrize("name", CODES)
def test_the_codes_are_those_of_the_header(name):
    text = header(name)
    for constant, code in CODES[name].items():
        assert re.search(rf"\b{constant}\s*=\s*(-?\d+)", text)[1] == str(code)
    assert {WHOLE.operands} == {code.result for code in (WHOLE, TF32, HALF, BRAIN)}
    assert {WHOLE.sums} == {code.sums for code in (WHOLE, HALF, BRAIN)}
