"""Regression: one or more real numbers for each example."""

from typing import Any

from ...functional.loss import mean_squared_error_backward, mean_squared_error_forward
from .base import Array, Metric, Task


class Regression(Task):
    """Mean squared error: targets and output (B, outputs)."""

    metric = Metric("loss", "validation MSE (fraction of variance)", -1)

    def loss_forward(self, output: Array, y: Array) -> tuple[Array, Any]:
        return mean_squared_error_forward(output, y)

    def loss_backward(self, dloss: Array | float, cache: Any) -> Array:
        return mean_squared_error_backward(dloss, cache)
