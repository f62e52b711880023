"""Sequences of tasks, one learnt after the other: classes in groups, permuted pixels, data sets.

By name: ``cifar10/5`` are the classes of CIFAR10 in 5 groups, ``cifar10-permuted/5`` are 5 tasks of
all classes, the first as it is, each other with the pixels in another order, and
``cifar10+cifar100`` is one data set after the other. The groups and orders are drawn from the seed.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..backends import xp_of
from ..errors import UserError, unknown
from ..functional.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from ..rng import stream
from . import datasets
from .datasets import IMAGES_32, Dataset
from .tasks.classification import Classification

Array = Any

PERMUTED = "-permuted"


class Sequence(NamedTuple):
    """Tasks in their order.

    datasets : of each task its own, or one for all. tasks : how many. permuted : whether the pixels
    are, instead of the classes being split.
    """

    datasets: tuple[str, ...]
    tasks: int
    permuted: bool = False

    @property
    def split(self) -> bool:
        """Whether the tasks are groups of the classes of one data set."""
        return len(self.datasets) == 1 and not self.permuted

    @property
    def outputs(self) -> int:
        """How many outputs a network of all tasks has."""
        return self.bounds[-1][1]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Of each task the first of its classes, and the one after its last, among all outputs."""
        classes = [datasets.sizes_of(name).outputs for name in self.datasets]
        if self.permuted:
            return [(0, classes[0])] * self.tasks
        if self.split:
            classes = [classes[0] // self.tasks] * self.tasks
        return list(itertools.pairwise(np.cumsum([0, *classes]).tolist()))

    def examples(self, task: int, train: int | None) -> int:
        """Return about how many examples a task is trained on, of `train` at most."""
        found = datasets.sizes_of(self._dataset(task)).examples
        if self.split:
            found //= self.tasks
        return min(train or found, found)

    def _dataset(self, task: int) -> str:
        return self.datasets[task if len(self.datasets) > 1 else 0]

    def task(self, number: int, seed: int, load: Callable[[str], Dataset],
             train: int | None = None, test: int | None = None) -> Dataset:
        """Return the data of a task, labelled by their places among the outputs of all tasks.

        Of the training images the first `train`, of those for validation and test the first `test`.
        """
        first, last = self.bounds[number]
        name = self._dataset(number)
        data = load(name)
        order = np.arange(data.outputs)
        if self.split:
            order = stream(seed, "classes", name).permutation(data.outputs)[first:last]
        label = np.full(data.outputs, -1)
        label[order] = np.arange(first, last)
        assert data.image is not None
        pixels = stream(seed, "pixels", number).permutation(data.image[1] * data.image[2])
        changed: dict[str, Any] = {"outputs": self.outputs}
        for part, most in (("train", train), ("val", test), ("test", test)):
            y = label[getattr(data, f"y_{part}")]
            rows = np.flatnonzero(y >= 0)[:most]
            x = getattr(data, f"x_{part}")[rows]
            if self.permuted and number:
                x = x.reshape(len(x), -1, len(pixels))[..., pixels].reshape(x.shape)
            changed |= {f"x_{part}": x, f"y_{part}": y[rows]}
        return replace(data, **changed)


def sequence(name: str) -> Sequence:
    """Return the sequence of a name.

    Raises
    ------
    UserError
        If it is none, or the classes cannot be split so.
    """
    if "+" in name:
        found = Sequence(tuple(name.split("+")), name.count("+") + 1)
    else:
        dataset, _, count = name.partition("/")
        if not count.isdecimal() or int(count) < 2:
            raise UserError("a sequence of tasks is DATASET/TASKS (its classes in groups), DATASET"
                            f"{PERMUTED}/TASKS (its pixels in another order each time), with at "
                            f'least 2 tasks, or DATASET+DATASET, got "{name}"')
        found = Sequence((dataset.removesuffix(PERMUTED),), int(count), dataset.endswith(PERMUTED))
    if len(set(found.datasets)) < len(found.datasets):
        raise UserError(f"a sequence takes each data set once, got {name}")
    for dataset in found.datasets:
        if dataset not in IMAGES_32:
            raise unknown("data set of 32x32 images", dataset, IMAGES_32)
    classes = datasets.sizes_of(found.datasets[0]).outputs
    if found.split and (classes % found.tasks or classes // found.tasks < 2):
        raise UserError(f"the {classes} classes of {found.datasets[0]} are split into equal groups "
                        f"of at least 2, got {found.tasks} tasks")
    return found


def datasets_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the data sets of some sequences."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(
        sequence(name).datasets for name in names)))


@dataclass(frozen=True)
class Head(Classification):
    """The classes first..last-1 of a network's outputs, all others left out of loss and choice.

    The count ``among_met`` is of those that are right among the outputs 0..met-1.
    """

    first: int
    last: int
    met: int

    def loss_forward(self, output: Array, y: Array) -> tuple[Array, Any]:
        own = output[:, self.first:self.last].copy()
        loss, cache = softmax_cross_entropy_forward(own, y - self.first)
        return loss, (cache, output)

    def loss_backward(self, dloss: Array | float, cache: Any) -> Array:
        own, output = cache
        doutput = xp_of(output).zeros_like(output)
        doutput[:, self.first:self.last] = softmax_cross_entropy_backward(dloss, own)
        return doutput

    def counts(self, output: Array, y: Array) -> dict[str, Array]:
        argmax = xp_of(output).argmax
        own = argmax(output[:, self.first:self.last], axis=-1) + self.first
        return {"accuracy": (own == y).sum(),
                "among_met": (argmax(output[:, :self.met], axis=-1) == y).sum()}
