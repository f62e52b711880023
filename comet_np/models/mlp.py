"""The multilayer perceptron, eq. (1)-(2), and with a gate the masked one: COMET, eq. (4)-(8).

The leading axes of its input are free, so it is the MLP inside the blocks of larger models too.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple

from ..backends import Backend, backend_of, described, get_backend, mask_fits, xp_of
from ..errors import UserError, unknown
from ..functional.activations import Activation, activation, scaled
from ..functional.dropout import DropoutCache, check_rate, dropout_backward, dropout_forward
from ..functional.hidden import HiddenCache, hidden_backward, hidden_forward
from ..functional.linear import (
    Linear,
    LinearCache,
    check_features,
    linear_backward,
    linear_forward,
)
from ..functional.packing import unpacked
from ..gates import EVALUATION, Comet, Gate, Kept, Pass
from ..gates.comet import Routed
from ..precision import check_format
from ..rng import key, normal, seed_of, uniform
from ..tree import check_shapes, leaves, zeros_like

__all__ = ["MLPCache", "MLPConfig", "Params", "Trace", "backward", "forward", "infer", "init",
           "parameter_count", "shapes", "trace", "zeros_like"]

Array = Any
Params = tuple[Linear, ...]  # one a layer, 1..L
Fixed = Any  # the gate's fixed weights, a tree; of COMET V_l, one a hidden layer
INITIALS = ("paper", "he")
# Multiply-adds of the rows gathered at once: BLAS does so few without packing the operands.
GATHERED = 1 << 19
FEW = 0.25, 0.6  # of a layer's rows, of one example and of several: with more, all are as fast


@dataclass(frozen=True)
class MLPConfig:
    """The shape and rules of an MLP.

    Attributes
    ----------
    widths : tuple of int
        N_0 (inputs), N_1, ..., N_L (outputs).
    activation : str
        f, a name of `comet_np.functional.activations.ACTIVATIONS`.
    gate : Gate or None
        Where the masks of the hidden layers come from, see `comet_np.gates`; None is the standard
        model.
    bias : bool
        Whether the layers have biases b. The paper has them in eq. (1) and drops them in eq. (7);
        its published code keeps them.
    dropout : float
        Rate at which hidden activations are dropped in training, after the mask.
    scale : float
        Factor of the hidden activations: of the control that shows what a mask does on average.
    compute : str or None
        The format in which products read their operands, see `comet_np.precision`.
    initial : {"paper", "he"}
        The law of the initial W and b, see `init`.
    """

    widths: tuple[int, ...]
    activation: str = "softplus"
    gate: Gate | None = field(default=Comet())
    bias: bool = True
    dropout: float = 0.0
    scale: float = 1.0
    compute: str | None = None
    initial: str = "paper"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) < 2 or not all(isinstance(N, Integral) and N >= 1
                                           for N in self.widths):
            raise UserError("widths are the layers' sizes from input to output, at least two and "
                            f"each an integer of at least 1, got {self.widths}")
        activation(self.activation)
        if self.gate is not None and not isinstance(self.gate, Gate):
            raise UserError("gate is None or a gate, as comet_np.gates.Comet(p_k=0.5), got "
                            f"{self.gate!r}")
        check_rate(self.dropout)
        check_format(self.compute)
        if self.initial not in INITIALS:
            raise unknown("initialisation", self.initial, INITIALS)

    @property
    def f(self) -> Activation:
        """The activation of the hidden layers, with its factor."""
        f = activation(self.activation)
        return f if self.scale == 1 else scaled(f, self.scale)

    @property
    def hidden(self) -> int:
        """The number of hidden layers, L - 1."""
        return len(self.widths) - 2


class MLPCache(NamedTuple):
    """What `backward` reads.

    hidden : one HiddenCache a hidden layer. dropped : one DropoutCache a hidden layer, or none.
    output : LinearCache.
    """

    hidden: tuple[HiddenCache, ...]
    dropped: tuple[DropoutCache, ...]
    output: LinearCache

    @property
    def masks(self) -> tuple[Array | None, ...]:
        """m_l, one bool array (..., N_l) a hidden layer; None where there is no mask."""
        return tuple(None if layer.m is None else unpacked(layer.m, layer.a.shape[-1])
                     for layer in self.hidden)


@functools.cache
def shapes(config: MLPConfig) -> Params:
    """Return the shapes of the parameters, a tree like the parameters themselves."""
    return tuple(Linear((N, N_in), (N,) if config.bias else None)
                 for N_in, N in zip(config.widths, config.widths[1:], strict=False))


def init(config: MLPConfig, seed: int = 0, backend: Backend | None = None,
         dtype: str = "float32", name: tuple[str | int, ...] = ()) -> tuple[Params, Fixed]:
    """Return freshly drawn parameters, and the gate's fixed weights.

    "paper", which is PyTorch's default:
    ``W_l, b_l ~ U(-1/sqrt(N_{l-1}), 1/sqrt(N_{l-1}))``

    "he", of He et al., 'Delving deep into rectifiers', 2015:
    ``W_l ~ N(0, 2/N_{l-1})``,  ``b_l = 0``

    The gate's fixed weights have a law of their own, whichever it is.

    Parameters
    ----------
    config : MLPConfig
    seed : int
        Each array has a random stream of its own, so that models of one seed start from the same
        W and b, whatever their gates.
    backend : Backend, optional
        Where the arrays are made; NumPy if not given.
    dtype : str
    name : tuple of str or int
        What the names of all streams begin with, in a model of several MLPs.

    Returns
    -------
    params : tuple of Linear
    fixed : tree of arrays, never trained; of COMET V_l (N_l, N_{l-1}); () without a gate
    """
    backend = backend or get_backend("numpy")
    draw = _he if config.initial == "he" else uniform
    params = tuple(
        Linear(draw(backend, dtype, W[1], W, seed, *name, "W", layer),
               None if b is None else draw(backend, dtype, W[1], b, seed, *name, "b", layer))
        for layer, (W, b) in enumerate(shapes(config), start=1))
    return params, init_gate(config, seed, backend, dtype, name)


def init_gate(config: MLPConfig, seed: int, backend: Backend, dtype: str,
              name: tuple[str | int, ...] = ()) -> Fixed:
    """Return the gate's fixed weights as `init` does, of a model with other laws of W and b."""
    if config.gate is None:
        return ()
    return config.gate.init(config.widths, seed_of(seed, *name), backend, dtype)


def _he(backend: Backend, dtype: str, N_in: int, shape: tuple[int, ...], seed: int,
        *name: str | int) -> Array:
    """Return a weight or a bias of the law "he"; its arguments are those of `uniform`."""
    if name[-2] == "b":
        return backend.xp.zeros(shape, dtype=dtype)
    return normal(backend, dtype, math.sqrt(2 / N_in), shape, seed, *name)


def forward(x: Array, params: Params, fixed: Fixed, config: MLPConfig,
            masks: tuple[Array | None, ...] | None = None,
            at: Pass = EVALUATION) -> tuple[Array, MLPCache]:
    """Return the network's output a_L, eq. (7)-(8), or (1)-(2) without a gate.

    ``a_l = W_l x_{l-1} + b_l``,  ``x_l = m_l o f(a_l)``;  the output a_L is not masked

    Parameters
    ----------
    x : array (..., N_0), float
    params : tuple of Linear
    fixed : tree
        The gate's fixed weights; not read if `masks` are given.
    config : MLPConfig
    masks : sequence of bool arrays (..., N_l), optional
        Masks from outside, one a hidden layer, instead of the gate's; None for a layer without.
    at : Pass
        Whether in training, at which step, on which examples; evaluation if not given.

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
    if masks is not None:
        check_masks(masks, x, config)
    else:
        masks = _gate_masks(x, fixed, config, at)
    f = config.f
    hidden: list[HiddenCache] = []
    dropped: list[DropoutCache] = []
    for layer, (p, m) in enumerate(zip(params, masks, strict=False), start=1):
        x, cache = hidden_forward(x, p, m, f, config.compute)  # (..., N_l)
        hidden.append(cache)
        if config.dropout and at.train:
            x, drop = dropout_forward(x, config.dropout, key(at.seed, "dropout", layer), at.step)
            dropped.append(drop)
    a_L, output = linear_forward(x, params[-1], config.compute)  # (..., N_L)
    return a_L, MLPCache(tuple(hidden), tuple(dropped), output)


def infer(x: Array, params: Params, fixed: Fixed, config: MLPConfig,
          masks: tuple[Array | None, ...] | None = None) -> Array:
    """Return what `forward` does in evaluation, and compute the winners alone: for few examples.

    The rows A of the neurons that win for some example: ``x_l = m_l o f(W_l[A] x_{l-1} + b_l[A])``,
    else 0. Where these are more than three of five, or of one example more than a quarter, the
    whole product is taken, as gathering rows takes longer than reading them.

    Parameters
    ----------
    x : array (B, N_0)
    params, fixed, config, masks
        As of `forward`. The gate's masks must not be a function of the layers' own inputs, which
        are not whole here.

    Returns
    -------
    a_L : array (B, N_L)

    Raises
    ------
    UserError
        If a shape does not fit, a routing score is NaN, or the masks are not known before.
    """
    check_arrays(x, params, config)
    if x.ndim != 2:
        raise UserError(f"infer takes examples as rows (B, N_0), got shape {tuple(x.shape)}")
    if masks is None:
        masks = _gate_masks(x, fixed, config, EVALUATION)
        if any(map(callable, masks)):
            raise UserError(f"infer computes winners alone, which the gate "
                            f"{type(config.gate).__name__} knows only when all is computed: call "
                            "forward")
    else:
        check_masks(masks, x, config)
    masks = tuple(None if m is None else unpacked(m, N)
                  for m, N in zip(masks, config.widths[1:-1], strict=True))
    for p, m in zip(params, masks, strict=False):
        winners = None if m is None else xp_of(m).flatnonzero(m.any(axis=0))
        if winners is None or len(winners) > FEW[len(x) > 1] * len(p.weight):
            x, _ = hidden_forward(x, p, m, config.f, config.compute)
        else:
            x = _winners_forward(x, p, m, winners, config.f, config.compute)  # (B, N_l)
    return linear_forward(x, params[-1], config.compute)[0]  # (B, N_L)


def _gate_masks(x: Array, fixed: Fixed, config: MLPConfig, at: Pass) -> tuple[Any, ...]:
    """Return the masks that the gate gives, one for each hidden layer."""
    check_fixed(fixed, config)
    masks: tuple[Any, ...] = ((None,) * config.hidden if config.gate is None else
                              config.gate.masks(x, fixed, config, at))
    if len(masks) != config.hidden:
        raise UserError(f"the gate {type(config.gate).__name__} must give a mask for each of "
                        f"the {config.hidden} hidden layers, got {len(masks)}")
    return masks


def _winners_forward(x: Array, p: Linear, m: Array, winners: Array, f: Activation,
                     compute: str | None) -> Array:
    """Return ``m o f(W x + b)`` (B, N) by the rows of those that win for some example.

    On a CPU so many rows are gathered at once that they stay in its cache until they are read.
    """
    xp, (W, b) = xp_of(x), p
    a = xp.empty((len(x), len(winners)), x.dtype)
    step = len(winners) if backend_of(x).waits else -(-GATHERED // x.size)
    for start in range(0, len(winners), step or 1):
        rows = Linear(W.take(winners[start:start + step], axis=0), None)
        a[:, start:start + step], _ = linear_forward(x, rows, compute)
    if b is not None:
        a += b[winners]
    h = xp.zeros(m.shape, x.dtype)
    h[m] = f.forward(a[m[:, winners]])
    return h


def backward(da_L: Array, cache: MLPCache, params: Params, grads: Params, config: MLPConfig,
             input_gradient: bool = True) -> Array | None:
    """Return dx and add the gradients of all parameters into `grads`.

    ``da_l = dx_l o m_l o f'(a_l)``,  ``dx_{l-1} = W_l^T da_l``,  ``dW_l += da_l x_{l-1}^T``,
    ``db_l += da_l``

    Masks are piecewise constant, so nothing flows through the gate.

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

    Raises
    ------
    UserError
        If a shape does not fit, or `grads` cannot be written to.
    """
    if len(grads) != len(params):
        raise UserError(f"expected gradients for each of the {len(params)} layers, as of "
                        f"zeros_like(params), got {len(grads)}")
    dx = linear_backward(da_L, cache.output, params[-1], grads[-1], config.compute,
                         input_gradient or config.hidden > 0)
    f = config.f
    for layer in reversed(range(config.hidden)):
        if cache.dropped:
            dx = dropout_backward(dx, cache.dropped[layer])
        dx = hidden_backward(dx, cache.hidden[layer], params[layer], grads[layer], f,
                             config.compute, input_gradient or layer > 0)
    return dx


def with_kept_masks(config: MLPConfig) -> MLPConfig | None:
    """Return the configuration that reads masks kept by `comet_np.gates.keep`; None if none can be.
    """
    if config.gate is None or config.gate.depends_on is None or not config.hidden:
        return None
    return replace(config, gate=Kept())


def quantities(params: Params, cache: MLPCache, a_L: Array) -> Iterator[tuple[str, Array]]:
    """Yield what a forward pass read and made, by its name in the paper, in order."""
    activations = [(here.x, here.a) for here in cache.hidden] + [(cache.output.x, a_L)]
    for layer, (p, (x, a)) in enumerate(zip(params, activations, strict=True), start=1):
        for name, array in ((f"x_{layer - 1}", x), (f"W_{layer}", p.weight),
                            (f"b_{layer}", p.bias), (f"a_{layer}", a)):
            if array is not None:
                yield f"{name} of layer {layer}", array


class Trace(NamedTuple):
    """Every intermediate of a forward pass by its name in the paper.

    a : a_1..a_L. x : x_0..x_{L-1}. m : of the hidden layers. c, z : of COMET's routing network,
    c_1..c_{L-1} and z_1..z_{L-2}; empty for other gates.
    """

    a: tuple[Array, ...]
    x: tuple[Array, ...]
    c: tuple[Array, ...]
    m: tuple[Array | None, ...]
    z: tuple[Array, ...]


def trace(x: Array, params: Params, fixed: Fixed, config: MLPConfig) -> Trace:
    """Run `forward`, in evaluation, and return all that it computed."""
    c = z = ()
    masks = None
    if isinstance(config.gate, Comet):
        check_arrays(x, params, config)
        check_fixed(fixed, config)
        c, masks, z = config.gate.trace(x, fixed)
    a_L, cache = forward(x, params, fixed, config, masks)
    return Trace(a=(*(layer.a for layer in cache.hidden), a_L),
                 x=(*(layer.x for layer in cache.hidden), cache.output.x), c=c, m=cache.masks, z=z)


def parameter_count(config: MLPConfig) -> int:
    """Return the number of trainable parameters (the gate's fixed weights are not counted)."""
    return sum(N * (N_in + config.bias) for (N, N_in), _ in shapes(config))


def kept_numbers(config: MLPConfig) -> int:
    """Return about how many numbers a forward pass in training keeps of an example."""
    inputs, *hidden, outputs = config.widths
    return inputs + outputs + (2 + bool(config.dropout)) * sum(hidden)


def multiply_adds(config: MLPConfig) -> tuple[int, int]:
    """Return the multiply-adds of one example in a training step: trained layers, fixed weights.

    Of a layer ``W x``, ``dW`` and, but for the first, ``W^T da``; of the gate's fixed weights, as
    V of COMET, each once, if the masks are not kept.
    """
    trained = 3 * sum(N * N_in for (N, N_in), _ in shapes(config)) - math.prod(config.widths[:2])
    gate = config.gate
    return trained, gate.multiply_adds(config.widths) if isinstance(gate, Routed) else 0


def check_arrays(x: Array, params: Params, config: MLPConfig) -> None:
    """Raise a UserError unless x and the parameters fit the configuration."""
    check_shapes(params, shapes(config), f"the widths {config.widths} with bias={config.bias} "
                                         "need weights and biases")
    if type(x) is not type(params[0].weight):
        backend_of(x, params[0].weight)  # says which are mixed
    check_features(x, params[0].weight, "x")


def check_fixed(fixed: Fixed, config: MLPConfig) -> None:
    """Raise a UserError unless the gate's fixed weights fit the configuration."""
    if config.gate is None:
        if any(True for _ in leaves(fixed)):
            raise UserError("a network without a gate has no fixed weights, expected (): got some "
                            "(was a gate meant, as gate=comet_np.gates.Comet()?)")
    elif (wanted := config.gate.shapes(config.widths)) is not None:
        check_shapes(fixed, wanted, f"the gate {type(config.gate).__name__} of a network of widths "
                                    f"{config.widths} needs fixed weights V")


def check_masks(masks: tuple[Array | None, ...], x: Array, config: MLPConfig) -> None:
    """Raise a UserError unless there is one fitting mask for each hidden layer."""
    wanted = [(*x.shape[:-1], N) for N in config.widths[1:-1]]
    if not isinstance(masks, tuple | list):
        raise UserError("masks must be a tuple with one array, or None, for each of the "
                        f"{len(wanted)} hidden layers, got {described(masks)}")
    if len(masks) == len(wanted) and all(
            m is None or mask_fits(m, shape) for m, shape in zip(masks, wanted, strict=True)):
        return
    for m in masks:
        if m is not None:
            backend_of(m)  # says how to convert what is no array
    packed = [(*shape[:-1], -(-shape[-1] // 8)) for shape in wanted]
    got = [None if m is None else described(m) for m in masks]
    raise UserError(f"masks must be bool arrays of shapes {wanted}, or bit-packed uint8 arrays of "
                    f"shapes {packed}, got {got}")
