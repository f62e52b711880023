"""Dispatch and combine of a soft mixture of experts: slots are mixtures of the tokens, and back.

Puigcerver et al., 'From sparse to soft mixtures of experts', 2023. Both are softmaxes of the same
logits (..., T, E S), T tokens by the S slots of each of E experts: over the tokens, and over the
slots.
"""

from typing import Any, NamedTuple

from .products import multiply
from .softmax import softmax, softmax_gradient

Array = Any


class DispatchCache(NamedTuple):
    """What the backward of the dispatch reads: x (..., T, D), weights (..., T, E S)."""

    x: Array
    weights: Array


class CombineCache(NamedTuple):
    """What the backward of the combination reads: slots (..., E S, D), weights (..., T, E S)."""

    slots: Array
    weights: Array


def dispatch_forward(x: Array, logits: Array,
                     compute: str | None = None) -> tuple[Array, DispatchCache]:
    """Return the inputs of the slots, each a mean of the tokens with weights of its own.

    ``D_ts = exp(l_ts) / sum_u exp(l_us)``,  ``slot_s = sum_t D_ts x_t``

    x (..., T, D), logits (..., T, E S) -> (..., E S, D). `compute` is the format of the product:
    `comet_np.precision.rounded`.
    """
    weights = softmax(logits, axis=-2)
    return multiply(weights.swapaxes(-1, -2), x, compute), DispatchCache(x, weights)


def dispatch_backward(dslots: Array, cache: DispatchCache, compute: str | None = None,
                      input_gradient: bool = True) -> tuple[Array | None, Array]:
    """Return dx (..., T, D), the part of it that does not go through the logits, and dlogits.

    ``dx_t = sum_s D_ts dslot_s``,  ``dD_ts = x_t . dslot_s``,
    ``dl_ts = D_ts (dD_ts - sum_u D_us dD_us)``

    Without `input_gradient` dx is None, and a product is saved.
    """
    x, weights = cache
    dx = multiply(weights, dslots, compute) if input_gradient else None
    dweights = multiply(x, dslots.swapaxes(-1, -2), compute)  # (..., T, E S)
    return dx, softmax_gradient(dweights, weights, axis=-2)


def combine_forward(slots: Array, logits: Array, kept: Array | None = None,
                    compute: str | None = None) -> tuple[Array, CombineCache]:
    """Return for each token the mean of what the slots put out, with weights of its own.

    ``C_ts = exp(l_ts) / sum_r exp(l_tr)``,  ``y_t = sum_s C_ts slot_s``

    slots (..., E S, D), logits (..., T, E S) -> (..., T, D). With `kept`, bool and broadcast to the
    logits, the weights of the slots that are not kept are 0, and those of the others sum to 1.
    """
    weights = softmax(logits, axis=-1, kept=kept)
    return multiply(weights, slots, compute), CombineCache(slots, weights)


def combine_backward(dy: Array, cache: CombineCache,
                     compute: str | None = None) -> tuple[Array, Array]:
    """Return dslots (..., E S, D) and dlogits (..., T, E S) for dy (..., T, D).

    ``dslot_s = sum_t C_ts dy_t``,  ``dC_ts = dy_t . slot_s``,
    ``dl_ts = C_ts (dC_ts - sum_r C_tr dC_tr)``
    """
    slots, weights = cache
    dslots = multiply(weights.swapaxes(-1, -2), dy, compute)
    dweights = multiply(dy, slots.swapaxes(-1, -2), compute)  # (..., T, E S)
    return dslots, softmax_gradient(dweights, weights, axis=-1)
