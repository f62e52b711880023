"""Tiny ImageNet: 200 classes of photographs, 64x64 pixels, from its official archive or folder.

A class has 500 training images, and 50 of the official validation set, which is the test set here:
the labels of the official test set were never published. Fewer classes will do as well.
"""

import functools
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError
from .base import (
    IMAGE_SCALE,
    IMAGE_SHIFT,
    Dataset,
    OfficialFile,
    Preparation,
    exists,
    file_size,
    is_official,
    not_found,
    read_file,
    reason,
    remedy,
    split,
    unreadable,
)

NAME, FOLDER = "tiny_imagenet", "tiny-imagenet-200"
ARCHIVE = OfficialFile(f"{FOLDER}.zip", f"http://cs231n.stanford.edu/{FOLDER}.zip",
                       "90528d7ca1a48142e341f4ef8d21d0de")
DOWNLOADS = (ARCHIVE,)
CLASSES, TRAIN, TEST = 200, 100_000, 10_000  # of which, in all, there are so many images
IMAGE = 3, 64, 64
LABELS = "val/val_annotations.txt"  # a line an image: its name, its class, and its object's box
TRAINING = re.compile(r"train/(n\d+)/images/[^/.][^/]*\.JPEG")
TESTING = re.compile(r"val/images/([^/.][^/]*\.JPEG)")
LARGEST = 1 << 20  # bytes of a file, far more than an image or the labels have
LARGEST_ARCHIVE = 1 << 28
AT_ONCE = 100  # images that a thread decodes in a turn


class Listing(NamedTuple):
    """What images there are.

    train : for each class, in order, the names of its training images
    test : of those of the official validation set
    """

    train: dict[str, list[str]]
    test: list[str]

    @property
    def images(self) -> int:
        """How many there are for training and validation."""
        return sum(map(len, self.train.values()))

    @property
    def whole(self) -> bool:
        """Whether these are as many as the official ones."""
        return (len(self.train), self.images, len(self.test)) == (CLASSES, TRAIN, TEST)


def locate(folder: Path) -> Path | None:
    """Return the folder of the images, in `folder` or itself, or an archive in it."""
    for place in (folder / FOLDER, folder):
        if exists(place / LABELS) and exists(place / "train"):
            return place
    official = folder / ARCHIVE.name
    others = sorted(folder.glob("tiny-imagenet-*.zip"))
    return official if exists(official) else next(iter(others), None)


def status(folder: Path) -> tuple[str, Path | None]:
    """Return "found", "incomplete", "unreadable", "missing" or how many images, and where."""
    place = locate(folder)
    if place is None:
        part = folder / FOLDER
        return ("incomplete", part) if part.is_dir() else ("missing", None)
    try:
        listing = _listing(place, stamp(folder))
    except UserError:
        return "unreadable", place
    found = listing.images + len(listing.test)
    return "found" if listing.whole else f"{found:,} of {TRAIN + TEST:,} images", place


def stamp(folder: Path) -> Any:
    """Return by what a change of the files in `folder` is noticed; None if there are none."""
    place = locate(folder)
    if place is None:
        return None
    parts = (place,) if place.suffix == ".zip" else (place / "train", place / "val" / "images")
    try:
        return place, *(part.stat().st_mtime_ns for part in parts)
    except OSError:
        return place


def pillow() -> Any:
    """Return Pillow's module of images.

    Raises
    ------
    UserError
        If it is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise UserError(f'the data set "{NAME}" is decoded by Pillow: python -m pip install Pillow'
                        ) from None
    return Image


def load(folder: Path, seed: int) -> Dataset:
    """Return the data set found in `folder`; 20 % of its training images are for validation.

    Its classes are those that have training images, in the order of their names.

    Raises
    ------
    UserError
        If it is not there, incomplete, damaged, or of another format, or Pillow is not installed.
    """
    pillow()
    place = locate(folder)
    if place is None:
        raise _not_found(folder)
    listing = _listing(place, stamp(folder))
    classes = list(listing.train)
    if len(classes) < 2:
        raise UserError(f"{place} holds training images of {len(classes)} classes, and two are the "
                        f"least: {remedy(NAME, DOWNLOADS)}")
    y = np.repeat(np.arange(len(classes)), list(map(len, listing.train.values())))
    train, val = split(len(y), seed, place)
    names = [name for of_class in listing.train.values() for name in of_class]
    with _reader(place) as (read, official):
        labels = _labels(place, read(LABELS))
        known = [(name, classes.index(label)) for name in listing.test
                 if (label := _label(place, labels, name)) in listing.train]
        if not known:
            raise UserError(f"{place} holds no validation images of the classes that it holds "
                            f"training images of: {remedy(NAME, DOWNLOADS)}")
        x = _decoded(place, read, [names[row] for row in (*train, *val)])
        x_test = _decoded(place, read, [name for name, _ in known])
    notice = ""
    if not (listing.whole if official is None else official):
        what = ("not all of the official images" if official is None else
                "not the official bytes (unknown hash), but of the right format")
        notice = (f"{place}: {what}, and used: {len(classes)} of {CLASSES} classes, {len(y)} "
                  f"images for training and validation, {len(known)} for the test")
        if len(known) < len(listing.test):
            notice += f" ({len(listing.test) - len(known)} are of other classes and left out)"
    return Dataset(NAME, "classification", x[:len(train)], y[train], x[len(train):], y[val], x_test,
                   np.array([label for _, label in known]), len(classes), IMAGE_SCALE, IMAGE_SHIFT,
                   notice, Preparation(classes=tuple(classes)), IMAGE)


def _not_found(folder: Path) -> UserError:
    place = folder / FOLDER
    if place.is_dir():
        lacking = [name for name in (LABELS, "train") if not exists(place / name)]
        return UserError(f"{place} lacks {' and '.join(lacking)}: {remedy(NAME, DOWNLOADS)}")
    return not_found(NAME, folder, f"{FOLDER}/ or {ARCHIVE.name}", DOWNLOADS)


@functools.lru_cache(maxsize=1)
def _listing(place: Path, stamp: Any) -> Listing:
    """Return what images there are in a folder or an archive; the `stamp` is that of its files."""
    if place.suffix == ".zip":
        file_size(place)  # it is a file
        try:
            with open_archive(place, place) as archive:
                names = list(archive)
        except PermissionError as error:
            raise unreadable(place, error) from error
    else:
        names = _names_in(place)
    train: dict[str, list[str]] = {}
    for name in sorted(names):
        if match := TRAINING.fullmatch(name):
            train.setdefault(match[1], []).append(name)
    return Listing(train, sorted(name for name in names if TESTING.fullmatch(name)))


def _names_in(place: Path) -> list[str]:
    """Return the names of all files in the folders of images."""
    try:
        folders = [f"train/{name}/images" for name in os.listdir(place / "train")]
        return [f"{folder}/{name}" for folder in (*folders, "val/images")
                if (place / folder).is_dir() for name in os.listdir(place / folder)]
    except OSError as error:
        raise unreadable(Path(error.filename or place), error) from error


@contextmanager
def open_archive(place: Path, source: Any) -> Iterator[dict[str, Callable[[], bytes]]]:
    """Yield, for each file within an archive, a function that reads it.

    Raises
    ------
    UserError
        If the archive is damaged, also while its files are read.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            members = {info.filename: info for info in archive.infolist()}
            root = next((name.removesuffix(LABELS) for name in members if name.endswith(LABELS)),
                        None)
            if root is None:
                raise ValueError(f"it holds no {LABELS}")
            yield {name.removeprefix(root): functools.partial(_member, archive, info)
                   for name, info in members.items() if name.startswith(root)}
    except (UserError, PermissionError):
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, OSError,
            struct.error, OverflowError) as error:
        raise UserError(f"{place} is a damaged archive ({reason(error)}): remove it and "
                        f"{remedy(NAME, DOWNLOADS)}") from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is packed as the official ones are not")
    if info.file_size > LARGEST:
        raise ValueError(f"{info.filename} has {info.file_size} bytes, more than an image")
    return archive.read(info)


@contextmanager
def _reader(place: Path) -> Iterator[tuple[Callable[[str], bytes], bool | None]]:
    """Yield a function that reads a file, and whether the archive is the official one, if any."""
    if place.suffix != ".zip":
        yield (lambda name: read_file(place, name, LARGEST)), None
        return
    content = read_file(place.parent, place.name, LARGEST_ARCHIVE)
    with open_archive(place, io.BytesIO(content)) as archive:
        yield (lambda name: archive[name]()), is_official(content, ARCHIVE.hash)


def _labels(place: Path, content: bytes) -> dict[str, str]:
    """Return the class of each image of the official validation set."""
    lines = [line.split("\t")[:2] for line in content.decode("ascii", "replace").splitlines()]
    if not all(len(line) == 2 for line in lines):
        raise UserError(f"{place / LABELS}: expected an image's name, a tab and its class in each "
                        f"line; remove it and {remedy(NAME, DOWNLOADS)}")
    return dict(lines)


def _label(place: Path, labels: dict[str, str], name: str) -> str:
    short = name.rpartition("/")[2]
    if short not in labels:
        raise UserError(f"{place / LABELS} says no class of {short}: remove it and "
                        f"{remedy(NAME, DOWNLOADS)}")
    return labels[short]


def _decoded(place: Path, read: Callable[[str], bytes], names: Sequence[str]) -> np.ndarray:
    """Return these images: uint8 (n, 12288), the red plane, then green, then blue.

    In threads, as Pillow's decoder does not hold Python's lock.
    """
    x = np.empty((len(names), *IMAGE), np.uint8)

    def decode(start: int) -> None:
        for i, name in enumerate(names[start:start + AT_ONCE], start):
            x[i] = _pixels(read(name), place, name).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        try:
            for _ in pool.map(decode, range(0, len(names), AT_ONCE)):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return x.reshape(len(x), math.prod(IMAGE))


def _pixels(content: bytes, place: Path, name: str) -> np.ndarray:
    """Return the image in a JPEG file: uint8 (64, 64, 3); of grey, three equal colours."""
    Image = pillow()
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            if image.size != IMAGE[:0:-1]:
                raise ValueError("{}x{} pixels".format(*image.size))
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:
        raise UserError(f"{place / name}: expected a JPEG image of {IMAGE[2]}x{IMAGE[1]} pixels, "
                        f"got something else ({reason(error)}); remove {place} and "
                        f"{remedy(NAME, DOWNLOADS)}") from error
