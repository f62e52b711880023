"""What the benchmark of the models times, one framework a process: ``...model_workers WORK N B``.

Each work prints one line of JSON: milliseconds a training step (the median of many) by model.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..backends.cpu import keep_freed_memory
from ..experiments.training import RunConfig
from ..experiments.variants import VARIANTS
from ..gates import Bernoulli, Comet, ExampleTied, Layerwise, Pass, TopK
from ..models import module_of
from ..models.moe import MoEConfig
from ..tree import leaves, tree_map
from .cpu_workers import LR, active, batch, median_ms, network, our_step


class Model(NamedTuple):
    """A model that is measured.

    variant, p_k : of `VARIANTS`. kept : whether its masks are kept, if they can be.
    """

    variant: str
    p_k: float = 0.5
    kept: bool = True

    def run(self, N: int) -> RunConfig:
        """Return a run of the model; ties as in the published code."""
        return VARIANTS[self.variant](RunConfig(network(N, None)), self.p_k, "threshold")


MODELS = {name: Model(name, kept=name != "comet") for name in VARIANTS
          if name not in ("comet-exact", "comet-block-diagonal")} | {
    "comet, masks kept": Model("comet"),
    "moe, p_k = 0.1": Model("moe", 0.1),
    "moe-fixed, p_k = 0.1": Model("moe-fixed", 0.1)}


def our_models(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time our training step of each model."""
    keep_freed_memory()
    return {name: median_ms(our_model_step(model, N, B)[1], seconds)
            for name, model in MODELS.items()}


def our_model_step(model: Model, N: int, B: int) -> tuple[Any, Callable[[], Any]]:
    """Return our learner and its training step."""
    return our_step(model.run(N), B, model.kept)


def pytorch_models(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time PyTorch's training step of each model, eager."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    return {name: median_ms(torch_step(model, N, B)[1], seconds) for name, model in MODELS.items()}


def torch_step(model: Model, N: int, B: int) -> tuple[Any, Callable[[], float]]:
    """Return PyTorch's parameters, a tree as ours with the same numbers, and its training step."""
    import torch
    from torch.nn import functional as F

    run = model.run(N)
    ours, fixed = module_of(run.model).init(run.model, run.seed)
    params = tree_map(lambda p: torch.tensor(p, requires_grad=True), ours)
    form = torch_mixture if isinstance(run.model, MoEConfig) else torch_mlp
    network = form(params, tree_map(torch.tensor, fixed), run, B)
    trained, l1 = list(leaves(params)), run.training.optimizer.l1
    optimizer = torch.optim.SGD(trained, lr=LR)
    x, y = map(torch.tensor, batch(B))
    rows = torch.arange(B)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x, rows), y)
        if l1:
            loss = loss + l1 * sum(p.abs().sum() for p in trained if p.ndim > 1)
        loss.backward()
        optimizer.step()
        return loss.item()

    return params, step


def torch_mlp(params: Any, V: Any, run: RunConfig, B: int) -> Callable[[Any, Any], Any]:
    """Return the published network of an MLP as a function of x and the numbers of the examples."""
    import torch
    from torch.nn import functional as F

    config, gate = run.model, run.model.gate
    if isinstance(gate, Bernoulli | ExampleTied):
        at = Pass(train=True, example=np.arange(B), seed=run.seed)
        of_examples = [torch.tensor(m) for m in gate.masks(batch(B)[0], (), config, at)]  # (B, N)

    def winners(scores: Any) -> Any:
        kth = torch.topk(scores, active(scores.shape[1], gate.p_k), dim=1).values[:, -1:]
        return (scores >= kth).to(scores.dtype)

    def network(x: Any, rows: Any) -> Any:
        z = x
        for layer, (W, b) in enumerate(params[:-1]):
            a = F.linear(x, W, b)
            m = None
            if isinstance(gate, Comet):
                c = F.linear(z, V[layer])
                m = winners(c)
                z = m * c
            elif isinstance(gate, Layerwise):
                m = winners(F.linear(x, V[layer]))
            elif isinstance(gate, TopK):
                m = winners(a)
            elif gate is not None:
                m = of_examples[layer][rows]
            x = F.softplus(a)
            if config.activation == "centred_softplus":
                x = x - math.log(2)
            if m is not None:
                x = m * x
            if config.scale != 1:
                x = config.scale * x
            if config.dropout:
                x = F.dropout(x, config.dropout)
        return F.linear(x, *params[-1])

    return network


def torch_mixture(params: Any, fixed: Any, run: RunConfig, B: int) -> Callable[[Any, Any], Any]:
    """Return a mixture of experts likewise: each expert computes the examples that chose it."""
    import torch
    from torch.nn import functional as F

    gate = params.gate or fixed

    def mlp(x: Any, layers: Any, f: Callable[[Any], Any]) -> Any:
        for W, b in layers[:-1]:
            x = f(F.linear(x, W, b))
        return F.linear(x, *layers[-1])

    def network(x: Any, rows: Any) -> Any:
        weight, chosen = torch.softmax(mlp(x, gate, torch.tanh), dim=1).max(dim=1)
        y = x.new_zeros(len(x), run.model.widths[-1])
        for e, expert in enumerate(params.experts):
            mine = (chosen == e).nonzero()[:, 0]
            if len(mine):
                y[mine] = weight[mine, None] * mlp(x[mine], expert, F.softplus)
        return y

    return network


WORKS = {work.__name__: work for work in (our_models, pytorch_models)}

if __name__ == "__main__":
    from .processes import end_with_the_parent

    end_with_the_parent()
    name, N, B, seconds = sys.argv[1:]
    print(json.dumps(WORKS[name](int(N), int(B), float(seconds))))
