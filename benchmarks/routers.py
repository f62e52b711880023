"""What routers cost on the CPU: ``python -m comet_np.benchmarks.routers``.

Times a training step of the network 3072-N-N-N-10, masks not kept, with each router, and apart from
it the routing, and of that the maps ``c = V z`` alone; the rest of the routing is the cap and
``z = m o g(c)``, the same for all. Each router takes turns with the standard model; the shortest
times count.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..experiments.experiment import columns
from ..experiments.training import RunConfig
from ..experiments.training.config import multiply_adds
from ..gates import EVALUATION, Comet
from ..gates.routers import ROUTERS
from ..models.mlp import MLPConfig
from .cpu_workers import P_K, batch, our_step, widths


class Timed:
    """A router's step, its routing and its maps, and the shortest time of each in ms."""

    def __init__(self, router: str | None, N: int, B: int) -> None:
        gate = None if router is None else Comet(P_K[1], "threshold", router=router)
        self.name, self.model = router or "standard", MLPConfig(widths(N), gate=gate)
        learner, step = our_step(RunConfig(self.model), B, False)
        self.calls: dict[str, Callable[[], Any]] = {"step": step}
        if gate is not None:
            x, fixed, maps = batch(B)[0], learner.fixed, ROUTERS[gate.router].scores
            z = (x, *gate.trace(x, fixed).z)
            self.calls["routing"] = lambda: gate.masks(x, fixed, self.model, EVALUATION)
            self.calls["maps"] = lambda: [maps(*each) for each in zip(z, fixed, strict=True)]
        self.ms = dict.fromkeys(self.calls, float("inf"))

    def round(self) -> None:
        """Time each call once."""
        for name, call in self.calls.items():
            started = time.perf_counter()
            call()
            self.ms[name] = min(self.ms[name], 1e3 * (time.perf_counter() - started))


def rows(N: int, B: int, routers: Sequence[str], rounds: int) -> list[list[str]]:
    """Return the rows of the table for layers of N and batches of B."""
    standard = Timed(None, N, B)
    found = []
    for router in routers:
        each = Timed(router, N, B)
        standard.ms["step"] = float("inf")
        for _ in range(rounds):
            standard.round()
            each.round()
        trained, routing = multiply_adds(each.model)
        ms = each.ms
        found.append([each.name, str(N), str(B), f"{100 * routing / (trained + routing):.1f} %",
                      *(f"{ms[name]:.2f}" for name in ("maps", "routing", "step")),
                      f"{100 * ms['maps'] / ms['step']:.1f} %",
                      f"{100 * ms['routing'] / ms['step']:.1f} %",
                      f"{ms['step'] / standard.ms['step']:.2f}"])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[1000, 3000], help="N")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128], help="B")
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS), choices=list(ROUTERS))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    head = ["router", "N", "B", "multiply-adds", "maps, ms", "routing, ms", "step, ms",
            "maps/step", "routing/step", "step/standard"]
    print(columns([head, *(row for N in options.widths for B in options.batches
                           for row in rows(N, B, options.routers, options.rounds))]))


if __name__ == "__main__":
    main()
