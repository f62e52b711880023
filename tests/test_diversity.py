"""The experiment `diversity`: its masks, what is counted of them, and what it shows."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from comet_np import analysis
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import diversity, masks
from comet_np.experiments.cli import main
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.diversity import BINS, DiversityConfig, Kind
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import write_result
from comet_np.experiments.masks import Images
from comet_np.experiments.progress import Progress
from comet_np.experiments.signals import Stop
from tests import naive


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, get_backend("numpy"), None, Progress(1))


def some_images(n=50, classes=3):
    draw = np.random.default_rng(3)
    x = draw.integers(0, 60, (n, 3072)) + draw.integers(0, 196, (n, 1))
    return Images(x.astype("uint8"), draw.integers(0, classes, n), 2 / 255, -1.0)


# --- images and masks ---------------------------------------------------------------------------


def test_images_are_of_all_splits_in_an_order_of_the_seed(place, monkeypatch):
    parts = {f"{xy}_{part}": np.arange(first, last) for xy in "xy"
             for part, first, last in (("train", 0, 5), ("val", 5, 8), ("test", 8, 10))}
    data = Dataset("a", "classification", outputs=1, scale=0.5, shift=0.25, **parts)
    monkeypatch.setattr(masks, "load", lambda spec, place: data)
    x, y, *scale = masks.some_images("a", place, 1, None)
    assert sorted(x) == list(range(10))
    assert x.tolist() != sorted(x)
    assert (y.tolist(), scale) == (x.tolist(), [0.5, 0.25])
    assert masks.some_images("a", place, 1, 4).x.tolist() == x[:4].tolist()
    assert masks.some_images("a", place, 2, None).x.tolist() != x.tolist()


def test_masks_are_those_of_equations_4_to_6(place, monkeypatch):
    monkeypatch.setattr(masks, "BLOCK", 3)
    images, config = some_images(8), masks.network(11, 2, 0.3)
    found = masks.masks_of(images, config, 5, place)
    V = config.gate.init(config.widths, 5, get_backend("numpy"), "float32")
    for i, image in enumerate(images.x):
        z = image * (2 / 255) - 1
        for layer, V_l in zip(found, V, strict=True):
            c = V_l.astype("float64") @ z
            m = naive.cap(c, 3)
            np.testing.assert_array_equal(layer[i], m)
            z = c * m


# --- what is counted ----------------------------------------------------------------------------


def test_numbers_are_those_of_counting(draw):
    seen = draw.random((40, 9)) < 0.15
    found = diversity.numbers(seen)
    kinds = [tuple(m) for m in seen]
    assert (found["images"][0], found["images"][-1]) == (10, 40)
    for n, distinct in zip(found["images"], found["distinct"], strict=True):
        assert distinct == len(set(kinds[:n]))
    assert found["once"] == sum(kinds.count(m) == 1 for m in kinds)
    p = [kinds.count(m) / 40 for m in set(kinds)]
    assert found["effective"] == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)))
    p = seen.sum(axis=0) / seen.sum()
    assert found["neurons"] == pytest.approx(math.exp(-sum(q * math.log(q) for q in p if q)))
    assert found["nats"] == pytest.approx(analysis.code_lengths(seen[::2], seen[1::2]).mean())


def test_overlaps_of_pairs_within_and_between_classes(draw):
    x, y, seen = draw.standard_normal((14, 6)), draw.integers(0, 3, 14), draw.random((14, 9)) < 0.4
    pairs = diversity.Pairs.of(x, y)
    found = pairs.overlaps(seen)
    rows = sorted((x[i] @ x[j] / (x[i] @ x[i] * (x[j] @ x[j])) ** 0.5,
                   bool(y[i] == y[j]), (seen[i] & seen[j]).sum()
                   / max(seen[i].sum() * seen[j].sum(), 1) ** 0.5)
                  for i, j in itertools.combinations(range(14), 2))
    cosine, same, overlap = map(np.array, zip(*rows, strict=True))
    assert found["correlation"] == pytest.approx(np.corrcoef(cosine, overlap)[0, 1], abs=1e-6)
    of_bin = np.arange(91) * BINS // 91
    for name, chosen in (("within", same), ("between", ~same)):
        assert found[name] == pytest.approx(overlap[chosen].mean())
        for number, value in enumerate(found[f"{name} by cosine"]):
            here = overlap[chosen & (of_bin == number)]
            assert value == (pytest.approx(here.mean()) if len(here) else None)
    np.testing.assert_allclose(pairs.middles,
                               [cosine[of_bin == number].mean() for number in range(BINS)])


@pytest.mark.parametrize("n", [300, 4000])
def test_dimensions_hold_shares_of_the_variance(n, draw):
    """Of twenty pixels that alone vary, ten a hundred times as much."""
    x = np.full((n, 3072), 100.0)
    x[:, :20] += draw.standard_normal((n, 20)) * ([30] * 10 + [3] * 10)
    images = Images(np.clip(x, 0, 255).astype("uint8"), np.zeros(n), 1.0, 0.0)
    half, most, nearly_all = diversity.dimensions(images)
    assert 4 <= half <= 6
    assert most <= 10
    assert 10 <= nearly_all <= 12


# --- what it shows ------------------------------------------------------------------------------

CONFIG = DiversityConfig(sizes=(20, 30), p_k=(0.1, 0.5), hidden=1, images=1000, compared=24,
                         seeds=2)


def finished(out, config=CONFIG):
    """Write files of the cells; of a seed more, one mask more was met."""
    for cell in diversity.cells(config):
        cell.folder(out).mkdir(parents=True)
        if cell.name == "dimensions":
            write_result(cell.folder(out), {"dimensions": [1, 2, 40]})
            continue
        layer = {"images": [10, 1000], "distinct": [10, 500 + cell.spec.seed], "once": 250,
                 "chao1": 600.0, "least": 100.0, "effective": 400.0, "nats": 4 * math.log(10),
                 "neurons": 12.0, "correlation": 0.5, "within": 0.25, "between": 0.125,
                 "within by cosine": [0.25] * BINS, "between by cosine": [None] + [0.125] * 11}
        write_result(cell.folder(out), {"images": 1000, "cosine": list(range(BINS)),
                                        "layers": [layer, layer]})


def test_the_table_says_what_the_files_do(tmp_path):
    finished(tmp_path)
    table = diversity.table(CONFIG, tmp_path)
    row = next(line for line in table.splitlines() if line.split()[:3] == ["30", "0.5", "1"])
    assert row.split()[3:] == [
        "10^8.2", "10^2.0", "10^(4.0", "+-0.0)", "500", "+-6", "400", "600", "25.0", "12", "0.250",
        "+-0.000", "0.125", "+-0.000", "0.500", "+-0.000"]
    row = next(line for line in table.splitlines() if line.split()[:3] == ["20", "0.1", "all"])
    assert row.split()[3:7] == ["10^2.3", "10^2.0", "10^(2.3", "+-0.0)"]  # no more than there are
    assert "Of the 10^3.6 experts of a first layer with N = 30 and p_k = 0.1, 1,000" in table
    assert "between 10^2.0 and 10^(3.6 +-0.0), at most a share of 10^0.0 of all." in table
    assert "one class share 25.0 +-0.0 % of their active neurons, of two classes 12.5" in table
    assert "those of one class share +12.5 +- 0.0 points more." in table  # 11 of the 12 bins
    bound = math.log10(2 * sum(math.comb(29, i) for i in range(3)))
    assert f"no more than 10^{bound:.0f} (1, which hold 50%" in table


def test_possible_masks_of_all_layers_are_those_of_each_with_each():
    config = replace(CONFIG, hidden=3)
    one, every = (diversity.log10_possible(config, Kind(20, 0.1, layer)) for layer in ("2", "all"))
    assert (one, every) == pytest.approx((math.log10(190), math.log10(190**3)))  # C(20, 2) = 190


def test_what_a_class_adds_is_compared_bin_by_bin():
    """Of images of an equal cosine; of two networks, one of which has such in three bins."""
    nan = [None] * (BINS - 3)
    lists = {"within by cosine": np.array([[0.5, 0.6, 0.9, *nan], [0.5, 0.9, None, *nan]], float),
             "between by cosine": np.array([[0.4, 0.2, 0.5, *nan], [0.4, 0.4, 0.1, *nan]], float)}
    found = diversity.of_equal_cosine(diversity.Measured({}, lists))
    assert found.mean == pytest.approx(30)  # of 10, 40 and 40; and of 10 and 50
    lists["within by cosine"][:] = np.nan
    assert math.isnan(diversity.of_equal_cosine(diversity.Measured({}, lists)).mean)


def test_the_figure_shows_what_the_files_say(tmp_path, saved):
    finished(tmp_path)
    assert diversity.draw(CONFIG, tmp_path) == [tmp_path / "diversity.png"]
    met, _, overlaps = saved[0].axes
    np.testing.assert_allclose(met.lines[0].get_xydata(), [[10, 10], [1000, 500.5]])
    np.testing.assert_allclose(overlaps.lines[0].get_ydata(), 0.25)


def test_a_part_of_the_cells_is_shown(tmp_path, saved):
    config = DiversityConfig(sizes=(30,), p_k=(0.5,), hidden=1, images=1000, compared=24, seeds=1)
    finished(tmp_path, config)
    assert set(diversity.read(CONFIG, tmp_path).kinds) == {
        Kind(30, 0.5, "1"), Kind(30, 0.5, "all")}
    assert "25.0 %" in diversity.table(CONFIG, tmp_path)
    diversity.draw(CONFIG, tmp_path)


def test_nothing_finished_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no finished cell of diversity: run it first"):
        diversity.table(CONFIG, tmp_path)


def test_damaged_results_are_a_sentence(tmp_path):
    finished(tmp_path)
    cell = diversity.cell_of(CONFIG, 20, 0.1, 0)
    for wrong in ({}, {"layers": []}, {"layers": 3, "cosine": []}):
        write_result(cell.folder(tmp_path), wrong)
        with pytest.raises(UserError, match="run the experiment again"):
            diversity.table(CONFIG, tmp_path)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"dataset": "arm"}, "unknown data set of 32x32 images"), ({"sizes": ()}, "--sizes needs"),
    ({"p_k": (0.5, 0.5)}, "--p-k .* each given once"), ({"p_k": (2.0,)}, "got 2"),
    ({"p_k": (1.0,)}, "one expert: give --p-k below 1"),
    ({"seeds": 0}, "at least 1 seed"), ({"compared": 3}, "compared = 3 of 20000 images"),
    ({"images": 100}, "compared = 1500 of 100 images")])
def test_bad_settings(wrong, message):
    with pytest.raises(UserError, match=message):
        DiversityConfig(**wrong)


def test_a_cell_ends_when_asked_to(place, monkeypatch):
    monkeypatch.setattr(diversity, "some_images", lambda *given: some_images())
    stop = Stop()
    stop.ask()
    for cell in diversity.cells(CONFIG)[:2]:
        with pytest.raises(KeyboardInterrupt):
            diversity.run_cell(cell.spec, place._replace(stop=stop))


def test_a_run_is_finished_by_a_second_one(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = ["run", "diversity", "--preset", "smoke", "--sizes", "20", "--p-k", "0.5", "--hidden",
           "1", "--images", "60", "--compared", "24", "--out", str(tmp_path)]
    assert main([*run, "--seeds", "1", "--jobs", "1"]) == 0
    first = {file: file.read_bytes() for file in tmp_path.glob("cells/*/result.json")}
    assert len(first) == 2
    assert main([*run, "--seeds", "2", "--jobs", "1"]) == 0
    assert len(list(tmp_path.glob("cells/*/result.json"))) == 3
    assert all(file.read_bytes() == content for file, content in first.items())
    assert "60 images meet" in capsys.readouterr().out
