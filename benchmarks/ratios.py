"""What both benchmarks share: work in processes of its own, ratios with their range, the figure."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..experiments import figures

Times = dict[str, list[float]]  # by "work N B name": one median a process


def print_settings(settings: dict[str, Any]) -> None:
    """Print what the figures below hold for."""
    print("\n".join(f"{name}: {value}" for name, value in settings.items()), flush=True)


def show_progress(text: str) -> None:
    """Replace the progress line on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


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


def milliseconds(times: Times, key: str) -> str:
    """Return the median of a time as text, or a dash where it was not measured."""
    return f"{statistics.median(times[key]):.4g}" if key in times else "-"


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
