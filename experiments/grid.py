"""Learning curves over a grid: data sets x widths x p_k x models x seeds.

`quickstart` (built-in data), Figures 4 and 11 (CIFAR10) and Figure 33 (SARCOS) are such grids and
differ in their presets only.
"""

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown
from ..models.mlp import MLPConfig
from ..schedules import schedule
from ..settings import option
from . import datasets
from .experiment import Cell, Place
from .training import RunConfig, TrainConfig, step_work, train
from .variants import VARIANTS, WITHOUT_P_K

IMAGES = ("glyphs", "cifar10", "cifar100")
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
    target: str | None = option(None, "which torque to predict (arm: 0-6, sarcos: 21-27, all); of "
                                "a CSV file: which column, by name or number")
    task: str | None = option(None, "of a file of your own: classification or regression (by the "
                              "type of its targets if not given)")
    layers: int = option(4, "layers, L, the output included")
    activation: str = option("softplus", "activation f")
    ties: str = option("strict", "ties in the cap: strict (the paper), threshold, index")
    bias: bool = option(True, "biases in the backbone")
    training: TrainConfig = field(default=TrainConfig(lr=3e-2, epochs=8))

    def __post_init__(self) -> None:
        for name in ("datasets", "models", "widths", "p_k"):
            values, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if not values:
                raise UserError(f"{flag} needs at least one value")
            if len(set(values)) < len(values):
                layers = "; how many layers have such a width is said by --layers"
                raise UserError(f"{flag} compares values, each given once, got "
                                f"{', '.join(map(str, values))}{layers * (name == 'widths')}")
        if self.layers < 1 or (self.train is not None and self.train < 1):
            raise UserError("a network needs at least 1 layer and 1 training example, got "
                            f"layers = {self.layers}, train = {self.train}")
        for name in self.models:
            if name not in VARIANTS:
                raise unknown("model", name, VARIANTS)
        if len({short_name(name) for name in self.datasets}) < len(self.datasets):
            raise UserError("two of the data sets have one name, by which their cells are called: "
                            "give each once, or rename a file, got "
                            f"{', '.join(self.datasets)}")
        for name in self.datasets:
            sizes = datasets.sizes_of(name, self.target, self.task)
            if self.training.augment is not None and name not in IMAGES:
                raise UserError(f"--augment is for images of 32x32 pixels, and {name} has none: "
                                "leave it out, or choose other --datasets")
            steps = self.training.epochs * math.ceil(
                min(self.train or sizes.examples, sizes.examples) / self.training.examples_a_step)
            schedule(self.training.schedule, 0, steps, self.training.warmup)  # if it does not fit
        last = (self.seeds - 1,) if isinstance(self.seeds, int) else self.seeds
        if not last or min(last) < 0 or len(set(last)) < len(last):
            raise UserError("an experiment needs at least 1 seed, each 0 or more and given once, "
                            f"got seeds = {self.seeds}")
        seeds = self.seeds if isinstance(self.seeds, int) else len(self.seeds)
        count = seeds * len(self.datasets) * len(self.widths) * len(self.models) * len(self.p_k)
        if count > MOST_CELLS or self.layers > MOST_LAYERS:
            raise UserError(f"that is a grid of up to {count:,} networks of {self.layers:,} layers "
                            f"each, of which {MOST_CELLS:,} and {MOST_LAYERS:,} can be: choose "
                            "fewer --seeds, --widths, --p-k or --layers")
        cells(self)  # bad settings are refused before the first cell runs

    @property
    def seed_numbers(self) -> Sequence[int]:
        """The seeds: those that are listed, or as many as are asked for, from 0."""
        return range(self.seeds) if isinstance(self.seeds, int) else self.seeds


@dataclass(frozen=True)
class GridCell:
    """One cell: one model trained on one data set from one seed."""

    dataset: str
    train: int | None
    target: str | None
    task: str | None
    digest: str
    run: RunConfig


def cells(config: GridConfig) -> list[Cell]:
    """Return the cells, seed by seed, so that a first comparison of all models comes early."""
    return _cells(config, tuple(datasets.sizes_of(name, config.target, config.task)
                                for name in config.datasets))


@functools.cache
def _cells(config: GridConfig, sizes: tuple[datasets.Sizes, ...]) -> list[Cell]:
    """Return the cells for data sets of these sizes: those of a file may change."""
    found = {cell.name: cell for seed in config.seed_numbers for dataset in config.datasets
             for width in config.widths for cell in _of_one_width(config, seed, dataset, width)}
    return list(found.values())  # a model without p_k has one cell for all of them


def _of_one_width(config: GridConfig, seed: int, dataset: str, width: int) -> Iterator[Cell]:
    for model in config.models:
        for p_k in config.p_k:
            yield cell_of(config, dataset, width, model, p_k, seed)


def cell_of(config: GridConfig, dataset: str, width: int, model: str, p_k: float,
            seed: int) -> Cell:
    """Return the cell of one model."""
    sizes = datasets.sizes_of(dataset, config.target, config.task)
    standard = MLPConfig((sizes.inputs, *[width] * (config.layers - 1), sizes.outputs),
                         config.activation, gate=None, bias=config.bias)
    own = VARIANTS[model](standard, p_k, config.ties)  # type: ignore[arg-type]
    run = RunConfig(own, config.training, seed)
    level = "" if model in WITHOUT_P_K else f"-pk{p_k}"
    examples = config.training.epochs * min(config.train or sizes.examples, sizes.examples)
    return Cell(f"{short_name(dataset)}-{model}-N{width}{level}-seed{seed}",
                GridCell(dataset, config.train, config.target, config.task, sizes.digest, run),
                step_work(run) * examples / config.training.examples_a_step)


def short_name(dataset: str) -> str:
    """Return what a data set is called in the names of cells and in figures: of a file its stem."""
    return Path(dataset).stem if datasets.is_file_name(dataset) else dataset


_loading = threading.Lock()


@functools.lru_cache(maxsize=2)
def _load(name: str, folder: str | None, train: int | None, target: str | None,
          task: str | None, digest: str, stamp: Any) -> Any:
    data = datasets.load(name, folder, target=target, task=task)
    if digest and data.digest != digest:
        raise UserError(f"{name} was changed after this run had begun: give the same command again")
    return replace(data, x_train=data.x_train[:train], y_train=data.y_train[:train])


def run_cell(spec: GridCell, place: Place) -> dict[str, Any]:
    """Train the cell's model."""
    with _loading:  # once, though the threads of a GPU begin together
        data = _load(spec.dataset, place.data, spec.train, spec.target, spec.task,
                     spec.digest, datasets.stamp(spec.dataset))
    if data.notice:
        place.progress.message(f"{spec.dataset}: {data.notice}")
    return train(spec.run, data, place.folder, place.backend, place.progress, place.stop)
