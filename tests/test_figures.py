"""What figures share: one look for each model, bands over seeds, files written or refused."""

import sys

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.experiments import figures
from comet_np.experiments.variants import VARIANTS, VARIANTS_OF_BLOCKS


def test_every_model_has_a_look_of_its_own():
    assert set(figures.LOOKS) == set(VARIANTS) | set(VARIANTS_OF_BLOCKS) | {"ewc"}
    for of_all in zip(*figures.LOOKS.values(), strict=True):  # colours, then names
        assert len(set(of_all)) == len(figures.LOOKS)


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="python -m pip install matplotlib"):
        figures.pyplot()


def test_a_band_reaches_from_the_lowest_seed_to_the_highest():
    pytest.importorskip("matplotlib")
    plt = figures.pyplot()
    figure, axes = plt.subplots()
    figures.seed_band(axes, np.arange(2), np.array([[1.0, 2.0], [3.0, 7.0]]), "C0", "two seeds")
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2.0, 4.5])
    corners = {tuple(corner) for corner in axes.collections[0].get_paths()[0].vertices}
    assert corners == {(0, 1), (0, 3), (1, 2), (1, 7)}
    figures.seed_band(axes, np.arange(2), np.array([[1.0, 2.0]]), "C1", "one")
    assert (len(axes.lines), len(axes.collections)) == (2, 1)
    plt.close(figure)


def test_a_saved_figure_is_closed_and_one_that_cannot_be_is_a_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    plt = figures.pyplot()
    before = plt.get_fignums()
    assert figures.save(plt.figure(), tmp_path / "a.png") == tmp_path / "a.png"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"cannot write .* choose another folder with --out"):
        figures.save(plt.figure(), tmp_path / "missing" / "a.png")
    assert plt.get_fignums() == before
