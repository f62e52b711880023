"""Streams and paths: output that cannot be written, names that cannot be used, progress in a file.

Each is one sentence, or simply works.
"""

import dataclasses
import errno
import io
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from comet_np import checkpoint
from comet_np.backends import cpu
from comet_np.checkpoint import CheckpointError
from comet_np.errors import UserError, of_system
from comet_np.experiments import figures, quickstart, streams
from comet_np.experiments.cli import main
from comet_np.experiments.progress import Progress
from comet_np.experiments.workers import in_turn
from comet_np.records import read_json, write_json
from tests.test_sweep import cells_run_by, jobs_of

ROOT = Path(__file__).resolve().parent.parent
ARM = ("run", "quickstart", "--preset", "smoke", "--datasets", "arm", "--epochs", "1", "--train",
       "200", "--widths", "20", "--models", "standard", "--seeds", "2", "--jobs", "1")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMET_DATA", raising=False)


def shell(command, **environment):
    """Return the status, the output and the errors of a command line with `cli` in it."""
    cli = f"{shlex.quote(sys.executable)} -m comet_np.experiments.cli"
    answer = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command.replace('cli', cli, 1)}"], text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, check=False)
    for unwanted in ("Traceback", "Exception ignored"):
        assert unwanted not in answer.stdout + answer.stderr
    return answer.returncode, answer.stdout, answer.stderr


# --- standard output and error ------------------------------------------------------------------

FULL = "comet-np: cannot write to standard output (No space left on device): what was printed is " \
       "lost\n"


@pytest.mark.parametrize(("command", "status", "lines", "errors"), [
    ("cli list | head -1", 0, 1, ""),
    ("cli list > /dev/full", 1, 0, FULL),
    ("cli --help > /dev/full", 1, 0, FULL),
    ("cli rum > /dev/full", 2, 0, 'comet-np: unknown command "rum"; did you mean "run"? (known: '),
    ("cli list >&-", 0, 0, ""),
    ("cli list <&- >&- 2>&-", 0, 0, ""),
    ("cli rum 2> /dev/full", 2, 0, ""),
    ("cli rum 2>&-", 2, 0, "")])
def test_what_cannot_be_printed(command, status, lines, errors):
    found, out, err = shell(command)
    assert (found, out.count("\n")) == (status, lines)
    assert err.startswith(errors)
    assert err.count("\n") == bool(errors)


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["2>&-", "2> /dev/full", ">&- 2>&- <&-", "| head -1"])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_cannot_speak_is_done_all_the_same(streams, jobs):
    pytest.importorskip("matplotlib")
    status, *_ = shell(f"cli {' '.join(ARM)} --jobs {jobs} {streams}")
    assert status == 0
    assert len(list(Path("runs/quickstart-smoke").glob("cells/*/result.json"))) == 2
    assert Path("runs/quickstart-smoke/quickstart.png").exists()


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_terminal_without_the_character(environment):
    pytest.importorskip("matplotlib")
    status, out, _ = shell(f"cli {' '.join(ARM)} --out=é", **environment)
    assert status == 0
    assert "quickstart.png" in out
    assert Path("é/quickstart.png").exists()


def test_a_stream_keeps_its_first_error_and_drops_what_follows():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "full")

    stream = streams.Tolerant(Full())
    print("a", "b", file=stream)
    stream.flush()
    assert stream.error.errno == errno.ENOSPC


@pytest.mark.parametrize("closed", [None, "closed"])
def test_progress_that_cannot_be_shown_ends_no_training(monkeypatch, closed):
    """Outside of the command line, too."""
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "closed")

    monkeypatch.setattr(sys, "stderr", closed and Closed())
    progress = Progress(1, cells=1)
    progress.message("a notice")
    progress.ended("cell")
    progress.clear()


# --- progress in a file -------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that is put on by hand."""
    now = [0.0]
    monkeypatch.setattr("comet_np.experiments.progress.time.monotonic", lambda: now[0])
    return now


def test_in_a_file_each_cell_that_ends_is_a_line(clock):
    file = io.StringIO()
    progress = Progress(8, file, cells=4)
    progress.skip(2)
    progress.ended("found", found=True)
    for cell in ("one", "two", "three"):
        clock[0] += 3
        progress.advance(2, cell, steps=30)
        progress.ended(cell)
    progress.clear()
    assert file.getvalue() == ("2 of 4 cells, 50%, 10 steps/s, about 6.0 s left: one\n"
                               "3 of 4 cells, 75%, 10 steps/s, about 3.0 s left: two\n"
                               "4 of 4 cells, 100%, 10 steps/s: three\n")


def test_a_long_run_alone_is_a_line_a_minute_and_a_short_one_none(clock):
    file = io.StringIO()
    progress = Progress(1000, file)
    for _ in range(150):
        clock[0] += 1
        progress.advance(1, "run", steps=2)
    assert file.getvalue() == ("6%, 2 steps/s, about 15 min 40 s left: run\n"
                               "12%, 2 steps/s, about 14 min 40 s left: run\n")


def test_no_time_is_told_where_nothing_was_done(clock):
    file = io.StringIO()
    progress = Progress(2, file, cells=2)
    clock[0] += 1
    progress.skip(1)
    progress.ended("failed")
    assert file.getvalue() == "1 of 2 cells, 50%: failed\n"


def test_a_terminal_has_its_line_only_and_no_longer_than_it_is_wide(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    progress = Progress(2, terminal, cells=2)
    clock[0] += 1
    progress.advance(1, 80 * "x")
    progress.ended("cell")
    assert terminal.getvalue() == "\r\x1b[K" + " 50%  1 steps/s  1.0 s left  ".ljust(39, "x")


def test_a_sweep_tells_the_cells_that_end(tmp_path, monkeypatch, capsys):
    jobs = jobs_of(tmp_path, seeds=2)
    cells_run_by(monkeypatch, lambda spec, place: {})
    for _ in range(2):  # the second time they are found finished
        in_turn(jobs, Progress(sum(job.cell.work for job in jobs), cells=2))
    assert capsys.readouterr().err == "".join(
        f"{i} of 2 cells, {50 * i}%: {job.cell.name}\n" for i, job in enumerate(jobs, start=1))


@pytest.mark.slow
def test_processes_tell_the_cells_that_end():
    pytest.importorskip("matplotlib")
    _, _, err = shell(f"cli {' '.join(ARM)} --jobs 2")
    assert [line.split(",")[0] for line in err.splitlines()] == ["1 of 2 cells", "2 of 2 cells"]
    assert {line.rpartition("-")[2] for line in err.splitlines()} == {"seed0", "seed1"}


# --- paths --------------------------------------------------------------------------------------

LONG = 300 * "x"
NOBODY = "~there_is_no_such_user/x"


@pytest.mark.parametrize(("arguments", "said"), [
    (["run", "quickstart", "--out", LONG], "File name too long): choose another folder with --out, "
                                           "of a shorter name"),
    (["plot", "quickstart", "--out", LONG], "File name too long): choose"),
    (["data", "--data", LONG], "File name too long): name another folder with --data"),
    (["run", "quickstart", "--out", NOBODY], f"{NOBODY}: there is no such home folder"),
    (["plot", "quickstart", "--out", NOBODY], f"{NOBODY}: there is no such home folder"),
    (["bench", "--out", NOBODY], f"{NOBODY}: there is no such home folder"),
    (["data", "--data", NOBODY], f"{NOBODY}: there is no such home folder"),
    (["run", "quickstart", "--out", "file"], "(File exists): something else lies there, choose"),
    (["run", "quickstart", "--out="], "--out needs a folder, got nothing"),
    (["run", "quickstart", "--augment=--"], '--augment cannot be "--"'),
    (["run", "quickstart", "--jobs="], "argument --jobs: invalid int value: '' (see comet-np run"),
    (["run"], "the following arguments are required: name (see comet-np run --help)"),
    *((["run", "quickstart", f"--{flag}="], said) for flag, said in {
        "widths": "--widths needs at least one value", "lr": '--lr takes a number, got ""',
        "augment": 'unknown augmentation ""', "preset": 'unknown preset ""'}.items())])
def test_names_and_values_that_cannot_be_used(capsys, arguments, said):
    Path("file").touch()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("comet-np: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main([*ARM, "--out=~/run"]) == 0
    assert (tmp_path / "home" / "run" / "quickstart.png").exists()


def test_data_that_cannot_be_read_are_not_called_unwritable(monkeypatch, capsys):
    def unreadable(spec, place):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/data.bin")

    cells_run_by(monkeypatch, unreadable)
    assert main(ARM) == 1
    assert ("cannot read /elsewhere/data.bin (Permission denied): choose another folder with "
            "--data") in capsys.readouterr().out


@contextmanager
def without_rights():
    """Lose the rights of root, if we have them; this folder can still be read."""
    root = os.geteuid() == 0
    if root:
        os.chmod(".", 0o755)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_finished_run_that_is_read_only_tells_its_table_when_it_is_drawn(capsys, monkeypatch):
    pytest.importorskip("matplotlib")

    def read_only(file, *parts):
        raise CheckpointError("not said") from PermissionError(errno.EACCES, "Permission denied")

    main(ARM)
    figure = Path("runs/quickstart-smoke/quickstart.png")
    table, drawn = capsys.readouterr().out.split("\n", 2)[2].split("figure: ")[0], \
        figure.read_bytes()
    monkeypatch.setattr(figures, "write_atomically", read_only)
    assert main(["plot", "quickstart", "--preset", "smoke"]) == 2
    said, err = capsys.readouterr()
    assert said == table
    assert err == (f"comet-np: the figure cannot be written to {figure} (Permission denied): copy "
                   "the folder to where you may write, and draw it there with: comet-np plot --out "
                   "COPY\n")
    assert figure.read_bytes() == drawn


def test_a_run_that_cannot_be_read_is_a_sentence(capsys):
    pytest.importorskip("matplotlib")
    main(ARM)
    capsys.readouterr()
    out = Path("runs/quickstart-smoke")
    out.chmod(0)
    try:
        with without_rights():
            assert main(["plot", "quickstart", "--preset", "smoke"]) == 2
    finally:
        out.chmod(0o755)
    err = capsys.readouterr().err
    assert "Permission denied): choose another folder" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("code", "remedy"), [
    (errno.ENOSPC, "free some space or choose another folder with --out"),
    (errno.EDQUOT, "free some space"), (errno.EROFS, "choose another folder with --out, one that"),
    (errno.EACCES, "one that is yours"), (errno.ENAMETOOLONG, "of a shorter name"),
    (errno.EMFILE, "raise ulimit -n"), (errno.ENXIO, "choose another folder with --out")])
def test_the_remedy_is_that_of_the_error(tmp_path, monkeypatch, code, remedy):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    said = of_system("write", "a", OSError(code, "why"))
    assert said.startswith("cannot write a (why): ")
    assert remedy in said
    by_path = of_system("write", "a", OSError(code, "why"), "")
    assert by_path == said.replace("choose another folder with --out", "give another path")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.write_atomically(tmp_path / "file", b"content")
    assert remedy in str(error.value)
    assert ("free some space" in str(error.value)) == (code in (errno.ENOSPC, errno.EDQUOT))


# --- the environment and names in figures -------------------------------------------------------


@pytest.mark.parametrize(("given", "taken"), [
    ("3", 3), ("²", 2), ("3,2", 3), ("0", 2), ("-1", 2), ("", 2), ("many", 2), (" 4 ", 4)])
def test_threads_are_those_of_the_environment_if_it_names_a_number(monkeypatch, given, taken):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert cpu.threads.__wrapped__() == taken


@pytest.mark.parametrize("code", [
    "print(figures.pyplot().get_backend())",
    "print(figures.matplotlib('').rcParams['backend'])"])
@pytest.mark.parametrize("chosen", ["no_such_backend", "svg"])
def test_a_backend_for_windows_is_not_needed_to_exist(code, chosen):
    pytest.importorskip("matplotlib")
    answer = subprocess.run(
        [sys.executable, "-c", f"from comet_np.experiments import figures\n{code}"], text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": chosen},
        check=True)
    if "pyplot" in code:
        assert answer.stdout == "Agg\n"
    elif chosen == "svg":
        assert answer.stdout == "svg\n"


@pytest.mark.parametrize("name", ["$", "a$b$", r"a\$b", "$\\frac$", "$^$ and $_$"])
def test_a_dollar_in_a_name_begins_no_formula(name):
    pytest.importorskip("matplotlib")
    from matplotlib.mathtext import MathTextParser

    plain = figures.plain(name)
    figure = figures.pyplot().figure()
    title = figure.suptitle(plain)
    assert title._preprocess_math(plain) == (name, False)
    figure.suptitle(f"{plain}: $p_k$ = 0.5")
    figures.save(figure, Path("mixed.png"))
    glyphs = MathTextParser("path").parse(f"{plain}$x$").glyphs
    assert "".join(chr(glyph[2]) for glyph in glyphs)[:-1] == name


def test_names_with_a_dollar_are_drawn(saved, tmp_path, monkeypatch):
    config = quickstart.EXPERIMENT.configure("smoke", {
        "datasets": ("arm",), "epochs": 1, "train": 96, "widths": (20,), "seeds": 1,
        "models": ("standard",)})
    monkeypatch.setattr(quickstart, "EXPERIMENT", dataclasses.replace(quickstart.EXPERIMENT))
    job, = jobs_of(tmp_path, models=("standard",))
    in_turn([job], Progress(1))
    result = job.cell.folder(tmp_path) / "result.json"
    write_json(result, read_json(result) | {"notice": "costs $^ and $_"})
    quickstart.EXPERIMENT.draw(config, tmp_path)
    assert "costs $^ and $_" in saved[0]._suptitle._preprocess_math(
        saved[0]._suptitle.get_text())[0]


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    file = tmp_path / "a.png"
    figures.save(figures.pyplot().figure(), file)
    before = file.read_bytes()

    def broken(*arguments):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UserError, match=r"cannot write the figure .* \(full\): free some space"):
        figures.save(figures.pyplot().figure(), file)
    assert file.read_bytes() == before
    assert np.array_equal(list(tmp_path.iterdir()), [file])
