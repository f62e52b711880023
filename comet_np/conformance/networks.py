"""ViT, MLP-Mixer and GPT-2 as functions of decisions, in plain NumPy and float64.

Norm and attention are those of `layers.py`, the MLP of a block is that of `mlp.py`. With the
decisions of `right` they are `comet_np.models`, and a test holds them against these.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UserError
from ..functional.activations import activation
from ..functional.packing import unpacked
from ..functional.patches import Embedding
from ..interop import gpt2_from_torch, gpt2_to_torch, mixer_from_torch, mixer_to_torch, vit_to_torch
from ..interop.places import matches
from ..interop.torch_gpt2 import HEAD, PREFIX
from ..interop.torch_vit import STYLES, places_of, vit_from_torch
from ..models import gpt2, mixer, vit
from ..models.gpt2 import GPT2Config
from ..models.mixer import MixerConfig
from ..models.mlp import MLPConfig, Params
from ..models.vit import ViTConfig
from ..rng import stream
from ..tree import zeros_like
from .layer_mistakes import GATED, GPT2, MIXER, NETWORK_GRADIENTS, TIED_GRADIENTS, VIT
from .layers import (
    NO_KEY,
    OF_ATTENTION,
    OF_GRADIENTS,
    OF_NORM,
    Subject,
    attention,
    check_right,
    normed,
    of_attention,
    wide,
)
from .mistakes import ACTIVATION, Choices, Mistake
from .mlp import (
    ROUTING,
    Forward,
    MLPSubject,
    _fits,
    count,
    cross_entropy_gradient,
    log_softmax,
    winners_of,
)
from .search import NotApplicable

Array = Any
ROWS, MOST_TOKENS = 12, 8  # of a batch, and of a text
Found = dict[str, Array]


class BlockMLP(MLPSubject):
    """The MLP of a block, of which each row of its input (..., N) is an example of its own."""

    def __init__(self, params: Params, fixed: Any, config: MLPConfig, allowed: float) -> None:
        named = {f"fc{layer}.{part}": array for layer, p in enumerate(params, start=1)
                 for part, array in (("weight", p.weight), ("bias", p.bias)) if array is not None}
        named |= {f"spec_{layer}.weight": V for layer, V in enumerate(fixed, start=1)}
        super().__init__(named, config.gate, config.activation, allowed)
        self.lead: tuple[int, ...] = ()
        self.routed: Array = None

    def of_tokens(self, x: Array, routed: Array, choices: Choices) -> tuple[Array, Found, Array]:
        """Return the output for x (B, T, N), c, m, a, and decided (B,).

        `routed` is what routing scores are taken of.
        """
        self.lead, self.routed = x.shape[:-1], routed.reshape(-1, routed.shape[-1])
        self._products.clear()  # which are of one input
        made = self.forward(x.reshape(-1, x.shape[-1]), choices)
        found = {"a": made.a[0]} if self.gate is None else {
            "c": made.c[0], "m": made.m[0], "a": made.a[0]}
        return (made.y.reshape(*self.lead, -1),
                {name: each.reshape(*self.lead, -1) for name, each in found.items()},
                made.decided.reshape(self.lead).all(axis=1))

    def _scores(self, layer: int, made: Forward, a: Array, choices: Choices) -> Array:
        if layer == 1:
            made = made._replace(x=[self.routed])
        return super()._scores(layer, made, a, choices)

    def _cap(self, c: Array, layer: int, choices: Choices) -> tuple[Array, Array]:
        if choices["axis"] == "neurons":
            return super()._cap(c, layer, choices)
        axis = 0 if choices["axis"] == "batch" else 1
        whole = np.moveaxis(c.reshape(*self.lead, -1), axis, -1)  # (..., B) or (..., T)
        m, sure = winners_of(whole.reshape(-1, self.lead[axis]),
                             count(choices["p_k"], self.lead[axis], choices["k"]), choices["ties"],
                             self.allowed)
        sure = sure.reshape(whole.shape[:-1]).all(axis=None if axis == 0 else 1)
        return (np.moveaxis(m.reshape(whole.shape), -1, axis).reshape(c.shape),
                np.broadcast_to(np.atleast_1d(sure)[:, None], self.lead).reshape(-1))


class Network(Subject):
    """What ViT, MLP-Mixer and GPT-2 share: the MLPs of their blocks, their norms, their gradients.
    """

    model: Any  # its module
    config: Any
    table: Sequence[Mistake]
    numbers_in_pairs = False

    def _begin(self, params: Any, fixed: Any, maps: Sequence[Params], config: Any,
               allowed: float) -> None:
        """Take what a constructor has found."""
        if config.gate is not None and (type(config.gate) not in ROUTING
                                        or config.routing != "block"):
            raise UserError("diagnose knows the gates Comet, Layerwise and TopK in the blocks' "
                            f"MLPs, and routing=\"block\", got {config.gate!r} and "
                            f"routing={config.routing!r}")
        self.params, self.fixed, self.allowed = params, fixed, allowed
        self.config = replace(config, compute=None)
        self.mlps = [BlockMLP(p, V, one, allowed)
                     for p, V, one in zip(maps, fixed, config.mlps, strict=True)]
        self.right = self.mlps[0].right | OF_NORM | OF_ATTENTION | {
            "eps": float(config.eps), "hidden_scale": float(config.scale),
            "routing_input": "normed", "norm_place": "pre", "norms": "own", "residual": "both",
            "blocks": "in turn", "logits": "logits", "logits_scale": 1.0, "head_bias": "given",
            "triangle": "none"} | OF_GRADIENTS

    @property
    def mistakes(self) -> list[Mistake]:  # type: ignore[override]
        """What may be wrong with an output, the likeliest first."""
        activations = {(each.decision, each.value) for each in ACTIVATION}
        fits = [mistake for mistake in self.table
                if (self.config.gate is not None or mistake.decision not in GATED | {"axis"})
                and ((mistake.decision, mistake.value) not in activations
                     or _fits(mistake, self.config.activation))]
        if not hasattr(self.params, "blocks"):
            return fits
        return of_attention(fits, self.right["triangle"] == "own", self.params.blocks[0].attention)

    @property
    def gradient_mistakes(self) -> Sequence[Mistake]:  # type: ignore[override]
        """What may be wrong with gradients."""
        return [mistake for mistake in NETWORK_GRADIENTS
                if self.config.gate is not None
                or mistake.decision not in ("through", "V_gradient")]

    def jittered(self, eps: float, number: int) -> Any:
        """Return it with all parameters moved by eps, relative, up or down."""
        rough = super().jittered(eps, number)
        rough.mlps = [one.jittered(eps, number) for one in self.mlps]
        return rough

    def branch(self, x: Array, i: int, norm: Any, choices: Choices, part: int = 1,
               across: bool = False) -> tuple[Array, Found, Array]:
        """Return x (B, T, D) with what the i-th MLP gives of it, c, m and a, and decided (B,).

        It is the first or second part of a block; with `across` it maps tokens, not channels.
        """
        mixing = choices["mixing"] if across else "untransposed"
        if across and mixing != "transposed" and x.shape[1] != x.shape[2]:
            raise NotApplicable
        n = self.before(x, norm, choices)
        routed = n if choices["routing_input"] == "normed" else x
        if mixing == "transposed":
            routed = routed.swapaxes(1, 2)
        turn = mixing != "untransposed"
        y, found, decided = self.mlps[i].of_tokens(n.swapaxes(1, 2) if turn else n, routed,
                                                   choices)
        y = self.summed(x, n, y.swapaxes(1, 2) if turn else y, norm, choices, part)
        return y, found, decided

    def before(self, x: Array, norm: Any, choices: Choices) -> Array:
        """Return what a branch is given of x."""
        return normed(x, norm, choices) if choices["norm_place"] == "pre" else x

    def summed(self, x: Array, n: Array, y: Array, norm: Any, choices: Choices,
               part: int) -> Array:
        """Return x with what a branch gives added, of the first or second part of a block."""
        if choices["norm_place"] == "branch":
            y = normed(y, norm, choices)
        residual = choices["residual"]
        if residual == "normed":
            y = n + y
        elif residual == "both" or residual == ("first only", "second only")[part]:
            y = x + y
        return normed(y, norm, choices) if choices["norm_place"] == "post" else y

    def finished(self, x: Array, choices: Choices) -> Array:
        """Return what the network returns of its logits (..., classes)."""
        x = choices["logits_scale"] * x
        if choices["logits"] == "logits":
            return x
        y = log_softmax(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        return np.exp(y) if choices["logits"] == "softmax" else y

    @property
    def parameters(self) -> list[str]:
        """The names of what `gradients` returns."""
        return list(self.named_gradients(self.params))

    def gradients(self, x: Array, labels: Array, choices: Choices, call: int = 0
                  ) -> dict[str, Array]:
        """Return the gradients of the mean cross-entropy of x and labels by the published names.

        They are our own hand-written ones: an output must be that of the specification.
        """
        check_right(self, choices)
        x = self.model_input(x)
        y, cache = self.model.forward(x, self.params, self.fixed, self.config)
        dy = loss_gradient(y, labels, choices) * (call + 1 if choices["calls"] == "accumulate"
                                                  else 1)
        grads = zeros_like(self.params)
        self.model.backward(dy, _reread(cache, self.config, choices), self.params, grads,
                            self.config, False)
        return self.named_gradients(self.chosen(grads, cache, dy, choices))

    def chosen(self, grads: Any, cache: Any, dy: Array, choices: Choices) -> Any:
        """Return the gradients; if nothing flows beyond the head, those of the head alone."""
        return (grads if choices["detached"] == "none"
                else zeros_like(grads)._replace(head=grads.head))

    def model_input(self, x: Array) -> Array:
        """Return x as the model wants it."""
        return x

    def named_gradients(self, grads: Any) -> Found:
        """Return gradients by the names of the parameters."""
        raise NotImplementedError

    def intermediates_of(self, i: int, x: Array, of_mlp: Found) -> Found:
        """Return the intermediates of the i-th MLP, and what its branch gives, by their names."""
        return {f"{name}_{i + 1}": each for name, each in of_mlp.items()} | {f"block_{i + 1}": x}


class OfImages(Network):
    """What ViT and MLP-Mixer share: images (B, C, rows, columns) as tokens, and the head."""

    def inputs(self, number: int) -> Array:
        """Return images (B, C, rows, columns), of which some are empty or nearly so."""
        draw = stream(number, "diagnose")
        C, rows, columns = self.config.image
        x = draw.normal(size=(ROWS, C, rows, columns))
        x[0], x[1], x[2] = 0.0, 1.0, -1.0
        for row in range(3, 6):
            x[row] *= draw.uniform(size=x[row].shape) < 0.1
        x[6:8] *= 4.0
        x[8] *= 0.1
        return x

    def shape(self, x: Array) -> tuple[int, ...]:
        """Return the shape of the logits."""
        return len(x), self.config.classes

    def labels(self, x: Array) -> Array:
        """Return labels (B,)."""
        return stream(4, "diagnose").integers(0, self.config.classes, len(x))

    def patches(self, x: Array, choices: Choices) -> Array:
        """Return the patches (B, T, P P C) of images."""
        C, rows, columns = self.config.image
        P = self.config.patch
        cells = x.reshape(len(x), C, rows // P, P, columns // P, P)
        order = {"rows": (0, 2, 4, 3, 5, 1), "transposed": (0, 2, 4, 5, 3, 1),
                 "channels first": (0, 2, 4, 1, 3, 5), "by column": (0, 4, 2, 3, 5, 1)}
        return cells.transpose(order[choices["patches"]]).reshape(len(x), -1, P * P * C)

    def mapped(self, x: Array, p: Any, choices: Choices) -> Array:
        """Return the tokens (B, T, D) of images."""
        y = self.patches(x, choices) @ p.weight.T
        return y + p.bias if choices["patch_bias"] == "given" else y

    def headed(self, pooled: Array, choices: Choices) -> Array:
        """Return the output of what was pooled (B, D)."""
        y = pooled @ self.params.head.weight.T
        return self.finished(y + self.params.head.bias if choices["head_bias"] == "given" else y,
                             choices)


class ViTSubject(OfImages):
    """A ViT, images (B, C, rows, columns) -> logits (B, classes), by the names of its styles."""

    model, table = vit, VIT

    def __init__(self, named: Mapping[str, Array], config: ViTConfig, allowed: float) -> None:
        arrays = wide(named)
        params, fixed = vit_from_torch(arrays, config)
        self.style = max(STYLES, key=lambda style: matches(arrays, places_of(config, style)))
        self._begin(params, fixed, [block.mlp for block in params.blocks], config, allowed)
        self.right |= {"patches": "rows", "patch_bias": "given", "class_token": "first",
                       "pooling": config.pooling, "positions": "given", "embedding_scale": "none",
                       "final_norm": config.final_norm or "none"}

    @property
    def mistakes(self) -> list[Mistake]:  # type: ignore[override]
        """What may be wrong: without a class token, or without a last norm, less."""
        of_class = self.config.pooling == "class"
        return [mistake for mistake in super().mistakes
                if (of_class or not mistake.name.startswith("class-token"))
                and (mistake.name != "final-norm-place" or (not of_class and self.params.norm))]

    def run(self, x: Array, choices: Choices) -> tuple[Found, Array]:
        """Return all that is computed of images, and which do not hang on rounding."""
        p = self.params
        x = self.embedded(self.mapped(x, p.embedding.patches, choices), p.embedding, choices)
        found, decided = blocks(self, x, choices)
        x = list(found.values())[-1]
        final = choices["final_norm"]
        if final == "tokens":
            x = found["norm"] = normed(x, p.norm, choices)
        pooling = choices["pooling"]
        if pooling == "class":
            x = x[:, -1 if choices["class_token"] == "last" else 0]
        elif pooling == "mean of patches":
            x = (x[:, :-1] if choices["class_token"] == "last" else x[:, 1:]).mean(axis=1)
        else:
            x = x[:, -1] if pooling == "last" else x.mean(axis=1)
        if final == "pooled":
            x = found["norm"] = normed(x, p.norm, choices)
        found["logits"] = self.headed(x, choices)
        return found, decided

    def embedded(self, x: Array, p: Embedding, choices: Choices) -> Array:
        """Return the first tokens (B, T, D) of mapped patches."""
        class_token = p.token is not None
        positions: Array = p.positions
        how = choices["positions"]
        if choices["embedding_scale"] == "root":
            x = x * math.sqrt(x.shape[-1])
        if not class_token and (how in ("before class", "patches only")
                                or choices["class_token"] == "last"):
            raise NotApplicable
        if how == "before class":
            positions = np.concatenate([0 * positions[:1], positions[:-1]])
        if how == "patches only":
            positions = np.concatenate([0 * positions[:1], positions[1:]])
        if how in ("next", "previous"):
            positions = np.roll(positions, -1 if how == "next" else 1, axis=0)
        if class_token:
            first: Array = p.token
            token = np.broadcast_to(first, (len(x), 1, x.shape[-1]))
            x = np.concatenate([x, token] if choices["class_token"] == "last" else [token, x],
                               axis=1)
        return x if how == "none" else x + positions

    def named_gradients(self, grads: Any) -> Found:
        """Return gradients by the names of the parameters."""
        return vit_to_torch(grads, (), self.config, self.style)


class MixerSubject(OfImages):
    """An MLP-Mixer, images (B, C, rows, columns) -> logits (B, classes)."""

    model, table = mixer, MIXER

    def __init__(self, named: Mapping[str, Array], config: MixerConfig, allowed: float) -> None:
        params, fixed = mixer_from_torch(wide(named), config)
        self._begin(params, fixed, [branch.mlp for branch in params.branches], config, allowed)
        self.right |= {"patches": "rows", "patch_bias": "given", "pooling": "mean",
                       "mixing": "transposed", "mixing_order": "tokens first",
                       "final_norm": "tokens"}

    def run(self, x: Array, choices: Choices) -> tuple[Found, Array]:
        """Return all that is computed of images, and which do not hang on rounding."""
        p = self.params
        x = self.mapped(x, p.patches, choices)
        found, decided = {"x_0": x}, np.ones(len(x), bool)
        order = list(range(len(p.branches)))
        if choices["mixing_order"] == "channels first":
            order = [i ^ 1 for i in order]
        for i in order:
            place = {"own": i, "swapped": i ^ 1, "first": i & ~1}[choices["norms"]]
            x, of_mlp, sure = self.branch(x, i, p.branches[place].norm, choices, i % 2, i % 2 == 0)
            decided = decided & sure
            found |= self.intermediates_of(i, x, of_mlp)
        if choices["final_norm"] == "tokens":
            x = found["norm"] = normed(x, p.norm, choices)
        found["logits"] = self.headed(x[:, 0] if choices["pooling"] == "class" else x.mean(axis=1),
                                      choices)
        return found, decided

    def named_gradients(self, grads: Any) -> Found:
        """Return gradients by the names of the parameters."""
        return mixer_to_torch(grads, (), self.config)


class GPT2Subject(Network):
    """A GPT-2, tokens (B, T) -> logits (B, T, V), by the names of Hugging Face's.

    ``lm_head.weight`` may be another than the table of tokens: a mistake is then to use it.
    """

    model, table, if_nan = gpt2, GPT2, NO_KEY

    def __init__(self, named: Mapping[str, Array], config: GPT2Config, allowed: float) -> None:
        arrays = wide(named)
        tables = [name for name in arrays if name.endswith("wte.weight")]
        self.head = arrays.pop(HEAD) if tables and HEAD in arrays else None
        params, fixed = gpt2_from_torch(arrays, config)
        self.prefix = PREFIX if any(name.startswith(PREFIX) for name in arrays) else ""
        self._begin(params, fixed, [block.mlp for block in params.blocks], config, allowed)
        self.right |= {"triangle": "own", "positions": "given", "embedding_scale": "none",
                       "final_norm": "tokens", "head": "tied"}

    @property
    def gradient_mistakes(self) -> Sequence[Mistake]:  # type: ignore[override]
        """What may be wrong with gradients, those of the tied table too."""
        return (*super().gradient_mistakes, *TIED_GRADIENTS)

    def inputs(self, number: int) -> Array:
        """Return tokens, int (B, T): T leaves a position free where there are several."""
        config, draw = self.config, stream(number, "diagnose")
        T = max(1, min(MOST_TOKENS, config.positions - 1))
        x = draw.integers(0, config.vocabulary, (ROWS, T))
        x[0], x[1] = 0, config.vocabulary - 1
        return x

    def shape(self, x: Array) -> tuple[int, ...]:
        """Return the shape of the logits."""
        return *x.shape, self.config.vocabulary

    def labels(self, x: Array) -> Array:
        """Return labels (B, T)."""
        return stream(4, "diagnose").integers(0, self.config.vocabulary, x.shape)

    def model_input(self, x: Array) -> Array:
        """Return tokens as integers."""
        return np.rint(x).astype("int64")

    def run(self, x: Array, choices: Choices) -> tuple[Found, Array]:
        """Return all that is computed of tokens (B, T), and which texts do not hang on rounding."""
        p, T = self.params, x.shape[1]
        at = np.arange(T)
        if choices["positions"] == "next":
            at = at + 1
        if choices["positions"] == "previous":
            at = np.maximum(at - 1, 0)
        if at[-1] >= len(p.embedding.positions):
            raise NotApplicable
        x = p.embedding.tokens[self.model_input(x)]
        if choices["embedding_scale"] == "root":
            x = x * math.sqrt(x.shape[-1])
        if choices["positions"] != "none":
            x = x + p.embedding.positions[at]
        found, decided = blocks(self, x, choices)
        x = list(found.values())[-1]
        if choices["final_norm"] != "none":
            x = found["norm"] = normed(x, p.norm, choices)
        head = p.embedding.tokens
        if choices["head"] == "own":
            if self.head is None or self.head.shape != head.shape:
                raise NotApplicable
            head = self.head
        found["logits"] = self.finished(x @ head.T, choices)
        return found, decided

    def chosen(self, grads: Any, cache: Any, dy: Array, choices: Choices) -> Any:
        """Return the gradients; the table's has two parts, as the head's and as the embedding's."""
        x = cache.head.x
        of_head = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        whole = grads.embedding.tokens
        if choices["detached"] != "none":
            grads, whole = zeros_like(grads), of_head
        table = {"embedding": whole - of_head, "head": of_head}.get(choices["tied"], whole)
        return grads._replace(embedding=grads.embedding._replace(tokens=table))

    def named_gradients(self, grads: Any) -> Found:
        """Return gradients by the names of the parameters."""
        return {self.prefix + name.removeprefix(PREFIX): each
                for name, each in gpt2_to_torch(grads, (), self.config).items()}


def blocks(self: Any, x: Array, choices: Choices) -> tuple[Found, Array]:
    """Return what all blocks of a ViT or a GPT-2 make of x (B, T, D), and decided (B,)."""
    found, decided = {"x_0": x}, np.ones(len(x), bool)
    for i, p in enumerate(self.params.blocks):
        first, second = {"own": (p.attention_norm, p.mlp_norm),
                         "swapped": (p.mlp_norm, p.attention_norm),
                         "first": (p.attention_norm, p.attention_norm)}[choices["norms"]]
        n = self.before(x, first, choices)
        y, found[f"weights_{i + 1}"] = attention(n, p.attention, self.config.heads, choices)
        x_mlp = self.summed(x, n, y, first, choices, 0)
        found[f"attention_{i + 1}"] = x_mlp
        parallel = choices["blocks"] == "parallel"
        y, of_mlp, sure = self.branch(x if parallel else x_mlp, i, second, choices)
        x = x_mlp + y - x if parallel else y
        decided = decided & sure
        found |= self.intermediates_of(i, x, of_mlp)
    return found, decided


def loss_gradient(y: Array, labels: Array, choices: Choices) -> Array:
    """Return the gradient of the mean cross-entropy by the logits y (..., classes)."""
    rows = y.reshape(-1, y.shape[-1])
    return cross_entropy_gradient(rows, labels.reshape(-1), choices["loss"]).reshape(y.shape)


def _reread(cache: Any, config: Any, choices: Choices) -> Any:
    """Return the cache as the backward of a mistake reads it."""
    f = activation(config.activation)

    def of_mlp(made: Any) -> Any:
        hidden, = made.hidden
        if choices["through"] == "mask" and hidden.m is not None:
            hidden = hidden._replace(m=np.ones_like(unpacked(hidden.m, hidden.a.shape[-1])))
        if choices["derivative"] == "output":
            hidden = hidden._replace(a=f.forward(hidden.a))
        return made._replace(hidden=(hidden,))

    if choices["derivative"] == "none":
        raise NotApplicable
    if hasattr(cache, "branches"):
        return cache._replace(branches=tuple(branch._replace(mlp=of_mlp(branch.mlp))
                                             for branch in cache.branches))
    return cache._replace(blocks=tuple(
        block._replace(branch=block.branch._replace(mlp=of_mlp(block.branch.mlp)))
        for block in cache.blocks))
