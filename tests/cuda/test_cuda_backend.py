"""The CuPy backend as a whole: its errors in one sentence, and training that equals NumPy's."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import BackendError, get_backend
from comet_np.experiments import cli
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.progress import Progress
from comet_np.experiments.training import Learner, Split, TrainConfig, Trainer
from comet_np.models import mlp
from comet_np.optim import OptimizerConfig

from ..tolerances import assert_close
from .strict_cupy import strict_cupy

# --- errors -------------------------------------------------------------------------------------

MACHINES = {
    "no driver": ({"driver": 0}, r"no usable NVIDIA driver .*ubuntu-drivers install"),
    "old driver": ({"driver": 12040},
                   r'for CUDA 13, but .* CUDA 12: .*pip install "comet-np\[cuda12'),
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


def test_too_little_memory_says_what_was_needed():
    with strict_cupy(memory=1000):
        gpu = get_backend("cupy")
        scores = gpu.asarray(np.ones((2, 100), "float32"))
        with pytest.raises(BackendError, match=r"allocating 1,600 bytes.*1,000 bytes\): lower"):
            gpu.asarray(np.ones((2, 100)))
        with pytest.raises(BackendError, match=r"allocating 1,200 bytes"):
            gpu.kernels["project"](scores, gpu.asarray(np.ones((150, 1), "float32")))


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
        batches.append((backend.asarray(x, dtype=config.dtype),
                        backend.asarray(y, dtype=None if y.dtype.kind == "i" else config.dtype)))
    return learner, batches


def train(backend, config, task="classification"):
    """Return the losses, the parameters and the masks of 20 steps."""
    learner, batches = learner_and_batches(backend, config, task)
    losses = [learner.step(x, y, 0.1) for x, y in batches]
    masks = mlp.masks_of(batches[0][0], learner.routing, config.model)
    return ([float(backend.to_host(loss)) for loss in losses], backend.to_host(learner.flat),
            [None if m is None else backend.to_host(m) for m in masks])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_equals_numpy(gpu, name):
    config = TrainConfig(MODEL, OPTIMIZERS[name], dtype="float64")
    losses, flat, masks = train(gpu, config)
    expected_losses, expected_flat, expected_masks = train(get_backend("numpy"), config)
    assert_close(losses, expected_losses, "training")
    assert_close(flat, expected_flat, "training")
    for ours, numpys in zip(masks, expected_masks, strict=True):
        np.testing.assert_array_equal(ours, numpys)


@pytest.mark.parametrize(("change", "task"), [
    ({"activation": "gelu", "ties": "index"}, "classification"),
    ({"p_k": None, "activation": "tanh"}, "classification"),
    ({"bias": False, "routing_activation": "relu"}, "regression"),
    ({"activation": "0.5*softplus"}, "regression")])
def test_training_of_other_models_equals_numpy(gpu, change, task):
    config = TrainConfig(replace(MODEL, **change), dtype="float64")
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
    config = TrainConfig(MODEL, dtype="float64", epochs=2, batch=16, schedule="cosine", **settings)
    result = Trainer(config, small_data(task), folder, backend, Progress(1)).run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines] + [result]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_learning_curve_equals_that_of_numpy(gpu, task, tmp_path):
    ours = learning_curve(gpu, task, tmp_path / "cupy")
    numpys = learning_curve(get_backend("numpy"), task, tmp_path / "numpy")
    for mine, theirs in zip(ours, numpys, strict=True):
        assert set(mine) == set(theirs)
        for name in set(mine) - {"seconds", "last", "notice", "data"}:
            assert_close(float(mine[name]), theirs[name], "training")


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
    for ours, fresh in zip(masks, mlp.masks_of(x, learner.routing, MODEL), strict=True):
        np.testing.assert_array_equal(gpu.to_host(ours), gpu.to_host(fresh))


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
