"""Losses: softmax cross-entropy for classes, mean squared error for values.

Both are means over the leading axes; sums are taken in float32 or better.
"""

from typing import Any, NamedTuple

from ..backends import backend_of, labels_fit, overridable, writeable, xp_of
from ..errors import UserError

Array = Any


class CrossEntropyCache(NamedTuple):
    """What the backward of the cross-entropy reads.

    q : array (..., C), the predicted probabilities. labels : int array (...). counted : how many
    labels count. ignored, in_place : as the forward was given them.
    """

    q: Array
    labels: Array
    counted: Array | int
    ignored: int | None
    in_place: bool


@overridable
def softmax_cross_entropy(logits: Array, labels: Array, ignored: int | None = None,
                          in_place: bool = False) -> tuple[Array, Array]:
    """Return the cross-entropy of each example (...) and softmax(logits) (..., C).

    The loss of an ignored label is 0. With `in_place` the softmax is written over the logits.
    """
    check_shapes(labels, logits)
    check_own_memory(logits, in_place)
    xp = xp_of(logits)
    rows, flat = _wide(logits).reshape(-1, logits.shape[-1]), labels.reshape(-1)
    shifted = rows - rows.real.max(axis=-1, keepdims=True)  # .real: for the complex step
    log_q = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
    kept = counted_labels(flat, ignored)
    losses = xp.where(kept, -log_q[xp.arange(len(rows)), xp.where(kept, flat, 0)], 0)
    q = xp.exp(log_q).reshape(logits.shape).astype(logits.dtype)
    if in_place:
        logits[...] = q
        q = logits
    return losses.reshape(labels.shape), q


def softmax_cross_entropy_forward(logits: Array, labels: Array, ignored: int | None = None,
                                  in_place: bool = False) -> tuple[Array, CrossEntropyCache]:
    """Return the mean cross-entropy of the labels under softmax(logits), in nats.

    ``q = exp(a) / sum_j exp(a_j)``,  ``loss = -mean log q[label]``

    Parameters
    ----------
    logits : array (..., C), float
        The network's output a_L.
    labels : int array (...)
        The true class of each example, 0 to C - 1.
    ignored : int, optional
        The label of examples that do not count, as -100; the mean is over the others.
    in_place : bool
        Whether the logits are given away: q, and by the backward their gradient, are written over
        them. Of a vocabulary of 50257 they are most of what a step needs, and this spares two
        copies. The backward can then be called once.

    Returns
    -------
    loss : 0-d array
    cache : CrossEntropyCache

    Raises
    ------
    UserError
        If the shapes do not fit, the labels are not integers, or one is out of range; if none
        counts.
    """
    check_labels(labels, logits, ignored)
    losses, q = softmax_cross_entropy(logits, labels, ignored, in_place)
    if ignored is None:
        return losses.mean(), CrossEntropyCache(q, labels, labels.size, None, in_place)
    counted = counted_labels(labels, ignored).sum().astype(losses.dtype)
    return losses.sum() / counted, CrossEntropyCache(q, labels, counted, ignored, in_place)


def softmax_cross_entropy_backward(dloss: Array | float, cache: CrossEntropyCache) -> Array:
    """Return ``dlogits = dloss (q - onehot(label)) / n``, of n examples that count: (..., C).

    It is 0 for those that do not.
    """
    q, labels, counted, ignored, in_place = cache
    return softmax_cross_entropy_gradient(q, labels, dloss / counted, ignored, in_place)


@overridable
def softmax_cross_entropy_gradient(q: Array, labels: Array, scale: Array | float,
                                   ignored: int | None = None, in_place: bool = False) -> Array:
    """Return ``scale (q - onehot(label))``: q (..., C), labels (...) -> (..., C).

    Rows of an ignored label are 0. With `in_place` it is written over q.
    """
    check_shapes(labels, q)
    check_own_memory(q, in_place)
    xp = xp_of(q)
    rows, flat = (q * scale).reshape(-1, q.shape[-1]), labels.reshape(-1)
    kept = counted_labels(flat, ignored)
    rows[xp.arange(len(rows)), xp.where(kept, flat, 0)] -= scale
    rows[~kept] = 0
    dlogits = rows.reshape(q.shape)
    if in_place:
        q[...] = dlogits
        dlogits = q
    return dlogits


def counted_labels(labels: Array, ignored: int | None) -> Array:
    """Return which labels are not ignored, bool; unsigned ones are never negative."""
    if ignored is None:
        return xp_of(labels).ones(labels.shape, bool)
    return labels.astype("int64") != ignored


def check_labels(labels: Array, logits: Array, ignored: int | None = None) -> None:
    """Raise a UserError unless `labels` are class indices that fit `logits`, or ignored."""
    xp_of(logits)  # says what it should be
    if type(labels) is not type(logits):
        backend_of(labels, logits)  # says which are mixed
    check_shapes(labels, logits)
    check_not_empty(labels)
    check_label_range(labels, logits.shape[-1], ignored)


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
def check_label_range(labels: Array, C: int, ignored: int | None = None) -> None:
    """Raise a UserError unless all `labels` lie in 0..C-1 (a GPU tells it later, see `Backend`).

    But for those that are ignored, and these must not be all.
    """
    if ignored is not None:
        labels = labels[counted_labels(labels, ignored)]
        check_not_empty(labels)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= C:
        raise UserError(f"labels must lie in 0..{C - 1} for {C} classes, got {low}..{high}: check "
                        "the number of classes of the network or the labels of the data set")


def check_own_memory(array: Array, in_place: bool) -> None:
    """Raise a UserError if an array is to be written over and cannot be."""
    if in_place and not (writeable(array) and array.dtype.itemsize >= 4):
        raise UserError("in_place writes over an array of float32 or better that is not read-only, "
                        f"got {array.dtype}{' (read-only)' * (not writeable(array))}: leave "
                        "in_place out")


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
