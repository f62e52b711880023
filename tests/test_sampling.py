"""What a run draws, by its moments: weights, order, augmentation, dropout, masks of examples.

Bounds are five standard deviations of the estimate, whatever the number of draws.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from comet_np.experiments.training import RunConfig, loop
from comet_np.gates import Bernoulli, ExampleTied
from comet_np.models import mlp
from tests.runs import MODEL, TRAINING, images, small_data, trained

SIGMAS = 5


def assert_mean(samples, mean, variance):
    """Assert that independent samples of this variance have this mean."""
    samples = np.asarray(samples, dtype="float64")
    assert abs(samples.mean() - mean) < SIGMAS * (variance / samples.size) ** 0.5


def assert_uncorrelated(a, b):
    """Assert that paired samples do not tell anything of each other, to first order."""
    a, b = (np.ravel(v).astype("float64") for v in (a, b))
    n = min(a.size, b.size)
    assert abs(np.corrcoef(a[:n], b[:n])[0, 1]) < SIGMAS / n**0.5


def started(folder, data=None, model=None, **training):
    """Return a run before its first step."""
    config = RunConfig(replace(MODEL, **(model or {})), replace(TRAINING, epochs=0, **training))
    return trained(config, data or small_data(), folder).run


def test_initial_weights_are_uniform_and_each_array_has_its_own():
    found = {}
    for seed in 0, 1:
        params, V = mlp.init(mlp.MLPConfig((400, 300, 300, 200)), seed, dtype="float64")
        for layer, p in enumerate(params, start=1):
            found |= {(seed, "W", layer): p.weight, (seed, "b", layer): p.bias}
        found |= {(seed, "V", layer): V_l for layer, V_l in enumerate(V, start=1)}
    for (_, _, layer), a in found.items():
        u = a * (400, 300, 300)[layer - 1] ** 0.5  # on [-1, 1]
        assert abs(u).max() <= 1
        assert_mean(u, 0, 1 / 3)
        assert_mean(u**2, 1 / 3, 4 / 45)
        assert_mean(u**4, 1 / 5, 16 / 225)
    for a, b in combinations(found.values(), 2):
        assert_uncorrelated(a, b)
    W = found[0, "W", 1]
    assert_uncorrelated(W[1:], W[:-1])
    assert_uncorrelated(W[:, 1:], W[:, :-1])


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Return the order of 50 images and their choices in each of 2000 epochs: (2000, 2, 50)."""
    run = started(tmp_path_factory.mktemp("run"), images(), {"widths": (3072, 5)},
                  augment="crop_flip")
    return np.array([loop.order(run, epoch) for epoch in range(2000)])


def test_in_the_order_of_an_epoch_every_example_may_be_anywhere(plans):
    order, n = plans[:, 0], 50
    assert (np.sort(order, axis=1) == np.arange(n)).all()
    place = np.argsort(order, axis=1)  # of each example
    for example in 0, 17, n - 1:
        assert_mean(place[:, example], (n - 1) / 2, (n**2 - 1) / 12)
        counts = np.bincount(place[:, example], minlength=n)
        assert (abs(counts - 40) < SIGMAS * 40**0.5).all()
        assert_uncorrelated(place[1:, example], place[:-1, example])  # one epoch and the next
    follows = place[:, 18] == place[:, 17] + 1  # no neighbours stay neighbours
    assert_mean(follows, 1 / n, 1 / n)


def test_an_images_augmentation_tells_nothing_of_its_neighbours_place_or_next_epoch(plans):
    order, choices = plans[:, 0], plans[:, 1]
    values, counts = np.unique(choices, return_counts=True)
    assert len(values) == 162
    assert (abs(counts - choices.size / 162) < SIGMAS * (choices.size / 162) ** 0.5).all()
    assert_uncorrelated(choices, order)
    assert_uncorrelated(choices[:, 1:], choices[:, :-1])
    assert_uncorrelated(choices[1:], choices[:-1])


def test_dropout_drops_its_share_and_every_layer_step_and_mini_batch_others(tmp_path):
    run = started(tmp_path, model={"widths": (12, 600, 600, 5), "dropout": 0.3}, accumulate=2)
    batch, dropped = run.training.batch(np.arange(50)), []
    for step in range(3):
        run.learner.state = run.learner.state._replace(step=step)
        for part in range(2):
            made = run.learner.forward(batch, run.training, True, part)
            dropped += [layer.factor == 0 for layer in made.cache.dropped]
    assert len(dropped) == 3 * 2 * 2
    for a in dropped:
        assert_mean(a, 0.3, 0.3 * 0.7)
        assert_uncorrelated(a[1:], a[:-1])
        assert_uncorrelated(a[:, 1:], a[:, :-1])
    for a, b in combinations(dropped, 2):
        assert_uncorrelated(a, b)
    assert not run.learner.forward(batch, run.training).cache.dropped  # in evaluation


@pytest.mark.parametrize(("gate", "always"), [(Bernoulli(0.3), 0), (ExampleTied(0.3, 0.2), 120)])
def test_masks_of_examples_have_their_share_and_every_layer_and_example_others(gate, always,
                                                                              tmp_path):
    run = started(tmp_path, model={"widths": (12, 600, 600, 5), "gate": gate})
    batch = run.training.batch(np.arange(50))
    masks = run.learner.forward(batch, run.training, True).cache.masks
    for m in masks:
        assert m[:, :always].all()
        assert_mean(m[:, always:], 0.3, 0.3 * 0.7)
        assert_uncorrelated(m[1:, always:], m[:-1, always:])
        assert_uncorrelated(m[:, always + 1:], m[:, always:-1])
    assert_uncorrelated(*(m[:, always:] for m in masks))
    run.learner.state = run.learner.state._replace(step=7)  # the same in every epoch
    for m, again in zip(masks, run.learner.forward(batch, run.training, True).cache.masks,
                        strict=True):
        np.testing.assert_array_equal(m, again)
