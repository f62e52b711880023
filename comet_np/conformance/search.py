"""Which one or two mistakes explain what was seen.

What was seen is a number of items: the rows of an output, the gradient of each parameter, each
parameter after each step. A set of decisions explains an item if what it computes agrees with it to
rounding. An item at which it would itself be a matter of rounding, as a row whose k-th and next
score are nearly equal, is undecided and counts for nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from ..errors import UserError
from .mistakes import Between, Choices, Mistake

Array = Any
GRID = {(1, 1): 41, (2, 1): 25, (2, 2): 15}  # by mistakes, and those with a number: points a number
STARTS = 3  # of a fit
ZOOMS = 3  # of a fit
CLOSER = 12  # pairs with a number


class NotApplicable(Exception):
    """Decisions that these shapes do not allow, such as a square V used transposed."""


class Agreement(NamedTuple):
    """How what was seen differs from what a set of decisions computes.

    Attributes
    ----------
    error : float array (items,)
        Relative; NaN counts as infinity.
    decided : bool array (items,)
    """

    error: Array
    decided: Array


Compare = Callable[[Choices, bool], Agreement]
Mistakes = tuple[Mistake, ...]


class Explanation(NamedTuple):
    """Mistakes, and the items that they explain.

    Attributes
    ----------
    explained : int
        Of the decided items.
    agreeing : int
        Of all items.
    distance : float
        The mean logarithm of the errors of the decided items.
    """

    mistakes: tuple[Mistake, ...]
    explained: int
    decided: int
    agreeing: int
    items: int
    distance: float

    @property
    def full(self) -> bool:
        """Whether all decided items are explained, and at least half of all agree."""
        return 0 < self.items <= 2 * self.agreeing and self.explained == self.decided


Explain = Callable[..., Explanation | None]


class Search(NamedTuple):
    """What was found of one stage.

    Attributes
    ----------
    right : Explanation
        By no mistake.
    causes : tuple of Explanation
        In full, the first that of the fewest mistakes; the others compute the same.
    closest : Explanation or None
        Without causes, the one or two mistakes that explain a good deal.
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


def search(compare: Compare, right: Choices, mistakes: Sequence[Mistake], allowed: float,
           numbers_in_pairs: bool = True) -> Search:
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
    numbers_in_pairs : bool
        Whether mistakes with an unknown number are tried in pairs too, which takes long.
    """
    def explain(made: Mistakes, quick: bool = False) -> Explanation | None:
        choices = right | {mistake.decision: mistake.value for mistake in made}
        try:
            error, decided = compare(choices, quick)
        except NotApplicable:
            return None
        error = np.where(np.isnan(error), np.inf, error)
        agrees = error <= allowed
        # Of a number, a few digits more in a few rows say more than fewer in all.
        digits = np.log(np.minimum(error[decided], 1e9) + allowed)
        return Explanation(made, int(agrees[decided].sum()), int(decided.sum()), int(agrees.sum()),
                           len(error), float(digits.mean()) if len(digits) else 0.0)

    spec = explain(())
    if spec is not None and spec.explained == spec.decided:
        return Search(spec, (), None)  # right, or too little is decided to say that it is wrong
    spec = spec or Explanation((), 0, 0, 0, 0, 0.0)
    mistakes = [mistake for mistake in mistakes
                if right.get(mistake.decision, mistake.value) != mistake.value]
    free = [mistake for mistake in mistakes if not _is_unknown(mistake)]
    tried = [explain((mistake,), True) for mistake in free]
    causes = _full(explain, tried)
    if causes:
        return Search(spec, causes, None)
    fits = [_fitted(explain, (mistake,), allowed) for mistake in mistakes if _is_unknown(mistake)]
    causes = _best(fits)
    if causes:
        return Search(spec, causes, None)
    singles = [each for each in tried if each]
    singles.sort(key=lambda each: (-each.explained, each.distance))
    order = [each.mistakes[0] for each in singles]
    # What cannot be computed alone, for its shapes, may be with a second.
    order += [mistake for mistake, each in zip(free, tried, strict=True) if not each]
    pairs = []
    causes = ()
    for pair in combinations(order, 2):
        if pair[0].decision != pair[1].decision:
            pairs.append(explain(pair, True))
            causes = _best((*causes, *_full(explain, pairs[-1:])))
            if causes and causes[0].agreeing == causes[0].items:
                break  # nothing agrees with more
    if not causes and numbers_in_pairs:
        causes = _with_numbers(explain, order, mistakes, allowed)
    if causes:
        return Search(spec, causes[:1], None)
    nearest = max((each for each in singles + pairs if each), default=None,
                  key=lambda each: each.explained)
    close = [each for each in (nearest and explain(nearest.mistakes), *fits) if each]
    closest = max(close, default=None, key=lambda each: each.explained)
    if closest and 4 * (closest.explained - spec.explained) < closest.items:
        closest = None  # by chance, or of rows that tell nothing
    return Search(spec, (), closest)


def unseen(compare: Compare, right: Choices, mistakes: Sequence[Mistake], allowed: float
           ) -> tuple[Mistake, ...]:
    """Return the mistakes that agree with what was seen as well as the specification does."""
    def agreeing(choices: Choices, quick: bool) -> int:
        try:
            return int((compare(choices, quick).error <= allowed).sum())
        except NotApplicable:
            return -1

    need = {quick: agreeing(right, quick) for quick in (True, False)}
    return tuple(
        mistake for mistake in mistakes
        if not _is_unknown(mistake) and right.get(mistake.decision) not in (mistake.value, None)
        and all(agreeing(right | {mistake.decision: mistake.value}, quick) >= need[quick]
                for quick in (True, False)))


def _is_unknown(mistake: Mistake) -> bool:
    """Return whether a number of the mistake is not known."""
    return isinstance(number(mistake), Between)


def _full(explain: Explain, tried: Iterable[Explanation | None]) -> tuple[Explanation, ...]:
    """Return what explains all, of what explains all of a few items."""
    whole = (explain(each.mistakes) for each in tried if each and each.explained == each.decided)
    return _best(whole)


def _best(found: Iterable[Explanation | None]) -> tuple[Explanation, ...]:
    """Return those in full that agree with the most: what leaves items out must not win."""
    full = [each for each in found if each and each.full]
    most = max((each.agreeing for each in full), default=0)
    return tuple(each for each in full if each.agreeing == most)


def _with_numbers(explain: Explain, order: Sequence[Mistake], mistakes: Sequence[Mistake],
                  allowed: float) -> tuple[Explanation, ...]:
    """Return the pair in full of which at least one has an unknown number."""
    unknown = [mistake for mistake in mistakes if _is_unknown(mistake)]
    pairs = [pair for pair in (*combinations(unknown, 2), *product(unknown, order))
             if pair[0].decision != pair[1].decision]
    # A grid shows where it is worth while to look closer.
    profiles = [(pair, _Profile(explain, pair)) for pair in pairs]
    profiles.sort(key=lambda each: each[1].least)
    for pair, profile in profiles[:CLOSER]:
        found = _fitted(explain, pair, allowed, profile)
        if found and found.full:
            return (found,)
    return ()


class _Profile:
    """The distance as a function of the logarithms of the unknown numbers, one or two, on a grid.

    starts : the grid's best points, none beside another. step : float array, the grid's.
    """

    def __init__(self, explain: Explain, mistakes: Mistakes) -> None:
        self.explain, self.mistakes = explain, mistakes
        self.places = [i for i, mistake in enumerate(mistakes) if _is_unknown(mistake)]
        points = GRID[len(mistakes), len(self.places)]
        bounds = [np.log(number(mistakes[place])) for place in self.places]
        axes = [np.linspace(low, high, points) for low, high in bounds]
        self.step = np.array([axis[1] - axis[0] for axis in axes])
        self.low, self.high = np.array(bounds).T
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
        distances = np.array([self(point) for point in grid])
        self.least = float(distances.min())
        self.starts: list[Array] = []
        for i in np.argsort(distances, kind="stable"):
            if len(self.starts) == STARTS or distances[i] == np.inf:
                break
            if all((np.abs(grid[i] - start) > 1.5 * self.step).any() for start in self.starts):
                self.starts.append(grid[i])

    def made(self, logarithms: Array) -> Mistakes:
        """Return the mistakes with these numbers."""
        made = list(self.mistakes)
        within = np.clip(logarithms, self.low, self.high)
        for place, logarithm in zip(self.places, within, strict=True):
            made[place] = with_number(made[place], math.exp(logarithm))
        return tuple(made)

    def __call__(self, logarithms: Array) -> float:
        """Return the distance."""
        found = self.explain(self.made(logarithms), True)
        return math.inf if found is None else found.distance


def _fitted(explain: Explain, mistakes: Mistakes, allowed: float, profile: _Profile | None = None
            ) -> Explanation | None:
    """Return what mistakes explain, of which one or two have an unknown number."""
    profile = profile or _Profile(explain, mistakes)
    best = None
    for start in profile.starts:
        point = _minimum(profile, start, allowed)
        found = explain(profile.made(point))
        if found is not None and found.full:
            return _round(explain, profile.mistakes, found)
        if found and (best is None or found.explained > best.explained):
            best = found
    return best


def _minimum(profile: _Profile, start: Array, allowed: float) -> Array:
    """Return the logarithms of the numbers at which the distance is least, near a start."""
    point, step = start, profile.step
    if len(point) == 1:
        # Masks that hang on the number make steps: only near the minimum it can be seen as one.
        for _ in range(ZOOMS):
            around = [point + part * step for part in np.linspace(-1, 1, 9)]
            point = min(around, key=profile)
            step = step / 4
        for width in (float(step[0]), 1e-6):  # which it finds to half of a width's digits
            least = minimize_scalar(_moved(profile, point), method="bounded",
                                    bounds=(-width, width), options={"xatol": allowed / 100})
            point = min((point, point + least.x), key=profile)
        return point
    for _ in range(2):  # of a narrow valley Nelder and Mead see the end at the second try
        simplex = [point, point + [step[0], 0], point + [0, step[1]]]
        least = minimize(profile, point, method="Nelder-Mead", options={
            "initial_simplex": simplex, "xatol": allowed / 100, "fatol": 1e-3, "maxfev": 200})
        point, step = least.x, step / 16
    return point


def _moved(profile: _Profile, point: Array) -> Callable[[float], float]:
    """Return the distance as a function of how far it is from a point."""
    return lambda offset: profile(point + offset)


def _round(explain: Explain, mistakes: Mistakes, found: Explanation) -> Explanation:
    """Return an explanation by rounder numbers, if there is one."""
    for digits in range(2, 7):
        made = tuple(
            with_number(mistake, float(f"{number(mistake):.{digits}g}")) if _is_unknown(before)
            else mistake for before, mistake in zip(mistakes, found.mistakes, strict=True))
        rounder = explain(made)
        if rounder is not None and rounder.full and rounder.agreeing >= found.agreeing:
            return rounder
    return found


def number(mistake: Mistake) -> Any:
    """Return the number of a mistake that has one: its value, or the last of a tuple."""
    return mistake.value[-1] if type(mistake.value) is tuple else mistake.value


def with_number(mistake: Mistake, value: float) -> Mistake:
    """Return the mistake with a number in place of the unknown one."""
    whole = (*mistake.value[:-1], value) if type(mistake.value) is tuple else value
    return mistake._replace(value=whole)


def floored(size: Array, allowed: float) -> Array:
    """Return the sizes of rows, and not less than rounding leaves of rows whose terms cancel."""
    return np.maximum(size, allowed * np.nanmax(size, initial=0.0))


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
