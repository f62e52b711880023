"""The benchmark of inference: a forward pass of few examples against eager PyTorch's."""

import itertools

from ..experiments.experiment import columns
from .inference_workers import BATCHES, P_K, ROUTERS
from .processes import Plan, Results
from .ratios import NO_GOAL, Row, shown

WORKERS = "inference_workers"
CELLS = {"smoke": [(100, 1), (100, 2)],
         "full": list(itertools.product((1000, 3000), (1, 2, 4, 8)))}
PACKAGES = {"pytorch": "torch"}
# Our time by a cheap router over that of PyTorch's standard MLP, at this N and p_k: what we set
# out to reach.
GOAL, GOAL_N, GOAL_P_K = 0.3, 3000, 0.1
SETTINGS = {
    "pytorch settings": "eager, float32, torch.inference_mode, torch.nn.Linear, torch.topk and >=; "
                        "torch.set_num_threads",
    "inference": f"3072-N-N-N-10, softplus, in evaluation; {BATCHES} batches of random inputs take "
                 "turns; both sides have the same weights, and their outputs were compared",
    "masks": 'ties = "threshold" on both sides'}


def plan(results: Results, preset: str, compiled: bool) -> Plan:
    """Return the workers of a repeat; no model is compiled."""
    works = ["ours", *(work for work in PACKAGES if work not in results.left_out)]
    return [(work, N, B) for N, B in CELLS[preset] for work in works]


def ratios(results: Results, N: int, B: int, p_k: float) -> Row:
    """Return our times over PyTorch's: over its standard MLP's by name, and over its COMET's."""
    standard, comet = (f"pytorch {N} {B} {name}" for name in ("standard", f"comet {p_k}"))
    goal = GOAL if (N, p_k) == (GOAL_N, GOAL_P_K) else NO_GOAL
    pairs = {name: (f"ours {N} {B} {name} {p_k}", standard,
                    NO_GOAL if name == "dense" else goal) for name in ("given", *ROUTERS)}
    return results.ratios(pairs | {
        "forward/COMET": (f"ours {N} {B} forward {p_k}", comet, NO_GOAL),
        "dense/COMET": (f"ours {N} {B} dense {p_k}", comet, NO_GOAL)})


def report(results: Results, preset: str) -> str:
    """Return the tables: times, and their ratios."""
    works = {"PyTorch standard": "pytorch {} standard", "PyTorch COMET": "pytorch {} comet {}",
             "our standard": "ours {} standard", "our forward": "ours {} forward {}",
             **{f"infer, {router}": f"ours {{}} {router} {{}}" for router in ROUTERS},
             "infer, masks given": "ours {} given {}"}
    names = (*ROUTERS, "given", "dense/COMET", "forward/COMET")
    times = [["N, batch, p_k", *works]]
    table = [["N, batch, p_k", *(f"{name}/standard" for name in (*ROUTERS, "given")), *names[-2:]]]
    for (N, B), p_k in itertools.product(CELLS[preset], P_K):
        cell = f"{N}, {B}, {p_k}"
        times.append([cell, *(results.shown(key.format(f"{N} {B}", p_k))
                              for key in works.values())])
        table.append([cell, *shown(ratios(results, N, B, p_k), *names)])
    return "\n".join([
        "one forward pass of 3072-N-N-N-10, softplus: ms, then ratios", columns(times),
        columns(table),
        "our time over that of PyTorch's standard MLP, or of its COMET: ratio of medians "
        "(lowest-highest of the repeats); "
        f"* misses the goal, {GOAL:g} at N = {GOAL_N}, p_k = {GOAL_P_K:g} without the dense router",
        *results.why_left_out()])
