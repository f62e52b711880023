"""Tokens of a text and their embedding, the first layer of a GPT: forward and backward."""

import math
from typing import Any, NamedTuple

from ..backends import overridable, tokens_fit, writeable, xp_of
from ..errors import UserError
from .linear import check_cotangent

Array = Any


class TokenEmbedding(NamedTuple):
    """Parameters: a row for each entry of the vocabulary (V, D), and for each position (P, D)."""

    tokens: Array
    positions: Array


class TokenCache(NamedTuple):
    """What the backward of the embedding reads: the tokens, an int array (..., T)."""

    tokens: Array


@overridable(cache=TokenCache)
def tokens_forward(tokens: Array, p: TokenEmbedding, first: int = 0) -> tuple[Array, TokenCache]:
    """Return ``x_t = E[token_t] + P[first + t]``: tokens (..., T) -> x (..., T, D).

    Parameters
    ----------
    tokens : int array (..., T)
        Entries of the vocabulary, 0 to V - 1.
    p : TokenEmbedding
    first : int
        The position of the first token; others than 0 where a text goes on.

    Returns
    -------
    x : array (..., T, D)
    cache : TokenCache

    Raises
    ------
    UserError
        If the tokens are no integers, one is not in the vocabulary, or they are more than there are
        positions.
    """
    check_tokens(tokens, p, first)
    check_token_range(tokens, len(p.tokens))
    T = tokens.shape[-1]
    return p.tokens[tokens] + p.positions[first:first + T], TokenCache(tokens)


@overridable
def tokens_backward(dx: Array, cache: TokenCache, g: TokenEmbedding, first: int = 0) -> None:
    """Add the gradients of both tables into `g`, for dx (..., T, D).

    ``dE[v] += sum over all t with token_t = v of dx_t``,  ``dP[first + t] += sum over texts dx_t``

    A token's sum is taken in the order of the texts, so that it is the same from run to run, bit
    for bit. See ``docs/derivations/tokens.md``.

    Raises
    ------
    UserError
        If a shape does not fit, or `g` cannot be written to.
    """
    tokens = cache.tokens
    check_tokens(tokens, g, first)
    check_cotangent(dx, (*tokens.shape, g.tokens.shape[-1]))
    check_table_gradients(dx, g)
    T, D = dx.shape[-2:]
    xp_of(dx).add.at(g.tokens, tokens.reshape(-1), dx.reshape(-1, D))
    dpositions = g.positions[first:first + T]
    dpositions += dx.reshape(math.prod(dx.shape[:-2]), T, D).sum(axis=0)


def check_tokens(tokens: Array, p: TokenEmbedding, first: int) -> None:
    """Raise a UserError unless tokens of such numbers and places can be looked up."""
    if tokens_fit(tokens, p.tokens, p.positions, first):
        return
    if tokens.ndim and tokens.dtype.kind in "iu" and p.tokens.ndim == p.positions.ndim == 2 and (
            p.tokens.shape[-1] == p.positions.shape[-1] and first + tokens.shape[-1] > len(
                p.positions)):
        raise UserError(f"a text of {first + tokens.shape[-1]} tokens is longer than the context, "
                        f"which is {len(p.positions)}: give fewer tokens, or train a model with "
                        "more positions")
    raise UserError("an embedding needs integer tokens (..., T), tables of the vocabulary (V, D) "
                    "and of positions (P, D), and a first position of at least 0, got "
                    f"{tokens.dtype} {tokens.shape}, {p.tokens.shape}, {p.positions.shape} and "
                    f"{first}")


@overridable
def check_token_range(tokens: Array, V: int) -> None:
    """Raise a UserError unless all tokens lie in 0..V-1 (a GPU tells it later, see `Backend`)."""
    if tokens.size == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= V:
        raise UserError(f"tokens must lie in 0..{V - 1} for a vocabulary of {V}, got {low}..{high}:"
                        " was the text prepared with another tokenizer?")


def check_table_gradients(dx: Array, g: TokenEmbedding) -> None:
    """Raise a UserError unless gradients can be added into the tables of `g`, in their place."""
    for name, total in zip(g._fields, g, strict=True):
        if total.dtype != dx.dtype or not writeable(total):
            raise UserError(f"the gradient of the table of {name} is added in place and must be "
                            f"{dx.dtype} and not read-only, got {total.dtype}: make it by "
                            "comet_np.tree.zeros_like(params)")
