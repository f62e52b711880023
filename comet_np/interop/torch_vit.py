"""The names of PyTorch's vision transformers: of the published code, Hugging Face's and timm's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UserError, unknown
from ..functional.attention import SelfAttention
from ..functional.patches import Embedding
from ..models import vit
from ..models.vit import Block, ViTConfig, ViTParams
from ..tree import check_shapes
from .places import (
    Place,
    fixed_to_places,
    from_places,
    layer,
    matches,
    routing_places,
    to_places,
)
from .torch_mlp import check_mapping

Array = Any
Tree = Any


class Names(NamedTuple):
    """What the parts of a ViT are called. Those from `attention_norm` on are behind ``block``.

    convolution : whether the map of the patches is one, with the colours of a patch apart.
    """

    token: str
    positions: str
    patches: str
    convolution: bool
    norm: str
    head: str
    block: str
    attention_norm: str
    qkv: tuple[str, ...]
    out: str
    mlp_norm: str
    first: str
    second: str
    mlp: str


STYLES = {
    "published": Names(
        "cls_token", "pos_embedding", "to_patch_embedding.1", False, "mlp_head.0", "mlp_head.1",
        "transformer.layers.{}.", "0.norm", ("0.fn.to_qkv",), "0.fn.to_out.0",
        "1.norm", "1.fn.net.0", "1.fn.net.3", "1.fn"),
    "huggingface": Names(
        "vit.embeddings.cls_token", "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection", True, "vit.layernorm", "classifier",
        "vit.encoder.layer.{}.", "layernorm_before",
        tuple(f"attention.attention.{each}" for each in ("query", "key", "value")),
        "attention.output.dense",
        "layernorm_after", "intermediate.dense", "output.dense", "intermediate"),
    "timm": Names(
        "cls_token", "pos_embed", "patch_embed.proj", True, "norm", "head",
        "blocks.{}.", "norm1", ("attn.qkv",), "attn.proj",
        "norm2", "mlp.fc1", "mlp.fc2", "mlp"),
}
# The modules of transformers 5 have other names than its files, which keep the old ones.
STYLES["transformers"] = STYLES["huggingface"]._replace(
    block="vit.layers.{}.", qkv=tuple(f"attention.{each}_proj" for each in "qkv"),
    out="attention.o_proj", first="mlp.fc1", second="mlp.fc2", mlp="mlp")


def places_of(config: ViTConfig, style: str) -> tuple[ViTParams, Tree]:
    """Return the places of the parameters, and of the fixed weights, under the names of a style."""
    n = STYLES[style]
    if style == "timm" and config.pooling == "mean" and config.final_norm == "pooled":
        n = n._replace(norm="fc_norm")
    (patches, token, _), blocks, norm, head = vit.shapes(config)
    T, D, (C, _, _), P = config.tokens, config.width, config.image, config.patch
    embedding = Embedding(
        layer(patches, n.patches), token and Place((n.token,), token, (1, 1, D)),
        Place((n.positions,), (T, D), (1, T, D)))
    if n.convolution:
        weight = Place((f"{n.patches}.weight",), patches.weight, (D, C, P, P), (0, 2, 3, 1))
        embedding = embedding._replace(patches=embedding.patches._replace(weight=weight))
    ats = [n.block.format(i) for i in range(config.depth)]
    params = ViTParams(embedding, tuple(
        Block(layer(block.attention_norm, at + n.attention_norm),
              SelfAttention(layer(block.attention.qkv, *(at + part for part in n.qkv)),
                            layer(block.attention.out, at + n.out)),
              layer(block.mlp_norm, at + n.mlp_norm),
              tuple(layer(shape, at + module)
                    for shape, module in zip(block.mlp, (n.first, n.second), strict=True)))
        for at, block in zip(ats, blocks, strict=True)),
        norm and layer(norm, n.norm), layer(head, n.head))
    return params, routing_places(config, tuple(at + n.mlp for at in ats))


def check_style(config: ViTConfig, style: str) -> None:
    """Raise a UserError unless there is this style, and it has names for all of this ViT."""
    if not isinstance(style, str) or style not in STYLES:
        raise unknown("style of names", style, STYLES)
    if style in ("huggingface", "transformers") and (config.pooling != "class"
                                                     or config.final_norm is None):
        raise UserError("Hugging Face's ViTForImageClassification reads a class token after a norm:"
                        ' expected a ViTConfig of pooling="class" and with a final norm, got '
                        f'"{config.pooling}" and {config.final_norm!r}')


def vit_from_torch(named: Mapping[str, Array], config: ViTConfig) -> tuple[ViTParams, Tree]:
    """Return a ViT's parameters and fixed weights from arrays under their PyTorch names.

    Parameters
    ----------
    named : mapping of str to array
        NumPy or CuPy arrays, or PyTorch tensors (as of ``module.state_dict()``), all of one dtype,
        in one of the styles that `vit_to_torch` writes: which one follows from the names.
    config : ViTConfig
        Of a pretrained model without COMET: with ``gate=None``. Its parameters go with any gate:
        the fixed weights are then those of `comet_np.models.vit.init`.

    Returns
    -------
    params, fixed
        Copies, of the backend of the arrays; of tensors, NumPy arrays. `fixed` is a tuple of ()
        where the gate has no fixed weights, or others than one array a block.

    Raises
    ------
    UserError
        If tensors are missing, unexpected, or of another shape: the first of them are named; or if
        a dtype does not fit.
    BackendError
        If a value is no array of a backend, or two are of different ones.

    Notes
    -----
    A final norm of the class token is the same before and after pooling, so that for
    ``pooling="class"`` Hugging Face's and timm's names go with either ``final_norm``.
    """
    check_mapping(named)
    style = max(STYLES, key=lambda style: matches(named, places_of(config, style)))
    check_style(config, style)
    return from_places(named, places_of(config, style), config)


def vit_to_torch(params: ViTParams, fixed: Tree, config: ViTConfig,
                 style: str = "published") -> dict[str, Array]:
    """Return a ViT's weights (or gradients of the same structure) under their PyTorch names.

    Parameters
    ----------
    params : ViTParams
    fixed : tree
        As `comet_np.models.vit.init` returns it; () leaves it out, as with gradients.
    config : ViTConfig
    style : {"published", "huggingface", "timm", "transformers"}
        Whose names: of the code on which the paper builds (kentaroy47/vision-transformers-cifar10);
        of the files of Hugging Face's ViTForImageClassification; of timm's VisionTransformer; of
        the modules of ViTForImageClassification in transformers 5, as ``state_dict()`` has them.

    Returns
    -------
    dict of str to array
        Views where they can be. Routing weights, for which no code is published, stand where the
        MLP of a block does: V in ``transformer.layers.{i}.1.fn.spec.weight``,
        ``vit.encoder.layer.{i}.intermediate.spec.weight``, ``blocks.{i}.mlp.spec.weight`` or
        ``vit.layers.{i}.mlp.spec.weight``. Of a routing stream U is beside V, in
        ``spec_back.weight``, and E, whose columns are in the order of our patches, in
        ``spec_embedding.weight``.

    Raises
    ------
    UserError
        If the weights do not fit the configuration, or the style has no names for it.
    """
    check_style(config, style)
    check_shapes(params, vit.shapes(config), "this ViTConfig needs ViTParams")
    places, of_fixed = places_of(config, style)
    return to_places(params, places) | fixed_to_places(fixed, of_fixed)
