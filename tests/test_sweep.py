"""Sweeps: a cell is run once, whatever ends it, and however several are run at a time."""

import dataclasses
import functools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from comet_np import checkpoint
from comet_np.backends import get_backend
from comet_np.backends.cpu import threads
from comet_np.experiments import cell as cells_module
from comet_np.experiments import files, quickstart, sweep, workers
from comet_np.experiments.cell import Job, Outcome, less_memory, run_job
from comet_np.experiments.files import write_result
from comet_np.experiments.progress import Progress
from comet_np.experiments.registry import experiment
from comet_np.experiments.signals import Stop
from comet_np.experiments.training import loop
from comet_np.records import read_json

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Whoever started these tests may have let it be ignored, as shells do in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def jobs_of(out, name="quickstart", **flags):
    """Return jobs of small cells."""
    small = {"datasets": ("arm",), "epochs": 1, "train": 96, "widths": (20,), "seeds": 1,
             "models": ("comet",)}
    grid = experiment(name)
    config = grid.configure("smoke", small | flags if name == "quickstart" else flags)
    return [Job(name, cell, out, "numpy", None) for cell in grid.cells(config)]


def cells_run_by(monkeypatch, run_cell):
    """Let the quickstart run its cells by another function, in this process."""
    monkeypatch.setattr(quickstart, "EXPERIMENT",
                        dataclasses.replace(quickstart.EXPERIMENT, run_cell=run_cell))


def folder_of(job):
    return job.cell.folder(job.out)


def lines(folder):
    """Return the metrics of a cell without their times."""
    return [json.loads(line) | {"seconds": None}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- one cell -----------------------------------------------------------------------------------


def test_what_a_cell_returns_is_its_result(tmp_path, monkeypatch):
    job, = jobs_of(tmp_path)
    cells_run_by(monkeypatch, lambda spec, place: {"said by": spec.run.seed})
    assert run_job(job, Progress(1)) == Outcome(job.cell.name, "done")
    assert read_json(folder_of(job) / "result.json") == {"said by": 0, "files": {}}
    assert job.cell.result(tmp_path) == {"said by": 0}


def test_a_finished_cell_is_not_run_again(tmp_path, monkeypatch):
    job, = jobs_of(tmp_path)
    run_job(job, Progress(1))
    before = job.cell.result(tmp_path)
    cells_run_by(monkeypatch, lambda spec, place: pytest.fail("run again"))
    assert run_job(job, Progress(1)).status == "found"
    assert job.cell.result(tmp_path) == before


def test_a_cell_that_another_sweep_finishes_meanwhile_is_not_run_again(tmp_path, monkeypatch):
    job, = jobs_of(tmp_path)
    lock = cells_module.locked

    @contextmanager
    def lock_late(file):
        write_result(file.parent, {"by": "another sweep"})
        with lock(file) as ours:
            yield ours

    monkeypatch.setattr(cells_module, "locked", lock_late)
    cells_run_by(monkeypatch, lambda spec, place: {"by": "this one"})
    assert run_job(job, Progress(1)).status == "found"
    assert job.cell.result(tmp_path) == {"by": "another sweep"}


def test_a_cell_is_told_where_it_runs(tmp_path, monkeypatch):
    job, = jobs_of(tmp_path)
    stop, places = Stop(), []
    cells_run_by(monkeypatch, lambda spec, place: places.append(place) or {})
    run_job(job._replace(data="the data"), Progress(1), stop)
    place, = places
    assert place[:3] == (folder_of(job), get_backend("numpy"), "the data")
    assert place.stop is stop


def test_two_cannot_hold_a_lock(tmp_path):
    lock = tmp_path / "lock"
    with cells_module.locked(lock) as first, cells_module.locked(lock) as second:
        assert (first, second) == (True, False)
    with cells_module.locked(lock) as third:
        assert third


def test_the_traceback_of_a_failed_cell_is_kept(tmp_path, monkeypatch):
    def fail(spec, place):
        raise RuntimeError("planted")

    job, = jobs_of(tmp_path)
    cells_run_by(monkeypatch, fail)
    file = folder_of(job) / "error.txt"
    assert run_job(job, Progress(1)) == Outcome(
        job.cell.name, "failed", f"RuntimeError: planted (the traceback is in {file})")
    assert file.read_text().startswith("Traceback")
    assert 'raise RuntimeError("planted")' in file.read_text()


def test_every_start_is_recorded(tmp_path, monkeypatch):
    job, = jobs_of(tmp_path)

    def fail(spec, place):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        cells_run_by(patch, fail)
        assert run_job(job, Progress(1)).status == "failed"
    assert run_job(job, Progress(1)).status == "done"
    starts = (folder_of(job) / "starts.jsonl").read_text().splitlines()
    assert len(starts) == 2
    for start in map(json.loads, starts):
        assert {"time", "comet-np", "git", "python", "machine", "backend", "device", "threads",
                "numpy"} <= set(start)


def test_checkpoints_go_when_the_result_is_there(tmp_path, monkeypatch):
    job, = jobs_of(tmp_path)
    unlink, seen = Path.unlink, []

    def watched(file, *arguments, **options):
        if file.parent == folder_of(job) and file.name.startswith("checkpoint"):
            seen.append((file.name, job.cell.result(tmp_path)))
        unlink(file, *arguments, **options)

    def leave_checkpoints(spec, place):
        for name in ("checkpoint", "checkpoint.previous", "checkpoint.new"):
            (place.folder / name).write_text("of the training")
        return {"a": "result"}

    cells_run_by(monkeypatch, leave_checkpoints)
    monkeypatch.setattr(Path, "unlink", watched)
    assert run_job(job, Progress(1)).status == "done"
    assert len(seen) == 3
    assert all(result == {"a": "result"} for _, result in seen)
    assert not list(folder_of(job).glob("checkpoint*"))


def test_the_error_of_a_cell_goes_when_it_is_done(tmp_path, monkeypatch):
    job, = jobs_of(tmp_path)
    with monkeypatch.context() as patch:
        cells_run_by(patch, lambda spec, place: 1 / 0)
        assert run_job(job, Progress(1)).status == "failed"
        assert (folder_of(job) / "error.txt").exists()
    assert run_job(job, Progress(1)).status == "done"
    assert not (folder_of(job) / "error.txt").exists()


def test_a_kill_between_result_and_clearing_up_loses_nothing(tmp_path, monkeypatch):
    job, = jobs_of(tmp_path)

    def leave_a_checkpoint(spec, place):
        (place.folder / "checkpoint").touch()
        return {"a": "result"}

    def killed(file, missing_ok=False):
        raise SystemExit

    cells_run_by(monkeypatch, leave_a_checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(SystemExit):
            run_job(job, Progress(1))
    assert run_job(job, Progress(1)).status == "found"
    assert job.cell.result(tmp_path) == {"a": "result"}


def test_without_a_result_the_checkpoint_stays(tmp_path, monkeypatch):
    job, = jobs_of(tmp_path)

    def leave_a_checkpoint(spec, place):
        (place.folder / "checkpoint").touch()
        return {"a": "result"}

    def full(path, *parts):
        raise checkpoint.CheckpointError("no space left")

    cells_run_by(monkeypatch, leave_a_checkpoint)
    monkeypatch.setattr(files, "write_result", full)
    assert run_job(job, Progress(1)) == Outcome(job.cell.name, "failed", "no space left")
    assert (folder_of(job) / "checkpoint").exists()
    assert job.cell.result(tmp_path) is None


@pytest.mark.parametrize("checkpoints", [6, 0])
def test_metrics_are_on_the_disk_before_what_stands_for_them(tmp_path, monkeypatch, checkpoints):
    """Before a checkpoint, which says how much of them to keep, and before the result."""
    job, = jobs_of(tmp_path, epochs=2)
    metrics = folder_of(job) / "metrics.jsonl"
    fsync, replace = os.fsync, os.replace
    synced, stood = [0], []

    def watched_fsync(descriptor):
        fsync(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(metrics)):
            synced.append(os.fstat(descriptor).st_size)

    def watched_replace(source, target):
        if Path(target).name in ("checkpoint", "result.json"):
            stood.append(Path(target).name)
            claimed = (metrics.stat().st_size if Path(target).name == "result.json"
                       else checkpoint.load(Path(source))[1]["metrics_bytes"])
            assert synced[-1] >= claimed > 0
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(loop, "due", lambda run: checkpoints > 0)
    assert run_job(job, Progress(1)).status == "done"
    # a checkpoint a step: 2 epochs of 96 examples in batches of 32
    assert stood == checkpoints * ["checkpoint"] + ["result.json"]


def test_a_failed_cell_counts_as_done_in_the_time_left(tmp_path, monkeypatch):
    jobs = jobs_of(tmp_path, seeds=2)

    def fail(spec, place):
        place.progress.skip(0.3 * jobs[0].cell.work)
        place.progress.advance(0.2 * jobs[0].cell.work)
        raise RuntimeError("planted")

    cells_run_by(monkeypatch, fail)
    progress = Progress(sum(job.cell.work for job in jobs))
    assert {run_job(job, progress).status for job in jobs} == {"failed"}
    assert progress.done == pytest.approx(progress.total)


@pytest.mark.parametrize(("name", "flags", "advice"), [
    ("quickstart", {}, "lower --widths or --batch or --train, or run fewer cells at once"),
    ("quickstart", {"precision": "float64"}, "--train, or the --precision, or run fewer cells"),
    ("fig3", {}, "lower --images, or run fewer cells at once with --jobs 1")])
def test_too_little_memory_names_flags_that_the_experiment_has(tmp_path, monkeypatch, name, flags,
                                                               advice):
    def greedy(spec, place):
        raise MemoryError("Unable to allocate 9 EiB")

    monkeypatch.setattr(cells_module, "experiment", lambda name: dataclasses.replace(
        experiment(name), run_cell=greedy))
    outcome = run_job(jobs_of(tmp_path, name, **flags)[0], Progress(1))
    assert outcome.message.startswith("too little memory (Unable to allocate 9 EiB; ")
    assert advice in outcome.message


@pytest.mark.parametrize("flags", [{"jobs": 1}, {"jobs": 2, "mpi": True}])
def test_cells_that_run_alone_are_not_told_to_run_alone(tmp_path, monkeypatch, flags):
    told = []
    monkeypatch.setattr(sweep, "in_turn", lambda jobs, progress: told.extend(jobs))
    monkeypatch.setattr(sweep, "by_mpi", lambda jobs, progress: told.extend(jobs))
    small_sweep(tmp_path)._replace(**flags).run()
    assert all(job.alone for job in told)
    assert less_memory(experiment("quickstart"), told[0].cell, told[0].alone) == (
        "lower --widths or --batch or --train")


# --- several at a time --------------------------------------------------------------------------


def small_sweep(out, jobs=1, **flags):
    """Return a sweep of six small cells."""
    cells = [job.cell for job in jobs_of(out, models=("standard", "comet"), seeds=3, **flags)]
    return sweep.Sweep("quickstart", cells, out, jobs=jobs)


def by_threads(run, at_once=2):
    """Run a sweep's cells in threads, as on a GPU."""
    jobs = [Job("quickstart", cell, run.out, "numpy", None) for cell in run.cells]
    return workers.by_threads(jobs, at_once, Progress(sum(cell.work for cell in run.cells)))


@pytest.mark.parametrize(("jobs", "waits", "mpi", "chosen"), [
    (1, False, False, "in_turn"), (2, False, False, "by_processes"), (1, True, False, "in_turn"),
    (2, True, False, "by_threads"), (1, False, True, "by_mpi"), (2, True, True, "by_mpi")])
def test_cells_go_to_processes_on_a_cpu_and_to_threads_on_a_gpu(tmp_path, monkeypatch, jobs, waits,
                                                                mpi, chosen):
    for way in ("in_turn", "by_processes", "by_threads", "by_mpi"):
        monkeypatch.setattr(sweep, way, lambda jobs, *rest, way=way: (way, len(jobs), rest[:-1]))
    monkeypatch.setattr(get_backend("numpy"), "waits", waits)
    run = small_sweep(tmp_path, jobs)._replace(mpi=mpi)
    assert run.run() == (chosen, 6, (jobs,) if chosen in ("by_processes", "by_threads") else ())


def test_the_expected_time_is_the_work_at_the_speed_of_a_product(tmp_path, monkeypatch):
    """Here of five products of 2 x 128 x 1024 x 1024 operations in half a second."""
    now = iter(range(100))
    monkeypatch.setattr(sweep.time, "perf_counter", lambda: next(now) / 2)
    cells = small_sweep(tmp_path).cells
    expected = sweep.expected_seconds(cells, get_backend("numpy"))
    work = sum(cell.work for cell in cells)
    assert expected == pytest.approx(work / (sweep.SHARE_IN_PRODUCTS * 20 * 128 * 1024**2))


def test_the_summary_counts_cells_and_says_what_became_of_the_others():
    outcomes = [Outcome("a", "done"), Outcome("b", "found"), Outcome("c", "busy", "elsewhere"),
                Outcome("d", "done"), Outcome("e", "failed", "why")]
    assert sweep.summary(outcomes, 2.0) == ("2 cells run in 2.0 s, 1 found finished, 1 busy "
                                            "elsewhere, 1 FAILED\n  c: elsewhere\n  e: why")
    assert sweep.summary(outcomes[:1], 2.0) == "1 cell run in 2.0 s"


def test_threads_give_what_one_after_the_other_gives(tmp_path):
    one, many = small_sweep(tmp_path / "one"), small_sweep(tmp_path / "many")
    assert one.run() == by_threads(many, 3) == [Outcome(cell.name, "done") for cell in one.cells]
    for cell in one.cells:
        a, b = cell.folder(one.out), cell.folder(many.out)
        assert lines(a) == lines(b)
        assert cell.result(one.out)["test_loss"] == cell.result(many.out)["test_loss"]


def test_a_failed_cell_does_not_end_the_other_threads(tmp_path, monkeypatch):
    train = quickstart.EXPERIMENT.run_cell

    def fail_once(spec, place):
        if spec.run.seed == 0 and spec.run.model.gate is None:
            raise RuntimeError("planted")
        return train(spec, place)

    cells_run_by(monkeypatch, fail_once)
    outcomes = by_threads(small_sweep(tmp_path))
    assert [outcome.status for outcome in outcomes] == ["failed", *5 * ["done"]]


def test_ctrl_c_stops_all_threads_with_checkpoints(tmp_path, monkeypatch):
    """And begins no other cell; then all goes on to what one after the other gives."""
    one, many = small_sweep(tmp_path / "one", epochs=6), small_sweep(tmp_path / "many", epochs=6)
    one.run()
    take_steps, met = loop.take_steps, threading.Barrier(2)
    ask, asked = Stop.ask, threading.Event()

    def both_in_the_middle(run, *arguments):
        if run.step == 7:
            if met.wait(timeout=30) == 0:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert asked.wait(timeout=30)
        take_steps(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_steps", both_in_the_middle)
        patch.setattr(Stop, "ask", lambda stop, *number: (ask(stop, *number), asked.set()))
        with pytest.raises(KeyboardInterrupt):
            by_threads(many)
    begun = list(many.out.glob("cells/*"))
    assert len(begun) == 2
    for folder in begun:
        assert checkpoint.load(folder / "checkpoint")[1]["step"] == 8
        assert not (folder / "result.json").exists()
    by_threads(many)
    for cell in one.cells:
        assert lines(cell.folder(one.out)) == lines(cell.folder(many.out))


def run_with(run_cell, job):
    """Do what a worker process does, with another cell function."""
    quickstart.EXPERIMENT = dataclasses.replace(quickstart.EXPERIMENT, run_cell=run_cell)
    return run_job(job, workers._Remote(workers._pipe.send))


def say_threads(spec, place):
    """Return what decides about the threads of this process, once two cells are running."""
    (place.folder / "running").touch()
    wait_for(lambda: len(list(place.folder.parent.glob("*/running"))) == 2)
    return {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"], "threads": threads()}


@pytest.mark.parametrize("before", [None, "7"])
def test_processes_run_side_by_side_and_share_out_the_threads(tmp_path, monkeypatch, before):
    if before is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    monkeypatch.setattr(workers, "threads", lambda: 7)
    monkeypatch.setattr(workers, "_run_remote", functools.partial(run_with, say_threads))
    jobs = jobs_of(tmp_path, seeds=2)
    outcomes = workers.by_processes(jobs, 2, Progress(1))
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    for job in jobs:
        assert job.cell.result(tmp_path) == {"OMP_NUM_THREADS": "3", "threads": 3}
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_a_worker_tells_all_that_it_did():
    """However short a cell is, so that the time left is right."""
    messages = queue.SimpleQueue()
    remote = workers._Remote(messages.put)
    for work in (1.0, 2.0):
        remote.advance(work)
    remote.skip(4.0)
    progress = Progress(7.0)
    while not messages.empty():
        method, *arguments = messages.get()
        getattr(progress, method)(*arguments)
    assert (progress.done, progress.steps) == (7.0, 2)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def die_once(spec, place):
    """Kill the worker the first time a cell comes, and finish it the second time."""
    mark = place.folder / "died"
    if spec.run.seed == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def die(spec, place):
    """Kill the worker whenever one cell comes."""
    if spec.run.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.slow
def test_a_killed_worker_does_not_end_the_sweep(tmp_path, monkeypatch):
    jobs = jobs_of(tmp_path, seeds=3, models=("standard", "comet"))
    monkeypatch.setattr(workers, "_run_remote", functools.partial(run_with, die_once))
    outcomes = workers.by_processes(jobs, 2, Progress(1))
    assert {outcome.status for outcome in outcomes} <= {"done", "found"}
    assert len(list(tmp_path.glob("cells/*/died"))) == 2  # both models of seed 1


@pytest.mark.slow
def test_a_cell_whose_worker_is_killed_again_and_again_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_run_remote", functools.partial(run_with, die))
    outcomes = workers.by_processes(jobs_of(tmp_path, seeds=3), 2, Progress(1))
    assert [o.status in ("done", "found") for o in outcomes] == [True, False, True]
    assert "its process was killed, again and again" in outcomes[1].message


@pytest.mark.slow
def test_mpi_with_two_ranks(tmp_path):
    pytest.importorskip("mpi4py", reason="the mpi extra is not installed")
    pytest.importorskip("matplotlib")
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec on this machine")
    answer = subprocess.run(
        [mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m",
         "mpi4py.futures", "-m", "comet_np.experiments.cli", "run", "quickstart", "--preset",
         "smoke", "--datasets", "arm", "--epochs", "1", "--train", "200", "--widths", "20",
         "--models", "standard,comet", "--mpi", "--out", str(tmp_path / "mpi")],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "4 cells run in" in answer.stdout
