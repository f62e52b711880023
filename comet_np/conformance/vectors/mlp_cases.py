"""Cases of the MLP: standard, COMET, layer-wise and top-k."""

from functools import partial
from typing import Any

import numpy as np

from ...functional.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from ...functional.linear import Linear
from ...functional.routing import winners
from ...gates import Comet, Gate, Layerwise, TopK
from ...models import mlp
from ...models.mlp import MLPConfig
from ...tree import zeros_like
from .making import Draw, Made, case, check_exact, decided, margins

BITS_X, BITS_V, BITS_W = 4, 4, 8
GATES = {Comet: "comet", Layerwise: "layer-wise", TopK: "top-k"}


def settings(config: MLPConfig) -> dict[str, Any]:
    """Return what a stranger needs of a configuration."""
    found: dict[str, Any] = {"activation": config.activation, "bias": config.bias, "gate": "none",
                             "loss": "cross-entropy", "widths": list(config.widths)}
    gate = config.gate
    if gate is None:
        return found
    k = [winners(gate.p_k, N) for N in config.widths[1:-1]]
    exact = [isinstance(gate, Comet) or layer == 0 for layer in range(config.hidden)]
    return found | {"gate": GATES[type(gate)], "k": k, "p_k": gate.p_k, "scores_exact": exact,
                    "ties": gate.ties}


def given(draw: Draw, config: MLPConfig, B: int, twins: bool) -> dict[str, Any]:
    """Return x, labels, parameters and V.

    Of x row 0 is zero, row 1 nearly so, row 2 constant. With `twins` the rows of V come in equal
    pairs, so that scores tie.
    """
    N_0, *_, N_L = config.widths
    x = draw.grid("x", (B, N_0), 1.5, BITS_X)
    x[0], x[2] = 0, 0.5
    x[1, 1:] = 0
    found = {"x": x, "labels": draw.integers("labels", (B,), 0, N_L - 1)}
    for layer, (N_in, N) in enumerate(zip(config.widths, config.widths[1:], strict=False), 1):
        found[f"W_{layer}"] = draw.grid(f"W_{layer}", (N, N_in), 1.5 / N_in**0.5, BITS_W)
        if config.bias:
            found[f"b_{layer}"] = draw.grid(f"b_{layer}", (N,), 0.5, BITS_W)
        if isinstance(config.gate, Comet | Layerwise) and layer <= config.hidden:
            V = draw.grid(f"V_{layer}", (N, N_in), 1.5 / N_in**0.5, BITS_V)
            found[f"V_{layer}"] = np.repeat(V[:-(-N // 2)], 2, axis=0)[:N] if twins else V
    return found


def make(config: MLPConfig, B: int, twins: bool, draw: Draw) -> Made:
    """Return a case with all that a training step computes."""
    here = f"mlp {config.widths}"
    arrays = given(draw, config, B, twins)
    L, x = len(config.widths) - 1, arrays["x"]
    params = tuple(Linear(arrays[f"W_{l}"], arrays.get(f"b_{l}")) for l in range(1, L + 1))
    fixed = tuple(arrays[f"V_{l}"] for l in range(1, L) if f"V_{l}" in arrays)
    trace = mlp.trace(x, params, fixed, config)
    expected, levels = {}, {}

    def expect(level: str, **found: Any) -> None:
        expected.update(found)
        levels.update(dict.fromkeys(found, level))

    gate = config.gate
    for l in range(1, L):
        if gate is not None:
            k, exact = winners(gate.p_k, config.widths[l]), isinstance(gate, Comet) or l == 1
            scores = _scores(gate, trace, fixed, l)
            if isinstance(gate, Comet):
                z = x if l == 1 else trace.z[l - 2]
                check_exact(here, z, fixed[l - 1], BITS_X + BITS_V * l)
            if not isinstance(gate, TopK):
                expect("routing", **{f"c_{l}": scores})
            expect("routing", **{f"margin_{l}": margins(scores, k) if exact else
                                 decided(here, f"layer {l}", scores, k)})
            if isinstance(gate, Comet) and l < L - 1:
                expect("routing", **{f"z_{l}": trace.z[l - 1]})
            arrays[f"m_{l}"] = np.asarray(trace.m[l - 1])
        expect("forward", **{f"a_{l}": trace.a[l - 1], f"x_{l}": trace.x[l]})
    expect("forward", **{f"a_{L}": trace.a[-1]})
    y, cache = mlp.forward(x, params, fixed, config)
    loss, of_loss = softmax_cross_entropy_forward(y, arrays["labels"])
    dy = softmax_cross_entropy_backward(1.0, of_loss)
    expect("forward", loss=loss)
    grads = zeros_like(params)
    dx = mlp.backward(dy, cache, params, grads, config)
    expect("gradients", **{f"da_{L}": dy})
    for l in range(L, 0, -1):
        expect("gradients", **{f"dW_{l}": grads[l - 1].weight})
        if config.bias:
            expect("gradients", **{f"db_{l}": grads[l - 1].bias})
    expect("gradients", dx=dx)
    return Made(settings(config), arrays, expected, levels)


def _scores(gate: Gate, trace: mlp.Trace, fixed: Any, l: int) -> Any:
    if isinstance(gate, Comet):
        return trace.c[l - 1]
    if isinstance(gate, Layerwise):
        return trace.x[l - 1] @ fixed[l - 1].T
    scores = trace.a[l - 1]
    return scores


def add(name: str, title: str, equation: str, config: MLPConfig, B: int = 8, twins: bool = False,
        flags: tuple[str, ...] = (), draw: int = 0, large: bool = False) -> None:
    """Register a case of the MLP."""
    case(name, title, equation, "mlp", flags, draw, large)(partial(make, config, B, twins))


PAPER = "(1)-(8)"
for ties in ("strict", "threshold", "index"):
    add(f"mlp-comet-{ties}", f"COMET, ties {ties}", PAPER,
        MLPConfig((9, 14, 11, 13, 5), gate=Comet(0.5, ties)), twins=True)
