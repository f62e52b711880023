"""`CometClassifier` and `CometRegressor`: scikit-learn's own checks, and what its users do."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import comet_np
from comet_np.errors import UserError
from comet_np.experiments.datasets.own import from_arrays
from comet_np.experiments.training.model import load_run
from comet_np.gates import Comet, Layerwise
from tests.runs import trained as watched

sklearn = pytest.importorskip("sklearn")

from sklearn.base import clone  # noqa: E402 (it may be missing)
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import OneHotEncoder, StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BOTH = (comet_np.CometClassifier, comet_np.CometRegressor)
X = np.random.default_rng(0).normal(size=(80, 4))
Y = {comet_np.CometClassifier: np.where(X[:, 0] * X[:, 1] > 0, "same", "other"),
     comet_np.CometRegressor: X[:, 0] * X[:, 1]}
SMALL = {"widths": (30, 30), "epochs": 60, "lr": 3e-3, "random_state": 0}
# Skipped by scikit-learn where pandas or its environment variable is missing; all else is passed.
MAY_BE_SKIPPED = {"check_array_api_input", "check_classifier_data_not_an_array",
                  "check_regressor_data_not_an_array"}


@pytest.mark.parametrize("kind", BOTH)
def test_scikit_learns_own_checks(kind):
    found = check_estimator(kind(widths=(50, 50), epochs=40, lr=3e-3), on_fail=None, on_skip=None)
    failed = {check["check_name"]: check["exception"] for check in found
              if check["status"] != "passed" and check["check_name"] not in MAY_BE_SKIPPED}
    assert failed == {}
    assert sum(check["status"] == "passed" for check in found) >= 45
    assert {check["status"] for check in found} <= {"passed", "skipped"}


@pytest.mark.parametrize("kind", BOTH)
def test_it_learns_and_is_what_the_loop_trains(kind, tmp_path):
    model = kind(**SMALL).fit(X, Y[kind])
    assert model.score(X, Y[kind]) > 0.9
    trained = model.trained_
    run = watched(trained.run, from_arrays(X, Y[kind], validation=False), tmp_path)
    for ours, theirs in zip(trained.params, run.run.learner.params, strict=True):
        np.testing.assert_array_equal(ours.weight, theirs.weight)
    assert trained.config.widths == (4, 30, 30, 2 if kind is BOTH[0] else 1)
    assert trained.config.gate == Comet(0.5)
    np.testing.assert_array_equal(model.predict(X), trained.predict(X))
    np.testing.assert_array_equal(load_run(trained.save(tmp_path / "kept")).predict(X),
                                  model.predict(X))


def test_every_parameter_reaches_the_run():
    model = comet_np.CometClassifier(
        (5, 6), p_k=0.3, model="layerwise", activation="tanh", bias=False, optimizer="adamw",
        lr=0.01, epochs=2, batch=7, weight_decay=0.1, precision="float32", random_state=4).fit(
            X, Y[comet_np.CometClassifier])
    run = model.trained_.run
    assert (run.model.widths, run.model.gate) == ((4, 5, 6, 2), Layerwise(0.3))
    assert (run.model.activation, run.model.bias) == ("tanh", False)
    training = run.training
    assert (training.optimizer.name, training.optimizer.weight_decay) == ("adamw", 0.1)
    assert (training.lr, training.epochs, training.batch) == (0.01, 2, 7)
    assert training.precision == "float32"
    assert model.trained_.params[0].weight.dtype == "float32"
    assert set(model.get_params()) == {
        "widths", "p_k", "model", "activation", "bias", "optimizer", "lr", "epochs", "batch",
        "weight_decay", "precision", "backend", "random_state"}


@pytest.mark.parametrize("kind", BOTH)
def test_every_parameter_is_described(kind):
    described = kind.__doc__.replace(",", " ").split()
    assert set(kind().get_params()) | {"trained_"} <= set(described)
    assert ("classes_" in described) == (kind is comet_np.CometClassifier)
    assert kind.__doc__.count("Parameters\n") == 1


def test_random_states(tmp_path):
    def weights(random_state):
        model = comet_np.CometRegressor((5,), epochs=1, random_state=random_state)
        return model.fit(X, Y[comet_np.CometRegressor]).trained_.params[0].weight

    np.testing.assert_array_equal(weights(3), weights(3))
    assert not np.array_equal(weights(3), weights(4))
    assert not np.array_equal(weights(None), weights(None))
    state = np.random.RandomState(3)
    np.testing.assert_array_equal(weights(state), weights(3))
    assert not np.array_equal(weights(state), weights(3))  # which has gone on


@pytest.mark.parametrize("kind", BOTH)
def test_a_grid_search_over_p_k_and_model(kind):
    search = GridSearchCV(kind(**SMALL | {"epochs": 3, "widths": (8,)}), {
        "p_k": np.array([0.25, 0.5], "float32"), "model": ["standard", "comet", "top-k"],
        "batch": np.array([16])}, cv=2, error_score="raise")
    search.fit(X, Y[kind])
    assert len(search.cv_results_["params"]) == 6
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.predict(X).shape == (80,)


@pytest.mark.parametrize("kind", BOTH)
def test_a_pipeline_clone_pickle_and_set_params(kind):
    pipeline = make_pipeline(StandardScaler(), kind(**SMALL | {"epochs": 5}))
    assert cross_val_score(pipeline, X, Y[kind], cv=2, error_score="raise").shape == (2,)
    pipeline.fit(X, Y[kind])
    again = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(again.predict(X), pipeline.predict(X))
    fresh = clone(pipeline)
    assert not hasattr(fresh[-1], "trained_")
    fresh.set_params(**{f"{kind.__name__.lower()}__p_k": 0.25, f"{kind.__name__.lower()}__epochs":
                        1}).fit(X, Y[kind])
    assert fresh[-1].trained_.config.gate.p_k == 0.25
    with pytest.raises(ValueError, match="Invalid parameter"):
        fresh[-1].set_params(pk=0.25)


def test_categories_by_scikit_learns_encoder():
    """As the message says of text among the inputs."""
    colours = np.array(["red", "green", "blue", "red"] * 10)[:, None]
    with pytest.raises(ValueError, match=r"(?i)convert"):
        comet_np.CometClassifier(**SMALL).fit(colours, colours[:, 0])
    pipeline = make_pipeline(OneHotEncoder(sparse_output=False), comet_np.CometClassifier(**SMALL))
    assert pipeline.fit(colours, colours[:, 0]).score(colours, colours[:, 0]) == 1


def test_targets_come_back_in_their_shape():
    y = Y[comet_np.CometRegressor]
    for target in (y, y[:, None], np.stack([y, -y], axis=1)):
        model = comet_np.CometRegressor(**SMALL | {"epochs": 1})
        assert model.fit(X, target).predict(X[:7]).shape == (7, *target.shape[1:])


@pytest.mark.parametrize("labels", [np.arange(80) % 3 - 1, np.arange(80) % 2 == 0,
                                    (np.arange(80) % 2 + 0.0), Y[comet_np.CometClassifier],
                                    Y[comet_np.CometClassifier].astype(object)])
def test_labels_of_every_type_come_back(labels):
    model = comet_np.CometClassifier(**SMALL | {"epochs": 2}).fit(X, labels)
    assert model.classes_.tolist() == sorted(set(labels.tolist()))
    assert model.predict(X).dtype == model.classes_.dtype == labels.dtype
    probabilities = model.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(axis=1)], model.predict(X))


@pytest.mark.parametrize(("changes", "said"), [
    ({"model": "commet"}, 'unknown model "commet"; did you mean "comet"'),
    ({"widths": 50}, "widths must be a tuple, each part a whole number, got 50"),
    ({"p_k": "half"}, "p_k must be a number, got 'half'"),
    ({"p_k": 0}, r"must be in \(0, 1\], got 0"),
    ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
    ({"optimizer": "adm"}, 'did you mean "adam"'),
    ({"backend": "cuda"}, 'unknown backend "cuda"'),
])
def test_a_parameter_that_does_not_fit_is_a_sentence(changes, said):
    with pytest.raises(UserError, match=said):
        comet_np.CometRegressor(**SMALL | changes).fit(X, Y[comet_np.CometRegressor])


WITHOUT = "import sys\nsys.modules['sklearn'] = None\nimport comet_np\n"


@pytest.mark.parametrize(("code", "said"), [
    ("comet_np.CometClassifier", "need scikit-learn 1.6 or newer: python -m pip install"),
    ("from comet_np import CometRegressor", "need scikit-learn 1.6 or newer"),
    ("comet_np.fit\nfrom comet_np import *\nfit, load_run, kwta_mask", None),
    ("import comet_np.experiments.cli", None),
])
def test_scikit_learn_is_needed_by_its_estimators_alone(code, said):
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    if said is None:
        assert done.returncode == 0, done.stderr
    else:
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("comet_np.errors.UserError: CometClassifier and CometRegressor")
        assert said in last
