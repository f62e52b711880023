"""The MLP as a function of decisions, in plain NumPy and float64: outputs and gradients.

With the decisions of `MLP.right` this is eq. (1)-(8), and a test holds it against
`comet_np.models.mlp`; with another value of one of them it is what a mistake computes.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, unknown
from ..functional.activations import ACTIVATIONS, activation, sigmoid, softplus
from ..functional.routing import grid_bits, on_grid
from ..gates import Comet, Gate, Layerwise, TopK
from ..rng import stream
from .mistakes import ACTIVATION, GRADIENTS, MLP, Choices, Mistake
from .search import NotApplicable, floored

Array = Any
TRANSPOSED = " (is it transposed? pass .T)"
NAME = re.compile(r"(fc|spec_)(\d+)\.(weight|bias)")
ROWS = 64  # of a batch
LOSSES = ("cross_entropy", "mse")
OF_OUTPUT = ("W", "output", "bias", "output_mask", "output_scale")  # there without hidden layers
WITHOUT_GATE = ("W", "activation", "output", "bias", "hidden_scale", "output_scale")
ROUTING = {Comet: "z", Layerwise: "backbone", TopK: "pre-activation"}


class Forward(NamedTuple):
    """Every intermediate of a forward pass, by its name in the paper, a list over the layers.

    x : x_0..x_{L-1}. a : a_1..a_L. c, m, z : of the hidden layers. slope : dh/da of the hidden
    layers. y : what the network returns. size : (B,), that of y or of the terms of its sums, as
    rounding is as large as these. decided : bool (B,), whether no mask hangs on rounding.
    """

    x: list[Array]
    a: list[Array]
    c: list[Array]
    m: list[Array]
    z: list[Array]
    slope: list[Array]
    y: Array
    size: Array
    decided: Array


class MLPSubject:
    """An MLP whose weights are given, to be checked.

    Parameters
    ----------
    named : mapping of str to array
        ``fc{l}.weight`` (N_l, N_{l-1}), ``fc{l}.bias``, ``spec_{l}.weight`` and perhaps
        ``spec_{l}.bias``.
    gate : Comet, Layerwise, TopK or None
    f : str
        The activation.
    allowed : float
        What a relative difference may be: scores nearer than that are not ordered.
    scale : float
        Of the hidden activations.
    loss : {"cross_entropy", "mse"}
        Of `gradients`.
    """

    unit = "rows"
    if_nan = ""
    numbers_in_pairs = True

    def __init__(self, named: Mapping[str, Array], gate: Gate | None, f: str,
                 allowed: float, scale: float = 1.0, loss: str = "cross_entropy") -> None:
        if gate is not None and type(gate) not in ROUTING:
            raise UserError("diagnose knows the gates Comet, Layerwise, TopK and None, got "
                            f"{type(gate).__name__}")
        if isinstance(gate, Comet) and gate.router != "dense":
            raise UserError('diagnose knows the router of the paper, Comet(router="dense"), got '
                            f"{gate}")
        if loss not in LOSSES:
            raise unknown("loss", loss, LOSSES)
        activation(f)
        self.gate, self.f, self.allowed, self.scale, self.loss = gate, f, allowed, scale, loss
        self.g = activation(getattr(gate, "g", "identity")).forward
        layers = {kind: _layers(named, *kind.split()) for kind in
                  ("fc weight", "fc bias", "spec_ weight", "spec_ bias")}
        self.W = list(layers["fc weight"].values())
        self.L = len(self.W)
        if not self.W or list(layers["fc weight"]) != list(range(1, self.L + 1)):
            raise UserError("the layers' weights are fc1.weight to fcL.weight, got "
                            f"{', '.join(map(str, named)) or 'none'}")
        self.V, self.V_bias = layers["spec_ weight"], layers["spec_ bias"]
        self.b = [layers["fc bias"].get(layer) for layer in range(1, self.L + 1)]
        self._check_shapes(layers)
        self._products: dict[tuple[str, int], Array] = {}

    def _check_shapes(self, layers: Mapping[str, Mapping[int, Array]]) -> None:
        """Raise a UserError unless the parameters fit together; note the widths."""
        for kind, arrays in layers.items():
            name, part = kind.split()
            for layer, array in arrays.items():
                if array.ndim != (2 if part == "weight" else 1):
                    raise UserError(f"{name}{layer}.{part} must have "
                                    f"{2 if part == 'weight' else 1} axes, got shape {array.shape}")
        shapes = [W.shape for W in self.W]
        pairs = list(enumerate(pairwise(shapes), start=2))
        for layer, (before, W) in pairs:
            if W[1] != before[0]:
                turned = W[0] == before[0] or all(one[1] == two[0] for _, (one, two) in pairs)
                raise UserError(
                    f"fc{layer}.weight is (N_l, N_{{l-1}}) and should have {before[0]} columns, "
                    f"the rows of fc{layer - 1}.weight, got {W}" + TRANSPOSED * turned)
        self.widths = widths = (shapes[0][1], *(rows for rows, _ in shapes))
        for layer, b in layers["fc bias"].items():
            if layer > self.L or b.shape != (widths[layer],):
                turned = layer <= self.L and len(b) == widths[layer - 1]
                raise UserError(f"fc{layer}.bias does not belong to a layer of these widths, "
                                f"{widths}: got shape {b.shape}" + TRANSPOSED * turned)
        if not isinstance(self.gate, Comet | Layerwise):
            return
        missing = [f"spec_{layer}.weight" for layer in range(1, self.L) if layer not in self.V]
        if missing:
            raise UserError(f"the routing weights V are missing: {', '.join(missing)}")
        for layer in range(1, self.L):
            N_in, N = widths[layer - 1:layer + 1]
            V = self.V[layer].shape
            if V not in ((N, N_in), (N, widths[0])):  # the latter routes from the input
                raise UserError(f"spec_{layer}.weight is (N_l, N_{{l-1}}) and should have the "
                                f"shape {N, N_in}, got {V}" + TRANSPOSED * ((N_in, N) == V))
            if isinstance(self.gate, Comet):
                self.gate.check(f"spec_{layer}.weight", self.V[layer])

    @property
    def right(self) -> Choices:
        """The decisions of the specification."""
        routing = ROUTING[type(self.gate)] if self.gate else "none"
        if getattr(self.gate, "of", None) == "activation":
            routing = "activation"
        exact = getattr(self.gate, "exact", False)
        return {"ties": getattr(self.gate, "ties", "strict"), "k": "floor", "k_width": "own",
                "p_k": getattr(self.gate, "p_k", 1.0), "grid": "rows" if exact else "none",
                "cap": "largest", "axis": "neurons", "mask": "after" if self.gate else "none",
                "output_mask": "none", "routing": routing, "routing_bias": "none", "V": "given",
                "W": "given", "activation": self.f, "output": "logits", "bias": "given",
                "masks": "fresh", "hidden_scale": self.scale, "output_scale": 1.0, "loss": "mean",
                "through": "function", "derivative": "input", "bias_gradient": "sum",
                "calls": "fresh", "detached": "none", "V_gradient": "none"}

    @property
    def mistakes(self) -> list[Mistake]:
        """What may be wrong with an output, the likeliest first."""
        return [mistake for mistake in MLP
                if (self.gate or mistake.decision in WITHOUT_GATE)
                and (self.L > 1 or mistake.decision in OF_OUTPUT)
                and (mistake not in ACTIVATION or _fits(mistake, self.f))
                and (mistake.decision, mistake.value) != ("output", self.f)]

    @property
    def gradient_mistakes(self) -> tuple[Mistake, ...]:
        """What may be wrong with gradients."""
        return GRADIENTS

    @property
    def parameters(self) -> list[str]:
        """The names of what is trained, in the order of computation."""
        return [f"fc{layer}.{part}" for layer in range(1, self.L + 1)
                for part in ("weight", "bias")[:1 + (self.b[layer - 1] is not None)]]

    def at(self, named: Mapping[str, Array]) -> "MLPSubject":
        """Return this network with other weights."""
        return MLPSubject(named, self.gate, self.f, self.allowed, self.scale, self.loss)

    def inputs(self, number: int) -> Array:
        """Return a batch (B, N_0) on which mistakes show, another one for each number.

        Of it zero rows have ties in all layers, and of nearly empty ones most scores are small.
        """
        draw = stream(number, "diagnose")
        N_0 = self.widths[0]
        x = draw.normal(size=(ROWS, N_0))
        x[:4] = 0.0
        x[2] = -0.0
        for row in range(4, 16):
            x[row, draw.permutation(N_0)[max(1, row // 6):]] = 0.0
        x[16], x[17] = 1.0, -1.0
        x[18:26] *= 4.0
        x[26:32] *= 0.1
        return x[draw.permutation(ROWS)]

    def shape(self, x: Array) -> tuple[int, ...]:
        """Return the shape of the output for x."""
        return len(x), self.widths[-1]

    def jittered(self, eps: float, number: int) -> "MLPSubject":
        """Return the network with weights and biases moved by eps, relative, up or down."""
        draw, rough = stream(number, "diagnose", "jitter"), copy.copy(self)
        rough._products = {}
        rough.W = [W * (1 + draw.choice([-eps, eps], W.shape)) for W in self.W]
        rough.b = [b if b is None else b * (1 + draw.choice([-eps, eps], b.shape)) for b in self.b]
        return rough

    def labels(self, x: Array) -> Array:
        """Return labels (B,) of these inputs, or targets (B, N_L) of the squared error."""
        draw = stream(4, "diagnose")
        if self.loss == "mse":
            return draw.normal(size=(len(x), self.widths[-1])).astype(x.dtype)
        return draw.integers(0, self.widths[-1], len(x))

    def intermediates(self, x: Array, choices: Choices) -> tuple[dict[str, Array], Array]:
        """Return by name, in the order of computation, what `forward` computes; and `decided`."""
        made = self.forward(x, choices)
        found = {}
        for layer, a in enumerate(made.a, start=1):
            if layer < self.L:
                if self.gate is not None:
                    for name in ("c", "m", "z"):
                        found[f"{name}_{layer}"] = getattr(made, name)[layer - 1]
                found[f"a_{layer}"], found[f"x_{layer}"] = a, made.x[layer]
            else:
                found[f"a_{layer}"] = a
        return found, made.decided

    def outputs(self, calls: Sequence[Array], choices: Choices) -> tuple[Array, Array, Array]:
        """Return what calls with these inputs give, one after the other.

        Returns
        -------
        y : (calls * B, N_L). scale : (calls * B,). decided : bool (calls * B,)
        """
        if choices["axis"] == "batch" and any(len(x) != ROWS for x in calls):
            raise NotApplicable  # of some rows of a batch
        passes: list[Forward] = []
        for i, x in enumerate(calls):
            fresh = self.forward(x, choices)
            before = {"fresh": i, "previous": max(i - 1, 0), "first": 0}[choices["masks"]]
            if before < i:
                stale = self.forward(calls[before], choices)
                fresh = self.forward(x, choices, stale.m)._replace(decided=stale.decided)
            passes.append(fresh)
        y = np.concatenate([each.y for each in passes])
        size = np.concatenate([each.size for each in passes])
        return y, floored(size, self.allowed), np.concatenate([each.decided for each in passes])

    def forward(self, x: Array, choices: Choices, masks: Sequence[Array] | None = None) -> Forward:
        """Return all that the network computes of x (B, N_0)."""
        f, df = _activation(choices["activation"])
        made = Forward([x], [], [], [], [], [], x, x, np.ones(len(x), bool))
        decided, scale = made.decided, choices["hidden_scale"]
        for layer in range(1, self.L):
            a = self._pre_activation(made.x[-1], layer, choices)
            if self.gate is None:
                c = m = np.ones_like(a)
            else:
                c = self._scores(layer, made, a, choices)
                if c.shape != a.shape:
                    raise NotApplicable
                m, sure = self._cap(c, layer, choices)
                if masks is None:
                    decided = decided & sure
                else:
                    m = masks[layer - 1]
            place = choices["mask"]
            if place == "not first":
                place = "none" if layer == 1 else "after"
            if place == "not last":
                place = "none" if layer == self.L - 1 else "after"
            if place in ("before", "before bias"):
                masked = m * a
                if place == "before bias" and self.b[layer - 1] is not None and self._has_bias(
                        layer, choices):
                    masked = masked + (1 - m) * self.b[layer - 1]
                h, slope = f(masked), m * df(masked)
            else:
                factor = {"after": m, "none": 1.0, "scores": m * c}[place]
                h, slope = factor * f(a), factor * df(a)
            if choices["derivative"] == "output":
                slope = m * df(f(a))
            if choices["derivative"] == "none":
                slope = m * np.ones_like(a)
            if choices["through"] == "mask":
                slope = df(a)
            values = scale * h, a, c, m, m * self.g(c), scale * slope
            for made_list, value in zip(made[:6], values, strict=True):
                made_list.append(value)
        a = self._pre_activation(made.x[-1], self.L, choices)
        made.a.append(a)
        y = choices["output_scale"] * a
        if choices["output_mask"] != "none":
            c = a if choices["output_mask"] == "own" else self._scores(self.L, made, a, choices)
            m, sure = self._cap(c, self.L, choices)
            y, decided = y * m, decided & sure
        if choices["output"] == "activated":
            y = f(y)
        elif choices["output"] in ACTIVATIONS:
            y = activation(choices["output"]).forward(y)
        elif choices["output"] != "logits":
            y = log_softmax(y)
            y = np.exp(y) if choices["output"] == "softmax" else y
        size = np.abs(y).max(axis=1)
        if choices["output"] == "logits":
            terms = made.x[-1]**2 @ self.W[-1].T**2 if choices["W"] == "given" else 0 * a
            size = np.maximum(size, abs(choices["output_scale"]) * np.sqrt(terms.max(axis=1)))
        return made._replace(y=y, size=size, decided=decided)

    def gradients(self, x: Array, labels: Array, choices: Choices, call: int = 0
                  ) -> dict[str, Array]:
        """Return the gradients of the loss of x (B, N_0), labels (B,) by W_l and b_l.

        `call` says which call of the same x this is: gradients that are not set to zero add up.
        """
        made = self.forward(x, choices)
        da = self._output_gradient(made.y, labels, choices) * choices["output_scale"]
        if choices["calls"] == "accumulate":
            da = (call + 1) * da
        dc = np.zeros_like(da)  # of the layer after
        grads = {}
        for layer in range(self.L, 0, -1):
            W = self.W[layer - 1]
            transposed = choices["W"] == "transposed"
            dW = da.T @ made.x[layer - 1]
            grads[f"fc{layer}.weight"] = dW.T if transposed else dW
            if self.b[layer - 1] is not None:
                used = self._has_bias(layer, choices)
                db = da.sum(axis=0) * used
                grads[f"fc{layer}.bias"] = {"mean": db / len(x), "none": 0 * db}.get(
                    choices["bias_gradient"], db)
            if layer > 1:
                dx = da @ (W.T if transposed else W)
                if layer < self.L and self._routes_by_input(choices):
                    dx = dx + dc @ self.V[layer]
                if choices["detached"] == "last" or (choices["detached"] == "first"
                                                     and layer == 2):
                    dx = 0 * dx
                da = dx * made.slope[layer - 2]
                dc = self._score_gradient(dx, made, layer - 1, choices)
                if choices["routing"] == "pre-activation":
                    da = da + dc
        return {name: grads[name] for name in self.parameters}

    def _output_gradient(self, y: Array, labels: Array, choices: Choices) -> Array:
        """Return the gradient of the loss by the logits, (B, N_L)."""
        if choices["output"] not in ("logits", "log-softmax") or choices["output_mask"] != "none":
            raise NotApplicable  # whose gradient is of no use: the output comes first
        (B, N), loss = y.shape, choices["loss"]
        if self.loss == "cross_entropy":
            return cross_entropy_gradient(y, labels, loss)
        of = {each: factor / N for each, factor in _of_mean(B).items()} | {
            "sum": 1.0, "halved": 0.5 / (B * N), "sum over outputs": 1 / B}
        if loss not in of or choices["output"] != "logits":
            raise NotApplicable
        return of[loss] * 2 * (y - labels)

    def _routes_by_input(self, choices: Choices) -> bool:
        """Return whether scores are V x_{l-1}, through which a gradient could flow back."""
        return choices["routing"] == "backbone" and choices["V"] == "given"

    def _score_gradient(self, dx: Array, made: Forward, layer: int, choices: Choices) -> Array:
        """Return the gradient by the scores of a layer, which a mask has none of: (B, N_l)."""
        if choices["through"] not in ("identity", "sigmoid"):
            return np.zeros_like(dx)
        if choices["mask"] != "after" or not (self._routes_by_input(choices)
                                              or choices["routing"] == "pre-activation"):
            raise NotApplicable  # scores do not depend on what is trained
        f, _ = _activation(choices["activation"])
        c = made.c[layer - 1]
        slope = sigmoid(c) * (1 - sigmoid(c)) if choices["through"] == "sigmoid" else 1.0
        return dx * choices["hidden_scale"] * f(made.a[layer - 1]) * slope

    def _has_bias(self, layer: int, choices: Choices) -> bool:
        return {"given": True, "none": False, "hidden only": layer < self.L,
                "output only": layer == self.L}[choices["bias"]]

    def _pre_activation(self, x: Array, layer: int, choices: Choices) -> Array:
        """Return a_l = W_l x_{l-1} + b_l, (B, N_l)."""
        a = self._product(x, self.W[layer - 1], layer, "W", choices["W"])
        b = self.b[layer - 1]
        return a + b if b is not None and self._has_bias(layer, choices) else a

    def _product(self, x: Array, W: Array, layer: int, name: str, how: str,
                 grid: str = "none") -> Array:
        """Return W x for rows x; of the first layer, on which most time goes, once an input."""
        if how == "transposed":
            if W.shape[0] != W.shape[1]:
                raise NotApplicable
            W = W.T
        if x.shape[1] != W.shape[1]:
            raise NotApplicable
        key = f"{name} {how} {grid}", id(x)
        if layer == 1 and key in self._products and self._products[key][0] is x:
            return self._products[key][1]
        z = on_grid(x, grid_bits(x.shape[1]).z) if grid == "rows" else x
        product = z @ W.T
        if layer == 1:
            self._products[key] = x, product
        return product

    def _scores(self, layer: int, made: Forward, a: Array, choices: Choices) -> Array:
        """Return the scores c_l (B, N_l) that are capped."""
        f, _ = _activation(choices["activation"])
        routing = choices["routing"]
        if routing in ("pre-activation", "activation"):
            return a if routing == "pre-activation" else f(a)
        if layer == 1 or routing == "input":
            z = made.x[0]
        elif routing == "backbone unmasked":
            z = choices["hidden_scale"] * f(made.a[-1])
        else:
            z = {"z": made.z, "backbone": made.x}.get(routing, [None])[-1]
            if routing == "unmasked":
                z = self.g(made.c[-1])
            if routing == "activated":
                z = made.m[-1] * f(made.c[-1])
        how = choices["V"]
        if how == "W":
            c = self._product(z, self.W[layer - 1], layer, "W", "given")
        elif layer not in self.V:
            raise NotApplicable
        else:
            c = self._product(z, self.V[layer], layer, "V", how, choices["grid"])
        if choices["routing_bias"] != "none":
            b = (self.V_bias.get(layer) if choices["routing_bias"] == "own" else self.b[layer - 1])
            if b is None:
                raise NotApplicable
            c = c + b
        return c

    def _cap(self, c: Array, layer: int, choices: Choices) -> tuple[Array, Array]:
        """Return the mask (B, N_l), and (B,) whether it does not hang on rounding."""
        if choices["cap"] == "smallest":
            c = -c
        elif choices["cap"] == "magnitude":
            c = np.abs(c)
        if choices["axis"] == "batch":
            m, sure = winners_of(c.T, count(choices["p_k"], len(c), "floor"), choices["ties"],
                                 self.allowed)
            return m.T, np.full(len(c), sure.all())
        of = {"own": layer, "before": layer - 1, "after": layer + 1, "first": 1}[choices["k_width"]]
        N = self.widths[min(of, self.L)]
        k = min(count(choices["p_k"], N, choices["k"]), c.shape[1])
        if choices["cap"].startswith("argsort"):
            return argsort_of(c, k, choices["cap"] == "argsort", self.allowed)
        m, sure = winners_of(c, k, choices["ties"], self.allowed)
        return (1 - m if choices["cap"] == "inverted" else m), sure


def count(p_k: float, N: int, how: str) -> int:
    """Return k of a layer of N neurons."""
    if how == "quantile":  # N - k scores lie below it
        return N - math.ceil((1 - p_k) * (N - 1) - 1e-9)
    share = 1 - p_k if how == "complement" else p_k
    k = math.ceil(share * N) if how == "ceil" else (
        round(share * N) if how == "round" else int(share * N))
    return max(1, k + {"more": 1, "less": -1}.get(how, 0))


def winners_of(c: Array, k: int, ties: str, allowed: float) -> tuple[Array, Array]:
    """Return eq. (3) of rows c (B, N), and whether the k-th score is clearly above the next.

    Scores that are equal are so for a reason, as in a row of zeros: that is no matter of rounding.
    """
    N = c.shape[1]
    if k >= N:
        return np.ones_like(c), np.ones(len(c), bool)
    order = np.sort(c, axis=1)
    kth, after = order[:, N - k, None], order[:, N - k - 1, None]
    gap = (kth - after)[:, 0]
    sure = (gap == 0) | (gap > allowed * np.abs(c).max(axis=1))
    if ties == "strict":
        return (c > after).astype(float), sure
    if ties == "threshold":
        return (c >= kth).astype(float), sure
    if ties == "any":
        # Whatever is seen in the other rows, it does not agree with this.
        return np.where(gap[:, None] > 0, c >= kth, np.nan), sure & (gap > 0)
    if ties == "last":
        m, _ = winners_of(c[:, ::-1], k, "index", allowed)
        return m[:, ::-1], sure
    places = k - (c > kth).sum(axis=1, keepdims=True)
    tied = c == kth
    return ((c > kth) | (tied & (tied.cumsum(axis=1) <= places))).astype(float), sure


def argsort_of(c: Array, k: int, descending: bool, allowed: float) -> tuple[Array, Array]:
    """Return the k first places, or last, of the argsort of rows c where ranks were meant.

    All places hang on rounding if any two scores of a row are nearly equal.
    """
    order = np.argsort(-c if descending else c, axis=1, kind="stable")
    gaps = np.diff(np.sort(c, axis=1), axis=1).min(axis=1, initial=np.inf)
    m = order < k if descending else order >= c.shape[1] - k
    return m.astype(float), gaps > allowed * np.abs(c).max(axis=1)


def _of_mean(B: int) -> dict[str, float]:
    """Return the factor of each example's loss, by what the loss over a batch is."""
    return {"mean": 1 / B, "sum": 1.0, "mean twice": 1 / B**2, "negated": -1 / B}


def cross_entropy_gradient(y: Array, labels: Array, loss: str) -> Array:
    """Return the gradient of a cross-entropy by the logits y (B, N), labels (B,)."""
    B, N = y.shape
    of = _of_mean(B) | {"mean over classes": 1 / (B * N), "softmax twice": 1 / B}
    if loss not in of:
        raise NotApplicable
    target = np.eye(N)[labels]
    p = np.exp(log_softmax(y))
    dy = p - target
    if loss == "softmax twice":
        q = np.exp(log_softmax(p)) - target
        dy = p * (q - (q * p).sum(axis=1, keepdims=True))
    return of[loss] * dy


def log_softmax(a: Array) -> Array:
    """Return the logarithm of the softmax of the rows of a."""
    a = a - a.max(axis=1, keepdims=True)
    return a - np.log(np.exp(a).sum(axis=1, keepdims=True))


def _activation(name: Any) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Return f and f' of a name, or of a name and its number."""
    if isinstance(name, str):
        f = activation(name)
        return f.forward, f.derivative
    kind, number = name
    if kind == "softplus":
        return (lambda a: softplus(number * a) / number), (lambda a: sigmoid(number * a))
    return (lambda a: np.where(a > 0, a, number * a)), (lambda a: np.where(a > 0, 1.0, number))


def _fits(mistake: Mistake, f: str) -> bool:
    """Return whether this is a mistake that one makes with the activation f."""
    if mistake.name == "softplus-beta":
        return f == "softplus"
    if mistake.name == "leaky-slope" or (f == "leaky_relu" and type(mistake.value) is tuple):
        return f == "leaky_relu" and mistake.name == "leaky-slope"
    gelu = f in ("gelu", "gelu_new")
    if mistake.name == "gelu-form":
        return gelu
    return not (gelu and mistake.value in ("gelu", "gelu_new"))


def _layers(named: Mapping[str, Array], kind: str, part: str) -> dict[int, Array]:
    """Return the arrays of this kind in float64, by their layer, in order."""
    found = {}
    for name, array in named.items():
        match = NAME.fullmatch(str(name))
        if match and match[1] == kind and match[3] == part:
            found[int(match[2])] = np.asarray(array, "float64")
    return dict(sorted(found.items()))
