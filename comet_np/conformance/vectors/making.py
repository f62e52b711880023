"""How a case is made: its register, its random numbers, and the rounding of what is expected.

What is given lies on a coarse grid: every number, and in COMET's routing every sum of products in
whatever order, is exact in float32. What is expected is computed in float64 and rounded to 24 bits,
so that machines whose float64 differs in the last bits write the same files.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ...backends import reference
from ...errors import UserError
from ...functional.linear import Linear
from ...models.mlp import MLPConfig, Params
from ...rng import key, random_bits
from .files import Case

Array = Any
Arrays = dict[str, Array]

BITS = 24  # of a float32
GUARD, GUARD_OF_LARGE = 1e-13, 1e-14  # of the largest: many times what float64 loses in sums
NOTHING, SMALL = 2.0**-45, 2.0**-40  # what is in between would hang on rounding
TOLERANCE = 1e-5
CLEAR, STABLE = 4 * TOLERANCE, 1e-10  # margins of scores, relative to the largest
LARGEST = float(np.finfo("float32").max)


class Draw:
    """The random numbers of a case: the same with every version of NumPy."""

    def __init__(self, case: str, draw: int, least_margin: float) -> None:
        self.case, self._draw, self.least_margin = case, draw, least_margin

    def integers(self, name: str, shape: tuple[int, ...], low: int, high: int) -> Array:
        """Return int64 numbers from low to high, both included, of the array called `name`."""
        stream = key(self._draw, "vectors", self.case, name)
        bits = random_bits(stream, math.prod(shape), np.zeros((), "int64"))
        return low + (bits.astype("int64") % (high - low + 1)).reshape(shape)

    def grid(self, name: str, shape: tuple[int, ...], bound: float, bits: int) -> Array:
        """Return float64 multiples of 2^-bits, at most `bound` in magnitude, but at least one."""
        most = max(1, int(bound * 2**bits))
        return self.integers(name, shape, -most, most) / 2**bits


class Made(NamedTuple):
    """What a case's function returns: `levels` are of the expected arrays, one each."""

    config: dict[str, Any]
    inputs: Arrays
    expected: Arrays
    levels: dict[str, str]


class Expected:
    """What is expected, in the order of computation, each with its level."""

    def __init__(self) -> None:
        self._arrays: Arrays = {}
        self._levels: dict[str, str] = {}

    def add(self, level: str, **found: Array) -> None:
        self._arrays |= found
        self._levels |= dict.fromkeys(found, level)

    def of(self, config: dict[str, Any], inputs: Arrays) -> Made:
        """Return it with what was given."""
        return Made(config, inputs, self._arrays, self._levels)


class _Entry(NamedTuple):
    title: str
    equation: str
    model: str
    flags: tuple[str, ...]
    draw: int
    large: bool
    make: Callable[[Draw], Made]


CASES: dict[str, _Entry] = {}


def case(name: str, title: str, equation: str, model: str, flags: Iterable[str] = (),
         draw: int = 0, large: bool = False) -> Callable[[Any], Any]:
    """Register the function that makes a case.

    `draw` is part of the seed: a number chosen so that nothing expected is too near a boundary of
    the rounding.
    """
    def register(make: Callable[[Draw], Made]) -> Callable[[Draw], Made]:
        CASES[name] = _Entry(title, equation, model, tuple(sorted(flags)), draw, large, make)
        return make

    return register


def made(name: str) -> Case:
    """Make one case.

    Raises
    ------
    UserError
        If another machine might round it otherwise.
    """
    entry = CASES[name]
    guard = GUARD_OF_LARGE if entry.large else GUARD
    with reference():
        config, inputs, expected, levels = entry.make(
            Draw(name, entry.draw, STABLE if entry.large else CLEAR))
    found = tuple(level for level in ("cap", "forward", "gradients", "routing", "trajectory")
                  if level in levels.values())
    return Case(name, entry.title, entry.equation, entry.model, config, found, entry.flags,
                TOLERANCE, {one: given(name, one, array) for one, array in inputs.items()},
                {one: rounded(name, one, array, guard) for one, array in expected.items()}, levels)


def given(case: str, name: str, array: Array) -> Array:
    """Return an array that is given, in the dtype of its file, which must hold it exactly."""
    dtype = {"b": "uint8", "f": "float32", "i": "int64"}[array.dtype.kind]
    stored = np.ascontiguousarray(array, dtype)
    if not np.array_equal(stored, array):
        raise UserError(f"{name} of the case {case} is not exact in {dtype}: choose a coarser grid")
    return stored


def rounded(case: str, name: str, array: Array, guard: float = GUARD) -> Array:
    """Return an expected array with 24 bits relative to its largest, in float32; or int64, uint8.

    Raises
    ------
    UserError
        If a number is so near the middle between two that another machine may round it to the
        other.
    """
    array = np.asarray(array)
    if array.dtype.kind != "f":
        return given(case, name, array)
    if np.all(array == LARGEST):
        return array.astype("float32")
    largest = np.abs(array).max(initial=0.0)
    if largest < NOTHING:  # all terms cancel, but for rounding: of a bias before a norm, say
        return np.zeros_like(array, "float32")
    unit = 2.0 ** (math.frexp(largest)[1] - BITS)
    scaled = array / unit
    whole = np.rint(scaled)
    distance = 0.5 - np.abs(scaled - whole).max(initial=0.0)
    if distance < guard * 2**BITS or largest < SMALL:
        raise UserError(f"{name} of the case {case} is too near a boundary of the rounding: choose "
                        "another draw for it")
    return (whole * unit + 0.0).astype("float32")  # + 0.0: no -0


def margins(draw: Draw, scores: Array, k: int) -> Array:
    """Return the k-th less the (k+1)-th largest of the scores (..., N): (...).

    Where k = N nothing competes: the largest float32. It is also what an infinite margin is, and of
    two infinities of one sign the margin is 0.
    """
    N = scores.shape[-1]
    if k == N:
        return np.full(scores.shape[:-1], LARGEST)
    ordered = np.sort(scores, axis=-1)
    kth, after = ordered[..., N - k], ordered[..., N - k - 1]
    with np.errstate(invalid="ignore"):
        return np.where(kth == after, 0.0, np.minimum(kth - after, LARGEST))


def decided(draw: Draw, scores: Array, k: int) -> Array:
    """Return the margins of scores that are not exact, which must be clear on every machine.

    But for rows of zeros, which are zeros everywhere. In the small set all are clear in float32; in
    the large one some are not, and reported.
    """
    found = margins(draw, scores, k)
    clear = found > draw.least_margin * np.abs(scores).max(initial=0.0)
    if not (clear | (scores == 0).all(axis=-1)).all():
        raise UserError(f"a margin of the case {draw.case} is too small: choose another draw")
    return found


def check_exact(case: str, z: Array, V: Array, bits: int) -> None:
    """Raise a UserError unless ``V z`` is exact in float32 in every order of summation.

    z (..., N_in) and V (N, N_in) lie on grids whose product is 2^-bits.
    """
    most = (np.abs(z) @ np.abs(V).T).max(initial=0.0) * 2.0**bits
    if most > 2**BITS or (z * 2.0**bits % 1).any():
        raise UserError(f"the routing scores of the case {case} are not exact in float32: choose a "
                        "coarser grid")


def trees(arrays: Arrays, config: MLPConfig) -> tuple[Params, tuple[Array, ...]]:
    """Return the parameters and the fixed weights of an MLP among the arrays."""
    layers = range(1, len(config.widths))
    return (tuple(Linear(arrays[f"W_{i}"], arrays.get(f"b_{i}")) for i in layers),
            tuple(arrays[f"V_{i}"] for i in layers if f"V_{i}" in arrays))


def linear_names(params: Params) -> Iterator[tuple[str, Array]]:
    """Yield the weights and biases of an MLP, or their gradients, by their names in the paper."""
    for layer, (W, b) in enumerate(params, start=1):
        yield f"W_{layer}", W
        if b is not None:
            yield f"b_{layer}", b
