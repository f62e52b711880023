"""Learning curves over a grid: data sets x kinds of networks x sizes x p_k x models x seeds.

`quickstart` (built-in data), Figures 4, 11 and 34 (CIFAR10) and Figure 33 (SARCOS) are grids of
MLPs and differ in their presets only; Figures 5 to 8 are grids of ViT and MLP-Mixer, see `vision`.
"""

import functools
import itertools
import math
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .. import settings
from ..errors import UserError, unknown
from ..models.mlp import MLPConfig
from ..schedules import schedule
from ..settings import option
from . import datasets
from .datasets import Dataset
from .experiment import Cell, Place
from .tasks import task
from .tasks.base import Metric
from .training import RunConfig, TrainConfig, run_memory, run_work, train
from .variants import VARIANTS, WITHOUT_P_K, Variant

DEFAULT_F = "softplus"
MOST_CELLS, MOST_LAYERS = 100_000, 1000  # far beyond any use: a slip of the finger


class Panel(NamedTuple):
    """A panel of the figure: what its models share.

    kind : the activation of an MLP, the architecture of a network of images. size : its width, ...
    """

    dataset: str
    kind: str
    size: int
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


@dataclass(frozen=True)
class Comparison:
    """What is compared, and the settings that the cells share; which networks, subclasses say.

    The fields' help texts are those of the command line.
    """

    datasets: tuple[str, ...] = option(("glyphs", "arm"), "data sets, see: comet-np data; or files "
                                       "of your own: CSV, or npz with x and y")
    models: tuple[str, ...] = option(("standard", "comet", "centred"),
                                     f"models to compare, of {', '.join(VARIANTS)}")
    p_k: tuple[float, ...] = option((0.1, 0.5), "proportion of neurons that stay active")
    seeds: int | tuple[int, ...] = option(3, "number of seeds, or a list of them: of weights, data "
                                          "order and augmentation")
    train: int | None = option(None, "use only so many training examples")
    validation: int | None = option(None, "use only so many validation examples")
    ties: str = option("strict", "ties in the cap: strict (the paper), threshold, index")
    training: TrainConfig = field(default=TrainConfig(lr=3e-2, epochs=8))

    variants: ClassVar[dict[str, Variant]] = VARIANTS
    # Settings that a figure's title or its axes say on their own; that it says even if they are the
    # paper's, with the paper's if not; and the kinds of networks that alone have them.
    said: ClassVar[tuple[str, ...]] = ("datasets", "models", "p_k", "seeds", "train", "optimizer",
                                       "lr", "batch", "epochs", "steps")
    shown: ClassVar[tuple[str, ...]] = ()
    only: ClassVar[dict[str, str]] = {}
    kind_name: ClassVar[str] = "f"

    @property
    def across(self) -> str:
        """What tells apart the panels that stand side by side in the figure."""
        return "kind" if len(self.kinds) > 1 else "p_k"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of networks, see `Panel`."""
        raise NotImplementedError

    def sizes(self, kind: str) -> tuple[int, ...]:
        """Return the sizes of the networks of a kind."""
        raise NotImplementedError

    def letter(self, kind: str) -> str:
        """Return the letter of the size."""
        return "N"

    def standard(self, panel: Panel) -> Any:
        """Return the configuration of the standard model."""
        raise NotImplementedError

    def training_of(self, kind: str) -> TrainConfig:
        """Return how networks of a kind are trained."""
        return self.training

    def __post_init__(self) -> None:
        check_compared(self)
        if len({short_name(name) for name in self.datasets}) < len(self.datasets):
            raise UserError("two of the data sets have one name, by which their cells are called: "
                            "give each once, or rename a file, got "
                            f"{', '.join(self.datasets)}")
        check_count(self.seeds, math.prod(map(len, (self.datasets, self.models, self.p_k))) * sum(
            len(self.sizes(kind)) for kind in self.kinds))
        for name, kind in itertools.product(self.datasets, self.kinds):
            self._check_training(name, self.training_of(kind))
        cells(self)  # bad settings are refused before the first cell runs

    def _check_training(self, dataset: str, training: TrainConfig) -> None:
        """Refuse what does not fit a data set."""
        schedule(training.schedule, 0, training.total(examples(self, dataset)), training.warmup)
        if training.augment is not None and sizes_of(self, dataset).image is None:
            raise UserError(f"--augment is for images, and {dataset} has none: leave it out, or "
                            "choose other --datasets")

    @property
    def seed_numbers(self) -> Sequence[int]:
        """The seeds: those that are listed, or as many as are asked for, from 0."""
        return numbers(self.seeds)


def numbers(seeds: int | Sequence[int]) -> Sequence[int]:
    """Return the seeds: those that are listed, or as many as are asked for, from 0."""
    return range(seeds) if isinstance(seeds, int) else seeds


def check_list(name: str, values: Sequence[Any], known: Collection[Any] | None = None) -> None:
    """Refuse a list that is empty, in which a value is given twice or, if `known`, is unknown."""
    for each in values:
        if known is not None and each not in known:
            raise unknown(name[:-1], each, known)
    if not values or len(set(values)) < len(values):
        raise UserError(f"--{name.replace('_', '-')} needs at least one value, each given once, "
                        f"got {', '.join(map(str, values)) or 'none'}")


def check_lists(config: Any) -> None:
    """Refuse lists of values to compare that are empty, or in which one is given twice."""
    for name, values in settings.values(config).items():
        if name == "seeds" or not isinstance(values, tuple):
            continue
        flag = f"--{name.replace('_', '-')}"
        if not values:
            raise UserError(f"{flag} needs at least one value")
        if len(set(values)) < len(values):
            layers = "; how many layers have such a width is said by --layers"
            raise UserError(f"{flag} compares values, each given once, got "
                            f"{', '.join(map(str, values))}{layers * (name == 'widths')}")


def check_compared(config: Any) -> None:
    """Refuse values that cannot be compared: models, levels of p_k, seeds, limits of examples."""
    check_lists(config)
    if min(1 if n is None else n for n in (config.train, config.validation)) < 1:
        raise UserError("a network needs at least 1 example to train and to validate, got "
                        f"train = {config.train}, validation = {config.validation}")
    for name in config.models:
        if name not in config.variants:
            raise unknown("model", name, config.variants)
    for level in config.p_k:
        if not 0 < level <= 1:
            raise UserError("the proportion of neurons that stay active, --p-k, must be in "
                            f"(0, 1], got {level}")
    last = (config.seeds - 1,) if isinstance(config.seeds, int) else config.seeds
    if not last or min(last) < 0 or len(set(last)) < len(last):
        raise UserError("an experiment needs at least 1 seed, each 0 or more and given once, "
                        f"got seeds = {config.seeds}")


def check_count(seeds: int | Sequence[int], of_each: int) -> None:
    """Refuse more networks than anyone means."""
    count = of_each * (seeds if isinstance(seeds, int) else len(seeds))
    if count > MOST_CELLS:
        raise UserError(f"those are up to {count:,} networks, of which {MOST_CELLS:,} can be: "
                        "choose fewer --seeds, --p-k or sizes")


@dataclass(frozen=True)
class GridConfig(Comparison):
    """A grid of MLPs: activations x widths; the defaults are the paper's where it says."""

    widths: tuple[int, ...] = option((500,), "neurons in each hidden layer, N")
    target: str | None = option(None, "which torque to predict (arm: 0-6, sarcos: 21-27, all); of "
                                "a CSV file: which column, by name or number")
    task: str | None = option(None, "of a file of your own: classification or regression (by the "
                              "type of its targets if not given)")
    layers: int = option(4, "layers, L, the output included")
    activation: tuple[str, ...] = option((DEFAULT_F,), "activations f")
    bias: bool = option(True, "biases in the backbone")

    said: ClassVar[tuple[str, ...]] = (*Comparison.said, "widths", "activation")

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= MOST_LAYERS:
            raise UserError(f"a network has at least 1 layer and at most {MOST_LAYERS:,}, got "
                            f"layers = {self.layers}")
        super().__post_init__()

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.activation

    def sizes(self, kind: str) -> tuple[int, ...]:
        return self.widths

    def standard(self, panel: Panel) -> MLPConfig:
        sizes = sizes_of(self, panel.dataset)
        return MLPConfig((sizes.inputs, *[panel.size] * (self.layers - 1), sizes.outputs),
                         panel.kind, gate=None, bias=self.bias)


def cells(config: Comparison) -> list[Cell]:
    """Return the cells, seed by seed, so that a first comparison of all models comes early."""
    return _cells(config, tuple(sizes_of(config, name) for name in config.datasets))


@functools.cache
def _cells(config: Comparison, sizes: tuple[datasets.Sizes, ...]) -> list[Cell]:
    """Return the cells for data sets of these sizes: those of a file may change."""
    found = {cell.name: cell for seed in config.seed_numbers for panel in panels(config)
             for cell in (cell_of(config, panel, model, seed) for model in config.models)}
    return list(found.values())  # a model without p_k has one cell for all of them


def panels(config: Comparison) -> list[Panel]:
    """Return the panels, in order."""
    return [Panel(dataset, kind, size, p_k) for dataset in config.datasets
            for kind in config.kinds for size in config.sizes(kind) for p_k in config.p_k]


def cell_of(config: Any, panel: Panel, model: str, seed: int) -> Cell:
    """Return the cell of one model in a panel."""
    dataset, kind, size, p_k = panel
    training = config.training_of(kind)
    if "l1" in config.models and model != "l1":  # --l1 is then the penalty of that model
        training = replace(training, optimizer=replace(training.optimizer, l1=0.0))
    run = config.variants[model](RunConfig(config.standard(panel), training, seed), p_k,
                                 config.ties)
    name = "-".join([short_name(dataset), model, f"{config.letter(kind)}{size}",
                     *[f"pk{p_k}"] * (model not in WITHOUT_P_K),
                     *[kind] * (kind != DEFAULT_F), f"seed{seed}"])
    return Cell(name,
                GridCell(dataset, config.train, config.validation, config.target, config.task,
                         sizes_of(config, dataset).digest, run),
                run_work(run, examples(config, dataset)), run_memory(run))


def sizes_of(config: Any, dataset: str) -> datasets.Sizes:
    """Return the sizes of a data set, with the target and task that were asked for."""
    return datasets.sizes_of(dataset, config.target, config.task)


def examples(config: Any, dataset: str) -> int:
    """Return how many examples of a data set are trained on."""
    sizes = sizes_of(config, dataset)
    return min(config.train or sizes.examples, sizes.examples)


def metric_of(config: Any, dataset: str) -> Metric:
    """Return the metric by which models are compared on a data set."""
    return task(sizes_of(config, dataset).task).metric


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
