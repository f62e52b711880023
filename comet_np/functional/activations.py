"""Elementwise activations f (Fig. 34) and the masked layer ``x = m o f(a)``, eq. (8).

Every activation is finite and free of warnings for arguments of +-1e4, in float16 too: float16 is
raised to float32 inside.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..backends import backend_of, overridable, xp_of
from ..errors import UserError, unknown
from .linear import accumulate_sum

Array = Any


class Activation(NamedTuple):
    """An activation: its name, f(a) and f'(a), each an elementwise function of one array."""

    name: str
    forward: Callable[[Array], Array]
    derivative: Callable[[Array], Array]


def _in_float32_or_better(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    @functools.wraps(function)
    def wide(a: Array) -> Array:
        if a.dtype.itemsize >= 4:
            return function(a)
        return function(a.astype("float32")).astype(a.dtype)

    return wide


ACTIVATIONS: dict[str, Activation] = {}


def _register(name: str, forward: Callable[[Array], Array],
              derivative: Callable[[Array], Array]) -> None:
    ACTIVATIONS[name] = Activation(name, _in_float32_or_better(forward),
                                   _in_float32_or_better(derivative))


CENTRED = "centred_"


def activation(name: str) -> Activation:
    """Return the activation called `name`, or one made of it for a controlled experiment.

    ``"0.5*softplus"`` is 0.5 f(a);  ``"centred_softplus"`` is f(a) - f(0).

    Raises
    ------
    UserError
        If there is no such activation (the nearest name is suggested).
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    factor, star, plain = name.rpartition("*")
    f = ACTIVATIONS.get(plain.removeprefix(CENTRED))
    if f is None:
        raise unknown("activation", name, ACTIVATIONS)
    if plain.startswith(CENTRED):
        f = _centred(f)
    if not star:
        return f
    try:
        scale = float(factor)
    except ValueError:
        raise UserError(f'the activation "{name}" needs a number before the *') from None
    return Activation(name, lambda a: scale * f.forward(a), lambda a: scale * f.derivative(a))


def _centred(f: Activation) -> Activation:
    def forward(a: Array) -> Array:
        return f.forward(a) - f.forward(xp_of(a).zeros(1, dtype=a.dtype))

    return Activation(CENTRED + f.name, forward, f.derivative)


# Each pair below is f(a) and f'(a). At a kink the derivative is that of the left side.

def identity(a: Array) -> Array:
    """f(a) = a."""
    return a


def identity_derivative(a: Array) -> Array:
    return xp_of(a).ones_like(a)


def relu(a: Array) -> Array:
    """f(a) = max(a, 0)."""
    return xp_of(a).maximum(a, 0)


def relu_derivative(a: Array) -> Array:
    return (a > 0).astype(a.dtype)


LEAK = 0.1  # Fig. 34


def leaky_relu(a: Array) -> Array:
    """f(a) = a for a > 0, else 0.1 a."""
    return xp_of(a).where(a > 0, a, LEAK * a)


def leaky_relu_derivative(a: Array) -> Array:
    return xp_of(a).where(a > 0, 1, LEAK).astype(a.dtype)


def tanh(a: Array) -> Array:
    """f(a) = tanh(a)."""
    return xp_of(a).tanh(a)


def tanh_derivative(a: Array) -> Array:
    return 1 - xp_of(a).tanh(a) ** 2


def sigmoid(a: Array) -> Array:
    """f(a) = 1 / (1 + exp(-a))."""
    xp = xp_of(a)
    t = xp.exp(-xp.abs(a))  # never above 1, so it cannot overflow
    return xp.where(a >= 0, 1, t) / (1 + t)


def sigmoid_derivative(a: Array) -> Array:
    xp = xp_of(a)
    t = xp.exp(-xp.abs(a))
    return t / (1 + t) ** 2


def softplus(a: Array) -> Array:
    """f(a) = log(1 + exp(a))."""
    xp = xp_of(a)
    return xp.maximum(a, 0) + xp.log1p(xp.exp(-xp.abs(a)))


softplus_derivative = sigmoid


def silu(a: Array) -> Array:
    """f(a) = a sigmoid(a)."""
    return a * sigmoid(a)


def silu_derivative(a: Array) -> Array:
    return sigmoid(a) + a * sigmoid_derivative(a)


def gelu(a: Array) -> Array:
    """f(a) = a Phi(a), with Phi the normal distribution function (exact, by erf)."""
    return a * _normal_cdf(a)


def gelu_derivative(a: Array) -> Array:
    density = xp_of(a).exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    return _normal_cdf(a) + a * density


def _normal_cdf(a: Array) -> Array:
    return 0.5 * (1 + backend_of(a).erf(a / math.sqrt(2)))


def elu(a: Array) -> Array:
    """f(a) = a for a > 0, else exp(a) - 1."""
    xp = xp_of(a)
    return xp.where(a > 0, a, xp.expm1(xp.minimum(a, 0)))


def elu_derivative(a: Array) -> Array:
    xp = xp_of(a)
    return xp.exp(xp.minimum(a, 0))


# Klambauer et al. 2017, eq. (14): the values for which mean 0 and variance 1 are a fixed point.
SELU_ALPHA = 1.6732632423543772
SELU_SCALE = 1.0507009873554805


def selu(a: Array) -> Array:
    """f(a) = scale * (a for a > 0, else alpha (exp(a) - 1))."""
    xp = xp_of(a)
    return SELU_SCALE * xp.where(a > 0, a, SELU_ALPHA * xp.expm1(xp.minimum(a, 0)))


def selu_derivative(a: Array) -> Array:
    xp = xp_of(a)
    return SELU_SCALE * xp.where(a > 0, 1, SELU_ALPHA * xp.exp(xp.minimum(a, 0)))


def mish(a: Array) -> Array:
    """f(a) = a tanh(softplus(a))."""
    return a * xp_of(a).tanh(softplus(a))


def mish_derivative(a: Array) -> Array:
    t = xp_of(a).tanh(softplus(a))
    return t + a * (1 - t**2) * sigmoid(a)


_register("identity", identity, identity_derivative)
_register("relu", relu, relu_derivative)
_register("leaky_relu", leaky_relu, leaky_relu_derivative)
_register("tanh", tanh, tanh_derivative)
_register("sigmoid", sigmoid, sigmoid_derivative)
_register("softplus", softplus, softplus_derivative)
_register("silu", silu, silu_derivative)
_register("gelu", gelu, gelu_derivative)
_register("elu", elu, elu_derivative)
_register("selu", selu, selu_derivative)
_register("mish", mish, mish_derivative)


@overridable
def bias_activation_mask(s: Array, b: Array | None, m: Array | None,
                         f: Activation) -> tuple[Array, Array]:
    """Return ``a = s + b`` and ``x = m o f(a)``: s, m (..., N), b (N,) -> both (..., N)."""
    a = s if b is None else s + b
    x = f.forward(a)
    return a, x if m is None else x * unpacked(m, s.shape[-1])


@overridable
def bias_activation_mask_gradient(dx: Array, a: Array, m: Array | None, f: Activation,
                                  db: Array | None) -> Array:
    """Return ``da = dx o m o f'(a)`` (..., N) and add its sum over all examples into db (N,)."""
    da = dx * f.derivative(a)
    if m is not None:
        da = da * unpacked(m, da.shape[-1])
    if db is not None:
        accumulate_sum(da, db)
    return da


def unpacked(m: Array, N: int) -> Array:
    """Return a mask as bool (..., N); it may be bit-packed, uint8 (..., ceil(N / 8))."""
    if m.dtype == bool:
        return m
    bits = xp_of(m).unpackbits(m.reshape(-1)).reshape(*m.shape[:-1], 8 * m.shape[-1])
    return bits[..., :N].view(bool)


class MaskedActivationCache(NamedTuple):
    """What the backward of the masked activation reads.

    a : array (..., N), the pre-activation with its bias. m : the mask as it was given, or None.
    """

    a: Array
    m: Array | None


def masked_activation_forward(s: Array, b: Array | None, m: Array | None,
                              f: Activation) -> tuple[Array, MaskedActivationCache]:
    """Return ``x = m o f(a)`` with ``a = s + b``, eq. (8); with m = None eq. (2).

    Parameters
    ----------
    s : array (..., N)
        The product ``W x`` of eq. (7).
    b : array (N,) or None
        Of S networks side by side, (S, 1, N).
    m : bool array (..., N) or None
        Or bit-packed as by `numpy.packbits` along the last axis: uint8 (..., ceil(N / 8)).
    f : Activation

    Returns
    -------
    x : array (..., N)
    cache : MaskedActivationCache
    """
    a, x = bias_activation_mask(s, b, m, f)
    return x, MaskedActivationCache(a, m)


def masked_activation_backward(dx: Array, cache: MaskedActivationCache, f: Activation,
                               db: Array | None) -> Array:
    """Return ``da = dx o m o f'(a)`` and add its sum over the leading axes into db, if any.

    Parameters
    ----------
    dx : array (..., N)
    cache : MaskedActivationCache
    f : Activation
    db : array (N,) or None
        Of S networks side by side, (S, 1, N).

    Returns
    -------
    da : array (..., N)
    """
    return bias_activation_mask_gradient(dx, cache.a, cache.m, f, db)
