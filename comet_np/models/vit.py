"""The vision transformer, ViT, with a gate in the MLPs of its blocks: Sec. 4.2.2 of the paper."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..backends import Backend, backend_of, get_backend, xp_of
from ..errors import UserError, unknown
from ..functional.attention import SelfAttention
from ..functional.dropout import DropoutCache
from ..functional.linear import (
    Linear,
    LinearCache,
    check_cotangent,
    linear_backward,
    linear_forward,
)
from ..functional.norm import Norm, NormCache, norm_backward, norm_forward
from ..functional.patches import (
    Embedding,
    Image,
    embedding_backward,
    embedding_forward,
    from_patches,
    patch_count,
    patch_width,
    to_patches,
)
from ..gates import EVALUATION, Comet, Gate, Pass
from ..rng import normal
from ..tree import check_shapes, elements
from . import mlp
from .block import (
    Block,
    BlockCache,
    BlockInput,
    block_multiply_adds,
    block_shapes,
    blocks_backward,
    blocks_forward,
    check_heads,
    mlp_caches,
)
from .branch import check_common, check_images, dropped, fresh_norm, linear, undropped, unpooled
from .stream import routed, routing_multiply_adds, stream_init

Array = Any
POOLINGS = ("class", "mean")
FINAL_NORMS = ("pooled", "tokens", None)


@dataclass(frozen=True)
class ViTConfig:
    """The shape and rules of a ViT; the defaults are the paper's small one, on CIFAR10.

    Attributes
    ----------
    image : tuple of int
        Colours, rows, columns.
    patch : int
        Side of a patch, P.
    classes : int
    width : int
        D, of a token.
    depth : int
        Blocks.
    heads : int
        Of attention; they divide the width.
    hidden : int
        H, of the MLP (D, H, D) of each block: 512, 3072 and 6144 in the paper.
    activation, gate, scale, compute
        Of the MLPs, see `comet_np.models.mlp.MLPConfig`; `compute` is the format of all products.
    routing : {"block", "stream"}
        What the gate's input is: that of the MLP itself, as in the paper; or, for COMET, a stream
        of the network's input alone, see `comet_np.models.stream`.
    dropout : float
        Rate after the embedding, after attention's projection and after an MLP's second map.
    hidden_dropout : float
        Rate after an MLP's activation.
    weight_dropout : float
        Rate of attention's weights.
    qkv_bias : bool
        Whether queries, keys and values have biases, as in Hugging Face's and timm's ViT.
    pooling : {"class", "mean"}
        What the head reads: a class token, or the mean of all tokens, of which none is then one.
    final_norm : {"pooled", "tokens", None}
        Where the last norm stands: on what was pooled, on all tokens before, or nowhere.
    eps : float
        Of the norms; 1e-12 in Hugging Face's ViT, 1e-6 in timm's.
    """

    image: Image = (3, 32, 32)
    patch: int = 4
    classes: int = 10
    width: int = 512
    depth: int = 6
    heads: int = 8
    hidden: int = 512
    activation: str = "tanh"
    gate: Gate | None = field(default=Comet())
    routing: str = "block"
    dropout: float = 0.1
    hidden_dropout: float = 0.1
    weight_dropout: float = 0.0
    qkv_bias: bool = False
    pooling: str = "class"
    final_norm: str | None = "pooled"
    eps: float = 1e-5
    scale: float = 1.0
    compute: str | None = None

    def __post_init__(self) -> None:
        check_common(self, ("patch", "classes", "width", "depth", "heads", "hidden"),
                     ("dropout", "hidden_dropout", "weight_dropout"))
        check_images(self)
        check_heads(self.heads, self.width)
        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS)
        if self.final_norm not in FINAL_NORMS:
            raise UserError("final_norm is one of \"pooled\", \"tokens\" and None, got "
                            f"{self.final_norm!r}")
        self.mlps  # noqa: B018 (what does not fit is refused now)

    @functools.cached_property
    def mlps(self) -> tuple[mlp.MLPConfig, ...]:
        """The configurations of all MLPs, one a block, in order."""
        one = mlp.MLPConfig((self.width, self.hidden, self.width), self.activation, self.gate,
                            dropout=self.hidden_dropout, scale=self.scale, compute=self.compute)
        return self.depth * (one,)

    @property
    def across(self) -> tuple[bool, ...]:
        """Of each MLP whether it maps tokens; here all map channels."""
        return self.depth * (False,)

    @property
    def stream_embedding(self) -> tuple[int, int]:
        """The shape of a routing stream's map of patches."""
        return self.width, patch_width(self.image, self.patch)

    @property
    def tokens(self) -> int:
        """T, the class token included."""
        return patch_count(self.image, self.patch) + (self.pooling == "class")


class ViTParams(NamedTuple):
    """All parameters; norm is None without a final norm."""

    embedding: Embedding
    blocks: tuple[Block, ...]
    norm: Norm | None
    head: Linear


class ViTCache(NamedTuple):
    """What `backward` reads."""

    embedding: LinearCache
    dropped: DropoutCache | None
    blocks: tuple[BlockCache | BlockInput, ...]
    norm: NormCache | None
    head: LinearCache

    @property
    def mlps(self) -> tuple[mlp.MLPCache, ...]:
        """The caches of all MLPs, one a block."""
        return mlp_caches(self.blocks)

    @property
    def masks(self) -> tuple[Array | None, ...]:
        """m of each block's MLP, bool (..., T, H); None where there is no mask."""
        return tuple(block.mask for block in self.blocks)


@functools.cache
def shapes(config: ViTConfig) -> ViTParams:
    """Return the shapes of the parameters, a tree like the parameters themselves."""
    D, P = config.width, patch_width(config.image, config.patch)
    embedding = Embedding(Linear((D, P), (D,)), (D,) if config.pooling == "class" else None,
                          (config.tokens, D))
    return ViTParams(embedding, block_shapes(config, config.qkv_bias),
                     Norm((D,), (D,)) if config.final_norm else None,
                     Linear((config.classes, D), (config.classes,)))


def init(config: ViTConfig, seed: int = 0, backend: Backend | None = None,
         dtype: str = "float32") -> tuple[ViTParams, Any]:
    """Return freshly drawn parameters, and the fixed weights of the routing.

    Linear maps ``W, b ~ U(-1/sqrt(N_in), 1/sqrt(N_in))``, class token and positions ``~ N(0, 1)``,
    norms 1 and 0: the laws of the code on which the paper builds.

    Returns
    -------
    params : ViTParams
    fixed : tree
        A tree of the gate's fixed weights for each block; with routing="stream" a `Stream`.
    """
    backend = backend or get_backend("numpy")
    wanted, D = shapes(config), config.width
    blocks, fixed = [], []
    for i, block in enumerate(wanted.blocks):
        maps, of_gate = mlp.init(config.mlps[i], seed, backend, dtype, ("block", i))
        blocks.append(Block(
            fresh_norm(backend, dtype, D),
            SelfAttention(linear(backend, dtype, block.attention.qkv, seed, "block", i, "qkv"),
                          linear(backend, dtype, block.attention.out, seed, "block", i, "out")),
            fresh_norm(backend, dtype, D), maps))
        fixed.append(of_gate)
    embedding = Embedding(
        linear(backend, dtype, wanted.embedding.patches, seed, "patches"),
        normal(backend, dtype, 1.0, (D,), seed, "token") if config.pooling == "class" else None,
        normal(backend, dtype, 1.0, (config.tokens, D), seed, "positions"))
    params = ViTParams(embedding, tuple(blocks),
                       fresh_norm(backend, dtype, D) if config.final_norm else None,
                       linear(backend, dtype, wanted.head, seed, "head"))
    if config.routing == "stream":
        return params, stream_init(config, seed, backend, dtype)
    return params, tuple(fixed)


def forward(x: Array, params: ViTParams, fixed: Any, config: ViTConfig,
            masks: Sequence[Array | None] | None = None,
            at: Pass = EVALUATION) -> tuple[Array, ViTCache]:
    """Return the logits (..., classes) of images.

    ``x_0 = embedding(patches)``, and in each block
    ``x = x + attention(norm(x))``,  ``x = x + MLP(norm(x))``;  then pooling, norm, head.

    The MLP is that of `comet_np.models.mlp`, eq. (7)-(8), its routing input the normed x: a token
    is routed by itself.

    Parameters
    ----------
    x : array (..., C rows columns) or (..., C, rows, columns), float
    params : ViTParams
    fixed : tree
        As `init` returns it; not read if `masks` are given.
    config : ViTConfig
    masks : sequence of arrays (..., T, H), bool or bit-packed, optional
        Masks from outside, one a block, instead of the gate's; None for a block without.
    at : Pass
        Whether in training, at which step, on which examples; evaluation if not given.

    Returns
    -------
    logits : array (..., classes)
    cache : ViTCache

    Raises
    ------
    UserError
        If a shape does not fit, or a routing score is NaN.
    """
    check_shapes(params, shapes(config), "this ViTConfig needs ViTParams")
    backend_of(x, params.head.weight)
    patches = to_patches(x, config.image, config.patch)  # (..., T', P P C)
    routing = routed(patches, fixed, config, masks, config.pooling == "class")
    x, embedding = embedding_forward(patches, params.embedding, config.compute)  # (..., T, D)
    x, of_drop = dropped(x, config.dropout, at, "embedding")
    x, blocks = blocks_forward(x, params.blocks, routing, config, at)
    norm = None
    if config.final_norm == "tokens" and params.norm is not None:
        x, norm = norm_forward(x, params.norm, config.eps)
    pooled = x[..., 0, :] if config.pooling == "class" else x.mean(axis=-2)  # (..., D)
    if config.final_norm == "pooled" and params.norm is not None:
        pooled, norm = norm_forward(pooled, params.norm, config.eps)
    logits, head = linear_forward(pooled, params.head, config.compute)
    return logits, ViTCache(embedding, of_drop, blocks, norm, head)


def backward(dlogits: Array, cache: ViTCache, params: ViTParams, grads: ViTParams,
             config: ViTConfig, input_gradient: bool = True) -> Array | None:
    """Return dx, flat (..., C rows columns), and add the gradients of all parameters into `grads`.

    Masks are piecewise constant, so nothing flows through the gates.

    Parameters
    ----------
    dlogits : array (..., classes)
    cache : ViTCache
    params, grads : ViTParams
        `grads` may be `params` themselves: see `comet_np.optim`.
    config : ViTConfig
    input_gradient : bool
        False returns None and saves a product: training does not need dx.

    Raises
    ------
    UserError
        If a shape does not fit, or `grads` cannot be written to.
    """
    check_cotangent(dlogits, (*cache.head.x.shape[:-1], config.classes))
    check_shapes(grads, shapes(config), "this ViTConfig needs ViTParams, the gradients")
    d = linear_backward(dlogits, cache.head, params.head, grads.head, config.compute)
    if config.final_norm == "pooled":
        d = norm_backward(d, cache.norm, params.norm, grads.norm)
    dx = _unpooled(d, config)  # (..., T, D)
    if config.final_norm == "tokens":
        dx = norm_backward(dx, cache.norm, params.norm, grads.norm)
    dx = blocks_backward(dx, cache.blocks, params.blocks, grads.blocks, config)
    dx = undropped(dx, cache.dropped)
    dpatches = embedding_backward(dx, cache.embedding, params.embedding, grads.embedding,
                                  config.compute, input_gradient)
    return None if dpatches is None else from_patches(dpatches, config.image, config.patch)


def _unpooled(d: Array, config: ViTConfig) -> Array:
    """Return the gradient by the tokens (..., T, D) of one by what was pooled of them (..., D)."""
    if config.pooling == "mean":
        return unpooled(d, config.tokens)
    dx = xp_of(d).zeros((*d.shape[:-1], config.tokens, d.shape[-1]), dtype=d.dtype)
    dx[..., 0, :] = d
    return dx


def parameter_count(config: ViTConfig) -> int:
    """Return the number of trainable parameters (fixed weights of the routing are not counted)."""
    return elements(shapes(config))


def kept_numbers(config: ViTConfig) -> int:
    """Return about how many numbers a forward pass in training keeps of an example."""
    D, H = config.width, config.hidden
    factors = 2 * D * bool(config.dropout) + H * bool(config.hidden_dropout)
    return config.depth * config.tokens * (8 * D + 2 * H + config.heads * config.tokens + factors)


def multiply_adds(config: ViTConfig) -> tuple[int, int]:
    """Return the multiply-adds of one example in a training step: trained maps, routing."""
    T, D = config.tokens, config.width
    P, patches = patch_width(config.image, config.patch), patch_count(config.image, config.patch)
    blocks = config.depth * block_multiply_adds(T, D, config.hidden)
    trained = 2 * patches * P * D + 3 * (blocks + D * config.classes)
    return trained, routing_multiply_adds(config, config.depth * (T,), patches)
