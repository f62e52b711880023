"""The mixture of experts of the paper's comparison: whole MLPs, of which a gate chooses one.

The gate looks at the network's input; which expert it chooses, and with which weight, is in
`comet_np.functional.mixture`.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np

from ..backends import Backend, backend_of, described, get_backend
from ..errors import UserError, unknown
from ..functional.linear import check_cotangent
from ..functional.mixture import WeightCache, one_hot, top_1, weight_backward, weight_forward
from ..gates import EVALUATION, Pass
from ..tree import check_shapes, leaves, zeros_like
from . import mlp
from .mlp import MLPCache, MLPConfig

__all__ = ["MoECache", "MoEConfig", "MoEParams", "backward", "counts", "forward", "init",
           "parameter_count", "quantities", "shapes", "zeros_like"]

Array = Any
GATES = ("weighted", "hard")


@dataclass(frozen=True)
class MoEConfig:
    """The shape and rules of a mixture of experts.

    Attributes
    ----------
    widths : tuple of int
        Of one expert: N_0 (inputs), n_1, ..., N_L (outputs). In the paper n_l = p_k N_l.
    experts : int
        E. In the paper 1 / p_k, rounded down.
    activation : str
        f, of the experts.
    gate : {"weighted", "hard"}
        "weighted" (the paper): an MLP with one hidden layer, whose softmax weighs the output of the
        chosen expert. "hard" (the published code): one layer, which only chooses. No gradient
        reaches it, so it is never trained, whatever `trainable` says, and lies in `fixed`.
    trainable : bool
        Whether the weighted gate is trained; if not, it lies in `fixed`.
    gate_width : int, optional
        Neurons of the weighted gate's hidden layer, of which the paper does not say the number; as
        many as an expert's first layer has if not given.
    gate_activation : str, optional
        Of that hidden layer, of which the paper does not say it either; f if not given.
    bias : bool
        Whether the layers have biases, of the experts and of the gate.
    compute : str or None
        The format in which products of the experts read their operands, see `comet_np.precision`.
        The gate's are never reduced, as that changes choices.
    initial : {"paper", "he"}
        The law of the initial weights of the experts and of the gate, see `mlp.init`.
    """

    widths: tuple[int, ...]
    experts: int
    activation: str = "softplus"
    gate: Literal["weighted", "hard"] = "weighted"
    trainable: bool = True
    gate_width: int | None = None
    gate_activation: str | None = None
    bias: bool = True
    compute: str | None = None
    initial: str = "paper"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if not isinstance(self.experts, Integral) or self.experts < 1:
            raise UserError("experts is how many there are, an integer of at least 1, got "
                            f"{self.experts!r}")
        if self.gate not in GATES:
            raise unknown("gate of a mixture of experts", self.gate, GATES)
        if self.gate_width is not None and (not isinstance(self.gate_width, Integral)
                                            or self.gate_width < 1):
            raise UserError("gate_width is how many neurons the gate's hidden layer has, an "
                            f"integer of at least 1, got {self.gate_width!r}")
        for name in ("gate_width", "gate_activation"):
            if self.gate == "hard" and getattr(self, name) is not None:
                raise UserError(f"a hard gate is one layer without a hidden one: leave {name} out, "
                                f"got {getattr(self, name)}")
        _ = self.expert, self.gating  # say what is wrong with the rest

    @property
    def trains_gate(self) -> bool:
        """Whether the gate is among the parameters; it is fixed otherwise."""
        return self.gate == "weighted" and self.trainable

    @functools.cached_property
    def expert(self) -> MLPConfig:
        """The configuration of one expert."""
        return MLPConfig(self.widths, self.activation, None, self.bias, compute=self.compute,
                         initial=self.initial)

    @functools.cached_property
    def gating(self) -> MLPConfig:
        """The configuration of the gate."""
        hidden = () if self.gate == "hard" else (self.gate_width or self.widths[1],)
        return MLPConfig((self.widths[0], *hidden, self.experts),
                         self.gate_activation or self.activation, None, self.bias,
                         initial=self.initial)


class MoEParams(NamedTuple):
    """Parameters: of the gate, None when it is fixed, and of each expert."""

    gate: mlp.Params | None
    experts: tuple[mlp.Params, ...]


class ExpertCache(NamedTuple):
    """What the backward of an expert reads.

    rows : int64 array of the examples that it saw, or a slice of all. y : its output for them.
    """

    rows: Array | slice
    y: Array
    cache: MLPCache


class MoECache(NamedTuple):
    """What `backward` reads, and the gate's scores.

    chosen : bool (..., E), one expert an example. weight : (...), 1 of a hard gate. weighing :
    WeightCache, None of a hard gate. gate : its parameters. scores : (..., E), and gating :
    MLPCache, both None if the gate was not asked. experts : an ExpertCache each, None of one
    without examples.
    """

    chosen: Array
    weight: Array
    weighing: WeightCache | None
    gate: mlp.Params
    scores: Array | None
    gating: MLPCache | None
    experts: tuple[ExpertCache | None, ...]


@functools.cache
def shapes(config: MoEConfig) -> MoEParams:
    """Return the shapes of the parameters, a tree like the parameters themselves."""
    return MoEParams(mlp.shapes(config.gating) if config.trains_gate else None,
                     (mlp.shapes(config.expert),) * config.experts)


def init(config: MoEConfig, seed: int = 0, backend: Backend | None = None,
         dtype: str = "float32") -> tuple[MoEParams, tuple[Any, ...]]:
    """Return freshly drawn parameters, and the gate's if it is fixed, else ().

    Gate and experts are drawn as `comet_np.models.mlp.init` does, each array from a random stream
    of its own: a fixed gate is the one from which a trained one of the same seed starts.
    """
    backend = backend or get_backend("numpy")
    gate, _ = mlp.init(config.gating, seed, backend, dtype, ("gate",))
    experts = tuple(mlp.init(config.expert, seed, backend, dtype, ("expert", e))[0]
                    for e in range(config.experts))
    return placed(gate, experts, config)


def placed(gate: mlp.Params, experts: tuple[mlp.Params, ...],
           config: MoEConfig) -> tuple[MoEParams, tuple[Any, ...]]:
    """Return the parameters, and the gate's if it is fixed, else ()."""
    return (MoEParams(gate, experts), ()) if config.trains_gate else (MoEParams(None, experts),
                                                                      gate)


def forward(x: Array, params: MoEParams, fixed: Any, config: MoEConfig,
            choice: Array | None = None, at: Pass = EVALUATION) -> tuple[Array, MoECache]:
    """Return the network's output: that of the chosen expert, times its weight.

    ``s = gate(x)``,  ``e = argmax_j s_j``,  ``g = softmax(s)``,  ``y = g_e expert_e(x)``;
    without g_e of a hard gate

    On a CPU an expert computes its own examples only. On a device, where shapes may not depend on
    data as a step is captured once, every expert computes all of them.

    Parameters
    ----------
    x : array (..., N_0), float
    params : MoEParams
    fixed : tuple
        The gate's parameters if it is fixed, else ().
    config : MoEConfig
    choice : int array (...), optional
        The expert of each example from outside, instead of the gate's; a weight is still the
        gate's.
    at : Pass
        Of no consequence: training and evaluation are the same.

    Returns
    -------
    y : array (..., N_L)
    cache : MoECache

    Raises
    ------
    UserError
        If a shape does not fit, or an expert is chosen that does not exist (on a CPU).
    """
    check_arrays(x, params, fixed, config)
    backend, expert = backend_of(x), config.expert
    xp, lead, dtype = backend.xp, x.shape[:-1], _dtype(x, params)
    gate = fixed if params.gate is None else params.gate
    scores = gating = weighing = None
    if choice is not None:
        check_choice(choice, x, config)
    if choice is None or config.gate == "weighted":
        scores, gating = mlp.forward(x, gate, (), config.gating)  # (..., E)
    chosen = one_hot(top_1(scores) if choice is None else choice, config.experts)  # (..., E)
    if config.gate == "weighted":
        weight, weighing = weight_forward(scores, chosen)  # (...)
    else:
        weight = xp.ones(lead, dtype=dtype)
    x, masks, factor = (a.reshape(prod(lead), a.shape[-1])
                        for a in (x, chosen, weight[..., None]))
    y = xp.zeros((len(x), config.widths[-1]), dtype=dtype)
    experts: list[ExpertCache | None] = []
    for e, p in enumerate(params.experts):
        rows: Any = slice(None) if backend.waits else xp.nonzero(masks[:, e])[0]
        if not backend.waits and not len(rows):
            experts.append(None)
            continue
        y_e, cache = mlp.forward(x[rows], p, (), expert)  # (rows, N_L)
        y[rows] += xp.where(masks[rows, e, None], factor[rows] * y_e, 0)
        experts.append(ExpertCache(rows, y_e, cache))
    made = MoECache(chosen, weight, weighing, gate, scores, gating, tuple(experts))
    return y.reshape(*lead, config.widths[-1]), made


def backward(dy: Array, cache: MoECache, params: MoEParams, grads: MoEParams, config: MoEConfig,
             input_gradient: bool = True) -> Array | None:
    """Return dx and add the gradients of all parameters into `grads`.

    ``dexpert_e = g_e dy``,  ``dg_e = sum_i dy_i expert_e(x)_i``,
    ``ds_j = g_e ([j = e] - g_j) dg_e``

    The choice is piecewise constant, so nothing flows through it: an expert that was not chosen
    gets a gradient of 0, and a hard gate, whose g_e is no factor, none.

    Parameters
    ----------
    dy : array (..., N_L)
        The gradient of the loss by the output.
    cache : MoECache
    params, grads : MoEParams
        `grads` may be `params` themselves: see `comet_np.optim`.
    config : MoEConfig
    input_gradient : bool
        False returns None and saves products: training does not need dx.

    Raises
    ------
    UserError
        If a shape does not fit, or `grads` cannot be written to.
    """
    check_shapes(grads, shapes(config), "the gradients of a mixture of experts need arrays, as of "
                                        "zeros_like(params),")
    lead, expert = cache.chosen.shape[:-1], config.expert
    check_cotangent(dy, (*lead, config.widths[-1]))
    xp, dtype = backend_of(dy).xp, _dtype(dy, params)
    dy, masks, factor = (a.reshape(prod(lead), a.shape[-1])
                         for a in (dy, cache.chosen, cache.weight[..., None]))
    dx = xp.zeros((len(dy), config.widths[0]), dtype=dtype) if input_gradient else None
    dweight = xp.zeros(len(dy), dtype=dtype)
    # A fixed gate learns nothing: what flows into it matters for dx only.
    through_gate = cache.weighing is not None and (config.trainable or input_gradient)
    for e, part in enumerate(cache.experts):
        if part is None:
            continue
        rows, y_e, made = part
        mine = masks[rows, e, None]
        if through_gate:
            dweight[rows] += xp.where(mine, dy[rows] * y_e, 0).sum(axis=-1)
        dy_e = xp.where(mine, factor[rows] * dy[rows], 0)  # (rows, N_L)
        dx_e = mlp.backward(dy_e, made, params.experts[e], grads.experts[e], expert, input_gradient)
        if dx is not None:
            dx[rows] += dx_e
    if dx is not None:
        dx = dx.reshape(*lead, config.widths[0])
    if through_gate:
        assert cache.weighing is not None and cache.gating is not None
        ds = weight_backward(dweight.reshape(lead), cache.weighing)  # (..., E)
        to = zeros_like(cache.gate) if grads.gate is None else grads.gate
        dx_gate = mlp.backward(ds, cache.gating, cache.gate, to, config.gating, input_gradient)
        dx = dx if dx is None else dx + dx_gate
    return dx


def _dtype(x: Array, params: MoEParams) -> Any:
    return np.result_type(x.dtype, params.experts[0][0].weight.dtype)


def counts(cache: MoECache, config: MoEConfig) -> dict[str, Array]:
    """Return how many examples chose each expert: ``load_0 .. load_{E-1}``, 0-d arrays.

    Of an example with more axes of its own (..., N_0) the share that did.
    """
    chosen, inner = cache.chosen, prod(cache.chosen.shape[1:-1])
    loads = chosen.reshape(-1, config.experts).sum(axis=0) / inner
    return {f"load_{e}": loads[e] for e in range(config.experts)}


def quantities(params: MoEParams, cache: MoECache, y: Array) -> Iterator[tuple[str, Array]]:
    """Yield what a forward pass read and made, by its name in the paper, in order."""
    if cache.gating is not None:
        for name, array in mlp.quantities(cache.gate, cache.gating, cache.scores):
            yield f"{name} of the gate", array
    for e, part in enumerate(cache.experts):
        if part is not None:
            for name, array in mlp.quantities(params.experts[e], part.cache, part.y):
                yield f"{name} of expert {e}", array
    yield "the output y", y


def parameter_count(config: MoEConfig) -> int:
    """Return the number of trainable parameters (a fixed gate's are not counted)."""
    gate = mlp.parameter_count(config.gating) if config.trains_gate else 0
    return gate + config.experts * mlp.parameter_count(config.expert)


def multiply_adds(config: MoEConfig) -> tuple[int, int]:
    """Return the multiply-adds of one example in a training step: trained layers, a fixed gate."""
    expert, gate = (mlp.multiply_adds(part)[0] for part in (config.expert, config.gating))
    once = sum(prod(layer.weight) for layer in mlp.shapes(config.gating))
    return (expert + gate, 0) if config.trains_gate else (expert, once)


def check_arrays(x: Array, params: MoEParams, fixed: Any, config: MoEConfig) -> None:
    """Raise a UserError unless x, the parameters and the fixed gate fit the configuration."""
    what = f"{config.experts} experts of widths {config.widths} with bias={config.bias} "
    gate = "a gate that is trained" if config.trains_gate else "a gate that is fixed"
    check_shapes(params, shapes(config), f"{what}and {gate} need parameters")
    if config.trains_gate:
        if any(True for _ in leaves(fixed)):
            raise UserError("a mixture of experts with a gate that is trained has no fixed "
                            "weights, expected (): got some (was trainable=False meant?)")
    else:
        check_shapes(fixed, mlp.shapes(config.gating), f"{what}and {gate} need fixed weights, of "
                                                       "the gate,")
    mlp.check_arrays(x, params.experts[0], config.expert)


def check_choice(choice: Array, x: Array, config: MoEConfig) -> None:
    """Raise a UserError unless `choice` says an expert for each example; a device is not read."""
    backend = backend_of(x, choice)
    if choice.dtype.kind not in "iu" or choice.shape != x.shape[:-1]:
        raise UserError("choice is the number of an expert for each example, an integer array of "
                        f"shape {x.shape[:-1]}, got {described(choice)}")
    if not backend.waits and choice.size:
        low, high = int(choice.min()), int(choice.max())
        if low < 0 or high >= config.experts:
            raise UserError(f"choice must lie in 0..{config.experts - 1} for {config.experts} "
                            f"experts, got {low}..{high}")
