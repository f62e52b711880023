"""`glyphs`: generated images of street numbers in the shape of SVHN, with no download.

Ten classes, 32x32 pixels, 3 colours. The digits of matplotlib's bundled fonts are drawn once, large
and in several degrees of blur; an image is then one look-up into these drawings for each pixel.
Left and right of its digit an image may show parts of the neighbours in the house number, in the
same font and colour, as SVHN does. The same seed gives the same images (on one version of
matplotlib).
"""

import functools
from pathlib import Path

import numpy as np

from ...rng import stream
from .. import figures
from .base import IMAGE_SCALE, IMAGE_SHIFT, Dataset

Array = np.ndarray

SIDE = 32  # pixels
IMAGE = 3, SIDE, SIDE
SIZES = {"train": 8000, "val": 2000, "test": 2000}
# Images are made in blocks that fit in the processor's cache, each from a random stream of its own.
BLOCK = 250

# The bundled fonts that have digits (the others hold symbols, some under the digits' codes).
FONTS = (
    *(f"DejaVu{name}.ttf" for name in (
        "Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique", "SansMono", "SansMono-Bold",
        "Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic")),
    *(f"STIX{name}.ttf" for name in ("General", "GeneralBol", "GeneralItalic", "GeneralBolIta")),
    "cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf", "cmti10.ttf",
)
BLANK = 10 * len(FONTS)  # the drawing of no digit
CELL, HEIGHT = 80, 48  # pixels of a drawing: its sides, and the height of the digit inside
LIGHTER = 0.9  # the proportion of digits that are lighter than their wall
BLURS = (1.0, 1.5, 2.5, 3.5)  # standard deviations of the blur, in pixels of a drawing


def load(seed: int) -> Dataset:
    """Return the data set: 8000 images for training, 2000 each for validation and test.

    Raises
    ------
    UserError
        If matplotlib is not installed.
    """
    return Dataset("glyphs", "classification", *images(seed, "train", SIZES["train"]),
                   *images(seed, "val", SIZES["val"]), *images(seed, "test", SIZES["test"]),
                   10, IMAGE_SCALE, IMAGE_SHIFT, image=IMAGE)


def images(seed: int, split: str, n: int) -> tuple[Array, Array]:
    """Return the first `n` images of a split.

    Returns
    -------
    x : uint8 array (n, 3072), the red, green and blue planes of 32x32 pixels
    y : int64 array (n,), the digits
    """
    x, y = np.empty((n, 3 * SIDE * SIDE), np.uint8), np.empty(n, np.int64)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        block_x, block_y = _block(stream(seed, "glyphs", split, start))
        x[rows], y[rows] = block_x[:rows.stop - start], block_y[:rows.stop - start]
    return x, y


@functools.cache
def drawings() -> tuple[Array, Array]:
    """Return all digits of all fonts, drawn large.

    Returns
    -------
    ink : uint8 array (blurs, 10 * fonts + 1, CELL, CELL)
        How much of each pixel is covered, 0 to 255; digit d of font f is number 10 f + d, the last
        one is blank.
    widths : float32 array (fonts,)
        The width of each font's widest digit, in heights of a digit.
    """
    matplotlib = figures.matplotlib('the data set "glyphs" draws its digits with matplotlib')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D
    from scipy.ndimage import gaussian_filter  # here, as it takes a quarter of a second to load

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    sheet = Figure(figsize=(10 * CELL, len(FONTS) * CELL), dpi=1, facecolor="white")
    sheet.set_layout_engine("none")
    canvas = FigureCanvasAgg(sheet)
    widths = np.zeros(len(FONTS), np.float32)
    for row, font in enumerate(FONTS):
        for digit in range(10):
            path = TextPath((0, 0), str(digit), prop=FontProperties(fname=folder / font))
            box = path.get_extents()
            widths[row] = max(widths[row], box.width / box.height)
            place = (Affine2D().translate(-box.x0 - box.width / 2, -box.y0 - box.height / 2)
                     .scale(HEIGHT / box.height)
                     .translate((digit + 0.5) * CELL, (row + 0.5) * CELL))
            sheet.add_artist(PathPatch(path, transform=place, color="black", linewidth=0,
                                       antialiased=True))
    canvas.draw()
    # (fonts * CELL, 10 * CELL), the first font at the bottom as matplotlib counts rows from there
    page = 255 - np.asarray(canvas.buffer_rgba())[..., 0]
    cells = page.reshape(len(FONTS), CELL, 10, CELL)[::-1].swapaxes(1, 2).reshape(-1, CELL, CELL)
    cells = np.concatenate([cells, np.zeros((1, CELL, CELL), np.uint8)])
    return np.stack([gaussian_filter(cells, (0, blur, blur)) for blur in BLURS]), widths


def _block(rng: np.random.Generator) -> tuple[Array, Array]:
    """Return BLOCK images: uint8 (BLOCK, 3072), and their digits, int64 (BLOCK,)."""
    digits = rng.integers(10, size=(BLOCK, 3))  # the left neighbour, the image's digit, the right
    wall, paint = _colours(rng)
    x = _ink(rng, digits)[:, None] * paint  # (BLOCK, 3, SIDE, SIDE)
    x += wall
    x += _light(rng)[:, None]
    grain = rng.integers(256, size=x.shape, dtype=np.uint8)
    x += (grain - np.float32(127.5)) * _uniform(rng, 0, 0.2, 4)
    np.clip(x, 0, 255, out=x)
    return x.astype(np.uint8).reshape(BLOCK, -1), digits[:, 1].astype(np.int64)


def _uniform(rng: np.random.Generator, low: float, high: float, ndim: int = 3) -> Array:
    """Return a number for each image of a block: float32 (BLOCK, 1, ...) of `ndim` dimensions."""
    draw = rng.random((BLOCK,) + (1,) * (ndim - 1), np.float32)
    return draw * np.float32(high - low) + np.float32(low)


def _ink(rng: np.random.Generator, digits: Array) -> Array:
    """Return how much of each pixel the digits cover, 0 to 1: float32 (BLOCK, SIDE, SIDE)."""
    ink, widths = drawings()
    font = rng.integers(len(FONTS), size=(BLOCK, 1))
    number = 10 * font + digits  # (BLOCK, 3)
    number[:, ::2][rng.random((BLOCK, 2)) < 0.4] = BLANK
    blur = rng.integers(len(BLURS), size=(BLOCK, 1))
    # The line of digits in its own coordinates u (along), v (down), in heights of a digit.
    height = _uniform(rng, 18, 28)
    width = height * _uniform(rng, 0.75, 1.15)
    angle = _uniform(rng, -0.2, 0.2)
    slant = _uniform(rng, -0.25, 0.25)
    x, y = _axes(_uniform(rng, -2, 2), _uniform(rng, -2, 2))
    cos, sin = np.cos(angle), np.sin(angle)
    v = cos / height * y - sin / height * x  # (BLOCK, SIDE, SIDE)
    u = cos / width * x + sin / width * y
    u += slant * v
    pitch = widths[font][..., None] + _uniform(rng, 0.05, 0.25)
    place = np.clip(np.rint(u / pitch), -1, 1)  # which of the three digits is near
    u -= place * pitch

    def pixel(position: Array) -> Array:
        return np.clip(position * HEIGHT + CELL / 2, 0, CELL - 1).astype(np.int32)

    first = ((blur * len(ink[0]) + number) * CELL**2).astype(np.int32)  # (BLOCK, 3)
    here = place.astype(np.int32) + np.arange(1, 3 * BLOCK, 3, dtype=np.int32)[:, None, None]
    index = first.reshape(-1)[here] + pixel(v) * CELL + pixel(u)
    return ink.reshape(-1)[index] * np.float32(1 / 255)


def _axes(x0: Array | float = 0, y0: Array | float = 0) -> tuple[Array, Array]:
    """Return the pixels' x (to the right) and y (down), 0 at (x0, y0) from the image's middle."""
    middle = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
    return middle - x0, middle[:, None] - y0


def _colours(rng: np.random.Generator) -> tuple[Array, Array]:
    """Return the colour of the wall, and what the digits add to it: float32 (BLOCK, 3, 1, 1)."""
    sign = np.where(rng.random((BLOCK, 1, 1, 1)) < LIGHTER, np.float32(1), np.float32(-1))
    grey = 127.5 - sign * _uniform(rng, -20, 110, 4)
    contrast = sign * _uniform(rng, 30, 150, 4)
    tints = rng.standard_normal((2, BLOCK, 3, 1, 1), np.float32) * np.float32(10)
    return grey + tints[0], contrast + tints[1]


def _light(rng: np.random.Generator) -> Array:
    """Return the light on the wall, without colour: float32 (BLOCK, SIDE, SIDE).

    A gradient, blotches, and stripes such as boards or bricks make.
    """
    x, y = _axes()
    light = _uniform(rng, -1.5, 1.5) * x + _uniform(rng, -1.5, 1.5) * y
    blotches = rng.standard_normal((BLOCK, 5, 5), np.float32) * _uniform(rng, 0, 15)
    spread = np.maximum(0, 1 - np.abs(np.linspace(0, 4, SIDE, dtype=np.float32)[:, None]
                                      - np.arange(5, dtype=np.float32)))  # linear interpolation
    light += spread @ blotches @ spread.T
    # cos(a + b) by its parts: the cosines of a row and of a column instead of those of all pixels
    a = _uniform(rng, -1.2, 1.2) * x + _uniform(rng, 0, 6.3)
    b = _uniform(rng, -1.2, 1.2) * y
    stripes = np.cos(a) * np.cos(b)
    stripes -= np.sin(a) * np.sin(b)
    light += stripes * np.maximum(0, _uniform(rng, -12, 12))  # every other wall has none
    return light
