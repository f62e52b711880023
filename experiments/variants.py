"""The models that are compared, each a change of one configuration: Sec. 4 of the paper."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import UserError
from ..functional.activations import ACTIVATIONS
from ..functional.routing import Ties
from ..gates import Bernoulli, Comet, ExampleTied, Layerwise, TopK
from ..models.mlp import MLPConfig
from ..models.moe import MoEConfig
from .training.config import RunConfig

WITHOUT_P_K = ("standard", "l1", "centred")
PENALTY = 1e-4  # factor of the L1 penalty, which the paper does not say; --l1 gives another

Variant = Callable[[RunConfig, float, Ties], RunConfig]  # a run of the standard model, p_k, ties


def _change(run: RunConfig, **changes: Any) -> RunConfig:
    """Return the run with a few fields of its model changed."""
    return replace(run, model=replace(run.model, **changes))


def _fewer_neurons(run: RunConfig, p_k: float, ties: Ties) -> RunConfig:
    def fewer(N: int) -> int:
        if int(p_k * N) < 1:
            raise UserError(f"p_k = {p_k} leaves the smaller model, and the experts of moe, no "
                            f"neuron in a layer of {N}: raise one of them, or leave that model out")
        return int(p_k * N)

    if isinstance(run.model, MLPConfig):
        inputs, *hidden, outputs = run.model.widths
        return _change(run, widths=(inputs, *map(fewer, hidden), outputs))
    return _change(run, **{name: fewer(getattr(run.model, name))
                           for name in ("hidden", "token_hidden") if hasattr(run.model, name)})


def _dropout(run: RunConfig, p_k: float, ties: Ties) -> RunConfig:
    name = "dropout" if isinstance(run.model, MLPConfig) else "hidden_dropout"
    return _change(run, **{name: 1 - p_k})


def _mixture(run: RunConfig, p_k: float, ties: Ties, trainable: bool = True) -> RunConfig:
    """Return a mixture of experts; the gate's hidden layer has tanh.

    Its activation is not in the paper. With softplus, whose outputs hardly depend on the input
    beside their mean, a gate of 100 that is drawn chooses 1 to 3 of 10 experts for all of CIFAR10,
    with tanh 7 to 8, and the published gate without a hidden layer 8 to 9.
    """
    one = _fewer_neurons(run, p_k, ties).model
    return replace(run, model=MoEConfig(one.widths, int(1 / p_k), one.activation,
                                        trainable=trainable, gate_activation="tanh",
                                        bias=one.bias,
                                        initial=one.initial))


def _l1(run: RunConfig, p_k: float, ties: Ties) -> RunConfig:
    optimizer = run.training.optimizer
    penalized = replace(optimizer, l1=optimizer.l1 or PENALTY)
    return replace(run, training=replace(run.training, optimizer=penalized))


def _centred(run: RunConfig, p_k: float, ties: Ties) -> RunConfig:
    centred = f"centred_{run.model.activation}"
    return _change(run, activation=centred) if centred in ACTIVATIONS else run


# The paper's eleven, and four more. "comet-exact" is COMET with masks that rounding cannot change,
# "comet-block-diagonal" COMET with a router that costs little; the last two are controls of what a
# mask does besides routing: "scaled" is the standard model with its hidden activations multiplied
# by p_k, as a mask does on average; "centred" the standard model with f(a) - f(0), without the
# positive mean of softplus.
VARIANTS: dict[str, Variant] = {
    "standard": lambda run, p_k, ties: run,
    "smaller": _fewer_neurons,
    "dropout": _dropout,
    "top-k": lambda run, p_k, ties: _change(run, gate=TopK(p_k, ties)),
    "moe": _mixture,
    "moe-fixed": lambda run, p_k, ties: _mixture(run, p_k, ties, trainable=False),
    "layerwise": lambda run, p_k, ties: _change(run, gate=Layerwise(p_k, ties)),
    "bernoulli": lambda run, p_k, ties: _change(run, gate=Bernoulli(p_k)),
    "example-tied": lambda run, p_k, ties: _change(run, gate=ExampleTied(p_k)),
    "l1": _l1,
    "comet": lambda run, p_k, ties: _change(run, gate=Comet(p_k, ties)),
    "comet-exact": lambda run, p_k, ties: _change(run, gate=Comet(p_k, ties, exact=True)),
    "comet-block-diagonal": lambda run, p_k, ties: _change(
        run, gate=Comet(p_k, ties, router="block-diagonal")),
    "scaled": lambda run, p_k, ties: _change(run, scale=p_k),
    "centred": _centred,
}

# Those of networks with gated MLPs in their blocks. There is no "layerwise", for there COMET routes
# by the MLP's own input; "comet-stream" by the network's, as COMET does in an MLP.
VARIANTS_OF_BLOCKS = {name: VARIANTS[name] for name in (
    "standard", "comet", "comet-block-diagonal", "smaller", "dropout", "top-k", "bernoulli",
    "example-tied", "scaled")} | {
    "comet-stream": lambda run, p_k, ties: _change(run, gate=Comet(p_k, ties), routing="stream")}
