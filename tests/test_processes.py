"""Processes and signals: a sweep that is killed or stopped, at any moment, leaves no process."""

import contextlib
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comet_np import checkpoint
from comet_np.errors import UserError
from comet_np.experiments import cli, quickstart, workers
from comet_np.experiments.progress import Progress
from comet_np.experiments.signals import SIGNALS
from tests.test_sweep import jobs_of

ROOT = Path(__file__).resolve().parent.parent
ARM = ("run", "quickstart", "--preset", "smoke", "--datasets", "arm", "--epochs", "1", "--train",
       "200", "--widths", "20", "--models", "standard", "--seeds", "2", "--jobs", "1")
# Of an interpreter that is a worker: it waits before it imports anything.
HELD = """
import os, sys, time
from pathlib import Path
if "--multiprocessing-fork" in sys.orig_argv:
    folder = Path(os.environ["HELD"])
    (folder / f"{os.getpid()}.held").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def signals_are_heard():
    """Whoever started these tests may have let them be ignored, as shells and nohup do."""
    before = {number: signal.signal(number, signal.default_int_handler if number == signal.SIGINT
                                    else signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def running(group):
    """Return the states, by Linux's /proc, of the processes of a group that have not ended."""
    states = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                states.append(state)
    return states


class Sweep:
    """A long sweep of two processes, in a process group of its own.

    held : whether its workers wait before they import anything, until `go`.
    """

    def __init__(self, folder, held=False):
        self.out, self.folder = folder / "out", folder
        (folder / "sitecustomize.py").write_text(HELD if held else "")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "comet_np.experiments.cli", "run", "quickstart", "--preset",
             "smoke", "--datasets", "arm", "--seeds", "3", "--models", "comet", "--epochs", "5000",
             "--jobs", "2", "--out", str(self.out)], text=True,
            env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "HELD": str(folder)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def is_alive(self):
        """Return whether there is a process left in the group, the resource tracker or another.

        One that has ended, and that whoever adopted it has not asked for, is none.
        """
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return bool(running(self.process.pid)) or not Path("/proc/self").exists()

    def held(self):
        return [int(file.stem) for file in self.folder.glob("*.held")]

    def go(self):
        (self.folder / "go").touch()

    def in_training(self):
        """Return how many cells have begun to train."""
        return sum(file.stat().st_size > 500 for file in self.out.glob("cells/*/metrics.jsonl"))

    def reach(self, moment):
        if moment == "workers import":
            wait_for(lambda: len(self.held()) == 2)
        else:
            wait_for(lambda: self.in_training() == 2)

    def signal(self, number, to_all):
        (os.killpg if to_all else os.kill)(self.process.pid, number)

    def ends(self):
        """Wait for the end and return the status and the output."""
        output, _ = self.process.communicate(timeout=60)
        wait_for(lambda: not self.is_alive())
        return self.process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["workers import", "training"])
def test_no_process_outlives_a_killed_parent(tmp_path, moment):
    with Sweep(tmp_path, moment == "workers import") as sweep:
        sweep.reach(moment)
        sweep.signal(signal.SIGKILL, to_all=False)
        sweep.process.wait()
        sweep.go()
        wait_for(lambda: not sweep.is_alive(), seconds=10)
        if moment == "workers import":
            assert not list(sweep.out.glob("cells/*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to_all", "moment"), [
    (signal.SIGINT, True, "training"), (signal.SIGINT, False, "training"),
    (signal.SIGINT, True, "workers import"), (signal.SIGTERM, True, "training"),
    (signal.SIGTERM, False, "training"), (signal.SIGTERM, True, "workers import"),
    (signal.SIGHUP, True, "training"), (signal.SIGHUP, True, "workers import")])
def test_a_signal_stops_all_processes_with_a_checkpoint(tmp_path, number, to_all, moment):
    """Whether the terminal's, to all of them, or to the parent alone."""
    with Sweep(tmp_path, moment == "workers import") as sweep:
        sweep.reach(moment)
        sweep.signal(number, to_all)
        sweep.go()
        status, output = sweep.ends()
        assert status == 128 + number, output
        assert "the same command goes on from here" in output
        for unwanted in ("Traceback", "Warning", "leaked"):
            assert unwanted not in output
        if moment == "training":
            folders = list(sweep.out.glob("cells/*"))
            assert len(folders) == 2  # no third cell was begun
            for folder in folders:
                checkpoint.load(folder / "checkpoint")


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_imports_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("HELD", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(HELD + """
    import signal
    try:
        (folder / "killed").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    except FileExistsError:
        pass
""")
    (tmp_path / "go").touch()
    outcomes = workers.by_processes(jobs_of(tmp_path, seeds=2), 2, Progress(1))
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    assert len(list(tmp_path.glob("*.held"))) >= 3


def test_processes_that_cannot_be_started_are_a_sentence(tmp_path, monkeypatch):
    def submit(pool, *call):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(workers.ProcessPoolExecutor, "submit", submit)
    with pytest.raises(UserError, match=r"temporarily unavailable.*--jobs 1"):
        workers.by_processes(jobs_of(tmp_path), 2, Progress(1))


# --- one process --------------------------------------------------------------------------------


def run_cells_by(monkeypatch, run_cell):
    monkeypatch.setattr(quickstart, "EXPERIMENT",
                        dataclasses.replace(quickstart.EXPERIMENT, run_cell=run_cell))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", ["loading data", "drawing"])
def test_a_signal_outside_of_training_ends_the_command(tmp_path, monkeypatch, capsys, number,
                                                       moment):
    def interrupted(*arguments):
        signal.raise_signal(number)
        pytest.fail("went on")

    monkeypatch.chdir(tmp_path)
    if moment == "drawing":
        monkeypatch.setattr(quickstart, "EXPERIMENT", dataclasses.replace(
            quickstart.EXPERIMENT, draw=interrupted, run_cell=lambda spec, place: {},
            table=lambda config, out: ""))
    else:
        run_cells_by(monkeypatch, interrupted)
    before = signal.getsignal(number)
    assert cli.main(ARM) == 128 + number
    assert "the same command goes on from here" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_twice_is_heard_once(tmp_path, monkeypatch):
    """As when a terminal is closed: the system sends SIGHUP, and so does the shell."""
    def interrupted(spec, place):
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            (place.folder / "cleared up").touch()

    monkeypatch.chdir(tmp_path)
    run_cells_by(monkeypatch, interrupted)
    assert cli.main(ARM) == 128 + signal.SIGHUP
    assert len(list(tmp_path.rglob("cleared up"))) == 1


def test_what_is_ignored_stays_so(tmp_path, monkeypatch):
    """SIGHUP under nohup."""
    heard = []

    def not_interrupted(spec, place):
        signal.raise_signal(signal.SIGHUP)
        heard.append(spec)
        return {}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "EXPERIMENT", dataclasses.replace(
        quickstart.EXPERIMENT, run_cell=not_interrupted, draw=lambda config, out: [out],
        table=lambda config, out: ""))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert cli.main(ARM) == 0
    assert len(heard) == 2


def test_a_request_that_a_library_swallowed_stops_the_training(tmp_path, monkeypatch):
    train = quickstart.EXPERIMENT.run_cell

    def swallow(spec, place):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        return train(spec, place)

    monkeypatch.chdir(tmp_path)
    run_cells_by(monkeypatch, swallow)
    assert cli.main(ARM) == 128 + signal.SIGTERM
    saved, = tmp_path.rglob("checkpoint")
    assert checkpoint.load(saved)[1]["step"] == 1


def test_the_status_is_that_of_the_signal_wherever_it_came(tmp_path):
    """Under ``python -m`` Python ends as if by Ctrl-C if the exception passed an `exec`."""
    (tmp_path / "program.py").write_text(f"""
import dataclasses, signal, sys
from comet_np.experiments import cli, quickstart
quickstart.EXPERIMENT = dataclasses.replace(
    quickstart.EXPERIMENT, run_cell=lambda spec, place: exec("signal.raise_signal(15)"))
sys.exit(cli.main({ARM!r}))
""")
    answer = subprocess.run(
        [sys.executable, "-m", "program"], cwd=tmp_path, env=os.environ | {
            "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert answer.returncode == 143, answer.stderr


@pytest.mark.parametrize("flag", ["--help", "run"])
def test_help_says_what_the_exit_status_means(capsys, flag):
    with pytest.raises(SystemExit):
        cli.main([flag] if flag == "--help" else [flag, "--help"])
    assert "128 + n" in capsys.readouterr().out
