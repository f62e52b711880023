"""The laws of extension: a gate, a model, a task and a data set of one's own need no change of the
package. Each trains, is stopped and goes on bit for bit, on every backend, and is drawn.

Read the first fifty lines, and `tests/residual.py`, to write your own.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from comet_np.backends import get_backend, xp_of
from comet_np.errors import UserError
from comet_np.experiments import datasets, grid, variants
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.quickstart import EXPERIMENT
from comet_np.experiments.sweep import Sweep
from comet_np.experiments.tasks.base import Metric, Task
from comet_np.experiments.training import Diverged, RunConfig, TrainConfig, loop
from comet_np.functional.linear import project
from comet_np.gates import Gate
from comet_np.gradcheck import check_gradients
from comet_np.models.mlp import MLPConfig
from comet_np.optim import OptimizerConfig
from comet_np.rng import uniform
from comet_np.tree import zeros_like
from tests import residual
from tests.residual import ResidualConfig
from tests.runs import assert_bit_for_bit, small_data, stopped, trained
from tests.tolerances import TOLERANCES


@dataclass(frozen=True)
class HalfSpaces(Gate):
    """A gate of one's own: each neuron is active on one side of a fixed random plane, V x > 0."""

    depends_on: ClassVar = "input"  # so that the masks of a data set are computed once and kept

    def shapes(self, widths):
        return tuple((N, widths[0]) for N in widths[1:-1])

    def init(self, widths, seed, backend, dtype):
        return tuple(uniform(backend, dtype, widths[0], shape, seed, "plane", layer)
                     for layer, shape in enumerate(self.shapes(widths)))

    def masks(self, x, fixed, config, at):
        return tuple(project(x, V) > 0 for V in fixed)


class AbsoluteError(Task):
    """A task of one's own: mean |y - target|, and the share of examples that are off by < 1."""

    metric = Metric("near", "predictions off by less than 1", 1)

    def loss_forward(self, output, y):
        e = output - y
        return abs(e).mean(), e

    def loss_backward(self, dloss, e):
        return xp_of(e).sign(e) * (dloss / e.size)

    def counts(self, output, y):
        return {"near": (abs(output - y) < 1).all(axis=-1).sum()}


def data_of_a_table(file, seed=0):
    """Return a data set of one's own: a table whose last column is to be told from the others."""
    table = np.loadtxt(file, delimiter=",", dtype="float32")
    (train, val, test), N = np.split(table, [60, 80]), table.shape[1] - 1
    return Dataset("table", AbsoluteError(), train[:, :N], train[:, N:], val[:, :N], val[:, N:],
                   test[:, :N], test[:, N:], outputs=1)


def write_table(folder):
    """Write a table: the target is a function of the other columns."""
    x = np.random.default_rng(0).standard_normal((100, 6))
    y = 3 * np.tanh(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    np.savetxt(folder / "table.csv", np.hstack([x, y]), delimiter=",")
    return folder / "table.csv"


class Unkept(HalfSpaces):
    """The same gate, whose masks are not kept but computed at every step."""

    depends_on = None


ADAM = TrainConfig(OptimizerConfig("adam"), batch=8, epochs=3)
SGD = TrainConfig(lr=0.1, batch=8, epochs=3)
GATED = MLPConfig((12, 20, 15, 5), gate=HalfSpaces())
OWN = {  # the run, and what it is trained on
    "gate": (RunConfig(GATED, ADAM), "regression"),
    "gate, the backward pass is the update": (RunConfig(GATED, SGD), "regression"),
    "gate, not kept": (RunConfig(replace(GATED, gate=Unkept(), dropout=0.2), ADAM), "regression"),
    "model": (RunConfig(ResidualConfig(12, 5), ADAM), "regression"),
    "model, the backward pass is the update": (RunConfig(ResidualConfig(12, 5), SGD),
                                               "classification"),
    "task and data": (RunConfig(MLPConfig((6, 20, 1)), ADAM), "table"),
    "everything": (RunConfig(ResidualConfig(6, 1), SGD), "table"),
}


def check_own(name, folder, backend, epochs=3):
    """Assert that a run with something of one's own goes on bit for bit after every stop."""
    config, kind = OWN[name]
    config = replace(config, training=replace(config.training, epochs=epochs))
    data = data_of_a_table(write_table(folder)) if kind == "table" else small_data(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "STEPS_AHEAD", 4)
        whole, stops = trained(config, data, folder / "whole", backend), 0
        while stopped(config, data, folder / "parts", backend):
            stops += 1
        assert stops >= 2 * epochs
        assert_bit_for_bit(trained(config, data, folder / "parts", backend), whole)
    return whole


@pytest.mark.parametrize("name", OWN)
def test_what_is_of_ones_own_trains_and_resumes_bit_for_bit(name, tmp_path):
    whole = check_own(name, tmp_path, get_backend("numpy"))
    assert whole.lines[-1]["train_loss"] < whole.lines[1]["train_loss"]


def test_masks_that_are_kept_are_those_that_are_not(tmp_path):
    kept, fresh = (trained(RunConfig(replace(GATED, gate=gate), ADAM), small_data(),
                           tmp_path / str(i)) for i, gate in enumerate((HalfSpaces(), Unkept())))
    assert kept.run.training.model.gate != fresh.run.training.model.gate
    assert_bit_for_bit(kept, fresh)


def test_another_gate_of_ones_own_is_another_run(tmp_path):
    assert stopped(RunConfig(GATED, ADAM), small_data(), tmp_path)
    with pytest.raises(UserError, match="gate was HalfSpaces, is Unkept"):
        trained(RunConfig(replace(GATED, gate=Unkept()), ADAM), small_data(), tmp_path)


def test_a_model_of_ones_own_has_its_gradients_checked(draw):
    config = ResidualConfig(4, 3)
    params, fixed = residual.init(config, dtype="float64")

    def forward(at):
        return residual.forward(at["x"], at["params"], fixed, config)

    def backward(dy, cache, at):
        grads = zeros_like(at["params"])
        return {"x": residual.backward(dy, cache, at["params"], grads, config), "params": grads}

    result = check_gradients(forward, backward, {"x": draw.standard_normal((5, 4)),
                                                 "params": params})
    assert result.error <= TOLERANCES["difference"]["float64"], result


def test_a_model_of_ones_own_that_diverges_names_what_did(tmp_path):
    def spoil(run):
        run.learner.params["block"].weight[2, 1] = np.nan

    with pytest.raises(Diverged, match=r"not finite is parameter\.block\.weight;"):
        trained(RunConfig(ResidualConfig(12, 5), SGD), small_data(), tmp_path, prepare=spoil)


def test_a_model_without_a_format_of_products_has_its_own_only(tmp_path):
    with pytest.raises(UserError, match=r"ResidualConfig has no field `compute`, .* float64"):
        trained(RunConfig(ResidualConfig(12, 5), replace(SGD, precision="tf32")), small_data(),
                tmp_path)


def test_a_task_of_ones_own_is_measured_by_its_own_metric(tmp_path):
    data, config = data_of_a_table(write_table(tmp_path)), OWN["task and data"][0]
    ours = trained(config, data, tmp_path / "run")
    output = ours.run.learner.forward(next(ours.run.test.blocks()), ours.run.test).output
    off = np.abs(output - data.y_test)
    assert ours.result["test_near"] == (off < 1).mean()
    assert ours.result["test_loss"] == pytest.approx(off.mean(), rel=1e-6)
    assert ours.result["data"] == data.digest


def make_known(folder, monkeypatch):
    """Let experiments know the gate as the model "half-spaces", and the table as "table"."""
    file = write_table(folder)
    monkeypatch.setitem(variants.VARIANTS, "half-spaces", lambda run, p_k, ties: replace(
        run, model=replace(run.model, gate=HalfSpaces())))
    monkeypatch.setitem(datasets.DATASETS, "table", datasets.Entry(
        datasets.Sizes(AbsoluteError(), 6, 1, 60), lambda seed: data_of_a_table(file)))


def test_a_gate_and_a_data_set_of_ones_own_are_compared_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="draws, and matplotlib is not installed")
    make_known(tmp_path, monkeypatch)
    config = grid.GridConfig(("table",), ("standard", "half-spaces"), (0.5,), 2, widths=(10,),
                             training=ADAM)
    outcomes = Sweep("quickstart", grid.cells(config), tmp_path / "out").run()
    assert [outcome.status for outcome in outcomes] == 4 * ["done"], outcomes
    assert all(file.stat().st_size > 10_000 for file in EXPERIMENT.draw(config, tmp_path / "out"))
    row = EXPERIMENT.table(config, tmp_path / "out").splitlines()[1]
    assert row.startswith("table")
    assert "half-spaces" in row
