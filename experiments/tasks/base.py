"""What a task is; one of one's own derives from `Task`."""

from typing import Any, NamedTuple

import numpy as np

from ...backends import Backend
from ...errors import UserError
from ..datasets.base import Preparation, scaled

Array = Any


class Metric(NamedTuple):
    """The metric by which models are compared.

    key : str, in the metrics of a run: ``val_`` or ``test_`` stands before it
    label : str, on an axis
    sign : 1 if more of it is better, else -1
    """

    key: str
    label: str
    sign: int


class Batch(NamedTuple):
    """A mini-batch on the backend: what goes in, what should come out, and which examples it is.

    x : array (B, ...). y : array (B, ...). rows : int64 array (B,) of the examples' numbers.
    """

    x: Array
    y: Array
    rows: Array


class Task:
    """What is asked of a model."""

    metric = Metric("loss", "validation loss", -1)

    def inputs(self, x: Array, scale: Any, shift: Any, dtype: str) -> Array:
        """Return the network's input for examples as they are stored: ``x * scale + shift``.

        Scale and shift are each one number, or an array (N_0,), or as `Dataset` has them.
        """
        return scaled(x, scale, shift, dtype)

    def targets(self, y: np.ndarray, backend: Backend, dtype: str) -> Array:
        """Return what the network should put out, on the backend; `dtype` is that of floats."""
        return backend.asarray(y, dtype=None if y.dtype.kind in "iu" else dtype)

    def loss_forward(self, output: Array, y: Array) -> tuple[Array, Any]:
        """Return the mean loss over the batch, a 0-d array, and what `loss_backward` reads."""
        raise NotImplementedError

    def loss_backward(self, dloss: Array | float, cache: Any) -> Array:
        """Return the gradient by the output, times `dloss`."""
        raise NotImplementedError

    def predicted(self, output: np.ndarray, preparation: Preparation) -> np.ndarray:
        """Return predictions in the units of the data as they came, of a network's output."""
        if preparation.y_mean is not None:
            output = output * preparation.y_std + preparation.y_mean
        return output[..., 0] if output.shape[-1] == 1 else output

    def probabilities(self, output: np.ndarray) -> np.ndarray:
        """Return the probability of each class, of a network's output.

        Raises
        ------
        UserError
            If the task has no classes.
        """
        raise UserError(f"{type(self).__name__} has no classes, so there are no probabilities: use "
                        "predict")

    def measures(self, means: dict[str, float]) -> dict[str, float]:
        """Return what is written down of the means of loss and counts over all examples."""
        return means

    def counts(self, output: Array, y: Array) -> dict[str, Array]:
        """Return metrics besides the loss as sums over the examples of a block: 0-d arrays."""
        return {}
