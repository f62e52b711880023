"""The training loop: it learns, resumes bit for bit, and says where numbers went wrong."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from comet_np import checkpoint, precision
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import datasets
from comet_np.experiments.datasets.augment import augmentation
from comet_np.experiments.signals import Stop, stop_on_signals
from comet_np.experiments.training import (
    Diverged,
    RunConfig,
    TrainConfig,
    loop,
    record,
    step_work,
)
from comet_np.experiments.training.config import OVERHEAD, computing, run_memory
from comet_np.functional.packing import unpacked
from comet_np.gates import Bernoulli, Comet, ExampleTied, Kept, Layerwise, Pass, TopK
from comet_np.models import gpt2, mlp
from comet_np.optim import OPTIMIZERS, OptimizerConfig
from tests.runs import after_steps, assert_bit_for_bit, lines, small_data, stopped, texts, trained
from tests.tolerances import assert_close

ROOT = Path(__file__).resolve().parent.parent
MODEL = mlp.MLPConfig((12, 20, 15, 5))
GLYPHS = mlp.MLPConfig((3072, 20, 10))
RUN = RunConfig(MODEL, TrainConfig(batch=8, epochs=2))


@pytest.fixture(scope="module")
def data():
    return small_data()


@pytest.fixture(scope="module")
def glyphs():
    return datasets.load("glyphs", train=40)


def changed(model=None, optimizer=None, **training):
    """Return the run with some changes."""
    optimizer = OptimizerConfig(**(optimizer or {}))
    return replace(RUN, model=replace(MODEL, **(model or {})),
                   training=replace(RUN.training, optimizer=optimizer, **training))


def stand(config, data, folder):
    """Return the state of a run in which no step was taken yet."""
    return trained(replace(config, training=replace(config.training, epochs=0)), data, folder).run


def test_it_learns_and_reports(tmp_path):
    config = RunConfig(mlp.MLPConfig((21, 30, 30, 1), "tanh"), TrainConfig(lr=0.1, epochs=4))
    ours = trained(config, datasets.load("arm", train=200), tmp_path)
    assert [line["epoch"] for line in ours.lines] == [0, 1, 2, 3, 4]
    assert ours.lines[-1]["step"] == 4 * 7  # 200 examples in batches of 32, the last one short
    assert ours.lines[-1]["val_loss"] < 0.9 * ours.lines[0]["val_loss"]
    assert ours.result["parameters"] == mlp.parameter_count(config.model)
    assert ours.result["last"].items() >= ours.lines[-1].items()
    assert {"notice", "data", "seconds", "test_loss"} < set(ours.result)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "metrics.jsonl",
                                                          "weights.npz"}


@pytest.mark.parametrize("settings", [
    {"batch": 0}, {"accumulate": 0}, {"epochs": -1}, {"steps": -1}, {"evaluations": 0},
    {"warmup": -1}, {"lr": 0.0}, {"lr": float("inf")}, {"schedule": "cosin"},
    {"augment": "flop"}, {"precision": "float8"}],
    ids=str)
def test_settings_without_a_meaning_are_refused(settings):
    (value,) = settings.values()
    with pytest.raises(UserError, match=str(value)):
        TrainConfig(**settings)


def test_a_steps_work_is_that_of_its_products():
    """And of what it costs besides. Three products a weight, two in the first layer."""
    weights = 12 * 20 + 20 * 15 + 15 * 5
    products = 2 * 8 * (3 * weights - 12 * 20)
    assert step_work(changed()) == products + OVERHEAD
    assert step_work(changed(accumulate=3)) == 3 * products + OVERHEAD


# --- examples -----------------------------------------------------------------------------------

KEPT = {  # the gates whose masks are kept: in training, in evaluation
    Comet(0.3): (True, True),
    Bernoulli(0.3): (True, False),
    ExampleTied(0.3): (True, False),
    Layerwise(0.3): (False, False),
    TopK(0.3): (False, False),
}


@pytest.mark.parametrize("gate", KEPT, ids=str)
def test_kept_masks_are_those_of_the_gate(gate, data, tmp_path, small_blocks):
    run, rows = stand(changed({"gate": gate}), data, tmp_path), np.array([3, 24, 0])
    for part, kept, train in zip((run.training, run.validation), KEPT[gate], (True, False),
                                 strict=True):
        assert isinstance(part.model.gate, Kept) == kept
        batch, at = part.batch(rows), Pass(train=train, example=rows, seed=RUN.seed)
        for ours, fresh, N in zip(part.model.gate.masks(batch.x, part.fixed, part.model, at),
                                  gate.masks(batch.x, run.learner.fixed, MODEL, at),
                                  MODEL.widths[1:-1], strict=True):
            if kept:
                np.testing.assert_array_equal(unpacked(ours, N), unpacked(fresh, N))


def test_augmented_images_are_drawn_anew_each_epoch_and_routed_afresh(glyphs, tmp_path):
    config = RunConfig(GLYPHS, TrainConfig(augment="crop_flip"))
    run = stand(config, glyphs, tmp_path)
    epochs = [loop.order(run, epoch) for epoch in range(2)]
    assert [plan.shape for plan in epochs] == 2 * [(2, 40)]
    assert (epochs[0] != epochs[1]).any(axis=-1).all()
    assert isinstance(run.training.model.gate, Comet)
    assert isinstance(run.validation.model.gate, Kept)
    rows, choices = epochs[0][:, :8]
    batch = run.training.batch(rows, choices)
    moved = augmentation("crop_flip").apply(glyphs.x_train[rows], choices, glyphs.image)
    assert_close(batch.x, moved.astype("float64") * glyphs.scale + glyphs.shift, "sum")
    np.testing.assert_array_equal(batch.y, glyphs.y_train[rows])
    np.testing.assert_array_equal(batch.rows, rows)


def test_masks_of_examples_stay_what_they_are_when_the_images_move(glyphs, tmp_path):
    config = RunConfig(replace(GLYPHS, gate=Bernoulli(0.3)), TrainConfig(augment="flip"))
    assert isinstance(stand(config, glyphs, tmp_path).training.model.gate, Kept)


def test_any_other_example_is_other_data(data):
    for name in ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test"):
        changed = getattr(data, name).copy()
        changed[0] += 1
        assert replace(data, **{name: changed}).digest != data.digest


def test_a_data_set_without_a_test_set(data, tmp_path):
    result = trained(RUN, replace(data, x_test=None, y_test=None), tmp_path).result
    assert not any(name.startswith("test") for name in result)


# --- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_sgd_in_the_backward_pass_is_sgd(task, tmp_path):
    """The update without a gradient buffer and the one with it agree to rounding."""
    fused, plain = (
        trained(changed(optimizer=settings, precision="float64"), small_data(task),
                tmp_path / str(settings))
        for settings in ({}, {"clip_norm": 1e9}))  # never clips, but needs the gradient
    assert fused.run.learner._flat_grads is None
    assert plain.run.learner._flat_grads is not None
    assert_close(fused.arrays["flat"], plain.arrays["flat"], "training")


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_mini_batches_summed_up_are_one_large_mini_batch(task, tmp_path):
    """The last step of an epoch too, whose mini-batches are of unequal size."""
    runs = [trained(changed(batch=batch, accumulate=accumulate, precision="float64"),
                    small_data(task), tmp_path / str(batch))
            for batch, accumulate in ((18, 1), (9, 2), (6, 3), (2, 9))]
    for other in runs[1:]:
        assert_close(other.arrays["flat"], runs[0].arrays["flat"], "training")
        assert_close(other.lines[-1]["train_loss"], runs[0].lines[-1]["train_loss"], "training")


def test_the_mini_batches_of_a_step_drop_different_elements(data, tmp_path):
    run = stand(changed({"dropout": 0.5}, accumulate=2), data, tmp_path)
    batch = run.training.batch(np.arange(8))
    first, second = (run.learner.forward(batch, run.training, True, part).cache.dropped[0].factor
                     for part in range(2))
    assert (first != second).any()


def moved_in(precision, data, folder, prepare=lambda run: None):
    """Return how far a run whose steps are small moves the parameters."""
    config = changed(lr=1e-7, precision=precision)
    before = stand(config, data, folder / "before").learner.flat
    after = trained(config, data, folder / "after", prepare=prepare).arrays["flat"]
    return np.abs(after - before).sum()


def test_a_small_step_is_not_lost_in_float16(data, tmp_path):
    """As it would be if the gradient, before its products, were multiplied by the rate."""
    whole = moved_in("float32", data, tmp_path / "float32")
    assert moved_in("float16", data, tmp_path / "float16") > 0.9 * whole

    def update_in_backward(run):
        run.learner._flat_grads = None

    assert moved_in("float16", data, tmp_path / "mutant", update_in_backward) < 0.9 * whole


def first_gradient(precision, data, folder, **changes):
    """Return the gradient of the first weights below small other ones, and the run."""
    run = stand(changed({"gate": None}, {"clip_norm": 1e9}, precision=precision, **changes), data,
                folder)
    for p in run.learner.params[1:]:
        p.weight[...] *= 4e-3
    batches = [run.training.batch(np.arange(i, i + 8)) for i in (0, 8, 16)]
    run.learner.step(batches[:run.config.training.accumulate], run.training, 0.0)
    return run.learner._grads[0].weight, run


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradients_too_small_for_float16_are_not_lost(accumulate, data, tmp_path, monkeypatch):
    """Since the loss is scaled."""
    whole, _ = first_gradient("float32", data, tmp_path / "whole", accumulate=accumulate)
    scaled, run = first_gradient("float16", data, tmp_path / "scaled", accumulate=accumulate)
    assert np.abs(scaled / 65536 - whole).max() < 0.01 * np.abs(whole).max()
    assert run.learner.scaling.tolist() == [65536, 1, 0]
    with monkeypatch.context() as patch:
        patch.setattr(precision, "FIRST_SCALE", 1.0)
        unscaled, _ = first_gradient("float16", data, tmp_path / "mutant", accumulate=accumulate)
    assert np.abs(unscaled - whole).max() > 0.1 * np.abs(whole).max()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_whose_gradient_overflows_is_left_out_and_counted(name, accumulate, data, tmp_path,
                                                                 monkeypatch):
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**24)
    config = changed(optimizer={"name": name, "weight_decay": 0.1}, precision="float16",
                     accumulate=accumulate, batch=2, epochs=1)
    before, seen = stand(config, data, tmp_path / "before").learner.arrays(), []

    def watch(run):
        after_steps(run, lambda: seen.append(run.learner.flat.copy()))

    ours = trained(config, data, tmp_path / "after", prepare=watch)
    left_out = ours.lines[-1]["left_out"]
    assert 1 < left_out < ours.run.step == ours.lines[-1]["step"]
    assert ours.lines[-1]["loss_scale"] == 2.0 ** (24 - left_out)
    assert ours.lines[0].items() >= {"loss_scale": 2.0**24, "left_out": 0}.items()
    moved = [(a != b).any() for a, b in zip([before["flat"], *seen], seen, strict=False)]
    assert moved.count(False) == left_out
    assert not moved[0]
    assert "left_out" not in trained(RUN, data, tmp_path / "float32").lines[-1]


# --- stopped and resumed ------------------------------------------------------------------------

SCHEDULED = {"schedule": "warmup_cosine", "warmup": 5}
INTERRUPTED = {
    **{name: changed(optimizer={"name": name}, **SCHEDULED) for name in OPTIMIZERS},
    "decay, clipping": changed(optimizer={"weight_decay": 0.1, "clip_norm": 0.1}),
    "three mini-batches a step": changed({"dropout": 0.3}, accumulate=3, epochs=4),
    "steps, evaluations": changed(steps=17, evaluations=5),
    "dropout": changed({"dropout": 0.3, "gate": None}),
    "Bernoulli": changed({"gate": Bernoulli(0.3)}),
    "example-tied": changed({"gate": ExampleTied(0.3)}),
    "layer-wise": changed({"gate": Layerwise(0.3)}),
    "top-k": changed({"gate": TopK(0.3)}),
    "float64": changed(precision="float64"),
    "float16": changed(precision="float16"),
}


@pytest.mark.parametrize("waits", [False, True], ids=["step by step", "in groups"])
@pytest.mark.parametrize("config", INTERRUPTED.values(), ids=INTERRUPTED)
def test_interrupted_anywhere_is_bit_for_bit_the_same(config, waits, data, tmp_path, monkeypatch,
                                                      small_blocks):
    monkeypatch.setattr(get_backend("numpy"), "waits", waits)
    whole, stops = trained(config, data, tmp_path / "whole"), 0
    while stopped(config, data, tmp_path / "parts"):  # after every single step, or group of steps
        stops += 1
    assert stops == whole.run.step or (waits and stops >= whole.run.step / 3)
    assert_bit_for_bit(trained(config, data, tmp_path / "parts"), whole)


LANGUAGE = RunConfig(
    gpt2.GPT2Config(vocabulary=17, positions=8, width=8, depth=2, heads=2, activation="softplus",
                    dropout=0.2, weight_dropout=0.2, gate=Comet(0.5)),
    TrainConfig(OptimizerConfig("adamw", clip_norm=0.5, weight_decay=0.1, decay_biases=False),
                1e-2, "warmup_cosine", 2, batch=3, accumulate=2, epochs=2, evaluations=3,
                precision="float16", recompute=True))


@pytest.fixture
def restless(monkeypatch):
    """Let the scale of the loss change often, and steps be left out."""
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**17)
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 1)


@pytest.mark.parametrize("waits", [False, True], ids=["step by step", "in groups"])
@pytest.mark.parametrize("changes", [{}, {"accumulate": 1, "steps": 9}], ids=str)
def test_a_language_model_killed_anywhere_is_bit_for_bit_the_same(changes, waits, tmp_path,
                                                                  monkeypatch, restless):
    """With all that there is: scaled losses, recomputation, lines within an epoch, dropout."""
    monkeypatch.setattr(get_backend("numpy"), "waits", waits)
    config = replace(LANGUAGE, training=replace(LANGUAGE.training, **changes))
    whole = trained(config, texts(), tmp_path / "whole")
    assert 0 < whole.lines[-1]["left_out"] < whole.run.step
    assert len({line["loss_scale"] for line in whole.lines}) > 1
    epochs = [line["epoch"] for line in whole.lines]
    assert len(epochs) == (4 if changes else 7)
    assert any(isinstance(epoch, float) for epoch in epochs)
    while stopped(config, texts(), tmp_path / "parts"):
        pass
    assert_bit_for_bit(trained(config, texts(), tmp_path / "parts"), whole)
    for at in np.random.default_rng(0).permutation(whole.run.step)[:3] + 1:
        stopped(config, texts(), tmp_path / "random", at=at)
    assert_bit_for_bit(trained(config, texts(), tmp_path / "random"), whole)
    if not changes:
        kept = replace(config, training=replace(config.training, recompute=False))
        assert_bit_for_bit(trained(kept, texts(), tmp_path / "kept"), whole)


def test_recomputation_is_asked_of_the_model():
    assert computing(LANGUAGE).recompute
    assert not computing(replace(LANGUAGE, training=TrainConfig())).recompute
    kept = replace(LANGUAGE, training=replace(LANGUAGE.training, recompute=False))
    assert step_work(LANGUAGE) > step_work(kept)
    many = replace(LANGUAGE.training, batch=1000)
    assert run_memory(replace(LANGUAGE, training=many)) < run_memory(replace(
        kept, training=replace(many, recompute=False)))
    with pytest.raises(UserError, match=r"MLPConfig has no field `recompute`.*train it without"):
        computing(changed(recompute=True))


@pytest.mark.parametrize("augment", ["flip", "crop_flip"])
def test_augmented_training_resumes_bit_for_bit(augment, glyphs, tmp_path):
    config = RunConfig(GLYPHS, TrainConfig(batch=8, augment=augment, epochs=2))
    whole = trained(config, glyphs, tmp_path / "whole")
    assert stopped(config, glyphs, tmp_path / "parts", at=7)  # within the second epoch
    assert_bit_for_bit(trained(config, glyphs, tmp_path / "parts"), whole)
    plain = replace(config, training=replace(config.training, augment=None))
    assert trained(plain, glyphs, tmp_path / "plain").lines != whole.lines


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(data, tmp_path, capsys):
    whole = trained(RUN, data, tmp_path / "whole")
    for at in (3, 9):
        assert stopped(RUN, data, tmp_path / "parts", at=at)
    file = tmp_path / "parts" / "checkpoint"
    file.write_bytes(file.read_bytes()[:-1])
    assert_bit_for_bit(trained(RUN, data, tmp_path / "parts"), whole)
    assert "is damaged" in (said := capsys.readouterr().err)
    assert "going on from the checkpoint before it" in said


def test_what_a_killed_write_left_is_removed(data, tmp_path):
    left = tmp_path / "checkpoint.new.123.tmp"
    left.write_bytes(b"half")
    trained(RUN, data, tmp_path)
    assert not left.exists()


def test_lines_that_no_checkpoint_stands_for_are_written_anew(data, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"ep')
    assert len(trained(RUN, data, tmp_path).lines) == 3


@dataclass(frozen=True)
class Other(Comet):
    """A gate with the fields of another one."""


OTHER_RUNS = {
    r"lr was 0\.01, is 0\.5": changed(lr=0.5),
    r"seed was 0, is 1": replace(RUN, seed=1),
    r"p_k was 0\.5, is 0\.3": changed({"gate": Comet(0.3)}),
    r"gate was Comet, is TopK": changed({"gate": TopK()}),
    r"gate was Comet, is Other": changed({"gate": Other()}),
    r"gate was Comet, is None": changed({"gate": None}),
    r"momentum was 0\.9, is 0\.8": changed(optimizer={"momentum": 0.8}),
}


@pytest.mark.parametrize("difference", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(difference, data, tmp_path):
    assert stopped(RUN, data, tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=f"another run .*{difference}"):
        trained(OTHER_RUNS[difference], data, tmp_path)


def test_a_checkpoint_of_other_data_is_refused(data, tmp_path):
    assert stopped(RUN, data, tmp_path)
    other = replace(data, y_val=data.y_val[::-1])
    with pytest.raises(checkpoint.CheckpointError, match=r"another run \(data was"):
        trained(RUN, other, tmp_path)


def test_a_checkpoint_of_another_backend_is_refused(data, tmp_path, monkeypatch):
    """It would go on, but not bit for bit."""
    assert stopped(RUN, data, tmp_path)
    monkeypatch.setattr(get_backend("numpy"), "name", "cupy")
    with pytest.raises(checkpoint.CheckpointError, match=r"\(backend was numpy, is cupy\)"):
        trained(RUN, data, tmp_path)


def test_the_times_of_all_starts_are_summed_up(data, tmp_path):
    stop = Stop()

    def slow(run):
        run.record.seconds["train"] = 100.0
        stop.ask()

    with pytest.raises(KeyboardInterrupt):
        trained(RUN, data, tmp_path, stop=stop, prepare=slow)
    assert trained(RUN, data, tmp_path).run.record.seconds["train"] > 100


def test_lost_metrics_are_said(data, tmp_path):
    assert stopped(RUN, data, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(checkpoint.CheckpointError, match="is shorter than when"):
        trained(RUN, data, tmp_path)


def test_checkpoints_are_seldom_enough(data, tmp_path, monkeypatch):
    run = stand(RUN, data, tmp_path)
    now = run.record.saved_at
    monkeypatch.setattr(record.time, "monotonic", lambda: now)
    run.record.save_cost = 0.5
    now += 49
    assert not record.due(run)
    now += 2  # 0.5 s of writing in 51 s of training is about 1 %
    assert record.due(run)
    run.record.save_cost = 0.0
    assert record.due(run)
    now -= 42
    assert not record.due(run)  # 9 s after the last, however fast it was written


@pytest.mark.slow
def test_killed_25_times_ends_in_the_same_metrics_and_weights(tmp_path):
    # All starts are children of one process, which alone takes the time that imports take. It says
    # the number of each child, and later how it ended.
    program = """
import os, signal, sys
from comet_np.experiments import cli, quickstart
from comet_np.experiments.training import loop, record
record.LEAST_CHECKPOINT_SECONDS, record.CHECKPOINT_SHARE = 0.02, 1.0
finish = loop.finish
def keep_the_last_checkpoint(run):
    record.save(run)
    (run.record.folder / "checkpoint").rename(run.record.folder / "final")
    return finish(run)
loop.finish = keep_the_last_checkpoint
for out in map(str.strip, sys.stdin):
    child = os.fork()
    if child == 0:
        signal.alarm(200)
        os.dup2(os.open(out + ".txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        status = cli.main([*sys.argv[1:], "--out", out])
        sys.stdout.flush()
        os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

    def saved(out):
        """Return when the newest checkpoint was written; 0 if there is none, or one is renamed."""
        with contextlib.suppress(FileNotFoundError):
            return max((f.stat().st_mtime_ns for f in out.glob("cells/*/checkpoint")), default=0)
        return 0

    def runs(child):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 0)
            return True
        return False

    draw = random.Random(0)
    with subprocess.Popen(
            [sys.executable, "-c", program, "run", "quickstart", "--preset", "smoke", "--datasets",
             "arm", "--models", "comet", "--seeds", "1", "--epochs", "400", "--optimizer", "adam",
             "--lr", "1e-3", "--jobs", "1"], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as starts:

        def start(out):
            print(out, file=starts.stdin, flush=True)
            return int(starts.stdout.readline())

        def status():
            return int(starts.stdout.readline())

        start(tmp_path / "whole")
        assert status() == 0, (tmp_path / "whole.txt").read_text()
        for kills in range(25):
            before = saved(tmp_path / "killed")
            child = start(tmp_path / "killed")
            while saved(tmp_path / "killed") == before and runs(child):
                time.sleep(0.002)  # until this start has trained and saved
            time.sleep(draw.uniform(0.0, 0.06))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            assert status() == -signal.SIGKILL, (
                f"the run ended after {kills} kills: make it longer, if it did not fail: "
                + (tmp_path / "killed.txt").read_text())
        start(tmp_path / "killed")
        assert status() == 0, (tmp_path / "killed.txt").read_text()
    whole, killed = (next((tmp_path / name).glob("cells/*")) for name in ("whole", "killed"))
    assert lines(killed) == lines(whole)
    assert len(lines(killed)) == 401
    arrays, expected = (checkpoint.load(folder / "final")[0] for folder in (killed, whole))
    assert set(arrays) == {"flat", "first", "second"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])


# --- asked to stop ------------------------------------------------------------------------------


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def number(request):
    """Yield a signal that asks for the end; whoever runs the tests may have it ignored."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_stops_a_run_with_a_checkpoint(number, data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(RUN, data, tmp_path,
                prepare=lambda run: after_steps(run, lambda: signal.raise_signal(number)))
    assert checkpoint.load(tmp_path / "checkpoint")[1]["step"] == 1


def test_a_signal_in_the_last_evaluation_is_not_lost_and_costs_no_step(number, data, tmp_path,
                                                                       monkeypatch):
    whole, finish = trained(RUN, data, tmp_path / "whole"), loop.finish

    def interrupted(run):
        signal.raise_signal(number)
        return finish(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(RUN, data, tmp_path / "parts")
    assert checkpoint.load(tmp_path / "parts" / "checkpoint")[1]["step"] == whole.run.step
    assert_bit_for_bit(trained(RUN, data, tmp_path / "parts"), whole)


def test_the_first_signal_asks_and_a_second_ctrl_c_ends_at_once(number):
    """SIGTERM and SIGHUP come twice from systems, which must not cost the checkpoint."""
    before, went_on = signal.getsignal(number), False
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
        signal.raise_signal(number)
        went_on = True
        stop.raise_if_asked()
    assert went_on == (number != signal.SIGINT)
    assert signal.getsignal(number) is before


def test_another_thread_may_ask_for_the_end(number, data, tmp_path):
    """And then signals are left alone: they are the business of who gave the request."""
    stop, handlers = Stop(), []

    def ask():
        handlers.append(signal.getsignal(number))
        stop.ask()

    with pytest.raises(KeyboardInterrupt):
        trained(RUN, data, tmp_path, stop=stop, prepare=lambda run: after_steps(run, ask))
    assert handlers == [signal.getsignal(number)]
    assert checkpoint.load(tmp_path / "checkpoint")[1]["step"] == 1


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_trains_without_handling_signals(data, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(
        loop.train(RUN, data, tmp_path, get_backend("numpy"))))
    thread.start()
    thread.join()
    assert len(results) == 1


# --- divergence ---------------------------------------------------------------------------------


def test_divergence_names_step_and_quantity_and_leaves_the_state(data, tmp_path):
    runs = []
    with pytest.raises(Diverged, match=r"at step \d+ .* not finite is a_\d of layer \d"):
        trained(changed(lr=1e6, epochs=9), small_data("regression"), tmp_path,
                prepare=runs.append)
    arrays, description = checkpoint.load(tmp_path / "diverged")
    np.testing.assert_array_equal(arrays["flat"], runs[0].learner.flat)
    assert description["step"] == runs[0].step > 0


SPOILED = {"W_2 of layer 2": lambda params: params[1].weight,
           "b_1 of layer 1": lambda params: params[0].bias,
           "W_3 of layer 3": lambda params: params[2].weight}


@pytest.mark.parametrize("name", SPOILED)
def test_the_first_quantity_that_is_not_finite_is_named(name, data, tmp_path):
    def spoil(run):
        SPOILED[name](run.learner.params).flat[1] = np.inf

    with pytest.raises(Diverged, match=rf"at step 0 .* not finite is {name};"):
        trained(changed({"gate": None}), data, tmp_path, prepare=spoil)


def test_divergence_late_in_the_validation_split_names_its_quantity(tmp_path, small_blocks):
    data = small_data("regression")
    data.x_val[-1, 3] = np.inf
    with pytest.raises(Diverged, match=r"at step 0 .* not finite is x_0 of layer 1;"):
        trained(changed({"gate": None}), data, tmp_path)


def test_a_last_step_that_diverges_is_no_success(tmp_path):
    data = small_data("regression")
    data = replace(data, x_train=data.x_train[:8], y_train=data.y_train[:8])
    with pytest.raises(Diverged, match="at step 1 "):
        trained(changed(lr=1e30, epochs=1), data, tmp_path)


def test_a_diverged_run_diverges_again_at_the_same_step(tmp_path):
    """Its checkpoints are of before, and ``diverged`` is not taken for one."""
    data, messages = small_data("regression"), []
    assert stopped(changed(lr=1e6, epochs=9), data, tmp_path)
    for _ in range(2):
        with pytest.raises(Diverged) as caught:
            trained(changed(lr=1e6, epochs=9), data, tmp_path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("gate", [Layerwise(0.3), TopK(0.3)])
def test_a_gate_that_reads_what_diverged_is_no_bad_input(gate, tmp_path):
    """Its scores are NaN before the loss is looked at."""
    config = changed({"gate": gate, "widths": (12, *5 * [20], 5)}, lr=1e20)
    with pytest.raises(Diverged, match=r"diverged at step \d+: a routing score is NaN; lower --lr"):
        trained(config, small_data("regression"), tmp_path)
    assert checkpoint.load(tmp_path / "diverged")
