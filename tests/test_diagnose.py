"""`diagnose` names every known mistake in an MLP by its own name, and nothing in one that is right.
"""

import itertools

import numpy as np
import pytest

import comet_np
from comet_np import gates, interop
from comet_np.conformance.mistakes import MLP, Between
from comet_np.conformance.mlp import MLPSubject
from comet_np.conformance.search import number, search, unseen
from comet_np.errors import UserError
from comet_np.functional.activations import ACTIVATIONS
from comet_np.functional.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from comet_np.models import mlp
from comet_np.rng import stream

from .tolerances import assert_close

WIDTHS = (9, 17, 13, 11, 10, 7)  # at p_k = 0.9 all ways to round k differ somewhere
GATES = {"comet": gates.Comet, "layerwise": gates.Layerwise, "top_k": gates.TopK}
DTYPES = ("float32", "float64")
SETTINGS = {"p_k": 0.9, "activation": "softplus", "ties": "strict", "gate": "comet"}


def parameters(widths=WIDTHS, dtype="float64", seed=0, from_input=False):
    """Return weights under their published names, routing biases and a V of the output too."""
    gate = gates.Comet()
    named = interop.mlp_to_torch(*mlp.init(mlp.MLPConfig(widths, gate=gate), seed, dtype=dtype))
    draw = stream(seed, "spec")
    for layer, (N_in, N) in enumerate(itertools.pairwise(widths), start=1):
        if from_input or layer == len(widths) - 1:
            named[f"spec_{layer}.weight"] = draw.normal(
                size=(N, widths[0] if from_input else N_in)).astype(dtype)
        named[f"spec_{layer}.bias"] = draw.normal(size=N).astype(dtype)
    return named


# --- the MLP as a function of decisions ---------------------------------------------------------

@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gate", [
    *(made(0.4, ties) for made in GATES.values() for ties in ("strict", "threshold", "index")),
    gates.TopK(0.4, of="activation"), gates.Comet(0.4, g="relu"), None], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_right_decisions_are_the_model(name, gate, bias):
    config = mlp.MLPConfig(WIDTHS, activation=name, gate=gate, bias=bias, scale=0.8)
    params, fixed = mlp.init(config, dtype="float64")
    subject = MLPSubject(interop.mlp_to_torch(params, fixed), gate, name, 1e-10, config.scale)
    x = subject.inputs(1)
    y, cache = mlp.forward(x, params, fixed, config)
    made, scale, decided = subject.outputs([x], subject.right)
    assert_close(made, y, "torch")
    assert decided.all()
    assert (scale >= np.abs(y).max(axis=1)).all()
    for m, want in zip(subject.forward(x, subject.right).m, cache.masks, strict=True):
        assert gate is None or np.array_equal(m, want)
    labels = subject.labels(x)
    _, loss = softmax_cross_entropy_forward(y, labels)
    grads = mlp.zeros_like(params)
    mlp.backward(softmax_cross_entropy_backward(y.dtype.type(1), loss), cache, params, grads,
                 config)
    found = subject.gradients(x, labels, subject.right)
    wanted = interop.mlp_to_torch(grads)
    assert found.keys() == wanted.keys()
    for key, want in wanted.items():
        assert_close(found[key], want, "torch")


# --- correct models -----------------------------------------------------------------------------

def jax_mlp(named, p_k, ties, activation, gate):
    """Return a masked MLP in JAX."""
    jax = pytest.importorskip("jax", reason="JAX, of the crosscheck extra, is not installed")
    import jax.numpy as jnp

    f = {"softplus": jax.nn.softplus, "gelu": lambda a: jax.nn.gelu(a, approximate=False),
         "tanh": jnp.tanh, "leaky_relu": lambda a: jax.nn.leaky_relu(a, 0.1)}[activation]
    L = sum(name.startswith("fc") and name.endswith("weight") for name in named)

    def mask(c):
        k = max(1, int(p_k * c.shape[-1]))
        if ties == "index":
            rank = jnp.argsort(jnp.argsort(-c, axis=-1, stable=True), axis=-1)
            return (rank < k).astype(c.dtype)
        if ties == "threshold":
            return (c >= jax.lax.top_k(c, k)[0][..., -1:]).astype(c.dtype)
        return ((c[..., None, :] >= c[..., None]).sum(-1) <= k).astype(c.dtype)

    def forward(x):
        z = x
        for layer in range(1, L):
            a = x @ named[f"fc{layer}.weight"].T + named[f"fc{layer}.bias"]
            m = 1
            if gate is not None:
                c = a if gate == "top_k" else (
                    x if gate == "layerwise" else z) @ named[f"spec_{layer}.weight"].T
                m = mask(c)
                z = m * c
            x = m * f(a)
        return x @ named[f"fc{L}.weight"].T + named[f"fc{L}.bias"]

    def fn(x):
        with jax.enable_x64():
            return np.asarray(jax.jit(forward)(jnp.asarray(x)))
    return fn


RIGHT = [(gate, ties, activation) for gate in GATES for ties in ("strict", "threshold", "index")
         for activation in ("softplus", "gelu", "tanh", "leaky_relu")] + [
    (None, "strict", "softplus"), (None, "strict", "gelu")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gate", "ties", "activation"), RIGHT)
@pytest.mark.parametrize("package", ["torch", "jax"])
def test_a_correct_model_is_ok(package, gate, ties, activation, dtype):
    named = parameters(dtype=dtype)
    settings = {"p_k": 0.5, "ties": ties, "activation": activation, "gate": gate}
    if package == "torch":
        pytest.importorskip("torch", reason="PyTorch is not installed")
        from .wrong_mlps import Net as made
    else:
        made = jax_mlp
    report = comet_np.diagnose(made(named, **settings), named, **settings)
    assert report.ok, report
    assert report.cause is None
    assert report.mistakes == ()
    assert str(report).startswith("RIGHT, as far as was compared\n  output  agrees in all 192 rows")


def ours(config, named, dtype):
    """Return our own model as a function."""
    params, fixed = interop.mlp_from_torch(
        {name: array for name, array in named.items() if not (
            name.startswith("spec") and name.endswith("bias"))}, config)
    return lambda x: mlp.forward(x, params, fixed, config)[0]


@pytest.mark.parametrize("widths", [
    (1, 5, 3), (5, 7, 1), (4, 1, 1, 2), (6, 3), (1, 1), (2, 2, 2), (8, *[12] * 10, 4),
    (30, 1500, 1000, 5), (3, *[300] * 10, 1)], ids=str)
@pytest.mark.parametrize("p_k", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_a_correct_model_is_never_called_wrong(widths, p_k, size):
    """In float32; what hangs on rounding is not compared."""
    named = {name: array * np.float32(size if name.startswith("fc") else 1)
             for name, array in parameters(widths, "float32").items()}
    for activation in ("softplus", "tanh", "gelu"):
        gate = gates.Comet(p_k)
        config = mlp.MLPConfig(widths, activation, gate)
        report = comet_np.diagnose(ours(config, named, "float32"), named, config)
        assert not str(report).startswith("WRONG"), report
        assert report.mistakes == ()
        if size <= 1 or len(widths) < 5:
            assert report.ok, report


# --- mutants ------------------------------------------------------------------------------------

def key(mistake):
    """Return under what the mistake's class is noted."""
    decision = "gelu" if mistake.name == "gelu-form" else mistake.decision
    value = mistake.value
    if isinstance(number(mistake), Between):
        value = "here" if isinstance(value, Between) else (*value[:-1], "here")
    return decision, value


def table():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from .wrong_mlps import WRONG
    return WRONG


def title(mistake):
    return f"{mistake.name}, {key(mistake)[1]}"


def test_each_mistake_has_a_mutant():
    keys = [key(mistake) for mistake in MLP]
    assert len(set(keys)) == len(keys)
    assert set(keys) == table().keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MLP, ids=title)
def test_a_mistake_is_called_by_its_own_name(mistake, dtype):
    made, settings = table()[key(mistake)]
    settings = SETTINGS | settings
    named = parameters(settings.pop("widths", WIDTHS), dtype)
    report = comet_np.diagnose(made(named, **settings), named, **settings)
    assert report.mistakes == (mistake.name,), report
    assert report.findings[0].found.causes[0].mistakes[0].value == mistake.value or isinstance(
        number(mistake), Between)
    assert len(report.findings[0].found.causes) == 1, report
    assert str(report).startswith(f"WRONG: {report.cause}\n")
    assert str(report).count(report.cause) == 1


def test_V_of_the_input_in_all_layers_is_routing_from_the_input():
    named = parameters(from_input=True)
    made, settings = table()["routing", "input"]
    settings = SETTINGS | settings
    del settings["widths"]
    report = comet_np.diagnose(made(named, **settings), named, **settings)
    assert report.mistakes == ("routing-from-input",)
    assert "cannot be computed with parameters of these shapes" in str(report)
