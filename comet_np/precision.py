"""Precision: the number formats of a training run, and the rounding of a product's operands."""

from typing import Any, NamedTuple

import numpy as np

from .backends import xp_of
from .errors import UserError, unknown

Array = Any

FORMATS = ("tf32", "float16", "bfloat16")  # in which a product may read its operands


class Precision(NamedTuple):
    """In which format a training run multiplies, sums and keeps its numbers.

    Losses, sums over examples and the optimizer work in `accumulate` or better. Routing scores are
    always products of whole `accumulate` numbers, since fewer bits flip masks.

    Attributes
    ----------
    compute : str or None
        One of `FORMATS`: how the matrix products of the trained layers read their operands, see
        `rounded`. None: as they are.
    accumulate : str
        Dtype of sums, activations and gradients.
    master : str
        Dtype of parameters and optimizer state.
    """

    compute: str | None
    accumulate: str
    master: str


FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # of PyTorch's GradScaler
LARGEST_SCALE = 2.0**127  # in float32

PRECISIONS = {
    "float64": Precision(None, "float64", "float64"),
    "float32": Precision(None, "float32", "float32"),
    "tf32": Precision("tf32", "float32", "float32"),
    "float16": Precision("float16", "float32", "float32"),
    "bfloat16": Precision("bfloat16", "float32", "float32"),
}


def precision(name: str) -> Precision:
    """Return the precision called `name`.

    Raises
    ------
    UserError
        If there is none of that name, or bfloat16 is asked for without the package that has it.
    """
    if name not in PRECISIONS:
        raise unknown("precision", name, PRECISIONS)
    check_format(PRECISIONS[name].compute)
    return PRECISIONS[name]


def check_format(compute: str | None) -> None:
    """Raise a UserError unless `compute` is None or one of `FORMATS` that can be had here."""
    if compute is not None and compute not in FORMATS:
        raise unknown("format of products", compute, FORMATS)
    if compute == "bfloat16":
        bfloat16()


def bfloat16() -> Any:
    """Return the dtype bfloat16, of the package `ml_dtypes`.

    Raises
    ------
    UserError
        If it is not installed.
    """
    try:
        import ml_dtypes
    except ImportError:
        raise UserError("bfloat16 needs the package ml_dtypes: python -m pip install ml_dtypes"
                        ) from None
    return np.dtype(ml_dtypes.bfloat16)


def first_scaling(xp: Any) -> Array:
    """Return the state of dynamic loss scaling before the first step, float32 (3,).

    Small gradients vanish when float16 rounds them: the loss, and so each gradient, is multiplied
    by a scale, and the gradients are divided by it before the optimizer sees them. The state is the
    scale; how many steps were good since it changed; how many steps were left out.
    """
    return xp.array([FIRST_SCALE, 0, 0], dtype="float32")


def unscaled(scaling: Array, finite: Array) -> Array:
    """Return by what the gradients are to be multiplied, a 0-d array; NaN if not all are finite."""
    return xp_of(scaling).where(finite, 1 / scaling[0], np.nan)


def adjust(scaling: Array, finite: Array) -> None:
    """Change the state after a step, in place, as PyTorch's GradScaler does.

    A gradient that is not finite halves the scale; 2000 good steps one after the other double it.
    Nothing is read by the host.
    """
    xp = xp_of(scaling)
    scale, good, left_out = scaling[:1], scaling[1:2], scaling[2:]  # views
    good[...] = xp.where(finite, good + 1, 0)
    due = good == GROWTH_INTERVAL
    larger = 2 * xp.minimum(scale, LARGEST_SCALE / 2)
    scale[...] = xp.where(finite, xp.where(due, larger, scale), scale / 2)
    good[...] = xp.where(due, 0, good)
    left_out[...] = xp.where(finite, left_out, left_out + 1)


def rounded(a: Array, compute: str | None) -> Array:
    """Return the operand `a` as a product in the format `compute` reads it, in its own dtype.

    To the nearest number with 10 bits of mantissa ("tf32", a tie away from 0; "float16", a tie to
    even) or 7 ("bfloat16", a tie to even); for "tf32" and "bfloat16" float64 is rounded to float32
    first. Sums are taken in the dtype of `a`.
    """
    if compute is None:
        return a
    check_format(compute)
    if a.dtype.kind != "f":
        raise UserError(f"a product in the format {compute} takes arrays of floats, got {a.dtype}: "
                        'cast them with .astype("float32")')
    with np.errstate(over="ignore"):  # beyond the largest number of a format lies infinity
        if compute == "tf32":
            xp = xp_of(a)
            whole = a.astype("float32")
            bits = whole.view(xp.uint32) + xp.uint32(1 << 12)
            near = (bits & xp.uint32(0xFFFFE000)).view(xp.float32)
            return xp.where(xp.isnan(whole), whole, near).astype(a.dtype)  # NaN has payloads
        return a.astype(bfloat16() if compute == "bfloat16" else compute).astype(a.dtype)
