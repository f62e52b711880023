"""What the benchmark of inference times: ``...inference_workers WORK N B SECONDS``.

Each work prints one line of JSON: milliseconds a forward pass (the median of many) by name. Batches
take turns, so that the winners' rows are not in the cache from the call before.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..backends import get_backend
from ..errors import UserError
from ..gates import Comet
from ..models import mlp
from .cpu_workers import active, batch, median_ms, widths
from .steps import answer, torch_threads

P_K = (0.1, 0.5)
ROUTERS = ("dense", "block-diagonal")
BATCHES = 16  # that take turns
CLOSE = 1e-4  # of the largest output: how far two float32 results may be apart
FLIPPED = 0.02  # of a layer's masks: how many may differ, by near-ties of scores and their effect


def batches(B: int) -> list[np.ndarray]:
    """Return the inputs (B, 3072) that take turns."""
    return list(batch(BATCHES * B)[0].reshape(BATCHES, B, -1))


def config_of(N: int, p_k: float | None, router: str = "dense") -> mlp.MLPConfig:
    """Return the network 3072-N-N-N-10, without p_k the standard one; ties as published."""
    gate = None if p_k is None else Comet(p_k, "threshold", router=router)
    return mlp.MLPConfig(widths(N), gate=gate)


def ours(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time `mlp.forward` of the standard model and of COMET, and `mlp.infer` with each router and
    with masks given.
    """
    xs, standard = batches(B), config_of(N, None)
    params, _ = mlp.init(standard)
    times = {"standard": timed(lambda x: mlp.forward(x, params, (), standard), xs, seconds)}
    for router, p_k in itertools.product(ROUTERS, P_K):
        found = of_comet(config_of(N, p_k, router), params, xs, seconds)
        times |= {f"{router} {p_k}": found.pop("infer")}
        if router == "dense":  # as of the published model
            times |= {f"{name} {p_k}": ms for name, ms in found.items()}
    return times


def of_comet(config: mlp.MLPConfig, params: mlp.Params, xs: list[np.ndarray],
             seconds: float) -> dict[str, float]:
    """Return the times of one COMET model, after a check that all give the same."""
    fixed = mlp.init_gate(config, 0, get_backend("numpy"), "float32")

    def forward(x: np.ndarray) -> Any:
        return mlp.forward(x, params, fixed, config)

    def infer(x: np.ndarray) -> Any:
        return mlp.infer(x, params, fixed, config)

    def by_masks(given: tuple[np.ndarray, Any]) -> Any:
        x, masks = given
        return mlp.infer(x, params, (), config, masks)

    inputs = []
    for x in xs:
        a_L, cache = forward(x)
        inputs.append((x, cache.masks))
        check_close("mlp.infer", infer(x), a_L)
        check_close("mlp.infer with masks given", by_masks(inputs[-1]), a_L)
    return {"infer": timed(infer, xs, seconds), "forward": timed(forward, xs, seconds),
            "given": timed(by_masks, inputs, seconds)}


def pytorch(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time PyTorch's standard MLP and its COMET, eager, on the same weights, which it checks."""
    import torch

    torch_threads()
    xs = batches(B)
    params, V = mlp.init(config_of(N, P_K[0]))
    network, times = torch_network(params, V), {}
    with torch.inference_mode():
        for name, p_k in (("standard", None), *((f"comet {p_k}", p_k) for p_k in P_K)):
            check_pytorch(network, xs[0], params, V, p_k)
            times[name] = timed(functools.partial(network, p_k=p_k), map(torch.from_numpy, xs),
                                seconds)
    return times


def torch_network(params: mlp.Params, V: Sequence[np.ndarray]) -> Callable[..., Any]:
    """Return the published network in evaluation, of x and p_k: its output, and the masks.

    Where p_k is None it is the standard MLP.
    """
    import torch
    from torch.nn import functional as F

    def linear(W: np.ndarray, b: np.ndarray | None) -> Any:
        layer = torch.nn.utils.skip_init(torch.nn.Linear, W.shape[1], len(W), b is not None)
        layer.load_state_dict({name: torch.from_numpy(p) for name, p in
                               (("weight", W), ("bias", b)) if p is not None})
        return layer.eval()

    *hidden, last = [linear(*p) for p in params]
    routing = [linear(V_l, None) for V_l in V]

    def network(x: Any, p_k: float | None) -> Any:
        z, masks = x, []
        for layer, spec in zip(hidden, routing, strict=True):
            x = F.softplus(layer(x))
            if p_k is not None:
                c = spec(z)
                kth = torch.topk(c, active(c.shape[1], p_k), dim=1).values[:, -1:]
                m = (c >= kth).to(c.dtype)
                x, z = m * x, m * c
                masks.append(m)
        return last(x), masks

    return network


def timed(call: Callable[[Any], Any], inputs: Any, seconds: float) -> float:
    """Return the median time in ms of a call, on one input after the other."""
    turns = itertools.cycle(inputs)
    return median_ms(lambda: call(next(turns)), seconds)


def check_pytorch(network: Callable[..., Any], x: np.ndarray, params: mlp.Params, V: Any,
                  p_k: float | None) -> None:
    """Raise a UserError unless PyTorch routes x as we do, and computes what we do by its masks."""
    import torch

    config = config_of(len(V[0]), p_k)
    a_L, theirs = network(torch.from_numpy(x), p_k)
    masks = None
    if p_k is not None:
        masks = tuple(m.numpy() > 0 for m in theirs)
        routed = mlp.forward(x, params, V, config)[1].masks
        if (share := max((m != n).mean() for m, n in zip(masks, routed, strict=True))) > FLIPPED:
            raise UserError(f"PyTorch's masks are not ours: {share:.2%} of a layer's differ")
    check_close("PyTorch", a_L.numpy(), mlp.infer(x, params, (), config, masks))


def check_close(name: str, got: np.ndarray, want: np.ndarray) -> None:
    """Raise a UserError unless two results agree as well as float32 does."""
    error = abs(got - want).max() / abs(want).max()
    if not error <= CLOSE:  # NaN is no agreement
        raise UserError(f"the output of {name} is not the expected one: {error:.1e} apart of the "
                        "largest")


if __name__ == "__main__":
    answer({"ours": lambda N, *sizes: ours(int(N), *sizes),
            "pytorch": lambda N, *sizes: pytorch(int(N), *sizes)})
