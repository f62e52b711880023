"""COMET in a ViT and an MLP-Mixer: routed by what the blocks have learnt, or by the input alone.

With routing="block", the paper's, a gate sees the normed input of its own MLP, so that the experts
of an image change as the blocks before it learn. With routing="stream", see
`comet_np.models.stream`, it sees a fixed random stream of the network's input, so that the same
image always meets the same experts. The experiment measures how far the masks of the same images
move from initialisation to the end of training, and how well the networks learn.
"""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .. import settings
from ..errors import UserError
from ..gates import Comet
from ..models import module_of
from ..models.mixer import MixerConfig
from ..models.vit import ViTConfig
from ..optim import OptimizerConfig
from ..schedules import schedule
from ..settings import option
from . import datasets, figures
from .datasets.base import scaled
from .experiment import Cell, Experiment, Place, columns
from .grid import DataCell, check_list, examples, load
from .intervals import advantage, percent, signed
from .training import RunConfig, TrainConfig, run_memory, run_work, train
from .training.config import computing, multiply_adds
from .training.model import read_weights
from .vision import check_images, normalised

Array = Any

ARCHITECTURES = {"vit": "ViT", "mixer": "MLP-Mixer"}
LOOKS = {"standard": figures.LOOKS["standard"],  # colour, and name
         "block": (figures.LOOKS["comet"][0], "COMET, routed by block"),
         "stream": ("#2f9c95", "COMET, routed by stream")}


@dataclass(frozen=True)
class RoutingConfig:
    """Settings; the defaults are small networks on a part of CIFAR10."""

    dataset: str = option("cifar10", "images to classify, see: comet-np data")
    architectures: tuple[str, ...] = option(tuple(ARCHITECTURES), "vit, mixer")
    models: tuple[str, ...] = option(tuple(LOOKS), "standard, and COMET routed by block or stream")
    p_k: float = option(0.5, "proportion of neurons that stay active")
    patch: int = option(8, "side of the patches, in pixels")
    width: int = option(128, "D, of a token")
    depth: int = option(4, "blocks")
    heads: int = option(4, "of the ViT's attention")
    hidden: int = option(256, "neurons of an MLP that maps the channels of a token")
    token_hidden: int = option(64, "neurons of an MLP of the Mixer that maps tokens")
    images: int = option(200, "validation images whose masks are compared")
    train: int | None = option(5000, "use only so many training images")
    validation: int | None = option(1000, "use only so many validation images")
    seeds: int = option(3, "number of seeds: of weights, data order and dropout")
    training: TrainConfig = field(default=TrainConfig(
        OptimizerConfig("adam"), lr=1e-3, schedule="cosine", batch=64, epochs=4))

    target: ClassVar[None] = None
    task: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_images(self.dataset, "--dataset")
        for name, known in (("architectures", ARCHITECTURES), ("models", LOOKS)):
            check_list(name, getattr(self, name), known)
        if min(self.images, 2 if self.validation is None else self.validation) < 2:
            raise UserError("the masks of different validation images are compared, which needs "
                            f"at least 2, got images = {self.images}, validation = "
                            f"{self.validation}")
        if min(self.seeds, 1 if self.train is None else self.train) < 1:
            raise UserError("an experiment needs at least 1 seed and 1 example to train, got seeds "
                            f"= {self.seeds}, train = {self.train}")
        steps = self.training.total(examples(self, self.dataset))
        schedule(self.training.schedule, 0, steps, self.training.warmup)  # if it does not fit
        cells(self)  # bad settings are refused before the first cell runs


@dataclass(frozen=True)
class RoutingCell(DataCell):
    """One cell: a network trained from one seed, and how many images its masks are compared on."""

    images: int
    run: RunConfig


def cells(config: RoutingConfig) -> list[Cell]:
    """Return the cells, seed by seed."""
    return [cell_of(config, architecture, model, seed) for seed in range(config.seeds)
            for architecture in config.architectures for model in config.models]


def cell_of(config: RoutingConfig, architecture: str, model: str, seed: int) -> Cell:
    """Return the cell of a network and a seed."""
    run = RunConfig(network(config, architecture, model), config.training, seed)
    spec = RoutingCell(config.dataset, config.train, config.validation, None, None,
                       datasets.sizes_of(config.dataset).digest, config.images, run)
    return Cell(f"{config.dataset}-{architecture}-{model}-seed{seed}", spec,
                run_work(run, examples(config, config.dataset)), run_memory(run))


def network(config: RoutingConfig, architecture: str, model: str) -> ViTConfig | MixerConfig:
    """Return the standard network of an architecture, or COMET with one of its routings."""
    sizes = datasets.sizes_of(config.dataset)
    shape: dict[str, Any] = {
        "image": sizes.image, "patch": config.patch, "classes": sizes.outputs,
        "width": config.width, "depth": config.depth, "hidden": config.hidden,
        "gate": None if model == "standard" else Comet(config.p_k),
        "routing": "block" if model == "standard" else model}
    if architecture == "vit":
        return ViTConfig(heads=config.heads, **shape)
    return MixerConfig(token_hidden=config.token_hidden, **shape)


# --- a cell -------------------------------------------------------------------------------------


def run_cell(spec: RoutingCell, place: Place) -> dict[str, Any]:
    """Train the cell's network on normalised images, and compare its masks with its first ones."""
    data = normalised(load(spec, place))
    result = train(spec.run, data, place.folder, place.backend, place.progress, place.stop)
    if spec.run.model.gate is None or not place.first:
        return result
    model, formats = computing(spec.run), spec.run.training.formats
    assert data.x_val is not None  # all data sets of images have them
    x = scaled(place.backend.asarray(data.x_val[:spec.images]), data.scale, data.shift,
               formats.accumulate)
    weights = (module_of(model).init(model, spec.run.seed, place.backend, formats.master),
               read_weights(place.folder, model, place.backend))
    start, end = ([place.backend.to_host(m)
                   for m in module_of(model).forward(x, *each, model)[1].masks] for each in weights)
    return result | {"overlaps": [overlap(*both)._asdict()
                                  for both in zip(start, end, strict=True)]}


class Overlap(NamedTuple):
    """Of the neurons that are active at the end the share that is active in another mask, too.

    kept : in that of the same image and token before training.
    others : in that of another image and the same token, on average over all others.
    """

    kept: float
    others: float


def overlap(start: np.ndarray, end: np.ndarray) -> Overlap:
    """Return the overlaps of the masks of an MLP: bool (images, rows, H) at start and end.

    ``|m_start and m_end| / k`` where k neurons win, and with ties, of which fewer may, 1 if all
    masks are the same.
    """
    active = end.sum(axis=0)  # of how many images each neuron is: (rows, H)
    pairs = active * (active - 1)  # of different images, both active
    total = active.sum()
    return Overlap(float((start & end).sum() / total),
                   float(pairs.sum() / (total * (len(end) - 1))))


# --- what the files say -------------------------------------------------------------------------


class Trained(NamedTuple):
    """What the files of a finished cell say.

    epochs, accuracy : arrays (T,), on the validation set. test : accuracy. parameters : int.
    overlaps : array (MLPs, 2), see `Overlap`; of the standard network without rows.
    """

    epochs: np.ndarray
    accuracy: np.ndarray
    test: float
    parameters: int
    overlaps: np.ndarray


Found = dict[tuple[str, str], dict[int, Trained]]  # by architecture and model, by seed


def read(config: RoutingConfig, out: Path) -> Found:
    """Return what the finished cells say.

    Raises
    ------
    UserError
        If there is none, or its files are damaged.
    """
    found: Found = {}
    for architecture in config.architectures:
        for model in config.models:
            of_seeds = {seed: _read(config, cell_of(config, architecture, model, seed), out)
                        for seed in range(config.seeds)}
            finished = {seed: each for seed, each in of_seeds.items() if each is not None}
            if finished:
                found[architecture, model] = finished
    if not found:
        raise UserError(f"{out} holds no finished cell of routing: run it first")
    return found


def _read(config: RoutingConfig, cell: Cell, out: Path) -> Trained | None:
    model = cell.spec.run.model

    def of_result(result: dict[str, Any]) -> tuple[float, int, np.ndarray]:
        overlaps = [[float(each[name]) for name in Overlap._fields]
                    for each in (result["overlaps"] if model.gate else ())]
        shape = (len(model.mlps) if model.gate else 0, len(Overlap._fields))
        return (float(result["test_accuracy"]), int(result["parameters"]),
                np.array(overlaps).reshape(shape))

    def of_lines(lines: list[dict[str, Any]]) -> np.ndarray:
        curve = np.array([(line["epoch"], line["val_accuracy"]) for line in lines], np.float64)
        return curve.reshape(config.training.lines(examples(config, config.dataset)), 2).T

    result = cell.result(out, of_result)
    return None if result is None else Trained(*cell.metrics(out, of_lines), *result)


def table(config: RoutingConfig, out: Path) -> str:
    """Return for each network its size, accuracy and lead, and how far its masks have moved."""
    found = read(config, out)
    rows = [("architecture", "model", "parameters", "multiply-adds", "for routing",
             "test accuracy", "over standard", "masks kept", "other images")]
    for (architecture, model), of_seeds in found.items():
        standard = found.get((architecture, "standard"), {})
        both = sorted(of_seeds.keys() & standard.keys()) if model != "standard" else []
        ours, theirs = (np.array([each[seed].test for seed in both])
                        for each in (of_seeds, standard))
        lead = signed(advantage(ours, theirs, 1)) if both else "-"
        overlaps = np.array([each.overlaps.mean(axis=0) for each in of_seeds.values()]
                            if model != "standard" else ())
        parameters = next(iter(of_seeds.values())).parameters
        rows.append((ARCHITECTURES[architecture], model, f"{parameters:,}",
                     *(f"{n / 1e6:.1f}M" for n in multiply_adds(network(config, architecture,
                                                                        model))),
                     percent([each.test for each in of_seeds.values()]), lead,
                     *(map(percent, overlaps.T) if len(overlaps) else ("-", "-"))))
    return columns(rows) + (
        f"\n{config.dataset}: test accuracies after the last epoch in %, leads in points, means "
        "over seeds with 95 % intervals; multiply-adds of one image in a training step\n"
        "masks kept: of the neurons that are active at the end for an image and a token, the % "
        "that were before training, mean over all MLPs; other images: that are for another image, "
        f"too; two unrelated masks share {100 * config.p_k:g} %")


def draw(config: RoutingConfig, out: Path) -> list[Path]:
    """Draw the accuracies, and the overlaps of the masks by block."""
    plt = figures.pyplot()
    found = read(config, out)
    kinds = {name: dict.fromkeys(network(config, name, "standard").across)
             for name in config.architectures}
    figure, panels = plt.subplots(
        len(kinds), 1 + max(map(len, kinds.values())), squeeze=False,
        figsize=(9, 2.6 * len(kinds) + 0.7))
    for (architecture, across), row in zip(kinds.items(), panels, strict=True):
        name = ARCHITECTURES[architecture]
        _draw_accuracy(row[0], found, architecture)
        row[0].set_title(f"{name} on {config.dataset}")
        for axes, of_tokens in zip(row[1:], across, strict=False):
            _draw_overlaps(axes, config, found, architecture, of_tokens)
            mixing = (" of token mixing" if of_tokens else " of channel mixing") * (len(across) > 1)
            axes.set_title(f"{name}: masks{mixing}")
        for axes in row[1 + len(across):]:
            axes.set_axis_off()
    named = {label: line for axes in panels[:, 1:].flat
             for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=5)
    figure.suptitle(textwrap.fill(_title(config), 144), fontsize=8)
    return [figures.save(figure, out / "routing.png")]


def _title(config: RoutingConfig) -> str:
    """Return the settings of the networks and of their training."""
    values, defaults = settings.values(config.training), settings.values(TrainConfig())
    length = "epochs" if config.training.steps is None else "steps"
    training = ", ".join(f"{name} {value}" for name, value in values.items()
                         if name in ("optimizer", "lr", "batch", length, "schedule")
                         or (value != defaults[name] and name != "epochs"))
    models = {name: network(config, name, "standard") for name in config.architectures}
    only = {"vit": f"{config.heads} heads", "mixer": f"token hidden {config.token_hidden}"}
    own = "; ".join(f"{ARCHITECTURES[name]}: {only[name]}, dropout {model.dropout:g}"
                    for name, model in models.items())
    activation = next(iter(models.values())).activation
    return (f"routing: width {config.width}, hidden {config.hidden}, {activation}, {config.depth} "
            f"blocks, patches of {config.patch}x{config.patch}, $p_k$ {config.p_k:g}; {own}; "
            f"{training}; {examples(config, config.dataset):,} training images; {config.seeds} "
            "seeds, band: lowest to highest")


def _draw_accuracy(axes: Any, found: Found, architecture: str) -> None:
    for model, (color, label) in LOOKS.items():
        of_seeds = list(found.get((architecture, model), {}).values())
        if of_seeds:
            curves = np.array([each.accuracy for each in of_seeds])
            figures.seed_band(axes, of_seeds[0].epochs, curves, color, label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy")
    if axes.lines:
        axes.legend(loc="lower right")


def _draw_overlaps(axes: Any, config: RoutingConfig, found: Found, architecture: str,
                   of_tokens: bool) -> None:
    """Draw the overlaps of the MLPs that map tokens, or of the others, block by block."""
    chosen = np.array(network(config, architecture, "standard").across) == of_tokens
    blocks = np.arange(1, config.depth + 1)
    for model in ("block", "stream"):
        of_seeds = found.get((architecture, model), {}).values()
        if of_seeds:
            overlaps = np.array([each.overlaps[chosen] for each in of_seeds])  # (seeds, blocks, 2)
            color, _ = LOOKS[model]
            figures.seed_band(axes, blocks, overlaps[..., 0], color,
                              f"{model}: same image, before and\nafter training")
            figures.seed_band(axes, blocks, overlaps[..., 1], color,
                              f"{model}: different images,\nafter training", dashed=True)
    if axes.lines:
        axes.axhline(config.p_k, color="#8a8a8a", linewidth=0.8, label="unrelated masks, $p_k$")
    axes.set_xticks(blocks)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("block")
    axes.set_ylabel("overlap of masks")


EXPERIMENT = Experiment(
    "routing", RoutingConfig,
    {"smoke": {"dataset": "glyphs", "train": 300, "validation": 200, "epochs": 1, "seeds": 2,
               "images": 20, "patch": 16, "width": 32, "depth": 2, "heads": 2, "hidden": 32,
               "token_hidden": 16},
     "paper": {"architectures": ("vit",), "patch": 4, "width": 512, "depth": 6, "heads": 8,
               "hidden": 512, "token_hidden": 256, "train": None, "validation": None, "lr": 1e-4,
               "batch": 512, "epochs": 200, "augment": "crop_flip"}},
    lambda config: (config.dataset,), cells, run_cell, draw, table)
