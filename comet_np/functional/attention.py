"""Multi-head attention, bidirectional and causal: forward and backward."""

import math
from typing import Any, NamedTuple

from ..backends import heads_fit, overridable, weights_shape, xp_of
from ..errors import UserError
from ..rng import Key
from .dropout import dropout_factor
from .linear import Linear, LinearCache, check_cotangent, linear_backward, linear_forward
from .products import multiply
from .softmax import softmax, softmax_gradient

Array = Any


class AttentionCache(NamedTuple):
    """What the backward of attention reads.

    qkv : array (..., T, 3 D). weights : array (..., H, T, T), P. factor : array (..., H, T, T) of
    dropout, or None.
    """

    qkv: Array
    weights: Array
    factor: Array | None


@overridable(cache=AttentionCache)
def attention_forward(qkv: Array, heads: int, causal: bool = False, factor: Array | None = None,
                      compute: str | None = None) -> tuple[Array, AttentionCache]:
    """Return for each token, head by head, a mean of the values of all tokens.

    ``S = Q K^T / sqrt(d)``,  ``P = softmax(S)`` over its rows,  ``Y = (P o F) V``

    of Q, K, V (T, d) in each of the H heads, d = D / H.

    Parameters
    ----------
    qkv : array (..., T, 3 D)
        Queries, keys and values of the tokens side by side, each head by head.
    heads : int
        H, which divides D.
    causal : bool
        Whether a token sees itself and those before it only.
    factor : array (..., H, T, T), optional
        F, of dropout on the weights: `comet_np.functional.dropout.dropout_factor`.
    compute : str, optional
        The format in which products read their operands, see `comet_np.precision.rounded`.

    Returns
    -------
    y : array (..., T, D)
    cache : AttentionCache

    Raises
    ------
    UserError
        If the shapes do not fit together.
    """
    check_heads(qkv, heads)
    check_factor(factor, qkv, heads)
    q, k, v = split_heads(qkv, heads)  # (..., H, T, d)
    S = multiply(q, k.swapaxes(-1, -2), compute) / math.sqrt(q.shape[-1])  # (..., H, T, T)
    P = softmax(S, axis=-1, kept=not_after(S) if causal else None)
    weighted = P if factor is None else P * factor
    y = joined_heads(multiply(weighted, v, compute))  # (..., T, D)
    return y, AttentionCache(qkv, P, factor)


@overridable
def attention_backward(dy: Array, cache: AttentionCache, heads: int,
                       compute: str | None = None) -> Array:
    """Return dqkv (..., T, 3 D) for dy (..., T, D).

    ``dV = (P o F)^T dY``,  ``dP = (dY V^T) o F``,  ``dS_ij = P_ij (dP_ij - sum_k dP_ik P_ik)``,
    ``dQ = dS K / sqrt(d)``,  ``dK = dS^T Q / sqrt(d)``

    Where the forward is causal P is 0, and so is dS. See ``docs/derivations/attention.md``.

    Raises
    ------
    UserError
        If dy does not have the shape of the output.
    """
    qkv, P, factor = cache
    D = qkv.shape[-1] // 3
    check_cotangent(dy, (*qkv.shape[:-1], D))
    q, k, v = split_heads(qkv, heads)
    dy = by_head(dy, heads)  # (..., H, T, d)
    weighted = P if factor is None else P * factor
    dv = multiply(weighted.swapaxes(-1, -2), dy, compute)  # undoes y = weighted v
    dP = multiply(dy, v.swapaxes(-1, -2), compute)
    if factor is not None:
        dP = dP * factor
    dS = softmax_gradient(dP, P, axis=-1) / math.sqrt(q.shape[-1])
    dq = multiply(dS, k, compute)  # undoes S = q k^T / sqrt(d)
    dk = multiply(dS.swapaxes(-1, -2), q, compute)
    xp = xp_of(dy)
    return xp.concatenate([joined_heads(part) for part in (dq, dk, dv)], axis=-1)


def query_attention(q: Array, keys: Array, values: Array, compute: str | None = None) -> Array:
    """Return the attention of one token's queries to what is kept of it and those before it.

    ``y = softmax(q K^T / sqrt(d)) V``

    Parameters
    ----------
    q : array (..., H, 1, d)
    keys, values : arrays (..., H, T, d)
    compute : str, optional

    Returns
    -------
    y : array (..., 1, D), the last row of `attention_forward` on all T tokens, causal
    """
    S = multiply(q, keys.swapaxes(-1, -2), compute) / math.sqrt(q.shape[-1])  # (..., H, 1, T)
    return joined_heads(multiply(softmax(S, axis=-1), values, compute))


def split_heads(qkv: Array, heads: int) -> tuple[Array, Array, Array]:
    """Return queries, keys and values (..., T, 3 D) head by head, each (..., H, T, D / H)."""
    D = qkv.shape[-1] // 3
    q, k, v = (by_head(qkv[..., start:start + D], heads) for start in (0, D, 2 * D))
    return q, k, v


def by_head(x: Array, heads: int) -> Array:
    """Return x (..., T, D) head by head, (..., H, T, D / H)."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-2, -3)


def joined_heads(x: Array) -> Array:
    """Return x (..., H, T, d) with its heads side by side, (..., T, H d)."""
    *lead, H, T, d = x.shape
    return x.swapaxes(-2, -3).reshape(*lead, T, H * d)


def not_after(S: Array) -> Array:
    """Return which of the scores (..., T, T) are of a token itself or one before it: (T, T)."""
    position = xp_of(S).arange(S.shape[-1])
    return position <= position[:, None]


def check_heads(qkv: Array, heads: int) -> None:
    """Raise a UserError unless queries, keys and values can be had of `qkv`."""
    if not heads_fit(qkv, heads):
        raise UserError("attention needs queries, keys and values of at least one token side by "
                        "side, (..., T, 3 D), and a number of heads that divides D, got "
                        f"{qkv.shape} and {heads} heads")


def check_factor(factor: Array | None, qkv: Array, heads: int) -> None:
    """Raise a UserError unless the factor of dropout has the shape of the weights."""
    wanted = weights_shape(qkv, heads)
    if factor is not None and factor.shape != wanted:
        raise UserError(f"the factor of dropout must have the shape of the weights, {wanted}, got "
                        f"{factor.shape}")


# --- the layer: projections before and after ----------------------------------------------------


class SelfAttention(NamedTuple):
    """Parameters: qkv (3 D, D), the maps to queries, keys and values; out (D, D)."""

    qkv: Linear
    out: Linear


class SelfAttentionCache(NamedTuple):
    """What the backward of the layer reads: the caches of its three parts."""

    qkv: LinearCache
    attention: AttentionCache
    out: LinearCache


def self_attention_forward(x: Array, p: SelfAttention, heads: int, causal: bool = False,
                           rate: float = 0.0, key: Key | None = None, step: Array | int = 0,
                           compute: str | None = None) -> tuple[Array, SelfAttentionCache]:
    """Return the attention of the tokens x (..., T, D) to one another, projected: (..., T, D).

    ``qkv = W_qkv x + b_qkv``,  Y by `attention_forward`,  ``y = W_out Y + b_out``

    With a key, weights are dropped with the probability `rate`, as `dropout_forward` says.
    """
    qkv, of_qkv = linear_forward(x, p.qkv, compute)  # (..., T, 3 D)
    factor = None
    if rate and key is not None:
        like = xp_of(x).empty(weights_shape(x, heads), dtype=x.dtype)
        factor = dropout_factor(like, rate, key, step)
    y, of_attention = attention_forward(qkv, heads, causal, factor, compute)
    y, of_out = linear_forward(y, p.out, compute)
    return y, SelfAttentionCache(of_qkv, of_attention, of_out)


def self_attention_backward(dy: Array, cache: SelfAttentionCache, p: SelfAttention,
                            g: SelfAttention, heads: int, compute: str | None = None) -> Array:
    """Return dx (..., T, D) for dy (..., T, D), and add the gradients of the maps into `g`."""
    dy = linear_backward(dy, cache.out, p.out, g.out, compute)
    dqkv = attention_backward(dy, cache.attention, heads, compute)
    return linear_backward(dqkv, cache.qkv, p.qkv, g.qkv, compute)
