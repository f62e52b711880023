"""Dropout: its law, its counter, its gradient."""

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.functional import dropout
from comet_np.functional.dropout import dropout_backward, dropout_forward
from comet_np.gradcheck import check_gradients
from comet_np.rng import key, random_bits
from tests.tolerances import TOLERANCES, assert_close

KEY = key(0, "test dropout")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999])
def test_element_i_uses_number_i_of_the_stream(rate, dtype, draw):
    x = draw.standard_normal((3, 4, 5)).astype(dtype)
    y, _ = dropout_forward(x, rate, KEY)
    assert y.dtype == dtype
    for i, bits in enumerate(random_bits(KEY, x.size, np)):
        kept = bits / 2**32 >= rate
        assert_close(y.flat[i], float(x.flat[i]) / (1 - rate) if kept else 0, "elementwise")


def test_the_number_at_the_rate_is_kept(monkeypatch):
    """So that exactly the share `rate` of all numbers is dropped, and none at rate 0."""
    bits = np.array([0, 2**30 - 1, 2**30, 2**32 - 1], "uint32")
    monkeypatch.setattr(dropout, "random_bits", lambda key, n, xp: bits)
    np.testing.assert_array_equal(dropout_forward(np.ones(4), 0.25, KEY)[0] > 0, [0, 0, 1, 1])
    np.testing.assert_array_equal(dropout_forward(np.ones(4), 0.0, KEY)[0], 1)


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.repeat(a, 2, -1)[..., ::2]])
def test_the_mask_does_not_depend_on_the_memory_layout(layout, draw):
    x = draw.standard_normal((3, 5))
    np.testing.assert_array_equal(dropout_forward(layout(x), 0.5, KEY)[0],
                                  dropout_forward(x, 0.5, KEY)[0])


def test_proportion_and_mean():
    n, rate = 1 << 18, 0.3
    y, _ = dropout_forward(np.ones(n), rate, KEY)
    deviation = (rate * (1 - rate) / n) ** 0.5
    assert abs((y == 0).mean() - rate) < 5 * deviation
    assert abs(y.mean() - 1) < 5 * deviation / (1 - rate)


def test_keys_name_masks():
    x = np.ones(1000)
    y, _ = dropout_forward(x, 0.5, KEY)
    np.testing.assert_array_equal(dropout_forward(x, 0.5, KEY)[0], y)
    assert (dropout_forward(x, 0.5, key(1, "test dropout"))[0] != y).any()


def forward(at):
    return dropout_forward(at["x"], 0.3, KEY)


def test_gradient(draw):
    at = {"x": draw.standard_normal((4, 5))}
    result = check_gradients(
        forward, lambda dy, cache, at: {"x": dropout_backward(dy, cache)}, at, full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result


MUTANTS = {
    "no mask": lambda dy, factor: dy / 0.7,
    "no scale": lambda dy, factor: dy * (factor > 0),
    "scaled twice": lambda dy, factor: dy * factor**2,
}


@pytest.mark.parametrize("gradient", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(gradient, draw):
    result = check_gradients(forward, lambda dy, cache, at: {"x": gradient(dy, cache.factor)},
                             {"x": draw.standard_normal((4, 5))})
    assert not result.ok


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_rates_outside_0_to_1(rate):
    with pytest.raises(UserError, match=rf"probability in \[0, 1\), got {rate}"):
        dropout_forward(np.ones(3), rate, KEY)
