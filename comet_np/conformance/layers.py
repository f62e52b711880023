"""Layer norm and attention as functions of decisions, in plain NumPy and float64.

With the decisions of `right` they are those of `comet_np.functional`, and a test holds them against
these; with another value of one of them they are what a mistake computes.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..functional.attention import (
    SelfAttention,
    not_after,
    self_attention_backward,
    self_attention_forward,
)
from ..functional.linear import Linear
from ..functional.norm import Norm, norm_backward, norm_forward
from ..rng import stream
from ..tree import tree_map, zeros_like
from .layer_mistakes import ATTENTION, NORM
from .mistakes import Choices, Mistake
from .search import NotApplicable, floored

Array = Any
NO_KEY = " (does each token see itself, or is the causal triangle off by one?)"
ROWS, TOKENS = 16, 6  # of a batch of the layers; a row is an example
OF_NORM = {"variance": "biased", "eps_place": "inside", "norm_mean": "subtracted",
           "norm_gain": "given", "norm_bias": "given", "norm_axis": "features"}
OF_ATTENTION = {"attention_scale": "head", "softmax": "keys", "heads": "blocks", "qkv": "qkv",
                "attention_bias": "given", "attention_out": "given"}
OF_GRADIENTS = {"loss": "mean", "through": "function", "derivative": "input", "calls": "fresh",
                "detached": "none", "bias_gradient": "sum", "tied": "both", "V_gradient": "none"}


class Subject:
    """What is to be checked: what all of these share.

    A subject gives by `run` all that it computes of an input, the output last, and of which
    examples it does not hang on rounding.
    """

    unit = "rows"
    if_nan = ""  # what may be wrong if an output is NaN
    numbers_in_pairs = True  # whether pairs with an unknown number are tried, which takes long
    right: Choices
    mistakes: Sequence[Mistake]
    gradient_mistakes: Sequence[Mistake] = ()
    allowed: float
    params: Any

    def run(self, x: Array, choices: Choices) -> tuple[dict[str, Array], Array]:
        """Return by name, in the order of computation, what x gives; and decided, bool (B,)."""
        raise NotImplementedError

    def shape(self, x: Array) -> tuple[int, ...]:
        """Return the shape of the output for x: tokens become tokens."""
        return x.shape

    def jittered(self, eps: float, number: int) -> Any:
        """Return it with all parameters moved by eps, relative, up or down."""
        draw, rough = stream(number, "diagnose", "jitter"), copy.copy(self)
        rough.params = tree_map(lambda p: p * (1 + draw.choice([-eps, eps], p.shape)), self.params)
        return rough

    def intermediates(self, x: Array, choices: Choices) -> tuple[dict[str, Array], Array]:
        """Return what `run` does."""
        return self.run(x, choices)

    def outputs(self, calls: Sequence[Array], choices: Choices) -> tuple[Array, Array, Array]:
        """Return what calls with these inputs give, one after the other.

        Returns
        -------
        y : (calls * B, ...). scale : (calls * B,). decided : bool (calls * B,)
        """
        different = {id(x): x for x in calls}
        with np.errstate(all="ignore"):  # of what a mistake makes
            made = {key: self.run(x, choices) for key, x in different.items()}
        y = np.concatenate([list(made[id(x)][0].values())[-1] for x in calls])
        size = np.abs(np.where(np.isnan(y), 0.0, y)).max(axis=tuple(range(1, y.ndim)))
        return y, floored(size, self.allowed), np.concatenate([made[id(x)][1] for x in calls])


class LayerNormSubject(Subject):
    """A layer norm, (B, T, D) -> (B, T, D), by ``weight`` and ``bias``."""

    mistakes = NORM

    def __init__(self, named: Mapping[str, Array], allowed: float, eps: float = 1e-5) -> None:
        given = wide(named)
        D = max((array.size for array in given.values()), default=0)
        if given.keys() - {"weight", "bias"} or not given or any(
                array.shape != (D,) for array in given.values()):
            raise UserError("a layer norm's parameters are weight and bias, each (D,), got "
                            f"{_shapes(named)}")
        self.params = Norm(given.get("weight", np.ones(D)), given.get("bias", np.zeros(D)))
        self.names, self.D, self.eps, self.allowed = list(given), D, float(eps), allowed
        self.right = OF_NORM | OF_GRADIENTS | {"eps": self.eps}

    def inputs(self, number: int) -> Array:
        """Return tokens (B, T, D): with a mean far from 0, and of little variance."""
        draw = stream(number, "diagnose")
        x = draw.normal(size=(ROWS, TOKENS, self.D))
        x[:3] += 8.0 * draw.normal(size=(3, TOKENS, 1))
        x[3:9] *= math.sqrt(self.eps) * np.array([1e-3, 0.1, 0.3, 1.0, 3.0, 10.0])[:, None, None]
        return x

    def labels(self, x: Array) -> Array:
        """Return a gradient of the output."""
        return stream(4, "diagnose").normal(size=x.shape)

    def run(self, x: Array, choices: Choices) -> tuple[dict[str, Array], Array]:
        """Return the output, and that nothing hangs on rounding."""
        return {"y": normed(x, self.params, choices)}, np.ones(len(x), bool)

    @property
    def parameters(self) -> list[str]:
        """The names of what `gradients` returns."""
        return [name for name in ("weight", "bias") if name in self.names]

    def gradients(self, x: Array, labels: Array, choices: Choices, call: int = 0
                  ) -> dict[str, Array]:
        """Return the gradients of weight and bias for `labels`, that of the output."""
        check_right(self, choices)
        g = zeros_like(self.params)
        norm_backward(labels, norm_forward(x, self.params, self.eps)[1], self.params, g)
        return {name: each for name, each in zip(("weight", "bias"), g, strict=True)
                if name in self.parameters}


class AttentionSubject(Subject):
    """Attention with the maps before and after it, (B, T, D) -> (B, T, D).

    Its names are those of timm's Attention, ``qkv.weight`` (3 D, D) and ``proj.weight`` (D, D), or
    of PyTorch's MultiheadAttention, ``in_proj_weight`` and ``out_proj.weight``, or ours,
    ``qkv.weight`` and ``out.weight``, each perhaps with a bias.
    """

    def __init__(self, named: Mapping[str, Array], allowed: float, heads: int = 8,
                 causal: bool = False) -> None:
        given = wide(named)
        first = "in_proj_" if "in_proj_weight" in given else "qkv."
        last = next((name for name in ("out_proj", "proj") if f"{name}.weight" in given), "out")
        self.places = {f"{first}weight": "qkv", f"{first}bias": "qkv",
                       f"{last}.weight": "out", f"{last}.bias": "out"}
        unknown = given.keys() - self.places.keys()
        maps = {module: [given.get(name) for name, of in self.places.items() if of == module]
                for module in ("qkv", "out")}
        W: Array = maps["qkv"][0]
        out: Array = maps["out"][0]
        D = 0 if out is None else len(out)
        fits = W is not None and W.shape == (3 * D, D) and out.shape == (D, D) and all(
            b is None or b.shape == (N,) for b, N in ((maps["qkv"][1], 3 * D),
                                                      (maps["out"][1], D)))
        if unknown or not fits:
            raise UserError("attention's parameters are qkv.weight (3 D, D) and out.weight (D, D), "
                            "perhaps with qkv.bias and out.bias, under these names, timm's or "
                            f"those of MultiheadAttention, got {_shapes(named)}")
        if type(heads) is not int or heads < 1 or D % heads:
            raise UserError(f"heads is an integer that divides the width {D}, got {heads!r}")
        self.params = SelfAttention(Linear(*maps["qkv"]), Linear(*maps["out"]))
        self.given, self.heads, self.causal, self.allowed = list(given), heads, causal, allowed
        self.if_nan = NO_KEY * causal
        self.right = OF_ATTENTION | OF_GRADIENTS | {"triangle": "own" if causal else "none"}

    @property
    def mistakes(self) -> list[Mistake]:  # type: ignore[override]
        """What may be wrong, of causal attention or of the other."""
        return of_attention(ATTENTION, self.causal, self.params)

    def inputs(self, number: int) -> Array:
        """Return tokens (B, T, D), of which some are large, and some equal."""
        x = stream(number, "diagnose").normal(size=(ROWS, TOKENS, self.params.out.weight.shape[0]))
        x[:4] *= 3.0
        x[4, 1:] = x[4, 0]
        x[5, 2:4] = 0.0
        return x

    def labels(self, x: Array) -> Array:
        """Return a gradient of the output."""
        return stream(4, "diagnose").normal(size=x.shape)

    def run(self, x: Array, choices: Choices) -> tuple[dict[str, Array], Array]:
        """Return the weights and the output, and that nothing hangs on rounding."""
        y, P = attention(x, self.params, self.heads, choices)
        return {"weights": P, "y": y}, np.ones(len(x), bool)

    @property
    def parameters(self) -> list[str]:
        """The names of what `gradients` returns."""
        return [name for name in self.places if name in self.given]

    def gradients(self, x: Array, labels: Array, choices: Choices, call: int = 0
                  ) -> dict[str, Array]:
        """Return the gradients of the maps for `labels`, that of the output."""
        check_right(self, choices)
        g = zeros_like(self.params)
        _, cache = self_attention_forward(x, self.params, self.heads, self.causal)
        self_attention_backward(labels, cache, self.params, g, self.heads)
        return {name: getattr(getattr(g, module), "bias" if name.endswith("bias") else "weight")
                for name, module in self.places.items() if name in self.parameters}


def normed(x: Array, p: Norm, choices: Choices) -> Array:
    """Return the layer norm of x (..., D)."""
    over = (-2, -1) if choices["norm_axis"] == "tokens too" and x.ndim > 2 else (-1,)
    count = math.prod(x.shape[axis] for axis in over)
    mean = x.mean(axis=over, keepdims=True)
    of_root = x if choices["norm_mean"] == "kept" else x - mean
    variance = (of_root * of_root).mean(axis=over, keepdims=True)
    if choices["variance"] == "unbiased":
        if count == 1:
            raise NotApplicable
        variance = variance * (count / (count - 1))
    root = (np.sqrt(variance + choices["eps"]) if choices["eps_place"] == "inside"
            else np.sqrt(variance) + choices["eps"])
    n = (x if choices["norm_mean"] != "subtracted" else of_root) / root
    if choices["norm_gain"] == "given":
        n = n * p.gain
    return n + p.bias if choices["norm_bias"] == "given" else n


def attention(x: Array, p: SelfAttention, heads: int, choices: Choices) -> tuple[Array, Array]:
    """Return self-attention of tokens x (B, T, D), and its weights (B, H, T, T)."""
    B, T, D = x.shape
    d = D // heads
    qkv = _mapped(x, p.qkv, choices["attention_bias"] in ("given", "qkv only"))
    how = choices["heads"]
    if how == "qkv by head":
        parts = list(qkv.reshape(B, T, heads, 3, d).transpose(3, 0, 2, 1, 4))
    else:
        parts = [_by_head(part, heads, how) for part in np.split(qkv, 3, axis=-1)]
    q, k, v = (parts[choices["qkv"].index(name)] for name in "qkv")  # (B, H, T, d)
    scale = choices["attention_scale"]
    if isinstance(scale, str):
        scale = {"head": 1 / math.sqrt(d), "width": 1 / math.sqrt(D), "none": 1.0}[scale]
    S = scale * (q @ k.swapaxes(-1, -2))  # (B, H, T, T)
    triangle = choices["triangle"]
    seen = not_after(S)
    if triangle == "before":
        seen = seen & ~np.eye(T, dtype=bool)
    if triangle == "next":
        seen = seen | np.eye(T, k=1, dtype=bool)
    if triangle == "after":
        seen = seen.T
    if triangle not in ("none", "after softmax"):
        S = np.where(seen, S, -1e300)  # finite: who sees none sees all alike
    axis = -2 if choices["softmax"] == "queries" else -1
    P = np.exp(S - S.max(axis=axis, keepdims=True))
    P = P / P.sum(axis=axis, keepdims=True)
    if triangle == "after softmax":
        P = P * seen
    y = P @ v  # (B, H, T, d)
    if how == "interleaved":
        y = y.transpose(0, 2, 3, 1).reshape(B, T, D)
    else:
        y = (y if how == "joined untransposed" else y.swapaxes(1, 2)).reshape(B, T, D)
    if choices["attention_out"] == "none":
        return y, P
    W, b = p.out
    out = Linear(W.T if choices["attention_out"] == "transposed" else W, b)
    return _mapped(y, out, choices["attention_bias"] in ("given", "out only")), P


def of_attention(mistakes: Sequence[Mistake], causal: bool, p: SelfAttention) -> list[Mistake]:
    """Return those of the mistakes that one can make with attention, causal or not, like this."""
    both = p.qkv.bias is not None and p.out.bias is not None
    one = p.qkv.bias is not None or p.out.bias is not None
    return [mistake for mistake in mistakes
            if (mistake.decision != "triangle" or causal != (mistake.value == "own"))
            and (mistake.decision != "attention_bias" or both or (one and mistake.value == "none"))]


def check_right(subject: Any, choices: Choices) -> None:
    """Raise NotApplicable unless all decisions about an output are those of the specification.

    Gradients are then those of our own hand-written ones.
    """
    if any(choices[decision] != value for decision, value in subject.right.items()
           if decision not in OF_GRADIENTS):
        raise NotApplicable


def _mapped(x: Array, p: Linear, biased: bool) -> Array:
    y = x @ p.weight.T
    return y + p.bias if biased and p.bias is not None else y


def _by_head(x: Array, heads: int, how: str) -> Array:
    """Return x (B, T, D) head by head, (B, H, T, D / H)."""
    B, T, D = x.shape
    if how.startswith("interleaved"):
        return x.reshape(B, T, D // heads, heads).transpose(0, 3, 1, 2)
    if how == "split untransposed":
        return x.reshape(B, heads, T, D // heads)
    return x.reshape(B, T, heads, D // heads).swapaxes(1, 2)


def wide(named: Mapping[str, Array]) -> dict[str, Array]:
    """Return the arrays in float64."""
    return {str(name): np.asarray(array, "float64") for name, array in named.items()}


def _shapes(named: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {np.shape(array)}" for name, array in named.items()) or "none"
