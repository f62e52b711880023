"""The affine layer ``y = x W^T + b``, eq. (1), and the products and sums it is made of.

Networks of one shape can be computed side by side: S of them have weights (S, N_out, N_in), biases
(S, 1, N_out) and inputs (S, B, N_in), and nothing else changes.
"""

from typing import Any, NamedTuple

from ..backends import overridable
from ..errors import UserError

Array = Any


class Linear(NamedTuple):
    """Parameters of an affine layer: weight (N_out, N_in), bias (N_out,) or None.

    Of S networks side by side: weight (S, N_out, N_in), bias (S, 1, N_out) or None.
    """

    weight: Array
    bias: Array | None


class LinearCache(NamedTuple):
    """What the backward of an affine layer reads: its input x (..., N_in)."""

    x: Array


@overridable
def project(x: Array, W: Array, tf32: bool = False) -> Array:
    """Return ``x W^T``: x (..., N_in), W (N_out, N_in) -> (..., N_out), in any memory order.

    With `tf32` a GPU may read float32 operands with 10 bits of mantissa instead of 23, and still
    sums in float32: see `comet_np.precision`. The CPU always reads them whole.
    """
    return x @ W.swapaxes(-1, -2)


@overridable
def project_back(dy: Array, W: Array, tf32: bool = False) -> Array:
    """Return ``dy W``, the gradient of `project` by x: dy (..., N_out) -> (..., N_in)."""
    return dy @ W


@overridable
def accumulate_outer(dy: Array, x: Array, dW: Array, tf32: bool = False) -> None:
    """Add ``dy^T x``, the gradient of `project` by W, into dW (N_out, N_in), over all examples."""
    networks = dW.shape[:-2]  # () or (S,)
    dW += (dy.reshape(*networks, -1, dy.shape[-1]).swapaxes(-1, -2)
           @ x.reshape(*networks, -1, x.shape[-1]))


@overridable
def accumulate_sum(dy: Array, db: Array) -> None:
    """Add the sum of dy (..., N_out) over all examples into db (N_out,), or (S, 1, N_out)."""
    db += dy.reshape(*db.shape[:-1], -1, dy.shape[-1]).sum(axis=-2)


def linear_forward(x: Array, p: Linear, tf32: bool = False) -> tuple[Array, LinearCache]:
    """Return the affine map of x, eq. (1): ``a = W x + b``.

    Parameters
    ----------
    x : array (..., N_in)
    p : Linear
        weight (N_out, N_in); bias (N_out,) or None.
    tf32 : bool
        See `project`.

    Returns
    -------
    a : array (..., N_out)
    cache : LinearCache

    Raises
    ------
    UserError
        If the last axis of x is not N_in.
    """
    check_features(x, p.weight, "x")
    y = project(x, p.weight, tf32)  # (..., N_out)
    if p.bias is not None:
        y = y + p.bias
    return y, LinearCache(x)


def linear_backward(dy: Array, cache: LinearCache, p: Linear, g: Linear,
                    input_gradient: bool = True, tf32: bool = False) -> Array | None:
    """Return dx and add dW and db into `g`.

    ``dx = dy W``,  ``dW += sum dy^T x``,  ``db += sum dy``  (sums over the leading axes)

    dx is taken before g is written, so `g` may be `p` itself: see `comet_np.optim`.

    Parameters
    ----------
    dy : array (..., N_out)
    cache : LinearCache
    p, g : Linear
        Parameters, and where their gradients are added.
    input_gradient : bool
        False returns None and saves the product, for the first layer of a network in training.
    tf32 : bool
        See `project`.

    Raises
    ------
    UserError
        If dy does not have the shape of the output.
    """
    shape = (*cache.x.shape[:-1], p.weight.shape[-2])
    if dy.shape != shape:
        raise UserError(f"dy must have the shape of the layer's output, {shape}, got {dy.shape}")
    dx = project_back(dy, p.weight, tf32) if input_gradient else None
    accumulate_outer(dy, cache.x, g.weight, tf32)
    if g.bias is not None:
        accumulate_sum(dy, g.bias)
    return dx


def check_features(x: Array, W: Array, name: str) -> None:
    """Raise a UserError unless the last axis of x is as long as W's rows."""
    if x.ndim == 0 or x.shape[-1] != W.shape[-1]:
        raise UserError(f"{name} must have shape (..., {W.shape[-1]}) for a weight of shape "
                        f"{W.shape}, got {x.shape}")
