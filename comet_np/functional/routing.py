"""The routing network of COMET: the cap C_k and equations (3)-(6). Read this file first.

Routing has no backward: masks are piecewise constant in the scores and the routing weights V are
fixed, so their derivative is taken as 0, as in the paper.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

from ..backends import overridable, xp_of
from ..errors import NaNScore, UserError, unknown
from .activations import Activation, masked
from .linear import project

Array = Any
Ties = Literal["strict", "threshold", "index"]
TIES = ("strict", "threshold", "index")


def winners(p_k: float, N: int) -> int:
    """Return k, the number of neurons that survive the cap in a layer of N.

    ``k = max(1, int(p_k N))``: rounded towards zero in double precision, so that p_k = 0.29 and
    N = 100 give 28, and at least 1.

    Raises
    ------
    UserError
        If p_k is not in (0, 1].

    Notes
    -----
    Where the paper is silent (it writes k = p_k N) this is what its published code does.
    """
    if not 0 < p_k <= 1:
        raise UserError(f"p_k is the proportion of neurons that stay active and must be in (0, 1], "
                        f"got {p_k}")
    return max(1, int(p_k * N))


@overridable
def kwta_mask(scores: Array, k: int, ties: Ties = "strict") -> Array:
    """Return the k-winner-take-all mask of `scores` over the last axis, eq. (3).

    ``[C_k(v)]_i = 1  iff  #{j : v_j >= v_i} <= k``

    Parameters
    ----------
    scores : array (..., N), float
        Routing scores c.
    k : int
        Number of winners, 1 <= k <= N.
    ties : {"strict", "threshold", "index"}
        What becomes of equal scores that straddle rank k. ``"strict"`` (the paper): all of them
        lose, so fewer than k may win. ``"threshold"`` (the published code): all of them win.
        ``"index"``: exactly k win, of equal scores those with the lowest index.

    Returns
    -------
    mask : bool array (..., N)

    Raises
    ------
    UserError
        If k or `ties` is out of range, or a score is NaN (the message says where).

    Notes
    -----
    +0 and -0 are equal. Infinities are ordinary scores.
    """
    check_kwta_arguments(scores, k, ties)
    xp = xp_of(scores)
    check_no_nan(scores, xp)
    N = scores.shape[-1]
    ascending = xp.sort(scores, axis=-1)
    if ties == "strict":
        # v_i wins iff it is above the (k+1)-th largest score: then at most k scores are >= v_i.
        if k == N:
            return xp.ones(scores.shape, dtype=bool)
        return scores > ascending[..., N - k - 1, None]
    kth_largest = ascending[..., N - k, None]
    if ties == "threshold":
        return scores >= kth_largest
    above, tied = scores > kth_largest, scores == kth_largest
    places_left = k - above.sum(axis=-1, keepdims=True)
    return above | (tied & (xp.cumsum(tied, axis=-1) <= places_left))


@overridable
def cap(scores: Array, k: int, ties: Ties = "strict") -> Array:
    """Return C_k of eq. (5) as a gate hands it to a layer: `kwta_mask`, bool (..., N).

    A backend whose layers read bits as fast may give it bit-packed, uint8 (..., ceil(N / 8)).
    """
    return kwta_mask(scores, k, ties)


def check_kwta_arguments(scores: Array, k: int, ties: str) -> None:
    """Raise a UserError unless `k` and `ties` fit `scores`."""
    if scores.ndim == 0:
        raise UserError("k-winner-take-all needs scores of shape (..., N), got a scalar")
    if ties not in TIES:
        raise unknown("tie rule", ties, TIES)
    if not isinstance(k, Integral) or not 1 <= k <= scores.shape[-1]:
        raise UserError(f"k must be an integer between 1 and N = {scores.shape[-1]} (the last axis "
                        f"of the scores, shape {scores.shape}), got {k}")


def check_no_nan(scores: Array, xp: Any) -> None:
    """Raise a NaNScore that names the first NaN of `scores`, if there is one."""
    bad = xp.isnan(scores)
    if bool(bad.any()):
        where = tuple(int(i[0]) for i in xp.nonzero(bad))
        raise NaNScore(f"routing score {where} of {scores.shape} is NaN, which has no rank: look "
                        "for NaN or infinity in the input or in the routing weights")


class RoutingTrace(NamedTuple):
    """What the routing network computed: c (4) and m (5) of every hidden layer, z (6) of all but
    the last, whose z routes nothing.
    """

    c: tuple[Array, ...]
    m: tuple[Array, ...]
    z: tuple[Array, ...]


def routing_forward(x: Array, V: Sequence[Any], p_k: float, ties: Ties, g: Activation,
                    exact: bool = False,
                    scores: Callable[[Array, Any], Array] = project) -> RoutingTrace:
    """Run the routing network, eq. (4)-(6), with z_0 = x.

    ``c_l = V_l z_{l-1}``,  ``m_l = C_{k_l}(c_l)``,  ``z_l = m_l o g(c_l)``

    Parameters
    ----------
    x : array (..., N_0), float
        The network's input. float16 is raised to float32: reduced precision flips masks.
    V : sequence of arrays (N_l, N_{l-1})
        Fixed random weights, one a hidden layer.
    p_k : float
        Proportion of neurons that survive, in (0, 1].
    ties : {"strict", "threshold", "index"}
        See `kwta_mask`.
    g : Activation
        The routing network's own activation; the paper uses the identity.
    exact : bool
        Whether each z is put `on_grid` before it is multiplied, so that for V of
        `weight_on_grid` and a g that is exact, identity or relu, the masks are the same bits in
        any order of summation.
    scores : function of z and V_l
        What computes ``V_l z_{l-1}``, where another router of `comet_np.gates.routers` does.

    Returns
    -------
    RoutingTrace
        m as `cap` gives them; z as the next layer reads them.
    """
    c: list[Array] = []
    m: list[Array] = []
    z = [whole(x)]
    for V_l in V:
        if m:
            z.append(masked(c[-1], m[-1], g))  # (..., N_{l-1})
        if exact:
            z[-1] = on_grid(z[-1], grid_bits(V_l.shape[1]).z)
        c.append(scores(z[-1], V_l))  # (..., N_l)
        m.append(cap(c[-1], winners(p_k, c[-1].shape[-1]), ties))  # (..., N_l)
    return RoutingTrace(tuple(c), tuple(m), tuple(z[1:]))


def whole(x: Array) -> Array:
    """Return x in float32 or better, in which routing scores are taken."""
    xp_of(x)  # says what it should be
    return x.astype("float32") if x.dtype.itemsize < 4 else x


class GridBits(NamedTuple):
    """Bits, besides the sign, of the integers of z and of V on their grids."""

    z: int
    V: int


MOST_BITS = 7  # with its sign a number then fits int8, and bfloat16 and TF32 hold it exactly
FLOAT32_BITS = 24  # float32 holds all integers up to 2^24
FURTHEST = 100  # exponent up to which nothing over- or underflows in float32, for any N_in


def grid_bits(N_in: int) -> GridBits:
    """Return the bits (b, v) of exact routing for sums of N_in products.

    ``b + v = min(14, 24 - ceil(log2 N_in))``,  ``b = ceil((b + v) / 2)``

    All partial sums of products of such integers, in any order, are integers below
    ``N_in 2^b 2^v <= 2^24``, which float32 holds: no addition rounds.

    Raises
    ------
    UserError
        If N_in leaves no bits.
    """
    both = min(2 * MOST_BITS, FLOAT32_BITS - (N_in - 1).bit_length())
    if both < 2:
        raise UserError(f"exact routing takes at most {2**(FLOAT32_BITS - 2):,} inputs of a layer, "
                        f"beyond which float32 leaves no bits for them, got {N_in:,}: route by "
                        "Comet(exact=False)")
    return GridBits(both - both // 2, both // 2)


def on_grid(z: Array, bits: int) -> Array:
    """Return z (..., N) rounded to integers of so many bits times a power of two for each row.

    ``z_q = n u``,  ``n = clip(rint(z / u), -(2^bits - 1), 2^bits - 1)``,  ``u = 2^(E - bits)``

    E is the exponent of the row's largest, ``max|z| = f 2^E`` with 0.5 <= f < 1, as frexp gives it,
    but at least -100 and at most 100; of a row of zeros it is 0. rint takes halves to even. A row
    with NaN or infinity becomes NaN, of which `kwta_mask` tells.

    Division by u and multiplication are exact, so that float32 and float64 give the same numbers.
    So do sums of products with a `weight_on_grid`, in any order: each is an integer below 2^24, see
    `grid_bits`, times the product of both u, which is a power of two between the limits of float32.
    """
    xp = xp_of(z)
    top = abs(z).max(axis=-1, keepdims=True)  # (..., 1)
    E = xp.clip(xp.frexp(top)[1], -FURTHEST, FURTHEST)
    unit = xp.where(xp.isfinite(top), xp.ldexp(xp.ones_like(top), E - bits), xp.nan)
    return _rounded_to(unit, z, bits)


def weight_on_grid(V: Array) -> Array:
    """Return V (N, N_in) on the grid of exact routing: `on_grid` with one exponent for all rows.

    That of the bound of V's law, ``1 / sqrt(N_in) = f 2^E``, with `grid_bits`' bits v.
    """
    N_in = V.shape[1]
    bits = grid_bits(N_in).V
    _, E = math.frexp(1 / math.sqrt(N_in))
    return _rounded_to(2.0**(E - bits), V, bits)


def _rounded_to(unit: Array | float, z: Array, bits: int) -> Array:
    xp, most = xp_of(z), 2**bits - 1
    return xp.clip(xp.rint(z / unit), -most, most) * unit


def log10_experts(N: int, k: int) -> float:
    """Return log10 of C(N, k), the number of experts of a layer of N neurons with k winners.

    The paper's example, N = 1000 and k = 100, gives 139.8, that is 6.4e139.
    """
    if not 0 <= k <= N:
        raise UserError(f"the number of experts C(N, k) needs 0 <= k <= N, got N = {N}, k = {k}")
    return (math.lgamma(N + 1) - math.lgamma(k + 1) - math.lgamma(N - k + 1)) / math.log(10)
