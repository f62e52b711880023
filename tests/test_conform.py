"""`comet-np conform`: right adapters, and wrong ones at the level where each is wrong and no other.
"""

import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from comet_np.conformance import Unsupported, adapter
from comet_np.conformance.conform import (
    STATUSES,
    Expected,
    catches,
    chosen,
    conform,
    needed,
    suspects,
    undecided,
)
from comet_np.conformance.ours import Ours
from comet_np.conformance.page import page
from comet_np.conformance.vectors import Case, read_all, write
from comet_np.conformance.vectors.files import LEVELS
from comet_np.errors import UserError
from comet_np.experiments.cli import main

ROOT = Path(__file__).resolve().parent.parent
FEW = ("cap-strict-n7-k3", "mlp-comet-strict", "mlp-train-momentum")


@pytest.fixture(scope="module")
def cases():
    return read_all()


@pytest.fixture(scope="module")
def few(cases):
    return [case for case in cases if case.id in FEW]


@pytest.fixture
def folder(few, tmp_path, monkeypatch):
    """Stand in an empty folder beside one of test vectors, and let modules of it be imported."""
    for case in few:
        write(tmp_path / "vectors" / case.id, case)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path:
            del sys.modules[name]


def failed(report):
    """Return the levels at which something failed."""
    return {result.level for result in report.bad}


def only(report, case="mlp-comet-strict", level="forward"):
    return next(result for result in report.results if (result.case, result.level) == (case, level))


# --- adapters that are right --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_our_own_adapter_passes_all(cases, dtype):
    report = conform(Ours(dtype), cases)
    assert report.ok, str(report)
    assert report.cases == len(cases)
    assert Counter(result.status for result in report.results) == {
        "passed": sum(len(case.levels) for case in cases)}
    assert report.undecided == 0


def test_our_own_adapter_returns_all_that_is_expected(cases):
    """All but the margins, which are no part of a model."""
    compared = {(result.case, one.name) for result in conform(Ours(), cases).results
                for one in result.compared}
    missing = {(case.id, name) for case in cases if case.model != "cap"
               for name in case.expected if not name.startswith("margin_")} - compared
    assert not missing


def test_an_adapter_in_pytorch(cases):
    pytest.importorskip("torch")
    from .adapter_torch import Adapter

    report = conform(Adapter(), cases)
    assert report.ok, str(report)
    found = {(result.model, result.level) for result in report.results
             if result.status == "passed"}
    assert found == {("cap", "cap"), ("mlp", "forward"), ("mlp", "gradients"), ("mlp", "routing"),
                     ("mlp", "trajectory")}


def test_an_adapter_in_jax(cases):
    pytest.importorskip("jax")
    from .adapter_jax import Adapter

    # JAX compiles anew for each shape: cases of few shapes.
    report = conform(Adapter(), [case for name in ("cap-*-n7-k3", "mlp-comet-strict", "attention")
                                 for case in chosen(cases, name)])
    assert report.ok, str(report)
    found = {(result.model, result.level) for result in report.results
             if result.status == "passed"}
    assert found == {("cap", "cap"), ("mlp", "forward"), ("mlp", "gradients"), ("mlp", "routing")}


# --- adapters that are wrong, at one level each -------------------------------------------------


class OtherTies(Ours):
    """A router that lets ties win."""

    def cap(self, scores, k, ties):
        return super().cap(scores, k, "threshold")

    def run(self, case, masks):
        if masks is None and "ties" in case.config:
            case = case._replace(config=case.config | {"ties": "threshold"})
        return super().run(case, masks)


class OtherGradients(Ours):
    def run(self, case, masks):
        found = super().run(case, masks)
        return {name: array * len(case.arrays["x"]) if re.match("d[aWbx]", name) else array
                for name, array in found.items()}


class OtherOptimizer(Ours):
    def train(self, case):
        rate = {"constant": 0.5}.get(case.config.get("schedule", "constant"), 0.9)
        return super().train(case._replace(config=case.config | {"lr": case.config["lr"] * rate}))


class OtherActivation(Ours):
    def run(self, case, masks):
        if "activation" in case.config:
            case = case._replace(config=case.config | {"activation": "mish"})
        return super().run(case, masks)


def test_another_rule_for_ties_fails_cap_and_routing_only(cases):
    report = conform(OtherTies(), cases)
    assert failed(report) == {"cap", "routing"}
    assert not [result for result in report.bad if "threshold" in result.case]
    result = only(report, level="routing")
    assert result.array == "m_1"
    assert "and scores tie at rank k" in result.reason


def test_another_backward_fails_gradients_only(few):
    report = conform(OtherGradients(), few)
    assert failed(report) == {"gradients"}
    result = only(report, level="gradients")
    assert result.array == "da_4"
    assert "all of it is 8 times as large" in result.reason
    assert "after it differ dW_4, db_4, dW_3, db_3 ..." in result.reason


def test_another_optimizer_fails_trajectory_only(cases):
    report = conform(OtherOptimizer(), cases)
    assert failed(report) == {"trajectory"}
    assert {result.case for result in report.results if result.level == "trajectory"} == {
        result.case for result in report.bad}


def test_another_activation_fails_forward_and_what_follows(few):
    report = conform(OtherActivation(), few)
    assert failed(report) == {"forward", "gradients", "routing"}
    assert only(report).array == "x_1"
    assert only(report, level="routing").array == "x_1"


def test_the_first_array_in_the_order_of_computation_is_named(few):
    class Late(Ours):
        def run(self, case, masks):
            found = super().run(case, masks)
            found["x_2"] = found["x_2"] + 1
            found["a_3"] = found["a_3"] + 1
            return dict(reversed(found.items()))

    assert only(conform(Late(), few)).array == "x_2"


# --- what an adapter may leave out --------------------------------------------------------------


def test_methods_that_are_missing_are_unsupported(few):
    class OnlyCap:
        def cap(self, scores, k, ties):
            return Ours().cap(scores, k, ties)

    report = conform(OnlyCap(), few)
    assert report.ok
    assert report.cases == 1
    assert only(report).reason == "the adapter has no method run"
    assert Counter(result.status for result in report.results) == {"passed": 1, "unsupported": 4}


def test_unsupported_is_not_failed(few):
    class Forward(Ours):
        def run(self, case, masks):
            if masks is None:
                raise Unsupported("give me masks")
            return {name: array for name, array in super().run(case, masks).items()
                    if not name.startswith("d")}

    report = conform(Forward(), few)
    assert report.ok
    assert only(report).status == "passed"
    assert only(report, level="routing").reason == "give me masks"
    assert only(report, level="gradients").reason == "run returns no gradients"


def test_who_supports_nothing_does_not_conform(few):
    class Nothing:
        def run(self, case, masks):
            raise Unsupported

    report = conform(Nothing(), few)
    assert not report.ok
    assert report.verdict.startswith("NOTHING COMPARED: 0 cases run")
    assert "Nothing was compared" in page(report)
    assert "the adapter says so" in str(report)


def test_intermediates_may_be_left_out_and_outputs_not(few):
    class Short(Ours):
        def run(self, case, masks):
            found = super().run(case, masks)
            return {name: found[name] for name in found if name in self.names}

    case = next(case for case in few if case.id == "mlp-comet-strict")
    short = Short()
    short.names = {*needed(case, "forward"), *needed(case, "gradients")}
    assert short.names == {"a_4", *(f"d{kind}_{i}" for i in (1, 2, 3, 4) for kind in "Wb")}
    assert conform(short, [case]).ok
    short.names = short.names - {"dW_2"}
    report = conform(short, [case])
    assert failed(report) == {"gradients"}
    assert "run did not return dW_2, but a_4, " in report.bad[0].reason
    short.names = {"a_1", "dx"}
    assert failed(conform(short, [case])) == {"forward", "gradients", "routing"}
    assert "did not return a_4, but a_1, dx" in only(conform(short, [case])).reason


def test_arrays_that_a_case_lacks_may_be_returned_if_their_kind_is_known(few):
    class More(Ours):
        def run(self, case, masks):
            return super().run(case, masks) | {"z_3": np.zeros(3), "x_0": case.arrays["x"]}

    assert conform(More(), few).ok


# --- adapters that break ------------------------------------------------------------------------

BROKEN = {
    "raises": (lambda found: 1 / 0, r"run raised ZeroDivisionError: division by zero \(test_conf"),
    "shape": (lambda found: found | {"a_4": found["a_4"][:, :2]},
              r"a_4 has the shape \(8, 2\), expected \(8, 5\)"),
    "transposed": (lambda found: found | {"a_4": found["a_4"].T},
                   r"a_4 has the shape \(5, 8\), the transpose's, expected \(8, 5\)"),
    "dtype": (lambda found: found | {"a_4": found["a_4"].astype("complex64")},
              r"a_4 must be an array of numbers, got ndarray of dtype complex64"),
    "integers": (lambda found: found | {"a_4": found["a_4"].astype("int64")},
                 r"a_4 must be of floats, got int64"),
    "text": (lambda found: found | {"a_4": "nothing"}, r"a_4 must be an array of numbers, got str"),
    "ragged": (lambda found: found | {"a_4": [[1.0], [1.0, 2.0]]}, r"a_4 is no array: ValueError"),
    "NaN": (lambda found: found | {"a_4": np.where(np.eye(8, 5), np.nan, found["a_4"])},
            r"a_4 is nan at \(0, 0\), expected .* \(5 of 40 numbers\)"),
    "infinity": (lambda found: found | {"a_4": found["a_4"] / 0}, r"a_4 is -?inf at \(0, 0\)"),
    "name": (lambda found: found | {"dW2": found["dW_2"]},
             r'run returned "dW2", and this case has no such array; did you mean "dW_2"\?'),
    "odd name": (lambda found: found | {7: found["dW_2"]},
                 r'run returned "7", and this case has no such array; it has c_1, margin_1, '),
    "list": (lambda found: list(found), r"run must return arrays by name, a dict, got list"),
    "nothing": (lambda found: None, r"run must return arrays by name, a dict, got NoneType"),
    "empty": (lambda found: {}, r"run did not return a_4, but nothing"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_what_is_broken_is_a_sentence_and_the_others_go_on(few, kind):
    broken, message = BROKEN[kind]

    class Broken(Ours):
        def run(self, case, masks):
            found = super().run(case, masks)
            return found if case.id != "mlp-comet-strict" else broken(found)

    report = conform(Broken(), few)
    result = only(report)
    assert result.status == "failed"
    assert re.match(f"mlp-comet-strict, forward: {message}", result.sentence), result.sentence
    assert "\n" not in result.sentence
    assert {result.case for result in report.bad} == {"mlp-comet-strict"}
    assert only(report, "mlp-train-momentum", "trajectory").status == "passed"
    assert bool(result.trace) == (kind == "raises")


def test_the_traceback_of_an_adapter_is_kept_without_our_own_frames(few):
    class Raising(Ours):
        def cap(self, scores, k, ties):
            raise RuntimeError("two\nlines")

    result = only(conform(Raising(), few), "cap-strict-n7-k3", "cap")
    assert "cap raised RuntimeError: two lines (test_conform.py, line" in result.sentence
    assert "in cap" in result.trace
    assert "adapter.py" not in result.trace


@pytest.mark.parametrize(("method", "case", "level", "name"), [
    ("cap", "cap-strict-n7-k3", "cap", "scores"),
    ("run", "mlp-comet-strict", "forward", "W_2"),
    ("run", "mlp-comet-strict", "routing", "x"),
    ("train", "mlp-train-momentum", "trajectory", "b_1")])
def test_writing_into_what_was_given_fails_and_does_not_reach_other_cases(few, method, case, level,
                                                                          name):
    class Writing(Ours):
        def cap(self, scores, k, ties):
            return self._wrote({"scores": scores}, super().cap(scores.copy(), k, ties))

        def run(self, given, masks):
            return self._wrote(given.arrays, super().run(given, masks))

        def train(self, given):
            return self._wrote(given.arrays, super().train(given))

        def _wrote(self, arrays, answer):
            if name in arrays:
                arrays[name] += 1
            return answer

    report = conform(Writing("float64"), few)
    assert f"{method} writes into {name}, which it was given" in only(report, case, level).sentence
    assert conform(Ours(), few).ok


def test_writing_into_a_mask_fails(few):
    class Writing(Ours):
        def run(self, case, masks):
            found = super().run(case, masks)
            if masks is not None:
                masks[1][:] = True
            return found

    report = conform(Writing(), few)
    assert failed(report) == {"forward", "gradients"}
    assert "writes into the mask m_2" in only(report).reason


def test_masks_are_bool_and_kept_from_who_routes(few):
    seen = {}

    class Looking(Ours):
        def run(self, case, masks):
            seen[masks is None] = set(case.arrays)
            assert masks is None or all(m.dtype == bool for m in masks)
            assert not {"c_1", "a_4", "dW_1"} & set(case.arrays)
            return super().run(case, masks)

    assert conform(Looking(), few).ok
    assert seen[False] - seen[True] == {"m_1", "m_2", "m_3"}


def test_what_is_given_cannot_be_changed_for_the_next_case(few):
    class Forgetful(Ours):
        def run(self, case, masks):
            found = super().run(case, masks)
            case.config.clear()
            case.arrays.clear()
            return found

    assert conform(Forgetful(), few * 2).ok


@pytest.mark.parametrize("mask", [np.array([[0.5, 1.0]]), np.array([[2, 1]])])
def test_a_mask_is_of_zeros_and_ones(mask):
    class Half:
        def cap(self, scores, k, ties):
            return mask

    case = of_cap(np.array([[0.0, 1.0]]), 1)
    assert "mask must be a mask of 0 and 1, got" in conform(Half(), [case]).bad[0].sentence


@pytest.mark.parametrize("dtype", ["bool", "int64", "float32", "uint8"])
def test_a_mask_may_have_any_dtype(few, dtype):
    class Typed(Ours):
        def cap(self, scores, k, ties):
            return super().cap(scores, k, ties).astype(dtype)

    assert conform(Typed(), few).ok


def of_cap(scores, k, ties="strict"):
    mask = Ours().cap(scores.astype("float32"), k, ties)
    return Case("one", "", "(3)", "cap", {"N": scores.shape[1], "k": k, "ties": ties}, ("cap",),
                (), 1e-5, {"scores": scores.astype("float32")}, {"mask": mask.astype("uint8")},
                {"mask": "cap"})


def test_a_mask_that_differs_says_where_and_how():
    class Rounded(Ours):
        def cap(self, scores, k, ties):
            return super().cap(scores, k + 1, ties)

    scores = np.array([[3.0, 2.0, 1.0, 0.0], [5.0, 6.0, 7.0, 8.0]])
    result = conform(Rounded(), [of_cap(scores, 2)]).bad[0]
    assert result.reason == ("mask differs in 2 of 2 rows, first in row 0: neuron 2 is 1, expected "
                             "0 (3 win, expected 2), and no scores tie at rank k there")


# --- comparison ---------------------------------------------------------------------------------


def small(**changes):
    """Return a case of one layer whose scores are not exact, row 1 with a margin of nothing."""
    c = np.array([[4.0, 1.0], [2.0, 2.0], [0.0, 0.0]], "float32")
    m = np.array([[1, 0], [1, 0], [0, 0]], "uint8")
    expected = {"c_1": c, "margin_1": np.array([3, 1e-7, 0], "float32"),
                "a_1": c + 1, "x_1": (c + 1) * m, "loss": np.array(0.5, "float32")}
    case = Case("small", "", "", "mlp", {"k": [1], "scores_exact": [False]},
                ("forward", "routing"), (), 1e-5, {"x": c, "m_1": m}, expected,
                {"c_1": "routing", "margin_1": "routing", "a_1": "forward", "x_1": "forward",
                 "loss": "forward"})
    return case._replace(**changes)


class Fixed:
    """An adapter that returns the expected arrays, with some changes."""

    def __init__(self, case, **changes):
        self.answer = {"m_1": case.inputs["m_1"], **case.expected, **changes}

    def run(self, case, masks):
        return self.answer


def test_rows_whose_masks_hang_on_rounding_are_reported_not_failed():
    case = small()
    assert undecided(case).tolist() == [False, True, False]  # scores of zero are exact
    other = case.inputs["m_1"].copy()
    other[1] = [0, 1]
    report = conform(Fixed(case, m_1=other, x_1=case.expected["a_1"] * other,
                           loss=np.float32(9)), [case._replace(levels=("routing",))])
    assert report.ok
    assert report.undecided == 1
    assert "1 row left out, whose masks hang on rounding" in str(report)
    assert "1 row left out" in page(report)
    exact = case._replace(config=case.config | {"scores_exact": [True]})
    assert not undecided(exact).any()
    report = conform(Fixed(case, m_1=other), [exact])
    assert report.bad[0].array == "m_1"


def test_a_row_after_one_that_is_left_out_has_its_own_number():
    case = small()
    other = case.inputs["m_1"].copy()
    other[2] = [0, 1]
    result = only(conform(Fixed(case, m_1=other), [case]), "small", "routing")
    assert "differs in 1 of 2 rows, first in row 2: neuron 1 is 1, expected 0" in result.reason


def test_routing_compares_scores_then_masks_then_what_is_made_of_them():
    case = small()
    result = only(conform(Fixed(case), [case]), "small", "routing")
    assert [one.name for one in result.compared] == ["c_1", "margin_1", "m_1", "a_1", "x_1"]


@pytest.mark.parametrize(("change", "good"), [(3.9e-5, True), (4.1e-5, False), (-4.1e-5, False)])
def test_the_tolerance_is_relative_to_the_largest(change, good):
    case = small(levels=("forward",))
    a = case.expected["a_1"].astype("float64") * 0.8  # largest 4
    case = case._replace(expected=case.expected | {"a_1": a.astype("float32")})
    a = a.astype("float32").astype("float64")
    a[2, 0] += change
    report = conform(Fixed(case, a_1=a), [case])
    assert report.ok is good
    assert good or report.bad[0].reason.startswith("a_1 differs most at (2, 0): got ")


def test_an_array_of_zeros_has_the_tolerance_itself():
    case = small(levels=("forward",))
    case = case._replace(expected=case.expected | {"a_1": np.zeros((3, 2), "float32")})
    assert conform(Fixed(case, a_1=np.full((3, 2), 0.9e-5)), [case]).ok
    assert not conform(Fixed(case, a_1=np.full((3, 2), 1.1e-5)), [case]).ok


def test_a_wrong_loss_is_no_failure_of_routing(few):
    class Summed(Ours):
        def run(self, case, masks):
            found = super().run(case, masks)
            return found | {"loss": found["loss"] * 8}

    assert failed(conform(Summed(), few)) == {"forward"}


def test_integers_must_be_equal():
    case = small(levels=("forward",))
    case = case._replace(expected=case.expected | {"a_1": np.array([1, 2])})
    assert conform(Fixed(case), [case]).ok
    assert not conform(Fixed(case, a_1=np.array([1, 3])), [case]).ok


@pytest.mark.parametrize(("factor", "words"), [
    (2.0, "all of it is 2 times as large"), (-1.0, "all of it is -1 times what is expected")])
def test_a_constant_factor_is_named(factor, words):
    case = small(levels=("forward",))
    reason = conform(Fixed(case, a_1=case.expected["a_1"] * factor), [case]).bad[0].reason
    assert words in reason
    wrong = case.expected["a_1"] * factor + np.eye(3, 2)
    assert "all of it" not in conform(Fixed(case, a_1=wrong), [case]).bad[0].reason


def test_what_serves_two_levels_is_asked_once(few):
    calls = []

    class Counting(Ours):
        def run(self, case, masks):
            calls.append((case.id, masks is None))
            return super().run(case, masks)

    conform(Counting(), few)
    assert calls == [("mlp-comet-strict", False), ("mlp-comet-strict", True)]


def test_the_mistakes_that_a_case_catches_are_named(few):
    """Those that show at this level and would fail just the cases that fail."""
    flags = {"cap-strict-n7-k3": ("ties-threshold", "k-rounded", "not yet known"),
             "mlp-comet-strict": ("ties-threshold", "routing-bias", "loss-summed", "mask-missing")}
    few = [case._replace(flags=flags.get(case.id, ())) for case in few]
    ties = next(case for case in few if case.model == "cap")
    mask = ties.expected["mask"][:0]
    passes = ties._replace(id="cap-without-rows", flags=("k-rounded",), expected={"mask": mask},
                           inputs={"scores": ties.inputs["scores"][:0]})
    report = conform(OtherTies(), [*few, passes])
    assert suspects(report, "cap", "cap") == ["ties-threshold", "not yet known"]
    assert suspects(report, "routing", "mlp") == ["ties-threshold", "routing-bias"]
    assert "these cases, and no others, catch: ties-threshold, not yet known\n" in str(report)
    text = page(report)
    assert "<code>ties-threshold</code>, <code>not yet known</code></p>" in text
    assert "scores that tie at rank k all win" in text
    assert "the loss is the sum" not in text  # which shows in gradients
    assert suspects(conform(OtherGradients(), few), "gradients", "mlp") == ["loss-summed"]


def test_what_follows_from_a_level_before_suggests_no_mistake(few):
    class Both(OtherActivation, OtherGradients):
        pass

    few = [case._replace(flags=("activation-other", "loss-summed")) for case in few]
    report = conform(Both(), few)
    assert failed(report) == {"forward", "gradients", "routing"}
    assert suspects(report, "gradients", "mlp") == []
    assert suspects(report, "forward", "mlp") == ["activation-other", "loss-summed"]


@pytest.mark.parametrize(("factor", "words"), [(8, ": 8 times as large"), (1.37, None), (-1, None)])
def test_a_loss_that_is_summed_says_so(factor, words):
    case = small(levels=("forward",))
    reason = conform(Fixed(case, loss=np.float64(0.5 * factor)), [case]).bad[0].reason
    assert reason == f"loss differs: got {0.5 * factor:.6g}, expected 0.5{words or ''}"


def test_every_mistake_has_a_level_and_a_sentence(cases):
    """And every level at which a case has something to compare is one of those of its flags."""
    result = conform(Ours(), cases[:1]).results[0]
    for case in cases:
        shown = {flag: sentence for level in LEVELS
                 for flag, sentence in catches(result._replace(flags=case.flags,
                                                               level=level)).items()}
        assert set(shown) == set(case.flags), case.id


# --- expected failures --------------------------------------------------------------------------


def expecting(tmp_path, cases, text):
    file = tmp_path / "expected.txt"
    file.write_text(text)
    return Expected(file, cases)


def test_expected_failures(few, tmp_path):
    text = "# ties\ncap-* cap  # all of them\n\nmlp-comet-* rout*\n"
    report = conform(OtherTies(), few, expecting(tmp_path, few, text))
    assert report.ok
    assert "2 expected failure" in report.verdict
    assert only(report, level="routing").reason.startswith("m_1 differs in")


def test_an_unexpected_pass_fails(few, tmp_path):
    report = conform(Ours(), few, expecting(tmp_path, few, "* forward"))
    assert not report.ok
    assert only(report).status == "unexpected-pass"
    assert ("UNEXPECTED PASS  mlp-comet-strict, forward: passes, and is listed as an expected "
            "failure") in str(report)


def test_what_is_unsupported_is_no_expected_failure(few, tmp_path):
    class Nothing:
        def cap(self, scores, k, ties):
            return Ours().cap(scores, k, ties)

    assert conform(Nothing(), few, expecting(tmp_path, few, "mlp-* *")).ok


@pytest.mark.parametrize(("text", "message"), [
    ("cap-* cap\nmlp-comit-strict routing", "line 2 of .*: no case matches mlp-comit-strict at the "
     r'level routing; did you mean "mlp-comet-strict"\?'),
    ("mlp-* rooting", r"line 1 of .*: no level matches rooting \(they are cap, forward"),
    ("cap-* routing", r"line 1 of .*: no case matches cap-\* at the level routing"),
    ("mlp-*", r'line 1 of .* must be a case and a level, as "mlp-\* routing", got "mlp-\*"'),
    ("mlp-* routing because", "line 1 of .* must be a case and a level")])
def test_a_line_that_means_nothing_is_refused(few, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        expecting(tmp_path, few, text)


def test_a_file_that_cannot_be_read_is_a_sentence(few, tmp_path):
    with pytest.raises(UserError, match="is missing: it was to list the expected failures"):
        Expected(tmp_path / "no.txt", few)
    with pytest.raises(UserError, match=r"cannot read .* \(Is a directory\)"):
        Expected(tmp_path, few)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        Expected(tmp_path / "bytes", few)


def test_a_pattern_that_chooses_nothing_is_refused(few):
    assert [case.id for case in chosen(few, "mlp-*")] == ["mlp-comet-strict", "mlp-train-momentum"]
    with pytest.raises(UserError, match='no case matches "mlp-comet-stric"; did you mean'):
        chosen(few, "mlp-comet-stric")


# --- finding an adapter -------------------------------------------------------------------------

ADAPTER = """
from comet_np.conformance.ours import Ours

class Adapter(Ours):
    pass

class Ties(Ours):
    def cap(self, scores, k, ties):
        return super().cap(scores, k, "threshold")

class Raises(Ours):
    def __init__(self):
        raise RuntimeError("no weights here")

class Empty:
    pass

made = Adapter("float32")
"""


@pytest.mark.parametrize(("name", "message"), [
    ("mine", r'an adapter is named package\.module:Class, got "mine"'),
    ("mine:", "an adapter is named"),
    ("mien:Adapter", "the adapter mien:Adapter was not found: there is no module mien in /"),
    ("mine.inner:Adapter", r"was not found: there is no module mine\.inner in /"),
    ("mine:Adaptr", r'was not found: mine has no Adaptr; did you mean "Adapter"\?'),
    ("mine:Raises", r"cannot be made without arguments: RuntimeError: no weights here \(mine\.py, "
     "line 13"),
    ("mine:Empty", "has none of the methods cap, run, train"),
    ("lacking:Adapter", r"cannot be imported: ModuleNotFoundError: No module named "
     r"'no_such_package' \(lacking\.py, line 1\)"),
    ("damaged:Adapter", r"cannot be imported: SyntaxError: .*\(damaged\.py, line 1\)"),
    ("failing:Adapter", r"cannot be imported: ZeroDivisionError: division by zero "
     r"\(failing\.py, line 2\)")])
def test_an_adapter_that_cannot_be_had_is_a_sentence(folder, capsys, name, message):
    (folder / "mine.py").write_text(ADAPTER)
    (folder / "lacking.py").write_text("import no_such_package\n")
    (folder / "damaged.py").write_text("def (:\n")
    (folder / "failing.py").write_text("\n1 / 0\n")
    assert main(["conform", name, "--vectors", "vectors"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("comet-np: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said


def test_an_object_may_be_an_adapter(folder):
    (folder / "mine.py").write_text(ADAPTER)
    assert adapter.load("mine:made").__class__.__name__ == "Adapter"


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_what_differs(folder, capsys):
    (folder / "mine.py").write_text(ADAPTER)
    assert main(["conform", "mine:Adapter", "--vectors", "vectors"]) == 0
    assert capsys.readouterr().out == """\
mine:Adapter on the test vectors in vectors

     cap  forward  gradients  routing  trajectory
cap  1/1  -        -          -        -
mlp  -    1/1      1/1        1/1      1/1

CONFORMS: 3 cases run, 5 checks: 5 passed
"""
    assert main(["conform", "mine:Ties", "--vectors", "vectors", "--only", "cap-*"]) == 1
    out = capsys.readouterr().out
    assert "cap  0/1" in out
    assert "FAILED  cap-strict-n7-k3, cap: mask differs in" in out
    assert out.endswith("DIFFERS: 1 case run, 1 check: 1 failed\n")
    assert all(len(line) <= 100 for line in out.splitlines())


def test_only_three_failures_of_a_level_are_shown(cases):
    text = str(conform(OtherTies(), chosen(cases, "mlp-*")))
    assert text.count("FAILED") == 3
    assert re.search(r"\.\.\. and \d+ more of mlp, routing \(--html FILE or --json FILE", text)


def test_models_without_a_check_are_named_in_a_line(cases):
    class OnlyCap:
        def cap(self, scores, k, ties):
            return Ours().cap(scores, k, ties)

    text = str(conform(OnlyCap(), cases))
    assert "unsupported altogether: attention, " in text
    assert "attention " not in text
    assert re.search(r"UNSUPPORTED  \d+ checks: the adapter has no method run", text)


def test_the_number_of_cases_is_asserted(folder, capsys):
    command = ["conform", "comet_np.conformance.ours:Ours", "--vectors", "vectors", "--count"]
    assert main([*command, "3"]) == 0
    assert main([*command, "4"]) == 1
    assert capsys.readouterr().err == "comet-np: expected 4 cases to be run, and 3 were\n"


def test_expected_failures_are_looked_for_among_all_cases(folder, capsys):
    (folder / "mine.py").write_text(ADAPTER)
    (folder / "known.txt").write_text("cap-* cap\n")
    command = ["conform", "mine:Ties", "--vectors", "vectors", "--expected", "known.txt"]
    assert main(command) == 0
    assert "1 expected failure" in capsys.readouterr().out
    assert main([*command, "--only", "mlp-*"]) == 0
    (folder / "known.txt").write_text("cop-* cap\n")
    assert main(command) == 2
    assert "no case matches cop-*" in capsys.readouterr().err


def test_vectors_that_are_not_there_are_a_sentence(folder, capsys):
    assert main(["conform", "comet_np.conformance.ours:Ours", "--vectors", "nowhere"]) == 2
    assert "nowhere has no test vectors" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_file_that_cannot_be_written_is_a_sentence(folder, capsys, flag):
    (folder / "here").mkdir()
    assert main(["conform", "comet_np.conformance.ours:Ours", "--vectors", "vectors", flag,
                 "here"]) == 2
    said = capsys.readouterr()
    assert "cannot write here (Is a directory)" in said.err
    assert flag in said.err
    assert "CONFORMS" in said.out  # nothing is lost
    assert main(["conform", "comet_np.conformance.ours:Ours", "--vectors", "vectors", flag,
                 "new/file"]) == 0
    assert (folder / "new" / "file").stat().st_size > 1000


# --- JSON and the page --------------------------------------------------------------------------


def test_the_json_has_these_fields(folder, few):
    (folder / "mine.py").write_text(ADAPTER)
    assert main(["conform", "mine:Ties", "--vectors", "vectors", "--json", "out.json"]) == 1
    found = json.loads((folder / "out.json").read_text())
    assert set(found) == {"format", "comet-np", "adapter", "vectors", "ok", "cases", "counts",
                          "results"}
    assert found["format"] == 1
    assert (found["adapter"], found["vectors"], found["ok"], found["cases"]) == (
        "mine:Ties", "vectors", False, 3)
    assert list(found["counts"]) == list(STATUSES)
    assert sum(found["counts"].values()) == len(found["results"]) == 5
    for result in found["results"]:
        assert set(result) == {"case", "level", "status", "reason", "array", "compared",
                               "undecided", "trace", "model", "title", "equation", "flags"}
        assert result["status"] in STATUSES
        assert result["level"] in LEVELS
        for one in result["compared"]:
            assert set(one) == {"name", "largest", "allowed", "wrong"}


def test_the_json_is_strict_where_a_difference_is_not_finite(few):
    class NotANumber(Ours):
        def run(self, case, masks):
            return super().run(case, masks) | {"a_4": np.full((8, 5), np.nan)}

    text = json.dumps(conform(NotANumber(), few).json(), allow_nan=False)
    assert '"largest": null' in text


class Tags(HTMLParser):
    """What a page holds, and that its tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.links = Counter(), [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_beside_it(cases):
    for subject in (Ours(), OtherTies()):
        report = conform(subject, cases, name="mine:Adapter")
        tags = Tags(page(report))
        assert not tags.open
        assert not tags.links
        assert not {"script", "link", "img", "iframe"} & set(tags.tags)
        assert tags.tags["article"] == len(report.bad)
    text = page(report)
    assert "http" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert '<meta name="viewport"' in text
    assert text.index("What differs") < text.index("By model and level") < text.index("All checks")
    assert text.index("<article") < text.index("<table><tr>")
    assert f"{len(report.bad)} of {len(report.results)} checks differ" in text


def test_the_page_escapes_what_others_wrote(few):
    bad = "<script>alert('x')</script>&amp;"

    class Raising(Ours):
        def run(self, case, masks):
            raise ValueError(bad)

        def train(self, case):
            raise Unsupported(bad)

    few = [case._replace(id=f"{case.id}{bad}", title=bad, equation=bad, model=case.model + bad,
                         flags=(bad,)) for case in few]
    tags = Tags(page(conform(Raising(), few, name=bad, vectors=bad)))
    assert not tags.tags["script"]
    assert "".join(tags.text).count(bad) > 10


# --- pytest -------------------------------------------------------------------------------------

pytest_plugins = ["pytester"]


def run_pytest(pytester, *arguments):
    return pytester.runpytest_subprocess("-p", "comet_np_pytest", "-p", "no:cacheprovider",
                                         *arguments)


@pytest.fixture
def project(pytester, few, monkeypatch):
    """Stand in a project with an adapter and vectors."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # ours may be installed here
    pytester.makepyfile(mine=ADAPTER)
    for case in few:
        write(pytester.path / "vectors" / case.id, case)
    return pytester


def test_pytest_has_a_test_a_case_and_level(project):
    project.makepyfile(test_own="def test_one():\n    pass\n")
    done = run_pytest(project, "--comet-adapter", "mine:Adapter", "--comet-vectors", "vectors",
                      "-v")
    done.assert_outcomes(passed=6)
    done.stdout.fnmatch_lines(["*comet-np::mlp-comet-strict::routing PASSED*",
                               "comet-np: 3 cases of 3 run"])


def test_pytest_shows_the_sentence_of_a_failure(project):
    done = run_pytest(project, "--comet-adapter", "mine:Ties", "--comet-vectors", "vectors")
    done.assert_outcomes(passed=4, failed=1)
    done.stdout.fnmatch_lines(["*cap-strict-n7-k3, cap: mask differs in * of * rows*"])
    assert "conform.py" not in done.stdout.str()


def test_pytest_chooses_with_k_and_in_processes(project):
    pytest.importorskip("xdist")
    done = run_pytest(project, "--comet-adapter", "mine:Adapter", "--comet-vectors", "vectors",
                      "-k", "mlp-comet-strict", "-p", "xdist", "-n", "2")
    done.assert_outcomes(passed=3)
    done.stdout.fnmatch_lines(["comet-np: 1 case of 3 run"])


def test_pytest_skips_what_is_unsupported_and_expects_failures(project):
    project.makepyfile(partial="""
        from comet_np.conformance.ours import Ours

        class Adapter:
            def cap(self, scores, k, ties):
                return Ours().cap(scores, k, "threshold")
        """)
    project.path.joinpath("known.txt").write_text("cap-* *\nmlp-* forward\n")
    done = run_pytest(project, "--comet-adapter", "partial:Adapter", "--comet-vectors", "vectors",
                      "--comet-expected", "known.txt", "-rs")
    done.assert_outcomes(xfailed=1, skipped=4)
    done.stdout.fnmatch_lines(["*the adapter has no method run*"])
    assert done.ret == 0


def test_pytest_fails_for_an_unexpected_pass(project):
    project.path.joinpath("known.txt").write_text("mlp-* forward\n")
    done = run_pytest(project, "--comet-adapter", "mine:Adapter", "--comet-vectors", "vectors",
                      "--comet-expected", "known.txt")
    done.assert_outcomes(passed=4, failed=1)
    done.stdout.fnmatch_lines(["*XPASS(strict)*"])


@pytest.mark.parametrize(("arguments", "message"), [
    (("--comet-adapter", "mine:Adaptr"), "*mine has no Adaptr; did you mean*"),
    (("--comet-adapter", "mine:Adapter", "--comet-vectors", "none"), "*none has no test vectors*"),
    (("--comet-adapter", "mine:Adapter", "--comet-vectors", "vectors", "--comet-expected", "no"),
     "*no is missing*")])
def test_pytest_says_what_it_cannot_use(project, arguments, message):
    if len(arguments) == 2:
        arguments += ("--comet-vectors", "vectors")
    done = run_pytest(project, *arguments)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([message])
    assert "Traceback" not in done.stderr.str()


def test_pytest_without_the_option_loads_nothing_of_ours(project):
    project.makepyfile(test_own="""
        import sys

        def test_nothing_is_loaded():
            assert "comet_np_pytest" in sys.modules
            assert not {"comet_np", "numpy"} & set(sys.modules)
        """)
    done = run_pytest(project)
    done.assert_outcomes(passed=1)
    # Our summary and our tests begin so; of an installed plugin pytest lists the version.
    assert "comet-np:" not in done.stdout.str()


def test_the_plugin_is_registered_under_its_own_name():
    """So that `-p` and the entry point do not load it twice."""
    assert '"pytest11": ["comet_np_pytest = comet_np_pytest"]' in (ROOT / "setup.py").read_text()
    assert 'py_modules=["comet_np_pytest"]' in (ROOT / "setup.py").read_text()
