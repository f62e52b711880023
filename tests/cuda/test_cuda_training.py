"""Training on a GPU, as it is and as a CUDA graph: what it computes equals NumPy's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comet_np import precision as precisions
from comet_np.backends import BackendError, get_backend
from comet_np.experiments import cli, grid, sweep, workers
from comet_np.experiments.cell import Job
from comet_np.experiments.progress import Progress
from comet_np.experiments.signals import Stop, stop_on_signals
from comet_np.experiments.training import Diverged, RunConfig, TrainConfig
from comet_np.functional.packing import unpacked
from comet_np.gates import Bernoulli, Comet, ExampleTied, Layerwise, TopK
from comet_np.models import mlp
from comet_np.models.moe import MoEConfig
from comet_np.optim import OptimizerConfig

from ..runs import (
    after_steps,
    assert_bit_for_bit,
    images,
    lines,
    small_data,
    stopped,
    texts,
    trained,
)
from ..test_extension import make_known
from ..test_loop_oracle import CASES, check, data_for
from ..test_training import LANGUAGE
from ..tolerances import assert_close
from . import shim
from .strict_cupy import strict_cupy

pytestmark = pytest.mark.usefixtures("small_blocks")
OPTIMIZERS = {
    "sgd, the backward pass is the update": OptimizerConfig("sgd"),
    "sgd, which shrinks": OptimizerConfig("sgd", weight_decay=0.01, l1=0.01),
    "sgd": OptimizerConfig("sgd", weight_decay=0.01, clip_value=0.5),
    "momentum": OptimizerConfig("momentum", weight_decay=0.01, decay_biases=False),
    "adam": OptimizerConfig("adam", weight_decay=0.01, clip_norm=0.1, l1=0.01),
    "adamw": OptimizerConfig("adamw", weight_decay=0.01, clip_norm=10.0),
}
MODEL = mlp.MLPConfig((12, 30, 40, 5), gate=Comet(0.3))
MIXTURE = MoEConfig((12, 10, 13, 5), 3, activation="tanh")  # with softplus all choose the same
RUN = RunConfig(MODEL, TrainConfig(batch=8, epochs=2))


def changed(model=None, **training):
    """Return the run with some changes."""
    return replace(RUN, model=replace(MODEL, **(model or {})),
                   training=replace(RUN.training, **training))


# --- the same numbers ---------------------------------------------------------------------------


# What is left out differs from what stays by a number on the host only.
ELSEWHERE = ("seed 3", "warm-up past an epoch", "clip_value", "ties: strict", "top-k, ties: strict",
             *(case for case in CASES if case.endswith("decay, all")))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ELSEWHERE])
def test_the_loop_by_hand_agrees(gpu, case, tmp_path):
    check(CASES[case], data_for(CASES[case]), tmp_path, backend=gpu)


@pytest.mark.parametrize("case", ["the defaults", "three mini-batches a step", "all of it"])
def test_regression_agrees(gpu, case, tmp_path):
    check(CASES[case], small_data("regression"), tmp_path, backend=gpu)


@pytest.mark.parametrize("change", [
    {"activation": "gelu", "gate": Comet(0.3, "index")}, {"scale": 0.5},
    {"bias": False, "gate": Comet(0.3, g="relu")}], ids=str)
def test_other_models_equal_numpys(gpu, change, tmp_path):
    config = changed(change, precision="float64")
    assert_as_on_numpy(gpu, config, small_data(), tmp_path, "training")


@pytest.mark.parametrize("change", [{}, {"trainable": False}, {"gate": "hard"}], ids=str)
def test_mixtures_of_experts_equal_numpys(gpu, change, tmp_path):
    """Whose experts compute all examples here, and their own there."""
    config = replace(changed(precision="float64"), model=replace(MIXTURE, **change))
    assert_as_on_numpy(gpu, config, small_data(), tmp_path, "training")


def assert_as_on_numpy(gpu, config, data, folder, operation):
    """Assert that metrics and weights are those of NumPy."""
    ours, numpys = (trained(config, data, folder / backend.name, backend)
                    for backend in (gpu, get_backend("numpy")))
    for mine, theirs in zip(ours.lines, numpys.lines, strict=True):
        assert set(mine) == set(theirs)
        for name, value in theirs.items():
            assert_close(np.asarray(mine[name], ours.arrays["flat"].dtype), value, operation)
    for name, array in ours.arrays.items():
        assert_close(array, numpys.arrays[name], operation)


@pytest.mark.parametrize("name", ["sgd, the backward pass is the update", "momentum"])
def test_float32_equals_numpys(gpu, name, tmp_path):
    config = changed(optimizer=OPTIMIZERS[name])
    assert_as_on_numpy(gpu, config, small_data("regression"), tmp_path, "sum")


@pytest.mark.parametrize("gate", [None, Comet(0.3), Bernoulli(0.4)], ids=str)
def test_augmented_training_equals_numpys(gpu, gate, tmp_path):
    config = changed({"widths": (3072, 12, 5), "gate": gate}, augment="crop_flip",
                     precision="float64")
    assert_as_on_numpy(gpu, config, images(), tmp_path, "training")


@pytest.mark.parametrize("augment", [None, "crop_flip"])
def test_training_on_normalised_images_equals_numpys(gpu, augment, tmp_path):
    """Nothing comes from the host within a captured step."""
    config = changed({"widths": (3072, 12, 5)}, augment=augment, precision="float64")
    data = images().normalised((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    assert_as_on_numpy(gpu, config, data, tmp_path, "training")


@pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"])
def test_a_format_changes_the_products_but_not_the_masks(gpu, precision, tmp_path):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    model = {"widths": (12, 256, 256, 5)}  # for small ones cuBLAS may not bother
    whole, short = (trained(changed(model, precision=name, epochs=1), small_data(),
                            tmp_path / name, gpu) for name in ("float32", precision))
    np.testing.assert_array_equal(gpu.to_host(short.run.training.fixed),
                                  gpu.to_host(whole.run.training.fixed))
    assert short.lines[-1]["train_loss"] == pytest.approx(whole.lines[-1]["train_loss"], rel=1e-2)
    assert short.lines[-1]["train_loss"] != whole.lines[-1]["train_loss"]


# --- one graph ----------------------------------------------------------------------------------

CAPTURED = {
    **{name: changed(optimizer=optimizer) for name, optimizer in OPTIMIZERS.items()},
    "three mini-batches a step": changed({"dropout": 0.3}, accumulate=3, batch=4, epochs=3),
    "dropout": changed({"dropout": 0.3, "gate": None}),
    "dropout, Bernoulli": changed({"dropout": 0.3, "gate": Bernoulli(0.4)}),
    "example-tied": changed({"gate": ExampleTied(0.4, 0.2)}),
    "layer-wise": changed({"gate": Layerwise(0.3)}),
    "top-k": changed({"gate": TopK(0.3)}),
    "float16": changed(precision="float16", optimizer=OPTIMIZERS["adamw"]),
    "mixture of experts": replace(RUN, model=MIXTURE),
    "mixture of experts, fixed gate": replace(RUN, model=replace(MIXTURE, trainable=False)),
    "mixture of experts, hard gate": replace(
        changed(optimizer=OPTIMIZERS["adam"]), model=replace(MIXTURE, gate="hard")),
}


@pytest.mark.parametrize("config", CAPTURED.values(), ids=CAPTURED)
def test_training_without_graphs_is_bit_for_bit_the_same(gpu, config, tmp_path, monkeypatch):
    runs = []
    for graphs in "10":
        monkeypatch.setenv("COMET_NP_GRAPHS", graphs)
        counted = []

        def count(run, counted=counted):
            after_steps(run, lambda: counted.append(1))

        runs.append(trained(config, small_data(), tmp_path / graphs, gpu, prepare=count))
        # Captured, Python runs a step twice (as it is, then to record it), and each short one.
        short = config.training.epochs
        assert len(counted) == (2 + short if graphs == "1" else runs[-1].run.step)
    assert_bit_for_bit(*runs)


def test_a_language_model_in_float16_is_captured_whole(gpu, tmp_path, monkeypatch):
    """With losses whose scale changes, steps that are left out, recomputation and dropout.

    It equals NumPy's to what float16 rounds elsewhere, and resumes bit for bit.
    """
    monkeypatch.setattr(precisions, "FIRST_SCALE", 2.0**18)
    monkeypatch.setattr(precisions, "GROWTH_INTERVAL", 1)
    config = replace(LANGUAGE, model=replace(LANGUAGE.model, depth=1),
                     training=replace(LANGUAGE.training, warmup=0, steps=5))
    numpys = trained(config, texts(), tmp_path / "numpy")
    captured = trained(config, texts(), tmp_path / "captured", gpu)
    assert 0 < captured.lines[-1]["left_out"] < captured.run.step
    for mine, theirs in zip(captured.lines, numpys.lines, strict=True):
        assert set(mine) == set(theirs)
        assert (mine["loss_scale"], mine["left_out"]) == (theirs["loss_scale"], theirs["left_out"])
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-2)
    monkeypatch.setenv("COMET_NP_GRAPHS", "0")
    assert stopped(config, texts(), tmp_path / "plain", gpu, at=2)
    assert_bit_for_bit(trained(config, texts(), tmp_path / "plain", gpu), captured)


@pytest.mark.parametrize(("name", "graphs"), [
    *((name, "1") for name in OPTIMIZERS), ("adam", "0"),
    ("three mini-batches a step", "1"), ("dropout, Bernoulli", "1"), ("mixture of experts", "1")])
def test_a_resumed_run_is_bit_for_bit_the_same(gpu, name, graphs, tmp_path, monkeypatch):
    """The first step after a resume runs outside a graph, and must not differ for that."""
    monkeypatch.setenv("COMET_NP_GRAPHS", graphs)
    data, stops = small_data(), 0
    whole = trained(CAPTURED[name], data, tmp_path / "whole", gpu)
    while stopped(CAPTURED[name], data, tmp_path / "parts", gpu):
        stops += 1
    assert stops > 3
    assert_bit_for_bit(trained(CAPTURED[name], data, tmp_path / "parts", gpu), whole)


@pytest.mark.parametrize("gate", [Comet(0.3), Bernoulli(0.4)], ids=str)
def test_augmented_training_resumes_bit_for_bit(gpu, gate, tmp_path):
    config = changed({"widths": (3072, 12, 5), "gate": gate}, augment="crop_flip")
    whole = trained(config, images(), tmp_path / "whole", gpu)
    while stopped(config, images(), tmp_path / "parts", gpu):
        pass
    assert_bit_for_bit(trained(config, images(), tmp_path / "parts", gpu), whole)


def test_divergence_is_found_at_its_step_and_named_as_on_numpy(gpu, tmp_path):
    messages = []
    for backend in gpu, get_backend("numpy"):
        with pytest.raises(Diverged) as caught:
            trained(changed(lr=1e6, epochs=9), small_data("regression"), tmp_path / backend.name,
                    backend)
        messages.append(str(caught.value).replace(str(tmp_path / backend.name), "FOLDER"))
    assert messages[0] == messages[1]


# --- what the host does meanwhile ---------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("config", CAPTURED.values(), ids=CAPTURED)
def test_a_step_never_waits(machine, config, task, tmp_path):
    """Neither for the gathering of its mini-batches."""
    gpu = get_backend("cupy")
    config = replace(config, training=replace(config.training, epochs=0))
    run = trained(config, small_data(task), tmp_path, gpu).run
    order, size = gpu.asarray(np.random.default_rng(0).permutation(50)), config.training.batch
    with machine.no_waiting():
        for _ in range(3):
            batches = [run.training.batch(order[i * size:(i + 1) * size])
                       for i in range(config.training.accumulate)]
            run.learner.step(batches, run.training, 0.1)
    gpu.check_errors()


def test_a_mini_batch_gathered_on_the_device_has_the_masks_of_its_examples(gpu, tmp_path):
    data = small_data()
    run = trained(changed(epochs=0), data, tmp_path, gpu).run
    rows = np.random.default_rng(0).permutation(50)[3:19]
    batch = run.training.batch(gpu.asarray(rows))
    np.testing.assert_array_equal(gpu.to_host(batch.y), data.y_train[rows])
    kept = run.learner.forward(batch, run.training, True).cache.masks
    fresh = MODEL.gate.masks(batch.x, run.learner.fixed, MODEL, None)
    for ours, m, N in zip(kept, fresh, MODEL.widths[1:-1], strict=True):
        np.testing.assert_array_equal(gpu.to_host(ours), gpu.to_host(unpacked(m, N)))


# --- cells side by side -------------------------------------------------------------------------


@pytest.fixture
def jobs(gpu, tmp_path, monkeypatch):
    """Return a function that makes four small cells of a folder."""
    make_known(tmp_path, monkeypatch)
    config = grid.GridConfig(("table",), ("standard", "comet"), (0.5,), 2, widths=(8,),
                             training=replace(RUN.training, optimizer=OPTIMIZERS["adam"]))
    return lambda name: [Job("quickstart", cell, tmp_path / name, gpu.name, None)
                         for cell in grid.cells(config)]


def results(jobs):
    """Return the metrics and the result, times aside, of finished cells by name."""
    return {job.cell.name: (lines(job.cell.folder(job.out)),
                            {name: value for name, value in job.cell.result(job.out).items()
                             if name not in ("seconds", "last")}) for job in jobs}


def test_cells_at_once_give_the_results_of_cells_in_turn(jobs):
    in_turn, at_once = jobs("in turn"), jobs("at once")
    for outcomes in (workers.in_turn(in_turn, Progress(1)),
                     workers.by_threads(at_once, 2, Progress(1))):
        assert [outcome.status for outcome in outcomes] == 4 * ["done"], outcomes
    assert results(at_once) == results(in_turn)


def test_ctrl_c_leaves_checkpoints_of_the_cells_at_work(jobs, monkeypatch):
    in_turn, parts, stop = jobs("in turn"), jobs("parts"), Stop()
    progress = Progress(1)
    with monkeypatch.context() as patch:
        patch.setattr(workers, "stop_on_signals", lambda: stop_on_signals(stop))
        patch.setattr(progress, "advance", lambda *arguments: stop.ask())
        with pytest.raises(KeyboardInterrupt):
            workers.by_threads(parts, 2, progress)
    at_work = [job.cell.folder(job.out) for job in parts if job.cell.folder(job.out).exists()]
    assert 1 <= len(at_work) <= 2
    assert all((folder / "checkpoint").exists() for folder in at_work)
    workers.by_threads(parts, 2, Progress(1))
    workers.in_turn(in_turn, Progress(1))
    assert results(parts) == results(in_turn)


def test_quickstart_runs(machine, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="draws, and matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    machine.watch = False
    make_known(tmp_path, monkeypatch)
    command = ("run quickstart --preset smoke --backend cupy --datasets table --epochs 1 "
               "--widths 8 --seeds 1 --models half-spaces,comet")
    assert cli.main(command.split()) == 0
    assert "cells on stand-in" in capsys.readouterr().out
    record = json.loads(Path("runs/quickstart-smoke/run.json").read_text())
    assert record["backend"] == "cupy"


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "needed"), [(1100, "1,316"), (5000, "168,000"),
                                                (300_000, "33,554,432")])
def test_too_little_memory_anywhere_says_what_lowers_it(tmp_path, monkeypatch, capsys, memory,
                                                        needed):
    """The parameters, the data or the workspace of cuBLAS are the first that do not fit."""
    if shim.GXX is None:
        pytest.skip("g++ compiles the kernels for the CPU, and is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "at_once", lambda *arguments: 1)  # which would refuse it before
    monkeypatch.setattr(sweep, "expected_seconds", lambda *arguments: 1.0)
    command = ("run quickstart --preset smoke --backend cupy --datasets arm --epochs 1 --train 20 "
               "--widths 8 --seeds 1 --models standard")
    with strict_cupy(memory=memory):
        assert cli.main(command.split()) == 1
    assert (f"too little memory (Out of memory allocating {needed} bytes; stand-in has {memory:,} "
            "bytes): lower --widths or --batch or --train") in capsys.readouterr().out


def test_too_little_memory_before_the_start_is_said_too(machine):
    machine.memory = 2**20
    with pytest.raises(BackendError, match=r"too little memory .*allocating 4,194,304 bytes"):
        sweep.expected_seconds([], get_backend("cupy"))
