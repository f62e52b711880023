"""Experiments that measure networks, on a GPU: each cell has NumPy's numbers."""


import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.experiments import diversity, grid, interpret, masks, ntk, sensitivity, stability
from comet_np.experiments.datasets import Dataset
from comet_np.experiments.experiment import Place
from comet_np.experiments.progress import Progress
from comet_np.experiments.training import TrainConfig
from comet_np.optim import OptimizerConfig

from ..tolerances import TOLERANCES

TRAINING = TrainConfig(OptimizerConfig("momentum"), lr=0.1, batch=8, epochs=1, precision="float64")
TRAINED = stability.StabilityConfig("glyphs", 2, 2, width=12, layers=3, training=TRAINING)
LEVELS = sensitivity.SensitivityConfig(("glyphs",), widths=(12,), layers=3, training=TRAINING)
KERNELS = ntk.NtkConfig(("comet", "top-k"), (0.25,), points=6, inputs=10, width=12, hidden=2,
                        dataset="glyphs", images=7, image_width=8, image_hidden=2, seeds=2,
                        training=TRAINING)
MASKS = diversity.DiversityConfig("glyphs", (20,), (0.25,), hidden=2, images=60, compared=30)
NEAR = interpret.InterpretConfig("glyphs", 20, 2, (0.25,), 40, neighbours=3)
CELLS = {
    "diversity": (diversity, diversity.cell_of(MASKS, 20, 0.25, 1)),
    "interpret": (interpret, interpret.cell_of(NEAR, 0.25, 1)),
    "stability": (stability, stability.cell_of(TRAINED, (0, 1))),
    "sensitivity": (sensitivity, grid.cell_of(LEVELS, grid.panels(LEVELS)[5], "comet", 1)),
    **{f"ntk, {network.dataset or 'random'}, {network.model}": (ntk, ntk.cell_of(
        KERNELS, network, 1)) for network in ntk.networks(KERNELS)}}


def noise(*given):
    """Return 30, 20 and 10 images of noise, each of its own brightness, in 10 classes."""
    draw = np.random.default_rng(1)
    parts = [((draw.integers(0, 60, (n, 3072)) + draw.integers(0, 196, (n, 1))).astype("uint8"),
              draw.integers(0, 10, n)) for n in (30, 20, 10)]
    return Dataset("noise", "classification", *(array for part in parts for array in part), 10,
                   2 / 255, -1.0)


def assert_equal(ours, numpys):
    """Assert that results are equal but for rounding, times aside."""
    assert type(ours) is type(numpys)
    if isinstance(ours, dict):
        assert ours.keys() == numpys.keys()
        for name in ours.keys() - {"seconds"}:
            assert_equal(ours[name], numpys[name])
    elif isinstance(ours, list | tuple):
        for one, other in zip(ours, numpys, strict=True):
            assert_equal(one, other)
    elif isinstance(ours, float):
        tolerance = TOLERANCES["training"]["float64"]
        assert ours == pytest.approx(numpys, rel=tolerance, abs=tolerance)
    else:
        assert ours == numpys


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_has_numpys_numbers(name, gpu, tmp_path, monkeypatch):
    for module in masks, grid, ntk:
        monkeypatch.setattr(module, "load", noise)
    module, cell = CELLS[name]
    assert_equal(*(module.run_cell(cell.spec, Place(
        tmp_path / backend.name, backend, None, Progress(1))) for backend in (
            gpu, get_backend("numpy"))))
