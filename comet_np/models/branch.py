"""What all blocks share: the MLP with its norm, dropout, and the sum."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

from ..backends import Backend, xp_of
from ..errors import UserError, unknown
from ..functional.dropout import DropoutCache, check_rate, dropout_backward, dropout_forward
from ..functional.linear import Linear
from ..functional.norm import Norm, NormCache, norm_backward, norm_forward
from ..functional.patches import check_patch
from ..gates import Comet, Pass
from ..rng import key, seed_of, uniform
from . import mlp

Array = Any
Tree = Any
Masks = tuple[Array | None, ...] | None
ROUTINGS = ("block", "stream")


def linear(backend: Backend, dtype: str, shape: Linear, seed: int, *name: str | int) -> Linear:
    """Return a layer of these shapes: ``W, b ~ U(-1/sqrt(N_in), 1/sqrt(N_in))``."""
    W, b = shape
    return Linear(uniform(backend, dtype, W[1], W, seed, *name, "W"),
                  None if b is None else uniform(backend, dtype, W[1], b, seed, *name, "b"))


def fresh_norm(backend: Backend, dtype: str, D: int) -> Norm:
    """Return the gain 1 and the bias 0."""
    return Norm(backend.xp.ones(D, dtype=dtype), backend.xp.zeros(D, dtype=dtype))


def dropped(x: Array, rate: float, at: Pass, *name: str) -> tuple[Array, DropoutCache | None]:
    """Return x with dropout in training, by the stream of this name, and its cache if any."""
    if not rate or not at.train:
        return x, None
    return dropout_forward(x, rate, key(at.seed, *name), at.step)


def undropped(dy: Array, cache: DropoutCache | None) -> Array:
    """Return the gradient by what `dropped` was given."""
    return dy if cache is None else dropout_backward(dy, cache)


def unpooled(d: Array, T: int) -> Array:
    """Return the gradient by T tokens (..., T, D) of one by their mean (..., D)."""
    return xp_of(d).repeat(d[..., None, :] / T, T, axis=-2)


def within(at: Pass, *name: str | int) -> Pass:
    """Return the pass as a part of a model sees it: with random streams of its own."""
    return at._replace(seed=seed_of(at.seed, *name))


class BranchCache(NamedTuple):
    """What `branch_backward` reads."""

    norm: NormCache
    mlp: mlp.MLPCache
    dropped: DropoutCache | None


def branch_forward(x: Array, norm: Norm, p: mlp.Params, fixed: Tree, config: mlp.MLPConfig,
                   masks: Masks, at: Pass, eps: float, rate: float,
                   across: bool = False) -> tuple[Array, BranchCache]:
    """Return ``x + dropout(MLP(norm(x)))``: x (..., T, D) -> (..., T, D).

    The MLP's gate has the normed x for its input. With `across` the MLP maps the tokens of each
    channel, (..., D, T), not the channels of each token.

    `masks`, those of `comet_np.models.mlp.forward`, are one from outside, or None for the gate's.
    """
    y, of_norm = norm_forward(x, norm, eps)
    y, of_mlp = mlp.forward(turned(y, across), p, fixed, config, masks, at)
    y, of_drop = dropped(turned(y, across), rate, at, "second map")
    return x + y, BranchCache(of_norm, of_mlp, of_drop)


def branch_backward(dy: Array, cache: BranchCache, norm: Norm, p: mlp.Params, g_norm: Norm,
                    g: mlp.Params, config: mlp.MLPConfig, across: bool = False) -> Array:
    """Return dx (..., T, D) for dy (..., T, D), and add the gradients into `g_norm` and `g`."""
    d = turned(undropped(dy, cache.dropped), across)
    d = turned(mlp.backward(d, cache.mlp, p, g, config), across)
    return dy + norm_backward(d, cache.norm, norm, g_norm)


def turned(x: Array, across: bool) -> Array:
    """Return tokens (..., T, D) as channels (..., D, T) or the other way round, if `across`."""
    return xp_of(x).ascontiguousarray(x.swapaxes(-1, -2)) if across else x


def check_common(config: Any, sizes: Sequence[str], rates: Sequence[str]) -> None:
    """Raise a UserError unless the fields that the configurations share are possible."""
    for name in sizes:
        value: Any = getattr(config, name)
        if not isinstance(value, Integral) or int(value) < 1:
            raise UserError(f"{name} is an integer of at least 1, got {value!r}")
    for name in rates:
        check_rate(getattr(config, name))
    for name, low in ("eps", 0.0), ("scale", -math.inf):
        value = getattr(config, name)
        if not isinstance(value, Real) or not low < float(value) < math.inf:
            raise UserError(f"{name} is a finite number{' above 0' * (low == 0)}, got {value!r}")
    if config.routing not in ROUTINGS:
        raise unknown("routing", config.routing, ROUTINGS)
    if config.routing == "stream" and not isinstance(config.gate, Comet):
        raise UserError("a routing stream is COMET's: configure it with a gate "
                        f"comet_np.gates.Comet(...), or routing=\"block\", got {config.gate!r}")
    if config.routing == "stream" and config.gate.exact:
        raise UserError("a routing stream is not exact, since it passes through maps that round: "
                        "configure it with gates.Comet(exact=False), or routing=\"block\"")
    router = getattr(config.gate, "router", "dense")
    if config.routing == "stream" and router != "dense":
        raise UserError("a routing stream consists of dense maps: configure it with gates.Comet("
                        f'router="dense"), or routing="block", got router="{router}"')
    if router == "convolutional":
        raise UserError("the convolutional router sees images, and an MLP of a block sees none: "
                        'configure it with another router, as gates.Comet(router="dense")')


def check_images(config: Any) -> None:
    """Raise a UserError unless images can be cut into patches; make them a tuple."""
    image = config.image if isinstance(config.image, tuple | list) else (config.image,)
    object.__setattr__(config, "image", tuple(image))
    if len(image) != 3 or not all(isinstance(N, Integral) and int(N) >= 1 for N in image):
        raise UserError("image is (colours, rows, columns), each an integer of at least 1, got "
                        f"{tuple(image)}")
    check_patch(config.image, config.patch)
