"""The gradient checks: right pairs pass, wrong ones fail where they are wrong, flips are told."""

import doctest
import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from comet_np import gradcheck, kwta_mask
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.functional.activations import ACTIVATIONS
from comet_np.gates import Comet, Layerwise, TopK
from comet_np.gradcheck import check_gradients
from comet_np.models import mlp
from comet_np.selfcheck import check_mlp_gradients, check_model_gradients, routing_scores
from tests.tolerances import TOLERANCES


class Point(NamedTuple):
    """Where the softmax of a product is differentiated."""

    x: Any
    W: Any


def forward(at):
    q = np.exp(at.x @ at.W.T)
    return q / q.sum(axis=-1, keepdims=True), None


def backward(dy, cache, at):
    q, _ = forward(at)
    da = q * (dy - (dy * q).sum(axis=-1, keepdims=True))
    return Point(da @ at.W, da.T @ at.x)


@pytest.fixture
def at(draw):
    return Point(draw.standard_normal((2, 3)), draw.standard_normal((4, 3)))


@pytest.mark.parametrize("full", [True, False])
def test_a_right_pair_passes(at, full):
    result = check_gradients(forward, backward, at, full=full, probes=3)
    assert result.ok
    assert result.error <= TOLERANCES["difference"]["float64"]
    assert result.perturbations == (6 + 12 if full else 3 + 3)
    exact = check_gradients(forward, backward, at, full=full, complex_step=True)
    assert exact.ok
    assert exact.error <= TOLERANCES["complex step"]["float64"]


def no_sum(dy, cache, at):
    """Forget the second term of the softmax's gradient."""
    da = forward(at)[0] * dy
    return Point(da @ at.W, da.T @ at.x)


WRONG = {
    "zero": (lambda dy, cache, at: Point(0 * at.x, 0 * at.W), None),
    "no sum": (no_sum, None),
    "x off by 1e-4": (lambda dy, cache, at: backward(dy, cache, at)._replace(
        x=backward(dy, cache, at).x * 1.0001), "x"),
    "one element of W": (lambda dy, cache, at: backward(dy, cache, at)._replace(
        W=backward(dy, cache, at).W + 1e-3 * (np.arange(12).reshape(4, 3) == 7)), "W"),
    "not a number": (lambda dy, cache, at: backward(dy, cache, at)._replace(
        W=np.full((4, 3), np.nan)), "W"),
    "infinite": (lambda dy, cache, at: backward(dy, cache, at)._replace(
        W=np.full((4, 3), np.inf)), "W"),
    "a sign": (lambda dy, cache, at: Point(*(-g for g in backward(dy, cache, at))), None),
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("complex_step", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_backward_passes_fail_where_they_are_wrong(wrong, complex_step, full, at):
    mutant, place = WRONG[wrong]
    with np.errstate(invalid="ignore"):  # of infinity times 0
        result = check_gradients(forward, mutant, at, full=full, complex_step=complex_step)
    assert not result.ok
    assert str(result).startswith("WRONG: relative error ")
    if place and not full:
        assert result.worst == place
    if full and wrong == "one element of W":
        assert result.worst.startswith("d y[")
        assert result.worst.endswith("/ d W[2, 1]")


def test_a_backward_that_is_not_linear_fails(at):
    assert not check_gradients(forward, lambda dy, *rest: backward(abs(dy), *rest), at).ok


def test_cotangents_of_ones_would_have_passed_a_zero_gradient(at):
    """The rows of a softmax sum to 1, so their sum has no gradient: the reason for random ones."""
    da = backward(np.ones((2, 4)), None, at)
    assert all(np.abs(g).max() < 1e-14 for g in da)
    assert not check_gradients(forward, WRONG["zero"][0], at).ok


def test_a_gradient_that_is_zero_but_for_rounding_passes(draw):
    """A shift of all logits does not change a softmax, up to the last digit."""
    def shifted(at):
        return forward(Point(at["x"], at["W"] + at["shift"]))

    def gradient(dy, cache, at):
        g = backward(dy, cache, Point(at["x"], at["W"] + at["shift"]))
        return {"x": g.x, "W": g.W, "shift": g.W.sum(axis=0)}

    point = {"x": draw.standard_normal((9, 3)), "W": draw.standard_normal((8, 3)),
             "shift": draw.standard_normal(3)}
    result = check_gradients(shifted, gradient, point, probes=20)
    assert result.ok, result
    assert not check_gradients(shifted, lambda *arguments: gradient(*arguments) | {
        "shift": np.full(3, 1e-3)}, point).ok


def test_the_point_and_the_result_are_left_alone(at):
    before = at.x.copy(), at.W.copy()
    first = check_gradients(forward, backward, at)
    assert check_gradients(forward, backward, at) == first
    assert check_gradients(forward, backward, at, seed=1) != first
    for a, b in zip(at, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_output_that_is_its_input():
    at = {"x": np.arange(3.0)}
    assert check_gradients(lambda at: (at["x"], None), lambda dy, cache, at: {"x": dy}, at).ok


def test_a_wrong_tree_is_an_error(at):
    with pytest.raises(UserError, match=r"in float64, got float32 for W"):
        check_gradients(forward, backward, at._replace(W=at.W.astype("float32")))
    with pytest.raises(UserError, match=r"of W must have its shape, \(4, 3\), got \(3, 4\)"):
        check_gradients(forward, lambda dy, c, at: Point(at.x, at.W.T), at)
    with pytest.raises(UserError, match=r"of x must have its shape, \(2, 3\), got None"):
        check_gradients(forward, lambda dy, c, at: Point(None, at.W), at)


# --- mask flips ---------------------------------------------------------------------------------


class Cap(NamedTuple):
    """The cache of ``y = C_k(x) o x``."""

    m: Any


def capped(at):
    m = kwta_mask(at["x"], 2)
    return at["x"] * m, Cap(m)


def capped_gradient(dy, cache, at):
    return {"x": dy * cache.m}


def cap_scores(at, cache):
    return [(at["x"], 2)]


GAP = 1e-7
NEARLY_TIED = np.array([[4.0, 3.0, 2.0, 1.0], [4.0, 1.0, 3.0, 3.0 - GAP]])


def test_a_flip_is_reported_with_its_margin():
    result = check_gradients(capped, capped_gradient, {"x": NEARLY_TIED}, scores=cap_scores,
                             full=True)
    assert result.ok  # what was compared agrees
    assert (result.perturbations, len(result.flips)) == (6, 2)
    flip = result.flips[0]
    assert (flip.input, flip.mask, flip.row, flip.neurons) == ("x", 0, (1,), (2, 3))
    assert flip.margin == pytest.approx(GAP, rel=1e-6)
    assert "moving x flips mask 0 in row (1,), neurons 2, 3, margin 1.0e-07" in str(result)
    assert "2 mask flips" in result.summary


def test_masks_that_are_not_in_the_cache_can_be_given():
    def hidden(at):
        y, cache = capped(at)
        return y, {"packed": np.packbits(cache.m)}

    def gradient(dy, cache, at):
        return {"x": dy * np.unpackbits(cache["packed"]).reshape(2, 4)}

    averaged = check_gradients(hidden, gradient, {"x": NEARLY_TIED}, full=True)
    assert not averaged.ok  # the jump is taken for a derivative
    told = check_gradients(hidden, gradient, {"x": NEARLY_TIED}, full=True, masks=lambda cache: [
        np.unpackbits(cache["packed"]).reshape(2, 4).astype(bool)])
    assert told.ok
    assert [flip.margin for flip in told.flips] == [None, None]
    assert "margin" not in str(told)


def test_nothing_compared_is_not_a_pass():
    tied = {"x": np.ones((1, 4))}  # all lose; whoever moves, some win
    result = check_gradients(capped, capped_gradient, tied, scores=cap_scores)
    assert (result.perturbations, len(result.flips)) == (0, 4)
    assert math.isnan(result.error)
    assert not result.ok
    assert result.flips[0].margin == 0


GATES = (Comet(), Comet(g="tanh", ties="index"), Layerwise(), TopK(), TopK(of="activation"))


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_a_step_too_large_flips_the_masks_of_a_network(gate, draw):
    config = mlp.MLPConfig((20, 50, 40, 5), activation="gelu", gate=gate)
    params, fixed = mlp.init(config, dtype="float64")
    x = draw.standard_normal((30, 20))
    fine = check_mlp_gradients(x, params, fixed, config)
    assert fine.error <= TOLERANCES["difference of a network"]["float64"], fine
    assert not fine.flips
    _, cache = mlp.forward(x, params, fixed, config)
    for (c, k), m in zip(routing_scores(x, cache, fixed, config), cache.masks, strict=True):
        np.testing.assert_array_equal(kwta_mask(c, k, gate.ties), m)  # the scores are the right
    coarse = check_mlp_gradients(x, params, fixed, config, step=0.1)
    moved = {flip.input for flip in coarse.flips}
    if isinstance(gate, Comet):
        assert moved == {"x"}
    else:
        assert moved > {"x"}
    assert all(0 < flip.margin < 0.1 for flip in coarse.flips)
    assert not check_mlp_gradients(x, params, fixed, config, cache.masks, step=0.1).flips


def test_flips_of_packed_masks_are_seen(draw, monkeypatch):
    """A backend may leave masks packed."""
    config = mlp.MLPConfig((20, 50, 40, 5))
    params, fixed = mlp.init(config, dtype="float64")
    x = draw.standard_normal((30, 20))
    kept_packed = mlp.forward

    def forward(*arguments, **options):
        a_L, cache = kept_packed(*arguments, **options)
        return a_L, cache._replace(hidden=tuple(
            layer._replace(m=np.packbits(layer.m, axis=-1)) for layer in cache.hidden))

    expected = check_mlp_gradients(x, params, fixed, config, step=0.1).flips
    monkeypatch.setattr(mlp, "forward", forward)
    assert check_mlp_gradients(x, params, fixed, config, step=0.1).flips == expected != ()


# --- what comet-np check runs -------------------------------------------------------------------


def test_every_backward_pass_of_the_project():
    results = dict(check_model_gradients())
    gates = ("Comet", "Layerwise", "TopK of the pre-activation", "TopK of the activation",
             "Bernoulli", "ExampleTied", "Kept")
    assert set(results) == {
        "linear", "softmax cross-entropy", "mean squared error", "dropout",
        *(f"hidden {name}" for name in ACTIVATIONS), "hidden softplus, no mask", "MLP, no gate",
        *(f"MLP, {gate}" for gate in gates), *(f"MLP, {gate}, masks frozen" for gate in gates),
        "MLP, Comet, dropout"}
    for name, result in results.items():
        kind = "difference of a network" if name.startswith("MLP") else "difference"
        assert result.error <= TOLERANCES[kind]["float64"], (name, result)
        assert not result.flips, (name, result)


@pytest.mark.parametrize("operation", ["hidden_backward", "linear_backward"])
def test_a_wrong_kernel_fails_the_checks_that_run_it(operation, monkeypatch):
    kernels = get_backend("numpy").kernels
    right = kernels[operation]

    def wrong(body, dy, *rest, **options):
        return right(body, dy * 1.001, *rest, **options)

    monkeypatch.setitem(kernels, operation, wrong)
    failed = {name for name, result in check_model_gradients() if not result.ok}
    assert {"MLP, Comet", "MLP, Kept, masks frozen"} < failed
    assert ("linear" in failed) == (operation == "linear_backward")
    assert ("hidden gelu" in failed) == (operation == "hidden_backward")


def test_the_examples_in_the_documentation_are_true():
    assert doctest.testmod(gradcheck).failed == 0
