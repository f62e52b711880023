"""Data sets: built in (`glyphs`, `arm`), or official files in a folder that the user names."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError, unknown, user_path
from . import arm, cifar, glyphs, sarcos
from .base import Dataset, OfficialFile, remedy
from .download import Progress, fetch_file

__all__ = ["DATASETS", "REGRESSION", "SIZES", "Dataset", "fetch", "load", "report"]


class Entry(NamedTuple):
    """What is known of a data set before it is loaded.

    task : "classification" or "regression"
    inputs, outputs, examples : N_0, classes or targets, and size of the training set
    load : function (seed, ...) if built in, else (folder, seed, ...) -> Dataset
    downloads : the official files; none if built in
    status : function (folder) -> what is there of the files in a word or two, and where
    """

    task: str
    inputs: int
    outputs: int
    examples: int
    load: Callable[..., Dataset]
    downloads: tuple[OfficialFile, ...] = ()
    status: Callable[[Path], tuple[str, Path | None]] = lambda folder: ("missing", None)


def _cifar(kind: cifar.Cifar) -> Entry:
    return Entry("classification", cifar.PIXELS, kind.classes, 40_000, partial(cifar.load, kind),
                 kind.downloads, partial(cifar.status, kind))


DATASETS: dict[str, Entry] = {
    "glyphs": Entry("classification", 3 * glyphs.SIDE**2, 10, glyphs.SIZES["train"], glyphs.load),
    "arm": Entry("regression", 3 * arm.JOINTS, 1, arm.MOVEMENTS["train"] * arm.MOMENTS, arm.load),
    "cifar10": _cifar(cifar.CIFAR10),
    "cifar100": _cifar(cifar.CIFAR100),
    "sarcos": Entry("regression", sarcos.INPUTS, 1, 35_588, sarcos.load, sarcos.DOWNLOADS,
                    sarcos.status),
}
# (inputs, outputs, training examples) of each data set with its default target, official files
SIZES = {name: (entry.inputs, entry.outputs, entry.examples) for name, entry in DATASETS.items()}
REGRESSION = frozenset(name for name, entry in DATASETS.items() if entry.task == "regression")


def load(name: str, folder: str | Path | None = None, seed: int = 0, train: int | None = None,
         **options: Any) -> Dataset:
    """Return a data set, in memory and ready for training.

    Parameters
    ----------
    name : str
        A key of `DATASETS`.
    folder : path, optional
        Where the files of a data set that is not built in lie; the environment's COMET_DATA if not
        given.
    seed : int
        Of what is generated, and of the split into training and validation set.
    train : int, optional
        Use at most the first `train` training examples (they are in random order already).
    target : int or "all", optional
        Of "arm" and "sarcos": which torque to predict, see `arm.load` and `sarcos.load`.

    Raises
    ------
    UserError
        If the name is unknown, an option does not fit, or the files are missing or damaged.
    """
    entry = _entry(name)
    if options and entry.task != "regression":
        raise UserError(f'"{name}" has classes: {" and ".join(options)} cannot be chosen')
    if train is not None and train < 1:
        raise UserError(f"training needs at least 1 example, got train = {train}")
    if entry.downloads:
        where = folder or os.environ.get("COMET_DATA")
        if not where:
            raise UserError(f"{name} needs its official files: name their folder with --data DIR "
                            f"or COMET_DATA, and {remedy(name, entry.downloads)}")
        data = entry.load(user_path(where), seed, **options)
    else:
        data = entry.load(seed, **options)
    return replace(data, x_train=data.x_train[:train], y_train=data.y_train[:train])


def report(folder: str | Path | None) -> list[tuple[str, str, str, str]]:
    """Return, for each data set, its name, status, where it lies, and where it comes from."""
    rows = []
    for name, entry in DATASETS.items():
        if not entry.downloads:
            rows.append((name, "built in", "-", "generated"))
            continue
        status, place = entry.status(user_path(folder)) if folder else ("missing", None)
        rows.append((name, status, str(place or "-"),
                     " and ".join(file.url for file in entry.downloads)))
    return rows


def fetch(name: str, folder: str | Path, progress: Progress | None = None) -> list[Path]:
    """Download the official files of a data set into `folder` and return their paths.

    A download that broke off goes on where it stopped; see `download.fetch_file`.

    Raises
    ------
    UserError
        If the name is unknown or built in, or a download fails.
    """
    entry = _entry(name)
    if not entry.downloads:
        raise UserError(f"{name} is built in: there is nothing to download")
    return [fetch_file(file, user_path(folder), progress) for file in entry.downloads]


def _entry(name: str) -> Entry:
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    return DATASETS[name]
