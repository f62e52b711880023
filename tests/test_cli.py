"""The command: what it prints, what it refuses and in which words, and how sweeps behave."""

import dataclasses
import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from comet_np import records
from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import cli, figures, provenance, quickstart, sweep
from comet_np.experiments.cli import main
from comet_np.experiments.experiment import columns
from comet_np.experiments.gpt_figures import FIGURES
from comet_np.experiments.progress import Progress, duration
from comet_np.experiments.registry import EXPERIMENTS, experiment
from comet_np.records import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
ARM = ("run", "quickstart", "--preset", "smoke", "--datasets", "arm", "--epochs", "1", "--train",
       "200", "--widths", "20", "--models", "standard,comet", "--jobs", "1")
PLOT = ("plot", "quickstart", "--preset", "smoke")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMET_DATA", raising=False)


@pytest.fixture(scope="module")
def arm_run(tmp_path_factory):
    """Return the folder of a finished run, and what it printed."""
    pytest.importorskip("matplotlib")
    folder, printed = tmp_path_factory.mktemp("arm"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        assert main(ARM) == 0
    return folder / "runs", printed.getvalue()


@pytest.fixture
def finished(arm_run, in_an_empty_folder):
    """Lay a finished run into the folder, and return what it printed."""
    runs, printed = arm_run
    shutil.copytree(runs, "runs")
    return printed


def cell_folders():
    return sorted(Path("runs/quickstart-smoke/cells").iterdir())


def run_cells_by(monkeypatch, run_cell):
    """Let the quickstart run its cells by another function."""
    monkeypatch.setattr(quickstart, "EXPERIMENT",
                        dataclasses.replace(quickstart.EXPERIMENT, run_cell=run_cell))


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


def test_finished_cells_are_skipped_and_new_ones_run(finished, capsys, monkeypatch):
    before = {f: (f / "result.json").stat().st_mtime_ns for f in cell_folders()}
    to_run = []
    monkeypatch.setattr(sweep, "expected_seconds", lambda cells, *rest: to_run.extend(cells) or 60)
    assert main([*ARM, "--seeds", "3"]) == 0
    out = capsys.readouterr().out
    assert "about 1 min 00 s" in out
    assert "2 cells run in" in out.split("4 found finished")[0].split("\n")[-1]
    assert [cell.spec.run.seed for cell in to_run] == [2, 2]
    assert all((f / "result.json").stat().st_mtime_ns == t for f, t in before.items())
    assert len(cell_folders()) == 6


def test_cells_of_different_data_are_not_compared_silently(finished, capsys):
    assert "different data" not in finished
    file = cell_folders()[0] / "result.json"
    write_json(file, read_json(file) | {"data": "other"})
    main(ARM)
    assert "the finished cells of arm were trained on different data" in capsys.readouterr().out


def test_another_setting_is_another_cell(finished):
    main([*ARM, "--lr", "0.02"])
    assert len(cell_folders()) == 8


def test_plot_redraws_from_the_files_alone(finished, capsys):
    table = finished.split("\n", 2)[2]
    Path("runs/quickstart-smoke/quickstart.png").unlink()
    assert main(["plot", "quickstart", "--preset", "smoke"]) == 0
    assert capsys.readouterr().out == table
    assert Path("runs/quickstart-smoke/quickstart.png").exists()


def test_processes_give_the_same_metrics(finished):
    assert main([*ARM[:-1], "2", "--out", "two"]) == 0
    for one in cell_folders():
        lines = [[{k: v for k, v in json.loads(line).items() if k != "seconds"}
                  for line in (folder / "metrics.jsonl").read_text().splitlines()]
                 for folder in (one, Path("two/cells") / one.name)]
        assert lines[0] == lines[1]


def test_the_revision_is_that_of_the_checkout():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True,
                              capture_output=True, check=True).stdout.strip()
    assert provenance.provenance("numpy")["git"] == revision


def test_an_installed_copy_does_not_record_the_revision_around_it(monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(ROOT / "tests" / "experiments" / "a.py"))
    assert provenance._git_revision.__wrapped__() is None


@pytest.mark.parametrize("content", [None, "", '{"epoch": 0'])
def test_lost_metrics_of_a_finished_cell_are_a_sentence(finished, capsys, content):
    file = cell_folders()[0] / "metrics.jsonl"
    file.unlink() if content is None else file.write_text(content)
    assert main(["plot", "quickstart", "--preset", "smoke"]) == 2
    said = capsys.readouterr().err
    assert "metrics.jsonl is missing or damaged" in said
    assert "remove its folder and run the experiment again" in said


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_busy_one(monkeypatch, error):
    pytest.importorskip("matplotlib")

    def flock(handle, how):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(ARM) == 0


def test_a_failed_cell_does_not_end_the_others(capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    train = quickstart.EXPERIMENT.run_cell

    def fail_once(spec, place):
        if spec.run.model.gate is not None and spec.run.seed == 0:
            raise RuntimeError("planted")
        return train(spec, place)

    run_cells_by(monkeypatch, fail_once)
    assert main(ARM) == 1
    out = capsys.readouterr().out
    assert "3 cells run" in out
    assert "1 FAILED" in out
    assert "RuntimeError: planted (the traceback is in" in out


def test_two_sweeps_share_a_folder(capsys):
    """A cell that another sweep is running is left to it."""
    pytest.importorskip("matplotlib")
    grid = experiment("quickstart")
    cell = grid.cells(grid.configure("smoke", {"datasets": ("arm",), "epochs": 1, "train": 200,
                                               "widths": (20,)}))[0]
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
    (["run", "quickstart", "--seeds", "0"], "at least 1 seed, each 0 or more and given once, got"),
    (["run", "quickstart", "--batch", "0"], "a batch of at least 1"),
    (["run", "quickstart", "--jobs", "0"], "--jobs must be at least 1, got 0"),
    (["run", "quickstart", "--precision", "float46"],
     'unknown precision "float46"; did you mean "float64"? (known: bfloat16, float16, float32, '),
    (["run", "quickstart", "--datasets", "glyphs", "--augment", "crop_flop"],
     'unknown augmentation "crop_flop"; did you mean "crop_flip"?'),
    (["run", "quickstart", "--datasets", "arm", "--augment", "flip"], "arm has none: leave it"),
    (["run", "quickstart", "--target", "3"], "glyphs has classes: leave it out"),
    (["run", "quickstart", "--warmup", "-5"], "the warm-up is a number of steps, 0 or more"),
    (["run", "quickstart", "--widths", ""], "--widths needs at least one value"),
    (["run", "quickstart", "--layers", "0"], "at least 1 layer"),
    (["run", "quickstart", "--train", "0"], "1 example to train"),
    (["run", "quickstart", "--lr", "-1"], "the learning rate must be positive and finite, got -1"),
    (["run", "quickstart", "--preset", "papre"], 'unknown preset "papre"; did you mean "paper"?'),
    (["run", "quickstart", "--backend", "cuda"], 'unknown backend "cuda"'),
    (["run", "--out", "fig2", "quickstart", "--lr", "fast"], '--lr takes a number, got "fast"'),
    (["run", "--mpi", "quickstart", "--lr", "fast"], '--lr takes a number, got "fast"'),
    (["run", "fig3", "--datasets", "cifar10,cifar10O"], 'data set of 32x32 images "cifar10O"'),
    (["bench", "--preset", "smok"], 'unknown preset "smok"; did you mean "smoke"?'),
    (["bench", "--out", "/dev/null/x"], "choose another folder with --out"),
    (["run", "quickstart", "--out", "/dev/null/x"], "choose another folder with --out"),
    (["plot", "quickstart"], "holds no run of quickstart: run it first"),
    (["run", "quickstart", "--seeds", "100000000"], "choose fewer --seeds, --p-k or sizes"),
    (["run", "quickstart", "--layers", "1000000"], "at most 1,000, got layers = 1000000"),
    (["run", "quickstart", "--seeds", "1,-2"], "0 or more and given once, got seeds = (1, -2)"),
    (["run", "quickstart", "--seeds", "1,2,1"], "given once, got seeds = (1, 2, 1)"),
    (["run", "quickstart", "--datasets", "arm", "--target", "7"], 'is one of 0 to 6 or "all"'),
    (["run", "fig33", "--target", "7"], 'is one of 21 to 27 or "all"'),
    (["run", "quickstart", "--schedule", "warmup_cosine", "--warmup", "99999"],
     "the warm-up must be 0 to 2000 steps long, the length of the run, got 99999"),
    (["run", "quickstart", "--task", "regression"], "--task is for files of your own"),
    (["run", "my.csv"], "comet-np run quickstart --datasets my.csv (of a CSV file also --target"),
    (["run", "quickstart", "--datasets", "my.csv"], "there is no file my.csv"),
    (["run", "quickstart", "--datasets", "a/my.csv,b/my.npz"], "two of the data sets have one"),
    (["run", "fig4", "--data", "/nonexistent"], "there is no folder /nonexistent: name the folder"),
    (["run", "fig3"], "cifar10 needs its official files: name their folder with --data DIR"),
    (["data", "--data", "/nonexistent"], "there is no folder /nonexistent: name the folder of the"),
])
def test_bad_input_is_one_clear_sentence(capsys, arguments, said):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.startswith("comet-np: ")
    assert captured.err.count("\n") == 1


def test_missing_data_says_where_it_comes_from(capsys):
    """Once, before the first cell."""
    assert main(["run", "fig4", "--epochs", "1", "--seeds", "1", "--widths", "10"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "--data DIR or COMET_DATA" in said.err
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in said.err


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(spec, place):
        raise KeyboardInterrupt

    run_cells_by(monkeypatch, interrupted)
    assert main(ARM) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "waits", "jobs"), [
    ((), False, 3), (("--seeds", "1"), False, 2), ((), True, cli.CELLS_ON_A_GPU),
    (("--jobs", "7"), False, 7)])
def test_as_many_cells_at_a_time_as_cores_or_as_fit_a_gpu(monkeypatch, flags, waits, jobs):
    """But no more than there are."""
    monkeypatch.setattr(sweep.Sweep, "run", lambda sweep: [])
    monkeypatch.setattr("comet_np.backends.cpu.cores", lambda: 3)
    monkeypatch.setattr(get_backend("numpy"), "waits", waits)
    assert main([*ARM[:-2], "--seeds", "4", *flags]) == 0
    assert json.loads(Path("runs/quickstart-smoke/run.json").read_text())["jobs"] == jobs


def test_a_sweep_is_told_what_the_flags_say(monkeypatch):
    sweeps, dtypes = [], []
    monkeypatch.setattr(sweep.Sweep, "run", lambda sweep: sweeps.append(sweep) or [])
    monkeypatch.setattr(sweep, "expected_seconds", lambda cells, backend, dtype: dtypes.append(
        dtype) or 0)
    main([*ARM, "--precision", "float64"])
    assert main([*ARM, "--data", "here", "--mpi", "--out", "there"]) == 0
    assert dtypes == ["float64", "float32"]
    del sweeps[0]
    told, = sweeps
    assert told == ("quickstart", told.cells, Path("there"), "numpy", "here", 1, True)
    assert len(told.cells) == 4


def test_data_lists_what_is_there_and_what_is_missing(capsys, tmp_path, monkeypatch):
    def rows():
        assert main(["data"]) == 0
        return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}

    assert "built in" in rows()["arm"]
    assert "missing" in rows()["cifar10"] and "https://" in rows()["cifar10"]
    (tmp_path / "files" / "cifar-10-batches-bin").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setenv("COMET_DATA", str(tmp_path / "files"))
        assert "incomplete" in rows()["cifar10"]
    assert main(["data", "--fetch", "cifar10"]) == 2
    assert "--fetch needs a folder to download into" in capsys.readouterr().err
    assert main(["data", "--data", str(tmp_path), "--fetch", "arm"]) == 2
    assert "arm is built in" in capsys.readouterr().err


def test_a_plot_of_another_experiments_run_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sweep.Sweep, "run", lambda sweep: [])
    main(ARM)
    assert main(["plot", "fig4", "--out", "runs/quickstart-smoke"]) == 2
    assert "holds a run of quickstart, not of fig4" in capsys.readouterr().err


def test_help_lists_the_flags_of_the_experiment(capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "quickstart", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--weight-decay" in out
    assert "learning rate" in out


# What differs from the preset of a figure that is run whole: Figure 4 has all panels of the models
# of 11 and 33, Figure 5 all cells of 6, 7 and 8.
ONE_PANEL = ("--widths", "50", "--p-k", "0.5")
ONE_EPOCH = ("--seeds", "1", "--epochs", "1", "--mixer-epochs", "1")
PARTS = {"fig11": ONE_PANEL, "fig33": ONE_PANEL, "fig6": ONE_EPOCH, "fig7": ONE_EPOCH,
         "fig8": ONE_EPOCH}


# The figures of GPT-2 have the smoke preset of `gpt`.
@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if n != "quickstart" and n not in FIGURES])
def test_smoke_presets_need_no_download(name, capsys):
    pytest.importorskip("matplotlib")
    assert main(["run", name, "--preset", "smoke", "--jobs", "1", *PARTS.get(name, ())]) == 0, (
        capsys.readouterr().out)
    assert Path(f"runs/{name}-smoke/{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_formats_of_a_gpu_can_be_tried_on_the_cpu(precision, capsys):
    pytest.importorskip("matplotlib")
    losses = set()
    for name in (precision, "float32"):
        assert main([*ARM, "--precision", name, "--models", "standard", "--seeds", "1"]) == 0
    for file in Path("runs/quickstart-smoke/cells").glob("*/metrics.jsonl"):
        losses.add(json.loads(file.read_text().splitlines()[-1])["val_loss"])
    assert len(losses) == 2  # operands are rounded
    assert max(losses) == pytest.approx(min(losses), rel=1e-2)


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


def test_a_message_is_said_once_and_progress_to_terminals_only(capsys):
    progress = Progress(2)
    for _ in range(2):
        progress.message("look")
        progress.advance(1, "cell")
    progress.clear()
    assert capsys.readouterr().err == "look\n"


def test_durations_and_columns():
    assert [duration(s) for s in (0.04, 9.94, 59.4, 185, 7800)] == [
        "0.0 s", "9.9 s", "59 s", "3 min 05 s", "2 h 10 min"]
    assert columns([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc   d"


def test_check_passes_and_finds_a_wrong_kernel(capsys, monkeypatch):
    assert main(["check"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setitem(get_backend("numpy").kernels, "project",
                        lambda body, x, W: 1.001 * (x @ W.T))
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "FAILED  kernel against body: project" in out
    assert "checks FAILED on" in out


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: "{", lambda text: "[]", lambda text: "null",
    lambda text: text.replace("arm", "amr"), lambda text: text.replace("1", "2")])
def test_a_damaged_record_is_a_sentence(finished, capsys, damage):
    """Of a cell, or of the run; a changed digit is not believed."""
    for file, command in ((cell_folders()[0] / "result.json", ARM),
                          (cell_folders()[0] / "result.json", PLOT),
                          (Path("runs/quickstart-smoke/run.json"), PLOT)):
        before = file.read_text()
        file.write_text(damage(before))
        if file.read_text() != before:
            assert main(command) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1
            assert f"{file} is damaged: " in said
            assert "run the experiment again" in said
        file.write_text(before)
    assert main(PLOT) == 0


def test_a_record_of_other_settings_is_kept_with_its_figure(finished, capsys):
    out = Path("runs/quickstart-smoke")
    first = {name: (out / name).read_bytes() for name in ("run.json", "quickstart.png")}
    main(ARM)
    assert "other settings" not in capsys.readouterr().out
    main([*ARM, "--seeds", "1"])
    assert "run of other settings: its record and figure are kept" in capsys.readouterr().out
    kept = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert len(kept) == 2 * 5  # a record and four figures of each
    for name, content in first.items():
        stem, suffix = name.split(".")
        (other,) = (each for each in kept if each.startswith(f"{stem}-"))
        assert other.endswith(suffix)
        assert kept[other] == content
    assert kept["run.json"] != first["run.json"]


def test_a_finished_run_is_shown_where_nothing_can_be_written(finished, capsys, monkeypatch):
    table = finished.splitlines()[2:-4]

    def read_only(*arguments):
        raise UserError("read-only file system")

    monkeypatch.setattr(records, "write_atomically", read_only)
    monkeypatch.setattr(figures, "save", read_only)
    assert main(ARM) == 2
    said = capsys.readouterr()
    assert said.out.splitlines()[-len(table):] == table
    assert said.err == "comet-np: read-only file system\n"


def test_a_plot_without_a_finished_cell_is_refused(finished, capsys):
    for folder in cell_folders():
        (folder / "result.json").unlink()
    assert main(["plot", "quickstart", "--preset", "smoke"]) == 2
    assert "holds no finished cell of quickstart" in capsys.readouterr().err


def test_a_cell_folder_that_cannot_be_written_is_a_sentence(capsys):
    Path("runs/quickstart-smoke").mkdir(parents=True)
    Path("runs/quickstart-smoke/cells").write_text("in the way")
    assert main(ARM) == 1
    assert "cannot write into" in capsys.readouterr().out
