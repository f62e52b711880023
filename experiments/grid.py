"""Learning curves over a grid: data sets x widths x p_k x models x seeds.

`quickstart` (built-in data), Figures 4 and 11 (CIFAR10) and Figure 33 (SARCOS) are such grids and
differ in their presets only.
"""

import functools
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, unknown
from ..models.mlp import MLPConfig
from ..optim import OptimizerConfig
from . import datasets, figures
from .experiment import Cell, Experiment, Place, columns, damaged, option, read_lines
from .training import TrainConfig, Trainer, step_work

# The models compared: what each makes of the grid's p_k and activation. Two are controls of what a
# mask does besides routing: "scaled" is the standard model with its hidden activations multiplied
# by p_k, as a mask does on average; "centred" the standard model with f(a) - f(0), without the
# positive mean of softplus.
MODELS: dict[str, Callable[[float, str], tuple[float | None, str]]] = {
    "standard": lambda p_k, f: (None, f),
    "comet": lambda p_k, f: (p_k, f),
    "scaled": lambda p_k, f: (None, f"{p_k}*{f}"),
    "centred": lambda p_k, f: (None, f"centred_{f}"),
}


Curves = dict[int, np.ndarray]  # by seed, (T,)
# Settings that a figure's title names where they are not the default.
UNUSUAL = ("layers", "activation", "ties", "bias", "momentum", "weight_decay", "clip_norm",
           "clip_value", "schedule", "warmup", "augment", "precision", "target")
CHARACTERS_AN_INCH = 16  # of a title


@dataclass(frozen=True)
class GridSpec:
    """One cell: one model trained on one data set, from one seed or from several side by side."""

    dataset: str
    train: int | None
    target: int | None
    model: str
    width: int
    p_k: float | None
    seeds: tuple[int, ...]
    layers: int
    activation: str
    ties: str
    bias: bool
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    clip_norm: float | None
    clip_value: float | None
    schedule: str
    warmup: int
    batch: int
    epochs: int
    augment: str | None
    precision: str

    def configure(self, inputs: int, outputs: int) -> TrainConfig:
        """Return the training run for a data set with so many inputs and outputs."""
        widths = (inputs, *[self.width] * (self.layers - 1), outputs)
        return TrainConfig(
            MLPConfig(widths, self.activation, self.p_k, self.ties, self.bias),  # type: ignore[arg-type]
            OptimizerConfig(self.optimizer, momentum=self.momentum,
                            weight_decay=self.weight_decay, clip_norm=self.clip_norm,
                            clip_value=self.clip_value),
            self.lr, self.schedule, self.warmup, self.batch, self.epochs, self.seeds, self.augment,
            self.precision)


@dataclass(frozen=True)
class GridConfig:
    """The grid and the settings that its cells share; the defaults are the paper's where it says.

    The fields' help texts are those of the command line.
    """

    datasets: tuple[str, ...] = option(("glyphs", "arm"), "data sets, see: comet-np data")
    models: tuple[str, ...] = option(("standard", "comet", "centred"), "models to compare: "
                                     "standard, comet, and the controls centred and scaled")
    widths: tuple[int, ...] = option((500,), "neurons in each hidden layer, N")
    p_k: tuple[float, ...] = option((0.1, 0.5), "proportion of neurons that stay active")
    seeds: int = option(3, "number of seeds: of weights, data order and augmentation")
    epochs: int = option(8, "passes over the training set")
    train: int | None = option(None, "use only so many training examples")
    target: int | None = option(None, "which torque to predict (arm: 0-6, sarcos: 21-27)")
    layers: int = option(4, "layers, L, the output included")
    activation: str = option("softplus", "activation f")
    ties: str = option("strict", "ties in the cap: strict (the paper), threshold, index")
    bias: bool = option(True, "biases in the backbone")
    optimizer: str = option("sgd", "sgd, momentum, adam or adamw")
    lr: float = option(3e-2, "highest learning rate")
    momentum: float = option(0.9, "for --optimizer momentum")
    weight_decay: float = option(0.0, "weight decay")
    clip_norm: float | None = option(None, "clip the gradient to this norm")
    clip_value: float | None = option(None, "clip each gradient element to this value")
    schedule: str = option("constant", "constant, cosine or warmup_cosine")
    warmup: int = option(0, "steps of warm-up, for warmup_cosine")
    batch: int = option(32, "examples a step")
    augment: str | None = option(None, "augment images: flip, crop or crop_flip")
    precision: str = option("float32", "float32, float64, or tf32 (a GPU's tensor cores)")
    together: int = option(200, "train all seeds of networks up to this width side by side, as "
                           "arrays with one axis more: faster where cells are no fewer than "
                           "cores; not with --clip-norm; other --seeds train them anew (0: one "
                           "by one)")

    def __post_init__(self) -> None:
        for field in ("datasets", "models", "widths", "p_k"):
            if not getattr(self, field):
                raise UserError(f"--{field.replace('_', '-')} needs at least one value")
        if self.layers < 1 or (self.train is not None and self.train < 1):
            raise UserError("a network needs at least 1 layer and 1 training example, got "
                            f"layers = {self.layers}, train = {self.train}")
        for name in self.models:
            if name not in MODELS:
                raise unknown("model", name, MODELS)
        for name in self.datasets:
            if name not in datasets.DATASETS:
                raise unknown("data set", name, datasets.DATASETS)
            if self.augment is not None and name in datasets.REGRESSION:
                raise UserError(f"--augment is for images, and {name} has none: leave it out, or "
                                "choose other --datasets")
            if self.target is not None and name not in datasets.REGRESSION:
                raise UserError(f"--target is for data sets with several torques, and {name} has "
                                "classes: leave it out, or choose other --datasets")
        if self.seeds < 1:
            raise UserError(f"an experiment needs at least 1 seed, got {self.seeds}")
        cells(self)  # bad settings are refused before the first cell runs


@functools.cache
def cells(config: GridConfig) -> list[Cell]:
    """Return the cells, seed by seed, so that a first comparison of all models comes early."""
    shared = {field.name: getattr(config, field.name) for field in fields(GridSpec)
              if hasattr(config, field.name) and field.name not in ("p_k", "activation", "seeds")}
    found: dict[str, Cell] = {}
    for seed in range(config.seeds):
        for dataset in config.datasets:
            for width in config.widths:
                together = width <= config.together and config.clip_norm is None
                seeds = tuple(range(config.seeds)) if together else (seed,)
                for model in config.models:
                    for level in config.p_k:
                        p_k, activation = MODELS[model](level, config.activation)
                        spec = GridSpec(dataset=dataset, model=model, width=width, p_k=p_k,
                                        activation=activation, seeds=seeds, **shared)
                        cell = _cell(spec)
                        found[cell.name] = cell  # the standard model has one cell for all p_k
    return list(found.values())


def _cell(spec: GridSpec) -> Cell:
    inputs, outputs, examples = datasets.SIZES[spec.dataset]
    level = "" if spec.p_k is None else f"-pk{spec.p_k}"
    if spec.model == "scaled":
        level = "-" + spec.activation.replace("*", "")
    config = spec.configure(inputs, outputs)
    steps = spec.epochs * min(spec.train or examples, examples) / spec.batch
    seeds = "-".join(map(str, sorted({spec.seeds[0], spec.seeds[-1]})))
    return Cell(f"{spec.dataset}-{spec.model}-N{spec.width}{level}-seed{seeds}", spec,
                step_work(config) * steps)


@functools.lru_cache(maxsize=2)
def _load(name: str, folder: str | None, train: int | None, target: int | None) -> Any:
    options = {} if target is None else {"target": target}
    return datasets.load(name, folder, train=train, **options)


def run_cell(spec: GridSpec, place: Place) -> dict[str, Any]:
    """Train the cell's model."""
    data = _load(spec.dataset, place.data, spec.train, spec.target)
    if data.notice:
        place.progress.message(f"{spec.dataset}: {data.notice}")
    config = spec.configure(data.x_train.shape[1], data.outputs)
    return Trainer(config, data, place.folder, place.backend, place.progress).run()


# --- figure and table -------------------------------------------------------------------------


def _metric(dataset: str) -> tuple[str, str, int]:
    """Return the metric's key, its name on an axis, and the sign that makes more of it better."""
    if dataset in datasets.REGRESSION:
        return "val_loss", "validation MSE (fraction of variance)", -1
    return "val_accuracy", "validation accuracy", 1


def _curves(config: GridConfig, out: Path, dataset: str, width: int, model: str,
            level: float) -> tuple[np.ndarray, Curves, int]:
    """Return epochs (T,), the metric's curve of each finished seed, and the parameter count."""
    key, (p_k, activation) = _metric(dataset)[0], MODELS[model](level, config.activation)
    curves: Curves = {}
    epochs, count = np.zeros(0), 0
    for cell in cells(config):
        spec = cell.spec
        if ((spec.dataset, spec.width, spec.model, spec.p_k, spec.activation)
                == (dataset, width, model, p_k, activation) and (result := cell.result(out))):
            lines = read_lines(cell.folder(out) / "metrics.jsonl")
            count = result["parameters"]
            for seed in spec.seeds:
                own = [line for line in lines if line.get("seed") == seed]
                if len(own) != spec.epochs + 1 or any(key not in line for line in own):
                    raise damaged(cell.folder(out) / "metrics.jsonl")
                epochs = np.array([line["epoch"] for line in own])
                curves[seed] = np.array([line[key] for line in own])
    return epochs, curves, count


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
    if not any(cell.result(out) for cell in cells(config)):
        raise UserError(f"{out} holds no finished cell of {name}: run it first")
    rows = [(dataset, width) for dataset in config.datasets for width in config.widths]
    figure = plt.figure(figsize=(2.6 * (len(config.p_k) + 1), 3.0 * len(rows) + 0.3))
    grid = figure.add_gridspec(len(rows), len(config.p_k) + 1)
    for i, (dataset, width) in enumerate(rows):
        _, label, sign = _metric(dataset)
        for j, level in enumerate(config.p_k):
            axes = figure.add_subplot(grid[i, j])
            for model in config.models:
                epochs, curves, count = _curves(config, out, dataset, width, model, level)
                if len(curves):
                    figures.seed_band(axes, epochs, np.array(list(curves.values())),
                                      figures.COLORS[model],
                                      f"{figures.LABELS[model]}: {best(curves, sign).mean():.3f} "
                                      f"({count / 1e6:.2g} M)")
            axes.set_title(f"{dataset}, N = {width}, $p_k$ = {level:g}")
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
    defaults = {field.name: field.default for field in fields(config)}
    others = "".join(f", {name.replace('_', ' ')} {getattr(config, name)}" for name in UNUSUAL
                     if getattr(config, name) != defaults[name])
    notices = {cell.spec.dataset: result["notice"] for cell in cells(config)
               if (result := cell.result(out)) and result["notice"]}
    characters = int(CHARACTERS_AN_INCH * figure.get_figwidth())
    figure.suptitle("\n".join([
        textwrap.fill(f"{name}: {config.optimizer} lr {config.lr:g}, batch {config.batch}, "
                      f"{config.epochs} epochs, {config.seeds} seeds (band: lowest to highest)"
                      f"{examples}{others}", characters),
        *(textwrap.fill(f"{dataset}: {notice}", characters)
          for dataset, notice in notices.items())]), fontsize=8)
    return figures.save(figure, out / f"{name}.png")


def _draw_advantage(axes: Any, config: GridConfig, out: Path, dataset: str) -> None:
    sign = _metric(dataset)[2]
    table = np.array([[_advantage_at(config, out, dataset, width, level) for level in config.p_k]
                      for width in config.widths])
    largest = min(np.nanmax(np.abs(table)), 100) if np.isfinite(table).any() else 1.0
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
    axes.set_title(f"{dataset}: COMET's lead at its best,\n"
                   + ("points of accuracy" if sign > 0 else "% less error"))


def _advantage_at(config: GridConfig, out: Path, dataset: str, width: int, level: float) -> float:
    standard = _curves(config, out, dataset, width, "standard", level)[1]
    comet = _curves(config, out, dataset, width, "comet", level)[1]
    return advantage(standard, comet, _metric(dataset)[2])


def table(config: GridConfig, out: Path) -> str:
    """Return a row for each data set, width and p_k: best values, lead, seeds won, time."""
    others = [model for model in config.models if model not in ("standard", "comet")]
    rows = [("data set", "N", "p_k", "standard", "COMET", *others, "COMET's lead", "seeds won")]
    for dataset in config.datasets:
        _, _, sign = _metric(dataset)
        for width in config.widths:
            for level in config.p_k:
                curves = {model: _curves(config, out, dataset, width, model, level)[1]
                          for model in ("standard", "comet", *others)}
                standard, comet = curves["standard"], curves["comet"]
                rows.append((dataset, str(width), f"{level:g}",
                             *(_spread(values, sign) for values in curves.values()),
                             _lead(advantage(standard, comet, sign), sign),
                             _won(standard, comet, sign)))
    mixed = [f"\nthe finished cells of {dataset} were trained on different data, as its files were "
             "changed in between: compare within one --out that was begun afresh"
             for dataset in config.datasets
             if len({result["data"] for cell in cells(config) if cell.spec.dataset == dataset
                     and (result := cell.result(out))}) > 1]
    return "".join([columns(rows), "\nbest on the validation split, mean over seeds (lowest-"
                    "highest); accuracy, or MSE as a fraction of the target's variance", *mixed])


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
    return f"{abs(value):.1f} % {'less' if value > 0 else 'more'} error"


def _won(standard: Curves, comet: Curves, sign: int) -> str:
    seeds = sorted(standard.keys() & comet.keys())
    if not seeds:
        return "-"
    won = (sign * best(comet, sign, seeds) > sign * best(standard, sign, seeds)).sum()
    return f"{won} of {len(seeds)}"


def grid(name: str, title: str, **presets: dict[str, Any]) -> Experiment:
    """Return a grid experiment; `presets` gives what each preset changes."""
    return Experiment(name, title, GridConfig, presets, cells, run_cell,
                      lambda config, out: draw(config, out, name), table)


QUICKSTART = grid(
    "quickstart", "COMET against the standard MLP on built-in data (images, robot arm)",
    smoke={"widths": (100,), "p_k": (0.5,), "seeds": 2, "epochs": 2, "train": 1000},
    laptop={},
    paper={"widths": (1000,), "seeds": 10, "epochs": 20},
)

_PAPER_LEVELS = {"p_k": (0.1, 0.5, 0.9), "seeds": 3}
_PAPER_MODELS = {"models": ("standard", "comet")}

FIG4 = grid(
    "fig4", "Figure 4: CIFAR10, 4-layer MLP, SGD lr 1e-4",
    smoke={"datasets": ("glyphs",), "widths": (50, 100), "p_k": (0.1, 0.5), "seeds": 1,
           "epochs": 1, "train": 500, "lr": 1e-3},
    laptop={"datasets": ("cifar10",), "widths": (100, 500, 1000), "lr": 1e-3, "epochs": 10,
            "train": 10_000, **_PAPER_LEVELS},
    paper={"datasets": ("cifar10",), "widths": (100, 500, 1000, 3000), "lr": 1e-4, "epochs": 100,
           **_PAPER_LEVELS, **_PAPER_MODELS},
)

FIG11 = grid(
    "fig11", "Figure 11: CIFAR10, 4-layer MLP, SGD lr 1e-3",
    smoke={"datasets": ("glyphs",), "widths": (50, 100), "p_k": (0.1, 0.5), "seeds": 1,
           "epochs": 1, "train": 500},
    laptop={"datasets": ("cifar10",), "widths": (100, 500, 1000), "lr": 1e-2, "epochs": 10,
            "train": 10_000, **_PAPER_LEVELS},
    paper={"datasets": ("cifar10",), "widths": (100, 500, 1000, 3000, 9000), "lr": 1e-3,
           "epochs": 100, **_PAPER_LEVELS, **_PAPER_MODELS},
)

FIG33 = grid(
    "fig33", "Figure 33: SARCOS, 4-layer MLP, SGD lr 1e-2",
    smoke={"datasets": ("arm",), "widths": (50, 100), "p_k": (0.1, 0.5), "seeds": 1, "epochs": 1,
           "train": 500},
    laptop={"datasets": ("sarcos",), "widths": (100, 500, 1000), "lr": 1e-2, "epochs": 20,
            **_PAPER_LEVELS},
    paper={"datasets": ("sarcos",), "widths": (100, 500, 1000), "lr": 1e-2, "epochs": 50,
           **_PAPER_LEVELS, **_PAPER_MODELS},
)
