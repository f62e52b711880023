"""Sweeps: independent cells, run in turn, by several processes, or by the ranks of MPI.

A finished cell is skipped, a stopped one goes on, a failed one does not end the others, and two
sweeps may share a folder: each cell is locked while it runs.
"""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import platform
import queue
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from ..backends import Backend, BackendError, OutOfMemory, get_backend
from ..backends.numpy_backend import keep_freed_memory, threads
from ..errors import UserError
from ..functional.linear import project
from .experiment import Cell, Place
from .progress import Progress, duration

MPI_START = "mpiexec -n RANKS python -m mpi4py.futures -m comet_np.experiments.cli run ... --mpi"
SHARE_IN_PRODUCTS = 0.6  # of a training step's time, at the speed of a large product: measured


class Task(NamedTuple):
    """A cell for a worker: the experiment's name, the cell, and where."""

    experiment: str
    cell: Cell
    out: Path
    backend: str
    data: str | None


class Outcome(NamedTuple):
    """What became of a cell: "done", "found" (finished before), "busy" or "failed", and why."""

    cell: str
    status: str
    message: str = ""


class Sweep(NamedTuple):
    """Which cells to run and how.

    jobs : int, processes; the machine's threads are shared out among them. One thread each is
        the best use of the cores: a product's threads wait for each other, cells do not.
    mpi : bool, run the cells on the ranks of an MPI job instead, started as `MPI_START` says.
    """

    experiment: str
    cells: list[Cell]
    out: Path
    backend: str = "numpy"
    data: str | None = None
    jobs: int = 1
    mpi: bool = False

    def run(self) -> list[Outcome]:
        """Run all cells that are not finished and return what became of each."""
        progress = Progress(sum(cell.work for cell in self.cells))
        tasks = [Task(self.experiment, cell, self.out, self.backend, self.data)
                 for cell in self.cells]
        try:
            if self.mpi:
                outcomes = _with_mpi(tasks, progress)
            elif self.jobs > 1:
                outcomes = _with_processes(tasks, self.jobs, progress)
            else:
                outcomes = [run_task(task, progress) for task in tasks]
        finally:
            progress.clear()
        return outcomes


def run_task(task: Task, progress: Any) -> Outcome:
    """Run one cell, unless it is finished or another sweep is at it."""
    from .cli import EXPERIMENTS  # here, as that module knows this one

    cell, folder = task.cell, task.cell.folder(task.out)
    progress = _CellProgress(progress, cell.work)
    if cell.result(task.out) is not None:
        progress.end()
        return Outcome(cell.name, "found")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "lock") as ours:
            if not ours:
                return Outcome(cell.name, "busy", "another sweep is running it")
            if cell.result(task.out) is not None:
                return Outcome(cell.name, "found")
            if task.backend == "numpy":
                keep_freed_memory()
            with open(folder / "starts.jsonl", "a") as starts:
                starts.write(json.dumps(provenance(task.backend)) + "\n")
            place = Place(folder, get_backend(task.backend), task.data, progress)
            with place.backend.memory_explained():
                EXPERIMENTS[task.experiment].run_cell(cell.spec, place)
            return Outcome(cell.name, "done")
    except OutOfMemory as error:
        return Outcome(cell.name, "failed", f"{error}: {_less_memory(task)}")
    except (UserError, BackendError) as error:
        return Outcome(cell.name, "failed", str(error))
    except OSError as error:
        return Outcome(cell.name, "failed", f"cannot write into {folder} ({error.strerror}): free "
                       "some space or choose another folder with --out, then run it again")
    except Exception as error:
        report = folder / "error.txt"
        with contextlib.suppress(OSError):
            report.write_text(traceback.format_exc())
        return Outcome(cell.name, "failed",
                       f"{type(error).__name__}: {error} (the traceback is in {report})")
    finally:
        progress.end()
        gc.collect()  # what lies in cycles, as a captured step does, gives its memory back


def _less_memory(task: Task) -> str:
    """Return the advice to use less memory, by flags that this experiment has."""
    from .cli import EXPERIMENTS

    fields = {field.name for field in dataclasses.fields(EXPERIMENTS[task.experiment].config)}
    flags = [f"--{name}" for name in ("width", "widths", "batch", "train", "images")
             if name in fields]
    advice = [f"lower {' or '.join(flags)}"]
    if getattr(task.cell.spec, "precision", "") == "float64":
        advice.append("or the --precision")
    if len(getattr(task.cell.spec, "seeds", ())) > 1:
        advice.append("train seeds one by one with --together 0")
    if task.backend == "numpy":
        advice.append("or run fewer cells at once with --jobs 1")
    return ", ".join(advice)


def provenance(backend: str) -> dict[str, Any]:
    """Return when, by which versions and on what machine something is computed, for its record."""
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "comet-np": __version__,
            "git": _git_revision(), "python": platform.python_version(),
            "machine": platform.platform(), **get_backend(backend).describe()}


@cache
def _git_revision() -> str | None:
    """Return the revision of the checkout this runs from, or None if it is not one."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():  # installed, maybe within a repository of another's
        return None
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, text=True,
                                capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


@contextmanager
def _lock(file: Path) -> Iterator[bool]:
    """Hold an exclusive lock on `file`, or yield False; the system frees it if we are killed.

    Where a file system has no locks, as some of clusters do, two sweeps may do a cell twice.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no flock
        yield True
        return
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield True


class _CellProgress:
    """The progress of one cell, which counts as done when it ends, however that comes."""

    def __init__(self, progress: Any, work: float) -> None:
        self._progress, self._left = progress, work
        self.message = progress.message

    def skip(self, work: float) -> None:
        self._left -= work
        self._progress.skip(work)

    def advance(self, work: float, text: str = "", steps: int = 1) -> None:
        self._left -= work
        self._progress.advance(work, text, steps)

    def end(self) -> None:
        """Leave out what the cell did not need, or did not come to."""
        self.skip(self._left)


class _Remote:
    """The progress of a worker process: sent to the parent, a few times a second."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages
        self._work, self._steps, self._sent = 0.0, 0, time.monotonic()

    def skip(self, work: float) -> None:
        self._messages.put(("skip", work))

    def advance(self, work: float, text: str = "", steps: int = 1) -> None:
        self._work += work
        self._steps += steps
        if time.monotonic() - self._sent > 0.2:
            self._messages.put(("advance", self._work, text, self._steps))
            self._work, self._steps, self._sent = 0.0, 0, time.monotonic()

    def message(self, text: str) -> None:
        self._messages.put(("message", text))


_stopped = False  # in a worker: whether its cell was interrupted, so that it takes no other


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_remote(task: Task, messages: Any) -> Outcome:
    global _stopped
    if _stopped:
        return Outcome(task.cell.name, "busy", "not started")
    try:
        return run_task(task, _Remote(messages))
    except KeyboardInterrupt:
        _stopped = True
        return Outcome(task.cell.name, "busy", "stopped")


def _with_processes(tasks: list[Task], jobs: int, progress: Progress) -> list[Outcome]:
    before = os.environ.get("OMP_NUM_THREADS")
    # read by the workers' BLAS when it is loaded
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads() // jobs))
    context = get_context("spawn")
    try:
        with context.Manager() as manager:
            messages = manager.Queue()

            def attempt(tasks: list[Task]) -> list[Outcome | None]:
                with ProcessPoolExecutor(jobs, context, _start_worker) as pool:
                    return _collect(pool, tasks, messages, progress)

            outcomes = attempt(tasks)
            # A worker that was killed takes the pool with it, and cells that did nothing wrong:
            # each of them is tried again, alone, and may be killed once more.
            for i, outcome in enumerate(outcomes):
                if outcome is None:
                    outcomes[i] = attempt([tasks[i]])[0] or attempt([tasks[i]])[0]
            return [outcome or Outcome(task.cell.name, "failed", "its process was killed, again "
                                       "and again: is there too little memory? --jobs 1 needs less")
                    for task, outcome in zip(tasks, outcomes, strict=True)]
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _with_mpi(tasks: list[Task], progress: Progress) -> list[Outcome]:
    try:
        from mpi4py.futures import MPIPoolExecutor
    except ImportError:
        raise UserError('--mpi needs mpi4py: pip install "comet-np[mpi]", then start with '
                        f"{MPI_START}") from None
    with MPIPoolExecutor() as pool:
        futures = [pool.submit(_run_silent, task) for task in tasks]
        outcomes = []
        for task, future in zip(tasks, futures, strict=True):
            outcomes.append(future.result())
            count = progress.skip if outcomes[-1].status == "found" else progress.advance
            count(task.cell.work)
        return outcomes


def _run_silent(task: Task) -> Outcome:
    with open(os.devnull, "w") as nowhere:
        return run_task(task, Progress(task.cell.work, nowhere))


def _collect(pool: ProcessPoolExecutor, tasks: list[Task], messages: Any,
             progress: Progress) -> list[Outcome | None]:
    """Return the outcomes of the tasks, showing their progress; None where a worker was killed."""
    futures = [pool.submit(_run_remote, task, messages) for task in tasks]
    workers = list((pool._processes or {}).values())
    try:
        while True:
            finished = all(future.done() for future in futures)
            try:  # what the workers said is shown to the last word
                method, *arguments = messages.get(timeout=0 if finished else 0.2)
                getattr(progress, method)(*arguments)
            except queue.Empty:
                if finished:
                    break
    except KeyboardInterrupt:
        for worker in workers:
            worker.terminate()  # SIGTERM: a cell in training saves a checkpoint and stops
        try:
            pool.shutdown(wait=True, cancel_futures=True)
        except KeyboardInterrupt:
            for worker in workers:
                worker.kill()
        raise
    return [None if isinstance(future.exception(), BrokenProcessPool) else future.result()
            for future in futures]


def expected_seconds(cells: list[Cell], backend: Backend, dtype: str = "float32") -> float:
    """Return about how long the cells will take, from the speed of products of this dtype here."""
    rates = []
    with backend.memory_explained():
        x = backend.asarray(np.ones((128, 1024), dtype))
        W = backend.asarray(np.ones((1024, 1024), dtype))
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(5):
                project(x, W)
            backend.synchronize()
            rates.append(5 * 2 * x.size * len(W) / (time.perf_counter() - started))
    return sum(cell.work for cell in cells) / (SHARE_IN_PRODUCTS * max(rates))


def cells_of(count: int) -> str:
    """Return ``"1 cell"``, ``"2 cells"``."""
    return f"{count} cell{'s' * (count != 1)}"


def summary(outcomes: list[Outcome], seconds: float) -> str:
    """Return a line on the sweep, and one on each cell that has no result."""
    count = {status: sum(o.status == status for o in outcomes)
             for status in ("done", "found", "busy", "failed")}
    lines = [f"{cells_of(count['done'])} run in {duration(seconds)}"
             + (f", {count['found']} found finished" if count["found"] else "")
             + (f", {count['busy']} busy elsewhere" if count["busy"] else "")
             + (f", {count['failed']} FAILED" if count["failed"] else "")]
    lines += [f"  {o.cell}: {o.message}" for o in outcomes if o.message]
    return "\n".join(lines)
