"""The command: what it prints, what it refuses and in which words, and how sweeps behave."""

import dataclasses
import errno
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from comet_np.backends import OPERATIONS, get_backend
from comet_np.experiments import check, cli, sweep
from comet_np.experiments.cli import EXPERIMENTS, main
from comet_np.experiments.experiment import columns
from comet_np.experiments.progress import Progress, duration

ROOT = Path(__file__).resolve().parent.parent
ARM = ("run", "quickstart", "--preset", "smoke", "--datasets", "arm", "--epochs", "1", "--train",
       "200", "--widths", "20", "--models", "standard,comet", "--together", "0", "--jobs", "1")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMET_DATA", raising=False)


def cell_folders():
    return sorted(Path("runs/quickstart-smoke/cells").iterdir())


def test_list_names_every_experiment(capsys):
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)


def test_run_trains_draws_and_says_what_it_means(capsys):
    pytest.importorskip("matplotlib")
    assert main(ARM) == 0
    out = capsys.readouterr().out
    assert "4 cells run in" in out
    assert "% less error" in out or "% more error" in out
    assert Path("runs/quickstart-smoke/quickstart.png").stat().st_size > 10_000
    record = json.loads(Path("runs/quickstart-smoke/run.json").read_text())
    assert record["config"]["datasets"] == ["arm"]
    assert {"comet-np", "git", "python", "numpy", "backend", "device", "threads"} <= set(record)


def test_finished_cells_are_skipped_and_new_ones_run(capsys):
    pytest.importorskip("matplotlib")
    main(ARM)
    before = {f: (f / "result.json").stat().st_mtime_ns for f in cell_folders()}
    assert main([*ARM, "--seeds", "3"]) == 0
    assert "2 cells run in" in capsys.readouterr().out.split("4 found finished")[0].split("\n")[-1]
    assert all((f / "result.json").stat().st_mtime_ns == t for f, t in before.items())
    assert len(cell_folders()) == 6


def test_small_networks_train_their_seeds_side_by_side(capsys):
    pytest.importorskip("matplotlib")
    main(ARM)
    one_by_one = capsys.readouterr().out
    assert main([*ARM, "--together", "20", "--out", "together"]) == 0
    together = capsys.readouterr().out
    assert "4 cells run" in one_by_one and "2 cells run" in together
    tables = [out.split("\ndata set")[1].split("\nfigure")[0] for out in (one_by_one, together)]
    assert tables[0] == tables[1]


def test_cells_of_different_data_are_not_compared_silently(capsys):
    pytest.importorskip("matplotlib")
    main(ARM)
    assert "different data" not in capsys.readouterr().out
    file = cell_folders()[0] / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "other"}))
    main(ARM)
    assert "the finished cells of arm were trained on different data" in capsys.readouterr().out


def test_another_setting_is_another_cell():
    pytest.importorskip("matplotlib")
    main(ARM)
    main([*ARM, "--lr", "0.02"])
    assert len(cell_folders()) == 8


def test_plot_redraws_from_the_files_alone(capsys):
    pytest.importorskip("matplotlib")
    main(ARM)
    table = capsys.readouterr().out.split("\n", 2)[2]
    Path("runs/quickstart-smoke/quickstart.png").unlink()
    assert main(["plot", "quickstart", "--preset", "smoke"]) == 0
    assert capsys.readouterr().out == table
    assert Path("runs/quickstart-smoke/quickstart.png").exists()


def test_processes_give_the_same_metrics():
    pytest.importorskip("matplotlib")
    main(ARM)
    assert main([*ARM[:-1], "2", "--out", "two"]) == 0
    for one in cell_folders():
        lines = [[{k: v for k, v in json.loads(line).items() if k != "seconds"}
                  for line in (folder / "metrics.jsonl").read_text().splitlines()]
                 for folder in (one, Path("two/cells") / one.name)]
        assert lines[0] == lines[1]


def test_every_start_of_a_cell_is_recorded():
    pytest.importorskip("matplotlib")
    main(ARM)
    for folder in cell_folders():
        start, = map(json.loads, (folder / "starts.jsonl").read_text().splitlines())
        assert {"time", "comet-np", "git", "python", "machine", "backend", "device", "threads",
                "numpy"} <= set(start)


def test_an_installed_copy_does_not_record_the_revision_around_it(monkeypatch):
    monkeypatch.setattr(sweep, "__file__", str(ROOT / "tests" / "experiments" / "sweep.py"))
    assert sweep._git_revision.__wrapped__() is None


@pytest.mark.parametrize("content", [None, "", '{"epoch": 0'])
def test_lost_metrics_of_a_finished_cell_are_a_sentence(capsys, content):
    pytest.importorskip("matplotlib")
    main(ARM)
    file = cell_folders()[0] / "metrics.jsonl"
    file.unlink() if content is None else file.write_text(content)
    assert main(["plot", "quickstart", "--preset", "smoke"]) == 2
    assert "metrics.jsonl is missing or damaged: remove its folder" in capsys.readouterr().err


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_busy_one(monkeypatch, error):
    pytest.importorskip("matplotlib")

    def flock(handle, how):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(ARM) == 0


def test_a_failed_cell_counts_as_done_in_the_time_left(tmp_path, monkeypatch):
    def fail(spec, place):
        place.progress.advance(1.0)
        raise RuntimeError("planted")

    monkeypatch.setitem(EXPERIMENTS, "quickstart",
                        dataclasses.replace(cli.QUICKSTART, run_cell=fail))
    config = cli.QUICKSTART.configure("smoke", {"datasets": ("arm",)})
    tasks = [sweep.Task("quickstart", cell, tmp_path, "numpy", None)
             for cell in cli.QUICKSTART.cells(config)]
    progress = Progress(sum(task.cell.work for task in tasks))
    assert {sweep.run_task(task, progress).status for task in tasks} == {"failed"}
    assert progress.done == pytest.approx(progress.total)


def test_too_little_memory_names_flags_that_the_experiment_has(tmp_path, monkeypatch):
    def greedy(spec, place):
        raise MemoryError("Unable to allocate 9 EiB")

    for name, advice in (("quickstart", "lower --widths or --batch or --train, train seeds one by "
                                        "one with --together 0, or run fewer cells at once"),
                         ("fig3", "lower --images, or run fewer cells at once with --jobs 1")):
        experiment = EXPERIMENTS[name]
        monkeypatch.setitem(EXPERIMENTS, name, dataclasses.replace(experiment, run_cell=greedy))
        cell = experiment.cells(experiment.configure("smoke", {}))[0]
        outcome = sweep.run_task(sweep.Task(name, cell, tmp_path, "numpy", None), Progress(1))
        assert outcome.message.startswith("too little memory (Unable to allocate 9 EiB; ")
        assert advice in outcome.message


def test_a_failed_cell_does_not_end_the_others(capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    train = cli.QUICKSTART.run_cell

    def fail_once(spec, place):
        if spec.model == "comet" and spec.seeds == (0,):
            raise RuntimeError("planted")
        return train(spec, place)

    monkeypatch.setitem(EXPERIMENTS, "quickstart",
                        dataclasses.replace(cli.QUICKSTART, run_cell=fail_once))
    assert main(ARM) == 1
    out = capsys.readouterr().out
    assert "3 cells run" in out
    assert "1 FAILED" in out
    assert "RuntimeError: planted (the traceback is in" in out


def test_two_sweeps_share_a_folder(capsys):
    """A cell that another sweep is running is left to it."""
    pytest.importorskip("matplotlib")
    config = EXPERIMENTS["quickstart"].configure("smoke", {
        "datasets": ("arm",), "epochs": 1, "train": 200, "widths": (20,), "together": 0})
    cell = EXPERIMENTS["quickstart"].cells(config)[0]
    folder = cell.folder(Path("runs/quickstart-smoke"))
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(ARM) == 1
    assert f"{cell.name}: another sweep is running it" in capsys.readouterr().out
    assert main(ARM) == 0


@pytest.mark.parametrize(("arguments", "said"), [
    (["rum"], 'unknown command "rum"; did you mean "run"?'),
    (["run", "quickstat"], 'unknown experiment "quickstat"; did you mean "quickstart"?'),
    (["run", "quickstart", "--epoch", "3"], 'unknown argument --epoch; did you mean "--epochs"?'),
    (["run", "quickstart", "--lr", "fast"], '--lr takes a number, got "fast"'),
    (["run", "quickstart", "--epochs", "2.5"], '--epochs takes a whole number, got "2.5"'),
    (["run", "quickstart", "--bias", "1"], '--bias takes true or false, got "1"'),
    (["run", "quickstart", "--p-k", "0"], "must be in (0, 1], got 0.0"),
    (["run", "quickstart", "--p-k", "0.5,1.5"], "must be in (0, 1], got 1.5"),
    (["run", "quickstart", "--models", "commet"], 'unknown model "commet"; did you mean "comet"?'),
    (["run", "quickstart", "--datasets", "cifar"], 'unknown data set "cifar"; did you mean "cifar'),
    (["run", "quickstart", "--activation", "sofplus"], 'did you mean "softplus"?'),
    (["run", "quickstart", "--optimizer", "adm"], 'unknown optimizer "adm"; did you mean "adam"?'),
    (["run", "quickstart", "--seeds", "0"], "at least 1 seed, got 0"),
    (["run", "quickstart", "--batch", "0"], "a batch of at least 1"),
    (["run", "quickstart", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    (["run", "quickstart", "--precision", "float16"],
     'unknown precision "float16"; did you mean "float64"? (known: float32, float64, tf32)'),
    (["run", "quickstart", "--datasets", "glyphs", "--augment", "crop_flop"],
     'unknown augmentation "crop_flop"; did you mean "crop_flip"?'),
    (["run", "quickstart", "--precision", "tf32"], "use --backend cupy, or --precision float32"),
    (["run", "quickstart", "--datasets", "arm", "--augment", "flip"], "arm has none: leave it"),
    (["run", "quickstart", "--target", "3"], "glyphs has classes: leave it out"),
    (["run", "quickstart", "--warmup", "-5"], "the warm-up is a number of steps, 0 or more"),
    (["run", "quickstart", "--widths", ""], "--widths needs at least one value"),
    (["run", "quickstart", "--layers", "0"], "at least 1 layer"),
    (["run", "quickstart", "--train", "0"], "1 training example"),
    (["run", "quickstart", "--lr", "-1"], "the learning rate must be positive and finite, got -1"),
    (["run", "quickstart", "--preset", "papre"], 'unknown preset "papre"; did you mean "paper"?'),
    (["run", "quickstart", "--backend", "cuda"], 'unknown backend "cuda"'),
    (["run", "--out", "fig2", "quickstart", "--lr", "fast"], '--lr takes a number, got "fast"'),
    (["run", "fig3", "--datasets", "cifar10,cifar10O"], 'unknown data set "cifar10O"'),
    (["bench", "--preset", "smok"], 'unknown preset "smok"; did you mean "smoke"?'),
    (["bench", "--out", "/dev/null/x"], "choose another with --out"),
    (["run", "quickstart", "--out", "/dev/null/x"], "choose another with --out"),
    (["plot", "quickstart"], "holds no run of quickstart: run it first"),
])
def test_bad_input_is_one_clear_sentence(capsys, arguments, said):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.startswith("comet-np: ")
    assert captured.err.count("\n") == 1


def test_missing_data_says_where_it_comes_from(capsys):
    assert main(["run", "fig4", "--epochs", "1", "--seeds", "1", "--widths", "10"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "--data DIR or COMET_DATA" in out
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in out


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(spec, place):
        raise KeyboardInterrupt

    monkeypatch.setitem(EXPERIMENTS, "quickstart",
                        dataclasses.replace(cli.QUICKSTART, run_cell=interrupted))
    assert main(ARM) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_help_lists_the_flags_of_the_experiment(capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "quickstart", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--weight-decay" in out
    assert "learning rate" in out


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if n != "quickstart"])
def test_smoke_presets_need_no_download(name, capsys):
    pytest.importorskip("matplotlib")
    assert main(["run", name, "--preset", "smoke", "--jobs", "1"]) == 0, capsys.readouterr().out
    assert Path(f"runs/{name}-smoke/{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_mpi_with_two_ranks():
    pytest.importorskip("mpi4py", reason="the mpi extra is not installed")
    pytest.importorskip("matplotlib")
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec on this machine")
    answer = subprocess.run(
        [mpiexec, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m",
         "mpi4py.futures", "-m", "comet_np.experiments.cli", *ARM, "--mpi", "--out",
         str(Path.cwd() / "mpi")], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False)
    assert answer.returncode == 0, answer.stderr
    assert "4 cells run in" in answer.stdout


def test_progress_shows_rate_and_time_left(monkeypatch):
    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    now = [0.0]
    monkeypatch.setattr("comet_np.experiments.progress.time.monotonic", lambda: now[0])
    terminal = Terminal()
    progress = Progress(100, terminal)
    progress.skip(50)
    for _ in range(10):
        now[0] += 1
        progress.advance(1, "cell")
    assert terminal.text.endswith(" 60%  1 steps/s  40 s left  cell")


def test_durations_and_columns():
    assert [duration(s) for s in (0.04, 9.94, 59.4, 185, 7800)] == [
        "0.0 s", "9.9 s", "59 s", "3 min 05 s", "2 h 10 min"]
    assert columns([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"


def test_check_covers_every_operation_and_finds_a_wrong_kernel(capsys, monkeypatch):
    backend = get_backend("numpy")
    assert set(check._samples(backend)) == set(OPERATIONS)
    assert main(["check"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setitem(backend.kernels, "project", lambda x, W, tf32=False: 1.001 * (x @ W.T))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  kernel against body: project " in out
    assert "checks FAILED on" in out


def test_damaged_files_are_said_or_done_again(capsys):
    pytest.importorskip("matplotlib")
    main(ARM)
    (cell_folders()[0] / "result.json").write_text("")
    assert main(ARM) == 0
    assert "1 cell run in" in capsys.readouterr().out.split("\n4 cells")[-1]
    Path("runs/quickstart-smoke/run.json").write_text("{")
    assert main(["plot", "quickstart", "--preset", "smoke"]) == 2
    assert "run.json is damaged: run the experiment again" in capsys.readouterr().err


def test_a_plot_without_a_finished_cell_is_refused(capsys):
    pytest.importorskip("matplotlib")
    main(ARM)
    for folder in cell_folders():
        (folder / "result.json").unlink()
    assert main(["plot", "quickstart", "--preset", "smoke"]) == 2
    assert "holds no finished cell of quickstart" in capsys.readouterr().err


def test_a_cell_folder_that_cannot_be_written_is_a_sentence(capsys):
    Path("runs/quickstart-smoke").mkdir(parents=True)
    Path("runs/quickstart-smoke/cells").write_text("in the way")
    assert main(ARM) == 1
    assert "cannot write into" in capsys.readouterr().out


def start_sweep(out):
    """Start a long sweep of two processes in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "comet_np.experiments.cli", "run", "quickstart", "--preset", "smoke",
         "--datasets", "arm", "--seeds", "3", "--models", "comet", "--epochs", "5000",
         "--together", "0", "--jobs", "2", "--out", str(out)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def in_training(out):
    """Return how many cells have begun to train."""
    return sum(f.stat().st_size > 500 for f in out.glob("cells/*/metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False], ids=["the terminal's", "to the parent alone"])
def test_ctrl_c_stops_all_processes_with_a_checkpoint(tmp_path, to_all):
    process = start_sweep(tmp_path / "out")
    wait_for(lambda: in_training(tmp_path / "out") == 2)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "the same command goes on from here" in output
    assert "Traceback" not in output
    files = [str(file.relative_to(tmp_path)) for file in tmp_path.glob("out/cells/*/*")]
    assert sum(file.endswith("/checkpoint") for file in files) == 2, f"{files}\n{output}"
    assert in_training(tmp_path / "out") == 2  # no third cell was begun


@pytest.mark.slow
def test_processes_end_with_a_killed_parent(tmp_path):
    process = start_sweep(tmp_path / "out")
    wait_for(lambda: in_training(tmp_path / "out") == 2)
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()

    def free(lock):
        with open(lock, "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    wait_for(lambda: all(map(free, tmp_path.glob("out/cells/*/lock"))), seconds=10)


def die_once(spec, place):
    """Kill the worker the first time a cell comes, and finish it the second time."""
    mark = place.folder / "died"
    if spec.seeds == (1,) and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (place.folder / "result.json").write_text("{}")
    return {}


@pytest.mark.slow
def test_a_killed_worker_does_not_end_the_sweep(tmp_path, monkeypatch):
    grid = EXPERIMENTS["quickstart"]
    config = grid.configure("smoke", {"seeds": 4, "datasets": ("arm",), "together": 0})
    monkeypatch.setattr(sweep, "_run_remote", functools.partial(run_with, die_once))
    outcomes = sweep.Sweep("quickstart", grid.cells(config), tmp_path, jobs=2).run()
    assert {outcome.status for outcome in outcomes} <= {"done", "found"}
    assert len(list(tmp_path.glob("cells/*/died"))) == 3  # the three models of seed 1


def run_with(run_cell, task, messages):
    """Do what a worker does, with another cell function."""
    EXPERIMENTS["quickstart"] = dataclasses.replace(EXPERIMENTS["quickstart"], run_cell=run_cell)
    return sweep.run_task(task, sweep._Remote(messages))
