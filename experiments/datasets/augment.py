"""Augmentation of images: mirrored and shifted copies, the same on every backend.

What is random, one integer for each example, is drawn on the host from a named stream; what is
costly, the moving of pixels, happens where the images lie and follows from that integer alone. So
a run sees the same images on NumPy and CuPy, and after a resume.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...backends import xp_of
from ...errors import UserError, unknown
from .cifar import PIXELS
from .glyphs import SIDE

Array = Any

MARGIN = 4  # pixels that a crop may move an image by: He et al. 2016, sec. 4.2
SHIFTS = 2 * MARGIN + 1  # in each direction
# A choice is mirrored + 2 * (SHIFTS * dy + dx), dy and dx from -MARGIN to MARGIN, so 0 changes
# nothing. These are the choices of each augmentation, all equally likely.
CHOICES = {"flip": range(2),
           "crop": range(1 - SHIFTS**2, SHIFTS**2, 2),
           "crop_flip": range(1 - SHIFTS**2, SHIFTS**2 + 1)}


class Augmentation(NamedTuple):
    """A random change of images, in two halves.

    draw : function (generator, n) -> int64 array (n,)
        A choice for each of n examples, on the host; a function of the generator's stream alone.
    apply : function (x, choices) -> array of the shape and dtype of x
        See `apply`.
    """

    draw: Callable[[np.random.Generator, int], np.ndarray]
    apply: Callable[[Array, Array], Array]


def draw(choices: range, generator: np.random.Generator, n: int) -> np.ndarray:
    """Return `n` of the `choices`, each equally likely: int64 array (n,)."""
    return choices.start + choices.step * generator.integers(len(choices), size=n)


def apply(x: Array, choices: Array) -> Array:
    """Return the images x as the choices change them: moved, 0 beyond the border, then mirrored.

    The host does not wait, so this may be part of a CUDA graph.

    Parameters
    ----------
    x : array (..., 3072) of any dtype, not written to
        Red, green and blue planes of 32x32 pixels; before `Dataset.scale` and `shift`, where 0 is
        black.
    choices : int64 array (...,) on the backend of x
        As `Augmentation.draw` returns them; unchecked, for the host would have to wait.

    Returns
    -------
    array of the shape and dtype of x
        Pixel (i, j) is pixel (i + dy, j + dx) of x, or if mirrored, (i + dy, 31 - j + dx).

    Raises
    ------
    UserError
        If the last axis of x is not an image.
    """
    if x.shape[-1:] != (PIXELS,):
        raise UserError(f"an augmentation needs images of {PIXELS} values on the last axis (3 "
                        f"colours of {SIDE}x{SIDE} pixels), got an array of shape {x.shape}: take "
                        "a data set of images, or train without augmentation")
    xp, width = xp_of(x), SIDE + 2 * MARGIN
    planes = x.reshape(-1, PIXELS // SIDE**2, SIDE, SIDE).swapaxes(0, 1)
    # Colours first, as all planes of an image move alike: 0.07 ms for 32 images of bytes and 0.28
    # for 128, on a core of an AMD EPYC. With an index for each byte, 0.11 and 0.40; with indices
    # clipped at the border instead of a margin, times their validity, 0.31 and 1.17.
    padded = xp.zeros((*planes.shape[:2], width, width), x.dtype)
    padded[..., MARGIN:-MARGIN, MARGIN:-MARGIN] = planes
    choices = choices.reshape(-1, 1)
    mirrored, crop = choices & 1, (choices >> 1) + SHIFTS**2 // 2
    pixel = xp.arange(SIDE)
    rows = width * (width * xp.arange(planes.shape[1])[:, None] + crop // SHIFTS + pixel)
    columns = crop % SHIFTS + abs(mirrored * (SIDE - 1) - pixel)
    moved = padded.reshape(len(planes), -1).take(rows[:, :, None] + columns[:, None], axis=1)
    return moved.swapaxes(0, 1).reshape(x.shape)


AUGMENTATIONS = {name: Augmentation(partial(draw, choices), apply)
                 for name, choices in CHOICES.items()}


def augmentation(name: str) -> Augmentation:
    """Return the augmentation called `name`.

    Raises
    ------
    UserError
        If there is none.
    """
    if name not in AUGMENTATIONS:
        raise unknown("augmentation", name, AUGMENTATIONS)
    return AUGMENTATIONS[name]
