"""The softmax over any axis: weights that are positive and sum to 1."""

from typing import Any

from ..backends import xp_of

Array = Any


def softmax(a: Array, axis: int, kept: Array | None = None) -> Array:
    """Return ``p_i = exp(a_i) / sum_j exp(a_j)``, i and j along `axis`, in the shape of a.

    With `kept`, a bool array that broadcasts to a, the sum is over the elements that are kept, and
    p is 0 elsewhere: the weights of the others, scaled to the sum 1.
    """
    xp = xp_of(a)
    if kept is not None:
        a = xp.where(kept, a, -xp.inf)
    powers = xp.exp(a - a.real.max(axis=axis, keepdims=True))  # .real: for the complex step
    return powers / powers.sum(axis=axis, keepdims=True)


def softmax_gradient(dp: Array, p: Array, axis: int) -> Array:
    """Return ``da_i = p_i (dp_i - sum_j dp_j p_j)`` for p = softmax(a)."""
    return p * (dp - (dp * p).sum(axis=axis, keepdims=True))
