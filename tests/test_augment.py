"""Augmentation: each choice moves the pixels it says, and a stream alone decides the choices."""

import math
from dataclasses import replace

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.experiments.datasets.augment import AUGMENTATIONS, CHOICES, apply, augmentation
from comet_np.experiments.training import RunConfig
from comet_np.models.mlp import MLPConfig
from comet_np.rng import stream
from tests.runs import TRAINING, images, trained

EVERY = np.array(CHOICES["crop_flip"])
SMALL = 3, 32, 32
AUGMENTED = RunConfig(MLPConfig((3072, 5), gate=None), replace(TRAINING, augment="crop_flip"))


def changed(x, image, mirrored, dy, dx):
    """Return an image (N,) of this shape after one choice, pixel by pixel."""
    old, (_, height, width) = x.reshape(image), image
    new = np.zeros_like(old)
    for i in range(height):
        for j in range(width):
            row, column = i + dy, j + dx
            if 0 <= row < height and 0 <= column < width:
                new[:, i, width - 1 - j if mirrored else j] = old[:, row, column]
    return new.reshape(-1)


@pytest.mark.parametrize(("image", "dtype"), [
    *((SMALL, dtype) for dtype in ("uint8", "float32", "float64")), ((3, 64, 64), "uint8"),
    ((1, 5, 11), "float32"), ((2, 9, 3), "uint8")])
def test_every_choice_moves_the_pixels_it_says(draw, image, dtype):
    meanings = [(mirrored, dy, dx) for mirrored in (0, 1) for dy in range(-4, 5)
                for dx in range(-4, 5)]
    choices = np.array([mirrored + 2 * (9 * dy + dx) for mirrored, dy, dx in meanings])
    assert sorted(choices) == EVERY.tolist()
    x = draw.integers(1, 256, (len(choices), math.prod(image))).astype(dtype)
    before = x.copy()
    result = apply(x, choices, image)
    assert (result.shape, result.dtype) == (x.shape, x.dtype)
    for new, old, meaning in zip(result, x, meanings, strict=True):
        np.testing.assert_array_equal(new, changed(old, image, *meaning), str(meaning))
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0, 3)])
def test_any_leading_axes(draw, shape):
    x = draw.integers(256, size=(*shape, 3072), dtype=np.uint8)
    choices = draw.choice(EVERY, shape)
    result = apply(x, np.asarray(choices), SMALL)
    assert result.shape == x.shape
    flat = apply(x.reshape(-1, 3072), np.reshape(choices, -1), SMALL)
    np.testing.assert_array_equal(result.reshape(-1, 3072), flat)


def test_the_result_is_never_a_view_and_any_memory_order_will_do(draw):
    x = np.asfortranarray(draw.integers(256, size=(5, 3072), dtype=np.uint8))
    x.flags.writeable = False
    result = apply(x, np.zeros(5, np.int64), SMALL)
    np.testing.assert_array_equal(result, x)
    assert not np.shares_memory(result, x)
    np.testing.assert_array_equal(apply(x[::-2], EVERY[:6:2], SMALL),
                                  apply(x[::-2].copy(), EVERY[:6:2], SMALL))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_choices_are_a_function_of_the_stream(name):
    def drawn(*key, n=20_000):
        return AUGMENTATIONS[name].draw(stream(*key), n)

    choices = drawn(3, "augment", 1)
    assert (choices.shape, choices.dtype) == ((20_000,), np.int64)
    np.testing.assert_array_equal(choices, drawn(3, "augment", 1))
    for other in (drawn(4, "augment", 1), drawn(3, "augment", 2)):
        assert np.mean(choices == other) < 0.6
    assert drawn(3, "augment", 1, n=0).shape == (0,)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_all_choices_are_equally_likely(draw, name):
    n = 40_000
    values, counts = np.unique(AUGMENTATIONS[name].draw(draw, n), return_counts=True)
    number = {"flip": 2, "crop": 81, "crop_flip": 162}[name]
    assert len(values) == number
    assert set(values.tolist()) == set(CHOICES[name])
    mean = n / number
    assert (abs(counts - mean) < 5 * np.sqrt(mean)).all()
    assert set(values % 2) == ({0} if name == "crop" else {0, 1})
    assert set(values // 2) == ({0} if name == "flip" else set(range(-40, 41)))


def test_an_unknown_name_is_said_with_the_nearest():
    assert augmentation("crop") is AUGMENTATIONS["crop"]
    with pytest.raises(UserError, match='unknown augmentation "flop"; did you mean "flip"'):
        augmentation("flop")


@pytest.mark.parametrize("shape", [(4, 12), (3072, 1), ()])
def test_what_is_no_image_is_refused_in_one_sentence(shape):
    with pytest.raises(UserError) as caught:
        apply(np.zeros(shape, np.uint8), np.zeros(shape[:-1], np.int64), SMALL)
    text = str(caught.value)
    assert "\n" not in text
    for part in ("3072", "32x32", f"got an array of shape {shape}", "train without augmentation"):
        assert part in text


def test_data_without_an_images_shape_are_refused(tmp_path):
    """Though their examples are as long as images are."""
    data = replace(images(), image=None)
    config = replace(AUGMENTED, training=replace(AUGMENTED.training, augment="flip"))
    with pytest.raises(UserError, match="these data say no image's shape, got an array of shape"):
        trained(config, data, tmp_path)


def test_images_of_any_shape_are_trained_on(tmp_path):
    """Each choice of the plan moves its image as that image's shape says."""
    data = replace(images(), image=(2, 24, 64))
    batches = []

    def watch(run):
        whole = run.training.batch
        run.training.batch = lambda *plan: batches.append((plan, whole(*plan))) or batches[-1][1]

    trained(AUGMENTED, data, tmp_path, prepare=watch)
    (rows, choices), batch = batches[0]
    moved = apply(data.x_train[rows], choices, data.image).astype("float64")
    np.testing.assert_array_equal(batch.x, moved * data.scale + data.shift)
    assert (moved != data.x_train[rows]).any()
