"""Routers on the device: the scores of NumPy, in graphs that resume bit for bit."""

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.gates import Comet
from comet_np.gates.routers import ROUTERS
from comet_np.models.vit import ViTConfig
from comet_np.optim import OptimizerConfig
from comet_np.tree import leaves

from ..runs import assert_bit_for_bit, images, stopped, trained
from ..test_routers import SMALL, sizes
from ..tolerances import assert_close


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ROUTERS)
def test_scores_are_those_of_numpy(name, dtype, gpu, draw):
    router = ROUTERS[name]
    for N_in, N in sizes(name):
        V, theirs = (router.init(N_in, N, 1, 1, backend, dtype)
                     for backend in (get_backend("numpy"), gpu))
        for one, two in zip(leaves(V), leaves(theirs), strict=True):
            np.testing.assert_array_equal(one, gpu.to_host(two))
        for batch in ((5,), (2, 3)):
            z = draw.standard_normal((*batch, N_in)).astype(dtype)
            c = gpu.to_host(router.scores(gpu.asarray(z), theirs))
            if name.startswith("sparse"):
                np.testing.assert_array_equal(c, router.scores(z, V))
            else:
                assert_close(c, router.scores(z, V), "sum",
                             summed=np.full(c.shape, N_in * abs(z).max()))
    gpu.check_errors()


@pytest.mark.parametrize("name", [name for name in SMALL if name != "dense"])
def test_training_resumes_bit_for_bit(name, gpu, tmp_path):
    """In blocks, whose masks are not kept."""
    config = RunConfig(ViTConfig((3, 32, 32), 16, 5, 8, 2, 2, 12, gate=Comet(router=name)),
                       TrainConfig(OptimizerConfig("adam"), lr=1e-2, batch=8, epochs=1))
    data = images()
    whole = trained(config, data, tmp_path / "whole", gpu)
    assert stopped(config, data, tmp_path / "parts", gpu)
    assert_bit_for_bit(trained(config, data, tmp_path / "parts", gpu), whole)
