"""GPT-2 on text: the figures' settings, a run from the command line, its figure and its table."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.errors import UserError
from comet_np.experiments import gpt_report, sweep
from comet_np.experiments.cli import main
from comet_np.experiments.datasets.tokenizer import load_tokenizer
from comet_np.experiments.experiment import Place
from comet_np.experiments.files import write_result
from comet_np.experiments.gpt import GPTConfig, cell_of, load, run_cell, shape
from comet_np.experiments.gpt_figures import FIGURES
from comet_np.experiments.gpt_report import Curve, reached, verdict
from comet_np.experiments.progress import Progress
from comet_np.experiments.registry import EXPERIMENTS, experiment
from comet_np.experiments.training.model import load_run
from comet_np.gates import Comet
from comet_np.models.gpt2 import GPT2Config, parameter_count
from comet_np.optim import OptimizerConfig
from comet_np.records import read_json
from tests.runs import lines, stopped

# --- the settings -------------------------------------------------------------------------------

ALL = ("small", "medium", "large")
BPE = {"tokenizer": "bpe", "vocabulary": 50_000}
PAPER = {9: ("wikitext", ALL, BPE), 10: ("codeparrot", ALL, BPE)}  # what A.4 and the captions say
for first, change in ((12, {}), (18, {"lr": (1e-3,)}), (24, {"accumulate": (2,)})):
    for i, corpus in enumerate(("wikitext", "codeparrot")):
        PAPER |= {first + 3 * i + j: (corpus, (size,), change) for j, size in enumerate(ALL)}
PAPER |= {number: (corpus, (size,), {"precision": ("float32",)}) for number, corpus, size in (
    (30, "wikitext", "small"), (31, "wikitext", "medium"), (32, "codeparrot", "small"))}


def test_every_figure_of_gpt_2_is_there():
    assert {f"fig{number}" for number in PAPER} == set(FIGURES)


@pytest.mark.parametrize("number", PAPER)
def test_the_paper_presets_are_those_of_the_paper(number):
    corpus, sizes, changes = PAPER[number]
    config = experiment(f"fig{number}").configure("paper", {})
    assert config == GPTConfig(corpora=(corpus,), sizes=sizes, **changes)
    assert EXPERIMENTS[f"fig{number}"][1].startswith(f"Figure {number}: ")


def test_the_defaults_are_those_of_the_paper():
    config = GPTConfig()
    panel, = GPTConfig(corpora=("wikitext",), sizes=("small",)).panels
    run = cell_of(config, panel, "comet", 2).spec.run
    assert run.model == GPT2Config(gate=Comet(0.5), context=128)
    assert (run.seed, config.seeds, config.models) == (2, 3, ("standard", "comet"))
    training = run.training
    assert training.optimizer == OptimizerConfig("adamw", weight_decay=0.1, decay_biases=False,
                                                 clip_norm=1.0)
    assert (training.lr, training.schedule, training.warmup) == (5e-4, "warmup_cosine", 1000)
    assert (training.batch, training.accumulate, training.epochs) == (32, 8, 3)
    assert (training.precision, training.steps) == ("float16", None)


@pytest.mark.parametrize(("size", "tokenizer", "count"), [
    ("small", "gpt2", 124_439_808), ("small", "bpe", 124_242_432), ("4x128x4", "bytes", 957_184)])
def test_the_number_of_parameters(size, tokenizer, count):
    config = GPTConfig(sizes=(size,), tokenizer=tokenizer)
    assert parameter_count(config.standard(config.panels[0])) == count


def test_the_panels_are_all_settings_and_the_models_without_p_k_have_one_cell():
    config = GPTConfig(sizes=("1x8x2",), p_k=(0.25, 0.5), lr=(1e-3, 1e-2), accumulate=(1, 4),
                       precision=("float16", "float32"), seeds=2)
    found = experiment("gpt").cells(config)
    assert len(config.panels) == 2 * 2 * 2 * 2 * 2
    assert len(found) == len({cell.name for cell in found}) == 2 * (32 + 16)
    assert [cell.spec.run.seed for cell in found] == 48 * [0] + 48 * [1]
    assert {(r.training.lr, r.training.accumulate, r.training.precision)
            for r in (cell.spec.run for cell in found)} == {
        (lr, accumulate, precision) for lr in (1e-3, 1e-2) for accumulate in (1, 4)
        for precision in ("float16", "float32")}
    assert {cell.spec.filtered for cell in found if cell.spec.corpus == "wikitext"} == {False}
    assert {cell.spec.filtered for cell in found if cell.spec.corpus == "codeparrot"} == {True}


@pytest.mark.parametrize(("flags", "message"), [
    ({"sizes": ("huge",)}, r'a size of GPT-2 is one of small, .* as 4x128x4, got "huge"'),
    ({"sizes": ("1000x8x2",)}, 'got "1000x8x2"'),
    ({"sizes": ("2x10x3",)}, "heads"),
    ({"tokenizer": "words"}, "unknown tokenizer"),
    ({"tokenizer": "bpe", "vocabulary": 0}, "vocabulary"),
    ({"context": 1}, "at least 2 tokens"),
    ({"positions": 64}, "at most as many as --positions, got context = 128, positions = 64"),
    ({"corpora": ("a/x.txt", "b/x.txt")}, "two of the corpora have one name"),
    ({"lr": ()}, "--lr needs at least one value"),
    ({"steps": 10}, "the warm-up must be 0 to 10 steps long, the length of the run, got 1000"),
    ({"models": ("moe",)}, "unknown model"), ({"p_k": (0.0,)}, "proportion of neurons"),
    ({"seeds": 10**9}, "networks, of which 100,000 can be")])
def test_bad_settings_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        experiment("gpt").configure("paper", flags)


# --- a run --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMET_DATA", raising=False)


@pytest.fixture
def text():
    """Write a small corpus."""
    words = np.random.default_rng(0).choice(["one ", "two ", "three ", "\n"], 2000)
    Path("text.txt").write_text("".join(words))


RUN = ("run", "gpt", "--preset", "smoke", "--corpora", "text.txt", "--jobs", "1")


def test_a_run_trains_draws_and_leaves_what_generates(text, capsys):
    pytest.importorskip("matplotlib")
    assert main([*RUN, "--seeds", "1"]) == 0
    shown = capsys.readouterr()
    assert "2 cells run in" in shown.out
    assert "comet learns " in shown.out
    folder = next(Path("runs/gpt-smoke/cells").glob("text-comet-*-seed0-*"))
    assert load_run(folder).config.vocabulary == load_tokenizer(folder).vocabulary == 256
    metrics = lines(folder)
    assert [line["step"] for line in metrics] == [0, 2, 4, 6, 8, 10]
    assert metrics[-1]["val_perplexity"] == pytest.approx(math.exp(metrics[-1]["val_loss"]))
    assert metrics[-1]["val_perplexity"] < 0.8 * metrics[0]["val_perplexity"]
    assert read_json(folder / "result.json")["texts"] == 200
    Path("runs/gpt-smoke/gpt.png").unlink()
    Path("text.txt").unlink()
    assert main(["plot", "gpt", "--preset", "smoke"]) == 0
    assert capsys.readouterr().out == shown.out[shown.out.index("perplexity "):]
    assert Path("runs/gpt-smoke/gpt.png").stat().st_size > 10_000
    assert main([*RUN, "--seeds", "1"]) == 0  # nothing is to be done: no text is needed
    assert "2 found finished" in capsys.readouterr().out


def test_a_run_that_was_stopped_ends_as_one_that_was_not(text, tmp_path):
    """With dropout and accumulation, at a step between two evaluations."""
    config = experiment("gpt").configure("smoke", {
        "corpora": ("text.txt",), "dropout": 0.1, "steps": 6, "evaluations": 2})
    spec = cell_of(config, config.panels[0], "comet", 0).spec
    whole, parts = (Place(tmp_path / name, get_backend("numpy"), None, Progress(1))
                    for name in ("whole", "parts"))
    run_cell(spec, whole)
    assert stopped(spec.run, load(spec, None, Progress(1)), parts.folder, at=4)
    run_cell(spec, parts)
    assert lines(parts.folder) == lines(whole.folder)
    assert [line["step"] for line in lines(parts.folder)] == [0, 3, 6]
    weights = [np.load(place.folder / "weights.npz") for place in (whole, parts)]
    for name in weights[0]:
        np.testing.assert_array_equal(weights[0][name], weights[1][name], name)


def test_a_diverged_run_is_a_result(text, capsys, saved):
    assert main([*RUN, "--lr", "1e-2,1e30", "--seeds", "1", "--models", "standard", "--steps", "4",
                 "--clip-norm", "none"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"lr 1e\+30, p_k = 0.5: standard, seed 0: training diverged at step \d \(loss",
                     out)
    assert re.search(r"lr 1e\+30, p_k = 0.5: standard \(1 diverged\) .* diverged ", out)
    assert not list(Path("runs").glob("**/diverged"))
    left, = Path("runs/gpt-smoke/cells").glob("*lr1e+30*")
    assert read_json(left / "result.json")["texts"] == 200
    assert main(["generate", str(left), "--prompt", "one"]) == 2
    assert re.search(r"left no network \(training diverged at step \d .*\): there is no model",
                     capsys.readouterr().err)
    crosses = [[line.get_marker() for line in axes.lines].count("x") for axes in saved[-1].axes]
    assert crosses == [0, 0, 1, 1]


def test_what_is_missing_is_said_before_any_work(text, capsys, monkeypatch):
    monkeypatch.setattr(sweep.Sweep, "run", lambda self: pytest.fail("it runs"))
    for flags, message in (
            (["--corpora", "text.txt,wikitext"], "wikitext needs its files"),
            (["--corpora", "text.txt,other.txt"], "there is no file other.txt"),
            (["--tokenizer", "gpt2"], '"gpt2" needs its files'),
            (["--steps", "none", "--epochs", "1", "--warmup", "99"], "warm-up must be 0 to 10 ")):
        assert main([*RUN, *flags]) == 2
        assert message in capsys.readouterr().err
        assert not Path("runs/gpt-smoke/run.json").exists()
    assert not Path("cache").exists() or len(list(Path("cache").iterdir())) == 1


@pytest.mark.parametrize(("flags", "advice"), [
    ([], ", or give --recompute true\n"), (["--recompute", "true"], "\n"),
    (["--sizes", "medium", "--batch", "16"],
     ", or give --recompute true, or run fewer cells at once with --jobs 1\n")])
def test_too_little_memory_is_said_before_the_start(text, capsys, monkeypatch, flags, advice):
    monkeypatch.setattr(sweep, "physical_memory", lambda: 16e9)
    assert main(["run", "fig14", "--preset", "paper", "--jobs", "2", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(r"2 cells at a time need about \d\d\.\d GB of memory beside the data, and .* "
                     r"has 16.0 GB: lower --sizes or --batch", error)
    assert f"--accumulate makes up for a smaller batch{advice}" in error


def test_as_many_cells_run_at_once_as_fit():
    cells = [sweep.Cell(str(i), None, 1.0, memory) for i, memory in enumerate((3, 1, 2, 2))]

    class Backend:
        def __init__(self, memory):
            self.memory = memory

        def describe(self):
            return {"memory": self.memory, "device": "a device"}

    assert [sweep.at_once(None, cells, Backend(memory), None, 4) for memory in (3, 5, 7, 8)] == [
        1, 2, 3, 4]
    assert sweep.at_once(None, cells, Backend(5), 2, 4) == 2
    assert sweep.at_once(None, [], Backend(5), None, 0) == 1


# --- figure and table, from files made by hand --------------------------------------------------


def curve(values, diverged=None):
    return Curve(100.0 * np.arange(len(values)), np.array(values, float),
                 np.arange(len(values), dtype=float), diverged, "")


def test_how_much_faster_one_learns():
    slow, fast = curve([100, 40, 20, 10]), curve([100, 20, 5, 5])
    assert reached(slow, 10) == 300
    assert reached(slow, 20 * 2**0.5) == pytest.approx(150)  # halfway in the logarithm
    assert reached(slow, 9) == math.inf
    assert reached(slow, 200) == 0
    ahead = gpt_report.saved(fast, slow)
    assert ahead == pytest.approx(0.5)  # 10 lies halfway from 20 to 5
    assert gpt_report.saved(slow, fast) == -ahead
    assert gpt_report.saved(slow, slow) == 0


def test_the_verdict_is_over_the_seeds_that_came_to_the_end():
    one = {0: curve([100, 20, 5]), 1: curve([100, 30, 8]), 2: curve([100, 1], "diverged")}
    other = {0: curve([100, 15, 10]), 1: curve([100, 25, 10]), 2: curve([100, 10, 9])}
    made = verdict(one, other)
    assert made.lower.mean == pytest.approx(35)  # 50 % and 20 %
    assert made.lower.reach == pytest.approx(12.706204736 * 15)  # t_{1, 0.975} s / sqrt(2)
    assert (made.ahead, made.of) == (1, 2)
    assert verdict({2: one[2]}, other) is None


CONFIG = GPTConfig(corpora=("wikitext",), sizes=("1x8x2",), tokenizer="bytes", batch=4,
                   accumulate=(1,), context=8, seeds=3)


def finish(out, curves, **result):
    """Write the files of finished cells with these perplexities, a step apart."""
    panel, = CONFIG.panels
    for model, of_seeds in curves.items():
        for seed, values in enumerate(of_seeds):
            folder = cell_of(CONFIG, panel, model, seed).folder(out)
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(
                {"epoch": i, "step": i, "val_perplexity": value, "seconds": 2.0 * i}) + "\n"
                for i, value in enumerate(values)))
            ended = {} if len(values) == 4 else {"diverged": "at step 3"}
            write_result(folder, {"data": "d"} | ended | result)


def test_the_table_and_the_figure_with_seeds_missing_and_diverged(tmp_path, saved):
    finish(tmp_path, {"standard": ([99, 50, 30, 20], [99, 60, 40]),
                      "comet": ([99, 20, 15, 10],)})
    rows = [re.split("  +", line) for line in gpt_report.table(CONFIG, tmp_path).splitlines()]
    where = "wikitext, 1x8x2, p_k = 0.5"
    assert rows[1] == [f"{where}: standard (2 of 3 seeds, 1 diverged)", "30.00 +- 127.06", "20.00",
                       "16", "11,128"]
    assert rows[2] == [f"{where}: comet (1 of 3 seeds)", "10.00", "10.00", "16", "11,128"]
    assert rows[3] == [f"{where}: standard, seed 1: at step 3"]
    assert rows[4] == [f"{where}: comet learns faster: it comes to where standard ends with 66.7 % "
                       "fewer tokens; at the end its perplexity is 50.0 % lower; ahead at 3 of 3 "
                       "evaluations (one seed)"]
    assert gpt_report.draw(CONFIG, tmp_path, "gpt") == [tmp_path / "gpt.png"]
    left, right = saved[-1].axes
    np.testing.assert_allclose(left.lines[0].get_xydata() * [1e6, 1], [
        [0, 99], [32, 55], [64, 35]])  # the mean as far as both go
    np.testing.assert_array_equal(right.lines[1].get_xydata(), [[4, 30], [6, 20]])
    assert left.get_yscale() == "log"
    assert left.get_ylim()[1] < 99  # what is before the first tenth leaves the figure


def test_tokens_are_those_of_the_texts_though_the_last_step_of_an_epoch_is_short(tmp_path):
    finish(tmp_path, {"standard": ([99, 50, 30, 20], [99, 60, 40])}, texts=3)  # 3 of a batch of 4
    found = gpt_report.read(CONFIG, tmp_path)[CONFIG.panels[0], "standard"]
    assert [curve.tokens[-1] for curve in found.values()] == [3 * 3 * 8, 2 * 3 * 8]


@pytest.mark.parametrize(("standard", "speed"), [(([99],), "-"), (([99, 50, 30, 20], [99]), "16")])
def test_the_speed_is_that_of_the_cells_that_took_a_step(tmp_path, standard, speed):
    finish(tmp_path, {"standard": standard})
    assert re.split("  +", gpt_report.table(CONFIG, tmp_path).splitlines()[1])[3] == speed


def test_a_folder_without_finished_cells_has_no_figure(tmp_path):
    with pytest.raises(UserError, match="holds no finished cell of gpt"):
        gpt_report.draw(CONFIG, tmp_path, "gpt")


def test_a_size_is_a_name_or_three_numbers():
    assert shape("2x16x4") == (2, 16, 4)
    assert shape("large") == (36, 1280, 20)
