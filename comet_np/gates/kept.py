"""Masks computed before and kept as bits, for a fixed data set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..backends import backend_of, described, xp_of
from ..errors import UserError
from ..functional.packing import pack_masks, unpack_masks
from .base import Array, Gate, Pass, Tree
from .bernoulli import examples


@dataclass(frozen=True)
class Kept(Gate):
    """m_l as kept for each example of a data set; the fixed weights are `keep`'s bits.

    The number of an example that is not among the n kept ones is a UserError on the CPU. A GPU
    would have to wait for the check: there CuPy takes the numbers modulo n.
    """

    depends_on: ClassVar[Literal["example"]] = "example"

    def shapes(self, widths: tuple[int, ...]) -> None:
        return None  # by `check_bits`: as many rows as there are examples

    def masks(self, x: Array, fixed: Array, config: Any, at: Pass) -> tuple[Array, ...]:
        check_bits(fixed, config.widths)
        numbers = examples(at, x)
        try:
            bits = fixed[numbers]
        except IndexError:
            raise UserError(f"the masks of {len(fixed)} examples were kept, numbers 0 to "
                            f"{len(fixed) - 1}: got {numbers.max()}") from None
        return unpack_masks(bits, config.widths[1:-1])


def check_bits(bits: Array, widths: tuple[int, ...]) -> None:
    """Raise a UserError unless `bits` are as wide as the masks of these layers."""
    wanted = sum(-(-N // 8) for N in widths[1:-1])
    shape: tuple[int, ...] = getattr(bits, "shape", ())
    if len(shape) < 2 or shape[-1] != wanted or bits.dtype != "uint8":
        raise UserError("the gate Kept needs the bits that comet_np.gates.keep returns, uint8 "
                        f"(n, ..., {wanted}) for a network of widths {widths}, got "
                        f"{described(bits)}")
    backend_of(bits)


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
        If the masks depend on more than that, or the gate gives none there, or there are no inputs.
    """
    if gate.depends_on is None:
        raise UserError(f"the masks of the gate {type(gate).__name__} change as the network learns "
                        "and cannot be kept")
    blocks = []
    for x, at in inputs:
        masks = gate.masks(x, fixed, config, at)
        if any(m is None for m in masks):
            raise UserError(f"the gate {type(gate).__name__} gives no masks in evaluation: say "
                            "Pass(train=True, example=numbers) with each x")
        blocks.append(pack_masks(masks))
    if not blocks:
        raise UserError("there are no inputs whose masks could be kept: expected pairs (x, Pass)")
    return xp_of(blocks[0]).concatenate(blocks)
