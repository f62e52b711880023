"""Data sets: built in (`glyphs`, `arm`), official files in a folder, or files of one's own."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError, unknown, user_path
from . import arm, cifar, corpora, glyphs, own, sarcos, svhn, tiny_imagenet
from .base import Dataset, Image, OfficialFile, columns_of, exists, remedy
from .download import Progress, fetch_file
from .own import is_file_name

__all__ = ["DATASETS", "IMAGES_32", "Dataset", "Entry", "Sizes", "fetch", "in_folder",
           "is_file_name", "load", "look", "recall", "report", "sizes_of", "stamp"]


class Sizes(NamedTuple):
    """What a network needs to know of a data set.

    task : "classification" or "regression", or a Task of one's own
    inputs, outputs, examples : N_0, classes or targets, and size of the training set
    digest : of the data in a file of one's own, for a cell is trained on these and no others
    image : (colours, height, width), None if the examples are no images
    """

    task: Any
    inputs: int
    outputs: int
    examples: int
    digest: str = ""
    image: Image | None = None


class Entry(NamedTuple):
    """What is known of a data set before it is loaded.

    sizes : Sizes, with its default target and official files
    load : function (seed, ...) if built in, else (folder, seed, ...) -> Dataset
    downloads : the official files; none if built in
    status : function (folder) -> what is there of the files in a word or two, and where
    targets : the columns of which one may be the target, if there is a choice
    needs : function that raises a UserError if something is missing that it is made with
    stamp : function (folder) -> by what a change of the files is noticed, if the sizes are theirs
    """

    sizes: Sizes
    load: Callable[..., Dataset]
    downloads: tuple[OfficialFile, ...] = ()
    status: Callable[[Path], tuple[str, Path | None]] = lambda folder: ("missing", None)
    targets: range | None = None
    needs: Callable[[], object] = tuple
    stamp: Callable[[Path], Any] | None = None


def _of_images(image: Image, classes: int, examples: int) -> Sizes:
    return Sizes("classification", math.prod(image), classes, examples, image=image)


def _cifar(kind: cifar.Cifar) -> Entry:
    return Entry(_of_images(cifar.IMAGE, kind.classes, 40_000),
                 partial(cifar.load, kind), kind.downloads, partial(cifar.status, kind))


DATASETS: dict[str, Entry] = {
    "glyphs": Entry(_of_images(glyphs.IMAGE, 10, glyphs.SIZES["train"]), glyphs.load,
                    needs=glyphs.drawings),
    "arm": Entry(Sizes("regression", 3 * arm.JOINTS, 1, arm.MOVEMENTS["train"] * arm.MOMENTS),
                 arm.load, targets=range(arm.JOINTS)),
    "cifar10": _cifar(cifar.CIFAR10),
    "cifar100": _cifar(cifar.CIFAR100),
    "sarcos": Entry(Sizes("regression", sarcos.INPUTS, 1, 35_588), sarcos.load, sarcos.DOWNLOADS,
                    sarcos.status, range(sarcos.INPUTS, sarcos.COLUMNS)),
    "svhn": Entry(_of_images(svhn.IMAGE, 10, 58_606), svhn.load, svhn.DOWNLOADS, svhn.status),
    "tiny_imagenet": Entry(
        _of_images(tiny_imagenet.IMAGE, tiny_imagenet.CLASSES, 80_000), tiny_imagenet.load,
        tiny_imagenet.DOWNLOADS, tiny_imagenet.status, needs=tiny_imagenet.pillow,
        stamp=tiny_imagenet.stamp),
}
IMAGES_32 = tuple(name for name, entry in DATASETS.items() if entry.sizes.image == (3, 32, 32))
_seen: dict[tuple[Any, ...], Sizes] = {}  # of data whose files say them
_folder: str | Path | None = None  # in which data sets lie, if not said otherwise


@contextmanager
def in_folder(folder: str | Path | None) -> Iterator[None]:
    """Let data sets be looked for in `folder`, unless it is None, by what is called within."""
    global _folder
    before, _folder = _folder, folder or _folder
    try:
        yield
    finally:
        _folder = before


def sizes_of(name: str, target: str | None = None, task: str | None = None) -> Sizes:
    """Return what a network needs to know of a data set; of a file of one's own it is read.

    So it is of official files that may be there in part; see `in_folder`.

    Parameters
    ----------
    name, target, task
        As `load` takes them.

    Raises
    ------
    UserError
        If there is no such data set, target or task, or the file cannot be read.
    """
    known = name, target, task, stamp(name)
    if known in _seen:
        return _seen[known]
    if is_file_name(name):
        return _seen.setdefault(known, _measured(own.read(name, target, task)))
    entry = _entry(name)
    _check_options(name, entry, target, task)
    if entry.stamp is not None and known[-1] is not None:
        folder = _folder_of(name)
        whole = entry.status(folder)[0] == "found"
        return _seen.setdefault(known, entry.sizes if whole else _measured(entry.load(folder, 0)))
    if target is None or entry.targets is None:
        return entry.sizes
    return entry.sizes._replace(outputs=len(columns_of(name, target, entry.targets)))


def _measured(data: Dataset) -> Sizes:
    return Sizes(data.task, data.x_train.shape[1], data.outputs, len(data.x_train), data.digest,
                 data.image)


def stamp(name: str) -> Any:
    """Return by what a change of the data is noticed, if their files say their sizes.

    None if there are no such files.
    """
    if is_file_name(name):
        return own.stamp(name)
    where, entry = named(), DATASETS.get(name)
    if entry is None or entry.stamp is None or where is None or not exists(user_path(where)):
        return None
    return entry.stamp(user_path(where))


def recall(name: str, target: str | None, task: str | None, sizes: Sizes) -> None:
    """Let `sizes_of` know what a file held when a run began, so that its figure needs no file."""
    if sizes.image is not None:  # a list, if it comes from a record
        colours, height, width = sizes.image
        sizes = sizes._replace(image=(colours, height, width))
    _seen[name, target, task, stamp(name)] = sizes


def look(names: Iterable[str], folder: str | Path | None) -> None:
    """Raise a UserError unless all that these data sets need is there."""
    for entry, name in ((_entry(name), name) for name in names if not is_file_name(name)):
        entry.needs()
        if entry.downloads:
            status, place = entry.status(_folder_of(name, folder))
            if status in ("missing", "incomplete"):
                raise UserError(f"{name} is {status} in {place or _folder_of(name, folder)}: "
                                f"{remedy(name, entry.downloads)}")


def named(folder: str | Path | None = None) -> str | Path | None:
    """Return which folder of data sets is named, if any."""
    return folder or _folder or os.environ.get("COMET_DATA")


def _folder_of(name: str, folder: str | Path | None = None) -> Path:
    """Return the folder in which the official files of a data set should lie."""
    where = named(folder)
    if not where:
        raise UserError(f"{name} needs its official files: name their folder with --data DIR or "
                        f"COMET_DATA, and {remedy(name, _entry(name).downloads)}")
    return existing(where)


def existing(folder: str | Path) -> Path:
    """Return the folder of the data sets.

    Raises
    ------
    UserError
        If there is none.
    """
    found = user_path(folder)
    if not exists(found):
        raise UserError(f"there is no folder {found}: name the folder of the data sets with --data "
                        "DIR or COMET_DATA")
    return found


def _check_options(name: str, entry: Entry, target: object, task: object) -> None:
    if task is not None:
        raise UserError(f"--task is for files of your own, and {name} is none: leave it out")
    if target is not None and entry.targets is None:
        raise UserError(f"--target is for data sets with several torques and for files of your "
                        f"own, and {name} has classes: leave it out, or run each of the --datasets "
                        "apart")


def load(name: str, folder: str | Path | None = None, seed: int = 0, train: int | None = None,
         target: int | str | None = None, task: str | None = None) -> Dataset:
    """Return a data set, in memory and ready for training.

    Parameters
    ----------
    name : str
        A key of `DATASETS`, or the path of a CSV or npz file, see `own.read`.
    folder : path, optional
        Where the files of a data set that is not built in lie; the environment's COMET_DATA if not
        given.
    seed : int
        Of what is generated, and of the split into training and validation set.
    train : int, optional
        Use at most the first `train` training examples (they are in random order already).
    target : int or str, optional
        Of "arm" and "sarcos": which torque to predict, or "all"; of a CSV file: which column.
    task : {"classification", "regression"}, optional
        Of a file, if the type of its targets says it wrongly.

    Raises
    ------
    UserError
        If the name is unknown, an option does not fit, or the files are missing or damaged.
    """
    if train is not None and train < 1:
        raise UserError(f"training needs at least 1 example, got train = {train}")
    if is_file_name(name):
        data = own.read(name, None if target is None else str(target), task, seed)
    else:
        entry = _entry(name)
        _check_options(name, entry, target, task)
        where = (_folder_of(name, folder),) if entry.downloads else ()
        options = {} if target is None else {"target": target}
        data = entry.load(*where, seed, **options)
    return replace(data, x_train=data.x_train[:train], y_train=data.y_train[:train])


def report(folder: str | Path | None) -> list[tuple[str, str, str, str]]:
    """Return, for each data set and corpus, its name, status, where it lies, and its source."""
    rows, folder = [], None if folder is None else existing(folder)
    for name, entry in DATASETS.items():
        if not entry.downloads:
            rows.append((name, "built in", "-", "generated"))
            continue
        status, place = entry.status(folder) if folder else ("missing", None)
        rows.append((name, status, str(place or "-"),
                     " and ".join(file.url for file in entry.downloads)))
    return rows + corpora.report(folder)


def fetch(name: str, folder: str | Path, progress: Progress | None = None) -> list[Path]:
    """Download the official files of a data set into `folder` and return their paths.

    A download that broke off goes on where it stopped; see `download.fetch_file`.

    Raises
    ------
    UserError
        If the name is unknown or built in, or a download fails.
    """
    if name in corpora.CORPORA:
        raise UserError(f"{name} is not downloaded by this program: its source is "
                        f"{corpora.CORPORA[name].source}")
    entry = _entry(name)
    if not entry.downloads:
        raise UserError(f"{name} is built in: there is nothing to download")
    return [fetch_file(file, user_path(folder), progress) for file in entry.downloads]


def _entry(name: str) -> Entry:
    if name not in DATASETS:
        raise UserError(f"{unknown('data set', name, DATASETS)}, or a file of your own, which ends "
                        f"in {' or '.join(own.SUFFIXES)}")
    return DATASETS[name]
