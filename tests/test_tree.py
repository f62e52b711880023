"""Trees of arrays: their order, their flat buffers, and what cannot lie in one."""

import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.tree import (
    check_shapes,
    flatten,
    leaves,
    matrix_elements,
    named_leaves,
    tree_map,
    zeros_like,
)


class Pair(NamedTuple):
    first: Any
    second: Any


def example():
    return {"b": Pair(np.arange(6.0).reshape(2, 3), None), "a": (np.array(7.0), np.zeros((0, 4)))}


def test_leaves_come_depth_first_and_none_is_no_leaf():
    tree = example()
    assert [leaf.shape for leaf in leaves(tree)] == [(2, 3), (), (0, 4)]
    assert list(leaves(None)) == list(leaves(())) == []
    only = np.ones(2)
    assert next(leaves(only)) is only


def test_leaves_have_paths():
    names = [name for name, _ in named_leaves(example())]
    assert names == ["b.first", "a[0]", "a[1]"]
    for (_, named), leaf in zip(named_leaves(example()), leaves(example()), strict=True):
        np.testing.assert_array_equal(named, leaf)
    assert [name for name, _ in named_leaves(np.ones(2))] == ["at"]


def test_tree_map_keeps_the_structure():
    tree = example()
    sums = tree_map(lambda a, b: a + b, tree, tree)
    assert list(sums) == ["b", "a"]
    assert isinstance(sums["b"], Pair)
    assert type(sums["a"]) is tuple
    assert sums["b"].second is None
    np.testing.assert_array_equal(sums["b"].first, 2 * tree["b"].first)
    with pytest.raises(ValueError, match="zip"):
        tree_map(lambda a, b: a, (1, 2), (1,))


def test_a_flat_buffer_and_its_views_are_one():
    tree = example()
    flat, views = flatten(tree)
    np.testing.assert_array_equal(flat, [0, 1, 2, 3, 4, 5, 7])
    flat[1] = 100
    assert views["b"].first[0, 1] == 100
    views["a"][0][...] = -1
    assert flat[6] == -1
    assert all(np.shares_memory(flat, leaf) for leaf in leaves(views) if leaf.size)
    assert tree["b"].first[0, 1] == 1  # a copy
    assert tree["a"][0] == 7


def test_matrices_lie_before_what_an_optimizer_may_spare():
    vector, matrix, number, other = np.ones(3), np.full((2, 2), 2.0), np.array(3.0), np.full(
        (1, 2), 4.0)
    tree = {"b": vector, "W": (matrix, None), "n": number, "last": other}
    flat, views = flatten(tree)
    np.testing.assert_array_equal(flat, [2, 2, 2, 2, 4, 4, 1, 1, 1, 3])
    assert matrix_elements(tree) == 6
    for view, leaf in zip(leaves(views), leaves(tree), strict=True):
        np.testing.assert_array_equal(view, leaf)
    assert list(views) == list(tree)


def test_a_column_major_leaf_is_flattened_by_rows():
    flat, views = flatten((np.asfortranarray(np.arange(6).reshape(2, 3)),))
    np.testing.assert_array_equal(flat, range(6))
    assert views[0].flags.c_contiguous


def test_zeros_like_is_row_major_and_new():
    tree = (np.asfortranarray(np.ones((2, 3), "float32")), None)
    zeros = zeros_like(tree)
    assert zeros[0].dtype == "float32"
    assert zeros[0].flags.c_contiguous
    assert not zeros[0].any()
    assert zeros[1] is None


def test_one_dtype_a_buffer():
    with pytest.raises(UserError, match="one dtype, got float32, float64"):
        flatten((np.zeros(2, "float32"), np.zeros(2)))
    with pytest.raises(UserError, match="got none"):
        flatten((None, ()))


def test_wrong_shapes_are_told_in_full():
    wanted = {"b": Pair((2, 3), None), "a": ((), (0, 4))}
    check_shapes(example(), wanted, "this needs arrays")
    for change, got in ({"b": Pair(np.ones((3, 2)), None)}, "((3, 2), None)"), (
            {"b": Pair(np.ones((2, 3)), np.ones(1))}, "((2, 3), (1,))"), (
            {"b": Pair([1.0], None)}, "('list', None)"), (
            {"b": {"x": np.ones(1)}}, "{'x': (1,)}"), ({"b": ()}, "()"):
        with pytest.raises(UserError, match=re.escape(
                "this needs arrays of shapes {'b': ((2, 3), None), 'a': ((), (0, 4))}, got {'b': "
                f"{got}, 'a': ((), (0, 4))}}")):
            check_shapes(example() | change, wanted, "this needs arrays")
