"""A grid: its models are the paper's, its flags reach its cells, its numbers are the files'."""

import io
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comet_np import settings
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import datasets, grid, grid_report
from comet_np.experiments.datasets import DATASETS
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import write_result
from comet_np.experiments.grid import GridConfig, Panel, cell_of, cells, examples
from comet_np.experiments.progress import Progress
from comet_np.experiments.registry import EXPERIMENTS, experiment
from comet_np.experiments.signals import Stop
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.training.config import OVERHEAD, multiply_adds
from comet_np.experiments.variants import VARIANTS, WITHOUT_P_K
from comet_np.functional.activations import ACTIVATIONS
from comet_np.gates import Bernoulli, Comet, ExampleTied, Layerwise, TopK
from comet_np.models import mlp, module_of
from comet_np.models.mlp import MLPConfig
from comet_np.models.moe import MoEConfig
from comet_np.optim import OptimizerConfig
from comet_np.tree import leaves
from tests import naive
from tests.tolerances import assert_close

# --- the models ---------------------------------------------------------------------------------

WIDTHS = (30, 19, 25, 4)
STANDARD = MLPConfig(WIDTHS, gate=None)
SMALLER = (30, 4, 6, 4)  # p_k N neurons, rounded down
# What Sec. 4 of the paper says of each, here of p_k = 0.25; the last four are ours.
DEFINITIONS = {
    "standard": STANDARD,
    "smaller": MLPConfig(SMALLER, gate=None),
    "dropout": MLPConfig(WIDTHS, gate=None, dropout=0.75),  # rate 1 - p_k
    "top-k": MLPConfig(WIDTHS, gate=TopK(0.25, "index", of="pre-activation")),
    "moe": MoEConfig(SMALLER, experts=4, gate_activation="tanh", trainable=True),
    "moe-fixed": MoEConfig(SMALLER, experts=4, gate_activation="tanh", trainable=False),
    "layerwise": MLPConfig(WIDTHS, gate=Layerwise(0.25, "index")),
    "bernoulli": MLPConfig(WIDTHS, gate=Bernoulli(0.25, evaluation="all")),
    "example-tied": MLPConfig(WIDTHS, gate=ExampleTied(0.25, generalisation=None,
                                                       evaluation="generalisation")),
    "l1": STANDARD,  # and a penalty: see below
    "comet": MLPConfig(WIDTHS, gate=Comet(0.25, "index", g="identity")),
    "comet-exact": MLPConfig(WIDTHS, gate=Comet(0.25, "index", exact=True)),
    "comet-block-diagonal": MLPConfig(WIDTHS, gate=Comet(0.25, "index", router="block-diagonal")),
    "scaled": MLPConfig(WIDTHS, gate=None, scale=0.25),
    "centred": MLPConfig(WIDTHS, "centred_softplus", gate=None),
}


def variant(name, standard=STANDARD, p_k=0.25, ties="strict"):
    """Return the run of a model, as a change of the standard model's."""
    return VARIANTS[name](RunConfig(standard, TrainConfig(lr=0.3), 7), p_k, ties)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_is_as_the_paper_defines_it(name):
    run = variant(name, ties="index")
    assert run.model == DEFINITIONS[name]
    penalty = OptimizerConfig(l1=1e-4) if name == "l1" else OptimizerConfig()
    assert run == RunConfig(run.model, TrainConfig(penalty, lr=0.3), 7)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name):
    """Masks, and fixed weights, are not parameters."""
    smaller, gate = 4 * 31 + 6 * 5 + 4 * 7, 4 * 31 + 4 * 5
    count = {"smaller": smaller, "moe": 4 * smaller + gate, "moe-fixed": 4 * smaller}.get(
        name, 19 * 31 + 25 * 20 + 4 * 26)
    model = variant(name).model
    assert module_of(model).parameter_count(model) == count
    assert sum(array.size for array in leaves(module_of(model).init(model)[0])) == count


@pytest.mark.parametrize("name", VARIANTS)
def test_multiply_adds_are_counted_product_by_product(name):
    """Each matrix once forward, once for its gradient, and but for the first once for dx."""
    first, whole, few = 30 * 19, 30 * 19 + 19 * 25 + 25 * 4, 30 * 4 + 4 * 6 + 6 * 4
    gate = 30 * 4 + 4 * 4
    expected = {"smaller": (3 * few - 120, 0), "moe": (3 * few - 120 + 3 * gate - 120, 0),
                "moe-fixed": (3 * few - 120, gate),
                # 5 blocks of 4 x 6, and 4 of 7 x 5
                "comet-block-diagonal": (3 * whole - first, 5 * 4 * 6 + 4 * 7 * 5)}.get(
        name, (3 * whole - first, (first + 19 * 25) * (name in ("comet", "comet-exact",
                                                                 "layerwise"))))
    assert multiply_adds(variant(name).model) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_models_without_p_k_are_the_same_for_all_of_them(name):
    one, other = (variant(name, p_k=p_k) for p_k in (0.1, 0.9))
    assert (one == other) == (name in WITHOUT_P_K)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cells_model_is_the_variant_of_the_standard_mlp(name):
    config = GridConfig(layers=3, ties="index", activation=("sigmoid",), bias=False,
                        training=TrainConfig(lr=0.3))
    standard = MLPConfig((21, 20, 20, 1), "sigmoid", gate=None, bias=False)
    run = cell_of(config, Panel("arm", "sigmoid", 20, 0.25), name, 7).spec.run
    assert run == variant(name, standard, ties="index")


def test_a_penalty_is_that_of_the_model_l1_if_it_is_compared():
    """And of all models if it is not."""
    training = TrainConfig(OptimizerConfig(l1=0.5))
    for models, penalties in ((("standard", "l1", "comet"), [0, 0.5, 0]),
                              (("standard", "comet"), [0.5, 0.5])):
        found = cells(GridConfig(models=models, datasets=("arm",), p_k=(0.5,), seeds=1,
                                 training=training))
        assert [cell.spec.run.training.optimizer.l1 for cell in found] == penalties


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if "centred" not in name])
def test_the_controls_do_what_a_mask_does_besides_routing(name, draw):
    """"scaled" multiplies f by p_k, "centred" is f(a) - f(0): zero where a is."""
    standard = MLPConfig((3, 6, 1), name, gate=None)
    params, _ = mlp.init(standard, dtype="float64")
    x = draw.standard_normal((5, 3))
    f = naive.ACTIVATIONS[name]
    for control, expected in (("scaled", lambda a: 0.3 * f(a)), ("centred", lambda a: f(a) - f(0))):
        trace = mlp.trace(x, params, (), variant(control, standard, 0.3).model)
        assert_close(trace.x[1], np.vectorize(expected)(trace.a[0]), "sum")


@pytest.mark.parametrize("model", ["smaller", "moe", "moe-fixed"])
def test_a_model_without_a_neuron_is_refused(model):
    with pytest.raises(UserError, match=r"0\.01 leaves the smaller model, and the experts of moe, "
                                        "no neuron in a layer of 50"):
        GridConfig(models=(model,), widths=(50,), p_k=(0.01,))


@pytest.mark.parametrize("level", [0.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("model", VARIANTS)
def test_a_proportion_is_one(model, level):
    """0 would drop all, and leave infinitely many experts."""
    with pytest.raises(UserError, match=r"--p-k, must be in \(0, 1\], got"):
        GridConfig(models=(model,), p_k=(level,))


@pytest.mark.parametrize("model", VARIANTS)
def test_every_model_is_stopped_and_goes_on_bit_for_bit(model, tmp_path):
    config = GridConfig(datasets=("glyphs",), models=(model,), widths=(12,), p_k=(0.25,), seeds=1,
                        train=60, validation=30, training=TrainConfig(lr=0.1, epochs=3, batch=16))
    cell, = cells(config)
    backend = get_backend("numpy")

    def run(name, stop):
        place = Place(tmp_path / name, backend, None, Progress(1, io.StringIO()), stop)
        return grid.run_cell(cell.spec, place)

    class StopAfter:
        """Asks for the end at the given look, and a checkpoint is written then."""

        def __init__(self, looks):
            self.looks = looks

        @property
        def asked(self):
            self.looks -= 1
            return self.looks < 0

        def raise_if_asked(self):
            if self.looks < 0:
                raise KeyboardInterrupt

    whole = run("whole", Stop())
    for looks in (1, 4):  # in the first epoch, and in the second
        with pytest.raises(KeyboardInterrupt):
            run("parts", StopAfter(looks))
    parts = run("parts", Stop())
    assert {**whole, "seconds": 0, "last": 0} == {**parts, "seconds": 0, "last": 0}
    lines = [[{**json.loads(line), "seconds": 0}
              for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("whole", "parts")]
    assert len(lines[0]) == 4 and lines[0] == lines[1]
    weights = [dict(np.load(tmp_path / name / "weights.npz")) for name in ("whole", "parts")]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name])


# --- flags --------------------------------------------------------------------------------------


def of_model(name):
    return lambda cell: getattr(cell.spec.run.model, name)


def of_training(name):
    return lambda cell: getattr(cell.spec.run.training, name)


def of_optimizer(name):
    return lambda cell: getattr(cell.spec.run.training.optimizer, name)


# Flag: a text other than the default, where it has to arrive in the last cell, and as what.
REACHES = {
    "datasets": ("glyphs", lambda cell: cell.spec.dataset, "glyphs"),
    "models": ("top-k", of_model("gate"), TopK(0.1)),
    "widths": ("30", of_model("widths"), (21, 30, 30, 30, 1)),
    "p_k": ("0.3", lambda cell: cell.spec.run.model.gate.p_k, 0.3),
    "seeds": ("5", lambda cell: cell.spec.run.seed, 4),
    "train": ("77", lambda cell: cell.spec.train, 77),
    "validation": ("55", lambda cell: cell.spec.validation, 55),
    "target": ("2", lambda cell: cell.spec.target, "2"),
    "task": ("regression", lambda cell: cell.spec.task, "regression"),
    "layers": ("2", of_model("widths"), (21, 500, 1)),
    "activation": ("tanh", of_model("activation"), "tanh"),
    "ties": ("index", lambda cell: cell.spec.run.model.gate.ties, "index"),
    "bias": ("false", of_model("bias"), False),
    "optimizer": ("adamw", of_optimizer("name"), "adamw"),
    "momentum": ("0.7", of_optimizer("momentum"), 0.7),
    "beta1": ("0.8", of_optimizer("beta1"), 0.8),
    "beta2": ("0.99", of_optimizer("beta2"), 0.99),
    "eps": ("1e-6", of_optimizer("eps"), 1e-6),
    "weight_decay": ("0.1", of_optimizer("weight_decay"), 0.1),
    "decay_biases": ("false", of_optimizer("decay_biases"), False),
    "l1": ("1e-4", of_optimizer("l1"), 1e-4),
    "clip_norm": ("2", of_optimizer("clip_norm"), 2.0),
    "clip_value": ("3", of_optimizer("clip_value"), 3.0),
    "lr": ("0.25", of_training("lr"), 0.25),
    "schedule": ("cosine", of_training("schedule"), "cosine"),
    "warmup": ("17", of_training("warmup"), 17),
    "batch": ("48", of_training("batch"), 48),
    "accumulate": ("3", of_training("accumulate"), 3),
    "epochs": ("9", of_training("epochs"), 9),
    "steps": ("77", of_training("steps"), 77),
    "evaluations": ("3", of_training("evaluations"), 3),
    "augment": ("flip", of_training("augment"), "flip"),
    "precision": ("float64", of_training("precision"), "float64"),
}


@pytest.fixture(autouse=True)
def a_file_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", x=np.eye(10), y=np.arange(10) % 2)


def last_cell(**texts):
    """Return the last cell of a grid whose flags were given as these texts."""
    data = "glyphs" if "augment" in texts else "own.npz" if "task" in texts else "arm"
    given = {"datasets": data, "models": "comet", "p_k": "0.1"} | texts
    fields = dict(settings.flags(GridConfig))
    return cells(settings.build(GridConfig, {
        name: settings.parse(name, fields[name], text) for name, text in given.items()}))[-1]


def test_there_is_a_case_for_every_flag():
    assert {*REACHES, "recompute"} == {name for name, _ in settings.flags(GridConfig)}


def test_networks_that_cannot_recompute_say_so_before_the_first_cell():
    with pytest.raises(UserError, match=r"^MLPConfig has no field `recompute`.*train it without"):
        last_cell(recompute="true")


@pytest.mark.parametrize("flag", REACHES)
def test_every_flag_reaches_the_cell(flag):
    text, where, expected = REACHES[flag]
    default = last_cell()
    changed = last_cell(**{flag: text})
    assert where(default) != expected
    assert where(changed) == expected
    assert changed.folder(Path()) != default.folder(Path())


def test_a_cell_is_trained_on_the_data_that_it_names(monkeypatch, tmp_path):
    """And says what is the matter with them."""
    expected = replace(datasets.load("arm", train=77, target=2), notice="half of it")
    load = datasets.load
    monkeypatch.setattr(datasets, "load", lambda *given, **options: replace(
        load(*given, **options), notice="half of it"))
    monkeypatch.setattr(grid, "train", lambda *given: given)
    grid._load.cache_clear()
    cell = last_cell(datasets="arm", train="77", target="2")
    progress, said = Progress(1), []
    monkeypatch.setattr(progress, "message", said.append)
    place = Place(tmp_path, get_backend("numpy"), None, progress, Stop())
    run, data, *where = grid.run_cell(cell.spec, place)
    grid._load.cache_clear()
    assert (run, data.digest, len(data.x_train)) == (cell.spec.run, expected.digest, 77)
    assert where == [tmp_path, place.backend, progress, place.stop]
    assert said == ["arm: half of it"]


def test_threads_that_begin_together_load_the_data_once(tmp_path, monkeypatch):
    loaded, both = [], threading.Barrier(2)

    def load(name, *arguments, **options):
        loaded.append(name)
        time.sleep(0.1)  # the other thread is there by then
        return DATASETS["arm"].load(0)

    grid._load.cache_clear()
    monkeypatch.setattr(datasets, "load", load)
    monkeypatch.setattr(grid, "train", lambda *arguments: None)
    spec = cells(GridConfig(datasets=("arm",)))[0].spec
    place = Place(tmp_path, get_backend("numpy"), None, Progress(1), Stop())

    def run(_):
        both.wait()
        grid.run_cell(spec, place)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    grid._load.cache_clear()
    assert loaded == ["arm"]



@pytest.mark.parametrize(("values", "said"), [
    ({"widths": (20, 20)}, "--widths compares values, each given once, got 20, 20; how many"),
    ({"p_k": (0.5, 0.5)}, "--p-k compares values, each given once, got 0.5, 0.5$"),
    ({"models": ("comet", "comet")}, "--models compares values")])
def test_nothing_is_compared_with_itself(values, said):
    with pytest.raises(UserError, match=said):
        GridConfig(**values)


def test_a_cell_stands_for_one_model_data_set_and_seed():
    config = GridConfig(datasets=("glyphs", "arm"), models=("standard", "comet"), widths=(10, 20),
                        p_k=(0.1, 0.5), seeds=3)
    found = cells(config)
    assert len({cell.name for cell in found}) == len(found) == 2 * 2 * 3 * (1 + 2)
    assert [cell.spec.run.seed for cell in found] == sorted(cell.spec.run.seed for cell in found)


def test_work_is_that_of_the_products():
    """2 operations a weight and example, forward and for dW; for dx in the second layer only.

    And of what a step costs besides.
    """
    cell = last_cell(datasets="arm", train="100", epochs="3", widths="7", layers="2", bias="false")
    assert cell.work == pytest.approx(
        2 * (2 * 21 * 7 + 3 * 7) * 3 * 100 + OVERHEAD * 3 * 100 / 32)
    cell = last_cell(datasets="arm", train="100", steps="5", widths="7", layers="2", bias="false")
    assert cell.work == pytest.approx(5 * (2 * (2 * 21 * 7 + 3 * 7) * 32 + OVERHEAD))


def test_routing_is_work_unless_its_masks_are_kept():
    """An image that is changed at each pass has other masks each time."""
    of = {name: last_cell(datasets="glyphs", models=name, **more).work
          for name, more in (("standard", {}), ("comet", {}), ("layerwise", {}))}
    assert of["standard"] == of["comet"] < of["layerwise"]
    assert last_cell(datasets="glyphs", augment="flip").work == of["layerwise"]


# --- presets ------------------------------------------------------------------------------------

PAPER = {  # data set, widths, learning rate, epochs
    "fig4": ("cifar10", (100, 500, 1000, 3000), 1e-4, 100),
    "fig11": ("cifar10", (100, 500, 1000, 3000, 9000), 1e-3, 100),
    "fig33": ("sarcos", (100, 500, 1000), 1e-2, 50),
}


def test_figure_34_is_that_of_the_paper():
    config = experiment("fig34").configure("paper", {})
    training = config.training
    assert (config.datasets, config.widths, config.p_k, config.seeds) == (
        ("cifar10",), (3000,), (0.5,), 3)
    assert set(config.activation) == {"gelu", "softplus", "relu", "leaky_relu", "tanh", "selu",
                                      "sigmoid", "silu", "elu", "mish"}
    assert {"standard", "comet"} <= set(config.models)
    assert (training.lr, training.epochs, training.optimizer) == (
        1e-3, 100, OptimizerConfig("momentum", momentum=0.9))


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_presets_are_those_of_the_paper(name):
    config = experiment(name).configure("paper", {})
    training = config.training
    assert (config.datasets, config.widths, training.lr, training.epochs) == (
        (PAPER[name][0],), *PAPER[name][1:])
    assert (config.p_k, config.seeds, config.layers) == ((0.1, 0.5, 0.9), 3, 4)
    assert (config.activation, config.ties, config.bias) == (("softplus",), "strict", True)
    assert config.models == tuple(name for name in VARIANTS if name not in (
        "comet-exact", "comet-block-diagonal", "scaled", "centred"))
    assert (config.train, training.batch, training.accumulate) == (None, 32, 1)
    assert training.optimizer == OptimizerConfig("sgd")  # without momentum, decay, clipping
    assert (training.schedule, training.augment, training.precision) == ("constant", None,
                                                                         "float32")


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("preset", ["smoke", "laptop", "paper"])
def test_every_preset_can_be_had_and_restored_from_its_record(name, preset):
    found = experiment(name)
    config = found.configure(preset, {})
    assert found.cells(config)
    assert settings.build(found.config, json.loads(json.dumps(settings.values(config)))) == config


# --- figure and table, from files made by hand --------------------------------------------------

CONFIG = GridConfig(datasets=("arm", "glyphs"), models=("standard", "comet"), widths=(20,),
                    p_k=(0.5,), seeds=3, training=TrainConfig(epochs=3))
CURVES = {  # from epoch 0
    ("glyphs", "standard"): ([0.1, 0.5, 0.4, 0.3], [0.1, 0.2, 0.6, 0.5], [0.2, 0.5, 0.6, 0.7]),
    ("glyphs", "comet"): ([0.1, 0.2, 0.5, 0.4], [0.1, 0.8, 0.7, 0.6], [0.2, 0.3, 0.65, 0.5]),
    ("arm", "standard"): ([1.0, 0.3, 0.2, 0.4], [1.1, 0.9, 0.6, 0.4], [1.2, 1.0, 0.9, 0.9]),
    ("arm", "comet"): ([1.0, 0.5, 0.4, 0.6], [1.1, 0.1, 0.2, 0.3], [1.2, 0.5, 0.1, 0.2]),
}


def finish(config, out, curves, data="the data", notice=""):
    """Write the files of finished cells, of the first width and p_k, with these metrics."""
    for (dataset, model), of_seeds in curves.items():
        key = "val_loss" if dataset == "arm" else "val_accuracy"
        panel = Panel(dataset, config.activation[0], config.widths[0], config.p_k[0])
        for seed, values in enumerate(of_seeds):
            if values is None:
                continue
            folder = cell_of(config, panel, model, seed).folder(out)
            folder.mkdir(parents=True)
            lines = [json.dumps({"epoch": epoch, "val_loss": 9.0, key: value,
                                 "seconds": 10.0 * epoch * (seed + 1)})
                     for epoch, value in enumerate(values)]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            write_result(folder, {"parameters": 2_500_000, "data": f"{data} of {dataset}",
                                  "notice": notice, "seconds": {"prepare": 1.0}})


def rows(config, out):
    """Return the cells of the table's rows behind the panel's name, by data set."""
    lines = [re.split("  +", line) for line in grid_report.table(config, out).splitlines()]
    return {line[0]: line[3:] for line in lines if line[0] in config.datasets}


def reach(differences):
    """Return how far the 95 % interval of three differences reaches; t_{2, 0.975} = 4.303."""
    return 4.302652729911275 * np.std(differences, ddof=1) / np.sqrt(3)


def test_the_table_says_who_wins_by_how_much_and_with_which_interval(tmp_path):
    """Less error is better where the metric is an error."""
    finish(CONFIG, tmp_path, CURVES)
    points = f"+5.0 +- {reach([0, 20, -5]):.1f} points"
    error = f"60.0 +- {reach([-40, 60, 160]):.1f} % less error"
    assert rows(CONFIG, tmp_path) == {
        "glyphs": ["comet", "0.650", "standard", "0.600", points, "0.650", "0.600", points],
        "arm": ["comet", "0.200", "standard", "0.500", error, "0.200", "0.500", error]}


def test_the_table_says_when_comet_is_worse(tmp_path):
    """And by how much of the standard model's error."""
    swapped = {(dataset, {"standard": "comet", "comet": "standard"}[model]): curves
               for (dataset, model), curves in CURVES.items()}
    finish(CONFIG, tmp_path, swapped)
    found = rows(CONFIG, tmp_path)
    assert found["glyphs"][0] == found["arm"][0] == "standard"
    assert found["glyphs"][-1] == f"-5.0 +- {reach([0, 20, -5]):.1f} points"
    assert found["arm"][-1] == f"150.0 +- {reach([-100, 150, 400]):.1f} % more error"


def test_the_table_says_when_there_is_no_difference(tmp_path):
    """As without a hidden layer, where all models are one."""
    finish(CONFIG, tmp_path, {("arm", model): [[1.0, 0.5, 0.4, 0.3]] for model in CONFIG.models})
    assert rows(CONFIG, tmp_path)["arm"][-1] == "no difference"


def test_the_best_of_many_models_is_found_in_each_panel(tmp_path):
    config = replace(CONFIG, datasets=("glyphs",), models=("standard", "dropout", "comet", "l1"),
                     widths=(10, 20), seeds=1)
    for width, values in ((10, {"standard": 0.5, "dropout": 0.7, "comet": 0.6}),
                          (20, {"comet": 0.9, "l1": 0.85, "standard": 0.1})):
        finish(replace(config, widths=(width,)), tmp_path,
               {("glyphs", model): [[value] * 4] for model, value in values.items()})
    lines = [re.split("  +", line)[1:] for line in grid_report.table(config, tmp_path).splitlines()]
    assert lines[1] == ["10", "0.5", "dropout", "0.700", "comet", "0.600", "+10.0 points",
                        "0.600", "0.500", "+10.0 points"]
    assert lines[2] == ["20", "0.5", "comet", "0.900", "l1", "0.850", "+5.0 points",
                        "0.900", "0.100", "+80.0 points"]


def test_a_model_that_lost_seeds_is_not_the_best(tmp_path):
    """From those it may have diverged; its one good seed says little."""
    config = replace(CONFIG, datasets=("glyphs",), models=("standard", "dropout", "comet"))
    finish(config, tmp_path, {("glyphs", "standard"): [[0.5] * 4] * 3,
                              ("glyphs", "dropout"): (None, [0.9] * 4, None),
                              ("glyphs", "comet"): [[0.4] * 4] * 3})
    found = rows(config, tmp_path)["glyphs"]
    assert found[:4] == ["standard", "0.500", "comet", "0.400"]


def test_seeds_may_be_listed(tmp_path):
    config = replace(CONFIG, seeds=(2, 0))
    assert [cell.spec.run.seed for cell in cells(config)][::4] == [2, 0]
    finish(CONFIG, tmp_path, CURVES)
    found = rows(config, tmp_path)["glyphs"]
    assert (found[0], found[5:7]) == ("standard", ["0.575", "0.600"])
    assert found[-1].startswith("-2.5 +- ")


def test_the_task_of_ones_own_names_its_metric(tmp_path):
    finish(CONFIG, tmp_path, CURVES)
    assert grid_report.table(CONFIG, tmp_path).splitlines()[-1] == (
        "validation MSE (fraction of variance), or validation accuracy: best over the epochs, "
        "mean over seeds; a lead with its 95 % interval over seeds")


@pytest.mark.parametrize(("lead", "deep"), [(1, False), (-2, False), (30, True)])
def test_a_lead_alone_in_its_panel_is_as_deep_as_it_is_large(tmp_path, saved, lead, deep):
    config = replace(CONFIG, datasets=("glyphs",), seeds=1)
    finish(config, tmp_path, {("glyphs", "standard"): [[0.5] * 4],
                              ("glyphs", "comet"): [[0.5 + lead / 100] * 4]})
    grid_report.draw(config, tmp_path, "grid")
    image, = saved[-1].axes[0].images
    assert (abs(image.norm(lead) - 0.5) > 0.4) == deep


def test_a_lead_is_over_the_seeds_that_both_have(tmp_path):
    """Here the last one; all that is finished has its best value."""
    finish(CONFIG, tmp_path, {("glyphs", "standard"): ([0.1, 0.5, 0.4, 0.3], None, [0.2] * 4),
                              ("glyphs", "comet"): (None, [0.9] * 4, [0.1, 0.3, 0.3, 0.2])})
    assert rows(CONFIG, tmp_path) == {
        "glyphs": ["comet (2 of 3 seeds)", "0.600", "standard (2 of 3 seeds)", "0.350",
                   "+10.0 points", "0.600", "0.350", "+10.0 points"],
        "arm": ["-"] * 8}


def test_cells_of_different_data_are_not_compared_silently(tmp_path):
    finish(CONFIG, tmp_path, {which: curves for which, curves in CURVES.items()
                              if which != ("glyphs", "comet")})
    assert "different data" not in grid_report.table(CONFIG, tmp_path)
    finish(CONFIG, tmp_path, {("glyphs", "comet"): CURVES["glyphs", "comet"]}, "other data")
    assert ("the finished cells of glyphs were trained on different data"
            in grid_report.table(CONFIG, tmp_path))


def line_of(**values):
    return json.dumps({"epoch": 0, "seconds": 0.0} | values) + "\n"


@pytest.mark.parametrize("content", [
    None, "", '{"epoch": 0', line_of(val_accuracy=0.5) * 3,  # an epoch too few
    line_of(val_accuracy=0.5) * 5, line_of(val_loss=0.5) * 4, line_of(val_accuracy=None) * 4,
    "\0" * 9])
def test_damaged_metrics_of_a_finished_cell_are_a_sentence(tmp_path, content):
    finish(CONFIG, tmp_path, CURVES)
    folder = cell_of(CONFIG, Panel("glyphs", "softplus", 20, 0.5), "comet", 1).folder(tmp_path)
    file = folder / "metrics.jsonl"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    for read in (grid_report.table, lambda *where: grid_report.draw(*where, "grid")):
        with pytest.raises(UserError) as error:
            read(CONFIG, tmp_path)
        assert str(error.value).startswith(f"{file} is missing or damaged")
        assert "; remove its folder and run the experiment again" in str(error.value)


def beside(axes):
    """Return the models' names beside a panel, from the top down."""
    return [text.get_text() for text in sorted(axes.texts, key=lambda text: -text.xy[1])]


def test_the_figures_show_the_numbers_of_the_files(tmp_path, saved):
    finish(CONFIG, tmp_path, CURVES)
    assert grid_report.draw(CONFIG, tmp_path, "grid") == [
        tmp_path / f"grid{suffix}.png" for suffix in ("", "_time", "_work", "_summary")]
    epochs, time, work, summary = saved
    for dataset, names, lead, means in (
            ("glyphs", ["COMET 0.650 (2.5 M)", "standard 0.600 (2.5 M)"],
             f"+5.0\n± {reach([0, 20, -5]):.1f}",
             {"COMET": [0.4 / 3, 1.3 / 3, 1.85 / 3, 0.5],
              "standard": [0.4 / 3, 0.4, 1.6 / 3, 0.5]}),
            ("arm", ["COMET 0.200 (2.5 M)", "standard 0.500 (2.5 M)"],
             f"+60.0\n± {reach([-40, 60, 160]):.1f}",
             {"COMET": [1.1, 1.1 / 3, 0.7 / 3, 1.1 / 3],
              "standard": [1.1, 2.2 / 3, 1.7 / 3, 1.7 / 3]})):
        place = CONFIG.datasets.index(dataset)
        for figure, x in ((epochs, [0, 1, 2, 3]), (time, [1, 21, 41, 61])):
            axes = figure.axes[place]
            assert axes.get_title() == f"{dataset}, N = 20, $p_k$ = 0.5"
            assert beside(axes) == names
            bands = dict(zip(("COMET", "standard"), axes.collections, strict=True))
            assert [line.get_label() for line in axes.lines] == ["COMET", "standard"]
            for line in axes.lines:
                label = line.get_label()
                np.testing.assert_allclose(line.get_xdata(), x)
                np.testing.assert_allclose(line.get_ydata(), means[label])
                edge = bands[label].get_paths()[0].vertices[:, 1]
                of = CURVES[dataset, label.lower()]
                assert (edge.min(), edge.max()) == (np.min(of), np.max(of))
            assert axes.get_yscale() == ("log" if dataset == "arm" else "linear")
        assert [text.get_text() for text in summary.axes[place].texts] == [lead]
        n = examples(CONFIG, dataset)
        trained, routing = multiply_adds(
            cell_of(CONFIG, Panel(dataset, "softplus", 20, 0.5), "comet", 0).spec.run.model)
        places = [line.get_xdata() for line in work.axes[place].lines]
        epochs_done = np.arange(4)
        np.testing.assert_allclose(places[0], epochs_done * n * trained + n * routing)  # kept
        np.testing.assert_allclose(places[1], epochs_done * n * (trained + routing))  # each step
        np.testing.assert_allclose(places[2], epochs_done * n * trained)  # standard


def test_leads_stand_in_the_summary_by_rival_width_and_p_k(tmp_path, saved):
    config = replace(CONFIG, datasets=("glyphs",), models=("standard", "comet", "dropout"),
                     widths=(10, 20), p_k=(0.1, 0.5, 0.9), seeds=1)
    leads = {(10, 0.1): 1, (10, 0.5): 2, (10, 0.9): -3, (20, 0.1): 4, (20, 0.9): 150}
    for width in config.widths:
        finish(replace(config, widths=(width,)), tmp_path, {("glyphs", "standard"): [[0.5] * 4]})
    for (width, level), lead in leads.items():
        finish(replace(config, widths=(width,), p_k=(level,)), tmp_path,
               {("glyphs", "comet"): [[0.5 + lead / 100] * 4],
                ("glyphs", "dropout"): [[0.5] * 4]})
    grid_report.draw(config, tmp_path, "grid")
    standard, dropout = saved[-1].axes
    assert [axes.get_title() for axes in (standard, dropout)] == ["standard *", "dropout"]
    for axes in standard, dropout:
        assert {text.get_position(): text.get_text() for text in axes.texts} == {
            (0, 0): "+1.0", (1, 0): "+2.0", (2, 0): "-3.0", (0, 1): "+4.0", (1, 1): "-",
            (2, 1): "+150"}
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.5", "0.9"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["10", "20"]


def test_activations_stand_side_by_side(tmp_path, saved):
    config = replace(CONFIG, datasets=("glyphs",), activation=("tanh", "relu"), seeds=1)
    for f, values in (("tanh", (0.1, 0.2)), ("relu", (0.4, 0.3))):
        finish(replace(config, activation=(f,)), tmp_path, {
            ("glyphs", "standard"): [[values[0]] * 4], ("glyphs", "comet"): [[values[1]] * 4]})
    grid_report.draw(config, tmp_path, "grid")
    assert [axes.get_title() for axes in saved[0].axes] == [
        f"glyphs, N = 20, $p_k$ = 0.5, {f}" for f in ("tanh", "relu")]
    leads, = saved[-1].axes
    assert [text.get_text() for text in leads.texts] == ["+10.0", "-10.0"]
    assert [label.get_text() for label in leads.get_yticklabels()] == ["tanh", "relu"]
    lines = [re.split("  +", line) for line in grid_report.table(config, tmp_path).splitlines()]
    assert [line[1] for line in lines[1:3]] == ["tanh", "relu"]


def test_the_load_of_experts_is_said(tmp_path):
    """As the number of equally used experts that has its entropy; of two seeds the mean."""
    config = replace(CONFIG, datasets=("glyphs",), models=("moe", "comet"), seeds=2)
    for seed, last in enumerate(([1.0, 0.0], [0.5, 0.5])):
        folder = cell_of(config, Panel("glyphs", "softplus", 20, 0.5), "moe", seed).folder(tmp_path)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(
            line_of(val_accuracy=0.5, val_load_0=shares[0], val_load_1=shares[1])
            for shares in ([0.5, 0.5], last)))
        write_result(folder, {"parameters": 1, "data": "", "notice": "", "seconds": {"prepare": 0}})
    assert grid_report.table(config, tmp_path).splitlines()[-1] == (
        "experts in use of 2, moe, glyphs, N = 20, p_k = 0.5: 2.0 before training, 1.5 after it "
        "(exp of the entropy of their shares; the largest share is 75%)")


def test_the_figures_title_says_what_is_not_the_default_and_what_is_wrong_with_the_data(
        tmp_path, saved):
    config = replace(CONFIG, train=77, ties="index")
    finish(config, tmp_path, {("glyphs", "comet"): CURVES["glyphs", "comet"]},
           notice="of some/folder/half of it")
    grid_report.draw(config, tmp_path, "grid")
    assert " ".join(saved[0].get_suptitle().split()) == (
        "grid: sgd lr 0.01, batch 32, 3 epochs, softplus, 3 seeds (band: lowest to highest), 77 "
        "training examples, ties index; beside each panel: the best value of each model and its "
        "parameters glyphs: of half of it")
