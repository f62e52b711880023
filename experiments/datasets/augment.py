"""Augmentation of images: mirrored and shifted copies, the same on every backend.

What is random, one integer for each example, is drawn on the host from a named stream; what is
costly, the moving of pixels, happens where the images lie and follows from that integer alone. So
a run sees the same images on NumPy and CuPy, and after a resume.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ...backends import xp_of
from ...errors import UserError, unknown
from .base import Image

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
    apply : function (x, choices, image) -> array of the shape and dtype of x
        See `apply`.
    """

    draw: Callable[[np.random.Generator, int], np.ndarray]
    apply: Callable[[Array, Array, Image | None], Array]


def draw(choices: range, generator: np.random.Generator, n: int) -> np.ndarray:
    """Return `n` of the `choices`, each equally likely: int64 array (n,)."""
    return choices.start + choices.step * generator.integers(len(choices), size=n)


def apply(x: Array, choices: Array, image: Image | None) -> Array:
    """Return the images x as the choices change them: moved, 0 beyond the border, then mirrored.

    The host does not wait, so this may be part of a CUDA graph.

    Parameters
    ----------
    x : array (..., colours * height * width) of any dtype, not written to
        A plane of pixels for each colour; before `Dataset.scale` and `shift`, where 0 is black.
    choices : int64 array (...,) on the backend of x
        As `Augmentation.draw` returns them; unchecked, for the host would have to wait.
    image : tuple (colours, height, width)
        See `Dataset.image`.

    Returns
    -------
    array of the shape and dtype of x
        Pixel (i, j) is pixel (i + dy, j + dx) of x, or if mirrored, (i + dy, width - 1 - j + dx).

    Raises
    ------
    UserError
        If there is no such image on the last axis of x.
    """
    if image is None or x.shape[-1:] != (math.prod(image),):
        expected = ("these data say no image's shape" if image is None else
                    f"expected {math.prod(image)} values on the last axis ({image[0]} colours of "
                    f"{image[1]}x{image[2]} pixels)")
        raise UserError(f"an augmentation needs images: {expected}, got an array of shape "
                        f"{x.shape}; take a data set of images, or train without augmentation")
    xp, (_, height, width) = xp_of(x), image
    high, wide = height + 2 * MARGIN, width + 2 * MARGIN
    planes = x.reshape(-1, *image).swapaxes(0, 1)
    # Colours first, as all planes of an image move alike: 0.07 ms for 32 images of bytes and 0.28
    # for 128, on a core of an AMD EPYC. With an index for each byte, 0.11 and 0.40; with indices
    # clipped at the border instead of a margin, times their validity, 0.31 and 1.17.
    padded = xp.zeros((*planes.shape[:2], high, wide), x.dtype)
    padded[..., MARGIN:-MARGIN, MARGIN:-MARGIN] = planes
    choices = choices.reshape(-1, 1)
    mirrored, crop = choices & 1, (choices >> 1) + SHIFTS**2 // 2
    number = xp.arange(planes.shape[1])[:, None]
    rows = wide * (high * number + crop // SHIFTS + xp.arange(height))
    columns = crop % SHIFTS + abs(mirrored * (width - 1) - xp.arange(width))
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
