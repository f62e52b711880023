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

both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
pytestmark = pytest.mark.usefixtures("bodies_or_kernels")


def cross_entropy(labels, ignored=None):
    """Return forward and backward for `check_gradients`."""
    return (lambda at: softmax_cross_entropy_forward(at["logits"], labels, ignored),
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


@both
def test_gradients(kernels, draw):
    logits, labels = draw.standard_normal((2, 3, 5)), draw.integers(0, 5, (2, 3))
    for pair, at in ((cross_entropy(labels), {"logits": logits}),
                     (squared_error(draw.standard_normal((2, 3))), {"y": logits[..., 0]})):
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


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_logits(dtype, kernels):
    logits = np.array([[-1e4, 1e4, 0], [1e4, -1e4, 0]], dtype)
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


# --- labels that do not count, and memory that is written over ---------------------------------

IGNORED = -100
SHAPES = [(6, 5), (2, 3, 300), (9, 70001)]  # few classes, many, and a row longer than a block


def some_ignored(draw, shape):
    labels = draw.integers(0, shape[-1], shape[:-1])
    labels[..., 1] = IGNORED
    return labels


@both
def test_ignored_labels_are_as_if_their_examples_were_left_out(kernels, draw):
    logits = draw.standard_normal((2, 3, 5))
    labels = some_ignored(draw, logits.shape)
    loss, cache = softmax_cross_entropy_forward(logits, labels, IGNORED)
    kept = labels != IGNORED
    expected, left = softmax_cross_entropy_forward(logits[kept], labels[kept])
    assert_close(loss, expected, "sum")
    dlogits = softmax_cross_entropy_backward(0.7, cache)
    assert_close(dlogits[kept], softmax_cross_entropy_backward(0.7, left), "sum")
    assert not dlogits[~kept].any()
    result = check_gradients(*cross_entropy(labels, IGNORED), {"logits": logits}, full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result


@both
def test_what_is_ignored_may_be_nan(kernels, draw):
    logits, labels = draw.standard_normal((3, 5)), np.array([IGNORED, 2, 0])
    logits[0] = np.nan
    loss, cache = softmax_cross_entropy_forward(logits, labels, IGNORED)
    assert np.isfinite(loss) and np.isfinite(softmax_cross_entropy_backward(1.0, cache)).all()


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_is_the_same_written_over(shape, dtype, kernels, draw):
    logits, labels = draw.standard_normal(shape).astype(dtype), some_ignored(draw, shape)
    loss, cache = softmax_cross_entropy_forward(logits, labels, IGNORED)
    expected = softmax_cross_entropy_backward(1.0, cache)
    ours, own = softmax_cross_entropy_forward(logits, labels, IGNORED, in_place=True)
    assert own.q is logits and ours == loss
    np.testing.assert_array_equal(logits, cache.q)
    assert softmax_cross_entropy_backward(1.0, own) is logits
    np.testing.assert_array_equal(logits, expected)


@both
def test_in_place_in_every_order_of_memory(kernels, draw):
    logits, labels = draw.standard_normal((2, 3, 4)), draw.integers(0, 4, (2, 3))
    loss, cache = softmax_cross_entropy_forward(logits, labels)
    expected = softmax_cross_entropy_backward(1.0, cache)
    for memory in (np.empty((4, 6)).T.reshape(2, 3, 4), np.empty((2, 3, 8))[..., ::2],
                   np.empty((4, 3, 2)).T, np.empty((3, 2, 4)).swapaxes(0, 1)):
        memory[...] = logits
        ours, own = softmax_cross_entropy_forward(memory, labels, in_place=True)
        assert_close(ours, loss, "sum")
        assert softmax_cross_entropy_backward(1.0, own) is memory
        assert_close(memory, expected, "sum")


@both
def test_in_place_is_refused_where_nothing_can_be_written(kernels):
    labels = np.zeros(2, int)
    with pytest.raises(UserError, match=r"got float64 \(read-only\): leave in_place out"):
        softmax_cross_entropy_forward(np.broadcast_to(0.0, (2, 3)), labels, in_place=True)
    with reference(), pytest.raises(UserError, match="got float16: leave in_place out"):
        softmax_cross_entropy_forward(np.zeros((2, 3), "float16"), labels, in_place=True)


@both
def test_nothing_but_ignored_labels(kernels):
    with pytest.raises(UserError, match="the mean loss of no examples is undefined"):
        softmax_cross_entropy_forward(np.zeros((2, 3)), np.full(2, IGNORED), IGNORED)


@both
def test_unsigned_labels_may_be_ignored_and_are_never_negative(kernels, draw):
    logits, labels = draw.standard_normal((4, 3)), np.array([0, 2, 1, 65535], "uint16")
    kept, _ = softmax_cross_entropy_forward(logits[:3], labels[:3], IGNORED)
    assert_close(kept, softmax_cross_entropy_forward(logits[:3], labels[:3])[0], "sum")
    assert_close(softmax_cross_entropy_forward(logits, labels, 65535)[0], kept, "sum")


@both
def test_labels_out_of_range_are_told_beside_ignored_ones(kernels):
    with pytest.raises(UserError, match=r"labels must lie in 0\.\.2 for 3 classes, got -1\.\.2"):
        softmax_cross_entropy_forward(np.zeros((3, 3)), np.array([IGNORED, -1, 2]), IGNORED)


@both
def test_ignored_labels_are_those_of_pytorch(kernels, draw):
    torch = pytest.importorskip("torch")
    logits = draw.standard_normal((2, 7, 300))
    labels = some_ignored(draw, logits.shape)
    theirs = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.tensor(labels).flatten(),
                                             ignore_index=IGNORED)
    loss.backward()
    ours, cache = softmax_cross_entropy_forward(logits, labels, IGNORED, in_place=True)
    dlogits = softmax_cross_entropy_backward(1.0, cache)
    for a, b in (ours, loss), (dlogits, theirs.grad):
        error = np.abs(a - b.detach().numpy()).max() / np.abs(a).max()
        assert error <= TOLERANCES["torch"]["float64"]


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
