"""The models that are compared, each a change of one configuration."""

from collections.abc import Callable
from dataclasses import replace

from ..errors import UserError
from ..functional.activations import ACTIVATIONS
from ..functional.routing import Ties
from ..gates import Bernoulli, Comet, ExampleTied, Layerwise, TopK
from ..models.mlp import MLPConfig

WITHOUT_P_K = ("standard", "centred")

Variant = Callable[[MLPConfig, float, Ties], MLPConfig]  # the standard model, p_k, tie rule


def _smaller(standard: MLPConfig, p_k: float, ties: Ties) -> MLPConfig:
    hidden = [int(p_k * N) for N in standard.widths[1:-1]]
    if min(hidden, default=1) < 1:
        raise UserError(f"p_k = {p_k} leaves the smaller model no neuron in a layer of "
                        f"{min(standard.widths[1:-1])}: raise one of them, or leave that model out")
    return replace(standard, widths=(standard.widths[0], *hidden, standard.widths[-1]))


def _centred(standard: MLPConfig, p_k: float, ties: Ties) -> MLPConfig:
    centred = f"centred_{standard.activation}"
    return replace(standard, activation=centred if centred in ACTIVATIONS else standard.activation)


# Sec. 4 of the paper. The last two are controls of what a mask does besides routing: "scaled" is
# the standard model with its hidden activations multiplied by p_k, as a mask does on average;
# "centred" the standard model with f(a) - f(0), without the positive mean of softplus.
VARIANTS: dict[str, Variant] = {
    "standard": lambda standard, p_k, ties: standard,
    "smaller": _smaller,
    "dropout": lambda standard, p_k, ties: replace(standard, dropout=1 - p_k),
    "top-k": lambda standard, p_k, ties: replace(standard, gate=TopK(p_k, ties)),
    "layerwise": lambda standard, p_k, ties: replace(standard, gate=Layerwise(p_k, ties)),
    "bernoulli": lambda standard, p_k, ties: replace(standard, gate=Bernoulli(p_k)),
    "example-tied": lambda standard, p_k, ties: replace(standard, gate=ExampleTied(p_k)),
    "comet": lambda standard, p_k, ties: replace(standard, gate=Comet(p_k, ties)),
    "scaled": lambda standard, p_k, ties: replace(standard, scale=p_k),
    "centred": _centred,
}
