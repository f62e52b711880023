"""The CPU benchmark: every framework in processes of its own, in turn, medians and ranges.

What it shares with the GPU benchmark is here too.
"""

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ..backends.numpy_backend import processor
from ..backends.numpy_backend import threads as usable_threads
from ..errors import UserError, unknown
from ..experiments import figures
from ..experiments.experiment import columns, make_folder
from .cpu_workers import KWTA_K, KWTA_N, KWTA_ROWS, P_K

WIDTHS = {"smoke": (100,), "full": (100, 500, 1000, 3000)}
BATCHES = {"smoke": (32,), "full": (32, 128)}
SECONDS = {"smoke": 0.05, "full": 0.5}  # a timing, before its median is taken
# Our time over PyTorch's, or over the other quantity named: what we set out to reach.
GOALS: dict[str, Any] = {
    "comet": {32: 0.60, 128: 0.75}, "cached": {32: 0.45, 128: 0.60}, "standard": 1.0,
    "cached/standard": 1.05, "step/products": 1.20, "kwta": 1 / 20, "memory": 1.0}

Times = dict[str, list[float]]  # by "work N B name": one median a process


def run(backend: str, preset: str, out: Path, repeats: int, threads: int | None,
        compiled: bool) -> None:
    """Measure, print the table, and write ``bench.json`` and ``bench.png`` into `out`."""
    if preset not in SECONDS:
        raise unknown("preset", preset, SECONDS)
    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}")
    make_folder(out)
    try:
        torch_version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise UserError('the benchmark compares with PyTorch: pip install "comet-np[crosscheck]"'
                        ) from None
    if backend == "cupy":
        from . import gpu  # which builds on this module

        gpu.run(preset, out, repeats, compiled)
        return
    threads = threads or usable_threads()
    settings = {
        "machine": processor(), "cores": os.cpu_count(), "threads": threads,
        "python": platform.python_version(), "numpy": metadata.version("numpy"),
        "scipy": metadata.version("scipy"), "torch": torch_version,
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", "not set"),
        "pytorch settings": f"eager, float32, torch.set_num_threads({threads}), torch.optim.SGD; "
                            "compiled: torch.compile with its defaults",
        "repeats": repeats, "preset": preset}
    print_settings(settings)
    times = _measure(preset, repeats, threads, compiled)
    (out / "bench.json").write_text(
        json.dumps({"settings": settings, "times": times}, indent=1) + "\n")
    print(report(times))
    points = [(N, B, p_k, row) for N, B in _cells(times) for p_k, row in ratios(times, N, B)]
    title = (f"training step 3072-N-N-N-10, softplus, SGD; {settings['machine']}, "
             f"{threads} threads, PyTorch {torch_version}")
    print(f"figure: {draw(points, title, out / 'bench.png')}")


def print_settings(settings: dict[str, Any]) -> None:
    """Print what the figures below hold for."""
    print("\n".join(f"{name}: {value}" for name, value in settings.items()), flush=True)


def show_progress(text: str) -> None:
    """Replace the progress line on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _measure(preset: str, repeats: int, threads: int, compiled: bool) -> Times:
    seconds = SECONDS[preset]
    largest = max(WIDTHS[preset])
    environment = {name: str(threads) for name in
                   ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    times: Times = {}
    for repeat in range(repeats):
        plan = [(work, N, B) for N in WIDTHS[preset] for B in BATCHES[preset]
                for work in ("ours", "pytorch", "products")]
        plan += [(work, largest, max(BATCHES[preset])) for work in ("memory_ours",
                                                                    "memory_pytorch")]
        plan += [(work, KWTA_N, KWTA_ROWS) for work in ("kwta_ours", "kwta_pytorch")]
        if compiled and repeat == 0:
            plan += [("pytorch_compiled", N, B) for N in WIDTHS[preset] for B in BATCHES[preset]]
        for work, N, B in plan:
            show_progress(f"repeat {repeat + 1} of {repeats}: {work} N = {N} batch {B}")
            for name, value in in_a_process("cpu_workers", environment, work, N, B,
                                            seconds).items():
                times.setdefault(f"{work} {N} {B} {name}", []).append(value)
    show_progress("")
    return times


def in_a_process(module: str, environment: dict[str, str], *arguments: Any) -> dict[str, Any]:
    """Return what a module of this folder prints as JSON in a process of its own."""
    words = [str(argument) for argument in arguments]
    answer = subprocess.run([sys.executable, "-m", f"comet_np.benchmarks.{module}", *words],
                            env=os.environ | environment, capture_output=True, text=True,
                            check=False)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"the benchmark's process {' '.join(words)} failed: "
                        f"{re.sub(r'^[A-Za-z_.]*(Error|Memory): ', '', last)}")
    result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return result


class Ratio:
    """A ratio of medians with the range of the pairwise ratios, and its goal."""

    def __init__(self, ours: list[float], theirs: list[float], goal: float) -> None:
        pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
        self.value = statistics.median(ours) / statistics.median(theirs)
        self.low, self.high, self.goal = min(pairs), max(pairs), goal

    def __str__(self) -> str:
        missed = "*" if self.value > self.goal else " "
        return f"{self.value:.2f}{missed} ({self.low:.2f}-{self.high:.2f})"


def ratios(times: Times, N: int, B: int) -> list[tuple[float, dict[str, Ratio]]]:
    """Return, for each p_k, the ratios of one network and batch size by the names of GOALS."""

    def of(work: str, name: str) -> list[float]:
        return times[f"{work} {N} {B} {name}"]

    rows = []
    for p_k in P_K:
        comet, cached = of("ours", f"comet {p_k}"), of("ours", f"cached {p_k}")
        standard = of("ours", "standard")
        row = {"comet": Ratio(comet, of("pytorch", f"comet {p_k}"), GOALS["comet"][B]),
               "cached": Ratio(cached, of("pytorch", f"comet {p_k}"), GOALS["cached"][B]),
               "standard": Ratio(standard, of("pytorch", "standard"), GOALS["standard"]),
               "cached/standard": Ratio(cached, standard, GOALS["cached/standard"])}
        goal = GOALS["step/products"] if N >= 1000 else float("inf")
        row["step/products"] = Ratio(comet, of("products", "comet"), goal)
        row["cached/products"] = Ratio(cached, of("products", "standard"), goal)
        rows.append((p_k, row))
    return rows


def milliseconds(times: Times, key: str) -> str:
    """Return the median of a time as text, or a dash where it was not measured."""
    return f"{statistics.median(times[key]):.4g}" if key in times else "-"


def _cells(times: Times) -> list[tuple[int, int]]:
    return sorted({(int(N), int(B)) for key in times for work, N, B, *_ in [key.split()]
                   if work == "ours"})


def report(times: Times) -> str:
    """Return the tables: steps, memory, and the k-winner-take-all mask alone."""
    rows: list[tuple[str, ...]] = [
        ("N, batch, p_k", "ours ms", "cached ms", "PyTorch ms", "compiled ms", "ours/PyTorch",
         "cached/PyTorch", "standard/PyTorch", "cached/standard", "ours/products",
         "cached/products")]
    for N, B in _cells(times):
        for p_k, row in ratios(times, N, B):
            keys = (f"ours {N} {B} comet {p_k}", f"ours {N} {B} cached {p_k}",
                    f"pytorch {N} {B} comet {p_k}", f"pytorch_compiled {N} {B} comet {p_k}")
            rows.append((f"{N}, {B}, {p_k}", *(milliseconds(times, key) for key in keys),
                         *map(str, row.values())))
    lines = [columns(rows), "ratio of medians (lowest-highest of the repeats); * misses the goal: "
             "ours 0.60 (batch 32), 0.75 (128); cached 0.45, 0.60; standard 1.0; cached/standard "
             "1.05; products 1.20 from N = 1000"]
    for title, prefix, goal, unit in (
            (f"k-winner-take-all {KWTA_ROWS} x {KWTA_N}, k = {KWTA_K}", "kwta", GOALS["kwta"],
             "ms"), ("peak memory of a training process", "memory", GOALS["memory"], "MiB")):
        ours, theirs = (next(v for key, v in times.items() if key.startswith(f"{prefix}_{who} "))
                        for who in ("ours", "pytorch"))
        ratio = Ratio(ours, theirs, goal)
        lines.append(f"{title}: ours {statistics.median(ours):.1f} {unit}, PyTorch "
                     f"{statistics.median(theirs):.1f} {unit}, ratio {ratio.value:.3f}"
                     f"{' *' if ratio.value > goal else ''}")
    return "\n".join(lines)


def draw(points: list[tuple[int, int, float, dict[str, Ratio]]], title: str, file: Path) -> Path:
    """Draw the ratios of (N, batch, p_k) to PyTorch, a panel a batch size, goals as lines."""
    plt = figures.pyplot()
    batches = sorted({B for _, B, *_ in points})
    figure, panels = plt.subplots(1, len(batches), figsize=(4.2 * len(batches), 3.4),
                                  sharey=True, squeeze=False)
    looks = {"comet": ("#d9622b", "COMET"), "cached": ("#8a3f9e", "COMET, masks kept"),
             "standard": ("#4c6a92", "standard")}
    for axes, batch in zip(panels[0], batches, strict=True):
        for name, (color, label) in looks.items():
            here = [(N * {0.1: 0.94, 0.5: 1.0, 0.9: 1.06}[p_k], row[name])
                    for N, B, p_k, row in points if batch == B and name in row]
            for x, ratio in here:
                axes.plot([x, x], [ratio.low, ratio.high], color=color, linewidth=1)
                if math.isfinite(ratio.goal):
                    axes.axhline(ratio.goal, color=color, linewidth=0.8, linestyle=":")
            axes.plot([x for x, _ in here], [ratio.value for _, ratio in here], "o", color=color,
                      markersize=4, label=label)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("N (at each: $p_k$ = 0.1, 0.5, 0.9)")
    panels[0][0].set_ylabel("our time / eager PyTorch's (dotted: goal)")
    panels[0][0].legend()
    figure.suptitle(title, fontsize=8)
    return figures.save(figure, file)
