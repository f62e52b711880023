"""The cap C_k and the routing network, equations (3)-(6), against their literal definitions."""

import math

import numpy as np
import pytest

from comet_np import kwta_mask
from comet_np.backends import BackendError, reference
from comet_np.errors import UserError
from comet_np.functional.activations import activation
from comet_np.functional.routing import (
    TIES,
    cap,
    log10_experts,
    routing_forward,
    winners,
)
from tests import naive
from tests.tolerances import assert_close

SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, 1, -1, np.inf, 0.0, -np.inf, 1, 1])


def check_cap(of, draw):
    """Assert that `of` is the definition on rows with ties, zeros of both signs, infinities."""
    rows = [draw.permutation(SPECIAL), draw.integers(0, 3, 9), np.zeros(5), -np.zeros(4), [7.0],
            draw.standard_normal(12), np.full(3, np.inf), [0.0, -0.0, 0.0, -0.0, -1.0]]
    for v in rows:
        for dtype in ("float32", "float64"):
            v = np.asarray(v, dtype)
            for k in range(1, len(v) + 1):
                for ties in TIES:
                    np.testing.assert_array_equal(of(v, k, ties), naive.cap(v, k, ties))


@pytest.mark.parametrize("of", [kwta_mask, cap], ids=["kwta_mask", "cap"])
def test_cap_is_its_definition(of, draw):
    check_cap(of, draw)
    with reference():
        check_cap(of, draw)


MUTANTS = {
    ">= for > in strict": lambda v, k, ties: kwta_mask(
        v, k, "threshold" if ties == "strict" else ties),
    "k largest by argsort": lambda v, k, ties: kwta_mask(v, k, "index"),
    "ties to the highest index": lambda v, k, ties: kwta_mask(v[::-1], k, ties)[::-1],
    "one too many": lambda v, k, ties: kwta_mask(v, min(k + 1, len(v)), ties),
    "the smallest": lambda v, k, ties: kwta_mask(-v, k, ties),
    "all-equal rows keep one": lambda v, k, ties: kwta_mask(v, k, ties) | (
        (np.arange(len(v)) == 0) & (v.min() == v.max())),
    "+0 above -0": lambda v, k, ties: kwta_mask(
        np.where((v == 0) & ~np.signbit(v), 1e-30, v), k, ties),
}


@pytest.mark.parametrize("of", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_the_cap_are_caught(of, draw):
    with pytest.raises(AssertionError):
        check_cap(of, draw)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("N", [1, 2, 100, 1000, 3000, 9216])
@pytest.mark.parametrize("rounded", [False, True])
def test_cap_of_wide_rows(N, ties, rounded, draw):
    scores = draw.standard_normal((3, N)).astype("float32")
    if rounded:
        scores = np.round(scores * 4)
    at_least = np.array([N - np.searchsorted(np.sort(v), v, "left") for v in scores])  # #{>=}
    above = np.array([N - np.searchsorted(np.sort(v), v, "right") for v in scores])  # #{>}
    for p_k in (0.001, 0.1, 0.5, 0.9, 1.0):
        k = winners(p_k, N)
        mask = kwta_mask(scores, k, ties)
        if ties == "strict":
            np.testing.assert_array_equal(mask, at_least <= k)
        elif ties == "threshold":
            np.testing.assert_array_equal(mask, above < k)
        else:
            stable = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
            np.testing.assert_array_equal(np.sort(stable), np.nonzero(mask)[1].reshape(3, k))


def test_ties_at_rank_k_lose_win_or_are_split():
    scores = np.array([3.0, 2, 2, 2, 1])
    np.testing.assert_array_equal(kwta_mask(scores, 2), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(kwta_mask(scores, 2, "threshold"), [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(kwta_mask(scores, 2, "index"), [1, 1, 0, 0, 0])


@pytest.mark.parametrize("ties", TIES)
def test_cap_takes_any_leading_axes_and_leaves_its_input(ties, draw):
    scores = np.round(draw.standard_normal((2, 3, 4, 9)))
    before = scores.copy()
    mask = kwta_mask(scores, 4, ties)
    assert mask.dtype == bool
    np.testing.assert_array_equal(scores, before)
    for index in np.ndindex(2, 3, 4):
        np.testing.assert_array_equal(mask[index], naive.cap(scores[index], 4, ties))
    assert kwta_mask(scores=scores[0, 0, :0], k=4, ties=ties).shape == (0, 9)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("k", [2, 1000])
def test_nan_is_an_error_that_says_where(ties, k, draw):
    scores = draw.standard_normal((3, 700, 1000)).astype("float32")
    scores[1, 650, 7] = scores[2, 0, 0] = np.nan
    for order in "CF":
        with pytest.raises(UserError, match=r"score \(1, 650, 7\) of \(3, 700, 1000\) is NaN"):
            kwta_mask(scores.copy(order), k, ties)


BAD_CAPS = [
    ((np.ones(5), 0), UserError, r"k must be an integer between 1 and N = 5 .*got 0"),
    ((np.ones(5), 6), UserError, r"k must be an integer between 1 and N = 5 .*got 6"),
    ((np.ones(5), 2.0), UserError, r"k must be an integer between 1 and N = 5 .*got 2\.0"),
    ((np.ones((3, 0)), 1), UserError, r"between 1 and N = 0 .*\(3, 0\)\), got 1"),
    ((np.array(1.0), 1), UserError, r"shape \(\.\.\., N\), got a scalar"),
    ((np.ones(5), 2, "strickt"), UserError, r'unknown tie rule "strickt"; did you mean "strict"'),
    (([1.0, 2.0], 1), BackendError, r"expected a numpy\.ndarray .* got builtins\.list"),
    ((np.ones(5, int), 2), BackendError, r"float32 or float64, got int64"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CAPS)
def test_bad_arguments_of_the_cap(arguments, error, message):
    with pytest.raises(error, match=message):
        kwta_mask(*arguments)


def test_winners_rounds_down_in_double_precision():
    assert winners(0.29, 100) == 28  # 0.29 * 100 is 28.999999999999996
    assert winners(0.5, 7) == 3
    assert winners(1e-9, 10) == 1
    assert all(winners(1.0, N) == N for N in range(1, 9217))


@pytest.mark.parametrize("p_k", [0, -0.1, 1.0001, math.nan, math.inf])
def test_p_k_outside_0_to_1(p_k):
    with pytest.raises(UserError, match=rf"must be in \(0, 1\], got {p_k}"):
        winners(p_k, 10)


def test_number_of_experts():
    assert log10_experts(1000, 100) == pytest.approx(math.log10(math.comb(1000, 100)), rel=1e-12)
    assert round(log10_experts(1000, 100), 1) == 139.8
    assert log10_experts(5, 0) == log10_experts(5, 5) == 0
    with pytest.raises(UserError, match="got N = 5, k = 6"):
        log10_experts(5, 6)


@pytest.mark.parametrize("g", ["identity", "tanh"])
@pytest.mark.parametrize("ties", TIES)
def test_routing_network_is_equations_4_to_6(ties, g, draw):
    V = [draw.standard_normal((8, 6)), draw.standard_normal((7, 8)), draw.standard_normal((9, 7))]
    x = draw.standard_normal((2, 3, 6))
    trace = routing_forward(x, V, 0.5, ties, activation(g))
    for index in np.ndindex(2, 3):
        z = x[index]
        for layer in range(3):
            c = np.array([sum(v * z_j for v, z_j in zip(row, z, strict=True)) for row in V[layer]])
            m = naive.cap(c, int(0.5 * len(c)), ties)
            z = np.array([math.tanh(c_i) if g == "tanh" else c_i for c_i in c]) * m
            assert_close(trace.c[layer][index], c, "sum")
            np.testing.assert_array_equal(trace.m[layer][index], m)
            if layer < 2:
                assert_close(trace.z[layer][index], z, "sum")
    assert len(trace.z) == 2  # the last one's would route nothing


def test_routing_never_computes_in_float16(draw):
    V = [draw.standard_normal((8, 6)).astype("float32"),
         draw.standard_normal((3, 8)).astype("float32")]
    x = draw.standard_normal((5, 6)).astype("float16")
    c, m, z = routing_forward(x, V, 0.5, "strict", activation("identity"))
    assert c[0].dtype == z[0].dtype == "float32"
    np.testing.assert_array_equal(
        m[0], kwta_mask(x.astype("float32") @ V[0].T, 4))
