"""Parameters under the names of published implementations, and models of one's own by their trees.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..models import module_of
from ..models.mlp import MLPConfig
from ..models.moe import MoEConfig
from ..tree import named_leaves, tree_map
from .torch_mlp import has_names, mlp_from_torch, mlp_to_torch
from .torch_moe import moe_from_torch, moe_to_torch

__all__ = ["mlp_from_torch", "mlp_to_torch", "moe_from_torch", "moe_to_torch", "named_weights",
           "weights_of"]

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
    params, fixed = module_of(config).init(config)
    like = {"params": params, "fixed": fixed}
    shapes = {name: array.shape for name, array in named_leaves(like)}
    given = {name: array.shape for name, array in named.items()}
    if shapes != given:
        raise UserError(f"a {type(config).__name__} needs weights of shapes {shapes}, got {given}")
    names = iter(shapes)
    found = tree_map(lambda array: named[next(names)], like)
    return found["params"], found["fixed"]
