"""All randomness: named streams on the host, and a counter-based generator for masks.

A stream is a function of its seed and name alone, so initial weights, data order and dropout are
the same on every backend, in every order of calls, and after a resume.
"""

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np

from .backends import Backend, xp_of

Array = Any


class Key(NamedTuple):
    """Two 64-bit words that name a stream of `random_bits`."""

    k0: int
    k1: int


def stream(seed: int, *name: str | int) -> np.random.Generator:
    """Return the host generator of the stream called `name` (for example ``"W", 2``)."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_digest(seed, name), "<u8")))


def uniform(backend: Backend, dtype: str, N_in: int, shape: tuple[int, ...], seed: int,
            *name: str | int) -> Array:
    """Return numbers ~ U(-1/sqrt(N_in), 1/sqrt(N_in)) of the stream called `name`.

    They are drawn in float32, so that they are the same in every dtype.
    """
    draw = stream(seed, *name).random(shape, dtype="float32") * 2 - 1
    return backend.asarray(draw * (1 / math.sqrt(N_in)), dtype=dtype)


def normal(backend: Backend, dtype: str, std: float, shape: tuple[int, ...], seed: int,
           *name: str | int) -> Array:
    """Return numbers ~ N(0, std^2) of the stream called `name`, the same in every dtype."""
    draw = stream(seed, *name).standard_normal(shape, dtype="float32")
    return backend.asarray(draw * std, dtype=dtype)


def seed_of(seed: int, *name: str | int) -> int:
    """Return a seed of its own for each part of a model, as ``"block", 2``; `seed` for no name."""
    return int(np.frombuffer(_digest(seed, name), "<u8")[0] >> 1) if name else seed


def key(seed: int, *name: str | int) -> Key:
    """Return the key of the counter-based stream called `name`."""
    k0, k1 = np.frombuffer(_digest(seed, name), "<u8")
    return Key(int(k0), int(k1))


def _digest(seed: int, name: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(repr((int(seed), *name)).encode()).digest()[:16]


# Philox 4x64 with 10 rounds: Salmon et al., 'Parallel random numbers: as easy as 1, 2, 3', 2011.
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW, ALL = 2**32 - 1, 2**64 - 1
WORDS = 8  # 32-bit words a block


def _product(a: int, b: Array) -> tuple[Array, Array]:
    """Return the high and the low 64 bits of a b."""
    a_high, a_low, b_high, b_low = a >> 32, a & LOW, b >> 32, b & LOW
    middle = a_high * b_low + (a_low * b_low >> 32)
    other = a_low * b_high + (middle & LOW)
    return a_high * b_high + (middle >> 32) + (other >> 32), a * b


def philox(counter: tuple[Array, Array, Array, Array], key: Key) -> tuple[Array, ...]:
    """Return four arrays of random 64-bit words for each counter of four 64-bit words.

    Parameters
    ----------
    counter : four uint64 arrays of one shape
    key : Key

    Returns
    -------
    four uint64 arrays of that shape
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(MULTIPLIERS[0], c0), _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & ALL, (k1 + WEYL[1]) & ALL
    return c0, c1, c2, c3


def random_bits(key: Key, n: int, counter: Array) -> Array:
    """Return the first `n` numbers of the key's stream at each counter: uint32 array (..., n).

    Number i is 32-bit word i mod 8, the lowest first, of the Philox block of the counter
    (1 + i // 8, 0, `counter`, 0).

    Parameters
    ----------
    key : Key
    n : int
    counter : int64 array (...), none negative
        Its backend is that of the result.
    """
    xp = xp_of(counter)
    block = xp.arange(1, 1 + -(-n // WORDS), dtype=xp.uint64)
    counter = counter.astype(xp.uint64)[..., None] + xp.zeros_like(block)  # (..., blocks)
    zero = xp.zeros_like(counter)
    words = xp.stack(philox((block + zero, zero, counter, zero), key), axis=-1)
    halves = xp.stack([words & LOW, words >> 32], axis=-1)  # (..., blocks, 4, 2)
    return halves.reshape(*counter.shape[:-1], WORDS * len(block))[..., :n].astype(xp.uint32)
