"""Workers in processes of their own, limited in time; the file that grows by their results."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically
from .ratios import Ratio, Row

Run = Callable[..., dict[str, Any]]  # (work, *sizes): what that worker returns
Plan = list[tuple[str, int | str, int]]  # workers in turn: work, N or model, batch size


class WorkerFailed(Exception):
    """A worker that returned nothing; its text is "what: why"."""


def in_a_process(module: str, environment: dict[str, str], limit: float,
                 *arguments: Any) -> dict[str, Any]:
    """Return what a module of this folder prints as JSON in a process of its own.

    Raises
    ------
    WorkerFailed
        If it ends without an answer, or takes longer than `limit` seconds: it is then killed, with
        the processes that it has started.
    """
    command = [sys.executable, "-m", f"comet_np.benchmarks.{module}", *map(str, arguments)]
    watched, held = os.pipe()  # the held end closes with this process, however that ends
    try:
        worker = subprocess.Popen(command, env=os.environ | environment, stdin=watched,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                  start_new_session=True)
        with worker:
            try:
                answer, errors = worker.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                raise WorkerFailed(f"timed out: killed after {limit:g} s, --limit allows more"
                                   ) from None
            finally:
                if worker.returncode is None:
                    os.killpg(worker.pid, signal.SIGKILL)
    finally:
        os.close(watched)
        os.close(held)
    if worker.returncode < 0:
        raise WorkerFailed(f"killed: by {signal.Signals(-worker.returncode).name}")
    if worker.returncode:
        last = (errors.strip().splitlines() or ["it said nothing"])[-1]
        raise WorkerFailed(f"failed: {re.sub(r'^[A-Za-z_.]*(Error|Memory): ', '', last)}")
    result: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return result


def end_with_the_parent() -> None:
    """Let this worker, and all that it starts, end with `in_a_process`, however that ends."""
    def watch() -> None:
        os.read(0, 1)  # of stdin: returns when the held end is closed
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def own_compile_cache() -> Iterator[dict[str, str]]:
    """Yield the environment in which torch.compile keeps what it compiles in a folder of its own.

    A worker that is killed may leave half a library there, which PyTorch would load ever after.
    """
    with tempfile.TemporaryDirectory(prefix="comet-np-bench-") as folder:
        yield {"TORCHINDUCTOR_CACHE_DIR": folder}


def show_progress(text: str) -> None:
    """Replace the progress line on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


class Results:
    """What the workers returned, in a file that is written anew after each of them.

    times : by "work sizes name", one median a process.
    left_out : why others are missing, as "what: why", by the same names, or by "work sizes" or
        "work" where all of theirs are.
    all_ran : whether every worker returned something.
    """

    def __init__(self, file: Path, settings: dict[str, Any], run: Run) -> None:
        self.times: dict[str, list[float]] = {}
        self.left_out: dict[str, str] = {}
        self.all_ran = True
        self._file, self._settings, self._run = file, settings, run

    def add(self, work: str, *sizes: int | str) -> None:
        """Run a worker, unless it failed in a repeat before, and keep what it returned."""
        worker = " ".join(map(str, (work, *sizes)))
        if worker in self.left_out:
            return
        try:
            for name, value in self._run(work, *sizes).items():
                if isinstance(value, str):
                    self.left_out[f"{worker} {name}"] = value
                else:
                    self.times.setdefault(f"{worker} {name}", []).append(value)
        except WorkerFailed as error:
            self.left_out[worker] = str(error)
            self.all_ran = False
        self.save()

    def save(self) -> None:
        """Write all that is known into the file."""
        content = {"settings": self._settings, "times": self.times, "left out": self.left_out}
        write_atomically(self._file, json.dumps(content, indent=1).encode() + b"\n")

    def shown(self, key: str) -> str:
        """Return the median of a time as text; without one, why there is none, in few words."""
        if key in self.times:
            return f"{statistics.median(self.times[key]):.4g}"
        return next((why.partition(":")[0] for name, why in self.left_out.items()
                     if f"{key} ".startswith(f"{name} ")), "-")

    def ratios(self, pairs: dict[str, tuple[str, str, float]]) -> Row:
        """Return the ratio of each (ours, theirs, goal) by name, if both have been measured."""
        return {name: Ratio(self.times[ours], self.times[theirs], goal)
                for name, (ours, theirs, goal) in pairs.items()
                if ours in self.times and theirs in self.times}

    def why_left_out(self) -> list[str]:
        """Return a line for all that is missing."""
        return [f"left out: {name} ({why})" for name, why in self.left_out.items()]
