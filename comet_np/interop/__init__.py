"""Parameters under the names of published implementations, and models of one's own by their trees.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..models import module_of
from ..models.gpt2 import GPT2Config
from ..models.mixer import MixerConfig
from ..models.mlp import MLPConfig
from ..models.moe import MoEConfig
from ..models.vit import ViTConfig
from ..tree import named_leaves, tree_map
from .huggingface import (
    load_huggingface_gpt2,
    load_huggingface_vit,
    save_huggingface_gpt2,
    save_huggingface_vit,
)
from .huggingface_config import gpt2_config_from_huggingface, vit_config_from_huggingface
from .places import has_places
from .tensors import load_safetensors, save_safetensors
from .torch_gpt2 import gpt2_from_torch, gpt2_to_torch
from .torch_mixer import mixer_from_torch, mixer_to_torch
from .torch_mlp import has_names, mlp_from_torch, mlp_to_torch
from .torch_moe import moe_from_torch, moe_to_torch
from .torch_vit import vit_from_torch, vit_to_torch

__all__ = ["gpt2_config_from_huggingface", "gpt2_from_torch", "gpt2_to_torch",
           "load_huggingface_gpt2", "load_huggingface_vit", "load_safetensors", "mixer_from_torch",
           "mixer_to_torch", "mlp_from_torch", "mlp_to_torch", "moe_from_torch", "moe_to_torch",
           "named_weights", "save_huggingface_gpt2", "save_huggingface_vit", "save_safetensors",
           "vit_config_from_huggingface", "vit_from_torch", "vit_to_torch", "weights_of"]

Array = Any
Tree = Any


def named_weights(params: Tree, fixed: Tree, config: Any) -> dict[str, Array]:
    """Return all weights of a model, by the published names of its parameters if it has any.

    A model of one's own names them by their places, as ``"params.block.weight"``.
    """
    if isinstance(config, MLPConfig) and has_names(config):
        return mlp_to_torch(params, fixed)
    if isinstance(config, MoEConfig):
        return moe_to_torch(params, fixed)
    if isinstance(config, ViTConfig) and has_places(config):
        return vit_to_torch(params, fixed, config)
    if isinstance(config, MixerConfig) and has_places(config):
        return mixer_to_torch(params, fixed, config)
    if isinstance(config, GPT2Config) and has_places(config):
        return gpt2_to_torch(params, fixed, config)
    return dict(named_leaves({"params": params, "fixed": fixed}))


def weights_of(named: Mapping[str, Array], config: Any) -> tuple[Tree, Tree]:
    """Return the parameters and the fixed weights that `named_weights` names.

    Raises
    ------
    UserError
        If a name is missing or unknown, or a shape does not fit.
    """
    if isinstance(config, MLPConfig) and has_names(config):
        return mlp_from_torch(named, config)
    if isinstance(config, MoEConfig):
        return moe_from_torch(named, config)
    if isinstance(config, ViTConfig) and has_places(config):
        return vit_from_torch(named, config)
    if isinstance(config, MixerConfig) and has_places(config):
        return mixer_from_torch(named, config)
    if isinstance(config, GPT2Config) and has_places(config):
        return gpt2_from_torch(named, config)
    params, fixed = module_of(config).init(config)
    like = {"params": params, "fixed": fixed}
    shapes = {name: array.shape for name, array in named_leaves(like)}
    given = {name: array.shape for name, array in named.items()}
    if shapes != given:
        raise UserError(f"a {type(config).__name__} needs weights of shapes {shapes}, got {given}")
    names = iter(shapes)
    found = tree_map(lambda array: named[next(names)], like)
    return found["params"], found["fixed"]
