"""The MLP-Mixer with a gate in each of its MLPs: Sec. 4.2.2 of the paper."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..backends import Backend, backend_of, get_backend
from ..functional.linear import (
    Linear,
    LinearCache,
    check_cotangent,
    linear_backward,
    linear_forward,
)
from ..functional.norm import Norm, NormCache, norm_backward, norm_forward
from ..functional.patches import Image, from_patches, patch_count, patch_width, to_patches
from ..gates import EVALUATION, Comet, Gate, Pass
from ..tree import check_shapes, elements
from . import mlp
from .branch import (
    BranchCache,
    branch_backward,
    branch_forward,
    check_common,
    check_images,
    fresh_norm,
    linear,
    unpooled,
    within,
)
from .stream import routed, routing_multiply_adds, stream_init

Array = Any


@dataclass(frozen=True)
class MixerConfig:
    """The shape and rules of an MLP-Mixer; the defaults are the paper's small one, on CIFAR10.

    Attributes
    ----------
    image : tuple of int
        Colours, rows, columns.
    patch : int
        Side of a patch, P.
    classes : int
    width : int
        D, of a token: 512 and 3072 in the paper.
    depth : int
        Blocks.
    token_hidden : int
        Of the token mixing's MLP (T, token_hidden, T); 4 T in the code on which the paper builds.
    hidden : int
        Of the channel mixing's MLP (D, hidden, D); D / 2 in that code, the reverse of the usual.
    activation, gate, scale, compute
        Of all MLPs, see `comet_np.models.mlp.MLPConfig`.
    routing : {"block", "stream"}
        What a gate's input is: that of its MLP, as in the paper; or, for COMET, a stream of the
        network's input alone, see `comet_np.models.stream`.
    dropout : float
        Rate after an MLP's second map.
    hidden_dropout : float
        Rate after an MLP's activation.
    eps : float
        Of the norms.
    """

    image: Image = (3, 32, 32)
    patch: int = 4
    classes: int = 10
    width: int = 512
    depth: int = 6
    token_hidden: int = 256
    hidden: int = 256
    activation: str = "tanh"
    gate: Gate | None = field(default=Comet())
    routing: str = "block"
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    eps: float = 1e-5
    scale: float = 1.0
    compute: str | None = None

    def __post_init__(self) -> None:
        check_common(self, ("patch", "classes", "width", "depth", "token_hidden", "hidden"),
                     ("dropout", "hidden_dropout"))
        check_images(self)
        self.mlps  # noqa: B018 (what does not fit is refused now)

    @property
    def stream_embedding(self) -> tuple[int, int]:
        """The shape of a routing stream's map of patches."""
        return self.width, patch_width(self.image, self.patch)

    @property
    def tokens(self) -> int:
        """T."""
        return patch_count(self.image, self.patch)

    @functools.cached_property
    def mlps(self) -> tuple[mlp.MLPConfig, ...]:
        """The configurations of all MLPs, in order: of each block token and channel mixing."""
        token, channel = (
            mlp.MLPConfig((N, H, N), self.activation, self.gate, dropout=self.hidden_dropout,
                          scale=self.scale, compute=self.compute)
            for N, H in ((self.tokens, self.token_hidden), (self.width, self.hidden)))
        return self.depth * (token, channel)

    @property
    def across(self) -> tuple[bool, ...]:
        """Of each MLP whether it maps tokens, or else channels."""
        return self.depth * (True, False)


class Branch(NamedTuple):
    """Parameters of an MLP and the norm before it."""

    norm: Norm
    mlp: mlp.Params


class MixerParams(NamedTuple):
    """All parameters; branches: token and channel mixing of each block in turn."""

    patches: Linear
    branches: tuple[Branch, ...]
    norm: Norm
    head: Linear


class MixerCache(NamedTuple):
    """What `backward` reads."""

    patches: LinearCache
    branches: tuple[BranchCache, ...]
    norm: NormCache
    head: LinearCache

    @property
    def mlps(self) -> tuple[mlp.MLPCache, ...]:
        """The caches of all MLPs, of each block token and channel mixing."""
        return tuple(branch.mlp for branch in self.branches)

    @property
    def masks(self) -> tuple[Array | None, ...]:
        """m of each MLP: token mixing (..., D, token_hidden), channel mixing (..., T, hidden)."""
        return tuple(made.masks[0] for made in self.mlps)


@functools.cache
def shapes(config: MixerConfig) -> MixerParams:
    """Return the shapes of the parameters, a tree like the parameters themselves."""
    D, norm = config.width, Norm((config.width,), (config.width,))
    return MixerParams(Linear((D, patch_width(config.image, config.patch)), (D,)),
                       tuple(Branch(norm, mlp.shapes(one)) for one in config.mlps), norm,
                       Linear((config.classes, D), (config.classes,)))


def init(config: MixerConfig, seed: int = 0, backend: Backend | None = None,
         dtype: str = "float32") -> tuple[MixerParams, Any]:
    """Return freshly drawn parameters, and the fixed weights of the routing.

    Linear maps ``W, b ~ U(-1/sqrt(N_in), 1/sqrt(N_in))``, norms 1 and 0.

    Returns
    -------
    params : MixerParams
    fixed : tree
        A tree of the gate's fixed weights for each MLP; with routing="stream" a `Stream`.
    """
    backend = backend or get_backend("numpy")
    wanted = shapes(config)
    made = [mlp.init(one, seed, backend, dtype, ("branch", i))
            for i, one in enumerate(config.mlps)]
    params = MixerParams(
        linear(backend, dtype, wanted.patches, seed, "patches"),
        tuple(Branch(fresh_norm(backend, dtype, config.width), p) for p, _ in made),
        fresh_norm(backend, dtype, config.width),
        linear(backend, dtype, wanted.head, seed, "head"))
    if config.routing == "stream":
        return params, stream_init(config, seed, backend, dtype)
    return params, tuple(of_gate for _, of_gate in made)


def forward(x: Array, params: MixerParams, fixed: Any, config: MixerConfig,
            masks: Sequence[Array | None] | None = None,
            at: Pass = EVALUATION) -> tuple[Array, MixerCache]:
    """Return the logits (..., classes) of images.

    ``x = W patches + b``, and in each block  ``x = x + MLP_T(norm(x)^T)^T``,
    ``x = x + MLP_D(norm(x))``;  then norm, the mean over the tokens, head.

    Token mixing maps the T tokens of a channel, and is routed by them; channel mixing maps the D
    channels of a token.

    Parameters
    ----------
    x : array (..., C rows columns) or (..., C, rows, columns), float
    params : MixerParams
    fixed : tree
        As `init` returns it; not read if `masks` are given.
    config : MixerConfig
    masks : sequence of arrays, bool or bit-packed, optional
        Masks from outside instead of the gates', in the shapes and order of `MixerCache.masks`;
        None for an MLP without.
    at : Pass
        Whether in training, at which step, on which examples; evaluation if not given.

    Returns
    -------
    logits : array (..., classes)
    cache : MixerCache

    Raises
    ------
    UserError
        If a shape does not fit, or a routing score is NaN.
    """
    check_shapes(params, shapes(config), "this MixerConfig needs MixerParams")
    backend_of(x, params.head.weight)
    patches = to_patches(x, config.image, config.patch)  # (..., T, P P C)
    routing = routed(patches, fixed, config, masks)
    x, of_patches = linear_forward(patches, params.patches, config.compute)  # (..., T, D)
    branches = []
    for i, (p, one, (m, V)) in enumerate(zip(params.branches, config.mlps, routing, strict=True)):
        x, cache = branch_forward(x, p.norm, p.mlp, V, one, m, within(at, "branch", i),
                                  config.eps, config.dropout, config.across[i])
        branches.append(cache)
    x, norm = norm_forward(x, params.norm, config.eps)
    logits, head = linear_forward(x.mean(axis=-2), params.head, config.compute)
    return logits, MixerCache(of_patches, tuple(branches), norm, head)


def backward(dlogits: Array, cache: MixerCache, params: MixerParams, grads: MixerParams,
             config: MixerConfig, input_gradient: bool = True) -> Array | None:
    """Return dx, flat (..., C rows columns), and add the gradients of all parameters into `grads`.

    Masks are piecewise constant, so nothing flows through the gates.

    Parameters
    ----------
    dlogits : array (..., classes)
    cache : MixerCache
    params, grads : MixerParams
        `grads` may be `params` themselves: see `comet_np.optim`.
    config : MixerConfig
    input_gradient : bool
        False returns None and saves a product: training does not need dx.

    Raises
    ------
    UserError
        If a shape does not fit, or `grads` cannot be written to.
    """
    check_cotangent(dlogits, (*cache.head.x.shape[:-1], config.classes))
    check_shapes(grads, shapes(config), "this MixerConfig needs MixerParams, the gradients")
    d = linear_backward(dlogits, cache.head, params.head, grads.head, config.compute)
    dx = norm_backward(unpooled(d, config.tokens), cache.norm, params.norm, grads.norm)
    for i in reversed(range(len(config.mlps))):
        p, g = params.branches[i], grads.branches[i]
        dx = branch_backward(dx, cache.branches[i], p.norm, p.mlp, g.norm, g.mlp, config.mlps[i],
                             config.across[i])
    dpatches = linear_backward(dx, cache.patches, params.patches, grads.patches, config.compute,
                               input_gradient)
    return None if dpatches is None else from_patches(dpatches, config.image, config.patch)


def parameter_count(config: MixerConfig) -> int:
    """Return the number of trainable parameters (fixed weights of the routing are not counted)."""
    return elements(shapes(config))


def kept_numbers(config: MixerConfig) -> int:
    """Return about how many numbers a forward pass in training keeps of an example."""
    T, D = config.tokens, config.width
    hidden = (2 + bool(config.hidden_dropout)) * (D * config.token_hidden + T * config.hidden)
    return config.depth * (T * D * (6 + 2 * bool(config.dropout)) + hidden)


def multiply_adds(config: MixerConfig) -> tuple[int, int]:
    """Return the multiply-adds of one example in a training step: trained maps, routing."""
    T, D = config.tokens, config.width
    P = patch_width(config.image, config.patch)
    block = 2 * T * D * (config.token_hidden + config.hidden)
    trained = 2 * T * P * D + 3 * (config.depth * block + D * config.classes)
    return trained, routing_multiply_adds(config, config.depth * (D, T), T)
