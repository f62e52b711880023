"""The CuPy backend as a whole: its errors in one sentence, and training that equals NumPy's."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import BackendError, OutOfMemory, get_backend
from comet_np.experiments import cli, datasets, sweep
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.progress import Progress
from comet_np.experiments.training import Learner, Split, TrainConfig, Trainer
from comet_np.functional.routing import winners
from comet_np.models import mlp
from comet_np.optim import OptimizerConfig

from ..tolerances import TOLERANCES, assert_close
from . import shim
from . import strict_cupy as strict_cupy_module
from .strict_cupy import strict_cupy

# --- errors -------------------------------------------------------------------------------------

MACHINES = {
    "no driver": ({"driver": 0}, r"no usable NVIDIA driver .*ubuntu-drivers install"),
    "old driver": ({"driver": 12040},
                   r'for CUDA 13, but .* CUDA 12: .*pip install "comet-np\[cuda12'),
    "a very old driver": ({"driver": 11080}, "supports CUDA 11, and CuPy needs 12 or newer"),
    "no GPU": ({"devices": 0}, "CUDA sees no GPU: check nvidia-smi"),
}


@pytest.mark.parametrize("what", MACHINES)
def test_a_missing_gpu_is_said_in_one_sentence(what):
    settings, message = MACHINES[what]
    with strict_cupy(**settings), pytest.raises(BackendError, match=message):
        get_backend("cupy")


@pytest.mark.parametrize(("missing", "message"), [
    ("cupy", r'needs CuPy: pip install "comet-np\[cuda13\]"'),
    ("cupy.cublas", r'cannot load a library of CUDA .*pip install "cupy-cuda13x\[ctk\]"')])
def test_a_missing_package_is_said_with_its_command(monkeypatch, missing, message):
    with strict_cupy(), monkeypatch.context() as patch:
        patch.setitem(sys.modules, missing, None)
        with pytest.raises(BackendError, match=message):
            get_backend("cupy")


@pytest.mark.parametrize(("memory", "needed"), [(1100, "1,316"), (5000, "168,000"),
                                                (300_000, "33,554,432")])
def test_too_little_memory_anywhere_says_what_lowers_it(tmp_path, monkeypatch, capsys, memory,
                                                        needed):
    """The parameters, the data or the workspace of cuBLAS are the first that do not fit."""
    if shim.GXX is None:
        pytest.skip("g++ compiles the kernels for the CPU, and is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "expected_seconds", lambda *arguments: 1.0)
    command = ("run quickstart --preset smoke --backend cupy --datasets arm --epochs 1 --train 20 "
               "--widths 8 --seeds 1 --models standard")
    with strict_cupy(memory=memory):
        assert cli.main(command.split()) == 1
    assert (f"too little memory (Out of memory allocating {needed} bytes; stand-in has {memory:,} "
            "bytes): lower --widths or --batch or --train\n") in capsys.readouterr().out


def test_too_little_memory_before_the_start_is_said_too(machine):
    machine.memory = 2**20
    with pytest.raises(BackendError, match=r"too little memory .*allocating 4,194,304 bytes"):
        sweep.expected_seconds([], get_backend("cupy"))


def test_memory_that_cublas_lacks_is_too_little_memory(machine, monkeypatch):
    monkeypatch.setattr(strict_cupy_module, "CUBLAS_MEMORY", 2**40)
    gpu = get_backend("cupy")
    x = gpu.asarray(np.ones((2, 2)))
    with pytest.raises(OutOfMemory, match=r"cublasCreate_v2 .* status 1"), gpu.memory_explained():
        gpu.kernels["project"](x, x)


def test_describe(gpu):
    assert {"backend", "device", "memory", "driver", "cuda", "cupy"} <= set(gpu.describe())


def test_arrays_go_and_come_back(gpu):
    for values in (np.arange(6.0).reshape(2, 3).T, [1, 2], 3.5):
        array = gpu.asarray(values)
        assert isinstance(array, gpu.xp.ndarray)
        np.testing.assert_array_equal(gpu.to_host(array), values)
    assert gpu.asarray([1, 2], dtype="float32").dtype == "float32"
    gpu.synchronize()


# --- training -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd, the backward pass is the update": OptimizerConfig("sgd"),
    "sgd": OptimizerConfig("sgd", weight_decay=0.01, clip_value=0.5),
    "momentum": OptimizerConfig("momentum", weight_decay=0.01),
    "adam": OptimizerConfig("adam", weight_decay=0.01, clip_norm=0.1),
    "adamw": OptimizerConfig("adamw", weight_decay=0.01, clip_norm=10.0),
}
MODEL = mlp.MLPConfig((12, 30, 40, 5), p_k=0.3)


def learner_and_batches(backend, config, task="classification"):
    """Return a learner and some mini-batches on a backend."""
    learner = Learner(config, task, backend)
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(20):
        x = rng.normal(size=(8, config.model.widths[0]))
        y = (rng.integers(0, 5, 8) if task == "classification" else rng.normal(size=(8, 5)))
        dtype = learner.precision.accumulate
        batches.append((backend.asarray(x, dtype=dtype),
                        backend.asarray(y, dtype=None if y.dtype.kind == "i" else dtype)))
    return learner, batches


def train(backend, config, task="classification"):
    """Return the losses, the parameters and the masks of 20 steps."""
    learner, batches = learner_and_batches(backend, config, task)
    losses = [learner.step(x, y, 0.1) for x, y in batches]
    trace = mlp.trace(batches[0][0], learner.params, learner.routing, config.model)
    return ([float(backend.to_host(loss)) for loss in losses], backend.to_host(learner.flat),
            [(backend.to_host(m), backend.to_host(c))
             for m, c in zip(trace.m, trace.c, strict=True)])


def assert_same_masks(ours, theirs, scores, k):
    """Assert that masks (B, N) agree, but for rows whose scores leave rank k to rounding.

    Another order of summation may swap two scores that are as good as equal; such rows are named.
    """
    ordered, N = np.sort(scores, axis=-1), scores.shape[-1]
    margin = (ordered[:, N - k] - ordered[:, N - k - 1]) / np.abs(scores).max(axis=-1)
    rounding = TOLERANCES["sum"][str(scores.dtype)]
    for row in np.flatnonzero((ours != theirs).any(axis=-1)):
        assert margin[row] <= rounding, f"the masks of row {row} differ, margin {margin[row]:.1e}"
        print(f"row {row}: its mask is left to rounding, margin {margin[row]:.1e}")


def test_masks_may_differ_only_where_rounding_decides(capsys):
    scores = np.array([[3.0, 1.0, 2.0], [5.0, 1.0, 1.0 + 1e-15]])
    mask = np.array([[True, False, True], [True, False, True]])
    other = np.array([[True, False, True], [True, True, False]])
    assert_same_masks(mask, other, scores, 2)
    assert "row 1: its mask is left to rounding, margin 2" in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"row 0 differ, margin 3\.3e-01"):
        assert_same_masks(mask, ~other, scores, 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_numpy(gpu, name):
    config = TrainConfig(MODEL, OPTIMIZERS[name], precision="float64")
    losses, flat, masks = train(gpu, config)
    expected_losses, expected_flat, expected_masks = train(get_backend("numpy"), config)
    assert_close(losses, expected_losses, "training")
    assert_close(flat, expected_flat, "training")
    for (ours, _), (numpys, scores) in zip(masks, expected_masks, strict=True):
        assert_same_masks(ours, numpys, scores, winners(MODEL.p_k, scores.shape[-1]))


@pytest.mark.parametrize(("change", "task"), [
    ({"activation": "gelu", "ties": "index"}, "classification"),
    ({"p_k": None, "activation": "tanh"}, "classification"),
    ({"bias": False, "routing_activation": "relu"}, "regression"),
    ({"activation": "0.5*softplus"}, "regression")])
def test_training_of_other_models_equals_numpy(gpu, change, task):
    config = TrainConfig(replace(MODEL, **change), precision="float64")
    ours, numpys = train(gpu, config, task), train(get_backend("numpy"), config, task)
    assert_close(ours[0], numpys[0], "training")
    assert_close(ours[1], numpys[1], "training")


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step_never_waits(machine, name, task):
    gpu = get_backend("cupy")
    learner, batches = learner_and_batches(gpu, TrainConfig(MODEL, OPTIMIZERS[name]), task)
    with machine.no_waiting():
        for x, y in batches[:3]:
            learner.step(x, y, 0.1)
    gpu.check_errors()


def small_data(task):
    """Return a data set of bytes with a scale and a shift, as images are."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (3, 50, 12), dtype="uint8")
    y = rng.integers(0, 5, (3, 50)) if task == "classification" else rng.normal(size=(3, 50, 5))
    return Dataset("small", task, x[0], y[0], x[1], y[1], x[2], y[2], 5, 2 / 255, -1.0)


def learning_curve(backend, task, folder, **settings):
    """Train for two epochs, the last mini-batch of each a short one; return metrics and result."""
    config = TrainConfig(MODEL, precision="float64", epochs=2, batch=16, schedule="cosine",
                         **settings)
    result = Trainer(config, small_data(task), folder, backend, Progress(1)).run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines] + result["networks"]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_learning_curve_equals_that_of_numpy(gpu, task, seeds, tmp_path):
    ours = learning_curve(gpu, task, tmp_path / "cupy", seeds=seeds)
    numpys = learning_curve(get_backend("numpy"), task, tmp_path / "numpy", seeds=seeds)
    for mine, theirs in zip(ours, numpys, strict=True):
        assert set(mine) == set(theirs)
        for name in set(mine) - {"seconds", "last"}:
            assert_close(float(mine[name]), theirs[name], "training")


def test_augmented_training_equals_numpy(gpu, tmp_path):
    data = datasets.load("glyphs", train=24)
    config = TrainConfig(mlp.MLPConfig((3072, 12, 10), p_k=0.3), augment="crop_flip", epochs=2,
                         batch=8, precision="float64")
    results = [Trainer(config, data, tmp_path / backend.name, backend, Progress(1)).run()
               for backend in (gpu, get_backend("numpy"))]
    ours, numpys = (result["networks"][0]["last"]["train_loss"] for result in results)
    assert_close(ours, numpys, "training")


def test_tf32_changes_the_products_but_not_the_masks(gpu):
    model = replace(MODEL, widths=(256, 256, 256, 5))  # for small ones cuBLAS may not bother
    config = TrainConfig(model, precision="tf32")
    learner, batches = learner_and_batches(gpu, config)
    x = batches[0][0]
    whole, whole_cache = mlp.forward(x, learner.params, learner.routing, model)
    short, short_cache = mlp.forward(x, learner.params, learner.routing, model, tf32=True)
    difference = np.abs(gpu.to_host(whole) - gpu.to_host(short)).max()
    assert 1e-6 < difference < 1e-2
    for a, b in zip(whole_cache.masks, short_cache.masks, strict=True):
        np.testing.assert_array_equal(gpu.to_host(a), gpu.to_host(b))
    losses = [float(gpu.to_host(learner.step(x, y, 0.1))) for x, y in batches]
    assert losses == pytest.approx(train(gpu, replace(config, precision="float32"))[0], rel=1e-2)
    assert losses != train(gpu, replace(config, precision="float32"))[0]


@pytest.mark.parametrize(("graphs", "seeds"), [("1", (0,)), ("0", (0,)), ("1", (0, 1))])
def test_a_resumed_run_is_bit_for_bit_the_same(gpu, tmp_path, monkeypatch, graphs, seeds):
    """The first step after a resume runs outside a graph, and must not differ for that."""
    monkeypatch.setenv("COMET_NP_GRAPHS", graphs)
    monkeypatch.setattr(type(gpu), "losses_at_once", 2)
    config = TrainConfig(MODEL, OptimizerConfig("adam"), epochs=2, batch=8, seeds=seeds)
    whole = Trainer(config, small_data("classification"), tmp_path / "whole", gpu, Progress(1))
    whole.run()
    while True:
        part = Trainer(config, small_data("classification"), tmp_path / "parts", gpu, Progress(1))
        monkeypatch.setattr(part, "due", lambda: True)
        stop_after(part, monkeypatch, 5)
        try:
            part.run()
            break
        except KeyboardInterrupt:
            continue
    for ours, theirs in zip(part._arrays().values(), whole._arrays().values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # weights and moments
    curves = [[{k: v for k, v in json.loads(line).items() if k != "seconds"}
               for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
              for name in ("whole", "parts")]
    assert curves[0] == curves[1]


def stop_after(run, monkeypatch, saves):
    """Let a run stop, as by Ctrl-C, when it has written so many checkpoints."""
    save, left = run.save, saves

    def counted():
        nonlocal left
        save()
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "save", counted)


def test_a_mini_batch_is_gathered_on_the_device(machine):
    gpu = get_backend("cupy")
    config, data = TrainConfig(MODEL), small_data("classification")
    learner = Learner(config, data.task, gpu)
    training = Split(data.x_train, data.y_train, data, config, gpu, learner.routing)
    order = gpu.asarray(np.random.default_rng(0).permutation(50))
    with machine.no_waiting():
        x, y, masks = training.batch(order[3:19])
        learner.step(x, y, 0.1, masks)
    rows = gpu.to_host(order[3:19])
    np.testing.assert_array_equal(gpu.to_host(y), data.y_train[rows])
    fresh = mlp.masks_of(x, learner.routing, MODEL)
    for packed, m in zip(masks, fresh, strict=True):
        np.testing.assert_array_equal(gpu.to_host(packed), np.packbits(gpu.to_host(m), axis=-1))


def test_quickstart_runs(machine, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    machine.watch = False
    command = ("run quickstart --preset smoke --backend cupy --datasets arm --epochs 1 --train 64 "
               "--widths 8 --seeds 1")
    assert cli.main(command.split()) == 0
    assert "cells on stand-in" in capsys.readouterr().out
    record = json.loads(Path("runs/quickstart-smoke/run.json").read_text())
    assert record["backend"] == "cupy"
