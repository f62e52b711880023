"""The paper's definitions one number at a time, in plain Python: what other tests compare with."""

import math

import numpy as np


def phi(a):
    return 0.5 * math.erfc(-a / math.sqrt(2))


def sigmoid(a):
    return 1 / (1 + math.exp(-a))


def softplus(a):
    return math.log1p(math.exp(a))


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
