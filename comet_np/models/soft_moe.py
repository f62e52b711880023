"""The soft mixture of experts, Soft MoE, of Puigcerver et al. (2023): a layer on tokens.

Each expert is an MLP that maps a few slots, and each slot is a mean of all tokens; each token gets
a mean of what all slots put out. Everything is differentiable: there is no choice of experts.
"""

import functools
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

from ..backends import Backend, backend_of, described, get_backend, xp_of
from ..errors import UserError
from ..functional.linear import (
    Linear,
    LinearCache,
    check_cotangent,
    linear_backward,
    linear_forward,
)
from ..functional.soft_mixture import (
    CombineCache,
    DispatchCache,
    combine_backward,
    combine_forward,
    dispatch_backward,
    dispatch_forward,
)
from ..gates import EVALUATION, Pass
from ..rng import uniform
from ..tree import check_shapes
from . import mlp

Array = Any


@dataclass(frozen=True)
class SoftMoEConfig:
    """The shape of a soft mixture of experts.

    Attributes
    ----------
    widths : tuple of int
        Of one expert: D (of a token), hidden layers, D_out.
    experts : int
        E.
    slots : int
        S, of each expert.
    activation, bias, compute
        Of the experts, see `comet_np.models.mlp.MLPConfig`. `compute` is also the format of the
        products of dispatch and combination; logits are taken of whole numbers, as routing scores.
    """

    widths: tuple[int, ...]
    experts: int
    slots: int = 1
    activation: str = "softplus"
    bias: bool = True
    compute: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", self.expert.widths)
        for name in ("experts", "slots"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise UserError(f"a soft mixture has at least 1 expert, each of at least 1 slot, "
                                f"got {name} = {value!r}")

    @functools.cached_property
    def expert(self) -> mlp.MLPConfig:
        """The configuration of one expert."""
        return mlp.MLPConfig(self.widths, self.activation, gate=None, bias=self.bias,
                             compute=self.compute)


class SoftMoEParams(NamedTuple):
    """slots : array (E S, D), Phi, expert by expert. experts : the parameters of E MLPs."""

    slots: Array
    experts: tuple[mlp.Params, ...]


class SoftMoECache(NamedTuple):
    """What `backward` reads.

    routing : LinearCache, of the logits. dispatch : DispatchCache. experts : one MLPCache an
    expert. combine : CombineCache. logits : array (..., T, E S), to combine anew with.
    """

    routing: LinearCache
    dispatch: DispatchCache
    experts: tuple[mlp.MLPCache, ...]
    combine: CombineCache
    logits: Array


@functools.cache
def shapes(config: SoftMoEConfig) -> SoftMoEParams:
    """Return the shapes of the parameters, a tree like the parameters themselves."""
    return SoftMoEParams((config.experts * config.slots, config.widths[0]),
                         config.experts * (mlp.shapes(config.expert),))


def init(config: SoftMoEConfig, seed: int = 0, backend: Backend | None = None,
         dtype: str = "float32") -> tuple[SoftMoEParams, tuple[()]]:
    """Return freshly drawn parameters, and nothing fixed.

    ``Phi ~ U(-1/sqrt(D), 1/sqrt(D))``, and each expert as `comet_np.models.mlp.init` draws it, all
    from random streams of their own.
    """
    backend = backend or get_backend("numpy")
    Phi = uniform(backend, dtype, config.widths[0], shapes(config).slots, seed, "slots")
    experts = tuple(mlp.init(config.expert, seed, backend, dtype, ("expert", number))[0]
                    for number in range(config.experts))
    return SoftMoEParams(Phi, experts), ()


def forward(x: Array, params: SoftMoEParams, fixed: tuple[()], config: SoftMoEConfig,
            kept: Array | None = None, at: Pass = EVALUATION) -> tuple[Array, SoftMoECache]:
    """Return for each token a mean of what all slots put out.

    ``logits = X Phi^T``,  ``D = softmax(logits)`` over the tokens,  ``slots = D^T X``, of which
    expert e maps its S;  ``C = softmax(logits)`` over the slots,  ``Y = C (slot outputs)``

    Parameters
    ----------
    x : array (..., T, D), float
        T tokens; leading axes are free.
    params : SoftMoEParams
    fixed : ()
    config : SoftMoEConfig
    kept : bool array (..., E), optional
        The experts of which each input's tokens are combined: of the others the weights in C are
        0, and the rest sums to 1. All if not given.
    at : Pass
        Not read: nothing here differs in training.

    Returns
    -------
    y : array (..., T, D_out)
    cache : SoftMoECache

    Raises
    ------
    UserError
        If a shape does not fit, there are more slots to an expert than tokens, or `kept` leaves
        an input without an expert.

    Notes
    -----
    The published code divides tokens and Phi by their norms before the logits, which the equations
    of the paper do not have; nor has this.
    """
    check_arrays(x, params, config)
    routing = Linear(params.slots, None)
    logits, routing_cache = linear_forward(x, routing)  # (..., T, E S)
    slots, dispatch = dispatch_forward(x, logits, config.compute)  # (..., E S, D)
    made = [mlp.forward(part, p, (), config.expert)
            for part, p in zip(_by_expert(slots, config), params.experts, strict=True)]
    outputs = _side_by_side([y for y, _ in made])  # (..., E S, D_out)
    y, combine = combine_forward(outputs, logits, kept_slots(kept, x, config), config.compute)
    return y, SoftMoECache(routing_cache, dispatch, tuple(cache for _, cache in made), combine,
                           logits)


def backward(dy: Array, cache: SoftMoECache, params: SoftMoEParams, grads: SoftMoEParams,
             config: SoftMoEConfig, input_gradient: bool = True) -> Array | None:
    """Return dx (..., T, D) for dy (..., T, D_out), and add the gradients into `grads`.

    ``X`` is read three times: by the logits, which both softmaxes read, and by the slots. See
    ``docs/derivations/soft_mixture.md``.

    Parameters
    ----------
    dy : array (..., T, D_out)
    cache : SoftMoECache
    params, grads : SoftMoEParams
        `grads` may be `params` themselves: see `comet_np.optim`.
    config : SoftMoEConfig
    input_gradient : bool
        False returns None and saves two products: training does not need dx.

    Raises
    ------
    UserError
        If a shape does not fit, or `grads` cannot be written to.
    """
    check_cotangent(dy, (*cache.dispatch.x.shape[:-1], config.widths[-1]))
    check_shapes(grads, shapes(config), f"{_needs(config)} gradients")
    doutputs, dlogits = combine_backward(dy, cache.combine, config.compute)
    dslots = _side_by_side(
        [mlp.backward(part, made, p, g, config.expert) for part, made, p, g in zip(
            _by_expert(doutputs, config), cache.experts, params.experts, grads.experts,
            strict=True)])  # (..., E S, D)
    dx, of_dispatch = dispatch_backward(dslots, cache.dispatch, config.compute, input_gradient)
    through_logits = linear_backward(dlogits + of_dispatch, cache.routing,
                                     Linear(params.slots, None), Linear(grads.slots, None),
                                     None, input_gradient)
    return dx + through_logits if input_gradient else None


def parameter_count(config: SoftMoEConfig) -> int:
    """Return the number of trainable parameters, those of Phi and of all experts."""
    rows, columns = shapes(config).slots
    return rows * columns + config.experts * mlp.parameter_count(config.expert)


def kept_slots(kept: Array | None, x: Array, config: SoftMoEConfig) -> Array | None:
    """Return the slots (..., 1, E S) of the experts (..., E) that are kept, for all tokens of x.

    Raises
    ------
    UserError
        If `kept` is not a bool array of the experts of each input, or an input has none.
    """
    if kept is None:
        return None
    backend_of(kept, x)
    shape = (*x.shape[:-2], config.experts)
    if kept.dtype != bool or kept.shape != shape:
        raise UserError(f"`kept` says of each input which experts are kept, a bool array {shape}, "
                        f"got {described(kept)}")
    if not bool(kept.any(axis=-1).all()):
        raise UserError("`kept` leaves an input without an expert: keep at least one for each")
    return xp_of(kept).repeat(kept, config.slots, axis=-1)[..., None, :]


def check_arrays(x: Array, params: SoftMoEParams, config: SoftMoEConfig) -> None:
    """Raise a UserError unless x and the parameters fit the configuration."""
    check_shapes(params, shapes(config), f"{_needs(config)} parameters")
    backend_of(x, params.slots)
    if x.ndim < 2 or x.shape[-1] != config.widths[0]:
        raise UserError("a soft mixture maps the tokens of an input together, so x must have shape "
                        f"(..., T, {config.widths[0]}), got {x.shape}")
    if config.slots > x.shape[-2]:
        raise UserError(f"more slots than tokens make no sense, as an expert's slots are mixtures "
                        f"of T tokens, of which no more than T are independent: got {config.slots} "
                        f"slots an expert and T = {x.shape[-2]}")


def _needs(config: SoftMoEConfig) -> str:
    return (f"{config.experts} experts of widths {config.widths} and {config.slots} slots with "
            f"bias={config.bias} need SoftMoEParams(slots, experts), the")


def _by_expert(slots: Array, config: SoftMoEConfig) -> Array:
    """Return slots (..., E S, D) as (E, ..., S, D): those of each expert whole in memory."""
    apart = slots.reshape(*slots.shape[:-2], config.experts, config.slots, slots.shape[-1])
    xp = xp_of(slots)
    return xp.ascontiguousarray(xp.moveaxis(apart, -3, 0))


def _side_by_side(parts: list[Array]) -> Array:
    """Return the slots (..., S, D) of each of the experts as one array (..., E S, D)."""
    xp, shape = xp_of(parts[0]), parts[0].shape
    apart = xp.moveaxis(xp.stack(parts), 0, -3)  # (..., E, S, D)
    return apart.reshape(*shape[:-2], len(parts) * shape[-2], shape[-1])
