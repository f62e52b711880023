"""Cases of larger models with COMET: Mixer block, ViT, MLP-Mixer, GPT-2; and mixtures of experts.
"""

from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from ...functional.norm import Norm
from ...functional.routing import winners
from ...gates import EVALUATION, Comet
from ...interop import named_weights, weights_of
from ...models import mlp, module_of
from ...models.branch import branch_backward, branch_forward
from ...models.gpt2 import GPT2Config
from ...models.mixer import MixerConfig
from ...models.mlp import MLPConfig
from ...models.moe import MoEConfig
from ...models.soft_moe import SoftMoEConfig
from ...models.vit import ViTConfig
from ...tree import named_leaves, tree_map, zeros_like
from .making import Array, Arrays, Draw, Expected, Made, case, decided

BITS = 6
NORMS = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight", "gain")


def drawn(draw: Draw, name: str, shape: tuple[int, ...]) -> Array:
    """Return a weight: of a norm around 1, a bias, or a matrix of about unit gain."""
    if name.endswith(NORMS) or (len(shape) == 1 and name.endswith("weight")):
        return 1 + draw.grid(name, shape, 0.5, BITS)
    return draw.grid(name, shape, 0.25 if len(shape) == 1 else 1.5 / shape[-1] ** 0.5, BITS)


def routed(expected: Expected, draw: Draw, cache: mlp.MLPCache, config: MLPConfig, V: Array,
           layer: int) -> Array:
    """Add what the gate of one MLP of a larger model computed, and return its mask."""
    (made,), gate = cache.hidden, config.gate
    assert isinstance(gate, Comet)
    scores = made.x @ V.T
    expected.add("forward", **{f"x_{layer}": made.x})
    expected.add("routing", **{
        f"c_{layer}": scores,
        f"margin_{layer}": decided(draw, scores, winners(gate.p_k, len(V)))})
    expected.add("forward", **{f"a_{layer}": made.a})
    return np.asarray(cache.masks[0])


def mixer_block(draw: Draw) -> Made:
    """Return token mixing, then channel mixing, each with COMET, and their backward."""
    T, D, hidden = 4, 6, (7, 9)
    gate = Comet(0.5)
    x, dy = draw.grid("x", (2, T, D), 2, BITS), draw.grid("dy", (2, T, D), 1, BITS)
    arrays: Arrays = {"x": x}
    expected, parts = Expected(), []
    for i, (N, H) in enumerate(zip((T, D), hidden, strict=True), start=1):
        config = MLPConfig((N, H, N), "tanh", gate)
        names = {f"gain_{i}": (D,), f"bias_{i}": (D,), f"W_{2 * i - 1}": (H, N),
                 f"b_{2 * i - 1}": (H,), f"W_{2 * i}": (N, H), f"b_{2 * i}": (N,),
                 f"V_{i}": (H, N)}
        made = {name: (1.0 if name.startswith("gain") else 0.0) + draw.grid(
            name, shape, 0.5, BITS) for name, shape in names.items()}
        arrays |= made
        gain, bias, W, b, W_2, b_2, V = made.values()
        norm, p = Norm(gain, bias), (mlp.Linear(W, b), mlp.Linear(W_2, b_2))
        y, cache = branch_forward(x, norm, p, (V,), config, None, EVALUATION, 1e-5, 0.0, i == 1)
        arrays[f"m_{i}"] = routed(expected, draw, cache.mlp, config, V, i)
        expected.add("forward", **{f"y_{i}": y})
        parts.append((norm, p, cache, config))
        x = y
    d = dy
    grads: Arrays = {}
    for i in (2, 1):
        norm, p, cache, config = parts[i - 1]
        of_norm, g = zeros_like(norm), zeros_like(p)
        d = branch_backward(d, cache, norm, p, of_norm, g, config, i == 1)
        grads |= {f"dW_{2 * i}": g[1].weight, f"db_{2 * i}": g[1].bias,
                  f"dW_{2 * i - 1}": g[0].weight, f"db_{2 * i - 1}": g[0].bias,
                  f"dgain_{i}": of_norm.gain, f"dbias_{i}": of_norm.bias}
    expected.add("gradients", **grads, dx=d)
    return expected.of({"activation": "tanh", "eps": 1e-5, "gate": "comet", "p_k": 0.5,
                        "k": [winners(0.5, H) for H in hidden], "ties": "strict",
                        "scores_exact": [False, False]}, {**arrays, "dy": dy})


def weights(config: Any, draw: Draw) -> tuple[Arrays, Any, Any]:
    """Return weights under published names, and as parameters and fixed weights."""
    params, fixed = module_of(config).init(config, dtype="float64")
    named = {name: drawn(draw, name, array.shape)
             for name, array in named_weights(params, fixed, config).items()}
    return named, *weights_of(named, config)


def network(config: Any, draw: Draw) -> Made:
    """Return a ViT, an MLP-Mixer or a GPT-2 under published names, and its backward."""
    module = module_of(config)
    named, params, fixed = weights(config, draw)
    if isinstance(config, GPT2Config):
        key, x = "tokens", draw.integers("tokens", (2, 5), 0, config.vocabulary - 1)
    else:
        key, x = "x", draw.grid("x", (2, np.prod(config.image)), 2, BITS)
    y, cache = module.forward(x, params, fixed, config)
    expected, masks = Expected(), {}
    for i, (made, one, (V,)) in enumerate(zip(cache.mlps, config.mlps, fixed, strict=True), 1):
        masks[f"m_{i}"] = routed(expected, draw, made, one, V, i)
    expected.add("forward", y=y)
    dy, grads = draw.grid("dy", y.shape, 1, BITS), zeros_like(params)
    dx = module.backward(dy, cache, params, grads, config, True)
    expected.add("gradients", **{f"d_{name}": g for name, g in
                                 named_weights(grads, (), config).items()},
                 **({} if dx is None else {"dx": dx}))
    return expected.of(of_network(config), {key: x, **named, **masks, "dy": dy})


def of_network(config: Any) -> dict[str, Any]:
    """Return what a stranger needs of a configuration: its own fields, but dropout and such."""
    left_out = ("gate", "dropout", "hidden_dropout", "weight_dropout", "scale", "compute",
                "context", "recompute", "routing")
    fields = {name: value for name, value in asdict(config).items() if name not in left_out}
    gate, hidden = config.gate, [one.widths[1] for one in config.mlps]
    return fields | {"gate": "comet", "p_k": gate.p_k, "ties": gate.ties, "g": gate.g,
                     "k": [winners(gate.p_k, H) for H in hidden],
                     "scores_exact": [False] * len(hidden)}


def moe(config: MoEConfig, draw: Draw) -> Made:
    """Return a mixture of experts, and its backward."""
    module = module_of(config)
    named, params, fixed = weights(config, draw)
    x = draw.grid("x", (7, config.widths[0]), 2, BITS)
    y, cache = module.forward(x, params, fixed, config)
    expected = Expected()
    expected.add("routing", scores=cache.scores, margin_1=decided(draw, cache.scores, 1))
    choice = cache.chosen.argmax(axis=-1)
    if config.gate == "weighted":
        expected.add("forward", weight=cache.weight)
    expected.add("forward", y=y)
    dy, grads = draw.grid("dy", y.shape, 1, BITS), zeros_like(params)
    dx = module.backward(dy, cache, params, grads, config)
    expected.add("gradients", **{
        f"d_{name}": g for name, g in named_weights(grads, (), config).items()}, dx=dx)
    return expected.of({"activation": config.activation, "experts": config.experts,
                        "gate": config.gate, "widths": list(config.widths)},
                       {"x": x, **named, "choice": choice, "dy": dy})


def soft_moe(config: SoftMoEConfig, draw: Draw) -> Made:
    """Return a soft mixture of experts, and its backward."""
    module = module_of(config)
    params, _ = module.init(config, dtype="float64")
    names = ["Phi", *(f"{kind}_{layer}_of_{expert}" for expert in range(1, config.experts + 1)
                      for layer in range(1, len(config.widths)) for kind in "Wb")]
    shapes = [array.shape for _, array in named_leaves(params)]
    arrays = {name: drawn(draw, name, shape) for name, shape in zip(names, shapes, strict=True)}
    leaves = iter(arrays.values())
    params = tree_map(lambda _: next(leaves), params)
    x = draw.grid("x", (2, 6, config.widths[0]), 2, BITS)
    y, cache = module.forward(x, params, (), config)
    dy, grads = draw.grid("dy", y.shape, 1, BITS), zeros_like(params)
    dx = module.backward(dy, cache, params, grads, config)
    expected = Expected()
    expected.add("forward", logits=cache.logits, dispatch=cache.dispatch.weights, y=y)
    expected.add("gradients", **{f"d{name}": g for name, (_, g) in zip(
        names, named_leaves(grads), strict=True)}, dx=dx)
    return expected.of({"activation": config.activation, "experts": config.experts,
                        "slots": config.slots, "widths": list(config.widths)},
                       {"x": x, **arrays, "dy": dy})


case("mixer-block", "token and channel mixing with COMET", "(3)-(8)", "mixer-block")(mixer_block)
NONE: dict[str, Any] = {"dropout": 0.0, "hidden_dropout": 0.0}
for name, config, draw in (
        ("vit", ViTConfig((2, 4, 4), 2, 3, 8, 2, 2, 12, **NONE), 0),
        ("vit-mean", ViTConfig((1, 4, 6), 2, 3, 8, 1, 4, 9, "gelu", Comet(0.25), qkv_bias=True,
                               pooling="mean", **NONE), 0),
        ("mixer", MixerConfig((2, 4, 4), 2, 3, 8, 2, 7, 12), 0),
        ("gpt2", GPT2Config(11, 6, 8, 2, 2, 12, weight_dropout=0.0, **NONE), 0),
        ("gpt2-gelu-new", GPT2Config(11, 6, 8, 1, 4, None, "gelu_new", Comet(0.25),
                                     weight_dropout=0.0, **NONE), 0),
        ("vit-cifar10", ViTConfig(width=64, depth=2, hidden=96, **NONE), 0),
        ("mixer-cifar10", MixerConfig(width=64, depth=2, token_hidden=48, hidden=96), 0),
        ("gpt2-medium-width", GPT2Config(301, 40, 96, 3, 6, weight_dropout=0.0, **NONE), 0)):
    case(name, f"a {type(config).__name__.removesuffix('Config')} with COMET in its MLPs",
         "(3)-(8)", name.split("-")[0], draw=draw, large=config.width > 8)(
             partial(network, config))
for name, mixture in (("moe", MoEConfig((6, 7, 4), 3)),
                      ("moe-hard", MoEConfig((6, 7, 4), 3, gate="hard"))):
    case(name, f"a mixture of experts with a {mixture.gate} gate", "mixture of experts", "moe")(
        partial(moe, mixture))
case("soft-moe", "a soft mixture of experts", "soft mixture", "soft-moe")(
    partial(soft_moe, SoftMoEConfig((6, 7, 5), 3, 2)))
