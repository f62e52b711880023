"""Elastic weight consolidation (Kirkpatrick et al. 2017): old tasks hold on to their parameters."""

from typing import Any

import numpy as np

from ..backends import Backend, backend_of
from ..functional.softmax import softmax
from ..rng import stream
from ..tree import flatten, zeros_like
from .sequences import Head
from .training import RunConfig
from .training.examples import Examples
from .training.step import Learner

Array = Any


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


def importance(learner: Learner, head: Head, examples: Examples, count: int, seed: int) -> Array:
    """Return the diagonal of the Fisher information of the parameters, (n,).

    ``F_i = mean (d log q(y | x) / dp_i)^2`` over `count` examples x, with y drawn from the
    network's own q. The backward pass of a mini-batch sums gradients before they can be squared, so
    each example is one of its own.
    """
    backend, draw = backend_of(learner.flat), stream(seed, "fisher")
    flat, grads = flatten(zeros_like(learner.params))
    total, learner.task = backend.xp.zeros_like(flat), head
    rows = draw.permutation(len(examples))[:count]
    for row in rows:
        made = learner.forward(examples.batch(backend.asarray(np.array([row]))), examples)
        own = backend.to_host(made.output)[0, head.first:head.last]
        q = softmax(own.astype("float64"), axis=-1).cumsum()
        drawn = head.first + min(int(q.searchsorted(draw.random())), len(q) - 1)
        loss, cache = head.loss_forward(made.output, backend.asarray(np.array([drawn])))
        backend.clear(flat)
        learner.backward(1.0, made._replace(loss=loss, loss_cache=cache), grads)
        total += flat * flat
    return total / len(rows)
