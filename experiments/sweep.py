"""Sweeps: independent cells, each run once.

A finished cell is skipped, a stopped one goes on, a failed one does not end the others, and two
sweeps may share a folder.
"""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..backends import Backend, get_backend
from ..backends.cpu import physical_memory
from ..errors import UserError
from ..functional.linear import project
from .cell import Job, Outcome, less_memory
from .experiment import Cell, Experiment
from .progress import Progress, duration
from .workers import by_mpi, by_processes, by_threads, in_turn

SHARE_IN_PRODUCTS = 0.6  # of a training step's time, at the speed of a large product: measured


class Sweep(NamedTuple):
    """Which cells to run and how.

    jobs : int, cells at a time. On a CPU they run in processes, which share out the threads: one
        each is the best use of the cores, as a product's threads wait for each other and cells do
        not. On a GPU they run in threads, each with a stream of its own.
    mpi : bool, run the cells on the ranks of an MPI job instead, see `workers.MPI_START`.
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
        progress = Progress(sum(cell.work for cell in self.cells), cells=len(self.cells))
        jobs = [Job(self.experiment, cell, self.out, self.backend, self.data,
                    self.mpi or self.jobs == 1) for cell in self.cells]
        try:
            if self.mpi:
                return by_mpi(jobs, progress)
            if self.jobs == 1:
                return in_turn(jobs, progress)
            if get_backend(self.backend).waits:
                return by_threads(jobs, self.jobs, progress)
            return by_processes(jobs, self.jobs, progress)
        finally:
            progress.clear()


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


def memory_of(cells: list[Cell], jobs: int) -> int:
    """Return about how many bytes cells take, their data aside, if the `jobs` largest run at once.
    """
    return sum(sorted((cell.memory for cell in cells), reverse=True)[:jobs])


def at_once(experiment: Experiment, cells: list[Cell], backend: Backend, asked: int | None,
            most: int) -> int:
    """Return how many cells to run at a time: as `asked`, else as many up to `most` as fit.

    Raises
    ------
    UserError
        If their memory is more than the device has: how much, and what lowers it.
    """
    device = backend.describe()
    memory = device.get("memory") or physical_memory()
    jobs = asked or max(1, most)
    while asked is None and jobs > 1 and memory_of(cells, jobs) > memory:
        jobs -= 1
    needed = memory_of(cells, jobs)
    if needed > memory:
        largest = max(cells, key=lambda cell: cell.memory)
        several = f"{min(jobs, len(cells))} cells at a time need" if jobs > 1 else "a cell needs"
        raise UserError(f"{several} about {needed / 1e9:.1f} GB of memory beside the data, and "
                        f"{device['device']} has {memory / 1e9:.1f} GB: "
                        f"{less_memory(experiment, largest, jobs == 1 or largest.memory > memory)}")
    return jobs


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
