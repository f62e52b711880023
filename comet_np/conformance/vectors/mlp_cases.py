"""Cases of the MLP: standard, COMET, layer-wise and top-k."""

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from types import NoneType
from typing import Any

import numpy as np

from ...functional.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from ...functional.routing import Ties, grid_bits, on_grid, weight_on_grid, winners
from ...gates import Comet, Gate, Layerwise, TopK
from ...gates.comet import Capped, Routed
from ...models import mlp
from ...models.mlp import MLPConfig
from ...tree import zeros_like
from .making import (
    Array,
    Arrays,
    Draw,
    Expected,
    Made,
    case,
    check_exact,
    decided,
    margins,
    trees,
)

BITS_W = 8
GATES = {Comet: "comet", Layerwise: "layerwise", TopK: "top-k"}


def settings(config: MLPConfig) -> dict[str, Any]:
    """Return what a stranger needs of a configuration."""
    found: dict[str, Any] = {"activation": config.activation, "bias": config.bias, "gate": "none",
                             "loss": "cross-entropy", "widths": list(config.widths)}
    gate = config.gate
    if gate is None:
        return found
    assert isinstance(gate, Capped)
    k = [winners(gate.p_k, N) for N in config.widths[1:-1]]
    exact = [isinstance(gate, Comet) or layer == 0 for layer in range(config.hidden)]
    found |= {"gate": GATES[type(gate)], "k": k, "p_k": gate.p_k, "scores_exact": exact,
              "ties": gate.ties}
    return found | ({"exact": gate.exact, "g": gate.g} if isinstance(gate, Comet) else {})


def given(draw: Draw, config: MLPConfig, B: int, twins: bool, bits: int) -> Arrays:
    """Return x, labels, parameters and V; x and V on the grid 2^-bits.

    Of x row 0 is zero, row 1 nearly so, row 2 constant. With `twins` rows of V, of top-k those of
    the first layer, come in equal pairs, so that scores tie.
    """
    N_0, *_, N_L = config.widths
    x = draw.grid("x", (B, N_0), 1.5, bits)
    x[0], x[2] = 0, 0.5
    x[1, 1:] = 0
    found = {"x": x, "labels": draw.integers("labels", (B,), 0, N_L - 1)}
    for layer, (N_in, N) in enumerate(pairwise(config.widths), start=1):
        found[f"W_{layer}"] = draw.grid(f"W_{layer}", (N, N_in), 1.5 / N_in**0.5, BITS_W)
        if config.bias:
            found[f"b_{layer}"] = draw.grid(f"b_{layer}", (N,), 0.5, BITS_W)
        if isinstance(config.gate, Comet | Layerwise) and layer <= config.hidden:
            V = draw.grid(f"V_{layer}", (N, N_in), 1.5 / N_in**0.5, bits)
            found[f"V_{layer}"] = weight_on_grid(V) if exact_gate(config) else V
    for name in found:
        if twins and name in (("W_1", "b_1") if isinstance(config.gate, TopK) else
                              (f"V_{layer}" for layer in range(1, len(config.widths)))):
            N = len(found[name])
            found[name] = np.repeat(found[name][:-(-N // 2)], 2, axis=0)[:N]
    return found


def exact_gate(config: MLPConfig) -> bool:
    """Return whether COMET routes on a fixed-point grid."""
    return isinstance(config.gate, Comet) and config.gate.exact


def make(config: MLPConfig, B: int, twins: bool, bits: int, draw: Draw) -> Made:
    """Return all that one forward and one backward pass compute."""
    arrays, expected, gate = given(draw, config, B, twins, bits), Expected(), config.gate
    x, L = arrays["x"], len(config.widths) - 1
    params, fixed = trees(arrays, config)
    trace = mlp.trace(x, params, fixed, config)
    for i in range(1, L):
        if isinstance(gate, Capped):
            scores, k = _scores(trace, fixed, gate, i), winners(gate.p_k, config.widths[i])
            if exact_gate(config) and i == 1:
                expected.add("routing", z_0=on_grid(x, grid_bits(x.shape[1]).z))
            elif isinstance(gate, Comet) and not gate.exact:
                check_exact(draw.case, (x, *trace.z)[i - 1], fixed[i - 1], bits * (i + 1))
            if not isinstance(gate, TopK):
                expected.add("routing", **{f"c_{i}": scores})
            clear = margins if i == 1 or isinstance(gate, Comet) else decided
            expected.add("routing", **{f"margin_{i}": clear(draw, scores, k)})
            if isinstance(gate, Comet) and i < L - 1:
                expected.add("routing", **{f"z_{i}": trace.z[i - 1]})
            arrays[f"m_{i}"] = np.asarray(trace.m[i - 1])
        expected.add("forward", **{f"a_{i}": trace.a[i - 1], f"x_{i}": trace.x[i]})
    y, loss, dy, grads, dx = step(x, arrays["labels"], params, fixed, config)
    expected.add("forward", **{f"a_{L}": y, "loss": loss})
    expected.add("gradients", **{f"da_{L}": dy})
    for i in range(L, 0, -1):
        expected.add("gradients", **{f"dW_{i}": grads[i - 1].weight})
        if config.bias:
            expected.add("gradients", **{f"db_{i}": grads[i - 1].bias})
    expected.add("gradients", dx=dx)
    return expected.of(settings(config), arrays)


def step(x: Array, labels: Array, params: mlp.Params, fixed: Any,
         config: MLPConfig) -> tuple[Array, Array, Array, mlp.Params, Array]:
    """Return the output, the loss, its gradient by the output, by the parameters and by x."""
    y, cache = mlp.forward(x, params, fixed, config)
    loss, of_loss = softmax_cross_entropy_forward(y, labels)
    dy = softmax_cross_entropy_backward(1.0, of_loss)
    grads = zeros_like(params)
    dx = mlp.backward(dy, cache, params, grads, config)
    return y, loss, dy, grads, dx


def _scores(trace: mlp.Trace, fixed: Any, gate: Gate, layer: int) -> Array:
    """Return the scores of which the cap of a layer is taken."""
    if isinstance(gate, Comet):
        return trace.c[layer - 1]
    if isinstance(gate, Layerwise):
        return trace.x[layer - 1] @ fixed[layer - 1].T
    return trace.a[layer - 1]


EVERY = {"activation-other", "derivative-at-output", "derivative-missing", "gradient-negated",
         "hidden-scaled", "layer-detached", "loss-divided-twice", "loss-over-classes",
         "loss-summed", "output-activated", "output-log-softmax", "output-scaled",
         "output-softmax", "softmax-twice"}
BIASED = {"bias-gradient-mean", "bias-gradient-missing", "bias-missing"}
MASKED = {"cap-magnitude", "cap-over-batch", "cap-smallest", "gradient-through-mask", "k-ceiled",
          "k-of-first-layer", "k-of-layer-after", "k-of-layer-before", "k-one-less", "k-one-more",
          "k-rounded", "mask-missing", "mask-missing-first", "mask-missing-last",
          "mask-times-scores", "output-masked"}
ROUTED = MASKED | {"V-is-W", "routing-from-backbone-unmasked", "routing-unmasked", "ties-index",
                   "ties-threshold", "top-k-of-activation", "top-k-of-pre-activation"}
FLAGS = {NoneType: EVERY, TopK: EVERY | MASKED, Comet: EVERY | ROUTED | {"routing-from-backbone"},
         Layerwise: EVERY | ROUTED | {"routing-activated", "routing-from-z"}}
NOT_ZERO = {"mask-before-activation", "routing-activated"}  # caught where f(0) is not 0


def add(name: str, title: str, equation: str, config: MLPConfig, catches: Iterable[str] = (),
        misses: Iterable[str] = (), B: int = 8, twins: bool = False, bits: int = 4, draw: int = 0,
        large: bool = False) -> None:
    """Register a case of the MLP; its flags are those of its kind, with some more or less."""
    flags = FLAGS[type(config.gate)] | set(catches)
    if config.bias:
        flags |= BIASED
        flags |= {"routing-bias"} if isinstance(config.gate, Routed) else set()
    if config.activation == "softplus":
        flags |= {"softplus-beta"}
        flags |= NOT_ZERO if isinstance(config.gate, Routed) else set()
    case(name, title, equation, "mlp", flags - set(misses), draw, large)(
        partial(make, config, B, twins, bits))


WIDTHS, SMALL, WIDE = (9, 14, 11, 13, 5), (6, 11, 8, 4), (9, 27, 14, 26, 5)
ALL, PLAIN = "(1)-(8)", "(1)-(2)"
RULES: dict[Ties, str] = {
    "strict": "of equal scores at rank k all lose",
    "threshold": "of equal scores at rank k all win",
    "index": "of equal scores at rank k the first win"}

add("mlp-standard", "the standard MLP", PLAIN, MLPConfig(WIDTHS, gate=None))
add("mlp-standard-no-bias", "the standard MLP without biases", PLAIN,
    MLPConfig(WIDTHS, gate=None, bias=False))
for ties, rule in RULES.items():
    others, own = {f"ties-{other}" for other in RULES}, {f"ties-{ties}"} - {"ties-index"}
    add(f"mlp-comet-{ties}", f"COMET with equal rows of V, {rule}", ALL,
        MLPConfig(WIDTHS, gate=Comet(0.5, ties)), others, own, twins=True)
    add(f"mlp-layerwise-{ties}", f"layer-wise routing, {rule}", "(3), (5), (7)-(8)",
        MLPConfig(WIDTHS, gate=Layerwise(0.5, ties)), others, own)
    add(f"mlp-top-k-{ties}", f"top-k with equal rows of W_1, {rule}", "(3), (7)-(8)",
        MLPConfig(WIDTHS, gate=TopK(0.5, ties)), others | {"mask-before-activation"}, own,
        twins=True)
    add(f"mlp-exact-{ties}", f"COMET with exact routing on a fixed-point grid, {rule}", ALL,
        MLPConfig(WIDTHS, gate=Comet(0.5, ties, exact=True)), others, own, twins=True, bits=12)
for p_k, misses in {0.1: {"routing-activated"}, 0.29: (), 0.9: ()}.items():
    add(f"mlp-comet-p{100 * p_k:.0f}", f"COMET, p_k = {p_k}", ALL,
        MLPConfig(WIDE, gate=Comet(p_k)), {"k-complement"}, misses)
add("mlp-comet-p100", "COMET, p_k = 1: all neurons win", ALL, MLPConfig(WIDE, gate=Comet(1.0)),
    {"k-complement"}, (ROUTED | NOT_ZERO | {"routing-bias", "routing-from-backbone"}) - {
        "k-of-layer-after", "k-of-layer-before", "k-one-less", "mask-times-scores"})
for f, draw, catches, misses in (
        ("gelu", 0, {"gelu-form"}, ()), ("gelu_new", 0, {"gelu-form"}, ()),
        ("relu", 18, (), {"derivative-at-output"}),
        ("leaky_relu", 2, {"leaky-slope"}, {"derivative-at-output"}), ("tanh", 0, (), ()),
        ("selu", 0, (), ()), ("sigmoid", 0, NOT_ZERO, ()), ("silu", 0, {"routing-activated"}, ()),
        ("elu", 0, (), ()), ("mish", 0, (), ()),
        ("identity", 2, (), {"derivative-at-output", "derivative-missing", "output-activated"})):
    add(f"mlp-comet-{f.replace('_', '-')}", f"COMET with the activation {f}", ALL,
        MLPConfig(SMALL, f, Comet(0.5)), catches, misses, draw=draw)
add("mlp-comet-no-bias", "COMET without biases, as eq. (7)", ALL,
    MLPConfig(WIDTHS, gate=Comet(0.5), bias=False))
add("mlp-comet-square", "COMET, all layers equally wide: nothing but numbers tells transposes",
    ALL, MLPConfig((10, 10, 10, 10)), {"V-transposed", "W-transposed", "routing-from-input"},
    {"k-ceiled", "k-of-first-layer", "k-of-layer-after", "k-of-layer-before", "k-rounded"})
add("mlp-comet-deep", "COMET with six hidden layers", ALL,
    MLPConfig((8, 9, 9, 9, 9, 9, 9, 4), "tanh"), {"routing-activated"},
    {"k-of-first-layer", "k-of-layer-before", "k-rounded"}, bits=3)
add("mlp-comet-narrow", "COMET with a layer of one neuron, three examples", ALL,
    MLPConfig((4, 1, 3, 2)), (), {
        "k-of-first-layer", "k-of-layer-after", "k-of-layer-before", "k-one-less",
        "mask-missing-first", "output-activated", "routing-unmasked"}, B=3)
add("mlp-comet-relu-routing", "COMET with g = relu in the routing network", ALL,
    MLPConfig(WIDTHS, gate=Comet(0.5, g="relu")))
add("mlp-exact-wide", "COMET with exact routing, so wide a layer that its grid is coarser", ALL,
    MLPConfig((2060, 6, 4, 3), gate=Comet(0.5, exact=True)), (),
    {"k-ceiled", "k-rounded", "routing-activated"}, B=4, bits=12)
# The large set: the paper's widths, on inputs of the size of SARCOS and CIFAR10.
for name, widths, p_k, bits, draws in (
        ("sarcos-100", (21, 100, 100, 100, 7), 0.1, 4, (0, 0)),
        ("sarcos-500", (21, 500, 500, 500, 7), 0.5, 3, (0, 0)),
        ("sarcos-1000", (21, 1000, 1000, 1000, 7), 0.9, 3, (0, 0)),
        ("cifar10-100", (3072, 100, 100, 100, 10), 0.5, 3, (0, 0)),
        ("cifar10-500", (3072, 500, 500, 500, 10), 0.1, 3, (0, 4))):
    add(f"mlp-comet-{name}", f"COMET of the widths {widths}", ALL,
        MLPConfig(widths, gate=Comet(p_k)), B=16, bits=bits, draw=draws[0], large=True)
    add(f"mlp-exact-{name}", f"COMET with exact routing, of the widths {widths}", ALL,
        MLPConfig(widths, gate=Comet(p_k, exact=True)), B=16, bits=12, draw=draws[1],
        large=True)
