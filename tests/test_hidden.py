"""The COMET layer, eq. (7)-(8): forward and backward one number at a time, masks, mutants."""

import re

import numpy as np
import pytest

from comet_np.backends import reference
from comet_np.errors import UserError
from comet_np.functional.activations import ACTIVATIONS, Activation, activation, scaled
from comet_np.functional.hidden import HiddenCache, hidden_backward, hidden_forward
from comet_np.functional.linear import Linear
from comet_np.gradcheck import check_gradients
from comet_np.tree import zeros_like
from tests import naive
from tests.tolerances import TOLERANCES, assert_close

ANALYTIC = ("identity", "tanh", "gelu")  # as written, without abs, minimum or where
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


def functions(kernels):
    """Return forward and backward as a user calls them, or their bodies."""
    pair = hidden_forward, hidden_backward
    return pair if kernels else tuple(operation.body for operation in pair)


def point(draw, batch=(4,), bias=True):
    return {"x": draw.standard_normal((*batch, 7)),
            "p": Linear(draw.standard_normal((9, 7)), draw.standard_normal(9) if bias else None)}


def naive_forward(x, p, m, name):
    """Return h and a of eq. (7)-(8), for x (B, N_in)."""
    h, a = np.zeros(m.shape), np.zeros(m.shape)
    for row in range(len(x)):
        for i, a_i in enumerate(naive.affine(x[row], p)):
            a[row, i] = a_i
            h[row, i] = naive.ACTIVATIONS[name](a_i) if m[row, i] else 0
    return h, a


def naive_backward(dh, x, p, m, name):
    """Return dx, dW and db, each the sum over all paths from h to it."""
    _, a = naive_forward(x, p, m, name)
    dx, dW, db = np.zeros(x.shape), np.zeros(p.weight.shape), np.zeros(len(p.weight))
    for row, i in np.ndindex(m.shape):
        if m[row, i]:
            da = dh[row, i] * naive.SLOPES[name](a[row, i])
            db[i] += da
            for j in range(x.shape[1]):
                dx[row, j] += p.weight[i, j] * da
                dW[i, j] += x[row, j] * da
    return dx, dW, db


def check_values(forward, backward, draw):
    """Assert that a pair of functions is the definition, with a mask and a bias and without."""
    for name in naive.SLOPES:
        f = activation(name)
        for bias, masked in (True, True), (True, False), (False, True), (False, False):
            at = point(draw, bias=bias)
            x, p = at["x"], at["p"]
            m = draw.random((4, 9)) < 0.5 if masked else np.ones((4, 9), bool)
            dh = draw.standard_normal((4, 9))
            h, cache = forward(x, p, m if masked else None, f)
            expected, a = naive_forward(x, p, m, name)
            assert_close(h, expected, "sum")
            assert_close(cache[1], a, "sum")
            g = zeros_like(p)
            dx = backward(dh, HiddenCache(x, a, m if masked else None), p, g, f)
            for ours, theirs in zip((dx, *g), naive_backward(dh, x, p, m, name), strict=True):
                assert (ours is None) == (ours is g.bias and not bias)
                if ours is not None:
                    assert_close(ours, theirs, "sum")


@both
def test_values_and_gradients_one_by_one(kernels, draw):
    check_values(*functions(kernels), draw)


def changed_forward(change):
    """Return a wrong forward: `change(x, p, m, f)` says h."""
    def forward(x, p, m, f):
        return change(x, p, m, f), hidden_forward.body(x, p, m, f)[1]

    return forward, hidden_backward


def changed_backward(change):
    """Return a wrong backward: `change(body, dh, (x, a, m), p, g, f)` says dx."""
    return hidden_forward, lambda dh, cache, p, g, f: change(
        hidden_backward.body, dh, cache, p, g, f)


def affine(x, p):
    return x @ p.weight.T + (0 if p.bias is None else p.bias)


def ones_if_none(m, a):
    return np.ones_like(a) if m is None else m


def after_masking_x(body, dh, cache, p, g, f):
    """Forget the mask for the weights, not for x."""
    body(dh, cache._replace(m=None), p, g, f)
    return body(dh, cache, p, zeros_like(p), f)


MUTANTS = {
    "right": (changed_forward(lambda x, p, m, f: hidden_forward.body(x, p, m, f)[0]), True),
    "mask before the activation": (changed_forward(
        lambda x, p, m, f: f.forward(affine(x, p) * ones_if_none(m, affine(x, p)))), False),
    "mask of the losers": (changed_forward(
        lambda x, p, m, f: hidden_forward.body(x, p, None if m is None else ~m, f)[0]), False),
    "no mask": (changed_forward(
        lambda x, p, m, f: hidden_forward.body(x, p, None, f)[0]), False),
    "no bias": (changed_forward(
        lambda x, p, m, f: hidden_forward.body(x, p._replace(bias=None), m, f)[0]), False),
    "kept activity scaled up": (changed_forward(
        lambda x, p, m, f: hidden_forward.body(x, p, m, f)[0] / ones_if_none(
            m, affine(x, p)).mean()), False),
    "backward without mask": (changed_backward(
        lambda body, dh, c, p, g, f: body(dh, c._replace(m=None), p, g, f)), False),
    "weights learn without mask": (changed_backward(after_masking_x), False),
    "derivative at h": (changed_backward(lambda body, dh, c, p, g, f: body(
        dh, c._replace(a=f.forward(c.a)), p, g, f)), False),
    "derivative of a masked a": (changed_backward(lambda body, dh, c, p, g, f: body(
        dh, c._replace(a=c.a * ones_if_none(c.m, c.a), m=None), p, g, f)), False),
    "mean over examples": (changed_backward(lambda body, dh, c, p, g, f: (
        body(dh / 4, c, p, g, f), body(dh, c, p, zeros_like(p), f))[1]), False),
    "no bias gradient": (changed_backward(lambda body, dh, c, p, g, f: body(
        dh, c, p, g._replace(bias=None), f)), False),
    "first example only": (changed_backward(lambda body, dh, c, p, g, f: (
        body(dh * (np.arange(4) == 0)[:, None], c, p, g, f),
        body(dh, c, p, zeros_like(p), f))[1]), False),
    "dx of the other rows": (changed_backward(
        lambda body, dh, c, p, g, f: body(dh, c, p, g, f)[::-1]), False),
}


@pytest.mark.parametrize(("pair", "ok"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(pair, ok, draw):
    if ok:
        check_values(*pair, draw)
    else:
        with pytest.raises(AssertionError):
            check_values(*pair, draw)


# --- gradients by difference --------------------------------------------------------------------


def pair(m, f):
    """Return forward and backward for `check_gradients`."""
    def forward(at):
        return hidden_forward(at["x"], at["p"], m, f)

    def backward(dh, cache, at):
        g = zeros_like(at["p"])
        return {"x": hidden_backward(dh, cache, at["p"], g, f), "p": g}

    return forward, backward


SCALED = {"-2 softplus": scaled(activation("softplus"), -2.0)}


@both
@pytest.mark.parametrize("f", (ACTIVATIONS | SCALED).values(), ids=ACTIVATIONS | SCALED)
def test_the_full_jacobian(f, kernels, draw):
    with np.errstate() if kernels else reference():
        at, m = point(draw, (2,)), draw.random((2, 9)) < 0.6
        result = check_gradients(*pair(m, f), at, full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result
    assert result.perturbations == 14 + 63 + 9


@pytest.mark.parametrize("name", ANALYTIC)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_by_complex_step(name, bias, draw):
    m = draw.random((2, 3, 9)) < 0.6
    result = check_gradients(*pair(m, activation(name)), point(draw, (2, 3), bias),
                             complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_wrong_derivative_is_caught(name, draw):
    f = activation(name)
    for wrong in (lambda a: 1.01 * f.derivative(a), lambda a: f.derivative(-a) + (a > 1),
                  np.zeros_like):
        mutant = Activation("mutant", f.forward, wrong)
        assert not check_gradients(*pair(None, mutant), point(draw)).ok


# --- masks --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (300,)])
def test_a_mask_may_be_packed_or_a_function(batch, kernels, draw):
    forward, backward = functions(kernels)
    at, m = point(draw, batch), draw.random((*batch, 9)) < 0.6
    f, dh = activation("softplus"), draw.standard_normal(m.shape)
    seen = []

    def asked(x, a):
        seen.append((x, a.copy()))
        return m

    def results(mask):
        h, cache = forward(at["x"], at["p"], mask, f)
        g = zeros_like(at["p"])
        dx = backward(dh, HiddenCache(*cache), at["p"], g, f)
        return h, dx, *g

    expected = results(m)
    for mask in np.packbits(m, axis=-1), asked, lambda x, a: np.packbits(m, axis=-1):
        for ours, theirs in zip(results(mask), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    (x, a), = seen  # once
    assert x is at["x"]
    assert_close(a, affine(x, at["p"]), "sum")  # with its bias
    for ours, theirs in zip(results(lambda x, a: None), results(None), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@both
@pytest.mark.parametrize(("m", "got"), [
    (np.ones((4, 10), bool), "bool (4, 10)"),
    (np.ones((5, 9), bool), "bool (5, 9)"),
    (np.ones((300, 9), bool), "bool (300, 9)"),
    (np.ones(9, bool), "bool (9,)"),
    (np.ones((4, 1), bool), "bool (4, 1)"),
    (np.ones((2, 2, 9), bool), "bool (2, 2, 9)"),
    (np.ones((4, 9), "uint8"), "uint8 (4, 9)"),  # 0 and 1 in bytes are not bits
    (np.ones((4, 1), "uint8"), "uint8 (4, 1)"),
    (np.ones((4, 9)), "float64 (4, 9)"),
])
def test_a_mask_that_does_not_fit_is_refused(m, got, kernels, draw):
    at = point(draw)
    for mask in m, lambda x, a: m:
        with (np.errstate() if kernels else reference()), pytest.raises(UserError, match=re.escape(
                "a mask must be a bool array of the shape of the layer's output, (4, 9), or a "
                f"bit-packed uint8 array of shape (4, 2), got {got}")):
            hidden_forward(at["x"], at["p"], mask, activation("tanh"))


@both
@pytest.mark.parametrize("shape", [(3, 5), (4,), ()])
def test_a_wrong_input_shape(shape, kernels, draw):
    p = point(draw)["p"]
    with (np.errstate() if kernels else reference()), pytest.raises(UserError, match=re.escape(
            f"x must have shape (..., 7) for a weight of shape (9, 7), got {shape}")):
        hidden_forward(np.ones(shape), p, None, activation("tanh"))


@both
@pytest.mark.parametrize("name", ["softplus", "sigmoid", "tanh", "identity", "gelu"])
def test_all_and_no_winners(name, kernels, draw):
    at, f = point(draw), activation(name)
    with np.errstate() if kernels else reference():
        every, _ = hidden_forward(at["x"], at["p"], np.ones((4, 9), bool), f)
        plain, _ = hidden_forward(at["x"], at["p"], None, f)
        nobody, cache = hidden_forward(at["x"], at["p"], np.zeros((4, 9), bool), f)
        g = zeros_like(at["p"])
        dx = hidden_backward(np.ones((4, 9)), cache, at["p"], g, f)
    np.testing.assert_array_equal(every, plain)
    for zero in nobody, dx, *g:
        assert not zero.any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extreme_pre_activations(name, dtype):
    """The kernels' own ways to compute f and f' do not overflow, and agree with the bodies."""
    f = activation(name)
    x = np.array([[-1e4], [-100], [-41], [-1], [0], [1], [39], [41], [100], [1e4]], dtype)
    p = Linear(np.ones((1, 1), dtype), np.zeros(1, dtype))
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        h, cache = hidden_forward(x, p, None, f)
        dx = hidden_backward(np.ones_like(x), cache, p, zeros_like(p), f)
    assert_close(h, f.forward(x), "elementwise")
    assert_close(dx, f.derivative(x), "elementwise")
