"""GPT-2 on a GPU, as it is and as a CUDA graph, and its generation: NumPy's numbers."""

from dataclasses import replace

import numpy as np
import pytest

from comet_np import gates
from comet_np.backends import get_backend
from comet_np.gates import Pass
from comet_np.generation import generate
from comet_np.models import gpt2
from comet_np.tree import leaves, tree_map, zeros_like

from ..test_gpt2 import CASES, DROPPING, GPT2, cases, network
from ..tolerances import assert_close

VARIED = CASES | {
    "dropout": DROPPING, "recomputed": replace(DROPPING, recompute=True),
    "stream, recomputed": replace(DROPPING, routing="stream", recompute=True),
    "layer-wise": replace(GPT2, gate=gates.Layerwise()),
    "Bernoulli": replace(GPT2, gate=gates.Bernoulli())}


@cases(VARIED)
def test_it_equals_numpys_in_and_outside_a_graph(gpu, config, draw):
    tokens, params, fixed, dy = network(config, draw, batch=(3,))

    def work_on(backend):
        tokens_, params_, fixed_, dy_, step, example = tree_map(
            backend.asarray, (tokens, params, fixed, dy, np.array(4), np.array([5, 0, 2])))

        def work():
            grads = zeros_like(params_)
            y, cache = gpt2.forward(tokens_, params_, fixed_, config,
                                    at=Pass(True, step, example))
            gpt2.backward(dy_, cache, params_, grads, config)
            return y, grads, tree_map(lambda m: m.astype(y.dtype), cache.masks)

        return backend.capture(work)

    expected = work_on(get_backend("numpy"))()
    work = work_on(gpu)
    for _ in ("ordinary", "captured", "replayed"):
        for ours, numpys in zip(leaves(work()), leaves(expected), strict=True):
            scale = np.abs(numpys).max() + np.ones(numpys.shape)
            assert_close(gpu.to_host(ours), numpys, "sum", scale)


def test_the_host_does_not_wait(machine, draw):
    gpu = get_backend("cupy")
    tokens, params, fixed, dy = tree_map(gpu.asarray, network(GPT2, draw))
    with machine.no_waiting():
        _, cache = gpt2.forward(tokens, params, fixed, GPT2, at=Pass(train=True))
        gpt2.backward(dy, cache, params, params, GPT2)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 5, "top_p": 0.9, "seed": 3}])
@cases({name: VARIED[name] for name in ("GPT-2", "stream", "scale, eps, top-k")})
def test_generated_tokens_are_numpys(gpu, config, options, draw):
    _, params, fixed, _ = network(config, draw)
    prompt = draw.integers(0, config.vocabulary, (2, 3))
    expected = list(generate(prompt, params, fixed, config, 5, **options))
    ours = generate(gpu.asarray(prompt), *tree_map(gpu.asarray, (params, fixed)), config, 5,
                    **options)
    np.testing.assert_array_equal(list(ours), expected)
