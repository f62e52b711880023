"""Trees of arrays: nested tuples, NamedTuples and dicts, whose leaves are arrays or None."""

from collections.abc import Callable, Iterator
from typing import Any

from .backends import backend_of
from .errors import UserError

Array = Any
Tree = Any


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


def flatten(tree: Tree) -> tuple[Array, Tree]:
    """Return one flat buffer that holds a copy of all leaves, and the tree of views into it.

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
    if len({array.dtype for array in arrays}) != 1:
        raise UserError("a flat buffer holds arrays of one dtype, got "
                        f"{', '.join(sorted({str(array.dtype) for array in arrays})) or 'none'}")
    xp = backend_of(*arrays).xp
    flat = xp.concatenate([array.reshape(-1) for array in arrays])
    position = 0

    def view(array: Array) -> Array:
        nonlocal position
        start, position = position, position + array.size
        return flat[start:position].reshape(array.shape)

    return flat, tree_map(view, tree)


def zeros_like(tree: Tree) -> Tree:
    """Return a tree of zeros of the structure, shapes and dtypes of `tree`, for gradients."""
    return tree_map(lambda array: backend_of(array).xp.zeros_like(array, order="C"), tree)
