"""The affine layer ``y = W x + b``, eq. (1), and the bare product of the routing network."""

from typing import Any, NamedTuple

from numpy import can_cast

from ..backends import overridable, writeable
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
        If the shapes of x, weight and bias do not fit together.
    """
    W, b = p
    check_features(x, W, "x", b)
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
        If dy does not have the shape of the output, or `g` not the shapes of `p`, or `g` cannot be
        written to.
    """
    W, x = p.weight, cache.x
    check_features(x, W, "x")
    check_cotangent(dy, (*x.shape[:-1], len(W)))
    check_gradients(dy, x, p, g)
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


def check_features(x: Array, W: Array, name: str, b: Array | None = None) -> None:
    """Raise a UserError unless the last axis of x is as long as W's rows, and b as its columns."""
    if W.ndim != 2 or 0 in W.shape:
        raise UserError(f"a weight has shape (N_out, N_in), both at least 1, got {W.shape}")
    if x.ndim == 0 or x.shape[-1] != W.shape[-1]:
        raise UserError(f"{name} must have shape (..., {W.shape[-1]}) for a weight of shape "
                        f"{W.shape}, got {x.shape}")
    if b is not None and b.shape != W.shape[:1]:
        raise UserError(f"the bias must have shape {W.shape[:1]} for a weight of shape {W.shape}, "
                        f"got {b.shape}")


def check_gradients(dy: Array, x: Array, p: Linear, g: Linear) -> None:
    """Raise a UserError unless the gradients of `p` can be added into `g`, in its place."""
    wanted = Linear(p.weight.shape, p.weight.shape[:1])
    for name, shape, total in zip(wanted._fields, wanted, g, strict=True):
        if total is None:
            continue
        if total.shape != shape:
            raise UserError(f"the gradient of the {name} must have its shape, {shape}, got "
                            f"{total.shape}")
        for read in dy, x:
            if not can_cast(read.dtype, total.dtype, "same_kind"):
                raise UserError(f"gradients of {read.dtype} cannot be added into the {name}'s, of "
                                f"{total.dtype}: make these by comet_np.tree.zeros_like(params)")
        if not writeable(total):
            raise UserError(f"gradients are added in place, and that of the {name} is read-only: "
                            "give it memory of its own, as comet_np.tree.zeros_like(params)")


def check_cotangent(dy: Array, shape: tuple[int, ...]) -> None:
    """Raise a UserError unless dy has the shape of the layer's output."""
    if dy.shape != shape:
        raise UserError(f"dy must have the shape of the layer's output, {shape}, got {dy.shape}")
