"""Classification: one class for each example."""

from typing import Any

import numpy as np

from ...backends import xp_of
from ...functional.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from ...functional.softmax import softmax
from ..datasets.base import Preparation
from .base import Array, Metric, Task


class Classification(Task):
    """Softmax cross-entropy, and the accuracy: labels int64 (B,), output (B, C)."""

    metric = Metric("accuracy", "validation accuracy", 1)

    def loss_forward(self, output: Array, y: Array) -> tuple[Array, Any]:
        return softmax_cross_entropy_forward(output, y)

    def loss_backward(self, dloss: Array | float, cache: Any) -> Array:
        return softmax_cross_entropy_backward(dloss, cache)

    def predicted(self, output: np.ndarray, preparation: Preparation) -> np.ndarray:
        numbers = output.argmax(axis=-1)
        return numbers if preparation.classes is None else np.array(preparation.classes)[numbers]

    def probabilities(self, output: np.ndarray) -> np.ndarray:
        return softmax(output, axis=-1)

    def counts(self, output: Array, y: Array) -> dict[str, Array]:
        return {"accuracy": (xp_of(output).argmax(output, axis=-1) == y).sum()}
