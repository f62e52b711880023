"""A model of one's own, a module like those of `comet_np.models`: y = W (x + f(V x)) + b."""

from dataclasses import dataclass
from typing import NamedTuple

from comet_np.backends import get_backend
from comet_np.functional.activations import activation
from comet_np.functional.hidden import HiddenCache, hidden_backward, hidden_forward
from comet_np.functional.linear import Linear, LinearCache, linear_backward, linear_forward
from comet_np.gates import EVALUATION
from comet_np.rng import uniform

TANH = activation("tanh")


@dataclass(frozen=True)
class ResidualConfig:
    """N inputs, as many hidden neurons, and some outputs."""

    N: int
    outputs: int


class Cache(NamedTuple):
    """What `backward` reads."""

    block: HiddenCache
    output: LinearCache


def init(config, seed=0, backend=None, dtype="float32"):
    def layer(name, N):
        return Linear(*(uniform(backend or get_backend("numpy"), dtype, config.N, shape, seed, name)
                        for shape in ((N, config.N), (N,))))

    return {"block": layer("V", config.N), "output": layer("W", config.outputs)}, ()


def forward(x, params, fixed, config, masks=None, at=EVALUATION):
    h, block = hidden_forward(x, params["block"], None, TANH)
    y, output = linear_forward(x + h, params["output"])
    return y, Cache(block, output)


def backward(dy, cache, params, grads, config, input_gradient=True):
    dh = linear_backward(dy, cache.output, params["output"], grads["output"])
    dx = hidden_backward(dh, cache.block, params["block"], grads["block"], TANH)
    return dh + dx  # x goes through the block, and past it


def parameter_count(config):
    return (config.N + 1) * (config.N + config.outputs)
