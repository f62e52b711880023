"""A network of one soft mixture of experts: tokens, the mixture, the mean over tokens, a read-out.

A model like those of `comet_np.models`, of the experiment `softmoe`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..backends import Backend, get_backend, xp_of
from ..errors import UserError
from ..functional.linear import Linear, LinearCache, linear_backward, linear_forward
from ..functional.soft_mixture import combine_forward
from ..gates import EVALUATION, Pass
from ..models import soft_moe
from ..models.soft_moe import SoftMoECache, SoftMoEConfig, SoftMoEParams
from ..rng import uniform

Array = Any
SIDE, COLOURS = 32, 3  # of an image


@dataclass(frozen=True)
class PooledConfig:
    """The shape of the network.

    Attributes
    ----------
    mixture : SoftMoEConfig
    tokens : int
        T, into which an input is cut.
    outputs : int
    patch : int or None
        The side of the square patches of an image, which are then the tokens, each with its
        position as T numbers, of which one is 1. None: the input is its tokens side by side.
    """

    mixture: SoftMoEConfig
    tokens: int
    outputs: int
    patch: int | None = None

    @property
    def inputs(self) -> int:
        """N_0, the length of an input."""
        features = self.mixture.widths[0]
        return self.tokens * (features if self.patch is None else features - self.tokens)


class PooledParams(NamedTuple):
    """mixture : SoftMoEParams. readout : Linear, from D_out to the outputs."""

    mixture: SoftMoEParams
    readout: Linear


class PooledCache(NamedTuple):
    """What `backward` and `combined` read."""

    mixture: SoftMoECache
    readout: LinearCache


def of_images(patch: int, hidden: int, out: int, experts: int, outputs: int,
              activation: str) -> PooledConfig:
    """Return the network of one-slot experts of one hidden layer for images of 32x32 pixels."""
    if patch < 1 or SIDE % patch:
        raise UserError(f"patches of {patch}x{patch} pixels do not fill an image of {SIDE}x{SIDE}: "
                        "choose 4, 8 or 16")
    tokens = (SIDE // patch) ** 2
    widths = (COLOURS * patch**2 + tokens, hidden, out)
    return PooledConfig(SoftMoEConfig(widths, experts, activation=activation), tokens, outputs,
                        patch)


def init(config: PooledConfig, seed: int = 0, backend: Backend | None = None,
         dtype: str = "float32") -> tuple[PooledParams, tuple[()]]:
    """Return freshly drawn parameters, and nothing fixed."""
    backend = backend or get_backend("numpy")
    D = config.mixture.widths[-1]
    readout = Linear(*(uniform(backend, dtype, D, shape, seed, "readout", name)
                       for name, shape in (("W", (config.outputs, D)), ("b", (config.outputs,)))))
    return PooledParams(soft_moe.init(config.mixture, seed, backend, dtype)[0], readout), ()


def forward(x: Array, params: PooledParams, fixed: tuple[()], config: PooledConfig,
            kept: Array | None = None, at: Pass = EVALUATION) -> tuple[Array, PooledCache]:
    """Return the network's output (n, outputs) for inputs x (n, N_0).

    ``y = W mean_t SoftMoE(X)_t + b``; `kept` as `soft_moe.forward` takes it.
    """
    Y, mixture = soft_moe.forward(tokens_of(x, config), params.mixture, fixed, config.mixture, kept)
    y, readout = linear_forward(Y.mean(axis=-2), params.readout)
    return y, PooledCache(mixture, readout)


def combined(cache: PooledCache, params: PooledParams, config: PooledConfig, kept: Array) -> Array:
    """Return the output if of each input only the experts that are kept, (n, E), are combined."""
    mixture = cache.mixture
    slots = soft_moe.kept_slots(kept, mixture.dispatch.x, config.mixture)
    Y, _ = combine_forward(mixture.combine.slots, mixture.logits, slots)
    return linear_forward(Y.mean(axis=-2), params.readout)[0]


def backward(dy: Array, cache: PooledCache, params: PooledParams, grads: PooledParams,
             config: PooledConfig, input_gradient: bool = True) -> Array | None:
    """Return dx (n, N_0) for dy (n, outputs), and add the gradients into `grads`."""
    dmean = linear_backward(dy, cache.readout, params.readout, grads.readout)
    dY = xp_of(dy).repeat(dmean[..., None, :] / config.tokens, config.tokens, axis=-2)
    dX = soft_moe.backward(dY, cache.mixture, params.mixture, grads.mixture, config.mixture,
                           input_gradient)
    return None if dX is None else inputs_of(dX, config)


def parameter_count(config: PooledConfig) -> int:
    """Return the number of trainable parameters."""
    return (soft_moe.parameter_count(config.mixture)
            + config.outputs * (config.mixture.widths[-1] + 1))


def tokens_of(x: Array, config: PooledConfig) -> Array:
    """Return the tokens (n, T, D) of inputs x (n, N_0)."""
    if config.patch is None:
        return x.reshape(len(x), config.tokens, -1)
    xp, across, patch = xp_of(x), SIDE // config.patch, config.patch
    cut = x.reshape(len(x), COLOURS, across, patch, across, patch).transpose(0, 2, 4, 1, 3, 5)
    X = cut.reshape(len(x), config.tokens, -1)  # (n, T, 3 patch^2)
    positions = xp.zeros_like(X[..., :1]) + xp.eye(config.tokens, dtype=x.dtype)
    return xp.concatenate([X, positions], axis=-1)


def inputs_of(dX: Array, config: PooledConfig) -> Array:
    """Return the gradient (n, N_0) by the inputs for that by their tokens (n, T, D)."""
    if config.patch is None:
        return dX.reshape(len(dX), -1)
    across, patch = SIDE // config.patch, config.patch
    cut = dX[..., :-config.tokens].reshape(len(dX), across, across, COLOURS, patch, patch)
    return cut.transpose(0, 3, 1, 4, 2, 5).reshape(len(dX), -1)  # undoes tokens_of
