"""The names of Hugging Face's GPT2LMHeadModel."""

import re
from collections.abc import Mapping
from typing import Any

from ..backends import backend_of
from ..errors import UserError
from ..functional.attention import SelfAttention
from ..functional.tokens import TokenEmbedding
from ..models import gpt2
from ..models.block import Block
from ..models.gpt2 import GPT2Config, GPT2Params
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
from .torch_mlp import array_of, check_backend, check_mapping

Array = Any
Tree = Any

PREFIX = "transformer."
HEAD = "lm_head.weight"
# Old files hold the causal mask, and the number that stands for its minus infinity.
BUFFER = re.compile(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias", re.DOTALL)


def places_of(config: GPT2Config, prefix: str = PREFIX) -> tuple[GPT2Params, Tree]:
    """Return the places of the parameters, and of the fixed weights, behind a prefix."""
    (tokens, positions), blocks, norm = gpt2.shapes(config)
    ats = [f"{prefix}h.{i}." for i in range(config.depth)]
    params = GPT2Params(
        TokenEmbedding(Place((f"{prefix}wte.weight",), tokens),
                       Place((f"{prefix}wpe.weight",), positions)),
        tuple(Block(layer(block.attention_norm, f"{at}ln_1"),
                    SelfAttention(_map(block.attention.qkv, f"{at}attn.c_attn"),
                                  _map(block.attention.out, f"{at}attn.c_proj")),
                    layer(block.mlp_norm, f"{at}ln_2"),
                    tuple(_map(shape, f"{at}mlp.{name}")
                          for shape, name in zip(block.mlp, ("c_fc", "c_proj"), strict=True)))
              for at, block in zip(ats, blocks, strict=True)),
        layer(norm, f"{prefix}ln_f"))
    return params, routing_places(config, tuple(f"{at}mlp" for at in ats))


def _map(shape: Any, module: str) -> Any:
    """Return the places of a map, whose weight stands there as (N_in, N), our transpose."""
    places = layer(shape, module)
    weight = places.weight
    return places._replace(weight=Place(weight.names, weight.shape, weight.shape[::-1], (1, 0)))


def gpt2_from_torch(named: Mapping[str, Array], config: GPT2Config) -> tuple[GPT2Params, Tree]:
    """Return a GPT-2's parameters and fixed weights from arrays under their PyTorch names.

    Parameters
    ----------
    named : mapping of str to array
        NumPy or CuPy arrays, or PyTorch tensors (as of ``module.state_dict()``), all of one dtype,
        under the names that `gpt2_to_torch` writes, or all of them without ``transformer.``, as in
        old files, whose causal masks are passed over. ``lm_head.weight``, the table of tokens
        again, may be there too, or alone.
    config : GPT2Config
        Of a pretrained model without COMET: with ``gate=None``. Its parameters go with any gate:
        the fixed weights are then those of `comet_np.models.gpt2.init`.

    Returns
    -------
    params, fixed
        Copies, of the backend of the arrays; of tensors, NumPy arrays. `fixed` is a tuple of ()
        where the gate has no fixed weights, or others than one array a block.

    Raises
    ------
    UserError
        If tensors are missing, unexpected, or of another shape: the first of them are named; if
        the head is another than the table of tokens; or if a dtype does not fit.
    BackendError
        If a value is no array of a backend, or two are of different ones.
    """
    check_mapping(named)
    places = max((places_of(config, prefix) for prefix in (PREFIX, "")),
                 key=lambda places: matches(named, places))
    named = {name: array for name, array in named.items() if not BUFFER.fullmatch(str(name))}
    table = places[0].embedding.tokens.names[0]
    if HEAD not in named:
        return from_places(named, places, config)
    head = named.pop(HEAD)
    params, fixed = from_places({table: head} | named, places, config)
    _check_tied(array_of(HEAD, head), params.embedding.tokens, table)
    return params, fixed


def _check_tied(head: Array, tokens: Array, table: str) -> None:
    """Raise a UserError unless the head is the table of tokens."""
    check_backend(HEAD, tokens, head)
    if head.shape != tokens.shape or not backend_of(head).xp.array_equal(
            head, tokens, equal_nan=True):
        raise UserError(f'"{HEAD}" {head.shape} is not "{table}" {tokens.shape}, and in GPT-2 the '
                        "head is the table of tokens: a model with a head of its own is another")


def gpt2_to_torch(params: GPT2Params, fixed: Tree, config: GPT2Config) -> dict[str, Array]:
    """Return a GPT-2's weights (or gradients of the same structure) under their PyTorch names.

    Parameters
    ----------
    params : GPT2Params
    fixed : tree
        As `comet_np.models.gpt2.init` returns it; () leaves it out, as with gradients.
    config : GPT2Config

    Returns
    -------
    dict of str to array
        Views, under the names of ``GPT2LMHeadModel.named_parameters()``: ``transformer.wte.weight``
        is the head's too, and the maps of a block stand there as (N_in, N), our transpose. Routing
        weights, for which no code is published, stand where the MLP of a block does: V (H, D) in
        ``transformer.h.{i}.mlp.spec.weight``; of a routing stream U is beside it, in
        ``spec_back.weight``, and its table of tokens in ``spec_embedding.weight``.

    Raises
    ------
    UserError
        If the weights do not fit the configuration.
    """
    check_shapes(params, gpt2.shapes(config), "this GPT2Config needs GPT2Params")
    places, of_fixed = places_of(config)
    return to_places(params, places) | fixed_to_places(fixed, of_fixed)
