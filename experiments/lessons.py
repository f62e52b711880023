"""What `continual` and `transfer` share: settings, and a network that takes lessons in tasks.

All train by Adam, with a fresh state for each task. The learning rate is the one of the grid, the
same for all models, with the best validation accuracy on the first task; nothing later is used for
the choice. It is made anew from each seed, so seeds are independent repetitions of all of it.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .. import checkpoint
from ..backends import Backend, backend_of
from ..errors import NaNScore, UserError
from ..gates import Pass
from ..models import module_of
from ..models.mlp import MLPConfig
from ..optim import OptimizerConfig
from ..rng import seed_of, stream
from ..settings import option
from . import datasets
from .datasets import Dataset
from .experiment import Cell, Place
from .grid import DataCell, check_list, load
from .sequences import Head, Sequence
from .signals import Stop
from .training import RunConfig, TrainConfig, run_memory
from .training.config import evaluated_at_once, step_work
from .training.examples import Examples
from .training.ranks import of_command
from .training.step import Learner, evaluate
from .variants import VARIANTS

T = TypeVar("T")
Found = dict[str, dict[str, dict[int, T]]]  # what finished cells say, by sequence, model, seed


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
        check_list("models", self.models, known)
        for name, values in (lists | {"lrs": self.lrs}).items():
            check_list(name, values)
        for name in ("layers", "epochs", "train", "test", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")

    def run(self, model: str, outputs: int, seed: int) -> RunConfig:
        """Return how a variant is trained; the learning rate is the first of those to choose from.
        """
        inputs = datasets.sizes_of("glyphs").inputs  # as all images of 32x32
        widths = (inputs, *[self.width] * (self.layers - 1), outputs)
        training = TrainConfig(OptimizerConfig("adam"), lr=self.lrs[0], batch=self.batch,
                               epochs=self.epochs)
        for lr in self.lrs:
            replace(training, lr=lr)  # refuses what is no rate
        return VARIANTS[model](RunConfig(MLPConfig(widths, self.activation, gate=None), training,
                                         seed), self.p_k, "strict")


def combinations(config: Any) -> Iterator[tuple[str, str, int]]:
    """Yield the sequence, model and seed of each cell, seed by seed."""
    return ((name, model, seed) for seed in range(config.seeds)
            for name in config.sequences for model in config.models)


def make_cell(name: str, model: str, spec: Any, steps: int) -> Cell:
    """Return the cell of a sequence and a model that takes so many steps."""
    run = spec.run
    return Cell(f"{name.replace('/', '-')}-{model}-seed{run.seed}", spec, step_work(run) * steps,
                run_memory(run))


# --- a cell -------------------------------------------------------------------------------------


class Diverged(UserError):
    """Training met a loss that is not finite."""


class State:
    """What a cell has come to, of which its checkpoint consists.

    taken : lessons. chosen, best : number and validation accuracy of the best learning rate.
    found : what was measured, by name. arrays : of the network that is kept.
    """

    def __init__(self, settings: dict[str, Any], measured: tuple[str, ...]) -> None:
        self.settings = settings
        self.taken, self.chosen, self.best = 0, 0, -1.0
        self.found: dict[str, list[Any]] = {name: [] for name in measured}
        self.arrays: dict[str, np.ndarray] = {}

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint holds besides the arrays."""
        return {name: value for name, value in vars(self).items() if name != "arrays"}

    def save(self, place: Place) -> None:
        """Write a checkpoint."""
        if place.first:
            checkpoint.save(place.folder / "checkpoint", self.arrays, self.description)

    def keep(self, learner: Learner) -> None:
        """Keep the network as it is, but for the state of the optimizer."""
        to_host = backend_of(learner.flat).to_host
        self.arrays = {name: to_host(getattr(learner, name)).copy()
                       for name in ("flat", "importance", "anchor") if hasattr(learner, name)}

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
    kinds, ours = ({name: type(value) for name, value in each.items()}
                   for each in (description, state.description))
    if kinds != ours or description["found"].keys() != state.found.keys():
        raise checkpoint.CheckpointError(
            f"the checkpoint in {place.folder} does not hold what this experiment writes: move "
            "that folder away to start again")
    if description["settings"] != state.settings:
        raise checkpoint.CheckpointError(
            f"the checkpoint in {place.folder} is of other data or another backend than now: "
            "choose another --out, or move that folder away to start again")
    vars(state).update(description, arrays=arrays)
    return state


class Lessons:
    """The tasks of a cell on the backend, and what its network has come to.

    Parameters
    ----------
    spec : of the cell, with its run and learning rates
    heads, losses : of each task, for the answer and for the loss
    data : of each task
    state : State
    new : (run, head, backend) -> Learner
    """

    def __init__(self, spec: Any, heads: list[Head], losses: list[Head], data: list[Dataset],
                 state: State, place: Place, stop: Stop,
                 new: Callable[..., Learner] = Learner) -> None:
        self.spec, self.heads, self.losses, self.new = spec, heads, losses, new
        self.state, self.place, self.stop = state, place, stop
        self._drawn = Learner(spec.run, heads[0], place.backend)
        self.training = [self.examples(each, "train") for each in data]
        self.test = [self.examples(each, "test") for each in data]
        self.validation = self.examples(data[0], "val")  # of the first task alone

    def examples(self, data: Dataset, part: str) -> Examples:
        """Return a part of some data on the backend: train, val or test."""
        run, drawn = self.spec.run, self._drawn
        return Examples(getattr(data, f"x_{part}"), getattr(data, f"y_{part}"), data, drawn.model,
                        drawn.fixed, self.place.backend, run.training.formats.accumulate,
                        Pass(train=True, seed=run.seed) if part == "train" else None,
                        block=evaluated_at_once(run))

    def take(self, lessons: list[Callable[[], None]]) -> dict[str, Any]:
        """Choose the learning rate, take the lessons, and return the result of the cell.

        After each lesson stands a checkpoint; those of before are not taken again.
        """
        run, lrs, state = self.spec.run, self.spec.lrs, self.state
        everything: list[Callable[[], None]] = [
            *(partial(self.choose, number) for number in range(len(lrs))), *lessons]
        for number in range(state.taken, len(everything)):
            everything[number]()
            state.taken = number + 1
            state.save(self.place)
            self.stop.raise_if_asked()
        return {"parameters": module_of(run.model).parameter_count(run.model),
                "lr": lrs[state.chosen]} | state.found

    def choose(self, number: int) -> None:
        """Learn the first task with a learning rate, and keep the network if it is the best so far.

        Raises
        ------
        UserError
            If it is the last rate, and all have diverged.
        """
        lrs, state = self.spec.lrs, self.state
        tried = self.first(lrs[number])
        if tried is not None and tried[0] > state.best:
            state.best, state.chosen = tried[0], number
            state.keep(tried[1])
        if number == len(lrs) - 1 and not state.arrays:
            raise UserError("training diverged with all learning rates: give lower --lrs")

    def first(self, lr: float) -> tuple[float, Learner] | None:
        """Return the validation accuracy of a network that learnt the first task, or None if it
        diverged.
        """
        learner = self.fresh(0)
        try:
            self.learn(learner, 0, self.training[0], lr)
        except (Diverged, NaNScore):
            return None
        return self.accuracy(learner, 0, self.validation)[0], learner

    def fresh(self, task: int) -> Learner:
        """Return a network as it is drawn, with a fresh state of the optimizer, for a task."""
        run = self.spec.run
        learner = self.new(run, self.heads[task], self.place.backend)
        # Steps are counted from 0 in each task, and dropout is not to drop the same again.
        learner.config = replace(run, seed=seed_of(run.seed, "task", task))
        return learner

    def kept(self, task: int) -> Learner:
        """Return the network that was kept last, with a fresh state of the optimizer, for a task.
        """
        return self.state.bring(self.fresh(task), self.place.backend)

    def learn(self, learner: Learner, task: int, examples: Examples, lr: float | None = None,
              epochs: int | None = None) -> None:
        """Let the network learn a task, by the chosen learning rate if none is given.

        Raises
        ------
        Diverged
            At a loss that is not finite.
        KeyboardInterrupt
            When asked to stop.
        """
        run, backend = self.spec.run, self.place.backend
        lr = self.spec.lrs[self.state.chosen] if lr is None else lr
        learner.task = self.losses[task]
        for epoch in range(run.training.epochs if epochs is None else epochs):
            order = stream(run.seed, "order", task, epoch).permutation(len(examples))
            for start in range(0, len(order), run.training.batch):
                rows = backend.asarray(order[start:start + run.training.batch])
                loss = learner.step([examples.batch(rows)], examples, lr)
                if not np.isfinite(float(backend.to_host(loss))):
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


def heads_of(tasks: Sequence) -> list[Head]:
    """Return the head of each task."""
    return [Head(first, last, last) for first, last in tasks.bounds]


def from_files(place: Place) -> Callable[[str], Dataset]:
    """Return what loads a data set by its name."""
    return lambda name: load(DataCell(name, None, None, None, None, ""), place)


# --- what the files say -------------------------------------------------------------------------


def finished(experiment: str, config: Any, out: Path, cell_of: Callable[..., Cell],
             use: Callable[[str, dict[str, Any]], T]) -> Found[T]:
    """Return what `use` makes of a sequence's name and the result of each finished cell.

    Raises
    ------
    UserError
        If there is none, or a file is damaged.
    """
    found: Found[T] = {}
    for name, model, seed in itertools.product(config.sequences, config.models,
                                               range(config.seeds)):
        result = cell_of(config, name, model, seed).result(out, partial(use, name))
        if result is not None:
            found.setdefault(name, {}).setdefault(model, {})[seed] = result
    if not found:
        raise UserError(f"{out} holds no finished cell of {experiment}: run it first")
    return found


def over_sequences(found: Found[T], model: str, measure: Callable[[T], float]) -> dict[int, float]:
    """Return a measure of a model by seed, the mean over sequences.

    Of the seeds from which it has finished all sequences.
    """
    sides = [models.get(model, {}) for models in found.values()]
    return {seed: float(np.mean([measure(side[seed]) for side in sides]))
            for seed in sorted(set.intersection(*(set(side) for side in sides)))}


def lead(found: Found[T], model: str, rival: str, measure: Callable[[T], float]) -> np.ndarray:
    """Return by how much a model's measure is above a rival's: (seeds,), of those of both."""
    ours, theirs = (over_sequences(found, each, measure) for each in (model, rival))
    return np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def passes(epochs: int) -> str:
    """Return how many epochs, in words."""
    return f"{epochs} epoch{'s' * (epochs > 1)}"


def rates(finished: dict[int, Any]) -> str:
    """Return the learning rates that were chosen, for a table."""
    return ", ".join(f"{lr:g}" for lr in sorted({each.lr for each in finished.values()}))
