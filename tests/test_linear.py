"""The affine layer, eq. (1): values one by one, gradients, and what it refuses."""

import re

import numpy as np
import pytest

from comet_np.backends import BackendError, reference
from comet_np.errors import UserError
from comet_np.functional.linear import (
    Linear,
    LinearCache,
    linear_backward,
    linear_forward,
    project,
)
from comet_np.gradcheck import check_gradients
from comet_np.tree import zeros_like
from tests import naive
from tests.tolerances import TOLERANCES, assert_close


def backward(dy, cache, at):
    g = zeros_like(at["p"])
    return {"x": linear_backward(dy, cache, at["p"], g), "p": g}


def forward(at):
    return linear_forward(at["x"], at["p"])


def point(draw, bias=True):
    return {"x": draw.standard_normal((2, 3, 4)),
            "p": Linear(draw.standard_normal((5, 4)), draw.standard_normal(5) if bias else None)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
def test_values_one_by_one(bias, kernels, draw):
    at = point(draw, bias)
    with reference() if not kernels else np.errstate():
        y, _ = forward(at)
        product = project(at["x"], at["p"].weight)
    assert y.shape == product.shape == (2, 3, 5)
    for i in np.ndindex(2, 3):
        assert_close(y[i], naive.affine(at["x"][i], at["p"]), "sum")
        assert_close(product[i], naive.product(at["p"].weight, at["x"][i]), "sum")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
def test_gradients(bias, kernels, draw):
    with reference() if not kernels else np.errstate():
        result = check_gradients(forward, backward, point(draw, bias), full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result
    result = check_gradients(forward, backward, point(draw, bias), complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


MUTANTS = {
    "no bias gradient": lambda dy, c, at: backward(dy, c, at) | {
        "p": Linear(backward(dy, c, at)["p"].weight, 0 * at["p"].bias)},
    "mean over examples": lambda dy, c, at: backward(dy, c, at) | {
        "p": backward(dy / 6, c, at)["p"]},
    "first example only": lambda dy, c, at: backward(dy, c, at) | {
        "p": backward(dy[:1], LinearCache(c.x[:1]), at)["p"]},
    "no input gradient": lambda dy, c, at: backward(dy, c, at) | {"x": 0 * at["x"]},
    "reversed weight": lambda dy, c, at: backward(dy[..., ::-1], c, at),
    "not a number": lambda dy, c, at: backward(dy, c, at) | {"x": np.nan * at["x"]},
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(mutant, draw):
    assert not check_gradients(forward, mutant, point(draw)).ok


@pytest.mark.parametrize("function", [linear_forward, project])
@pytest.mark.parametrize("shape", [(3, 5), (4,), ()])
def test_a_wrong_input_shape(shape, function):
    W = np.ones((2, 7))
    with pytest.raises(UserError, match=re.escape(
            f"x must have shape (..., 7) for a weight of shape (2, 7), got {shape}")):
        function(np.ones(shape), W if function is project else Linear(W, None))


@pytest.mark.parametrize(("dtype_x", "dtype_W"), [("float32", "float64"), ("float16", "float16")])
def test_dtypes_without_a_kernel(dtype_x, dtype_W):
    with pytest.raises(BackendError, match=f"one dtype .* got {dtype_x} and {dtype_W}: cast"):
        linear_forward(np.ones((3, 7), dtype_x), Linear(np.ones((2, 7), dtype_W), None))
