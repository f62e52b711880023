"""The gradient checks: right pairs pass, wrong ones fail where they are wrong, flips are told."""

import doctest
import itertools
import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest

from comet_np import gradcheck, kwta_mask
from comet_np.backends import base, get_backend
from comet_np.backends.numpy_backend import NumpyBackend
from comet_np.errors import UserError
from comet_np.functional.activations import ACTIVATIONS
from comet_np.gates import Comet, Layerwise, TopK
from comet_np.gradcheck import check_gradients
from comet_np.models import mlp
from comet_np.selfcheck import check_mlp_gradients, check_model_gradients, routing_scores
from comet_np.tree import tree_map
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
    "infinite in one element": (lambda dy, cache, at: backward(dy, cache, at)._replace(
        W=np.where(np.arange(12).reshape(4, 3) == 7, np.inf, 0)), "W"),
    "so large that its square overflows": (lambda dy, cache, at: backward(dy, cache, at)._replace(
        W=np.full((4, 3), 1e200)), "W"),
    "a sign": (lambda dy, cache, at: Point(*(-g for g in backward(dy, cache, at))), None),
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("complex_step", [True, False])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_backward_passes_fail_where_they_are_wrong(wrong, complex_step, full, at):
    mutant, place = WRONG[wrong]
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


def test_each_array_has_a_verdict_of_its_own(at):
    result = check_gradients(forward, WRONG["one element of W"][0], at, probes=3)
    x, W = result.arrays
    assert (x.name, x.verdict, x.compared, x.flips) == ("x", "ok", 3, ())
    assert x.error <= TOLERANCES["difference"]["float64"] < W.error
    assert x.numeric == pytest.approx(x.analytic)
    assert (W.name, W.verdict, W.compared) == ("W", "WRONG", 3)
    assert abs(W.numeric - W.analytic) > 1e-5
    assert result.verdict == "WRONG"
    assert (result.error, result.worst) == (W.error, "W")
    assert (result.numeric, result.analytic) == (W.numeric, W.analytic)
    assert result.perturbations == 6


def test_printing_shows_a_line_an_array_the_wrong_ones_first(at):
    result = check_gradients(forward, WRONG["one element of W"][0], at, full=True)
    lines = str(result).splitlines()
    assert lines[0] == (f"WRONG: relative error {result.error:.1e} at {result.worst} "
                        f"({result.tolerance:.1e} allowed)")
    words = [re.split("   *", line.strip()) for line in lines]
    assert words[1] == ["array", "error", "by difference", "by backward", "compared", "flipped"]
    assert [line[:2] for line in words[2:]] == [["WRONG", result.worst],
                                                ["ok", result.arrays[0].place]]
    assert [line[-2:] for line in words[2:]] == [["12", "0"], ["6", "0"]]
    starts = [[match.start() for match in re.finditer(r"(?<=  )\S", line)] for line in lines[1:]]
    assert starts[1] == starts[2] == [starts[1][0], *starts[0]]  # aligned


def copied(tree):
    return tree_map(np.copy, tree)


def test_buffers_that_are_filled_anew_by_each_call():
    """The arrays of a call are read before the next one, or copied."""
    y, m, dx = np.empty(4), np.empty(4, bool), np.empty(4)

    def fill(at):
        np.multiply(at["x"], np.greater(at["x"], 0, out=m), out=y)
        return y, Cap(m)

    def gradient(dy, cache, at):
        return {"x": np.multiply(dy, cache.m, out=dx)}

    result = check_gradients(fill, gradient, {"x": np.array([1, -1e-7, 1e-7, 2])}, full=True)
    assert result.ok, result
    assert [flip.neurons for flip in result.flips] == [(1,), (2,)]


def test_a_point_of_one_number():
    result = check_gradients(lambda at: (at**2, None), lambda dy, cache, at: 2 * dy * at,
                             np.float64(3))
    assert result.ok, result
    assert [array.name for array in result.arrays] == ["at"]


# --- what is not as it should be ----------------------------------------------------------------

BAD_POINTS = {
    "a list": (lambda at: at._replace(W=at.W.tolist()),
               r"^W is a list: make it an array, or a tuple of arrays"),
    "a string": (lambda at: at._replace(W="W"),
                 r"^W: expected a numpy\.ndarray or cupy\.ndarray, got builtins\.str"),
    "a number": (lambda at: at._replace(x=1.0), r"^x: expected .* got builtins\.float"),
    "float32": (lambda at: at._replace(W=at.W.astype("float32")),
                r"in float64, got float32 for W: convert"),
    "integers": (lambda at: at._replace(x=at.x.astype(int)), "in float64, got int64 for x"),
    "complex": (lambda at: at._replace(x=at.x + 0j), "in float64, got complex128 for x"),
    "not finite": (lambda at: at._replace(x=np.where(at.x == at.x.max(), np.inf, at.x)),
                   "^x is not finite: choose a point"),
    "no elements": (lambda at: at._replace(W=np.empty((0, 3))),
                    r"^W has no elements .* its shape is \(0, 3\): leave it out"),
    "no arrays": (lambda at: Point(None, ()), "no array in `at`"),
    "too large to move": (lambda at: at._replace(x=1e12 * (1 + at.x**2)),
                          r"^the step 6\.1e-06 is lost in the rounding of x, .* take a larger one"),
    "one element too large to move": (
        lambda at: at._replace(W=at.W - 1e12 * (np.arange(12).reshape(4, 3) == 7)),
        r"^the step 6\.1e-06 is lost in the rounding of W, whose largest element is 1\.0e\+12"),
}


@pytest.mark.parametrize("name", BAD_POINTS)
def test_points_that_are_refused(name, at):
    change, message = BAD_POINTS[name]
    with pytest.raises(UserError, match=message):
        check_gradients(lambda at: (at.x @ at.W.T, None),
                        lambda dy, cache, at: Point(dy @ at.W, dy.T @ at.x), change(at))


def test_tensors_are_refused(at):
    torch = pytest.importorskip("torch", reason="PyTorch, the crosscheck extra, is not installed")
    with pytest.raises(UserError, match=r"^W: expected .* got torch\.Tensor: convert"):
        check_gradients(forward, backward, at._replace(W=torch.tensor(at.W)))
    with pytest.raises(UserError, match=r"^forward's output: expected .* got torch\.Tensor: conv"):
        check_gradients(lambda at: (torch.tensor(at.x), None), backward, at)
    with pytest.raises(UserError, match=r"^the gradient of x: expected .* got torch\.Tensor: conv"):
        check_gradients(forward, lambda dy, c, at: Point(torch.tensor(at.x), at.W), at)


BAD_OUTPUTS = {
    "no pair": (lambda y: y, "^forward must return a pair, .* got ndarray"),
    "a triple": (lambda y: (y, None, None), "got a tuple of 3"),
    "a list": (lambda y: (y.tolist(), None), "^forward's output: expected .* got builtins.list"),
    "a number": (lambda y: (float(y.sum()), None), "^forward's output: expected .* got .*float"),
    "float32": (lambda y: (y.astype("float32"), None), "must be float64 .* got float32"),
    "complex": (lambda y: (y + 0j, None), "must be float64 .* got complex128"),
    "integers": (lambda y: (y.astype(int), None), "must be float64 .* got int64"),
    "not a number": (lambda y: (y * np.nan, None), "^forward's output is not finite"),
    "nothing": (lambda y: (y[:0], None), r"must have elements, .* got shape \(0, 4\)"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_outputs_that_are_refused(name, at):
    change, message = BAD_OUTPUTS[name]
    with pytest.raises(UserError, match=message):
        check_gradients(lambda at: change(forward(at)[0]), backward, at)


def test_outputs_that_become_bad_on_the_way():
    def refused(forward, **options):
        with pytest.raises(UserError, match=r"^forward's output ") as refused:
            check_gradients(lambda x: (forward(x), None), lambda dy, cache, x: dy, np.ones(3),
                            **options)
        return str(refused.value)

    assert "is not finite" in refused(lambda x: np.where(x == 1, x, np.inf))
    assert "as many at each point, got shape (2,), (3,) before" in refused(
        lambda x: x[:3 - (x != 1).any()])
    assert "must be complex128 where `at` is, got float64" in refused(abs, complex_step=True)


BAD_GRADIENTS = {
    "a key is missing": (lambda g: {"p": g["p"]}, "the gradient of at must be a dict of p, x, .* "
                                                  "got a dict of p$"),
    "a key too many": (lambda g: g | {"b": 0}, "dict of p, x, as in `at`, got a dict of b, p, x$"),
    "no dict": (lambda g: g["x"], "dict of p, x, as in `at`, got ndarray"),
    "another length": (lambda g: g | {"p": g["p"][:1]},
                       "the gradient of p must be a tuple of 2, as in `at`, got a tuple of 1"),
    "a list": (lambda g: g | {"p": list(g["p"])}, "of p must be a tuple of 2, .* got list"),
    "an array for nothing": (lambda g: g | {"p": (g["p"][0], g["x"])},
                             r"of p\[1\] must be None, as in `at`, got ndarray"),
    "nothing": (lambda g: g | {"x": None}, r"of x must have its shape, \(2, 3\), got None"),
    "another shape": (lambda g: g | {"p": (g["p"][0].T, None)},
                      r"of p\[0\] must have its shape, \(4, 3\), got \(3, 4\)"),
    "a tree for an array": (lambda g: g | {"x": (g["x"],)}, "of x: expected .* got builtins.tuple"),
    "a number": (lambda g: g | {"x": 0.0}, "of x: expected .* got builtins.float"),
    "float32": (lambda g: g | {"x": g["x"].astype("float32")}, "x must be float64, got float32"),
    "integers": (lambda g: g | {"x": g["x"].astype(int)}, "of x must be float64, got int64"),
}


@pytest.mark.parametrize("name", BAD_GRADIENTS)
def test_gradients_that_are_refused(name, draw):
    change, message = BAD_GRADIENTS[name]
    point = {"x": draw.standard_normal((2, 3)), "p": (draw.standard_normal((4, 3)), None)}

    def gradients(dy, cache, at):
        W = at["p"][0]
        return {"p": (dy.T @ at["x"], None), "x": dy @ W}  # the order of a dict's keys is free

    def product(at):
        return at["x"] @ at["p"][0].T, None

    assert check_gradients(product, gradients, point).ok
    with pytest.raises(UserError, match=message):
        check_gradients(product, lambda *given: change(gradients(*given)), point)


def test_arrays_of_two_backends_are_refused(at, monkeypatch):
    class Foreign(np.ndarray):
        """Stands for the arrays of another backend."""

    backend = NumpyBackend()
    backend.name = "foreign"
    monkeypatch.setitem(base.BACKENDS, Foreign, backend)
    with pytest.raises(UserError, match=r"^W: arrays of two backends are mixed"):
        check_gradients(forward, backward, at._replace(W=at.W.view(Foreign)))
    with pytest.raises(UserError, match=r"^forward's output: arrays of two backends are mixed"):
        check_gradients(lambda at: (forward(at)[0].view(Foreign), None), backward, at)
    with pytest.raises(UserError, match=r"^the gradient of W: arrays of two backends are mixed"):
        check_gradients(forward, lambda *given: backward(*given)._replace(
            W=at.W.view(Foreign)), at)


def test_what_writes_into_its_arguments_is_refused_and_the_callers_arrays_stay(at):
    def kept(at):
        return forward(at)[0], {"q": [], "p": Point(forward(at)[0], np.full(2, np.nan))}

    def refused(forward=kept, backward=backward):
        before = copied(at)
        with pytest.raises(UserError, match="which others read after it: let it work") as refused:
            check_gradients(forward, backward, at)
        for a, b in zip(at, before, strict=True):
            np.testing.assert_array_equal(a, b)
        return str(refused.value).split(",")[0]

    def writes(place, value=1e-9):
        def mutant(dy, cache, at):
            g = backward(dy.copy(), None, at)
            place(dy, cache, at)[..., :1] += value
            return g
        return mutant

    def writing_forward(at):
        at.W[0] *= -1  # a second call undoes it
        return kept(at)

    def copying_forward(at):
        return kept(copied(at))

    assert check_gradients(kept, backward, at).ok
    assert refused(lambda at: kept(at._replace(x=np.tanh(at.x, out=at.x)))) == (
        "forward writes into x")
    assert refused(writing_forward) == "forward writes into W"
    assert refused(backward=writes(lambda dy, cache, at: at.W)) == "backward writes into W"
    assert refused(backward=writes(lambda dy, cache, at: dy)) == (
        "backward writes into the cotangent dy")
    assert refused(copying_forward, writes(lambda dy, cache, at: cache["p"].x)) == (
        "backward writes into cache.p.x")


def test_a_forward_that_draws_at_random_is_refused(at, draw):
    def dropped(at):
        m = draw.random((2, 4)) > 0.5
        return forward(at)[0] * m, m

    with pytest.raises(UserError, match=r"^forward gives two outputs for one point"):
        check_gradients(dropped, lambda dy, m, at: backward(dy * m, None, at), at)

    def rounded(at):
        """Differ in the last digit, as sums do that threads share in no fixed order."""
        return forward(at)[0] * (1 + 2 * np.finfo(float).eps * draw.random()), None

    assert check_gradients(rounded, backward, at).ok


def test_options_that_are_refused(at):
    with pytest.raises(UserError, match="at least 1, got 0"):
        check_gradients(forward, backward, at, probes=0)
    for step in 0.0, -1e-6, math.nan, math.inf:
        with pytest.raises(UserError, match=f"step is how far to move, above 0, got {step}"):
            check_gradients(forward, backward, at, step=step)
    with pytest.raises(UserError, match=r"the step 1\.0e-30 is lost in the rounding of x"):
        check_gradients(forward, WRONG["zero"][0], at, step=1e-30)


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


def test_masks_in_lists_of_the_cache_are_seen():
    def listed(at):
        y, cache = capped(at)
        return y, [{"masks": [cache]}]

    def gradient(dy, cache, at, write=0):
        cache[0]["masks"][0].m[0, :2] ^= bool(write)
        return {"x": dy * cache[0]["masks"][0].m}

    result = check_gradients(listed, gradient, {"x": NEARLY_TIED}, full=True)
    assert result.ok
    assert len(result.flips) == 2
    with pytest.raises(UserError, match=r"^backward writes into cache\[0\]\.masks\[0\]\.m, "):
        check_gradients(listed, lambda *given: gradient(*given, write=1), {"x": NEARLY_TIED},
                        probes=1)


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
    assert str(result).startswith("UNDECIDED: x undecided, 4 mask flips")
    assert "take a smaller step or another point, or freeze the masks" in str(result)
    assert "WRONG" not in str(result)


def test_an_array_that_only_flips_is_undecided_beside_others_that_are_not():
    point = {"x": np.ones((1, 4)), "s": np.array(2.0)}

    def scaled(at):
        y, cache = capped(at)
        return y * at["s"] + at["s"], cache

    def gradient(dy, cache, at, right=1.0):
        return {"x": dy * cache.m * at["s"], "s": right * (dy * (at["x"] * cache.m + 1)).sum()}

    result = check_gradients(scaled, gradient, point)
    assert [array.verdict for array in result.arrays] == ["UNDECIDED", "ok"]
    assert result.verdict == "UNDECIDED"
    assert not result.ok  # of x nothing is known
    assert result.error <= TOLERANCES["difference"]["float64"]
    assert result.worst == "s"
    assert len(result.arrays[0].flips) == 4
    assert [line.split()[0] for line in str(result).splitlines()[2:4]] == ["UNDECIDED", "ok"]
    wrong = check_gradients(scaled, lambda *given: gradient(*given, right=2.0), point)
    assert wrong.verdict == "WRONG"
    assert [line.split()[0] for line in str(wrong).splitlines()[2:4]] == ["WRONG", "UNDECIDED"]


def test_a_layer_without_a_mask_keeps_its_number():
    result = check_gradients(capped, capped_gradient, {"x": NEARLY_TIED}, full=True,
                             masks=lambda cache: iter((None, cache.m)),
                             scores=lambda at, cache: [None, (at["x"], 2)])
    assert result.ok
    assert [(flip.mask, flip.margin) for flip in result.flips] == [(1, pytest.approx(GAP))] * 2


def test_masks_and_scores_that_do_not_fit_are_refused():
    numbers = itertools.chain([1], itertools.repeat(2))
    with pytest.raises(UserError, match="masks must give as many masks of each cache, got 1 and 2"):
        check_gradients(capped, capped_gradient, {"x": NEARLY_TIED},
                        masks=lambda cache: [cache.m] * next(numbers))
    with pytest.raises(UserError, match="scores must give c and k of each of the 1 masks, got 0"):
        check_gradients(capped, capped_gradient, {"x": NEARLY_TIED}, full=True,
                        scores=lambda at, cache: [])


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
        "linear", "softmax cross-entropy", "softmax cross-entropy, ignored labels",
        "embedding of tokens, tied to the head", "mean squared error", "dropout", "layer norm",
        "attention", "attention, causal", "patch embedding",
        *(f"hidden {name}" for name in ACTIVATIONS), "hidden softplus, no mask", "MLP, no gate",
        *(f"MLP, {gate}" for gate in gates), *(f"MLP, {gate}, masks frozen" for gate in gates),
        "MLP, Comet, dropout",
        *(f"mixture of experts, {gate} gate" for gate in ("weighted", "fixed", "hard")),
        "Soft MoE", "Soft MoE, of kept experts", "ViT", "ViT, dropout, qkv biases",
        "ViT, mean pooling, routing stream", "MLP-Mixer, dropout",
        "MLP-Mixer, dropout, routing stream", "GPT-2", "GPT-2, routing stream", "GPT-2, dropout",
        "GPT-2, dropout, recomputed"}
    for name, result in results.items():
        network = name.startswith(("MLP", "mixture", "Soft", "ViT", "GPT-2"))
        kind = "difference of a network" if network else "difference"
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
