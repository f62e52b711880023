"""The training loop: it learns, resumes bit for bit, and says where numbers went wrong."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comet_np import checkpoint
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import datasets, training
from comet_np.experiments.datasets.augment import augmentation
from comet_np.experiments.progress import Progress
from comet_np.experiments.training import Diverged, Learner, TrainConfig, Trainer
from comet_np.models import mlp
from comet_np.optim import OPTIMIZERS, OptimizerConfig
from comet_np.tree import leaves

ROOT = Path(__file__).resolve().parent.parent
ARM = mlp.MLPConfig((21, 30, 30, 1))


@pytest.fixture(scope="module")
def arm():
    return datasets.load("arm", train=200)


def trainer(config, data, folder):
    return Trainer(config, data, folder, get_backend("numpy"), Progress(1))


def lines(folder):
    """Return the metrics of a run without their times."""
    text = (folder / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in text.splitlines()]


def run_until_ctrl_c(run, monkeypatch, at=None):
    """Run until Ctrl-C comes within the next step, or within the one that completes step `at`."""
    monkeypatch.setattr(run, "due", lambda: True)
    step = run.learner.step

    def stop_after(*arguments):
        loss = step(*arguments)
        if at in (None, run.learner.state.step):
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(run.learner, "step", stop_after)
    with pytest.raises(KeyboardInterrupt):
        run.run()


def test_it_learns_and_reports(arm, tmp_path):
    config = TrainConfig(replace(ARM, activation="tanh"), lr=0.1, epochs=4)
    result = trainer(config, arm, tmp_path).run()
    metrics = lines(tmp_path)
    assert [line["epoch"] for line in metrics] == [0, 1, 2, 3, 4]
    assert metrics[-1]["step"] == 4 * 7  # 200 examples in batches of 32, the last one short
    assert metrics[-1]["val_loss"] < 0.9 * metrics[0]["val_loss"]
    assert result["parameters"] == mlp.parameter_count(ARM)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert not list(tmp_path.glob("checkpoint*"))


def test_cached_masks_are_those_of_the_routing_network(arm, tmp_path):
    run = trainer(TrainConfig(ARM), arm, tmp_path)
    x, _, masks = run.training.batch(np.array([3, 199, 0]))
    for cached, fresh in zip(masks, mlp.masks_of(x, run.learner.routing, ARM), strict=True):
        np.testing.assert_array_equal(cached, fresh)
    run.metrics.close()


GLYPHS = mlp.MLPConfig((3072, 20, 15, 10))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("model", "augment"), [
    (ARM, None), (replace(ARM, p_k=None), None), (GLYPHS, None), (GLYPHS, "crop_flip")], ids=str)
def test_seeds_side_by_side_are_each_as_alone(arm, tmp_path, name, model, augment):
    arm = arm if model.widths[0] == 21 else datasets.load("glyphs", train=65)  # a last batch of 1
    config = TrainConfig(model, OptimizerConfig(name), epochs=2, seeds=(3, 0, 1), augment=augment,
                         precision="float64")
    result = trainer(config, arm, tmp_path / "together").run()
    together = lines(tmp_path / "together")
    assert [line["seed"] for line in together] == 3 * [3, 0, 1]
    for network in result["networks"]:
        seed = network["seed"]
        alone = trainer(replace(config, seeds=(seed,)), arm, tmp_path / str(seed)).run()
        for what in network.keys() - {"last", "seed"}:
            assert network[what] == pytest.approx(alone["networks"][0][what], rel=1e-10)
        ours = [line for line in together if line["seed"] == seed]
        for mine, theirs in zip(ours, lines(tmp_path / str(seed)), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_augmented_images_are_drawn_anew_each_epoch_and_routed_afresh(tmp_path, seeds):
    data = datasets.load("glyphs", train=40)
    config = TrainConfig(mlp.MLPConfig((3072, 30, 10)), seeds=seeds, augment="crop_flip", epochs=2)
    run = trainer(config, data, tmp_path)
    run.metrics.close()
    epochs = [run.plan(epoch) for epoch in range(2)]
    assert [plan.shape for plan in epochs] == 2 * [(2, len(seeds), 40)]
    assert (epochs[0] != epochs[1]).any(axis=-1).all()
    x, y, masks = run.mini_batch(epochs[0][..., :8].copy())
    assert masks is None and run.validation.bits is not None
    rows, choices = (part if len(seeds) > 1 else part[0] for part in epochs[0][..., :8])
    moved = augmentation("crop_flip").apply(data.x_train[rows], choices)
    np.testing.assert_allclose(x, moved * np.float32(data.scale) + np.float32(data.shift),
                               rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(y, data.y_train[rows])


@pytest.mark.parametrize(("augment", "seeds"), [("flip", (0,)), ("crop_flip", (0, 1))])
def test_augmented_training_resumes_bit_for_bit(tmp_path, monkeypatch, augment, seeds):
    data = datasets.load("glyphs", train=100)
    config = TrainConfig(mlp.MLPConfig((3072, 20, 10)), augment=augment, epochs=2, seeds=seeds)
    whole = trainer(config, data, tmp_path / "whole")
    whole.run()
    assert lines(tmp_path / "whole") != lines_of_plain(replace(config, augment=None), data,
                                                       tmp_path / "plain")
    part = trainer(config, data, tmp_path / "part")
    run_until_ctrl_c(part, monkeypatch, 6)  # within the second epoch
    last = trainer(config, data, tmp_path / "part")
    last.run()
    assert lines(tmp_path / "part") == lines(tmp_path / "whole")
    np.testing.assert_array_equal(last.learner.flat, whole.learner.flat)


def lines_of_plain(config, data, folder):
    trainer(config, data, folder).run()
    return lines(folder)


def test_one_of_several_seeds_that_diverges_is_named(arm, tmp_path, monkeypatch):
    run = trainer(TrainConfig(ARM, epochs=1, seeds=(5, 6, 7)), arm, tmp_path)
    run.learner.params[1].weight[2, 0, 0] = np.inf
    with pytest.raises(Diverged, match=r"with seed 7 diverged .* not finite is W_2 of layer 2; .* "
                                        r"or train the other seeds without it by --together 0"):
        run.run()


def test_what_a_killed_write_left_is_removed(arm, tmp_path):
    left = tmp_path / "checkpoint.new.123.tmp"
    left.write_bytes(b"half")
    trainer(TrainConfig(ARM, epochs=1), arm, tmp_path).run()
    assert not left.exists()


def test_divergence_late_in_the_validation_split_names_its_quantity(arm, tmp_path):
    data = replace(arm, x_val=np.concatenate([arm.x_val, arm.x_val[:200]]),
                   y_val=np.concatenate([arm.y_val, arm.y_val[:200]]))
    assert len(data.x_val) > training.EVALUATION_BATCH
    data.x_val[-1, 3] = np.inf
    with pytest.raises(Diverged, match=r"at step 0 .* not finite is x_0 of layer 1;"):
        trainer(TrainConfig(replace(ARM, p_k=None)), data, tmp_path).run()


def test_any_other_example_is_other_data(arm):
    for name in ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test"):
        changed = getattr(arm, name).copy()
        changed[0] += 1
        assert replace(arm, **{name: changed}).digest != arm.digest


def test_augmented_images_cost_their_routing():
    plain = TrainConfig(GLYPHS)
    routed = 2 * 32 * (3072 * 20 + 20 * 15)
    assert training.step_work(replace(plain, augment="flip")) == training.step_work(plain) + routed
    standard = replace(plain, model=replace(GLYPHS, p_k=None))
    assert training.step_work(replace(standard, augment="flip")) == training.step_work(standard)


def test_clipping_the_norm_of_several_networks_is_refused():
    with pytest.raises(UserError, match="give clip_norm with one seed at a time"):
        TrainConfig(ARM, OptimizerConfig(clip_norm=1.0), seeds=(0, 1))


def test_tf32_needs_tensor_cores(arm, tmp_path):
    with pytest.raises(UserError, match="use --backend cupy, or --precision float32"):
        trainer(TrainConfig(ARM, precision="tf32"), arm, tmp_path)


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_interrupted_anywhere_is_bit_for_bit_the_same(arm, tmp_path, monkeypatch, name, seeds):
    config = TrainConfig(ARM, OptimizerConfig(name), schedule="warmup_cosine", warmup=5, epochs=3,
                         seeds=seeds)
    whole = trainer(config, arm, tmp_path / "whole")
    whole.run()
    steps = whole.learner.state.step
    for _ in range(steps):  # stop after every single step
        part = trainer(config, arm, tmp_path / "parts")
        run_until_ctrl_c(part, monkeypatch)
    last = trainer(config, arm, tmp_path / "parts")
    last.run()
    assert last.learner.state.step == steps
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    for ours, theirs in ((last.learner.flat, whole.learner.flat),
                         (last.learner.state.first, whole.learner.state.first),
                         (last.learner.state.second, whole.learner.state.second)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_killed_25_times_ends_in_the_same_metrics_and_weights(tmp_path):
    program = """
import sys
from comet_np.experiments import cli, training
training.LEAST_CHECKPOINT_SECONDS, training.CHECKPOINT_SHARE = 0.02, 1.0
finish = training.Trainer.finish
def keep_the_last_checkpoint(self):
    self.save()
    (self.folder / "checkpoint").rename(self.folder / "final")
    return finish(self)
training.Trainer.finish = keep_the_last_checkpoint
sys.exit(cli.main(sys.argv[1:]))
"""

    def start(out):
        return subprocess.Popen(
            [sys.executable, "-c", program, "run", "quickstart", "--preset", "smoke", "--datasets",
             "arm", "--models", "comet", "--seeds", "1", "--epochs", "400", "--optimizer", "adam",
             "--lr", "1e-3", "--jobs", "1", "--out", str(out)], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def saved(out):
        """Return when the newest checkpoint was written; 0 if there is none, or one is renamed."""
        with contextlib.suppress(FileNotFoundError):
            return max((f.stat().st_mtime_ns for f in out.glob("cells/*/checkpoint")), default=0)
        return 0

    undisturbed = start(tmp_path / "whole")
    output, _ = undisturbed.communicate(timeout=200)
    assert undisturbed.returncode == 0, output
    draw = random.Random(0)
    for kills in range(25):
        before = saved(tmp_path / "killed")
        process = start(tmp_path / "killed")
        while saved(tmp_path / "killed") == before and process.poll() is None:
            time.sleep(0.002)  # until this start has trained and saved
        time.sleep(draw.uniform(0.0, 0.06))
        assert process.poll() is None, f"the run ended after {kills} kills: make it longer"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(tmp_path / "killed")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    whole, killed = (next((tmp_path / name).glob("cells/*")) for name in ("whole", "killed"))
    assert lines(killed) == lines(whole)
    assert len(lines(killed)) == 401
    arrays, expected = (checkpoint.load(folder / "final")[0] for folder in (killed, whole))
    assert set(arrays) == {"flat", "first", "second"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])


def test_divergence_names_step_and_layer(arm, tmp_path):
    run = trainer(TrainConfig(ARM, lr=1e6), arm, tmp_path)
    with pytest.raises(Diverged, match=r"at step \d+ .* not finite is a_\d of layer \d"):
        run.run()
    arrays, description = checkpoint.load(tmp_path / "diverged")
    assert arrays["flat"].size == mlp.parameter_count(ARM)
    assert description["step"] == run.learner.state.step


@pytest.mark.parametrize("group", [1, 5, 1000])
def test_divergence_is_found_at_its_step_however_often_losses_are_read(arm, tmp_path, monkeypatch,
                                                                        group):
    run = trainer(TrainConfig(ARM, epochs=3), arm, tmp_path)
    monkeypatch.setattr(run.backend, "losses_at_once", group, raising=False)
    loss_forward = run.learner.loss_forward

    def sabotaged(a_L, y, stacked):
        loss, cache = loss_forward(a_L, y, stacked)
        return (loss * np.nan if run.learner.state.step == 6 else loss), cache

    monkeypatch.setattr(run.learner, "loss_forward", sabotaged)
    with pytest.raises(Diverged, match=r"at step 6 .* not finite is the loss itself;"):
        run.run()
    assert run.learner.state.step == 6


def test_a_checkpoint_of_another_run_is_refused(arm, tmp_path, monkeypatch):
    config = TrainConfig(ARM, epochs=2)
    first = trainer(config, arm, tmp_path)
    monkeypatch.setattr(first, "due", lambda: True)
    monkeypatch.setattr(first, "finish", lambda: None)
    first.run()
    with pytest.raises(checkpoint.CheckpointError, match=r"another run \(lr was 0.01, is 0.5\)"):
        trainer(replace(config, lr=0.5), arm, tmp_path).run()


def test_sgd_in_the_backward_pass_is_sgd(arm):
    """The update without a gradient buffer and the one with it agree to rounding."""
    fused = Learner(TrainConfig(ARM, precision="float64"), "regression", get_backend("numpy"))
    clipped = OptimizerConfig("sgd", clip_norm=1e9)  # never clips, but needs the gradient
    plain = Learner(TrainConfig(ARM, clipped, precision="float64"), "regression",
                    get_backend("numpy"))
    x = arm.x_train[:32].astype("float64")
    y = arm.y_train[:32].astype("float64")
    for _ in range(5):
        assert fused.step(x, y, 0.1) == pytest.approx(plain.step(x, y, 0.1), rel=1e-12)
    for a, b in zip(leaves(fused.params), leaves(plain.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def test_checkpoints_are_seldom_enough(arm, tmp_path, monkeypatch):
    run = trainer(TrainConfig(ARM), arm, tmp_path)
    run.metrics.close()
    now = run.saved_at
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    run.save_cost = 0.5
    now += 49
    assert not run.due()
    now += 2  # 0.5 s of writing in 51 s of training is about 1 %
    assert run.due()


def test_a_last_step_that_diverges_is_no_success(arm, tmp_path):
    data = replace(arm, x_train=arm.x_train[:32], y_train=arm.y_train[:32])
    with pytest.raises(Diverged, match="at step 1 "):
        trainer(TrainConfig(ARM, lr=1e30, epochs=1), data, tmp_path).run()


def test_ctrl_c_in_the_last_evaluation_is_not_lost(arm, tmp_path, monkeypatch):
    run = trainer(TrainConfig(ARM, epochs=1), arm, tmp_path)
    finish = run.finish

    def interrupted():
        signal.raise_signal(signal.SIGINT)
        return finish()

    monkeypatch.setattr(run, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert (tmp_path / "result.json").exists()


def stopped_after_an_epoch(arm, folder, monkeypatch):
    run = trainer(TrainConfig(ARM, epochs=2), arm, folder)
    monkeypatch.setattr(run, "due", lambda: True)
    monkeypatch.setattr(run, "finish", lambda: None)
    run.run()


def test_a_checkpoint_of_other_data_is_refused(arm, tmp_path, monkeypatch):
    stopped_after_an_epoch(arm, tmp_path, monkeypatch)
    with pytest.raises(checkpoint.CheckpointError, match=r"another run \(data was"):
        trainer(TrainConfig(ARM, epochs=2), datasets.load("arm", seed=7, train=200),
                tmp_path).run()


def test_lost_metrics_are_said(arm, tmp_path, monkeypatch):
    stopped_after_an_epoch(arm, tmp_path, monkeypatch)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(checkpoint.CheckpointError, match="is shorter than when"):
        trainer(TrainConfig(ARM, epochs=2), arm, tmp_path).run()
