"""The names of the published PyTorch MLP: ``fc1..fcL`` trainable, ``spec_1..spec_L`` fixed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..backends import backend_of
from ..errors import UserError, nearest
from ..functional.linear import Linear
from ..gates.comet import Routed
from ..models.mlp import Fixed, MLPConfig, Params

Array = Any


def mlp_from_torch(named: Mapping[str, Array], config: MLPConfig) -> tuple[Params, Fixed]:
    """Return the MLP's parameters and fixed weights from arrays under their PyTorch names.

    Parameters
    ----------
    named : mapping of str to array
        NumPy or CuPy arrays, or PyTorch tensors (as of ``module.state_dict()``):
        ``fc{l}.weight`` (N_l, N_{l-1}) and, with bias, ``fc{l}.bias`` (N_l,) for l = 1..L;
        ``spec_{l}.weight`` (N_l, N_{l-1}) for the hidden layers of a gate with fixed weights. A
        ``spec_L.weight`` of the output layer, which the published model has and never uses, is
        passed over.
    config : MLPConfig

    Returns
    -------
    params, fixed
        Copies, of the backend of the arrays; of tensors, NumPy arrays.

    Raises
    ------
    UserError
        If a name is missing or unknown, or a shape does not fit.
    BackendError
        If a value is no array of a backend, or two are of different ones.
    """
    L = len(config.widths) - 1
    routed = isinstance(config.gate, Routed)
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in range(1, L + 1):
        matrix = config.widths[layer], config.widths[layer - 1]
        wanted[f"fc{layer}.weight"] = matrix
        if config.bias:
            wanted[f"fc{layer}.bias"] = (config.widths[layer],)
        if routed and layer < L:
            wanted[f"spec_{layer}.weight"] = matrix
    unused = {f"spec_{layer}.weight" for layer in range(1, L + 1)} - set(wanted)
    for name in named:
        if name not in wanted and name not in unused:
            raise UserError(f'no parameter of this MLP is called "{name}"{nearest(name, wanted)} '
                            f"(expected {', '.join(wanted)})")
    for name, expected in wanted.items():
        if name not in named:
            raise UserError(f'the parameter "{name}" of shape {expected} is missing (given: '
                            f"{', '.join(named) or 'none'})")
    arrays = {name: _array(named[name]) for name in wanted}
    backend_of(*arrays.values())
    for name, expected in wanted.items():
        if arrays[name].shape != expected:
            raise UserError(f'"{name}" must have shape {expected} for the widths {config.widths}, '
                            f"got {arrays[name].shape}")
    params = tuple(Linear(arrays[f"fc{layer}.weight"], arrays.get(f"fc{layer}.bias"))
                   for layer in range(1, L + 1))
    return params, tuple(arrays[f"spec_{layer}.weight"] for layer in range(1, L) if routed)


def _array(values: Array) -> Array:
    """Return a copy of an array, or of a tensor as a NumPy array."""
    if type(values).__module__.split(".")[0] == "torch":
        return np.array(values.detach().cpu().numpy())
    backend_of(values)  # says what it should be
    return values.copy()


def mlp_to_torch(params: Params, fixed: Fixed = ()) -> dict[str, Array]:
    """Return parameters (or gradients of the same structure) under their PyTorch names.

    Parameters
    ----------
    params : tuple of Linear
    fixed : tuple of arrays, optional
        V_l of a gate with fixed weights.

    Returns
    -------
    dict of str to array
        ``fc{l}.weight``, ``fc{l}.bias`` and, for the given fixed weights, ``spec_{l}.weight``.
    """
    named = {}
    for layer, p in enumerate(params, start=1):
        named[f"fc{layer}.weight"] = p.weight
        if p.bias is not None:
            named[f"fc{layer}.bias"] = p.bias
    for layer, V in enumerate(fixed, start=1):
        named[f"spec_{layer}.weight"] = V
    return named
