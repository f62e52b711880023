"""Checks of hand-written backward passes: finite differences, complex step, mask flips.

Any pair will do, of this project or of a reader's own, in which `at` is a tree (nested tuples,
NamedTuples, dicts) of the float64 arrays by which to differentiate:

>>> import numpy as np
>>> def forward(at):
...     return np.tanh(at["x"] @ at["W"].T), None  # the output, and a cache for the backward
>>> def backward(dy, cache, at):
...     da = dy * (1 - np.tanh(at["x"] @ at["W"].T) ** 2)
...     return {"x": da @ at["W"], "W": da.T @ at["x"]}
>>> draw = np.random.default_rng(0)
>>> at = {"x": draw.normal(size=(5, 4)), "W": draw.normal(size=(3, 4))}
>>> check_gradients(forward, backward, at).ok
True
>>> wrong = lambda dy, cache, at: {**backward(dy, cache, at), "W": np.zeros((3, 4))}
>>> result = check_gradients(forward, wrong, at)
>>> result.ok, result.worst
(False, 'W')
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .backends import backend_of, reference
from .errors import UserError
from .rng import stream
from .tree import leaves, named_leaves, tree_map

Array = Any
Tree = Any
Forward = Callable[[Tree], tuple[Array, Any]]  # at -> output, cache
Backward = Callable[[Array, Any, Tree], Tree]  # cotangent, cache, at -> gradients, a tree like at
Scores = Callable[[Tree, Any], Sequence[tuple[Array, int]]]  # at, cache -> c and k of every mask

EPS = sys.float_info.epsilon
# A central difference errs by about h^2 (its formula) and EPS / h (rounding): least at this h.
CENTRAL_STEP = EPS ** (1 / 3)
COMPLEX_STEP = EPS**2  # no difference is taken, so nothing is lost by a tiny step


class Flip(NamedTuple):
    """A perturbation that changed a mask: the function jumps there and has no derivative.

    input : str, the array that was moved. mask : int, the first mask that changed.
    row : its first row that changed. neurons : which of them won before or after, not both.
    margin : the k-th largest score of that row less the (k+1)-th; None if no scores were given.
    """

    input: str
    mask: int
    row: tuple[int, ...]
    neurons: tuple[int, ...]
    margin: float | None

    def __str__(self) -> str:
        margin = "" if self.margin is None else f", margin {self.margin:.1e}"
        return (f"moving {self.input} flips mask {self.mask} in row {self.row}, neurons "
                f"{', '.join(map(str, self.neurons))}{margin}")


class GradientCheck(NamedTuple):
    """What `check_gradients` found.

    error : largest relative difference; NaN if every perturbation flipped a mask.
    tolerance : what it may be.
    worst : where the error is: the array, with `full` the elements.
    numeric, analytic : the derivative there, by difference and by the backward pass.
    perturbations : how many were compared.
    flips : the perturbations that were left out, a Flip each.
    """

    error: float
    tolerance: float
    worst: str
    numeric: float
    analytic: float
    perturbations: int
    flips: tuple[Flip, ...]

    @property
    def ok(self) -> bool:
        """Whether the gradients agree wherever no mask flipped."""
        return self.error <= self.tolerance

    @property
    def summary(self) -> str:
        """The result in a few words."""
        flips = f", {len(self.flips)} mask flips" if self.flips else ""
        return f"relative error {self.error:.1e}{flips}"

    def __str__(self) -> str:
        return "\n  ".join([
            f"{'ok' if self.ok else 'WRONG'}: {self.summary} ({self.tolerance:.1e} allowed, "
            f"{self.perturbations} perturbations), worst at {self.worst}: "
            f"{self.numeric:.9g} by difference, {self.analytic:.9g} by backward",
            *map(str, self.flips)])


def check_gradients(forward: Forward, backward: Backward, at: Tree, *, full: bool = False,
                    complex_step: bool = False, step: float | None = None, probes: int = 4,
                    masks: Callable[[Any], Sequence[Array]] | None = None,
                    scores: Scores | None = None, seed: int = 0) -> GradientCheck:
    """Compare a backward pass with finite differences of its forward pass, in float64.

    For random cotangents w and, in each array of `at`, random unit directions d:
    ``w . (f(x + h d) - f(x - h d)) / 2h``  against  ``(backward of w) . d``.
    Cotangents of ones would hide wrong gradients of softmax and of norms.

    Parameters
    ----------
    forward : callable
        ``forward(at) -> (y, cache)`` with one output array y.
    backward : callable
        ``backward(dy, cache, at) -> gradients``, a tree of the structure and shapes of `at`.
    at : tree of float64 arrays
        Where to differentiate, away from kinks.
    full : bool
        Compare every element of the Jacobian instead of random directions: for small cases.
    complex_step : bool
        Use ``Im f(x + i h d) / h``, exact to rounding, of a function that is analytic (no abs, no
        maximum, no live masks) and accepts complex arrays. Kernels are off meanwhile.
    step : float, optional
        h, if not the best one for a function of order 1 at arguments of order 1.
    probes : int
        How many cotangents, and how many directions in each array.
    masks : callable, optional
        ``masks(cache) -> bool arrays``; if not given, all bool arrays of the cache (a tree).
    scores : callable, optional
        ``scores(at, cache) -> [(c, k), ...]`` of every mask, for the margin of a flip.
    seed : int

    Returns
    -------
    GradientCheck
        Differences are relative to the largest of: the derivative; its typical size over
        directions and cotangents; and that at which the rounding of y alone is just tolerated.
        The tolerance lies half way, in digits, between the error of a right gradient and 1.
        Perturbations that flip a mask are left out and reported.

    Raises
    ------
    UserError
        If `at` holds anything but float64, or a gradient has the wrong shape.
    """
    inputs = list(named_leaves(at))
    for name, x in inputs:
        if x.dtype != "float64":
            raise UserError(f"gradients are checked in float64, got {x.dtype} for {name}")
    if step is None:
        step = COMPLEX_STEP if complex_step else CENTRAL_STEP
    tolerance = math.sqrt(EPS if complex_step else EPS ** (2 / 3))
    y, cache = forward(at)
    cotangents = list(_probes("cotangent", y, full, probes, seed))
    gradients = [_in_order(backward(dy, cache, at), at, inputs) for _, dy in cotangents]
    masks = masks or _bool_arrays
    before = masks(cache)
    worst = GradientCheck(math.nan, tolerance, "nothing", math.nan, math.nan, 0, ())
    perturbations, flips = 0, []

    for position, (name, x) in enumerate(inputs):
        squares = [_norm(gradient[position]) ** 2 for gradient in gradients]
        typical = math.sqrt(sum(squares) / (len(squares) * x.size))
        for element, d in _probes(name, x, full, probes, seed):
            d = d * (step / _norm(d))
            if complex_step:
                move, change, size = d, _imaginary(forward, at, position, d), step * abs(y)
            else:
                ends = x + d, x - d
                (above, cache_above), (below, cache_below) = (
                    forward(_replaced(at, position, end)) for end in ends)
                flip = (_flip(name, before, masks(cache_above))
                        or _flip(name, before, masks(cache_below)))
                if flip:
                    flips.append(flip if scores is None else
                                 flip._replace(margin=_margin(flip, scores(at, cache))))
                    continue
                # The distance after rounding, so that the rounding of x is no error.
                move, change, size = ends[0] - ends[1], above - below, abs(above) + abs(below)
            perturbations += 1
            for (output, dy), gradient in zip(cotangents, gradients, strict=True):
                dx, length = gradient[position], _norm(move)
                numeric, analytic = float((dy * change).sum()), float((dx * move).sum())
                scale = max(abs(numeric), typical * length,
                            EPS * float((abs(dy) * size).sum()) / tolerance)
                error = abs(numeric - analytic)
                if error:
                    error = error / scale if error < math.inf else math.inf  # inf for NaN too
                if not error <= worst.error:
                    place = f"d y{output} / d {name}{element}" if full else name
                    worst = worst._replace(error=error, worst=place, numeric=numeric / length,
                                           analytic=analytic / length)
    return worst._replace(perturbations=perturbations, flips=tuple(flips))


def _probes(name: str, like: Array, full: bool, probes: int,
            seed: int) -> Iterator[tuple[str, Array]]:
    """Yield vectors in the space of `like`: the axes with their indices, or `probes` random."""
    backend = backend_of(like)
    if full:
        axes = np.eye(like.size).reshape(-1, *like.shape)
        for place, axis in zip(np.ndindex(like.shape), axes, strict=True):
            yield str(list(place)) if place else "", backend.asarray(axis)
    else:
        draw = stream(seed, "gradcheck", name)
        for _ in range(probes):
            yield "", backend.asarray(draw.standard_normal(like.shape))


def _norm(a: Array) -> float:
    return math.sqrt(float((a * a).sum()))


def _in_order(gradients: Tree, at: Tree, inputs: Sequence[tuple[str, Array]]) -> list[Array]:
    """Return the gradients in the order of the `inputs`, after a look at their shapes."""
    ordered: list[Array] = []
    tree_map(lambda x, dx: ordered.append(dx), at, gradients)
    for (name, x), dx in zip(inputs, ordered, strict=True):
        shape = getattr(dx, "shape", None)
        if shape != x.shape:
            raise UserError(f"the gradient of {name} must have its shape, {x.shape}, got {shape}")
    return ordered


def _replaced(at: Tree, position: int, value: Array) -> Tree:
    """Return `at` with another array at this position among its leaves."""
    counter = itertools.count()
    return tree_map(lambda x: value if next(counter) == position else x, at)


def _imaginary(forward: Forward, at: Tree, position: int, d: Array) -> Array:
    """Return Im f(x + i d)."""
    with reference():  # kernels are for real numbers
        x = list(leaves(at))[position]
        moved = _replaced(at, position, x + 1j * d)
        return forward(tree_map(lambda a: a.astype("complex128"), moved))[0].imag


def _bool_arrays(cache: Any) -> list[Array]:
    return [leaf for leaf in leaves(cache) if getattr(leaf, "dtype", None) == "bool"]


def _flip(name: str, before: Sequence[Array], after: Sequence[Array]) -> Flip | None:
    """Return the first difference between two lists of masks, if there is one."""
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        changed = backend_of(old).to_host(old != new)
        if changed.any():
            row = tuple(int(i) for i in np.argwhere(changed)[0][:-1])
            neurons = tuple(int(i) for i in np.flatnonzero(changed[row]))
            return Flip(name, layer, row, neurons, None)
    return None


def _margin(flip: Flip, scores: Sequence[tuple[Array, int]]) -> float:
    """Return by how much the k-th largest score of the flip's row exceeds the (k+1)-th."""
    c, k = scores[flip.mask]
    descending = np.sort(backend_of(c).to_host(c)[flip.row])[::-1]
    return float(descending[k - 1] - descending[k])  # k = N never flips
