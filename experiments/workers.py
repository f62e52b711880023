"""How the cells of a sweep are run: in turn, by processes, by threads of a GPU, or by MPI ranks."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from typing import Any

from ..backends import get_backend
from ..backends.cpu import threads
from ..errors import UserError
from .cell import Job, Outcome, run_job
from .progress import Progress
from .signals import SIGNALS, Stop, stop_on_signals

MPI_START = "mpiexec -n RANKS python -m mpi4py.futures -m comet_np.experiments.cli run ... --mpi"


def in_turn(jobs: list[Job], progress: Progress) -> list[Outcome]:
    """Run the cells one after the other, in this process."""
    return [_run_cell(job, progress) for job in jobs]


def _run_cell(job: Job, progress: Any, stop: Stop | None = None) -> Outcome:
    """Run a cell and tell when it has ended."""
    outcome = run_job(job, progress, stop)
    progress.ended(job.cell.name, outcome.status == "found")
    return outcome


# --- threads, on a GPU --------------------------------------------------------------------------


def by_threads(jobs: list[Job], at_once: int, progress: Progress) -> list[Outcome]:
    """Run several cells at once in threads of this process, each on a stream of its own.

    Small networks leave most of a GPU idle; their kernels run side by side.
    """
    shared = _Shared(progress)

    def work(job: Job) -> Outcome | None:
        if stop.asked:
            return None
        try:
            with get_backend(job.backend).own_stream():
                return _run_cell(job, shared, stop)
        except KeyboardInterrupt:
            return None

    with stop_on_signals() as stop, ThreadPoolExecutor(at_once, "comet-np-cell") as pool:
        outcomes = list(pool.map(work, jobs))
    stop.raise_if_asked()
    return [outcome for outcome in outcomes if outcome is not None]


class _Shared:
    """A progress line that threads share."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        def locked(*arguments: Any) -> None:
            with self._lock:
                getattr(self._progress, name)(*arguments)

        return locked


# --- processes ----------------------------------------------------------------------------------

LONGEST = 1000  # characters of a message: a pipe takes 4096 bytes as one, whoever else writes


class _Remote:
    """The progress of a worker process: sent to the parent, a few times a second.

    All workers write into one pipe. It has no lock that one of them, when killed, would keep.
    """

    def __init__(self, send: Callable[[tuple[Any, ...]], None]) -> None:
        self._tell = send
        self._work, self._steps, self._sent = 0.0, 0, time.monotonic()

    def skip(self, work: float) -> None:
        self._send("")
        self._tell(("skip", work))

    def advance(self, work: float, text: str = "", steps: int = 1) -> None:
        self._work += work
        self._steps += steps
        if time.monotonic() - self._sent > 0.2:
            self._send(text)

    def _send(self, text: str) -> None:
        self._tell(("advance", self._work, text[:LONGEST], self._steps))
        self._work, self._steps, self._sent = 0.0, 0, time.monotonic()

    def message(self, text: str) -> None:
        self._tell(("message", text[:LONGEST]))

    def ended(self, cell: str, found: bool) -> None:
        self._tell(("ended", cell, found))


# In a worker: the pipe to the parent, and whether its cell was interrupted, so that it takes no
# other.
_pipe: Any = None
_stopped = False


def _start_worker(pipe: Any) -> None:
    """Leave Ctrl-C to the parent, and end when the parent does, however and whenever it ends."""
    global _pipe
    _pipe = pipe
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def _born_deaf() -> Iterator[None]:
    """Let processes that are started here hear of signals when they are ready for them.

    Before that Ctrl-C would print a traceback for each, and the resource tracker of
    `multiprocessing`, which nobody makes ready for SIGHUP, would be missed.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_remote(job: Job) -> Outcome:
    global _stopped
    if _stopped:
        return Outcome(job.cell.name, "busy", "not started")
    try:
        return _run_cell(job, _Remote(_pipe.send))
    except KeyboardInterrupt:
        _stopped = True
        return Outcome(job.cell.name, "busy", "stopped")


def by_processes(jobs: list[Job], at_once: int, progress: Progress) -> list[Outcome]:
    """Run several cells at once in processes that share out the threads.

    Raises
    ------
    UserError
        If the system starts no processes.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    # read by the workers' BLAS when it is loaded
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads() // at_once))
    try:
        with stop_on_signals() as stop:
            outcomes = _attempt(jobs, at_once, progress, stop)
            # A worker that was killed takes the pool with it, and cells that did nothing wrong:
            # each of them is tried again, alone, and may be killed once more.
            for i, outcome in enumerate(outcomes):
                if outcome is None:
                    outcomes[i] = (_attempt([jobs[i]], at_once, progress, stop)[0]
                                   or _attempt([jobs[i]], at_once, progress, stop)[0])
        return [outcome or Outcome(job.cell.name, "failed", "its process was killed, again and "
                                   "again: is there too little memory? --jobs 1 needs less")
                for job, outcome in zip(jobs, outcomes, strict=True)]
    except OSError as error:
        raise UserError(f"cells cannot run in processes of their own here ({error.strerror}): run "
                        "fewer at a time, or one after the other with --jobs 1") from error
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _attempt(jobs: list[Job], at_once: int, progress: Progress,
             stop: Stop) -> list[Outcome | None]:
    """Return the outcomes of the cells, showing their progress; None where a worker was killed.

    Raises
    ------
    KeyboardInterrupt
        If asked to stop, when all processes have ended.
    """
    context = get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with reader, writer, ThreadPoolExecutor(1, "comet-np-progress") as shower:
        with _born_deaf():  # starts the resource tracker, and ends the deafness too
            pool = ProcessPoolExecutor(at_once, context, _start_worker, (writer,))
        with pool:
            try:
                futures: list[Future[Outcome]] = []
                with _born_deaf(), suppress(BrokenProcessPool):  # as one may be killed already
                    for job in jobs:
                        futures.append(pool.submit(_run_remote, job))
                writer.close()  # so that the pipe ends with the workers
                shown = shower.submit(_show, reader, progress)
                while wait(futures, timeout=0.2).not_done and not stop.asked:
                    if shown.done():  # before its time: else the pipe fills up and all wait
                        shown.result()
                        break
                if stop.asked:
                    for worker in _processes(pool):
                        worker.terminate()  # a cell in training saves a checkpoint and stops
                    pool.shutdown(cancel_futures=True)
            except BaseException:  # asked twice, or there are no more processes to be had
                writer.close()
                for worker in _processes(pool):
                    worker.kill()
                raise
    shown.result()
    stop.raise_if_asked()
    outcomes = [None if isinstance(future.exception(), BrokenProcessPool) else future.result()
                for future in futures]
    return outcomes + (len(jobs) - len(outcomes)) * [None]


def _processes(pool: ProcessPoolExecutor) -> list[Any]:
    return list((pool._processes or {}).values())


def _show(reader: Any, progress: Progress) -> None:
    """Show the progress of the workers to the last word, which is said when all have ended."""
    with suppress(EOFError):
        while True:
            method, *arguments = reader.recv()
            getattr(progress, method)(*arguments)


# --- MPI ----------------------------------------------------------------------------------------


def by_mpi(jobs: list[Job], progress: Progress) -> list[Outcome]:
    """Run the cells on the ranks of an MPI job, started as `MPI_START` says.

    Raises
    ------
    UserError
        If mpi4py is not installed.
    """
    try:
        from mpi4py.futures import MPIPoolExecutor
    except ImportError:
        raise UserError("--mpi needs mpi4py: python -m pip install mpi4py, then start with "
                        f"{MPI_START}") from None
    with MPIPoolExecutor() as pool:
        futures = {pool.submit(_run_silent, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                cell, found = futures[future].cell, future.result().status == "found"
                if found:
                    progress.skip(cell.work)
                else:
                    progress.advance(cell.work, steps=0)
                progress.ended(cell.name, found)
        except KeyboardInterrupt:  # no other cell begins
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _run_silent(job: Job) -> Outcome:
    with open(os.devnull, "w") as nowhere:
        return run_job(job, Progress(job.cell.work, nowhere))
