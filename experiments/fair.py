"""The fair fight: COMET against other models, each with its best setting, see `selection`."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from . import figures
from .experiment import Cell, Experiment, columns
from .grid import metric_of, short_name
from .intervals import Interval, advantage, interval, signed
from .selection import Curve, FairConfig, Setting, best, cell_of, cells, run_cell
from .tasks.base import Metric
from .training.config import spent

Cost = Callable[[Setting, Curve], np.ndarray]  # of each point of a curve


class Contender(NamedTuple):
    """What the files of a finished cell say.

    setting : Setting or None, if all have diverged. curves : of the chosen one, by reporting seed.
    notice : of its data.
    """

    setting: Setting | None
    curves: dict[int, Curve]
    notice: str

    @property
    def diverged(self) -> int:
        """From how many seeds its chosen setting has diverged."""
        return sum(curve.diverged is not None for curve in self.curves.values())

    @property
    def stands(self) -> bool:
        """Whether it can be compared."""
        return self.setting is not None and not self.diverged

    def best(self, sign: int) -> np.ndarray:
        """Return the best value from each seed, (seeds,)."""
        return np.array([best(curve, sign) for curve in self.curves.values()], np.float64)


def read(config: FairConfig, out: Path, dataset: str) -> dict[str, Contender]:
    """Return the contenders of a data set whose cells are finished."""
    found = {model: _read(cell_of(config, dataset, model), out) for model in config.models}
    return {model: contender for model, contender in found.items() if contender is not None}


def _read(cell: Cell, out: Path) -> Contender | None:
    def use(result: dict[str, Any]) -> Contender:
        chosen = result["chosen"]
        curves = {seed: Curve(**{name: report[name] for name in Curve._fields})
                  for seed, report in zip(cell.spec.reporting, result["reported"], strict=False)}
        return Contender(None if chosen is None else cell.spec.settings[chosen], curves,
                         str(result["notice"]))

    found: Contender | None = cell.result(out, use)
    return found


# --- comparisons --------------------------------------------------------------------------------


def epochs(setting: Setting, curve: Curve) -> np.ndarray:
    """Return the epochs before each point."""
    return np.array(curve.epochs, np.float64)


def seconds(setting: Setting, curve: Curve) -> np.ndarray:
    """Return the seconds of training before each point, masks kept and evaluation left out.

    They are those of the machine, and of what else ran on it at the time.
    """
    return np.array(curve.seconds, np.float64)


def work(setting: Setting, curve: Curve) -> np.ndarray:
    """Return the multiply-adds before each point, for each training example.

    Masks that are kept are routed once.
    """
    found: np.ndarray = spent(setting.run, epochs(setting, curve))
    return found


def lead(comet: Contender, rival: Contender, sign: int, cost: Cost = epochs) -> Interval:
    """Return by how much COMET is better at equal cost: points of accuracy, or % less error.

    From each seed both go as far as the one that could spend less, and count at their best until
    then. The interval is that of the differences, which are paired by seeds: it says how sure the
    mean is over seeds, on these data, and each is for itself.
    """
    assert comet.setting is not None and rival.setting is not None
    pairs = []
    for ours, theirs in zip(comet.curves.values(), rival.curves.values(), strict=True):
        spent = cost(comet.setting, ours), cost(rival.setting, theirs)
        limit = min(spent[0][-1], spent[1][-1])
        pairs.append([_best_within(limit, costs, curve, sign)
                      for costs, curve in zip(spent, (ours, theirs), strict=True)])
    a, b = np.array(pairs).T
    return advantage(a, b, sign)


def _best_within(limit: float, costs: np.ndarray, curve: Curve, sign: int) -> float:
    """Return the best value up to the limit, at which the curve is taken for straight.

    The untrained network's counts whatever it costs.
    """
    reached = np.interp(limit, costs, curve.values)
    return sign * max(sign * value for value in (
        *(value for point, value in enumerate(curve.values) if point == 0 or costs[point] <= limit),
        float(reached)))


def lead_on_test(comet: Contender, rival: Contender, sign: int) -> Interval:
    """Return COMET's lead on the test set after the last epoch."""
    a, b = (np.array([curve.test for curve in side.curves.values()], np.float64)
            for side in (comet, rival))
    return advantage(a, b, sign)


# --- the table ----------------------------------------------------------------------------------


def table(config: FairConfig, out: Path) -> str:
    """Return for each data set the contenders with what they chose, COMET's leads, and who wins."""
    return "\n\n".join(_table(config, dataset, read(config, out, dataset))
                       for dataset in config.datasets)


def _table(config: FairConfig, dataset: str, found: dict[str, Contender]) -> str:
    metric = metric_of(config, dataset)
    comet = found.get("comet")
    tested = any(curve.test is not None for each in found.values()
                 for curve in each.curves.values())
    rows = [("model", "lr", "momentum", "f", "initial", "best", "COMET's lead", "at equal seconds",
             "at equal work", *("test", "COMET's lead") * tested)]
    for model in config.models:
        side = found.get(model)
        if side is None or side.setting is None:
            why = "not finished" if side is None else "all diverged"
            rows.append((model, *["-"] * 4, why, *["-"] * (len(rows[0]) - 6)))
            continue
        setting, leads, tests = side.setting, ["-"] * 3, ["-"] * 2
        value = f"{side.diverged} of {len(side.curves)} diverged"
        if side.stands:
            value = _spread(side.best(metric.sign))
            tests[0] = _spread(np.array([curve.test for curve in side.curves.values()], np.float64))
        if comet is not None and comet.stands and side.stands and model != "comet":
            leads = [signed(lead(comet, side, metric.sign, cost))
                     for cost in (epochs, seconds, work)]
            tests[1] = signed(lead_on_test(comet, side, metric.sign))
        rows.append((model, f"{setting.lr:g}", f"{setting.momentum:g}", setting.activation,
                     setting.initial, value, *leads, *tests * tested))
    title = (f"{short_name(dataset)}: {metric.label}, best over the epochs, mean over seeds "
             f"{', '.join(map(str, config.reporting))} with its 95 % interval; leads in "
             f"{_unit(metric)}")
    return "\n".join([title, columns(rows), *_edges(config, found),
                      f"{short_name(dataset)}: {verdict(found, metric)}"])


def _spread(values: np.ndarray) -> str:
    mean, reach = interval(values)
    return f"{mean:.3f}" + ("" if np.isnan(reach) else f" +- {reach:.3f}")


def _unit(metric: Metric) -> str:
    return f"points of {metric.key}" if metric.sign > 0 else "% less error"


def _edges(config: FairConfig, found: dict[str, Contender]) -> list[str]:
    """Return a line on the chosen learning rates at the edge of their grid, if there are any."""
    at = [f"{model} ({side.setting.lr:g})" for model, side in found.items()
          if side.setting is not None and len(config.lrs) > 1
          and side.setting.lr in (min(config.lrs), max(config.lrs))]
    return [f"at the edge of --lrs, so that a better one may lie beyond: {', '.join(at)}"] * bool(
        at)


def verdict(found: dict[str, Contender], metric: Metric) -> str:
    """Return who wins at equal epochs, by how much, and where the interval contains 0."""
    comet = found.get("comet")
    if comet is None or not comet.stands:
        return "comet is not finished, or has diverged: no comparison"
    leads = {model: lead(comet, side, metric.sign) for model, side in found.items()
             if side.stands and model != "comet"}
    said = []
    for words, sign in (("better than", 1), ("worse than", -1), ("not shown to differ from", 0)):
        models = [f"{model} ({signed(by)})" for model, by in leads.items()
                  if sign == (np.sign(by.mean) if by.excludes_zero else 0)]
        said += [f"COMET is {words} {', '.join(models)}"] * bool(models)
    said += [f"{model} has diverged" for model, side in found.items() if not side.stands]
    first = max((model for model, side in found.items() if side.stands),
                key=lambda model: metric.sign * found[model].best(metric.sign).mean())
    return f"{first} has the best mean; " + "; ".join(said) + f" (leads in {_unit(metric)})"


# --- the figure ---------------------------------------------------------------------------------


def draw(config: FairConfig, out: Path) -> list[Path]:
    """Draw for each data set the curves of what was chosen, and COMET's lead over each rival."""
    plt = figures.pyplot()
    found = {dataset: read(config, out, dataset) for dataset in config.datasets}
    if not any(found.values()):
        raise UserError(f"{out} holds no finished cell of fair: run it first")
    figure, panels = plt.subplots(len(found), 3, squeeze=False,
                                  figsize=(10.5, 2.7 * len(found) + 0.5),
                                  gridspec_kw={"width_ratios": (1, 1, 0.9)})
    for (dataset, contenders), row in zip(found.items(), panels, strict=True):
        for axes, cost, label in zip(row, (epochs, seconds), (
                "epoch", "seconds of training, masks kept"), strict=False):
            _draw_curves(axes, config, dataset, contenders, cost, label)
        row[0].set_ylabel(metric_of(config, dataset).label)
        _draw_leads(row[2], config, dataset, contenders)
    notices = dict.fromkeys(f"{dataset}: {side.notice}" for dataset, sides in found.items()
                            for side in sides.values() if side.notice)
    settings = len(cells(config)[0].spec.settings)
    title = (f"fair: each model with the best of {settings} settings; seeds for the choice "
             f"{', '.join(map(str, config.choosing))}, for what is shown "
             f"{', '.join(map(str, config.reporting))} (band: lowest to highest; bars: 95 % "
             f"intervals, paired); N = {config.width}, p_k {config.p_k:g}, "
             f"{config.epochs} epochs"
             + ("" if config.train is None else f", {config.train} training examples"))
    figure.suptitle(figures.plain("\n".join(textwrap.fill(line, 160)
                                            for line in (title, *notices))), fontsize=8)
    return [figures.save(figure, out / "fair.png")]


def _draw_curves(axes: Any, config: FairConfig, dataset: str, found: dict[str, Contender],
                 cost: Cost, label: str) -> None:
    metric = metric_of(config, dataset)
    for model, side in found.items():
        if side.setting is None:
            continue
        color, name = figures.look(model, config.models.index(model))
        curves = [curve for curve in side.curves.values() if curve.diverged is None]
        if curves:
            x = np.mean([cost(side.setting, curve) for curve in curves], axis=0)
            figures.seed_band(axes, x, np.array([curve.values for curve in curves]), color, name,
                              strong=model in ("comet", "standard"))
    if metric.sign < 0:
        axes.set_yscale("log")
    axes.set_xlabel(label, labelpad=1)
    axes.set_title(figures.plain(short_name(dataset)))


def _draw_leads(axes: Any, config: FairConfig, dataset: str, found: dict[str, Contender]) -> None:
    """Draw COMET's lead over each rival, at equal epochs and seconds, and what each has chosen."""
    metric, comet = metric_of(config, dataset), found.get("comet")
    names = []
    for number, model in enumerate(config.models):
        color, name = figures.look(model, number)
        side = found.get(model)
        if side is None or side.setting is None:
            names.append(f"{name}\n" + ("not finished" if side is None else "diverged"))
            continue
        chosen = side.setting
        momentum = f" momentum {chosen.momentum:g}" if chosen.momentum else ""
        names.append(f"{name}\nlr {chosen.lr:g}{momentum} {chosen.activation} {chosen.initial}")
        if comet is None or not comet.stands or not side.stands or model == "comet":
            continue
        for cost, offset, marker in ((epochs, -0.14, "o"), (seconds, 0.14, "s")):
            mean, reach = lead(comet, side, metric.sign, cost)
            axes.errorbar(mean, number + offset, xerr=None if np.isnan(reach) else reach,
                          fmt=marker, color=color, markersize=3.5, capsize=2,
                          markerfacecolor=color if marker == "o" else "white")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for text, model in zip(axes.get_yticklabels(), config.models, strict=True):
        text.set_color(figures.look(model, 0)[0])
    axes.set_xlabel(_unit(metric), labelpad=1)
    axes.set_title(f"{figures.plain(short_name(dataset))}: COMET's lead at\nequal epochs (discs), "
                   "seconds (squares)")


EXPERIMENT = Experiment(
    "fair", FairConfig,
    {"smoke": {"datasets": ("glyphs", "arm"), "models": ("standard", "dropout", "comet"),
               "width": 20, "train": 200, "validation": 200, "epochs": 2, "lrs": (1e-2, 1e-1),
               "choosing": (100,), "reporting": (0, 1)},
     "paper": {"width": 1000, "train": None, "validation": None, "epochs": 50,
               "choosing": (100, 101, 102), "reporting": tuple(range(10))}},
    lambda config: config.datasets, cells, run_cell, draw, table)
