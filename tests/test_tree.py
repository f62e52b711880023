"""Trees of arrays: their order, their flat buffers, and what cannot lie in one."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.tree import flatten, leaves, tree_map, zeros_like


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
