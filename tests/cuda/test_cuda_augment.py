"""Augmentation on a GPU: the same bytes as NumPy's, without waiting, and within a CUDA graph."""

import math

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.experiments.datasets.augment import AUGMENTATIONS, apply
from comet_np.rng import stream

SMALL = 3, 32, 32


def images_and_choices(name, dtype, *shape, image=SMALL):
    """Return images (*shape, N) and a choice for each."""
    x = stream(1, "x").integers(256, size=(*shape, math.prod(image))).astype(dtype)
    n = int(np.prod(shape))
    return x, AUGMENTATIONS[name].draw(stream(1, "augment", 0), n).reshape(shape)


@pytest.mark.parametrize("image", [SMALL, (3, 64, 64), (1, 5, 11)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_bytes_are_those_of_numpy(gpu, name, dtype, image):
    for shape in ((), (300,), (2, 3), (0,)):
        x, choices = images_and_choices(name, dtype, *shape, image=image)
        ours = gpu.to_host(AUGMENTATIONS[name].apply(gpu.asarray(x), gpu.asarray(choices), image))
        assert ours.dtype == x.dtype
        np.testing.assert_array_equal(ours, apply(x, choices, image))


@pytest.mark.parametrize("image", [SMALL, (3, 64, 64)])
def test_a_captured_augmentation_reads_new_choices(gpu, image):
    x, choices = images_and_choices("crop_flip", "uint8", 16, image=image)
    images, rows, moves = gpu.asarray(x), gpu.asarray(np.arange(8)), gpu.asarray(choices[:8])
    out = gpu.asarray(np.zeros_like(x[:8]))

    def work():
        out[...] = apply(images[rows], moves, image)

    captured = gpu.capture(work)
    for first in (0, 4, 8):  # as it is, recorded, and again
        rows[...] = gpu.asarray(np.arange(first, first + 8))
        moves[...] = gpu.asarray(choices[first:first + 8])
        captured()
        np.testing.assert_array_equal(
            gpu.to_host(out), apply(x[first:first + 8], choices[first:first + 8], image))


def test_the_host_never_waits(machine):
    gpu = get_backend("cupy")
    x, choices = (gpu.asarray(a) for a in images_and_choices("crop_flip", "uint8", 5))
    with machine.no_waiting():
        apply(x, choices, SMALL)
