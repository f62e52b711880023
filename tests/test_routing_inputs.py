"""The experiment `routing`: how far masks move while networks learn, and what it shows of that."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import routing
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.datasets.base import scaled
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import finish
from comet_np.experiments.progress import Progress
from comet_np.experiments.registry import experiment
from comet_np.experiments.routing import RoutingConfig, cell_of, overlap
from comet_np.experiments.signals import Stop
from comet_np.experiments.training import TrainConfig
from comet_np.experiments.training.model import load_run
from comet_np.experiments.vision import normalised
from comet_np.functional.routing import kwta_mask
from comet_np.models import module_of
from comet_np.models.vit import parameter_count
from comet_np.optim import OptimizerConfig
from tests.test_records import finish_cell, one_sentence
from tests.test_trained import forgeries

TRAINING = TrainConfig(OptimizerConfig("adam"), lr=1e-2, batch=8, epochs=1)
SMALL = RoutingConfig("glyphs", patch=16, width=8, depth=2, heads=2, hidden=12, token_hidden=6,
                      images=5, train=32, validation=9, seeds=2, training=TRAINING)
networks = pytest.mark.parametrize(
    ("architecture", "model"), [*itertools.product(routing.ARCHITECTURES, routing.LOOKS)])


# --- overlaps -----------------------------------------------------------------------------------


def naive_overlap(start, end, k):
    """Image by image, row by row, neuron by neuron."""
    n, rows, H = end.shape
    kept, others = [], []
    for i, row in itertools.product(range(n), range(rows)):
        kept.append(sum(start[i, row, h] and end[i, row, h] for h in range(H)) / k)
        others += [sum(end[i, row, h] and end[j, row, h] for h in range(H)) / k
                   for j in range(n) if j != i]
    return np.mean(kept), np.mean(others)


def test_overlaps_are_those_of_counting_one_by_one(draw):
    c = draw.standard_normal((6, 3, 10)) + draw.standard_normal((3, 10))
    start, end = kwta_mask(c + draw.standard_normal(c.shape), 4), kwta_mask(c, 4)
    found = overlap(start, end)
    assert found == pytest.approx(naive_overlap(start, end, 4))
    assert 0.4 < found.others < found.kept < 1


def test_overlaps_at_their_limits():
    one, other = np.eye(4, dtype=bool)[[0, 0, 0], None], np.eye(4, dtype=bool)[[1, 2, 3], None]
    assert overlap(one, one) == (1, 1)
    assert overlap(one, other) == (0, 0)
    assert overlap(other, one) == (0, 1)


def test_equal_masks_overlap_wholly_though_ties_leave_fewer_winners():
    untied = kwta_mask(np.array([[[3.0, 2.5, 2.0, 1.0]], [[4.0, 3.0, 2.0, 1.0]]]), 2)
    tied = kwta_mask(np.array([[[3.0, 2.0, 2.0, 1.0]], [[4.0, 3.0, 2.0, 1.0]]]), 2)
    assert tied.sum() == 3
    assert overlap(tied, tied).kept == overlap(untied, tied).kept == 1
    assert overlap(tied, untied).kept == 3 / 4  # of the neurons that are active at the end


# --- cells --------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, draw, monkeypatch):
    parts = [part for n in (32, 9, 20) for part in (
        draw.integers(0, 256, (n, 3072), dtype="uint8"), draw.integers(0, 10, n))]
    data = Dataset("noise", "classification", *parts, 10, image=(3, 32, 32))
    monkeypatch.setattr(routing, "load", lambda spec, place: data)
    return Place(tmp_path / "cell", get_backend("numpy"), None, Progress(1))


@networks
def test_a_cell_compares_its_masks_with_those_of_its_seed(architecture, model, place):
    """Stopped and gone on with in between."""
    spec, stop = cell_of(SMALL, architecture, model, 1).spec, Stop()
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        routing.run_cell(spec, place._replace(stop=stop))
    result = routing.run_cell(spec, place)
    finish(place.folder, result)
    trained = load_run(place.folder)
    assert trained.config == spec.run.model
    if model == "standard":
        assert "overlaps" not in result
        return
    functions = module_of(trained.config)
    data = normalised(routing.load(spec, place))
    x = scaled(data.x_val[:5], data.scale, data.shift, "float32")
    start, end = (functions.forward(x, *weights, trained.config)[1].masks for weights in (
        functions.init(trained.config, 1), (trained.params, trained.fixed)))
    assert len(start) == SMALL.depth * (2 if architecture == "mixer" else 1)
    for m_0, m, found in zip(start, end, result["overlaps"], strict=True):
        k = m.shape[-1] // 2
        assert (m.sum(axis=-1) == k).all()
        assert (found["kept"], found["others"]) == pytest.approx(naive_overlap(m_0, m, k))
        if model == "stream":
            assert found["kept"] == 1
        else:
            assert found["kept"] < 1


def test_a_stopped_cell_ends_as_one_that_was_not(place):
    spec, stop = cell_of(SMALL, "vit", "block", 0).spec, Stop()
    whole = routing.run_cell(spec, place._replace(folder=place.folder.with_name("whole")))
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        routing.run_cell(spec, place._replace(stop=stop))
    result = routing.run_cell(spec, place)
    for each in whole, result:
        del each["seconds"], each["last"]["seconds"]
    assert result == whole


def test_cells_are_all_networks_and_seeds():
    found = routing.cells(SMALL)
    assert [cell.name for cell in found] == [
        f"glyphs-{architecture}-{model}-seed{seed}" for seed in range(2)
        for architecture in ("vit", "mixer") for model in ("standard", "block", "stream")]
    assert [cell.spec.run.model.gate is None for cell in found] == 4 * [True, False, False]
    assert all(cell.work > 0 for cell in found)


def test_the_paper_has_its_small_vit():
    config = experiment("routing").configure("paper", {})
    for model in routing.LOOKS:
        run = cell_of(config, "vit", model, 0).spec.run
        assert parameter_count(run.model) == 9_523_722
        assert (run.model.patch, run.model.heads, run.model.activation) == (4, 8, "tanh")
        assert (run.training.lr, run.training.batch, run.training.epochs) == (1e-4, 512, 200)
        assert (run.training.schedule, run.training.augment) == ("cosine", "crop_flip")
    mixer = routing.network(replace(config, hidden=256), "mixer", "block")
    assert module_of(mixer).parameter_count(mixer) == 1_819_530


def test_images_may_have_any_size(monkeypatch):
    monkeypatch.delenv("COMET_DATA", raising=False)  # where a part of them may lie
    model = cell_of(replace(SMALL, dataset="tiny_imagenet"), "vit", "block", 0).spec.run.model
    assert (model.image, model.classes) == ((3, 64, 64), 200)


@pytest.mark.parametrize(("changes", "message"), [
    ({"dataset": "arm"}, "arm has no images to classify: choose others by --dataset"),
    ({"dataset": "cifar11"}, 'unknown data set "cifar11"; did you mean "cifar10"'),
    ({"architectures": ("vit", "mlp")}, 'unknown architecture "mlp"'),
    ({"architectures": ()}, "--architectures needs at least one value, each given once, got none"),
    ({"models": ("block", "block")}, "each given once, got block, block"),
    ({"models": ("comet",)}, 'unknown model "comet"'),
    ({"p_k": 0.0}, r"must be in \(0, 1\], got 0"),
    ({"patch": 5}, "cannot be cut into patches of 5x5"),
    ({"heads": 3}, "3 heads do not divide the width 8"),
    ({"hidden": 0}, "hidden is an integer of at least 1, got 0"),
    ({"token_hidden": 0}, "token_hidden is an integer of at least 1, got 0"),
    ({"images": 1}, "at least 2, got images = 1, validation = 9"),
    ({"validation": 1}, "at least 2, got images = 5, validation = 1"),
    ({"seeds": 0}, "at least 1 seed and 1 example to train, got seeds = 0, train = 32"),
    ({"train": 0}, "train = 0"),
    ({"training": replace(TRAINING, schedule="warmup_cosine", warmup=5)}, "0 to 4 steps")])
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message) as error:
        replace(SMALL, **changes)
    assert "\n" not in str(error.value)


# --- figure and table, from files made by hand --------------------------------------------------

ACCURACIES = {"standard": (0.25, 0.75), "block": (0.5, 1.0), "stream": (0.125, 0.375)}
OVERLAPS = {"block": (0.75, 0.625), "stream": (1.0, 0.5)}


def finished(config, out, chosen=tuple(routing.LOOKS)):
    """Write the files of finished cells: the second seed's overlaps are those of the first."""
    for architecture, model, seed in itertools.product(config.architectures, chosen, range(2)):
        mlps = config.depth * (2 if architecture == "mixer" else 1)
        result = {"parameters": 1234, "test_accuracy": ACCURACIES[model][seed]}
        if model != "standard":
            kept, others = OVERLAPS[model]
            result["overlaps"] = [{"kept": kept - i / 8, "others": others} for i in range(mlps)]
        lines = [{"epoch": epoch, "val_accuracy": epoch / 2 + seed / 4} for epoch in range(2)]
        finish_cell(cell_of(config, architecture, model, seed), out, result, lines)


def test_the_table_says_what_the_files_say(tmp_path):
    config = replace(SMALL, architectures=("vit",))
    finished(config, tmp_path)
    lines = [line.split() for line in routing.table(config, tmp_path).splitlines()]
    assert [line[:3] for line in lines[1:4]] == [["ViT", model, "1,234"] for model in ACCURACIES]
    assert [line[4] for line in lines[1:4]] == ["0.0M", "0.0M", "0.0M"]
    assert [line[5] for line in lines[1:4]] == ["50.0", "75.0", "25.0"]
    assert lines[1][7:] == ["-", "-", "-"]
    assert lines[2][7:] == ["+25.0", "+-", "0.0", "68.8", "+-0.0", "62.5", "+-0.0"]
    assert lines[3][7:10:2] == ["-25.0", "158.8"]
    assert lines[3][10:] == ["93.8", "+-0.0", "50.0", "+-0.0"]


def test_the_table_counts_multiply_adds(tmp_path):
    config = replace(SMALL, hidden=12_000, architectures=("vit",))
    finished(config, tmp_path)
    trained, routed = {}, {}
    for line in routing.table(config, tmp_path).splitlines()[1:4]:
        _, model, _, trained[model], routed[model], *_ = line.split()
    mlps = 2 * 5 * 8 * 12_000 / 1e6  # two blocks of five tokens: V of each, U of one
    assert set(trained.values()) == {f"{3 * 2 * mlps:.1f}M"}  # two maps forward, twice backward
    stream = 1.5 * mlps + 4 * 16 * 16 * 3 * 8 / 1e6  # and E of four patches
    assert routed == {"standard": "0.0M", "block": f"{mlps:.1f}M", "stream": f"{stream:.1f}M"}


def test_the_figure_shows_what_the_files_say(tmp_path, saved):
    finished(SMALL, tmp_path)
    routing.draw(SMALL, tmp_path)
    vit, mixer = np.array(saved[0].axes).reshape(2, 3)
    for axes in vit[0], mixer[0]:
        assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
            label: [[0, 0.125], [1, 0.625]] for _, label in routing.LOOKS.values()}
    assert not vit[2].axison
    shown = [{line.get_label().split(":")[0] + line.get_linestyle(): line.get_ydata().tolist()
              for line in axes.lines[:4]} for axes in (vit[1], *mixer[1:])]
    assert shown == [{"block-": kept, "block--": [0.625, 0.625],
                      "stream-": [each + 0.25 for each in kept], "stream--": [0.5, 0.5]}
                     for kept in ([0.75, 0.625], [0.75, 0.5], [0.625, 0.375])]
    assert all(line.get_xdata().tolist() == [1, 2] for line in vit[1].lines[:4])
    assert vit[1].lines[4].get_ydata() == [0.5, 0.5]  # p_k
    assert len(saved[0].legends[0].get_texts()) == 5
    title = " ".join(saved[0].get_suptitle().split())
    for part in ("width 8, hidden 12, tanh, 2 blocks, patches of 16x16", "ViT: 2 heads, dropout "
                 "0.1; MLP-Mixer: token hidden 6, dropout 0;", "optimizer adam, lr 0.01, schedule "
                 "constant, batch 8, epochs 1;", "32 training images; 2 seeds"):
        assert part in title


@pytest.mark.parametrize("chosen", [("standard",), ("stream",), ("block", "stream")])
def test_a_part_of_the_cells_is_shown(chosen, tmp_path, saved):
    finished(SMALL, tmp_path, chosen)
    routing.draw(SMALL, tmp_path)
    saved[0].canvas.draw()
    for line in routing.table(SMALL, tmp_path).splitlines()[1:-2]:
        assert line.split()[1] in chosen
        assert line.count(" - ") + line.endswith(" -") == (3 if chosen == ("standard",) else 1)


def test_nothing_finished_is_a_sentence(tmp_path):
    pytest.importorskip("matplotlib")
    for show in (routing.table, routing.draw):
        with pytest.raises(UserError, match="holds no finished cell of routing: run it first"):
            show(SMALL, tmp_path)


def test_forged_files_are_one_sentence(tmp_path):
    config = replace(SMALL, architectures=("vit",), models=("block",), seeds=1)
    (cell,) = routing.cells(config)
    result = {"parameters": 3, "test_accuracy": 0.5,
              "overlaps": [{"kept": 0.75, "others": 0.5}, {"kept": 0.5, "others": 0.25}]}
    lines = [{"epoch": 0, "val_accuracy": 0.25}, {"epoch": 1, "val_accuracy": 0.5}]
    finish_cell(cell, tmp_path, result, lines)
    whole, found = routing.table(config, tmp_path), []
    for changed in forgeries({"result": result, "lines": lines}):
        if (isinstance(changed, dict) and isinstance(changed.get("result"), dict)
                and isinstance(changed.get("lines"), list)):
            finish_cell(cell, tmp_path, changed["result"], changed["lines"])
            found.append(one_sentence(routing.table, config, tmp_path))
    assert sum("run the experiment again" in each for each in found) > len(found) / 2
    assert whole in found
