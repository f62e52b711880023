"""The experiment `routers`: its measures number by number, its cells, and what it shows of them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import routers
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.datasets.base import scaled
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import finish
from comet_np.experiments.progress import Progress
from comet_np.experiments.registry import experiment
from comet_np.experiments.routers import RoutersConfig, cell_of, measures, share, verdict
from comet_np.experiments.signals import Stop
from comet_np.experiments.training.model import load_run
from comet_np.functional.routing import kwta_mask
from comet_np.gates import Comet
from comet_np.models import gpt2, mlp, vit
from tests.test_records import finish_cell, one_sentence
from tests.test_trained import forgeries

SMALL = RoutersConfig("glyphs", routers=("standard", "dense", "sparse-binary", "relu"),
                      block_routers=("dense", "kronecker"), width=12, epochs=1, batch=8, train=32,
                      validation=20, images=12, vit_size="1x8x2", vit_hidden=12, patch=16,
                      vit_epochs=1, gpt_size="1x8x2", gpt_steps=2, context=16, seeds=2)


# --- measures -----------------------------------------------------------------------------------


def naive_measures(masks, x, labels):
    """Pair by pair."""
    n, N = masks.shape
    pairs = list(itertools.combinations(range(n), 2))

    def shared(i, j):
        return sum(masks[i] & masks[j]) / np.sqrt(sum(masks[i]) * sum(masks[j]))

    def cosine(i, j):
        return sum(x[i] * x[j]) / np.sqrt(sum(x[i]**2) * sum(x[j]**2))

    def ranks(values):  # the mean rank of equal ones
        return [(sum(v < w for v in values) + sum(v <= w for v in values) + 1) / 2 for w in values]

    one = np.array(ranks([round(shared(i, j), 9) for i, j in pairs]))
    two = np.array(ranks([cosine(i, j) for i, j in pairs]))
    one, two = one - one.mean(), two - two.mean()
    counts = [sum(masks[:, i]) for i in range(N)]
    p = [count / sum(counts) for count in counts if count]
    own = [sum(labels[j] == labels[i] for j in sorted(
        (j for j in range(n) if j != i), key=lambda j: (-round(shared(i, j), 6), j))[:10]) / 10
        for i in range(n)]
    return (sum(one * two) / np.sqrt(sum(one**2) * sum(two**2)),
            np.mean([shared(i, j) for i, j in pairs]), np.mean([count == 0 for count in counts]),
            np.exp(-sum(each * np.log(each) for each in p)) / N, np.mean(own))


def test_measures_are_those_of_counting_pair_by_pair(draw):
    x = draw.standard_normal((20, 9)) + 0.5 * draw.standard_normal(9)
    masks = kwta_mask(x @ draw.standard_normal((9, 16)) - 40 * (np.arange(16) == 3), 5)
    labels = draw.integers(0, 3, 20)
    found = measures(masks, x, labels)
    assert found == pytest.approx(naive_measures(masks, x, labels), rel=1e-5)
    assert 0.2 < found.likeness < 1 and found.never > 0 and found.even < 1


def test_masks_that_are_all_the_same_are_like_nothing():
    masks = np.tile(np.arange(6) < 3, (12, 1))
    found = measures(masks, np.random.default_rng(0).standard_normal((12, 4)), np.arange(12) % 2)
    assert (found.likeness, found.overlap, found.never) == (0, pytest.approx(1), 0.5)


@pytest.mark.parametrize(("ours", "dense", "sign", "expected"), [
    ((0.5, 0.7), (0.5, 0.6), 1, "within"), ((0.7, 0.8), (0.5, 0.6), 1, "better"),
    ((0.4, 0.5), (0.5, 0.6), 1, "worse"), ((9.0, 9.5), (10.0, 11.0), -1, "better"),
    ((12.0, 13.0), (10.0, 11.0), -1, "worse"), ((10.0, 11.0), (10.0, 11.0), -1, "within"),
    ((0.5,), (0.5,), 1, "-")])
def test_verdicts(ours, dense, sign, expected):
    assert verdict(np.array(ours), np.array(dense), sign) == expected


# --- cells --------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, draw, monkeypatch):
    parts = [part for n in (32, 20, 16) for part in (
        draw.integers(0, 256, (n, 3072), dtype="uint8"), draw.integers(0, 10, n))]
    data = Dataset("noise", "classification", *parts, 10, 2 / 255, -1.0, image=(3, 32, 32))
    monkeypatch.setattr(routers, "load", lambda spec, place: data)
    return Place(tmp_path / "cell", get_backend("numpy"), None, Progress(1))


@pytest.mark.parametrize("kind", SMALL.routers)
def test_a_cell_measures_its_masks_though_it_was_stopped(kind, place):
    spec, stop = cell_of(SMALL, "mlp", kind, 1).spec, Stop()
    whole = routers.run_cell(spec, place._replace(folder=place.folder.with_name("whole")))
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        routers.run_cell(spec, place._replace(stop=stop))
    result = routers.run_cell(spec, place)
    finish(place.folder, result)
    for each in whole, result:
        del each["seconds"], each["last"]["seconds"]
    assert result == whole
    if kind == "standard":
        assert "layers" not in result
        return
    trained = load_run(place.folder)
    assert trained.config.gate == (
        Comet(g="relu") if kind == "relu" else Comet(router=kind))
    data = routers.load(spec, place)
    x = scaled(data.x_val[:12], data.scale, data.shift, "float32")
    masks = mlp.forward(x, trained.params, trained.fixed, trained.config)[1].masks
    for m, found in zip(masks, result["layers"], strict=True):
        assert found == measures(m, x, data.y_val[:12])._asdict()


def test_a_cell_of_a_vit_has_an_accuracy_only(place):
    result = routers.run_cell(cell_of(SMALL, "vit", "kronecker", 0).spec, place)
    assert 0 <= result["test_accuracy"] <= 1 and "layers" not in result


def test_cells_are_all_networks_and_seeds():
    found = routers.cells(SMALL)
    assert [cell.name for cell in found[:8]] == [
        *(f"glyphs-mlp-{kind}-seed0" for kind in SMALL.routers),
        "glyphs-vit-dense-seed0", "glyphs-vit-kronecker-seed0",
        "python-prose-gpt-dense-seed0", "python-prose-gpt-kronecker-seed0"]
    assert len(found) == 16 and all(cell.work > 0 for cell in found)


def test_shares_are_those_of_the_products():
    wide = replace(SMALL, width=3000)
    trained = 3 * (3000 * (3072 + 3000 + 3000 + 10)) - 3000 * 3072
    dense = 3000 * (3072 + 3000 + 3000)
    assert share(wide, "mlp", "dense") == share(wide, "mlp", "relu") == dense / (trained + dense)
    assert share(wide, "mlp", "sparse-binary") == 3 * 18_000 / (trained + 3 * 18_000)
    assert share(wide, "mlp", "standard") == 0
    for model, architecture in (vit, "vit"), (gpt2, "gpt"):
        steps, routing = model.multiply_adds(routers.network(SMALL, architecture, "dense"))
        assert share(SMALL, architecture, "dense") == routing / (steps + routing) > 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"dataset": "arm"}, "arm has no images to classify: choose others by --dataset"),
    ({"architectures": ("cnn",)}, 'unknown architecture "cnn"'),
    ({"routers": ("desne",)}, 'unknown router "desne"; did you mean "dense"'),
    ({"routers": ()}, "--routers needs at least one value, each given once, got none"),
    ({"block_routers": ("dense", "convolutional")}, "an MLP of a block sees none"),
    ({"p_k": 0.0}, r"must be in \(0, 1\], got 0"),
    ({"gpt_size": "1x8"}, "as 4x128x4"),
    ({"images": 10}, "at least 11, got images = 10"),
    ({"seeds": 0}, "at least 1 seed and 1 example to train, got seeds = 0")])
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message) as error:
        replace(SMALL, **changes)
    assert "\n" not in str(error.value)


def test_presets_are_possible():
    for preset in "smoke", "laptop", "paper":
        config = experiment("routers").configure(preset, {})
        assert {"mlp", "vit", "gpt"} == set(config.architectures)


# --- figure and table, from files made by hand --------------------------------------------------

QUALITY = {"standard": (0.5, 0.75), "dense": (0.25, 0.75), "sparse-binary": (0.75, 0.5),
           "relu": (0.125, 0.125), "kronecker": (1.0, 1.0)}


def finished(config, out, kinds=tuple(QUALITY)):
    """Write the files of finished cells."""
    for architecture in config.architectures:
        for kind, seed in itertools.product(config.of(architecture), range(2)):
            if kind not in kinds:
                continue
            result = {"test_accuracy": QUALITY[kind][seed]}
            if architecture == "gpt":
                result = {"last": {"val_loss": float(np.log(10 * QUALITY[kind][seed]))}}
            elif architecture == "mlp" and kind != "standard":
                result |= {"inputs_purity": 0.25, "layers": [
                    dict(zip(routers.Measures._fields, (0.75 - i / 4, 0.5, 0.125, 0.875, 0.375),
                             strict=True)) for i in range(3)]}
            finish_cell(cell_of(config, architecture, kind, seed), out, result, [])


def test_the_table_says_what_the_files_say(tmp_path):
    finished(SMALL, tmp_path)
    lines = routers.table(SMALL, tmp_path).splitlines()
    words = {tuple(line.split()[:2]): line.split() for line in lines[1:9]}
    assert words["MLP", "dense"][2:5] == [f"{100 * share(SMALL, 'mlp', 'dense'):.1f}", "%", "50.00"]
    assert words["MLP", "dense"][-12:-10] == ["-", "-"]
    assert words["MLP", "dense"][-10:] == [
        "0.75", "0.25", "0.50", "0.50", "12.5", "12.5", "87.5", "87.5", "37.5", "37.5"]
    sparse = words["MLP", "sparse-binary"]
    assert (sparse[4], sparse[7], sparse[10]) == ("62.50", "+12.5", "within")
    assert words["MLP", "relu"][10] == "worse"
    assert words["ViT", "kronecker"][4] == "100.00" and "better" in words["ViT", "kronecker"]
    text = words["GPT-2", "kronecker"]
    assert text[4] == "10.00" and text[7:11] == ["-100.0", "+-", "635.3", "worse"]
    assert "(of the images themselves 25.0)" in lines[-4]
    assert lines[-3] == (
        "MLP: of 2 other routers 1 are within the seeds of the dense one or better (sparse-binary);"
        " of these cost less than 5 % of a step's multiply-adds, where dense costs 33 %: "
        "sparse-binary +12.5 +- 476.5; but the standard model is within them, too, so this says "
        "little")
    assert "of 1 other routers 0 are within" in lines[-1] and lines[-1].endswith("3 %: none")


def test_what_diverged_is_worse(tmp_path):
    config = replace(SMALL, architectures=("gpt",))
    finished(config, tmp_path)
    for seed in range(2):
        finish_cell(cell_of(config, "gpt", "kronecker", seed), tmp_path, {"diverged": "why"}, [])
    with np.errstate(invalid="ignore"):
        line = routers.table(config, tmp_path).splitlines()[2]
    assert line.split()[4] == "inf" and "worse" in line


def test_the_figure_shows_what_the_files_say(tmp_path, saved):
    finished(SMALL, tmp_path)
    routers.draw(SMALL, tmp_path)
    mlp_axes, vit_axes, gpt_axes, masks = saved[0].axes
    means = [line.get_xdata().tolist() for line in mlp_axes.lines[1::2]]
    assert means == [[62.5], [50.0], [62.5], [12.5]]
    assert [line.get_xdata()[0] for line in gpt_axes.lines[1::2]] == pytest.approx([5, 10])
    assert vit_axes.lines[2].get_xdata().tolist() == [100, 100]
    names = [label.get_text().split()[0] for label in mlp_axes.get_yticklabels()]
    assert names == list(SMALL.routers)
    assert {line.get_label(): line.get_xdata().tolist() for line in masks.lines} == {
        "likeness, first layer": 3 * [0.75], "likeness, last layer": 3 * [0.25],
        "purity, first layer": 3 * [0.375], "purity, last layer": 3 * [0.375]}


@pytest.mark.parametrize("kinds", [("standard",), ("kronecker",), ("dense", "relu")])
def test_a_part_of_the_cells_is_shown(kinds, tmp_path, saved):
    finished(SMALL, tmp_path, kinds)
    routers.draw(SMALL, tmp_path)
    saved[0].canvas.draw()
    assert routers.table(SMALL, tmp_path)


def test_nothing_finished_is_a_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    for show in (routers.table, routers.draw):
        with pytest.raises(UserError, match="holds no finished cell of routers: run it first"):
            show(SMALL, tmp_path)


def test_forged_files_are_one_sentence(tmp_path):
    config = replace(SMALL, architectures=("mlp",), routers=("dense",), seeds=1)
    finished(replace(config, seeds=2), tmp_path)
    (cell,) = routers.cells(config)
    result = cell.result(tmp_path)
    whole, found = routers.table(config, tmp_path), []
    for changed in forgeries(result):
        if isinstance(changed, dict):
            finish_cell(cell, tmp_path, changed, [])
            found.append(one_sentence(routers.table, config, tmp_path))
    assert sum("run the experiment again" in each for each in found) > len(found) / 2
    assert whole in found
