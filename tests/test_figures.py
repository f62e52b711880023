"""The figures' own arithmetic: utilisation, statistics, cosines, and what a lead is."""

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.experiments import fig2, fig3, grid
from comet_np.experiments.experiment import Place
from comet_np.experiments.progress import Progress
from comet_np.functional.routing import winners


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, get_backend("numpy"), None, Progress(1))


def test_utilisation_is_a_share_of_the_first_data_set(place, monkeypatch, draw):
    """The second data set has another number of images."""
    images = {"first": draw.integers(0, 256, (60, 50)).astype("uint8"),
              "second": draw.integers(0, 256, (7, 50)).astype("uint8")}
    monkeypatch.setattr(fig3, "_images", lambda name, place, count: (images[name], 2 / 255, -1.0))
    result = fig3.run_cell(fig3.Fig3Spec(0, 3, None, ("first", "second"), 0), place)
    for network in result["networks"]:
        for quantiles, N in zip(network["quantiles"], network["widths"], strict=True):
            assert max(quantiles) <= 1
            # each image has exactly k winners, so the mean over neurons is k / N
            assert np.mean(quantiles) == pytest.approx(winners(network["p_k"], N) / N, abs=0.02)


def test_statistics_of_sleepers():
    networks = [{"never": 0, "widths": [100, 200]}] * 99 + [{"never": 3, "widths": [100, 200]}]
    found = fig3.statistics(networks)
    value, low, high = found["never active"]
    assert value == 3 / 30_000
    assert low <= value <= high
    value, low, high = found["models with one"]
    assert value == 0.01
    assert 0 < low < 0.01 < high < 0.1


def test_cosine():
    assert fig2.cosine(np.array([[1.0, 0.0], [1.0, 1.0]])) == pytest.approx(0.5**0.5)
    masks = np.array([[True, True, False, False], [True, False, True, False]])
    assert fig2.cosine(masks) == 0.5  # the share of one's active neurons that are the other's


def test_more_similar_inputs_have_more_similar_masks(place):
    spec = fig2.Fig2Spec(0, 12, 2, (0.25, 1.0), 100, 64, 3, 25.0, "softplus", 0)
    result = fig2.run_cell(spec, place)
    mask, activation = np.array(result["mask"]), np.array(result["activation"])
    assert np.corrcoef(result["input"], mask[:, 0])[0, 1] > 0.5
    assert (mask[:, 1] == 1).all()  # p_k = 1 is the vanilla MLP
    assert (activation[:, 0] < activation[:, 1]).all()  # sparser tells inputs apart more sharply


def test_a_lead_is_in_points_or_in_percent_of_the_error():
    accuracy = {0: np.array([0.1, 0.5, 0.4])}, {0: np.array([0.1, 0.6, 0.5])}
    assert grid.advantage(*accuracy, sign=1) == pytest.approx(10)
    error = {3: np.array([1.0, 0.2, 0.3])}, {3: np.array([1.0, 0.5, 0.05])}
    assert grid.advantage(*error, sign=-1) == pytest.approx(75)
    assert np.isnan(grid.advantage({}, accuracy[1], sign=1))


def test_a_lead_is_over_the_seeds_that_both_have():
    standard = {0: np.array([0.5]), 2: np.array([0.9])}
    comet = {0: np.array([0.4]), 1: np.array([0.95])}
    assert grid.advantage(standard, comet, sign=1) == pytest.approx(-10)
    assert grid._won(standard, comet, 1) == "0 of 1"
