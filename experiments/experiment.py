"""What an experiment is: a configuration with presets, a list of cells, a figure and a table."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import settings
from ..backends import Backend
from ..errors import UserError, of_system, unknown
from ..records import DamagedRecord, believed, read_json, read_known, write_json
from . import datasets
from .files import METRICS, RESULT, read_result
from .signals import Stop

PRESETS = ("smoke", "laptop", "paper")
RUN = "run.json"  # the record of a run, in its folder


class Cell(NamedTuple):
    """One independent piece of an experiment.

    name : str, unique and readable. spec : a frozen dataclass that says all there is to the cell.
    work : float, about how long it takes, in floating-point operations. memory : int, about how
    many bytes, its data aside; 0 if that is not known.
    """

    name: str
    spec: Any
    work: float
    memory: int = 0

    def folder(self, out: Path) -> Path:
        """Return where the cell's files go: another spec of the same name has another folder."""
        spec = json.dumps(settings.record(self.spec), sort_keys=True)
        return out / "cells" / f"{self.name}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"

    def result(self, out: Path, use: Callable[[dict[str, Any]], Any] = dict) -> Any:
        """Return what `use` makes of the result of a finished cell, or None.

        Raises
        ------
        UserError
            If it is damaged, or `use` does not find what it needs.
        """
        folder = self.folder(out)
        try:
            with believed(folder / RESULT):
                return use(read_result(folder)[0])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DamagedRecord as error:
            raise damaged(error) from error

    def metrics(self, out: Path, use: Callable[[list[dict[str, Any]]], Any] = list) -> Any:
        """Return what `use` makes of the metrics of a finished cell, a line an epoch.

        Raises
        ------
        UserError
            If they are missing or damaged, or `use` does not find what it needs.
        """
        folder = self.folder(out)
        try:
            with believed(folder / METRICS):
                content = read_known(folder / METRICS, read_result(folder)[1])
                return use([json.loads(line) for line in content.splitlines()])
        except DamagedRecord as error:
            raise damaged(error) from error


class Place(NamedTuple):
    """Where a cell runs: its folder, the backend, the data folder, the progress line.

    stop : Stop or None, by which another thread asks for the end; if None, signals do.
    first : bool, whether this is the first of the ranks that train together, and so the one that
        writes files, and reads what training wrote.
    """

    folder: Path
    backend: Backend
    data: str | None
    progress: Any
    stop: Stop | None = None
    first: bool = True

    def raise_if_stopped(self) -> None:
        """Raise KeyboardInterrupt if another thread asked for the end."""
        if self.stop is not None:
            self.stop.raise_if_asked()


@dataclass(frozen=True)
class Experiment:
    """An experiment; `registry` knows its name and title.

    Attributes
    ----------
    name : str
    config : type
        A frozen dataclass whose fields are `comet_np.settings` options.
    presets : dict of str to dict
        What each preset changes of the config's defaults, by flag; nothing if it is not named.
    datasets : config -> names of the data sets
        Their files are looked for once, before the first cell.
    cells : config -> list of Cell
    run_cell : (spec, Place) -> result
        A dict of JSON values. Stopped and called again, training goes on from its checkpoint; the
        short cells of Figures 2 and 3 start over.
    draw : (config, out) -> paths of the figures
        From the files of finished cells alone.
    table : (config, out) -> str
        What the figure means, in a few lines.
    prepare : (config, data folder, progress) -> list of Cell, optional
        Make what all cells read, once, before the first; the cells again, as their work may be
        known only then.
    """

    name: str
    config: type
    presets: dict[str, dict[str, Any]]
    datasets: Callable[[Any], Sequence[str]]
    cells: Callable[[Any], list[Cell]]
    run_cell: Callable[[Any, Place], dict[str, Any]]
    draw: Callable[[Any, Path], list[Path]]
    table: Callable[[Any, Path], str]
    prepare: Callable[[Any, str | None, Any], list[Cell]] | None = None

    def configure(self, preset: str, changes: dict[str, Any]) -> Any:
        """Return the configuration of a preset with some flags changed."""
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        return settings.build(self.config, self.presets.get(preset, {}) | changes)


def make_folder(out: Path) -> None:
    """Make the folder of the results, unless it is there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(of_system("make the folder", out, error)) from error


def keep_record(out: Path, record: dict[str, Any], starting: bool) -> str:
    """Write the record of a run into its folder, beside that of a run of other settings.

    Nothing is written if nothing is to be done, for a finished run may lie where none can write.

    Returns
    -------
    str
        What became of the record that was there, if it is of another run; else nothing.
    """
    file, notice = out / RUN, ""
    record = json.loads(json.dumps(record))
    try:
        before = read_json(file)
    except FileNotFoundError:
        before = None
    except DamagedRecord:
        before = {}
    same = before is not None and all(
        before.get(key) == record[key] for key in ("experiment", "config", "own data"))
    try:
        if before is not None and not same:
            name = hashlib.sha256(file.read_bytes() if file.is_file() else b"").hexdigest()[:8]
            kept = [each.replace(out / f"{each.stem}-{name}{each.suffix}")
                    for each in (file, *out.glob("*.png")) if "-" not in each.stem]
            notice = (f"{out} holds a run of other settings: its record and figure are kept there "
                      f"as {' and '.join(each.name for each in kept)}")
    except OSError as error:
        raise UserError(f"cannot keep {file} under another name ({error.strerror}): choose another "
                        "folder with --out") from error
    if starting or not same:
        write_json(file, record)
    return notice


def read_record(out: Path, experiment: Experiment) -> tuple[Any, str]:
    """Return the configuration of the run in a folder, and its preset.

    Raises
    ------
    UserError
        If there is none, it is of another experiment, or its record is damaged.
    """
    file = out / RUN
    try:
        with believed(file):
            record = read_json(file)
            if record["experiment"] != experiment.name:
                raise UserError(f"{out} holds a run of {record['experiment']}, not of "
                                f"{experiment.name}")
            values = dict(record["config"])
            for dataset, sizes in record["own data"].items():
                datasets.recall(dataset, values.get("target"), values.get("task"),
                                datasets.Sizes(*sizes))
            return settings.build(experiment.config, values), str(record["preset"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{out} holds no run of {experiment.name}: run it first, or name its "
                        "folder with --out") from error
    except DamagedRecord as error:
        raise UserError(f"{error}; run the experiment again with its settings, finished cells are "
                        "kept") from error


def damaged(error: DamagedRecord) -> UserError:
    """Return the error for a finished cell of which a file does not hold what it should."""
    return UserError(f"{error}; remove its folder and run the experiment again, other cells are "
                     "kept")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]),
                                *(cell.rjust(width)
                                  for cell, width in zip(row[1:], widths[1:], strict=True))])
                     for row in rows)
