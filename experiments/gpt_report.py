"""The figure and the table of `gpt`, from the files of its finished cells alone."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..models.gpt2 import parameter_count
from . import figures
from .experiment import Cell, Experiment, columns
from .gpt import GPTConfig, Panel, cell_of, cells, prepare, run_cell, short_name
from .gpt_figures import FIGURES, LAPTOP, SMOKE
from .intervals import Interval, interval

CHARACTERS_AN_INCH = 18  # of the title
EARLY = 0.1  # share of the training before which perplexity falls out of the top of the figure


class Curve(NamedTuple):
    """What a finished cell's files say.

    tokens, value, seconds : arrays (points,): the tokens trained on, the validation perplexity, the
    training time. diverged : why there are no more, or None. data : digest of its texts.
    """

    tokens: np.ndarray
    value: np.ndarray
    seconds: np.ndarray
    diverged: str | None
    data: str

    @property
    def best(self) -> float:
        """The lowest perplexity."""
        return float(self.value.min())

    @property
    def last(self) -> float:
        """The perplexity after training; NaN if it diverged."""
        return float("nan") if self.diverged else float(self.value[-1])

    @property
    def speed(self) -> float | None:
        """Tokens per second of training; None if there was none."""
        return float(self.tokens[-1] / self.seconds[-1]) if self.seconds[-1] else None


Curves = dict[int, Curve]  # by seed
Found = dict[tuple[Panel, str], Curves]


def read(config: GPTConfig, out: Path) -> Found:
    """Return the curves of all finished cells, those that diverged among them."""
    found: Found = {}
    for panel in config.panels:
        for model in config.models:
            read_here = {seed: _read(cell_of(config, panel, model, seed), out)
                         for seed in config.seed_numbers}
            found[panel, model] = {seed: curve for seed, curve in read_here.items()
                                   if curve is not None}
    return found


def _read(cell: Cell, out: Path) -> Curve | None:
    def of_result(result: dict[str, Any]) -> tuple[int | None, str | None, str]:
        return result.get("texts"), result.get("diverged"), str(result["data"])

    def of_lines(lines: list[dict[str, Any]]) -> np.ndarray:
        table = np.array([(each * line[unit], line["val_perplexity"], line["seconds"])
                          for line in lines], np.float64)
        return table.reshape(-1, 3).T

    if (result := cell.result(out, of_result)) is None:
        return None
    texts, *rest = result  # of an epoch, whose last step may be short; not in earlier results
    unit, count = (("step", cell.spec.run.training.examples_a_step) if texts is None else
                   ("epoch", texts))
    each = count * cell.spec.context
    return Curve(*cell.metrics(out, of_lines), *rest)


# --- comparisons --------------------------------------------------------------------------------


def reached(curve: Curve, value: float) -> float:
    """Return after how many tokens a curve first comes down to a perplexity; inf if it never does.

    Between two points it is taken to fall evenly in the logarithm.
    """
    below = np.flatnonzero(curve.value <= value)
    if not len(below):
        return np.inf
    i = below[0]
    if i == 0:
        return float(curve.tokens[0])
    high, low, wanted = np.log([curve.value[i - 1], curve.value[i], value])
    share = (high - wanted) / (high - low)
    return float(curve.tokens[i - 1] + share * (curve.tokens[i] - curve.tokens[i - 1]))


def saved(one: Curve, other: Curve) -> float:
    """Return the share of its tokens that `one` is ahead of `other`, in -1..1.

    Of the two the better one at the end is asked how many tokens it took to come to where the other
    ended: so many fewer it needs. Negative if the other is the better one.
    """
    if one.last <= other.last:
        return 1 - reached(one, other.last) / other.tokens[-1]
    return reached(other, one.last) / one.tokens[-1] - 1


class Verdict(NamedTuple):
    """One model against another over the seeds from which both came to the end.

    saved : % fewer tokens for the same perplexity. lower : % lower perplexity at the end.
    ahead, of : at how many evaluations after the first its mean perplexity is the lower one.
    """

    saved: Interval
    lower: Interval
    ahead: int
    of: int


def verdict(one: Curves, other: Curves) -> Verdict | None:
    """Return how one model compares with another; None if no seed of both came to the end."""
    seeds = [seed for seed in one.keys() & other.keys()
             if not one[seed].diverged and not other[seed].diverged]
    if not seeds:
        return None
    pairs = [(one[seed], other[seed]) for seed in sorted(seeds)]
    means = [np.mean([pair[i].value for pair in pairs], axis=0)[1:] for i in (0, 1)]
    return Verdict(interval(np.array([100 * saved(*pair) for pair in pairs])),
                   interval(np.array([100 * (1 - a.last / b.last) for a, b in pairs])),
                   int((means[0] < means[1]).sum()), len(means[0]))


# --- the table ----------------------------------------------------------------------------------


def table(config: GPTConfig, out: Path) -> str:
    """Return a row for each model of each panel, and what they say against the standard model."""
    found = read(config, out)
    rows = [("perplexity", "best (95 %)", "last", "tokens/s", "parameters")]
    for panel in config.panels:
        for model in config.models:
            if curves := found[panel, model]:
                rows.append((f"{_where(config, panel)}: {model}{_missing(config, curves)}",
                             *_values(curves),
                             f"{_parameters(config, panel, model):,}"))
    lines = [line for panel in config.panels for line in _said(config, found, panel)]
    mixed = [f"the finished cells of {short_name(corpus)} were trained on different texts, as its "
             "files were changed in between: compare within one --out that was begun afresh"
             for corpus in config.corpora
             if len({curve.data for (panel, _), curves in found.items()
                     if panel.corpus == corpus for curve in curves.values()}) > 1]
    return "\n".join([columns(rows), *lines, *mixed])


def _values(curves: Curves) -> tuple[str, str, str]:
    best = interval(np.array([curve.best for curve in curves.values()]))
    lasts = np.array([curve.last for curve in curves.values()])
    speeds = [curve.speed for curve in curves.values() if curve.speed is not None]
    return (f"{best.mean:.2f}{_reach(best, 2)}",
            "diverged" if np.isnan(lasts).all() else f"{np.nanmean(lasts):.2f}",
            f"{np.mean(speeds):,.0f}" if speeds else "-")


def _reach(found: Interval, digits: int = 1) -> str:
    return "" if np.isnan(found.reach) else f" +- {found.reach:.{digits}f}"


def _parameters(config: GPTConfig, panel: Panel, model: str) -> int:
    return parameter_count(cell_of(config, panel, model, 0).spec.run.model)


def _where(config: GPTConfig, panel: Panel) -> str:
    """Return what a panel is: what others differ in, and p_k."""
    varied = {"lr": f"lr {panel.lr:g}", "accumulate": f"batch {config.batch} x {panel.accumulate}",
              "precision": panel.precision}
    return ", ".join([short_name(panel.corpus), panel.size,
                      *(text for name, text in varied.items() if len(getattr(config, name)) > 1),
                      f"p_k = {panel.p_k:g}"])


def _missing(config: GPTConfig, curves: Curves) -> str:
    """Return how many seeds are not finished or diverged, if any."""
    asked, diverged = len(config.seed_numbers), sum(bool(c.diverged) for c in curves.values())
    parts = [f"{len(curves)} of {asked} seeds"] * (len(curves) < asked)
    parts += [f"{diverged} diverged"] * bool(diverged)
    return f" ({', '.join(parts)})" if parts else ""


def _said(config: GPTConfig, found: Found, panel: Panel) -> list[str]:
    """Return a line on each model against the standard one, and on each that diverged."""
    lines = []
    for model in config.models:
        for seed, curve in found[panel, model].items():
            if curve.diverged:
                lines.append(f"{_where(config, panel)}: {model}, seed {seed}: {curve.diverged}")
    for model in config.models:
        made = verdict(found[panel, model], found.get((panel, "standard"), {}))
        if model != "standard" and made is not None:
            lines.append(f"{_where(config, panel)}: {in_words(model, made)}")
    return lines


def in_words(model: str, made: Verdict) -> str:
    """Return a verdict on a model against the standard one."""
    size, lower = abs(made.saved.mean), made.lower.mean
    by = f"{size:.1f}{_reach(made.saved)} % fewer tokens"
    faster = (f"it comes to where standard ends with {by}" if made.saved.mean >= 0 else
              f"standard comes to where it ends with {by}")
    certain = made.saved.excludes_zero or np.isnan(made.saved.reach)
    word = "faster" if made.saved.mean >= 0 else "slower"
    return (f"{model} learns {word}{'' if certain else ', within what seeds differ'}: {faster}; at "
            f"the end its perplexity is {abs(lower):.1f}{_reach(made.lower)} % "
            f"{'lower' if lower >= 0 else 'higher'}; ahead at {made.ahead} of {made.of} evaluations"
            + ("" if np.isfinite(made.saved.reach) else " (one seed)"))


# --- the figure ---------------------------------------------------------------------------------


def draw(config: GPTConfig, out: Path, name: str) -> list[Path]:
    """Draw perplexity against tokens and against time, a row a panel."""
    found = read(config, out)
    if not any(found.values()):
        raise UserError(f"{out} holds no finished cell of {name}: run it first")
    plt, panels = figures.pyplot(), [panel for panel in config.panels
                                     if any(found[panel, model] for model in config.models)]
    figure, grid = plt.subplots(len(panels), 2, squeeze=False, sharey="row",
                                figsize=(7.6, 2.6 * len(panels) + 0.7))
    for row, panel in zip(grid, panels, strict=True):
        _draw_panel(row, config, found, panel)
    for axes, label in zip(grid[-1], ("million tokens", "seconds of training"), strict=True):
        axes.set_xlabel(label)
    figure.suptitle(figures.plain(textwrap.fill(_title(config, name), int(
        CHARACTERS_AN_INCH * figure.get_figwidth()))), fontsize=8)
    return [figures.save(figure, out / f"{name}.png")]


def _draw_panel(row: Any, config: GPTConfig, found: Found, panel: Panel) -> None:
    """Draw a panel: on the left against tokens, on the right against time."""
    plt, late = figures.pyplot(), []
    for number, model in enumerate(config.models):
        curves = list(found[panel, model].values())
        if not curves:
            continue
        color, label = figures.look(model, number)
        best, _, speed = _values(found[panel, model])
        best = best.replace("+-", "±")
        labels = (f"{label} {best} ({_parameters(config, panel, model) / 1e6:.3g} M)"
                  f"{_missing(config, found[panel, model])}", f"{label}: {speed} tokens/s")
        places = [[curve.tokens / 1e6 for curve in curves], [curve.seconds for curve in curves]]
        for axes, text, x in zip(row, labels, places, strict=True):
            _draw_curves(axes, x, curves, color, text)
        late += [curve.value[curve.tokens >= EARLY * curve.tokens[-1]] for curve in curves]
    values = np.concatenate(late)
    values = values[np.isfinite(values)]
    row[0].set_yscale("log")
    for set_formatter in row[0].yaxis.set_major_formatter, row[0].yaxis.set_minor_formatter:
        set_formatter(plt.LogFormatter(minor_thresholds=(2, 0.5)))
    row[0].set_ylim(values.min() / 1.05, values.max() * 1.05)
    row[0].set_ylabel("validation perplexity")
    row[0].set_title(figures.plain(_where(config, panel)).replace("p_k", "$p_k$"))
    for axes in row:
        axes.grid(True, which="minor", axis="y")
        axes.set_xlim(left=0)
        axes.legend(loc="best")


def _draw_curves(axes: Any, places: list[np.ndarray], curves: list[Curve], color: str,
                 label: str) -> None:
    """Draw the mean and the band as far as all curves go, then each alone; a cross where one
    diverged.
    """
    n = min(map(len, places))
    figures.seed_band(axes, np.mean([x[:n] for x in places], axis=0),
                      np.array([curve.value[:n] for curve in curves]), color, label)
    for x, curve in zip(places, curves, strict=True):
        axes.plot(x[n - 1:], curve.value[n - 1:], color=color, linewidth=0.8)
        if curve.diverged:
            axes.plot(x[-1], curve.value[-1], "x", color=color, clip_on=False)


def _title(config: GPTConfig, name: str) -> str:
    """Return the settings, but for what the panels say."""
    seeds = len(config.seed_numbers)
    length = (f"{config.steps} steps" if config.steps is not None else
              f"{config.epochs} epoch{'s' * (config.epochs != 1)}")
    one = {"lr": "lr {:g}", "precision": "{}"}
    parts = [config.optimizer.name,
             *(text.format(getattr(config, key)[0]) for key, text in one.items()
               if len(getattr(config, key)) == 1),
             f"batch {config.batch}" + f" x {config.accumulate[0]}" * (
                 len(config.accumulate) == 1) + f" texts of {config.context} tokens",
             length, f"tokenizer {config.tokenizer} of {config.entries:,} entries",
             config.activation, f"dropout {config.dropout:g}",
             f"{seeds} seed{'s' * (seeds != 1)}" + " (band: lowest to highest)" * (seeds > 1)]
    if config.train is not None:
        parts.insert(4, f"at most {config.train:,} training texts")
    return (f"{name}: {', '.join(parts)}; in the legends the best perplexity"
            f"{' with its 95 % interval' * (seeds > 1)} and the parameters")


def family(name: str, presets: dict[str, dict[str, Any]]) -> Experiment:
    """Return the experiment of this name; `presets` gives what each preset changes."""
    return Experiment(name, GPTConfig, presets, lambda config: (), cells, run_cell,
                      lambda config, out: draw(config, out, name), table, prepare)


EXPERIMENTS = {"gpt": family("gpt", {"smoke": SMOKE, "laptop": LAPTOP | {"lr": (1e-3, 3e-3)}})} | {
    name: family(name, figure.presets) for name, figure in FIGURES.items()}
