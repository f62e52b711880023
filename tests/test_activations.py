"""Activations, and eq. (6): values one by one, derivatives, extremes."""

import numpy as np
import pytest

from comet_np.backends import reference
from comet_np.errors import UserError
from comet_np.functional.activations import ACTIVATIONS, activation, masked, scaled
from comet_np.gradcheck import check_gradients
from tests import naive
from tests.tolerances import TOLERANCES, assert_close

LIMITS = {  # f(-1e4) and f(1e4)
    "identity": (-1e4, 1e4), "relu": (0, 1e4), "leaky_relu": (-1e3, 1e4), "tanh": (-1, 1),
    "sigmoid": (0, 1), "softplus": (0, 1e4), "silu": (0, 1e4), "gelu": (0, 1e4),
    "gelu_new": (0, 1e4), "elu": (-1, 1e4),
    "selu": (-1.0507009873554805 * 1.6732632423543772, 1.0507009873554805e4), "mish": (0, 1e4),
    "centred_sigmoid": (-0.5, 0.5), "centred_softplus": (-np.log(2), 1e4 - np.log(2)),
}
ANALYTIC = ("identity", "tanh", "gelu")  # as written, without abs, minimum or where


def test_the_list_is_complete():
    assert set(naive.ACTIVATIONS) == set(LIMITS) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(name, dtype):
    a = np.linspace(-20, 20, 401, dtype=dtype)
    expected = [naive.ACTIVATIONS[name](float(a_i)) for a_i in a]
    y = activation(name).forward(a)
    assert y.dtype == dtype
    assert_close(y, expected, "elementwise")


@pytest.mark.parametrize("name", naive.SLOPES)
def test_slopes(name):
    a = np.linspace(-20, 20, 401)
    expected = [naive.SLOPES[name](float(a_i)) for a_i in a]
    assert_close(activation(name).derivative(a), expected, "elementwise")


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


def pair(f):
    """Return forward and backward of f for `check_gradients`."""
    return (lambda at: (f.forward(at["a"]), at["a"]),
            lambda dy, a, at: {"a": dy * f.derivative(a)})


@pytest.mark.parametrize("f", [*ACTIVATIONS.values(), scaled(activation("gelu"), -2.0)],
                         ids=lambda f: f.name)
def test_derivatives(f, draw):
    at = {"a": 2 * draw.standard_normal((2, 6))}
    result = check_gradients(*pair(f), at, full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result


@pytest.mark.parametrize("name", ANALYTIC)
def test_derivatives_by_complex_step(name, draw):
    at = {"a": 2 * draw.standard_normal((2, 6))}
    result = check_gradients(*pair(activation(name)), at, complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


def test_at_a_kink_the_derivative_is_that_of_the_left_side():
    zero = np.zeros(1)
    slopes = {name: float(activation(name).derivative(zero)[0])
              for name in ("relu", "leaky_relu", "elu", "selu")}
    assert slopes == {"relu": 0, "leaky_relu": 0.1, "elu": 1,
                      "selu": 1.0507009873554805 * 1.6732632423543772}


@pytest.mark.parametrize(("name", "message"), [
    ("sofplus", r'unknown activation "sofplus"; did you mean "softplus"\? \(known: centred_sig'),
    ("centred_tanh", r'unknown activation "centred_tanh"; did you mean '),  # it is 0 at 0 already
    ("2*softplus", r'unknown activation "2\*softplus"; did you mean "softplus"\?'),
])
def test_bad_names(name, message):
    with pytest.raises(UserError, match=message):
        activation(name)


@pytest.mark.parametrize("name", ["sigmoid", "softplus"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_centred_is_zero_at_zero_and_has_the_same_slope(name, dtype, draw):
    a = draw.standard_normal(7).astype(dtype)
    f, centred = activation(name), activation(f"centred_{name}")
    assert centred.forward(a).dtype == dtype
    assert abs(float(centred.forward(a * 0)[0])) <= TOLERANCES["elementwise"][dtype]
    np.testing.assert_array_equal(centred.derivative(a), f.derivative(a))


def test_a_factor_multiplies(draw):
    a = draw.standard_normal(7)
    f, doubled = activation("gelu"), scaled(activation("gelu"), -2.0)
    np.testing.assert_array_equal(doubled.forward(a), -2 * f.forward(a))
    np.testing.assert_array_equal(doubled.derivative(a), -2 * f.derivative(a))
    assert doubled.name not in ACTIVATIONS  # no kernel may take it for another
    assert scaled(f, -2.0) is doubled


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", ["identity", "tanh"])
def test_routing_activity_one_by_one(name, kernels, draw):
    """Eq. (6)."""
    c, m = draw.standard_normal((2, 3, 9)), draw.random((2, 3, 9)) < 0.5
    with np.errstate() if kernels else reference():
        for mask in m, np.packbits(m, axis=-1):
            z = masked(c, mask, activation(name))
            for i in np.ndindex(c.shape):
                assert_close(z[i], naive.ACTIVATIONS[name](c[i]) if m[i] else 0, "elementwise")
