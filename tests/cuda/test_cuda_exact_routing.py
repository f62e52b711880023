"""Exact routing on the device: the masks of NumPy, bit for bit."""

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.functional.packing import unpacked

from ..test_exact_routing import EXACT, KINDS, PLAIN, routed, rows, weights


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_numpy(kind, dtype, gpu, draw):
    x, V = rows(kind, 200, draw), weights(EXACT, kind)
    masks = EXACT.trace(gpu.asarray(x, dtype), tuple(gpu.asarray(V_l, dtype) for V_l in V)).m
    for ours, m in zip(routed(x, V, EXACT), masks, strict=True):
        np.testing.assert_array_equal(gpu.to_host(unpacked(m, ours.shape[1])), ours)
    gpu.check_errors()


def test_weights_are_those_of_numpy(gpu):
    for V, theirs in zip(weights(EXACT), EXACT.init((40, 50, 30, 34, 3), 3, gpu,
                                                                "float32"), strict=True):
        np.testing.assert_array_equal(gpu.to_host(theirs), V)
        EXACT.check("spec", theirs)
    plain = gpu.asarray(weights(PLAIN)[0])
    with pytest.raises(UserError, match="is not on the grid of exact routing"):
        EXACT.check("spec", plain)
