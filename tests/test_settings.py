"""Settings: what flags and records make of configurations, and that no field is idle."""

import dataclasses
import inspect
import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from comet_np import gates, settings
from comet_np.errors import UserError
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.gates import Bernoulli, Comet, ExampleTied, Kept, Layerwise, TopK
from comet_np.models.mlp import MLPConfig
from comet_np.optim import OptimizerConfig
from comet_np.settings import option
from tests.runs import MODEL, TRAINING, images, tied_data, trained
from tests.test_loop_oracle import check

# --- flags and records --------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    """A part of a configuration."""

    name: str = option("sgd", "which", flag="optimizer")
    rate: float | None = option(None, "how fast")
    hidden: int = 3  # no flag


@dataclass(frozen=True)
class Outer:
    """A configuration."""

    widths: tuple[int, ...] = option((5, 6), "how wide")
    inner: Inner = field(default=Inner(rate=0.5))
    on: bool = option(True, "whether")


def test_the_flags_are_those_of_all_parts():
    assert [name for name, _ in settings.flags(Outer)] == ["widths", "optimizer", "rate", "on"]


def test_what_is_built_from_flags_has_their_values_and_the_defaults_of_the_whole():
    built = settings.build(Outer, {"optimizer": "adam", "on": False})
    assert built == Outer((5, 6), Inner("adam", 0.5), False)
    assert settings.values(built) == {"widths": (5, 6), "optimizer": "adam", "rate": 0.5,
                                      "on": False}
    assert settings.build(Outer, settings.values(built)) == built


def test_an_unknown_flag_is_said_with_the_nearest():
    with pytest.raises(UserError, match='unknown setting "optimiser"; did you mean "optimizer"'):
        settings.build(Outer, {"optimiser": "adam"})


def test_a_record_is_json_and_says_classes():
    record = settings.record(RunConfig(MLPConfig((3, 4, 2), gate=TopK(0.2))))
    assert json.loads(json.dumps(record)) == record
    assert record["model"]["gate"] == {"class": "TopK", "p_k": 0.2, "ties": "strict",
                                       "of": "pre-activation"}
    assert record["model"]["widths"] == [3, 4, 2]
    assert record["training"]["optimizer"]["class"] == "OptimizerConfig"


def test_numbers_of_numpy_are_recorded_as_those_of_python():
    record = settings.record(RunConfig(MLPConfig((np.int64(3), 4, 2), gate=TopK(np.float32(0.5)),
                                                 bias=np.True_), seed=np.uint8(3)))
    assert json.loads(json.dumps(record)) == settings.record(
        RunConfig(MLPConfig((3, 4, 2), gate=TopK(0.5)), seed=3))


@pytest.mark.parametrize(("kind", "value", "fitted"), [
    (int, np.int64(3), 3), (float, 3, 3.0), (float, np.float32(0.5), 0.5), (bool, np.False_, False),
    (str, "a", "a"), (float | None, None, None), (float | None, 2, 2.0),
    (tuple[int, ...], [np.int8(3), 4], (3, 4)), (int | tuple[int, ...], 3, 3),
    (int | tuple[int, ...], (3,), (3,)), (tuple[str, ...], ("a",), ("a",)),
    (MLPConfig, "anything", "anything"), (tuple[Comet, ...], ["anything"], ("anything",))])
def test_a_value_is_fitted_to_its_type(kind, value, fitted):
    found = settings.fitting("it", kind, value)
    assert found == fitted
    assert type(found) is type(fitted)


@pytest.mark.parametrize(("kind", "value", "said"), [
    (int, 2.5, "it must be a whole number, got 2.5"), (int, True, "got True"),
    (int, "3", "got '3'"), (float, "a", "it must be a number, got 'a'"),
    (float, False, "got False"), (bool, 1, "it must be True or False, got 1"),
    (str, 3, "it must be a string, got 3"), (float | None, "x", "a number or None, got 'x'"),
    (tuple[int, ...], 3, "it must be a tuple, each part a whole number, got 3"),
    (tuple[int, ...], [3, "a"], "each of it must be a whole number, got 'a'"),
    (int | tuple[int, ...], "3", "a whole number or a tuple, each part a whole number")])
def test_a_value_of_another_type_is_refused(kind, value, said):
    with pytest.raises(UserError, match=said):
        settings.fitting("it", kind, value)


CLASSES = {kind.__name__: kind for kind in (RunConfig, TrainConfig, OptimizerConfig, MLPConfig,
                                            Comet)}


def test_what_was_recorded_is_restored():
    run = RunConfig(MLPConfig((3, 4, 2)), TrainConfig(OptimizerConfig("adam"), lr=0.1), 3)
    assert settings.restored(json.loads(json.dumps(settings.record(run))), CLASSES) == run


@pytest.mark.parametrize(("values", "said"), [
    ({"class": "Comett"}, 'unknown class of a setting "Comett"; did you mean "Comet"'),
    ({"p_k": 0.5}, 'unknown class of a setting "None"'), ({"class": ["Comet"]}, "unknown class"),
    ({"class": "Comet", "pk": 0.5}, "these are no settings of a Comet: .*pk"),
    ({"class": "Comet", "p_k": "x"}, "p_k must|no settings of a Comet"),
    ({"class": "MLPConfig"}, "these are no settings of a MLPConfig: .*widths"),
    ({"class": "MLPConfig", "widths": [3, 2], "scale": None}, "scale must be a number, got None")])
def test_what_was_not_recorded_is_refused(values, said):
    with pytest.raises(UserError, match=said):
        settings.restored(values, CLASSES)


PARSED = {"widths": ("5,6", (5, 6)), "optimizer": ("adam", "adam"), "rate": ("1e-3", 1e-3),
          "on": ("False", False)}


@pytest.mark.parametrize("name", PARSED)
def test_the_text_of_a_flag_is_read_by_its_type(name):
    text, value = PARSED[name]
    parsed = settings.parse(name, dict(settings.flags(Outer))[name], text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_what_may_be_left_out_is_none():
    assert settings.parse("rate", dict(settings.flags(Outer))["rate"], "none") is None


@pytest.mark.parametrize(("name", "text", "wanted"), [
    ("widths", "5,x", "a whole number"), ("rate", "fast", "a number"),
    ("on", "yes", "true or false")])
def test_a_text_that_does_not_fit_is_refused(name, text, wanted):
    with pytest.raises(UserError, match=f"--{name} takes {wanted}, got"):
        settings.parse(name, dict(settings.flags(Outer))[name], text)


# --- every field of every configuration has its effect ------------------------------------------

RUN = RunConfig(MODEL, TRAINING)
# Of each field a value that is not its default, and what else must be set for it to matter.
VALUES = {
    RunConfig: {
        "model": (replace(MODEL, gate=Comet(0.3)), {}),
        "training": (replace(TRAINING, lr=0.02), {}),
        "seed": (3, {}),
        "routing_seed": (3, {"model": replace(MODEL, gate=Comet(0.3))}),
    },
    TrainConfig: {
        "optimizer": (OptimizerConfig("adam"), {}),
        "lr": (0.02, {}),
        "schedule": ("cosine", {}),
        "warmup": (5, {"schedule": "warmup_cosine"}),
        "batch": (9, {}),
        "accumulate": (2, {}),
        "epochs": (3, {}),
        "augment": ("flip", {}),
        "precision": ("float16", {}),
        "steps": (7, {}),
        "evaluations": (2, {}),
        "recompute": (True, {}),
    },
    OptimizerConfig: {
        "name": ("momentum", {}),
        "momentum": (0.5, {"name": "momentum"}),
        "beta1": (0.5, {"name": "adam"}),
        "beta2": (0.5, {"name": "adamw"}),
        "eps": (0.1, {"name": "adam"}),
        "weight_decay": (0.1, {}),
        "decay_biases": (False, {"weight_decay": 0.1}),
        "l1": (0.1, {}),
        "clip_norm": (0.1, {}),
        "clip_value": (0.01, {}),
    },
    MLPConfig: {
        "widths": ((12, 21, 5), {}),
        "activation": ("tanh", {}),
        "gate": (TopK(0.3), {}),
        "bias": (False, {}),
        "dropout": (0.2, {}),
        "scale": (0.5, {}),
        "compute": ("tf32", {}),
        "initial": ("he", {}),
    },
    Comet: {"p_k": (0.3, {}), "ties": ("index", {}), "g": ("softplus", {}),
            "exact": (True, {}), "router": ("centred", {})},
    Layerwise: {"p_k": (0.3, {}), "ties": ("threshold", {})},
    TopK: {"p_k": (0.3, {}), "ties": ("index", {}),
           "of": ("activation", {"p_k": 0.9, "activation": "silu"})},  # which falls, then rises
    Bernoulli: {"p": (0.3, {}), "evaluation": ("masks", {})},
    ExampleTied: {"p": (0.3, {}), "generalisation": (0.2, {}), "evaluation": ("all", {})},
}
BEYOND_THE_ORACLE = ("augment", "precision", "compute")
# Which changes no number, and is of models with blocks: see test_training.
WITHOUT_EFFECT = "recompute"
FIELDS = [(kind, name) for kind, values in VALUES.items() for name in values
          if name != WITHOUT_EFFECT]


def with_part(kind, changes):
    """Return the run with some changes in the part of this kind."""
    if kind is RunConfig:
        return replace(RUN, **changes)
    if kind is TrainConfig:
        return replace(RUN, training=replace(TRAINING, **changes))
    if kind is OptimizerConfig:
        return with_part(TrainConfig, {"optimizer": OptimizerConfig(**changes)})
    if kind is MLPConfig:
        return replace(RUN, model=replace(MODEL, **changes))
    own = {name: value for name, value in changes.items() if name != "activation"}
    # Without biases the pre-activations of an input of zeros are all equal.
    return with_part(MLPConfig, {"gate": kind(**own), "bias": False, "activation":
                                 changes.get("activation", "softplus")})


def test_no_configuration_is_forgotten():
    found = {gate for _, gate in inspect.getmembers(gates, dataclasses.is_dataclass)}
    assert found - {Kept} == {kind for kind in VALUES if kind not in
                              (RunConfig, TrainConfig, OptimizerConfig, MLPConfig)}
    assert not dataclasses.fields(Kept)


@pytest.mark.parametrize("kind", VALUES)
def test_no_field_is_forgotten(kind):
    assert {field.name for field in dataclasses.fields(kind)} == set(VALUES[kind])


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
@pytest.mark.usefixtures("small_blocks")
def test_every_field_has_its_effect(kind, name, tmp_path):
    """And the right one, as far as the oracle of the training loop goes."""
    value, others = VALUES[kind][name]
    without, run = with_part(kind, others), with_part(kind, others | {name: value})
    assert without != run
    data = tied_data()
    if name == "augment":
        data = images()
        without, run = (replace(config, model=replace(MODEL, widths=(3072, 5)))
                        for config in (without, run))
    before, after = (trained(config, data, tmp_path / place)
                     for config, place in ((without, "before"), (run, "after")))
    assert before.lines != after.lines
    if name not in BEYOND_THE_ORACLE:
        check(run, data, tmp_path / "again")
    if not name.startswith("evaluation"):  # which changes what is measured, not what is learned
        assert not np.array_equal(before.arrays["flat"], after.arrays["flat"])
