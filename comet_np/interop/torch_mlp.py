"""The names of the published PyTorch MLP: ``fc1..fcL`` trainable, ``spec_1..spec_L`` fixed."""

from collections.abc import Mapping
from typing import Any

from ..backends import backend_of
from ..errors import UserError, nearest
from ..functional.linear import Linear
from ..models.mlp import MLPConfig, Params, Routing

Array = Any


def mlp_from_torch(named: Mapping[str, Array], config: MLPConfig) -> tuple[Params, Routing]:
    """Return the MLP's parameters and routing weights from arrays under their PyTorch names.

    Parameters
    ----------
    named : mapping of str to array
        ``fc{l}.weight`` (N_l, N_{l-1}) and, with bias, ``fc{l}.bias`` (N_l,) for l = 1..L;
        ``spec_{l}.weight`` (N_l, N_{l-1}) for the hidden layers of a COMET network. A
        ``spec_L.weight`` of the output layer, which the published model has and never uses, is
        passed over.
    config : MLPConfig

    Returns
    -------
    params, routing
        Of the backend of the arrays, which are not copied.

    Raises
    ------
    UserError
        If a name is missing or unknown, or a shape does not fit.
    BackendError
        If a value is no array of a backend, or two are of different ones.
    """
    L = len(config.widths) - 1
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in range(1, L + 1):
        matrix = config.widths[layer], config.widths[layer - 1]
        wanted[f"fc{layer}.weight"] = matrix
        if config.bias:
            wanted[f"fc{layer}.bias"] = (config.widths[layer],)
        if config.p_k is not None and layer < L:
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
    backend_of(*(named[name] for name in wanted))
    for name, expected in wanted.items():
        if named[name].shape != expected:
            raise UserError(f'"{name}" must have shape {expected} for the widths {config.widths}, '
                            f"got {named[name].shape}")
    params = tuple(Linear(named[f"fc{layer}.weight"], named.get(f"fc{layer}.bias"))
                   for layer in range(1, L + 1))
    routing = tuple(named[f"spec_{layer}.weight"] for layer in range(1, L)
                    if config.p_k is not None)
    return params, routing


def mlp_to_torch(params: Params, routing: Routing = ()) -> dict[str, Array]:
    """Return parameters (or gradients of the same structure) under their PyTorch names.

    Parameters
    ----------
    params : tuple of Linear
    routing : tuple of arrays, optional

    Returns
    -------
    dict of str to array
        ``fc{l}.weight``, ``fc{l}.bias`` and, for the given routing, ``spec_{l}.weight``.
    """
    named = {}
    for layer, p in enumerate(params, start=1):
        named[f"fc{layer}.weight"] = p.weight
        if p.bias is not None:
            named[f"fc{layer}.bias"] = p.bias
    for layer, V in enumerate(routing, start=1):
        named[f"spec_{layer}.weight"] = V
    return named
