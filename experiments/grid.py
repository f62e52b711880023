"""Learning curves over a grid: data sets x widths x p_k x models x seeds.

`quickstart` (built-in data), Figures 4 and 11 (CIFAR10) and Figure 33 (SARCOS) are such grids and
differ in their presets only.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, unknown
from ..models.mlp import MLPConfig
from ..settings import option
from . import datasets
from .experiment import Cell, Place
from .training import RunConfig, TrainConfig, step_work, train
from .variants import VARIANTS, WITHOUT_P_K


@dataclass(frozen=True)
class GridConfig:
    """The grid and the settings that its cells share; the defaults are the paper's where it says.

    The fields' help texts are those of the command line.
    """

    datasets: tuple[str, ...] = option(("glyphs", "arm"), "data sets, see: comet-np data")
    models: tuple[str, ...] = option(("standard", "comet", "centred"),
                                     f"models to compare, of {', '.join(VARIANTS)}")
    widths: tuple[int, ...] = option((500,), "neurons in each hidden layer, N")
    p_k: tuple[float, ...] = option((0.1, 0.5), "proportion of neurons that stay active")
    seeds: int = option(3, "number of seeds: of weights, data order and augmentation")
    train: int | None = option(None, "use only so many training examples")
    target: int | None = option(None, "which torque to predict (arm: 0-6, sarcos: 21-27)")
    layers: int = option(4, "layers, L, the output included")
    activation: str = option("softplus", "activation f")
    ties: str = option("strict", "ties in the cap: strict (the paper), threshold, index")
    bias: bool = option(True, "biases in the backbone")
    training: TrainConfig = field(default=TrainConfig(lr=3e-2, epochs=8))

    def __post_init__(self) -> None:
        for name in ("datasets", "models", "widths", "p_k"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} needs at least one value")
        if self.layers < 1 or (self.train is not None and self.train < 1):
            raise UserError("a network needs at least 1 layer and 1 training example, got "
                            f"layers = {self.layers}, train = {self.train}")
        for name in self.models:
            if name not in VARIANTS:
                raise unknown("model", name, VARIANTS)
        for name in self.datasets:
            if name not in datasets.DATASETS:
                raise unknown("data set", name, datasets.DATASETS)
            if self.training.augment is not None and name in datasets.REGRESSION:
                raise UserError(f"--augment is for images, and {name} has none: leave it out, or "
                                "choose other --datasets")
            if self.target is not None and name not in datasets.REGRESSION:
                raise UserError(f"--target is for data sets with several torques, and {name} has "
                                "classes: leave it out, or choose other --datasets")
        if self.seeds < 1:
            raise UserError(f"an experiment needs at least 1 seed, got {self.seeds}")
        cells(self)  # bad settings are refused before the first cell runs


@dataclass(frozen=True)
class GridCell:
    """One cell: one model trained on one data set from one seed."""

    dataset: str
    train: int | None
    target: int | None
    run: RunConfig


@functools.cache
def cells(config: GridConfig) -> list[Cell]:
    """Return the cells, seed by seed, so that a first comparison of all models comes early."""
    found = {cell.name: cell for seed in range(config.seeds) for dataset in config.datasets
             for width in config.widths for cell in _of_one_width(config, seed, dataset, width)}
    return list(found.values())  # a model without p_k has one cell for all of them


def _of_one_width(config: GridConfig, seed: int, dataset: str, width: int) -> Iterator[Cell]:
    for model in config.models:
        for p_k in config.p_k:
            yield cell_of(config, dataset, width, model, p_k, seed)


def cell_of(config: GridConfig, dataset: str, width: int, model: str, p_k: float,
            seed: int) -> Cell:
    """Return the cell of one model."""
    inputs, outputs, examples = datasets.SIZES[dataset]
    standard = MLPConfig((inputs, *[width] * (config.layers - 1), outputs), config.activation,
                         gate=None, bias=config.bias)
    own = VARIANTS[model](standard, p_k, config.ties)  # type: ignore[arg-type]
    run = RunConfig(own, config.training, seed)
    level = "" if model in WITHOUT_P_K else f"-pk{p_k}"
    steps = config.training.epochs * min(config.train or examples, examples)
    return Cell(f"{dataset}-{model}-N{width}{level}-seed{seed}",
                GridCell(dataset, config.train, config.target, run),
                step_work(run) * steps / config.training.examples_a_step)


@functools.lru_cache(maxsize=2)
def _load(name: str, folder: str | None, train: int | None, target: int | None) -> Any:
    options = {} if target is None else {"target": target}
    return datasets.load(name, folder, train=train, **options)


def run_cell(spec: GridCell, place: Place) -> dict[str, Any]:
    """Train the cell's model."""
    data = _load(spec.dataset, place.data, spec.train, spec.target)
    if data.notice:
        place.progress.message(f"{spec.dataset}: {data.notice}")
    return train(spec.run, data, place.folder, place.backend, place.progress, place.stop)
