"""Test vectors: each case against naive code, our models and known mistakes; their files."""

import hashlib
import json
import math
import re

import numpy as np
import pytest

from comet_np.conformance import mistakes
from comet_np.conformance.mistakes import Between
from comet_np.conformance.mlp import MLPSubject
from comet_np.conformance.search import NotApplicable
from comet_np.conformance.vectors import cases, files, making, read, read_all, write
from comet_np.errors import UserError
from comet_np.experiments.cli import main
from comet_np.functional.linear import Linear
from comet_np.functional.routing import winners
from comet_np.gates import Comet, Layerwise, TopK

from . import naive

SMALL = read_all()
MLPS = [case for case in SMALL if case.model == "mlp"]
BY_NAME = {case.id: case for case in SMALL}
GATES = {"comet": Comet, "layerwise": Layerwise, "top-k": TopK}
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
COUNTS = {False: 116, True: 158}  # the small set, the large one
DIGESTS = {False: "b250276b7197f223466ceb8bceaf30523358e53d7c39c3388c5aaf020930acac",
           True: "294165c72e08bc03411bb09478025fe4c846961e426ba42db7fededc751ee763"}


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
          "mlp-exact-wide", "mlp-layerwise-strict", "mlp-train-adamw", "moe", "soft-moe", "vit"]


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
    for module in ("linear", "hidden", "products"):
        monkeypatch.setattr(f"comet_np.functional.{module}.rounded", lambda x, compute: Turned(x))
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
        making.rounded("one", "y", np.array([1.0, 0.5 + 2**-24 + 2**-50]))
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
    both = min(14, 24 - math.ceil(math.log2(len(z))))
    bits, most = both - both // 2, max(map(abs, z))
    if most == 0:
        return z
    unit = 2.0 ** (math.frexp(most)[1] - bits)
    return [max(1 - 2**bits, min(2**bits - 1, round(z_i / unit))) * unit for z_i in z]


@of_model("hidden-layer")
def test_hidden_layers_are_those_of_the_definition(case):
    p, f = linear_of(case, 1), naive.ACTIVATIONS[case.config["activation"]]
    for b, x in enumerate(case.inputs["x"].tolist()):
        h = [f(a) * won for a, won in zip(naive.affine(x, p), case.inputs["m_1"][b].tolist(),
                                          strict=True)]
        np.testing.assert_allclose(case.expected["x_1"][b], h, atol=3e-7)


@of_model("loss")
def test_losses_are_those_of_the_definition(case):
    x = case.inputs["x"].astype("float64")
    if case.config["loss"] == "squared-error":
        losses = ((x - case.inputs["target"]) ** 2).ravel().tolist()
    else:
        rows = zip(x.reshape(-1, x.shape[-1]).tolist(), case.inputs["labels"].ravel().tolist(),
                   strict=True)
        losses = [math.log(math.fsum(math.exp(a - max(row)) for a in row)) + max(row) - row[label]
                  for row, label in rows if label != case.config.get("ignored")]
    assert case.expected["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=3e-7)


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
        values, weights = naive.attention(np.array(qkv), case.config["heads"],
                                          case.config["causal"])
        y = [naive.affine(row, naive_linear(given["W_out"], given["b_out"]))
             for row in values.tolist()]
        np.testing.assert_allclose(case.expected["weights"][b], weights, atol=2e-7)
        np.testing.assert_allclose(case.expected["y"][b], y, atol=2e-6)


# --- what each case catches ---------------------------------------------------------------------


KNOWN = {mistake.name for mistake in (*mistakes.MLP, *mistakes.GRADIENTS)} | {
    "variance-unbiased", "eps-outside-root", "attention-scale-width", "attention-unscaled",
    "causal-excludes-self", "causal-sees-next", "causal-missing", "softmax-over-queries",
    "heads-interleaved", "decay-coupled", "decay-of-biases", "decay-without-rate",
    "momentum-dampened", "momentum-nesterov", "adam-uncorrected", "adam-eps-inside",
    "schedule-late", "schedule-early", "schedule-missing", "parameter-frozen"}


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


def named_of(case):
    """Return the weights of an MLP under their published names."""
    named = {}
    for name, array in case.inputs.items():
        kind = {"W": "fc{}.weight", "b": "fc{}.bias", "V": "spec_{}.weight"}.get(name[0])
        if kind and "_" in name:
            named[kind.format(name[2:])] = array
    return named


def subject_of(case):
    named, config = named_of(case), case.config
    gate = None if config["gate"] == "none" else GATES[config["gate"]](config["p_k"],
                                                                       config["ties"])
    before = naive_grid_of_rows if config.get("exact") else (
        lambda z, layer: np.maximum(z, 0) if layer > 1 and config.get("g") == "relu" else z)
    return Subject(named, gate, config["activation"], before)


class Subject(MLPSubject):
    """An MLP whose routing does something to z before it is multiplied."""

    def __init__(self, named, gate, activation, before):
        super().__init__(named, gate, activation, 1e-9)
        self.before = before

    def _product(self, x, W, layer, name, *how):
        return super()._product(self.before(x, layer) if name == "V" else x, W, layer, name, *how)


def naive_grid_of_rows(z, layer):
    return np.array([naive_grid(row) for row in z.tolist()])


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


@of_model("cap")
def test_mistakes_in_a_cap_are_caught(case):
    v, k, ties = case.inputs["scores"], case.config["k"], case.config["ties"]

    def capped(rows, k=k, ties=ties):
        return np.array([naive.cap(row.tolist(), k, ties) for row in rows])

    wrong = {"cap-smallest": lambda: capped(-v), "cap-magnitude": lambda: capped(abs(v)),
             "cap-over-batch": lambda: capped(v.T, min(k, len(v))).T,
             "k-one-more": lambda: capped(v, k + 1), "k-one-less": lambda: capped(v, k - 1),
             **{f"ties-{other}": lambda other=other: capped(v, ties=other)
                for other in ("strict", "threshold", "index")}}
    for flag in case.flags:
        assert (wrong[flag]() != case.expected["mask"]).any(), flag


@of_model("layer-norm")
def test_mistakes_in_a_norm_are_caught(case):
    x, eps = case.inputs["x"].astype("float64"), case.config["eps"]
    centred, ddof = x - x.mean(axis=-1, keepdims=True), {"variance-unbiased": 1}
    for flag in ("", *case.flags):
        variance = x.var(axis=-1, ddof=ddof.get(flag, 0), keepdims=True)
        root = variance**0.5 + eps if flag == "eps-outside-root" else (variance + eps) ** 0.5
        y = centred / root * case.inputs["gain"] + case.inputs["bias"]
        assert differs(y, case, "y") == bool(flag), flag


def attended(case, flag):
    """Return the output of attention, with a mistake."""
    given = {name: array.astype("float64") for name, array in case.inputs.items()}
    qkv = given["x"] @ given["W_qkv"].T + given["b_qkv"]
    *lead, T, D = given["x"].shape
    heads = case.config["heads"]
    shape, place = ((D // heads, heads), -1) if flag == "heads-interleaved" else (
        (heads, D // heads), -2)
    q, k, v = (np.moveaxis(part.reshape(*lead, T, *shape), place, -3)
               for part in np.split(qkv, 3, axis=-1))
    scale = {"attention-unscaled": 1, "attention-scale-width": D**0.5}.get(
        flag, (D // heads) ** 0.5)
    S = q @ k.swapaxes(-1, -2) / scale
    seen = np.ones((T, T), bool)
    if case.config["causal"] and flag != "causal-missing":
        offset = {"causal-excludes-self": -1, "causal-sees-next": 1}.get(flag, 0)
        seen = np.tril(seen, offset)
    powers = np.exp(S - S.max()) * seen
    axis = -2 if flag == "softmax-over-queries" else -1
    total = powers.sum(axis=axis, keepdims=True)
    P = powers / np.where(total == 0, 1, total)
    h = np.moveaxis(P @ v, -3, place).reshape(*lead, T, D)
    return h @ given["W_out"].T + given["b_out"]


@of_model("attention")
def test_mistakes_in_attention_are_caught(case):
    for flag in ("", *case.flags):
        assert differs(attended(case, flag), case, "y") == bool(flag), flag


def factor_of(config, t, flag):
    """Return the factor of the learning rate of step t, with a mistake."""
    t = max(t + {"schedule-early": 1, "schedule-late": -1}.get(flag, 0), 0)
    name, T, warmup = config["schedule"], config["steps"], config["warmup"]
    if name == "constant" or flag == "schedule-missing":
        return 1.0
    if t < warmup:
        return t / warmup
    return 0.5 * (1 + np.cos(np.pi * (t - warmup) / (T - warmup)))


@of_model("schedule")
def test_mistakes_in_a_schedule_are_caught(case):
    for flag in ("", *case.flags):
        factor = np.array([factor_of(case.config, t, flag) for t in case.inputs["step"]])
        assert differs(factor, case, "factor") == bool(flag), flag


def steps(params, gradient, config, flag):
    """Yield the parameters after each step, by name, with a mistake."""
    rule, w = config["optimizer"], config["weight_decay"]
    params = {name: p.astype("float64") for name, p in params.items()}
    u, v, sums = (dict.fromkeys(params, 0.0) for _ in range(3))
    for t in range(1, config["steps"] + 1):
        lr = config["lr"] * (factor_of(config, t - 1, flag) if "schedule" in config else 1.0)
        grads = gradient(params, t)
        if limit := config["clip_value"]:
            grads = {name: np.clip(g, -limit, limit) for name, g in grads.items()}
        if limit := config["clip_norm"]:
            norm = sum((g * g).sum() for g in grads.values()) ** 0.5
            grads = {name: g * min(1.0, limit / (norm + 1e-6)) for name, g in grads.items()}
        for name, g in grads.items():
            if flag == "parameter-frozen" and name == "fc1.weight":
                continue
            if flag == "gradients-accumulate":
                sums[name] = g = sums[name] + g
            p = params[name]
            decay = w * (config["decay_biases"] or not name.endswith("bias")
                         or flag == "decay-of-biases")
            decoupled = flag == "decay-without-rate" or (
                rule == "adamw" and flag != "decay-coupled")
            if decoupled:
                p = p - (1.0 if flag == "decay-without-rate" else lr) * decay * p
            else:
                g = g + decay * p
            if rule == "sgd":
                params[name] = p - lr * g
            elif rule == "momentum":
                mu = config["momentum"]
                u[name] = mu * u[name] + (1 - mu if flag == "momentum-dampened" else 1) * g
                params[name] = p - lr * (
                    g + mu * u[name] if flag == "momentum-nesterov" else u[name])
            else:
                beta1, beta2, eps = (config[one] for one in ("beta1", "beta2", "eps"))
                u[name] = beta1 * u[name] + (1 - beta1) * g
                v[name] = beta2 * v[name] + (1 - beta2) * g * g
                first, second = u[name] / (1 - beta1**t), v[name] / (1 - beta2**t)
                if flag == "adam-uncorrected":
                    first, second = u[name], v[name]
                root = (second + eps) ** 0.5 if flag == "adam-eps-inside" else second**0.5 + eps
                params[name] = p - lr * first / root
        yield dict(params)


@of_model("optimizer")
def test_mistakes_in_an_optimizer_are_caught(case):
    for flag in ("", *case.flags):
        after = steps({"p": case.inputs["p"]}, lambda params, t: {
            "p": case.inputs[f"dp_{t}"].astype("float64")}, case.config, flag)
        assert any(differs(params["p"], case, f"p_after_{t}")
                   for t, params in enumerate(after, start=1)) == bool(flag), flag


@pytest.mark.parametrize("case", [case for case in MLPS if "trajectory" in case.levels],
                         ids=lambda case: case.id)
def test_mistakes_in_training_are_caught(case):
    x, labels = case.inputs["x"].astype("float64"), case.inputs["labels"]
    start = named_of(case)
    V = {name: array for name, array in start.items() if name.startswith("spec")}

    def gradient(params, t):
        subject = Subject(params | V, Comet(case.config["p_k"]), case.config["activation"],
                          lambda z, layer: z)
        return subject.gradients(x, labels, subject.right)

    trained = {name: array for name, array in start.items() if name not in V}
    for flag in ("", *case.flags):
        wrong = [name for t, params in enumerate(steps(trained, gradient, case.config, flag), 1)
                 for name, p in params.items() if f"W_1_after_{t}" in case.expected
                 and differs(p, case, f"{place_of(name)[1:]}_after_{t}")]
        assert bool(wrong) == bool(flag), (flag, wrong)


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A case in a folder of its own, to be damaged."""
    write(tmp_path / "case", BY_NAME["mlp-comet-strict"])
    return tmp_path / "case"


def changed(file, before, after):
    data = file.read_bytes()
    assert data.count(before) >= 1
    file.write_bytes(data.replace(before, after, 1))


def rehashed(folder, name):
    """Let the description say the hash of the array that now lies there."""
    line = re.search(rf'^"{name}": .*"sha256": "(\w+)"', (folder / "case.json").read_text(), re.M)
    new = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
    changed(folder / "case.json", line[1].encode(), new.encode())


def test_what_is_written_is_read(folder):
    before, after = BY_NAME["mlp-comet-strict"], read(folder)
    assert before._replace(inputs=0, expected=0) == after._replace(inputs=0, expected=0)
    for one, other in ((before.inputs, after.inputs), (before.expected, after.expected)):
        assert list(one) == list(other)
        for name in one:
            assert one[name].dtype == other[name].dtype == np.load(folder / f"{name}.npy").dtype
            np.testing.assert_array_equal(one[name], other[name])
            np.testing.assert_array_equal(one[name], np.load(folder / f"{name}.npy"))


def a_bit(folder):
    data = (folder / "x.npy").read_bytes()
    (folder / "x.npy").write_bytes(data[:-1] + bytes([data[-1] ^ 0x80]))


def a_short_array(folder):
    (folder / "x.npy").write_bytes((folder / "x.npy").read_bytes()[:-1])
    rehashed(folder, "x")


def another_shape(folder):
    changed(folder / "x.npy", b"(8, 9)", b"(9, 8)")
    rehashed(folder, "x")


def another_dtype(folder):
    changed(folder / "x.npy", b"<f4", b"<i4")
    rehashed(folder, "x")


def no_number(folder):
    changed(folder / "case.json", b'"float32"', b'"float16"')


def broken_json(folder):
    changed(folder / "case.json", b'"config": {', b'"config": ')


def another_format(folder):
    changed(folder / "case.json", b'"format": 1', b'"format": 2')


def no_model(folder):
    changed(folder / "case.json", b'"model": "mlp",\n', b"")


def no_level(folder):
    changed(folder / "case.json", b'"level": "forward", ', b"")


@pytest.mark.parametrize("damage, said", [
    (a_bit, r"x\.npy was changed: its SHA-256 is \w{12}\.\.\., case\.json says"),
    (lambda folder: (folder / "b_2.npy").unlink(), r"b_2\.npy is missing"),
    (lambda folder: (folder / "case.json").unlink(), r"case\.json is missing"),
    (a_short_array, r"x\.npy is not float32 of shape \(8, 9\), as case\.json says"),
    (another_shape, r"x\.npy is not float32 of shape \(8, 9\)"),
    (another_dtype, r"x\.npy is not float32 of shape \(8, 9\)"),
    (no_number, r"one of float32, int64, uint8, and case\.json says float16"),
    (broken_json, r"case\.json is no JSON \(.*\): write or copy the vectors again"),
    (another_format, r"case\.json is of format 2, and this COMET-NP reads format 1"),
    (lambda folder: (folder / "case.json").write_text("[]"), r"is of format None"),
    (no_model, r"case\.json is not what FORMAT\.md says \(KeyError: 'model'\)"),
    (no_level, r"case\.json is not what FORMAT\.md says \(KeyError: 'level'\)"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_case_is_one_sentence(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=said) as raised:
        read_all(folder.parent)
    assert "\n" not in str(raised.value)


def test_a_folder_without_vectors_is_one_sentence(tmp_path):
    for folder in tmp_path, tmp_path / "nowhere":
        with pytest.raises(UserError, match="has no test vectors"):
            read_all(folder)


def test_cases_are_what_the_schema_says():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema checks the schema")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    for file in sorted(files.DATA.glob("*/case.json")):
        fields = json.loads(file.read_text(encoding="ascii"))
        validator.validate(fields)
        for wrong in ({"flags": "one"}, {"more": 1}, {"format": 2}, {"levels": ["acceptable"]},
                      {"tolerance": 0}, {"model": "other"}):
            assert not validator.is_valid(fields | wrong), wrong
        arrays = fields["arrays"]
        name, entry = next((name, entry) for name, entry in arrays.items() if "level" in entry)
        for wrong in ({"level": "none"}, {"role": "input"}, {"dtype": "float64"}, {"sha256": "0"}):
            assert not validator.is_valid(fields | {"arrays": arrays | {name: entry | wrong}})


def test_cases_keep_the_rules_of_the_format():
    """By hand, for machines without jsonschema."""
    for file in sorted(files.DATA.glob("*/case.json")):
        lines = file.read_text(encoding="ascii").splitlines()
        fields = json.loads("\n".join(lines))
        assert fields.keys() == set(SCHEMA["required"])
        assert fields["id"] == file.parent.name and list(fields) == sorted(fields)
        assert fields["model"] in SCHEMA["properties"]["model"]["enum"]
        arrays, config = fields["arrays"], fields["config"]
        for name in (*arrays, *config, *fields):
            assert sum(line.startswith(f'"{name}": ') for line in lines) == (
                (name in arrays) + (name in config) + (name in fields)), name
        assert sorted(entry["order"] for entry in arrays.values()) == list(range(len(arrays)))
        assert {path.stem for path in file.parent.glob("*.npy")} == set(arrays)
        levels = {entry.get("level") for entry in arrays.values()} - {None}
        assert levels == set(fields["levels"])
        for name, entry in arrays.items():
            assert ("level" in entry) == (entry["role"] == "expected"), name
            assert (entry["dtype"] == "uint8") == (name == "mask" or name.startswith("m_")), name


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_what_the_package_holds(tmp_path, capsys):
    assert main(["vectors", str(tmp_path / "new")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{COUNTS[False]} test vectors, ") and not err
    assert digest(tmp_path / "new") == DIGESTS[False]
    assert {file.name for file in (tmp_path / "new").iterdir() if file.is_file()} == set(
        cases.BESIDE)
    assert [case.id for case in read_all(tmp_path / "new")] == list(BY_NAME)


def test_the_command_refuses_what_it_cannot_write_into(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for place, said in ((tmp_path, "is not empty"), (tmp_path / "file", "something else lies"),
                        ("", "needs a folder"), (tmp_path / "file" / "in", "cannot write")):
        assert main(["vectors", str(place)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_stopped_command_says_what_to_do(tmp_path, capsys, monkeypatch):
    def stopped(folder, case):
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "write", stopped)
    assert main(["vectors", str(tmp_path / "new")]) == 130
    assert "delete it and start anew" in capsys.readouterr().err
