"""Where the masks of a network of several MLPs come from: outside, each MLP's gate, or one stream.

The routing stream is the routing network of eq. (4)-(6) in the shape of the network that it routes.
It sees the network's input alone, so that the same input always meets the same experts; a gate
within a block sees what the blocks before it have learnt to make of the input.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..backends import Backend, xp_of
from ..errors import UserError
from ..functional.activations import activation, masked
from ..functional.linear import project
from ..functional.routing import whole
from ..gates import Comet
from ..gates.comet import Routed
from ..rng import uniform
from ..tree import check_shapes
from .branch import Masks, turned
from .mlp import MLPConfig

Array = Any
Tree = Any


class Stream(NamedTuple):
    """Fixed weights of a stream: its embedding; of each MLP V (H, N) and U (N, H).

    The embedding is a map of patches (D, P P C), or a row for each entry of a vocabulary (V, D).
    The last MLP has no U, which would route nothing: None.
    """

    embedding: Array
    maps: tuple[tuple[Array, Array | None], ...]


def stream_shapes(config: Any) -> Stream:
    """Return the shapes of a stream's weights: those of the trained maps that it stands beside."""
    widths = [one.widths for one in config.mlps]
    maps = tuple(((H, N), (N, H) if i < len(widths) else None)
                 for i, (N, H, _) in enumerate(widths, start=1))
    return Stream(config.stream_embedding, maps)


def stream_init(config: Any, seed: int, backend: Backend, dtype: str) -> Stream:
    """Return a stream's weights, drawn from the law that initialises the trained ones."""
    def draw(shape: tuple[int, int] | None, *name: str | int) -> Array | None:
        if shape is None:
            return None
        return uniform(backend, dtype, shape[1], shape, seed, "stream", *name)

    embedding, maps = stream_shapes(config)
    return Stream(draw(embedding, "E"),
                  tuple((draw(V, "V", i), draw(U, "U", i)) for i, (V, U) in enumerate(maps)))


def stream_masks(x: Array, stream: Stream, gate: Comet, across: Sequence[bool],
                 token: bool = False) -> tuple[Array, ...]:
    """Return the masks of all MLPs as a function of the network's input alone.

    ``s = E patch``, or of a token its row of E, and for each MLP
    ``c = V s``,  ``m = C_k(c)``,  ``s = U (m o g(c))``

    Parameters
    ----------
    x : array (..., T, P P C) of patches, or int array (..., T) of tokens
    stream : Stream
    gate : Comet
        p_k, the rule for ties, and g.
    across : sequence of bool
        Of each MLP whether it maps the tokens of a channel, as the token mixing of an MLP-Mixer.
    token : bool
        Whether a class token stands before the others; it begins with the mean of their s.
    """
    E = stream.embedding
    s = E[x] if x.dtype.kind in "iu" else project(whole(x), E)  # (..., T, D)
    if token:
        s = xp_of(s).concatenate([s.mean(axis=-2, keepdims=True), s], axis=-2)
    masks = []
    for (V, U), turn in zip(stream.maps, across, strict=True):
        (c,), (m,), _ = gate.trace(turned(s, turn), (V,))  # (..., T, H)
        masks.append(m)
        if U is not None:
            s = turned(project(masked(c, m, activation(gate.g)), U), turn)
    return tuple(masks)


def routed(x: Array, fixed: Tree, config: Any, masks: Sequence[Array | None] | None,
           token: bool = False) -> list[tuple[Masks, Tree]]:
    """Return for each MLP its masks, or None for those of its gate, and the gate's fixed weights.

    Raises
    ------
    UserError
        If `masks`, from outside, or the fixed weights are not one for each MLP.
    """
    mlps: Sequence[MLPConfig] = config.mlps

    def count(values: Any) -> Any:
        return len(values) if isinstance(values, tuple | list) else type(values).__name__

    if masks is None and config.routing == "block":
        if not isinstance(fixed, tuple | list) or len(fixed) != len(mlps):
            raise UserError(f"the fixed weights are a tree for each of the {len(mlps)} gates, as "
                            "init of the model returns them second, got "
                            f"{count(fixed)}")
        return [(None, each) for each in fixed]
    if masks is None:
        check_shapes(fixed, stream_shapes(config), "routing=\"stream\" needs the fixed weights "
                                                   "Stream(embedding, maps)")
        masks = stream_masks(x, fixed, config.gate, config.across, token)
    if not isinstance(masks, tuple | list) or len(masks) != len(mlps):
        raise UserError(f"masks from outside are one for each of the {len(mlps)} MLPs, got "
                        f"{count(masks)}")
    return [((m,), ()) for m in masks]


def routing_multiply_adds(config: Any, rows: Sequence[int], embedded: int) -> int:
    """Return the multiply-adds of one example's routing.

    `rows` says on how many rows each MLP works, `embedded` of how many patches a stream makes s by
    a product.
    """
    if not isinstance(config.gate, Routed):
        return 0
    each = [n * config.gate.multiply_adds(one.widths)
            for n, one in zip(rows, config.mlps, strict=True)]
    if config.routing == "block":
        return sum(each)
    return 2 * sum(each) - each[-1] + embedded * math.prod(config.stream_embedding)
