"""Training steps that need nothing from the host, so that a GPU can replay them as one graph."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .base import Backend

Array = Any


class DeviceSteps:
    """Steps whose data order, learning rates, counter and losses lie in the backend's memory.

    Parameters
    ----------
    backend : Backend
    step : function (rows, lr, done) -> loss
        One training step: on the examples whose indices are `rows` (batch,), with the learning rate
        `lr`, a 0-d array, after `done` steps, a 0-d int64 array; the loss is a 0-d array. All that
        it keeps from step to step must be changed in place.
    steps, batch : int
        The most steps that `begin` will announce, and the examples of each.
    dtype : str
        Of learning rates and losses.
    """

    def __init__(self, backend: Backend, step: Callable[[Array, Array, Array], Array], steps: int,
                 batch: int, dtype: str) -> None:
        xp = backend.xp
        self._backend, self._step, self._batch = backend, step, batch
        self._order = xp.zeros(steps * batch, dtype=np.int64)
        self._offsets = xp.arange(batch, dtype=np.int64)
        self._rates, self._losses = xp.zeros(steps, dtype=dtype), xp.zeros(steps, dtype=dtype)
        self._position, self._done = xp.zeros(1, dtype=np.int64), xp.zeros(1, dtype=np.int64)
        self.run = backend.capture(self._run)  # take the next step

    def begin(self, order: np.ndarray, rates: np.ndarray, done: int) -> None:
        """Announce the next steps.

        Parameters
        ----------
        order : int array (steps * batch,)
            The examples of all these steps, in order.
        rates : array (steps,)
            The learning rate of each.
        done : int
            Steps that were taken before.
        """
        self._order[:len(order)] = self._backend.asarray(order)
        self._rates[:len(rates)] = self._backend.asarray(rates, dtype=self._rates.dtype)
        self._position.fill(0)
        self._done.fill(done)

    def losses(self, steps: int) -> np.ndarray:
        """Return the losses of the first `steps` steps since `begin`, once they are done."""
        return self._backend.to_host(self._losses[:steps].copy())

    def _run(self) -> None:
        rows = self._order.take(self._position * self._batch + self._offsets)  # (batch,)
        lr = self._rates.take(self._position).reshape(())
        self._losses[self._position] = self._step(rows, lr, self._done.reshape(()))
        self._position += 1
        self._done += 1
