"""Dropout and the masks of examples: their law, their counters, the gradient."""

import numpy as np
import pytest

from comet_np.backends import BackendError, reference
from comet_np.errors import UserError
from comet_np.functional import dropout
from comet_np.functional.dropout import (
    dropout_backward,
    dropout_factor,
    dropout_forward,
    example_mask,
)
from comet_np.gradcheck import check_gradients
from comet_np.rng import key, random_bits
from tests.tolerances import TOLERANCES, assert_close

KEY = key(0, "test dropout")
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


def numbers(n, counter):
    """Return the first n numbers of the stream at a counter."""
    return random_bits(KEY, n, np.array(counter))


@both
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999])
def test_element_i_uses_number_i_of_the_stream_at_this_step(rate, dtype, kernels, draw):
    x = draw.standard_normal((3, 4, 5)).astype(dtype)
    for step in 0, 1, 2**40 + 3:
        with np.errstate() if kernels else reference():
            y, cache = dropout_forward(x, rate, KEY, step)
        assert y.dtype == cache.factor.dtype == dtype
        for i, bits in enumerate(numbers(x.size, step)):
            kept = bits / 2**32 >= rate
            assert_close(y.flat[i], float(x.flat[i]) / (1 - rate) if kept else 0, "elementwise")


def test_float16_is_of_the_body_only(draw):
    x = draw.standard_normal((3, 4)).astype("float16")
    with reference():
        y, _ = dropout_forward(x, 0.5, KEY, 0)
    assert y.dtype == "float16"
    np.testing.assert_array_equal(y, x * 2 * (numbers(12, 0) >= 2**31).reshape(3, 4))
    with pytest.raises(BackendError, match="float32 or float64, got float16"):
        dropout_forward(x, 0.5, KEY, 0)


def test_the_number_at_the_rate_is_kept(monkeypatch):
    """So that exactly the share `rate` of all numbers is dropped, and none at rate 0."""
    bits = np.array([0, 2**30 - 1, 2**30, 2**32 - 1], "uint32")
    monkeypatch.setattr(dropout, "random_bits", lambda key, n, counter: bits)
    with reference():
        for rate, kept in (0.25, [0, 0, 1, 1]), (0.0, [1, 1, 1, 1]):
            np.testing.assert_array_equal(dropout_factor(np.ones(4), rate, KEY, 0) > 0, kept)
        for p, won in (0.25, [1, 1, 0, 0]), (0.0, [0, 0, 0, 0]), (1.0, [1, 1, 1, 1]):
            np.testing.assert_array_equal(example_mask(np.zeros(1, int), 4, p, KEY), won)


@both
@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.repeat(a, 2, -1)[..., ::2]])
def test_the_mask_does_not_depend_on_the_memory_layout(layout, kernels, draw):
    x = draw.standard_normal((3, 5))
    with np.errstate() if kernels else reference():
        np.testing.assert_array_equal(dropout_forward(layout(x), 0.5, KEY, 3)[0],
                                      dropout_forward(x, 0.5, KEY, 3)[0])


def test_proportion_and_mean():
    n, rate = 1 << 18, 0.3
    y, _ = dropout_forward(np.ones(n), rate, KEY, 5)
    deviation = (rate * (1 - rate) / n) ** 0.5
    assert abs((y == 0).mean() - rate) < 5 * deviation
    assert abs(y.mean() - 1) < 5 * deviation / (1 - rate)


@both
def test_keys_and_steps_name_masks(kernels):
    x = np.ones(1000)
    with np.errstate() if kernels else reference():
        y = dropout_forward(x, 0.5, KEY, 3)[0]
        np.testing.assert_array_equal(dropout_forward(x, 0.5, KEY, np.array(3))[0], y)
        for other in (KEY, 4), (key(1, "test dropout"), 3):
            share = (dropout_forward(x, 0.5, *other)[0] != y).mean()
            assert abs(share - 0.5) < 5 * (0.25 / 1000) ** 0.5


def forward(at):
    return dropout_forward(at["x"], 0.3, KEY, 11)


@both
def test_gradient(kernels, draw):
    at = {"x": draw.standard_normal((4, 5))}
    with np.errstate() if kernels else reference():
        result = check_gradients(
            forward, lambda dy, cache, at: {"x": dropout_backward(dy, cache)}, at, full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result


MUTANTS = {
    "no mask": lambda dy, factor: dy / 0.7,
    "no scale": lambda dy, factor: dy * (factor > 0),
    "scaled twice": lambda dy, factor: dy * factor**2,
    "mask of the next step": lambda dy, factor: dropout_forward(dy, 0.3, KEY, 12)[0],
}


@pytest.mark.parametrize("gradient", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(gradient, draw):
    result = check_gradients(forward, lambda dy, cache, at: {"x": gradient(dy, cache.factor)},
                             {"x": draw.standard_normal((4, 5))})
    assert not result.ok


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_rates_outside_0_to_1(rate):
    with pytest.raises(UserError, match=rf"probability in \[0, 1\), got {rate}"):
        dropout_forward(np.ones(3), rate, KEY, 0)


# --- masks of examples --------------------------------------------------------------------------


@both
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 1.0])
def test_neuron_i_uses_number_i_of_the_stream_at_the_example(p, kernels):
    example = np.array([7, 0, 7, 2**40])
    with np.errstate() if kernels else reference():
        mask = example_mask(example, 13, p, KEY)
    assert (mask.dtype, mask.shape) == (bool, (4, 13))
    for row, number in zip(mask, example, strict=True):
        np.testing.assert_array_equal(row, numbers(13, number) / 2**32 < p)
    with np.errstate() if kernels else reference():
        assert example_mask(example[:0], 13, p, KEY).shape == (0, 13)
