"""All randomness: named streams on the host, and a counter-based generator for masks.

A stream is a function of its seed and name alone, so initial weights, data order and dropout are
the same on every backend, in every order of calls, and after a resume.
"""

import hashlib
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

Array = Any


class Key(NamedTuple):
    """Two 32-bit words that name a stream of `random_bits`."""

    k0: int
    k1: int


def stream(seed: int, *name: str | int) -> np.random.Generator:
    """Return the host generator of the stream called `name` (for example ``"W", 2``)."""
    return np.random.Generator(np.random.Philox(key=np.frombuffer(_digest(seed, name), "<u8")))


def key(seed: int, *name: str | int) -> Key:
    """Return the key of the counter-based stream called `name`."""
    k0, k1 = np.frombuffer(_digest(seed, name), "<u4")[:2]
    return Key(int(k0), int(k1))


def _digest(seed: int, name: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256(repr((int(seed), *name)).encode()).digest()[:16]


# Philox 4x32 with 10 rounds: Salmon et al., 'Parallel random numbers: as easy as 1, 2, 3', 2011.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def philox(counter: tuple[Array, Array, Array, Array], key: Key) -> tuple[Array, ...]:
    """Return four arrays of random 32-bit words for each counter of four 32-bit words.

    Parameters
    ----------
    counter : four uint64 arrays of one shape, each below 2^32
    key : Key

    Returns
    -------
    four uint64 arrays of that shape, each below 2^32
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW, (p0 >> 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def random_bits(key: Key, n: int, xp: ModuleType) -> Array:
    """Return the first `n` numbers of the key's stream: uint32 array (n,) of namespace `xp`.

    Number i is word i mod 4 of the Philox block of counter i // 4.
    """
    blocks = xp.arange(-(-n // 4), dtype=xp.uint64)
    zero = xp.zeros_like(blocks)
    words = philox((blocks & LOW, blocks >> 32, zero, zero), key)
    return xp.stack(words, axis=-1).reshape(-1)[:n].astype(xp.uint32)
