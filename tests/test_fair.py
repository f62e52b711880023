"""The fair fight: the best setting is chosen, on other seeds than are reported, whatever comes."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from comet_np import settings
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import fair, selection, sweep
from comet_np.experiments.datasets import sizes_of
from comet_np.experiments.experiment import Place
from comet_np.experiments.fair import EXPERIMENT, Contender, lead, verdict
from comet_np.experiments.files import read_result
from comet_np.experiments.progress import Progress
from comet_np.experiments.selection import Curve, FairConfig, Setting, cell_of, cells, run_cell
from comet_np.experiments.signals import Stop
from comet_np.experiments.tasks.base import Metric
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.variants import VARIANTS
from comet_np.models import module_of
from comet_np.models.mlp import MLPConfig
from comet_np.optim import OptimizerConfig
from comet_np.records import read_known
from comet_np.tree import leaves

SMALL = FairConfig(datasets=("arm", "glyphs"), models=("standard", "smaller", "comet"), width=8,
                   train=40, validation=30, epochs=2, batch=8, lrs=(1e-2, 0.2), momenta=(0.0, 0.9),
                   activations=("softplus",), initials=("paper", "he"), reporting=(0, 1, 2))
SIGNS = {"arm": ("val_loss", -1), "glyphs": ("val_accuracy", 1)}


@pytest.fixture(scope="module")
def fought(tmp_path_factory):
    """Return the folder of a small fight."""
    out = tmp_path_factory.mktemp("fair")
    outcomes = sweep.Sweep("fair", cells(SMALL), out).run()
    assert [outcome.status for outcome in outcomes] == 6 * ["done"], outcomes
    return out


@pytest.fixture(params=SIGNS)
def dataset(request):
    return request.param


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def best(folder, dataset):
    key, sign = SIGNS[dataset]
    return sign * max(sign * line[key] for line in lines(folder))


# --- the choice ---------------------------------------------------------------------------------


def test_every_contender_has_the_same_settings_to_choose_from(dataset):
    given = {model: [{**vars(setting), "run": None}
                     for setting in cell_of(SMALL, dataset, model).spec.settings]
             for model in SMALL.models}
    assert given["standard"] == given["smaller"] == given["comet"]
    assert len(given["comet"]) == 8


def test_a_setting_reaches_the_run():
    config = replace(SMALL, ties="index", layers=3, precision="float64", p_k=0.25)
    for model in SMALL.models:
        for setting in selection.settings_of(config, sizes_of("arm"), model):
            optimizer = (OptimizerConfig("momentum", setting.momentum) if setting.momentum
                         else OptimizerConfig())
            standard = MLPConfig((21, 8, 8, 1), setting.activation, None, initial=setting.initial)
            training = TrainConfig(optimizer, setting.lr, batch=8, epochs=2, precision="float64")
            assert setting.run == VARIANTS[model](RunConfig(standard, training), 0.25, "index")


@pytest.mark.parametrize("model", SMALL.models)
def test_the_setting_that_is_best_on_the_choosing_seeds_is_chosen(fought, dataset, model):
    cell = cell_of(SMALL, dataset, model)
    folder, result = cell.folder(fought), cell.result(fought)
    values = np.array([[best(folder / "choosing" / f"{setting.name}-seed{seed}", dataset)
                        for seed in SMALL.choosing] for setting in cell.spec.settings])
    assert len(list((folder / "choosing").iterdir())) == values.size == 16
    means = SIGNS[dataset][1] * values.mean(axis=1)
    assert means.max() > means.min()
    assert result["chosen"] == means.argmax()
    chosen = cell.spec.settings[means.argmax()]
    assert [entry.pop("values") for entry in result["tried"]] == values.tolist()
    assert [entry | {"run": setting.run} for entry, setting in zip(
        result["tried"], cell.spec.settings, strict=True)] == [*map(vars, cell.spec.settings)]
    assert sorted(each.name for each in (folder / "reporting").iterdir()) == [
        f"{chosen.name}-seed{seed}" for seed in SMALL.reporting]


def test_the_choice_sees_no_test_set_and_leaves_no_weights(fought, dataset):
    """Nor checkpoints; what it leaves is whole."""
    for part, files in (("choosing", {"config.json", "metrics.jsonl"}),
                        ("reporting", {"config.json", "metrics.jsonl", "weights.npz"})):
        for folder in (cell_of(SMALL, dataset, "comet").folder(fought) / part).iterdir():
            result, hashes = read_result(folder)
            assert set(hashes) == files
            assert {file.name for file in folder.iterdir()} == files | {"result.json"}
            for name in files:
                read_known(folder / name, hashes)
            assert any(name.startswith("test_") for name in result) == (part == "reporting")


def test_the_training_and_the_validation_set_are_limited(fought, tmp_path):
    config = replace(SMALL, datasets=("glyphs",), validation=10, epochs=1, choosing=(7,),
                     reporting=(8,), lrs=(0.1,), momenta=(0.0,), initials=("he",))
    cell = cell_of(config, "glyphs", "standard")
    result = run_cell(cell.spec, Place(tmp_path, get_backend("numpy"), None, Progress(1)))
    line, = lines(next((tmp_path / "choosing").iterdir()))[1:]
    assert line["step"] == 5  # 40 examples
    assert (10 * line["val_accuracy"]) % 1 == 0
    assert [report["seed"] for report in result["reported"]] == [8]


def curves(*values, diverged=None):
    return [Curve([0, 1], [9.0, value], [0.0, 1.0], None, diverged) for value in values]


def test_one_divergence_is_enough_and_the_first_of_equals_is_taken():
    lost = curves(0.0, diverged="at step 3")
    assert selection.choice([curves(2.0, 4.0), curves(3.5, 2.0), lost + curves(0.0)], -1) == 1
    assert selection.choice([curves(0.3), lost, curves(0.3)], -1) == 0
    assert selection.choice([lost, lost], 1) is None


def test_settings_that_diverge_are_recorded_and_end_nothing(tmp_path):
    config = replace(SMALL, datasets=("arm",), models=("comet", "layerwise"), lrs=(1e-2, 1e30),
                     momenta=(0.0,), initials=("paper",))
    assert {each.status for each in sweep.Sweep("fair", cells(config), tmp_path).run()} == {"done"}
    for cell in cells(config):
        result = cell.result(tmp_path)
        assert result["chosen"] == 0
        assert [None in entry["values"] for entry in result["tried"]] == [False, True]
        for folder in cell.folder(tmp_path).glob("choosing/*lr1e+30*"):
            assert not (folder / "diverged").exists()
            assert read_result(folder)[0]["diverged"].startswith("training diverged at step ")
    assert "layerwise has diverged" not in EXPERIMENT.table(config, tmp_path)


def test_a_contender_of_which_all_diverges_is_said_to(tmp_path):
    pytest.importorskip("matplotlib")
    config = replace(SMALL, datasets=("arm",), models=("standard", "comet"), lrs=(1e30,),
                     momenta=(0.0,), initials=("paper",))
    sweep.Sweep("fair", cells(config), tmp_path).run()
    assert cell_of(config, "arm", "comet").result(tmp_path)["reported"] == []
    assert EXPERIMENT.table(config, tmp_path).count("all diverged") == 2
    assert EXPERIMENT.draw(config, tmp_path) == [tmp_path / "fair.png"]


@pytest.mark.parametrize("model", VARIANTS)
def test_every_model_obeys_the_initialisation(model):
    paper, he = (selection.settings_of(replace(SMALL, initials=(initial,)), sizes_of("arm"),
                                       model)[0].run for initial in ("paper", "he"))
    assert paper != he == replace(paper, model=replace(paper.model, initial="he"))
    params = leaves(module_of(he.model).init(he.model)[0])
    assert not any(b.any() for b in params if b.ndim == 1)


# --- stopped and resumed ------------------------------------------------------------------------


class Killer(Progress):
    """A progress that asks for the end after some steps, and counts the work."""

    def __init__(self, steps):
        super().__init__(1)
        self.stop, self.left, self.worked = Stop(), steps, 0.0

    def advance(self, work, text="", steps=1):
        super().advance(work, text, steps)
        self.left -= steps
        self.worked += work
        if self.left == 0:
            self.stop.ask()


def without_times(result):
    return result | {"reported": [report | {"seconds": None} for report in result["reported"]]}


def files_of(folder):
    """Return the contents of the weights and the metrics of all trainings, times aside."""
    found = {}
    for file in sorted(folder.glob("*/*/*")):
        name = file.relative_to(folder)
        if file.name == "metrics.jsonl":
            found[name] = [line | {"seconds": None} for line in lines(file.parent)]
        elif file.name == "weights.npz":
            found[name] = {key: array.tobytes() for key, array in np.load(file).items()}
        else:
            found[name] = None
    return found


def test_a_fight_that_is_stopped_again_and_again_ends_as_one_that_is_not(tmp_path):
    """At every place of a training; no training is done twice, and all work is counted."""
    config = replace(SMALL, datasets=("arm",), initials=("he",), lrs=(0.1,), reporting=(0, 1))
    cell, numpy = cell_of(config, "arm", "comet"), get_backend("numpy")
    whole, worked, stops = Killer(-1), 0.0, 0
    expected = run_cell(cell.spec, Place(tmp_path / "whole", numpy, None, whole))
    assert whole.worked == pytest.approx(cell.work)
    for _ in range(100):
        killer = Killer(7)  # of 10 steps a training
        place = Place(tmp_path / "stopped", numpy, None, killer, killer.stop)
        try:
            result = run_cell(cell.spec, place)
            break
        except KeyboardInterrupt:
            stops += 1
        finally:
            worked += killer.worked
    assert stops > 5
    assert worked == pytest.approx(cell.work)
    assert killer.done == pytest.approx(cell.work)
    assert without_times(result) == without_times(expected)
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_a_damaged_training_is_one_sentence(tmp_path):
    config = replace(SMALL, datasets=("arm",), initials=("he",), lrs=(0.1,))
    cell = cell_of(config, "arm", "standard")
    place = Place(tmp_path, get_backend("numpy"), None, Progress(1))
    run_cell(cell.spec, place)
    for name in "metrics.jsonl", "result.json":
        file = next((tmp_path / "choosing").iterdir()) / name
        file.write_text(file.read_text().replace("1", "2"))
        with pytest.raises(UserError, match=f"{name} is .*damaged.*; remove its folder and run"):
            run_cell(cell.spec, place)


# --- the table ----------------------------------------------------------------------------------


def of_t(values):
    """Return the mean of some values and the reach of its 95 % interval."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return np.mean(values), (high - low) / 2


def test_the_tables_numbers_are_those_of_the_files(fought, dataset):
    folders = {model: sorted((cell_of(SMALL, dataset, model).folder(fought) / "reporting"
                              ).iterdir()) for model in SMALL.models}
    bests = {model: np.array([best(folder, dataset) for folder in each])
             for model, each in folders.items()}
    key, sign = SIGNS[dataset]
    tests = {model: np.array([read_result(folder)[0][key.replace("val", "test")]
                              for folder in each]) for model, each in folders.items()}
    text = EXPERIMENT.table(SMALL, fought).split("\n\n")[SMALL.datasets.index(dataset)]
    rows = {line.split()[0]: line for line in text.splitlines()}
    for model in SMALL.models:
        for values in bests[model], tests[model]:
            assert "{:.3f} +- {:.3f}".format(*of_t(values)) in rows[model]
        if model != "comet":
            for values in bests, tests:
                a, b = values["comet"], values[model]
                leads = 100 * (a - b) if sign > 0 else 100 * (b - a) / b.mean()
                assert "{:+.1f} +- {:.1f}".format(*of_t(leads)) in rows[model]
        chosen = folders[model][0].name
        f, initial, momentum, lr = chosen.rsplit("-seed", 1)[0].split("-", 3)
        assert rows[model].split()[1:5] == [lr.removeprefix("lr"),
                                            momentum.removeprefix("momentum"), f, initial]
    winner = max(SMALL.models, key=lambda model: sign * bests[model].mean())
    assert f"{dataset}: {winner} has the best mean; " in text


def test_the_figure_is_drawn(fought):
    pytest.importorskip("matplotlib")
    file, = EXPERIMENT.draw(SMALL, fought)
    assert file.stat().st_size > 10_000


def test_what_is_not_finished_is_said(tmp_path):
    assert EXPERIMENT.table(SMALL, tmp_path).count("not finished") == 8
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="holds no finished cell of fair: run it first"):
        EXPERIMENT.draw(SMALL, tmp_path)


SETTING = cell_of(SMALL, "arm", "standard").spec.settings[0]


def contender(*of_seeds, seconds=1.0, setting=SETTING, **changes):
    """Return a contender with these values after each epoch, which takes some seconds."""
    return Contender(setting, {
        seed: Curve(list(range(len(values))), list(values),
                    [seconds * epoch for epoch in range(len(values))], None, None)._replace(
                        **changes) for seed, values in enumerate(of_seeds)}, "")


def test_equal_epochs_count_the_best_and_pair_the_seeds():
    comet = contender([9.0, 3.0, 4.0], [9.0, 6.0, 5.0])
    rival = contender([9.0, 4.0, 8.0], [9.0, 7.0, 6.5])
    mean, reach = lead(comet, rival, -1)
    assert (mean, reach) == pytest.approx(of_t(100 * np.array([1.0, 1.5]) / 5.25))
    assert lead(rival, comet, 1).mean == pytest.approx(0.0)  # 9, before the first epoch


def test_at_equal_seconds_both_go_as_far_as_the_faster_one_could():
    """Here 3 seconds, half way between two points of the slower one: 0.25 from both seeds."""
    slow = contender([0.1, 0.2, 0.3, 0.9], [0.1, 0.3, 0.2, 0.9], seconds=2.0)
    fast = contender([0.1, 0.5, 0.4, 0.4], [0.1, 0.2, 0.6, 0.4], seconds=1.0)
    half_way = (0.25 + max(0.3, 0.25)) / 2
    assert lead(slow, fast, 1, fair.seconds).mean == pytest.approx(100 * (half_way - 0.55))
    assert lead(fast, slow, 1, fair.seconds).mean == pytest.approx(100 * (0.55 - half_way))
    assert lead(slow, fast, 1, fair.epochs).mean == pytest.approx(100 * (0.9 - 0.55))
    late = fast._replace(curves={seed: curve._replace(seconds=[3.0, 5.0, 6.0, 7.0])
                                 for seed, curve in fast.curves.items()})
    never = contender([0.7, 0.8], [0.7, 0.8], seconds=1.0)
    assert lead(late, never, 1, fair.seconds).mean == pytest.approx(100 * (0.1 - 0.8))


def test_work_is_counted_in_multiply_adds_with_the_routing():
    """Three products a layer but the first, two of that, and those of V once, or at each step."""
    widths = (21, 8, 8, 8, 1)
    layers = [N * M for N, M in itertools.pairwise(widths)]
    trained, V = 3 * sum(layers) - layers[0], sum(layers[:-1])
    curve = contender([1.0, 1.0, 1.0]).curves[0]
    for model, expected in (("standard", [0, trained, 2 * trained]),
                            ("comet", [V, V + trained, V + 2 * trained]),
                            ("layerwise", [0, V + trained, 2 * (V + trained)])):
        setting = cell_of(SMALL, "arm", model).spec.settings[0]
        np.testing.assert_allclose(fair.work(setting, curve), expected)


ACCURACY = Metric("accuracy", "validation accuracy", 1)


def test_the_verdict_says_who_wins_by_how_much_and_where_nothing_is_shown():
    found = {"standard": contender([0.50], [0.52], [0.51]), "comet": contender([0.60], [0.62],
                                                                               [0.611]),
             "dropout": contender([0.70], [0.73], [0.71]), "top-k": contender([0.5], [0.7], [0.6]),
             "smaller": contender([0.5], [0.5], [0.5], diverged="at step 2")}
    better, worse, open_ = ("({:+.1f} +- {:.1f})".format(*of_t(values)) for values in (
        [10.0, 10.0, 10.1], [-10.0, -11.0, -9.9], [10.0, -8.0, 1.1]))
    assert verdict(found, ACCURACY) == (
        f"dropout has the best mean; COMET is better than standard {better}; COMET is worse than "
        f"dropout {worse}; COMET is not shown to differ from top-k {open_}; smaller has diverged "
        "(leads in points of accuracy)")
    one_seed = {"standard": contender([0.5]), "comet": contender([0.9])}
    assert "COMET is not shown to differ from standard (+40.0)" in verdict(one_seed, ACCURACY)
    found["comet"] = contender([0.5], diverged="at step 1")
    for without in found, {"standard": found["standard"]}:
        assert "no comparison" in verdict(without, ACCURACY)


@pytest.mark.parametrize(("lr", "said"), [(1e-3, True), (1e-2, False), (1e-1, True)])
def test_a_learning_rate_at_the_edge_of_the_grid_is_said(lr, said):
    config = replace(SMALL, lrs=(1e-2, 1e-1, 1e-3))
    side = contender([0.5], setting=replace(SETTING, lr=lr))
    assert fair._edges(config, {"comet": side}) == [
        f"at the edge of --lrs, so that a better one may lie beyond: comet ({lr:g})"] * said


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"choosing": (3, 1), "reporting": (0, 1, 2, 3)}, "need different seeds, both have 1, 3"),
    ({"choosing": (-1,)}, "seeds are 0 or more, got --choosing -1"),
    ({"choosing": ()}, "--choosing needs at least one value, each given once, got none"),
    ({"lrs": (0.1, 0.1)}, "--lrs needs at least one value, each given once, got 0.1, 0.1"),
    ({"lrs": (0.0,)}, "the learning rate must be positive and finite, got 0.0"),
    ({"momenta": (1.0,)}, r"momentum must be in \[0, 1\), got 1.0"),
    ({"activations": ("rellu",)}, 'unknown activation "rellu"; did you mean "relu"'),
    ({"initials": ("hee",)}, 'unknown initialisation "hee"; did you mean "he"'),
    ({"models": ("standard", "comett")}, 'unknown model "comett"; did you mean "comet"'),
    ({"models": ("standard", "dropout")}, "between comet and at least one other"),
    ({"models": ("comet",)}, "between comet and at least one other"),
    ({"datasets": ("army",)}, 'unknown data set "army"; did you mean "arm"'),
    ({"p_k": 1.5}, r"--p-k, must be in \(0, 1\], got 1.5"),
    ({"p_k": 0.01}, "leaves the smaller model"),
    ({"width": 0}, "an integer of at least 1"),
    ({"layers": 0}, "at least 1 layer"),
    ({"train": 0}, "train = 0"),
    ({"validation": 0}, "validation = 0"),
    ({"epochs": -1}, "epochs = -1"),
    ({"batch": 0}, "batch = 0"),
    ({"precision": "float12"}, "float12"),
    ({"ties": "random"}, "random"),
    ({"lrs": tuple(np.linspace(0.1, 1, 3000).tolist())}, "choose fewer --lrs or --momenta"),
], ids=lambda part: next(iter(part)) if isinstance(part, dict) else "")
def test_bad_settings_are_refused_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message) as refused:
        settings.build(FairConfig, settings.values(SMALL) | changes)
    assert "\n" not in str(refused.value)


def test_data_without_a_validation_set_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "load", lambda spec, place: SimpleNamespace(
        task="regression", x_val=None))
    with pytest.raises(UserError, match="arm has no validation set"):
        run_cell(cell_of(SMALL, "arm", "comet").spec,
                 Place(tmp_path, get_backend("numpy"), None, Progress(1)))


def test_the_paper_preset_has_all_data_and_the_paper_width():
    config = EXPERIMENT.configure("paper", {})
    assert (config.width, config.train, config.validation) == (1000, None, None)
    assert isinstance(cells(config)[0].spec.settings[0], Setting)
