"""Examples in the backend's memory: mini-batches, blocks, and masks that are kept."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...backends import Backend
from ...gates import Pass, keep
from ...models import module_of
from ..datasets import Dataset
from ..datasets.augment import Augmentation
from ..datasets.base import spread
from ..tasks import Batch, task
from .ranks import ALONE, Ranks

Array = Any

BLOCK = 1000  # examples that are evaluated at once


def blocks(n: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover 0..n."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class Examples:
    """A part of a data set (training, validation or test) in the backend's memory.

    Masks that are a function of the network's input, or in training of the example's number, are
    computed once and kept bit-packed: `model` and `fixed` are then those of the gate `Kept`.

    Parameters
    ----------
    x, y : arrays (n, ...)
    data : Dataset
        Their task, scale and image's shape.
    model, fixed : the model's configuration and fixed weights
    backend : Backend
    dtype : str
        Of the network's input and of real targets.
    train : Pass, optional
        For the training set, a pass that says so.
    augmentation : Augmentation, optional
        Of the training set; masks of the input are then routed afresh for each image.
    keeps : bool
        Whether masks are kept at all; a benchmark of the routing wants none.
    block : int, optional
        How many are evaluated at once; BLOCK if not given.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, data: Dataset, model: Any, fixed: Any,
                 backend: Backend, dtype: str, train: Pass | None = None,
                 augmentation: Augmentation | None = None, keeps: bool = True,
                 block: int | None = None) -> None:
        self._block = BLOCK if block is None else block
        self._task, self._dtype = task(data.task), dtype
        # Those of planes are brought to the backend here, once: a captured step cannot.
        scale, shift = (spread(value, x.shape[-1], dtype) for value in (data.scale, data.shift))
        scale, shift = (backend.asarray(value) if isinstance(value, np.ndarray) else value
                        for value in (scale, shift))
        self._scale = scale, shift
        self._augmentation, self._image = augmentation, data.image
        self.x = backend.asarray(x)  # on a CPU no copy: a stream of tokens stays on disk
        self.y = self._task.targets(self.x if y is x else y, backend, dtype)
        self.rows = backend.xp.arange(len(x))
        self.model, self.fixed = model, fixed
        kept = getattr(module_of(model), "with_kept_masks", lambda config: None)(model)
        if kept is None or not keeps:
            return
        if augmentation is not None if model.gate.depends_on == "input" else train is None:
            return  # the masks change from epoch to epoch, or are for training examples only
        at = train or Pass()
        self.fixed = keep(model.gate, ((batch.x, at._replace(example=batch.rows))
                                       for batch in self.blocks()), fixed, model)
        self.model = kept

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Array, choices: Array | None = None) -> Batch:
        """Return the examples `rows`, int64 (B,), augmented by the `choices` (B,) if any.

        In line: a thread that prepared the next mini-batch meanwhile made steps slower by 1 to 10 %
        (N from 100 to 1000, batch 32), as it competes with BLAS for the cores.
        """
        x = self.x[rows]
        if self._augmentation is not None and choices is not None:
            x = self._augmentation.apply(x, choices, self._image)
        return Batch(self._task.inputs(x, *self._scale, self._dtype), self.y[rows], rows)

    def blocks(self, ranks: Ranks = ALONE) -> Iterator[Batch]:
        """Yield all examples in order, or this rank's share of them, many at a time."""
        each = list(blocks(len(self), self._block))
        for block in (each[i] for i in ranks.parts(len(each))):
            x = self._task.inputs(self.x[block], *self._scale, self._dtype)
            yield Batch(x, self.y[block], self.rows[block])
