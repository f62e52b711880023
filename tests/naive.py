"""The paper's definitions one number at a time, in plain Python: what other tests compare with."""

import math
from fractions import Fraction

import numpy as np


def phi(a):
    return 0.5 * math.erfc(-a / math.sqrt(2))


def sigmoid(a):
    return 1 / (1 + math.exp(-a))


def softplus(a):
    return math.log1p(math.exp(a))


def gelu_argument(a):
    return max(-300.0, min(300.0, math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


# f of one number, as the papers that introduced them write it.
ACTIVATIONS = {
    "identity": lambda a: a,
    "relu": lambda a: max(a, 0.0),
    "leaky_relu": lambda a: a if a > 0 else 0.1 * a,
    "tanh": math.tanh,
    "sigmoid": sigmoid,
    "softplus": softplus,
    "silu": lambda a: a / (1 + math.exp(-a)),
    "gelu": lambda a: a * phi(a),
    "gelu_new": lambda a: 0.5 * a * (
        1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "elu": lambda a: a if a > 0 else math.exp(a) - 1,
    "selu": lambda a: 1.0507009873554805 * (
        a if a > 0 else 1.6732632423543772 * (math.exp(a) - 1)),
    "mish": lambda a: a * math.tanh(softplus(a)),
    "centred_sigmoid": lambda a: sigmoid(a) - sigmoid(0),
    "centred_softplus": lambda a: softplus(a) - softplus(0),
}
SLOPES = {  # f' of some of them
    "identity": lambda a: 1.0,
    "relu": lambda a: float(a > 0),
    "tanh": lambda a: 1 / math.cosh(a) ** 2,
    "sigmoid": lambda a: sigmoid(a) * sigmoid(-a),
    "softplus": sigmoid,
    "gelu": lambda a: phi(a) + a * math.exp(-a * a / 2) / math.sqrt(2 * math.pi),
    "gelu_new": lambda a: sigmoid(2 * gelu_argument(a)) + a * math.sqrt(2 / math.pi) * (
        1 + 3 * 0.044715 * a * a) / (2 * math.cosh(gelu_argument(a)) ** 2),
}


def cap(v, k, ties="strict"):
    """Return the cap of one row."""
    mask = np.zeros(len(v), bool)
    for i in range(len(v)):
        if ties == "strict":  # eq. (3)
            mask[i] = sum(v_j >= v[i] for v_j in v) <= k
        elif ties == "threshold":
            mask[i] = sum(v_j > v[i] for v_j in v) < k
        else:
            mask[i] = sum(v_j > v[i] for v_j in v) + sum(v_j == v[i] for v_j in v[:i]) < k
    return mask


def on_grid(row):
    """Return a row, as its exact routing reads it, in whole numbers times a power of two."""
    both = min(14, 24 - math.ceil(math.log2(len(row))))
    bits = both - both // 2
    E = max(-100, min(100, math.frexp(max(map(abs, map(float, row))))[1]))
    unit, most = Fraction(2) ** (E - bits), 2**bits - 1
    return [float(max(-most, min(most, round(Fraction(float(z)) / unit))) * unit) for z in row]


def product(W, x):
    """Return W x of one x, each element summed without rounding."""
    return [math.fsum(w * x_j for w, x_j in zip(row, x, strict=True)) for row in W]


def affine(x, p):
    """Return eq. (1) or (7) of one x: W x + b."""
    bias = [0.0] * len(p.weight) if p.bias is None else p.bias
    return [a + b for a, b in zip(product(p.weight, x), bias, strict=True)]


def network(x, params, name, mask_of):
    """Return the masks and the output of an MLP on one x, eq. (7)-(8).

    ``mask_of(layer, x, a)`` says the mask of a hidden layer, counted from 0, on its input x.
    """
    masks = []
    for layer, p in enumerate(params[:-1]):
        a = affine(x, p)
        masks.append(np.array(mask_of(layer, x, a), bool))
        x = [ACTIVATIONS[name](a_i) if won else 0.0
             for a_i, won in zip(a, masks[-1], strict=True)]
    return masks, affine(x, params[-1])


def norm(x, p, eps=1e-5):
    """Return the layer norm of one x."""
    mean = math.fsum(x) / len(x)
    variance = math.fsum((x_i - mean) ** 2 for x_i in x) / len(x)
    return [(x_i - mean) / math.sqrt(variance + eps) * gain + bias
            for x_i, gain, bias in zip(x, *p, strict=True)]


def embedded(tokens, p, first=0):
    """Return the embeddings (T, D) of the tokens of one text."""
    return [[p.tokens[v][i] + p.positions[first + t][i] for i in range(len(p.tokens[0]))]
            for t, v in enumerate(tokens)]


def softmax(scores):
    """Return the softmax of a few scores."""
    powers = [math.exp(score) for score in scores]
    return [power / math.fsum(powers) for power in powers]


def attention(qkv, heads, causal=False, factor=None):
    """Return y (T, D) of qkv (T, 3 D), and the weights of its heads, one number at a time."""
    T, D = len(qkv), len(qkv[0]) // 3
    d = D // heads
    y, P = np.zeros((T, D)), np.zeros((heads, T, T))
    for head, i in np.ndindex(heads, T):
        q, k, v = ([row[part * D + head * d:][:d] for row in qkv] for part in range(3))
        seen = range(i + 1 if causal else T)
        scores = [math.fsum(a * b for a, b in zip(q[i], k[j], strict=True)) for j in seen]
        weights = softmax([score / math.sqrt(d) for score in scores])
        for j, weight in zip(seen, weights, strict=True):
            P[head, i, j] = weight
            kept = 1 if factor is None else factor[head, i, j]
            y[i, head * d:(head + 1) * d] += weight * kept * v[j]
    return y, P
