"""Masks as bits: one bit a neuron, so that those of a whole data set can be kept.

Each layer begins at a whole byte, and the highest bit of a byte comes first.
"""

from collections.abc import Sequence
from typing import Any

from ..backends import overridable, xp_of

Array = Any


def pack_masks(masks: Sequence[Array]) -> Array:
    """Return the masks of all layers bit-packed side by side.

    Parameters
    ----------
    masks : sequence of bool arrays (..., N_l), or of arrays that are bit-packed already

    Returns
    -------
    bits : uint8 array (..., sum of ceil(N_l / 8))
    """
    return xp_of(masks[0]).concatenate([m if m.dtype == "uint8" else _packed(m) for m in masks],
                                       axis=-1)


def _packed(m: Array) -> Array:
    xp = xp_of(m)
    padded = xp.pad(m, [(0, 0)] * (m.ndim - 1) + [(0, -m.shape[-1] % 8)])
    return xp.packbits(padded.reshape(-1)).reshape(*m.shape[:-1], padded.shape[-1] // 8)


def unpacked(m: Array, N: int) -> Array:
    """Return a mask as bool (..., N); it may be bit-packed, uint8 (..., ceil(N / 8))."""
    if m.dtype == bool:
        return m
    bits = xp_of(m).unpackbits(m.reshape(-1)).reshape(*m.shape[:-1], 8 * m.shape[-1])
    return bits[..., :N].view(bool)


@overridable
def unpack_masks(bits: Array, widths: Sequence[int]) -> tuple[Array, ...]:
    """Return what `pack_masks` packed: bits (..., bytes), the N_l -> bool arrays (..., N_l).

    A backend whose layers read bits as fast may leave them packed.
    """
    return tuple(unpacked(m, N) for m, N in zip(split_masks(bits, widths), widths, strict=True))


def split_masks(bits: Array, widths: Sequence[int]) -> tuple[Array, ...]:
    """Return the part of each layer in what `pack_masks` packed, still packed: views of `bits`."""
    masks, start = [], 0
    for N in widths:
        masks.append(bits[..., start:start + -(-N // 8)])
        start += -(-N // 8)
    return tuple(masks)
