"""Soft MoE, two claims of 'Beyond Parameter Count: Implicit Bias in Soft Mixture of Experts'.

(arXiv 2409.00879, of which the abstract alone was at hand: sizes, data and training are ours.)

(a) One expert, however large, cannot represent a simple convex function, the norm of its input;
several small ones of as many parameters together can. The network of `pooled` learns ||X||_2, the
norm of all numbers of T tokens of D normal numbers each, standardised, so that the mean squared
error is the fraction of the variance that is left. Every expert has one slot and one hidden layer,
as wide as the total number of parameters allows; one expert is also tried with more parameters.
The reason: a single slot holds one mean of the tokens, D of the T D numbers that the norm depends
on, and every token gets the same function of it. What is lost before the expert no width brings
back. So it may be the slots that count: one expert is also tried with several. Inputs are so many
(20,000 for 1600 parameters) that none are memorised. All train by Adam with a cosine schedule, at
whose end errors have settled: four times as many epochs change that of one expert by less than a
hundredth of it, and that of four by less than a tenth.

(b) With many small experts, those that are specialised to an input can be told from the combine
weights: with these alone the network predicts nearly as well as with all, and far better than with
as many others. The network learns to classify images whose patches are its tokens. In evaluation
the K experts of the largest total weight over an input's tokens are kept, the weights of the others
set to 0 and the rest scaled to the sum 1; and K that are drawn at random for each input, several
times. Nothing is trained anew.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from ..backends import Backend, xp_of
from ..errors import UserError, unknown
from ..functional.routing import kwta_mask
from ..models.soft_moe import SoftMoEConfig
from ..optim import OptimizerConfig
from ..rng import stream
from ..settings import option
from . import datasets, figures, pooled
from .datasets import IMAGES_32, Dataset
from .datasets.base import scaled
from .experiment import Cell, Experiment, Place, columns
from .intervals import interval, percent
from .pooled import PooledConfig
from .training import RunConfig, TrainConfig, run_work, train
from .training.examples import BLOCK, blocks
from .training.model import read_weights

Array = Any

NORMS, HELD_OUT = 20_000, 5_000  # inputs of which the norm is learnt, and on which it is measured


@dataclass(frozen=True)
class SoftMoESettings:
    """Settings of both parts; those of (a) begin with `norm`."""

    datasets: tuple[str, ...] = option(("glyphs",), "images to classify, of "
                                       f"{', '.join(IMAGES_32)}")
    experts: tuple[int, ...] = option((4, 8, 16, 32, 64), "how many experts share the parameters")
    parameters: int = option(100_000, "of all experts together")
    shares: tuple[float, ...] = option((0.5, 0.25, 0.125), "shares of the experts that are kept")
    draws: int = option(5, "random subsets of experts for each image")
    patch: int = option(8, "side of the patches, in pixels")
    features: int = option(32, "D_out, numbers that an expert puts out")
    train: int | None = option(None, "use only so many training images")
    epochs: int = option(12, "passes over the training images")
    lr: float = option(3e-3, "highest learning rate of Adam")
    norm_experts: tuple[int, ...] = option((1, 2, 4, 8, 16), "how many experts learn the norm")
    norm_parameters: int = option(1600, "of all experts together")
    norm_larger: tuple[int, ...] = option((4, 16), "of one expert also so many times as many")
    norm_slots: tuple[int, ...] = option((2, 4), "of one expert also so many slots, up to T")
    norm_tokens: int = option(4, "T")
    norm_features: int = option(4, "D, numbers a token")
    norm_epochs: int = option(10, f"passes over {NORMS:,} inputs")
    norm_lr: float = option(1e-2, "highest learning rate of Adam")
    batch: int = option(128, "examples in a mini-batch")
    activation: str = option("softplus", "activation of the experts")
    seeds: int = option(3, "number of seeds: of weights, data order, and data of the norm")

    def __post_init__(self) -> None:
        for name in self.datasets:
            if name not in IMAGES_32:
                raise unknown("data set of 32x32 images", name, IMAGES_32)
        if min(self.seeds, self.draws, self.norm_tokens, self.norm_features, self.features,
               *self.norm_larger, self.train or 1) < 1:
            raise UserError("seeds, draws, tokens, features, train and the factors of norm_larger "
                            "must each be at least 1")
        if not all(1 <= S <= self.norm_tokens for S in self.norm_slots):
            raise UserError(f"an expert has 1 to T = {self.norm_tokens} slots, got norm_slots = "
                            f"{self.norm_slots}")
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise UserError("shares of the experts lie between 0 and 1 and are at least one, got "
                            f"{self.shares}")
        cells(self)  # bad settings are refused before the first cell runs


@dataclass(frozen=True)
class NormCell:
    """One cell of (a)."""

    run: RunConfig


@dataclass(frozen=True)
class SpecialistCell:
    """One cell of (b)."""

    dataset: str
    train: int | None
    shares: tuple[float, ...]
    draws: int
    run: RunConfig


class Kind(NamedTuple):
    """What cells of several seeds have in common: the name, how many experts, of which data.

    dataset : of (b); None: the norm. larger : how many times the parameters one expert has.
    slots : of each expert.
    """

    name: str
    experts: int
    dataset: str | None = None
    larger: int = 1
    slots: int = 1


def kinds(config: SoftMoESettings) -> list[Kind]:
    """Return the networks that are compared."""
    return [*(Kind(f"norm-E{E}", E) for E in config.norm_experts),
            *(Kind(f"norm-E1-x{larger}", 1, larger=larger) for larger in config.norm_larger),
            *(Kind(f"norm-E1-S{slots}", 1, slots=slots) for slots in config.norm_slots),
            *(Kind(f"{name}-E{E}", E, name) for name in config.datasets for E in config.experts)]


def cells(config: SoftMoESettings) -> list[Cell]:
    """Return the cells, seed by seed."""
    return [cell_of(config, kind, seed) for seed in range(config.seeds) for kind in kinds(config)]


def cell_of(config: SoftMoESettings, kind: Kind, seed: int) -> Cell:
    """Return the cell of a network and a seed."""
    of_norm, name = kind.dataset is None, f"{kind.name}-seed{seed}"
    training = TrainConfig(
        OptimizerConfig("adam"), lr=config.norm_lr if of_norm else config.lr, schedule="cosine",
        batch=config.batch, epochs=config.norm_epochs if of_norm else config.epochs)
    run = RunConfig(network(config, kind), training, seed)
    if kind.dataset is None:
        return Cell(name, NormCell(run), run_work(run, NORMS))
    examples = datasets.sizes_of(kind.dataset).examples
    spec = SpecialistCell(kind.dataset, config.train, config.shares, config.draws, run)
    return Cell(name, spec, run_work(run, min(config.train or examples, examples)))


def network(config: SoftMoESettings, kind: Kind) -> PooledConfig:
    """Return the network of experts that share the parameters."""
    if kind.dataset is None:
        D, budget = config.norm_features, config.norm_parameters * kind.larger
        hidden = hidden_width(budget, kind.experts, D, 1, kind.slots)
        mixture = SoftMoEConfig((D, hidden, 1), kind.experts, kind.slots, config.activation)
        return PooledConfig(mixture, config.norm_tokens, 1)
    widths = pooled.of_images(config.patch, 1, config.features, 1, 1, "relu").mixture.widths
    hidden = hidden_width(config.parameters, kind.experts, widths[0], widths[-1])
    return pooled.of_images(config.patch, hidden, config.features, kind.experts,
                            datasets.sizes_of(kind.dataset).outputs, config.activation)


def hidden_width(parameters: int, experts: int, D: int, D_out: int, slots: int = 1) -> int:
    """Return the width of the hidden layer of experts that have so many parameters together.

    At most: ``E (H (D + D_out + 1) + D_out + S D)``, with biases and S slots an expert.

    Raises
    ------
    UserError
        If they are too few.
    """
    if experts < 1:
        raise UserError(f"a soft mixture has at least 1 expert, got {experts}")
    outside = D_out + slots * D
    width = (parameters // experts - outside) // (D + D_out + 1)
    if width < 1:
        raise UserError(f"{parameters:,} parameters are too few for {experts} experts from {D} to "
                        f"{D_out} numbers, which need {experts * (D + D_out + 1 + outside):,}")
    return width


# --- a cell -------------------------------------------------------------------------------------


def norms(tokens: int, features: int, seed: int) -> Dataset:
    """Return inputs of normal numbers, and their norms as targets: of mean 0 and variance 1."""
    x = stream(seed, "norms").standard_normal((NORMS + HELD_OUT, tokens * features), "float32")
    y = np.sqrt((x.astype("float64") ** 2).sum(axis=1, keepdims=True))
    y = ((y - y.mean()) / y.std()).astype("float32")
    return Dataset("norms", "regression", x[:NORMS], y[:NORMS], x[NORMS:], y[NORMS:], None, None, 1)


@functools.lru_cache(maxsize=1)
def _images(name: str, folder: str | None, examples: int | None) -> Dataset:
    return datasets.load(name, folder, train=examples)


def run_cell(spec: NormCell | SpecialistCell, place: Place) -> dict[str, Any]:
    """Train the cell's network; in (b) measure it with a part of its experts, too."""
    model = spec.run.model
    if isinstance(spec, NormCell):
        data = norms(model.tokens, model.mixture.widths[0], spec.run.seed)
    else:
        data = _images(spec.dataset, place.data, spec.train)
        if data.notice:
            place.progress.message(f"{spec.dataset}: {data.notice}")
    result = train(spec.run, data, place.folder, place.backend, place.progress, place.stop)
    if isinstance(spec, NormCell):
        return result
    params, _ = read_weights(place.folder, model, place.backend)
    return result | {"kept": accuracies(spec, params, data, place.backend)}


def accuracies(spec: SpecialistCell, params: pooled.PooledParams, data: Dataset,
               backend: Backend) -> list[dict[str, Any]]:
    """Return the test accuracies with the K experts of the largest weights, and with K others.

    One entry a share of the experts, of those that make at least one expert.
    """
    model, E = spec.run.model, spec.run.model.mixture.experts
    x_test, y_test = data.x_test, data.y_test
    assert x_test is not None and y_test is not None  # all data sets of images have them
    random = [stream(spec.run.seed, "random experts", draw).random((len(x_test), E), "float32")
              for draw in range(spec.draws)]
    hits: dict[int, np.ndarray] = {}
    for rows in blocks(len(x_test), BLOCK):
        x = scaled(backend.asarray(x_test[rows]), data.scale, data.shift, "float32")
        _, cache = pooled.forward(x, params, (), model)
        scores = [total_weights(cache.mixture.combine.weights, E),
                  *(backend.asarray(draw[rows]) for draw in random)]
        for K in counts(E, spec.shares):
            said = (pooled.combined(cache, params, model, kwta_mask(each, K, "index"))
                    for each in scores)
            right = [(backend.to_host(y).argmax(axis=-1) == y_test[rows]).sum() for y in said]
            hits[K] = hits.get(K, 0) + np.array(right)
    return [{"K": K, "specialised": right[0] / len(x_test),
             "random": (right[1:] / len(x_test)).tolist()} for K, right in hits.items()]


def total_weights(weights: Array, experts: int) -> Array:
    """Return the total weight of each expert, (n, E), over tokens and slots: C (n, T, E S)."""
    xp = xp_of(weights)
    n, T, slots = weights.shape
    return xp.ascontiguousarray(weights.reshape(n, T, experts, slots // experts).sum(axis=(1, 3)))


def counts(experts: int, shares: tuple[float, ...]) -> Iterator[int]:
    """Yield how many experts are kept, for the shares that make at least one."""
    yield from dict.fromkeys(int(share * experts) for share in shares if share * experts >= 1)


# --- what the files say -------------------------------------------------------------------------


class Kept(NamedTuple):
    """Accuracies of the runs of one kind with K experts: specialised, and random ones."""

    specialised: np.ndarray
    random: np.ndarray


def _norm_error(result: dict[str, Any]) -> tuple[int, float]:
    return int(result["parameters"]), float(result["last"]["val_loss"])


def _accuracies(result: dict[str, Any]) -> tuple[int, float, dict[int, tuple[float, float]]]:
    """Return the parameters, the accuracy, and by K those of the two kinds of subsets."""
    kept = {int(each["K"]): (float(each["specialised"]), fmean(each["random"]))
            for each in result["kept"]}
    return int(result["parameters"]), float(result["test_accuracy"]), kept


def _found(config: SoftMoESettings, out: Path) -> dict[Kind, list[Any]]:
    """Return what the finished cells of each kind measured, if any is."""
    found = {}
    for kind in kinds(config):
        use = _norm_error if kind.dataset is None else _accuracies
        results = [result for seed in range(config.seeds)
                   if (result := cell_of(config, kind, seed).result(out, use)) is not None]
        if results:
            found[kind] = results
    if not found:
        raise UserError(f"{out} holds no finished cell of softmoe: run it first")
    return found


def kept_by(results: list[Any], K: int) -> Kept | None:
    """Return the accuracies of all seeds with K experts, or None if they were not measured."""
    pairs = [kept[K] for _, _, kept in results if K in kept]
    return Kept(*np.array(pairs).T) if pairs else None


def draw(config: SoftMoESettings, out: Path) -> list[Path]:
    """Draw the error of the norm, and the accuracies with parts of the experts."""
    plt = figures.pyplot()
    found = _found(config, out)
    figure, panels = plt.subplots(1, 1 + len(config.datasets),
                                  figsize=(4 + 5.6 * len(config.datasets), 3.6), squeeze=False)
    axes = panels[0, 0]
    _draw_norm(axes, config, found)
    for axes, name in zip(panels[0, 1:], config.datasets, strict=True):
        _draw_kept(axes, config, name, found)
    for axes in panels[0]:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("experts, E")
        axes.xaxis.set_major_formatter("{x:g}")
    for axes, place in zip(panels[0], ("best", *len(config.datasets) * ("center left",)),
                           strict=True):
        if axes.containers:  # a part of the cells may be finished
            axes.legend(loc=place, bbox_to_anchor=None if place == "best" else (1, 0.5))
    figure.suptitle(f"softmoe: all experts together {config.norm_parameters:,} parameters (a) and "
                    f"{config.parameters:,} (b), one slot each (b), {config.seeds} seeds",
                    fontsize=8)
    return [figures.save(figure, out / "softmoe.png")]


def _draw_norm(axes: Any, config: SoftMoESettings, found: dict[Kind, list[Any]]) -> None:
    curves: dict[str, dict[int, np.ndarray]] = {}
    for kind, results in found.items():
        if kind.dataset is None:
            label = (f"one expert, {kind.larger} times the size" if kind.larger > 1 else
                     f"one expert of {kind.slots} slots" if kind.slots > 1 else "one slot each")
            errors = np.array([error for _, error in results])
            curves.setdefault(label, {})[kind.experts] = errors
    for number, (label, of_size) in enumerate(curves.items()):
        mean = np.array([errors.mean() for errors in of_size.values()])
        spread = [mean - [errors.min() for errors in of_size.values()],
                  [errors.max() for errors in of_size.values()] - mean]
        axes.errorbar(list(of_size), mean, spread, capsize=2, linewidth=1.2, markersize=5,
                      marker="oxs+D^"[number % 6], markerfacecolor="none", label=label)
    axes.set_yscale("log")
    axes.set_ylabel("validation error (fraction of variance)")
    axes.set_title(f"(a) the norm of {config.norm_tokens} tokens of {config.norm_features} numbers")


def _draw_kept(axes: Any, config: SoftMoESettings, name: str,
               found: dict[Kind, list[Any]]) -> None:
    of_data = {kind.experts: results for kind, results in found.items() if kind.dataset == name}
    lines: list[tuple[str, str, str, dict[int, Any]]] = [
        ("black", "-", "all", {E: [accuracy for _, accuracy, _ in results]
                               for E, results in of_data.items()})]
    for number, share in enumerate(config.shares):
        kept = {E: both for E, results in of_data.items()
                if share * E >= 1 and (both := kept_by(results, int(share * E))) is not None}
        for what, style, label in (("specialised", "-", "of the largest weights"),
                                   ("random", ":", "at random")):
            lines.append((f"C{number}", style, f"E $\\times$ {share:g} {label}",
                          {E: getattr(both, what) for E, both in kept.items()}))
    for color, style, label, accuracies_by in lines:
        if accuracies_by:
            mean, half = np.array([interval(np.asarray(each)) for each in accuracies_by.values()]).T
            axes.errorbar(list(accuracies_by), mean, np.nan_to_num(half), color=color,
                          linestyle=style, capsize=2, linewidth=1.2, marker="o", markersize=3,
                          label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("test accuracy, mean and 95 % interval")
    axes.set_title(f"(b) {figures.plain(name)}: experts that are kept for each image")


def table(config: SoftMoESettings, out: Path) -> str:
    """Return the errors of (a) and the accuracies of (b), and what they say of the claims."""
    found = _found(config, out)
    of_norm = {kind: results for kind, results in found.items() if kind.dataset is None}
    parts = [_norm_table(config, of_norm)] if of_norm else []
    for name in config.datasets:
        of_data = {kind.experts: results for kind, results in found.items() if kind.dataset == name}
        if of_data:
            parts.append(_kept_table(config, name, of_data))
    return "\n\n".join(parts)


def _norm_table(config: SoftMoESettings, of_norm: dict[Kind, list[Any]]) -> str:
    rows = [("(a) experts", "slots each", "parameters", "error of the norm", "seeds")]
    for kind, results in of_norm.items():
        errors = [error for _, error in results]
        rows.append((str(kind.experts), str(kind.slots), f"{results[0][0]:,}",
                     f"{np.mean(errors):.4f}", f"{min(errors):.4f}-{max(errors):.4f}"))
    text = columns(rows) + "\nerrors are fractions of the variance, means and range of the seeds"
    several = [kind for kind in of_norm if kind.experts > 1]
    for what, alone in (("one slot, of whatever size,", [1]), ("several slots", config.norm_slots)):
        one = [error for kind, results in of_norm.items()
               if kind.experts == 1 and kind.slots in alone for _, error in results]
        if one and several:
            most = max(several, key=lambda kind: kind.experts)
            text += (f"\none expert of {what} leaves at least {min(one):.3g} of the variance, "
                     f"{most.experts} experts of one at most "
                     f"{max(error for _, error in of_norm[most]):.3g}")
    return text


def _kept_table(config: SoftMoESettings, name: str, of_data: dict[int, list[Any]]) -> str:
    rows = [(f"(b) {name}: experts", "parameters", "all",
             *(f"{share:g} {what}" for share in config.shares for what in ("best", "random")))]
    for E, results in of_data.items():
        row = [str(E), f"{results[0][0]:,}", percent([accuracy for _, accuracy, _ in results])]
        for share in config.shares:
            both = kept_by(results, int(share * E)) if share * E >= 1 else None
            row += ["-", "-"] if both is None else map(percent, both)
        rows.append(tuple(row))
    text = columns(rows) + ("\ntest accuracies in %, means over seeds with 95 % intervals; best: "
                            "the share of the experts with the largest combine weights")
    for E in dict.fromkeys((min(of_data), max(of_data))):
        results = of_data[E]
        whole = np.mean([accuracy for _, accuracy, _ in results])
        measured = {K: both for K in counts(E, config.shares)
                    if (both := kept_by(results, K)) is not None}
        if measured and whole > 0:
            best, random = (", ".join(f"{np.mean(getattr(both, what)) / whole:.0%}"
                                      for both in measured.values()) for what in Kept._fields)
            text += (f"\nof {E} experts the best {', '.join(map(str, measured))} have {best} of "
                     f"the accuracy of all, as many random ones {random}")
    return text


EXPERIMENT = Experiment(
    "softmoe", SoftMoESettings,
    {"smoke": {"seeds": 2, "train": 500, "epochs": 1, "experts": (4, 8), "parameters": 20_000,
               "draws": 2, "norm_experts": (1, 4), "norm_larger": (4,), "norm_slots": (4,),
               "norm_epochs": 1},
     "paper": {"datasets": ("cifar10",), "seeds": 5, "parameters": 200_000, "epochs": 30,
               "norm_epochs": 40, "draws": 20}},
    lambda config: config.datasets, cells, run_cell, draw, table)
