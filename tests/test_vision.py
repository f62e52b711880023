"""Figures 5 to 8: the networks are the paper's, flags reach them, runs go on bit for bit."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comet_np import settings
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import datasets, grid_report, vision
from comet_np.experiments.cli import _memory, main
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.experiment import Cell, Place
from comet_np.experiments.files import write_result
from comet_np.experiments.fit import trained_on
from comet_np.experiments.grid import GridCell, Panel, cell_of, cells
from comet_np.experiments.progress import Progress
from comet_np.experiments.registry import experiment
from comet_np.experiments.training import RunConfig, TrainConfig, run_memory
from comet_np.experiments.training.config import (
    evaluated_at_once,
    kept_numbers,
    multiply_adds,
    spent,
)
from comet_np.experiments.variants import VARIANTS_OF_BLOCKS
from comet_np.experiments.vision import VisionConfig
from comet_np.gates import Bernoulli, Comet, ExampleTied, TopK
from comet_np.models import module_of
from comet_np.models.mixer import MixerConfig
from comet_np.models.mlp import MLPConfig
from comet_np.models.vit import ViTConfig
from comet_np.optim import OptimizerConfig
from comet_np.tree import leaves
from tests.runs import assert_bit_for_bit, stopped, trained

# --- the models ---------------------------------------------------------------------------------

VIT = ViTConfig((3, 8, 8), 4, 5, 8, 2, 2, 12, gate=None)
MIXER = MixerConfig((3, 8, 8), 4, 5, 8, 2, 16, 12, gate=None)
CHANGES = {  # for p_k = 0.25 and ties "index"
    "standard": {},
    "comet": {"gate": Comet(0.25, "index")},
    "comet-stream": {"gate": Comet(0.25, "index"), "routing": "stream"},
    "smaller": {"hidden": 3, "token_hidden": 4},
    "comet-block-diagonal": {"gate": Comet(0.25, "index", router="block-diagonal")},
    "dropout": {"hidden_dropout": 0.75},  # the share that COMET masks
    "top-k": {"gate": TopK(0.25, "index")},
    "bernoulli": {"gate": Bernoulli(0.25)},
    "example-tied": {"gate": ExampleTied(0.25)},
    "scaled": {"scale": 0.25},
}


@pytest.mark.parametrize("standard", [VIT, MIXER], ids=["vit", "mixer"])
@pytest.mark.parametrize("name", VARIANTS_OF_BLOCKS)
def test_every_model_is_a_change_of_the_standard_one(name, standard):
    run = RunConfig(standard, TrainConfig(lr=0.3), 7)
    changes = {field: value for field, value in CHANGES[name].items() if hasattr(standard, field)}
    assert VARIANTS_OF_BLOCKS[name](run, 0.25, "index") == replace(
        run, model=replace(standard, **changes))


def test_the_networks_are_those_of_the_paper():
    """Counted as in the code on which it builds."""
    config = experiment("fig6").configure("paper", {})
    counts = {}
    for cell in cells(config):
        model, training = cell.spec.run.model, cell.spec.run.training
        counts.setdefault((type(model), training.lr, training.epochs), set()).add(
            module_of(model).parameter_count(model))
        assert (model.patch, model.depth, model.activation) == (4, 6, "tanh")
        assert model.gate in (None, Comet(0.5))
        assert (training.optimizer, training.schedule, training.batch, training.augment) == (
            OptimizerConfig("adam"), "cosine", 512, "crop_flip")
    assert counts == {(ViTConfig, 1e-4, 200): {9_523_722, 25_267_722, 44_160_522},
                      (MixerConfig, 1e-3, 500): {1_819_530, 57_110_410}}
    assert config.seeds == 3
    assert {cell.spec.run.model.dropout for cell in cells(config)} == {0.1, 0.0}


@pytest.mark.parametrize(("name", "dataset", "tokens"), [
    ("fig5", "svhn", 65), ("fig6", "cifar10", 65), ("fig7", "cifar100", 65),
    ("fig8", "tiny_imagenet", 257)])
def test_each_figure_has_its_data(name, dataset, tokens):
    for preset in ("laptop", "paper"):
        assert experiment(name).configure(preset, {}).datasets == (dataset,)
    first = cells(experiment(name).configure("paper", {}))[0]
    assert (first.spec.run.model.tokens, first.spec.dataset) == (tokens, dataset)
    assert first.spec.run.model.classes == datasets.sizes_of(dataset).outputs


# --- flags --------------------------------------------------------------------------------------


def of_model(name):
    return lambda cell: getattr(cell.spec.run.model, name)


# Flag: a text other than the default, its architecture, where it arrives in the last cell, as what.
# Those that other grids have too are tested there.
REACHES = {
    "datasets": ("glyphs", "mixer", lambda cell: cell.spec.dataset, "glyphs"),
    "models": ("comet-stream", "vit", of_model("routing"), "stream"),
    "p_k": ("0.3", "mixer", lambda cell: cell.spec.run.model.gate.p_k, 0.3),
    "architectures": ("vit", "vit,mixer", lambda cell: type(cell.spec.run.model), ViTConfig),
    "vit_hidden": ("30", "vit", of_model("hidden"), 30),
    "mixer_widths": ("30", "mixer", lambda cell: (
        cell.spec.run.model.width, cell.spec.run.model.hidden, cell.spec.run.model.token_hidden),
        (30, 15, 256)),
    "vit_width": ("40", "vit", of_model("width"), 40),
    "heads": ("4", "vit", of_model("heads"), 4),
    "vit_dropout": ("0.3", "vit", lambda cell: (
        cell.spec.run.model.dropout, cell.spec.run.model.hidden_dropout), (0.3, 0.3)),
    "depth": ("2", "mixer", of_model("depth"), 2),
    "patch": ("8", "mixer", lambda cell: (
        cell.spec.run.model.patch, cell.spec.run.model.token_hidden), (8, 64)),
    "activation": ("relu", "vit", of_model("activation"), "relu"),
    "mixer_lr": ("0.25", "mixer", lambda cell: cell.spec.run.training.lr, 0.25),
    "mixer_epochs": ("9", "mixer", lambda cell: cell.spec.run.training.epochs, 9),
    "lr": ("0.25", "vit", lambda cell: cell.spec.run.training.lr, 0.25),
    "epochs": ("9", "vit", lambda cell: cell.spec.run.training.epochs, 9),
    "augment": ("none", "vit", lambda cell: cell.spec.run.training.augment, None),
    "ties": ("index", "vit", lambda cell: cell.spec.run.model.gate.ties, "index"),
}


def last_cell(**texts):
    fields = dict(settings.flags(VisionConfig))
    given = {"models": "comet", "seeds": "1"} | texts
    return cells(settings.build(VisionConfig, {
        name: settings.parse(name, fields[name], text) for name, text in given.items()}))[-1]


def test_there_is_a_case_for_every_flag_of_its_own():
    shared = set(settings.values(TrainConfig())) | {"seeds", "train", "validation"}
    assert set(REACHES) | shared == set(settings.values(VisionConfig()))


@pytest.mark.parametrize("flag", REACHES)
def test_every_flag_reaches_the_cell(flag):
    text, architectures, where, expected = REACHES[flag]
    given = {"architectures": architectures}
    default, changed = last_cell(**given), last_cell(**given | {flag: text})
    assert where(default) != expected
    assert where(changed) == expected
    assert changed.folder(Path()) != default.folder(Path())


@pytest.mark.parametrize(("values", "said"), [
    ({"datasets": ("arm",)}, "arm has no images to classify: choose others by --datasets"),
    ({"architectures": ("vti",)}, 'unknown architecture "vti"; did you mean "vit"'),
    ({"models": ("layerwise",)}, 'unknown model "layerwise"'),
    ({"models": ("moe",)}, 'unknown model "moe"'),
    ({"patch": 5}, "32x32 pixels cannot be cut into patches of 5x5: choose a patch that divides"),
    ({"heads": 7}, "7 heads do not divide the width 512"),
    ({"depth": 0}, "depth is an integer of at least 1, got 0"),
    ({"vit_hidden": ()}, "--vit-hidden needs at least one value"),
    ({"vit_hidden": (0,)}, "hidden is an integer of at least 1, got 0"),
    ({"mixer_widths": (16, 1)}, "--mixer-widths are each at least 2, .* got 1$"),
    ({"mixer_widths": (0,)}, "--mixer-widths are each at least 2, .* got 0$"),
    ({"mixer_widths": (8, 8)}, "--mixer-widths compares values, each given once, got 8, 8$"),
    ({"mixer_lr": 0.0}, "the learning rate must be positive and finite, got 0.0"),
    ({"mixer_epochs": -1}, "0 or more epochs, got batch = 512, accumulate = 1, epochs = -1"),
    ({"models": ("smaller",), "vit_hidden": (1,)}, "p_k = 0.5 leaves the smaller model"),
    ({"training": TrainConfig(schedule="warmup_cosine", warmup=10**6)}, "the warm-up must be 0 to"),
    ({"training": TrainConfig(schedule="warmup_cosine", warmup=1500), "mixer_epochs": 1},
     "the warm-up must be 0 to 1250 steps"),
])
def test_bad_settings_are_one_sentence(values, said):
    with pytest.raises(UserError, match=said) as error:
        VisionConfig(**values)
    assert "\n" not in str(error.value)


# --- training -----------------------------------------------------------------------------------


def small_images(draw, n=60):
    def part(n):
        return draw.integers(0, 256, (n, 3 * 8 * 8), dtype=np.uint8), draw.integers(0, 5, n)

    return Dataset("small", "classification", *part(n), *part(20), *part(20), 5, image=(3, 8, 8))


def test_colours_are_normalised_by_the_training_images(draw):
    """By their mean, and by the mean deviation within an image, to four digits."""
    data = small_images(draw)
    planes = data.x_train.reshape(60, 3, 64) / 255
    mean, std = (moments.round(4) for moments in (
        planes.mean(axis=(0, 2)), planes.std(axis=2).mean(axis=0)))
    found = vision.normalised(data)
    np.testing.assert_allclose(found.scale, 1 / (255 * std))
    np.testing.assert_allclose(found.shift, -mean / std)
    assert found.x_train is data.x_train


def test_a_cell_trains_on_normalised_images(draw, tmp_path, monkeypatch):
    data, run = small_images(draw), RunConfig(VIT, TrainConfig(batch=16, epochs=1))
    monkeypatch.setattr(vision, "load", lambda spec, place: data)
    vision.run_cell(GridCell("small", None, None, None, None, "", run),
                    Place(tmp_path, get_backend("numpy"), None, Progress(1)))
    stored = json.loads((tmp_path / "config.json").read_text())["data"]
    ours = vision.normalised(data)
    assert (stored["scale"], stored["shift"]) == (list(ours.scale), list(ours.shift))


@pytest.mark.parametrize("standard", [VIT, MIXER], ids=["vit", "mixer"])
def test_a_trained_model_takes_images_in_their_shape(standard, draw):
    data = vision.normalised(small_images(draw))
    model = trained_on(data, RunConfig(standard, TrainConfig(batch=16, epochs=1)))
    flat, images = data.x_test, data.x_test.reshape(-1, 3, 8, 8)
    np.testing.assert_array_equal(model.predict(images), model.predict(flat))
    assert model.output(images[:0]).shape == (0, 5)
    for x in images[0], images[..., 1:], images.swapaxes(1, 3), flat[:, 1:], images[:, None]:
        with pytest.raises(UserError, match=r"on images of 3 colours and 8x8 pixels: x must have "
                                            r"shape \(n, 192\) or \(n, 3, 8, 8\), got \("):
            model.output(x)


@pytest.mark.usefixtures("small_blocks")
def test_the_normalisation_does_not_depend_on_blocks(draw, monkeypatch):
    data = small_images(draw)
    whole = vision.normalised(data)
    monkeypatch.setattr(vision, "BLOCK", 7)
    assert vision.normalised(data).scale == whole.scale


@pytest.mark.parametrize("standard", [replace(VIT, dropout=0.2), replace(MIXER, dropout=0.2)],
                         ids=["vit", "mixer"])
@pytest.mark.parametrize("name", ["dropout", "comet", "comet-stream", "bernoulli"])
def test_a_stopped_run_goes_on_bit_for_bit(name, standard, draw, tmp_path):
    """With dropout and augmentation, from within an epoch."""
    training = TrainConfig(OptimizerConfig("adam"), 1e-2, "cosine", batch=16, epochs=3,
                           augment="crop_flip")
    run = VARIANTS_OF_BLOCKS[name](RunConfig(standard, training, 3), 0.5, "strict")
    data = vision.normalised(small_images(draw))
    whole = trained(run, data, tmp_path / "whole")
    for step in (2, 7):
        assert stopped(run, data, tmp_path / "parts", at=step)
    parts = trained(run, data, tmp_path / "parts")
    assert_bit_for_bit(parts, whole)
    assert whole.run.step == 12


def test_a_smoke_run_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["run", "fig6", "--preset", "smoke", "--jobs", "1", "--seeds", "1", "--epochs",
                 "1", "--mixer-epochs", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "vit   24  0.5" in said
    assert "mixer   16  0.5" in said
    assert all((tmp_path / f"fig6{suffix}.png").stat().st_size > 10_000
               for suffix in ("", "_time", "_work", "_summary"))


# --- the figure ---------------------------------------------------------------------------------

CONFIG = VisionConfig(("glyphs",), seeds=1, vit_hidden=(12, 24), mixer_widths=(16,), vit_width=16,
                      depth=3, mixer_epochs=2, training=TrainConfig(epochs=2))


def finish(out):
    """Write the files of finished cells by hand: COMET has 0.1 more than the standard model."""
    for kind, size, value in (("vit", 12, 0.3), ("vit", 24, 0.4), ("mixer", 16, 0.5)):
        for model in CONFIG.models:
            folder = cell_of(CONFIG, Panel("glyphs", kind, size, 0.5), model, 0).folder(out)
            folder.mkdir(parents=True)
            best = value + 0.1 * (model == "comet")
            (folder / "metrics.jsonl").write_text("".join(
                json.dumps({"epoch": epoch, "val_accuracy": best * epoch / 2, "seconds": epoch})
                + "\n" for epoch in range(3)))
            write_result(folder, {"parameters": 2_500_000, "data": "", "notice": "",
                                  "seconds": {"prepare": 1.0}})


def test_sizes_stand_side_by_side_and_the_title_says_what_is_not_the_papers(tmp_path, saved):
    finish(tmp_path)
    grid_report.draw(CONFIG, tmp_path, "fig6")
    curves, time, work, summary = saved
    titles = [f"glyphs, {size}, $p_k$ = 0.5, {kind}"
              for size, kind in (("H = 12", "vit"), ("H = 24", "vit"), ("D = 16", "mixer"))]
    assert [axes.get_title() for axes in curves.axes] == titles
    places = [tuple(axes.get_subplotspec().get_geometry()) for axes in curves.axes]
    assert places == [(2, 2, 0, 0), (2, 2, 1, 1), (2, 2, 2, 2)]
    assert sorted(text.get_text() for text in curves.axes[0].texts) == [
        "COMET 0.400 (2.5 M)", "standard 0.300 (2.5 M)"]
    title = " ".join(curves.get_suptitle().split())
    for part in ("vit width 16 (paper: 512)", "depth 3 (paper: 6)", "patch 4,", "activation tanh",
                 "sgd, batch 32 (paper: 512), vit lr 0.01 (paper: 0.0001), 2 epochs (paper: 200); "
                 "mixer lr 0.001, 2 epochs (paper: 500); 1 seed (", "heads 8,",
                 "augment None (paper: crop_flip)", "schedule constant (paper: cosine)"):
        assert part in title
    leads, = summary.axes
    assert [text.get_text() for text in leads.texts] == ["+10.0"] * 3
    assert [label.get_text() for label in leads.get_yticklabels()] == [
        "vit, 12", "vit, 24", "mixer"]
    assert curves.get_supxlabel() == "epoch"
    assert time.get_supxlabel() == "seconds of training"  # in which nothing is kept
    assert work.get_supxlabel() == "multiply-adds"
    run = cell_of(CONFIG, Panel("glyphs", "vit", 12, 0.5), "comet", 0).spec.run
    x = next(line for line in work.axes[0].lines if line.get_label() == "COMET").get_xdata()
    np.testing.assert_allclose(x, np.arange(3) * 8000 * sum(multiply_adds(run.model)))


@pytest.mark.parametrize(("kinds", "said", "unsaid"), [
    (("mixer",), "fig6: adam lr 0.001, batch 512, 500 epochs, mixer, 3 seeds (",
     ("0.0001", "200", "vit", "heads", "paper")),
    (("vit",), "fig6: adam lr 0.0001, batch 512, 200 epochs, vit, 3 seeds (", ("500", "mixer")),
    (("vit", "mixer"), "fig6: adam, batch 512, vit lr 0.0001, 200 epochs; mixer lr 0.001, 500 "
                       "epochs; 3 seeds (", ("(paper",))])
def test_the_title_says_how_the_networks_that_are_shown_are_trained(kinds, said, unsaid):
    config = experiment("fig6").configure("paper", {"architectures": kinds})
    title = " ".join(grid_report._title(config, {}, "fig6", 7.0, "").split())
    assert title.startswith(said)
    assert not [part for part in unsaid if part in title]
    assert ("vit width 512" in title) == ("vit" in kinds)


def test_the_table_says_the_network_and_its_size(tmp_path):
    finish(tmp_path)
    rows = [line.split() for line in grid_report.table(CONFIG, tmp_path).splitlines()]
    assert rows[0][2:5] == ["network", "H/D", "p_k"]
    assert [row[1:3] for row in rows[1:4]] == [["vit", "12"], ["vit", "24"], ["mixer", "16"]]


def test_routing_is_spent_once_where_masks_are_kept():
    """Each step, where the input changes from epoch to epoch or within the network."""
    comet = RunConfig(MLPConfig((6, 5, 3)))
    trained, routing = multiply_adds(comet.model)
    assert spent(comet, 4) == 4 * trained + routing
    assert spent(comet, 4, routed=True) == 4 * (trained + routing)
    assert spent(replace(comet, training=TrainConfig(augment="flip")), 4) == 4 * (trained + routing)
    vit = RunConfig(replace(VIT, gate=Comet()))
    assert spent(vit, 4) == 4 * sum(multiply_adds(vit.model))


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "batch"), [
    (replace(VIT, width=64, hidden=128, gate=Comet()), 100),
    (replace(VIT, width=64, hidden=256, dropout=0.0, hidden_dropout=0.0), 30),
    (replace(MIXER, width=64, hidden=32, gate=Comet(), hidden_dropout=0.5), 100),
    (MLPConfig((192, 300, 300, 5), gate=Comet()), 50)], ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.usefixtures("small_blocks")
def test_the_memory_of_a_run_is_told_within_a_half(model, batch, optimizer, draw, tmp_path):
    data = vision.normalised(small_images(draw, 100))
    run = RunConfig(model, TrainConfig(OptimizerConfig(optimizer), 1e-3, batch=batch, epochs=1))
    trained(run, data, tmp_path / "warm")
    tracemalloc.start()
    try:
        trained(run, data, tmp_path / "run")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / 1.5 < run_memory(run) < 1.5 * peak


@pytest.mark.parametrize("routing", ["block", "stream"])
@pytest.mark.parametrize("standard", [VIT, MIXER], ids=["vit", "mixer"])
def test_the_memory_of_a_run_has_all_fixed_weights(standard, routing, monkeypatch):
    """They are there once, and once more in what is written at the end."""
    monkeypatch.setattr("comet_np.experiments.training.config.MOST_KEPT", 1)
    model = replace(standard, width=3200, hidden=640, gate=Comet(), routing=routing)
    _, fixed = module_of(model).init(model)
    of_fixed = sum(array.nbytes for array in leaves(fixed))
    training = TrainConfig(batch=1)
    without = RunConfig(replace(model, gate=None, routing="block"), training)
    assert run_memory(RunConfig(model, training)) - run_memory(without) == 2 * of_fixed


def test_large_networks_are_evaluated_few_examples_at_a_time():
    """But no fewer than a mini-batch, and small networks many."""
    large = MixerConfig(width=3072, hidden=1536, gate=None)
    for model, batch, expected in ((MLPConfig((3072, 9000, 9000, 9000, 10)), 32, 1000),
                                   (large, 512, 512), (large, 1, 2**26 // kept_numbers(large)),
                                   (MIXER, 1, 1000)):
        assert evaluated_at_once(RunConfig(model, TrainConfig(batch=batch))) == expected


def test_a_run_is_evaluated_so_many_at_a_time(draw, tmp_path, monkeypatch):
    monkeypatch.setattr("comet_np.experiments.training.config.MOST_KEPT", 8 * kept_numbers(VIT))
    run = RunConfig(VIT, TrainConfig(batch=3, epochs=0))
    found = trained(run, vision.normalised(small_images(draw)), tmp_path).run
    assert [len(batch.rows) for batch in found.validation.blocks()] == [8, 8, 4]


def test_the_memory_of_cells_at_a_time_is_said():
    some = [Cell("a", None, 1.0, 2 * 10**9), Cell("b", None, 1.0, 10**8), Cell("c", None, 1.0,
                                                                              3 * 10**9)]
    assert _memory(some, 2) == ", about 5.0 GB of memory beside the data (2 cells at a time)"
    assert _memory(some, 1) == ", about 3.0 GB of memory beside the data"
    assert _memory([Cell("a", None, 1.0)], 2) == ""


