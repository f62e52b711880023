"""The losses: values one by one, gradients, extremes, and labels that cannot be."""

import math
import re

import numpy as np
import pytest

from comet_np.backends import BackendError, reference
from comet_np.errors import UserError
from comet_np.functional.loss import (
    mean_squared_error_backward,
    mean_squared_error_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from comet_np.gradcheck import check_gradients
from tests.tolerances import TOLERANCES, assert_close


def cross_entropy(labels):
    """Return forward and backward for `check_gradients`."""
    return (lambda at: softmax_cross_entropy_forward(at["logits"], labels),
            lambda dloss, cache, at: {"logits": softmax_cross_entropy_backward(dloss, cache)})


def squared_error(target):
    """Return forward and backward for `check_gradients`."""
    return (lambda at: mean_squared_error_forward(at["y"], target),
            lambda dloss, cache, at: {"y": mean_squared_error_backward(dloss, cache)})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropy_one_by_one(dtype, draw):
    logits = (3 * draw.standard_normal((2, 3, 5))).astype(dtype)
    labels = draw.integers(0, 5, (2, 3))
    loss, cache = softmax_cross_entropy_forward(logits, labels)
    total = 0.0
    for i in np.ndindex(2, 3):
        weights = [math.exp(a) for a in logits[i]]
        assert_close(cache.q[i], [w / sum(weights) for w in weights], "sum")
        total -= math.log(weights[labels[i]] / sum(weights))
    assert_close(loss, total / 6, "sum")


def test_squared_error_one_by_one(draw):
    y, target = draw.standard_normal((2, 3)), draw.standard_normal((2, 3))
    loss, _ = mean_squared_error_forward(y, target)
    assert_close(loss, sum((y[i] - target[i]) ** 2 for i in np.ndindex(2, 3)) / 6, "sum")


@pytest.mark.parametrize("kernels", [True, False])
def test_gradients(kernels, draw):
    logits, labels = draw.standard_normal((2, 3, 5)), draw.integers(0, 5, (2, 3))
    for pair, at in ((cross_entropy(labels), {"logits": logits}),
                     (squared_error(draw.standard_normal((2, 3))), {"y": logits[..., 0]})):
        with reference() if not kernels else np.errstate():
            result = check_gradients(*pair, at, full=True)
        assert result.error <= TOLERANCES["difference"]["float64"], result
        result = check_gradients(*pair, at, complex_step=True)
        assert result.error <= TOLERANCES["complex step"]["float64"], result


MUTANTS = {
    "zero": lambda dloss, q, onehot: 0 * q,
    "q alone": lambda dloss, q, onehot: dloss * q / 6,
    "summed": lambda dloss, q, onehot: dloss * (q - onehot),
    "cotangent forgotten": lambda dloss, q, onehot: (q - onehot) / 6,
    "sign": lambda dloss, q, onehot: dloss * (onehot - q) / 6,
}


@pytest.mark.parametrize("gradient", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_the_cross_entropy_are_caught(gradient, draw):
    labels = draw.integers(0, 5, 6)
    forward, _ = cross_entropy(labels)
    result = check_gradients(
        forward, lambda dloss, cache, at: {"logits": gradient(dloss, cache.q, np.eye(5)[labels])},
        {"logits": draw.standard_normal((6, 5))})
    assert not result.ok


def test_a_missing_2_in_the_squared_error_is_caught(draw):
    forward, backward = squared_error(draw.standard_normal((2, 3)))
    result = check_gradients(forward, lambda dloss, cache, at: backward(dloss / 2, cache, at),
                             {"y": draw.standard_normal((2, 3))})
    assert not result.ok


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_logits(dtype, kernels):
    logits = np.array([[-1e4, 1e4, 0], [1e4, -1e4, 0]], dtype)
    with reference() if not kernels else np.errstate():
        loss, cache = softmax_cross_entropy_forward(logits, np.array([1, 1]))
    assert loss == 1e4  # of 0 and 2e4
    np.testing.assert_array_equal(cache.q, [[0, 1, 0], [1, 0, 0]])
    assert loss.dtype == cache.q.dtype == dtype


def test_float16_is_summed_in_float32_by_the_body():
    logits, labels = np.zeros((5000, 3), "float16"), np.zeros(5000, int)
    with reference():
        loss, cache = softmax_cross_entropy_forward(logits, labels)
        error, _ = mean_squared_error_forward(logits + 1, logits)
    assert (loss.dtype, cache.q.dtype, error.dtype) == ("float32", "float16", "float32")
    assert_close(loss, math.log(3), "sum")
    assert error == 1
    with pytest.raises(BackendError, match="float32 or float64, got float16"):
        softmax_cross_entropy_forward(logits, labels)


def test_inputs_are_left_alone(draw):
    logits, labels = draw.standard_normal((4, 3)), draw.integers(0, 3, 4)
    before = logits.copy()
    _, cache = softmax_cross_entropy_forward(logits, labels)
    q = cache.q.copy()
    softmax_cross_entropy_backward(1.0, cache)
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_array_equal(cache.q, q)


LOGITS = np.zeros((4, 3))
BAD_LABELS = [
    (np.array([0, 1, 2, 3]), UserError, "labels must lie in 0..2 for 3 classes, got 0..3"),
    (np.array([-1, 1, 2, 0]), UserError, "labels must lie in 0..2 for 3 classes, got -1..2"),
    (np.array([0, 1, 2]), UserError, "less the class axis, (4,), got (3,)"),
    (np.zeros((4, 1), int), UserError, "less the class axis, (4,), got (4, 1)"),
    (np.zeros(4), UserError, "must be integer class indices, got dtype float64"),
    ([0, 1, 2, 0], BackendError, "expected a numpy.ndarray or cupy.ndarray, got builtins.list"),
]


@pytest.mark.parametrize(("labels", "error", "message"), BAD_LABELS)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=re.escape(message)):
        softmax_cross_entropy_forward(LOGITS, labels)


def test_bad_shapes():
    with pytest.raises(UserError, match="got an empty batch"):
        softmax_cross_entropy_forward(LOGITS[:0], np.zeros(0, int))
    with pytest.raises(BackendError, match=r"got builtins\.list"):
        mean_squared_error_forward(LOGITS, [1.0])
    with pytest.raises(UserError, match=r"shape of the output, \(4, 3\), got \(4, 1\)"):
        mean_squared_error_forward(LOGITS, np.zeros((4, 1)))
    with pytest.raises(UserError, match="got an empty batch"):
        mean_squared_error_forward(LOGITS[:0], LOGITS[:0])
