"""SARCOS: the inverse dynamics of a 7-joint robot arm, from its two official .mat files.

44,484 training and 4449 test rows of 28 columns: 7 joint angles, velocities and accelerations, and
7 torques. Almost all rows of the official test file also occur in the training file, so results on
the held-out training rows (`x_val`) say more than those on `x_test`.
"""

import zlib
from pathlib import Path

import numpy as np

from ...errors import UserError
from .base import (
    Dataset,
    OfficialFile,
    columns_of,
    find_file,
    is_official,
    not_found,
    read_file,
    reason,
    remedy,
    split,
    standardised,
)
from .mat import DOUBLES, HEADERS, Layout, read_mat

ADDRESS = "http://www.gaussianprocess.org/gpml/data/"
TRAIN = OfficialFile("sarcos_inv.mat", ADDRESS + "sarcos_inv.mat",
                     "b8a249733253ba6097372fedee7696833fcf30de42037d5b4a7227f21a6d1d97")
TEST = OfficialFile("sarcos_inv_test.mat", ADDRESS + "sarcos_inv_test.mat",
                    "161a59b5c3b4f4b404584323f181607b2acbe620eb134dc720760dc3f38f5cec")
DOWNLOADS = (TRAIN, TEST)
INPUTS, COLUMNS = 21, 28
ROWS = {TRAIN.name: 44_484, TEST.name: 4449}


def locate(folder: Path) -> Path | None:
    """Return `folder` or its subfolder ``sarcos``: where both files are, or just the test file."""
    places = [place for place in (folder / "sarcos", folder) if find_file(place, TEST.name)]
    return max(places, key=lambda place: find_file(place, TRAIN.name) is not None, default=None)


def status(folder: Path) -> tuple[str, Path | None]:
    """Return "found", "test file only" or "missing", and where."""
    place = locate(folder)
    if place is None:
        return "missing", None
    return "found" if find_file(place, TRAIN.name) else "test file only", place


def load(folder: Path, seed: int, target: int | str | None = None) -> Dataset:
    """Return the data set found in `folder`, standardised by the statistics of its training set.

    20 % of the training rows are held out for validation. If the training file is not there, the
    rows of the test file take its place, for trials, and there is no test set.

    Parameters
    ----------
    folder : Path
    seed : int
        Of the split.
    target : int or "all", optional
        The column to predict, 21 (the first joint's torque, as in Rasmussen & Williams, the
        default) to 27, or all seven. The paper's published code takes 22.

    Raises
    ------
    UserError
        If the files are missing or damaged, or there is no such target.
    """
    targets = columns_of("sarcos", target, range(INPUTS, COLUMNS))
    place = locate(folder)
    if place is None:
        raise not_found("sarcos", folder, f"{TRAIN.name} and {TEST.name}", DOWNLOADS)
    found = [file for file in DOWNLOADS if find_file(place, file.name)]
    rows, official = zip(*(_read(place, file) for file in found), strict=True)
    notices = [f"{file.name} in {place} is not the official file (unknown hash), but of the right "
               "format and used" for file, known in zip(found, official, strict=True) if not known]
    if len(found) == 1:
        notices.append(f"{TRAIN.name} is missing: rows of {TEST.name} are used for training and "
                       "validation, good for trials only")
    constant = rows[0].min(axis=0) == rows[0].max(axis=0)
    for column in np.flatnonzero(constant):
        raise UserError(f"{place / found[0].name}: column {column} is the same in all rows, which "
                        f"teaches nothing; remove the file and {remedy('sarcos', DOWNLOADS)}")
    train, val = split(len(rows[0]), seed, place / found[0].name)

    def pair(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return part[:, :INPUTS], part[:, targets]

    return standardised("sarcos", pair(rows[0][train]), pair(rows[0][val]),
                        pair(rows[1]) if len(rows) == 2 else None, "; ".join(notices))


def _read(place: Path, file: OfficialFile) -> tuple[np.ndarray, bool]:
    """Return a file's rows, float64 (n, COLUMNS), and whether it is the official one."""
    name, limit = Path(file.name).stem, ROWS[file.name] * COLUMNS * 8 + HEADERS
    content = read_file(place, file.name, limit)
    official = is_official(content, file.hash)
    try:
        rows, = read_mat(content, [Layout(name, (0, COLUMNS), (DOUBLES,))], limit, official)
        for row, column in np.argwhere(~np.isfinite(rows)):
            raise ValueError(f"{rows[row, column]} in row {row}, column {column}")
    except (ValueError, zlib.error) as error:
        raise UserError(f'{place / file.name}: expected a MATLAB 5 file with nothing but an array '
                        f'"{name}" of {COLUMNS} columns of finite doubles, got something else '
                        f"({reason(error)}); remove it and {remedy('sarcos', DOWNLOADS)}"
                        ) from error
    return rows, official
