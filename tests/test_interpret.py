"""The experiment `interpret`: properties of images, what the nearest foretell, and its pictures."""

import base64

import numpy as np
import pytest

from comet_np import analysis
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import interpret
from comet_np.experiments.cli import main
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import write_result
from comet_np.experiments.interpret import FARTHEST, NEAREST, PROPERTIES, QUERIES, InterpretConfig
from comet_np.experiments.masks import Images, masks_of, network
from comet_np.experiments.progress import Progress
from comet_np.experiments.signals import Stop


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, get_backend("numpy"), None, Progress(1))


def some_images(n=30):
    draw = np.random.default_rng(3)
    x = draw.integers(0, 60, (n, 3072)) + draw.integers(0, 196, (n, 1))
    return Images(x.astype("uint8"), draw.integers(0, 3, n), 2 / 255, -1.0)


def test_properties_pixel_by_pixel():
    images = some_images(3)
    found = interpret.properties(images)
    assert set(found) == set(PROPERTIES[1:])
    for i, image in enumerate(images.x.reshape(3, 3, 32, 32) / 255):
        places = [(r, c) for r in range(32) for c in range(32)]
        grey = {(r, c): image[:, r, c].mean() for r, c in places}
        edge = [(r, c) for r, c in places if min(r, c) < 3 or max(r, c) > 28]
        for colour in range(3):
            assert found["background"][i, colour] == pytest.approx(
                np.mean([image[colour, r, c] for r, c in edge]))
        values = list(grey.values())
        assert found["brightness"][i, 0] == pytest.approx(np.mean(values))
        assert found["contrast"][i, 0] == pytest.approx(np.std(values))
        assert found["light from above"][i, 0] == pytest.approx(
            np.mean(values[:512]) - np.mean(values[512:]))
        steps = [abs(grey[r, c] - grey[r + down, c + 1 - down]) for down in (0, 1)
                 for r, c in places if r + down < 32 and c + 1 - down < 32]
        assert found["detail"][i, 0] == pytest.approx(np.mean(steps))


def test_explained_is_one_less_the_share_that_is_left(draw):
    values, near = draw.standard_normal((9, 2)), draw.integers(0, 9, (9, 4))
    left = sum(((values[i] - np.mean([values[j] for j in near[i]], axis=0)) ** 2).sum()
               for i in range(9))
    assert interpret.explained(near, values) == pytest.approx(1 - left / (9 * values.var(
        axis=0).sum()))
    assert interpret.explained(np.arange(9)[:, None], values) == 1


def test_nearness_by_pixels_is_that_of_the_definitions(place):
    images = some_images(6)
    layers = masks_of(images, network(20, 2, 0.3), 0, place)
    found = dict(interpret.similarities(images, layers))
    assert tuple(found) == InterpretConfig(hidden=2).ways
    x = images.x * (2 / 255) - 1.0
    around = x - x.mean(axis=0)
    for i in range(6):
        for j in range(6):
            for way, expected in (("distance", -((x[i] - x[j]) ** 2).sum()),
                                  ("cosine", cosine(x[i], x[j])),
                                  ("centred", cosine(around[i], around[j]))):
                assert found[way][i, j] == pytest.approx(expected, abs=2e-3), way
    np.testing.assert_array_equal(found["masks 2"], analysis.overlaps(layers[1], layers[1]))
    both = np.concatenate(layers, axis=1)
    np.testing.assert_array_equal(found["masks all"], analysis.overlaps(both, both))


def cosine(u, v):
    return u @ v / (u @ u * (v @ v)) ** 0.5


def test_the_class_is_foretold_by_the_nearest_others(place, monkeypatch):
    images = some_images()
    monkeypatch.setattr(interpret, "some_images", lambda *given: images)
    spec = interpret.cells(InterpretConfig(width=20, images=30, neighbours=3))[0].spec
    result = interpret.run_cell(spec, place)
    frequency = np.bincount(images.y) / 30
    assert result["chance"] == pytest.approx((frequency**2).sum())
    masks = masks_of(images, network(20, 3, 0.1), 0, place)[0]
    assert result["ways"]["masks 1"]["class"] == pytest.approx(
        analysis.class_purity(analysis.overlaps(masks, masks), images.y, 3))


def test_the_picture_is_in_the_order_of_nearness(draw):
    x = np.arange(20, dtype="uint8")[:, None] * np.ones(3072, "uint8")
    similarity = draw.permutation(400).reshape(20, 20) / 400
    found = interpret.picture(x, similarity, np.array([3, 0, 7, 12]))
    pixels = np.frombuffer(base64.b64decode(found["pixels"]), "uint8").reshape(
        QUERIES, -1, 3072)[..., 0]
    for query, row, near in zip((3, 0, 7, 12), pixels, found["similarity"], strict=True):
        others = sorted((i for i in range(20) if i != query), key=lambda i: -similarity[query, i])
        assert row.tolist() == [query, *others[:NEAREST], *others[-FARTHEST:]]
        assert near == [similarity[query, i] for i in row[1:]]


CONFIG = InterpretConfig(hidden=1, p_k=(0.1, 0.5), images=100, seeds=2)


def finished(out):
    """Write files of the cells; masks are 10 points better than pixels but of class, 1 worse."""
    pixels = base64.b64encode(bytes(QUERIES * (1 + NEAREST + FARTHEST) * 3072)).decode()
    shown = {"pixels": pixels, "similarity": [[0.5] * (NEAREST + FARTHEST)] * QUERIES}
    for cell in interpret.cells(CONFIG):
        base = 0.3 + 0.01 * cell.spec.seed
        values = {way: {name: base + (way.startswith("masks") * (0.1 if name != "class" else -0.01))
                        for name in PROPERTIES} for way in CONFIG.ways}
        cell.folder(out).mkdir(parents=True)
        write_result(cell.folder(out), {"chance": 0.1, "ways": values, "picture": {
            "masks all": shown, "cosine": shown}})


def test_the_table_says_what_the_files_do(tmp_path):
    finished(tmp_path)
    table = interpret.table(CONFIG, tmp_path)
    row = next(line.split() for line in table.splitlines() if line.startswith("masks all"))
    assert row[2:5] == ["0.1", "29.5", "+-6.4"]
    assert row[5] == "40.5"
    assert "class -1.0 +- 0.0, background +10.0 +- 0.0" in table
    assert "29.5 +-6.4 % of the nearest are of the same class, by chance 10.0 %" in table


def test_the_figures_show_what_the_files_say(tmp_path, saved):
    finished(tmp_path)
    assert [file.name for file in interpret.draw(CONFIG, tmp_path)] == [
        "interpret.png", "interpret_images.png"]
    explained, pictures = saved
    assert [axes.get_title() for axes in explained.axes] == list(PROPERTIES)
    np.testing.assert_allclose(explained.axes[1].containers[0].lines[0].get_ydata(), 40.5)
    assert len(pictures.axes) == 2 * QUERIES * (1 + NEAREST + FARTHEST)
    assert pictures.axes[1].get_title() == "0.50"


def test_damaged_and_missing_results_are_a_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="holds no finished cell of interpret: run it first"):
        interpret.table(CONFIG, tmp_path)
    finished(tmp_path)
    cell = interpret.cells(CONFIG)[0]
    whole = cell.result(tmp_path)
    for wrong in ({}, whole | {"ways": {}}, whole | {"chance": None}, whole | {"picture": {}},
                  whole | {"picture": {way: {"pixels": "AA==", "similarity": []}
                                       for way in interpret.PICTURED}}):
        write_result(cell.folder(tmp_path), wrong)
        with pytest.raises(UserError, match="run the experiment again"):
            interpret.draw(CONFIG, tmp_path)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"dataset": "arm"}, "unknown data set of 32x32 images"), ({"p_k": ()}, "--p-k needs"),
    ({"seeds": 0}, "at least 1"), ({"images": 5}, "compares from 11 images.* got 5"),
    ({"neighbours": 50, "images": 50}, "from 51 images"), ({"p_k": (0.0,)}, "got 0")])
def test_bad_settings(wrong, message):
    with pytest.raises(UserError, match=message):
        InterpretConfig(**wrong)


def test_a_cell_ends_when_asked_to(place, monkeypatch):
    monkeypatch.setattr(interpret, "some_images", lambda *given: some_images())
    stop = Stop()
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        interpret.run_cell(interpret.cells(CONFIG)[0].spec, place._replace(stop=stop))


def test_a_run_is_finished_by_a_second_one(tmp_path):
    pytest.importorskip("matplotlib")
    run = ["run", "interpret", "--preset", "smoke", "--width", "20", "--hidden", "1", "--p-k",
           "0.5", "--images", "30", "--jobs", "1", "--out", str(tmp_path)]
    assert main([*run, "--seeds", "1"]) == 0
    (first,) = tmp_path.glob("cells/*/result.json")
    content = first.read_bytes()
    assert main([*run, "--seeds", "2"]) == 0
    assert len(list(tmp_path.glob("cells/*/result.json"))) == 2
    assert first.read_bytes() == content
