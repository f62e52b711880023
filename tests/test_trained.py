"""Trained models: what they predict, what a folder keeps of them, and what is made of bad ones."""

import copy
import dataclasses
import doctest
import inspect
import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

import comet_np
from comet_np import gates
from comet_np.errors import UserError
from comet_np.experiments import fit as fit_module
from comet_np.experiments.datasets.own import from_arrays
from comet_np.experiments.files import locked
from comet_np.experiments.fit import DEFAULTS, trained_on
from comet_np.experiments.training import Diverged, RunConfig, TrainConfig, examples
from comet_np.experiments.training import model as model_module
from comet_np.experiments.training.model import load_run
from comet_np.experiments.variants import VARIANTS
from comet_np.gates import Bernoulli, Comet, ExampleTied, Layerwise, TopK
from comet_np.models import mlp, module_of
from comet_np.models.mlp import MLPConfig
from comet_np.records import read_json, write_json
from comet_np.settings import build
from comet_np.tree import leaves
from tests import naive
from tests.oracle import F, cap
from tests.residual import ResidualConfig
from tests.runs import small_data, stopped
from tests.runs import trained as watched
from tests.test_extension import AbsoluteError, HalfSpaces, data_of_a_table, write_table
from tests.tolerances import assert_close

X = np.random.default_rng(0).normal(3, [1, 20, 0.1, 4], (70, 4))
Y = 100 + 7 * (X[:, 0] - 3) * (X[:, 3] - 3)
KINDS = np.where(Y > 100, "above", "below")
SMALL = {"widths": (9, 7), "epochs": 2, "batch": 16, "progress": False}

@dataclasses.dataclass(frozen=True)
class Planes(HalfSpaces):
    """The same, with its fixed weights in a tree that has no published names."""

    def shapes(self, widths):
        return {"planes": super().shapes(widths)}

    def init(self, widths, seed, backend, dtype):
        return {"planes": HalfSpaces().init(widths, seed, backend, dtype)}

    def masks(self, x, fixed, config, at):
        return super().masks(x, fixed["planes"], config, at)


GATES = {"none": None, "Comet": Comet(0.3), "Comet, g": Comet(0.5, "index", "softplus"),
         "Layerwise": Layerwise(0.4), "TopK": TopK(0.3), "TopK of f(a)": TopK(0.3, of="activation"),
         "Bernoulli": Bernoulli(0.5), "ExampleTied": ExampleTied(0.4), "own": HalfSpaces()}


def fitted(y=Y, folder=None, **changes):
    return comet_np.fit(X, y, folder=folder, **SMALL | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished run: COMET, a regression."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    fitted(folder=folder, precision="float64")
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """Return a copy of the finished run."""
    folder = tmp_path / "run"
    folder.mkdir()
    for file in finished.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def assert_same(ours, theirs):
    """Assert that two trained models are the same, bit for bit, but for times."""
    for name in ("config", "run", "task", "data"):
        assert repr(getattr(ours, name)).split(" at 0x")[0] == repr(
            getattr(theirs, name)).split(" at 0x")[0]
    ours_all, theirs_all = ([*leaves((each.params, each.fixed))] for each in (ours, theirs))
    for a, b in zip(ours_all, theirs_all, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    lines = [[{k: v for k, v in line.items() if k != "seconds"} for line in each.metrics]
             for each in (ours, theirs)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == ours.run.training.epochs + 1


# --- predictions --------------------------------------------------------------------------------


def predicted_by_hand(folder, x):
    """Return outputs and predictions from ``config.json`` and ``weights.npz`` alone."""
    config, weights = json.loads((folder / "config.json").read_text()), np.load(
        folder / "weights.npz")
    model, data = config["run"]["model"], config["data"]["preparation"]
    x = ((x - data["x_mean"]) / data["x_std"]).astype("float32").astype("float64")
    a = (mixture_by_hand if "experts" in model else mlp_by_hand)(model, weights, x)
    if config["task"] == "classification":
        return a, np.array(data["classes"])[a.argmax(axis=1)]
    return a, (a * data["y_std"] + data["y_mean"]).squeeze(axis=1)


def mixture_by_hand(model, weights, x):
    """Return the output of a mixture with a weighted gate."""
    def part(prefix, f, layers):
        own = {name.removeprefix(prefix): weights[name] for name in weights
               if name.startswith(prefix)}
        return mlp_by_hand(model | {"activation": f, "gate": None, "scale": 1,
                                    "widths": layers * [None]}, own, x)

    s = part("gating_network.", model["gate_activation"], 3)
    e = s.argmax(axis=1)
    g = np.exp(s.max(axis=1)) / np.exp(s).sum(axis=1)
    y = np.array([part(f"experts.{j}.", model["activation"], len(model["widths"]))
                  for j in range(model["experts"])])
    return g[:, None] * y[e, np.arange(len(x))]


def mlp_by_hand(model, weights, x):
    """Return the output of an MLP."""
    gate, f = model["gate"] or {"class": None}, F[model["activation"]]
    h = z = x
    for layer in range(1, len(model["widths"])):
        a = h @ weights[f"fc{layer}.weight"].T
        if model["bias"]:
            a = a + weights[f"fc{layer}.bias"]
        if layer + 1 == len(model["widths"]):
            break
        N, m = a.shape[1], 1
        k = max(1, int(gate.get("p_k", 1) * N))
        if gate["class"] == "Comet":
            if gate["exact"]:
                z = np.array(list(map(naive.on_grid, z)))
            c = z @ weights[f"spec_{layer}.weight"].T
            m = cap(c, k, gate["ties"])
            z = m * F[gate["g"]](c)
        elif gate["class"] == "Layerwise":
            m = cap(h @ weights[f"spec_{layer}.weight"].T, k, gate["ties"])
        elif gate["class"] == "TopK":
            m = cap(a if gate["of"] == "pre-activation" else f(a), k, gate["ties"])
        elif gate["class"] == "ExampleTied":
            m = np.arange(N) < int(gate["p"] * N)
        h = model["scale"] * m * f(a)
    return a


def check_predictions(model, folder, precision="float64"):
    """Assert that a model, and the one in its folder, predict what its files say by hand."""
    model.save(folder)
    output, predictions = predicted_by_hand(folder, X)
    for each in (model, load_run(folder)):
        assert_close(each.output(X).astype(precision), output, "sum")
        if predictions.dtype.kind == "f":
            assert each.predict(X).shape == (70,)
            assert_close(each.predict(X), predictions, "sum" if precision == "float64" else "torch")
        else:
            np.testing.assert_array_equal(each.predict(X), predictions)
            powers = np.exp(output - output.max(axis=1, keepdims=True))
            assert_close(each.predict_proba(X).astype(precision),
                         powers / powers.sum(axis=1, keepdims=True), "sum")


@pytest.mark.parametrize("name", [name for name in GATES if name != "own"])
def test_predictions_are_those_of_the_files(name, tmp_path):
    for i, y in enumerate((Y, KINDS)):
        check_predictions(fitted(y, gate=GATES[name], precision="float64", bias=i == 0),
                          tmp_path / str(i))


# Of the block-diagonal router's weights there are no published names: test_routers.py has it.
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "comet-block-diagonal"])
def test_every_model_of_the_paper_is_kept(name, tmp_path):
    data = from_arrays(X, Y)
    standard = RunConfig(MLPConfig((4, 9, 7, 1), gate=None, activation="tanh"),
                         build(TrainConfig, DEFAULTS | {"epochs": 1, "precision": "float64"}))
    check_predictions(trained_on(data, VARIANTS[name](standard, 0.5, "strict")), tmp_path)


def test_predictions_in_float32(tmp_path):
    model = fitted(KINDS)
    assert {leaf.dtype.name for leaf in leaves((model.params, model.fixed))} == {"float32"}
    check_predictions(model, tmp_path, "float32")


def test_a_rounded_format_of_products_is_that_of_the_run(tmp_path):
    model = fitted(precision="tf32")
    again = load_run(model.save(tmp_path))
    assert again.config.compute == model.config.compute == "tf32"
    np.testing.assert_array_equal(again.output(X), model.output(X))
    whole = dataclasses.replace(model, config=dataclasses.replace(model.config, compute=None))
    assert 0 < abs(whole.output(X) - model.output(X)).max() < 0.1


def test_labels_and_units_come_back(tmp_path):
    """Of a task that is learnt well."""
    long = {"epochs": 150, "lr": 1e-2, "widths": (40, 40)}
    for labels in (KINDS, np.where(Y > 100, 7, -3), Y > 100):
        model = load_run(fitted(labels, tmp_path / str(labels.dtype), **long)
                         and tmp_path / str(labels.dtype))
        assert model.predict(X).dtype == labels.dtype
        assert (model.predict(X) == labels).mean() > 0.85
        assert model.predict_proba(X).shape == (70, 2)
    assert abs(fitted(**long).predict(X) - Y).mean() < 0.3 * abs(Y - Y.mean()).mean()


def test_several_targets_are_predicted_together():
    y = np.stack([Y, -X[:, 1]], axis=1)
    assert fitted(y).predict(X[:5]).shape == (5, 2)
    assert fitted(y).output(X[:0]).shape == (0, 2)


def test_blocks_of_any_size_predict_the_same(monkeypatch):
    model = fitted(precision="float64")
    whole = model.output(X)
    monkeypatch.setattr(examples, "BLOCK", 9)
    assert_close(model.output(X), whole, "sum")


@pytest.mark.parametrize(("x", "said"), [
    (X[:, :3], r"trained on 4 features, got 3: x must have shape \(n, 4\)"),
    (X[0], r"\(n, features\), got one of type float64 and shape \(4,\)"),
    (X.astype(str), "need an array of numbers"),
    (np.where(X > 20, np.inf, X), "not finite"),
    (1e60 * X, "too far from those of the training set"),
])
def test_inputs_that_do_not_fit_are_refused(x, said):
    with pytest.raises(UserError, match=said):
        fitted().predict(x)


def test_a_regression_has_no_probabilities():
    with pytest.raises(UserError, match=r"Regression has no classes, .* use predict"):
        fitted().predict_proba(X)


# --- fit ----------------------------------------------------------------------------------------


def test_the_example_runs():
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(comet_np.fit, "fit", globs={})
    assert len(example.examples) == 4
    assert doctest.DocTestRunner().run(example).failed == 0


def test_fit_trains_as_the_loop_does(tmp_path):
    model = fitted(seed=3, precision="float64", validation=True)
    run = watched(model.run, from_arrays(X, Y, seed=3), tmp_path)
    for (layer, ours) in zip(model.params, run.run.learner.params, strict=True):
        np.testing.assert_array_equal(layer.weight, ours.weight)
    assert model.run.training == build(TrainConfig, {
        "optimizer": "adam", "lr": 1e-3, "epochs": 2, "batch": 16, "precision": "float64"})
    assert "val_loss" in model.metrics[-1]
    assert "val_loss" not in fitted(validation=False).metrics[-1]
    assert repr(model).startswith("Trained(MLPConfig(widths=(4, 9, 7, 1)")


def test_numbers_of_numpy_are_settings_too(tmp_path):
    model = comet_np.fit(X, Y, widths=(np.int64(9), 7), epochs=np.int32(2), batch=np.uint8(16),
                         lr=np.float32(0.5) / 512, bias=np.True_, dropout=np.float64(0),
                         gate=Comet(np.float32(0.5)), seed=np.int64(1), folder=tmp_path,
                         progress=False)
    same = fitted(lr=1 / 1024, seed=1)
    assert_same(load_run(tmp_path), same)
    np.testing.assert_array_equal(model.predict(X), same.predict(X))


@pytest.mark.parametrize(("changes", "said"), [
    ({"widths": 20}, "widths must be a tuple, each part a whole number, got 20"),
    ({"widths": (20, 2.5)}, "each of widths must be a whole number, got 2.5"),
    ({"widths": (0,)}, "widths are the layers' sizes"),
    ({"epochs": "2"}, "epochs must be a whole number, got '2'"),
    ({"epochs": True}, "epochs must be a whole number, got True"),
    ({"batch": 2.5}, "batch must be a whole number, got 2.5"),
    ({"lr": None}, "lr must be a number, got None"),
    ({"lr": 0}, "the learning rate must be positive"),
    ({"augment": 3}, "augment must be a string or None, got 3"),
    ({"seed": None}, "seed must be a whole number, got None"),
    ({"bias": "no"}, "bias must be True or False, got 'no'"),
    ({"dropout": "a"}, "dropout must be a number, got 'a'"),
    ({"activation": ["tanh"]}, "activation must be a string"),
    ({"gate": "comet"}, "gate is None or a gate"),
    ({"precision": "float46"}, 'did you mean "float64"'),
    ({"epoch": 3}, 'unknown setting "epoch"; did you mean "epochs"'),
    ({"backend": "cuda"}, 'unknown backend "cuda"'),
    ({"task": "clas"}, 'unknown task "clas"'),
    ({"folder": "/dev/null"}, "cannot write into /dev/null .*: something else lies there, choose"),
    ({"folder": "/dev/null/x"}, "cannot write into /dev/null/x"),
    ({"p_k": 0.5}, r"p_k is a setting of the gate: .*gate=comet_np\.gates\.Comet\(p_k=0\.5\)"),
])
def test_a_setting_that_does_not_fit_is_one_sentence(changes, said):
    with pytest.raises(UserError, match=said) as error:
        fitted(**changes)
    assert "\n" not in str(error.value)


def test_a_full_disk_is_one_sentence(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fit_module, "train", full)
    with pytest.raises(UserError, match=r"cannot write into .*No space left on device"):
        fitted(folder=tmp_path)


def test_what_diverges_names_no_file_that_is_gone(tmp_path):
    wild = {"lr": 1e30, "optimizer": "sgd", "epochs": 9}
    with pytest.raises(Diverged, match="the state is in") as error:
        fitted(folder=tmp_path, **wild)
    assert (tmp_path / "diverged").exists()
    with pytest.raises(Diverged) as other:
        fitted(**wild)
    assert str(other.value) == str(error.value).partition("; the state")[0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("shown", [False, True])
def test_progress_is_shown_if_asked_for(monkeypatch, shown):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    x = np.hstack([X, np.ones((70, 1))])
    ticks = iter(range(10**6))
    monkeypatch.setattr("comet_np.experiments.progress.time.monotonic", lambda: next(ticks))
    comet_np.fit(x, Y, **SMALL | {"progress": shown})
    assert ("100%" in terminal.getvalue()) == shown
    assert ("so it says nothing: column 4\n" in terminal.getvalue()) == shown


# --- a folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_a_stopped_fit_goes_on_bit_for_bit_and_a_finished_one_is_read(gate, tmp_path, monkeypatch):
    whole = fitted(gate=GATES[gate])
    assert stopped(whole.run, from_arrays(X, Y), tmp_path, at=5)
    assert (tmp_path / "checkpoint").exists()
    assert_same(fitted(gate=GATES[gate], folder=tmp_path), whole)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "lock", "metrics.jsonl",
                                                          "result.json", "weights.npz"}
    monkeypatch.setattr(fit_module, "train", None)  # it would be called
    again = fitted(gate=GATES[gate], folder=tmp_path)
    assert_same(again, whole)
    np.testing.assert_array_equal(again.predict(X), whole.predict(X))


@pytest.mark.parametrize(("x", "y", "changes"), [
    (X, Y, {"epochs": 3}), (X, Y, {"gate": Comet(0.4)}), (X, Y, {"gate": Layerwise(0.5)}),
    (X, Y, {"seed": 1}), (X, Y, {"precision": "float32"}), (X, Y + X[:, 1], {}), (X[1:], Y[1:], {}),
    (X, 2 * Y, {}), (4 * X, Y, {}), (X, KINDS, {})])
def test_a_finished_run_of_other_settings_or_data_is_left_alone(folder, x, y, changes):
    """Other units too, in which the standardised data are the same bit for bit."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="finished run of other settings or data: choose another"):
        comet_np.fit(x, y, folder=folder, **SMALL | {"precision": "float64"} | changes)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_of_too_long_a_name_is_refused():
    for call in (lambda: fitted(folder="x" * 300), lambda: load_run("x" * 300)):
        with pytest.raises(UserError, match=r"cannot .* of a shorter name"):
            call()


def test_two_do_not_train_in_one_folder(tmp_path):
    with locked(tmp_path / "lock"), pytest.raises(UserError, match="another training is at work"):
        fitted(folder=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    assert_same(fitted(folder=tmp_path), fitted())


def test_other_labels_are_other_data(tmp_path):
    fitted(KINDS, tmp_path)
    with pytest.raises(UserError, match="other settings or data"):
        fitted(np.where(KINDS == "above", "b", "c"), tmp_path)


def test_a_stopped_run_of_other_settings_or_data_is_not_gone_on_with(tmp_path):
    model = fitted()
    assert stopped(model.run, from_arrays(X, Y), tmp_path, at=3)
    for y, changes, what in ((Y, {"lr": 0.5}, "lr was"), (Y + X[:, 1], {}, "data was")):
        with pytest.raises(UserError, match=f"belongs to another run .*{what}"):
            fitted(y, tmp_path, **changes)


# --- saved and read -----------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [*GATES.values(), Planes()], ids=str)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_round_trip_changes_no_bit(gate, precision, tmp_path):
    model = fitted(KINDS, gate=gate, precision=precision)
    known = [HalfSpaces, Planes]
    again = load_run(model.save(tmp_path / "new" / "model"), known=known)
    assert_same(again, model)
    config, params, fixed = again
    assert config == model.config
    y, cache = mlp.forward(X[:9].astype(precision), params, fixed, config)
    theirs, other = mlp.forward(X[:9].astype(precision), *list(model)[1:], model.config)
    np.testing.assert_array_equal(y, theirs)
    for m, n in zip(cache.masks, other.masks, strict=True):
        np.testing.assert_array_equal(m, n)
    drawn = mlp.init(config, model.run.seed, dtype=precision)[1]
    for V, ours in zip(leaves(drawn), leaves(fixed), strict=True):
        np.testing.assert_array_equal(V, ours)
    assert again.result == model.result


def test_weights_have_the_published_names(tmp_path):
    torch = pytest.importorskip("torch")

    class Published(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for layer, (N_in, N) in enumerate(((4, 9), (9, 7), (7, 2)), start=1):
                self.add_module(f"fc{layer}", torch.nn.Linear(N_in, N))
                if layer < 3:
                    self.add_module(f"spec_{layer}", torch.nn.Linear(N_in, N, bias=False))

    fitted(KINDS, tmp_path, precision="float64")
    module = Published().double()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in
                            np.load(tmp_path / "weights.npz").items()}, strict=True)
    h = z = torch.from_numpy(load_run(tmp_path).data.preparation.inputs(X).astype("float64"))
    for layer, k in ((1, 4), (2, 3)):
        z = getattr(module, f"spec_{layer}")(z)
        m = torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)
        z = m * z
        h = m * torch.nn.functional.softplus(getattr(module, f"fc{layer}")(h))
    assert_close(load_run(tmp_path).output(X), module.fc3(h).detach().numpy(), "torch")


def test_a_model_of_ones_own_is_kept_by_the_places_of_its_weights(tmp_path):
    data = small_data("regression")
    model = trained_on(data, RunConfig(ResidualConfig(12, 5), TrainConfig(epochs=1)),
                       folder=tmp_path)
    assert set(np.load(tmp_path / "weights.npz")) == {
        f"params.{layer}.{what}" for layer in ("block", "output") for what in ("weight", "bias")}
    with pytest.raises(UserError, match=r'config.json: .*"ResidualConfig".*known=\[...\]'):
        load_run(tmp_path)
    again = load_run(tmp_path, known=[ResidualConfig])
    assert_same(again, model)
    y, _ = module_of(again.config).forward(data.x_test, again.params, again.fixed, again.config)
    np.testing.assert_array_equal(again.output(data.x_test), y)
    assert again.predict(data.x_test).shape == (17, 5)


def test_a_task_of_ones_own_is_kept_by_the_name_of_its_class(tmp_path):
    data = data_of_a_table(write_table(tmp_path))
    model = trained_on(data, RunConfig(MLPConfig((6, 20, 1), gate=HalfSpaces()),
                                       TrainConfig(epochs=1)), folder=tmp_path / "run")
    for known in ([], [HalfSpaces], [AbsoluteError]):
        with pytest.raises(UserError, match=r"unknown .*known=\[...\]"):
            load_run(tmp_path / "run", known=known)
    again = load_run(tmp_path / "run", known=[AbsoluteError, HalfSpaces])
    assert isinstance(again.task, AbsoluteError)
    assert_same(again, model)


def test_a_class_that_a_file_names_is_never_imported(folder):
    config = read_json(folder / "config.json")
    for name in ("antigravity", "os.system", "comet_np.fit", "Trained", "UserError", "__class__"):
        for changed in (config | {"task": name},
                        config | {"run": {"class": name}},
                        config | {"run": config["run"] | {"model": {"class": name, "x": "y"}}}):
            forge(folder, "config.json", changed)
            with pytest.raises(UserError, match=f'unknown .*"{name}"'):
                load_run(folder)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_too(copied, tmp_path):
    model = fitted(KINDS)
    again = load_run(copied(model).save(tmp_path))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


def test_every_gate_of_the_package_is_known():
    assert {each.__name__ for each in model_module.KNOWN} >= {
        name for name in gates.__all__ if inspect.isclass(getattr(gates, name))
    } - {"Gate", "Pass"}


def test_a_model_is_saved_over_a_model_only(tmp_path):
    model, other = fitted(), fitted(seed=1)
    model.save(tmp_path / "a")
    assert_same(load_run(other.save(tmp_path / "a")), other)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(UserError, match="is there and is no model's folder"):
            model.save(tmp_path / name)
    with pytest.raises(UserError, match="cannot write into /dev/null/x"):
        model.save("/dev/null/x")


def test_a_model_half_written_is_no_model(folder, monkeypatch):
    model = load_run(folder)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "write_result", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save(folder)
    with pytest.raises(UserError, match="holds no finished run"):
        load_run(folder)


# --- what is no model, and damage ---------------------------------------------------------------


def test_what_is_no_finished_run_is_refused(folder, tmp_path):
    runs = tmp_path / "runs" / "fig2-smoke"
    (runs / "cells").mkdir(parents=True)
    folder.rename(runs / "cells" / "a")
    for place in (runs, runs / "cells", tmp_path / "runs"):
        with pytest.raises(UserError, match=r"holds 1 finished runs?: name the folder of one, as "
                                            f"{runs / 'cells' / 'a'}"):
            load_run(place)
    (runs / "cells" / "of fig2").mkdir()
    model_module.write_result(runs / "cells" / "of fig2", {"input": []})
    for place, said in ((tmp_path / "none", "there is no folder"),
                        (runs / "cells" / "a" / "config.json", "is no folder"),
                        (tmp_path, "holds no finished run, which has a result.json"),
                        (runs / "cells" / "of fig2", "trains no network: there is no model in it")):
        with pytest.raises(UserError, match=said):
            load_run(place)


def forge(folder, name, content):
    """Write a file of a run, and its right hash beside it."""
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        write_json(folder / name, content)
    if name != "result.json":
        model_module.write_result(folder, {"last": {}})


FILES = ("config.json", "weights.npz", "metrics.jsonl", "result.json")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_sentence_that_names_it(folder, name):
    file = folder / name
    whole = file.read_bytes()
    digit = next(i for i in range(len(whole) // 2, len(whole)) if chr(whole[i]).isdigit())
    changed = bytearray(whole)
    changed[digit] = ord("1") if changed[digit] != ord("1") else ord("2")
    for content in (b"", whole[:len(whole) // 2], whole[:-3], bytes(changed), b"\xff\x00",
                    100_000 * b"["):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file} is (missing or )?damaged") as error:
            load_run(folder)
        assert "\n" not in str(error.value)
    file.unlink()
    for _ in "missing", "a folder":
        with pytest.raises(UserError, match=f"{file} is missing|holds no finished run|a folder"):
            load_run(folder)
        file.mkdir(exist_ok=True)
    file.rmdir()
    file.write_bytes(whole)
    load_run(folder)


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", FILES)
def test_an_unreadable_file_is_one_sentence(folder, name):
    (folder / name).chmod(0)
    with pytest.raises(UserError, match=f"{name}.*Permission denied"):
        load_run(folder)


WRONG = (None, -1, 1.5, "x", [], {}, [[1, "a"], None], {"class": "Comet"}, True)


LONG = 10


def forgeries(value):
    """Yield JSON values that differ from `value` in one place: of another type, or missing.

    In a long list of numbers that is the first.
    """
    yield from WRONG
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(
                1 if len(value) > LONG else len(value)):
            for part in forgeries(value[key]):
                changed = copy.copy(value)
                changed[key] = part
                yield changed
            changed = copy.copy(value)
            del changed[key]
            yield changed


def load_forged(folder):
    """Read a forged run: whatever comes but a sentence is an error; return whether it is read."""
    try:
        model = load_run(folder)
        repr(model)
        model.predict(X)
        return True
    except UserError as error:
        assert "\n" not in str(error)
        return False


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_forged_record_is_one_sentence(folder, name):
    """Its hash is right, and its values are of another type, or missing."""
    values = read_json(folder / name)
    read = [load_forged(folder) for changed in forgeries(values) if isinstance(changed, dict)
            and not forge(folder, name, changed)]
    assert len(read) > 100
    assert 0 < sum(read) < len(read)


@pytest.mark.parametrize("text", [
    b"\xff", b"{", b"[1]\n", b"null\n", b"1\n", b'"x"\n', b'{"epoch": 0}\n{', 5000 * b"["])
def test_forged_metrics_are_one_sentence(folder, text):
    forge(folder, "metrics.jsonl", text)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        load_run(folder)


def npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def forged_weights(weights):
    yield "missing", {k: v for k, v in weights.items() if k != "fc2.bias"}
    yield "V missing", {k: v for k, v in weights.items() if k != "spec_2.weight"}
    yield "unknown", weights | {"fc9.weight": weights["fc1.weight"]}
    for name in ("fc1.weight", "fc3.bias"):
        for dtype in ("float16", "float32", "int64", "complex128", "S8", "bool"):
            yield dtype, weights | {name: weights[name].astype(dtype)}
        yield "shape", weights | {name: weights[name][:-1]}
        yield "0-d", weights | {name: weights[name].reshape(-1)[0]}


def test_forged_weights_are_one_sentence(folder):
    weights = dict(np.load(folder / "weights.npz"))
    for name, arrays in forged_weights(weights):
        forge(folder, "weights.npz", npz(**arrays))
        with pytest.raises(UserError, match=r"weights\.npz") as error:
            load_run(folder)
            pytest.fail(name)
        assert "\n" not in str(error.value)
    for content in (b"", b"PK", npz(x=X)[:90]):
        forge(folder, "weights.npz", content)
        with pytest.raises(UserError, match=r"weights\.npz is no npz file"):
            load_run(folder)
    bomb = weights | {"fc1.bias": np.array([Path("exploded")] * 9, dtype=object)}
    forge(folder, "weights.npz", npz(**bomb))
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
        load_run(folder)
