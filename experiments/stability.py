"""How much of the spread of COMET's accuracy comes from the random draw of its routing weights?

A run draws W and b, the order of the data, and V. Here V has a seed apart: many draws of V for one
backbone (W, b and the order of the data fixed), and many backbones for one draw of V. As V and the
backbone may matter only together, some of each are also crossed, each with each, where

``accuracy_ij = mean + backbone_i + routing_j + pair_ij``

and the variance of each part is estimated, with its share of the three: Searle, Casella and
McCulloch, 'Variance Components', 1992. Training is a function of both seeds, so that nothing but
the pair is left; it holds what the finite set of images that is measured on adds, too. The standard
model, from the same backbones, says how far accuracies spread without any routing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy.special import chdtri, fdtri

from ..errors import UserError
from ..gates import Comet
from ..models.mlp import MLPConfig
from ..optim import OptimizerConfig
from ..rng import stream
from ..schedules import schedule
from ..settings import option
from . import figures
from .experiment import Cell, Experiment, columns
from .grid import DEFAULT_F, GridCell, examples, metric_of, run_cell, short_name, sizes_of
from .intervals import LEVEL
from .training import RunConfig, TrainConfig, run_memory, run_work

PIVOTS = 100_000  # draws of the distribution of which an interval of a share is made
TAILS = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
STANDARD = "standard"
Seeds = tuple[int, int | None]  # of the backbone, and of V; None: the standard model


@dataclass(frozen=True)
class StabilityConfig:
    """Settings; the defaults are small networks on a part of CIFAR10."""

    dataset: str = option("cifar10", "what to classify, see: comet-np data")
    draws: int = option(20, "draws of V for one backbone, and backbones for one draw of V")
    crossed: int = option(8, "so many of either are also paired each with each; 0: none")
    p_k: float = option(0.5, "proportion of neurons that stay active")
    width: int = option(200, "neurons in each hidden layer, N")
    layers: int = option(4, "layers, L, the output included")
    activation: str = option(DEFAULT_F, "activation f")
    train: int | None = option(4000, "use only so many training examples")
    validation: int | None = option(5000, "use only so many validation examples")
    training: TrainConfig = field(default=TrainConfig(
        OptimizerConfig("momentum"), lr=3e-2, schedule="cosine", epochs=4))

    target: ClassVar[None] = None
    task: ClassVar[None] = None

    def __post_init__(self) -> None:
        if metric_of(self, self.dataset).key != "accuracy":
            raise UserError("stability is of accuracies: choose a --dataset to classify, got "
                            f"{self.dataset}")
        if self.draws < 2 or self.crossed not in (0, *range(2, self.draws + 1)):
            raise UserError("a spread needs at least 2 draws, and --crossed is 0 or from 2 to as "
                            f"many, got draws = {self.draws}, crossed = {self.crossed}")
        if self.layers < 2 or min(1 if n is None else n for n in (self.train,
                                                                  self.validation)) < 1:
            raise UserError("a network needs at least 2 layers to have a routing, and 1 example to "
                            f"train and to validate, got layers = {self.layers}, train = "
                            f"{self.train}, validation = {self.validation}")
        steps = self.training.total(examples(self, self.dataset))
        schedule(self.training.schedule, 0, steps, self.training.warmup)  # if it does not fit
        cells(self)  # bad settings are refused before the first cell runs


def pairs(config: StabilityConfig) -> list[Seeds]:
    """Return the seeds of all networks: the arms, seed by seed, then what is left of the block."""
    arms: list[Seeds] = [seeds for n in range(config.draws)
                         for seeds in ((0, n), (n, 0), (n, None))]
    block = [(i, j) for i in range(config.crossed) for j in range(config.crossed)]
    return list(dict.fromkeys([*arms, *block]))


def cells(config: StabilityConfig) -> list[Cell]:
    """Return the cells."""
    return [cell_of(config, seeds) for seeds in pairs(config)]


def cell_of(config: StabilityConfig, seeds: Seeds) -> Cell:
    """Return the cell of a backbone and a draw of V."""
    backbone, routing = seeds
    sizes = sizes_of(config, config.dataset)
    model = MLPConfig((sizes.inputs, *[config.width] * (config.layers - 1), sizes.outputs),
                      config.activation, None if routing is None else Comet(config.p_k))
    run = RunConfig(model, config.training, backbone, routing)
    kind = STANDARD if routing is None else f"comet-pk{config.p_k}-V{routing}"
    return Cell(f"{short_name(config.dataset)}-N{config.width}-{kind}-seed{backbone}",
                GridCell(config.dataset, config.train, config.validation, None, None, sizes.digest,
                         run),
                run_work(run, examples(config, config.dataset)), run_memory(run))


# --- what is estimated --------------------------------------------------------------------------


class Range(NamedTuple):
    """An estimate, and its 95 % interval."""

    value: float
    low: float
    high: float


def deviation(values: Sequence[float]) -> Range:
    """Return the standard deviation of normal values (n,), by chi-square.

    ``s sqrt((n - 1) / chi2_{n-1})`` at both tails
    """
    s, free = float(np.std(values, ddof=1)), len(values) - 1
    return Range(s, *(s * np.sqrt(free / chdtri(free, TAILS))))


def ratio(one: Sequence[float], other: Sequence[float]) -> Range:
    """Return the ratio of the variances of two sets of normal values, by the F distribution."""
    value = float(np.var(one, ddof=1) / np.var(other, ddof=1))
    of_chance = fdtri(len(one) - 1, len(other) - 1, TAILS[::-1])
    return Range(value, *(value / of_chance))


class Shares(NamedTuple):
    """Of the variance of a crossed design: of the backbones, the draws of V, and the pairs."""

    backbone: Range
    routing: Range
    pair: Range


def shares(y: np.ndarray) -> Shares:
    """Return the shares of the variance of y (backbones, draws of V): a two-way random model.

    With sums of squares S of I rows, J columns and the rest, on n = I - 1, J - 1 and (I - 1)(J - 1)
    degrees of freedom: ``pair = S_pair / n``, ``rows = (S_rows / n - pair) / J``, columns likewise.
    For the interval draws from chi-square with n degrees of freedom stand in place of each n
    (generalised pivotal quantities: Weerahandi, 'Generalized confidence intervals', 1993). A
    variance below 0 counts as 0.
    """
    n_rows, n_cols = y.shape
    rows, cols = y.mean(axis=1, keepdims=True), y.mean(axis=0, keepdims=True)
    free = np.array([n_rows - 1, n_cols - 1, (n_rows - 1) * (n_cols - 1)])
    S = np.array([y.size * rows.var(), y.size * cols.var(),
                  ((y - rows - cols + y.mean()) ** 2).sum()])

    def parts(n: np.ndarray) -> np.ndarray:
        """Return the shares (..., 3) with these in place of the degrees of freedom."""
        of_rows, of_cols, pair = np.moveaxis(S / n, -1, 0)
        found = np.stack([np.maximum(of_rows - pair, 0) / n_cols,
                          np.maximum(of_cols - pair, 0) / n_rows, pair], axis=-1)
        result: np.ndarray = found / found.sum(axis=-1, keepdims=True)
        return result

    drawn = parts(stream(0, "pivots").chisquare(free, size=(PIVOTS, 3)))
    return Shares(*(Range(float(value), *map(float, bounds)) for value, bounds in
                    zip(parts(free), np.quantile(drawn, TAILS, axis=0).T, strict=True)))


# --- what the files say -------------------------------------------------------------------------


class Found(NamedTuple):
    """Validation accuracies after the last epoch, in %.

    routing : of draws of V for one backbone. backbone : of backbones for one draw of V. standard :
    of the standard model. block : (backbones, draws of V); None until it is whole, or if all are
    equal. asked : how many networks each of the first three has when all are finished.
    """

    routing: list[float]
    backbone: list[float]
    standard: list[float]
    block: np.ndarray | None
    asked: int


def read(config: StabilityConfig, out: Path) -> Found:
    """Return the accuracies of all finished cells.

    Raises
    ------
    UserError
        If there are none, or their files are damaged.
    """
    def of_result(result: dict[str, Any]) -> float:
        return 100 * float(result["last"]["val_accuracy"])

    by_seeds = {seeds: value for seeds in pairs(config)
                if (value := cell_of(config, seeds).result(out, of_result)) is not None}
    if not by_seeds:
        raise UserError(f"{out} holds no finished cell of stability: run it first")

    def arm(seeds: Callable[[int], Seeds]) -> list[float]:
        return [by_seeds[seeds(n)] for n in range(config.draws) if seeds(n) in by_seeds]

    block = [[by_seeds.get((i, j), np.nan) for j in range(config.crossed)]
             for i in range(config.crossed)]
    whole = config.crossed > 0 and not np.isnan(block).any() and np.ptp(block) > 0
    return Found(arm(lambda n: (0, n)), arm(lambda n: (n, 0)), arm(lambda n: (n, None)),
                 np.array(block) if whole else None, config.draws)


ARMS = {"routing": "V, one backbone", "backbone": "W, b, data order, one V",
        "standard": "standard, W, b, data order"}


def table(config: StabilityConfig, out: Path) -> str:
    """Return the spreads, their ratios, the shares of the variance, and the answer."""
    found = read(config, out)
    rows = [("what differs", "networks", "mean accuracy", "standard deviation", "95 % interval",
             "range")]
    for arm, name in ARMS.items():
        values = getattr(found, arm)
        s = f"{deviation(values).value:.2f}" if len(values) > 1 else "-"
        bounds = "{1:.2f}-{2:.2f}".format(*deviation(values)) if len(values) > 1 else "-"
        rows.append((name, f"{len(values)}" + f" of {found.asked}" * (len(values) < found.asked),
                     f"{np.mean(values):.2f}" if values else "-", s, bounds,
                     f"{min(values):.2f}-{max(values):.2f}" if values else "-"))
    text = columns(rows) + (f"\n{short_name(config.dataset)}, N = {config.width}, p_k = "
                            f"{config.p_k:g}: validation accuracies after the last epoch in %, "
                            "deviations in points")
    if len(set(found.routing)) > 1 and len(set(found.backbone)) > 1:
        text += ("\nThe draw of V alone makes {:.2f} (95 %: {:.2f}-{:.2f}) of the variance that "
                 "the backbone alone makes".format(*ratio(found.routing, found.backbone)))
        if len(set(found.standard)) > 1:
            text += (", and that makes {:.2f} ({:.2f}-{:.2f}) of the standard model's".format(
                *ratio(found.backbone, found.standard)))
        text += "."
    if found.block is not None:
        parts = shares(found.block)
        text += (f"\nOf the variance of {config.crossed} backbones x {config.crossed} draws of V, "
                 "the draw of V makes {}, the backbone {}, and {} belongs to the pair.".format(
                     *map(_percent, (parts.routing, parts.backbone, parts.pair))))
    return text


def _percent(share: Range) -> str:
    return "{:.0f} % ({:.0f}-{:.0f})".format(*(100 * value for value in share))


def draw(config: StabilityConfig, out: Path) -> list[Path]:
    """Draw the accuracies of each arm, the block, and the shares of its variance."""
    plt = figures.pyplot()
    found = read(config, out)
    colors = dict(zip(ARMS, ("#d9622b", "#2f9c95", figures.LOOKS["standard"][0]), strict=True))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.3), width_ratios=(3, 3, 2))
    for place, arm in enumerate(ARMS):
        values = getattr(found, arm)
        left.scatter(place + np.linspace(-0.3, 0.3, len(values)), values, s=12, color=colors[arm])
        if len(values) > 1:
            left.errorbar(place, np.mean(values), np.std(values, ddof=1), color="black", capsize=4,
                          linewidth=1, marker="_")
    left.set_xticks(range(len(ARMS)), [",\n".join(name.rsplit(", ", 1)) for name in ARMS.values()])
    left.set_ylabel("validation accuracy, %")
    left.set_title("each seed; black: mean and standard deviation")
    if found.block is None:
        middle.set_axis_off()
        right.set_axis_off()
    else:
        deviations = found.block - found.block.mean()
        most = np.abs(deviations).max()
        shown = middle.imshow(deviations, cmap="PuOr_r", vmin=-most, vmax=most)
        middle.grid(False)
        middle.set_xlabel("draw of V")
        middle.set_ylabel("backbone")
        middle.set_title("accuracy minus the mean, points")
        figure.colorbar(shown, ax=middle)
        parts = shares(found.block)
        for place, (name, color) in enumerate((
                ("routing", colors["routing"]), ("backbone", colors["backbone"]),
                ("pair", "0.6"))):
            value, low, high = (100 * number for number in getattr(parts, name))
            right.bar(place, value, color=color)
            right.plot([place, place], [low, high], color="black", linewidth=1)
        right.set_xticks(range(3), ["V", "backbone", "pair"])
        right.set_ylim(0, 100)
        right.set_ylabel("share of the variance, %, with its 95 % interval")
        right.set_title("of the crossed design")
    training = config.training
    length = f"{training.epochs} epochs" if training.steps is None else f"{training.steps} steps"
    figure.suptitle(
        f"stability: {figures.plain(short_name(config.dataset))}, "
        f"{examples(config, config.dataset):,} training examples, {config.layers} layers, "
        f"N = {config.width}, $p_k$ = {config.p_k:g}, {config.activation}; "
        f"{training.optimizer.name}, lr {training.lr:g}, {training.schedule}, batch "
        f"{training.batch}, {length}", fontsize=8)
    return [figures.save(figure, out / "stability.png")]


EXPERIMENT = Experiment(
    "stability", StabilityConfig,
    {"smoke": {"dataset": "glyphs", "draws": 3, "crossed": 2, "width": 20, "train": 200,
               "validation": 200, "epochs": 1},
     "paper": {"width": 1000, "draws": 30, "crossed": 10, "train": None, "validation": None,
               "epochs": 20}},
    lambda config: (config.dataset,), cells, run_cell, draw, table)
