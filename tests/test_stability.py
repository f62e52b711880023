"""The experiment `stability`: V of a seed apart, its estimates, and what it shows of the files."""

from dataclasses import replace

import numpy as np
import pytest

from comet_np.checkpoint import CheckpointError
from comet_np.errors import UserError
from comet_np.experiments import stability
from comet_np.experiments.cli import main
from comet_np.experiments.files import finish
from comet_np.experiments.registry import experiment
from comet_np.experiments.stability import StabilityConfig, cell_of, cells, pairs
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.training.model import load_run
from comet_np.gates import Comet, Layerwise
from comet_np.models import mlp
from comet_np.models.mlp import MLPConfig
from comet_np.models.moe import MoEConfig
from tests.runs import MODEL, TRAINING, assert_bit_for_bit, small_data, stopped, trained
from tests.test_records import finish_cell

SMALL = StabilityConfig("glyphs", draws=3, crossed=2, width=8, layers=3, train=32, validation=20,
                        training=TrainConfig(lr=0.1, batch=8, epochs=1))
COMET = replace(MODEL, gate=Comet(0.5))


# --- a seed of V apart --------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [Comet(0.25), Layerwise(0.5)])
def test_fixed_weights_may_have_a_seed_apart(gate, tmp_path):
    model = replace(MODEL, gate=gate)
    untrained = replace(TRAINING, epochs=0)
    found = [trained(RunConfig(model, untrained, *seeds), small_data(), tmp_path / str(seeds)).run
             .learner for seeds in ((3, 8), (3, None), (3,))]
    params, V = mlp.init(model, 3, dtype="float64")
    _, apart = mlp.init(model, 8, dtype="float64")
    for learner, expected in zip(found, (apart, V, V), strict=True):
        for ours, theirs in zip(learner.params, params, strict=True):
            np.testing.assert_array_equal(ours.weight, theirs.weight)
            np.testing.assert_array_equal(ours.bias, theirs.bias)
        for ours, theirs in zip(learner.fixed, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_order_of_the_data_is_the_backbones(tmp_path):
    """A model without fixed weights trains as if nothing had been said of them."""
    ours, theirs = (trained(RunConfig(MODEL, TRAINING, 3, seed), small_data(), tmp_path / str(seed))
                    for seed in (8, None))
    assert_bit_for_bit(ours, theirs)


def test_a_fixed_gate_of_a_mixture_has_it_too(tmp_path):
    model = MoEConfig((12, 6, 5), 3, trainable=False)
    one, other = (trained(RunConfig(model, TRAINING, *seeds), small_data(), tmp_path / str(seeds))
                  .run.learner.fixed for seeds in ((3, 8), (8, None)))
    np.testing.assert_array_equal(one[0].weight, other[0].weight)


def test_a_stopped_run_goes_on_with_its_own_routing(tmp_path):
    config, data = RunConfig(COMET, TRAINING, 3, 8), small_data()
    whole = trained(config, data, tmp_path / "whole")
    assert stopped(config, data, tmp_path / "cut", at=5)
    for other in (None, 9):
        with pytest.raises(CheckpointError, match=f"routing_seed was 8, is {other}"):
            trained(replace(config, routing_seed=other), data, tmp_path / "cut")
    again = trained(config, data, tmp_path / "cut")
    assert_bit_for_bit(again, whole)
    finish(tmp_path / "cut", again.result)
    model = load_run(tmp_path / "cut")
    assert model.run == config
    for ours, drawn in zip(model.fixed, mlp.init(COMET, 8, dtype="float64")[1], strict=True):
        np.testing.assert_array_equal(ours, drawn)


# --- estimates ----------------------------------------------------------------------------------


def test_intervals_of_spreads_are_those_of_their_distributions(draw):
    """Against the definitions: the tails of chi-square and of F that the intervals leave out."""
    from scipy.stats import chi2, f

    one, other = draw.standard_normal(7), 2 * draw.standard_normal(5)
    s, low, high = stability.deviation(one)
    assert s == pytest.approx(np.sqrt(((one - one.mean()) ** 2).sum() / 6))
    assert chi2.cdf(6 * s**2 / low**2, 6) == pytest.approx(0.975)
    assert chi2.cdf(6 * s**2 / high**2, 6) == pytest.approx(0.025)
    value, low, high = stability.ratio(one, other)
    assert value == pytest.approx(s**2 / other.var(ddof=1))
    assert f.cdf(value / low, 6, 4) == pytest.approx(0.975)
    assert f.cdf(value / high, 6, 4) == pytest.approx(0.025)


def naive_shares(y):
    """Sums of squares cell by cell, and expected mean squares solved for the variances."""
    n, m = y.shape
    rows, cols = [np.mean(row) for row in y], [np.mean(column) for column in y.T]
    whole = np.mean(y)
    of_rows = sum(m * (each - whole) ** 2 for each in rows) / (n - 1)
    of_cols = sum(n * (each - whole) ** 2 for each in cols) / (m - 1)
    pair = sum((y[i, j] - rows[i] - cols[j] + whole) ** 2
               for i in range(n) for j in range(m)) / ((n - 1) * (m - 1))
    parts = np.maximum([(of_rows - pair) / m, (of_cols - pair) / n, pair], 0)
    return parts / parts.sum()


def crossed(draw, n, m, *variances):
    """Return a crossed design of these variances of rows, columns and pairs."""
    rows, cols, pair = (np.sqrt(each) * draw.standard_normal(shape) for each, shape in zip(
        variances, ((n, 1), (1, m), (n, m)), strict=True))
    return rows + cols + pair


def test_shares_are_those_of_the_analysis_of_variance(draw):
    for variances in ((1, 4, 2), (0, 1, 1), (3, 0, 0.1)):
        y = crossed(draw, 5, 7, *variances)
        found = stability.shares(y)
        assert [part.value for part in found] == pytest.approx(naive_shares(y).tolist())
        assert all(0 <= part.low <= part.high <= 1 for part in found)
    swapped = stability.shares(y.T)
    assert swapped.routing.value == pytest.approx(found.backbone.value)
    assert swapped.backbone.value == pytest.approx(found.routing.value)


def test_intervals_of_shares_hold_the_truth(draw, monkeypatch):
    """Of 200 designs: as many as 95 % say, four standard errors of a proportion aside."""
    monkeypatch.setattr(stability, "PIVOTS", 2000)
    held = np.zeros(3)
    for _ in range(200):
        found = stability.shares(crossed(draw, 8, 8, 2, 1, 1))
        held += [part.low <= truth <= part.high
                 for part, truth in zip(found, (0.5, 0.25, 0.25), strict=True)]
    assert (held / 200 > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 200)).all()
    assert (held / 200 < 1).any()


# --- cells --------------------------------------------------------------------------------------


def test_cells_are_both_arms_the_standard_model_and_the_block():
    assert pairs(SMALL) == [(0, 0), (0, None), (0, 1), (1, 0), (1, None), (0, 2), (2, 0),
                            (2, None), (1, 1)]
    for (backbone, routing), cell in zip(pairs(SMALL), cells(SMALL), strict=True):
        run = cell.spec.run
        assert (run.seed, run.routing_seed) == (backbone, routing)
        assert run.model == MLPConfig((3072, 8, 8, 10),
                                      gate=None if routing is None else Comet(0.5))
    assert len({cell.name for cell in cells(SMALL)}) == 9
    assert len(pairs(replace(SMALL, draws=20, crossed=8))) == 20 + 19 + 20 + 49


@pytest.mark.parametrize(("changes", "message"), [
    ({"dataset": "arm"}, "of accuracies: choose a --dataset to classify, got arm"),
    ({"dataset": "cifar11"}, 'unknown data set "cifar11"'),
    ({"draws": 1, "crossed": 0}, "at least 2 draws"),
    ({"crossed": 1}, "draws = 3, crossed = 1"),
    ({"crossed": 4}, "draws = 3, crossed = 4"),
    ({"layers": 0}, "layers = 0"),
    ({"train": 0}, "train = 0"),
    ({"p_k": 0.0}, r"must be in \(0, 1\], got 0"),
    ({"training": replace(SMALL.training, schedule="warmup_cosine", warmup=9)}, "0 to 4 steps")])
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message) as error:
        replace(SMALL, **changes)
    assert "\n" not in str(error.value)


# --- figure and table, from files made by hand --------------------------------------------------

ACCURACY = {(0, 0): 0.5, (0, 1): 0.6, (0, 2): 0.7, (1, 0): 0.4, (2, 0): 0.6, (1, 1): 0.5,
            (0, None): 0.3, (1, None): 0.3, (2, None): 0.6}


def finished(out, *seeds):
    for each in seeds:
        finish_cell(cell_of(SMALL, each), out, {"last": {"val_accuracy": ACCURACY[each]}})


def test_the_table_says_what_the_files_say(tmp_path):
    finished(tmp_path, *pairs(SMALL))
    lines = stability.table(SMALL, tmp_path).splitlines()
    found = [line.replace(name, "").split()
             for line, name in zip(lines[1:4], stability.ARMS.values(), strict=True)]
    assert [line[:3] for line in found] == [["3", "60.00", "10.00"], ["3", "50.00", "10.00"],
                                            ["3", "40.00", "17.32"]]
    assert [line[-1] for line in found] == ["50.00-70.00", "40.00-60.00", "30.00-60.00"]
    assert found[0][3] == "5.21-62.85"  # sqrt(2 / chi2_2), of 7.378 and 0.0506
    assert "alone makes 1.00 (95 %: 0.03-39.00) of the variance that the backbone" in lines[5]
    assert "makes 0.33 (0.01-13.00) of the standard model's" in lines[5]
    assert "2 backbones x 2 draws of V, the draw of V makes 50 % (" in lines[6]
    assert "the backbone 50 % (" in lines[6]
    assert "and 0 % (" in lines[6]


@pytest.mark.parametrize("seeds", [[(0, 0)], [(0, None), (1, None)], [(0, 1), (0, 2), (2, 0)]])
def test_a_part_of_the_cells_is_shown(seeds, tmp_path, saved):
    finished(tmp_path, *seeds)
    text = stability.table(SMALL, tmp_path)
    assert "of 3" in text
    assert "nan" not in text
    assert "of the variance" not in text
    stability.draw(SMALL, tmp_path)
    saved[0].canvas.draw()
    assert not saved[0].axes[1].axison


def test_equal_accuracies_have_no_shares(tmp_path, saved, monkeypatch):
    """As networks that have learnt nothing have: no number is divided by 0."""
    monkeypatch.setitem(globals(), "ACCURACY", dict.fromkeys(ACCURACY, 0.1))
    finished(tmp_path, *pairs(SMALL))
    assert stability.table(SMALL, tmp_path).splitlines()[-1].startswith("glyphs, N = 8")
    stability.draw(SMALL, tmp_path)


def test_the_figure_shows_what_the_files_say(tmp_path, saved):
    finished(tmp_path, *pairs(SMALL))
    stability.draw(SMALL, tmp_path)
    left, middle, right, *_ = saved[0].axes
    dots = [points.get_offsets()[:, 1].tolist() for points in left.collections
            if len(points.get_offsets()) == 3]
    np.testing.assert_allclose(dots, [[50, 60, 70], [50, 40, 60], [30, 30, 60]])
    np.testing.assert_allclose(middle.images[0].get_array(), [[0, 10], [-10, 0]])
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], [50, 50, 0], atol=1e-9)
    assert "glyphs, 32 training examples, 3 layers, N = 8" in saved[0].get_suptitle()


def test_nothing_finished_is_a_sentence(tmp_path):
    for show in (stability.table, stability.draw):
        with pytest.raises(UserError, match="holds no finished cell of stability: run it first"):
            show(SMALL, tmp_path)


def test_a_run_from_the_command_line(tmp_path, capsys):
    command = ["run", "stability", "--preset", "smoke", "--jobs", "1", "--width", "6", "--train",
               "40", "--validation", "20", "--draws", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "Of the variance of 2 backbones x 2 draws of V" in first
    assert (tmp_path / "stability.png").exists()
    assert main(command) == 0  # finished cells are found
    assert [line for line in first.splitlines() if "V" in line][-3:] == [
        line for line in capsys.readouterr().out.splitlines() if "V" in line][-3:]


def test_the_paper_has_enough_draws():
    config = experiment("stability").configure("paper", {})
    assert config.draws >= 20
    assert config.train is None
