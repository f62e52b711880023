"""Which one or two mistakes explain what was seen.

What was seen is a number of items: the rows of an output, the gradient of each parameter, each
parameter after each step. A set of decisions explains an item if what it computes agrees with it to
rounding. An item at which it would itself be a matter of rounding, as a row whose k-th and next
score are nearly equal, is undecided and counts for nothing.
"""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, islice
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from ..errors import UserError
from .mistakes import Between, Choices, Mistake

Array = Any


class NotApplicable(Exception):
    """Decisions that these shapes do not allow, such as a square V used transposed."""


class Agreement(NamedTuple):
    """How what was seen differs from what a set of decisions computes.

    error : float array (items,), relative; NaN counts as infinity.
    decided : bool array (items,).
    """

    error: Array
    decided: Array


Compare = Callable[[Choices, bool], Agreement]
Mistakes = tuple[Mistake, ...]


class Explanation(NamedTuple):
    """Mistakes, and the items that they explain."""

    mistakes: tuple[Mistake, ...]
    explained: int
    decided: int
    items: int
    distance: float  # the mean logarithm of the errors of the decided items

    @property
    def full(self) -> bool:
        """Whether all decided items are explained, and half of all are decided."""
        return self.explained == self.decided and 2 * self.decided >= self.items


Explain = Callable[..., Explanation | None]


class Search(NamedTuple):
    """What was found of one stage.

    right : Explanation, by no mistake.
    causes : Explanations in full, the first that of the fewest mistakes; the others compute the
        same.
    closest : the single mistake that explains most, and more than none does; or None.
    """

    right: Explanation
    causes: tuple[Explanation, ...]
    closest: Explanation | None

    @property
    def ok(self) -> bool:
        """Whether the specification itself explains all."""
        return self.right.full


def tolerance(*dtypes: Any) -> float:
    """Return what a relative difference may be: EPS^(2/3) of the coarsest of the dtypes.

    At least 1e-8: PyTorch's softplus is linear above 20, which is 2e-9 off.
    """
    return float(max(1e-8, *(np.finfo(dtype).eps ** (2 / 3) for dtype in dtypes)))


def search(compare: Compare, right: Choices, mistakes: Sequence[Mistake], allowed: float
           ) -> Search:
    """Return which one or two of the mistakes explain all items.

    Parameters
    ----------
    compare : callable
        ``compare(choices, quick)``: how what was seen differs from what these decisions compute;
        `quick` may leave out items. It may raise NotApplicable.
    right : dict
        The decisions of the specification.
    mistakes : sequence of Mistake
        The likeliest first: of two that compute the same, the first is the cause.
    allowed : float
        What a relative difference may be.
    """
    def explain(made: Mistakes, quick: bool = False) -> Explanation | None:
        choices = right | {mistake.decision: mistake.value for mistake in made}
        try:
            error, decided = compare(choices, quick)
        except NotApplicable:
            return None
        of_decided = np.where(np.isnan(error), np.inf, error)[decided]
        # Of a number, a few digits more in a few rows say more than fewer in all.
        distance = np.log(np.minimum(of_decided, 1e9) + allowed).mean() if len(of_decided) else 0.0
        return Explanation(made, int((of_decided <= allowed).sum()), len(of_decided), len(error),
                           float(distance))

    spec = explain(())
    if spec is not None and spec.full:
        return Search(spec, (), None)
    spec = spec or Explanation((), 0, 0, 0, 0.0)
    mistakes = [mistake for mistake in mistakes
                if right.get(mistake.decision, mistake.value) != mistake.value]
    singles = [_tried(explain, (mistake,), allowed) for mistake in mistakes]
    ranked = sorted(filter(None, singles), key=lambda each: (-each.explained, each.distance))
    causes = tuple(each for each in filter(None, singles) if each.full)
    if not causes:
        order = [each.mistakes[0] for each in ranked]
        # What cannot be computed alone, for its shapes, may be with a second.
        order += [mistake for mistake, each in zip(mistakes, singles, strict=True) if not each]
        pairs = (_tried(explain, pair, allowed) for pair in combinations(order, 2)
                 if pair[0].decision != pair[1].decision)
        causes = tuple(islice((each for each in pairs if each and each.full), 1))
    better = bool(ranked) and ranked[0].explained > spec.explained
    return Search(spec, causes, ranked[0] if better else None)


def unseen(compare: Compare, right: Choices, mistakes: Sequence[Mistake], allowed: float
           ) -> tuple[Mistake, ...]:
    """Return the mistakes that agree with what was seen as well as the specification does."""
    found = []
    for mistake in mistakes:
        if isinstance(number(mistake), Between) or right.get(mistake.decision) in (
                mistake.value, None):
            continue
        try:
            error, decided = compare(right | {mistake.decision: mistake.value}, False)
        except NotApplicable:
            continue
        if bool((error[decided] <= allowed).all()):
            found.append(mistake)
    return tuple(found)


def _tried(explain: Explain, mistakes: Mistakes, allowed: float) -> Explanation | None:
    """Return what mistakes explain; an unknown number, of one of them, is fitted."""
    unknown = [i for i, mistake in enumerate(mistakes) if isinstance(number(mistake), Between)]
    if not unknown:
        return explain(mistakes)
    if len(unknown) > 1:
        return None
    place, = unknown
    mistake = mistakes[place]
    low, high = number(mistake)

    def made(value: float) -> Mistakes:
        return *mistakes[:place], with_number(mistake, value), *mistakes[place + 1:]

    def distance(logarithm: float) -> float:
        found = explain(made(math.exp(logarithm)), True)
        return math.inf if found is None else found.distance

    grid = np.linspace(math.log(low), math.log(high), 25)
    distances = [distance(each) for each in grid]
    best = int(np.argmin(distances))
    if distances[best] == math.inf:
        return None
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    least = minimize_scalar(distance, bounds=ends, method="bounded", options={"xatol": 1e-11})
    fitted = math.exp(least.x)
    if least.fun < math.log(2 * allowed):  # to be had, perhaps, by a round number
        for digits in range(2, 7):
            found = explain(made(float(f"{fitted:.{digits}g}")))
            if found is not None and found.full:
                return found
    return explain(made(fitted))


def number(mistake: Mistake) -> Any:
    """Return the number of a mistake that has one: its value, or the last of a tuple."""
    return mistake.value[-1] if type(mistake.value) is tuple else mistake.value


def with_number(mistake: Mistake, value: float) -> Mistake:
    """Return the mistake with a number in place of the unknown one."""
    whole = (*mistake.value[:-1], value) if type(mistake.value) is tuple else value
    return mistake._replace(value=whole)


def relative(got: Array, want: Array, scale: Array) -> Array:
    """Return the largest |got - want| / scale of each row; infinity where got is not finite.

    got, want : (rows, ...). scale : (rows,), 0 where only equal is right.
    """
    if got.shape != want.shape:
        raise UserError(f"expected an output of shape {want.shape}, got {got.shape}")
    axes = tuple(range(1, got.ndim))
    difference = np.abs(got - want)
    difference = np.where(np.isfinite(got), difference, np.inf).max(axis=axes, initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / scale)
