"""The figures and the table of a grid, from the files of its finished cells alone."""

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import settings
from ..errors import UserError
from . import figures
from .experiment import Cell, Experiment, columns
from .grid import (
    Comparison,
    GridConfig,
    Panel,
    cell_of,
    cells,
    examples,
    metric_of,
    panels,
    run_cell,
    short_name,
)
from .intervals import Interval, advantage
from .training.config import RunConfig, routes_once, spent
from .variants import WITHOUT_P_K

PAPER_LEVELS = {"p_k": (0.1, 0.5, 0.9), "seeds": 3}
PAPER_MODELS = ("standard", "smaller", "dropout", "top-k", "moe", "moe-fixed", "layerwise",
                "bernoulli", "example-tied", "l1", "comet")
SMOKE = {"datasets": ("glyphs",), "widths": (50, 100), "p_k": (0.1, 0.5), "seeds": 1, "epochs": 1,
         "train": 500, "models": PAPER_MODELS}
# A 125th of the paper's steps with a hundred times its learning rate: rate times steps, by
# which gradient descent gets as far, is nearly the paper's.
CIFAR10_LAPTOP = {"datasets": ("cifar10",), "widths": (100, 500, 1000), "epochs": 10,
                  "train": 3200, "validation": 2000, "models": PAPER_MODELS, **PAPER_LEVELS}

CHARACTERS_AN_INCH, LEAST_INCHES = 16, 5.0  # of a title, and the width that it needs
LEAST_HEIGHT = 1.7  # inches of a map, beside which its label stands
PALE = 20.0  # a lead below is pale, even if it is the largest: points, or per cent
ACROSS = 5  # panels at most side by side
LOAD = "val_load_"  # begins the metrics that say the share of each expert of a mixture

FOLDERS = re.compile(r"\S*[/\\](?=[^/\\\s])")  # of a path, all but its last part


class Curve(NamedTuple):
    """What a finished cell's files say.

    epoch, value, seconds : arrays (T,); the metric, and the training time with what was prepared.
    parameters : int. load : shares of the experts before the first and after the last epoch, or
    None. notice, data : of the data it was trained on.
    """

    epoch: np.ndarray
    value: np.ndarray
    seconds: np.ndarray
    parameters: int
    load: np.ndarray | None
    notice: str
    data: str

    def best(self, sign: int) -> float:
        """Return the best value."""
        return float(sign * (sign * self.value).max())


Curves = dict[int, Curve]  # by seed
Found = dict[tuple[Panel, str], Curves]


def read(config: Comparison, out: Path) -> Found:
    """Return the curves of all finished cells; of each file it reads what it needs, once."""
    known: dict[str, Curve | None] = {}
    found: Found = {}
    for panel in panels(config):
        key = f"val_{metric_of(config, panel.dataset).key}"
        for model in config.models:
            curves = found.setdefault((panel, model), {})
            for seed in config.seed_numbers:
                cell = cell_of(config, panel, model, seed)
                if cell.name not in known:
                    known[cell.name] = _read(cell, out, key)
                if (curve := known[cell.name]) is not None:
                    curves[seed] = curve
    return found


def _read(cell: Cell, out: Path, key: str) -> Curve | None:
    def of_result(result: dict[str, Any]) -> tuple[int, str, str, float]:
        return (int(result["parameters"]), str(result["notice"]), str(result["data"]),
                float(result["seconds"]["prepare"]))

    def of_lines(lines: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray | None]:
        table = np.array([(line["epoch"], line[key], line["seconds"]) for line in lines],
                         np.float64)
        shares = [[value for name, value in lines[i].items() if name.startswith(LOAD)]
                  for i in (0, -1)]
        return table.T, np.array(shares, np.float64) if shares[0] else None

    result = cell.result(out, of_result)
    if result is None:
        return None
    parameters, notice, data, prepare = result
    (epoch, value, seconds), load = cell.metrics(out, of_lines)
    return Curve(epoch, value, seconds + prepare, parameters, load, notice, data)


# --- comparisons --------------------------------------------------------------------------------


def lead(one: Curves, other: Curves, sign: int) -> Interval:
    """Return by how much `one` is better at its best: points of accuracy, or % less error.

    Over the seeds of which both are finished; NaN if there are none.
    """
    seeds = sorted(one.keys() & other.keys())
    a, b = (np.array([curves[seed].best(sign) for seed in seeds]) for curves in (one, other))
    return advantage(a, b, sign)


def _mean_best(curves: Curves, sign: int) -> float:
    return float(np.mean([curve.best(sign) for curve in curves.values()]))


def ranked(found: Found, panel: Panel, models: Sequence[str], sign: int) -> list[str]:
    """Return the models that have finished cells in a panel, the best first.

    Those with fewer seeds come after the others: the missing ones may have diverged.
    """
    present = [model for model in models if found[panel, model]]
    most = max((len(found[panel, model]) for model in present), default=0)
    return sorted(present, key=lambda model: (len(found[panel, model]) < most,
                                              -sign * _mean_best(found[panel, model], sign)))


# --- the table ----------------------------------------------------------------------------------


def table(config: Comparison, out: Path) -> str:
    """Return a row for each panel: who wins, by how much, and COMET against the standard model."""
    found = read(config, out)
    several = len(config.kinds) > 1
    rows = [("data set", *[config.kind_name] * several, _letters(config), "p_k",
             "best", "", "second", "", "lead (95 %)", "COMET", "standard", "COMET's lead (95 %)")]
    for panel in panels(config):
        sign = metric_of(config, panel.dataset).sign
        order = ranked(found, panel, config.models, sign)

        def value(model: str | None, panel: Panel = panel, sign: int = sign) -> str:
            curves = found.get((panel, model or ""), {})
            return f"{_mean_best(curves, sign):.3f}" if curves else "-"

        def by(one: str | None, other: str | None, panel: Panel = panel, sign: int = sign) -> str:
            a, b = (found.get((panel, model or ""), {}) for model in (one, other))
            return _lead(lead(a, b, sign), sign)

        first, second = (order + [None, None])[:2]
        def name(model: str | None, panel: Panel = panel) -> str:
            return "-" if model is None else model + _missing(config, found[panel, model])

        rows.append((short_name(panel.dataset), *[panel.kind] * several, str(panel.size),
                     f"{panel.p_k:g}", name(first), value(first), name(second), value(second),
                     by(first, second), value("comet"), value("standard"),
                     by("comet", "standard")))
    mixed = [f"\nthe finished cells of {short_name(dataset)} were trained on different data, as "
             "its files were changed in between: compare within one --out that was begun afresh"
             for dataset in config.datasets
             if len({curve.data for (panel, _), curves in found.items()
                     if panel.dataset == dataset for curve in curves.values()}) > 1]
    labels = dict.fromkeys(metric_of(config, dataset).label for dataset in config.datasets)
    return "".join([columns(rows), f"\n{', or '.join(labels)}: best over the epochs, mean over "
                    "seeds; a lead with its 95 % interval over seeds", *_loads(config, found),
                    *mixed])


def _letters(config: Comparison) -> str:
    return "/".join(dict.fromkeys(map(config.letter, config.kinds)))


def _missing(config: Comparison, curves: Curves) -> str:
    """Return of how many seeds a model has finished, unless of all: others may have diverged."""
    asked = len(config.seed_numbers)
    return "" if len(curves) == asked else f" ({len(curves)} of {asked} seeds)"


def _lead(found: Interval, sign: int) -> str:
    if np.isnan(found.mean):
        return "-"
    reach = "" if np.isnan(found.reach) else f" +- {found.reach:.1f}"
    if sign > 0:
        return f"{found.mean:+.1f}{reach} points"
    if abs(found.mean) < 0.05 and not reach:
        return "no difference"
    return f"{abs(found.mean):.1f}{reach} % {'less' if found.mean > 0 else 'more'} error"


def effective_experts(shares: np.ndarray) -> np.ndarray:
    """Return exp(entropy) of the experts' shares (..., E): E if all get as much, 1 if one gets all.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * np.log(shares), 0)
    return np.exp(-terms.sum(axis=-1))


def _loads(config: Comparison, found: Found) -> list[str]:
    """Return a line for each panel and mixture of several experts: how many of them are in use."""
    lines = []
    for panel in panels(config):
        for model in config.models:
            loads = [curve.load for curve in found[panel, model].values()
                     if curve.load is not None and curve.load.shape[1] > 1]
            if loads:
                first, last = effective_experts(np.array(loads)).mean(axis=0)
                largest = np.array(loads)[:, 1].max(axis=-1).mean()
                lines.append(f"\nexperts in use of {loads[0].shape[1]}, {model}, "
                             f"{_where(config, panel)}: "
                             f"{first:.1f} before training, {last:.1f} after it (exp of the "
                             f"entropy of their shares; the largest share is {largest:.0%})")
    return lines


def _where(config: Comparison, panel: Panel) -> str:
    return (f"{short_name(panel.dataset)}, {config.letter(panel.kind)} = {panel.size}, "
            f"p_k = {panel.p_k:g}")


# --- the figures --------------------------------------------------------------------------------


def draw(config: Comparison, out: Path, name: str) -> list[Path]:
    """Draw the curves against epochs, time and multiply-adds, and COMET's lead over each rival."""
    found = read(config, out)
    if not any(found.values()):
        raise UserError(f"{out} holds no finished cell of {name}: run it first")
    drawn = [_draw_curves(config, found, name, axis, out / f"{name}{suffix}.png")
             for suffix, axis in (("", EPOCHS), ("_time", SECONDS), ("_work", MULTIPLY_ADDS))]
    rivals = [model for model in config.models if model != "comet"]
    if "comet" in config.models and rivals:
        drawn.append(_draw_leads(config, found, rivals, name, out / f"{name}_summary.png"))
    return drawn


class Axis(NamedTuple):
    """What curves are drawn against: its label, and the place of each point.

    places : of the number of training examples, the run, its curves, and whether each step routes.
    """

    label: str
    places: Callable[[int, RunConfig, list[Curve], bool], np.ndarray]


def _epochs(examples: int, run: RunConfig, curves: list[Curve], routed: bool) -> np.ndarray:
    return curves[0].epoch


def _seconds(examples: int, run: RunConfig, curves: list[Curve], routed: bool) -> np.ndarray:
    places: np.ndarray = np.mean([curve.seconds for curve in curves], axis=0)
    return places


def _multiply_adds(examples: int, run: RunConfig, curves: list[Curve], routed: bool) -> np.ndarray:
    places: np.ndarray = examples * spent(run, curves[0].epoch, routed)
    return places


EPOCHS = Axis("epoch", _epochs)
SECONDS = Axis("seconds of training", _seconds)
MULTIPLY_ADDS = Axis("multiply-adds", _multiply_adds)
KEPT = {SECONDS: ", masks kept", MULTIPLY_ADDS: " (dashed: COMET routed at each step)"}


def _label(config: Comparison, axis: Axis) -> str:
    """Return an axis' label, and what it means for masks if there are some that are kept."""
    kept = any(routes_once(cell.spec.run) for cell in cells(config))
    return axis.label + KEPT.get(axis, "") * kept


def arranged(config: Comparison) -> list[list[Panel]]:
    """Return the panels in rows: side by side what the configuration has there."""
    rows: dict[Any, list[Panel]] = {}
    for panel in panels(config):
        rows.setdefault(panel._replace(**{config.across: None}), []).append(panel)  # type: ignore
    return [row[i:i + ACROSS] for row in rows.values() for i in range(0, len(row), ACROSS)]


def _draw_curves(config: Comparison, found: Found, name: str, axis: Axis, file: Path) -> Path:
    plt = figures.pyplot()
    rows = arranged(config)
    across = max(map(len, rows))
    figure = plt.figure(figsize=(max(3.4 * across, LEAST_INCHES), 2.3 * len(rows) + 0.6))
    grid = figure.add_gridspec(len(rows), across)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            axes = figure.add_subplot(grid[i, j])
            _draw_panel(axes, config, found, panel, axis)
            if j == 0:
                axes.set_ylabel(metric_of(config, panel.dataset).label)
    figure.supxlabel(_label(config, axis), fontsize=8)
    figure.suptitle(_title(config, found, name, figure.get_figwidth(),
                           "beside each panel: the best value of each model and its parameters"),
                    fontsize=8)
    return figures.save(figure, file)


def _draw_panel(axes: Any, config: Comparison, found: Found, panel: Panel, axis: Axis) -> None:
    """Draw a curve a model, COMET and the standard model on top, with their names in order."""
    sign = metric_of(config, panel.dataset).sign
    order = ranked(found, panel, config.models, sign)
    few = len(order) <= 3
    for rank, model in enumerate(order):
        curves = list(found[panel, model].values())
        color, label = figures.look(model, config.models.index(model))
        values = np.array([curve.value for curve in curves])
        above = few or model in ("comet", "standard")
        run = cell_of(config, panel, model, config.seed_numbers[0]).spec.run
        for routed in (False, True)[:1 + (axis is MULTIPLY_ADDS and routes_once(run))]:
            x = axis.places(examples(config, panel.dataset), run, curves, routed)
            figures.seed_band(axes, x, values, color, label, strong=above, dashed=routed)
        axes.annotate(f"{label} {_mean_best(found[panel, model], sign):.3f} "
                      f"({curves[0].parameters / 1e6:.2g} M)"
                      f"{_missing(config, found[panel, model])}", (1.02, 1 - 0.088 * rank),
                      xycoords="axes fraction", va="top", color=color, fontsize=6,
                      fontweight="bold" if above and not few else "normal")
    several = f", {panel.kind}" if len(config.kinds) > 1 else ""
    axes.set_title(figures.plain(f"{_where(config, panel)}{several}").replace("p_k", "$p_k$"))
    if axis is EPOCHS:
        axes.locator_params(axis="x", integer=True)
    if sign < 0:
        axes.set_yscale("log")


def _title(config: Comparison, found: Found, name: str, inches: float, more: str) -> str:
    """Return the settings that the networks have, with what is odd about the data."""
    ours, defaults = settings.values(config), settings.values(type(config)())
    limit = "" if config.train is None else f", {config.train} training examples"
    others = "".join(f", {name.replace('_', ' ')} {value}{_paper(config, name, value, default)}"
                     for (name, value), default in zip(ours.items(), defaults.values(), strict=True)
                     if name not in config.said and (value != default or name in config.shown)
                     and config.only.get(name, config.kinds[0]) in config.kinds)
    # A figure is shown to others, to whom the folders of this machine say nothing.
    notices = {panel.dataset: FOLDERS.sub("", curve.notice) for (panel, _), curves in found.items()
               for curve in curves.values() if curve.notice}
    characters = int(CHARACTERS_AN_INCH * inches)
    return figures.plain("\n".join([
        textwrap.fill(f"{name}: {_training(config)}{_seeds(config)} (band: lowest to highest)"
                      f"{limit}{others}; {more}", characters),
        *(textwrap.fill(f"{dataset}: {notice}", characters)
          for dataset, notice in notices.items())]))


def _training(config: Comparison) -> str:
    """Return how the networks are trained: each kind, if not all are in the same way."""
    batch, rates, epochs = f"batch {config.training.batch}", [], []
    defaults = type(config)()
    batch += _paper(config, "batch", config.training.batch, defaults.training.batch)
    for kind in config.kinds:
        ours, theirs = config.training_of(kind), defaults.training_of(kind)
        rates.append(f"lr {ours.lr:g}{_paper(config, 'lr', ours.lr, theirs.lr)}")
        epochs.append(f"{ours.epochs} epochs"
                      f"{_paper(config, 'epochs', ours.epochs, theirs.epochs)}"
                      if ours.steps is None else f"{ours.steps} steps")
    optimizer = config.training.optimizer.name
    if len(set(zip(rates, epochs, strict=True))) == 1:
        kind = "" if len(config.kinds) > 1 else f"{config.kinds[0]}, "
        return f"{optimizer} {rates[0]}, {batch}, {epochs[0]}, {kind}"
    return f"{optimizer}, {batch}, " + "".join(
        f"{kind} {rate}, {count}; "
        for kind, rate, count in zip(config.kinds, rates, epochs, strict=True))


def _paper(config: Comparison, name: str, value: Any, default: Any) -> str:
    """Return what the paper has for a setting that is shown, if it is another."""
    return f" (paper: {default})" * (name in config.shown and value != default)


def _seeds(config: Comparison) -> str:
    """Return the seeds in words: "1 seed", "3 seeds", "seeds 4, 7"."""
    if isinstance(config.seeds, int):
        return f"{config.seeds} seed{'s' * (config.seeds != 1)}"
    return f"seeds {', '.join(map(str, config.seeds))}"


def _draw_leads(config: Comparison, found: Found, rivals: list[str], name: str,
                file: Path) -> Path:
    """Draw COMET minus each rival over capacity and sparsity, a map a rival and data set."""
    plt = figures.pyplot()
    across = min(len(rivals), ACROSS)
    down = -(-len(rivals) // across)
    capacities = [(kind, size) for kind in config.kinds for size in config.sizes(kind)]
    height = max(0.7 + 0.34 * len(capacities), LEAST_HEIGHT)
    figure, grid = plt.subplots(
        down * len(config.datasets), across, squeeze=False,
        figsize=(max((1.0 + 0.72 * len(config.p_k)) * across, LEAST_INCHES),
                 height * down * len(config.datasets) + 0.8))
    for axes in grid.flat:
        axes.set_axis_off()
    for i, dataset in enumerate(config.datasets):
        metric = metric_of(config, dataset)
        leads = {rival: [[lead(found[panel, "comet"], found[panel, rival], metric.sign)
                          for panel in (Panel(dataset, *capacity, level) for level in config.p_k)]
                         for capacity in capacities] for rival in rivals}
        means = np.array([[[each.mean for each in row] for row in rows]
                          for rows in leads.values()])
        largest = (max(PALE, min(np.nanmax(np.abs(means)), 100)) if np.isfinite(means).any()
                   else 1.0)
        for j, rival in enumerate(rivals):
            axes = grid[i * down + j // across, j % across]
            axes.set_axis_on()
            _draw_lead(axes, leads[rival], largest)
            axes.set_title(figures.look(rival, j)[1] + (" *" if rival in WITHOUT_P_K else ""),
                           fontsize=7)
            axes.set_xticks(range(len(config.p_k)), [f"{level:g}" for level in config.p_k])
            axes.set_yticks(range(len(capacities)), _capacities(config, capacities))
            axes.set_xlabel("$p_k$", labelpad=1)
            if j % across == 0:
                unit = f"points of {metric.key}" if metric.sign > 0 else "% less error"
                axes.set_ylabel(figures.plain(f"{short_name(dataset)}: COMET's lead,\n{unit}; "
                                               f"{_letters(config)}"))
    figure.suptitle(_title(config, found, name, figure.get_figwidth(),
                           "COMET minus each rival, both at their best, with 95 % intervals over "
                           "seeds; bold: the interval leaves out 0; *: the rival has no p_k"),
                    fontsize=8)
    return figures.save(figure, file)


def _capacities(config: Comparison, capacities: list[tuple[str, int]]) -> list[str]:
    several = len(config.kinds) > 1
    return [f"{kind}, {size}" if several and len(config.sizes(kind)) > 1 else
            kind if several else str(size) for kind, size in capacities]


def _draw_lead(axes: Any, leads: list[list[Interval]], largest: float) -> None:
    means = np.array([[each.mean for each in row] for row in leads])
    axes.imshow(means, cmap="PuOr_r", vmin=-largest, vmax=largest, aspect="auto")
    for i, row in enumerate(leads):
        for j, (mean, reach) in enumerate(row):
            text = "-" if np.isnan(mean) else f"{mean:+.1f}" if abs(mean) < 100 else f"{mean:+.0f}"
            axes.text(j, i, text + ("" if np.isnan(reach) else f"\n± {reach:.1f}"), ha="center",
                      va="center", fontsize=6,
                      fontweight="bold" if row[j].excludes_zero else "normal",
                      color="white" if abs(mean) > 0.7 * largest else "black")
    axes.grid(False)


def grid(name: str, config: type[Comparison] = GridConfig, run_cell: Any = run_cell,
         **presets: dict[str, Any]) -> Experiment:
    """Return a grid experiment; `presets` gives what each preset changes."""
    return Experiment(name, config, presets, lambda config: config.datasets, cells, run_cell,
                      lambda config, out: draw(config, out, name), table)
