"""Inverted dropout, with its random numbers from a counter: the same mask on every backend."""

from typing import Any, NamedTuple

from ..backends import overridable, xp_of
from ..errors import UserError
from ..rng import Key, random_bits

Array = Any


class DropoutCache(NamedTuple):
    """What the backward of dropout reads: the factor (..., N), 0 or 1 / (1 - rate)."""

    factor: Array


def dropout_forward(x: Array, rate: float, key: Key) -> tuple[Array, DropoutCache]:
    """Return x with each element set to 0 with probability `rate`, the rest scaled up.

    ``y = x o r / (1 - rate)``,  r ~ Bernoulli(1 - rate)

    Parameters
    ----------
    x : array (..., N), float
    rate : float
        Probability that an element is dropped, in [0, 1).
    key : Key
        From `comet_np.rng.key`; element i of x uses the i-th number of its stream.

    Returns
    -------
    y : array (..., N)
    cache : DropoutCache

    Raises
    ------
    UserError
        If `rate` is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise UserError(f"the dropout rate is a probability in [0, 1), got {rate}")
    factor = dropout_factor(x, rate, key)
    return x * factor, DropoutCache(factor)


@overridable
def dropout_factor(x: Array, rate: float, key: Key) -> Array:
    """Return, of the shape and dtype of x, 0 with probability `rate`, else 1 / (1 - rate)."""
    bits = random_bits(key, x.size, xp_of(x)).reshape(x.shape)  # uniform on 0 .. 2^32 - 1
    return (bits >= round(rate * 2**32)).astype(x.dtype) / (1 - rate)


def dropout_backward(dy: Array, cache: DropoutCache) -> Array:
    """Return ``dx = dy o r / (1 - rate)``: dy (..., N) -> (..., N)."""
    return dy * cache.factor
