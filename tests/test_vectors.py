"""Test vectors: each case against naive code, our models and known mistakes; their files."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import reference
from comet_np.conformance import mistakes
from comet_np.conformance.mistakes import Between
from comet_np.conformance.mlp import MLPSubject
from comet_np.conformance.search import NotApplicable
from comet_np.conformance.vectors import Case, cases, files, making, read, read_all, write
from comet_np.errors import UserError
from comet_np.experiments.cli import main
from comet_np.functional.routing import winners
from comet_np.gates import Comet, Layerwise, TopK

from . import naive

SMALL = read_all()
MLPS = [case for case in SMALL if case.model == "mlp"]
BY_NAME = {case.id: case for case in SMALL}
GATES = {"comet": Comet, "layer-wise": Layerwise, "top-k": TopK}
SCHEMA = json.loads((files.DATA.parent / "schema.json").read_text(encoding="utf-8"))


def of_model(*models):
    """Return the parameters of a test of all cases of some models."""
    return pytest.mark.parametrize("case", [case for case in SMALL if case.model in models],
                                   ids=lambda case: case.id)


# --- what is written ----------------------------------------------------------------------------


def digest(folder):
    """Return one SHA-256 of the names and contents of all files of the cases in a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*/*"), key=lambda file: file.relative_to(folder).parts):
        total.update(file.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


# The tripwire: a change of these is a change of what others are checked against. Say why in the
# commit message, and write the small set anew: comet-np vectors FOLDER, its folders into data/.
COUNTS = {False: 0, True: 0}
DIGESTS = {False: "", True: ""}


def test_the_set_in_the_package_is_what_is_generated(tmp_path):
    cases.write_all(tmp_path / "all")
    assert digest(tmp_path / "all") == digest(files.DATA) == DIGESTS[False]
    assert len(SMALL) == cases.count() == COUNTS[False]
    assert sum(file.stat().st_size for file in files.DATA.rglob("*")) <= 5e6


@pytest.mark.slow
def test_the_large_set_is_what_it_was(tmp_path):
    cases.write_all(tmp_path / "all", large=True)
    assert digest(tmp_path / "all") == DIGESTS[True]
    assert cases.count(True) == COUNTS[True]


SAMPLE = ["attention-causal", "gpt2", "layer-norm", "mixer", "mlp-comet-gelu", "mlp-comet-strict",
          "mlp-exact-wide", "mlp-layer-wise-strict", "mlp-train-adamw", "moe", "soft-moe", "vit"]


def made_by_kernels(name):
    """Return a case that kernels have computed."""
    entry = making.CASES[name]
    draw = making.Draw(name, entry.draw, making.CLEAR)
    return {array: making.rounded(name, array, values)
            for array, values in entry.make(draw).expected.items()}


@pytest.mark.parametrize("name", SAMPLE)
def test_kernels_make_the_same_bytes_as_bodies(name):
    for array, values in made_by_kernels(name).items():
        assert files.npy(values) == files.npy(BY_NAME[name].expected[array]), array


@pytest.mark.parametrize("name", SAMPLE)
def test_another_order_of_summation_makes_the_same_bytes(name, monkeypatch):
    """Products whose terms are summed the other way round stand for another BLAS."""
    def turned(a, b):
        return np.flip(a, -1) @ np.flip(b, -2)

    monkeypatch.setattr("comet_np.functional.linear.rounded", lambda x, compute: Turned(x))
    monkeypatch.setattr("comet_np.functional.hidden.rounded", lambda x, compute: Turned(x))
    monkeypatch.setattr("comet_np.functional.products.rounded", lambda x, compute: Turned(x))
    again = cases.made(name)
    assert again.inputs.keys() == BY_NAME[name].inputs.keys()
    for array, values in (again.inputs | again.expected).items():
        before = (BY_NAME[name].inputs | BY_NAME[name].expected)[array]
        assert files.npy(values) == files.npy(before), array


class Turned:
    """An operand of a product whose terms are summed from the last to the first, one by one."""

    def __init__(self, values):
        self.values = values

    @property
    def T(self):
        return Turned(self.values.T)

    def __matmul__(self, other):
        a, b = self.values[..., ::-1], other.values[..., ::-1, :]
        total = np.zeros((*a.shape[:-1], b.shape[-1]))
        for i in range(a.shape[-1]):
            total += a[..., i, None] * b[..., i, None, :]
        return total


def test_a_number_on_a_boundary_of_the_rounding_is_refused():
    with pytest.raises(UserError, match=r"^y of the case one is too near a boundary of the round"):
        making.rounded("one", "y", np.array([1.0, 0.5 + 2**-25 + 2**-50]))
    for exact in ([1.0, 0.25], [-3.0, 0.0], [2.0**-30, 0.0]):
        np.testing.assert_array_equal(making.rounded("one", "y", np.array(exact)), exact)
    noise = making.rounded("one", "y", np.array([3e-17, -0.0]))
    assert not noise.any() and not np.signbit(noise).any()
    with pytest.raises(UserError, match="too near"):
        making.rounded("one", "y", np.array([2.0**-43, 0.0]))


def test_scores_that_float32_rounds_are_refused():
    making.check_exact("one", np.ones((1, 4)), np.full((2, 4), 0.5), 1)
    for z, bits in ((np.full((1, 4), 2.0**23), 1), (np.full((1, 4), 0.25), 1)):
        with pytest.raises(UserError, match=r"^the routing scores of the case one are not exact"):
            making.check_exact("one", z, np.ones((2, 4)), bits)


class Single(making.Draw):
    """The draw of a case in float32."""

    def grid(self, *arguments):
        return super().grid(*arguments).astype("float32")


@pytest.mark.parametrize("kernels", [False, True], ids=["bodies", "kernels"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_our_models_in_float32_are_within_the_tolerance(case, kernels, bodies_or_kernels):
    entry = making.CASES[case.id]
    made = entry.make(Single(case.id, entry.draw, 0.0))
    assert list(made.expected) == list(case.expected)
    for name, values in made.expected.items():
        assert_agrees(values, case.expected[name], case.tolerance, name)
    for name, values in made.inputs.items():
        np.testing.assert_array_equal(values, case.inputs[name], name)  # masks bit for bit


def assert_agrees(values, expected, tolerance, name):
    """Assert what FORMAT.md says of a comparison."""
    values = np.asarray(values)
    assert values.shape == expected.shape, name
    if expected.dtype != "float32":
        np.testing.assert_array_equal(values, expected, name)
        return
    largest = np.abs(expected).max(initial=0) or 1
    difference = np.abs(values.astype("float64") - expected).max(initial=0)
    assert difference <= tolerance * float(largest), (name, difference / largest)


# --- each case against naive code ---------------------------------------------------------------


@of_model("cap")
def test_caps_are_those_of_the_definition(case):
    k, ties = case.config["k"], case.config["ties"]
    masks = [naive.cap(row.tolist(), k, ties) for row in case.inputs["scores"]]
    np.testing.assert_array_equal(case.expected["mask"], masks)


def linear_of(case, layer):
    """Return the affine map of a layer as naive code takes it."""
    return naive_linear(case.inputs[f"W_{layer}"], case.inputs.get(f"b_{layer}"))


def naive_linear(W, b):
    from comet_np.functional.linear import Linear

    return Linear(W.tolist(), None if b is None else b.tolist())


@pytest.mark.parametrize("case", [case for case in MLPS if "forward" in case.levels],
                         ids=lambda case: case.id)
def test_mlps_are_those_of_the_definition(case):
    config, L = case.config, len(case.config["widths"]) - 1
    params = [linear_of(case, layer) for layer in range(1, L + 1)]
    if config["gate"] != "none":
        assert config["k"] == [winners(config["p_k"], N) for N in config["widths"][1:-1]]
    for b, x in enumerate(case.inputs["x"].astype("float64")):
        z = x.tolist()

        def mask_of(layer, x_l, a, b=b):
            nonlocal z
            gate, k = config["gate"], config.get("k", [0] * L)[layer]
            if gate == "none":
                return [True] * len(a)
            if gate == "top-k":
                return naive.cap(case.expected[f"a_{layer + 1}"][b].tolist(), k, config["ties"])
            if config.get("exact"):
                z = naive_grid(z)
            c = naive.product(case.inputs[f"V_{layer + 1}"].tolist(),
                              z if gate == "comet" else x_l)
            if config["scores_exact"][layer]:
                assert c == case.expected[f"c_{layer + 1}"][b].tolist()  # all digits
            m = naive.cap(c, k, config["ties"])
            g = naive.ACTIVATIONS[config.get("g", "identity")]
            z = [g(c_i) if won else 0.0 for c_i, won in zip(c, m, strict=True)]
            return m

        masks, y = naive.network(x.tolist(), params, config["activation"], mask_of)
        for layer, m in enumerate(masks, start=1):
            if config["gate"] != "none":
                np.testing.assert_array_equal(m, case.inputs[f"m_{layer}"][b])
        largest = np.abs(case.expected[f"a_{L}"]).max()
        assert np.abs(np.array(y) - case.expected[f"a_{L}"][b]).max() <= 1e-6 * largest


def naive_grid(z):
    """Return one row of exact routing on its grid."""
    import math

    both = min(14, 24 - math.ceil(math.log2(len(z))))
    bits, most = both - both // 2, max(map(abs, z))
    if most == 0:
        return z
    unit = 2.0 ** (math.frexp(most)[1] - bits)
    return [max(1 - 2**bits, min(2**bits - 1, round(z_i / unit))) * unit for z_i in z]


@of_model("layer-norm")
def test_norms_are_those_of_the_definition(case):
    p = case.inputs["gain"].tolist(), case.inputs["bias"].tolist()
    for index in np.ndindex(case.inputs["x"].shape[:-1]):
        y = naive.norm(case.inputs["x"][index].tolist(), p, case.config["eps"])
        np.testing.assert_allclose(case.expected["y"][index], y, atol=3e-7)


@of_model("attention")
def test_attention_is_that_of_the_definition(case):
    x, given = case.inputs["x"], case.inputs
    for b in range(len(x)):
        qkv = [naive.affine(row, naive_linear(given["W_qkv"], given["b_qkv"]))
               for row in x[b].tolist()]
        values, weights = naive.attention(qkv, case.config["heads"], case.config["causal"])
        y = [naive.affine(row, naive_linear(given["W_out"], given["b_out"]))
             for row in values.tolist()]
        np.testing.assert_allclose(case.expected["weights"][b], weights, atol=2e-7)
        np.testing.assert_allclose(case.expected["y"][b], y, atol=2e-6)


# --- what each case catches ---------------------------------------------------------------------


KNOWN = {mistake.name for mistake in (*mistakes.MLP, *mistakes.GRADIENTS)} | set(
    "variance-unbiased eps-outside-root attention-scale-width attention-unscaled "
    "causal-excludes-self causal-sees-next causal-missing softmax-over-queries "
    "heads-interleaved decay-coupled decay-of-biases decay-without-rate momentum-dampened "
    "momentum-nesterov adam-uncorrected adam-eps-inside schedule-late schedule-early "
    "schedule-missing V-trained parameter-frozen".split())


def test_flags_are_names_of_mistakes():
    for case in SMALL:
        assert set(case.flags) <= KNOWN and list(case.flags) == sorted(set(case.flags)), case.id


def values_of(mistake):
    """Return other values of a decision: of a number that is fitted some."""
    if isinstance(mistake.value, Between):
        return (2.0,)
    if type(mistake.value) is tuple:
        return ((mistake.value[0], 2.0),)
    return () if mistake.value == "any" else (mistake.value,)


def subject_of(case):
    named = {}
    for name, array in case.inputs.items():
        kind = {"W": "fc{}.weight", "b": "fc{}.bias", "V": "spec_{}.weight"}.get(name[0])
        if kind and "_" in name:
            named[kind.format(name[2:])] = array
    config = case.config
    gate = None if config["gate"] == "none" else GATES[config["gate"]](config["p_k"],
                                                                       config["ties"])
    return MLPSubject(named, gate, config["activation"], 1e-9)


def differs(values, case, name):
    expected = case.expected[name]
    return values.shape != expected.shape or (
        np.abs(values - expected).max() > 10 * case.tolerance * np.abs(expected).max())


@pytest.mark.parametrize("case", [case for case in MLPS if case.flags and "forward" in case.levels],
                         ids=lambda case: case.id)
def test_mistakes_in_an_mlp_are_caught(case):
    subject, L = subject_of(case), len(case.config["widths"]) - 1
    x, right = case.inputs["x"].astype("float64"), subject.right
    assert not differs(subject.forward(x, right).y, case, f"a_{L}")
    caught = {}
    for mistake in (*subject.mistakes, *subject.gradient_mistakes):
        if mistake.name not in case.flags:
            continue
        for value in values_of(mistake):
            if right[mistake.decision] == value:
                continue
            choices = right | {mistake.decision: value}
            try:
                if mistake in mistakes.GRADIENTS:
                    grads = subject.gradients(x, case.inputs["labels"], choices)
                    shown = any(differs(g, case, place_of(name)) for name, g in grads.items())
                else:
                    shown = differs(subject.forward(x, choices).y, case, f"a_{L}")
            except NotApplicable:
                continue
            caught[mistake.name] = caught.get(mistake.name, True) and shown
    assert caught == dict.fromkeys(case.flags, True)


def place_of(name):
    """Return the name of a gradient: dW_2 of fc2.weight."""
    return f"d{'W' if name.endswith('weight') else 'b'}_{name[2:].split('.')[0]}"
