"""Training steps that need nothing from the host, so that a GPU can replay them as one graph."""

from typing import Any

import numpy as np

from ...backends import Backend
from .examples import Examples
from .step import Learner

Array = Any


class DeviceSteps:
    """Steps whose plan, learning rates, counter and losses lie in the backend's memory.

    Parameters
    ----------
    learner : Learner
    examples : Examples
    backend : Backend
    steps : int
        The most that will be announced at once.
    """

    def __init__(self, learner: Learner, examples: Examples, backend: Backend, steps: int) -> None:
        training, xp = learner.config.training, backend.xp
        self._learner, self._examples, self._backend = learner, examples, backend
        kinds = 1 if training.augment is None else 2
        dtype = training.formats.accumulate
        self._plan = xp.zeros((steps, kinds, training.accumulate, training.batch), dtype=np.int64)
        self._rates, self._losses = xp.zeros(steps, dtype=dtype), xp.zeros(steps, dtype=dtype)
        self._position, self._done = xp.zeros(1, dtype=np.int64), xp.zeros(1, dtype=np.int64)
        self.step = backend.capture(self._take)  # take the next of the announced steps

    def run(self, plan: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """Take the next steps and return their losses (steps,); see `announce`."""
        learner, steps = self._learner, len(rates)
        before = learner.state
        self.announce(plan, rates)
        for _ in range(steps):
            self.step()
        learner.state = before._replace(step=before.step + steps)
        return self._backend.to_host(self._losses[:steps].copy())

    def announce(self, plan: np.ndarray, rates: np.ndarray) -> None:
        """Bring the numbers of the next steps to the device.

        Parameters
        ----------
        plan : int64 array (kinds, steps * accumulate * batch)
            The examples of the steps in order, and the choices of their augmentation, if any.
        rates : array (steps,)
            Learning rates.
        """
        steps = len(rates)
        shaped = plan.reshape(len(plan), steps, *self._plan.shape[2:]).swapaxes(0, 1)
        self._plan[:steps] = self._backend.asarray(np.ascontiguousarray(shaped))
        self._rates[:steps] = self._backend.asarray(rates, dtype=self._rates.dtype)
        self._position.fill(0)
        self._done.fill(self._learner.state.step)

    def _take(self) -> None:
        """Take one step, with numbers from the device alone."""
        learner, state = self._learner, self._learner.state
        plan = self._plan.take(self._position, axis=0)[0]  # (kinds, accumulate, batch)
        batches = [self._examples.batch(*plan[:, i]) for i in range(plan.shape[1])]
        learner.state = state._replace(step=self._done.reshape(()))
        loss = learner.step(batches, self._examples, self._rates.take(self._position).reshape(()))
        learner.state = state
        self._losses[self._position] = loss.reshape(1)
        self._position += 1
        self._done += 1
