"""Trees of arrays: nested tuples, NamedTuples and dicts, whose leaves are arrays or None."""

import math
from collections.abc import Callable, Iterator
from numbers import Integral
from typing import Any

from .backends import backend_of
from .errors import UserError

Array = Any
Tree = Any
FEW, SHOWN = 12, 3  # arrays of which all shapes are shown in an error; else so many that differ


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Return a tree of the same structure with `function` applied to the leaves (None stays)."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {name: tree_map(function, tree[name], *(other[name] for other in others))
                for name in tree}
    if isinstance(tree, tuple):
        mapped = [tree_map(function, *branches) for branches in zip(tree, *others, strict=True)]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)
    return function(tree, *others)


def leaves(tree: Tree) -> Iterator[Array]:
    """Yield the arrays of `tree`, depth first, in order."""
    if tree is None:
        return
    if isinstance(tree, dict | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(branch)
    else:
        yield tree


def named_leaves(tree: Tree, name: str = "") -> Iterator[tuple[str, Array]]:
    """Yield the paths and arrays of `tree`, in the order of `leaves`; a lone array is "at"."""
    if isinstance(tree, dict | tuple):
        for step, branch in _branches(tree):
            yield from named_leaves(branch, name + step)
    elif tree is not None:
        yield name.lstrip(".") or "at", tree


def _branches(tree: Tree) -> Iterator[tuple[str, Tree]]:
    """Yield the branches of a tree, each with the step that leads to it."""
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield f".{name}", branch
    else:
        fields = getattr(tree, "_fields", None)
        for i, branch in enumerate(tree):
            yield f".{fields[i]}" if fields else f"[{i}]", branch


def flatten(tree: Tree) -> tuple[Array, Tree]:
    """Return one flat buffer that holds a copy of all leaves, and the tree of views into it.

    Leaves of two axes and more come first, then the others (biases, gains), which an optimizer may
    spare from weight decay.

    Parameters
    ----------
    tree : tree of arrays of one dtype and backend

    Returns
    -------
    flat : array (n,)
        Writing into it changes the leaves of `views`, and the other way round.
    views : tree
        Of the structure, shapes and values of `tree`.
    """
    arrays = list(leaves(tree))
    if arrays:
        xp = backend_of(*arrays).xp
    if len({array.dtype for array in arrays}) != 1:
        raise UserError("a flat buffer holds arrays of one dtype, got "
                        f"{', '.join(sorted({str(array.dtype) for array in arrays})) or 'none'}")
    order = sorted(range(len(arrays)), key=lambda i: arrays[i].ndim < 2)
    flat = xp.concatenate([arrays[i].reshape(-1) for i in order])
    views, position = {}, 0
    for i in order:
        start, position = position, position + arrays[i].size
        views[i] = flat[start:position].reshape(arrays[i].shape)
    in_order = iter([views[i] for i in range(len(arrays))])
    return flat, tree_map(lambda array: next(in_order), tree)


def matrix_elements(tree: Tree) -> int:
    """Return how many elements the leaves of two axes and more have, which lie first in `flatten`.
    """
    return sum(array.size for array in leaves(tree) if array.ndim > 1)


def zeros_like(tree: Tree) -> Tree:
    """Return a tree of zeros of the structure, shapes and dtypes of `tree`, for gradients."""
    return tree_map(lambda array: backend_of(array).xp.zeros_like(array, order="C"), tree)


def elements(shapes: Tree) -> int:
    """Return how many elements the arrays of a tree of shapes have."""
    if shapes is None:
        return 0
    if isinstance(shapes, tuple) and all(isinstance(N, Integral) for N in shapes):
        return math.prod(shapes)
    return sum(map(elements, shapes))


def check_shapes(tree: Tree, shapes: Tree, what: str) -> None:
    """Raise a UserError that begins with `what` unless the arrays of `tree` have these shapes."""
    if _fits(tree, shapes):
        return
    wanted = dict(_named_shapes(shapes))
    if len(wanted) <= FEW:
        got = tree_map(lambda array: getattr(array, "shape", type(array).__name__), tree)
        raise UserError(f"{what} of shapes {_plain(shapes)}, got {_plain(got)}")
    found = {name: getattr(array, "shape", None) for name, array in named_leaves(tree)}
    differ = [f"{name} {wanted.get(name, 'not there')}, got {found.get(name, 'none')}"
              for name in wanted | found if wanted.get(name) != found.get(name)]
    more = f", and {len(differ) - SHOWN} more that differ" * (len(differ) > SHOWN)
    raise UserError(f"{what}, {len(wanted)} arrays: {'; '.join(differ[:SHOWN])}{more}")


def _named_shapes(shapes: Tree, name: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the paths and shapes of a tree of shapes, with the names of `named_leaves`."""
    if isinstance(shapes, tuple) and all(isinstance(N, Integral) for N in shapes):
        yield name.lstrip("."), shapes
    elif isinstance(shapes, dict | tuple):
        for step, branch in _branches(shapes):
            yield from _named_shapes(branch, name + step)


def _fits(tree: Tree, shapes: Tree) -> bool:
    if (shape := getattr(tree, "shape", None)) is not None:
        return bool(shape == shapes)
    if tree is None or shapes is None:
        return tree is shapes
    if isinstance(tree, dict):
        return (isinstance(shapes, dict) and tree.keys() == shapes.keys()
                and all(_fits(tree[k], shapes[k]) for k in tree))
    if isinstance(tree, tuple):
        return (isinstance(shapes, tuple) and len(tree) == len(shapes)
                and all(map(_fits, tree, shapes)))
    return False


def _plain(tree: Tree) -> Tree:
    """Return a tree of shapes without the names of its fields, to be shown."""
    if isinstance(tree, dict):
        return {name: _plain(branch) for name, branch in tree.items()}
    return tuple(map(_plain, tree)) if isinstance(tree, tuple) else tree
