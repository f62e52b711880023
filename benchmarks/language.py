"""The benchmark of GPT-2: training and generation against transformers, and the bare products."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..experiments import figures
from ..experiments.experiment import columns
from . import vision
from .language_workers import MODELS, lengths
from .processes import Plan, Results
from .ratios import LOOKS, Ratio, shown
from .steps import GATES

WORKERS = "language_workers"
CELLS = {"smoke": [("gpt2-tiny", 2)], "full": [("gpt2-256", 8), ("gpt2-small", 4)]}
GENERATED = {"smoke": "gpt2-tiny", "full": "gpt2-small"}  # one text at a time
PACKAGES = {"pytorch": "torch transformers"}
# Our tokens per second over PyTorch's: what we set out to reach.
FASTER = {"gpt2-small": 1.3, "generation": 1.0}
SIDES = {"ours": ("COMET-NP", LOOKS["comet"][0]), "PyTorch": ("transformers, eager", "#444444"),
         "compiled": ("torch.compile", "#888888"), "products": ("bare products", "#cccccc")}
BAR = 0.2  # width of a bar, of those of a kind together 4
SETTINGS = {
    "pytorch settings": "GPT2LMHeadModel of transformers with labels, eager, float32, its "
                        "attention the default (sdpa), no cache in training, "
                        "torch.set_num_threads, torch.optim.AdamW(fused=True); COMET: its MLPs "
                        "masked by torch.topk and >= without gradients; compiled: torch.compile "
                        "of the network with its defaults; generation: generate(do_sample=False, "
                        "use_cache=True)",
    "models": "vocabulary 50257, tanh, dropout off, AdamW, weight decay 0.1 but of biases and "
              "norms; gpt2-256: width 256, 4 layers, 8 heads, texts of 128 tokens; gpt2-small: "
              "its published size, texts of 64 tokens; smoke: a tiny one",
    "masks": 'p_k = 0.5, ties = "threshold" on both sides, routed at each step'}


def plan(results: Results, preset: str, compiled: bool) -> Plan:
    """Return the workers of a repeat."""
    generated = [f"generation_{side}" for side in ("ours", "pytorch")
                 if side not in results.left_out]
    return [*vision.plan_of(results, CELLS[preset], compiled),
            *((work, GENERATED[preset], 1) for work in generated)]


class Measured(NamedTuple):
    """Tokens per second of one model and kind: what of, by side, and the least ratio of ours."""

    title: str
    kind: str
    rates: dict[str, list[float]]
    least: float


def measured(results: Results, preset: str) -> Iterator[Measured]:
    """Yield what was measured of training steps and of generation."""
    for model, B in CELLS[preset]:
        tokens = B * (MODELS[model].context or 0)
        for kind in GATES:
            at = f"{model} {B}"
            times = {"ours": f"ours {at} {kind}", "PyTorch": f"pytorch {at} {kind}",
                     "compiled": f"compiled_{kind} {at} step", "products": f"products {at} {kind}"}
            yield Measured(f"training {model}", kind, _rates(results, tokens, times),
                           FASTER.get(model, 0.0))
    model = GENERATED[preset]
    for kind in GATES:
        times = {side: f"generation_{work} {model} 1 {kind}"
                 for side, work in (("ours", "ours"), ("PyTorch", "pytorch"))}
        yield Measured(f"generation {model}", kind, _rates(results, lengths(model)[1], times),
                       FASTER["generation"])


def _rates(results: Results, tokens: int, times: dict[str, str]) -> dict[str, list[float]]:
    return {side: [1e3 * tokens / ms for ms in results.times[key]]
            for side, key in times.items() if key in results.times}


def report(results: Results, preset: str) -> str:
    """Return the tables: tokens per second; times of training steps, memory, their ratios."""
    table = [["tokens/s", *SIDES, "ours/PyTorch"]]
    for title, kind, rates, least in measured(results, preset):
        row = {}
        if {"ours", "PyTorch"} <= set(rates):
            row["ours/PyTorch"] = Ratio(rates["ours"], rates["PyTorch"], least=least)
        table.append([f"{title}, {kind}", *(f"{statistics.median(rates[side]):.4g}"
                                            if side in rates else "-" for side in SIDES),
                      *shown(row, "ours/PyTorch")])
    (prompt, count), faster = lengths(GENERATED[preset]), FASTER["gpt2-small"]
    return "\n".join([
        columns(table),
        f"generation: {count} tokens after a prompt of {prompt}, one text, greedy; * misses the "
        f"goal: gpt2-small {faster:g} times PyTorch, generation {FASTER['generation']:.1f}", "",
        "training step, AdamW: ms, then ratios", *vision.tables(results, CELLS[preset]),
        *results.why_left_out()])


def draw(results: Results, preset: str, title: str, file: Path) -> str:
    """Draw the tokens per second, a panel a model and generation, and return a line about it."""
    found = list(measured(results, preset))
    titles = list(dict.fromkeys(one.title for one in found))
    plt = figures.pyplot()
    figure, panels = plt.subplots(1, len(titles), figsize=(0.8 + 3.2 * len(titles), 3.4),
                                  squeeze=False)
    for name, axes in zip(titles, panels[0], strict=True):
        here = [one for one in found if one.title == name]
        sides = [side for side in SIDES if any(side in one.rates for one in here)]
        for place, side in enumerate(sides):
            label, color = SIDES[side]
            for x, one in enumerate(here):
                if side in one.rates:
                    at, rate = x + BAR * (place - (len(sides) - 1) / 2), one.rates[side]
                    axes.bar(at, statistics.median(rate), BAR, color=color,
                             label=None if x else label)
                    axes.plot([at, at], [min(rate), max(rate)], color="black", linewidth=1)
        axes.set_xticks(range(len(here)), labels=[LOOKS[one.kind][1] for one in here])
        axes.set_xlim(-0.5, len(here) - 0.5)
        axes.grid(visible=False, axis="x")
        axes.set_title(name)
    panels[0][0].set_ylabel("tokens per second")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=7)
    figure.suptitle(title, fontsize=8)
    return f"figure: {figures.save(figure, file)}"
