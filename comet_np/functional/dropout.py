"""Inverted dropout and masks of examples, from counters: the same numbers on every backend.

What is drawn is a function of a key and a counter alone. The counter (a step, or the number of an
example) may lie on the device, so that a captured step draws anew each time.
"""

from numbers import Integral, Real
from typing import Any, NamedTuple

from ..backends import overridable, xp_of
from ..errors import UserError
from ..rng import Key, random_bits

Array = Any


class DropoutCache(NamedTuple):
    """What the backward of dropout reads: the factor (..., N), 0 or 1 / (1 - rate)."""

    factor: Array


def dropout_forward(x: Array, rate: float, key: Key,
                    step: Array | int) -> tuple[Array, DropoutCache]:
    """Return x with each element set to 0 with probability `rate`, the rest scaled up.

    ``y = x o r / (1 - rate)``,  r ~ Bernoulli(1 - rate)

    Parameters
    ----------
    x : array (..., N), float
    rate : float
        Probability that an element is dropped, in [0, 1).
    key : Key
        From `comet_np.rng.key`; element i of x uses the i-th number of its stream at this step.
    step : int or 0-d int64 array
        How many steps were taken before: each draws other elements.

    Returns
    -------
    y : array (..., N)
    cache : DropoutCache

    Raises
    ------
    UserError
        If `rate` is not in [0, 1), or `step` no integer, or one below 0.
    """
    check_rate(rate)
    check_step(step)
    factor = dropout_factor(x, rate, key, step)
    return x * factor, DropoutCache(factor)


def dropout_backward(dy: Array, cache: DropoutCache) -> Array:
    """Return ``dx = dy o r / (1 - rate)``: dy (..., N) -> (..., N)."""
    return dy * cache.factor


@overridable
def dropout_factor(x: Array, rate: float, key: Key, step: Array | int) -> Array:
    """Return, of the shape and dtype of x, 0 with probability `rate`, else 1 / (1 - rate)."""
    xp = xp_of(x)
    bits = random_bits(key, x.size, xp.asarray(step, dtype="int64")).reshape(x.shape)
    return (bits >= _threshold(rate, xp)).astype(x.dtype) / (1 - rate)


@overridable
def example_mask(example: Array, N: int, p: float, key: Key) -> Array:
    """Return a fixed random mask for each example: int64 (B,) -> bool (B, N), 1 with probability p.

    Neuron i of an example uses the i-th number of the key's stream at the example's number.
    """
    return random_bits(key, N, example) < _threshold(p, xp_of(example))  # (B, N)


def _threshold(p: float, xp: Any) -> Any:
    """Return below which number, of those uniform on 0 .. 2^32 - 1, a share p lies."""
    return xp.uint64(round(p * 2**32))  # 2^32 itself does not fit the numbers' dtype


def check_step(step: Any) -> None:
    """Raise a UserError unless `step` counts steps; one on a device is not read."""
    if not (int(step) >= 0 if isinstance(step, Integral) else
            getattr(step, "shape", None) == () and step.dtype.kind in "iu"):
        raise UserError("the step of dropout is an integer of at least 0, or a 0-d array of one, "
                        f"got {step!r}")


def check_rate(rate: float) -> None:
    """Raise a UserError unless `rate` is a probability below 1."""
    if not isinstance(rate, Real) or not 0 <= rate < 1:
        raise UserError(f"the dropout rate is a probability in [0, 1), got {rate!r}")
