"""SGD, momentum, Adam and AdamW over flat buffers, and gradient clipping.

Parameters, gradients and moments each lie in one buffer (`comet_np.tree.flatten`), so an update
is one pass over memory.

Plain SGD needs no gradient buffer. A backward pass *adds* parameter gradients into `grads` and is
linear in the cotangent, so with the cotangent scaled by -lr and ``grads = params`` it performs the
update itself:  ``backward(-lr * dlogits, cache, params, params, config)``. With weight decay or an
L1 penalty it adds into what `shrink` has made of the parameters, which then take its place.

An optimizer whose `scale` of the gradient is NaN leaves everything as it is: so a step whose
gradient overflowed is left out without asking the host, see `comet_np.precision.adjust`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .backends import backend_of, described, overridable, update_fits, writeable, xp_of
from .errors import UserError, unknown
from .settings import option

Array = Any

MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}  # in the state of each optimizer
OPTIMIZERS = tuple(MOMENTS)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its settings; the defaults and meanings are those of PyTorch.

    Attributes
    ----------
    name : {"sgd", "momentum", "adam", "adamw"}
    momentum : float
        mu, for "momentum".
    beta1, beta2, eps : float
        For "adam" and "adamw".
    weight_decay : float
        Added to the gradient as weight_decay * p; decoupled from it in "adamw".
    decay_biases : bool
        Whether biases and the gains of norms decay too.
    l1 : float
        Factor of an L1 penalty on the weights (biases are left out): ``g += l1 sign(p)``.
    clip_norm : float or None
        Scale the whole gradient down to at most this Euclidean norm.
    clip_value : float or None
        Clip each element to +-clip_value.
    """

    name: str = option("sgd", "sgd, momentum, adam or adamw", flag="optimizer")
    momentum: float = option(0.9, "for --optimizer momentum")
    beta1: float = option(0.9, "for adam and adamw")
    beta2: float = option(0.999, "for adam and adamw")
    eps: float = option(1e-8, "for adam and adamw")
    weight_decay: float = option(0.0, "weight decay")
    decay_biases: bool = option(True, "whether biases decay too")
    l1: float = option(0.0, "factor of an L1 penalty on the weights")
    clip_norm: float | None = option(None, "clip the gradient to this norm")
    clip_value: float | None = option(None, "clip each gradient element to this value")

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise unknown("optimizer", self.name, OPTIMIZERS)
        for field in ("momentum", "beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{field} must be in [0, 1), got {getattr(self, field)}")
        for field in ("eps", "weight_decay", "l1"):
            if not getattr(self, field) >= 0:
                raise UserError(f"{field} must be at least 0, got {getattr(self, field)}")
        for field in ("clip_norm", "clip_value"):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                raise UserError(f"{field} must be positive, got {getattr(self, field)}")

    @property
    def updates_in_backward(self) -> bool:
        """Whether backward(-lr * dlogits, ...) into the parameters, after `shrink`, is the update.
        """
        return self.name == "sgd" and self.clip_norm is None and self.clip_value is None

    @property
    def shrinks(self) -> bool:
        """Whether a step of SGD changes the parameters without a gradient too: see `shrink`."""
        return bool(self.weight_decay or self.l1)

    def decays(self, p: Array, matrices: int) -> list[tuple[slice, float]]:
        """Return the parts of the flat parameters, and the weight decay of each."""
        if self.weight_decay and not self.decay_biases:
            return [(slice(0, matrices), self.weight_decay), (slice(matrices, p.size), 0.0)]
        return [(slice(0, p.size), self.weight_decay)]


class OptimizerState(NamedTuple):
    """Steps done, and the moments (n,): velocity or first, second; None where there is none."""

    step: int
    first: Array | None
    second: Array | None


def init_state(p: Array, config: OptimizerConfig) -> OptimizerState:
    """Return the state before the first step for the flat parameters p (n,)."""
    xp = xp_of(p)
    first = None if config.name == "sgd" else xp.zeros_like(p)
    second = xp.zeros_like(p) if config.name in ("adam", "adamw") else None
    return OptimizerState(0, first, second)


def update(p: Array, g: Array, state: OptimizerState, lr: float, config: OptimizerConfig,
           matrices: int | None = None, scale: Array | float = 1.0) -> OptimizerState:
    """Clip the gradient, take one step of the optimizer on p in place, and return the new state.

    Parameters
    ----------
    p, g : arrays (n,)
        Flat parameters, changed in place, and gradients, which may be changed in place.
    state : OptimizerState
        Its moments are changed in place.
    lr : float
        Learning rate of this step, see `comet_np.schedules`.
    config : OptimizerConfig
    matrices : int, optional
        How many parameters at the front are elements of matrices, as `comet_np.tree.flatten` lays
        them; biases and gains lie behind. All if not given.
    scale : float or 0-d array
        The gradient is `scale` g: penalties and clipping mean that. If it is NaN, the step is left
        out: nothing changes but its number, from which Adam's corrections follow (PyTorch counts
        steps that are left out in schedules, and not in Adam).

    Raises
    ------
    UserError
        If the arrays are not flat, of one shape and dtype (one of floats), or one that is changed
        is read-only, or the state is that of another optimizer.
    """
    check_update(p, g, state, config)
    matrices = p.size if matrices is None else matrices
    if config.l1:
        g[:matrices] += config.l1 / scale * xp_of(p).sign(p[:matrices])
    if config.clip_value is not None:
        clip_value(g, config.clip_value / scale)
    if config.clip_norm is not None:
        scale = clip_scale(g, config.clip_norm, scale)
    step = state.step + 1
    for part, weight_decay in config.decays(p, matrices):
        first, second = (None if moment is None else moment[part]
                         for moment in (state.first, state.second))
        if config.name == "sgd":
            sgd(p[part], g[part], lr, weight_decay, scale)
        elif config.name == "momentum":
            momentum(p[part], g[part], first, lr, config.momentum, weight_decay, scale)
        else:
            adam(p[part], g[part], first, second, step, lr, config.beta1, config.beta2, config.eps,
                 weight_decay, config.name == "adamw", scale)
    return OptimizerState(step, state.first, state.second)


def check_update(p: Array, g: Array, state: OptimizerState, config: OptimizerConfig) -> None:
    """Raise a UserError unless the arrays of an update fit together and can be changed in place."""
    moments = [moment for moment in (state.first, state.second) if moment is not None]
    backend_of(p, g, *moments)
    wanted = MOMENTS[config.name]
    if len(moments) != wanted:
        raise UserError(f"the optimizer {config.name} has a state of {wanted} moments, got "
                        f"{len(moments)}: make it with init_state(p, config)")
    check_flat((p, *moments), g)
    if (config.l1 or config.clip_value is not None) and not writeable(g):
        raise UserError("an L1 penalty and clipping by value change the gradients in place, and "
                        "their array is read-only: give it a copy, g.copy()")


def check_flat(changed: Sequence[Array], g: Array) -> None:
    """Raise a UserError unless parameters and moments can be changed in place with the gradient g.
    """
    if not update_fits(changed, g):
        got = [described(a) + " (read-only)" * (not writeable(a)) for a in (*changed, g)]
        raise UserError("an update takes flat arrays of one shape and one dtype of floats, and "
                        f"changes the parameters and moments in place: got {', '.join(got)}")


def shrink(out: Array, p: Array, lr: Array | float, config: OptimizerConfig,
           matrices: int) -> None:
    """out = p - lr (weight_decay p + l1 sign(p)): all of a step of SGD but the gradient.

    Parameters
    ----------
    out, p : arrays (n,)
        What the gradient, times -lr, is then added to; the flat parameters.
    lr, config, matrices
        As of `update`.
    """
    for part, weight_decay in config.decays(p, matrices):
        penalized = max(min(matrices, part.stop) - part.start, 0) if config.l1 else 0
        middle = part.start + penalized
        for rows, l1 in ((slice(part.start, middle), config.l1), (slice(middle, part.stop), 0.0)):
            shrunk(out[rows], p[rows], lr * weight_decay, lr * l1)


def put(a: Array, new: Array, scale: Array | float) -> None:
    """a = new, in place, unless the scale of the gradient is NaN: the step is then left out."""
    if hasattr(scale, "dtype"):
        a[...] = xp_of(a).where(scale == scale, new, a)
    elif scale == scale:
        a[...] = new


@overridable
def shrunk(out: Array, p: Array, decay: Array | float, penalty: Array | float) -> None:
    """out = (1 - decay) p - penalty sign(p), in place on (n,)."""
    check_flat((out,), p)
    out[...] = (1 - decay) * p - penalty * xp_of(p).sign(p)


@overridable
def sgd(p: Array, g: Array, lr: float, weight_decay: float, scale: float) -> None:
    """p -= lr (scale g + weight_decay p), in place on (n,)."""
    check_flat((p,), g)
    put(p, p - (lr * (scale * g + weight_decay * p)).astype(p.dtype), scale)


@overridable
def momentum(p: Array, g: Array, v: Array, lr: float, mu: float, weight_decay: float,
             scale: float) -> None:
    """v = mu v + scale g + weight_decay p;  p -= lr v, in place on (n,)."""
    check_flat((p, v), g)
    put(v, mu * v + (scale * g + weight_decay * p).astype(p.dtype), scale)
    put(p, p - lr * v, scale)


@overridable
def adam(p: Array, g: Array, first: Array, second: Array, step: int, lr: float, beta1: float,
         beta2: float, eps: float, weight_decay: float, decoupled: bool, scale: float) -> None:
    """Adam (Kingma & Ba 2015), or AdamW (Loshchilov & Hutter 2019) if `decoupled`, on (n,).

    ``u = beta1 u + (1 - beta1) g``,  ``v = beta2 v + (1 - beta2) g^2``,
    ``p -= lr (u / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)``,
    with g scaled, and with weight decay in g or, decoupled, ``p -= lr weight_decay p`` before.
    """
    check_flat((p, first, second), g)
    g = (scale * g).astype(p.dtype)
    weight = p
    if decoupled:
        weight = (1 - lr * weight_decay) * p
    else:
        g = g + weight_decay * p
    put(first, beta1 * first + (1 - beta1) * g, scale)
    put(second, beta2 * second + (1 - beta2) * g * g, scale)
    denominator = second**0.5 / (1 - beta2**step) ** 0.5 + eps
    put(p, weight - lr / (1 - beta1**step) * first / denominator, scale)


@overridable
def squared_norm(g: Array) -> Array:
    """Return the squared Euclidean norm of g (n,), summed in float64: a 0-d array."""
    return (g.astype("float64") ** 2).sum()


def clip_scale(g: Array, clip_norm: float, scale: Array | float = 1.0) -> Array:
    """Return clipping by norm as a factor, a 0-d float64 array.

    ``scale min(1, clip_norm / (|scale g| + 1e-6))``

    The 1e-6 is PyTorch's, and keeps a zero gradient from dividing by zero. Where the norm alone is
    NaN, the factor is not, which would leave the step out: so that the parameters show it.
    """
    norm = scale * squared_norm(g) ** 0.5
    return scale * xp_of(g).fmin(clip_norm / (norm + 1e-6), 1.0)


def clip_value(g: Array, limit: Array | float) -> None:
    """Clip every element of g to +-limit, in place."""
    xp_of(g).clip(g, -limit, limit, out=g)
