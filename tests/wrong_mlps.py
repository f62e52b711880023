"""A masked MLP in PyTorch, right as it stands, and one class a mistake that people make in it.

Each class overrides what it does wrong and nothing else, so that two can be inherited from.
"""

import math

import torch
from torch.nn import functional as F

from comet_np.gates import Comet

GELUS = {"gelu": F.gelu, "gelu_new": lambda a: F.gelu(a, approximate="tanh")}
TORCH = {"identity": lambda a: a, "relu": F.relu, "leaky_relu": lambda a: F.leaky_relu(a, 0.1),
         "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "silu": F.silu,
         "elu": F.elu, "selu": F.selu, "mish": F.mish, **GELUS}


class Net:
    """COMET: c_l = V_l z_{l-1}, m_l = C_k(c_l), z_l = m_l o c_l, x_l = m_l o f(W_l x_{l-1} + b_l).

    `gate` "layerwise" takes the scores of x_{l-1}, "top-k" takes a_l for scores; None has no masks.
    """

    scale = output_scale = 1.0

    def __init__(self, named, p_k, ties, activation, gate="comet"):
        self.named = {name: torch.tensor(array) for name, array in named.items()}
        self.L = sum(name.startswith("fc") and name.endswith("weight") for name in named)
        self.p_k, self.ties, self.activation, self.gate = p_k, ties, activation, gate
        self.calls = []

    def __call__(self, x):
        with torch.no_grad():
            return self.forward(torch.tensor(x)).numpy()

    def forward(self, x):
        self.x, self.a, self.c, self.m, self.z = [x], [], [], [], [x]
        self.masks = []
        for layer in range(1, self.L):
            self.a.append(self.linear(layer))
            m = torch.ones_like(self.a[-1])
            if self.gate is not None:
                c = self.scores(layer)
                m = self.cap(c, layer)
                self.masks.append(m)
                self.c.append(c)
                self.z.append(m * c)
                m = self.mask_of(layer, m)
            self.m.append(m)
            self.x.append(self.scale * self.hidden(layer, m))
        self.calls.append(self.masks)
        y = self.output_scale * self.linear(self.L)
        return self.output(self.output_masked(y))

    def linear(self, layer):
        a = self.x[-1] @ self.W(layer).T
        b = self.bias(layer)
        return a if b is None else a + b

    def W(self, layer):
        return self.named[f"fc{layer}.weight"]

    def bias(self, layer):
        return self.named.get(f"fc{layer}.bias")

    def V(self, layer):
        return self.named[f"spec_{layer}.weight"]

    def routed(self, layer):
        """Return what routing scores are taken of."""
        return self.x[-1] if self.gate == "layerwise" else self.z[-1]

    def scores(self, layer):
        if self.gate == "top-k":
            return self.a[-1]
        return self.routed(layer) @ self.V(layer).T + self.routing_bias(layer)

    def routing_bias(self, layer):
        return 0.0

    def cap(self, c, layer):
        return self.winners(c, min(self.count(self.width(layer)), c.shape[-1]))

    def width(self, layer):
        """Return the width of which k is taken."""
        return len(self.W(layer))

    def count(self, N):
        return max(1, int(self.p_k * N))

    def winners(self, c, k):
        kth = torch.topk(c, k).values[..., -1:]
        if self.ties == "threshold":
            return (c >= kth).to(c.dtype)
        if self.ties == "strict":
            return ((c[..., None, :] >= c[..., None]).sum(-1) <= k).to(c.dtype)
        rank = torch.argsort(torch.argsort(c, dim=-1, descending=True, stable=True), dim=-1)
        return (rank < k).to(c.dtype)

    def mask_of(self, layer, m):
        """Return the mask that a layer uses."""
        return m

    def f(self, a):
        return TORCH[self.activation](a)

    def hidden(self, layer, m):
        return m * self.f(self.a[-1])

    def output_masked(self, y):
        return y

    def output(self, y):
        return y


WRONG = {}  # (decision, value) of a mistake -> the class, and the settings of what is right


def wrong(decision, value, **settings):
    """Note a class under the mistake's decision and value."""
    def note(made):
        WRONG[decision, value] = made, settings
        return made
    return note


def other(decision, value, method, function, **settings):
    """Note a class with another method of this name."""
    wrong(decision, value, **settings)(type(f"{decision}_{value}", (Net,), {method: function}))


SQUARE = (13, 13, 13, 13, 13)
HERE = "here"  # of the table's Between, any number

# --- the cap ------------------------------------------------------------------------------------


def by_rank(c, k, order):
    """Return the k largest, of equal ones those that come first in this order."""
    rank = torch.argsort(torch.argsort(c[..., order], dim=-1, descending=True, stable=True), dim=-1)
    return (rank < k).to(c.dtype)[..., torch.argsort(order)]


def any_order(self, c, k):
    return by_rank(c, k, torch.randperm(c.shape[-1], generator=torch.Generator().manual_seed(1)))


def threshold(self, c, k):
    return (c >= torch.topk(c, k).values[..., -1:]).to(c.dtype)


def strict(self, c, k):
    if k == c.shape[-1]:
        return torch.ones_like(c)
    return (c > torch.topk(c, k + 1).values[..., -1:]).to(c.dtype)


other("ties", "threshold", "winners", threshold)
other("ties", "strict", "winners", strict, ties="threshold")
other("ties", "index", "winners", lambda self, c, k: by_rank(c, k, torch.arange(c.shape[-1])))
other("ties", "last", "winners",
      lambda self, c, k: by_rank(c, k, torch.arange(c.shape[-1]).flip(0)))
other("ties", "any", "winners", any_order)
other("k", "round", "count", lambda self, N: max(1, round(self.p_k * N)))
other("k", "ceil", "count", lambda self, N: math.ceil(self.p_k * N))
other("k", "more", "count", lambda self, N: int(self.p_k * N) + 1)
other("k", "less", "count", lambda self, N: max(1, int(self.p_k * N) - 1))
other("k", "complement", "count", lambda self, N: max(1, int((1 - self.p_k) * N)))
other("k_width", "before", "width", lambda self, layer: self.W(layer).shape[1])
other("k_width", "after", "width", lambda self, layer: len(self.W(layer + 1)))
other("k_width", "first", "width", lambda self, layer: len(self.W(1)))


def quantile_count(self, N):
    """Return how many of 0..N-1 are at least their (1 - p_k) quantile."""
    v = torch.arange(N, dtype=torch.float64)
    return int((v >= torch.quantile(v, 1 - self.p_k) - 1e-9).sum())


other("k", "quantile", "count", quantile_count)
other("p_k", HERE, "count", lambda self, N: max(1, int(0.5 * N)))
other("grid", "none", "cap", Net.cap, gate=Comet(0.9, exact=True))


class Cap(Net):
    """The cap of other scores."""

    def cap(self, c, layer):
        return super().cap(self.seen(c), layer)


@wrong("cap", "smallest")
class Smallest(Cap):
    def seen(self, c):
        return -c


@wrong("cap", "magnitude")
class Magnitude(Cap):
    def seen(self, c):
        return c.abs()


@wrong("cap", "inverted")
class Inverted(Net):
    def cap(self, c, layer):
        return 1 - super().cap(c, layer)


@wrong("cap", "argsort")
class Argsort(Net):
    def cap(self, c, layer):
        k = min(self.count(self.width(layer)), c.shape[-1])
        return (torch.argsort(-c, stable=True) < k).to(c.dtype)


@wrong("cap", "argsort ascending")
class Ascending(Net):
    def cap(self, c, layer):
        k = min(self.count(self.width(layer)), c.shape[-1])
        return (torch.argsort(c, stable=True) >= c.shape[-1] - k).to(c.dtype)


@wrong("axis", "batch")
class OverBatch(Net):
    def cap(self, c, layer):
        return self.winners(c.T, int(self.p_k * len(c))).T


# --- the mask -----------------------------------------------------------------------------------

other("mask", "before", "hidden", lambda self, layer, m: self.f(m * self.a[-1]))
other("mask", "none", "hidden", lambda self, layer, m: self.f(self.a[-1]))
other("mask", "scores", "hidden", lambda self, layer, m: m * self.c[-1] * self.f(self.a[-1]))
other("mask", "not first", "hidden",
      lambda self, layer, m: (m if layer > 1 else 1) * self.f(self.a[-1]))
other("mask", "not last", "hidden",
      lambda self, layer, m: (m if layer < self.L - 1 else 1) * self.f(self.a[-1]))


@wrong("mask", "before bias")
class BeforeBias(Net):
    def hidden(self, layer, m):
        a, b = self.x[-1] @ self.W(layer).T, self.bias(layer)
        return self.f(m * a if b is None else m * a + b)


class OutputMasked(Net):
    def output_masked(self, y):
        return y * self.cap(self.output_scores(), self.L)


@wrong("output_mask", "routed")
class OutputRouted(OutputMasked):
    def output_scores(self):
        return self.scores(self.L)


@wrong("output_mask", "own")
class OutputOwn(OutputMasked):
    def output_scores(self):
        return self.linear(self.L)


# --- routing ------------------------------------------------------------------------------------

other("routing", "backbone", "routed", lambda self, layer: self.x[-1])
other("routing", "backbone unmasked", "routed",
      lambda self, layer: self.x[0] if layer == 1 else self.scale * self.f(self.a[layer - 2]))
other("routing", "unmasked", "routed", lambda self, layer: self.c[-1] if self.c else self.x[0])
other("routing", "activated", "routed",
      lambda self, layer: self.m[-1] * self.f(self.c[-1]) if self.c else self.x[0])
other("routing", "input", "routed", lambda self, layer: self.x[0], widths=SQUARE)
other("routing", "z", "routed", lambda self, layer: self.z[-1], gate="layerwise")
other("routing", "activation", "scores", lambda self, layer: self.f(self.a[-1]), gate="top-k",
      activation="mish")
other("routing", "pre-activation", "scores", lambda self, layer: self.a[-1],
      activation="mish")
other("routing_bias", "own", "routing_bias", lambda self, layer: self.named[f"spec_{layer}.bias"])
other("routing_bias", "backbone", "routing_bias", lambda self, layer: self.bias(layer))
other("V", "transposed", "V", lambda self, layer: Net.V(self, layer).T, widths=SQUARE)
other("V", "W", "V", lambda self, layer: self.named[f"fc{layer}.weight"])
other("W", "transposed", "W", lambda self, layer: Net.W(self, layer).T, widths=SQUARE)

# --- the rest -----------------------------------------------------------------------------------

other("activation", ("softplus", HERE), "f", lambda self, a: F.softplus(a, 1.7))
other("activation", ("leaky_relu", HERE), "f", lambda self, a: F.leaky_relu(a, 0.2),
      activation="leaky_relu")
other("activation", ("leaky_relu", 0.01), "f", lambda self, a: F.leaky_relu(a))
for name, f in TORCH.items():
    def method(self, a, f=f):
        return f(a)

    other("activation", name, "f", method, activation="relu" if name == "softplus" else "softplus")
for name, f in GELUS.items():
    def method(self, a, f=f):
        return f(a)

    wrong("gelu", name, activation="gelu" if name == "gelu_new" else "gelu_new")(
        type(name, (Net,), {"f": method}))
other("output", "activated", "output", lambda self, y: self.f(y))
other("output", "relu", "output", lambda self, y: torch.relu(y))
other("output", "sigmoid", "output", lambda self, y: torch.sigmoid(y))
other("output", "tanh", "output", lambda self, y: torch.tanh(y))
other("output", "softplus", "output", lambda self, y: torch.nn.functional.softplus(y),
      activation="tanh")
other("output", "softmax", "output", lambda self, y: torch.softmax(y, -1))
other("output", "log-softmax", "output", lambda self, y: torch.log_softmax(y, -1))
other("bias", "none", "bias", lambda self, layer: None)
other("bias", "hidden only", "bias",
      lambda self, layer: Net.bias(self, layer) if layer < self.L else None)
other("bias", "output only", "bias",
      lambda self, layer: Net.bias(self, layer) if layer == self.L else None)


@wrong("masks", "previous")
class Previous(Net):
    def mask_of(self, layer, m):
        return self.calls[-1][layer - 1] if self.calls else m


@wrong("masks", "first")
class First(Net):
    def mask_of(self, layer, m):
        return self.calls[0][layer - 1] if self.calls else m


other("hidden_scale", HERE, "scale", 1 / 0.9)
other("output_scale", HERE, "output_scale", 0.5)
