"""Elementwise activations f (Fig. 34), and eq. (6).

Every activation is finite and free of warnings for arguments of +-1e4, in float16 too: float16 is
raised to float32 inside.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..backends import backend_of, overridable, xp_of
from ..errors import UserError, unknown
from .packing import check_mask, unpacked

Array = Any


class Activation(NamedTuple):
    """An activation: its name, f(a) and f'(a), each an elementwise function of one array."""

    name: str
    forward: Callable[[Array], Array]
    derivative: Callable[[Array], Array]


def _in_float32_or_better(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    @functools.wraps(function)
    def wide(a: Array) -> Array:
        xp_of(a)  # says what it should be
        if a.dtype.kind not in "fc":
            raise UserError(f"an activation is a function of floats, got {a.dtype}: cast it with "
                            '.astype("float32")')
        if a.dtype.itemsize >= 4:
            return function(a)
        return function(a.astype("float32")).astype(a.dtype)

    return wide


ACTIVATIONS: dict[str, Activation] = {}


def _register(name: str, forward: Callable[[Array], Array],
              derivative: Callable[[Array], Array]) -> None:
    ACTIVATIONS[name] = Activation(name, _in_float32_or_better(forward),
                                   _in_float32_or_better(derivative))


def activation(name: str) -> Activation:
    """Return the activation called `name`.

    Raises
    ------
    UserError
        If there is none (the nearest name is suggested).
    """
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


@functools.cache
def scaled(f: Activation, factor: float) -> Activation:
    """Return ``factor f(a)``, of a controlled experiment."""
    return Activation(f"{factor} {f.name}", lambda a: factor * f.forward(a),
                      lambda a: factor * f.derivative(a))


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


def gelu_new(a: Array) -> Array:
    """f(a) = a (1 + tanh(u)) / 2,  u = sqrt(2/pi) (a + 0.044715 a^3): of GPT-2, for gelu."""
    u, _ = _gelu_argument(a)
    return 0.5 * a * (1 + xp_of(a).tanh(u))


def gelu_new_derivative(a: Array) -> Array:
    """f'(a) = s + 2 a s (1 - s) u' with s = (1 + tanh(u)) / 2, which is sigmoid(2 u)."""
    u, du = _gelu_argument(a)
    s = sigmoid(2 * u)
    return s + 2 * a * (s * sigmoid(-2 * u)) * du


GELU_CUBIC = 0.044715  # Hendrycks & Gimpel 2016


def _gelu_argument(a: Array) -> tuple[Array, Array]:
    """Return u and du/da."""
    square, root = a * a, math.sqrt(2 / math.pi)
    return root * a * (1 + GELU_CUBIC * square), root * (1 + 3 * GELU_CUBIC * square)


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
_register("gelu_new", gelu_new, gelu_new_derivative)
_register("elu", elu, elu_derivative)
_register("selu", selu, selu_derivative)
_register("mish", mish, mish_derivative)
# f(a) - f(0), without the mean that f gives to activations: controls of the experiments. The
# others of the ten are 0 at 0 already.
_register("centred_sigmoid", lambda a: sigmoid(a) - a.dtype.type(0.5), sigmoid_derivative)
_register("centred_softplus", lambda a: softplus(a) - a.dtype.type(math.log(2)),
          softplus_derivative)


@overridable
def masked(c: Array, m: Array, g: Activation) -> Array:
    """Return ``z = m o g(c)``, eq. (6): c (..., N), a mask, bool or bit-packed -> (..., N)."""
    check_mask(m, c.shape)
    return g.forward(c) * unpacked(m, c.shape[-1])
