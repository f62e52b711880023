"""The GPU benchmark without a GPU: our part on the stand-in, PyTorch's on the CPU, the tables."""

import contextlib
import gc
import importlib.util
import json
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from comet_np.backends import BackendError, get_backend
from comet_np.benchmarks import bench, cpu_workers, gpu, gpu_workers
from comet_np.benchmarks.gpu_workers import Sizes, Step
from comet_np.benchmarks.processes import Results, WorkerFailed
from comet_np.errors import UserError
from comet_np.experiments.tasks import TASKS
from comet_np.experiments.training import Learner, RunConfig, TrainConfig
from comet_np.optim import OptimizerConfig

from . import shim
from .strict_cupy import strict_cupy

TINY = Sizes(widths=(6,), batches=(2,), rows_of=(40,), numbers=4000, seconds=0.0,
             vision=(("vit-tiny",), 2), language=(("gpt2-tiny",), 2))
TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not TORCH, reason="PyTorch is not installed")


@pytest.fixture
def tiny_inputs(monkeypatch):
    """Give the benchmarked network few inputs: the stand-in runs each thread of a kernel."""
    monkeypatch.setattr(cpu_workers, "INPUTS", 12)
    monkeypatch.setattr(gpu_workers, "STEPS_AHEAD", 5)  # fewer than are taken


def test_our_steps(machine, tiny_inputs):
    machine.watch = False
    times = gpu_workers.ours(6, TINY)
    assert set(times) == {f"2 sgd {p_k} {how}" for p_k in ("standard", "0.5")
                          for how in ("graph", "ordinary", "tf32")} | {"2 sgd 0.5 cached"}
    assert all(time > 0 for time in times.values())


@pytest.mark.parametrize("how", ["graph", "ordinary", "tf32", "cached"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_timed_step_trains(machine, tiny_inputs, optimizer, how):
    machine.watch = False
    backend = get_backend("cupy")
    config = RunConfig(cpu_workers.network(6, 0.5), TrainConfig(OptimizerConfig(optimizer)))
    learner = Learner(config, TASKS["classification"], backend)
    step = gpu_workers.our_step(backend, learner, 6, Step(2, optimizer, 0.5), how)
    before = [backend.to_host(learner.flat)]
    for _ in range(12):
        step()
        before.append(backend.to_host(learner.flat))
        assert np.isfinite(before[-1]).all()
        assert (before[-1] != before[-2]).any()


@pytest.mark.parametrize(("networks", "model"), [("vision", "vit-tiny"),
                                                 ("language", "gpt2-tiny")])
def test_our_steps_of_other_models(machine, monkeypatch, networks, model):
    machine.watch = False
    monkeypatch.setattr(gpu_workers, "STEPS_AHEAD", 5)
    times = gpu_workers.other_ours(networks, model, TINY)
    assert set(times) == {f"{kind} {how}" for kind in ("comet", "standard")
                          for how in ("graph", "ordinary")}
    assert all(time > 0 for time in times.values())


def test_masks_alone(machine):
    machine.watch = False
    times = gpu_workers.kwta_ours(40, TINY)
    assert set(times) == {"bool", "bool copy", "bits", "bits copy"}


def test_kernels(machine):
    machine.watch = False
    times = gpu_workers.kernels(40, TINY)
    names = {name for name in times if not name.endswith(" copy")}
    assert len(names) == 23 and set(times) == names | {f"{name} copy" for name in names}
    timed = {name.partition("<")[0] for name in machine.launches}
    instances = {name.partition("<")[0] for names in shim.INSTANCES.values() for name in names}
    assert timed == instances - {"kwta"}  # which kwta_ours times


def test_what_does_not_fit_into_memory_is_left_out(machine):
    machine.memory = 3000
    assert gpu_workers.kwta_ours(40, TINY) == dict.fromkeys(
        ("bool", "bool copy", "bits", "bits copy"), "no memory: the GPU's is too small")


def test_other_errors_are_raised(machine):
    watch = gpu_workers.Stopwatch(gpu_workers.cpu_clock, 0.0)
    with pytest.raises(ZeroDivisionError):
        watch.add("call", lambda: lambda: 1 / 0)


def test_the_time_of_a_call_is_the_median_of_groups():
    asked = []

    def clock(call, calls):
        asked.append(calls)
        return calls * [2.0, 2.0, 9.0, 1.0, 3.0, 2.0, 4.0][len(asked) - 1]

    assert gpu_workers.Stopwatch(clock, 0.1).median_ms(lambda: None) == 3.0
    assert asked == [3, 2, *[10] * 5]  # 5 groups of 10 calls of 2 ms are 0.1 s


def test_the_steps_that_are_measured():
    full = gpu_workers.PRESETS["full"]
    chosen = [(N, *step) for N in full.widths for step in gpu_workers.steps(N, full.batches)]
    assert len(chosen) == 5 * (4 + 3 + 3) + 2
    assert (9000, 4096, "sgd", 0.5) in chosen and (100, 128, "sgd", 0.9) in chosen
    assert [step for step in chosen if "adamw" in step] == [(1000, 128, "adamw", None),
                                                            (1000, 128, "adamw", 0.5)]


# --- PyTorch ------------------------------------------------------------------------------------


@needs_torch
def test_pytorchs_part(tiny_inputs, request):
    import torch

    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))  # for other tests
    assert set(gpu_workers.pytorch(6, TINY, "cpu")) == {
        f"2 sgd {p_k} {how}" for p_k in ("standard", "0.5") for how in ("eager", "tf32")}
    assert set(gpu_workers.kwta_pytorch(40, TINY, "cpu")) == {"topk"}


@needs_torch
@pytest.mark.parametrize("p_k", [None, 0.5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_pytorchs_timed_step_trains(tiny_inputs, monkeypatch, optimizer, p_k):
    fc, network = cpu_workers.torch_network(6)
    monkeypatch.setattr(gpu_workers, "torch_network", lambda N: (fc, network))
    before = [p.detach().clone() for p in fc.parameters()]
    gpu_workers.torch_steps(6, "cpu")(Step(2, optimizer, p_k), "highest")()
    assert len(before) == 8
    assert all((p != old).any() for p, old in zip(fc.parameters(), before, strict=True))


@needs_torch
def test_networks_are_compiled_while_time_lasts(tiny_inputs, monkeypatch):
    import torch

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network, **how: compiled.append(how) or network)
    assert set(gpu_workers.pytorch_compiled(6, TINY, "cpu")) == {"2 sgd 0.5 compiled"}
    assert compiled == [{"mode": "reduce-overhead", "dynamic": False}]
    monkeypatch.setattr(gpu_workers, "COMPILE_SECONDS", -1.0)
    assert gpu_workers.pytorch_compiled(6, TINY, "cpu") == {
        "2 sgd 0.5 compiled": "no time: others took -1 s"}


@pytest.fixture
def made_up_graphs(monkeypatch):
    """Let PyTorch's streams and graphs be made up: a graph replays what ran while it was captured.

    Return what happened, in order; a step says on which stream it ran, and what it captured into.
    """
    import torch

    happened = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            happened.append(f"{self.name} waits for {other.name}")

    main = Stream("main")
    current = [main]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    class Graph:
        def replay(self):
            happened.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        assert isinstance(graph, Graph)
        with on(Stream("capture")):
            yield

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        Stream=Stream, stream=on, current_stream=lambda: current[-1], CUDAGraph=Graph,
        graph=capture))
    return happened, lambda: happened.append(f"step on {current[-1].name}")


@needs_torch
def test_a_step_is_captured_as_pytorchs_manual_says(made_up_graphs):
    happened, step = made_up_graphs
    replay = gpu_workers.capture(step)
    assert happened == ["side waits for main", *["step on side"] * 3, "main waits for side",
                        "step on capture"]
    del happened[:]
    replay()
    replay()
    assert happened == ["replay"] * 2


@needs_torch
def test_what_a_graph_reads_lives_as_long_as_its_replay(made_up_graphs):
    class Static:
        """The tensors of a mini-batch."""

    static = Static()
    alive = weakref.ref(static)

    def step(static=static):
        return static

    replay = gpu_workers.capture(step)
    del static, step
    gc.collect()
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None


@needs_torch
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_captured_step_is_the_whole_step(tiny_inputs, monkeypatch, optimizer):
    """It begins without gradients, and with an optimizer that may be captured."""
    import torch

    fc, network = cpu_workers.torch_network(6)
    monkeypatch.setattr(gpu_workers, "torch_network", lambda N: (fc, network))
    monkeypatch.setattr(gpu_workers, "steps",
                        lambda N, batches: [Step(2, optimizer, p_k) for p_k in (None, 0.5)])
    made, moved = [], []

    def recorded(build):
        return lambda *arguments, **keywords: made.append(keywords) or build(*arguments, **keywords)

    for name in ("SGD", "AdamW"):
        monkeypatch.setattr(torch.optim, name, recorded(getattr(torch.optim, name)))

    def capture(call):
        before = [p.detach().clone() for p in fc.parameters()]
        for p in fc.parameters():
            p.grad = torch.full_like(p, torch.nan)  # of a step before
        call()
        moved.append(all((torch.isfinite(p) & (p != old)).any()
                         for p, old in zip(fc.parameters(), before, strict=True)))
        return call

    monkeypatch.setattr(gpu_workers, "capture", capture)
    assert set(gpu_workers.pytorch_captured(6, TINY, "cpu")) == {
        f"2 {optimizer} {p_k} captured" for p_k in ("standard", "0.5")}
    assert moved == [True, True]
    assert all(keywords["fused"] for keywords in made)
    assert [keywords.get("capturable") for keywords in made] == [
        None if optimizer == "sgd" else True] * 2  # SGD without momentum has no state


@needs_torch
@pytest.mark.parametrize(("networks", "model"), [("vision", "vit-tiny"),
                                                 ("language", "gpt2-tiny")])
def test_pytorchs_steps_of_other_models(monkeypatch, networks, model):
    if networks == "language":
        pytest.importorskip("transformers", reason="transformers is not installed")
    moved = []

    def capture(call):
        moved.append([float(call()) for _ in range(3)])
        return call

    monkeypatch.setattr(gpu_workers, "capture", capture)
    for work, how in ("pytorch", "eager"), ("captured", "captured"):
        times = gpu_workers.WORKS[f"{networks}_{work}"](model, TINY, "cpu")
        assert set(times) == {f"{kind} {how}" for kind in ("comet", "standard")}
    assert all(len(set(losses)) == 3 for losses in moved) and len(moved) == 2  # the step trains


# --- the run as a whole -------------------------------------------------------------------------

SMOKE = gpu_workers.PRESETS["smoke"]


def answers(module, environment, limit, work, N, preset):
    """Stand for a worker: ours takes 1 ms, a copy 0.5, PyTorch 4, captured 2, its TF32 nothing."""
    steps = [] if isinstance(N, str) else gpu_workers.steps(N, SMOKE.batches)
    names = {"ours": [f"{step} {how}" for step in steps
                      for how in ("graph", "ordinary", "tf32", "cached")],
             "pytorch": [f"{step} {how}" for step in steps for how in ("eager", "tf32")],
             "pytorch_captured": [f"{step} captured" for step in steps],
             "pytorch_compiled": ["32 sgd 0.5 compiled"], "kwta_pytorch": ["topk"],
             "kwta_ours": ["bool", "bool copy", "bits", "bits copy"],
             "kernels": ["sgd", "sgd copy"],
             **{f"{networks}_{side}": [f"{kind} {how}" for kind in ("comet", "standard")
                                       for how in hows]
                for networks in ("vision", "language") for side, hows in (
                    ("ours", ("graph", "ordinary")), ("pytorch", ("eager",)),
                    ("captured", ("captured",)))}}[work]
    assert module == "gpu_workers" and preset == "smoke" and limit == 120

    def answer(name):
        if "pytorch" in work and "tf32" in name:
            return "no memory: the GPU's is too small"
        if name.endswith("copy"):
            return 0.5
        return 2.0 if "captured" in work + name else 4.0 if "pytorch" in work else 1.0

    return {name: answer(name) for name in names}


@pytest.fixture
def whole(machine, monkeypatch):
    """Let the benchmark run on the stand-in, with worker processes and PyTorch made up."""
    monkeypatch.setattr(gpu, "in_a_process", answers)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(
        __version__="2.9", cuda=SimpleNamespace(is_available=lambda: True),
        version=SimpleNamespace(cuda="13.0")))


def words_of(report, first):
    """Return the words of the report's lines that begin so, after their first column."""
    return [word for line in report.splitlines() if line.startswith(first + " ")
            for word in line.removeprefix(first).split()]


def test_a_whole_run(whole, saved, tmp_path, capsys):
    assert bench.run("cupy", "smoke", tmp_path, 2, None, True, 120)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert {"device", "driver", "cuda", "cupy", "torch", "pytorch settings"} <= set(
        result["settings"])
    assert result["times"]["ours 100 32 sgd 0.5 graph"] == [1.0, 1.0]
    assert result["times"]["pytorch_captured 100 32 sgd 0.5 captured"] == [2.0, 2.0]
    assert result["left out"]["pytorch 100 32 sgd 0.5 tf32"] == (
        "no memory: the GPU's is too small")
    quarter, missed_quarter, half, one, two = (
        f"{text} ({text[:4]}-{text[:4]})".split()
        for text in ("0.25", "0.25*", "0.50", "1.00", "2.00*"))
    assert words_of(printed, "512") == ["1", "1", "4", *2 * two, *2 * missed_quarter,
                                         "50%", "50%"]
    assert words_of(printed, "100, 32, sgd, 0.5") == [
        *["1"] * 5, "4", "no", "memory", "4", "2", "4", "2", *3 * quarter, *3 * half,
        *quarter, "-", *one]
    assert words_of(printed, "sgd") == ["1", "0.5", "2.00", "(2.00-2.00)"]  # has no goal
    assert ("left out: pytorch 100 32 sgd 0.5 tf32 (no memory: the GPU's is too small)"
            in printed)
    assert [axes.get_ylabel() for axes in saved[0].axes] == [
        "our time / eager PyTorch's", "our time / PyTorch in one CUDA graph's"]


def test_a_run_of_the_vision_models(whole, tmp_path, capsys):
    assert bench.run("cupy", "smoke", tmp_path, 2, None, True, 120, "vision")
    printed = capsys.readouterr().out
    for model in SMOKE.vision[0]:
        for kind in ("comet", "standard"):
            assert words_of(printed, f"{model}, {kind}") == [
                "1", "1", "4", "2", "0.25", "(0.25-0.25)", "0.50", "(0.50-0.50)"]
    times = json.loads((tmp_path / "bench.json").read_text())["times"]
    assert times["vision_ours vit-tiny comet graph"] == [1.0, 1.0]


def test_a_run_of_gpt2(whole, tmp_path, capsys):
    assert bench.run("cupy", "smoke", tmp_path, 2, None, True, 120, "language")
    printed = capsys.readouterr().out
    for kind in "comet", "standard":  # 2 texts of 12 tokens
        assert words_of(printed, f"gpt2-tiny, {kind}") == [
            "1", "1", "4", "2", "0.25", "(0.25-0.25)", "0.50", "(0.50-0.50)",
            "2.4e+04", "2.4e+04", "6000", "1.2e+04"]


def test_a_worker_that_hangs_is_reported_and_the_others_go_on(whole, saved, tmp_path, monkeypatch,
                                                              capsys):
    def hangs(*arguments):
        if arguments[3] == "pytorch_captured":
            raise WorkerFailed("timed out: killed after 120 s")
        return answers(*arguments)

    monkeypatch.setattr(gpu, "in_a_process", hangs)
    assert not bench.run("cupy", "smoke", tmp_path, 2, None, True, 120)
    words = words_of(capsys.readouterr().out, "100, 32, sgd, 0.5")
    assert words[9:15] == ["timed", "out", "4", "timed", "out", "0.25"]
    assert json.loads((tmp_path / "bench.json").read_text())["times"]["kernels 3000 sgd"] == [
        1.0, 1.0]


def results_of(tmp_path, times):
    """Return results of the made-up workers, and times."""
    results = Results(tmp_path / "bench.json", {}, lambda work, N: answers(
        "gpu_workers", {}, 120, work, N, "smoke"))
    results.times.update(times)
    return results


def test_repeats_end_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "REPEATS_END", 0.0)
    monkeypatch.setattr(gpu, "COMPILE_END", 0.0)
    results = results_of(tmp_path, {})
    gpu.measure(results, gpu.plan(SMOKE), SMOKE.widths, 5)
    assert {len(values) for values in results.times.values()} == {1}
    left_out = json.loads((tmp_path / "bench.json").read_text())["left out"]
    assert left_out["repeats from 2 on"] == left_out["pytorch_compiled 100"] == "no time"


def test_missing_times_are_dashes(tmp_path):
    text = gpu.report(results_of(tmp_path, {"ours 100 32 sgd 0.5 graph": [1.0]}), SMOKE)
    assert words_of(text, "100, 32, sgd, 0.5") == ["1", *["-"] * 19]
    assert words_of(text, "512") == ["-"] * 9


@pytest.mark.parametrize(("devices", "error", "message"), [
    (1, UserError, r"2\.9\+cpu cannot use the GPU.*pip install .*whl/cu130"),
    (0, BackendError, "CUDA sees no GPU")])
def test_what_is_missing_is_said_in_one_sentence(monkeypatch, tmp_path, devices, error, message):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(
        __version__="2.9+cpu", cuda=SimpleNamespace(is_available=lambda: False)))
    with strict_cupy(devices=devices), pytest.raises(error, match=message):
        bench.run("cupy", "smoke", tmp_path, 1, None, True, 120)


def test_a_missing_pytorch_is_said_in_one_sentence(machine, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="compares with PyTorch: python -m pip install torch"):
        bench.run("cupy", "smoke", tmp_path, 1, None, True, 120)
