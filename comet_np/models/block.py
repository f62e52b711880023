"""The transformer block of a ViT and of a GPT-2: attention, and an MLP with a gate.

``x = x + attention(norm(x))``,  ``x = x + MLP(norm(x))``, each with dropout.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..errors import UserError
from ..functional.attention import (
    SelfAttention,
    SelfAttentionCache,
    self_attention_backward,
    self_attention_forward,
)
from ..functional.dropout import DropoutCache
from ..functional.linear import Linear
from ..functional.norm import Norm, NormCache, norm_backward, norm_forward
from ..functional.packing import unpacked
from ..gates import Pass
from ..rng import key
from . import mlp
from .branch import (
    BranchCache,
    Masks,
    branch_backward,
    branch_forward,
    dropped,
    undropped,
    within,
)

Array = Any
Tree = Any


class Block(NamedTuple):
    """Parameters of a block."""

    attention_norm: Norm
    attention: SelfAttention
    mlp_norm: Norm
    mlp: mlp.Params


class BlockCache(NamedTuple):
    """What the backward of a block reads."""

    norm: NormCache
    attention: SelfAttentionCache
    dropped: DropoutCache | None
    branch: BranchCache

    @property
    def mask(self) -> Array | None:
        """m of the MLP, bool (..., T, H), or None."""
        return self.branch.mlp.masks[0]


class BlockInput(NamedTuple):
    """What the backward of a block reads that computes its forward again: less memory, more time.

    x : array (..., T, D). m : of the MLP, as it was found, so that it is not routed again; bool
    (..., T, H) or bit-packed, or None. hidden : H. at : the pass, by which dropout is the same.
    """

    x: Array
    m: Array | None
    hidden: int
    at: Pass

    @property
    def mask(self) -> Array | None:
        """m of the MLP, bool (..., T, H), or None."""
        return self.m if self.m is None else unpacked(self.m, self.hidden)


def block_shapes(config: Any, qkv_bias: bool) -> tuple[Block, ...]:
    """Return the shapes of the parameters of all blocks."""
    D = config.width
    norm = Norm((D,), (D,))
    attention = SelfAttention(Linear((3 * D, D), (3 * D,) if qkv_bias else None),
                              Linear((D, D), (D,)))
    return config.depth * (Block(norm, attention, norm, mlp.shapes(config.mlps[0])),)


def block_multiply_adds(T: int, D: int, H: int) -> int:
    """Return the multiply-adds of a block's forward pass on T tokens: its maps, and attention."""
    return T * D * (4 * D + 2 * H) + 2 * T * T * D


def blocks_forward(x: Array, params: Sequence[Block], routing: Sequence[tuple[Masks, Tree]],
                   config: Any, at: Pass, causal: bool = False, recompute: bool = False
                   ) -> tuple[Array, tuple[BlockCache | BlockInput, ...]]:
    """Return what all blocks make of x (..., T, D), and a cache of each.

    Parameters
    ----------
    x : array (..., T, D)
    params : sequence of Block
    routing : as `comet_np.models.stream.routed` returns it
    config : ViTConfig or GPT2Config
    at : Pass
    causal : bool
        Whether a token sees itself and those before it only.
    recompute : bool
        Whether to keep of a block its input alone; the backward then computes the rest again.
    """
    caches: list[BlockCache | BlockInput] = []
    for i, (p, (masks, fixed)) in enumerate(zip(params, routing, strict=True)):
        here = within(at, "block", i)
        y, cache = block_forward(x, p, fixed, config, masks, here, causal)
        caches.append(BlockInput(x, cache.branch.mlp.hidden[0].m, config.hidden, here)
                      if recompute else cache)
        x = y
    return x, tuple(caches)


def blocks_backward(dy: Array, caches: Sequence[BlockCache | BlockInput], params: Sequence[Block],
                    grads: Sequence[Block], config: Any, causal: bool = False) -> Array:
    """Return dx (..., T, D) for dy (..., T, D), and add the gradients of all blocks into `grads`.
    """
    for cache, p, g in zip(reversed(caches), reversed(params), reversed(grads), strict=True):
        if isinstance(cache, BlockInput):
            _, cache = block_forward(cache.x, p, (), config, (cache.m,), cache.at, causal)
        dy = block_backward(dy, cache, p, g, config)
    return dy


def block_forward(x: Array, p: Block, fixed: Tree, config: Any, masks: Masks, at: Pass,
                  causal: bool = False) -> tuple[Array, BlockCache]:
    """Return ``x + drop(attention(norm(x)))``, and that with the MLP's branch: (..., T, D)."""
    y, norm = norm_forward(x, p.attention_norm, config.eps)
    weights = key(at.seed, "weights") if at.train else None
    y, attention = self_attention_forward(y, p.attention, config.heads, causal,
                                          config.weight_dropout, weights, at.step, config.compute)
    y, drop = dropped(y, config.dropout, at, "attention")
    y, branch = branch_forward(x + y, p.mlp_norm, p.mlp, fixed, config.mlps[0], masks, at,
                               config.eps, config.dropout)
    return y, BlockCache(norm, attention, drop, branch)


def block_backward(dy: Array, cache: BlockCache, p: Block, g: Block, config: Any) -> Array:
    """Return dx (..., T, D) for dy (..., T, D), and add the gradients of all parameters into `g`.
    """
    dx = branch_backward(dy, cache.branch, p.mlp_norm, p.mlp, g.mlp_norm, g.mlp, config.mlps[0])
    d = self_attention_backward(undropped(dx, cache.dropped), cache.attention, p.attention,
                                g.attention, config.heads, config.compute)
    return dx + norm_backward(d, cache.norm, p.attention_norm, g.attention_norm)


def mlp_caches(caches: Sequence[BlockCache | BlockInput]) -> tuple[mlp.MLPCache, ...]:
    """Return the caches of the MLPs of all blocks, but for those that are computed again."""
    return tuple(cache.branch.mlp for cache in caches if isinstance(cache, BlockCache))


def check_heads(heads: int, width: int) -> None:
    """Raise a UserError unless so many heads can share the width of a token."""
    if width % heads:
        raise UserError(f"{heads} heads do not divide the width {width}: choose a number of heads "
                        "that does")
