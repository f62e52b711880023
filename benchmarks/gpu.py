"""The GPU benchmark: our kernels and steps against PyTorch and a copy's bandwidth on one GPU."""

import json
import platform
import time
from pathlib import Path
from typing import Any

from ..backends import get_backend
from ..errors import UserError
from ..experiments.experiment import columns
from .gpu_workers import PRESETS, Sizes, Step, steps
from .ratios import (
    Ratio,
    Times,
    draw,
    in_a_process,
    milliseconds,
    print_settings,
    show_progress,
)

KERNEL_N = 3000
# Our time over the other quantity's: what we set out to reach.
GOALS: dict[str, Any] = {"copy": 1 / 0.6, "topk": 1 / 8, "cached/standard": 1.10,
                         "comet": {32: 0.35, 128: 0.35, 4096: 0.8}}
# Seconds since the start after which no further repeat, and no further compilation, begins: the
# whole is meant to take less than 8 minutes.
REPEATS_END, COMPILE_END = 300.0, 410.0
NO_GOAL = float("inf")

Row = dict[str, Ratio]


def run(preset: str, out: Path, repeats: int, compiled: bool) -> None:
    """Measure, print the tables, and write ``bench.json`` and ``bench.png`` into `out`."""
    device = get_backend("cupy").describe()
    settings = device | versions_of_pytorch(device["cuda"]) | {
        "python": platform.python_version(),
        "our settings": "float32; graph: one CUDA graph a step, which gathers its mini-batch; "
                        "tf32: the same with TF32 for all products but the routing's; ordinary: "
                        "no graph; cached: a graph, masks kept",
        "pytorch settings": "float32, the mini-batch at hand, SGD and AdamW with fused=True; "
                            "eager: TF32 off; tf32: on; compiled: TF32 off, torch.compile("
                            'mode="reduce-overhead", dynamic=False)',
        "repeats": f"up to {repeats}, as many as fit into {REPEATS_END:.0f} s", "preset": preset}
    print_settings(settings)
    sizes = PRESETS[preset]
    times, left_out = measure(preset, sizes, repeats, compiled)
    (out / "bench.json").write_text(json.dumps(
        {"settings": settings, "times": times, "left out": left_out}, indent=1) + "\n")
    print(report(times, left_out, sizes))
    points = [(N, step.B, step.p_k, row) for N, step, row in ratios(times, sizes)
              if step.optimizer == "sgd" and step.p_k is not None]
    title = ("training step 3072-N-N-N-10, softplus, SGD, one CUDA graph\n"
             f"{device['device']}, PyTorch {settings['torch']}")
    print(f"figure: {draw(points, title, out / 'bench.png')}")


def versions_of_pytorch(cuda: int) -> dict[str, str]:
    """Return the versions of PyTorch and of its CUDA.

    Raises
    ------
    UserError
        If this PyTorch cannot use the GPU; `cuda` is the version that the advice is for.
    """
    import torch

    if not torch.cuda.is_available():
        wheels = "cu130" if cuda >= 13000 else "cu126"
        raise UserError(f"PyTorch {torch.__version__} cannot use the GPU, with which the benchmark "
                        "compares: python -m pip install --force-reinstall torch --index-url "
                        f"https://download.pytorch.org/whl/{wheels}")
    return {"torch": torch.__version__, "torch's cuda": str(torch.version.cuda)}


def measure(preset: str, sizes: Sizes, repeats: int,
            compiled: bool) -> tuple[Times, dict[str, str]]:
    """Return the times by "work N name", one a process, and why others are left out."""
    times: Times = {}
    left_out: dict[str, str] = {}
    started = time.monotonic()

    def elapsed() -> float:
        return time.monotonic() - started

    def add(work: str, N: int) -> None:
        show_progress(f"{elapsed():.0f} s: {work} N = {N}")
        environment = {"COMET_NP_GRAPHS": "1"}  # where the user has turned them off too
        for name, value in in_a_process("gpu_workers", environment, work, N, preset).items():
            if isinstance(value, str):
                left_out[f"{work} {N} {name}"] = value
            else:
                times.setdefault(f"{work} {N} {name}", []).append(value)

    plan = [(work, N) for N in sizes.rows_of for work in ("kwta_ours", "kwta_pytorch")]
    plan += [(work, N) for N in sizes.widths for work in ("ours", "pytorch")]
    plan.append(("kernels", KERNEL_N))
    for repeat in range(repeats):
        if repeat and elapsed() * (repeat + 1) / repeat > REPEATS_END:
            left_out[f"repeats from {repeat + 1} on"] = "no time"
            break
        for work, N in plan:
            add(work, N)
    for N in sizes.widths if compiled else ():
        if elapsed() > COMPILE_END:
            left_out[f"pytorch_compiled {N}"] = "no time"
        else:
            add("pytorch_compiled", N)
    show_progress("")
    return times, left_out


def ratios_of(times: Times, pairs: dict[str, tuple[str, str, float]]) -> Row:
    """Return the ratio of each (ours, theirs, goal) by name, if both have been measured."""
    return {name: Ratio(times[ours], times[theirs], goal)
            for name, (ours, theirs, goal) in pairs.items() if ours in times and theirs in times}


def ratios(times: Times, sizes: Sizes) -> list[tuple[int, Step, Row]]:
    """Return the ratios of each COMET training step, those that could be measured."""
    rows = []
    for N in sizes.widths:
        for step in steps(N, sizes.batches):
            if step.p_k is None:
                continue
            ours, pytorch, standard = f"ours {N} {step}", f"pytorch {N} {step}", _standard(step)
            rows.append((N, step, ratios_of(times, {
                "comet": (f"{ours} graph", f"{pytorch} eager",
                          GOALS["comet"].get(step.B, NO_GOAL)),
                "cached": (f"{ours} cached", f"{pytorch} eager", NO_GOAL),
                "standard": (f"ours {N} {standard} graph", f"pytorch {N} {standard} eager",
                             NO_GOAL),
                "tf32": (f"{ours} tf32", f"{pytorch} tf32", NO_GOAL),
                "comet/compiled": (f"{ours} graph", f"pytorch_compiled {N} {step} compiled",
                                   NO_GOAL),
                "cached/standard": (f"{ours} cached", f"ours {N} {standard} graph",
                                    GOALS["cached/standard"])})))
    return rows


def _standard(step: Step) -> Step:
    return step._replace(p_k=None)


def report(times: Times, left_out: dict[str, str], sizes: Sizes) -> str:
    """Return the tables: masks alone, training steps, kernels; and what was left out."""
    lines = [
        f"k-winner-take-all alone, k = N / 2, {sizes.numbers:,} scores in rows of N; copy: on the "
        "device, of as many bytes", columns(_masks(times, sizes)), "",
        "training step of 3072-N-N-N-10, softplus: ms, then ratios",
        *map(columns, _steps(times, sizes)), "",
        "kernels over their floor, the time of a copy of the bytes that they must move",
        columns(_kernels(times)), "",
        "ratio of medians (lowest-highest of the repeats); * misses the goal: masks "
        f"{GOALS['copy']:.2f} of the copy (60 % of the bandwidth), {GOALS['topk']:.3f} of topk; "
        "graph/PyTorch 0.35 (batch 32, 128), 0.80 (4096); cached/standard 1.10"]
    lines += [f"left out: {name} ({why})" for name, why in left_out.items()]
    return "\n".join(lines)


def _shown(row: Row, *names: str) -> list[str]:
    return [str(row[name]) if name in row else "-" for name in names]


def _masks(times: Times, sizes: Sizes) -> list[list[str]]:
    rows = [["N", "bool ms", "bits ms", "topk ms", "bool/copy", "bits/copy", "bool/topk",
             "bits/topk", "bool, share of bandwidth", "bits, share of bandwidth"]]
    for N in sizes.rows_of:
        ours, topk = f"kwta_ours {N}", f"kwta_pytorch {N} topk"
        outputs = ("bool", "bits")
        row = ratios_of(times, {
            f"{out}/copy": (f"{ours} {out}", f"{ours} {out} copy", GOALS["copy"])
            for out in outputs} | {
            f"{out}/topk": (f"{ours} {out}", topk, GOALS["topk"]) for out in outputs})
        shares = [f"{1 / row[f'{out}/copy'].value:.0%}" if f"{out}/copy" in row else "-"
                  for out in outputs]
        rows.append([str(N), *(milliseconds(times, key) for key in
                               (f"{ours} bool", f"{ours} bits", topk)),
                     *_shown(row, *rows[0][4:8]), *shares])
    return rows


def _steps(times: Times, sizes: Sizes) -> tuple[list[list[str]], list[list[str]]]:
    names = {"comet": "graph/PyTorch", "tf32": "TF32/PyTorch TF32",
             "comet/compiled": "graph/compiled", "cached": "cached/PyTorch",
             "standard": "standard/PyTorch", "cached/standard": "cached/standard"}
    cell = "N, batch, optimizer, p_k"
    times_rows = [[cell, "graph", "ordinary", "TF32", "cached", "standard", "PyTorch",
                   "PyTorch TF32", "compiled", "PyTorch standard"]]
    ratio_rows = [[cell, *names.values()]]
    for N, step, row in ratios(times, sizes):
        ours, standard = f"ours {N} {step}", _standard(step)
        keys = (f"{ours} graph", f"{ours} ordinary", f"{ours} tf32", f"{ours} cached",
                f"ours {N} {standard} graph",
                f"pytorch {N} {step} eager", f"pytorch {N} {step} tf32",
                f"pytorch_compiled {N} {step} compiled", f"pytorch {N} {standard} eager")
        cell = f"{N}, {step.B}, {step.optimizer}, {step.p_k}"
        times_rows.append([cell, *(milliseconds(times, key) for key in keys)])
        ratio_rows.append([cell, *_shown(row, *names)])
    return times_rows, ratio_rows


def _kernels(times: Times) -> list[list[str]]:
    rows = [["kernel", "ms", "floor ms", "time/floor"]]
    for floor in times:
        name = floor.removesuffix(" copy")
        if floor.startswith("kernels ") and name != floor:
            row = ratios_of(times, {"floor": (name, floor, NO_GOAL)})
            rows.append([name.split(" ", 2)[2], milliseconds(times, name),
                         milliseconds(times, floor), *_shown(row, "floor")])
    return rows
