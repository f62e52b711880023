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
>>> result.ok, result.worst, [(array.name, array.verdict) for array in result.arrays]
(False, 'W', [('x', 'ok'), ('W', 'WRONG')])

To print the result shows a line for each array, the wrong ones first.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .backends import BackendError, backend_of, reference, xp_of
from .backends.base import BACKENDS
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
VERDICTS = ("WRONG", "UNDECIDED", "ok")  # the worst first


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


class ArrayCheck(NamedTuple):
    """What `check_gradients` found of one array of `at`.

    name : str, the array.
    error : largest relative difference; NaN if every perturbation flipped a mask.
    tolerance : what it may be.
    place : where the error is: the array, with `full` the elements.
    numeric, analytic : the derivative there, by difference and by the backward pass.
    compared : how many perturbations were compared.
    flips : the perturbations that were left out, a Flip each.
    """

    name: str
    error: float
    tolerance: float
    place: str
    numeric: float
    analytic: float
    compared: int
    flips: tuple[Flip, ...]

    @property
    def verdict(self) -> Literal["WRONG", "UNDECIDED", "ok"]:
        """Whether the gradient agrees wherever no mask flipped; undecided if one always did."""
        if not self.compared:
            return "UNDECIDED"
        return "ok" if self.error <= self.tolerance else "WRONG"


class GradientCheck(NamedTuple):
    """What `check_gradients` found.

    tolerance : what a relative difference may be.
    arrays : of each array of `at`, in order, an ArrayCheck.
    """

    tolerance: float
    arrays: tuple[ArrayCheck, ...]

    @property
    def verdict(self) -> Literal["WRONG", "UNDECIDED", "ok"]:
        """The worst verdict of an array."""
        return min((array.verdict for array in self.arrays), key=VERDICTS.index)

    @property
    def ok(self) -> bool:
        """Whether all gradients agree wherever no mask flipped, and of each something was compared.
        """
        return self.verdict == "ok"

    @property
    def largest(self) -> ArrayCheck:
        """The array with the largest difference, of those of which something was compared."""
        nothing = ArrayCheck("nothing", math.nan, self.tolerance, "nothing", math.nan, math.nan, 0,
                             ())
        return max((array for array in self.arrays if array.compared),
                   key=lambda array: array.error, default=nothing)

    @property
    def error(self) -> float:
        """The largest relative difference; NaN if nothing was compared."""
        return self.largest.error

    @property
    def worst(self) -> str:
        """Where that is: the array, with `full` the elements."""
        return self.largest.place

    @property
    def numeric(self) -> float:
        """The derivative there, by difference."""
        return self.largest.numeric

    @property
    def analytic(self) -> float:
        """The derivative there, by the backward pass."""
        return self.largest.analytic

    @property
    def perturbations(self) -> int:
        """How many perturbations were compared."""
        return sum(array.compared for array in self.arrays)

    @property
    def flips(self) -> tuple[Flip, ...]:
        """The perturbations that were left out."""
        return tuple(flip for array in self.arrays for flip in array.flips)

    @property
    def summary(self) -> str:
        """The result in a few words."""
        words = []
        if self.perturbations:
            words.append(f"relative error {self.error:.1e}{'' if self.ok else f' at {self.worst}'}")
        undecided = [array.name for array in self.arrays if not array.compared]
        if undecided:
            words.append(f"{', '.join(undecided)} undecided")
        if self.flips:
            words.append(f"{len(self.flips)} mask flips")
        return ", ".join(words)

    def __str__(self) -> str:
        """Return the verdict, a line an array, the worst first, and a flip of each array."""
        order = sorted(self.arrays, key=lambda array: (VERDICTS.index(array.verdict), -array.error))
        rows = [("", "array", "error", "by difference", "by backward", "compared", "flipped")]
        for array in order:
            numbers = (f"{array.error:.1e}", f"{array.numeric:.9g}", f"{array.analytic:.9g}")
            rows.append((array.verdict, array.place, *(numbers if array.compared else "---"),
                         str(array.compared), str(len(array.flips))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.verdict}: {self.summary} ({self.tolerance:.1e} allowed)"]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        lines += [str(array.flips[0]) for array in order if array.flips]
        if not all(array.compared for array in order):
            lines.append("UNDECIDED is what flips a mask whichever way it moves: take a smaller "
                         "step or another point, or freeze the masks")
        return "\n  ".join(lines)


def check_gradients(forward: Forward, backward: Backward, at: Tree, *, full: bool = False,
                    complex_step: bool = False, step: float | None = None, probes: int = 4,
                    masks: Callable[[Any], Iterable[Array | None]] | None = None,
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
        ``masks(cache) -> bool arrays``, None for a layer without; if not given, all bool arrays in
        the cache, a tree or lists.
    scores : callable, optional
        ``scores(at, cache) -> [(c, k), ...]`` of every mask, for the margin of a flip.
    seed : int

    Returns
    -------
    GradientCheck
        Differences are relative to the largest of: the derivative; its typical size over
        directions and cotangents; and that at which the rounding of y alone is just tolerated.
        The tolerance lies half way, in digits, between the error of a right gradient and 1.
        Perturbations that flip a mask are left out and reported; an array of which that leaves none
        is undecided, and the check then not ok.

    Raises
    ------
    UserError
        If `at`, the output or a gradient is not what it should be, if `forward` gives two outputs
        for one point, or if a pass writes into what it is given.
    """
    if probes < 1:
        raise UserError(f"probes is how many directions to take, at least 1, got {probes}")
    if step is None:
        step = COMPLEX_STEP if complex_step else CENTRAL_STEP
    elif not 0 < step < math.inf:
        raise UserError(f"step is how far to move, above 0, got {step}")
    tolerance = math.sqrt(EPS if complex_step else EPS ** (2 / 3))
    _check_point(list(named_leaves(at)))
    given = list(leaves(at))
    at = tree_map(lambda x: x.copy(), at)  # the caller's arrays are safe from what writes into them
    inputs = list(named_leaves(at))

    def run(at: Tree, *like: Array) -> tuple[Array, Any]:
        return _checked(forward(at), inputs[0][1], *like)

    first, _ = run(at)
    _check_untouched("forward", inputs, given)
    y, cache = run(at, first)
    if _norm(y - first) > CENTRAL_STEP**2 * _norm(y):  # over the step an error of the tolerance
        raise UserError("forward gives two outputs for one point: let what it draws at random be "
                        "the same in each call")
    cotangents = list(_probes("cotangent", y, full, probes, seed))
    gradients = _all_gradients(backward, [dy for _, dy in cotangents], cache, at)
    _check_untouched("backward", inputs, given)
    masks = masks or _bool_arrays
    before = tree_map(lambda m: m.copy(), tuple(masks(cache)))
    scored = None if scores is None else scores(at, cache)
    if scored is not None and len(scored) != len(before):
        raise UserError(f"scores must give c and k of each of the {len(before)} masks, got "
                        f"{len(scored)}")
    checks = []

    for position, (name, x) in enumerate(inputs):
        squares = [_norm(gradient[position]) ** 2 for gradient in gradients]
        typical = math.sqrt(sum(squares) / (len(squares) * x.size))
        if not complex_step:
            _check_step(step if full else step / math.sqrt(x.size), step, name, x)
        worst = ArrayCheck(name, math.nan, tolerance, name, math.nan, math.nan, 0, ())
        compared, flips = 0, []
        for element, d in _probes(name, x, full, probes, seed):
            d = d * (step / _norm(d))
            if complex_step:
                move, change, size = d, _imaginary(run, at, position, d, y), step * abs(y)
            else:
                ends = x + d, x - d
                # The distance after rounding, so that the rounding of x is no error.
                move = ends[0] - ends[1]
                above, moved = run(_replaced(at, position, ends[0]), y)
                flip = _flip(name, before, masks(moved))
                below, moved = run(_replaced(at, position, ends[1]), y)
                flip = flip or _flip(name, before, masks(moved))
                if flip:
                    flips.append(flip if scored is None else
                                 flip._replace(margin=_margin(flip, scored)))
                    continue
                change, size = above - below, abs(above) + abs(below)
            compared += 1
            for (output, dy), gradient in zip(cotangents, gradients, strict=True):
                dx, length = gradient[position], _norm(move)
                with np.errstate(over="ignore", invalid="ignore"):  # of a wrong dx, infinity * 0
                    numeric, analytic = float((dy * change).sum()), float((dx * move).sum())
                scale = max(abs(numeric), typical * length,
                            EPS * float((abs(dy) * size).sum()) / tolerance)
                error = abs(numeric - analytic)
                if error:  # inf for NaN too, and where typical overflows
                    error = error / scale if error < math.inf > scale else math.inf
                if not error <= worst.error:
                    place = f"d y{output} / d {name}{element}" if full else name
                    worst = worst._replace(error=error, place=place, numeric=numeric / length,
                                           analytic=analytic / length)
        checks.append(worst._replace(compared=compared, flips=tuple(flips)))
    return GradientCheck(tolerance, tuple(checks))


def _check_array(what: str, a: Array, *like: Array) -> None:
    """Raise a UserError that begins with `what` unless `a` is an array of the backend of `like`."""
    try:
        backend_of(a, *like)
    except BackendError as error:
        raise UserError(f"{what}: {error}") from None


def _check_point(inputs: Sequence[tuple[str, Array]]) -> None:
    """Raise a UserError unless all arrays are finite, of float64, and of one backend."""
    if not inputs:
        raise UserError("there is no array in `at` by which to differentiate")
    for name, x in inputs:
        if isinstance(x, list):
            raise UserError(f"{name} is a list: make it an array, or a tuple of arrays")
        _check_array(name, x, inputs[0][1])
        if x.dtype != "float64":
            raise UserError(f"gradients are checked in float64, got {x.dtype} for {name}: convert "
                            'it, x.astype("float64")')
        if not x.size:
            raise UserError(f"{name} has no elements by which to differentiate, its shape is "
                            f"{x.shape}: leave it out")
        if not _finite(x):
            raise UserError(f"{name} is not finite: choose a point where it is")


def _check_step(moves: float, step: float, name: str, x: Array) -> None:
    """Raise a UserError unless each element of x can move so far."""
    largest = float(abs(x).max())
    if moves < EPS * largest:
        raise UserError(f"the step {step:.1e} is lost in the rounding of {name}, whose largest "
                        f"element is {largest:.1e}: take a larger one")


def _checked(result: Any, x: Array, *like: Array) -> tuple[Array, Any]:
    """Return a copy of the output of a forward pass, and its cache, after a look at both.

    The output has a shape and dtype `like` another, or is the first.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError("forward must return a pair, the output and a cache (which may be None), "
                        f"got {_kind(result)}")
    y, cache = result
    _check_array("forward's output", y, x)
    dtype, shape = (like[0].dtype, like[0].shape) if like else (np.dtype("float64"), y.shape)
    if y.dtype != dtype:
        raise UserError(f"forward's output must be {dtype} where `at` is, got {y.dtype}")
    if y.shape != shape or not y.size:
        raise UserError(f"forward's output must have elements, as many at each point, got shape "
                        f"{y.shape}, {shape} before")
    if not _finite(y):
        raise UserError("forward's output is not finite: choose a point, and a step, where it is")
    return y.copy(), cache  # a copy: it may be a buffer that the next call fills


def _check_untouched(who: str, arrays: Iterable[tuple[str, Array]],
                     before: Iterable[Array]) -> None:
    """Raise a UserError unless the arrays are bit for bit what they were before."""
    for (name, a), b in zip(arrays, before, strict=True):
        if not ((a == b) | ((a != a) & (b != b))).all():
            raise UserError(f"{who} writes into {name}, which others read after it: let it work on "
                            "a copy")


def _finite(a: Array) -> bool:
    return bool(xp_of(a).isfinite(a).all())


def _kind(tree: Tree) -> str:
    """Return what a tree is, without its leaves, to be shown."""
    if isinstance(tree, dict):
        return f"a dict of {', '.join(sorted(map(str, tree))) or 'nothing'}"
    if isinstance(tree, tuple):
        return f"a tuple of {len(tree)}"
    return "None" if tree is None else type(tree).__name__


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
    with np.errstate(over="ignore"):
        return math.sqrt(float((a * a).sum()))


def _all_gradients(backward: Backward, cotangents: Sequence[Array], cache: Any,
                   at: Tree) -> list[list[Array]]:
    """Return the gradients of each cotangent, in the order of the leaves of `at`."""
    kept = [(name, a) for name, a in named_leaves(_tree(cache), "cache")
            if type(a) in BACKENDS]
    before = [a.copy() for _, a in kept]
    gradients = []
    for dy in cotangents:
        own = dy.copy()
        gradients.append(list(_gradients(at, backward(own, cache, at))))
        _check_untouched("backward", [("the cotangent dy", own)], [dy])
    _check_untouched("backward", kept, before)
    return gradients


def _gradients(of: Tree, gradients: Tree, path: str = "") -> Iterator[Array]:
    """Yield a copy of the gradient of each array in the tree `of`, in order, after a look at it."""
    what = f"the gradient of {path.lstrip('.') or 'at'}"
    if of is None or isinstance(of, dict | tuple):
        if _kind(of) != _kind(gradients):
            raise UserError(f"{what} must be {_kind(of)}, as in `at`, got {_kind(gradients)}")
        fields = getattr(of, "_fields", None)
        for key, branch in of.items() if isinstance(of, dict) else enumerate(of or ()):
            name = fields[key] if fields else key
            step = f".{name}" if fields or isinstance(of, dict) else f"[{name}]"
            yield from _gradients(branch, gradients[key], path + step)
        return
    shape = getattr(gradients, "shape", None)
    if gradients is None or shape not in (None, of.shape):
        raise UserError(f"{what} must have its shape, {of.shape}, got {shape}")
    _check_array(what, gradients, of)
    if gradients.dtype != "float64":
        raise UserError(f"{what} must be float64, got {gradients.dtype}")
    yield gradients.copy()  # it may be a buffer that the next call fills


def _replaced(at: Tree, position: int, value: Array) -> Tree:
    """Return `at` with another array at this position among its leaves."""
    counter = itertools.count()
    return tree_map(lambda x: value if next(counter) == position else x, at)


def _imaginary(run: Callable[..., tuple[Array, Any]], at: Tree, position: int, d: Array,
               y: Array) -> Array:
    """Return Im f(x + i d), of f(x) = y."""
    with reference():  # kernels are for real numbers
        x = list(leaves(at))[position]
        moved = _replaced(at, position, x + 1j * d)
        return run(tree_map(lambda a: a.astype("complex128"), moved), y + 0j)[0].imag


def _bool_arrays(cache: Any) -> list[Array]:
    return [leaf for leaf in leaves(_tree(cache)) if getattr(leaf, "dtype", None) == "bool"]


def _tree(cache: Any) -> Tree:
    """Return a cache with its lists as tuples, so that it is a tree."""
    if isinstance(cache, dict):
        return {name: _tree(branch) for name, branch in cache.items()}
    if isinstance(cache, list | tuple):
        branches = tuple(map(_tree, cache))
        return type(cache)(*branches) if hasattr(cache, "_fields") else branches
    return cache


def _flip(name: str, before: Sequence[Array | None],
          after: Iterable[Array | None]) -> Flip | None:
    """Return the first difference between two lists of masks, if there is one."""
    after = tuple(after)
    if len(before) != len(after):
        raise UserError("masks must give as many masks of each cache, got "
                        f"{len(before)} and {len(after)}")
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        if old is None:
            continue
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
