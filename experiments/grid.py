"""Learning curves over a grid: data sets x activations x widths x p_k x models x seeds.

`quickstart` (built-in data), Figures 4, 11 and 34 (CIFAR10) and Figure 33 (SARCOS) are such grids
and differ in their presets only.
"""

import functools
import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, unknown
from ..models.mlp import MLPConfig
from ..schedules import schedule
from ..settings import option
from . import datasets
from .datasets import Dataset
from .experiment import Cell, Place
from .tasks import task
from .tasks.base import Metric
from .training import RunConfig, TrainConfig, run_work, train
from .variants import VARIANTS, WITHOUT_P_K

DEFAULT_F = "softplus"
MOST_CELLS, MOST_LAYERS = 100_000, 1000  # far beyond any use: a slip of the finger


@dataclass(frozen=True)
class GridConfig:
    """The grid and the settings that its cells share; the defaults are the paper's where it says.

    The fields' help texts are those of the command line.
    """

    datasets: tuple[str, ...] = option(("glyphs", "arm"), "data sets, see: comet-np data; or files "
                                       "of your own: CSV, or npz with x and y")
    models: tuple[str, ...] = option(("standard", "comet", "centred"),
                                     f"models to compare, of {', '.join(VARIANTS)}")
    widths: tuple[int, ...] = option((500,), "neurons in each hidden layer, N")
    p_k: tuple[float, ...] = option((0.1, 0.5), "proportion of neurons that stay active")
    seeds: int | tuple[int, ...] = option(3, "number of seeds, or a list of them: of weights, data "
                                          "order and augmentation")
    train: int | None = option(None, "use only so many training examples")
    validation: int | None = option(None, "use only so many validation examples")
    target: str | None = option(None, "which torque to predict (arm: 0-6, sarcos: 21-27, all); of "
                                "a CSV file: which column, by name or number")
    task: str | None = option(None, "of a file of your own: classification or regression (by the "
                              "type of its targets if not given)")
    layers: int = option(4, "layers, L, the output included")
    activation: tuple[str, ...] = option((DEFAULT_F,), "activations f")
    ties: str = option("strict", "ties in the cap: strict (the paper), threshold, index")
    bias: bool = option(True, "biases in the backbone")
    training: TrainConfig = field(default=TrainConfig(lr=3e-2, epochs=8))

    def __post_init__(self) -> None:
        for name in ("datasets", "models", "widths", "p_k", "activation"):
            values, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if not values:
                raise UserError(f"{flag} needs at least one value")
            if len(set(values)) < len(values):
                layers = "; how many layers have such a width is said by --layers"
                raise UserError(f"{flag} compares values, each given once, got "
                                f"{', '.join(map(str, values))}{layers * (name == 'widths')}")
        if min(self.layers, *(1 if n is None else n for n in (self.train, self.validation))) < 1:
            raise UserError("a network needs at least 1 layer, and 1 example to train and to "
                            f"validate, got layers = {self.layers}, train = {self.train}, "
                            f"validation = {self.validation}")
        for name in self.models:
            if name not in VARIANTS:
                raise unknown("model", name, VARIANTS)
        for level in self.p_k:
            if not 0 < level <= 1:
                raise UserError("the proportion of neurons that stay active, --p-k, must be in "
                                f"(0, 1], got {level}")
        if len({short_name(name) for name in self.datasets}) < len(self.datasets):
            raise UserError("two of the data sets have one name, by which their cells are called: "
                            "give each once, or rename a file, got "
                            f"{', '.join(self.datasets)}")
        for name in self.datasets:
            image = datasets.sizes_of(name, self.target, self.task).image
            if self.training.augment is not None and image is None:
                raise UserError(f"--augment is for images, and {name} has none: leave it out, or "
                                "choose other --datasets")
            steps = self.training.epochs * math.ceil(
                examples(self, name) / self.training.examples_a_step)
            schedule(self.training.schedule, 0, steps, self.training.warmup)  # if it does not fit
        last = (self.seeds - 1,) if isinstance(self.seeds, int) else self.seeds
        if not last or min(last) < 0 or len(set(last)) < len(last):
            raise UserError("an experiment needs at least 1 seed, each 0 or more and given once, "
                            f"got seeds = {self.seeds}")
        seeds = self.seeds if isinstance(self.seeds, int) else len(self.seeds)
        count = seeds * math.prod(map(len, (self.datasets, self.widths, self.models, self.p_k,
                                            self.activation)))
        if count > MOST_CELLS or self.layers > MOST_LAYERS:
            raise UserError(f"that is a grid of up to {count:,} networks of {self.layers:,} layers "
                            f"each, of which {MOST_CELLS:,} and {MOST_LAYERS:,} can be: choose "
                            "fewer --seeds, --widths, --p-k or --layers")
        cells(self)  # bad settings are refused before the first cell runs

    @property
    def seed_numbers(self) -> Sequence[int]:
        """The seeds: those that are listed, or as many as are asked for, from 0."""
        return range(self.seeds) if isinstance(self.seeds, int) else self.seeds


class Panel(NamedTuple):
    """A panel of the figure: what its models share."""

    dataset: str
    activation: str
    width: int
    p_k: float


@dataclass(frozen=True)
class DataCell:
    """What a cell says of its data, see `load`."""

    dataset: str
    train: int | None
    validation: int | None
    target: str | None
    task: str | None
    digest: str


@dataclass(frozen=True)
class GridCell(DataCell):
    """One cell: one model trained on one data set from one seed."""

    run: RunConfig


def cells(config: GridConfig) -> list[Cell]:
    """Return the cells, seed by seed, so that a first comparison of all models comes early."""
    return _cells(config, tuple(datasets.sizes_of(name, config.target, config.task)
                                for name in config.datasets))


@functools.cache
def _cells(config: GridConfig, sizes: tuple[datasets.Sizes, ...]) -> list[Cell]:
    """Return the cells for data sets of these sizes: those of a file may change."""
    found = {cell.name: cell for seed in config.seed_numbers for panel in panels(config)
             for cell in (cell_of(config, panel, model, seed) for model in config.models)}
    return list(found.values())  # a model without p_k has one cell for all of them


def panels(config: GridConfig) -> list[Panel]:
    """Return the panels, in order."""
    return list(itertools.starmap(Panel, itertools.product(
        config.datasets, config.activation, config.widths, config.p_k)))


def cell_of(config: GridConfig, panel: Panel, model: str, seed: int) -> Cell:
    """Return the cell of one model in a panel."""
    dataset, activation, width, p_k = panel
    sizes = datasets.sizes_of(dataset, config.target, config.task)
    standard = MLPConfig((sizes.inputs, *[width] * (config.layers - 1), sizes.outputs), activation,
                         gate=None, bias=config.bias)
    training = config.training
    if "l1" in config.models and model != "l1":  # --l1 is then the penalty of that model
        training = replace(training, optimizer=replace(training.optimizer, l1=0.0))
    run = VARIANTS[model](RunConfig(standard, training, seed), p_k,
                          config.ties)  # type: ignore[arg-type]
    name = "-".join([short_name(dataset), model, f"N{width}",
                     *[f"pk{p_k}"] * (model not in WITHOUT_P_K),
                     *[activation] * (activation != DEFAULT_F), f"seed{seed}"])
    return Cell(name,
                GridCell(dataset, config.train, config.validation, config.target, config.task,
                         sizes.digest, run),
                run_work(run, examples(config, dataset)))


def examples(config: Any, dataset: str) -> int:
    """Return how many examples of a data set are trained on."""
    sizes = datasets.sizes_of(dataset, config.target, config.task)
    return min(config.train or sizes.examples, sizes.examples)


def metric_of(config: Any, dataset: str) -> Metric:
    """Return the metric by which models are compared on a data set."""
    return task(datasets.sizes_of(dataset, config.target, config.task).task).metric


def short_name(dataset: str) -> str:
    """Return what a data set is called in the names of cells and in figures: of a file its stem."""
    return Path(dataset).stem if datasets.is_file_name(dataset) else dataset


_loading = threading.Lock()


@functools.lru_cache(maxsize=2)
def _load(name: str, folder: str | None, train: int | None, validation: int | None,
          target: str | None, task: str | None, digest: str, stamp: Any) -> Dataset:
    data = datasets.load(name, folder, target=target, task=task)
    if digest and data.digest != digest:
        raise UserError(f"{name} was changed after this run had begun: give the same command again")
    return data.first(train, validation)


def load(spec: Any, place: Place) -> Dataset:
    """Return the data of a cell, whose spec names them as a `GridCell` does; say what is odd."""
    with _loading:  # once, though the threads of a GPU begin together
        data: Dataset = _load(spec.dataset, place.data, spec.train, spec.validation, spec.target,
                              spec.task, spec.digest, datasets.stamp(spec.dataset))
    if data.notice:
        place.progress.message(f"{spec.dataset}: {data.notice}")
    return data


def run_cell(spec: GridCell, place: Place) -> dict[str, Any]:
    """Train the cell's model."""
    return train(spec.run, load(spec, place), place.folder, place.backend, place.progress,
                 place.stop)
