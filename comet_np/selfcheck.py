"""`comet-np check`: gradients against finite differences, kernels against their bodies, here."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .backends import OPERATIONS, Backend, backend_of, get_backend
from .functional.activations import ACTIVATIONS, Activation, activation
from .functional.attention import attention_backward, attention_forward
from .functional.dropout import dropout_backward, dropout_forward
from .functional.hidden import hidden_backward, hidden_forward
from .functional.linear import Linear, linear_backward, linear_forward, project
from .functional.loss import (
    mean_squared_error_backward,
    mean_squared_error_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from .functional.norm import Norm, norm_backward, norm_forward
from .functional.patches import Embedding, embedding_backward, embedding_forward
from .functional.routing import winners
from .functional.tokens import TokenEmbedding, tokens_backward, tokens_forward
from .gates import (
    EVALUATION,
    Bernoulli,
    Comet,
    ExampleTied,
    Gate,
    Kept,
    Layerwise,
    Pass,
    TopK,
    keep,
)
from .gradcheck import GradientCheck, check_gradients
from .models import gpt2, mixer, mlp, module_of, moe, soft_moe, vit
from .rng import key, stream
from .samples import SAMPLES, Size, alike, in_tf32, outcome, samples
from .tree import zeros_like

Array = Any
Tree = Any

TOLERANCE = 1e-5  # of float32 after sums of some hundred terms
TF32_TOLERANCE = 2**-9  # two operands of 10 bits
SIZE = Size((65,), 129, 301)  # odd, past one block of anything
SMALL_VIT = vit.ViTConfig((3, 8, 8), 4, 3, width=12, depth=2, heads=3, hidden=10)
SMALL_MIXER = mixer.MixerConfig((3, 8, 8), 4, 3, width=12, depth=2, token_hidden=9, hidden=7)
SMALL_GPT2 = gpt2.GPT2Config(13, 7, width=12, depth=2, heads=3, hidden=10, activation="gelu_new",
                             dropout=0.0, weight_dropout=0.0)
# One of each kind; `Kept` is added with masks to keep.
GATES: tuple[Gate, ...] = (Comet(), Layerwise(), TopK(), TopK(of="activation"), Bernoulli(),
                           ExampleTied())


def check_model_gradients(backend: Backend | None = None) -> Iterator[tuple[str, GradientCheck]]:
    """Check every backward pass of COMET-NP on `backend` (NumPy if not given).

    Yields
    ------
    name, result : str, GradientCheck
    """
    backend = backend or get_backend("numpy")
    draw = stream(0, "check model gradients")

    def normal(*shape: int) -> Array:
        return backend.asarray(draw.standard_normal(shape))

    def layer() -> Tree:
        return {"x": normal(6, 5), "p": Linear(normal(4, 5), normal(4))}

    def linear(dy: Array, cache: Any, at: Tree) -> Tree:
        g = zeros_like(at["p"])
        return {"x": linear_backward(dy, cache, at["p"], g), "p": g}

    yield "linear", check_gradients(
        lambda at: linear_forward(at["x"], at["p"]), linear, layer())

    def hidden(at: Tree, f: Activation, m: Array | None) -> tuple[Array, Any]:
        return hidden_forward(at["x"], at["p"], m, f)

    def hidden_gradients(dh: Array, cache: Any, at: Tree, f: Activation) -> Tree:
        g = zeros_like(at["p"])
        return {"x": hidden_backward(dh, cache, at["p"], g, f), "p": g}

    m = normal(6, 4) > 0
    for name, f, mask in (*((f"hidden {name}", f, m) for name, f in ACTIVATIONS.items()),
                          ("hidden softplus, no mask", activation("softplus"), None)):
        yield name, check_gradients(functools.partial(hidden, f=f, m=mask),
                                    functools.partial(hidden_gradients, f=f), layer())

    labels = backend.asarray(draw.integers(0, 5, 6))
    yield "softmax cross-entropy", check_gradients(
        lambda at: softmax_cross_entropy_forward(at["logits"], labels),
        lambda dloss, cache, at: {"logits": softmax_cross_entropy_backward(dloss, cache)},
        {"logits": normal(6, 5)})

    ignored = labels.copy()
    ignored[2:4] = -100
    yield "softmax cross-entropy, ignored labels", check_gradients(
        lambda at: softmax_cross_entropy_forward(at["logits"], ignored, -100),
        lambda dloss, cache, at: {"logits": softmax_cross_entropy_backward(dloss, cache)},
        {"logits": normal(6, 5)})

    target = normal(6, 5)
    yield "mean squared error", check_gradients(
        lambda at: mean_squared_error_forward(at["y"], target),
        lambda dloss, cache, at: {"y": mean_squared_error_backward(dloss, cache)},
        {"y": normal(6, 5)})

    yield "dropout", check_gradients(
        lambda at: dropout_forward(at["x"], 0.3, key(0, "check dropout"), 7),
        lambda dy, cache, at: {"x": dropout_backward(dy, cache)}, {"x": normal(6, 5)})

    def norm_gradients(dy: Array, cache: Any, at: Tree) -> Tree:
        g = zeros_like(at["p"])
        return {"x": norm_backward(dy, cache, at["p"], g), "p": g}

    yield "layer norm", check_gradients(
        lambda at: norm_forward(at["x"], at["p"]), norm_gradients,
        {"x": normal(6, 5), "p": Norm(normal(5), normal(5))})

    factor = (normal(2, 2, 6, 6) > -0.5) / 0.7

    def attention(at: Tree, causal: bool) -> tuple[Array, Any]:
        return attention_forward(at["qkv"], 2, causal, factor)

    for name, causal in ("attention", False), ("attention, causal", True):
        yield name, check_gradients(
            functools.partial(attention, causal=causal),
            lambda dy, cache, at: {"qkv": attention_backward(dy, cache, 2)},
            {"qkv": normal(2, 6, 24)})

    def embedding_gradients(dx: Array, cache: Any, at: Tree) -> Tree:
        g = zeros_like(at["p"])
        return {"x": embedding_backward(dx, cache, at["p"], g), "p": g}

    yield "patch embedding", check_gradients(
        lambda at: embedding_forward(at["x"], at["p"]), embedding_gradients,
        {"x": normal(2, 6, 5), "p": Embedding(Linear(normal(4, 5), normal(4)), normal(4),
                                              normal(7, 4))})

    tokens = backend.asarray(draw.integers(0, 5, (2, 6)))

    def tied(at: TokenEmbedding) -> tuple[Array, Any]:
        x, cache = tokens_forward(tokens, at)
        logits, of_head = linear_forward(x, Linear(at.tokens, None))
        return logits, (cache, of_head)

    def tied_gradients(dlogits: Array, caches: Any, at: TokenEmbedding) -> Tree:
        g, (cache, of_head) = zeros_like(at), caches
        dx = linear_backward(dlogits, of_head, Linear(at.tokens, None), Linear(g.tokens, None))
        tokens_backward(dx, cache, g)
        return g

    yield "embedding of tokens, tied to the head", check_gradients(
        tied, tied_gradients, TokenEmbedding(normal(7, 4), normal(8, 4)))

    x = normal(6, 20)
    at = Pass(train=True, example=backend.asarray(draw.permutation(6)))
    for gate in (None, *GATES, Kept()):
        config = mlp.MLPConfig((20, 30, 30, 5), gate=gate)
        params, fixed = mlp.init(config, backend=backend, dtype="float64")
        if isinstance(gate, Kept):
            fixed = keep(Bernoulli(), [(x, at)], (), config)
        name = f"MLP, {'no gate' if gate is None else _short(gate)}"
        yield name, check_mlp_gradients(x, params, fixed, config, at=at)
        if gate is not None:
            masks = mlp.forward(x, params, fixed, config, at=at)[1].masks
            yield f"{name}, masks frozen", check_mlp_gradients(x, params, fixed, config, masks)
    config = mlp.MLPConfig((20, 30, 30, 5), dropout=0.3)
    params, fixed = mlp.init(config, backend=backend, dtype="float64")
    yield "MLP, Comet, dropout", check_mlp_gradients(x, params, fixed, config, at=at)

    for name, mixture in (("weighted", moe.MoEConfig((20, 15, 15, 5), 3)),
                          ("fixed", moe.MoEConfig((20, 15, 15, 5), 3, trainable=False)),
                          ("hard", moe.MoEConfig((20, 15, 15, 5), 3, gate="hard"))):
        weights = moe.init(mixture, backend=backend, dtype="float64")
        yield f"mixture of experts, {name} gate", check_moe_gradients(x, *weights, mixture)
    for name, network in (
            ("ViT", SMALL_VIT),
            ("ViT, dropout, qkv biases", replace(SMALL_VIT, weight_dropout=0.2, qkv_bias=True)),
            ("ViT, mean pooling, routing stream", replace(
                SMALL_VIT, pooling="mean", final_norm="tokens", routing="stream")),
            # Without dropout the biases that token mixing adds to whole tokens have no gradient:
            # the next norm takes a token's mean away.
            ("MLP-Mixer, dropout", replace(SMALL_MIXER, dropout=0.2)),
            ("MLP-Mixer, dropout, routing stream", replace(
                SMALL_MIXER, dropout=0.2, hidden_dropout=0.2, routing="stream"))):
        yield name, check_network_gradients(
            normal(2, 3 * 8 * 8), network, at=Pass("dropout" in name, 3))
    tokens = backend.asarray(draw.integers(0, SMALL_GPT2.vocabulary, (2, 6)))
    dropping = replace(SMALL_GPT2, dropout=0.2, hidden_dropout=0.2, weight_dropout=0.2)
    for name, text in (("GPT-2", SMALL_GPT2),
                       ("GPT-2, routing stream", replace(SMALL_GPT2, routing="stream")),
                       ("GPT-2, dropout", dropping),
                       ("GPT-2, dropout, recomputed", replace(dropping, recompute=True))):
        yield name, check_network_gradients(tokens, text, at=Pass("dropout" in name, 3))
    for kept in (None, normal(3, 4) > -0.5):
        yield (f"Soft MoE{', of kept experts' * (kept is not None)}",
               check_soft_moe_gradients(normal(3, 6, 5), soft_moe.SoftMoEConfig((5, 7, 3), 4, 2),
                                        kept))


def check_network_gradients(x: Array,
                            config: vit.ViTConfig | mixer.MixerConfig | gpt2.GPT2Config,
                            masks: tuple[Array | None, ...] | None = None, at: Pass = EVALUATION,
                            **options: Any) -> GradientCheck:
    """Check the backward of a ViT or an MLP-Mixer by images x and by all parameters.

    Or of a GPT-2 by its parameters alone: x are tokens.
    The arguments are those of its `forward`; the `options` those of `check_gradients`.
    """
    model = module_of(config)
    params, fixed = model.init(config, backend=backend_of(x), dtype="float64")
    of_input = {} if isinstance(config, gpt2.GPT2Config) else {"x": x}

    def forward(point: Tree) -> tuple[Array, Any]:
        return model.forward(point.get("x", x), point["params"], fixed, config, masks, at)

    def backward(dy: Array, cache: Any, point: Tree) -> Tree:
        g = zeros_like(point["params"])
        dx = model.backward(dy, cache, point["params"], g, config)
        return dict.fromkeys(of_input, dx) | {"params": g}

    def scores(point: Tree, cache: Any) -> list[tuple[Array, int]]:
        return [score for made, V, one in zip(cache.mlps, fixed, config.mlps, strict=True)
                for score in routing_scores(made.hidden[0].x, made, V, one)]

    capped = isinstance(config.gate, Comet | Layerwise | TopK) and config.routing == "block"
    if getattr(config, "recompute", False) and at.train:
        capped = False  # scores are not kept
    return check_gradients(forward, backward, {**of_input, "params": params},
                           masks=lambda cache: cache.masks,
                           scores=scores if capped and masks is None else None, **options)


def check_soft_moe_gradients(x: Array, config: soft_moe.SoftMoEConfig, kept: Array | None = None,
                             **options: Any) -> GradientCheck:
    """Check `soft_moe.backward` by x and by all parameters; `options` as `check_gradients`."""
    params, _ = soft_moe.init(config, backend=backend_of(x), dtype="float64")

    def forward(point: Tree) -> tuple[Array, soft_moe.SoftMoECache]:
        return soft_moe.forward(point["x"], point["params"], (), config, kept)

    def backward(dy: Array, cache: soft_moe.SoftMoECache, point: Tree) -> Tree:
        g = zeros_like(point["params"])
        return {"x": soft_moe.backward(dy, cache, point["params"], g, config), "params": g}

    return check_gradients(forward, backward, {"x": x, "params": params}, **options)


def _short(gate: Gate) -> str:
    name = type(gate).__name__
    return f"{name} of the {gate.of}" if isinstance(gate, TopK) else name


def check_mlp_gradients(x: Array, params: mlp.Params, fixed: mlp.Fixed, config: mlp.MLPConfig,
                        masks: tuple[Array | None, ...] | None = None, at: Pass = EVALUATION,
                        **options: Any) -> GradientCheck:
    """Check `mlp.backward` by x and by all parameters, with `masks` frozen or else live.

    The arguments are those of `mlp.forward`; the `options` those of `check_gradients`.
    """
    def forward(point: Tree) -> tuple[Array, mlp.MLPCache]:
        return mlp.forward(point["x"], point["params"], fixed, config, masks, at)

    def backward(da_L: Array, cache: mlp.MLPCache, point: Tree) -> Tree:
        g = zeros_like(point["params"])
        return {"x": mlp.backward(da_L, cache, point["params"], g, config), "params": g}

    def scores(point: Tree, cache: mlp.MLPCache) -> list[tuple[Array, int]]:
        return routing_scores(point["x"], cache, fixed, config)

    capped = isinstance(config.gate, Comet | Layerwise | TopK)
    return check_gradients(forward, backward, {"x": x, "params": params},
                           masks=lambda cache: cache.masks, scores=scores if capped else None,
                           **options)


def check_moe_gradients(x: Array, params: moe.MoEParams, fixed: Tree, config: moe.MoEConfig,
                        choice: Array | None = None, **options: Any) -> GradientCheck:
    """Check `moe.backward` by x and by all parameters, with the `choice` frozen or else live.

    The arguments are those of `moe.forward`; the `options` those of `check_gradients`.
    """
    def forward(point: Tree) -> tuple[Array, moe.MoECache]:
        return moe.forward(point["x"], point["params"], fixed, config, choice)

    def backward(dy: Array, cache: moe.MoECache, point: Tree) -> Tree:
        g = zeros_like(point["params"])
        return {"x": moe.backward(dy, cache, point["params"], g, config), "params": g}

    def scores(point: Tree, cache: moe.MoECache) -> list[tuple[Array, int]]:
        return [(cache.scores, 1)]

    return check_gradients(forward, backward, {"x": x, "params": params},
                           masks=lambda cache: [cache.chosen],
                           scores=scores if choice is None else None, **options)


def routing_scores(x: Array, cache: mlp.MLPCache, fixed: mlp.Fixed,
                   config: mlp.MLPConfig) -> list[tuple[Array, int]]:
    """Return the scores that a forward pass on x capped, one array (..., N_l) a layer, and its k.

    Of the gates that cap: Comet, Layerwise, TopK.
    """
    gate = config.gate
    assert isinstance(gate, Comet | Layerwise | TopK)
    scores: list[Array]
    if isinstance(gate, Comet):
        scores = list(gate.trace(x, fixed).c)
    elif isinstance(gate, Layerwise):
        scores = [project(layer.x, V) for layer, V in zip(cache.hidden, fixed, strict=True)]
    else:
        f = activation("identity" if gate.of == "pre-activation" else config.activation)
        scores = [f.forward(layer.a) for layer in cache.hidden]
    return [(c, winners(gate.p_k, c.shape[-1])) for c in scores]


def _difference(name: str, arguments: tuple[Any, ...], backend: Backend) -> float:
    """Return the largest relative difference of a kernel from its body, over all it writes."""
    body = OPERATIONS[name].body
    results = [outcome(function, arguments, lambda a: backend.asarray(a.copy()))
               for function in (functools.partial(backend.kernels[name], body), body)]
    differences = [0.0]
    for pair in zip(*results, strict=True):
        ours, bodys = (np.asarray(a, "float64") for a in alike(*map(backend.to_host, pair)))
        if ours.shape != bodys.shape:
            return np.inf
        same_nan = np.isnan(ours) & np.isnan(bodys)  # as a scale that leaves all as it is
        other = (ours != bodys) & ~same_nan  # infinities are the same or not
        largest = np.abs(bodys[np.isfinite(bodys)]).max(initial=1e-30)
        differences.append(np.abs(ours[other] - bodys[other]).max(initial=0) / largest)
    return float(np.max(differences))  # NaN if any is


def run_checks(backend: Backend) -> int:
    """Run all checks, print a line for each, and return 0 if all pass, else 1."""
    failed = 0

    def line(name: str, ok: bool, text: str) -> None:
        nonlocal failed
        failed += not ok
        print(f"{'ok    ' if ok else 'FAILED'}  {name:56}  {text}", flush=True)

    for name, result in check_model_gradients(backend):
        line(f"gradient: {name}", result.ok, result.summary)
    for name in SAMPLES:
        if name in backend.kernels:
            found = [(_difference(name, arguments, backend),
                      TF32_TOLERANCE if in_tf32(arguments) else TOLERANCE)
                     for arguments in samples(name, "float32", [SIZE])]
            worst, allowed = found[np.argmax([difference / most for difference, most in found])]
            line(f"kernel against body: {name}", worst < allowed,
                 f"relative difference {worst:.1e}")
    print(f"{'all checks passed' if not failed else f'{failed} checks FAILED'} on "
          f"{backend.describe()['device']} ({backend.name})")
    return 1 if failed else 0
