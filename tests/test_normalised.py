"""Images normalised colour by colour: the right numbers, in training, from files, on a GPU."""

from dataclasses import replace

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.experiments.datasets.base import scaled, spread
from comet_np.experiments.fit import trained_on
from comet_np.experiments.tasks import TASKS
from comet_np.experiments.training import RunConfig
from comet_np.experiments.training.model import load_run
from comet_np.models import mlp
from comet_np.records import read_json
from tests.runs import MODEL, TRAINING, small_data, stopped, trained
from tests.test_datasets import refused
from tests.tolerances import assert_close

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGE = 3, 2, 2  # the 12 inputs of `small_data`
RUN = RunConfig(MODEL, TRAINING)


def images():
    return replace(small_data(), image=IMAGE)


def by_hand(x):
    """Return images (n, 12) normalised colour by colour, float64."""
    planes = [(x[:, 4 * c:4 * c + 4] / 255 - MEAN[c]) / STD[c] for c in range(3)]
    return np.concatenate(planes, axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_colour_has_its_own_mean_and_deviation(dtype):
    data = images().normalised(MEAN, STD)
    found = TASKS["classification"].inputs(data.x_train, data.scale, data.shift, dtype)
    assert found.dtype == dtype
    assert_close(found, by_hand(data.x_train), "sum")
    for shape in ((12,), (5, 2, 12), (0, 12)):
        x = np.resize(data.x_train, shape)
        expected = by_hand(x.reshape(-1, 12)).reshape(shape)
        assert_close(scaled(x, data.scale, data.shift, dtype), expected, "sum")


def test_one_number_is_that_of_all_colours():
    data = images()
    whole, each = data.normalised(0.4, 0.2), data.normalised((0.4,) * 3, (0.2,) * 3)
    assert (whole.scale, whole.shift) == (each.scale, each.shift)
    one = scaled(data.x_train, whole.scale[0], whole.shift[0], "float32")
    np.testing.assert_array_equal(scaled(data.x_train, whole.scale, whole.shift, "float32"), one)
    np.testing.assert_array_equal(  # one of the two alone may be that of the planes
        scaled(data.x_train, whole.scale[0], whole.shift, "float32"), one)
    half = data.normalised(0.5, 0.5)
    assert_close(np.array([half.scale, half.shift]), np.array([[2 / 255] * 3, [-1.0] * 3]), "sum")


def test_a_run_goes_on_with_the_normalisation_that_it_began_with_only(tmp_path):
    data = images()
    digests = {each.digest for each in (data, data.normalised(MEAN, STD),
                                        data.normalised(MEAN, STD[::-1]),
                                        data.normalised(MEAN[::-1], STD))}
    assert len(digests) == 4
    assert data.normalised(MEAN, STD).digest in digests
    assert stopped(RUN, data.normalised(MEAN, STD), tmp_path, at=3)
    refused(lambda: trained(RUN, data.normalised(MEAN, 0.3), tmp_path), tmp_path)


@pytest.mark.parametrize(("mean", "std"), [
    (MEAN[:2], STD), (MEAN, STD[:2]), (MEAN, 0.0), (MEAN, (0.2, -0.2, 0.2)), (MEAN, np.nan),
    ((0.5, np.inf, 0.5), STD), ((), STD), ([[0.5] * 3], STD)])
def test_numbers_that_do_not_normalise_are_refused(mean, std):
    refused(lambda: images().normalised(mean, std), "small", "one for each of 3 colours")


def test_only_images_are_normalised():
    for data in (small_data(), small_data("regression")):
        refused(lambda data=data: data.normalised(MEAN, STD), "holds no images")


@pytest.mark.parametrize("value", [(), (1.0,) * 5])
def test_planes_that_do_not_divide_an_example_are_refused(value):
    refused(lambda: scaled(np.zeros((2, 12), np.uint8), value, 0.0, "float32"), "12 numbers",
            f"into {len(value)} planes")


@pytest.mark.usefixtures("small_blocks")
def test_training_is_that_on_inputs_normalised_before(tmp_path):
    data = images().normalised(MEAN, STD)
    factors = [spread(value, 12, "float64") for value in (data.scale, data.shift)]
    before = replace(data, scale=1.0, shift=0.0, **{
        name: getattr(data, name) * factors[0] + factors[1]
        for name in ("x_train", "x_val", "x_test")})
    ours, theirs = trained(RUN, data, tmp_path / "a"), trained(RUN, before, tmp_path / "b")
    assert ours.lines == theirs.lines
    np.testing.assert_array_equal(ours.arrays["flat"], theirs.arrays["flat"])


def test_a_trained_model_normalises_what_it_is_given(tmp_path):
    data = images().normalised(MEAN, STD)
    model = trained_on(data, RUN, folder=tmp_path / "run")
    stored = read_json(tmp_path / "run" / "config.json")["data"]
    assert (stored["scale"], stored["shift"]) == (list(data.scale), list(data.shift))
    expected = mlp.forward(by_hand(data.x_test), model.params, model.fixed, model.config)[0]
    for each in (model, load_run(tmp_path / "run"), load_run(model.save(tmp_path / "saved"))):
        assert (each.data.scale, each.data.shift) == (data.scale, data.shift)
        assert_close(each.output(data.x_test), expected, "training")
    trained_on(data, RUN, folder=tmp_path / "run")  # is read again
    with pytest.raises(UserError, match="other settings or data"):
        trained_on(images(), RUN, folder=tmp_path / "run")
    with pytest.raises(UserError):
        model.output(np.zeros((2, 9), np.uint8))
    refused(lambda: model.output(np.zeros((2, 10), np.uint8)), "10 numbers")
