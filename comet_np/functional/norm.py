"""Layer normalisation: forward and backward."""

from typing import Any, NamedTuple

from ..backends import norm_fits, overridable, writeable
from ..errors import UserError
from .linear import check_cotangent

Array = Any


class Norm(NamedTuple):
    """Parameters of a layer norm: gain and bias, each (D,)."""

    gain: Array
    bias: Array


class NormCache(NamedTuple):
    """What the backward of a layer norm reads.

    normed : array (..., D), before gain and bias. inverse : array (..., 1), one over the standard
    deviation.
    """

    normed: Array
    inverse: Array


@overridable(cache=NormCache)
def norm_forward(x: Array, p: Norm, eps: float = 1e-5) -> tuple[Array, NormCache]:
    """Return x with mean 0 and variance 1 over its last axis, times a gain, plus a bias.

    ``n = (x - mean x) / sqrt(var x + eps)``,  ``y = gain o n + bias``

    Parameters
    ----------
    x : array (..., D)
    p : Norm
    eps : float
        Within the root, beside the variance, which is the biased one: a mean over D.

    Returns
    -------
    y : array (..., D)
    cache : NormCache

    Raises
    ------
    UserError
        If the shapes of x and the parameters do not fit together.
    """
    check_width(x, p)
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = ((centred * centred).mean(axis=-1, keepdims=True) + eps) ** -0.5  # (..., 1)
    normed = centred * inverse
    return normed * p.gain + p.bias, NormCache(normed, inverse)


@overridable
def norm_backward(dy: Array, cache: NormCache, p: Norm, g: Norm) -> Array:
    """Return dx (..., D) for dy (..., D), and add the gradients of gain and bias into `g`.

    ``dn = gain o dy``,  ``dx = (dn - mean dn - n mean(dn o n)) / sqrt(var x + eps)``,
    ``dgain += sum dy o n``,  ``dbias += sum dy``

    Means go over the last axis, sums over all others. See ``docs/derivations/norm.md``. dx is taken
    before g is written, so `g` may be `p` itself: see `comet_np.optim`.

    Raises
    ------
    UserError
        If a shape does not fit, or `g` cannot be written to.
    """
    normed, inverse = cache
    check_cotangent(dy, normed.shape)
    check_width(dy, p)
    check_norm_gradients(p, g)
    dn = dy * p.gain
    dx = inverse * (dn - dn.mean(axis=-1, keepdims=True)
                    - normed * (dn * normed).mean(axis=-1, keepdims=True))
    dgain, dbias = g
    D = len(dbias)
    dgain += (dy * normed).reshape(-1, D).sum(axis=0)
    dbias += dy.reshape(-1, D).sum(axis=0)
    return dx


def check_width(x: Array, p: Norm) -> None:
    """Raise a UserError unless gain and bias are as long as the last axis of x."""
    if not norm_fits(x, p.gain, p.bias):
        raise UserError("a layer norm needs x of shape (..., D), D at least 1, and gain and bias "
                        f"of shape (D,), got {x.shape}, {p.gain.shape} and {p.bias.shape}")


def check_norm_gradients(p: Norm, g: Norm) -> None:
    """Raise a UserError unless the gradients of `p` can be added into `g`, in its place."""
    for name, array, total in zip(p._fields, p, g, strict=True):
        if total.shape != array.shape or total.dtype != array.dtype or not writeable(total):
            raise UserError(f"the gradient of a norm's {name} is added in place and must be like "
                            f"it, {array.dtype} {array.shape} and not read-only, got {total.dtype} "
                            f"{total.shape}: make it by comet_np.tree.zeros_like(params)")
