"""Losses: softmax cross-entropy for classes, mean squared error for values.

Both are means over the leading axes; sums are taken in float32 or better.
"""

from typing import Any, NamedTuple

from ..backends import backend_of, labels_fit, overridable, xp_of
from ..errors import UserError

Array = Any


class CrossEntropyCache(NamedTuple):
    """What the backward of the cross-entropy reads.

    q : array (..., C), the predicted probabilities. labels : int array (...).
    """

    q: Array
    labels: Array


@overridable
def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Return the cross-entropy of each example (...) and softmax(logits) (..., C)."""
    check_shapes(labels, logits)
    xp = xp_of(logits)
    rows = _wide(logits).reshape(-1, logits.shape[-1])
    shifted = rows - rows.real.max(axis=-1, keepdims=True)  # .real: for the complex step
    log_q = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
    losses = -log_q[xp.arange(len(rows)), labels.reshape(-1)].reshape(labels.shape)
    return losses, xp.exp(log_q).reshape(logits.shape).astype(logits.dtype)


def softmax_cross_entropy_forward(logits: Array,
                                  labels: Array) -> tuple[Array, CrossEntropyCache]:
    """Return the mean cross-entropy of the labels under softmax(logits), in nats.

    ``q = exp(a) / sum_j exp(a_j)``,  ``loss = -mean log q[label]``

    Parameters
    ----------
    logits : array (..., C), float
        The network's output a_L.
    labels : int array (...)
        The true class of each example, 0 to C - 1.

    Returns
    -------
    loss : 0-d array
    cache : CrossEntropyCache

    Raises
    ------
    UserError
        If the shapes do not fit, the labels are not integers, or one is out of range.
    """
    check_labels(labels, logits)
    losses, q = softmax_cross_entropy(logits, labels)
    return losses.mean(), CrossEntropyCache(q, labels)


def softmax_cross_entropy_backward(dloss: Array | float, cache: CrossEntropyCache) -> Array:
    """Return ``dlogits = dloss (q - onehot(label)) / n``, with n examples: (..., C)."""
    return softmax_cross_entropy_gradient(cache.q, cache.labels, dloss / cache.labels.size)


@overridable
def softmax_cross_entropy_gradient(q: Array, labels: Array, scale: Array | float) -> Array:
    """Return ``scale (q - onehot(label))``: q (..., C), labels (...) -> (..., C)."""
    check_shapes(labels, q)
    rows = (q * scale).reshape(-1, q.shape[-1])
    rows[xp_of(q).arange(len(rows)), labels.reshape(-1)] -= scale
    return rows.reshape(q.shape)


def check_labels(labels: Array, logits: Array) -> None:
    """Raise a UserError unless `labels` are class indices that fit `logits`."""
    xp_of(logits)  # says what it should be
    if type(labels) is not type(logits):
        backend_of(labels, logits)  # says which are mixed
    check_shapes(labels, logits)
    check_not_empty(labels)
    check_label_range(labels, logits.shape[-1])


def check_shapes(labels: Array, logits: Array) -> None:
    """Raise a UserError unless there is an integer label for each row of `logits`."""
    if labels_fit(labels, logits):
        return
    if logits.shape[-1:] in ((), (0,)):
        raise UserError(f"logits must have shape (..., C) with at least one class, got "
                        f"{logits.shape}")
    if labels.dtype.kind not in "iu":
        raise UserError(f"labels must be integer class indices, got dtype {labels.dtype}")
    raise UserError(f"labels must have the shape of the logits less the class axis, "
                    f"{logits.shape[:-1]}, got {labels.shape}")


@overridable
def check_label_range(labels: Array, C: int) -> None:
    """Raise a UserError unless all `labels` lie in 0..C-1 (a GPU tells it later, see `Backend`)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= C:
        raise UserError(f"labels must lie in 0..{C - 1} for {C} classes, got {low}..{high}: check "
                        "the number of classes of the network or the labels of the data set")


def check_not_empty(batch: Array) -> None:
    """Raise a UserError if there is nothing to average over."""
    if batch.size == 0:
        raise UserError("the mean loss of no examples is undefined: got an empty batch")


class SquaredErrorCache(NamedTuple):
    """What the backward of the mean squared error reads: e = y - target (..., N)."""

    e: Array


def mean_squared_error_forward(y: Array, target: Array) -> tuple[Array, SquaredErrorCache]:
    """Return the mean squared error over all elements.

    ``loss = mean (y - target)^2``

    Parameters
    ----------
    y, target : array (..., N), float

    Returns
    -------
    loss : 0-d array
    cache : SquaredErrorCache

    Raises
    ------
    UserError
        If the shapes differ: they are never broadcast, which would hide a missing axis. If they
        are empty.
    """
    backend_of(y, target)
    if y.shape != target.shape:
        raise UserError(f"the target must have the shape of the output, {y.shape}, got "
                        f"{target.shape}")
    check_not_empty(y)
    e = y - target
    return (_wide(e) ** 2).mean(), SquaredErrorCache(e)


def mean_squared_error_backward(dloss: Array | float, cache: SquaredErrorCache) -> Array:
    """Return ``dy = dloss 2 (y - target) / n`` over n elements: (..., N)."""
    return cache.e * (2 * dloss / cache.e.size)


def _wide(a: Array) -> Array:
    if a.dtype.kind not in "fc":
        raise UserError(f'a loss is taken of floats, got {a.dtype}: cast with .astype("float32")')
    return a if a.dtype.itemsize >= 4 else a.astype("float32")
