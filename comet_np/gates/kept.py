"""Masks computed before and kept as bits, for a fixed data set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..backends import xp_of
from ..errors import UserError
from ..functional.packing import pack_masks, unpack_masks
from .base import Array, Gate, Pass, Tree
from .bernoulli import examples


@dataclass(frozen=True)
class Kept(Gate):
    """m_l as kept for each example of a data set; the fixed weights are `keep`'s bits."""

    depends_on: ClassVar[Literal["example"]] = "example"

    def shapes(self, widths: tuple[int, ...]) -> None:
        return None  # by `check_bits`: as many rows as there are examples

    def masks(self, x: Array, fixed: Array, config: Any, at: Pass) -> tuple[Array, ...]:
        check_bits(fixed, config.widths)
        return unpack_masks(fixed[examples(at, x)], config.widths[1:-1])


def check_bits(bits: Array, widths: tuple[int, ...]) -> None:
    """Raise a UserError unless `bits` are as wide as the masks of these layers."""
    wanted = sum(-(-N // 8) for N in widths[1:-1])
    shape = getattr(bits, "shape", ())
    if shape[-1:] != (wanted,):
        raise UserError("the gate Kept needs the bits that comet_np.gates.keep returns, uint8 "
                        f"(n, ..., {wanted}) for a network of widths {widths}, got {shape}")


def keep(gate: Gate, inputs: Iterable[tuple[Array, Pass]], fixed: Tree, config: Any) -> Array:
    """Return the masks of a whole data set, for the gate `Kept`: uint8 (n, sum of ceil(N_l / 8)).

    Parameters
    ----------
    gate : Gate
        One whose masks depend on the network's input or the example's number alone.
    inputs : iterable of (x, Pass)
        The data set in order, a block of examples at a time.
    fixed : tree
        The gate's fixed weights.
    config : MLPConfig
        Of the network.

    Raises
    ------
    UserError
        If the masks depend on more than that.
    """
    if gate.depends_on is None:
        raise UserError(f"the masks of the gate {type(gate).__name__} change as the network learns "
                        "and cannot be kept")
    blocks = [pack_masks(gate.masks(x, fixed, config, at)) for x, at in inputs]
    return xp_of(blocks[0]).concatenate(blocks)
