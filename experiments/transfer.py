"""Transfer: a network that learnt one task learns another from few examples, and a fresh one does.

The first task of a sequence of two (see `sequences`) is learnt as in `continual`, with the learning
rate that is best on its validation images. Then a few examples a class of some classes of the
second are learnt, once from the weights that the first has left and once from weights as they are
drawn, with the same rate, order and number of steps. All weights learn; the outputs of the second
task are fresh in both. What is compared is the accuracy on test images of those classes. The few
examples are drawn from training and validation images, as the latter of the second task serve no
choice; those of fewer are among those of more.
"""

import itertools
import math
import textwrap
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..rng import stream
from ..settings import option
from . import figures
from .datasets import Dataset
from .experiment import Cell, Experiment, Place, columns
from .intervals import interval, percent, signed
from .lessons import (
    Comparison,
    Found,
    Lessons,
    combinations,
    finished,
    from_files,
    heads_of,
    lead,
    make_cell,
    over_sequences,
    passes,
    rates,
    resumed,
)
from .sequences import Head, datasets_of, sequence
from .signals import stop_on_signals
from .training import RunConfig
from .variants import VARIANTS


@dataclass(frozen=True)
class TransferConfig(Comparison):
    """Settings; the defaults are small networks on built-in images."""

    sequences: tuple[str, ...] = option(("glyphs/2",), "pairs of tasks: DATASET/2, half of its "
                                        "classes each; DATASET+DATASET")
    shots: tuple[int, ...] = option((5, 20, 100), "examples a class of the second task")
    classes: int = option(10, "at most so many classes of the second task")
    steps: int = option(100, "steps on the second task, and up to the end of an epoch")
    train: int | None = option(1000, "use only so many training images of the first task")
    test: int | None = option(500, "use only so many validation images of the first task, and "
                              "test images of each")

    def __post_init__(self) -> None:
        self.check(tuple(VARIANTS), {"sequences": self.sequences, "shots": self.shots})
        if min(self.steps, *self.shots) < 1 or self.classes < 2:
            raise UserError("transfer needs at least 1 step, 1 example a class and 2 classes, got "
                            f"steps = {self.steps}, shots = {', '.join(map(str, self.shots))}, "
                            f"classes = {self.classes}")
        for name in self.sequences:
            if (tasks := sequence(name)).tasks != 2:
                raise UserError("transfer goes from one task to another, got "
                                f"{name} with {tasks.tasks}")
            if tasks.permuted:
                raise UserError("transfer needs a second task of other classes, and permuted "
                                f"pixels have the same ones: choose another sequence than {name}")
        cells(self)  # bad settings are refused before the first cell runs


@dataclass(frozen=True)
class TransferCell:
    """One cell: a model that learns one task, and another from few examples."""

    sequence: str
    train: int | None
    test: int | None
    lrs: tuple[float, ...]
    shots: tuple[int, ...]
    classes: int
    steps: int
    run: RunConfig


def cells(config: TransferConfig) -> list[Cell]:
    """Return the cells, seed by seed."""
    return [cell_of(config, *each) for each in combinations(config)]


def cell_of(config: TransferConfig, name: str, model: str, seed: int) -> Cell:
    """Return the cell of a pair of tasks, a model and a seed."""
    tasks = sequence(name)
    run = config.run(model, tasks.outputs, seed)
    spec = TransferCell(name, config.train, config.test, config.lrs, config.shots, config.classes,
                        config.steps, run)
    steps = (len(config.lrs) * run.training.total(tasks.examples(0, config.train))
             + 2 * config.steps * len(config.shots))
    return make_cell(name, model, spec, steps)


# --- a cell -------------------------------------------------------------------------------------


def some_classes(data: Dataset, head: Head, classes: int, test: int | None,
                 seed: int) -> tuple[Dataset, Head]:
    """Return the data of some classes, drawn from the seed, and their head.

    The training images are those for validation too, in random order; of the test images the first
    `test`.
    """
    chosen = stream(seed, "transferred").permutation(head.last - head.first)[:classes]
    label = np.full(head.last, -1)
    label[head.first + chosen] = head.first + np.arange(len(chosen))
    assert data.x_val is not None and data.y_val is not None  # all data sets of images have them
    x, y = np.concatenate([data.x_train, data.x_val]), np.concatenate([data.y_train, data.y_val])
    order = stream(seed, "few").permutation(len(x))
    order = order[label[y[order]] >= 0]
    assert data.x_test is not None and data.y_test is not None
    tested = np.flatnonzero(label[data.y_test] >= 0)[:test]
    last = head.first + len(chosen)
    return replace(data, x_train=x[order], y_train=label[y[order]], x_test=data.x_test[tested],
                   y_test=label[data.y_test[tested]]), Head(head.first, last, last)


def few(data: Dataset, head: Head, shots: int) -> Dataset:
    """Return the first so many training images of each class.

    Raises
    ------
    UserError
        If there are fewer of a class.
    """
    of_classes = [np.flatnonzero(data.y_train == label)[:shots]
                  for label in range(head.first, head.last)]
    least = min(map(len, of_classes))
    if least < shots:
        raise UserError(f"{data.name} has {least} images of a class outside its test set: give "
                        f"fewer --shots, got {shots}")
    rows = np.concatenate(of_classes)
    return replace(data, x_train=data.x_train[rows], y_train=data.y_train[rows])


def run_cell(spec: TransferCell, place: Place) -> dict[str, Any]:
    """Learn the first task, then the second from few examples, from its weights and fresh ones."""
    tasks, seed = sequence(spec.sequence), spec.run.seed
    first, second = heads_of(tasks)
    before = tasks.task(0, seed, from_files(place), spec.train, spec.test)
    after, second = some_classes(tasks.task(1, seed, from_files(place)), second, spec.classes,
                                 spec.test, seed)
    sets = [few(after, second, shots) for shots in spec.shots]
    with stop_on_signals(place.stop) as stop:
        state = resumed(("first", "carried", "fresh"), [before, *sets], place)
        lessons = Lessons(spec, [first, second], [first, second], [before, sets[-1]], state, place,
                          stop)
        return lessons.take([lambda: measure(lessons, lessons.kept(0), 0, "first"),
                             *(partial(both, lessons, data) for data in sets)])


def both(lessons: Lessons, data: Dataset) -> None:
    """Learn the second task from the weights that are kept, and from fresh ones."""
    spec, examples = lessons.spec, lessons.examples(data, "train")
    epochs = math.ceil(spec.steps / spec.run.training.steps_an_epoch(len(examples)))
    for name, learner in (("carried", lessons.kept(1)), ("fresh", lessons.fresh(1))):
        lessons.learn(learner, 1, examples, epochs=epochs)
        measure(lessons, learner, 1, name)


def measure(lessons: Lessons, learner: Any, task: int, name: str) -> None:
    """Measure a network on the test images of a task."""
    lessons.state.found[name].append(lessons.accuracy(learner, task, lessons.test[task])[0])


# --- what the files say -------------------------------------------------------------------------


class Transferred(NamedTuple):
    """What a finished cell says.

    carried, fresh : test accuracies (shots,), after the first task and without. first : of the
    first task. lr : the chosen rate.
    """

    carried: np.ndarray
    fresh: np.ndarray
    first: float
    lr: float

    @property
    def gain(self) -> np.ndarray:
        """What the first task brings, in points: (shots,)."""
        found: np.ndarray = 100 * (self.carried - self.fresh)
        return found


def read(config: TransferConfig, out: Path) -> Found[Transferred]:
    """Return what the finished cells say."""
    def use(_: str, result: dict[str, Any]) -> Transferred:
        carried, fresh = (np.array(result[name], np.float64).reshape(len(config.shots))
                          for name in ("carried", "fresh"))
        (first,) = result["first"]
        return Transferred(carried, fresh, float(first), float(result["lr"]))

    return finished("transfer", config, out, cell_of, use)


def table(config: TransferConfig, out: Path) -> str:
    """Return the accuracies of each pair, model and number of examples, and what they say."""
    found = read(config, out)
    rows = [("tasks", "model", "lr", "first task", *itertools.chain.from_iterable(
        (f"{shots} a class", "fresh", "gain") for shots in config.shots))]
    for name, models in found.items():
        for model, of_seeds in models.items():
            sides = list(of_seeds.values())
            rows.append((name, model, rates(of_seeds), percent([each.first for each in sides]),
                         *itertools.chain.from_iterable(
                             (percent([each.carried[i] for each in sides]),
                              percent([each.fresh[i] for each in sides]),
                              signed(interval(np.array([each.gain[i] for each in sides]))))
                             for i in range(len(config.shots)))))
    return columns(rows) + (
        "\ntest accuracy in %, means over seeds with 95 % intervals, after the first task and, "
        "fresh, without it; the gain is their difference in points, paired\n" + verdict(found))


def verdict(found: Found[Transferred]) -> str:
    """Return in two sentences what the first task brings, and whether it brings COMET more."""
    def gain(of_cell: Transferred) -> float:
        return float(of_cell.gain.mean())

    gains = {model: np.array(list(over_sequences(found, model, gain).values()))
             for model in dict.fromkeys(itertools.chain.from_iterable(found.values()))}
    said = ", ".join(f"{model} {signed(interval(each))}" for model, each in gains.items()
                     if len(each))
    first = (f"Having learnt the first task brings, in points of accuracy on the second (mean over "
             f"{len(found)} pair{'s' * (len(found) > 1)} and all numbers of examples, 95 % "
             f"interval over seeds): {said}.")
    more = lead(found, "comet", "standard", gain)
    if not len(more):
        return f"{first} comet and standard are not finished from one seed: no comparison."
    paired = interval(more)
    says = ("more" if paired.mean > 0 else "less") if paired.excludes_zero else (
        "not shown to be more")
    return (f"{first} What it brings COMET is {says} than what it brings the standard model: "
            f"{signed(paired)} points, {len(more)} seeds, paired.")


def draw(config: TransferConfig, out: Path) -> list[Path]:
    """Draw for each pair the accuracies against the number of examples, and what was gained."""
    plt = figures.pyplot()
    found = read(config, out)
    figure, panels = plt.subplots(len(found), 2, squeeze=False, figsize=(8, 2.7 * len(found) + 0.9))
    order = np.argsort(config.shots)
    shots = np.array(config.shots)[order]
    for (name, models), (left, right) in zip(found.items(), panels, strict=True):
        for number, (model, of_seeds) in enumerate(models.items()):
            color, label = figures.look(model, config.models.index(model))
            sides, strong = list(of_seeds.values()), model in ("comet", "standard")
            carried, fresh = (np.array([getattr(each, key)[order] for each in sides])
                              for key in ("carried", "fresh"))
            figures.seed_band(left, shots, carried, color, label, strong)
            figures.seed_band(left, shots, fresh.mean(axis=0, keepdims=True), color, "", strong,
                              dashed=True)  # without a band, of which there are many
            gains = [interval(np.array([each.gain[i] for each in sides])) for i in order]
            right.errorbar(np.arange(len(shots)) + 0.12 * (number - (len(models) - 1) / 2),
                           [gain.mean for gain in gains],
                           yerr=None if len(sides) < 2 else [gain.reach for gain in gains],
                           fmt="o", color=color, markersize=3.5, capsize=2)
        for axes in (left, right):
            axes.set_xlabel("examples a class of the second task")
        left.set_xscale("log")
        left.set_xticks(shots, [str(each) for each in shots])
        left.minorticks_off()
        right.set_xticks(range(len(shots)), [str(each) for each in shots])
        right.axhline(0, color="black", linewidth=0.8)
        left.set_ylabel("test accuracy")
        right.set_ylabel("points gained")
        left.set_title(f"{figures.plain(name)}: after the first task, and fresh (dashed)")
        right.set_title(f"{figures.plain(name)}: what the first task brings")
    handles = {label: line for axes in panels[:, 0] for line, label in
               zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    figure.suptitle(textwrap.fill(
        f"transfer: {config.layers} layers, N {config.width}, $p_k$ {config.p_k:g}, "
        f"{config.activation}, Adam, batch {config.batch}; first task {passes(config.epochs)} of "
        f"{config.train or 'all'} images, lr chosen on it; second: up to {config.classes} classes, "
        f"{config.steps} steps or more; {config.seeds} seeds, band: lowest to highest, bars: 95 % "
        "intervals", 120), fontsize=8)
    return [figures.save(figure, out / "transfer.png")]


EXPERIMENT = Experiment(
    "transfer", TransferConfig,
    {"smoke": {"models": ("standard", "comet"), "width": 20, "train": 100, "test": 100,
               "epochs": 1, "lrs": (1e-3, 1e-2), "shots": (2, 4), "classes": 3, "steps": 3,
               "seeds": 2},
     "paper": {"sequences": ("cifar10/2", "cifar10+cifar100"), "width": 1000, "train": None,
               "test": None, "epochs": 20, "steps": 1000, "classes": 100, "seeds": 10}},
    lambda config: datasets_of(config.sequences), cells, run_cell, draw, table)
