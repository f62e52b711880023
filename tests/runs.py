"""Runs for tests: small data, training that is watched from outside, and stopped at a step."""

import contextlib
import json
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.signals import Stop
from comet_np.experiments.training import TrainConfig, loop, train
from comet_np.experiments.training.run import Run
from comet_np.models.mlp import MLPConfig

MODEL = MLPConfig((12, 20, 15, 5), gate=None)
TRAINING = TrainConfig(lr=0.1, batch=8, epochs=2, precision="float64")


def small_data(task="classification"):
    """Return 50, 25 and 17 examples: bytes with a scale and a shift, or standard normal numbers."""
    draw, sizes = np.random.default_rng(1), (50, 25, 17)
    if task == "classification":
        x = [draw.integers(0, 256, (n, 12), dtype="uint8") for n in sizes]
        y, scale = [draw.integers(0, 5, n) for n in sizes], (2 / 255, -1.0)
    else:
        x, y = ([draw.standard_normal((n, N)).astype("float32") for n in sizes] for N in (12, 5))
        scale = (1.0, 0.0)
    return Dataset("small", task, x[0], y[0], x[1], y[1], x[2], y[2], 5, *scale)


def images():
    """Return data whose inputs are images, as augmentations take them."""
    data = small_data()
    return replace(data, image=(3, 32, 32), **{name: np.tile(getattr(data, name), 256)
                                               for name in ("x_train", "x_val", "x_test")})


def tied_data():
    """Return data on which scores tie: of few values, and every third example of zeros."""
    data = small_data()
    for x in data.x_train, data.x_val, data.x_test:
        x %= 3
        x[::3] = 0
    return replace(data, scale=3.0, shift=0.0)


def texts():
    """Return 20, 7 and 5 texts of 9 tokens, of a language with 17."""
    draw = np.random.default_rng(1)
    parts = [draw.integers(0, 17, (n, 9), dtype="uint16") for n in (20, 7, 5)]
    return Dataset("texts", "language", *(part for part in parts for _ in "xy"), 17)


class Watched(NamedTuple):
    """What became of a run: its result, its metrics without times, and its state."""

    result: dict[str, Any]
    lines: list[dict[str, Any]]
    run: Run

    @property
    def arrays(self):
        """Return on the host all that training changed, by name."""
        return {name: self.run.backend.to_host(array)
                for name, array in self.run.learner.arrays().items()}


def trained(config, data, folder, backend=None, stop=None, prepare=lambda run: None):
    """Train as `train` does and return what became of the run; `prepare` is shown it before."""
    runs = []

    def watched(*arguments):
        runs.append(Run(*arguments))
        prepare(runs[0])
        return runs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Run", watched)
        result = train(config, data, folder, backend or get_backend("numpy"), stop=stop)
    return Watched(result, lines(folder), runs[0])


def lines(folder):
    """Return the metrics of a run without their times."""
    text = (folder / "metrics.jsonl").read_text()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"}
            for line in text.splitlines()]


def stopped(*arguments, at=None):
    """Train until the next step, or the one that completes step `at`; return whether it came."""
    stop = Stop()

    def prepare(run):
        after_steps(run, lambda: stop.ask() if at in (None, run.step) else None)

    with contextlib.suppress(KeyboardInterrupt):
        trained(*arguments, stop=stop, prepare=prepare)
        return False
    return True


def after_steps(run, action):
    """Let an action follow every step of a run that Python takes (a graph has its own way)."""
    step = run.learner.step

    def followed(*arguments):
        loss = step(*arguments)
        action()
        return loss

    run.learner.step = followed


def assert_bit_for_bit(ours, theirs):
    """Assert that two runs have the same metrics, weights, moments and number of steps."""
    assert ours.lines == theirs.lines
    assert ours.run.step == theirs.run.step
    assert set(ours.arrays) == set(theirs.arrays)
    for name, array in ours.arrays.items():
        np.testing.assert_array_equal(array, theirs.arrays[name], name)
