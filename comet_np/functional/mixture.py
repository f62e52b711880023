"""The choice of a mixture of experts: softmax of a gate's scores, of which the largest stays."""

from typing import Any, NamedTuple

from ..backends import xp_of
from .softmax import softmax, softmax_gradient

Array = Any


class WeightCache(NamedTuple):
    """What the backward of a chosen expert's weight reads.

    g : array (..., E), the softmax of the scores. chosen : bool (..., E), one expert an example.
    """

    g: Array
    chosen: Array


def top_1(scores: Array) -> Array:
    """Return the expert with the largest score, int64 (...): of equal ones the lowest index.

    Of scores (..., E). A NaN counts as the largest, so that it reaches the output and the loss.
    """
    return xp_of(scores).argmax(scores, axis=-1)


def one_hot(choice: Array, E: int) -> Array:
    """Return which expert was chosen, bool (..., E), for int (...)."""
    return choice[..., None] == xp_of(choice).arange(E)


def weight_forward(scores: Array, chosen: Array) -> tuple[Array, WeightCache]:
    """Return the weight of the chosen expert: scores (..., E), chosen (..., E) -> (...).

    ``g = exp(s) / sum_j exp(s_j)``,  ``weight = g_e`` of the chosen expert e
    """
    g = softmax(scores, axis=-1)  # (..., E)
    return (g * chosen).sum(axis=-1), WeightCache(g, chosen)


def weight_backward(dweight: Array, cache: WeightCache) -> Array:
    """Return ``ds_j = g_e ([j = e] - g_j) dweight``: dweight (...) -> (..., E).

    The choice is piecewise constant in the scores, so nothing flows through it.
    """
    g, chosen = cache
    return softmax_gradient(dweight[..., None] * chosen, g, axis=-1)
