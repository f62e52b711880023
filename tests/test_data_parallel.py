"""Data-parallel training: several ranks give the numbers of one process, and end together."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import cell, cli, sweep
from comet_np.experiments.cell import Job, Outcome
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.progress import Progress
from comet_np.experiments.quickstart import EXPERIMENT
from comet_np.experiments.signals import Stop
from comet_np.experiments.training import Diverged, RunConfig, loop, ranks, record, train
from comet_np.experiments.training.ranks import Connected
from comet_np.experiments.training.run import Run
from comet_np.gates import Comet
from comet_np.models.gpt2 import GPT2Config
from comet_np.optim import OptimizerConfig

from .runs import (
    MODEL,
    TRAINING,
    Watched,
    after_steps,
    assert_bit_for_bit,
    lines,
    small_data,
    trained,
)
from .tolerances import assert_close

ROOT = Path(__file__).resolve().parent.parent
# Steps of 4 mini-batches of 5 examples; the last of an epoch, of 50 examples, has 2.
CONFIG = RunConfig(replace(MODEL, gate=Comet(0.5), dropout=0.2), replace(
    TRAINING, batch=5, accumulate=4, optimizer=OptimizerConfig("adam", clip_norm=1.0)), seed=3)
GPT2 = replace(CONFIG, model=GPT2Config(vocabulary=17, positions=8, width=8, depth=1, heads=2))


def texts():
    """Return 50, 25 and 17 texts of 9 tokens."""
    draw = np.random.default_rng(1)
    x = [draw.integers(0, 17, (n, 9), dtype="uint8") for n in (50, 25, 17)]
    return Dataset("texts", "language", x[0], x[0], x[1], x[1], x[2], x[2], 17)


class Threads:
    """The communicator of one of some threads that stand for ranks."""

    def __init__(self, rank, shared):
        self.rank, self.shared = rank, shared

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return len(self.shared.values)

    def allgather(self, value):
        shared = self.shared
        shared.values[self.rank] = value
        shared.barrier.wait()
        found = list(shared.values)
        shared.barrier.wait()
        return found

    def Allreduce(self, in_place, array):
        array[...] = sum(self.allgather(array.copy()))

    def Bcast(self, array):
        array[...] = self.allgather(array.copy())[0]

    def Abort(self, status):
        self.shared.barrier.abort()


def on_ranks(size, work):
    """Return what some work, a function of its `Ranks`, returned or raised on each rank."""
    shared = SimpleNamespace(values=[None] * size, barrier=threading.Barrier(size, timeout=10))
    answers = [None] * size

    def of_rank(rank):
        try:
            answers[rank] = work(Connected(Threads(rank, shared)))
        except BaseException as error:
            answers[rank] = error

    threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(isinstance(answer, threading.BrokenBarrierError) for answer in answers)
    return answers


@pytest.fixture(autouse=True)
def no_mpi(monkeypatch):
    monkeypatch.setattr(ranks, "_in_place", lambda: None)


def train_on(size, config, data, folder, prepare=lambda run: None):
    """Train on some ranks, of which only the first has the folder; see `on_ranks`."""
    def work(of_run):
        runs = []

        def watched(*arguments):
            runs.append(Run(*arguments))
            prepare(runs[0])
            return runs[0]

        local.run = watched
        result = train(config, data, place(folder, of_run.rank), get_backend("numpy"),
                       stop=Stop(), ranks=of_run)
        return Watched(result, lines(folder), runs[0])

    local = threading.local()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Run", lambda *arguments: local.run(*arguments))
        return on_ranks(size, work)


def place(folder, rank):
    return folder / "elsewhere" / str(rank) if rank else folder


def by_step(run, rank, step, action):
    """Let an action follow a step of one rank."""
    if run.ranks.rank == rank:
        after_steps(run, lambda: action() if run.step == step else None)


@pytest.mark.parametrize(("config", "size"), [(CONFIG, 2), (CONFIG, 4), (GPT2, 3)])
@pytest.mark.usefixtures("small_blocks")
def test_ranks_give_the_numbers_of_one_process(tmp_path, config, size):
    data = texts() if config is GPT2 else small_data()
    alone = trained(config, data, tmp_path / "alone")
    together = train_on(size, config, data, tmp_path / "together")
    assert not (tmp_path / "together" / "elsewhere").exists()
    assert (tmp_path / "together" / "weights.npz").exists()
    assert together[0].lines[0] == alone.lines[0]  # blocks are summed up in the same order
    assert len(together[0].lines) == len(alone.lines) == 3
    for ours, theirs in zip(together[0].lines, alone.lines, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)
    for of_rank in together:
        for name, array in of_rank.arrays.items():
            assert_close(array, alone.arrays[name], "training")
            np.testing.assert_array_equal(array, together[0].arrays[name])


def test_a_stop_asked_of_one_rank_stops_all_and_the_run_goes_on(tmp_path):
    unstopped = train_on(2, CONFIG, small_data(), tmp_path / "unstopped")

    def ask(run):
        by_step(run, 1, 4, lambda: stops[threading.get_ident()].ask(signal.SIGTERM))

    stops = {}  # by the thread of a rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "stop_on_signals", lambda given: _kept(given, stops))
        answers = train_on(2, CONFIG, small_data(), tmp_path / "run", ask)
    assert [type(answer) for answer in answers] == [KeyboardInterrupt] * 2
    assert [answer.args for answer in answers] == [(signal.SIGTERM,)] * 2
    assert (tmp_path / "run" / "checkpoint").exists()
    resumed = train_on(2, CONFIG, small_data(), tmp_path / "run")
    for ours, theirs in zip(resumed, unstopped, strict=True):
        assert_bit_for_bit(ours, theirs)


def _kept(given, stops):
    stops[threading.get_ident()] = given
    return contextlib.nullcontext(given)


def fail():
    raise OSError(28, "No space left on device", "/somewhere")


def test_an_error_of_one_rank_is_raised_by_all(tmp_path):
    ours, theirs = train_on(2, CONFIG, small_data(), tmp_path,
                            lambda run: by_step(run, 1, 2, fail))
    assert (type(ours), ours.errno) == (type(theirs), theirs.errno) == (OSError, 28)
    assert "of rank 1" in str(ours.__cause__) and "in fail" in str(ours.__cause__)


def test_an_error_that_cannot_be_sent_is_told(tmp_path):
    class Odd(Exception):
        pass

    def work(of_run):
        with of_run.together():
            if of_run.rank == 1:
                raise Odd("so odd")

    ours, theirs = on_ranks(2, work)
    assert str(ours) == "Odd: so odd" and str(theirs) in ("so odd", "Odd: so odd")


def test_a_rank_that_is_interrupted_while_all_raise_an_error_does_not_wait():
    def work(of_run):
        with of_run.together():
            if of_run.rank == 0:
                raise UserError("bad")
            try:
                of_run.gather(1)
            except UserError:
                raise KeyboardInterrupt from None

    ours, theirs = on_ranks(2, work)
    assert (type(ours), type(theirs)) == (UserError, KeyboardInterrupt)


def test_divergence_on_one_rank_leaves_the_state(tmp_path):
    data = small_data("regression")
    x = data.x_train.copy()
    x[loop.stream(3, "order", 0).permutation(50)[5:10]] = np.inf  # the second mini-batch
    config = replace(CONFIG, model=MODEL)
    answers = train_on(2, config, replace(data, x_train=x), tmp_path)
    assert [type(answer) for answer in answers] == [Diverged] * 2
    assert "at step 0" in str(answers[0]) and (tmp_path / "diverged").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_a_disk_that_is_full_when_the_state_is_kept_ends_all(tmp_path, monkeypatch):
    def full(*arguments):
        raise UserError("cannot write")

    monkeypatch.setattr(record.checkpoint, "save", full)
    config = replace(CONFIG, training=replace(CONFIG.training, lr=1e300))
    answers = train_on(2, replace(config, model=MODEL), small_data(), tmp_path)
    assert [str(answer) for answer in answers] == ["cannot write"] * 2


def test_ranks_that_disagree_are_told_on_what(tmp_path):
    def work(of_run):
        train(replace(CONFIG, seed=of_run.rank // 2), small_data(), tmp_path,
              get_backend("numpy"), stop=Stop(), ranks=of_run)

    for answer in on_ranks(3, work):
        assert type(answer) is UserError
        assert str(answer) == ("the ranks disagree on seed: 0 (ranks 0, 1), 1 (rank 2); start all "
                               "with the same command, version and data")


def test_more_ranks_than_mini_batches_are_refused(tmp_path):
    for answer in train_on(5, CONFIG, small_data(), tmp_path):
        assert "raise --accumulate to at least 5, and lower --batch" in str(answer)


def test_the_first_rank_says_whether_a_cell_is_to_be_run(tmp_path, monkeypatch):
    config = EXPERIMENT.configure("smoke", {"datasets": ("arm",), "train": 20, "epochs": 1,
                                            "models": ("standard",), "widths": (5,), "seeds": 1,
                                            "accumulate": 2})
    one, = EXPERIMENT.cells(config)

    def work(of_run):
        local.ranks = of_run
        job = Job("quickstart", one, place(tmp_path, of_run.rank), "numpy", None)
        return [cell.run_job(job, Progress(1)) for _ in range(2)]

    local = threading.local()
    monkeypatch.setattr(cell, "of_command", lambda: local.ranks)
    monkeypatch.setattr(loop, "of_command", lambda: local.ranks)
    monkeypatch.setattr(loop, "stop_on_signals", lambda given: _kept(Stop(), {}))
    for outcomes in on_ranks(2, work):
        assert outcomes == [Outcome(one.name, "done"), Outcome(one.name, "found")]
    assert not (tmp_path / "elsewhere").exists()
    starts = (one.folder(tmp_path) / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["ranks"] for line in starts] == [2]


def test_nccl_is_told_of_the_whole_buffer():
    calls = []
    nccl = SimpleNamespace(NCCL_FLOAT32=7, NCCL_FLOAT64=8, NCCL_SUM=0)
    array = SimpleNamespace(data=SimpleNamespace(ptr=123), size=5, dtype=np.dtype("float32"))
    communicator = SimpleNamespace(allReduce=lambda *arguments: calls.append(arguments))
    ranks.sum_on_device(communicator, nccl, array, 99)
    assert calls == [(123, 123, 5, 7, 0, 99)]


ARGUMENTS = ("run", "quickstart", "--preset", "smoke", "--datasets", "arm", "--data-parallel")


@pytest.mark.parametrize(("arguments", "message"), [
    ((*ARGUMENTS, "--jobs", "2"), "leave out --mpi and --jobs"),
    ((*ARGUMENTS, "--mpi"), "leave out --mpi and --jobs"),
    (("run", "fig2", "--data-parallel"), "fig2 has no --accumulate"),
])
def test_what_ranks_cannot_do_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    pytest.importorskip("mpi4py", reason="the mpi extra is not installed")
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1
    assert "there is one rank only" in out


class Two(ranks.Ranks):
    """Two ranks on one machine, as the first sees them that hears of no other."""

    size = neighbours = 2


def test_what_ranks_share_and_what_each_needs_is_told(tmp_path, monkeypatch, capsys):
    """The time of a cell is shared out, and on a CPU each rank needs the memory of one."""
    told = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranks, "joined", contextlib.nullcontext)
    monkeypatch.setattr(sweep.Sweep, "run", lambda sweep: [])
    monkeypatch.setattr(sweep, "expected_seconds", lambda cells, *rest: told.append(cells) or 0)
    for of_run in ranks.ALONE, Two():
        monkeypatch.setattr(ranks, "_of_command", of_run)
        assert cli.main([*ARGUMENTS, "--accumulate", "2"]) == 0
    capsys.readouterr()
    for alone, shared in zip(*told, strict=True):
        assert (shared.work, shared.memory) == (alone.work / 2, alone.memory * 2)
    monkeypatch.setattr(sweep, "physical_memory", lambda: 1.5 * max(c.memory for c in told[0]))
    assert cli.main([*ARGUMENTS, "--accumulate", "2"]) == 2
    assert capsys.readouterr().err.endswith("or --train, or start fewer ranks on each machine\n")
    monkeypatch.setattr(ranks, "_of_command", ranks.ALONE)
    assert cli.main([*ARGUMENTS, "--accumulate", "2"]) == 0


@pytest.mark.parametrize(("ranks_here", "devices", "sharing"), [(3, 2, 2), (2, 2, 1), (1, 4, 1)])
def test_ranks_share_the_memory_of_a_gpu_if_it_has_too_few(ranks_here, devices, sharing):
    used = []
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDeviceCount=lambda: devices),
        Device=lambda number: SimpleNamespace(use=lambda: used.append(number)))
    of_run = Connected(Threads(0, SimpleNamespace(values=[None], barrier=threading.Barrier(1))),
                       ranks_here - 1, ranks_here)
    of_run.place(SimpleNamespace(waits=True, xp=SimpleNamespace(cuda=cuda)))
    assert (used, of_run.neighbours, of_run._crowded) == (
        [(ranks_here - 1) % devices], sharing, sharing > 1)


def mpiexec(*arguments):
    """Run a Python program on two ranks and return what became of it."""
    pytest.importorskip("mpi4py", reason="the mpi extra is not installed")
    found = shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpiexec on this machine")
    return subprocess.run(
        [found, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *arguments],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120, check=False)


# A rank hears of SIGTERM after a step; then the run goes on, and at last a rank is killed.
JOB = """
import os, signal, sys
from pathlib import Path
from mpi4py import MPI
from comet_np.backends import get_backend
from comet_np.experiments.training import loop, run, train
from comet_np.experiments.training.ranks import Connected
from tests.runs import after_steps
from tests.test_data_parallel import GPT2, texts

ranks, folder, action = Connected(MPI.COMM_WORLD), Path(sys.argv[1]), signal.SIGTERM

class Run(run.Run):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        if ranks.rank == 1 and action is not None:
            after_steps(self, lambda: os.kill(os.getpid(), action) if self.step == 4 else None)

loop.Run = Run
for folder, action in (("run", signal.SIGTERM), ("run", None), ("killed", signal.SIGKILL)):
    try:
        train(GPT2, texts(), Path(sys.argv[1]) / folder, get_backend("numpy"), ranks=ranks)
        print("finished", ranks.rank, flush=True)
    except KeyboardInterrupt as stop:
        print("stopped by", stop.args[0], flush=True)
"""


@pytest.mark.slow
def test_processes_are_stopped_go_on_and_end_with_one_that_is_killed(tmp_path):
    answer = mpiexec("-c", JOB, str(tmp_path))
    assert answer.returncode != 0
    said = answer.stdout.split("\n")
    assert said.count("stopped by 15") == 2, answer.stderr
    assert {"finished 0", "finished 1"} < set(said)
    unstopped, _ = train_on(2, GPT2, texts(), tmp_path / "unstopped")
    assert lines(tmp_path / "run") == unstopped.lines
    ours, theirs = (np.load(tmp_path / name / "weights.npz") for name in ("run", "unstopped"))
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert not (tmp_path / "killed" / "weights.npz").exists()


@pytest.mark.slow
def test_the_command_runs_cells_on_all_ranks(tmp_path):
    pytest.importorskip("matplotlib")
    answer = mpiexec("-m", "comet_np.experiments.cli", *ARGUMENTS, "--epochs", "1", "--train",
                     "100", "--widths", "5", "--models", "standard", "--seeds", "1",
                     "--accumulate", "2", "--out", str(tmp_path))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("1 cell run in") == 1
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["ranks"], run["jobs"]) == (2, 1)
