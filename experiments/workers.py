"""How the cells of a sweep are run: in turn, by processes, by threads of a GPU, or by MPI ranks."""

import os
import queue
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from typing import Any

from ..backends import get_backend
from ..backends.cpu import threads
from ..errors import UserError
from .cell import Job, Outcome, run_job
from .progress import Progress
from .training.signals import stop_on_signals

MPI_START = "mpiexec -n RANKS python -m mpi4py.futures -m comet_np.experiments.cli run ... --mpi"


def in_turn(jobs: list[Job], progress: Progress) -> list[Outcome]:
    """Run the cells one after the other, in this process."""
    return [run_job(job, progress) for job in jobs]


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
                return run_job(job, shared, stop)
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


class _Remote:
    """The progress of a worker process: sent to the parent, a few times a second."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages
        self._work, self._steps, self._sent = 0.0, 0, time.monotonic()

    def skip(self, work: float) -> None:
        self._send("")
        self._messages.put(("skip", work))

    def advance(self, work: float, text: str = "", steps: int = 1) -> None:
        self._work += work
        self._steps += steps
        if time.monotonic() - self._sent > 0.2:
            self._send(text)

    def _send(self, text: str) -> None:
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


def _run_remote(job: Job, messages: Any) -> Outcome:
    global _stopped
    if _stopped:
        return Outcome(job.cell.name, "busy", "not started")
    try:
        return run_job(job, _Remote(messages))
    except KeyboardInterrupt:
        _stopped = True
        return Outcome(job.cell.name, "busy", "stopped")


def by_processes(jobs: list[Job], at_once: int, progress: Progress) -> list[Outcome]:
    """Run several cells at once in processes that share out the threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    # read by the workers' BLAS when it is loaded
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads() // at_once))
    context = get_context("spawn")
    try:
        manager = SyncManager(ctx=context)
        manager.start(_start_worker)
        with manager:
            messages = manager.Queue()

            def attempt(jobs: list[Job]) -> list[Outcome | None]:
                with ProcessPoolExecutor(at_once, context, _start_worker) as pool:
                    return _collect(pool, jobs, messages, progress)

            outcomes = attempt(jobs)
            # A worker that was killed takes the pool with it, and cells that did nothing wrong:
            # each of them is tried again, alone, and may be killed once more.
            for i, outcome in enumerate(outcomes):
                if outcome is None:
                    outcomes[i] = attempt([jobs[i]])[0] or attempt([jobs[i]])[0]
            return [outcome or Outcome(job.cell.name, "failed", "its process was killed, again "
                                       "and again: is there too little memory? --jobs 1 needs less")
                    for job, outcome in zip(jobs, outcomes, strict=True)]
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _collect(pool: ProcessPoolExecutor, jobs: list[Job], messages: Any,
             progress: Progress) -> list[Outcome | None]:
    """Return the outcomes of the cells, showing their progress; None where a worker was killed."""
    futures = [pool.submit(_run_remote, job, messages) for job in jobs]
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
        raise UserError('--mpi needs mpi4py: pip install "comet-np[mpi]", then start with '
                        f"{MPI_START}") from None
    with MPIPoolExecutor() as pool:
        futures = [pool.submit(_run_silent, job) for job in jobs]
        outcomes = []
        for job, future in zip(jobs, futures, strict=True):
            outcomes.append(future.result())
            count = progress.skip if outcomes[-1].status == "found" else progress.advance
            count(job.cell.work)
        return outcomes


def _run_silent(job: Job) -> Outcome:
    with open(os.devnull, "w") as nowhere:
        return run_job(job, Progress(job.cell.work, nowhere))
