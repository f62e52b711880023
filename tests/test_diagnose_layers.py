"""`diagnose` of layer norm, attention, ViT, MLP-Mixer and GPT-2: right ones pass, and each mistake,
made in PyTorch, is called by its own name.
"""

from dataclasses import replace

import numpy as np
import pytest

from comet_np import diagnose, interop
from comet_np.conformance.diagnose import _subject
from comet_np.conformance.layer_mistakes import (
    ATTENTION,
    BLOCK,
    GPT2,
    IN_BLOCK,
    MIXER,
    NETWORK_GRADIENTS,
    NORM,
    TIED_GRADIENTS,
    VIT,
)
from comet_np.conformance.search import tolerance
from comet_np.errors import UserError
from comet_np.functional.attention import SelfAttention, self_attention_forward
from comet_np.functional.linear import Linear
from comet_np.functional.norm import Norm, norm_forward
from comet_np.gates import Bernoulli, Comet, Layerwise, TopK
from comet_np.models import module_of
from comet_np.models.gpt2 import GPT2Config
from comet_np.models.mixer import MixerConfig
from comet_np.models.vit import ViTConfig
from comet_np.tree import tree_map

from .turns import in_turn

torch = pytest.importorskip("torch", reason="PyTorch, the crosscheck extra, is not installed")
F = torch.nn.functional
torch.set_num_threads(1)

IMAGE = (3, 4, 6)
GATE = Comet(0.31)  # 6 of 20 neurons, where k is not rounded
OFF = {"dropout": 0.0, "hidden_dropout": 0.0}
CLASS = ViTConfig(IMAGE, 2, 5, 12, 2, 3, 20, "softplus", GATE, qkv_bias=True, **OFF)
MEAN = replace(CLASS, pooling="mean", final_norm="tokens", qkv_bias=False, activation="gelu",
               gate=None)
MIXED = MixerConfig(IMAGE, 2, 5, 12, 2, 14, 20, "softplus", GATE)
SQUARE = replace(MIXED, image=(3, 6, 8), token_hidden=20)  # as many tokens as channels
TEXT = GPT2Config(17, 10, 12, 2, 3, 20, "softplus", GATE)
WITHOUT = replace(TEXT, gate=None, activation="gelu_new")
SMALL = replace(MIXED, activation="tanh", gate=Comet(0.5), depth=1)
RIGHT = {
    "class": CLASS, "mean": MEAN, "published": replace(CLASS, qkv_bias=False),
    "tokens": replace(CLASS, final_norm="tokens", activation="relu", gate=TopK(0.5)),
    "no norm": replace(MEAN, final_norm=None, gate=Layerwise(0.5, "threshold")),
    "pooled mean": replace(MEAN, final_norm="pooled", gate=Comet(0.9, "index"), scale=0.5),
    "mixer": MIXED, "mixer without": replace(MIXED, gate=None, eps=1e-3), "square": SQUARE,
    "gpt2": TEXT, "gpt2 without": WITHOUT, "gpt2 top-k": replace(TEXT, gate=TopK(0.5)),
}


def weights(config, dtype="float64", seed=0):
    """Return parameters of which none is 0 or 1, and the fixed weights."""
    params, fixed = module_of(config).init(config, seed, dtype=dtype)
    draw = np.random.default_rng(seed)
    return tree_map(lambda a: (a + 0.3 * draw.normal(size=a.shape)).astype(dtype), params), fixed


def ours(config, dtype="float64"):
    """Return our own model as a function, and its parameters by name."""
    params, fixed = weights(config, dtype)
    return (lambda x: module_of(config).forward(x, params, fixed, config)[0],
            interop.named_weights(params, fixed, config))


# --- the same in PyTorch, with mistakes ----------------------------------------------------------


def norm(x, p, eps, made=()):
    """Return a layer norm with mistakes."""
    w, b = p
    if "norm-gain-missing" in made:
        w = torch.ones_like(w)
    if "norm-bias-missing" in made:
        b = torch.zeros_like(b)
    for each in made:
        if each.startswith("eps-other"):
            eps = 3e-3 if "Between" in each else float(each.split()[1])
    if "norm-without-mean kept" in made:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w + b
    if "norm-without-mean kept above" in made:
        return x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + eps) * w + b
    if "norm-over-tokens" in made:
        return F.layer_norm(x, x.shape[1:], eps=eps) * w + b
    if "eps-outside-root" in made:
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + eps
                                                 ) * w + b
    if "variance-unbiased" in made:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt() * w + b
    if "eps-missing" in made:
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False) * w + b
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def attend(x, p, heads, causal, made=()):
    """Return self-attention with mistakes."""
    (W, b), (W_out, b_out) = p
    B, T, D = x.shape
    d = D // heads
    if {"attention-bias-missing none", "attention-bias-missing out only"} & set(made):
        b = None
    if {"attention-bias-missing none", "attention-bias-missing qkv only"} & set(made):
        b_out = None
    if "attention-projection-transposed" in made:
        W_out = W_out.T
    qkv = F.linear(x, W, b)
    if "qkv-by-head" in made:
        q, k, v = (each.transpose(1, 2) for each in qkv.view(B, T, heads, 3, d).unbind(3))
    else:
        parts = qkv.chunk(3, dim=-1)
        if any(each.startswith("heads-interleaved") for each in made):
            parts = [each.view(B, T, d, heads).permute(0, 3, 1, 2) for each in parts]
        elif "heads-untransposed split untransposed" in made:
            parts = [each.reshape(B, heads, T, d) for each in parts]
        else:
            parts = [each.view(B, T, heads, d).transpose(1, 2) for each in parts]
        order = next((each.split()[1] for each in made if each.startswith("qkv-order")), "qkv")
        q, k, v = (dict(zip(order, parts, strict=True))[name] for name in "qkv")
    scale = d ** -0.5
    if "attention-scale-width" in made:
        scale = D ** -0.5
    if "attention-unscaled" in made:
        scale = 1.0
    if "attention-scale-other" in made:
        scale = 1 / d  # twice
    causal = causal or "causal-unwanted" in made
    S = q @ k.mT * scale
    seen = torch.ones(T, T).tril()
    if {"causal-excludes-self", "nan"} & set(made):
        seen = torch.ones(T, T).tril(-1)
    if "causal-sees-next" in made:
        seen = torch.ones(T, T).tril(1)
    if "causal-reversed" in made:
        seen = torch.ones(T, T).triu()
    if causal and not {"causal-missing", "causal-after-softmax"} & set(made):
        S = S.masked_fill(seen == 0, -1e9 if "causal-excludes-self" in made
                          else -torch.inf)
    P = S.softmax(-2 if "softmax-over-queries" in made else -1)
    if "causal-after-softmax" in made:
        P = P * seen
    y = P @ v
    if "heads-interleaved interleaved" in made:
        y = y.permute(0, 2, 3, 1).reshape(B, T, D)
    elif "heads-untransposed joined untransposed" in made:
        y = y.reshape(B, T, D)
    else:
        y = y.transpose(1, 2).reshape(B, T, D)
    return y if "attention-projection-missing" in made else F.linear(y, W_out, b_out)


def mlp(x, p, fixed, one, made, routed):
    """Return an MLP's output for x (B, T, N), with mistakes."""
    (W, b), (W_out, b_out) = p
    f = {"softplus": F.softplus, "tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu,
         "gelu_new": lambda a: F.gelu(a, approximate="tanh")}[one.activation]
    if "activation-other tanh" in made:
        f = torch.tanh
    if "softplus-beta" in made:
        def f(a):
            return F.softplus(a, beta=2.0)
    if "gelu-form gelu_new" in made:
        def f(a):
            return F.gelu(a, approximate="tanh")
    if "gelu-form gelu" in made:
        f = F.gelu
    if {"bias-missing none", "bias-missing output only"} & set(made):
        b = None
    if {"bias-missing none", "bias-missing hidden only"} & set(made):
        b_out = None
    if "W-transposed" in made:
        W, W_out = W.T, W_out.T
    a = F.linear(x, W, b)
    h = f(a)
    if "hidden-scaled" in made:
        h = 1.25 * h
    if one.gate is not None:
        if "top-k-of-activation" in made:
            c = f(a)
        elif isinstance(one.gate, TopK) or "top-k-of-pre-activation" in made:
            c = a
        else:
            V = W if "V-is-W" in made else fixed[0]
            c = F.linear(routed, V.T if "V-transposed" in made else V,
                         b if "routing-bias" in made else None)
        axis = {"cap-over-batch batch": 0, "cap-over-batch tokens": 1}.get(next(
            (each for each in made if each.startswith("cap-over")), None), -1)
        N = c.shape[axis]
        k = {"k-ceiled": int(one.gate.p_k * N) + 1, "k-one-less": int(one.gate.p_k * N) - 1,
             "k-complement": int((1 - one.gate.p_k) * N),
             "k-of-layer-before": int(one.gate.p_k * x.shape[-1])}.get(next(
                 (each for each in made if each.startswith("k-")), None),
                 max(1, int(one.gate.p_k * N)))
        s = -c if "cap-smallest" in made else c.abs() if "cap-magnitude" in made else c
        if k < N:
            m = (s > s.sort(dim=axis, descending=True).values.narrow(axis, k, 1)).to(x.dtype)
        else:
            m = torch.ones_like(s)
        if "cap-inverted" in made:
            m = 1 - m
        if "cap-argsort argsort" in made:
            m = ((-c).argsort(-1) < k).to(x.dtype)
        if "cap-argsort argsort ascending" in made:
            m = (c.argsort(-1) >= N - k).to(x.dtype)
        if "mask-before-activation" in made:
            h = f(m * a)
        elif "mask-before-bias" in made:
            h = f(m * (a - b) + b)
        elif "mask-times-scores" in made:
            h = m * c * h
        elif "through mask" in made:
            h = h + (m * h - h).detach()
        elif "derivative output" in made:
            inner = h.detach().requires_grad_()
            slope, = torch.autograd.grad(f(inner).sum(), inner)
            h = m * slope * a + (m * h - m * slope * a).detach()
        elif "mask-missing" not in made:
            h = m * h
    y = F.linear(h, W_out, b_out)
    if "output-activated" in made:
        y = f(y)
    if "output-scaled" in made:
        y = 0.7 * y
    if "output-masked" in made:
        k = int(one.gate.p_k * y.shape[-1])
        y = y * (y > y.sort(descending=True).values[..., k, None])
    return y


def branch(x, p_norm, function, config, made, part):
    """Return x with what a function of its norm adds, with mistakes."""
    where = next((each.split()[1] for each in made if each.startswith("post-norm")), "pre")
    where = "none" if "norm-missing" in made else where
    n = norm(x, p_norm, config.eps, made) if where == "pre" else x
    y = function(n, x)
    if where == "branch":
        y = norm(y, p_norm, config.eps, made)
    if "residual-of-norm" in made:
        y = n + y
    elif not {"residual-missing none",
              f"residual-missing {('second', 'first')[part]} only"} & set(made):
        y = x + y
    return norm(y, p_norm, config.eps, made) if where == "post" else y


def routed(n, x, made):
    return x if "routing-before-norm" in made else n


def transformer(x, params, fixed, config, causal, made):
    for p, V in zip(params.blocks, fixed, strict=True):
        first, second = p.attention_norm, p.mlp_norm
        if "norms-swapped swapped" in made:
            first, second = second, first
        if "norms-swapped first" in made:
            second = first

        def attention(n, _, p=p):
            return attend(n, p.attention, config.heads, causal, made)

        def feed(n, x, p=p, V=V):
            return mlp(n, p.mlp, V, config.mlps[0], made, routed(n, x, made))

        y = branch(x, first, attention, config, made, 0)
        if "block-parallel" in made:
            x = y + branch(x, second, feed, config, made, 1) - x
        else:
            x = branch(y, second, feed, config, made, 1)
    return x


def patches_of(x, config, made):
    C, P = x.shape[1], config.patch
    cells = x.unfold(2, P, P).unfold(3, P, P)  # (B, C, rows, columns, P, P)
    if "patches-by-column" in made:
        cells = cells.transpose(2, 3)
    if "patches-transposed" in made:
        cells = cells.mT
    order = (0, 2, 3, 1, 4, 5) if "patches-channels-first" in made else (0, 2, 3, 4, 5, 1)
    return cells.permute(order).reshape(len(x), -1, P * P * C)


def embedded(x, p, config, made):
    return F.linear(patches_of(x, config, made), p.weight,
                    None if "patch-bias-missing" in made else p.bias)


def headed(x, p, made):
    return finished(F.linear(x, p.weight, None if "head-bias-missing" in made else p.bias), made)


def finished(y, made):
    if "logits-scaled" in made:
        y = y / 2.5
    if "output-softmax" in made:
        return y.softmax(-1)
    return y.log_softmax(-1) if "output-log-softmax" in made else y


def vit_of(x, params, fixed, config, made=()):
    e = params.embedding
    x = embedded(x, e.patches, config, made)
    positions = e.positions
    if "embedding-scaled" in made:
        x = x * config.width ** 0.5
    if "positions-off-by-one next" in made:
        positions = positions.roll(-1, 0)
    if "positions-missing none" in made:
        positions = torch.zeros_like(positions)
    if "positions-off-by-one before class" in made:
        x, positions = x + positions[:-1], torch.zeros_like(positions)
    if "positions-missing patches only" in made:
        x, positions = x + positions[1:], torch.zeros_like(positions)
    if e.token is not None:
        parts = [e.token.expand(len(x), 1, -1), x]
        x = torch.cat(parts[::-1] if "class-token-last last" in made else parts, dim=1)
    x = transformer(x + positions, params, fixed, config, False, made)
    final = {"tokens": "pooled", "pooled": "tokens"}[config.final_norm] if (
        any(each.startswith("final-norm-place") for each in made)) else config.final_norm
    final = None if "final-norm-missing" in made else final
    if final == "tokens":
        x = norm(x, params.norm, config.eps, made)
    if "class-token-mean mean" in made or (config.pooling == "mean"
                                           and "pooling-first" not in made):
        x = x.mean(1)
    elif "class-token-mean mean of patches" in made:
        x = x[:, 1:].mean(1)
    else:
        x = x[:, -1] if {"class-token-last last", "class-token-last read"} & set(made) else x[:, 0]
    return headed(norm(x, params.norm, config.eps, made) if final == "pooled" else x, params.head,
                  made)


def mixer_of(x, params, fixed, config, made=()):
    x = embedded(x, params.patches, config, made)
    order = list(range(len(params.branches)))
    if "mixing-order" in made:
        order = [i + 1 - 2 * (i % 2) for i in order]
    for i in order:
        place = i + 1 - 2 * (i % 2) if "norms-swapped swapped" in made else i
        place = i - i % 2 if "norms-swapped first" in made else place

        def feed(n, x, i=i):
            p, one = params.branches[i].mlp, config.mlps[i]
            source = routed(n, x, made)
            if i % 2 or "mixing-not-transposed untransposed" in made:
                return mlp(n, p, fixed[i], one, made, source)
            turned = source if "mixing-not-transposed routed untransposed" in made else source.mT
            return mlp(n.mT, p, fixed[i], one, made, turned).mT

        x = branch(x, params.branches[place].norm, feed, config, made, i % 2)
    if "final-norm-missing" not in made:
        x = norm(x, params.norm, config.eps, made)
    return headed(x[:, 0] if "pooling-first" in made else x.mean(1), params.head, made)


def gpt2_of(x, params, fixed, config, made=(), head=None):
    e = params.embedding
    at = torch.arange(x.shape[1])
    if "positions-off-by-one next" in made:
        at = at + 1
    if "positions-off-by-one previous" in made:
        at = (at - 1).clamp(min=0)
    x = e.tokens[x]
    if "embedding-scaled" in made:
        x = x * config.width ** 0.5
    if "positions-missing" not in made:
        x = x + e.positions[at]
    x = transformer(x, params, fixed, config, True, made)
    if "final-norm-missing" not in made:
        x = norm(x, params.norm, config.eps, made)
    return finished(F.linear(x, head if "head-untied" in made else e.tokens), made)


NETWORKS = {ViTConfig: vit_of, MixerConfig: mixer_of, GPT2Config: gpt2_of}


def in_torch(config, made=(), dtype="float64"):
    """Return a network in PyTorch with mistakes, by their keys, and its parameters by name."""
    params, fixed = weights(config, dtype)
    named = interop.named_weights(params, fixed, config)
    tensors, maps = tree_map(torch.as_tensor, (params, fixed))
    more = {}
    if isinstance(config, GPT2Config):
        more["head"] = torch.as_tensor(np.random.default_rng(1).normal(
            size=tensors.embedding.tokens.shape))
        named["lm_head.weight"] = more["head"].numpy().astype(dtype)
    network = NETWORKS[type(config)]

    def fn(x):
        return network(torch.as_tensor(x), tensors, maps, config, set(made), **more).numpy()

    return fn, named


def key(mistake, table):
    """Return by what a mistake goes in the code above: its name, and its value if there are two."""
    if sum(each.name == mistake.name for each in table) == 1:
        return mistake.name
    if mistake.name == "class-token-last" and mistake.decision == "pooling":
        return "class-token-last read"
    return f"{mistake.name} {mistake.value}"


# --- what is right -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIGHT)
def test_without_mistakes_it_is_our_model(name):
    config = RIGHT[name]
    fn, named = ours(config)
    subject = _subject(config, named, {}, tolerance("float64"))
    x = subject.inputs(1)
    y, _, decided = subject.outputs([x], subject.right)
    assert decided.all()
    np.testing.assert_allclose(y, fn(x), rtol=0, atol=1e-12 * np.abs(y).max())


@pytest.mark.parametrize(("name", "dtype"), in_turn(RIGHT, ["float64", "float32"]))
def test_right_networks_pass(name, dtype):
    fn, named = in_torch(RIGHT[name], dtype=dtype) if name not in (
        "no norm", "pooled mean") else ours(RIGHT[name], dtype)
    report = diagnose(fn, named, RIGHT[name])
    assert report.ok, str(report)


def test_without_mistakes_they_are_our_layers():
    draw = np.random.default_rng(0)
    p = Norm(*draw.normal(size=(2, 12)))
    report = diagnose(lambda x: norm_forward(x, p)[0], {"weight": p.gain, "bias": p.bias},
                      "layer-norm")
    assert report.ok, str(report)
    assert "would not show" not in str(report)
    named = of_attention()
    for causal in (False, True):
        layer = SelfAttention(*(Linear(named[f"{name}.weight"], named[f"{name}.bias"])
                                for name in ("qkv", "out")))
        report = diagnose(lambda x, layer=layer, causal=causal: self_attention_forward(
            x, layer, 3, causal)[0], named, "attention", heads=3, causal=causal)
        assert report.ok, str(report)
        assert "would not show" not in str(report)


def of_attention(D=12, seed=0):
    """Return the parameters of attention."""
    draw = np.random.default_rng(seed)
    shapes = {"qkv.weight": (3 * D, D), "qkv.bias": (3 * D,), "out.weight": (D, D),
              "out.bias": (D,)}
    return {name: 0.5 * draw.normal(size=shape) for name, shape in shapes.items()}


def of_module(module, x=lambda x: torch.as_tensor(x), y=lambda y: y):
    """Return a module as a function, and its parameters."""
    named = {name: array.numpy() for name, array in module.state_dict().items()}

    def fn(values):
        with torch.no_grad():
            return y(module.eval()(x(values))).numpy()

    return fn, named


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pytorchs_own_layers_pass(dtype):
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    made = torch.nn.LayerNorm(12, eps=1e-6, dtype=kind)
    torch.nn.init.normal_(made.weight)
    assert diagnose(*of_module(made), "layer-norm", eps=1e-6).ok
    assert diagnose(*of_module(made), "layer-norm").mistakes == ("eps-other",)
    plain = torch.nn.LayerNorm(12, bias=False, dtype=kind)
    assert diagnose(*of_module(plain), "layer-norm").ok

    class MultiHead(torch.nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    made = MultiHead(12, 3, batch_first=True, dtype=kind)
    assert diagnose(*of_module(made), "attention", heads=3).ok
    assert diagnose(*of_module(made), "attention", heads=2).ok is False
    named = of_attention()
    tensors = {name: torch.as_tensor(array, dtype=kind) for name, array in named.items()}

    def fused(x):
        q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in F.linear(
            torch.as_tensor(x), tensors["qkv.weight"], tensors["qkv.bias"]).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.linear(y, tensors["out.weight"], tensors["out.bias"]).numpy()

    assert diagnose(fused, tensors, "attention", heads=3, causal=True).ok


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layers_in_jax_pass(dtype):
    jax = pytest.importorskip("jax", reason="JAX, of the crosscheck extra, is not installed")
    with jax.enable_x64(dtype == "float64"):
        named = {name: array.astype(dtype) for name, array in of_attention().items()}

        def fn(x):
            q, k, v = (part.reshape(*part.shape[:2], 3, 4) for part in jax.numpy.split(
                x @ named["qkv.weight"].T + named["qkv.bias"], 3, axis=-1))
            S = jax.numpy.einsum("bihd,bjhd->bhij", q, k) / 2
            P = jax.nn.softmax(jax.numpy.where(np.tri(x.shape[1], dtype=bool), S, -np.inf))
            y = jax.numpy.einsum("bhij,bjhd->bihd", P, v)
            return np.asarray(y.reshape(*x.shape) @ named["out.weight"].T + named["out.bias"])

        assert diagnose(fn, named, "attention", heads=3, causal=True).ok

        def standard(x):
            n = jax.nn.standardize(jax.numpy.asarray(x), epsilon=1e-5)
            return np.asarray(n * weight + bias)

        weight, bias = np.linspace(0.5, 2, 24, dtype=dtype).reshape(2, 12)
        assert diagnose(standard, {"weight": weight, "bias": bias}, "layer-norm").ok


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gpt2_of_transformers_passes(dtype):
    transformers = pytest.importorskip("transformers", reason="transformers, of the crosscheck "
                                                              "extra, is not installed")
    torch.manual_seed(0)
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=17, n_positions=10, n_embd=12, n_layer=2, n_head=3, n_inner=20,
        initializer_range=0.3)).to(getattr(torch, dtype))
    fn, named = of_module(made, y=lambda y: y.logits)
    assert diagnose(fn, named, WITHOUT).ok
    assert diagnose(fn, named, replace(WITHOUT, activation="gelu")).mistakes == ("gelu-form",)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_timms_vit_passes(dtype):
    timm = pytest.importorskip("timm", reason="timm, of the crosscheck extra, is not installed")
    torch.manual_seed(0)
    made = timm.models.vision_transformer.VisionTransformer(
        img_size=(4, 6), patch_size=2, in_chans=3, num_classes=5, embed_dim=12, depth=2,
        num_heads=3, mlp_ratio=20 / 12).to(getattr(torch, dtype))
    config = replace(CLASS, gate=None, activation="gelu", eps=1e-6)
    report = diagnose(*of_module(made), config)
    assert report.ok, str(report)


# --- each mistake by its own name ----------------------------------------------------------------


def cases():
    """Yield (table, configuration, mistake) for all that is tried with whole networks."""
    square = replace(TEXT, hidden=12)
    for mistake in VIT:
        if mistake.name in ("pooling-first", "final-norm-place"):
            yield VIT, MEAN if mistake.value != "tokens" else replace(
                MEAN, final_norm="pooled"), mistake
        elif mistake not in ATTENTION + IN_BLOCK + NORM:
            yield VIT, CLASS, mistake
    for mistake in MIXER:
        if mistake not in IN_BLOCK + NORM:
            yield MIXER, SQUARE if mistake.decision == "mixing" else MIXED, mistake
    for mistake in GPT2:
        if mistake not in ATTENTION + IN_BLOCK + NORM:
            yield GPT2, TEXT, mistake
    for mistake in ATTENTION[::5] + NORM[::2]:  # here as in the layers, a few
        if mistake.name != "causal-unwanted" and mistake.name != "eps-other":
            yield GPT2, TEXT, mistake
    for mistake in IN_BLOCK:  # as the MLP has them, on tokens
        if mistake.name in ("V-transposed", "W-transposed"):
            yield GPT2, square, mistake
        elif mistake.name == "gelu-form":
            yield GPT2, replace(TEXT, activation={"gelu": "gelu_new", "gelu_new": "gelu"}[
                mistake.value]), mistake
        elif mistake.name.startswith("top-k"):  # softplus leaves them in their order
            yield GPT2, replace(TEXT, activation="gelu"), mistake
        elif mistake.name in ELSEWHERE or (
                mistake.name == "activation-other" and mistake.value != "tanh"):
            continue
        else:
            yield GPT2, TEXT, mistake


# Of the MLP's entries those that test_diagnose.py makes: ties, which tokens have by chance alone,
# and what would be the same here.
ELSEWHERE = ("ties-strict", "ties-threshold", "ties-index", "k-rounded", "k-one-more",
             "k-quantile", "p_k-other", "leaky-slope")
NETWORK_CASES = list(cases())


@pytest.mark.parametrize(("table", "config", "mistake"), NETWORK_CASES, ids=[
    f"{type(config).__name__} {mistake.name} {mistake.value}"
    for _, config, mistake in NETWORK_CASES])
def test_a_network_with_a_mistake_is_told_which(table, config, mistake):
    table = IN_BLOCK if mistake in IN_BLOCK else table
    config = replace(config, depth=1)
    fn, named = in_torch(config, {key(mistake, table)})
    report = diagnose(fn, named, config)
    assert report.mistakes == (mistake.name,), str(report)
    assert len(report.findings[0].found.causes) == 1 or mistake.name in ALIKE, str(report)


ALIKE = ("softplus-beta", "k-ceiled", "k-of-layer-before", "k-complement")


@pytest.mark.parametrize("mistake", NORM, ids=[f"{each.name} {each.value}" for each in NORM])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_norm_with_a_mistake_is_told_which(mistake, dtype):
    draw = np.random.default_rng(0)
    p = [torch.as_tensor(draw.normal(size=12), dtype=getattr(torch, dtype)) for _ in range(2)]
    report = diagnose(lambda x: norm(torch.as_tensor(x), p, 1e-5, {key(mistake, NORM)}).numpy(),
                      {"weight": p[0], "bias": p[1]}, "layer-norm",
                      **{"eps": 1e-4} if mistake.value == 1e-5 else {})
    assert report.mistakes == (mistake.name,), str(report)
    assert len(report.findings[0].found.causes) == 1, str(report)


@pytest.mark.parametrize("mistake", ATTENTION, ids=[f"{each.name} {each.value}"
                                                   for each in ATTENTION])
def test_attention_with_a_mistake_is_told_which(mistake):
    causal = mistake.decision == "triangle" and mistake.value != "own"
    named = of_attention()
    p = [[torch.as_tensor(named[f"{name}.{part}"]) for part in ("weight", "bias")]
         for name in ("qkv", "out")]
    report = diagnose(lambda x: attend(torch.as_tensor(x), p, 3, causal,
                                       {key(mistake, ATTENTION)}).numpy(),
                      named, "attention", heads=3, causal=causal)
    assert report.mistakes == (mistake.name,), str(report)
    assert len(report.findings[0].found.causes) == 1, str(report)


@pytest.mark.parametrize(("config", "names"), [
    (replace(TEXT, depth=1), ("attention-scale-width", "mask-before-activation")),
    (replace(MEAN, depth=1), ("variance-unbiased", "patches-transposed")),
])
def test_two_mistakes_are_told(config, names):
    fn, named = in_torch(config, names)
    report = diagnose(fn, named, config)
    assert set(report.mistakes) == {name.split()[0] for name in names}, str(report)


def test_a_first_token_that_sees_none_is_told():
    fn, named = in_torch(TEXT, {"nan"})
    with pytest.raises(UserError, match="triangle off by one"):
        diagnose(fn, named, TEXT)


@pytest.mark.parametrize(("config", "first"), [
    (replace(WITHOUT, depth=1), "x_0"), (SMALL, "c_2")])
def test_what_none_explains_is_placed(config, first):
    """As a network that is right but for a weight."""
    params, fixed = weights(config)
    named = interop.named_weights(params, fixed, config)
    if config is not SMALL:
        other = params._replace(embedding=params.embedding._replace(
            positions=params.embedding.positions * 1.1))
    else:
        last = params.branches[1]
        other = params._replace(branches=(params.branches[0], last._replace(
            norm=Norm(last.norm.gain + 0.1, last.norm.bias + 0.2))))
    one = _subject(config, interop.named_weights(other, fixed, config), {}, tolerance("float64"))
    report = diagnose(
        lambda x: one.outputs([x], one.right)[0], named, config,
        intermediates=lambda x: one.intermediates(x, one.right)[0])
    assert report.cause is None
    assert report.findings[0].first.startswith(f"{first} "), str(report)


# --- gradients -----------------------------------------------------------------------------------


def gradients_of(config, made=()):
    """Return a network, its parameters by name, and its gradients by autograd, with mistakes."""
    params, fixed = weights(config)
    named = interop.named_weights(params, fixed, config)
    names = list(interop.named_weights(params, (), config)) if not fixed[0] else [
        name for name in named if "spec" not in name]
    totals = {}

    def fn(x):
        tensors, maps = tree_map(torch.as_tensor, (params, fixed))
        return NETWORKS[type(config)](torch.as_tensor(x), tensors, maps, config).numpy()

    def gradients(x, labels):
        tensors = tree_map(lambda a: torch.as_tensor(a).requires_grad_(), params)
        maps = tree_map(torch.as_tensor, fixed)
        if "tied" in made:
            table = tensors.embedding.tokens
            parts = {"embedding": (table, table.detach()), "head": (table.detach(), table)}
            first, head = parts[made["tied"]]
            y = gpt2_of(torch.as_tensor(x), tensors._replace(
                embedding=tensors.embedding._replace(tokens=first)), maps, config,
                {"head-untied"}, head)
        else:
            y = NETWORKS[type(config)](torch.as_tensor(x), tensors, maps, config,
                                       {f"{decision} {value}" for decision, value in made.items()})
        if made.get("loss") == "softmax twice":
            y = y.softmax(-1)
        y, target = y.flatten(0, -2), torch.as_tensor(labels).flatten()
        loss = F.cross_entropy(y, target)
        loss = loss * {"sum": len(y), "mean twice": 1 / len(y), "negated": -1,
                       "mean over classes": 1 / y.shape[-1]}.get(made.get("loss"), 1)
        loss.backward()
        grads = tree_map(lambda p: (torch.zeros_like(p) if p.grad is None else p.grad).numpy(),
                         tensors)
        by_name = interop.named_weights(grads, (), config)
        assert list(by_name) == names
        if made.get("detached") == "last":
            heads = ("mlp_head.1.", "4.", "6.")
            by_name = {name: each if name.startswith(heads) else 0 * each
                       for name, each in by_name.items()}
        if made.get("calls") == "accumulate":
            for name, each in by_name.items():
                totals[name] = totals.get(name, 0) + each
            by_name = dict(totals)
        if made.get("V_gradient") == "any":
            by_name |= {name: named[name] for name in named if "spec" in name}
        return by_name

    return fn, named, gradients


@pytest.mark.parametrize("name", ["published", "mean", "tokens", "mixer", "gpt2", "gpt2 without"])
def test_right_gradients_pass(name):
    fn, named, gradients = gradients_of(RIGHT[name], {})
    report = diagnose(fn, named, RIGHT[name], gradients=gradients)
    assert report.ok, str(report)
    assert len(report.findings) == 2


@pytest.mark.parametrize(("name", "mistake"), [
    *(("published", each) for each in NETWORK_GRADIENTS),
    *(("mixer", each) for each in NETWORK_GRADIENTS[::3]),
    *(("gpt2", each) for each in (*NETWORK_GRADIENTS[::2], *TIED_GRADIENTS))])
def test_gradients_with_a_mistake_are_told_which(name, mistake):
    config = RIGHT[name]
    if mistake.decision == "detached" and name == "gpt2":
        config = RIGHT["published"]
    fn, named, gradients = gradients_of(config, {mistake.decision: mistake.value})
    report = diagnose(fn, named, config, gradients=gradients)
    assert report.mistakes == (mistake.name,), str(report)


def test_gradients_of_layers_are_compared():
    """For a gradient of the output, which takes the place of the labels."""
    torch.manual_seed(0)
    for module, model, settings in ((torch.nn.LayerNorm(12), "layer-norm", {}),
                                    (OfTimm(), "attention", {"heads": 3})):
        module = module.double()

        def gradients(x, dy, module=module):
            module.zero_grad()
            module(torch.as_tensor(x)).backward(torch.as_tensor(dy))
            return {name: p.grad.numpy() for name, p in module.named_parameters()}

        assert diagnose(*of_module(module), model, gradients=gradients, **settings).ok
        wrong = diagnose(*of_module(module), model, **settings, gradients=lambda x, dy: {
            name: 1.1 * each for name, each in gradients(x, dy).items()})
        assert not wrong.ok and wrong.cause is None


class OfTimm(torch.nn.Module):
    """Attention under timm's names."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(12, 36, bias=False), torch.nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2)
                   for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "named", "settings", "said"), [
    ("layer-norm", {}, {}, "no parameters"),
    ("norm", {"weight": np.ones(3)}, {}, "layer-norm"),
    ("layer-norm", {"weight": np.ones(3), "bias": np.ones(4)}, {}, r"weight \(3,\), bias \(4,\)"),
    ("layer-norm", {"weight": np.ones(3)}, {"heads": 2}, "heads"),
    ("attention", {"qkv.weight": np.ones((9, 3))}, {}, "out.weight"),
    ("attention", {"qkv.weight": np.ones((9, 3)), "out.weight": np.eye(3)}, {"heads": 2}, "heads"),
    (TEXT, {}, {"p_k": 0.5}, "p_k is given"),
    (replace(TEXT, gate=Bernoulli(0.5)), {}, {}, "Comet, Layerwise and TopK"),
    (replace(TEXT, routing="stream"), {}, {}, "stream"),
])
def test_what_cannot_be_compared_is_said(model, named, settings, said):
    if isinstance(model, GPT2Config):
        named = ours(model)[1]
    with pytest.raises(UserError, match=said):
        diagnose(lambda x: x, named, model, **settings)


def test_training_is_compared_of_an_mlp():
    fn, named = ours(TEXT)
    with pytest.raises(UserError, match="step is compared with an MLP"):
        diagnose(fn, named, TEXT, step=lambda x, labels: named)


def test_no_entry_lacks_a_mutant():
    tried = {(type(config).__name__, mistake) for _, config, mistake in NETWORK_CASES}
    own = {"ViTConfig": VIT, "MixerConfig": MIXER, "GPT2Config": GPT2}
    for name, table in own.items():
        for mistake in table:
            shared = mistake in ATTENTION + NORM + IN_BLOCK
            assert shared or (name, mistake) in tried, mistake
    assert set(BLOCK) <= {mistake for _, mistake in tried}


def test_a_near_tie_of_one_token_leaves_its_example_out():
    _, named = ours(TEXT, "float64")
    subject = _subject(TEXT, named, {}, tolerance("float64"))
    mlp_1 = subject.mlps[0]
    _, found, _ = mlp_1.of_tokens(np.ones((2, 3, 12)), np.ones((2, 3, 12)), subject.right)
    order = np.argsort(found["c"][0, 0])
    low, high = order[-7], order[-6]
    V = mlp_1.V[1]
    V[high] = V[low]
    V[high, 0] += 1e-14  # the k-th and the next score, of what is not 0 in its first place
    rows = np.ones((2, 3, 12))
    rows[0, 1:, 0] = rows[1, :, 0] = 0.0
    _, _, decided = mlp_1.of_tokens(rows, rows, subject.right)
    assert list(decided) == [False, True]
