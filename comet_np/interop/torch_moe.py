"""The names of the published PyTorch mixture of experts: an MLP each, and ``gating_network``."""

from collections.abc import Mapping
from typing import Any

from ..backends import backend_of
from ..errors import UserError
from ..models.moe import MoEConfig, MoEParams, placed
from ..tree import leaves
from .torch_mlp import check_mapping, mlp_from_torch, mlp_to_torch

Array = Any

GATE = "gating_network"


def moe_from_torch(named: Mapping[str, Array], config: MoEConfig) -> tuple[MoEParams, Any]:
    """Return the parameters and the fixed gate of a mixture of experts from their PyTorch names.

    Parameters
    ----------
    named : mapping of str to array
        NumPy or CuPy arrays, or PyTorch tensors, all of one dtype: ``experts.{e}.fc{l}.weight`` and
        ``.bias`` for e = 0..E-1 and l = 1..L; ``gating_network.fc1`` and, of a weighted gate,
        which the published code does not have, ``gating_network.fc2``.
    config : MoEConfig

    Returns
    -------
    params, fixed
        Copies, of the backend of the arrays; of tensors, NumPy arrays.

    Raises
    ------
    UserError
        If a name is missing or unknown, or a shape or dtype does not fit.
    BackendError
        If a value is no array of a backend, or two are of different ones.
    """
    check_mapping(named)
    configs = {f"experts.{e}": config.expert for e in range(config.experts)}
    configs[GATE] = config.gating
    parts: dict[str, dict[str, Array]] = {part: {} for part in configs}
    for name, array in named.items():
        part, _, rest = str(name).rpartition(".fc")
        if part not in parts:
            raise UserError(f'no parameter of this mixture of experts is called "{name}" (expected '
                            f"experts.0 to experts.{config.experts - 1} and {GATE}, each with "
                            "fc1.weight and so on)")
        parts[part][f"fc{rest}"] = array
    mlps = {}
    for part, of_part in configs.items():
        try:
            mlps[part], _ = mlp_from_torch(parts[part], of_part)
        except UserError as error:
            raise type(error)(f"{part}: {error}") from None
    arrays = list(leaves(mlps))
    backend_of(*arrays)
    if len(dtypes := {str(array.dtype) for array in arrays}) > 1:
        raise UserError("gate and experts must be of one dtype, got "
                        f"{' and '.join(sorted(dtypes))}: bring all to one")
    gate = mlps.pop(GATE)
    return placed(gate, tuple(mlps.values()), config)


def moe_to_torch(params: MoEParams, fixed: Any = ()) -> dict[str, Array]:
    """Return parameters (or gradients of the same structure) under their PyTorch names.

    Parameters
    ----------
    params : MoEParams
    fixed : tuple, optional
        The gate's parameters if it is fixed.

    Returns
    -------
    dict of str to array
        ``experts.{e}.fc{l}.weight`` and ``gating_network.fc{l}.weight``, and biases.
    """
    mlps = {f"experts.{e}": expert for e, expert in enumerate(params.experts)}
    mlps[GATE] = fixed if params.gate is None else params.gate
    return {f"{part}.{name}": array for part, one in mlps.items()
            for name, array in mlp_to_torch(one).items()}
