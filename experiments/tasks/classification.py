"""Classification: one class for each example."""

from typing import Any

from ...backends import xp_of
from ...functional.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from .base import Array, Metric, Task


class Classification(Task):
    """Softmax cross-entropy, and the accuracy: labels int64 (B,), output (B, C)."""

    metric = Metric("accuracy", "validation accuracy", 1)

    def loss_forward(self, output: Array, y: Array) -> tuple[Array, Any]:
        return softmax_cross_entropy_forward(output, y)

    def loss_backward(self, dloss: Array | float, cache: Any) -> Array:
        return softmax_cross_entropy_backward(dloss, cache)

    def counts(self, output: Array, y: Array) -> dict[str, Array]:
        return {"accuracy": (xp_of(output).argmax(output, axis=-1) == y).sum()}
