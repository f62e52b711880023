"""The routing network of COMET: the cap C_k and equations (3)-(6). Read this file first.

Routing has no backward: masks are piecewise constant in the scores and the routing weights V are
fixed, so their derivative is taken as 0, as in the paper.
"""

import math
from collections.abc import Sequence
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


def routing_forward(x: Array, V: Sequence[Array], p_k: float, ties: Ties,
                    g: Activation) -> RoutingTrace:
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

    Returns
    -------
    RoutingTrace
        m as `cap` gives them.
    """
    c: list[Array] = []
    m: list[Array] = []
    z = [whole(x)]
    for V_l in V:
        if m:
            z.append(masked(c[-1], m[-1], g))  # (..., N_{l-1})
        c.append(project(z[-1], V_l))  # (..., N_l)
        m.append(cap(c[-1], winners(p_k, len(V_l)), ties))  # (..., N_l)
    return RoutingTrace(tuple(c), tuple(m), tuple(z[1:]))


def whole(x: Array) -> Array:
    """Return x in float32 or better, in which routing scores are taken."""
    xp_of(x)  # says what it should be
    return x.astype("float32") if x.dtype.itemsize < 4 else x


def log10_experts(N: int, k: int) -> float:
    """Return log10 of C(N, k), the number of experts of a layer of N neurons with k winners.

    The paper's example, N = 1000 and k = 100, gives 139.8, that is 6.4e139.
    """
    if not 0 <= k <= N:
        raise UserError(f"the number of experts C(N, k) needs 0 <= k <= N, got N = {N}, k = {k}")
    return (math.lgamma(N + 1) - math.lgamma(k + 1) - math.lgamma(N - k + 1)) / math.log(10)
