"""`diagnose_module`: a PyTorch module, or a JAX function and its parameters, is it right?

Names, arrays, gradients and intermediates are taken from the framework, and `diagnose` does the
rest. Neither framework is needed to import this.
"""

import copy
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, unknown
from ..gates import Comet, Layerwise
from ..models.mlp import MLPConfig
from ..optim import OptimizerConfig
from .diagnose import FLOATS, Report, diagnose
from .mlp import NAME

Array = Any
Tensor = Any
Named = dict[str, Array]
WRAPPERS = re.compile(r"^(module\.)+|(?<![^.])_orig_mod\.")  # DataParallel's, torch.compile's
FIXED = re.compile(r"spec|rout|fixed|(^|[._])V([._\d]|$)")  # how V is called where nothing marks it


class Own(NamedTuple):
    """A parameter of the user's under the user's own name.

    shape : as stored. fixed : True, or False; None if nothing says whether it is trained.
    """

    shape: tuple[int, ...]
    fixed: bool | None


class Place(NamedTuple):
    """Where a published parameter stands: under which name, and whether transposed."""

    name: str
    transposed: bool

    def out(self, arrays: Mapping[str, Array]) -> Array:
        """Return the parameter."""
        array = arrays[self.name]
        return array.T if self.transposed else array


def diagnose_module(module: Any, model: str | Any = "mlp", params: Any = None, *,
                    names: Mapping[str, str] | None = None,
                    criterion: Callable[[Any, Any], Any] | None = None, optimizer: Any = None,
                    scheduler: Any = None, expected: OptimizerConfig | None = None,
                    **settings: Any) -> Report:
    """Compare a PyTorch module, or a JAX function, with the specification, gradients included.

    It runs in evaluation, in its own precision and on its own device, and is left as it was. See
    `diagnose` for what is compared, and docs/check-your-implementation.md for examples.

    Parameters
    ----------
    module : torch.nn.Module or callable
        The module, or of JAX ``module(params, x) -> logits``.
    model : str or configuration
        What it should be, as for `diagnose`.
    params : tree of arrays, or mapping of str to tensor
        Of JAX all parameters, V among them. Of a module what is not registered there, as a V that
        is a plain attribute, by its published name.
    names : mapping of str to str, optional
        Published names to those of the user, ``{"fc1.weight": "blocks.0.linear.weight"}``; those of
        a tree are joined by dots. ``.T`` behind one says that it is stored transposed, as kernels
        in JAX are. Not needed where the published names are used.
    criterion : callable, optional
        ``criterion(logits, labels)``: the user's loss, whose gradients are compared with those of
        the mean cross-entropy (or of `loss`, a setting). That itself if not given.
    optimizer, scheduler : optional
        The user's, of PyTorch, new: they are stepped, and compared with what is `expected`.
    expected : OptimizerConfig, optional
        What `optimizer` should be; plain SGD if not given. `lr` is the optimizer's if not given.
    settings
        Those of `diagnose`.

    Returns
    -------
    Report

    Raises
    ------
    UserError
        If names are missing, in one sentence with a proposal where the shapes allow one.
    """
    torch = sys.modules.get("torch")  # a module of PyTorch's has loaded it
    if torch is not None and isinstance(module, torch.nn.Module):
        return _of_torch(torch, module, model, params or {}, names, criterion, optimizer, scheduler,
                         settings | {"optimizer": expected})
    if not callable(module) or params is None:
        raise UserError("diagnose_module expects a torch.nn.Module, or a function of JAX "
                        "fn(params, x) -> logits and params=, got "
                        f"{type(module).__name__}{' without params' * callable(module)}")
    try:
        import jax
    except ImportError:
        raise UserError("JAX is not installed, by which gradients of a function are taken: "
                        "python -m pip install jax, or call diagnose") from None
    if optimizer is not None:
        raise UserError("optimizer is one of PyTorch's: of JAX give step= to diagnose, as in "
                        "docs/check-your-implementation.md")
    return _of_jax(jax, module, params, model, names, criterion, settings)


# --- PyTorch ------------------------------------------------------------------------------------


def _of_torch(torch: Any, module: Any, model: Any, others: Mapping[str, Tensor],
              names: Mapping[str, str] | None, criterion: Callable[[Any, Any], Any] | None,
              optimizer: Any, scheduler: Any, settings: dict[str, Any]) -> Report:
    """Return what is found of a module."""
    tensors = _tensors(module, others, twice=_is_mlp(model))
    own = {name: Own(tuple(tensor.shape), not tensor.requires_grad)
           for name, tensor in tensors.items()}
    places = _places(own, names, model, settings)
    used = {place.name: tensors[place.name] for place in places.values()}
    for name, tensor in used.items():
        _check_floats(name, str(tensor.dtype).removeprefix("torch."))
    trained = {name: tensor for name, tensor in used.items() if tensor.requires_grad}
    like = next(iter(used.values()))
    linear = _linear_layers(torch, module, places)

    def given(x: Array) -> Tensor:
        tensor = torch.from_numpy(x).to(like.device)
        return tensor.to(like.dtype) if tensor.is_floating_point() else tensor

    def run(x: Array) -> Tensor:
        y = module(given(x))
        y = getattr(y, "logits", y)  # of Hugging Face
        if not isinstance(y, torch.Tensor):
            raise UserError(f"the module must return a tensor of logits, got {type(y).__name__}: "
                            "wrap it in one that returns them alone")
        return y

    def fn(x: Array) -> Array:
        with torch.no_grad():
            return run(x).cpu().numpy()

    def loss(x: Array, labels: Array) -> Tensor:
        y = run(x)
        if criterion is not None:
            return criterion(y, given(labels))
        if settings.get("loss") == "mse":
            return torch.nn.functional.mse_loss(y, given(labels))
        if labels.dtype.kind == "f":  # of a layer, the gradient of its output
            return (y * given(labels)).sum()
        return torch.nn.functional.cross_entropy(y.reshape(-1, y.shape[-1]),
                                                 given(labels).reshape(-1))

    def gradients(x: Array, labels: Array) -> Named:
        value = loss(x, labels)
        found = {name: torch.zeros_like(tensor) for name, tensor in used.items()}
        if value.requires_grad:
            for name, each in zip(trained, torch.autograd.grad(
                    value, list(trained.values()), allow_unused=True), strict=True):
                found[name] = found[name] if each is None else each
        arrays = {name: each.detach().cpu().numpy() for name, each in found.items()}
        return {name: place.out(arrays) for name, place in places.items()}

    def intermediates(x: Array) -> Named:
        found: dict[str, list[Array]] = {name: [] for name in linear}
        hooks = [layer.register_forward_hook(
            lambda _layer, _x, y, calls=found[name]: calls.append(y.detach().cpu().numpy()))
            for name, layer in linear.items()]
        try:
            fn(x)
        finally:
            for hook in hooks:
                hook.remove()
        # A layer that is called twice is more than one of the paper's.
        return {name: calls[0] for name, calls in found.items() if len(calls) == 1}

    def step(x: Array, labels: Array) -> Named:
        optimizer.zero_grad()
        value = loss(x, labels)
        if value.requires_grad:
            value.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        return now()

    def now() -> Named:
        arrays = {name: tensor.detach().cpu().numpy().copy() for name, tensor in used.items()}
        return {name: place.out(arrays) for name, place in places.items()}

    if optimizer is not None:
        settings = {"lr": _rate(torch, optimizer, scheduler, used), **settings, "step": step}
    with _left_as_it_was(torch, module), _begun_anew(optimizer, scheduler):
        module.eval()
        return diagnose(fn, now(), model, gradients=gradients if trained else None,
                        intermediates=intermediates if linear else None, **settings)


def _rate(torch: Any, optimizer: Any, scheduler: Any, used: Mapping[str, Tensor]) -> float:
    """Return the optimizer's learning rate, before any schedule, if it can be diagnosed."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError("optimizer must be one of torch.optim's, as torch.optim.SGD("
                        f"module.parameters(), lr=0.1), got {type(optimizer).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(tensor) for tensor in used.values()}:
        raise UserError("optimizer holds no parameter of this module: make it from "
                        "module.parameters()")
    if scheduler is not None and scheduler.last_epoch:
        raise UserError(f"scheduler has made {scheduler.last_epoch} steps: give a new one, with a "
                        "new optimizer")
    group = optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


@contextmanager
def _begun_anew(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Take an optimizer's state away, and put it and a scheduler's back, whatever is done."""
    kept = [(each, copy.deepcopy(each.state_dict())) for each in (optimizer, scheduler)
            if each is not None]
    if optimizer is not None:
        optimizer.state.clear()
    try:
        yield
    finally:
        for each, state in kept:
            each.load_state_dict(state)


def _tensors(module: Any, others: Mapping[str, Tensor], twice: bool) -> dict[str, Tensor]:
    """Return the tensors of floats of a module, by their names without those of wrappers.

    `twice`: whether one tensor may have two names, as W that is V too, or only its first, as a
    head that is tied to the embedding.
    """
    found = {**dict(module.named_parameters(remove_duplicate=not twice)),
             **dict(module.named_buffers(remove_duplicate=not twice))}
    found = {WRAPPERS.sub("", name): tensor for name, tensor in found.items()}
    if not isinstance(others, Mapping):
        raise UserError("of a module params is a mapping of names to tensors that are not "
                        f"registered in it, got {type(others).__name__}")
    return {name: tensor for name, tensor in {**found, **others}.items()
            if tensor.is_floating_point()}


def _linear_layers(torch: Any, module: Any, places: Mapping[str, Place]) -> dict[str, Any]:
    """Return the submodules whose outputs are pre-activations a_l or scores c_l, by those names."""
    layers = {WRAPPERS.sub("", f"{name}.")[:-1]: layer for name, layer in module.named_modules()}
    found = {}
    for name, place in places.items():
        layer = layers.get(place.name.removesuffix(".weight"))
        match = NAME.fullmatch(name)
        if match and match[3] == "weight" and isinstance(layer, torch.nn.Linear):
            found[("a_" if match[1] == "fc" else "c_") + match[2]] = layer
    return found


@contextmanager
def _left_as_it_was(torch: Any, module: Any) -> Iterator[None]:
    """Put back attributes, tensors and gradients of a module, whatever is done with it."""
    stores = [(store, dict(store)) for each in module.modules()
              for store in (vars(each), each._parameters, each._buffers)]
    grads = [(tensor, tensor.grad) for tensor in module.parameters()]
    tensors = [*module.parameters(), *module.buffers(),
               *(grad for _, grad in grads if grad is not None)]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for store, before in stores:
            store.clear()
            store.update(before)
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for tensor, grad in grads:
            tensor.grad = grad


# --- JAX ----------------------------------------------------------------------------------------


def _of_jax(jax: Any, fn: Callable[[Any, Any], Any], params: Any, model: Any,
            names: Mapping[str, str] | None, criterion: Callable[[Any, Any], Any] | None,
            settings: dict[str, Any]) -> Report:
    """Return what is found of a function and its parameters."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = [(_dotted(path), leaf) for path, leaf in leaves]
    floats = {name: leaf for name, leaf in leaves if hasattr(leaf, "dtype")
              and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)}
    own = {name: Own(tuple(floats[name].shape), None) for name in sorted(floats, key=_by_number)}
    places = _places(own, names, model, settings)
    used = {place.name: floats[place.name] for place in places.values()}
    for name, leaf in used.items():
        _check_floats(name, str(leaf.dtype))
        if leaf.dtype == "float64" and not jax.config.jax_enable_x64:
            raise UserError(f"{name} is float64, in which JAX computes only after jax.config."
                            'update("jax_enable_x64", True): call that first, or give float32')

    def run(arrays: Named, x: Array) -> Any:
        whole = [arrays.get(name, leaf) for name, leaf in leaves]
        return fn(jax.tree_util.tree_unflatten(tree, whole), jax.numpy.asarray(x))

    def gradients(x: Array, labels: Array) -> Named:
        target = jax.numpy.asarray(labels)

        def value(arrays: Named) -> Any:
            y = run(arrays, x)
            if criterion is not None:
                return criterion(y, target)
            if settings.get("loss") == "mse":
                return ((y - target) ** 2).mean()
            if labels.dtype.kind == "f":  # of a layer, the gradient of its output
                return (y * target).sum()
            return -jax.numpy.take_along_axis(jax.nn.log_softmax(y), target[..., None], -1).mean()

        found = {name: np.asarray(array) for name, array in jax.grad(value)(used).items()}
        return {name: place.out(found) for name, place in places.items()}

    used = {name: jax.numpy.asarray(leaf) for name, leaf in used.items()}
    arrays = {name: np.asarray(leaf) for name, leaf in used.items()}
    named = {name: place.out(arrays) for name, place in places.items()}
    return diagnose(lambda x: np.asarray(run(used, x)), named, model, gradients=gradients,
                    **settings)


def _dotted(path: Sequence[Any]) -> str:
    """Return the name of a leaf: the keys, indices and fields on the way to it."""
    return ".".join(str(next(getattr(key, field) for field in ("key", "idx", "name")
                             if hasattr(key, field))) for key in path)


def _by_number(name: str) -> list[Any]:
    """Return what sorts Dense_2 before Dense_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# --- names --------------------------------------------------------------------------------------


def _check_floats(name: str, dtype: str) -> None:
    if dtype not in FLOATS:
        raise UserError(f"{name} must be float32 or float64, got {dtype}: diagnose a copy of the "
                        "model in float32 or float64")


def _is_mlp(model: Any) -> bool:
    return isinstance(model, MLPConfig) or (isinstance(model, str) and model == "mlp")


def _places(own: Mapping[str, Own], names: Mapping[str, str] | None, model: Any,
            settings: Mapping[str, Any]) -> dict[str, Place]:
    """Return where each published parameter stands."""
    mlp = _is_mlp(model)
    places = {}
    for published, theirs in (names or {}).items():
        name = theirs if theirs in own else str(theirs).removesuffix(".T")
        if mlp and not NAME.fullmatch(published):
            raise UserError("names maps the published names, fc{l}.weight, fc{l}.bias and "
                            f'spec_{{l}}.weight, to yours, got "{published}" as a published one')
        if name not in own:
            raise unknown("parameter", theirs, own)
        places[published] = Place(name, name != theirs)
    taken = {place.name for place in places.values()}
    for name in own:
        if name not in places and name not in taken and (NAME.fullmatch(name) or not mlp):
            places[name] = Place(name, False)
    gate = model.gate if isinstance(model, MLPConfig) else settings.get("gate", "comet")
    routed = gate in ("comet", "layerwise") or isinstance(gate, Comet | Layerwise)
    needed = ["fc1.weight", *["spec_1.weight"] * routed]
    missing = [name for name in needed if name not in places]
    if mlp and missing:
        proposal = _proposal(own, routed)
        has = ", ".join(f"{name} {each.shape}" for name, each in own.items()) or "none"
        raise UserError(
            f"there is no {' and no '.join(missing)}: "
            + (f"say what is called so, by shapes and order names={proposal}" if proposal else
               'say what is called so, names={"fc1.weight": YOURS, ...}, with ".T" behind what is '
               "stored transposed, params= for a V that is no parameter, or gate=None if there are "
               f"no masks (the parameters are {has})"))
    return places


def _proposal(own: Mapping[str, Own], routed: bool) -> dict[str, str] | None:
    """Return names for an MLP that shapes and order suggest, if they all fit."""
    def fixed(name: str) -> bool:
        marked = any(each.fixed for each in own.values())
        return bool(own[name].fixed) if marked else bool(FIXED.search(name))

    def of(dimensions: int, which: bool) -> list[str]:
        return [name for name, each in own.items()
                if len(each.shape) == dimensions and fixed(name) == which]

    fc, spec, bias = of(2, False), of(2, True) if routed else [], of(1, False)
    if not fc or (routed and len(spec) != len(fc) - 1) or len(bias) not in (0, len(fc)):
        return None
    for turned in (False, True):
        shapes = [own[name].shape[::-1] if turned else own[name].shape for name in fc]
        if all(W[1] == before[0] for before, W in pairwise(shapes)):
            break
    else:
        return None
    found = {f"fc{layer}.weight": name + ".T" * turned for layer, name in enumerate(fc, start=1)}
    for layer, (name, shape) in enumerate(zip(bias, shapes, strict=False), start=1):
        if own[name].shape != shape[:1]:
            return None
        found[f"fc{layer}.bias"] = name
    for layer, (name, shape) in enumerate(zip(spec, shapes, strict=False), start=1):
        as_it_is, back = (stored == shape for stored in (own[name].shape, own[name].shape[::-1]))
        if not (as_it_is or back):
            return None
        # Of a square one the shape does not say: as the weights.
        found[f"spec_{layer}.weight"] = name + ".T" * (turned if as_it_is and back else back)
    return found
