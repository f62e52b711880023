"""The arrays of a model under published names, by a tree of the places where each of them stands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..backends import backend_of
from ..errors import UserError
from ..gates.comet import Comet, Routed
from ..models.stream import Stream, stream_shapes
from ..tree import check_shapes, leaves, tree_map
from .torch_mlp import array_of, check_backend, check_floats, has_names, routing_shapes

Array = Any
Tree = Any
Shape = tuple[int, ...]

FEW = 3  # tensors that an error names of each kind


@dataclass(frozen=True)
class Place:
    """Where an array stands: under one name, or its rows in equal parts under several.

    shape : here. stored : there, of all parts together, if it differs. order : of the axes stored
    there as they follow each other here, if they do not in the same order.
    """

    names: tuple[str, ...]
    shape: Shape
    stored: Shape | None = None
    order: tuple[int, ...] | None = None

    @property
    def whole(self) -> Shape:
        """The shape there, of all parts together."""
        return self.stored or self.shape

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes stored there, in the order of here."""
        return self.order or tuple(range(len(self.whole)))

    @property
    def rows(self) -> int:
        """How many rows stand under one name."""
        return self.whole[0] // len(self.names)

    def shapes(self) -> dict[str, Shape]:
        """Return the shape that is stored under each name."""
        return dict.fromkeys(self.names, (self.rows, *self.whole[1:]))

    def out(self, array: Array) -> dict[str, Array]:
        """Return what is stored under each name: the array itself, or views where it can be."""
        if array.shape != self.whole or self.order:
            back = tuple(self.axes.index(axis) for axis in range(len(self.axes)))
            array = array.reshape([self.whole[axis] for axis in self.axes]).transpose(back)
        if len(self.names) == 1:
            return {self.names[0]: array}
        return {name: array[i * self.rows:(i + 1) * self.rows]
                for i, name in enumerate(self.names)}

    def back(self, named: Mapping[str, Array]) -> Array:
        """Return the array that stands under these names."""
        xp = backend_of(named[self.names[0]]).xp
        parts = [named[name] for name in self.names]
        array = parts[0] if len(parts) == 1 else xp.concatenate(parts)
        return xp.ascontiguousarray(array.transpose(self.axes)).reshape(self.shape)


def layer(shapes: Any, *modules: str) -> Any:
    """Return the places of a Linear or a Norm of these shapes: ``MODULE.weight``, ``MODULE.bias``.
    """
    return type(shapes)(*(
        None if shape is None else Place(tuple(f"{module}.{part}" for module in modules), shape)
        for part, shape in zip(("weight", "bias"), shapes, strict=True)))


def routing_places(config: Any, modules: tuple[str, ...]) -> Tree:
    """Return the places of a model's fixed weights; `modules` name its MLPs, in order.

    ``MODULE.spec.weight`` is V of a gate; of a routing stream ``spec_embedding.weight`` is E, and
    beside V ``MODULE.spec_back.weight`` is U. A gate whose fixed weights are others has no places.
    """
    if config.routing == "stream":
        embedding, maps = stream_shapes(config)
        return Stream(Place(("spec_embedding.weight",), embedding), tuple(
            (Place((f"{module}.spec.weight",), V),
             None if U is None else Place((f"{module}.spec_back.weight",), U))
            for module, (V, U) in zip(modules, maps, strict=True)))
    found = [routing_shapes(one) or () for one in config.mlps]
    return tuple((Place((f"{module}.spec.weight",), V[0]),) if len(V) == 1 else ()
                 for module, V in zip(modules, found, strict=True))


def has_places(config: Any) -> bool:
    """Return whether all weights of a model of several MLPs have places, the gates' fixed ones too.
    """
    return config.routing == "stream" or all(
        has_names(one) and len(routing_shapes(one) or (1,)) == 1 for one in config.mlps)


def from_places(named: Mapping[str, Array], places: tuple[Tree, Tree],
                config: Any) -> tuple[Tree, Tree]:
    """Return copies of the arrays that stand in these places, of parameters and of fixed weights.

    Raises
    ------
    UserError
        If a name is missing or unknown, or a shape or dtype does not fit.
    BackendError
        If a value is no array of a backend, or two are of different ones.
    """
    check_names(named, places, config)
    wanted = [name for place in leaves(places) for name in place.names]
    arrays = {name: array_of(name, named[name]) for name in wanted}
    first = wanted[0]
    own = config.gate is not None and not isinstance(config.gate, Routed)
    exempt = {name for place in leaves(places[1]) for name in place.names} if own else set()
    for name, array in arrays.items():
        check_backend(name, arrays[first], array)
        if name not in exempt:  # a gate of one's own has weights of any dtype
            check_floats(name, array, first, arrays[first])
    if isinstance(config.gate, Comet):
        for name in (name for place in leaves(places[1]) for name in place.names):
            config.gate.check(name, arrays[name])
    params, fixed = tree_map(lambda place: place.back(arrays), places)
    return params, fixed


def to_places(tree: Tree, places: Tree) -> dict[str, Array]:
    """Return the arrays of a tree under the names of their places."""
    return {name: array
            for place, leaf in zip(leaves(places), leaves(tree), strict=True)
            for name, array in place.out(leaf).items()}


def fixed_to_places(fixed: Tree, places: Tree) -> dict[str, Array]:
    """Return fixed weights under the names of their places, or nothing if there are none.

    Raises
    ------
    UserError
        If they are others than those that have places.
    """
    if not any(True for _ in leaves(fixed)):
        return {}
    check_shapes(fixed, tree_map(lambda place: place.shape, places),
                 "only one array an MLP and those of a Stream have names here, and other fixed "
                 "weights are left out by (): expected some")
    return to_places(fixed, places)


def matches(named: Mapping[str, Array], places: Tree) -> int:
    """Return how many of the places' names are given, be it behind a prefix."""
    ends = set()
    for name in map(str, named):
        parts = name.split(".")
        ends |= {".".join(parts[i:]) for i in range(len(parts))}
    return sum(name in ends for place in leaves(places) for name in place.names)


def check_names(named: Mapping[str, Array], places: Tree, config: Any) -> None:
    """Raise a UserError unless the names are those of the places, and the shapes too."""
    wanted = {name: shape for place in leaves(places) for name, shape in place.shapes().items()}
    given = {str(name): tuple(array.shape) if hasattr(array, "shape") else None
             for name, array in named.items()}
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in given]
    unknown = [f"{name} {given[name]}" for name in sorted(given.keys() - wanted.keys())]
    other = [f"{name} {given[name]}, which should be {shape}" for name, shape in wanted.items()
             if given.get(name) not in (None, shape)]  # what is no array has an error of its own
    kinds = {"missing": missing, "unexpected": unknown, "of another shape": other}
    found = [f"{len(tensors)} {kind} ({', '.join(tensors[:FEW])}{', ...' * (len(tensors) > FEW)})"
             for kind, tensors in kinds.items() if tensors]
    if found:
        raise UserError(f"these are not the {len(wanted)} tensors of this {type(config).__name__}: "
                        f"of {len(given)} given, {', '.join(found)}{_remedy(wanted, given)}")


def _remedy(wanted: Mapping[str, Shape], given: Mapping[str, Any]) -> str:
    """Return what helps, where names alone say it."""
    one = next(iter(wanted))
    for name in given:
        if name.endswith(f".{one}"):
            prefix = name[:-len(one)]
            return (f'; the names have a prefix: pass {{name.removeprefix("{prefix}"): array for '
                    "name, array in named.items()}")
    apart = wanted.keys() ^ given.keys()
    if apart and all(".spec" in name or name.startswith("spec_") for name in apart):
        return "; a network without routing has gate=None, one of COMET gates.Comet(p_k=...)"
    return ""

