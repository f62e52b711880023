"""The CPU benchmark: its workers' limits, what a failing one costs, JAX's step, the tables."""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.benchmarks import (
    bench,
    cpu_workers,
    inference,
    inference_workers,
    language_workers,
    model_workers,
    models,
    processes,
    steps,
    vision,
    vision_workers,
)
from comet_np.benchmarks.processes import Results, WorkerFailed, in_a_process
from comet_np.errors import UserError
from comet_np.experiments import cli
from comet_np.experiments.variants import PENALTY
from comet_np.functional import dropout
from comet_np.functional.attention import SelfAttention
from comet_np.functional.dropout import dropout_factor
from comet_np.functional.linear import Linear
from comet_np.functional.norm import Norm
from comet_np.functional.routing import cap
from comet_np.functional.tokens import TokenEmbedding
from comet_np.models import mlp, module_of
from comet_np.models.block import Block
from comet_np.models.gpt2 import GPT2Params
from comet_np.rng import key
from comet_np.tree import flatten, leaves, tree_map
from tests.tolerances import assert_close

needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None,
                               reason="JAX, of the crosscheck extra, is not installed")


def ends(pid):
    """Return whether a process ends soon: is gone, or but waits to be asked after."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def worker_that(tmp_path, monkeypatch):
    """Let shell lines stand for the workers' Python."""
    def stand(lines):
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\ncd {tmp_path}\n{lines}\n")
        script.chmod(0o700)
        monkeypatch.setattr(processes.sys, "executable", str(script))
        return tmp_path
    return stand


# --- a worker's process -------------------------------------------------------------------------


def test_the_last_line_of_a_worker_is_its_answer(worker_that):
    worker_that("""echo 'a library says hello'; echo '{"step": 1.5}'""")
    assert in_a_process("cpu_workers", {}, 60) == {"step": 1.5}


def test_a_worker_answers_and_ends():
    assert in_a_process("cpu_workers", {}, 120, "kwta_ours", 100, 32, 0.0)["kwta"] > 0


@pytest.mark.parametrize(("module", "arguments"), [
    ("cpu_workers", ("knit", 100, 32, 0.0)), ("gpu_workers", ("knit", 100, "smoke"))])
def test_an_error_of_a_worker_is_its_last_line(module, arguments):
    with pytest.raises(WorkerFailed, match=r"^failed: 'knit'$"):
        in_a_process(module, {}, 120, *arguments)


@pytest.mark.parametrize(("lines", "why"), [
    ("echo 'some.module.FooError: no luck' >&2; exit 1", "failed: no luck"),
    ("exit 3", "failed: it said nothing"),
    ("kill -s KILL $$", "killed: by SIGKILL")])
def test_why_a_worker_failed(worker_that, lines, why):
    worker_that(lines)
    with pytest.raises(WorkerFailed) as caught:
        in_a_process("cpu_workers", {}, 60)
    assert str(caught.value) == why


def test_a_worker_that_takes_too_long_is_killed_with_its_children(worker_that):
    folder = worker_that("sleep 60 & echo $! > child; echo $$ > worker; wait")
    with pytest.raises(WorkerFailed, match=r"^timed out: killed after 1 s, --limit allows more$"):
        in_a_process("cpu_workers", {}, 1)
    assert ends(int((folder / "worker").read_text()))
    assert ends(int((folder / "child").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_ends_with_its_parent_however_that_ends():
    parent = subprocess.Popen([sys.executable, "-c", """if True:
        from comet_np.benchmarks.processes import in_a_process
        in_a_process("cpu_workers", {}, 1000, "kwta_ours", 100, 32, 60)"""])
    try:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while not (workers := children.read_text().split()):
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    assert ends(int(workers[0]))


# --- the results --------------------------------------------------------------------------------


def test_results_are_written_after_each_worker_and_outlive_a_failed_one(tmp_path):
    file, asked = tmp_path / "bench.json", []

    def run(work, *sizes):
        asked.append(work)
        if len(asked) > 1:
            assert next(iter(json.loads(file.read_text())["times"])) == "ours 8 2 step"
        if work == "hangs":
            raise WorkerFailed("timed out: killed after 1 s")
        return {"step": 3.0 if work == "ours" else 2.0, "large": "no memory: too little"}

    results = Results(file, {"machine": "m"}, run)
    for _ in range(2):
        for work in ("ours", "hangs", "theirs"):
            results.add(work, 8, 2)
    assert asked == ["ours", "hangs", "theirs", "ours", "theirs"]  # it is not tried again
    assert json.loads(file.read_text()) == {
        "settings": {"machine": "m"},
        "times": {"ours 8 2 step": [3.0, 3.0], "theirs 8 2 step": [2.0, 2.0]},
        "left out": {"ours 8 2 large": "no memory: too little",
                     "hangs 8 2": "timed out: killed after 1 s",
                     "theirs 8 2 large": "no memory: too little"}}
    assert not results.all_ran
    assert [results.shown(f"{key} 8 2 step") for key in ("ours", "hangs", "hang")] == [
        "3", "timed out", "-"]
    assert results.shown("ours 8 2 large") == "no memory"
    ratios = results.ratios({"theirs": ("ours 8 2 step", "theirs 8 2 step", 1.0),
                             "hangs": ("ours 8 2 step", "hangs 8 2 step", 1.0)})
    assert [(name, str(ratio)) for name, ratio in ratios.items()] == [
        ("theirs", "1.50* (1.50-1.50)")]


# --- JAX ----------------------------------------------------------------------------------------


@needs_jax
@pytest.mark.parametrize("k", [None, 1, 3, 5, 6])
def test_jax_takes_the_step_of_the_published_network(monkeypatch, k):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import jax

    N, rate = 6, 10.0
    monkeypatch.setattr(cpu_workers, "INPUTS", 12)
    monkeypatch.setattr(cpu_workers, "LR", rate)  # so that an update is not lost in rounding
    params, V = jax.device_get(cpu_workers.jax_weights(N))
    x, y = cpu_workers.batch(4)
    moved, loss = cpu_workers.jax_step(k)(jax.device_put(params), V, x, y)

    fc, network = cpu_workers.torch_network(N)
    with torch.no_grad():
        spec = network.__closure__[network.__code__.co_freevars.index("spec")].cell_contents
        for layer, W in zip(spec, V, strict=True):
            layer.weight[:] = torch.tensor(W.T)
        for layer, (W, b) in zip(fc, params, strict=True):
            layer.weight[:], layer.bias[:] = torch.tensor(W.T), torch.tensor(b)
    expected = torch.nn.functional.cross_entropy(
        network(torch.from_numpy(x), None if k is None else (k + 0.5) / N), torch.from_numpy(y))
    expected.backward()
    assert_close(loss, expected.item(), "sum")
    for layer, before, after in zip(fc, params, moved, strict=True):
        assert_close((before[0] - np.asarray(after[0])) / rate, layer.weight.grad.numpy().T, "sum")
        assert_close((before[1] - np.asarray(after[1])) / rate, layer.bias.grad.numpy(), "sum")


@needs_jax
@pytest.mark.parametrize("k", range(1, 12))
def test_jax_finds_the_kth_largest_score(draw, k):
    c = draw.integers(-3, 3, (5, 11)).astype("float32")  # many ties
    c[0, :3] = np.inf, -np.inf, -0.0
    np.testing.assert_array_equal(cpu_workers.jax_kth_largest(c, k),
                                  np.sort(c, axis=1)[:, 11 - k, None])


def test_masks_that_break_the_published_rule_are_refused():
    c = np.float32([[3, 1, 2, 2], [1, 2, 3, 4]])
    mask = np.array([[True, False, True, True], [False, False, True, True]])
    cpu_workers.check_masks([(c, mask)], 2)
    mask[0, 3] = False  # a tie of the k-th is kept too
    with pytest.raises(UserError, match="not those of the published rule, c >= the 2-th largest c"):
        cpu_workers.check_masks([(c, mask)], 2)


@needs_jax
def test_the_masks_of_the_timed_model_are_checked(monkeypatch):
    monkeypatch.setattr(cpu_workers, "INPUTS", 12)
    monkeypatch.setattr(cpu_workers, "P_K", (0.1, 0.9))
    checked = []
    monkeypatch.setattr(cpu_workers, "check_masks", lambda routed, k: checked.append(
        (k, [mask.shape for _, mask in routed])))
    times = cpu_workers.jax(10, 2, 0.0)
    assert list(times) == ["standard", "comet 0.1", "comet 0.9"]
    assert all(time > 0 for time in times.values())
    assert checked == [(k, [(2, 10)] * 3) for k in (1, 9)]


# --- the compared models ------------------------------------------------------------------------


@pytest.mark.parametrize("name", model_workers.MODELS)
def test_pytorch_takes_our_step_of_each_model(name, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model, N, B, rate = model_workers.MODELS[name], 40, 12, 10.0
    monkeypatch.setattr(cpu_workers, "INPUTS", 12)
    for workers in cpu_workers, model_workers:  # so that an update is not lost in rounding
        monkeypatch.setattr(workers, "LR", rate)
    layers = iter((1, 2, 3))

    def dropped(h, p):
        factor = dropout_factor(h.detach().numpy(), p, key(0, "dropout", next(layers)), 0)
        return h * torch.tensor(factor)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropped)
    learner, ours = model_workers.our_model_step(model, N, B)
    before = tree_map(np.copy, learner.params)
    params, theirs = model_workers.torch_step(model, N, B)
    loss, expected = ours(), theirs()
    if name == "l1":  # their loss has the penalty
        expected -= PENALTY * sum(abs(p).sum() for p in leaves(before) if p.ndim > 1)
    assert_close(loss, expected, "sum")
    for old, new, of_torch in zip(*map(leaves, (before, learner.params, params)), strict=True):
        moved = [(old - p) / rate for p in (new, of_torch.detach().numpy())]
        assert_close(*moved, "sum")


@pytest.fixture
def tiny(monkeypatch):
    """Let the benchmark of the models be one of a small network, a few steps each."""
    monkeypatch.setattr(models, "WIDTHS", {"smoke": (10,)})
    monkeypatch.setattr(models, "BATCHES", {"smoke": (4,)})
    monkeypatch.setattr(bench, "SECONDS", {"smoke": 0.0})


@pytest.mark.slow
def test_a_run_of_the_models(tiny, tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert cli.main(["bench", "--models", "--preset", "smoke", "--repeats", "1", "--threads", "1",
                     "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^kind of processor: (unknown|family .*, with(out)? AVX-512)$", printed, re.M)
    times = json.loads((tmp_path / "bench.json").read_text())["times"]
    assert list(times) == [f"{work}_models 10 4 {name}" for work in ("our", "pytorch")
                           for name in model_workers.MODELS]
    for name in model_workers.MODELS:
        value = times[f"our_models 10 4 {name}"][0] / times[f"pytorch_models 10 4 {name}"][0]
        [[*_, ratio, _]] = words_of(printed, f"10, 4, {name} ")
        assert ratio == f"{value:.2f}" + "*" * (value > 0.7)


def test_the_models_without_pytorch(tiny, versions, monkeypatch, tmp_path, capsys):
    del versions["torch"]
    monkeypatch.setattr(bench, "in_a_process", lambda module, environment, limit, work, *sizes: (
        dict.fromkeys(model_workers.MODELS, 1.0) if work == "our_models" else pytest.fail(work)))
    assert bench.run("numpy", "smoke", tmp_path, 2, 1, True, 7, networks="models")
    printed = capsys.readouterr().out
    assert words_of(printed, "10, 4, comet ") == [["1", "not", "installed", "-"]]
    assert "left out: pytorch_models (not installed: python -m pip install torch)" in printed
    assert "jax" not in printed


@pytest.mark.parametrize("what", ["models", "inference"])
def test_what_is_measured_on_the_cpu_alone(what, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "get_backend", lambda name: SimpleNamespace(waits=True))
    with pytest.raises(UserError, match=f"--{what} measures on the CPU: leave out --backend or"):
        bench.run("cupy", "smoke", tmp_path / "bench", 1, None, True, 7, networks=what)
    assert not (tmp_path / "bench").exists()


# --- the vision models --------------------------------------------------------------------------

TINY = [name for name in vision_workers.MODELS if name.endswith("tiny")]


@pytest.fixture
def without_dropout(monkeypatch):
    """Let the tiny ViT drop nothing."""
    config = replace(vision_workers.MODELS["vit-tiny"], dropout=0.0, hidden_dropout=0.0)
    monkeypatch.setitem(vision_workers.MODELS, "vit-tiny", config)


@pytest.mark.parametrize("kind", vision_workers.GATES)
@pytest.mark.parametrize("model", TINY)
def test_pytorch_takes_our_step_of_each_vision_model(without_dropout, model, kind):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    run, B = vision_workers.run_of(model, kind, "float64"), 5
    learner, ours = cpu_workers.our_step(run, B, False)
    params, adam, theirs = vision_workers.torch_step(run, B)

    def of_torch(value):
        return flatten(tree_map(lambda p: value(p).detach().numpy(), params))[0]

    before = learner.flat.copy()
    np.testing.assert_array_equal(before, of_torch(lambda p: p))
    assert_close(ours(), theirs().item(), "torch")
    assert_close(learner.state.first, of_torch(lambda p: adam.state[p]["exp_avg"]), "torch")
    assert_close(learner.flat, of_torch(lambda p: p), "training")  # a step moves most by 1e-4
    assert (learner.flat != before).mean() > 0.9  # neurons that lose everywhere stay


def test_dropout_is_at_the_same_places(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    run, places = vision_workers.run_of("vit-tiny", "comet"), {"ours": [], "theirs": []}

    def factor(x, rate, key, step):
        places["ours"].append((x.shape, rate))
        return dropout_factor(x, rate, key, step)

    def dropped(x, p):
        places["theirs"].append((tuple(x.shape), p))
        return x

    monkeypatch.setattr(dropout, "dropout_factor", factor)
    monkeypatch.setattr(torch.nn.functional, "dropout", dropped)
    cpu_workers.our_step(run, 3, False)[1]()
    vision_workers.torch_step(run, 3)[2]()
    assert places["ours"] == places["theirs"] and len(places["ours"]) == 1 + 3 * 2


@pytest.mark.parametrize("kind", vision_workers.GATES)
@pytest.mark.parametrize("model", vision_workers.MODELS)
def test_the_bare_products_are_those_of_our_step(model, kind):
    config = vision_workers.run_of(model, kind).model
    found = sum(one.pairs * one.rows * one.N_in * one.N_out * one.products
                for one in vision_workers.maps(config, 3))
    assert found == 3 * sum(module_of(config).multiply_adds(config))


def test_each_bare_product_is_taken_once_and_in_place(monkeypatch):
    from scipy.linalg import blas

    sgemm, matmul, taken = blas.sgemm, np.matmul, []

    def of_scipy(alpha, a, b, c, **keywords):
        assert np.shares_memory(sgemm(alpha, a, b, c=c, **keywords), c)
        taken.append((1, *c.T.shape, a.size // len(c)))

    def of_numpy(a, b, out):
        matmul(a, b, out=out)
        taken.append((*out.shape, a.shape[-1]))

    monkeypatch.setattr(blas, "sgemm", of_scipy)
    monkeypatch.setattr(np, "matmul", of_numpy)
    wanted = [steps.Map(1, 5, 3, 4, 3), steps.Map(2, 5, 4, 7, 3),
              steps.Map(1, 5, 4, 8, 2), steps.Map(1, 5, 4, 6, 1)]
    steps.bare_products(wanted)()
    assert taken == [(1, 5, 4, 3), (2, 5, 7, 4), (1, 5, 8, 4), (1, 5, 6, 4),  # y
                     (1, 8, 4, 5),  # dW, and below dx before it
                     (2, 5, 4, 7), (2, 7, 4, 5), (1, 5, 3, 4), (1, 4, 3, 5)]


def test_parts_are_counted_once_and_the_kernels_stay_as_they_were(monkeypatch, draw):
    kernels = get_backend("numpy").kernels
    before, ticks = dict(kernels), itertools.count()
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(steps, "STEPS", 1)
    scores = draw.standard_normal((2, 5))
    parts = steps.parts_of(lambda: cap(scores, 2))  # which calls kwta_mask
    assert parts == {"cap": 2000, "kwta_mask": 1000, "elsewhere": 2000}  # 5 in all
    assert kernels == before


def test_each_operation_of_our_step_is_a_part():
    step = cpu_workers.our_step(vision_workers.run_of("vit-tiny", "comet"), 3, False)[1]
    assert {"attention_forward", "norm_backward", "hidden_forward", "kwta_mask", "dropout_factor",
            "adam", "elsewhere"} <= set(steps.parts_of(step))


def vision_times(work, B):
    """Return what a made-up worker returns: ours 1, or 2 of the standard ViT, the products 1."""
    side = next(name for name in ("ours", "pytorch", "products", "parts", "compiled")
                if name in work)
    if "memory" in work:
        return {"peak MiB": 100.0 if side == "ours" else 50.0, "growth MiB": 1.0}
    if side == "compiled":
        return {"step": 4.0}
    if side == "parts":
        return {f"{kind} {name}": ms for kind in vision_workers.GATES
                for name, ms in (("adam", 0.004), ("norm_forward", 0.3), ("elsewhere", 0.7))}
    return {"comet": 2.0 if side == "pytorch" else 1.0, "standard": 2.0 if side == "ours" else 1.0}


def test_a_whole_run_of_the_vision_models(versions, monkeypatch, tmp_path, capsys):
    def worker(module, environment, limit, work, model, B, seconds):
        assert (module, B, environment["OMP_NUM_THREADS"]) == ("vision_workers", 4, "3")
        if (work, model) == ("compiled_standard", "mixer-tiny"):
            raise WorkerFailed("failed: Unsupported: a layer")
        return vision_times(work, B)

    monkeypatch.setattr(bench, "in_a_process", worker)
    assert cli.main(["bench", "--vision", "--preset", "smoke", "--repeats", "2", "--threads", "3",
                     "--out", str(tmp_path)]) == 1  # one was not compiled
    printed = capsys.readouterr().out
    half, one, quarter, two = (f"{text} ({text[:4]}-{text[:4]})".split()
                               for text in ("0.50", "1.00", "0.25", "2.00*"))
    assert words_of(printed, "vit-tiny, comet ") == [
        ["1", "2", "4", "1"], [*half, *quarter, *one],
        ["100", "50", "1", "1", *two, *one]]
    assert words_of(printed, "mixer-tiny, standard ") == [
        ["2", "1", "failed", "1"], [*two, "-", *two], ["100", "50", "1", "1", *two, *one]]
    assert [line for line in printed.splitlines() if "by operation" in line] == [
        f"{model} 4, standard, ms by operation: elsewhere 0.7, norm_forward 0.3" for model in TINY]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert "Adam" in result["settings"]["pytorch settings"]
    assert len(result["times"]["ours vit-tiny 4 comet"]) == 2
    assert len(result["times"]["compiled_comet vit-tiny 4 step"]) == 1


def test_the_vision_models_without_pytorch(versions, monkeypatch, tmp_path, capsys):
    del versions["torch"]
    monkeypatch.setattr(bench, "in_a_process", lambda module, environment, limit, work, model, B,
                        seconds: pytest.fail(work) if "torch" in work else vision_times(work, B))
    assert bench.run("numpy", "smoke", tmp_path, 1, 1, True, 7, "vision")
    printed = capsys.readouterr().out
    assert words_of(printed, "vit-tiny, comet ")[0] == ["1", "not", "installed", "-", "1"]
    assert "left out: pytorch (not installed: python -m pip install torch)" in printed


@pytest.mark.long
def test_a_run_of_a_vision_model(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(vision, "MODELS", {"smoke": ("mixer-tiny",)})
    monkeypatch.setattr(bench, "SECONDS", {"smoke": 0.0})
    assert cli.main(["bench", "--vision", "--preset", "smoke", "--repeats", "1", "--threads", "1",
                     "--no-compile", "--out", str(tmp_path)]) == 0
    [*_, memory] = words_of(capsys.readouterr().out, "mixer-tiny, comet ")
    assert all(float(number) > 0 for number in memory[:4])


# --- GPT-2 --------------------------------------------------------------------------------------


def of_transformers(network, value):
    """Return the values of the parameters of transformers' network, a tree as ours is."""
    def linear(one):
        return Linear(value(one.weight).T, value(one.bias))

    def norm(one):
        return Norm(value(one.weight), value(one.bias))

    def block(one):
        mlp = getattr(one.mlp, "mlp", one.mlp)
        attention = SelfAttention(linear(one.attn.c_attn), linear(one.attn.c_proj))
        return Block(norm(one.ln_1), attention, norm(one.ln_2),
                     (linear(mlp.c_fc), linear(mlp.c_proj)))

    body = network.transformer
    return GPT2Params(TokenEmbedding(value(body.wte.weight), value(body.wpe.weight)),
                      tuple(block(one) for one in body.h), norm(body.ln_f))


@pytest.mark.parametrize("kind", language_workers.GATES)
def test_transformers_takes_our_step(kind):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    run, B = language_workers.run_of("gpt2-tiny", kind, "float64"), 3
    learner, ours = cpu_workers.our_step(run, B, False)
    learner.flat += 0.01 * np.random.default_rng(0).standard_normal(learner.flat.size)
    network, adam, theirs = language_workers.torch_step(run, B)
    network.double()
    network.loss_function = lambda logits, labels, shift_labels, **others: (  # theirs is float32
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten()))
    with torch.no_grad():
        tree_map(lambda p, ours: p.copy_(torch.tensor(ours)),
                 of_transformers(network, lambda p: p.data), learner.params)
        for block, V in zip(network.transformer.h, learner.fixed, strict=True):
            if kind == "comet":
                block.mlp.V[:] = torch.tensor(V[0])

    def of_torch(value):
        return flatten(of_transformers(network, lambda p: value(p).detach().numpy()))[0]

    before = learner.flat.copy()
    np.testing.assert_array_equal(before, of_torch(lambda p: p))
    assert_close(ours(), theirs().item(), "torch")
    assert_close(learner.state.first, of_torch(lambda p: adam.state[p]["exp_avg"]), "torch")
    assert_close(learner.flat, of_torch(lambda p: p), "training")
    assert (learner.flat != before).mean() > 0.15  # tokens and positions that never come decay


@pytest.mark.parametrize("kind", language_workers.GATES)
@pytest.mark.parametrize("model", language_workers.MODELS)
def test_the_bare_products_are_those_of_our_step_of_gpt2(model, kind):
    config = language_workers.run_of(model, kind).model
    found = sum(one.pairs * one.rows * one.N_in * one.N_out * one.products
                for one in language_workers.maps(config, 3))
    assert found == 3 * sum(module_of(config).multiply_adds(config))


def test_a_whole_run_of_gpt2(versions, saved, monkeypatch, tmp_path, capsys):
    versions["transformers"] = "5"

    def worker(module, environment, limit, work, model, B, seconds):
        assert (module, model) == ("language_workers", "gpt2-tiny")
        return vision_times(work, B) if B == 2 else {
            "comet": 4.0, "standard": 1.0 if work == "generation_pytorch" else 2.0}

    monkeypatch.setattr(bench, "in_a_process", worker)
    assert cli.main(["bench", "--language", "--preset", "smoke", "--repeats", "2", "--threads", "3",
                     "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    half, one, two = (f"{text} ({text[:4]}-{text[:4]})".split()
                      for text in ("0.50", "1.00", "2.00"))
    assert words_of(printed, "training gpt2-tiny, comet ") == [  # 2 texts of 12 tokens in 1 ms
        ["2.4e+04", "1.2e+04", "6000", "2.4e+04", *two]]
    assert words_of(printed, "generation gpt2-tiny, comet ") == [["3000", "3000", "-", "-", *one]]
    assert words_of(printed, "generation gpt2-tiny, standard ") == [
        ["6000", "1.2e+04", "-", "-", "0.50*", half[1]]]
    assert words_of(printed, "gpt2-tiny, comet ")[:2] == [
        ["1", "2", "4", "1"], [*half, "0.25", "(0.25-0.25)", *one]]
    settings = json.loads((tmp_path / "bench.json").read_text())["settings"]
    assert settings["torch"] == "2.9" and settings["transformers"] == "5"
    [figure] = saved
    assert [axes.get_title() for axes in figure.axes] == ["training gpt2-tiny",
                                                          "generation gpt2-tiny"]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [3000, 6000, 3000, 12000]


def test_gpt2_without_transformers(versions, saved, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "in_a_process", lambda module, environment, limit, work, model, B,
                        seconds: pytest.fail(work) if "torch" in work else vision_times(work, B))
    assert bench.run("numpy", "smoke", tmp_path, 1, 1, True, 7, "language")
    assert ("left out: pytorch (not installed: python -m pip install transformers)"
            in capsys.readouterr().out)


@pytest.mark.long
def test_a_run_of_gpt2(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(bench, "SECONDS", {"smoke": 0.0})
    assert cli.main(["bench", "--language", "--preset", "smoke", "--repeats", "1", "--threads", "1",
                     "--no-compile", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for what in "training gpt2-tiny, comet ", "generation gpt2-tiny, standard ":
        [[ours, theirs, *_]] = words_of(printed, what)
        assert float(ours) > 0 and float(theirs) > 0


# --- inference ----------------------------------------------------------------------------------


def test_pytorch_infers_what_we_do_and_is_refused_where_not(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(cpu_workers, "INPUTS", 12)
    params, V = mlp.init(inference_workers.config_of(40, 0.5))
    others, back = tree_map(lambda p: 1.001 * p, params), tuple(-V_l for V_l in V)
    [x, *_] = inference_workers.batches(3)
    network, check = inference_workers.torch_network(params, V), inference_workers.check_pytorch
    with torch.inference_mode():
        for p_k in (None, 0.1, 0.5):
            check(network, x, params, V, p_k)
            with pytest.raises(UserError, match=r"the output of PyTorch is not .* apart"):
                check(network, x, others, V, p_k)
        with pytest.raises(UserError, match=r"PyTorch's masks are not ours: \d+\.\d+% of"):
            check(network, x, params, back, p_k)


def test_a_wrong_result_of_ours_is_not_timed(monkeypatch):
    monkeypatch.setattr(cpu_workers, "INPUTS", 12)
    infer = mlp.infer
    times = inference_workers.ours(10, 2, 0.0)
    assert set(times) == {"standard", *(f"{name} {p_k}" for p_k in (0.1, 0.5) for name in (
        "dense", "block-diagonal", "forward", "given"))}
    monkeypatch.setattr(mlp, "infer", lambda *arguments: 1.001 * infer(*arguments))
    with pytest.raises(UserError, match=r"the output of mlp\.infer is not the expected one"):
        inference_workers.ours(10, 2, 0.0)


@pytest.mark.parametrize("without", [False, True])
def test_a_whole_run_of_inference(without, versions, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(inference.CELLS, "smoke", [(3000, 2)])
    if without:
        del versions["torch"]

    def worker(module, environment, limit, work, N, B, seconds):
        assert (module, N, B, environment["OMP_NUM_THREADS"]) == ("inference_workers", 3000, 2, "3")
        assert not (without and work == "pytorch")
        names = {"ours": ("dense", "block-diagonal", "forward", "given"), "pytorch": ("comet",)}
        cost = {"dense": 5.0, "block-diagonal": 2.0, "forward": 8.0, "given": 1.0, "comet": 10.0}
        return {"standard": 4.0} | {f"{name} {p_k}": cost[name] for name in names[work]
                                    for p_k in (0.1, 0.5)}

    monkeypatch.setattr(bench, "in_a_process", worker)
    assert cli.main(["bench", "--inference", "--preset", "smoke", "--repeats", "2", "--threads",
                     "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    times, row = words_of(printed, "3000, 2, 0.1 ")
    assert times[-5:] == ["4", "8", "5", "2", "1"]
    if without:
        assert times[:4] == ["not", "installed"] * 2 and row == ["-"] * 5
        assert "left out: pytorch (not installed: python -m pip install torch)" in printed
    else:
        assert times[:2] == ["4", "10"]
        assert row[::2] == ["1.25", "0.50*", "0.25", "0.50", "0.80"]
        assert words_of(printed, "3000, 2, 0.5 ")[1][2] == "0.50"  # there is no goal
    result = json.loads((tmp_path / "bench.json").read_text())
    assert "inference_mode" in result["settings"]["pytorch settings"]
    assert result["times"]["ours 3000 2 block-diagonal 0.1"] == [2.0, 2.0]


@pytest.mark.slow
def test_a_run_of_inference(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setitem(inference.CELLS, "smoke", [(100, 2)])
    monkeypatch.setattr(bench, "SECONDS", {"smoke": 0.0})
    assert cli.main(["bench", "--inference", "--preset", "smoke", "--repeats", "1", "--threads",
                     "1", "--out", str(tmp_path)]) == 0
    times, row = words_of(capsys.readouterr().out, "100, 2, 0.5 ")
    assert all(float(number) > 0 for number in (*times, *row[::2]))


# --- the run as a whole -------------------------------------------------------------------------


def made_up(module, environment, limit, work, N, B, seconds):
    """Stand for a worker: ours takes 1 ms, the products 0.5, PyTorch 2, JAX 4; it hangs alone."""
    assert module == "cpu_workers" and limit == 7
    assert environment["OMP_NUM_THREADS"] == environment["PJRT_NPROC"] == "3"
    assert Path(environment["TORCHINDUCTOR_CACHE_DIR"]).is_dir()
    if work == "kwta_jax":
        raise WorkerFailed("timed out: killed after 7 s")
    time = {"ours": 1.0, "products": 0.5, "pytorch": 2.0, "jax": 4.0}[
        next(name for name in ("ours", "products", "pytorch", "jax") if name in work)]
    return dict.fromkeys({"memory": ["peak MiB"], "kwta": ["kwta"]}.get(
        work.partition("_")[0], ["comet", "standard", *(f"{name} {p_k}" for p_k in (0.1, 0.5, 0.9)
                                                        for name in ("comet", "cached"))]), time)


@pytest.fixture
def versions(monkeypatch):
    """Return the versions of the installed packages, made up; JAX's may be taken out."""
    installed = {"torch": "2.9", "jax": "0.9", "numpy": "2", "scipy": "1"}

    def version(package):
        if package not in installed:
            raise bench.metadata.PackageNotFoundError
        return installed[package]

    monkeypatch.setattr(bench, "in_a_process", made_up)
    monkeypatch.setattr(bench.metadata, "version", version)
    return installed


def words_of(printed, first):
    """Return the words of all lines that begin so, after it."""
    return [line.removeprefix(first).split() for line in printed.splitlines()
            if line.startswith(first)]


def test_a_whole_run(versions, saved, tmp_path, capsys):
    out = tmp_path / "bench"
    assert cli.main(["bench", "--preset", "smoke", "--repeats", "2", "--threads", "3", "--limit",
                     "7", "--out", str(out)]) == 1  # a worker hung
    printed = capsys.readouterr().out
    one, two, half, quarter = (f"{text} ({text[:4]}-{text[:4]})".split()
                               for text in ("1.00", "2.00", "0.50", "0.25"))
    assert words_of(printed, "100, 32, 0.5") == [
        ["1", "1", "1", "2", "2", "4", "2", "4"],
        [*half, "0.50*", "(0.50-0.50)", *half, *quarter * 3], [*one, *two, *two]]
    assert ("k = 1500, ms: ours 1; PyTorch 2, ratio 0.50* (0.50-0.50); jax.jit timed out, ratio -"
            in printed)
    assert "left out: kwta_jax 3000 4096 (timed out: killed after 7 s)" in printed
    result = json.loads((out / "bench.json").read_text())
    assert result["settings"]["jax"] == "0.9" and result["settings"]["threads"] == 3
    assert result["times"]["jax 100 32 comet 0.9"] == [4.0, 4.0]
    assert result["left out"] == {"kwta_jax 3000 4096": "timed out: killed after 7 s"}
    [figure] = saved
    assert [axes.get_ylabel() for axes in figure.axes] == ["our time / eager PyTorch's",
                                                           "our time / jax.jit's"]
    assert [line.get_ydata()[0] for line in figure.axes[1].lines
            if line.get_label() == "COMET"] == [0.25]


@pytest.mark.parametrize("missing", [["jax"], ["torch", "jax"]])
def test_what_is_not_installed_is_left_out_with_a_reason(versions, saved, tmp_path, capsys,
                                                         missing):
    for package in missing:
        del versions[package]
    assert bench.run("numpy", "smoke", tmp_path, 1, 3, False, 7)
    printed = capsys.readouterr().out
    assert "left out: jax (not installed: python -m pip install jax)" in printed
    times, ratios, _ = words_of(printed, "100, 32, 0.1")
    assert times[-2:] == ["not", "installed"] and ratios[-3:] == ["-"] * 3
    assert not any("jax" in name for name in
                   json.loads((tmp_path / "bench.json").read_text())["times"])
    if len(missing) == 2:
        assert saved == [] and "no figure: there is nothing to compare with" in printed
    else:
        assert len(saved[0].axes) == 1


def test_a_run_that_is_stopped_keeps_what_was_measured(versions, tmp_path, monkeypatch, capsys):
    def stopped(*arguments):
        if arguments[3] == "pytorch":
            raise KeyboardInterrupt
        return made_up(*arguments)

    monkeypatch.setattr(bench, "in_a_process", stopped)
    assert cli.main(["bench", "--preset", "smoke", "--threads", "3", "--limit", "7", "--out",
                     str(tmp_path)]) == 130
    assert f"{tmp_path / 'bench.json'} has what was measured" in capsys.readouterr().err
    assert json.loads((tmp_path / "bench.json").read_text())["times"]["ours 100 32 comet 0.5"]


@pytest.mark.parametrize(("flags", "said"), [
    (["--limit", "0"], "--limit takes seconds, more than 0, got 0"),
    (["--limit", "nan"], "--limit takes seconds, more than 0, got nan"),
    (["--threads", "0"], "--threads must be at least 1, got 0"),
    (["--repeats", "0"], "--repeats must be at least 1, got 0")])
def test_bad_flags_are_one_sentence(flags, said, tmp_path, capsys):
    assert cli.main(["bench", "--out", str(tmp_path / "bench"), *flags]) == 2
    assert capsys.readouterr().err == f"comet-np: {said}\n"
    assert not (tmp_path / "bench").exists()
