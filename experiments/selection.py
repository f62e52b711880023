"""The fair fight: each model with the settings that are best for it, chosen with equal budgets.

A cell is one contender, a model on a data set. It trains every setting (learning rate, momentum,
activation, initialisation) from the choosing seeds, takes the one whose metric is best, and trains
that from the reporting seeds, which are others. So what is reported owes nothing to lucky seeds.

Criterion: the metric on the validation set at its best over the epochs, as if training had been
stopped there, in the mean over the choosing seeds. A setting that diverges from any of them is not
taken; of equals the first is.

What it owes to the validation set: the split is the same for all seeds, and both the setting and
the best epoch are chosen on it, so validation values are a little too good, for each model from the
same number of trials. Choosing never sees the test set. Where there is one, its values are those at
the end of training, and are free of that.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..models.mlp import MLPConfig
from ..optim import OptimizerConfig
from ..records import DamagedRecord, believed, read_known
from ..settings import option
from . import datasets
from .datasets import Dataset
from .experiment import Cell, Place, damaged
from .files import METRICS, RESULT, WEIGHTS, finish, read_result
from .grid import DataCell, check_list, examples, load, short_name
from .progress import Part
from .tasks import task
from .tasks.base import Metric
from .training import Diverged, RunConfig, TrainConfig, run_memory, run_work, train
from .variants import VARIANTS, WITHOUT_P_K

LISTS = ("datasets", "models", "lrs", "momenta", "activations", "initials", "choosing", "reporting")
MOST_SETTINGS = 10_000  # far beyond any use


@dataclass(frozen=True)
class FairConfig:
    """Who fights on what, the settings to choose from, and the budget.

    The fields' help texts are those of the command line.
    """

    datasets: tuple[str, ...] = option(("cifar10", "sarcos", "glyphs"), "data sets, see: comet-np "
                                       "data; or files of your own: CSV, or npz with x and y")
    models: tuple[str, ...] = option(
        ("standard", "smaller", "dropout", "top-k", "layerwise", "centred", "comet"),
        f"comet, and the models it is compared with, of {', '.join(VARIANTS)}")
    width: int = option(300, "neurons in each hidden layer, N")
    p_k: float = option(0.5, "proportion of neurons that stay active, for the models that have it")
    layers: int = option(4, "layers, L, the output included")
    train: int | None = option(3000, "use only so many training examples")
    validation: int | None = option(2000, "use only so many validation examples")
    target: str | None = option(None, "which torque to predict (arm: 0-6, sarcos: 21-27, all); of "
                                "a CSV file: which column, by name or number")
    task: str | None = option(None, "of a file of your own: classification or regression (by the "
                              "type of its targets if not given)")
    epochs: int = option(5, "passes over the training set")
    batch: int = option(32, "examples in a mini-batch")
    lrs: tuple[float, ...] = option((3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "learning rates to choose from")
    momenta: tuple[float, ...] = option((0.0, 0.9), "momenta to choose from; 0 is plain SGD")
    activations: tuple[str, ...] = option(("softplus", "relu"), "activations f to choose from")
    initials: tuple[str, ...] = option(("paper", "he"), "initialisations to choose from: paper "
                                       "(PyTorch's default) and he")
    choosing: tuple[int, ...] = option((100, 101), "seeds from which settings are chosen")
    reporting: tuple[int, ...] = option((0, 1, 2, 3, 4), "other seeds, from which the chosen "
                                        "setting is trained and reported")
    ties: str = option("strict", "ties in the cap: strict (the paper), threshold, index")
    precision: str = option("float32", "float32, float64, or with products of operands rounded to "
                                       "tf32, float16 or bfloat16")

    def __post_init__(self) -> None:
        for name in LISTS:
            check_list(name, getattr(self, name), VARIANTS if name == "models" else None)
        if "comet" not in self.models or len(self.models) < 2:
            raise UserError("a fight is between comet and at least one other of the --models, got "
                            f"{', '.join(self.models)}")
        if both := sorted(set(self.choosing) & set(self.reporting)):
            raise UserError("a setting that is chosen for a seed would be reported on that seed: "
                            "--choosing and --reporting need different seeds, both have "
                            f"{', '.join(map(str, both))}")
        if min(*self.choosing, *self.reporting) < 0:
            raise UserError("seeds are 0 or more, got --choosing "
                            f"{', '.join(map(str, self.choosing))} and --reporting "
                            f"{', '.join(map(str, self.reporting))}")
        if not 0 < self.p_k <= 1:
            raise UserError("the proportion of neurons that stay active, --p-k, must be in (0, 1], "
                            f"got {self.p_k}")
        if min(self.layers, *(1 if n is None else n for n in (self.train, self.validation))) < 1:
            raise UserError("a network needs at least 1 layer, and 1 example to train and to "
                            f"validate, got layers = {self.layers}, train = {self.train}, "
                            f"validation = {self.validation}")
        if len({short_name(name) for name in self.datasets}) < len(self.datasets):
            raise UserError("two of the data sets have one name, by which their cells are called: "
                            f"rename a file, got {', '.join(self.datasets)}")
        count = math.prod(map(len, (self.lrs, self.momenta, self.activations, self.initials)))
        if count > MOST_SETTINGS:
            raise UserError(f"those are {count:,} settings to choose from, of which "
                            f"{MOST_SETTINGS:,} can be: choose fewer --lrs or --momenta")
        cells(self)  # bad settings are refused before the first cell runs


@dataclass(frozen=True)
class Setting:
    """One of the settings to choose from, and the run of the contender that it makes; seed aside.
    """

    lr: float
    momentum: float
    activation: str
    initial: str
    run: RunConfig

    @property
    def name(self) -> str:
        """What the setting is called in the names of folders."""
        return f"{self.activation}-{self.initial}-momentum{self.momentum:g}-lr{self.lr:g}"


@dataclass(frozen=True)
class FairCell(DataCell):
    """One cell: one contender, and all it is to be tried with."""

    settings: tuple[Setting, ...]
    choosing: tuple[int, ...]
    reporting: tuple[int, ...]


def cells(config: FairConfig) -> list[Cell]:
    """Return the cells, data set by data set."""
    return [cell_of(config, dataset, model) for dataset in config.datasets
            for model in config.models]


def cell_of(config: FairConfig, dataset: str, model: str) -> Cell:
    """Return the cell of one contender."""
    sizes = datasets.sizes_of(dataset, config.target, config.task)
    settings = settings_of(config, sizes, model)
    work = [run_work(setting.run, examples(config, dataset)) for setting in settings]
    level = "" if model in WITHOUT_P_K else f"-pk{config.p_k}"
    return Cell(f"{short_name(dataset)}-{model}-N{config.width}{level}",
                FairCell(dataset, config.train, config.validation, config.target, config.task,
                         sizes.digest, settings, config.choosing, config.reporting),
                len(config.choosing) * sum(work) + len(config.reporting) * max(work),
                max(run_memory(setting.run) for setting in settings))


def settings_of(config: FairConfig, sizes: datasets.Sizes, model: str) -> tuple[Setting, ...]:
    """Return the settings that a contender may choose from: as many for each.

    Two of them may be one and the same for a model, as softplus and ReLU are not, but ReLU with and
    without f(0) is: then the first is chosen.
    """
    widths = (sizes.inputs, *[config.width] * (config.layers - 1), sizes.outputs)

    def setting(activation: str, initial: str, momentum: float, lr: float) -> Setting:
        optimizer = OptimizerConfig("momentum", momentum) if momentum else OptimizerConfig("sgd")
        training = TrainConfig(optimizer, lr, batch=config.batch, epochs=config.epochs,
                               precision=config.precision)
        standard = RunConfig(MLPConfig(widths, activation, None, initial=initial), training)
        return Setting(lr, momentum, activation, initial,
                       VARIANTS[model](standard, config.p_k,
                                       config.ties))  # type: ignore[arg-type]

    return tuple(itertools.starmap(setting, itertools.product(
        config.activations, config.initials, config.momenta, config.lrs)))


# --- a cell -------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """What the files of a finished training say.

    epochs, values, seconds : of each line of its metrics, the values of the data set's metric.
    test : the metric on the test set after the last epoch, or None.
    diverged : why it has no more lines, or None.
    """

    epochs: list[int]
    values: list[float]
    seconds: list[float]
    test: float | None
    diverged: str | None


def run_cell(spec: FairCell, place: Place) -> dict[str, Any]:
    """Choose the contender's setting and train it from the reporting seeds.

    Each training has a folder of its own in that of the cell, and is done once: a killed cell goes
    on with the training it was at. Those for the choice leave no weights.
    """
    data = load(spec, place)
    metric = task(data.task).metric
    if data.x_val is None:
        raise UserError(f"{spec.dataset} has no validation set, on which settings are chosen")
    without_test = replace(data, x_test=None, y_test=None)
    tried = [[trained(setting, seed, without_test, place, chosen=False) for seed in spec.choosing]
             for setting in spec.settings]
    chosen = choice(tried, metric.sign)
    reported = [] if chosen is None else [
        trained(spec.settings[chosen], seed, data, place, chosen=True) for seed in spec.reporting]
    return {"chosen": chosen, "metric": metric.key,
            "tried": [described(setting) | {"values": [best(curve, metric.sign)
                                                       for curve in curves]}
                      for setting, curves in zip(spec.settings, tried, strict=True)],
            "reported": [{"seed": seed} | curve._asdict()
                         for seed, curve in zip(spec.reporting, reported, strict=False)],
            "notice": data.notice, "data": data.digest}


def described(setting: Setting) -> dict[str, Any]:
    """Return a setting as JSON values, without its run, which follows from them."""
    return {"lr": setting.lr, "momentum": setting.momentum, "activation": setting.activation,
            "initial": setting.initial}


def best(curve: Curve, sign: int) -> float | None:
    """Return the best value over the epochs; None if it diverged."""
    return None if curve.diverged is not None else sign * max(sign * v for v in curve.values)


def choice(tried: Sequence[Sequence[Curve]], sign: int) -> int | None:
    """Return the number of the setting whose best values are best in the mean over the seeds.

    None if all have diverged.
    """
    values = np.array([[best(curve, sign) for curve in curves] for curves in tried], np.float64)
    means = sign * values.mean(axis=1)  # NaN of one that has diverged
    return None if np.isnan(means).all() else int(np.nanargmax(means))


def trained(setting: Setting, seed: int, data: Dataset, place: Place, chosen: bool) -> Curve:
    """Return the curve of a training, which is done now unless its folder holds the result."""
    run = replace(setting.run, seed=seed)
    folder = place.folder / ("reporting" if chosen else "choosing") / f"{setting.name}-seed{seed}"
    part = Part(place.progress, run_work(run, len(data.x_train)))
    try:
        if not (folder / RESULT).exists():
            _train(run, data, folder, place._replace(progress=part), chosen)
    finally:
        part.end()
    return _curve(folder, task(data.task).metric)


def _train(run: RunConfig, data: Dataset, folder: Path, place: Place, keep_weights: bool) -> None:
    place.raise_if_stopped()
    try:
        result = train(run, data, folder, place.backend, place.progress, place.stop)
    except Diverged as error:
        why, _, _ = str(error).partition(";")
        result = {"diverged": why}
        (folder / "diverged").unlink()  # the state: one a setting is too much, and it can be had
    if not keep_weights:
        (folder / WEIGHTS).unlink(missing_ok=True)
    finish(folder, result)


def _curve(folder: Path, metric: Metric) -> Curve:
    try:
        result, hashes = read_result(folder)
        with believed(folder / METRICS):
            lines = [json.loads(line)
                     for line in read_known(folder / METRICS, hashes).splitlines()]
            return Curve([line["epoch"] for line in lines],
                         [line[f"val_{metric.key}"] for line in lines],
                         [line["seconds"] for line in lines],
                         result.get(f"test_{metric.key}"), result.get("diverged"))
    except DamagedRecord as error:
        raise damaged(error) from error
