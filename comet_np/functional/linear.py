"""The affine layer ``y = W x + b``, eq. (1), and the bare product of the routing network."""

from typing import Any, NamedTuple

from ..backends import overridable
from ..errors import UserError
from ..precision import rounded

Array = Any


class Linear(NamedTuple):
    """Parameters of an affine layer: weight (N_out, N_in), bias (N_out,) or None."""

    weight: Array
    bias: Array | None


class LinearCache(NamedTuple):
    """What the backward of an affine layer reads: its input x (..., N_in)."""

    x: Array


@overridable
def project(x: Array, W: Array) -> Array:
    """Return ``W x``: x (..., N_in), W (N_out, N_in) -> (..., N_out), in any memory order."""
    check_features(x, W, "x")
    return x @ W.T


@overridable(cache=LinearCache)
def linear_forward(x: Array, p: Linear, compute: str | None = None) -> tuple[Array, LinearCache]:
    """Return the affine map of x (..., N_in), eq. (1): ``y = W x + b``, (..., N_out).

    `compute` is the format in which the product reads its operands: `comet_np.precision.rounded`.

    Raises
    ------
    UserError
        If the last axis of x is not N_in.
    """
    W, b = p
    check_features(x, W, "x")
    y = rounded(x, compute) @ rounded(W, compute).T  # (..., N_out)
    if b is not None:
        y = y + b
    return y, LinearCache(x)


@overridable
def linear_backward(dy: Array, cache: LinearCache, p: Linear, g: Linear,
                    compute: str | None = None, input_gradient: bool = True) -> Array | None:
    """Return dx (..., N_in) for dy (..., N_out), and add dW and db into `g`.

    ``dx = W^T dy``,  ``dW += sum dy x^T``,  ``db += sum dy``  (sums over the examples)

    dx is taken before g is written, so `g` may be `p` itself: see `comet_np.optim`. Without
    `input_gradient` None is returned, and a product saved.

    Raises
    ------
    UserError
        If dy does not have the shape of the output.
    """
    W, x = p.weight, cache.x
    check_cotangent(dy, (*x.shape[:-1], len(W)))
    dx = rounded(dy, compute) @ rounded(W, compute) if input_gradient else None  # (..., N_in)
    add_parameter_gradients(dy, x, g, compute)
    return dx


def add_parameter_gradients(dy: Array, x: Array, g: Linear, compute: str | None) -> None:
    """Add ``dW = sum dy x^T`` and ``db = sum dy``, over all leading axes, into `g`."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])  # (B, N_out), (B, N_in)
    dW, db = g
    dW += rounded(dy, compute).T @ rounded(x, compute)
    if db is not None:
        db += dy.sum(axis=0)


def check_features(x: Array, W: Array, name: str) -> None:
    """Raise a UserError unless the last axis of x is as long as W's rows."""
    if x.ndim == 0 or x.shape[-1] != W.shape[-1]:
        raise UserError(f"{name} must have shape (..., {W.shape[-1]}) for a weight of shape "
                        f"{W.shape}, got {x.shape}")


def check_cotangent(dy: Array, shape: tuple[int, ...]) -> None:
    """Raise a UserError unless dy has the shape of the layer's output."""
    if dy.shape != shape:
        raise UserError(f"dy must have the shape of the layer's output, {shape}, got {dy.shape}")
