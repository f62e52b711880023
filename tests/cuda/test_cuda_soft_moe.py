"""The soft mixture of experts on a GPU, as it is and as a CUDA graph: NumPy's numbers."""

import numpy as np
import pytest

from comet_np.backends import get_backend
from comet_np.experiments import pooled, softmoe
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.models import soft_moe
from comet_np.models.soft_moe import SoftMoEConfig
from comet_np.optim import OptimizerConfig
from comet_np.tree import leaves, tree_map, zeros_like

from ..runs import images
from ..test_soft_moe import CASES, layer
from ..tolerances import assert_close
from .test_cuda_training import assert_as_on_numpy


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("config", CASES, ids=str)
def test_it_equals_numpys_in_and_outside_a_graph(gpu, config, dtype, draw):
    x, params, dy = (tree_map(lambda a: a.astype(dtype), each) for each in layer(config, draw))

    def work_on(backend):
        arrays = tree_map(backend.asarray, (x, params, dy))

        def work():
            grads = zeros_like(arrays[1])
            y, cache = soft_moe.forward(*arrays[:2], (), config)
            return y, soft_moe.backward(arrays[2], cache, arrays[1], grads, config), grads

        return backend.capture(work)

    expected = work_on(get_backend("numpy"))()
    work = work_on(gpu)
    for _ in ("ordinary", "captured", "replayed"):
        for ours, numpys in zip(leaves(work()), leaves(expected), strict=True):
            assert_close(gpu.to_host(ours), numpys, "sum")


def test_the_host_does_not_wait(machine, draw):
    gpu, config = get_backend("cupy"), SoftMoEConfig((5, 6, 3), 3)
    x, params, dy = (tree_map(gpu.asarray, each) for each in layer(config, draw))
    with machine.no_waiting():
        _, cache = soft_moe.forward(x, params, (), config)
        soft_moe.backward(dy, cache, params, params, config)


def test_kept_experts_equal_numpys(gpu, draw):
    config = SoftMoEConfig((5, 6, 3), 3)
    x, params, _ = layer(config, draw)
    kept = np.array([[True, False, True], [False, True, False]])
    expected, _ = soft_moe.forward(x, params, (), config, kept)
    y, _ = soft_moe.forward(gpu.asarray(x), tree_map(gpu.asarray, params), (), config,
                            gpu.asarray(kept))
    assert_close(gpu.to_host(y), expected, "sum")


def test_training_in_a_graph_equals_numpys(gpu, tmp_path, small_blocks):
    model = pooled.of_images(16, 3, 4, 3, 5, "softplus")
    config = RunConfig(model, TrainConfig(OptimizerConfig("adam"), batch=8, epochs=1,
                                          precision="float64"))
    assert_as_on_numpy(gpu, config, images(), tmp_path, "training")


def test_accuracies_of_parts_equal_numpys(gpu):
    model = pooled.of_images(16, 3, 4, 4, 5, "softplus")
    spec = softmoe.SpecialistCell("images", None, (0.5,), 2, RunConfig(model))
    params, _ = pooled.init(model)
    found = (softmoe.accuracies(spec, tree_map(backend.asarray, params), images(), backend)
             for backend in (gpu, get_backend("numpy")))
    assert next(found) == next(found)
