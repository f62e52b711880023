"""Layer-wise routing: eq. (4) with the layer's own input in place of the routing network's."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..functional.hidden import Mask
from ..functional.linear import project
from ..functional.routing import cap, whole, winners
from .base import Array, Pass
from .comet import Routed, Weights


@dataclass(frozen=True)
class Layerwise(Routed):
    """m_l = C_k(c_l) with c_l = V_l x_{l-1}, V fixed.

    Attributes
    ----------
    p_k, ties
        Proportion of active neurons, in (0, 1]; rule for ties, see `comet_np.kwta_mask`.
    """

    def masks(self, x: Array, fixed: Weights, config: Any, at: Pass) -> tuple[Mask, ...]:
        return tuple(partial(self._mask, V_l) for V_l in fixed)

    def _mask(self, V_l: Array, x: Array, a: Array) -> Array:
        c = project(whole(x), V_l)  # (..., N_l)
        return cap(c, winners(self.p_k, len(V_l)), self.ties)
