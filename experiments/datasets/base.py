"""What a data set is, and what the loaders share: reading files, splits, standardisation."""

import errno
import functools
import gzip
import hashlib
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...backends import xp_of
from ...errors import UserError, one_line
from ...rng import stream


class Preparation(NamedTuple):
    """How data as they came were made into those of a `Dataset`.

    Attributes
    ----------
    x_mean, x_std : float64 arrays (N_0,) or None
        Of the inputs: ``(x - x_mean) / x_std`` stands in the data set; None: x as it came.
    y_mean, y_std : float64 arrays (outputs,) or None
        Likewise of the targets.
    classes : tuple of str, int, float or bool, or None
        The label of each class; None: its number.
    columns : tuple of str
        What the inputs are called, in their order; empty if they have no names.
    """

    x_mean: Any = None
    x_std: Any = None
    y_mean: Any = None
    y_std: Any = None
    classes: tuple[Any, ...] | None = None
    columns: tuple[str, ...] = ()

    def inputs(self, x: Any) -> Any:
        """Return inputs as they stand in a `Dataset`, float32 (..., N_0) if standardised."""
        return x if self.x_mean is None else self._standard(x, self.x_mean, self.x_std)

    def targets(self, y: Any) -> Any:
        """Return real targets as they stand in a `Dataset`, float32 (n, outputs)."""
        return y if self.y_mean is None else self._standard(y, self.y_mean, self.y_std)

    @staticmethod
    def _standard(values: Any, mean: Any, std: Any) -> Any:
        found = _scaled_down(values, mean, std)
        if not np.isfinite(found).all():
            raise UserError(f"a number of size {np.abs(values).max():.0e} is too far from those of "
                            "the training set: look for a slip in the data")
        return found


def _scaled_down(values: Any, mean: Any, std: Any) -> np.ndarray:
    with np.errstate(all="ignore"):  # who calls this looks at what comes out
        return ((np.asarray(values) - mean) / std).astype(np.float32)


AS_THEY_CAME = Preparation()
Image = tuple[int, int, int]  # colours, height, width
Factor = float | tuple[float, ...]  # one number, or one for each plane of an image


@dataclass(frozen=True)
class Dataset:
    """A data set in the memory of the host.

    Attributes
    ----------
    name : str
    task : {"classification", "regression"}
    x_train, x_val, x_test : arrays (n, N_0)
        uint8 for images (the red plane, then green, then blue, each row by row), else float32.
        Those for validation, and for the test, may be None.
    y_train, y_val, y_test : int64 class labels (n,), or float32 targets (n, outputs)
    outputs : int
        The number of classes, or of targets: the width of a network's output.
    scale, shift : float, or tuple of float
        A network's input is ``x * scale + shift``: one number, or one for each plane of an image.
    notice : str
        What the user should know about these data, one sentence; empty if nothing.
    preparation : Preparation
        What was done to them before.
    image : tuple (colours, height, width), or None
        The shape of an example, if it is an image.
    """

    name: str
    task: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray | None
    y_val: np.ndarray | None
    x_test: np.ndarray | None
    y_test: np.ndarray | None
    outputs: int
    scale: Factor = 1.0
    shift: Factor = 0.0
    notice: str = ""
    preparation: Preparation = AS_THEY_CAME
    image: Image | None = None

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of all examples, and of how each plane of them is scaled.

        A run goes on with the data it began with only.
        """
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_val, self.y_val, self.x_test, self.y_test):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        for factor in (self.scale, self.shift):
            if isinstance(factor, tuple):  # one number for all planes goes with the data's name
                digest.update(repr(factor).encode())
        return digest.hexdigest()

    def first(self, train: int | None, validation: int | None) -> "Dataset":
        """Return the first so many training and validation examples, and the whole test set."""
        x_val, y_val = (None if array is None else array[:validation]
                        for array in (self.x_val, self.y_val))
        return replace(self, x_train=self.x_train[:train], y_train=self.y_train[:train],
                       x_val=x_val, y_val=y_val)

    def normalised(self, mean: Factor, std: Factor) -> "Dataset":
        """Return these images with ``(x / 255 - mean) / std`` as a network's input.

        Parameters
        ----------
        mean, std : float, or tuple of float
            One number, or one for each colour.

        Raises
        ------
        UserError
            If these are no images of bytes, the numbers are not as many as the colours, or one is
            not finite, or a deviation not above 0.
        """
        if self.image is None or self.x_train.dtype != np.uint8:
            raise UserError(f"{self.name} holds no images of bytes, which alone are normalised by "
                            "their colours")
        planes = [np.broadcast_to(value, self.image[0]) if np.ndim(value) == 0 else np.array(value)
                  for value in (mean, std)]
        if not all(plane.shape == (self.image[0],) and np.isfinite(plane).all()
                   for plane in planes) or (planes[1] <= 0).any():
            raise UserError(f"to normalise {self.name}, mean and std must be finite, one number or "
                            f"one for each of {self.image[0]} colours, and std above 0, got mean "
                            f"{mean} and std {std}")
        m, s = planes
        return replace(self, scale=tuple((1 / (255 * s)).tolist()), shift=tuple((-m / s).tolist()))


# Bytes to [-1, 1], as published: (x/255 - 0.5) / 0.5.
IMAGE_SCALE, IMAGE_SHIFT = 2 / 255, -1.0


def spread(value: Any, N: int, dtype: str) -> Any:
    """Return numbers of planes as one for each of their `N` pixels, (N,); all else as it is."""
    if not isinstance(value, tuple):
        return value
    if not value or N % len(value):
        raise UserError(f"an example of {N} numbers cannot be divided into {len(value)} planes: "
                        "scale and shift are one number, or one for each plane of an image")
    return np.repeat(np.array(value, dtype), N // len(value))


def scaled(x: Any, scale: Any, shift: Any, dtype: str) -> Any:
    """Return a network's input ``x * scale + shift`` in `dtype`, on the backend of x (..., N_0).

    Numbers of planes are brought to the backend at each call, unless `spread` made them arrays.
    """
    xp = xp_of(x)
    scale, shift = (xp.asarray(spread(value, x.shape[-1], dtype)) if isinstance(value, tuple) else
                    value for value in (scale, shift))
    if isinstance(scale, Real) and isinstance(shift, Real) and (scale, shift) == (1, 0):
        return x.astype(dtype, copy=False)
    x = xp.multiply(x, scale, dtype=dtype)
    x += shift
    return x


class OfficialFile(NamedTuple):
    """A file to download: its name, address and hash (MD5 or SHA-256, in hex)."""

    name: str
    url: str
    hash: str


def new_hash(known: str) -> "hashlib._Hash":
    """Return a fresh hash object of the kind that gave `known`: MD5 has 32 digits, SHA-256 64."""
    return hashlib.new({32: "md5", 64: "sha256"}[len(known)], usedforsecurity=False)


def notice_of(unofficial: Sequence[str], place: Path, examples: int, tests: int) -> str:
    """Return what is odd about images of which these files are not the official ones, if any."""
    if not unofficial:
        return ""
    return (f"{', '.join(unofficial)} in {place}: not the official bytes (unknown hash), but of "
            f"the right format, and used: {examples} images for training and validation, {tests} "
            "for the test")


def is_official(content: bytes, known: str) -> bool:
    """Return whether the hash of `content` is the `known` one."""
    digest = new_hash(known)
    digest.update(content)
    return digest.hexdigest() == known


def remedy(name: str, files: Sequence[OfficialFile]) -> str:
    """Return what to do about a missing or damaged file of the data set `name`."""
    return (f"fetch it with: comet-np data --data DIR --fetch {name} "
            f"(from {' and '.join(file.url for file in files)})")


def reason(error: BaseException) -> str:
    """Return what an error says, on one line: its text may come from a damaged file."""
    text = one_line(getattr(error, "strerror", None) or str(error) or repr(error))
    return "".join(c if c.isprintable() else "?" for c in text[:200])


def exists(path: Path) -> bool:
    """Return whether there is anything of that name, be it a folder or a link to nothing.

    Raises
    ------
    UserError
        If that cannot be found out.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


def unreadable(path: Path, error: OSError) -> UserError:
    """Return the error for a file that is there but cannot be read: why, and what to do."""
    if os.path.islink(path) and error.errno in (errno.ENOENT, errno.ELOOP):
        return UserError(f"{path} is a link to {os.readlink(path)}, which is not there: mend the "
                         "link or remove it")
    todo = ("give yourself the right to read it" if isinstance(error, PermissionError)
            else "name another folder with --data")
    return UserError(f"cannot read {path} ({reason(error)}): {todo}")


def file_size(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises
    ------
    UserError
        If it is a folder, or a device or a pipe, which would go on forever, or a link to nothing.
    """
    try:
        info = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(info.st_mode):
        what = "a folder" if stat.S_ISDIR(info.st_mode) else "a device or a pipe"
        raise UserError(f"{path} is {what}, expected a file: move it away")
    return info.st_size


def not_found(name: str, folder: Path, expected: str, files: Sequence[OfficialFile]) -> UserError:
    """Return the error for a folder in which there is nothing of the data set `name`."""
    if folder.is_file():
        return UserError(f"{folder} is a file: name the folder of the data with --data")
    return UserError(f"no {name} in {folder}, which should hold {expected}: {remedy(name, files)}")


def find_file(folder: Path, name: str) -> Path | None:
    """Return the path of what is called `name` in `folder`, as it is or gzipped, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if exists(path)), None)


def read_file(folder: Path, name: str, limit: int) -> bytes:
    """Return the content of the file `name` in `folder`, which may be gzipped.

    Raises
    ------
    UserError
        If it cannot be read, is a damaged gzip file, or has more than `limit` bytes.
    """
    path = find_file(folder, name) or folder / name
    if file_size(path) > limit:
        raise _too_large(path, limit)
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            content = file.read(limit + 1)  # to the end, where the checksum is
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}, it is damaged ({reason(error)}): put the official "
                        "file there") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if len(content) > limit:
        raise _too_large(path, limit)
    return content


def _too_large(path: Path, limit: int) -> UserError:
    return UserError(f"{path} holds more than {limit} bytes, which is more than the official file "
                     "does: put that one there")


def split(n: int, seed: int, source: object = "a data set") -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the training set (80 %) and of the validation set (20 %), shuffled.

    Returns
    -------
    train, val : int64 arrays, a partition of 0..n-1 that depends on `n` and `seed` alone

    Raises
    ------
    UserError
        If one of them would be empty; `source` is what it says of where the rows come from.
    """
    if n < 5:
        raise UserError(f"{source}: expected at least 5 examples, as every fifth is for "
                        f"validation, got {n}")
    order = stream(seed, "split").permutation(n)
    return order[n // 5:], order[:n // 5]


def columns_of(name: str, target: int | str | None, known: range) -> list[int]:
    """Return the columns that `target` means: one of the `known`, "all", or None for the first.

    Raises
    ------
    UserError
        If there is no such target.
    """
    if target == "all":
        return list(known)
    if isinstance(target, str) and target.isdecimal():
        target = int(target)
    column = known[0] if target is None else target
    if column not in known:
        raise UserError(f'the target of "{name}" is one of {known[0]} to {known[-1]} or "all", '
                        f"got {target}")
    return [int(column)]


Pair = tuple[np.ndarray, np.ndarray]


def standardised(name: str, train: Pair, val: Pair, test: Pair | None = None,
                 notice: str = "") -> Dataset:
    """Return a regression data set with mean 0 and variance 1 in each column of the training set.

    Parameters
    ----------
    name : str
    train, val, test : pairs of float arrays x (n, N_0) and y (n, outputs)
        All are scaled by the statistics of `train`.
    notice : str

    Raises
    ------
    UserError
        If a column of the training set has one value only, or numbers are not finite or too large.
    """
    x, y = train
    with np.errstate(all="ignore"):
        to = Preparation(x.mean(axis=0), x.std(axis=0), y.mean(axis=0), y.std(axis=0))

    def scaled(part: Pair) -> Pair:
        results = []
        for kind, values, mean, std, of_train in zip(
                ("input", "target"), part, (to.x_mean, to.y_mean), (to.x_std, to.y_std), train,
                strict=True):
            found = _scaled_down(values, mean, std)
            # not by std == 0, which rounding may hide
            constant = np.isfinite(mean) & (of_train.min(axis=0) == of_train.max(axis=0))
            wrong = constant | ~(np.isfinite(found).all(axis=0) & np.isfinite(std))
            for column in np.flatnonzero(wrong):
                raise UserError(f"{name}: {kind} {column} " + (
                    "is the same in all examples of the training set: leave it out"
                    if constant[column] else
                    "has numbers that are not finite or far beyond the others: mend them"))
            results.append(found)
        return results[0], results[1]

    x_test, y_test = (None, None) if test is None else scaled(test)
    return Dataset(name, "regression", *scaled(train), *scaled(val), x_test, y_test,
                   outputs=y.shape[1], notice=notice, preparation=to)
