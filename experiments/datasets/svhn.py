"""SVHN: digits cut from photographs of house numbers, from its two official .mat files.

73,257 training and 26,032 test images of 32x32 pixels ("format 2", without the extra ones).
"""

import math
import zlib
from pathlib import Path

import numpy as np

from ...errors import UserError
from .base import (
    IMAGE_SCALE,
    IMAGE_SHIFT,
    Dataset,
    OfficialFile,
    find_file,
    is_official,
    not_found,
    notice_of,
    read_file,
    reason,
    remedy,
    split,
)
from .mat import BYTES, DOUBLES, DOUBLES_IN_BYTES, HEADERS, Layout, read_mat

ADDRESS = "http://ufldl.stanford.edu/housenumbers/"
TRAIN = OfficialFile("train_32x32.mat", ADDRESS + "train_32x32.mat",
                     "e26dedcc434d2e4c54c9b2d4a06d8373")
TEST = OfficialFile("test_32x32.mat", ADDRESS + "test_32x32.mat",
                    "eb5a983be6a315427106f1b164d9cef3")
DOWNLOADS = (TRAIN, TEST)
IMAGES = {TRAIN.name: 73_257, TEST.name: 26_032}
IMAGE = 3, 32, 32
X = Layout("X", (32, 32, 3, 0), (BYTES,))  # row, column, colour, example
Y = Layout("y", (0, 1), (BYTES, DOUBLES_IN_BYTES, DOUBLES))


def locate(folder: Path) -> Path | None:
    """Return `folder` or its subfolder ``svhn``: where the files are, or one of them."""
    found = {place: sum(find_file(place, file.name) is not None for file in DOWNLOADS)
             for place in (folder / "svhn", folder)}
    place = max(found, key=lambda place: found[place])
    return place if found[place] else None


def status(folder: Path) -> tuple[str, Path | None]:
    """Return "found", "incomplete" or "missing", and where."""
    place = locate(folder)
    if place is None:
        return "missing", None
    whole = all(find_file(place, file.name) for file in DOWNLOADS)
    return "found" if whole else "incomplete", place


def load(folder: Path, seed: int) -> Dataset:
    """Return the data set found in `folder`; 20 % of its training images are for validation.

    Raises
    ------
    UserError
        If it is not there, incomplete, damaged, or of another format.
    """
    place = locate(folder)
    if place is None:
        raise not_found("svhn", folder, f"{TRAIN.name} and {TEST.name}", DOWNLOADS)
    for file in DOWNLOADS:
        if not find_file(place, file.name):
            raise UserError(f"{place} lacks {file.name}: {remedy('svhn', DOWNLOADS)}")
    (x, y, *_), (x_test, y_test, _) = parts = [_read(place, file) for file in DOWNLOADS]
    names = [file.name for file, (*_, official) in zip(DOWNLOADS, parts, strict=True)
             if not official]
    notice = notice_of(names, place, len(x), len(x_test))
    train, val = split(len(x), seed, place / TRAIN.name)
    return Dataset("svhn", "classification", x[train], y[train], x[val], y[val], x_test, y_test, 10,
                   IMAGE_SCALE, IMAGE_SHIFT, notice, image=IMAGE)


def _read(place: Path, file: OfficialFile) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return a file's images (n, 3072) and digits (n,), and whether it is the official one."""
    limit = IMAGES[file.name] * (math.prod(IMAGE) + 8) + HEADERS
    content = read_file(place, file.name, limit)
    official = is_official(content, file.hash)
    try:
        x, y = read_mat(content, (X, Y), limit, official)
        if len(y) != x.shape[-1]:
            raise ValueError(f"{x.shape[-1]} images and {len(y)} digits")
        if not np.isin(y, range(1, 11)).all():
            raise ValueError("a digit that is none of them")
    except (ValueError, zlib.error) as error:
        raise UserError(f'{place / file.name}: expected a MATLAB 5 file with nothing but an array '
                        '"X" of (32, 32, 3, n) bytes and an array "y" of (n, 1) digits, 1 to 9 and '
                        f"10 for 0, got something else ({reason(error)}); remove it and "
                        f"{remedy('svhn', DOWNLOADS)}") from error
    planes = x.transpose(3, 2, 0, 1).reshape(len(y), -1)
    return planes, y[:, 0].astype(np.int64) % 10, official
