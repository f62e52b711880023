"""Ratios of times with their range and goal, in tables and in a figure."""

import math
import statistics
from pathlib import Path
from typing import Any

from ..experiments import figures

NO_GOAL = math.inf
LOOKS = {"comet": figures.LOOKS["comet"], "cached": ("#8a3f9e", "COMET, masks kept"),
         "standard": figures.LOOKS["standard"]}


class Ratio:
    """A ratio of medians with the range of the pairwise ratios.

    Its goal is what it may be at most; `least`, what it must be at least.
    """

    def __init__(self, ours: list[float], theirs: list[float], goal: float = NO_GOAL,
                 least: float = 0.0) -> None:
        pairs = [a / b for a, b in zip(ours, theirs, strict=False)]
        self.value = statistics.median(ours) / statistics.median(theirs)
        self.low, self.high, self.goal = min(pairs), max(pairs), goal
        self.least = least

    def __str__(self) -> str:
        missed = " " if self.least <= self.value <= self.goal else "*"
        return f"{self.value:.2f}{missed} ({self.low:.2f}-{self.high:.2f})"


Row = dict[str, Ratio]
Point = tuple[int, int, float, Row]  # N, batch, p_k, and the ratios as "comet/PyTorch"


def print_settings(settings: dict[str, Any]) -> None:
    """Print what the figures below hold for."""
    print("\n".join(f"{name}: {value}" for name, value in settings.items()), flush=True)


def shown(row: Row, *names: str) -> list[str]:
    """Return ratios as text, a dash for each that is not there."""
    return [str(row[name]) if name in row else "-" for name in names]


def draw(points: list[Point], peers: dict[str, str], title: str, file: Path) -> str:
    """Draw our time over each peer's, and return a line about it.

    A row of panels a peer that was measured, a panel a batch size, goals as dotted lines. `peers`
    are long names by those of the ratios.
    """
    rows = [peer for peer in peers
            if any(name.endswith(f"/{peer}") for *_, row in points for name in row)]
    if not rows:
        return "no figure: there is nothing to compare with"
    plt = figures.pyplot()
    batches = sorted({B for _, B, *_ in points})
    figure, panels = plt.subplots(
        len(rows), len(batches), figsize=(4.2 * len(batches), 0.6 + 2.8 * len(rows)),
        sharex=True, sharey="row", squeeze=False)
    for peer, line in zip(rows, panels, strict=True):
        for B, axes in zip(batches, line, strict=True):
            _draw_panel(axes, peer, [point for point in points if point[1] == B])
        line[0].set_ylabel(f"our time / {peers[peer]}'s")
        line[0].set_ylim(bottom=0)  # once all panels of the row are drawn, as it ends the scaling
    for B, top, bottom in zip(batches, panels[0], panels[-1], strict=True):
        top.set_title(f"batch {B}")
        bottom.set_xlabel("N (at each: $p_k$ = 0.1, 0.5, 0.9)")
    panels[0][0].legend()
    figure.suptitle(title, fontsize=8)
    return f"figure: {figures.save(figure, file)}"


def _draw_panel(axes: Any, peer: str, points: list[Point]) -> None:
    for model, (color, label) in LOOKS.items():
        here = [(N * {0.1: 0.94, 0.5: 1.0, 0.9: 1.06}[p_k], row[f"{model}/{peer}"])
                for N, _, p_k, row in points if f"{model}/{peer}" in row]
        for x, ratio in here:
            axes.plot([x, x], [ratio.low, ratio.high], color=color, linewidth=1)
            if math.isfinite(ratio.goal):
                axes.axhline(ratio.goal, color=color, linewidth=0.8, linestyle=":")
        axes.plot([x for x, _ in here], [ratio.value for _, ratio in here], "o", color=color,
                  markersize=4, label=label)
    axes.axhline(1, color="grey", linewidth=0.6)
    axes.set_xscale("log")
    widths = sorted({N for N, *_ in points})
    axes.set_xticks(widths, labels=map(str, widths))
    axes.minorticks_off()
