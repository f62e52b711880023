"""The benchmark of vision models: ViT and MLP-Mixer against PyTorch and the bare products."""

import statistics

from ..experiments.experiment import columns
from .processes import Plan, Results
from .ratios import Row, shown
from .steps import GATES

Cells = list[tuple[str, int]]  # models and batch sizes

WORKERS = "vision_workers"
MODELS = {"smoke": ("vit-tiny", "mixer-tiny"),
          "full": ("vit-512", "vit-3072", "mixer-512", "vit-512-no-dropout")}
BATCH = {"smoke": 4, "full": 16}
PACKAGES = {"pytorch": "torch"}
# Our time or memory over theirs: what we set out to reach.
GOALS = {"comet": 0.75, "standard": 1.0, "products": 1.35, "memory": 1.0}
SETTINGS = {
    "pytorch settings": "eager, float32, torch.set_num_threads, torch.optim.Adam(fused=True), one "
                        "map to queries, keys and values, F.scaled_dot_product_attention; COMET by "
                        "torch.topk and >= without gradients; compiled: torch.compile of the "
                        "network with its defaults",
    "models": "images of 3x32x32, patch 4, depth 6, tanh, Adam; ViT of width 512 with 8 heads and "
              "MLP 512 or 3072, dropout 0.1 at its four places as published, but where it says "
              "no-dropout; MLP-Mixer of width 512, without dropout as published; smoke: tiny ones",
    "masks": 'p_k = 0.5, ties = "threshold" on both sides, routed at each step'}


def plan(results: Results, preset: str, compiled: bool) -> Plan:
    """Return the workers of a repeat."""
    return plan_of(results, cells(preset), compiled)


def cells(preset: str) -> Cells:
    """Return the models and batch sizes of a preset."""
    return [(model, BATCH[preset]) for model in MODELS[preset]]


def plan_of(results: Results, cells: Cells, compiled: bool) -> Plan:
    """Return the workers of a repeat that measures training steps, as `steps.works` names them."""
    sides = ["ours", *(["pytorch"] if "pytorch" not in results.left_out else [])]
    works = [*sides, "products", "parts"]
    works += [f"memory_{side}_{kind}" for kind in GATES for side in sides]
    if compiled and "pytorch" in sides:
        works += [f"compiled_{kind}" for kind in GATES]
    return [(work, model, B) for model, B in cells for work in works]


def ratios(results: Results, model: str, B: int, kind: str) -> Row:
    """Return the ratios of one model, those that could be measured."""
    cell = f"{model} {B}"
    ours, theirs = f"ours {cell} {kind}", f"pytorch {cell} {kind}"
    our_memory, their_memory = (f"memory_{side}_{kind} {cell}" for side in ("ours", "pytorch"))
    return results.ratios({
        "ours/PyTorch": (ours, theirs, GOALS[kind]),
        "ours/compiled": (ours, f"compiled_{kind} {cell} step", GOALS[kind]),
        "ours/products": (ours, f"products {cell} {kind}", GOALS["products"]),
        "peak/PyTorch's": (f"{our_memory} peak MiB", f"{their_memory} peak MiB", GOALS["memory"]),
        "growth/PyTorch's": (f"{our_memory} growth MiB", f"{their_memory} growth MiB",
                             GOALS["memory"])})


def report(results: Results, preset: str) -> str:
    """Return the tables: times, memory, their ratios; and the parts of steps that miss a goal."""
    return "\n".join([f"training step, batch {BATCH[preset]}, Adam: ms, then ratios",
                      *tables(results, cells(preset)), *results.why_left_out()])


def tables(results: Results, cells: Cells) -> list[str]:
    """Return the tables of training steps, and the parts of those that miss a goal."""
    cell = "model"
    heads = [["ours", "PyTorch", "compiled", "products"],
             ["ours/PyTorch", "ours/compiled", "ours/products"],
             ["our peak", "PyTorch's", "our growth", "PyTorch's", "peak/PyTorch's",
              "growth/PyTorch's"]]
    tables, missed = [[[cell, *head]] for head in heads], []
    for model, B in cells:
        for kind in GATES:
            row, at = ratios(results, model, B, kind), f"{model} {B}"
            times = (f"ours {at} {kind}", f"pytorch {at} {kind}", f"compiled_{kind} {at} step",
                     f"products {at} {kind}")
            memory = (f"memory_{side}_{kind} {at} {what} MiB" for what in ("peak", "growth")
                      for side in ("ours", "pytorch"))
            for table, values in zip(tables, (
                    map(results.shown, times), shown(row, *heads[1]),
                    [*map(results.shown, memory), *shown(row, *heads[2][4:])]), strict=True):
                table.append([f"{model}, {kind}", *values])
            if any(row[name].value > row[name].goal for name in heads[1] if name in row):
                missed.append(_parts(results, at, kind))
    return [
        *map(columns, tables[:2]), "",
        "peak memory of a training process, and its growth since all was imported, MiB",
        columns(tables[2]),
        "ratio of medians (lowest-highest of the repeats); * misses the goal: COMET "
        f"{GOALS['comet']:.2f} of PyTorch, standard {GOALS['standard']:.2f}; "
        f"{GOALS['products']:.2f} of the products; memory {GOALS['memory']:.2f}",
        *filter(None, missed)]


def _parts(results: Results, cell: str, kind: str) -> str:
    """Return the operations of our step, the longest first, a hundredth of it or more."""
    start = f"parts {cell} {kind} "
    spent = {name.removeprefix(start): statistics.median(times)
             for name, times in results.times.items() if name.startswith(start)}
    whole = sum(spent.values())
    longest = sorted(spent.items(), key=lambda part: -part[1])
    return f"{cell}, {kind}, ms by operation: " + ", ".join(
        f"{name} {ms:.3g}" for name, ms in longest if ms > whole / 100) if spent else ""
