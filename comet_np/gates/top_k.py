"""Top-k: each layer masks itself, by its own pre-activations."""

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import unknown
from ..functional.hidden import Mask
from ..functional.routing import cap, whole, winners
from .base import Array, Pass
from .comet import Capped

OF = ("pre-activation", "activation")


@dataclass(frozen=True)
class TopK(Capped):
    """m_l = C_k(a_l).

    Attributes
    ----------
    p_k, ties
        Proportion of active neurons, in (0, 1]; rule for ties, see `comet_np.kwta_mask`.
    of : {"pre-activation", "activation"}
        Where the mask is taken: at a_l, as the paper says, or at f(a_l), as its published code does
        (the same for f that only rise, but for ties that rounding makes).
    """

    of: Literal["pre-activation", "activation"] = "pre-activation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in OF:
            raise unknown("place of the top-k mask", self.of, OF)

    def masks(self, x: Array, fixed: tuple[()], config: Any, at: Pass) -> tuple[Mask, ...]:
        def mask(x: Array, a: Array) -> Array:
            scores = a if self.of == "pre-activation" else config.f.forward(a)
            return cap(whole(scores), winners(self.p_k, a.shape[-1]), self.ties)

        return (mask,) * (len(config.widths) - 2)
