"""p_k in many steps: accuracy and time, and rules by which it may be chosen before training.

A case is a data set and a width. Of each rule it is said how much the p_k that it chooses loses
against the best p_k of the case, which is the best one of the other seeds: the best of the same
seeds would be ahead by luck alone. The numbers of the rules are found on the first case:

- ``half``: p_k = 0.5, the paper's choice for transformers;
- ``same p_k``: the best p_k of the first case;
- ``same k``: the best k of the first case, as many neurons whatever N;
- ``masks``: the p_k at which the masks of two training examples differ in the most neurons, which N
  and the data decide, without training: chance would have it at 0.5, but masks are not by chance;
- ``trial``: the best p_k after the first line of the metrics, which costs a short training of each.

One of the rules is chosen on the first data set, of all widths: the simplest, in this order, of
those that are behind the best p_k in the fewest cases. The other data sets have no say in that, and
are those on which it is judged.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..functional.packing import unpacked
from ..gates import EVALUATION, Comet
from ..models.mlp import MLPConfig
from ..optim import OptimizerConfig
from ..settings import option
from . import figures, grid
from .datasets.base import scaled
from .experiment import Experiment, Place, columns
from .grid import DEFAULT_F, GridCell, GridConfig, Panel, cell_of, examples, metric_of, short_name
from .grid_report import CHARACTERS_AN_INCH, Curve, Curves, Found, read
from .intervals import Interval, advantage, signed
from .training import TrainConfig
from .training.model import read_weights

EXAMPLES = 500  # of the training set, whose masks are compared
LEVELS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
COMET, STANDARD = "comet", "standard"


@dataclass(frozen=True)
class SensitivityConfig(GridConfig):
    """A grid of MLPs over many levels of p_k."""

    datasets: tuple[str, ...] = option(("cifar10", "glyphs", "arm"), "data sets, see: comet-np "
                                       "data; or files of your own: CSV, or npz with x and y; on "
                                       "the first the rules are found")
    models: tuple[str, ...] = option((STANDARD, COMET), "models to compare, comet among them")
    p_k: tuple[float, ...] = option(LEVELS, "proportions of neurons that stay active")
    widths: tuple[int, ...] = option((100, 400), "neurons in each hidden layer, N")
    train: int | None = option(2000, "use only so many training examples")
    validation: int | None = option(2000, "use only so many validation examples")
    training: TrainConfig = field(default=TrainConfig(
        OptimizerConfig("momentum"), lr=1e-2, schedule="cosine", epochs=5))

    def __post_init__(self) -> None:
        super().__post_init__()
        if COMET not in self.models or len(self.p_k) < 2:
            raise UserError("sensitivity is that of comet to p_k: name it among the --models, and "
                            f"at least 2 levels of --p-k, got {', '.join(self.models)} and "
                            f"{', '.join(map(str, self.p_k))}")


# --- a cell -------------------------------------------------------------------------------------


def run_cell(spec: GridCell, place: Place) -> dict[str, Any]:
    """Train the cell's model, and compare the masks of some training examples if it is COMET."""
    result = grid.run_cell(spec, place)
    model, formats = spec.run.model, spec.run.training.formats
    if not (isinstance(model, MLPConfig) and isinstance(model.gate, Comet) and place.first):
        return result
    data = grid.load(spec, place)
    x = scaled(place.backend.asarray(data.x_train[:EXAMPLES]), data.scale, data.shift,
               formats.accumulate)
    _, V = read_weights(place.folder, model, place.backend)
    masks = model.gate.masks(x, V, model, EVALUATION)
    return result | {"difference": float(np.mean([
        difference(place.backend.to_host(unpacked(m, N)))
        for m, N in zip(masks, model.widths[1:-1], strict=True)]))}


def difference(m: np.ndarray) -> float:
    """Return in what share of the neurons the masks m (n, N) of two examples differ, on average.

    Of n (n - 1) ordered pairs, 2 a (n - a) differ in a neuron that is active in a examples.
    """
    n, active = len(m), m.sum(axis=0, dtype="int64")
    return float((2 * active * (n - active)).mean() / (n * (n - 1))) if n > 1 else 0.0


# --- what the files say -------------------------------------------------------------------------


class Case(NamedTuple):
    """What the finished cells of a data set and a width say of COMET.

    panel : Panel, its p_k aside. sign : of the metric, 1 if more of it is better.
    p_k : array (P,), the levels of which all seeds are finished. values, first : arrays (seeds,
    P), the best of the metric, and that of its first line after the start. differences : array
    (seeds, P), see `difference`. standard : array (seeds,), or without rows.
    """

    panel: Panel
    sign: int
    p_k: np.ndarray
    values: np.ndarray
    first: np.ndarray
    differences: np.ndarray
    standard: np.ndarray

    @property
    def best(self) -> int:
        """The number of the best level, over all seeds."""
        return int((self.sign * self.values.mean(axis=0)).argmax())

    @property
    def at_best(self) -> np.ndarray:
        """The values (seeds,) at the level that is best by the other seeds, if there are any."""
        seeds = np.arange(len(self.values))
        others = [self.values[seeds != seed] if len(seeds) > 1 else self.values for seed in seeds]
        best = [(self.sign * each.mean(axis=0)).argmax() for each in others]
        return np.asarray(self.values[seeds, best])

    @property
    def lead(self) -> Interval:
        """How far COMET with the best p_k is ahead of the standard model: NaN if that is missing.
        """
        standard = self.standard if len(self.standard) == len(self.values) else np.empty(0)
        return advantage(self.at_best[:len(standard)], standard, self.sign)

    def nearest(self, p_k: float) -> int:
        """Return the number of the level nearest to this one, by their ratio."""
        return int(np.abs(np.log(self.p_k / p_k)).argmin())

    def loss(self, chosen: Any) -> Interval:
        """Return what the `chosen` levels, one or one a seed, lose: points, or % more error."""
        taken = self.values[np.arange(len(self.values)), chosen]
        gain = advantage(taken, self.at_best, self.sign)
        return Interval(0.0 - gain.mean, gain.reach)  # no loss is 0, not -0

    @property
    def as_good(self) -> np.ndarray:
        """The levels whose loss cannot be told from 0, and the best."""
        losses = [self.loss(number) for number in range(len(self.p_k))]
        kept = [number == self.best or not loss.mean > loss.reach
                for number, loss in enumerate(losses)]
        return np.asarray(self.p_k[kept])


def cases(config: SensitivityConfig, out: Path) -> list[Case]:
    """Return the cases of which at least two levels are finished.

    Raises
    ------
    UserError
        If there are none, or their files are damaged.
    """
    found, made = read(config, out), []
    for first in grid.panels(config)[::len(config.p_k)]:
        metric = metric_of(config, first.dataset)
        panels = [first._replace(p_k=level) for level in config.p_k]
        seeds = [seed for seed in config.seed_numbers
                 if sum(seed in found[panel, COMET] for panel in panels) > 1]
        finished = [panel for panel in panels
                    if seeds and all(seed in found[panel, COMET] for seed in seeds)]
        if len(finished) < 2:
            continue

        def array(of: Callable[[Panel, int], float], seeds: Sequence[int] = seeds,
                  finished: Sequence[Panel] = finished) -> np.ndarray:
            return np.array([[of(panel, seed) for panel in finished] for seed in seeds])

        def value(panel: Panel, seed: int, sign: int = metric.sign) -> float:
            return found[panel, COMET][seed].best(sign)

        def early(panel: Panel, seed: int) -> float:
            curve = found[panel, COMET][seed].value
            return float(curve[min(1, len(curve) - 1)])

        def differing(panel: Panel, seed: int) -> float:
            return float(cell_of(config, panel, COMET, seed).result(
                out, lambda result: float(result["difference"])))

        standard = found.get((first, STANDARD), {})
        made.append(Case(first, metric.sign, np.array([panel.p_k for panel in finished]),
                         array(value), array(early), array(differing),
                         np.array([standard[seed].best(metric.sign) for seed in seeds
                                   if seed in standard])))
    if not made:
        raise UserError(f"{out} holds no two finished levels of p_k of one data set and width: run "
                        "sensitivity first")
    return made


Rule = Callable[[Case, Case], Any]  # the first case and another: its level, or one a seed
RULES: dict[str, Rule] = {
    "half": lambda first, case: case.nearest(0.5),
    "same p_k": lambda first, case: case.nearest(first.p_k[first.best]),
    "same k": lambda first, case: case.nearest(
        first.p_k[first.best] * first.panel.size / case.panel.size),
    "masks": lambda first, case: case.differences.argmax(axis=1),
    "trial": lambda first, case: (case.sign * case.first).argmax(axis=1),
}


def behind(rule: Rule, first: Case, judged: Sequence[Case]) -> int:
    """Return in how many cases a rule is behind the best p_k, with an interval without 0."""
    return sum(loss.mean > loss.reach for loss in (case.loss(rule(first, case)) for case in judged))


def choose(found: Sequence[Case]) -> tuple[str, list[Case], list[Case]]:
    """Return the rule that the first data set chooses, its cases, and those of the others."""
    first = found[0]
    own = [case for case in found if case.panel.dataset == first.panel.dataset]
    others = [case for case in found if case.panel.dataset != first.panel.dataset]
    return min(RULES, key=lambda name: behind(RULES[name], first, own)), own, others


def table(config: SensitivityConfig, out: Path) -> str:
    """Return for each case the best p_k and what each rule loses, and the answer."""
    found = cases(config, out)
    first = found[0]
    rows = [("case", "best p_k", "as good", "COMET", "standard", "COMET's lead", *RULES)]
    for case in found:
        rows.append((_name(case), f"{case.p_k[case.best]:g}",
                     f"{case.as_good.min():g}-{case.as_good.max():g}",
                     f"{case.at_best.mean():.3f}",
                     f"{case.standard.mean():.3f}" if len(case.standard) else "-",
                     "-" if np.isnan(case.lead.mean) else signed(case.lead),
                     *(_loss(case, rule(first, case)) for rule in RULES.values())))
    text = columns(rows) + (
        "\nthe best over the epochs, means over seeds with 95 % intervals; leads in points of "
        "accuracy or % less error; of the rules what they lose against the best p_k, in points or "
        f"% more error, and the p_k that they take; they are found on {_name(first)}")
    ahead = sum(case.lead.mean > case.lead.reach for case in found)
    best = [case.p_k[case.best] for case in found]
    text += (f"\nThe best p_k is {min(best):g} to {max(best):g}, and with it COMET is ahead of the "
             f"standard model in {ahead} of {len(found)} cases (interval without 0)")
    if times := step_times(config, found, read(config, out)):
        text += (f"; its step takes {np.median(times):.2f} times as long as the standard model's "
                 f"({min(times):.2f} to {max(times):.2f} by p_k and case)")
    name, own, others = choose(found)
    text += (f". Of the rules, {short_name(first.panel.dataset)} chooses \"{name}\", which is "
             f"behind the best p_k in {behind(RULES[name], first, own)} of its {len(own)} cases")
    if others:
        text += (f"; on the other data sets it is behind in "
                 f"{behind(RULES[name], first, others)} of {len(others)}, and loses at most "
                 + " and ".join(_worst(RULES[name], first, others, sign) for sign in (1, -1)
                                if any(case.sign == sign for case in others)))
    return text + "."


def step_times(config: SensitivityConfig, cases: Sequence[Case], found: Found) -> list[float]:
    """Return how many of the standard model's steps COMET's takes, of each case and level."""
    times = []
    for case in cases:
        standard = found.get((case.panel, STANDARD), {})
        for p_k in case.p_k:
            comet = found[case.panel._replace(p_k=float(p_k)), COMET]
            seeds = comet.keys() & standard.keys()
            one, other = (sum(seconds(curves[seed]) for seed in seeds)
                          for curves in (comet, standard))
            if other > 0:
                times.append(one / other)
    return times


def seconds(curve: Curve) -> float:
    """Return how long the steps took, without what comes before the first."""
    return float(curve.seconds[-1] - curve.seconds[0])


def _worst(rule: Rule, first: Case, others: Sequence[Case], sign: int) -> str:
    """Return the largest loss of a rule by one of the two kinds of metrics, in words."""
    losses = {_name(case): case.loss(rule(first, case)) for case in others if case.sign == sign}
    name = max(losses, key=lambda name: losses[name].mean)
    unit = "points of accuracy" if sign > 0 else "% more error"
    return f"{signed(losses[name])} {unit} ({name})"


def _name(case: Case) -> str:
    return f"{short_name(case.panel.dataset)} {case.panel.size}" + (
        f" {case.panel.kind}" if case.panel.kind != DEFAULT_F else "")


def _loss(case: Case, chosen: Any) -> str:
    taken = np.unique(case.p_k[chosen])
    return f"{signed(case.loss(chosen))} ({'/'.join(f'{p_k:g}' for p_k in taken)})"


def draw(config: SensitivityConfig, out: Path) -> list[Path]:
    """Draw the metric, and the time of a step and of the whole, against p_k."""
    plt = figures.pyplot()
    found, of_cells = cases(config, out), read(config, out)
    figure, panels = plt.subplots(2, len(found), figsize=(2.6 * len(found) + 0.6, 4.8),
                                  squeeze=False, sharex=True, height_ratios=(3, 2))
    for number, (case, axes, below) in enumerate(zip(found, *panels, strict=True)):
        _draw_models(axes, below, config, of_cells, case)
        bottom, top = axes.get_ylim()
        for row, (name, rule) in enumerate(RULES.items()):
            taken = np.unique(case.p_k[rule(found[0], case)])
            axes.plot(taken, [0.03 + 0.05 * row] * len(taken), "ov^sD"[row], color=f"C{row}",
                      transform=axes.get_xaxis_transform(), markersize=4, label=name,
                      linestyle="none")
        axes.set_ylim(bottom - 0.3 * (top - bottom), top) if case.sign > 0 else axes.set_ylim(
            bottom * (bottom / top) ** 0.3, top)
        axes.set_xscale("log")
        shown = [level for level in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
                 if case.p_k.min() <= level <= case.p_k.max()]
        axes.set_xticks(shown, [f"{level:g}" for level in shown])
        axes.set_xticks([], minor=True)
        axes.set_title(figures.plain(_name(case)))
        below.set_xlabel("$p_k$")
        if number == 0:
            below.set_ylabel("ms a step (dashed: with all\nthat comes before the first)")
        if number == 0 or case.panel.dataset != found[number - 1].panel.dataset:
            axes.set_ylabel(metric_of(config, case.panel.dataset).label)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(config.models) + len(RULES))
    training = config.training
    length = f"{training.epochs} epochs" if training.steps is None else f"{training.steps} steps"
    figure.suptitle(textwrap.fill(
        f"sensitivity: {config.layers} layers, {training.optimizer.name}, lr {training.lr:g}, "
        f"{training.schedule}, batch {training.batch}, {length}; "
        f"{'all' if config.train is None else f'{config.train:,}'} training examples; best over "
        f"the epochs, {len(config.seed_numbers)} seeds, band: lowest to highest; marks: the $p_k$ "
        f"that rules choose, found on {figures.plain(_name(found[0]))}",
        int(CHARACTERS_AN_INCH * figure.get_figwidth())), fontsize=8)
    return [figures.save(figure, out / "sensitivity.png")]


def _draw_models(axes: Any, below: Any, config: SensitivityConfig, found: Found,
                 case: Case) -> None:
    """Draw each model's best values, above, and the milliseconds of its steps."""
    steps = max(1, config.training.total(examples(config, case.panel.dataset)))
    for number, model in enumerate(config.models):
        color, label = figures.look(model, number)
        by_level: dict[float, Curves] = {
            p_k: curves for p_k in case.p_k
            if (curves := found[case.panel._replace(p_k=float(p_k)), model])}
        seeds = sorted(set.intersection(*map(set, by_level.values()))) if by_level else []
        if not seeds:
            continue
        of_seeds = [[curves[seed] for curves in by_level.values()] for seed in seeds]
        values = np.array([[curve.best(case.sign) for curve in row] for row in of_seeds])
        x = np.array(list(by_level))
        figures.seed_band(axes, x, values, color, label)
        ms = np.array([[1000 * seconds(curve) / steps for curve in row] for row in of_seeds])
        figures.seed_band(below, x, ms, color, label)
        whole = np.array([[1000 * curve.seconds[-1] / steps for curve in row] for row in of_seeds])
        figures.seed_band(below, x, whole.mean(axis=0, keepdims=True), color, label,
                          strong=False, dashed=True)
    below.set_ylim(bottom=0)
    if case.sign < 0:
        axes.set_yscale("log")


EXPERIMENT = Experiment(
    "sensitivity", SensitivityConfig,
    {"smoke": {"datasets": ("glyphs", "arm"), "widths": (20,), "p_k": (0.1, 0.5, 1.0), "seeds": 2,
               "train": 200, "validation": 200, "epochs": 1},
     "paper": {"datasets": ("cifar10", "sarcos", "cifar100", "svhn"), "widths": (500, 1000, 3000),
               "seeds": 5, "train": None, "validation": None, "epochs": 20}},
    lambda config: config.datasets, grid.cells, run_cell, draw, table)
