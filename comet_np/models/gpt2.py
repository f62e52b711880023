"""GPT-2 with a gate in the MLPs of its blocks: Sec. 4.3 of the paper.

The names and laws are those of Radford et al., 'Language models are unsupervised multitask
learners', 2019, as Hugging Face's transformers has them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..backends import Backend, backend_of, get_backend
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
from ..functional.tokens import TokenCache, TokenEmbedding, tokens_backward, tokens_forward
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
from .branch import check_common, dropped, fresh_norm, undropped
from .stream import routed, routing_multiply_adds, stream_init

Array = Any
STD = 0.02  # of the initial weights and embeddings
SIZES = {"small": {"depth": 12, "width": 768, "heads": 12},
         "medium": {"depth": 24, "width": 1024, "heads": 16},
         "large": {"depth": 36, "width": 1280, "heads": 20}}


@dataclass(frozen=True)
class GPT2Config:
    """The shape and rules of a GPT-2; the defaults are the small one, with the paper's MLPs.

    Attributes
    ----------
    vocabulary : int
        V, entries: 50257 of GPT-2's tokenizer, 50000 of the Hugging Face course's.
    positions : int
        P, the most tokens of a text.
    width : int
        D, of a token.
    depth : int
        Blocks.
    heads : int
        Of attention; they divide the width.
    hidden : int or None
        H, of the MLP (D, H, D) of each block; 4 D if not given.
    activation, gate, scale, compute
        Of the MLPs, see `comet_np.models.mlp.MLPConfig`; GPT-2's own activation is "gelu_new", the
        paper's tanh. `compute` is the format of all products.
    routing : {"block", "stream"}
        What the gate's input is: that of the MLP itself, as in the paper; or, for COMET, a stream
        of the tokens alone, see `comet_np.models.stream`.
    dropout : float
        Rate after the embedding, after attention's projection and after an MLP's second map.
    hidden_dropout : float
        Rate after an MLP's activation.
    weight_dropout : float
        Rate of attention's weights.
    eps : float
        Of the norms.
    context : int or None
        Tokens of an example in training, by which work and memory are told; P if not given.
    recompute : bool
        Whether a forward pass keeps of a block its input alone, and the backward computes it again:
        the same numbers, bit for bit, from less memory in more time.
    """

    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    activation: str = "tanh"
    gate: Gate | None = field(default=Comet())
    routing: str = "block"
    dropout: float = 0.1
    hidden_dropout: float = 0.0
    weight_dropout: float = 0.1
    eps: float = 1e-5
    scale: float = 1.0
    compute: str | None = None
    context: int | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        for name, value in ("hidden", 4 * self.width), ("context", self.positions):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_common(self, ("vocabulary", "positions", "width", "depth", "heads", "hidden",
                            "context"), ("dropout", "hidden_dropout", "weight_dropout"))
        check_heads(self.heads, self.width)
        if (self.context or 0) > self.positions:
            raise UserError(f"a text of {self.context} tokens, the context, is longer than the "
                            f"{self.positions} positions of this GPT-2: lower the one, or raise "
                            "the other")
        if not isinstance(self.recompute, bool):
            raise UserError(f"recompute is True or False, got {self.recompute!r}")
        self.mlps  # noqa: B018 (what does not fit is refused now)

    @functools.cached_property
    def mlps(self) -> tuple[mlp.MLPConfig, ...]:
        """The configurations of all MLPs, one a block, in order."""
        one = mlp.MLPConfig((self.width, self.hidden or 0, self.width), self.activation, self.gate,
                            dropout=self.hidden_dropout, scale=self.scale, compute=self.compute)
        return self.depth * (one,)

    @property
    def across(self) -> tuple[bool, ...]:
        """Of each MLP whether it maps tokens; here all map channels."""
        return self.depth * (False,)

    @property
    def stream_embedding(self) -> tuple[int, int]:
        """The shape of a routing stream's table of tokens."""
        return self.vocabulary, self.width


def of_size(name: str, **changes: Any) -> GPT2Config:
    """Return the configuration of a published size, "small", "medium" or "large", with changes.

    Raises
    ------
    UserError
        If there is none of that name.
    """
    if name not in SIZES:
        raise unknown("size of a GPT-2", name, SIZES)
    return GPT2Config(**SIZES[name] | changes)


class GPT2Params(NamedTuple):
    """All parameters; the table of tokens is the head's weight too."""

    embedding: TokenEmbedding
    blocks: tuple[Block, ...]
    norm: Norm

    @property
    def head(self) -> Linear:
        """The map of the last norm's output to logits."""
        return Linear(self.embedding.tokens, None)


class GPT2Cache(NamedTuple):
    """What `backward` reads."""

    embedding: TokenCache
    dropped: DropoutCache | None
    blocks: tuple[BlockCache | BlockInput, ...]
    norm: NormCache
    head: LinearCache

    @property
    def mlps(self) -> tuple[mlp.MLPCache, ...]:
        """The caches of all MLPs, one a block; none of those that are computed again."""
        return mlp_caches(self.blocks)

    @property
    def masks(self) -> tuple[Array | None, ...]:
        """m of each block's MLP, bool (..., T, H); None where there is no mask."""
        return tuple(block.mask for block in self.blocks)


@functools.cache
def shapes(config: GPT2Config) -> GPT2Params:
    """Return the shapes of the parameters, a tree like the parameters themselves."""
    D = config.width
    embedding = TokenEmbedding((config.vocabulary, D), (config.positions, D))
    return GPT2Params(embedding, block_shapes(config, True), Norm((D,), (D,)))


def init(config: GPT2Config, seed: int = 0, backend: Backend | None = None,
         dtype: str = "float32") -> tuple[GPT2Params, Any]:
    """Return freshly drawn parameters, and the fixed weights of the routing.

    Weights and embeddings ``~ N(0, 0.02^2)``; those of the maps back into the residual stream
    ``~ N(0, 0.02^2 / (2 depth))``, as so many of them are summed; biases 0; norms 1 and 0.

    Returns
    -------
    params : GPT2Params
    fixed : tree
        A tree of the gate's fixed weights for each block; with routing="stream" a `Stream`.
    """
    backend = backend or get_backend("numpy")
    back = STD / math.sqrt(2 * config.depth)

    def draw(shape: Linear, std: float, *name: str | int) -> Linear:
        return Linear(normal(backend, dtype, std, shape.weight, seed, *name, "W"),
                      backend.xp.zeros(shape.bias, dtype=dtype))

    wanted, D = shapes(config), config.width
    blocks = []
    for i, shape in enumerate(wanted.blocks):
        first, second = shape.mlp
        blocks.append(Block(
            fresh_norm(backend, dtype, D),
            SelfAttention(draw(shape.attention.qkv, STD, "block", i, "qkv"),
                          draw(shape.attention.out, back, "block", i, "out")),
            fresh_norm(backend, dtype, D),
            (draw(first, STD, "block", i, "first"), draw(second, back, "block", i, "second"))))
    embedding = TokenEmbedding(*(normal(backend, dtype, STD, shape, seed, name) for name, shape in
                                 wanted.embedding._asdict().items()))
    params = GPT2Params(embedding, tuple(blocks), fresh_norm(backend, dtype, D))
    if config.routing == "stream":
        return params, stream_init(config, seed, backend, dtype)
    return params, tuple(mlp.init_gate(one, seed, backend, dtype, ("block", i))
                         for i, one in enumerate(config.mlps))


def forward(tokens: Array, params: GPT2Params, fixed: Any, config: GPT2Config,
            masks: Sequence[Array | None] | None = None,
            at: Pass = EVALUATION) -> tuple[Array, GPT2Cache]:
    """Return the logits (..., T, V) of the token that follows each.

    ``x_t = E[token_t] + P[t]``, and in each block
    ``x = x + attention(norm(x))``,  ``x = x + MLP(norm(x))``;  then ``logits = E norm(x)``

    Attention is causal: a token sees itself and those before it. The MLP is that of
    `comet_np.models.mlp`, eq. (7)-(8), its routing input the normed x: a token is routed by itself.

    Parameters
    ----------
    tokens : int array (..., T)
    params : GPT2Params
    fixed : tree
        As `init` returns it; not read if `masks` are given.
    config : GPT2Config
    masks : sequence of arrays (..., T, H), bool or bit-packed, optional
        Masks from outside, one a block, instead of the gate's; None for a block without.
    at : Pass
        Whether in training, at which step, on which examples; evaluation if not given.

    Returns
    -------
    logits : array (..., T, V)
    cache : GPT2Cache

    Raises
    ------
    UserError
        If a shape does not fit, a token is not in the vocabulary, a text is longer than the
        context, or a routing score is NaN.
    """
    check_shapes(params, shapes(config), "this GPT2Config needs GPT2Params")
    backend_of(tokens, params.norm.gain)
    routing = routed(tokens, fixed, config, masks)
    x, embedding = tokens_forward(tokens, params.embedding)  # (..., T, D)
    x, of_drop = dropped(x, config.dropout, at, "embedding")
    x, blocks = blocks_forward(x, params.blocks, routing, config, at, causal=True,
                               recompute=config.recompute)
    x, norm = norm_forward(x, params.norm, config.eps)
    logits, head = linear_forward(x, params.head, config.compute)
    return logits, GPT2Cache(embedding, of_drop, blocks, norm, head)


def backward(dlogits: Array, cache: GPT2Cache, params: GPT2Params, grads: GPT2Params,
             config: GPT2Config, input_gradient: bool = False) -> None:
    """Add the gradients of all parameters into `grads`.

    The table of tokens has two: as the head, and as the embedding. Masks are piecewise constant, so
    nothing flows through the gates.

    Parameters
    ----------
    dlogits : array (..., T, V)
    cache : GPT2Cache
    params, grads : GPT2Params
        `grads` may be `params` themselves: see `comet_np.optim`.
    config : GPT2Config
    input_gradient : bool
        Tokens have no gradient: None is returned in any case.

    Raises
    ------
    UserError
        If a shape does not fit, or `grads` cannot be written to.
    """
    check_cotangent(dlogits, (*cache.head.x.shape[:-1], config.vocabulary))
    check_shapes(grads, shapes(config), "this GPT2Config needs GPT2Params, the gradients")
    dx = linear_backward(dlogits, cache.head, params.head, grads.head, config.compute)
    dx = norm_backward(dx, cache.norm, params.norm, grads.norm)
    dx = blocks_backward(dx, cache.blocks, params.blocks, grads.blocks, config, causal=True)
    tokens_backward(undropped(dx, cache.dropped), cache.embedding, grads.embedding)


def parameter_count(config: GPT2Config) -> int:
    """Return the number of trainable parameters (fixed weights of the routing are not counted)."""
    return elements(shapes(config))


def kept_numbers(config: GPT2Config) -> int:
    """Return about how many numbers a forward pass in training keeps of an example."""
    T, D, H = config.context or 0, config.width, config.hidden or 0
    factors = 2 * D * bool(config.dropout) + H * bool(config.hidden_dropout)
    heads = config.heads * T * (2 if config.weight_dropout else 1)
    block = 8 * D + 2 * H + heads + factors
    of_blocks = block + config.depth * (D + H // 4) if config.recompute else config.depth * block
    return T * (of_blocks + 3 * D + config.vocabulary)


def multiply_adds(config: GPT2Config) -> tuple[int, int]:
    """Return the multiply-adds of one example in a training step: trained maps, routing."""
    T, D, H = config.context or 0, config.width, config.hidden or 0
    times = 4 if config.recompute else 3
    trained = (times * config.depth * block_multiply_adds(T, D, H)
               + 3 * T * D * config.vocabulary)
    return trained, routing_multiply_adds(config, config.depth * (T,), 0)
