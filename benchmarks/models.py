"""The benchmark of the paper's models: each one's training step against its eager PyTorch form."""

import itertools

from ..experiments.experiment import columns
from .model_workers import MODELS
from .processes import Plan, Results
from .ratios import shown

WORKERS = "model_workers"
WIDTHS = {"smoke": (100,), "full": (500, 1000)}
BATCHES = {"smoke": (32,), "full": (32, 128)}
PACKAGES = {"pytorch_models": "torch"}
GOAL = 0.7  # our time over PyTorch's: what we set out to reach
SETTINGS = {
    "masks": 'ties = "threshold" on both sides; masks of examples are drawn before, by us kept '
             "bit-packed, by PyTorch as bool; COMET's are routed at each step, and by us kept too "
             'where it says "masks kept", as training on a fixed data set does; the data set is '
             "the mini-batch",
    "mixtures": "1 / p_k experts whose layers have p_k N neurons; each computes its own examples; "
                "the gate's hidden layer has tanh",
    "l1": "PyTorch's loss has the penalty; our update adds its gradient"}


def cells(preset: str) -> list[tuple[int, int]]:
    """Return the widths and batch sizes of a preset."""
    return list(itertools.product(WIDTHS[preset], BATCHES[preset]))


def plan(results: Results, preset: str, compiled: bool) -> Plan:
    """Return the workers of a repeat; no model is compiled."""
    works = ["our_models", *(work for work in PACKAGES if work not in results.left_out)]
    return [(work, N, B) for N, B in cells(preset) for work in works]


def report(results: Results, preset: str) -> str:
    """Return the table."""
    table = [["N, batch, model", "ours", "PyTorch", "ratio"]]
    for N, B in cells(preset):
        for model in MODELS:
            ours, theirs = (f"{work}_models {N} {B} {model}" for work in ("our", "pytorch"))
            row = results.ratios({"": (ours, theirs, GOAL)})
            table.append([f"{N}, {B}, {model}", results.shown(ours), results.shown(theirs),
                          *shown(row, "")])
    return "\n".join([
        "training step of 3072-N-N-N-10, softplus, p_k = 0.5: ms, and their ratio", columns(table),
        f"ratio of medians (lowest-highest of the repeats); * misses the goal, {GOAL:g}",
        *results.why_left_out()])
