"""Masks as bits: they come back, whatever the widths, the leading axes and the layout."""

import numpy as np
import pytest

from comet_np.backends import reference
from comet_np.functional.packing import pack_masks, split_masks, unpack_masks, unpacked

WIDTHS = (8, 1, 17, 100)
BYTES = (1, 1, 3, 13)
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


def some_masks(draw, batch, widths=WIDTHS):
    return [draw.random((*batch, N)) < 0.5 for N in widths]


@both
@pytest.mark.parametrize("batch", [(), (0,), (1,), (5,), (256,), (257,), (2, 3)])
def test_packed_masks_come_back(batch, kernels, draw):
    masks = some_masks(draw, batch)
    with np.errstate() if kernels else reference():
        bits = pack_masks(masks)
        back = unpack_masks(bits, WIDTHS)
    assert (bits.dtype, bits.shape) == ("uint8", (*batch, sum(BYTES)))
    for mask, again in zip(masks, back, strict=True):
        assert again.dtype == bool
        np.testing.assert_array_equal(mask, again)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_split_masks_are_the_parts_of_each_layer(batch, draw):
    masks = some_masks(draw, batch)
    bits = pack_masks(masks)
    parts = split_masks(bits, WIDTHS)
    assert [part.shape for part in parts] == [(*batch, n) for n in BYTES]
    assert all(np.shares_memory(part, bits) for part in parts)
    for part, mask in zip(parts, masks, strict=True):
        np.testing.assert_array_equal(part, np.packbits(mask, axis=-1))
        np.testing.assert_array_equal(unpacked(part, mask.shape[-1]), mask)
        assert unpacked(mask, mask.shape[-1]) is mask
    np.testing.assert_array_equal(pack_masks(parts), bits)  # what is packed already stays
    np.testing.assert_array_equal(pack_masks([masks[0], *parts[1:]]), bits)


@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.repeat(a, 2, -1)[..., ::2]])
def test_the_layout_in_memory_does_not_matter(layout, draw):
    masks = some_masks(draw, (5,))
    bits = pack_masks(masks)
    np.testing.assert_array_equal(pack_masks([layout(m) for m in masks]), bits)
    for mask, again in zip(masks, unpack_masks(layout(bits), WIDTHS), strict=True):
        np.testing.assert_array_equal(mask, again)


def test_packed_masks_have_the_highest_bit_first():
    first, second = np.zeros((1, 3), bool), np.zeros((1, 9), bool)
    first[0, 0] = second[0, 7] = second[0, 8] = True
    np.testing.assert_array_equal(pack_masks([first, second]), [[0b10000000, 0b1, 0b10000000]])
