"""CIFAR10 and CIFAR100 from their official files: binary or python version, packed or unpacked."""

import gzip
import io
import math
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from .base import (
    IMAGE_SCALE,
    IMAGE_SHIFT,
    Dataset,
    OfficialFile,
    exists,
    file_size,
    find_file,
    is_official,
    not_found,
    notice_of,
    read_file,
    reason,
    remedy,
    split,
    unreadable,
)
from .pickles import read_pickle

Array = np.ndarray

IMAGE = 3, 32, 32
PIXELS = math.prod(IMAGE)  # bytes of an image: red, then green, then blue
EXTRA = 128  # bytes that a file may hold besides, for each image: its labels and its name
OTHER = 1 << 20  # bytes that an archive may hold besides the files
CHUNK = 1 << 18
IMAGES = {"train": 50_000, "train.bin": 50_000}  # in the other official files: 10,000
ADDRESS = "https://www.cs.toronto.edu/~kriz/"


class Version(NamedTuple):
    """A form in which a data set is distributed.

    folder : the name of the folder that the archive unpacks to.
    archive, md5 : the name of the archive and its hash.
    files : the name and MD5 of each file, the test set last.
    parse : from a file's content to pixels (n, PIXELS) and labels (n,).
    """

    folder: str
    archive: str
    md5: str
    files: dict[str, str]
    parse: Callable[[bytes, "Cifar"], tuple[Array, Array]]


class Cifar(NamedTuple):
    """One of the two data sets.

    label_bytes : before the pixels of a binary record; the last of them is the class.
    label_key : under which the python version keeps the classes.
    """

    name: str
    classes: int
    label_bytes: int
    label_key: bytes
    versions: tuple[Version, ...]

    @property
    def downloads(self) -> tuple[OfficialFile, ...]:
        """The official file that holds the data set: the archive of the binary version."""
        binary = self.versions[0]
        return (OfficialFile(binary.archive, ADDRESS + binary.archive, binary.md5),)


def parse_binary(content: bytes, kind: Cifar) -> tuple[Array, Array]:
    """Return pixels and labels of a file of the binary version."""
    size = kind.label_bytes + PIXELS
    if not content or len(content) % size:
        raise ValueError(f"expected records of {size} bytes ({kind.label_bytes} of labels, "
                         f"{PIXELS} of pixels), got {len(content)} bytes, no whole number of them")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, kind.label_bytes:], records[:, kind.label_bytes - 1]


def parse_python(content: bytes, kind: Cifar) -> tuple[Array, Array]:
    """Return pixels and labels of a file of the python version, a pickle, without executing it."""
    batch = read_pickle(content)
    x, y = batch.get(b"data"), batch.get(kind.label_key)
    if not (isinstance(x, Array) and isinstance(y, list) and x.shape == (len(y), PIXELS) and y
            and all(isinstance(label, int) for label in y)):
        raise ValueError(f'expected "data", an array (n, {PIXELS}), and n labels in '
                         f'"{kind.label_key.decode()}", got a pickle without them')
    return x, np.array(y)


CIFAR10 = Cifar("cifar10", 10, 1, b"labels", (
    Version("cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
            {"data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
             "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
             "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
             "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
             "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
             "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"}, parse_binary),
    Version("cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
            {"data_batch_1": "c99cafc152244af753f735de768cd75f",
             "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
             "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
             "data_batch_4": "634d18415352ddfa80567beed471001a",
             "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
             "test_batch": "40351d587109b95175f43aff81a1287e"}, parse_python)))

CIFAR100 = Cifar("cifar100", 100, 2, b"fine_labels", (
    Version("cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8",
            {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
             "test.bin": "4499cfba6c016c1be1438163640a0898"}, parse_binary),
    Version("cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
            {"train": "16019d7e3df5f24257cddd939b257f8d",
             "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}, parse_python)))


def locate(kind: Cifar, folder: Path) -> tuple[Version, Path] | None:
    """Return the version found in `folder`, and the folder of its files or its archive."""
    for version in kind.versions:
        for place in (folder / version.folder, folder):
            if all(find_file(place, name) for name in version.files):
                return version, place
    return next(((version, folder / version.archive) for version in kind.versions
                 if exists(folder / version.archive)), None)


def status(kind: Cifar, folder: Path) -> tuple[str, Path | None]:
    """Return "found", "incomplete" or "missing", and where."""
    found = locate(kind, folder)
    if found:
        return "found", found[1]
    part = next((folder / v.folder for v in kind.versions if (folder / v.folder).is_dir()), None)
    return ("incomplete", part) if part else ("missing", None)


def load(kind: Cifar, folder: Path, seed: int) -> Dataset:
    """Return the data set found in `folder`; 20 % of its training images are for validation.

    Raises
    ------
    UserError
        If it is not there, incomplete, damaged, or of another format.
    """
    found = locate(kind, folder)
    if found is None:
        raise _not_found(kind, folder)
    version, place = found
    packed = place == folder / version.archive
    members = _members(kind, version, place) if packed else {}

    def read(name: str) -> Part:
        content = members[name] if members else read_file(place, name, limit(name))
        return _parse(kind, version, place / name, content)

    with ThreadPoolExecutor() as pool:  # reading and hashing do not hold Python's lock
        *training, test = pool.map(read, version.files)
    y = np.concatenate([part.y for part in training])
    train, val = split(len(y), seed, place)
    # The images for training, then those for validation, each written to its place at once.
    x = np.empty((len(y), PIXELS), np.uint8)
    places = np.argsort(np.concatenate([train, val]))
    bounds = np.cumsum([len(part.y) for part in training])[:-1]
    for part, rows in zip(training, np.split(places, bounds), strict=True):
        x[rows] = part.x
    names = [name for name, part in zip(version.files, (*training, test), strict=True)
             if not part.official]
    notice = notice_of(names, place, len(x), len(test.x))
    return Dataset(kind.name, "classification", x[:len(train)], y[train], x[len(train):], y[val],
                   np.ascontiguousarray(test.x), test.y, kind.classes, IMAGE_SCALE, IMAGE_SHIFT,
                   notice, image=IMAGE)


class Part(NamedTuple):
    """What a file holds: pixels (n, PIXELS), int64 labels (n,); and whether its hash is known."""

    x: Array
    y: Array
    official: bool


def _parse(kind: Cifar, version: Version, path: Path, content: bytes) -> Part:
    try:
        x, y = version.parse(content, kind)
        if y.min() < 0 or y.max() >= kind.classes:
            raise ValueError(f"expected labels from 0 to {kind.classes - 1}, got {y.min()} to "
                             f"{y.max()}")
    except ValueError as error:
        raise UserError(f"{path}: {reason(error)}; remove it and "
                        f"{remedy(kind.name, kind.downloads)}") from error
    return Part(x, y.astype(np.int64), is_official(content, version.files[path.name]))


def limit(name: str) -> int:
    """Return the most bytes that an official file of that name may have."""
    return IMAGES.get(name, 10_000) * (PIXELS + EXTRA)


class Limited:
    """A stream that gives `limit` bytes at most, and its end once: no archive can go on forever."""

    def __init__(self, stream: io.BufferedIOBase, limit: int) -> None:
        self._stream, self._left, self._ended = stream, limit, False

    def read(self, size: int) -> bytes:
        piece = self._stream.read(size)
        self._left -= len(piece)
        if self._left < 0:
            raise ValueError("it unpacks to more than the official one")
        if self._ended:
            raise EOFError("it ends too early")
        self._ended = not piece
        return piece


def _members(kind: Cifar, version: Version, archive: Path) -> dict[str, bytes]:
    """Return the files' contents from an archive; nothing is unpacked to the disk."""
    contents = {}
    file_size(archive)  # it is a file
    try:
        with open(archive, "rb") as file:
            zipped = file.peek(2)[:2] == b"\x1f\x8b"
            stream = Limited(gzip.GzipFile(fileobj=file) if zipped else file,
                             sum(map(limit, version.files)) + OTHER)
            # Forwards only ("|"), as going back would let a damaged archive run in circles.
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:
                    name = PurePosixPath(member.name).name
                    if member.isfile() and not member.issparse() and name in version.files:
                        if member.size > limit(name):
                            raise ValueError(f"it holds {member.size} bytes of {name}, more than "
                                             "the official one")
                        contents[name] = tar.extractfile(member).read()
            while stream.read(CHUNK):
                pass  # to the end, where the checksum is
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError, ValueError,
            RecursionError) as error:  # the last two come from damaged headers
        raise UserError(f"{archive} is a damaged archive ({reason(error)}): remove it and "
                        f"{remedy(kind.name, kind.downloads)}") from error
    except OSError as error:
        raise unreadable(archive, error) from error
    if missing := version.files.keys() - contents.keys():
        raise UserError(f"{archive} lacks {', '.join(sorted(missing))}: remove it and "
                        f"{remedy(kind.name, kind.downloads)}")
    return contents


def _not_found(kind: Cifar, folder: Path) -> UserError:
    """Return the error for a folder that does not hold the data set: what it lacks."""
    for version in kind.versions:
        place = folder / version.folder
        if place.is_dir():
            missing = [name for name in version.files if not find_file(place, name)]
            return UserError(f"{place} lacks {', '.join(missing)}: "
                             f"{remedy(kind.name, kind.downloads)}")
    names = [f"{version.folder}/ or {version.archive}" for version in kind.versions]
    return not_found(kind.name, folder, ", or ".join(names), kind.downloads)
