"""Masks as bits: one bit a neuron, so that those of a whole data set can be kept.

Each layer begins at a whole byte, and the highest bit of a byte comes first.
"""

from collections.abc import Sequence
from typing import Any

from ..backends import backend_of, bits_fit, described, mask_fits, overridable, xp_of
from ..errors import UserError

Array = Any


def pack_masks(masks: Sequence[Array]) -> Array:
    """Return the masks of all layers bit-packed side by side.

    Parameters
    ----------
    masks : sequence of bool arrays (..., N_l), or of arrays that are bit-packed already

    Returns
    -------
    bits : uint8 array (..., sum of ceil(N_l / 8))

    Raises
    ------
    UserError
        If there are none, or they are not masks of the same examples.
    """
    if not masks:
        raise UserError("there are no masks to pack: expected one a hidden layer, got none")
    backend_of(*masks)
    if (any(m.dtype not in (bool, "uint8") or m.ndim == 0 for m in masks)
            or len({m.shape[:-1] for m in masks}) > 1):
        raise UserError("masks are bool arrays (..., N_l) of the same examples, or bit-packed "
                        f"uint8, got {', '.join(map(described, masks))}")
    return xp_of(masks[0]).concatenate([m if m.dtype == "uint8" else _packed(m) for m in masks],
                                       axis=-1)


def _packed(m: Array) -> Array:
    xp = xp_of(m)
    padded = xp.pad(m, [(0, 0)] * (m.ndim - 1) + [(0, -m.shape[-1] % 8)])
    return xp.packbits(padded.reshape(-1)).reshape(*m.shape[:-1], padded.shape[-1] // 8)


def check_mask(m: Array, shape: tuple[int, ...]) -> None:
    """Raise a UserError unless m is a mask of this shape: masks are never broadcast."""
    if not mask_fits(m, shape):
        backend_of(m)  # says what it should be
        raise UserError(f"a mask must be a bool array of the shape of the layer's output, {shape}, "
                        "or a bit-packed uint8 array of shape "
                        f"{(*shape[:-1], -(-shape[-1] // 8)) if shape else '(..., ceil(N / 8))'},"
                        f" got {described(m)}")


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

    Raises
    ------
    UserError
        If the bits are not those of masks of these widths.
    """
    if not bits_fit(bits, widths):
        wanted = sum(-(-N // 8) for N in widths)
        raise UserError(f"the masks of layers of widths {tuple(widths)} are packed as uint8 "
                        f"(..., {wanted}), got {described(bits)}")
    return tuple(unpacked(m, N) for m, N in zip(split_masks(bits, widths), widths, strict=True))


def split_masks(bits: Array, widths: Sequence[int]) -> tuple[Array, ...]:
    """Return the part of each layer in what `pack_masks` packed, still packed: views of `bits`."""
    masks, start = [], 0
    for N in widths:
        masks.append(bits[..., start:start + -(-N // 8)])
        start += -(-N // 8)
    return tuple(masks)
