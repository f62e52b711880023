"""Routers, appendix A.7 of the paper: what masks other routing networks make, and at what cost.

Each router of `comet_np.gates.routers`, and two other g of eq. (6), route an MLP on images; a few
of them a small ViT and a small GPT-2, where masks cannot be kept and routing is paid at each step.
Measured are the accuracy of the trained networks against that of the paper's router from the same
seeds, and how the masks of validation images overlap, are used, and follow the classes. What a
router costs is counted here in multiply-adds; ``python -m comet_np.benchmarks.routers`` times it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .. import analysis
from ..errors import UserError
from ..functional.packing import unpacked
from ..gates import EVALUATION, Comet
from ..gates.routers import ROUTERS
from ..models.gpt2 import GPT2Config
from ..models.mlp import MLPConfig
from ..models.vit import ViTConfig
from ..optim import OptimizerConfig
from ..settings import option
from . import datasets, figures, gpt
from .datasets.base import scaled
from .experiment import Cell, Experiment, Place, columns
from .gpt import TextCell, shape
from .grid import DataCell, check_list, examples, load
from .intervals import advantage, interval, signed
from .training import RunConfig, TrainConfig, run_memory, run_work, train
from .training.config import multiply_adds
from .training.model import read_weights
from .vision import check_images, normalised

Array = Any

ARCHITECTURES = {"mlp": "MLP", "vit": "ViT", "gpt": "GPT-2"}
OF_G = ("tanh", "relu")  # the dense router with another g
KINDS = ("standard", *ROUTERS, *OF_G)
CHEAP = 0.05  # of the multiply-adds of a step
NEIGHBOURS = 10


@dataclass(frozen=True)
class RoutersConfig:
    """Settings; the defaults are small networks on a part of CIFAR10, and on Python's own help."""

    dataset: str = option("cifar10", "images to classify, see: comet-np data")
    corpus: str = option("python-prose", "text for the GPT-2, or a file of your own")
    architectures: tuple[str, ...] = option(tuple(ARCHITECTURES), "mlp, vit, gpt")
    routers: tuple[str, ...] = option(KINDS, "of the MLP: standard, which has none, a router, or "
                                             "tanh or relu, the dense router with such a g")
    block_routers: tuple[str, ...] = option(
        ("standard", "dense", "sparse-binary", "sparse-signed", "kronecker", "block-diagonal",
         "hadamard"), "the same of the ViT and the GPT-2")
    p_k: float = option(0.5, "proportion of neurons that stay active")
    width: int = option(500, "neurons of each of the MLP's three hidden layers")
    epochs: int = option(5, "passes over the training images, of the MLP")
    batch: int = option(32, "images in a mini-batch of the MLP")
    vit_size: str = option("4x64x4", "blocks x width x heads of the ViT")
    vit_hidden: int = option(256, "neurons of the MLPs in its blocks")
    patch: int = option(8, "side of the patches, in pixels")
    vit_epochs: int = option(4, "passes over the training images, of the ViT")
    gpt_size: str = option("4x64x4", "blocks x width x heads of the GPT-2, whose tokens are bytes")
    gpt_steps: int = option(300, "steps of the GPT-2")
    context: int = option(64, "bytes of a text")
    train: int | None = option(5000, "use only so many training images, or texts")
    validation: int | None = option(1000, "use only so many validation images, or texts")
    images: int = option(500, "validation images whose masks are compared")
    seeds: int = option(3, "number of seeds: of routing and other weights, and of data order")

    target: ClassVar[None] = None
    task: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_images(self.dataset, "--dataset")
        for name, known in (("architectures", ARCHITECTURES), ("routers", KINDS),
                            ("block_routers", KINDS)):
            check_list(name, getattr(self, name), known)
        if min(self.seeds, 1 if self.train is None else self.train) < 1:
            raise UserError("an experiment needs at least 1 seed and 1 example to train, got seeds "
                            f"= {self.seeds}, train = {self.train}")
        fewest = NEIGHBOURS + 1
        if min(self.images, fewest if self.validation is None else self.validation) < fewest:
            raise UserError(f"masks are compared with those of {NEIGHBOURS} other images, which "
                            f"needs at least {fewest}, got images = {self.images}, validation = "
                            f"{self.validation}")
        cells(self)  # bad settings are refused before the first cell runs

    def of(self, architecture: str) -> tuple[str, ...]:
        """Return what routes the networks of an architecture."""
        return self.routers if architecture == "mlp" else self.block_routers


@dataclass(frozen=True)
class ImageCell(DataCell):
    """One cell: a network on images trained from one seed; `images` is 0 if no masks are compared.
    """

    images: int
    run: RunConfig


def cells(config: RoutersConfig) -> list[Cell]:
    """Return the cells, seed by seed."""
    return [cell_of(config, architecture, kind, seed) for seed in range(config.seeds)
            for architecture in config.architectures for kind in config.of(architecture)]


def cell_of(config: RoutersConfig, architecture: str, kind: str, seed: int) -> Cell:
    """Return the cell of a network and a seed."""
    if architecture == "gpt":
        training = TrainConfig(
            OptimizerConfig("adamw", weight_decay=0.1, decay_biases=False, clip_norm=1.0), lr=3e-3,
            schedule="cosine", batch=16, epochs=1, steps=config.gpt_steps, evaluations=5)
    else:
        mlp = architecture == "mlp"
        training = TrainConfig(OptimizerConfig("adam"), lr=1e-3, schedule="cosine",
                               batch=config.batch if mlp else 64,
                               epochs=config.epochs if mlp else config.vit_epochs)
    run = RunConfig(network(config, architecture, kind), training, seed)
    if architecture == "gpt":
        spec: Any = TextCell(config.corpus, "bytes", 256, config.context, False, config.train,
                             config.validation, run)
        return Cell(f"{gpt.short_name(config.corpus)}-gpt-{kind}-seed{seed}", spec,
                    run_work(run, config.train or 1), run_memory(run))
    masked = architecture == "mlp" and kind != "standard"
    spec = ImageCell(config.dataset, config.train, config.validation, None, None,
                     datasets.sizes_of(config.dataset).digest, config.images * masked, run)
    return Cell(f"{config.dataset}-{architecture}-{kind}-seed{seed}", spec,
                run_work(run, examples(config, config.dataset)), run_memory(run))


def gate_of(kind: str, p_k: float) -> Comet | None:
    """Return the gate of a kind of routing."""
    if kind == "standard":
        return None
    return Comet(p_k, g=kind) if kind in OF_G else Comet(p_k, router=kind)


def network(config: RoutersConfig, architecture: str,
            kind: str) -> MLPConfig | ViTConfig | GPT2Config:
    """Return the network of an architecture, with a kind of routing."""
    gate = gate_of(kind, config.p_k)
    if architecture == "gpt":
        depth, width, heads = shape(config.gpt_size)
        return GPT2Config(256, config.context, width, depth, heads, gate=gate, activation="tanh",
                          context=config.context)
    sizes = datasets.sizes_of(config.dataset)
    if architecture == "mlp":
        return MLPConfig((sizes.inputs, *3 * (config.width,), sizes.outputs), gate=gate)
    depth, width, heads = shape(config.vit_size)
    assert sizes.image is not None  # by `check_images`
    return ViTConfig(sizes.image, config.patch, sizes.outputs, width, depth, heads,
                     config.vit_hidden, gate=gate)


def prepare(config: RoutersConfig, folder: str | None, progress: Any) -> list[Cell]:
    """Make the texts, once, and return the cells."""
    if "gpt" in config.architectures:
        gpt.load(cell_of(config, "gpt", config.block_routers[0], 0).spec, folder, progress)
    return cells(config)


# --- a cell -------------------------------------------------------------------------------------


def run_cell(spec: ImageCell | TextCell, place: Place) -> dict[str, Any]:
    """Train the cell's network, and measure the masks of validation images."""
    if isinstance(spec, TextCell):
        return gpt.run_cell(spec, place)
    data, model = load(spec, place), spec.run.model
    if isinstance(model, ViTConfig):
        data = normalised(data)
    result = train(spec.run, data, place.folder, place.backend, place.progress, place.stop)
    if not spec.images or not place.first:
        return result
    assert data.x_val is not None and data.y_val is not None  # all data sets of images have them
    x = scaled(place.backend.asarray(data.x_val[:spec.images]), data.scale, data.shift, "float32")
    _, fixed = read_weights(place.folder, model, place.backend)
    masks = [place.backend.to_host(unpacked(m, N)) for m, N in zip(
        model.gate.masks(x, fixed, model, EVALUATION), model.widths[1:-1], strict=True)]
    x, labels = place.backend.to_host(x), np.asarray(data.y_val[:spec.images])
    return result | {"layers": [measures(m, x, labels)._asdict() for m in masks],
                     "inputs_purity": analysis.class_purity(
                         analysis.cosines(x), labels, NEIGHBOURS)}


class Measures(NamedTuple):
    """What the masks of a layer say.

    likeness : the rank correlation, over all pairs of images, of the overlap of their masks with
        the cosine of the images. overlap : the mean one. never : share of the neurons that no image
        activates. even : the effective number of neurons over N, 1 if all are active as often.
        purity : the share of the 10 images of most overlap that are of an image's own class.
    """

    likeness: float
    overlap: float
    never: float
    even: float
    purity: float


def measures(masks: np.ndarray, x: np.ndarray, labels: np.ndarray) -> Measures:
    """Return the measures of masks, bool (n, N), of inputs (n, N_0) with labels (n,)."""
    from scipy.stats import spearmanr  # here, as it takes a second to load

    overlaps, pairs = analysis.overlaps(masks, masks), np.triu_indices(len(masks), 1)
    counts = masks.sum(axis=0)
    shared, alike = overlaps[pairs], analysis.cosines(x)[pairs]
    constant = np.ptp(shared) == 0 or np.ptp(alike) == 0  # which is like nothing
    likeness = 0.0 if constant else float(spearmanr(shared, alike).statistic)
    return Measures(likeness, float(shared.mean()),
                    float((counts == 0).mean()),
                    analysis.effective_number(counts) / len(counts),
                    analysis.class_purity(overlaps, labels, NEIGHBOURS))


# --- what the files say -------------------------------------------------------------------------


class Found(NamedTuple):
    """What the files of the finished cells of an architecture and a kind say, by seed.

    quality : accuracy on the test set, or perplexity on validation texts, of each seed. layers :
    array (layers, measures) of each seed, or None. inputs : purity of the images themselves, or 0.
    """

    quality: dict[int, float]
    layers: dict[int, np.ndarray]
    inputs: float


def read(config: RoutersConfig, out: Path) -> dict[tuple[str, str], Found]:
    """Return what the finished cells say, by architecture and kind.

    Raises
    ------
    UserError
        If there is none, or its files are damaged.
    """
    found: dict[tuple[str, str], Found] = {}
    for architecture in config.architectures:
        for kind in config.of(architecture):
            def use(result: dict[str, Any], architecture: str = architecture,
                    kind: str = kind) -> tuple[float, np.ndarray | None, float]:
                if architecture == "gpt":
                    diverged = "diverged" in result
                    return (np.inf if diverged else
                            float(np.exp(float(result["last"]["val_loss"]))), None, 0.0)
                quality = float(result["test_accuracy"])
                if architecture == "vit" or kind == "standard":
                    return quality, None, 0.0
                layers = [[float(each[name]) for name in Measures._fields]
                          for each in result["layers"]]
                return (quality, np.array(layers).reshape(3, len(Measures._fields)),
                        float(result["inputs_purity"]))

            here = {seed: result for seed in range(config.seeds) if (result := cell_of(
                config, architecture, kind, seed).result(out, use)) is not None}
            if here:
                found[architecture, kind] = Found(
                    {seed: each[0] for seed, each in here.items()},
                    {seed: each[1] for seed, each in here.items() if each[1] is not None},
                    next(iter(here.values()))[2])
    if not found:
        raise UserError(f"{out} holds no finished cell of routers: run it first")
    return found


def share(config: RoutersConfig, architecture: str, kind: str) -> float:
    """Return the share of a step's multiply-adds that routing takes, masks not kept."""
    trained, routing = multiply_adds(network(config, architecture, kind))
    return routing / (trained + routing)


def sign(architecture: str) -> int:
    """Return 1 if more of what is measured of an architecture is better, else -1."""
    return -1 if architecture == "gpt" else 1


def paired(found: dict[tuple[str, str], Found], architecture: str,
           kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the qualities of a kind, and of the dense router, from the seeds that both have."""
    none = Found({}, {}, 0.0)
    ours, dense = (found.get((architecture, each), none).quality for each in (kind, "dense"))
    seeds = sorted(ours.keys() & dense.keys())
    return np.array([ours[seed] for seed in seeds]), np.array([dense[seed] for seed in seeds])


def verdict(ours: np.ndarray, dense: np.ndarray, sign: int) -> str:
    """Return where the mean of one router lies to the spread of the dense one over seeds."""
    if len(dense) < 2:
        return "-"
    mean, low, high = ours.mean(), dense.min(), dense.max()
    if low <= mean <= high:
        return "within"
    return "better" if (mean > high) == (sign > 0) else "worse"


def table(config: RoutersConfig, out: Path) -> str:
    """Return for each network its quality and cost, what its masks say, and the answer."""
    found = read(config, out)
    rows: list[tuple[str, ...]] = [
        ("network", "router", "of a step", "quality", "over dense", "dense's seeds", "likeness",
         "overlap", "never", "even", "purity")]
    for (architecture, kind), each in found.items():
        ours, dense = paired(found, architecture, kind)
        compared = len(ours) and kind != "dense"
        values = np.array(list(each.quality.values())) * (100 if architecture != "gpt" else 1)
        mean, reach = interval(values)
        masks = ["-"] * 5
        if each.layers:
            first, *_, last = np.mean(list(each.layers.values()), axis=0)
            masks = [f"{first[0]:.2f} {last[0]:.2f}", f"{first[1]:.2f} {last[1]:.2f}",
                     *(f"{100 * first[i]:.1f} {100 * last[i]:.1f}" for i in (2, 3, 4))]
        rows.append((ARCHITECTURES[architecture], kind,
                     f"{100 * share(config, architecture, kind):.1f} %",
                     f"{mean:.2f}" + (f" +- {reach:.2f}" if reach == reach else ""),
                     signed(advantage(ours, dense, sign(architecture))) if compared else "-",
                     verdict(ours, dense, sign(architecture)) if compared else "-", *masks))
    purity = max(each.inputs for each in found.values())
    return columns(rows) + (
        f"\n{config.dataset}, {config.corpus}: quality is the test accuracy in %, of a GPT-2 "
        "validation perplexity; over dense: points, or % lower perplexity, paired by seeds; means "
        "over seeds with 95 % intervals\nof a step: multiply-adds of routing in one of training, "
        "masks not kept; dense's seeds: whether the mean lies within the lowest and the highest of "
        "the dense router\nof masks, in the first and the last hidden layer: rank correlation of "
        "overlap and input cosine; mean overlap; % of neurons never active, evenness of use; class "
        f"purity of the {NEIGHBOURS} nearest, in % (of the images themselves {100 * purity:.1f})\n"
        + answer(config, found))


def answer(config: RoutersConfig, found: dict[tuple[str, str], Found]) -> str:
    """Return which routers are as good as the dense one, and which of these cost little.

    And whether that says anything: not where the standard model is as good, too.
    """
    lines = []
    for architecture in config.architectures:
        others = [kind for kind in config.of(architecture) if kind not in ("standard", "dense")
                  and len(paired(found, architecture, kind)[0])]
        as_good = [kind for kind in others if verdict(
            *paired(found, architecture, kind), sign(architecture)) in ("within", "better")]
        cheap = [kind for kind in as_good if share(config, architecture, kind) < CHEAP]
        if not others:
            continue
        leads = [f"{kind} {signed(_lead(found, architecture, kind))}" for kind in cheap]
        standard = verdict(*paired(found, architecture, "standard"), sign(architecture))
        lines.append(
            f"{ARCHITECTURES[architecture]}: of {len(others)} other routers {len(as_good)} are "
            f"within the seeds of the dense one or better ({', '.join(as_good) or 'none'}); of "
            f"these cost less than {100 * CHEAP:g} % of a step's multiply-adds, where dense costs "
            f"{100 * share(config, architecture, 'dense'):.0f} %: {', '.join(leads) or 'none'}"
            + "; but the standard model is within them, too, so this says little"
            * (standard == "within"))
    return "\n".join(lines)


def _lead(found: dict[tuple[str, str], Found], architecture: str, kind: str) -> Any:
    return advantage(*paired(found, architecture, kind), sign(architecture))


def draw(config: RoutersConfig, out: Path) -> list[Path]:
    """Draw the quality of each router by its cost, and what the masks of the MLP say."""
    plt = figures.pyplot()
    found = read(config, out)
    present = [name for name in config.architectures if any(key[0] == name for key in found)]
    masks = any(each.layers for each in found.values())
    rows = max(len([key for key in found if key[0] == name]) for name in present)
    figure, panels = plt.subplots(1, len(present) + masks, squeeze=False,
                                  figsize=(2.9 * (len(present) + masks) + 0.4, 0.24 * rows + 1.5))
    for axes, architecture in zip(panels[0], present, strict=False):
        kinds = [kind for kind in config.of(architecture) if (architecture, kind) in found]
        _draw_quality(axes, config, found, architecture, kinds)
    if masks:
        _draw_masks(panels[0, -1], found)
    figure.suptitle(f"routers: $p_k$ {config.p_k:g}, {config.seeds} seeds; band: seeds of the "
                    f"dense router; orange: less than {100 * CHEAP:g} % of a step's multiply-adds",
                    fontsize=8)
    return [figures.save(figure, out / "routers.png")]


def _rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _draw_quality(axes: Any, config: RoutersConfig, found: dict[tuple[str, str], Found],
                  architecture: str, kinds: list[str]) -> None:
    """Draw the quality of each seed and the mean, a row a router."""
    factor = 1 if architecture == "gpt" else 100
    for row, kind in enumerate(kinds):
        values = factor * np.array(list(found[architecture, kind].quality.values()))
        cost = share(config, architecture, kind)
        color = "#8a8a8a" if cost == 0 else "#d9622b" if cost < CHEAP else "#4c6a92"
        axes.plot(values, np.full(len(values), row), ".", color=color, alpha=0.45, markersize=4)
        axes.plot([values.mean()], [row], "o", color=color, markersize=5)
        if kind == "dense":
            axes.axvspan(values.min(), values.max(), color="#4c6a92", alpha=0.12, linewidth=0)
    _rows(axes, [f"{kind}  {100 * share(config, architecture, kind):.1f} %" for kind in kinds])
    text = architecture == "gpt"
    axes.set_title(f"{ARCHITECTURES[architecture]} on "
                   f"{figures.plain(gpt.short_name(config.corpus)) if text else config.dataset}")
    axes.set_xlabel("validation perplexity" if text else "test accuracy (%)")


def _draw_masks(axes: Any, found: dict[tuple[str, str], Found]) -> None:
    """Draw for each router of the MLP how its overlaps follow the inputs, and its class purity."""
    layers = {kind: np.mean(list(each.layers.values()), axis=0)
              for (_, kind), each in found.items() if each.layers}
    for name, column, marker in (("likeness", 0, "o"), ("purity", 4, "s")):
        for which, filled in ((0, True), (-1, False)):
            values = [each[which, column] for each in layers.values()]
            color = "#2f9c95" if name == "likeness" else "#8c1d18"
            axes.plot(values, range(len(values)), marker, color=color, markersize=4,
                      markerfacecolor=color if filled else "none",
                      label=f"{name}, {'first' if filled else 'last'} layer")
    _rows(axes, list(layers))
    axes.set_title("MLP: masks")
    axes.set_xlabel("likeness to inputs; class purity")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=2)


EXPERIMENT = Experiment(
    "routers", RoutersConfig,
    {"smoke": {"dataset": "glyphs", "routers": ("standard", "dense", "sparse-signed", "relu"),
               "block_routers": ("dense", "block-diagonal"), "width": 24, "epochs": 1,
               "vit_size": "1x16x2", "vit_hidden": 24, "patch": 16, "vit_epochs": 1,
               "gpt_size": "1x16x2", "gpt_steps": 5, "context": 32, "train": 200,
               "validation": 50, "images": 40, "seeds": 2},
     "paper": {"corpus": "wikitext", "width": 3000, "epochs": 100, "vit_size": "6x512x8",
               "vit_hidden": 512, "patch": 4, "vit_epochs": 200, "gpt_size": "small",
               "gpt_steps": 20_000, "context": 128, "train": None, "validation": None,
               "images": 2000}},
    lambda config: (config.dataset,), cells, run_cell, draw, table, prepare)
