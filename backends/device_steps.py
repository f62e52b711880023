"""Training steps that need nothing from the host, so that a GPU can replay them as one graph."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .base import Backend

Array = Any


class DeviceSteps:
    """Steps whose plan, learning rates, counter and losses lie in the backend's memory.

    Parameters
    ----------
    backend : Backend
    step : function (plan, lr, done) -> loss
        One training step: on the examples that `plan` (numbers,) says, with the learning rate
        `lr`, a 0-d array, after `done` steps, a 0-d int64 array; the loss is a 0-d array or
        (losses,). All that it keeps from step to step must be changed in place.
    steps, numbers, losses : int
        The most steps that `begin` will announce, the numbers of each one's plan, and its losses.
    dtype : str
        Of learning rates and losses.
    """

    def __init__(self, backend: Backend, step: Callable[[Array, Array, Array], Array], steps: int,
                 numbers: int, losses: int, dtype: str) -> None:
        xp = backend.xp
        self._backend, self._step = backend, step
        self._plan = xp.zeros((steps, numbers), dtype=np.int64)
        self._rates = xp.zeros(steps, dtype=dtype)
        self._losses = xp.zeros((steps, losses), dtype=dtype)
        self._position, self._done = xp.zeros(1, dtype=np.int64), xp.zeros(1, dtype=np.int64)
        self.run = backend.capture(self._run)  # take the next step

    def begin(self, plan: np.ndarray, rates: np.ndarray, done: int) -> None:
        """Announce the next steps.

        Parameters
        ----------
        plan : int array (steps, numbers)
        rates : array (steps,)
            The learning rate of each.
        done : int
            Steps that were taken before.
        """
        self._plan[:len(plan)] = self._backend.asarray(plan)
        self._rates[:len(rates)] = self._backend.asarray(rates, dtype=self._rates.dtype)
        self._position.fill(0)
        self._done.fill(done)

    def losses(self, steps: int) -> np.ndarray:
        """Return those of the first `steps` steps since `begin`, once done: (steps, losses)."""
        return self._backend.to_host(self._losses[:steps].copy())

    def _run(self) -> None:
        plan = self._plan.take(self._position, axis=0).reshape(-1)  # (numbers,)
        lr = self._rates.take(self._position).reshape(())
        loss = self._step(plan, lr, self._done.reshape(()))
        self._losses[self._position] = loss.reshape(1, -1)
        self._position += 1
        self._done += 1
