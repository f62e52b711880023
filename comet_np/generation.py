"""Text from a GPT-2: one token after the other, of which each is computed once.

The keys and values of all tokens so far are kept, block by block, so that a new token costs its own
products and one query. That gives the same logits as `comet_np.models.gpt2.forward` on the whole
text: attention is causal, and a token is routed by itself.
"""

import math
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from .backends import Backend, backend_of
from .errors import UserError
from .functional.attention import attention_forward, query_attention, split_heads
from .functional.linear import linear_forward
from .functional.norm import norm_forward
from .functional.softmax import softmax
from .functional.tokens import check_token_range, tokens_forward
from .gates import EVALUATION
from .models.branch import branch_forward
from .models.gpt2 import GPT2Config, GPT2Params, shapes
from .models.stream import routed
from .rng import stream
from .tree import check_shapes

Array = Any


class Kept(NamedTuple):
    """What is kept of the tokens so far in a block: keys and values, each (B, H, P, d)."""

    keys: Array
    values: Array


def room_for(B: int, tokens: int, config: GPT2Config, backend: Backend,
             dtype: str) -> tuple[Kept, ...]:
    """Return arrays, one pair a block, in which `advance` keeps B texts of so many tokens."""
    shape = (B, config.heads, tokens, config.width // config.heads)
    return tuple(Kept(*(backend.xp.empty(shape, dtype=dtype) for _ in Kept._fields))
                 for _ in range(config.depth))


def advance(tokens: Array, first: int, kept: tuple[Kept, ...], params: GPT2Params, fixed: Any,
            config: GPT2Config) -> Array:
    """Return the logits (B, V) of what follows the last of `tokens`, and keep these.

    Parameters
    ----------
    tokens : int array (B, T)
        The beginning of the texts, with first = 0; later one token of each, T = 1.
    first : int
        How many tokens of each text are kept already.
    kept : tuple of Kept
        As of `room_for`; keys and values of the tokens are written into them.
    params, fixed, config
        See `comet_np.models.gpt2`.
    """
    x, _ = tokens_forward(tokens, params.embedding, first)  # (B, T, D)
    stop = first + tokens.shape[-1]
    for p, one, (keys, values), (masks, V) in zip(
            params.blocks, config.mlps, kept, routed(tokens, fixed, config, None), strict=True):
        y, _ = norm_forward(x, p.attention_norm, config.eps)
        qkv, _ = linear_forward(y, p.attention.qkv, config.compute)  # (B, T, 3 D)
        q, keys[:, :, first:stop], values[:, :, first:stop] = split_heads(qkv, config.heads)
        if first:
            y = query_attention(q, keys[:, :, :stop], values[:, :, :stop], config.compute)
        else:
            y, _ = attention_forward(qkv, config.heads, True, None, config.compute)
        y, _ = linear_forward(y, p.attention.out, config.compute)
        x, _ = branch_forward(x + y, p.mlp_norm, p.mlp, V, one, masks, EVALUATION, config.eps, 0.0)
    x, _ = norm_forward(x[:, -1], params.norm, config.eps)  # (B, D)
    logits, _ = linear_forward(x, params.head, config.compute)
    return logits


def generate(prompt: Array, params: GPT2Params, fixed: Any, config: GPT2Config, count: int,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             seed: int = 0, entries: int | None = None) -> Iterator[np.ndarray]:
    """Return an iterator over the tokens that go on from a prompt, each as soon as it is chosen.

    ``token ~ softmax(logits / temperature)``, of the most probable ones if told so

    The same seed gives the same tokens on every backend, but for rounding.

    Parameters
    ----------
    prompt : int array (T,), or (B, T) of several texts of one length
    params : GPT2Params
    fixed : tree
        As `comet_np.models.gpt2.init` returns it.
    config : GPT2Config
    count : int
        How many tokens. They are fewer if the context becomes full, since a GPT-2 has no positions
        past it: the last token is then the one that follows `config.positions` tokens.
    temperature : float
        0 takes the most probable token always, of equal ones the first.
    top_k, top_p
        See `probabilities`.
    seed : int
    entries : int, optional
        Choose among the first so many entries of the vocabulary only: those of the tokenizer, if
        the model's table was made longer.

    Yields
    ------
    token : int64 array () of a prompt (T,), or (B,), of NumPy

    Raises
    ------
    UserError
        If an argument does not fit, at once; or if logits are not finite.
    """
    check_shapes(params, shapes(config), "this GPT2Config needs GPT2Params")
    backend = backend_of(params.norm.gain)
    tokens = np.asarray(prompt if isinstance(prompt, np.ndarray | list | tuple) else
                        backend.to_host(prompt))
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2) or 0 in tokens.shape:
        raise UserError("a prompt is an array of at least one token, integers (T,), or (B, T) of "
                        f"several texts, got {tokens.dtype} {tokens.shape}")
    check_token_range(tokens, config.vocabulary)
    T = tokens.shape[-1]
    if config.positions < T:
        raise UserError(f"a prompt of {T} tokens is longer than the context, which is "
                        f"{config.positions}: give fewer tokens, the last ones say most")
    if not isinstance(count, Integral) or count < 1:
        raise UserError(f"count is the number of tokens to make, at least 1, got {count!r}")
    if not isinstance(seed, Integral):
        raise UserError(f"a seed is a whole number, got {seed!r}")
    if entries is not None and (not isinstance(entries, Integral)
                                or not 1 <= entries <= config.vocabulary):
        raise UserError(f"entries is a number of tokens, 1 to {config.vocabulary}, got {entries!r}")
    check_choice(temperature, top_k, top_p)
    total = min(int(count), config.positions - T + 1)

    def made() -> Iterator[np.ndarray]:
        draw, new, first = stream(seed, "generation"), np.atleast_2d(tokens).astype("int64"), 0
        kept = room_for(len(new), T + total - 1, config, backend, params.norm.gain.dtype)
        for _ in range(total):
            logits = backend.to_host(
                advance(backend.asarray(new), first, kept, params, fixed, config))
            first += new.shape[1]
            chosen = choose(logits[:, :entries], draw, temperature, top_k, top_p)
            yield chosen.reshape(tokens.shape[:-1]).copy()
            new = chosen[:, None]

    return made()


def choose(logits: np.ndarray, draw: np.random.Generator, temperature: float = 1.0,
           top_k: int | None = None, top_p: float | None = None) -> np.ndarray:
    """Return a token for each row of logits (B, V), as `generate` does: int64 (B,)."""
    if not np.isfinite(logits).all():
        raise UserError("the logits are not finite (NaN or infinity): look for such numbers in the "
                        "weights, or in what the model was trained on")
    if temperature == 0:
        return logits.argmax(axis=-1)
    found = []
    for p, u in zip(probabilities(logits, temperature, top_k, top_p), draw.random(len(logits)),
                    strict=True):
        possible = np.flatnonzero(p)
        total = p[possible].cumsum()
        place = np.searchsorted(total, u * total[-1], side="right")
        found.append(possible[min(place, len(possible) - 1)])
    return np.array(found, "int64")


def probabilities(logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None,
                  top_p: float | None = None) -> np.ndarray:
    """Return with which probability each token is chosen: logits (..., V) -> float64 (..., V).

    Parameters
    ----------
    logits : array (..., V)
    temperature : float above 0
    top_k : int, optional
        Only tokens whose logit is at least the k-th largest.
    top_p : float, optional
        Of these only the smallest set of the most probable ones whose probability reaches p, at
        least one: Holtzman et al., 'The curious case of neural text degeneration', 2020.
    """
    check_choice(temperature, top_k, top_p)
    scores = logits.astype("float64")
    with np.errstate(over="ignore"):  # the smallest temperatures leave the most probable token
        scores = (scores - scores.max(axis=-1, keepdims=True)) / temperature
    V = scores.shape[-1]
    if top_k is not None and top_k < V:
        kth = np.partition(scores, V - top_k, axis=-1)[..., V - top_k, None]
        scores = np.where(scores >= kth, scores, -math.inf)
    p = softmax(scores, axis=-1)
    if top_p is not None and top_p < 1:
        order = np.argsort(-p, axis=-1, kind="stable")
        ranked = np.take_along_axis(p, order, axis=-1)
        before = ranked.cumsum(axis=-1) - ranked
        np.put_along_axis(p, order, np.where(before < top_p, ranked, 0), axis=-1)
        p /= p.sum(axis=-1, keepdims=True)
    return p


def check_choice(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise a UserError unless a token can be chosen so."""
    if not isinstance(temperature, Real) or not 0 <= temperature < math.inf:
        raise UserError("temperature is a finite number of at least 0, where 0 takes the most "
                        f"probable token always, got {temperature!r}")
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise UserError(f"top_k is a number of tokens, at least 1, got {top_k!r}")
    if top_p is not None and (not isinstance(top_p, Real) or not 0 < top_p <= 1):
        raise UserError(f"top_p is a probability above 0, up to 1, got {top_p!r}")
