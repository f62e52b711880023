"""Activations and the masked layer, eq. (2) and (8): values one by one, gradients, extremes."""

import math

import numpy as np
import pytest

from comet_np.backends import reference
from comet_np.errors import UserError
from comet_np.functional.activations import (
    ACTIVATIONS,
    Activation,
    activation,
    masked_activation_backward,
    masked_activation_forward,
)
from comet_np.gradcheck import check_gradients
from tests.tolerances import TOLERANCES, assert_close


def phi(a):
    return 0.5 * math.erfc(-a / math.sqrt(2))


def naive_softplus(a):
    return math.log1p(math.exp(a))


# f of one number, as the papers that introduced them write it.
NAIVE = {
    "identity": lambda a: a,
    "relu": lambda a: max(a, 0.0),
    "leaky_relu": lambda a: a if a > 0 else 0.1 * a,
    "tanh": math.tanh,
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "softplus": naive_softplus,
    "silu": lambda a: a / (1 + math.exp(-a)),
    "gelu": lambda a: a * phi(a),
    "elu": lambda a: a if a > 0 else math.exp(a) - 1,
    "selu": lambda a: 1.0507009873554805 * (
        a if a > 0 else 1.6732632423543772 * (math.exp(a) - 1)),
    "mish": lambda a: a * math.tanh(naive_softplus(a)),
}
LIMITS = {  # f(-1e4) and f(1e4)
    "identity": (-1e4, 1e4), "relu": (0, 1e4), "leaky_relu": (-1e3, 1e4), "tanh": (-1, 1),
    "sigmoid": (0, 1), "softplus": (0, 1e4), "silu": (0, 1e4), "gelu": (0, 1e4), "elu": (-1, 1e4),
    "selu": (-1.0507009873554805 * 1.6732632423543772, 1.0507009873554805e4), "mish": (0, 1e4),
}
ANALYTIC = ("identity", "tanh", "gelu")  # as written, without abs, minimum or where


def test_the_list_is_complete():
    assert set(NAIVE) == set(LIMITS) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(name, dtype):
    a = np.linspace(-20, 20, 401, dtype=dtype)
    expected = [NAIVE[name](float(a_i)) for a_i in a]
    y = activation(name).forward(a)
    assert y.dtype == dtype
    assert_close(y, expected, "elementwise")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nothing_overflows(name, dtype):
    f = activation(name)
    a = np.array([-1e4, -100, 0, 100, 1e4], dtype)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y, slope = f.forward(a), f.derivative(a)
    assert_close(y[[0, -1]], LIMITS[name], "elementwise")
    assert y.dtype == slope.dtype == dtype
    assert np.isfinite(slope).all()


def masked_pair(f):
    """Return forward and backward of the masked layer for `check_gradients`, and where to check."""
    def forward(at):
        return masked_activation_forward(at["s"], at["b"], at_mask, f)

    def backward(dx, cache, at):
        db = np.zeros_like(at["b"])
        return {"s": masked_activation_backward(dx, cache, f, db), "b": db}

    at_mask = np.arange(12).reshape(2, 6) % 3 > 0
    return forward, backward


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", [*ACTIVATIONS, "0.5*softplus", "-2*tanh", "centred_softplus",
                                  "2*centred_elu"])
def test_gradients(name, kernels, draw):
    at = {"s": 2 * draw.standard_normal((2, 6)), "b": draw.standard_normal(6)}
    with reference() if not kernels else np.errstate():
        result = check_gradients(*masked_pair(activation(name)), at, full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result


@pytest.mark.parametrize("name", ANALYTIC)
def test_gradients_by_complex_step(name, draw):
    at = {"s": 2 * draw.standard_normal((2, 6)), "b": draw.standard_normal(6)}
    result = check_gradients(*masked_pair(activation(name)), at, complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_wrong_derivative_is_caught(name, draw):
    f = activation(name)
    at = {"s": 2 * draw.standard_normal((2, 6)), "b": draw.standard_normal(6)}
    for wrong in (lambda a: 1.01 * f.derivative(a), lambda a: f.derivative(-a) + (a > 1),
                  np.zeros_like):
        mutant = Activation("mutant", f.forward, wrong)
        assert not check_gradients(*masked_pair(mutant), at).ok


def test_a_backward_that_forgets_the_mask_or_the_bias_is_caught(draw):
    f = activation("softplus")
    forward, backward = masked_pair(f)
    at = {"s": draw.standard_normal((2, 6)), "b": draw.standard_normal(6)}
    no_mask = check_gradients(
        forward, lambda dx, cache, at: backward(dx, cache._replace(m=None), at), at)
    assert not no_mask.ok
    no_bias = check_gradients(
        forward, lambda dx, cache, at: backward(dx, cache, at) | {"b": 0 * at["b"]}, at)
    assert (no_bias.ok, no_bias.worst) == (False, "b")


def test_at_a_kink_the_derivative_is_that_of_the_left_side():
    zero = np.zeros(1)
    slopes = {name: float(activation(name).derivative(zero)[0])
              for name in ("relu", "leaky_relu", "elu", "selu")}
    assert slopes == {"relu": 0, "leaky_relu": 0.1, "elu": 1,
                      "selu": 1.0507009873554805 * 1.6732632423543772}


def test_masked_layer_one_by_one(draw):
    s, b, m = draw.standard_normal((2, 3, 5)), draw.standard_normal(5), draw.random((2, 3, 5)) < 0.5
    before = s.copy()
    for bias, mask in ((b, m), (b, None), (None, m), (None, None)):
        x, cache = masked_activation_forward(s, bias, mask, activation("softplus"))
        for i in np.ndindex(s.shape):
            a = s[i] + (0 if bias is None else b[i[-1]])
            assert_close(cache.a[i], a, "elementwise")
            won = mask is None or m[i]
            assert_close(x[i], naive_softplus(a) if won else 0, "elementwise")
    np.testing.assert_array_equal(s, before)


def test_bias_gradient_is_added_and_the_cotangent_left_alone(draw):
    s, dx = draw.standard_normal((4, 5)), draw.standard_normal((4, 5))
    before = dx.copy()
    x, cache = masked_activation_forward(s, None, None, activation("tanh"))
    db = np.ones(5)
    da = masked_activation_backward(dx, cache, activation("tanh"), db)
    assert_close(da, dx * (1 - x**2), "sum")
    assert_close(db, 1 + da.sum(axis=0), "sum")
    np.testing.assert_array_equal(dx, before)


@pytest.mark.parametrize(("name", "message"), [
    ("sofplus", r'unknown activation "sofplus"; did you mean "softplus"\? \(known: elu, '),
    ("2*sofplus", r'unknown activation "2\*sofplus"; did you mean "softplus"\?'),
    ("x*softplus", r'"x\*softplus" needs a number before the \*'),
    ("*softplus", r'"\*softplus" needs a number before the \*'),
])
def test_bad_names(name, message):
    with pytest.raises(UserError, match=message):
        activation(name)


def test_centred_is_zero_at_zero(draw):
    a = draw.standard_normal(7)
    f, centred = activation("softplus"), activation("centred_softplus")
    np.testing.assert_array_equal(centred.forward(a), f.forward(a) - np.log1p(1.0))
    np.testing.assert_array_equal(centred.derivative(a), f.derivative(a))


def test_a_factor_multiplies(draw):
    a = draw.standard_normal(7)
    f, doubled = activation("gelu"), activation("-2*gelu")
    np.testing.assert_array_equal(doubled.forward(a), -2 * f.forward(a))
    np.testing.assert_array_equal(doubled.derivative(a), -2 * f.derivative(a))
