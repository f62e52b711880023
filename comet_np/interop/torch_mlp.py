"""The names of the published PyTorch MLP: ``fc1..fcL`` trainable, ``spec_1..spec_L`` fixed."""

import re
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np

from ..backends import BackendError, backend_of
from ..errors import UserError, nearest
from ..functional.linear import Linear
from ..gates import Gate
from ..gates.comet import Comet, Routed
from ..models.mlp import Fixed, MLPConfig, Params

Array = Any
Shape = tuple[int, ...]

FLOATS = ("float32", "float64")
NAME = re.compile(r"(.*\.)?((fc|spec_)\d+\.(weight|bias))", re.DOTALL)


def mlp_from_torch(named: Mapping[str, Array], config: MLPConfig) -> tuple[Params, Fixed]:
    """Return the MLP's parameters and fixed weights from arrays under their PyTorch names.

    Parameters
    ----------
    named : mapping of str to array
        NumPy or CuPy arrays, or PyTorch tensors (as of ``module.state_dict()``), all of one dtype:
        ``fc{l}.weight`` (N_l, N_{l-1}) and, with bias, ``fc{l}.bias`` (N_l,) for l = 1..L;
        ``spec_{l}.weight`` for the hidden layers of a gate whose fixed weights are one array a
        layer, of COMET (N_l, N_{l-1}). A ``spec_L.weight`` of the output layer, which the published
        model has and never uses, is then passed over.
    config : MLPConfig

    Returns
    -------
    params, fixed
        Copies, of the backend of the arrays; of tensors, NumPy arrays. `fixed` is () where the
        gate has no fixed weights, or others than one array a layer, which have no such names.

    Raises
    ------
    UserError
        If a name is missing or unknown, or a shape or dtype does not fit.
    BackendError
        If a value is no array of a backend, or two are of different ones.
    """
    check_mapping(named)
    wanted: dict[str, Shape] = {}
    layers = range(1, len(config.widths))
    for layer in layers:
        matrix = config.widths[layer], config.widths[layer - 1]
        wanted[f"fc{layer}.weight"] = matrix
        if config.bias:
            wanted[f"fc{layer}.bias"] = matrix[:1]
    routing = routing_shapes(config)
    wanted |= {f"spec_{layer}.weight": shape for layer, shape in enumerate(routing or (), start=1)}
    for name in named:
        if name not in wanted and (routing is None or name != f"spec_{layers[-1]}.weight"):
            raise UserError(_why_unknown(str(name), wanted, named, config))
    for name, shape in wanted.items():
        if name not in named:
            raise UserError(f'the parameter "{name}" of shape {shape} is missing (given: '
                            f"{', '.join(map(str, named)) or 'none'}){_without(name)}")
    arrays = {name: array_of(name, named[name]) for name in wanted}
    for name, shape in wanted.items():
        _check(name, arrays[name], shape, config, arrays["fc1.weight"])
    params = tuple(Linear(arrays[f"fc{layer}.weight"], arrays.get(f"fc{layer}.bias"))
                   for layer in layers)
    return params, tuple(arrays[name] for name in wanted if name.startswith("spec_"))


def check_mapping(named: Mapping[str, Array]) -> None:
    """Raise a UserError unless arrays are given by name."""
    if not isinstance(named, Mapping):
        raise UserError("arrays must be given by name, as a module's state_dict() does, got "
                        f"{type(named).__name__}")


def has_names(config: MLPConfig) -> bool:
    """Return whether all weights of this MLP have published names, the gate's fixed ones too."""
    gate = config.gate
    return gate is None or type(gate).init is Gate.init or routing_shapes(config) is not None


def routing_shapes(config: MLPConfig) -> tuple[Shape, ...] | None:
    """Return the shapes of the gate's fixed weights; None if it has none that go by these names."""
    if config.gate is None or type(config.gate).init is Gate.init:
        return None
    shapes = config.gate.shapes(config.widths)
    if type(shapes) is not tuple or not all(
            type(shape) is tuple and all(isinstance(N, Integral) for N in shape)
            for shape in shapes):
        return None
    return tuple(tuple(map(int, shape)) for shape in shapes)


def _without(name: str) -> str:
    """Return which configuration does without a parameter, if any."""
    if name.endswith(".bias"):
        return "; a network without biases needs MLPConfig(..., bias=False)"
    if name.startswith("spec_"):
        return "; a network without routing needs MLPConfig(..., gate=None)"
    return ""


def _why_unknown(name: str, wanted: Mapping[str, Shape], named: Mapping[str, Array],
                 config: MLPConfig) -> str:
    """Return the sentence about a name that is not wanted."""
    match = NAME.fullmatch(name)
    prefix, known, kind, part = match.groups() if match else (None,) * 4
    if prefix:
        return (f'"{name}" has a prefix before "{known}": pass '
                f'{{name.removeprefix("{prefix}"): array for name, array in named.items()}}')
    if kind == "spec_" and part == "bias":
        return (f'"{name}" is given, and routing has no bias, c = V z of eq. (4): make its layers '
                "by torch.nn.Linear(..., bias=False)")
    if kind == "spec_" and not any(each.startswith("spec_") for each in wanted):
        given = ", ".join(each for each in named if str(each).startswith("spec_"))
        gate = "None" if config.gate is None else type(config.gate).__name__
        return (f"routing weights are given ({given}) and the gate of the config, {gate}, has none "
                "of these names: pass a config with gate=gates.Comet(p_k=...), or leave them out")
    if kind == "fc" and part == "bias" and not config.bias:
        return (f'"{name}" is given and the config has no biases: pass MLPConfig(..., bias=True), '
                "or leave them out")
    return (f'no parameter of this MLP is called "{name}"{nearest(name, wanted)} '
            f"(expected {', '.join(wanted)})")


def array_of(name: str, values: Array) -> Array:
    """Return a copy of an array, or of a tensor as a NumPy array."""
    if any(kind.__module__.split(".")[0] == "torch" for kind in type(values).__mro__):
        try:
            return np.array(values.detach().cpu().numpy(), order="C")
        except (TypeError, RuntimeError) as error:  # bfloat16, sparse, quantized, meta
            reason = str(error).splitlines()[0]
            raise UserError(f'"{name}", a tensor of {values.dtype} and {values.layout}, cannot be '
                            f"read by NumPy ({reason}): convert it, by .float() or .to_dense()"
                            ) from None
    check_backend(name, values)
    return values.copy()


def check_backend(name: str, *arrays: Array) -> None:
    """Raise a BackendError that begins with the name unless the arrays are of one backend."""
    try:
        backend_of(*arrays)
    except BackendError as error:
        raise BackendError(f'"{name}": {error}') from None


def _check(name: str, array: Array, shape: Shape, config: MLPConfig, like: Array) -> None:
    """Raise a UserError unless an array has this shape, and a dtype and backend like another."""
    if array.shape != shape:
        transposed = ", its transpose: pass it as .T" if array.shape == shape[::-1] else ""
        raise UserError(f'"{name}" must have shape {shape} for the widths {config.widths}, '
                        f"got {array.shape}{transposed}")
    check_backend(name, like, array)
    if name.startswith("spec_") and not isinstance(config.gate, Routed):
        return  # a gate of one's own has weights of any dtype
    check_floats(name, array, "fc1.weight", like)
    if name.startswith("spec_") and isinstance(config.gate, Comet):
        config.gate.check(name, array)


def check_floats(name: str, array: Array, first: str, like: Array) -> None:
    """Raise a UserError unless an array is of a dtype of ours, that of the first one."""
    if array.dtype not in FLOATS:
        raise UserError(f'"{name}" must be {" or ".join(FLOATS)}, got {array.dtype}: convert it')
    if array.dtype != like.dtype:
        raise UserError(f'"{name}" is {array.dtype} and "{first}" {like.dtype}: bring all to one '
                        "dtype")


def mlp_to_torch(params: Params, fixed: Fixed = ()) -> dict[str, Array]:
    """Return parameters (or gradients of the same structure) under their PyTorch names.

    Parameters
    ----------
    params : tuple of Linear
    fixed : tuple of arrays, optional
        Of a gate whose fixed weights are one array a hidden layer, as V_l of COMET.

    Returns
    -------
    dict of str to array
        ``fc{l}.weight``, ``fc{l}.bias`` and, for the given fixed weights, ``spec_{l}.weight``.

    Raises
    ------
    UserError
        If `params` are none of an MLP, or `fixed` is something else, as the bits of kept masks.
    """
    if not isinstance(params, tuple) or not all(isinstance(p, Linear) for p in params):
        raise UserError("params must be a tuple of Linear, one a layer, as mlp.init returns first, "
                        f"got {_kind(params)}")
    if type(fixed) is not tuple or not all(hasattr(V, "shape") for V in fixed):
        raise UserError("only fixed weights that are a tuple of one array a hidden layer have "
                        f"names here, spec_1.weight and so on, got {_kind(fixed)}: leave them out, "
                        "and save them by themselves")
    named = {}
    for layer, p in enumerate(params, start=1):
        named[f"fc{layer}.weight"] = p.weight
        if p.bias is not None:
            named[f"fc{layer}.bias"] = p.bias
    for layer, V in enumerate(fixed, start=1):
        named[f"spec_{layer}.weight"] = V
    return named


def _kind(tree: Any) -> str:
    """Return what something is, to be shown."""
    if type(tree) is tuple:
        return f"a tuple of {', '.join(type(branch).__name__ for branch in tree) or 'nothing'}"
    return (f"an array of {tree.dtype} {tree.shape}" if hasattr(tree, "dtype")
            else type(tree).__name__)
