"""The multilayer perceptron, standard (eq. 1-2) and COMET (eq. 4-8).

Networks of one shape can be computed side by side: `stack` their parameters, and give each its own
mini-batch, x (S, B, N_0), or all the same one, x (B, N_0). The output is (S, B, N_L).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

from ..backends import Backend, backend_of, get_backend
from ..errors import UserError, unknown
from ..functional.activations import (
    MaskedActivationCache,
    activation,
    masked_activation_backward,
    masked_activation_forward,
)
from ..functional.linear import (
    Linear,
    LinearCache,
    check_features,
    linear_backward,
    linear_forward,
    project,
)
from ..functional.routing import TIES, Ties, routing_forward, winners
from ..rng import stream
from ..tree import tree_map, zeros_like

__all__ = ["MLPCache", "MLPConfig", "Trace", "backward", "forward", "init", "masks_of",
           "parameter_count", "stack", "trace", "zeros_like"]

Array = Any
Params = tuple[Linear, ...]  # one a layer, 1..L
Routing = tuple[Array, ...]  # V_l, one a hidden layer; empty for the standard model


@dataclass(frozen=True)
class MLPConfig:
    """The shape and rules of an MLP.

    Attributes
    ----------
    widths : tuple of int
        N_0 (inputs), N_1, ..., N_L (outputs).
    activation : str
        f, a name of `comet_np.functional.activations.ACTIVATIONS`.
    p_k : float or None
        Proportion of hidden neurons that stay active, in (0, 1]; None is the standard model.
    ties : {"strict", "threshold", "index"}
        See `comet_np.kwta_mask`.
    bias : bool
        Whether the layers have biases b. The paper has them in eq. (1) and drops them in eq. (7);
        its published code keeps them.
    routing_activation : str
        g of eq. (6).
    """

    widths: tuple[int, ...]
    activation: str = "softplus"
    p_k: float | None = 0.5
    ties: Ties = "strict"
    bias: bool = True
    routing_activation: str = "identity"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) < 2 or not all(isinstance(N, Integral) and N >= 1
                                           for N in self.widths):
            raise UserError("widths are the layers' sizes from input to output, at least two and "
                            f"each an integer of at least 1, got {self.widths}")
        activation(self.activation)
        activation(self.routing_activation)
        if self.ties not in TIES:
            raise unknown("tie rule", self.ties, TIES)
        if self.p_k is not None:
            winners(self.p_k, self.widths[1])


class MLPCache(NamedTuple):
    """What `backward` reads.

    linear : one LinearCache a layer, whose x is the layer's input x_{l-1}.
    hidden : one MaskedActivationCache a hidden layer, with a_l and m_l.
    """

    linear: tuple[LinearCache, ...]
    hidden: tuple[MaskedActivationCache, ...]

    @property
    def masks(self) -> tuple[Array | None, ...]:
        """m_l, one bool array (..., N_l) a hidden layer (None in the standard model).

        Masks that were given bit-packed are left so.
        """
        return tuple(layer.m for layer in self.hidden)


def init(config: MLPConfig, seed: int = 0, backend: Backend | None = None,
         dtype: str = "float32") -> tuple[Params, Routing]:
    """Return freshly drawn parameters and routing weights.

    ``W_l, b_l, V_l ~ U(-1/sqrt(N_{l-1}), 1/sqrt(N_{l-1}))``

    Parameters
    ----------
    config : MLPConfig
    seed : int
        Each array has a random stream of its own, so that a COMET and a standard model of one
        seed start from the same W and b.
    backend : Backend, optional
        Where the arrays are made; NumPy if not given.
    dtype : str

    Returns
    -------
    params : tuple of Linear
    routing : tuple of arrays (N_l, N_{l-1}), never trained; empty for the standard model
    """
    backend = backend or get_backend("numpy")

    def uniform(name: str, layer: int, *shape: int) -> Array:
        bound = 1 / math.sqrt(config.widths[layer - 1])
        draw = stream(seed, name, layer).random(shape, dtype="float32") * 2 - 1
        return backend.asarray(draw * bound, dtype=dtype)

    params, routing = [], []
    for layer, (N_in, N) in enumerate(_shapes(config), start=1):
        params.append(Linear(uniform("W", layer, N, N_in),
                             uniform("b", layer, N) if config.bias else None))
        if config.p_k is not None and layer < len(config.widths) - 1:
            routing.append(uniform("V", layer, N, N_in))
    return tuple(params), tuple(routing)


def stack(networks: Sequence[tuple[Params, Routing]]) -> tuple[Params, Routing]:
    """Return the parameters and routing weights of S networks, side by side.

    Parameters
    ----------
    networks : sequence of pairs as `init` returns them, of one configuration

    Returns
    -------
    params : tuple of Linear
        weight (S, N_l, N_{l-1}), bias (S, 1, N_l) or None.
    routing : tuple of arrays (S, N_l, N_{l-1})
    """
    def together(*arrays: Array) -> Array:
        stacked = backend_of(*arrays).xp.stack(arrays)
        return stacked[:, None] if stacked.ndim == 2 else stacked  # a bias, for all examples

    return tree_map(together, *networks)


def forward(x: Array, params: Params, routing: Routing, config: MLPConfig,
            masks: Sequence[Array | None] | None = None,
            tf32: bool = False) -> tuple[Array, MLPCache]:
    """Return the network's output a_L, eq. (7)-(8), or (1)-(2) for the standard model.

    ``a_l = W_l x_{l-1} + b_l``,  ``x_l = m_l o f(a_l)``;  the output a_L is not masked

    Parameters
    ----------
    x : array (..., N_0), float
    params : tuple of Linear
    routing : tuple of arrays (N_l, N_{l-1})
        Fixed weights V; ignored by the standard model or if `masks` are given.
    config : MLPConfig
    masks : sequence of bool arrays (..., N_l), optional
        Masks from outside, one a hidden layer, instead of the routing network's. They may be
        bit-packed, uint8 (..., ceil(N_l / 8)), as `split_masks` returns them.
    tf32 : bool
        See `comet_np.functional.linear.project`; never for the routing network, whose masks it
        would change.

    Returns
    -------
    a_L : array (..., N_L)
    cache : MLPCache

    Raises
    ------
    UserError
        If a shape does not fit, or a routing score is NaN.
    """
    check_arrays(x, params, config)
    if masks is None:
        masks = masks_of(x, routing, config)
    check_masks(masks, x, params, config)
    S = params[0].weight.shape[:-2]
    if S and x.ndim == 2:  # one for all networks, each of which has gradients of its own by it
        x = backend_of(x).xp.broadcast_to(x, (*S, *x.shape))
    f = activation(config.activation)
    linear, hidden = [], []
    for p, m in zip(params, masks, strict=False):  # the output layer has no mask
        linear.append(LinearCache(x))
        s = project(x, p.weight, tf32)  # (..., N_l)
        x, cache = masked_activation_forward(s, p.bias, m, f)
        hidden.append(cache)
    a_L, cache_L = linear_forward(x, params[-1], tf32)
    return a_L, MLPCache((*linear, cache_L), tuple(hidden))


def backward(da_L: Array, cache: MLPCache, params: Params, grads: Params, config: MLPConfig,
             input_gradient: bool = True, tf32: bool = False) -> Array | None:
    """Return dx and add the gradients of all parameters into `grads`.

    ``dx_{l-1} = W_l^T da_l``,  ``dW_l += da_l x_{l-1}^T``,  ``db_l += da_l``,
    ``da_l = dx_l o m_l o f'(a_l)``

    The masks are piecewise constant in x, so nothing flows through the routing network.

    Parameters
    ----------
    da_L : array (..., N_L)
        The gradient of the loss by the output.
    cache : MLPCache
    params, grads : tuple of Linear
        `grads` may be `params` themselves: see `comet_np.optim`.
    config : MLPConfig
    input_gradient : bool
        False returns None and saves a product: training does not need dx.
    tf32 : bool
        See `comet_np.functional.linear.project`.
    """
    f = activation(config.activation)
    dx = linear_backward(da_L, cache.linear[-1], params[-1], grads[-1],
                         input_gradient or len(params) > 1, tf32)
    for layer in reversed(range(len(params) - 1)):
        p, g = params[layer], grads[layer]
        da = masked_activation_backward(dx, cache.hidden[layer], f, g.bias)
        dx = linear_backward(da, cache.linear[layer], Linear(p.weight, None),
                             Linear(g.weight, None), input_gradient or layer > 0, tf32)
    return dx


def masks_of(x: Array, routing: Routing, config: MLPConfig,
             packed: bool = False) -> tuple[Array | None, ...]:
    """Return m_l of every hidden layer, eq. (5); None for each in the standard model.

    With `packed`, bit-packed: see `routing_forward`.
    """
    hidden = len(config.widths) - 2
    if config.p_k is None or not hidden:
        return (None,) * hidden
    check_routing(x, routing, config)
    return routing_forward(x, routing, config.p_k, config.ties,
                           activation(config.routing_activation), packed).m


class Trace(NamedTuple):
    """Every intermediate of a forward pass by its name in the paper.

    a : a_1..a_L. x : x_0..x_{L-1}. c, m, z : of the hidden layers; empty in the standard model.
    """

    a: tuple[Array, ...]
    x: tuple[Array, ...]
    c: tuple[Array, ...]
    m: tuple[Array, ...]
    z: tuple[Array, ...]


def trace(x: Array, params: Params, routing: Routing, config: MLPConfig) -> Trace:
    """Run `forward` and return all that it computed; the parameters are those of `forward`."""
    c = m = z = ()
    if config.p_k is not None and len(config.widths) > 2:
        check_routing(x, routing, config)
        c, m, z = routing_forward(x, routing, config.p_k, config.ties,
                                  activation(config.routing_activation))
    a_L, cache = forward(x, params, routing, config, masks=m or None)
    return Trace(a=(*(layer.a for layer in cache.hidden), a_L),
                 x=tuple(layer.x for layer in cache.linear), c=c, m=m, z=z)


def parameter_count(config: MLPConfig) -> int:
    """Return the number of trainable parameters (the fixed routing weights are not counted)."""
    return sum(N * (N_in + config.bias) for N_in, N in _shapes(config))


def _shapes(config: MLPConfig) -> Iterator[tuple[int, int]]:
    """Yield (N_{l-1}, N_l) of every layer."""
    return zip(config.widths, config.widths[1:], strict=False)


def check_arrays(x: Array, params: Params, config: MLPConfig) -> None:
    """Raise a UserError unless the shapes of x and of the parameters fit the configuration."""
    backend_of(x, *(p.weight for p in params))
    S = params[0].weight.shape[:-2]  # () or, side by side, (S,)
    shapes = [((*S, N, N_in), ((*S, 1, N) if S else (N,)) if config.bias else None)
              for N_in, N in _shapes(config)]
    got = [(p.weight.shape, None if p.bias is None else p.bias.shape) for p in params]
    if got != shapes:
        raise UserError(f"the widths {config.widths} with bias={config.bias} need weights and "
                        f"biases of shapes {shapes}, got {got}")
    check_features(x, params[0].weight, "x")
    if S and x.ndim != 2 and x.shape[:-2] != S:
        raise UserError(f"{S[0]} networks side by side take x of shape (B, {x.shape[-1]}), or of "
                        f"shape {(S[0], 'B', x.shape[-1])} for each its own, got {x.shape}")


def check_routing(x: Array, routing: Routing, config: MLPConfig) -> None:
    """Raise a UserError unless the routing weights fit the configuration and x fits them."""
    S = routing[0].shape[:-2] if routing else ()
    shapes = [(*S, N, N_in) for N_in, N in _shapes(config)][:-1]
    got = [V.shape for V in routing]
    if got != shapes:
        raise UserError(f"a COMET network of widths {config.widths} needs routing weights V of "
                        f"shapes {shapes}, got {got}")
    check_features(x, routing[0], "x")


def check_masks(masks: Sequence[Array | None], x: Array, params: Params,
                config: MLPConfig) -> None:
    """Raise a UserError unless there is one fitting mask for each hidden layer."""
    S, examples = params[0].weight.shape[:-2], x.shape[:-1]
    examples = (*S, *examples[-1:]) if S else examples
    shapes = [(*examples, N) for N in config.widths[1:-1]]
    packed = [(*examples, -(-N // 8)) for N in config.widths[1:-1]]
    if len(masks) == len(shapes) and all(
            m is None or (m.shape == shape and m.dtype == bool)
            or (m.shape == bits and m.dtype == "uint8")
            for m, shape, bits in zip(masks, shapes, packed, strict=True)):
        return
    got = [None if m is None else f"{m.dtype} {m.shape}" for m in masks]
    raise UserError(f"masks must be bool arrays of shapes {shapes}, or bit-packed uint8 arrays of "
                    f"shapes {packed}, got {got}")
