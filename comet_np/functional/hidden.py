"""The COMET layer, eq. (7)-(8), whole: forward and backward.

Every hidden layer of every model is this one. Where its mask comes from is the business of
`comet_np.gates`; without a mask it is the ordinary layer of eq. (1)-(2).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..backends import overridable
from ..precision import rounded
from .activations import Activation
from .linear import (
    Linear,
    add_parameter_gradients,
    check_cotangent,
    check_features,
    check_gradients,
)
from .packing import check_mask, unpacked

Array = Any
# None; a mask, bool (..., N) or bit-packed; or a function of the layer's input and pre-activation.
Mask = Array | Callable[[Array, Array], Array] | None


class HiddenCache(NamedTuple):
    """What the backward of a hidden layer reads.

    x : array (..., N_in), its input. a : array (..., N), its pre-activation. m : its mask, bool
    (..., N) or bit-packed, or None.
    """

    x: Array
    a: Array
    m: Array | None


@overridable(cache=HiddenCache)
def hidden_forward(x: Array, p: Linear, mask: Mask, f: Activation,
                   compute: str | None = None) -> tuple[Array, HiddenCache]:
    """Return the output h of a hidden layer (the paper's x_l) on its input x (x_{l-1}).

    ``a = W x + b``  (7),   ``h = m o f(a)``  (8)

    Parameters
    ----------
    x : array (..., N_in)
    p : Linear
        weight (N, N_in); bias (N,) or None, as in the paper.
    mask : bool array (..., N), function or None
        m; bit-packed as by `numpy.packbits` along the last axis it may be too. A function of (x, a)
        is asked for m, as of top-k and layer-wise gates. With None the layer is that of eq. (2).
    f : Activation
    compute : str, optional
        The format in which the product reads its operands, see `comet_np.precision.rounded`.

    Returns
    -------
    h : array (..., N)
    cache : HiddenCache

    Raises
    ------
    UserError
        If the shapes of x, weight and bias do not fit together, or a mask does not have that of the
        output.
    """
    W, b = p
    check_features(x, W, "x", b)
    a = rounded(x, compute) @ rounded(W, compute).T  # (..., N)
    if b is not None:
        a = a + b
    m = mask(x, a) if callable(mask) else mask
    h = f.forward(a)
    if m is not None:
        check_mask(m, a.shape)
        h = h * unpacked(m, len(W))
    return h, HiddenCache(x, a, m)


@overridable
def hidden_backward(dh: Array, cache: HiddenCache, p: Linear, g: Linear, f: Activation,
                    compute: str | None = None, input_gradient: bool = True) -> Array | None:
    """Return dx (..., N_in) for dh (..., N), and add dW and db into `g`.

    ``da = dh o m o f'(a)``,  ``dx = W^T da``,  ``dW += sum da x^T``,  ``db += sum da``

    Sums go over the examples. The mask is piecewise constant in whatever it is a function of, so
    nothing flows through it. dx is taken before g is written, so `g` may be `p` itself: see
    `comet_np.optim`. Without `input_gradient` None is returned, and a product saved.

    Raises
    ------
    UserError
        If dh does not have the shape of the output, or `g` not the shapes of `p`, or `g` cannot be
        written to.
    """
    x, a, m = cache
    check_features(x, p.weight, "x")
    check_cotangent(dh, a.shape)
    check_gradients(dh, x, p, g)
    da = dh * f.derivative(a)  # undoes h = m o f(a)
    if m is not None:
        da = da * unpacked(m, a.shape[-1])
    dx = rounded(da, compute) @ rounded(p.weight, compute) if input_gradient else None
    add_parameter_gradients(da, x, g, compute)  # with dx undoes a = W x + b
    return dx
