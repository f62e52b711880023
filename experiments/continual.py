"""Continual learning: tasks in sequence, and what a network keeps of those that it learnt before.

One network learns the tasks of a sequence (see `sequences`) one after the other, without seeing
earlier data again. R[i, j] is its accuracy on the test images of task j after learning task i. With
T tasks, in the mean over tasks:

- learnt: ``R[j, j]``
- final: ``R[T, j]``
- backward transfer: ``R[T, j] - R[j, j]``, j < T (Lopez-Paz & Ranzato 2017)
- forgetting: ``max_{i < T} R[i, j] - R[T, j]``, j < T (Chaudhry et al. 2018)
- forward transfer: ``R[j, j] - S[j]``, j > 1, where S[j] is the accuracy of a fresh network that
  learns task j alone. (The accuracy on a task before it is learnt says nothing if its classes were
  never seen.)

The network has one output for each class of all tasks. Two accuracies come from the same training:
within the task, where the answer is the best of the task's own classes (task-incremental), and
among all classes met (class-incremental). The loss compares the classes of the task alone, or with
``--loss-over met`` all met so far. How the learning rate is chosen, `lessons` says.

Elastic weight consolidation is the standard model with a penalty on leaving what earlier tasks made
of the weights, see `ewc`. Its default strength was, of 1e2, 1e3, 1e4 and 1e5, the one with the best
final accuracy on the old tasks of glyphs/5 (2 seeds), built-in images; for permuted pixels,
glyphs-permuted/5, 1e2 was the best.
"""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, unknown
from ..rng import seed_of
from ..settings import option
from . import figures
from .ewc import Anchored, importance
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
from .sequences import datasets_of, sequence
from .signals import stop_on_signals
from .training import RunConfig
from .training.step import Learner
from .variants import VARIANTS

EWC = "ewc"
MODELS = (*VARIANTS, EWC)
LOSSES = ("task", "met")
MARKERS = {"backward": (-0.15, {"marker": "o", "markersize": 3.5}),  # of transfer: offset, look
           "forward": (0.15, {"marker": "s", "markersize": 3.5, "markerfacecolor": "white"})}


@dataclass(frozen=True)
class ContinualConfig(Comparison):
    """Settings; the defaults are small networks on built-in images."""

    sequences: tuple[str, ...] = option(
        ("glyphs/2", "glyphs/5", "glyphs-permuted/10"), "DATASET/TASKS: its classes in groups; "
        "DATASET-permuted/TASKS: its pixels in another order each time; DATASET+DATASET")
    models: tuple[str, ...] = option((*Comparison.models, EWC),
                                     f"models to compare, of {', '.join(MODELS)}")
    strength: float = option(10_000.0, "of the penalty of ewc, lambda")
    fisher: int = option(50, "images of a task by which ewc weighs the parameters")
    loss_over: str = option("task", "classes that the loss compares: task (its own) or met (all so "
                            "far)")

    def __post_init__(self) -> None:
        self.check(MODELS, {"sequences": self.sequences})
        if self.loss_over not in LOSSES:
            raise unknown("set of classes for the loss", self.loss_over, LOSSES)
        if self.fisher < 1 or not 0 <= self.strength < np.inf:
            raise UserError("ewc needs at least 1 image a task and a finite strength of 0 or more, "
                            f"got fisher = {self.fisher}, strength = {self.strength}")
        cells(self)  # bad settings are refused before the first cell runs


@dataclass(frozen=True)
class ContinualCell:
    """One cell: a model that learns a sequence of tasks.

    penalty : strength of EWC and how many images weigh its parameters; None of other models.
    """

    sequence: str
    train: int | None
    test: int | None
    lrs: tuple[float, ...]
    penalty: tuple[float, int] | None
    loss_over: str
    run: RunConfig


def cells(config: ContinualConfig) -> list[Cell]:
    """Return the cells, seed by seed."""
    return [cell_of(config, *each) for each in combinations(config)]


def cell_of(config: ContinualConfig, name: str, model: str, seed: int) -> Cell:
    """Return the cell of a sequence, a model and a seed."""
    tasks = sequence(name)
    run = config.run("standard" if model == EWC else model, tasks.outputs, seed)
    penalty = (config.strength, config.fisher) if model == EWC else None
    spec = ContinualCell(name, config.train, config.test, config.lrs, penalty, config.loss_over,
                         run)
    times = [len(config.lrs), *[2] * (tasks.tasks - 1)]  # that each task is learnt
    steps = sum(each * run.training.total(tasks.examples(number, config.train))
                for number, each in enumerate(times))
    return make_cell(name, model, spec, steps)


# --- a cell -------------------------------------------------------------------------------------


def run_cell(spec: ContinualCell, place: Place) -> dict[str, Any]:
    """Learn the tasks in sequence, then each later one alone; go on after the last one learnt."""
    tasks = sequence(spec.sequence)
    later = range(1, tasks.tasks)
    data = [tasks.task(number, spec.run.seed, from_files(place), spec.train, spec.test)
            for number in range(tasks.tasks)]
    heads = heads_of(tasks)
    losses = heads if spec.loss_over == "task" else [replace(head, first=0) for head in heads]
    new: Callable[..., Learner] = Learner
    if spec.penalty is not None:
        new = partial(Anchored, strength=spec.penalty[0])
    with stop_on_signals(place.stop) as stop:
        state = resumed(("within", "among", "alone"), data, place)
        lessons = Lessons(spec, heads, losses, data, state, place, stop, new)
        return lessons.take([lambda: measure(lessons, 0),
                             *(partial(go_on, lessons, task) for task in later),
                             *(partial(alone, lessons, task) for task in later)])


def go_on(lessons: Lessons, task: int) -> None:
    """Learn the next task of the sequence; before it, EWC remembers the last one."""
    learner, before = lessons.kept(task), task - 1
    if isinstance(learner, Anchored):
        learner.remember(importance(
            learner, lessons.heads[before], lessons.training[before], lessons.spec.penalty[1],
            seed_of(lessons.spec.run.seed, "task", before)))
    lessons.learn(learner, task, lessons.training[task])
    lessons.state.keep(learner)
    measure(lessons, task)


def measure(lessons: Lessons, task: int) -> None:
    """Measure the network on all tasks after learning one: a row of R."""
    met = max(head.last for head in lessons.heads[:task + 1])
    learner = lessons.kept(task)
    row = [lessons.accuracy(learner, number, test, met)
           for number, test in enumerate(lessons.test)]
    for name, found in zip(("within", "among"), zip(*row, strict=True), strict=True):
        lessons.state.found[name].append(list(found))


def alone(lessons: Lessons, task: int) -> None:
    """Let a fresh network learn a task alone."""
    learner = lessons.fresh(task)
    lessons.learn(learner, task, lessons.training[task])
    lessons.state.found["alone"].append(lessons.accuracy(learner, task, lessons.test[task])[0])


# --- what the files say -------------------------------------------------------------------------


class Measures(NamedTuple):
    """Measures of a sequence, see the head of this module; shares, not percent.

    old : the final accuracy on all tasks but the last.
    """

    learnt: float
    final: float
    old: float
    backward: float
    forgetting: float
    forward: float


def measures(R: np.ndarray, alone: np.ndarray) -> Measures:
    """Return the measures of R (T, T) and S (T - 1,)."""
    learnt, final = R.diagonal(), R[-1]
    return Measures(float(learnt.mean()), float(final.mean()), float(final[:-1].mean()),
                    float((final - learnt)[:-1].mean()),
                    float((R[:-1, :-1].max(axis=0) - final[:-1]).mean()),
                    float((learnt[1:] - alone).mean()))


class Learnt(NamedTuple):
    """What a finished cell says: R within the task and among all classes met, S, learning rate."""

    within: np.ndarray
    among: np.ndarray
    alone: np.ndarray
    lr: float

    @property
    def measures(self) -> Measures:
        """The measures within the task."""
        return measures(self.within, self.alone)

    @property
    def so_far(self) -> np.ndarray:
        """The mean accuracy on the tasks learnt so far, after each: (T,)."""
        return np.array([row[:i].mean() for i, row in enumerate(self.within, start=1)])


def read(config: ContinualConfig, out: Path) -> Found[Learnt]:
    """Return what the finished cells say."""
    def use(name: str, result: dict[str, Any]) -> Learnt:
        T = sequence(name).tasks
        within, among, alone = (
            np.array(result[key], np.float64).reshape(shape)
            for key, shape in (("within", (T, T)), ("among", (T, T)), ("alone", (T - 1,))))
        return Learnt(within, among, alone, float(result["lr"]))

    return finished("continual", config, out, cell_of, use)


def table(config: ContinualConfig, out: Path) -> str:
    """Return the measures of each sequence and model, and what they say of COMET."""
    found = read(config, out)
    blocks = []
    for name, models in found.items():
        rows: list[tuple[str, ...]] = [("model", "lr", "learnt", "final", "backward", "forgetting",
                                        "forward", "among all met")]
        for model, of_seeds in models.items():
            by_seed = [each.measures for each in of_seeds.values()]
            rows.append((model, rates(of_seeds), *(
                percent([getattr(each, key) for each in by_seed])
                for key in ("learnt", "final", "backward", "forgetting", "forward")),
                percent([each.among[-1].mean() for each in of_seeds.values()])))
        blocks.append(f"{name}, {sequence(name).tasks} tasks\n{columns(rows)}")
    return "\n\n".join(blocks) + (
        "\n\nin %, means over seeds with 95 % intervals; learnt: accuracy on each task right after "
        "it, final: on all after the last, both among the classes of the task; transfer and "
        "forgetting in points; among all met: final accuracy where the answer may be any class\n"
        + f"\nCOMET minus standard, in points, paired\n{columns(leads(found))}\n\n"
        + verdict(found))


MEASURES = {"learnt": "learnt", "old": "old tasks at the end", "backward": "backward transfer",
            "forward": "forward transfer"}


def leads(found: Found[Learnt]) -> list[tuple[str, ...]]:
    """Return what COMET has over the standard model in each sequence, as rows of a table."""
    rows: list[tuple[str, ...]] = [("sequence", *MEASURES.values())]
    for name, models in found.items():
        ours = [100 * lead({name: models}, "comet", "standard", attrgetter(f"measures.{of}"))
                for of in MEASURES]
        rows.append((name, *(signed(interval(each)) if len(each) else "-" for each in ours)))
    return rows


def verdict(found: Found[Learnt]) -> str:
    """Return in two sentences whether COMET keeps more of the old tasks, and who keeps most."""
    against = {of: 100 * lead(found, "comet", "standard", attrgetter(f"measures.{of}"))
               for of in MEASURES}
    if not len(against["old"]):
        return "comet and standard are not finished from one seed: no comparison"
    old = interval(against["old"])
    says = ("keeps more of" if old.mean > 0 else "keeps less of") if old.excludes_zero else (
        "is not shown to differ from it on")
    values = {of: signed(interval(values)) for of, values in against.items()}
    kept = {model: list(over_sequences(found, model, attrgetter("measures.old")).values())
            for model in next(iter(found.values()))}
    means = {model: 100 * np.mean(each) for model, each in kept.items() if each}
    order = ", ".join(f"{model} {means[model]:.1f} %"
                      for model in sorted(means, key=lambda model: -means[model]))
    return (f"Compared with the standard model COMET {says} the old tasks: {values['old']} points "
            f"of accuracy on them after the last one (backward transfer {values['backward']}, "
            f"forward transfer {values['forward']}, right after learning {values['learnt']}; mean "
            f"over {len(found)} sequence{'s' * (len(found) > 1)}, 95 % interval over "
            f"{len(against['old'])} seeds, paired). On the old tasks are in the mean: {order}.")


def draw(config: ContinualConfig, out: Path) -> list[Path]:
    """Draw for each sequence the accuracy on the tasks so far, and both transfers of each model."""
    plt = figures.pyplot()
    found = read(config, out)
    figure, panels = plt.subplots(2, len(found), squeeze=False,
                                  figsize=(max(2.5 * len(found), 7), 5.4))
    for (name, models), above, below in zip(found.items(), *panels, strict=True):
        ticks = []
        for number, model in enumerate(config.models):
            of_seeds = list(models.get(model, {}).values())
            color, label = figures.look(model, number)
            ticks.append(label)
            if not of_seeds:
                continue
            curves = np.array([each.so_far for each in of_seeds])
            figures.seed_band(above, np.arange(1, curves.shape[1] + 1), curves, color, label,
                              strong=model in ("comet", "standard"))
            for key, (offset, marker) in MARKERS.items():
                mean, reach = interval(np.array([100 * getattr(each.measures, key)
                                                 for each in of_seeds]))
                below.errorbar(mean, number + offset, xerr=None if np.isnan(reach) else reach,
                               color=color, capsize=2, **marker)
        above.set_title(figures.plain(name))
        T = sequence(name).tasks
        above.set_xticks(range(1, T + 1, -(-(T - 1) // 4)))
        above.set_xlabel("tasks learnt")
        below.axvline(0, color="black", linewidth=0.8)
        below.set_yticks(range(len(ticks)), ticks if below is panels[1, 0] else [""] * len(ticks))
        below.set_ylim(len(ticks) - 0.5, -0.5)
        below.set_xlabel("points of accuracy")
    panels[0, 0].set_ylabel("accuracy on the tasks learnt so far")
    for key, (_, marker) in MARKERS.items():
        panels[1, 0].plot([], [], color="black", linestyle="", label=f"{key} transfer", **marker)
    handles = {label: line for axes in (*panels[0], panels[1, 0]) for line, label in
               zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    figure.suptitle(textwrap.fill(
        f"continual: {config.layers} layers, N {config.width}, $p_k$ {config.p_k:g}, "
        f"{config.activation}, Adam, batch {config.batch}, {passes(config.epochs)} a task of "
        f"{config.train or 'all'} images, lr chosen on the first task"
        + ", loss over all classes met" * (config.loss_over == "met")
        + f", EWC of strength {config.strength:g}" * (EWC in config.models)
        + f"; {config.seeds} seeds, band: lowest to highest, bars: 95 % intervals", 125),
        fontsize=8)
    return [figures.save(figure, out / "continual.png")]


EXPERIMENT = Experiment(
    "continual", ContinualConfig,
    {"smoke": {"sequences": ("glyphs/2", "glyphs-permuted/2"), "models": ("standard", "comet",
                                                                           EWC),
               "width": 20, "train": 100, "test": 100, "epochs": 1, "lrs": (1e-3, 1e-2),
               "fisher": 10, "seeds": 2},
     "paper": {"sequences": ("cifar10/2", "cifar10/5", "cifar100/10", "cifar10-permuted/10",
                             "cifar10+cifar100"),
               "width": 1000, "train": None, "test": None, "epochs": 20, "seeds": 10}},
    lambda config: datasets_of(config.sequences), cells, run_cell, draw, table)
