"""The law of extension for gates: one of your own takes ten lines and no change of the package."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from comet_np.backends import reference, xp_of
from comet_np.errors import UserError
from comet_np.gates import Gate, Kept, Pass, keep
from comet_np.models import mlp
from comet_np.models.mlp import MLPConfig
from comet_np.rng import uniform
from comet_np.selfcheck import check_mlp_gradients
from comet_np.tree import leaves
from tests.tolerances import TOLERANCES, assert_close


@dataclass(frozen=True)
class Nearest(Gate):
    """Each neuron has a place in the space of inputs, and is active near it."""

    radius: float = 1.0
    depends_on: ClassVar[str] = "input"

    def init(self, widths, seed, backend, dtype):
        return tuple(uniform(backend, dtype, 1, (N, widths[0]), seed, "place", layer)
                     for layer, N in enumerate(widths[1:-1]))

    def shapes(self, widths):
        return tuple((N, widths[0]) for N in widths[1:-1])

    def masks(self, x, fixed, config, at):
        return tuple(((x[..., None, :] - V) ** 2).sum(-1) < self.radius**2 for V in fixed)


@dataclass(frozen=True)
class Positive(Gate):
    """A neuron is active where its pre-activation is positive: with the identity, ReLU."""

    def masks(self, x, fixed, config, at):
        return (lambda x, a: xp_of(a).greater(a, 0),) * (len(config.widths) - 2)


WIDTHS = (3, 17, 9, 2)
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


def network(gate, draw, batch=(5,), activation="softplus"):
    config = MLPConfig(WIDTHS, activation, gate)
    params, fixed = mlp.init(config, dtype="float64")
    return draw.uniform(-1, 1, (*batch, 3)), params, fixed, config


@both
@pytest.mark.parametrize("batch", [(5,), (2, 3), (300,)])
def test_its_masks_are_those_of_the_network(batch, kernels, draw):
    x, params, fixed, config = network(Nearest(), draw, batch)
    with np.errstate() if kernels else reference():
        a_L, cache = mlp.forward(x, params, fixed, config)
    h = x
    for p, V, m in zip(params[:-1], fixed, cache.masks, strict=True):
        for i in np.ndindex(m.shape):
            assert m[i] == (np.linalg.norm(x[i[:-1]] - V[i[-1]]) < 1)
        assert 0 < m.mean() < 1
        h = m * np.log1p(np.exp(h @ p.weight.T + p.bias))
    assert_close(a_L, h @ params[-1].weight.T + params[-1].bias, "sum")


@both
@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("gate", [Nearest(), Positive()], ids=str)
def test_its_gradients_are_right(gate, frozen, kernels, draw):
    x, params, fixed, config = network(gate, draw)
    with np.errstate() if kernels else reference():
        masks = mlp.forward(x, params, fixed, config)[1].masks if frozen else None
        result = check_mlp_gradients(x, params, fixed, config, masks)
        coarse = check_mlp_gradients(x, params, fixed, config, masks, step=1.0)
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result
    assert bool(coarse.flips) != frozen  # and its flips are seen
    assert all(flip.margin is None for flip in coarse.flips)


@both
def test_the_gate_of_positive_pre_activations_makes_relu_of_the_identity(kernels, draw):
    x, params, _, config = network(Positive(), draw, activation="identity")
    relu = MLPConfig(WIDTHS, "relu", None)
    results = []
    with np.errstate() if kernels else reference():
        for each in config, relu:
            a_L, cache = mlp.forward(x, params, (), each)
            grads = mlp.zeros_like(params)
            results.append([a_L, mlp.backward(a_L, cache, params, grads, each), *leaves(grads)])
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_what_depends_on_the_input_alone_can_be_kept(draw):
    x, params, fixed, config = network(Nearest(), draw, (20,))
    kept = mlp.with_kept_masks(config)
    assert kept == MLPConfig(WIDTHS, gate=Kept())
    bits = keep(config.gate, [(x[:7], Pass()), (x[7:], Pass())], fixed, config)
    at = Pass(train=True, example=np.array([19, 3, 3]))
    np.testing.assert_array_equal(mlp.forward(x[at.example], params, bits, kept, at=at)[0],
                                  mlp.forward(x[at.example], params, fixed, config)[0])
    assert mlp.with_kept_masks(MLPConfig(WIDTHS, gate=Positive())) is None


def test_its_mistakes_are_told(draw):
    x, params, fixed, config = network(Nearest(), draw)
    with pytest.raises(UserError, match=r"gate Nearest of a network of widths .* needs fixed weig"):
        mlp.forward(x, params, fixed[:1], config)

    class Narrow(Nearest):
        def masks(self, x, fixed, config, at):
            return tuple(m[..., 1:] for m in super().masks(x, fixed, config, at))

    with pytest.raises(UserError, match=r"layer's output, \(5, 17\), .* got bool \(5, 16\)"):
        mlp.forward(x, params, fixed, MLPConfig(WIDTHS, gate=Narrow()))


def test_it_is_a_setting():
    assert Nearest() == Nearest(1.0) != Nearest(2.0)
    configs = {MLPConfig(WIDTHS, gate=gate) for gate in (Nearest(), Nearest(1.0), Positive())}
    assert len(configs) == 2
    single, double = (mlp.init(MLPConfig(WIDTHS, gate=Nearest()), dtype=dtype)[1]
                      for dtype in ("float32", "float64"))
    for a, b in zip(single, double, strict=True):
        np.testing.assert_array_equal(a, b)
