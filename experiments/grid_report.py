"""The figure and the table of a grid, from the files of its finished cells alone."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .. import settings
from ..errors import UserError
from . import datasets, figures
from .experiment import Experiment, columns
from .grid import GridConfig, cell_of, cells, run_cell, short_name
from .tasks import task
from .tasks.base import Metric

Curves = dict[int, np.ndarray]  # by seed, (T,)
# Settings that a figure's title names on their own, or that its axes do.
SAID = ("datasets", "models", "widths", "p_k", "seeds", "train", "optimizer", "lr", "batch",
        "epochs")
CHARACTERS_AN_INCH = 16  # of a title
PALE = 20.0  # a lead below is pale, even if it is the largest: points, or per cent


def metric_of(config: GridConfig, dataset: str) -> Metric:
    """Return the metric by which models are compared on a data set."""
    return task(datasets.sizes_of(dataset, config.target, config.task).task).metric


def curves_of(config: GridConfig, out: Path, dataset: str, width: int, model: str,
              level: float) -> tuple[np.ndarray, Curves, int]:
    """Return epochs (T,), the metric's curve of each finished seed, and the parameter count."""
    key = f"val_{metric_of(config, dataset).key}"
    curves: Curves = {}
    epochs, count = np.zeros(0), 0
    for seed in config.seed_numbers:
        cell = cell_of(config, dataset, width, model, level, seed)
        found = cell.result(out, lambda result: int(result["parameters"]))
        if found is not None:
            count = found
            epochs, curves[seed] = cell.metrics(out, lambda lines: np.array(
                [(line["epoch"], line[key]) for line in lines], np.float64).reshape(
                    max(len(lines), 1), 2).T)
    return epochs, curves, count


def _seeds(config: GridConfig) -> str:
    """Return the seeds in words: "1 seed", "3 seeds", "seeds 4, 7"."""
    if isinstance(config.seeds, int):
        return f"{config.seeds} seed{'s' * (config.seeds != 1)}"
    return f"seeds {', '.join(map(str, config.seeds))}"


def best(curves: Curves, sign: int, seeds: Iterable[int] | None = None) -> np.ndarray:
    """Return the best value of each curve, or of those of some seeds: (seeds,)."""
    return np.array([sign * (sign * curves[seed]).max()
                     for seed in (sorted(curves) if seeds is None else seeds)])


def advantage(standard: Curves, comet: Curves, sign: int) -> float:
    """Return by how much COMET's mean best is better: points of accuracy, or % less error.

    Over the seeds of which both are finished; NaN if there are none.
    """
    seeds = sorted(standard.keys() & comet.keys())
    if not seeds:
        return np.nan
    a, b = best(standard, sign, seeds).mean(), best(comet, sign, seeds).mean()
    return float(100 * (b - a) if sign > 0 else 100 * (a - b) / a)


def draw(config: GridConfig, out: Path, name: str) -> Path:
    """Draw a panel for each data set, width and p_k, and COMET's advantage in one more each."""
    plt = figures.pyplot()
    if all(cell.result(out) is None for cell in cells(config)):
        raise UserError(f"{out} holds no finished cell of {name}: run it first")
    rows = [(dataset, width) for dataset in config.datasets for width in config.widths]
    figure = plt.figure(figsize=(2.6 * (len(config.p_k) + 1), 3.0 * len(rows) + 0.3))
    grid = figure.add_gridspec(len(rows), len(config.p_k) + 1)
    for i, (dataset, width) in enumerate(rows):
        _, label, sign = metric_of(config, dataset)
        for j, level in enumerate(config.p_k):
            axes = figure.add_subplot(grid[i, j])
            for number, model in enumerate(config.models):
                epochs, curves, count = curves_of(config, out, dataset, width, model, level)
                if len(curves):
                    color, model_name = figures.look(model, number)
                    figures.seed_band(axes, epochs, np.array(list(curves.values())), color,
                                      f"{model_name}: {best(curves, sign).mean():.3f} "
                                      f"({count / 1e6:.2g} M)")
            axes.set_title(f"{figures.plain(short_name(dataset))}, N = {width}, $p_k$ = {level:g}")
            if sign < 0:
                axes.set_yscale("log")
            if j == 0:
                axes.set_ylabel(label)
            axes.set_xlabel("epoch", labelpad=1)
            if axes.lines:
                axes.legend(loc="upper left", bbox_to_anchor=(0, -0.24), title="best (parameters)",
                            title_fontsize=7, alignment="left")
    for i, dataset in enumerate(config.datasets):
        height = len(config.widths)
        _draw_advantage(figure.add_subplot(grid[i * height:(i + 1) * height, -1]), config, out,
                        dataset)
    examples = "" if config.train is None else f", {config.train} training examples"
    ours, defaults = settings.values(config), settings.values(GridConfig())
    others = "".join(f", {name.replace('_', ' ')} {value}" for name, value in ours.items()
                     if name not in SAID and value != defaults[name])
    notices = {cell.spec.dataset: notice for cell in cells(config)
               if (notice := cell.result(out, lambda result: str(result["notice"])))}
    characters = int(CHARACTERS_AN_INCH * figure.get_figwidth())
    figure.suptitle(figures.plain("\n".join([
        textwrap.fill(f"{name}: {ours['optimizer']} lr {ours['lr']:g}, batch {ours['batch']}, "
                      f"{ours['epochs']} epochs, {_seeds(config)} (band: lowest to highest)"
                      f"{examples}{others}", characters),
        *(textwrap.fill(f"{dataset}: {notice}", characters)
          for dataset, notice in notices.items())])), fontsize=8)
    return figures.save(figure, out / f"{name}.png")


def _draw_advantage(axes: Any, config: GridConfig, out: Path, dataset: str) -> None:
    metric = metric_of(config, dataset)
    table = np.array([[_advantage_at(config, out, dataset, width, level) for level in config.p_k]
                      for width in config.widths])
    largest = max(PALE, min(np.nanmax(np.abs(table)), 100)) if np.isfinite(table).any() else 1.0
    axes.imshow(table, cmap="PuOr_r", vmin=-largest, vmax=largest, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        text = ("-" if np.isnan(value) else f"{value:+.1f}" if abs(value) < 100
                else f"{value:+.0f}")
        axes.text(j, i, text, ha="center", va="center", fontsize=9,
                  color="white" if abs(value) > 0.7 * largest else "black")
    axes.set_xticks(range(len(config.p_k)), [f"{level:g}" for level in config.p_k])
    axes.set_yticks(range(len(config.widths)), [str(width) for width in config.widths])
    axes.set_xlabel("$p_k$")
    axes.set_ylabel("N")
    axes.grid(False)
    axes.set_title(f"{figures.plain(short_name(dataset))}: COMET's lead at its best,\n"
                   + (f"points of {metric.key}" if metric.sign > 0 else "% less error"))


def _advantage_at(config: GridConfig, out: Path, dataset: str, width: int, level: float) -> float:
    standard = curves_of(config, out, dataset, width, "standard", level)[1]
    comet = curves_of(config, out, dataset, width, "comet", level)[1]
    return advantage(standard, comet, metric_of(config, dataset).sign)


def table(config: GridConfig, out: Path) -> str:
    """Return a row for each data set, width and p_k: best values, lead and seeds won."""
    others = [model for model in config.models if model not in ("standard", "comet")]
    rows = [("data set", "N", "p_k", "standard", "COMET", *others, "COMET's lead", "seeds won")]
    for dataset in config.datasets:
        sign = metric_of(config, dataset).sign
        for width in config.widths:
            for level in config.p_k:
                curves = {model: curves_of(config, out, dataset, width, model, level)[1]
                          for model in ("standard", "comet", *others)}
                standard, comet = curves["standard"], curves["comet"]
                rows.append((short_name(dataset), str(width), f"{level:g}",
                             *(_spread(values, sign) for values in curves.values()),
                             _lead(advantage(standard, comet, sign), sign),
                             _won(standard, comet, sign)))
    mixed = [f"\nthe finished cells of {short_name(dataset)} were trained on different data, as "
             "its files were changed in between: compare within one --out that was begun afresh"
             for dataset in config.datasets
             if len({data for cell in cells(config) if cell.spec.dataset == dataset
                     and (data := cell.result(out, lambda result: str(result["data"])))}) > 1]
    labels = dict.fromkeys(metric_of(config, dataset).label for dataset in config.datasets)
    return "".join([columns(rows), f"\n{', or '.join(labels)}: best, mean over seeds (lowest-"
                    "highest)", *mixed])


def _spread(curves: Curves, sign: int) -> str:
    if not curves:
        return "-"
    values = best(curves, sign)
    return f"{values.mean():.3f} ({values.min():.3f}-{values.max():.3f})"


def _lead(value: float, sign: int) -> str:
    if np.isnan(value):
        return "-"
    if sign > 0:
        return f"{value:+.1f} points"
    if abs(value) < 0.05:
        return "no difference"
    return f"{abs(value):.1f} % {'less' if value > 0 else 'more'} error"


def _won(standard: Curves, comet: Curves, sign: int) -> str:
    seeds = sorted(standard.keys() & comet.keys())
    if not seeds:
        return "-"
    won = (sign * best(comet, sign, seeds) > sign * best(standard, sign, seeds)).sum()
    return f"{won} of {len(seeds)}"


PAPER_LEVELS = {"p_k": (0.1, 0.5, 0.9), "seeds": 3}
PAPER_MODELS = {"models": ("standard", "comet")}


def grid(name: str, **presets: dict[str, Any]) -> Experiment:
    """Return a grid experiment; `presets` gives what each preset changes."""
    return Experiment(name, GridConfig, presets, lambda config: config.datasets, cells, run_cell,
                      lambda config, out: draw(config, out, name), table)
