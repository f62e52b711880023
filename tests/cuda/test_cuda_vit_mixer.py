"""The ViT and the MLP-Mixer on a GPU, as they are and as a CUDA graph: NumPy's numbers."""

from dataclasses import replace

import numpy as np
import pytest

from comet_np import gates
from comet_np.backends import get_backend
from comet_np.benchmarks import language_workers
from comet_np.benchmarks.vision_workers import run_of
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.gates import Pass
from comet_np.models import module_of
from comet_np.optim import OptimizerConfig
from comet_np.tree import leaves, tree_map, zeros_like

from ..runs import images
from ..test_vit_mixer import CASES, MIXER, ONE, VIT, cases, network
from ..tolerances import assert_close
from .paper import at_depth, counted
from .test_cuda_training import assert_as_on_numpy

GATED = {f"{name}, {type(gate).__name__}": replace(config, gate=gate) for name, config in
         ONE.items() for gate in (gates.TopK(), gates.Layerwise(), gates.Bernoulli())}
DROPPED = {name: replace(config, dropout=0.2, hidden_dropout=0.2) for name, config in ONE.items()
           } | {"ViT, weights": replace(VIT, weight_dropout=0.3)}


@cases(CASES | GATED | DROPPED)
def test_it_equals_numpys_in_and_outside_a_graph(gpu, config, draw):
    x, params, fixed, dy = network(config, draw, batch=(3,))
    model = module_of(config)

    def work_on(backend):
        x_, params_, fixed_, dy_, step, example = tree_map(
            backend.asarray, (x, params, fixed, dy, np.array(4), np.array([5, 0, 2])))

        def work():
            grads = zeros_like(params_)
            y, cache = model.forward(x_, params_, fixed_, config, at=Pass(True, step, example))
            dx = model.backward(dy_, cache, params_, grads, config)
            return y, dx, grads, tree_map(lambda m: m.astype(y.dtype), cache.masks)

        return backend.capture(work)

    expected = work_on(get_backend("numpy"))()
    work = work_on(gpu)
    for _ in ("ordinary", "captured", "replayed"):
        for ours, numpys in zip(leaves(work()), leaves(expected), strict=True):
            scale = np.abs(numpys).max() + np.ones(numpys.shape)
            assert_close(gpu.to_host(ours), numpys, "sum", scale)


@cases(ONE)
def test_the_host_does_not_wait(machine, config, draw):
    gpu, model = get_backend("cupy"), module_of(config)
    x, params, fixed, dy = tree_map(gpu.asarray, network(config, draw))
    with machine.no_waiting():
        _, cache = model.forward(x, params, fixed, config, at=Pass(train=True))
        model.backward(dy, cache, params, params, config)


@pytest.mark.parametrize("augment", [None, "crop_flip"])
@cases({name: replace(config, image=(3, 32, 32), patch=16, classes=5, depth=1, dropout=0.1)
        for name, config in {"ViT": VIT, "Mixer": MIXER}.items()})
def test_training_in_a_graph_equals_numpys(gpu, config, augment, tmp_path, small_blocks):
    training = TrainConfig(OptimizerConfig("adam"), batch=8, epochs=1, augment=augment,
                           precision="float64")
    assert_as_on_numpy(gpu, RunConfig(config, training), images(), tmp_path, "training")


@pytest.mark.parametrize(("model", "gate", "launches", "products"), [
    ("vit-512", "comet", 374, 119), ("vit-512", "standard", 362, 113),
    ("mixer-512", "comet", 286, 89), ("mixer-512", "standard", 262, 77)])
def test_a_step_on_paper(machine, model, gate, launches, products):
    """What docs/gpu.md says; the multiply-adds are those that the model counts."""
    run = run_of(model, gate)
    step = counted(run, 16)
    assert (step.launches.total(), step.launches["product"]) == (launches, products)
    assert step.multiply_adds == 16 * sum(module_of(run.model).multiply_adds(run.model))


@pytest.mark.parametrize(("precision", "gate"), [("float32", "comet"), ("float16", "standard")])
def test_a_step_of_gpt2_on_paper(machine, precision, gate):
    run = language_workers.run_of("gpt2-tiny", gate, precision)
    run = replace(run, model=replace(run.model, depth=4))
    step = counted(run, 3)
    found = at_depth(run, 3)
    for each in found, step:
        for name in "squared_norm", "sum":  # whose partial sums are of whole blocks
            each.bytes.pop(name, None)
    assert found == step
    assert step.multiply_adds == 3 * sum(module_of(run.model).multiply_adds(run.model))
