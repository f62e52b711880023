"""Products of many matrices at once: of soft mixtures, and of attention."""

from typing import Any

from ..backends import overridable, products_fit
from ..errors import UserError
from ..precision import rounded

Array = Any


@overridable
def multiply(a: Array, b: Array, compute: str | None = None) -> Array:
    """Return ``a b``, matrix by matrix: a (..., M, K), b (..., K, N) -> (..., M, N).

    The leading axes are those of both: nothing is broadcast. `compute` is the format in which the
    operands are read: `comet_np.precision.rounded`.

    Raises
    ------
    UserError
        If the shapes do not fit together.
    """
    if not products_fit(a, b):
        raise UserError("products of matrices need shapes (..., M, K) and (..., K, N) with the "
                        f"same leading axes, got {a.shape} and {b.shape}")
    return rounded(a, compute) @ rounded(b, compute)
