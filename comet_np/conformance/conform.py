"""`conform`: does another implementation agree with the test vectors, level by level?"""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from ..errors import REMEDIES, UserError, nearest, of_system
from . import mistakes
from .adapter import Given, Unsupported, Wrong, called, host
from .vectors import Case
from .vectors.files import LEVELS, role

Array = Any

FORMAT = 1  # of the JSON
STATUSES = ("passed", "failed", "expected-failure", "unexpected-pass", "unsupported")
BAD = ("failed", "unexpected-pass")
BEFORE = {"gradients": ("forward",), "routing": ("forward",),
          "trajectory": ("forward", "gradients", "routing")}
OF_ROUTING = ("routing", "routing_bias", "V", "masks")  # decisions that given masks hide
SHOWN = 3  # failures of one model and level in a text
WIDTH = 100


class Compared(NamedTuple):
    """How an array of an adapter's differs from the expected one.

    Attributes
    ----------
    name : str
    largest, allowed : float
        The largest difference, infinity if something is not finite, and how large it may be.
    wrong : str
        What is wrong, as it goes on after the name; "" if nothing is.
    """

    name: str
    largest: float
    allowed: float
    wrong: str


class Result(NamedTuple):
    """What one level of one case came to.

    Attributes
    ----------
    case, level : str
    status : str
        One of `STATUSES`.
    reason : str
        A sentence; "" if it passed.
    array : str
        The first array, in the order of computation, that differs; "" if none does.
    compared : tuple of Compared
        What the adapter returned of this level, in the order of computation.
    undecided : int
        Rows left out, as their masks hang on rounding.
    trace : str
        The traceback of an exception that the adapter raised.
    model, title, equation, flags
        Of the case.
    """

    case: str
    level: str
    status: str
    reason: str
    array: str
    compared: tuple[Compared, ...]
    undecided: int
    trace: str
    model: str
    title: str
    equation: str
    flags: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The reason, with the names of the case and the level."""
        return f"{self.case}, {self.level}: {self.reason}"


class Report(NamedTuple):
    """What an adapter's results are on all cases.

    Attributes
    ----------
    adapter : str
        Its name.
    vectors : str
        The folder of the cases; "" for those that come with COMET-NP.
    results : tuple of Result
        Sorted by case, then in the order of the levels.
    """

    adapter: str
    vectors: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether something was compared, nothing failed, and nothing passed unexpectedly."""
        return self.cases > 0 and not self.bad

    @property
    def bad(self) -> tuple[Result, ...]:
        """The results that are not as they should be."""
        return tuple(result for result in self.results if result.status in BAD)

    @property
    def cases(self) -> int:
        """The number of cases run: those of which at least one level is supported."""
        return len({result.case for result in self.results if result.status != "unsupported"})

    @property
    def undecided(self) -> int:
        """The number of rows left out, as their masks hang on rounding."""
        return sum(result.undecided for result in self.results)

    @property
    def verdict(self) -> str:
        """The counts, in a line."""
        word = "CONFORMS" if self.ok else "DIFFERS" if self.bad else "NOTHING COMPARED"
        return (f"{word}: {many(self.cases, 'case')} run, "
                f"{counted(Counter(result.status for result in self.results))}")

    @property
    def source(self) -> str:
        """Where the vectors are from, in words."""
        return (f"the test vectors in {self.vectors}" if self.vectors else
                f"the test vectors of COMET-NP {__version__}")

    def __str__(self) -> str:
        """Return the counts of each model and level, then what failed."""
        return "\n".join([*_table(self), *_failures(self), *_unsupported(self),
                          self.verdict])

    def json(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        counts = Counter(result.status for result in self.results)
        return {"format": FORMAT, "comet-np": __version__, "adapter": self.adapter,
                "vectors": self.vectors, "ok": self.ok, "cases": self.cases,
                "counts": {status: counts[status] for status in STATUSES},
                "results": [_json(result) for result in self.results]}


def conform(adapter: Any, cases: Sequence[Case], expected: "Expected | None" = None,
            name: str = "", vectors: str = "") -> Report:
    """Return how an adapter does on all levels of some cases.

    Parameters
    ----------
    adapter : object
        See `comet_np.conformance.adapter`.
    cases : sequence of Case
        As `comet_np.conformance.vectors.read_all` gives them.
    expected : Expected, optional
        Which failures are expected.
    name, vectors : str
        Of the adapter and of the cases, for the report.
    """
    checker = Checker(adapter, expected)
    return Report(name, vectors, tuple(checker.check(case, level)
                                       for case in cases for level in case.levels))


def chosen(cases: Sequence[Case], pattern: str) -> list[Case]:
    """Return the cases whose names match a pattern, as "mlp-*".

    Raises
    ------
    UserError
        If none does.
    """
    found = [case for case in cases if fnmatchcase(case.id, pattern)]
    if not found:
        raise UserError(f'no case matches "{pattern}"{nearest(pattern, [c.id for c in cases])} '
                        f"({len(cases)} cases, as {cases[0].id})")
    return found


class Expected:
    """The failures that are expected: a pattern for cases and one for levels each.

    Parameters
    ----------
    file : Path
        Text, a line each as ``mlp-top-k-* routing``; from # on it is a comment.
    cases : sequence of Case
        All there are.

    Raises
    ------
    UserError
        If a line is something else, or matches nothing.
    """

    def __init__(self, file: Path, cases: Sequence[Case]) -> None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise UserError(f"{file} is missing: it was to list the expected failures, a case and "
                            "a level a line") from None
        except UnicodeDecodeError:
            raise UserError(f"{file} is no text in UTF-8: it lists the expected failures, a case "
                            "and a level a line") from None
        except OSError as error:
            if error.errno not in REMEDIES:
                raise
            raise UserError(of_system("read", file, error, "--expected")) from None
        self._patterns: list[tuple[str, str]] = []
        known = [(case.id, level) for case in cases for level in case.levels]
        for number, line in enumerate(lines, start=1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2:
                raise UserError(f'line {number} of {file} must be a case and a level, as "mlp-* '
                                f'routing", got "{line.strip()}"')
            one, level = words
            if not any(fnmatchcase(name, one) and fnmatchcase(of, level) for name, of in known):
                names = [name for name, of in known if fnmatchcase(of, level)]
                what = (f"no level matches {level} (they are {', '.join(LEVELS)})" if not names
                        else f"no case matches {one} at the level {level}{nearest(one, names)}")
                raise UserError(f"line {number} of {file}: {what}")
            self._patterns.append((one, level))

    def __contains__(self, what: tuple[str, str]) -> bool:
        return any(fnmatchcase(what[0], case) and fnmatchcase(what[1], level)
                   for case, level in self._patterns)


class Checker:
    """Asks an adapter, and compares.

    What it returns given the masks serves both the level forward and the level gradients.
    """

    def __init__(self, adapter: Any, expected: Expected | None = None) -> None:
        self._adapter, self._expected = adapter, expected
        self._kept: tuple[str, dict[str, Any] | Exception] = "", {}

    def check(self, case: Case, level: str) -> Result:
        """Return what one level of a case comes to."""
        compared: tuple[Compared, ...] = ()
        near, trace, array = np.zeros(0, bool), "", ""
        try:
            answer = self._answer(case, level)
            if level == "routing":
                near = undecided(case)
            compared = tuple(_compared(case, level, answer, near))
            first = next((one for one in compared if one.wrong), None)
            status, reason = ("failed", "") if first else ("passed", "")
            if first:
                array = first.name
                later = [one.name for one in compared if one.wrong and one is not first]
                reason = f"{array} {first.wrong}" + (
                    f"; after it differ {', '.join(later[:4])}{' ...' * (len(later) > 4)}"
                    if later else "")
        except Unsupported as why:
            status, reason = "unsupported", str(why) or "the adapter says so"
        except Wrong as wrong:
            status, reason, trace = "failed", str(wrong), wrong.trace
        if self._expected is not None and (case.id, level) in self._expected:
            if status == "failed":
                status = "expected-failure"
            elif status == "passed":
                status, reason = "unexpected-pass", "passes, and is listed as an expected failure"
        return Result(case.id, level, status, reason, array, compared, int(near.sum()), trace,
                      case.model, case.title, case.equation, case.flags)

    def _answer(self, case: Case, level: str) -> dict[str, Any]:
        """Return what the adapter returns, by name."""
        if level not in ("forward", "gradients"):
            return _asked(self._adapter, case, level)
        key, answer = self._kept
        if key != case.id:
            try:
                answer = _asked(self._adapter, case, level)
            except (Unsupported, Wrong) as error:
                answer = error
            self._kept = case.id, answer
        if isinstance(answer, Exception):
            raise answer
        return answer


def routed(case: Case) -> dict[str, Array]:
    """Return what is given at other levels, and at the level routing is to be found."""
    return {name: array for name, array in case.inputs.items()
            if role(name) == "given" or name == "choice"}


def _asked(adapter: Any, case: Case, level: str) -> dict[str, Any]:
    arrays = {name: array.copy() for name, array in case.inputs.items()
              if level != "routing" or name not in routed(case)}
    given = Given(case.id, case.model, dict(case.config), arrays)
    if level == "cap":
        scores = arrays["scores"]
        return {"mask": called(adapter, "cap", arrays, scores, case.config["k"],
                               case.config["ties"])}
    if level == "trajectory":
        method, answer = "train", called(adapter, "train", arrays, given)
    else:
        masks = {f"the mask {name}": array.astype(bool) for name, array in arrays.items()
                 if role(name) == "given"}
        method = "run"
        answer = called(adapter, "run", arrays | masks, given, tuple(masks.values()) or None)
    if not isinstance(answer, Mapping):
        raise Wrong(f"{method} must return arrays by name, a dict, got {type(answer).__name__}")
    _check_names(method, answer, case)
    return dict(answer)


def _check_names(method: str, answer: Mapping[Any, Any], case: Case) -> None:
    """Raise Wrong for a name that is like none of the case's, whatever its numbers."""
    known = [*case.inputs, *case.expected]
    kinds = {re.sub(r"\d+", "#", name) for name in known}
    for name in answer:
        if re.sub(r"\d+", "#", str(name)) not in kinds:
            has = nearest(str(name), known) or f"; it has {', '.join(case.expected)}"
            raise Wrong(f'{method} returned "{name}", and this case has no such array{has}')


def wanted(case: Case, level: str) -> dict[str, Array]:
    """Return what is expected at a level, in the order of computation."""
    if level != "routing":
        return {name: array for name, array in case.expected.items()
                if case.levels_of[name] == level}
    expected = {name: array for name, array in case.expected.items()
                if case.levels_of[name] in ("routing", "forward") and name != "loss"}
    masks, ordered = routed(case), dict[str, Array]()
    for name, array in expected.items():
        # The mask of a layer follows from its scores, and comes before what is made with it.
        if not name.startswith(("c_", "margin_", "scores")):
            for mask in masks.keys() & {f"m_{name.rpartition('_')[2]}", "choice"}:
                ordered[mask] = masks.pop(mask)
        ordered[name] = array
    return ordered | masks


def needed(case: Case, level: str) -> list[str]:
    """Return the arrays of a level that an adapter must return.

    That is what the level is about: the output, all gradients of parameters, or all parameters
    after steps. What comes in between is compared if it is returned.
    """
    names = [name for name, of in case.levels_of.items() if of == level]
    if level == "gradients":
        of = {name: re.sub("^d_?", "", name) for name in names}
        return [name for name in names
                if of[name] in case.inputs and role(of[name]) == "parameter"] or names
    if level in ("forward", "routing"):
        forward = [name for name, of in case.levels_of.items() if of == "forward"] or names
        return [name for name in forward if name != "loss"][-1:] or forward
    return [name for name in names if name != "losses"]


def undecided(case: Case) -> Array:
    """Return which examples have a mask that hangs on rounding: bool (B,), or (0,) if none can.

    Scores that are all zero are so with any rounding.
    """
    near = np.zeros(0, bool)
    margins = [name for name in case.expected if name.startswith("margin_")]
    exact = case.config.get("scores_exact", [False] * len(margins))
    for name, is_exact in zip(margins, exact, strict=True):
        margin, number = case.expected[name], name.removeprefix("margin_")
        scores = next(case.expected[one] for one in (f"c_{number}", f"a_{number}", "scores")
                      if one in case.expected)
        small = margin < (0 if is_exact else case.tolerance) * np.abs(scores).max()
        of_example = (small & scores.any(axis=-1)).reshape(len(small), -1).any(axis=1)
        near = of_example if not near.size else near | of_example
    return near


def _compared(case: Case, level: str, answer: dict[str, Any], near: Array) -> Iterator[Compared]:
    """Yield how each array that was returned differs, in the order of computation."""
    expected = wanted(case, level)
    missing = [name for name in needed(case, level) if name not in answer]
    if missing:
        method = {"trajectory": "train", "cap": "cap"}.get(level, "run")
        if level == "gradients" and not expected.keys() & answer.keys():
            raise Unsupported(f"{method} returns no gradients")
        raise Wrong(f"{method} did not return {', '.join(missing)}, but "
                    f"{', '.join(map(str, answer)) or 'nothing'}")
    for name, want in expected.items():
        if name not in answer:
            continue
        got = host(name, answer[name])
        if got.shape != want.shape:
            turned = ", the transpose's" * (got.shape == want.shape[::-1] and got.ndim == 2)
            yield Compared(name, math.inf, 0.0,
                           f"has the shape {got.shape}{turned}, expected {want.shape}")
            continue
        if near.any():
            if want.shape[:1] != near.shape:
                continue  # it is made of all rows
            got, want = got[~near], want[~near]
        if want.dtype == "uint8":
            rows = np.flatnonzero(~near) if near.any() else np.arange(len(want))
            yield _of_mask(case, level, name, got, want, rows)
        else:
            yield _of_numbers(case, name, got, want)


def _of_numbers(case: Case, name: str, got: Array, want: Array) -> Compared:
    wide = want.astype("float64")
    if want.dtype.kind == "f" and got.dtype.kind != "f":
        return Compared(name, math.inf, 0.0, f"must be of floats, got {got.dtype}")
    allowed = 0.0
    if want.dtype.kind == "f":
        allowed = case.tolerance * (float(np.abs(wide).max(initial=0.0)) or 1.0)
    with np.errstate(invalid="ignore", over="ignore"):
        given = got.astype("float64")
        difference = np.where(np.isfinite(given), np.abs(given - wide), np.inf)
    largest = float(difference.max(initial=0.0))
    if largest <= allowed:
        return Compared(name, largest, allowed, "")
    where = tuple(int(i) for i in np.unravel_index(difference.argmax(), want.shape))
    place = f" at {where if len(where) > 1 else where[0]}" if where else ""
    most = " most" * (want.size > 1)
    text = (f"differs{most}{place}: got {given[where]:.6g}, expected {wide[where]:.6g}"
            if math.isfinite(largest) else f"is {given[where]}{place}, expected {wide[where]:.6g}")
    count = int((difference > allowed).sum())
    if want.size > 1:
        text += f" ({count} of {want.size} numbers)"
    return Compared(name, largest, allowed, text + _multiple(given, wide, allowed))


def _multiple(got: Array, want: Array, allowed: float) -> str:
    """Return by which number all of an array is multiplied, in words; "" if by none."""
    norm = float((want * want).sum())
    if norm == 0 or not np.isfinite(got).all():
        return ""
    factor = float((got * want).sum()) / norm
    if want.size == 1:  # any number is a multiple of another, a whole one says something
        near = abs(factor - round(factor)) <= allowed / abs(float(want.sum())) * abs(factor)
        return f": {round(factor)} times as large" if near and factor > 1.5 else ""
    if not np.abs(got - factor * want).max() <= 2 * abs(factor) * allowed:
        return ""
    return f": all of it is {factor:.4g} times as large" if factor > 0 else (
        f": all of it is {factor:.4g} times what is expected")


def _of_mask(case: Case, level: str, name: str, got: Array, want: Array, rows: Array) -> Compared:
    """Compare masks (rows, ..., N), which are those of these rows of the case."""
    if not np.isin(got, (0, 1)).all():
        bad = got[~np.isin(got, (0, 1))].flat[0]
        return Compared(name, math.inf, 0.0, f"must be a mask of 0 and 1, got {bad}")
    differs = got.astype(bool) != want.astype(bool)
    if not differs.any():
        return Compared(name, 0.0, 0.0, "")
    of_row = differs.any(axis=-1)
    row = tuple(int(i[0]) for i in np.nonzero(of_row))  # the first that differs
    neuron = int(np.flatnonzero(differs[row])[0])
    first = (int(rows[row[0]]), *row[1:])
    text = (f"differs in {int(of_row.sum())} of {of_row.size} rows, first in row "
            f"{first if len(first) > 1 else first[0]}: neuron {neuron} is {int(got[row][neuron])}, "
            f"expected {int(want[row][neuron])}")
    winners, right = int(got[row].sum()), int(want[row].sum())
    if winners != right:
        text += f" ({winners} win, expected {right})"
    tied = _tied(case, level, name)
    if tied is not None:
        tied = tied[rows][of_row]
        text += (", and scores tie at rank k" + " in all of them" * (len(tied) > 1) if tied.all()
                 else ", and no scores tie at rank k there" if not tied.any() else "")
    return Compared(name, 1.0, 0.0, text)


def _tied(case: Case, level: str, name: str) -> Array | None:
    """Return in which rows scores tie at rank k: bool (...), or None if it is not known."""
    if level == "cap":
        scores, k = case.inputs["scores"], case.config["k"]
        ordered = np.sort(scores, axis=-1)
        if k == scores.shape[-1]:
            return np.zeros(scores.shape[:-1], bool)
        return np.asarray(ordered[..., -k] == ordered[..., -k - 1])
    margin = case.expected.get(f"margin_{name.removeprefix('m_')}")
    return None if margin is None else np.asarray(margin == 0)


# --- in words -----------------------------------------------------------------------------------


def many(number: int, what: str) -> str:
    """Return a number of things."""
    return f"{number} {what}" + "s" * (number != 1)


def counted(counts: Mapping[str, int]) -> str:
    """Return how many checks there are of each status, in words."""
    total = sum(counts.values())
    return f"{many(total, 'check')}: " + (", ".join(
        f"{counts[status]} {status.replace('-', ' ')}" for status in STATUSES
        if counts.get(status)) or "none")


def by_model(results: Iterable[Result]) -> dict[str, dict[str, Counter[str]]]:
    """Return the counts of each status, by model and level."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for result in results:
        found.setdefault(result.model, {}).setdefault(result.level, Counter())[result.status] += 1
    return found


def cell(counts: Counter[str] | None) -> str:
    """Return what stands in the table for a model and a level."""
    if not counts:
        return ""
    run = sum(counts.values()) - counts["unsupported"]
    if not run:
        return "unsupported"
    good = run - sum(counts[status] for status in BAD)
    return f"{good}/{run}" + f" +{counts['unsupported']}?" * bool(counts["unsupported"])


def catches(result: Result) -> dict[str, str]:
    """Return the mistakes that a result's case catches at its level, a sentence each by its name.

    Of a mistake that is not known here the sentence is "".
    """
    known = _mistakes()
    return {flag: known[flag][1] if flag in known else "" for flag in result.flags
            if flag not in known or result.level in known[flag][0]}


def suspects(report: Report, level: str, model: str) -> list[str]:
    """Return the mistakes that fail at a level of a model just the cases that do.

    None if a level fails on which this one builds: what differs then may follow from that.
    """
    if any((result.level, result.model) in [(one, model) for one in BEFORE.get(level, ())]
           for result in report.bad):
        return []
    run = [result for result in report.results if (result.level, result.model) == (level, model)
           and result.status != "unsupported"]
    failed = {result.case for result in run if result.status == "failed"}
    flags = dict.fromkeys(flag for result in run for flag in catches(result))
    return [flag for flag in flags
            if {result.case for result in run if flag in result.flags} == failed]


def _mistakes() -> dict[str, tuple[set[str], str]]:
    """Return the levels at which each mistake shows first, and what it is, by its name."""
    levels = {"CAP": {"cap", "routing"}, "GRADIENTS": {"gradients"}, "TRAINING": {"trajectory"}}
    found: dict[str, tuple[set[str], str]] = {}
    for group, entries in vars(mistakes).items():
        for one in entries if isinstance(entries, tuple) else ():
            if isinstance(one, mistakes.Mistake):
                usual = {"routing"} if one.decision in OF_ROUTING else {"forward"}
                shows = levels.get(group, usual)
                if one.decision == "loss":
                    shows = shows | {"forward"}
                found.setdefault(one.name, (shows, str(one)))
    return found


def _table(report: Report) -> list[str]:
    found = by_model(report.results)
    none = [model for model, row in found.items()
            if all(set(counts) == {"unsupported"} for counts in row.values())]
    found = {model: row for model, row in found.items() if model not in none}
    levels = [level for level in LEVELS if any(level in row for row in found.values())]
    rows = [["", *levels], *([model, *(cell(row.get(level)) or "-" for level in levels)]
                             for model, row in found.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    notes = []
    if any("?" in line for line in lines):
        notes.append("agree/run; +n?: so many more are unsupported")
    if none:
        notes += _wrapped(f"unsupported altogether: {', '.join(none)}")
    if report.undecided:
        notes.append(f"{many(report.undecided, 'row')} left out, whose masks hang on rounding")
    return [f"{report.adapter or 'the adapter'} on {report.source}", "", *lines, *notes, ""]


def groups(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """Return results by level and model, that first which the others build on."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda one: (LEVELS.index(one.level), one.model)):
        found.setdefault((result.level, result.model), []).append(result)
    return found


def place(level: str, model: str) -> str:
    """Return a level of a model, in words."""
    return level if level == model else f"{model}, {level}"


def _failures(report: Report) -> list[str]:
    lines = []
    for (level, model), group in groups(report.bad).items():
        for result in group[:SHOWN]:
            lines += _wrapped(f"{result.status.replace('-', ' ').upper()}  {result.sentence}")
        if len(group) > SHOWN:
            lines.append(f"        ... and {len(group) - SHOWN} more of {place(level, model)} "
                         "(--html FILE or --json FILE shows all)")
        if caught := suspects(report, level, model):
            lines += _wrapped(f"        these cases, and no others, catch: {', '.join(caught)}")
    return [*lines, ""] if lines else []


def _unsupported(report: Report) -> list[str]:
    why = Counter(result.reason for result in report.results if result.status == "unsupported")
    lines = [line for reason, number in why.most_common(SHOWN)
             for line in _wrapped(f"UNSUPPORTED  {many(number, 'check')}: {reason}")]
    if len(why) > SHOWN:
        lines.append(f"        ... and for {many(len(why) - SHOWN, 'other reason')}")
    return [*lines, ""] if lines else []


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * 8, break_long_words=False,
                         break_on_hyphens=False)


def _json(result: Result) -> dict[str, Any]:
    values = result._asdict()
    values["flags"] = list(result.flags)
    values["compared"] = [one._asdict() | {
        "largest": one.largest if math.isfinite(one.largest) else None}
        for one in result.compared]
    return values
