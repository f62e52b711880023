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
``--loss-over met`` all met so far.

All train by Adam, with a fresh state for each task. The learning rate is the one of the grid, the
same for all models, with the best validation accuracy on the first task; nothing later is used for
the choice. It is made anew from each seed, so seeds are independent repetitions of all of it.

Elastic weight consolidation (Kirkpatrick et al. 2017) is the standard model with a penalty on
leaving what earlier tasks made of the weights, see `Anchored` and `importance`.
"""

import itertools
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import checkpoint
from ..backends import Backend, backend_of
from ..errors import NaNScore, UserError, unknown
from ..functional.softmax import softmax
from ..gates import Pass
from ..models import module_of
from ..models.mlp import MLPConfig
from ..optim import OptimizerConfig
from ..rng import seed_of, stream
from ..settings import option
from ..tree import flatten, zeros_like
from . import datasets, figures
from .datasets import Dataset
from .experiment import Cell, Experiment, Place, columns
from .grid import DataCell, load
from .intervals import interval, percent, signed
from .sequences import Head, sequence
from .signals import Stop, stop_on_signals
from .training import RunConfig, TrainConfig, run_memory
from .training.config import evaluated_at_once, step_work
from .training.examples import Examples
from .training.ranks import of_command
from .training.step import Learner, evaluate
from .variants import VARIANTS

Array = Any

EWC = "ewc"
MODELS = (*VARIANTS, EWC)
LOOKS = {EWC: ("#222222", "standard with EWC")}
LOSSES = ("task", "met")


@dataclass(frozen=True)
class Comparison:
    """The settings that learning in sequence and transfer share."""

    models: tuple[str, ...] = option(("standard", "comet", "smaller", "dropout", "top-k"),
                                     f"models to compare, of {', '.join(VARIANTS)}")
    p_k: float = option(0.5, "proportion of neurons that stay active")
    width: int = option(300, "neurons in each hidden layer, N")
    layers: int = option(4, "layers, L, the output included")
    activation: str = option("softplus", "activation f")
    lrs: tuple[float, ...] = option((1e-4, 3e-4, 1e-3), "learning rates of Adam, of which the "
                                    "best on the first task is taken")
    batch: int = option(32, "examples in a mini-batch")
    epochs: int = option(4, "passes over the images of a task")
    train: int | None = option(600, "use only so many training images of a task")
    test: int | None = option(300, "use only so many validation and test images of a task")
    seeds: int = option(5, "number of seeds: of weights, data order, groups of classes and orders "
                        "of pixels")

    def check(self, known: tuple[str, ...], lists: dict[str, tuple[Any, ...]]) -> None:
        """Refuse models that are not `known`, lists that are empty or say a thing twice, and
        numbers that are too small.
        """
        for model in self.models:
            if model not in known:
                raise unknown("model", model, known)
        for name, values in (lists | {"models": self.models, "lrs": self.lrs}).items():
            if not values or len(set(values)) < len(values):
                raise UserError(f"--{name} needs at least one value, each given once, got "
                                f"{', '.join(map(str, values)) or 'none'}")
        numbers = {name: getattr(self, name) for name in ("layers", "epochs", "train", "test",
                                                          "seeds")}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")

    def run(self, model: str, outputs: int, seed: int) -> RunConfig:
        """Return how a model is trained; the learning rate is the first of those to choose from."""
        inputs = datasets.sizes_of("glyphs").inputs  # as all images of 32x32
        widths = (inputs, *[self.width] * (self.layers - 1), outputs)
        training = TrainConfig(OptimizerConfig("adam"), lr=self.lrs[0], batch=self.batch,
                               epochs=self.epochs)
        for lr in self.lrs:
            replace(training, lr=lr)  # refuses what is no rate
        standard = RunConfig(MLPConfig(widths, self.activation, gate=None), training, seed)
        return standard if model == EWC else VARIANTS[model](standard, self.p_k, "strict")


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
    return [cell_of(config, name, model, seed) for seed in range(config.seeds)
            for name in config.sequences for model in config.models]


def cell_of(config: ContinualConfig, name: str, model: str, seed: int) -> Cell:
    """Return the cell of a sequence, a model and a seed."""
    tasks = sequence(name)
    run = config.run(model, tasks.bounds[-1][1], seed)
    penalty = (config.strength, config.fisher) if model == EWC else None
    spec = ContinualCell(name, config.train, config.test, config.lrs, penalty, config.loss_over,
                         run)
    times = [len(config.lrs), *[2] * (tasks.tasks - 1)]  # that each task is learnt
    steps = sum(each * run.training.total(tasks.examples(number, config.train))
                for number, each in enumerate(times))
    return Cell(f"{name.replace('/', '-')}-{model}-seed{seed}", spec, step_work(run) * steps,
                run_memory(run))


def names(sequences: tuple[str, ...]) -> tuple[str, ...]:
    """Return the data sets of some sequences."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(
        sequence(name).datasets for name in sequences)))


# --- a cell -------------------------------------------------------------------------------------


class Diverged(UserError):
    """Training met a loss that is not finite."""


class Anchored(Learner):
    """A network with the penalty of EWC: ``strength/2 sum_i F_i (p_i - p*_i)^2``.

    Attributes
    ----------
    importance, anchor : arrays (n,)
        F and p*. The sum of the penalties of several tasks is again of this form, and `remember`
        takes it: ``F = sum_t F_t``, ``p* = sum_t F_t p*_t / F``.
    """

    def __init__(self, config: RunConfig, task: Any, backend: Backend, strength: float) -> None:
        super().__init__(config, task, backend)
        self.strength = strength
        self.importance, self.anchor = (backend.xp.zeros_like(self.flat) for _ in range(2))

    def _update(self, g: Array, lr: Array | float) -> None:
        g += self.strength * self.importance * (self.flat - self.anchor)
        super()._update(g, lr)

    def remember(self, importance: Array) -> None:
        """Add the penalty of a task just learnt: F_t (n,), at the parameters as they are."""
        self.importance += importance
        share = importance / (self.importance + (self.importance == 0))
        self.anchor += share * (self.flat - self.anchor)


def importance(learner: Learner, examples: Examples, count: int, seed: int) -> Array:
    """Return the diagonal of the Fisher information of the parameters, (n,).

    ``F_i = mean (d log q(y | x) / dp_i)^2`` over `count` examples x, with y drawn from the
    network's own q. The backward pass of a mini-batch sums gradients before they can be squared, so
    each example is one of its own.
    """
    backend, draw = backend_of(learner.flat), stream(seed, "fisher")
    flat, grads = flatten(zeros_like(learner.params))
    total, head = backend.xp.zeros_like(flat), learner.task
    assert isinstance(head, Head)
    rows = draw.permutation(len(examples))[:count]
    for row in rows:
        batch = examples.batch(backend.asarray(np.array([row])))
        made = learner.forward(batch, examples)
        own = backend.to_host(made.output)[0, head.first:head.last]
        chances = softmax(own.astype("float64"), axis=-1).cumsum()
        drawn = head.first + min(int(chances.searchsorted(draw.random())), len(chances) - 1)
        loss, cache = head.loss_forward(made.output, backend.asarray(np.array([drawn])))
        backend.clear(flat)
        learner.backward(1.0, made._replace(loss=loss, loss_cache=cache), grads)
        total += flat * flat
    return total / len(rows)


class Lessons:
    """What a cell works with: the tasks on the backend, and learning one of them.

    Attributes
    ----------
    heads, training, test : of each task. validation : of the first.
    """

    def __init__(self, spec: Any, heads: list[Head], data: list[Dataset], place: Place,
                 stop: Stop) -> None:
        self.spec, self.heads, self.place, self.stop = spec, heads, place, stop
        self._drawn = Learner(spec.run, heads[0], place.backend)
        self.training = [self.examples(each, "train") for each in data]
        self.test = [self.examples(each, "test") for each in data]
        self.validation = self.examples(data[0], "val")

    def examples(self, data: Dataset, part: str) -> Examples:
        """Return a part of some data on the backend: train, val or test."""
        run, drawn = self.spec.run, self._drawn
        return Examples(getattr(data, f"x_{part}"), getattr(data, f"y_{part}"), data, drawn.model,
                        drawn.fixed, self.place.backend, run.training.formats.accumulate,
                        Pass(train=True, seed=run.seed) if part == "train" else None,
                        block=evaluated_at_once(run))

    def learner(self, task: int) -> Learner:
        """Return a network as it is drawn, with a fresh state of the optimizer."""
        run = self.spec.run
        penalty = getattr(self.spec, "penalty", None)
        learner = (Learner(run, self.heads[task], self.place.backend) if penalty is None else
                   Anchored(run, self.heads[task], self.place.backend, penalty[0]))
        # Steps are counted from 0 in each task, and dropout is not to drop the same again.
        learner.config = replace(run, seed=seed_of(run.seed, "task", task))
        return learner

    def learn(self, learner: Learner, task: int, lr: float, examples: Examples | None = None,
              epochs: int | None = None) -> None:
        """Let the network learn a task.

        Raises
        ------
        Diverged
            At a loss that is not finite.
        KeyboardInterrupt
            When asked to stop.
        """
        run, to_host = self.spec.run, self.place.backend.to_host
        examples = self.training[task] if examples is None else examples
        head = self.heads[task]
        from_all = getattr(self.spec, "loss_over", "task") == "met"
        learner.task = replace(head, first=0) if from_all else head
        for epoch in range(run.training.epochs if epochs is None else epochs):
            order = stream(run.seed, "order", task, epoch).permutation(len(examples))
            for start in range(0, len(order), run.training.batch):
                rows = self.place.backend.asarray(order[start:start + run.training.batch])
                loss = float(to_host(learner.step([examples.batch(rows)], examples, lr)))
                if not np.isfinite(loss):
                    raise Diverged(f"training of task {task + 1} diverged with the learning rate "
                                   f"{lr:g}, the best on the first: leave it out of --lrs")
                self.place.progress.advance(step_work(run), self.place.folder.name)
                self.stop.raise_if_asked()

    def accuracy(self, learner: Learner, task: int, examples: Examples,
                 met: int = 0) -> tuple[float, float]:
        """Return the accuracy on a task, within its classes and among all met."""
        learner.task = replace(self.heads[task], met=max(met, self.heads[task].last))
        found = evaluate(learner, examples)
        return found["accuracy"], found["among_met"]

    def first(self, lr: float) -> tuple[float, Learner] | None:
        """Return the validation accuracy of a network that learnt the first task, or None if it
        diverged.
        """
        learner = self.learner(0)
        try:
            self.learn(learner, 0, lr)
        except (Diverged, NaNScore):
            return None
        return self.accuracy(learner, 0, self.validation)[0], learner


def run_cell(spec: ContinualCell, place: Place) -> dict[str, Any]:
    """Learn the tasks in sequence, then each later one alone; go on after the last one learnt."""
    tasks = sequence(spec.sequence)
    data = [tasks.task(number, spec.run.seed, lambda name: load(
        DataCell(name, None, None, None, None, ""), place), spec.train, spec.test)
        for number in range(tasks.tasks)]
    with stop_on_signals(place.stop) as stop:
        heads = [Head(first, last, last) for first, last in tasks.bounds]
        lessons = Lessons(spec, heads, data, place, stop)
        state = resumed(("within", "among", "alone"), data, place)
        rates, T = len(spec.lrs), tasks.tasks
        for number in range(state.done, rates + 2 * (T - 1)):
            if number < rates:
                choose(lessons, state, number)
                if number == rates - 1:
                    add_row(lessons, state, state.bring(lessons.learner(0), place.backend), 0)
            elif number < rates + T - 1:
                go_on(lessons, state, number - rates + 1)
            else:
                alone(lessons, state, number - rates - T + 2)
            state.done = number + 1
            state.save(place)
            stop.raise_if_asked()
    return {"parameters": module_of(spec.run.model).parameter_count(spec.run.model),
            "lr": spec.lrs[state.chosen]} | state.found


class State:
    """What a cell has come to, of which its checkpoint consists.

    done : lessons. chosen, best : number and validation accuracy of the best learning rate.
    found : what was measured, by name. arrays : of the network that is kept.
    """

    def __init__(self, settings: dict[str, Any], measured: tuple[str, ...]) -> None:
        self.settings = settings
        self.done, self.chosen, self.best = 0, 0, -1.0
        self.found: dict[str, list[Any]] = {name: [] for name in measured}
        self.arrays: dict[str, np.ndarray] = {}

    def save(self, place: Place) -> None:
        """Write a checkpoint, which holds what is not in the arrays as its description."""
        if place.first:
            checkpoint.save(place.folder / "checkpoint", self.arrays, {
                name: value for name, value in vars(self).items() if name != "arrays"})

    def keep(self, learner: Learner) -> None:
        """Keep the network as it is."""
        kept = ("flat", *("importance", "anchor") * isinstance(learner, Anchored))
        to_host = backend_of(learner.flat).to_host
        self.arrays = {name: to_host(getattr(learner, name)).copy() for name in kept}

    def bring(self, learner: Learner, backend: Backend) -> Learner:
        """Return the learner as the network that was kept."""
        for name, array in self.arrays.items():
            getattr(learner, name)[...] = backend.asarray(array)
        return learner


def resumed(measured: tuple[str, ...], data: list[Dataset], place: Place) -> State:
    """Return the state of the newest readable checkpoint, or that of the beginning."""
    state = State({"data": [each.digest for each in data], "backend": place.backend.name},
                  measured)
    place.folder.mkdir(parents=True, exist_ok=True)
    found = of_command().broadcast(
        checkpoint.load_latest(place.folder / "checkpoint") if place.first else None)
    if found is None:
        return state
    arrays, description, notice = found
    if notice:
        place.progress.message(f"{notice}; going on from the checkpoint before it")
    if description.keys() != vars(state).keys() - {"arrays"}:
        raise checkpoint.CheckpointError(
            f"the checkpoint in {place.folder} does not hold what this experiment writes: move "
            "that folder away to start again")
    if description["settings"] != state.settings:
        raise checkpoint.CheckpointError(
            f"the checkpoint in {place.folder} is of other data or another backend than now: "
            "choose another --out, or move that folder away to start again")
    vars(state).update(description, arrays=arrays)
    return state


def choose(lessons: Lessons, state: State, number: int) -> None:
    """Learn the first task with a learning rate, and keep the network if it is the best so far.

    Raises
    ------
    UserError
        If it is the last rate, and all have diverged.
    """
    lrs = lessons.spec.lrs
    tried = lessons.first(lrs[number])
    if tried is not None and tried[0] > state.best:
        state.best, state.chosen = tried[0], number
        remember(lessons, tried[1], 0)
        state.keep(tried[1])
    if number == len(lrs) - 1 and not state.arrays:
        raise UserError("training diverged with all learning rates: give lower --lrs")


def go_on(lessons: Lessons, state: State, task: int) -> None:
    """Learn the next task of the sequence."""
    learner = state.bring(lessons.learner(task), lessons.place.backend)
    lessons.learn(learner, task, lessons.spec.lrs[state.chosen])
    remember(lessons, learner, task)
    state.keep(learner)
    add_row(lessons, state, learner, task)


def alone(lessons: Lessons, state: State, task: int) -> None:
    """Let a fresh network learn a task alone."""
    learner = lessons.learner(task)
    lessons.learn(learner, task, lessons.spec.lrs[state.chosen])
    state.found["alone"].append(lessons.accuracy(learner, task, lessons.test[task])[0])


def remember(lessons: Lessons, learner: Learner, task: int) -> None:
    """Let EWC remember a task just learnt."""
    if isinstance(learner, Anchored):
        learner.task = lessons.heads[task]
        learner.remember(importance(learner, lessons.training[task], lessons.spec.penalty[1],
                                    seed_of(lessons.spec.run.seed, "task", task)))


def add_row(lessons: Lessons, state: State, learner: Learner, task: int) -> None:
    """Measure the network on all tasks after learning one: a row of R."""
    met = max(head.last for head in lessons.heads[:task + 1])
    row = [lessons.accuracy(learner, number, test, met)
           for number, test in enumerate(lessons.test)]
    within, among = zip(*row, strict=True)
    state.found["within"].append(list(within))
    state.found["among"].append(list(among))


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


Found = dict[str, dict[str, dict[int, Learnt]]]  # by sequence, model, seed


def read(config: ContinualConfig, out: Path) -> Found:
    """Return what the finished cells say.

    Raises
    ------
    UserError
        If there is none, or a file is damaged.
    """
    found: Found = {}
    for name, model, seed in itertools.product(config.sequences, config.models,
                                               range(config.seeds)):
        T = sequence(name).tasks

        def use(result: dict[str, Any], T: int = T) -> Learnt:
            return Learnt(*(np.array(result[key], np.float64).reshape(shape) for key, shape in (
                ("within", (T, T)), ("among", (T, T)), ("alone", (T - 1,)))), float(result["lr"]))

        learnt = cell_of(config, name, model, seed).result(out, use)
        if learnt is not None:
            found.setdefault(name, {}).setdefault(model, {})[seed] = learnt
    if not found:
        raise UserError(f"{out} holds no finished cell of continual: run it first")
    return found


def table(config: ContinualConfig, out: Path) -> str:
    """Return the measures of each sequence and model, and what they say of COMET."""
    found = read(config, out)
    blocks = []
    for name, models in found.items():
        rows = [("model", "lr", "learnt", "final", "backward", "forgetting", "forward",
                 "among all met")]
        for model, of_seeds in models.items():
            by_seed = [each.measures for each in of_seeds.values()]
            rates = dict.fromkeys(f"{each.lr:g}" for each in of_seeds.values())
            rows.append((model, "/".join(rates), *(
                percent([getattr(each, key) for each in by_seed])
                for key in ("learnt", "final", "backward", "forgetting", "forward")),
                percent([each.among[-1].mean() for each in of_seeds.values()])))
        blocks.append(f"{name}, {sequence(name).tasks} tasks\n{columns(rows)}")
    return "\n\n".join(blocks) + (
        "\n\nin %, means over seeds with 95 % intervals; learnt: accuracy on each task right after "
        "it, final: on all after the last, both among the classes of the task; transfer and "
        "forgetting in points; among all met: final accuracy where the answer may be any class\n"
        + verdict(found))


def lead(found: Found, model: str, rival: str, of: str) -> np.ndarray:
    """Return by how much a model's measure is above a rival's, (seeds,): the mean over sequences.

    In points, of the seeds from which both have finished all sequences.
    """
    sides = [(models.get(model, {}), models.get(rival, {})) for models in found.values()]
    both = set.intersection(*(a.keys() & b.keys() for a, b in sides))
    return np.array([np.mean([100 * (getattr(a[seed].measures, of) - getattr(b[seed].measures, of))
                              for a, b in sides]) for seed in sorted(both)])


def verdict(found: Found) -> str:
    """Return in two sentences whether COMET keeps more of the old tasks, and who keeps most."""
    against = {of: lead(found, "comet", "standard", of)
               for of in ("old", "backward", "forward", "learnt")}
    if not len(against["old"]):
        return "comet and standard are not finished from one seed: no comparison"
    old = interval(against["old"])
    says = ("keeps more of" if old.mean > 0 else "keeps less of") if old.excludes_zero else (
        "is not shown to differ from it on")
    values = {of: signed(interval(values)) for of, values in against.items()}
    means = {model: np.mean([np.mean([each.measures.old for each in models[model].values()])
                             for models in found.values()])
             for model in next(iter(found.values())) if all(model in m for m in found.values())}
    order = ", ".join(f"{model} {100 * means[model]:.1f} %"
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
            color, label = look(model, number)
            ticks.append(label)
            if not of_seeds:
                continue
            curves = np.array([each.so_far for each in of_seeds])
            figures.seed_band(above, np.arange(1, curves.shape[1] + 1), curves, color, label,
                              strong=model in ("comet", "standard"))
            for key, offset, filled in (("backward", -0.15, True), ("forward", 0.15, False)):
                mean, reach = interval(np.array([100 * getattr(each.measures, key)
                                                 for each in of_seeds]))
                below.errorbar(mean, number + offset, xerr=None if np.isnan(reach) else reach,
                               fmt="o" if filled else "s", color=color, markersize=3.5, capsize=2,
                               markerfacecolor=color if filled else "white")
        above.set_title(f"{figures.plain(name)}")
        above.set_xticks(np.unique(np.linspace(1, sequence(name).tasks, 5).round()))
        above.set_xlabel("tasks learnt")
        below.axvline(0, color="black", linewidth=0.8)
        below.set_yticks(range(len(ticks)), ticks if below is panels[1, 0] else [""] * len(ticks))
        below.set_ylim(len(ticks) - 0.5, -0.5)
        below.set_xlabel("points")
    panels[0, 0].set_ylabel("accuracy on the tasks learnt so far")
    panels[1, 0].set_title("backward (discs), forward transfer (squares)")
    handles = {label: line for axes in panels[0] for line, label in
               zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    figure.suptitle(textwrap.fill(
        f"continual: {config.layers} layers, N {config.width}, $p_k$ {config.p_k:g}, "
        f"{config.activation}, Adam, batch {config.batch}, {config.epochs} epochs a task of "
        f"{config.train or 'all'} images, lr chosen on the first task, ewc {config.strength:g}; "
        f"{config.seeds} seeds, band: lowest to highest, bars: 95 % intervals", 130), fontsize=8)
    return [figures.save(figure, out / "continual.png")]


def look(model: str, number: int) -> tuple[str, str]:
    """Return the colour and the name of a model, the `number`-th of a figure."""
    return LOOKS[model] if model in LOOKS else figures.look(model, number)


EXPERIMENT = Experiment(
    "continual", ContinualConfig,
    {"smoke": {"sequences": ("glyphs/2", "glyphs-permuted/2"), "models": ("standard", "comet",
                                                                           EWC),
               "width": 20, "train": 100, "test": 100, "epochs": 1, "lrs": (1e-3, 1e-2),
               "fisher": 10, "seeds": 2},
     "paper": {"sequences": ("cifar10/2", "cifar10/5", "cifar100/10", "cifar10-permuted/10",
                             "cifar10+cifar100"),
               "width": 1000, "train": None, "test": None, "epochs": 20, "seeds": 10}},
    lambda config: names(config.sequences), cells, run_cell, draw, table)
