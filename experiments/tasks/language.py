"""Language: the next token of a text."""

import math
from typing import Any

import numpy as np

from ...backends import Backend, xp_of
from ...functional.loss import softmax_cross_entropy_backward, softmax_cross_entropy_forward
from ...functional.softmax import softmax
from .base import Array, Metric, Task


class Language(Task):
    """Softmax cross-entropy of the next token, and the perplexity.

    Both x and y of a data set are its texts, tokens (n, T): all but the last token of a text are
    input, and all but the first are predicted; output (B, T - 1, V).
    """

    metric = Metric("perplexity", "validation perplexity", -1)

    def inputs(self, x: Array, scale: Any, shift: Any, dtype: str) -> Array:
        return x[..., :-1].astype("int64")

    def targets(self, y: np.ndarray, backend: Backend, dtype: str) -> Array:
        return backend.asarray(y)

    def loss_forward(self, output: Array, y: Array) -> tuple[Array, Any]:
        return softmax_cross_entropy_forward(output, y[..., 1:].astype("int64"), in_place=True)

    def loss_backward(self, dloss: Array | float, cache: Any) -> Array:
        return softmax_cross_entropy_backward(dloss, cache)

    def measures(self, means: dict[str, float]) -> dict[str, float]:
        loss = means["loss"]
        return means | {"perplexity": math.exp(loss) if loss < 700 else math.inf}

    def probabilities(self, output: np.ndarray) -> np.ndarray:
        return softmax(output, axis=-1)

    def predicted(self, output: np.ndarray, preparation: Any) -> np.ndarray:
        return xp_of(output).argmax(output, axis=-1)
