"""One cell of a sweep: locked while it runs, its result written when it is done."""

import contextlib
import dataclasses
import gc
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..backends import OutOfMemory, get_backend
from ..errors import UserError, of_system
from ..settings import flags
from .experiment import Cell, Experiment, Place
from .files import finish, locked
from .progress import Part
from .provenance import provenance
from .registry import experiment
from .signals import Stop
from .training.ranks import of_command


class Job(NamedTuple):
    """A cell for a worker: the experiment's name, the cell, and where; `alone`: one at a time."""

    experiment: str
    cell: Cell
    out: Path
    backend: str
    data: str | None
    alone: bool = False


class Outcome(NamedTuple):
    """What became of a cell: "done", "found" (finished before), "busy" or "failed", and why."""

    cell: str
    status: str
    message: str = ""


def run_job(job: Job, progress: Any, stop: Stop | None = None) -> Outcome:
    """Run one cell, unless it is finished or another sweep is at it.

    In a data-parallel run on all ranks; the first decides, and alone has the folder.
    """
    ranks = of_command()
    cell, folder = job.cell, job.cell.folder(job.out)
    progress = Part(progress, cell.work)
    try:
        with (ranks.together(),
              _claimed(job, folder) if ranks.first else contextlib.nullcontext() as outcome):
            outcome = ranks.broadcast(outcome)
            if outcome is not None:
                return outcome
            _run(job, folder, progress, stop)
            return Outcome(cell.name, "done")
    except OutOfMemory as error:
        return Outcome(cell.name, "failed",
                       f"{error}: {less_memory(experiment(job.experiment), cell, job.alone)}")
    except UserError as error:
        return Outcome(cell.name, "failed", str(error))
    except OSError as error:
        file = Path(os.fsdecode(error.filename or folder))
        return Outcome(cell.name, "failed", of_system("write into", folder, error)
                       if file.is_relative_to(job.out) else
                       of_system("read", file, error, "--data"))
    except Exception as error:
        report = folder / "error.txt"
        if ranks.first:
            with contextlib.suppress(OSError):
                report.write_text(traceback.format_exc())
        return Outcome(cell.name, "failed",
                       f"{type(error).__name__}: {error} (the traceback is in {report})")
    finally:
        progress.end()
        gc.collect()  # what lies in cycles, as a captured step does, gives its memory back


@contextlib.contextmanager
def _claimed(job: Job, folder: Path) -> Iterator[Outcome | None]:
    """Hold the cell's lock; yield its outcome if there is one without running it, else None."""
    cell = job.cell
    if cell.result(job.out) is not None:
        yield Outcome(cell.name, "found")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock") as ours:
        if not ours:
            yield Outcome(cell.name, "busy", "another sweep is running it")
        elif cell.result(job.out) is not None:  # finished by another sweep meanwhile
            yield Outcome(cell.name, "found")
        else:
            yield None


def _run(job: Job, folder: Path, progress: Any, stop: Stop | None) -> None:
    """Run a locked cell and write its result; what an earlier failure left goes after that."""
    backend = get_backend(job.backend)
    backend.keep_freed_memory()
    ranks = of_command()
    if ranks.first:
        with open(folder / "starts.jsonl", "a") as starts:
            starts.write(json.dumps(provenance(job.backend) | {"ranks": ranks.size}) + "\n")
    with backend.memory_explained():
        result = experiment(job.experiment).run_cell(
            job.cell.spec, Place(folder, backend, job.data, progress, stop, ranks.first))
    if ranks.first:
        finish(folder, result)
        (folder / "error.txt").unlink(missing_ok=True)


def less_memory(experiment: Experiment, cell: Cell, alone: bool) -> str:
    """Return the advice to use less memory, by flags that this experiment has.

    With `alone`, fewer cells at once are none.
    """
    known = {name for name, _ in flags(experiment.config)}
    if hasattr(cell.spec, "corpus"):
        known -= {"train"}  # texts stay on disk
    lower = [f"--{name}" for name in ("width", "widths", "sizes", "batch", "train", "images")
             if name in known]
    advice = [f"lower {' or '.join(lower)}"]
    run: Any = getattr(cell.spec, "run", None)
    if hasattr(getattr(run, "model", None), "recompute"):
        advice.append("--accumulate makes up for a smaller batch")
        advice += ["or give --recompute true"] * (not run.training.recompute)
    if "float64" in json.dumps(dataclasses.asdict(cell.spec)):
        advice.append("or the --precision")
    advice += ["or run fewer cells at once with --jobs 1"] * (not alone)
    advice += ["or start fewer ranks on each machine"] * (of_command().neighbours > 1)
    return ", ".join(advice)
