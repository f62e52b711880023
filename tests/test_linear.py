"""The affine layer, eq. (1): values one by one, gradients, and what it refuses."""

import re

import numpy as np
import pytest

from comet_np.backends import BackendError, reference
from comet_np.errors import UserError
from comet_np.functional.linear import Linear, LinearCache, linear_backward, linear_forward
from comet_np.gradcheck import check_gradients
from comet_np.tree import zeros_like
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
def test_values_one_by_one(bias, draw):
    at = point(draw, bias)
    y, _ = forward(at)
    assert y.shape == (2, 3, 5)
    expected = np.zeros(y.shape)
    for b, t, i in np.ndindex(y.shape):
        for w, x in zip(at["p"].weight[i], at["x"][b, t], strict=True):
            expected[b, t, i] += w * x
        if bias:
            expected[b, t, i] += at["p"].bias[i]
    assert_close(y, expected, "sum")


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


def test_parameter_gradients_are_added(draw):
    at = point(draw)
    y, cache = forward(at)
    dy = draw.standard_normal(y.shape)
    once, twice = zeros_like(at["p"]), zeros_like(at["p"])
    linear_backward(dy, cache, at["p"], once)
    for _ in range(2):
        linear_backward(dy, cache, at["p"], twice)
    for a, b in zip(once, twice, strict=True):
        assert_close(b, 2 * a, "sum")


def test_gradients_may_be_added_into_the_parameters_themselves(draw):
    at = point(draw)
    y, cache = forward(at)
    dy = draw.standard_normal(y.shape)
    g = zeros_like(at["p"])
    expected_dx = linear_backward(dy, cache, at["p"], g)
    expected = Linear(at["p"].weight + g.weight, at["p"].bias + g.bias)
    dx = linear_backward(dy, cache, at["p"], at["p"])
    np.testing.assert_array_equal(dx, expected_dx)
    for a, b in zip(at["p"], expected, strict=True):
        assert_close(a, b, "sum")


def test_the_input_gradient_can_be_left_out(draw):
    at = point(draw)
    y, cache = forward(at)
    g, without = zeros_like(at["p"]), zeros_like(at["p"])
    linear_backward(y, cache, at["p"], g)
    assert linear_backward(y, cache, at["p"], without, input_gradient=False) is None
    np.testing.assert_array_equal(without.weight, g.weight)
    np.testing.assert_array_equal(without.bias, g.bias)


def test_inputs_are_left_alone(draw):
    at = point(draw)
    copies = at["x"].copy(), at["p"].weight.copy(), at["p"].bias.copy()
    y, cache = forward(at)
    dy = y.copy()
    linear_backward(dy, cache, at["p"], zeros_like(at["p"]))
    for a, b in zip((at["x"], *at["p"], dy), (*copies, y), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(3, 5), (4,), ()])
def test_a_wrong_input_shape(shape):
    p = Linear(np.ones((2, 7)), None)
    with pytest.raises(UserError, match=re.escape(
            f"x must have shape (..., 7) for a weight of shape (2, 7), got {shape}")):
        linear_forward(np.ones(shape), p)


def test_a_wrong_cotangent_shape():
    p = Linear(np.ones((2, 7)), None)
    _, cache = linear_forward(np.ones((3, 7)), p)
    for shape in (3, 3), (4, 2), (2,):
        with pytest.raises(UserError, match=re.escape(
                f"dy must have the shape of the layer's output, (3, 2), got {shape}")):
            linear_backward(np.ones(shape), cache, p, p)


@pytest.mark.parametrize(("dtype_x", "dtype_W"), [("float32", "float64"), ("float16", "float16")])
def test_dtypes_without_a_kernel(dtype_x, dtype_W):
    with pytest.raises(BackendError, match=f"one dtype .* got {dtype_x} and {dtype_W}: cast"):
        linear_forward(np.ones((3, 7), dtype_x), Linear(np.ones((2, 7), dtype_W), None))
