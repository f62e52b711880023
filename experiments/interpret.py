"""What do images that share masks have in common: class, background, brightness, contrast?

Each property of an image is foretold from the images with the nearest masks, and for comparison
from the nearest by pixels. The masks are those of random networks: nothing is learnt.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import analysis
from ..errors import UserError, unknown
from ..rng import stream
from ..settings import option
from . import figures
from .datasets import IMAGES_32
from .datasets.base import scaled
from .experiment import Cell, Experiment, Place, columns
from .grid import check_lists
from .intervals import Interval, advantage, interval, percent, signed
from .masks import PIXELS, Images, masks_of, network, network_work, some_images

SIDE, EDGE = 32, 3  # pixels; an image's background is taken to be its outermost three
QUERIES, NEAREST, FARTHEST = 4, 6, 3  # of the picture
PROPERTIES = ("class", "background", "brightness", "contrast", "light from above", "detail")
PIXEL_WAYS = {"cosine": "pixels, cosine", "distance": "pixels, distance",
              "centred": "pixels, cosine around the mean"}


@dataclass(frozen=True)
class InterpretCell:
    """One cell: some images, and their masks in one random network."""

    dataset: str
    images: int
    width: int
    hidden: int
    p_k: float
    neighbours: int
    seed: int


@dataclass(frozen=True)
class InterpretConfig:
    """Settings; the defaults are a part of CIFAR10."""

    dataset: str = option("cifar10", "32x32 images, see: comet-np data")
    width: int = option(1000, "N, of the hidden layers")
    hidden: int = option(3, "hidden layers")
    p_k: tuple[float, ...] = option((0.1, 0.5, 0.9), "proportions of active neurons")
    images: int = option(2000, "images that are compared, drawn from all splits")
    neighbours: int = option(10, "of the nearest images, from which an image's properties are "
                                 "foretold")
    seeds: int = option(5, "number of seeds: of routing weights, and of which images")

    def __post_init__(self) -> None:
        if self.dataset not in IMAGES_32:
            raise unknown("data set of 32x32 images", self.dataset, IMAGES_32)
        check_lists(self)
        if min(self.seeds, self.hidden, self.neighbours) < 1:
            raise UserError("seeds, hidden and neighbours must each be at least 1")
        least = max(self.neighbours, NEAREST + FARTHEST, QUERIES) + 1
        if not least <= self.images <= 60_000:
            raise UserError(f"interpret compares from {least} images, for {self.neighbours} "
                            f"neighbours, to 60000, got {self.images}")
        for p_k in self.p_k:
            network(self.width, self.hidden, p_k)

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways in which an image is near to another: by masks, and by pixels."""
        return (*(f"masks {layer}" for layer in range(1, self.hidden + 1)), "masks all",
                *PIXEL_WAYS)


def cells(config: InterpretConfig) -> list[Cell]:
    """Return a cell a network, seed by seed."""
    return [cell_of(config, p_k, seed) for seed in range(config.seeds) for p_k in config.p_k]


def cell_of(config: InterpretConfig, p_k: float, seed: int) -> Cell:
    """Return the cell of a network."""
    spec = InterpretCell(config.dataset, config.images, config.width, config.hidden, p_k,
                         config.neighbours, seed)
    products = config.images**2 * (3 * PIXELS + 2 * config.hidden * config.width)
    return Cell(f"pk{p_k:g}-seed{seed}", spec,
                config.images * network_work(config.width, config.hidden) + 2.0 * products,
                24 * config.images**2)  # a similarity of all pairs, and its order


# --- a cell -------------------------------------------------------------------------------------


def properties(images: Images) -> dict[str, np.ndarray]:
    """Return the properties of images but the class, float64 (n, d) each.

    background : mean colour of the outermost pixels. brightness : mean of all. contrast : standard
    deviation of the pixels' brightness. light from above : brightness of the upper half less that
    of the lower. detail : mean difference of neighbours to the right and below.
    """
    x = images.x.reshape(-1, 3, SIDE, SIDE) / 255.0
    outside = np.ones((SIDE, SIDE), bool)
    outside[EDGE:-EDGE, EDGE:-EDGE] = False
    grey = x.mean(axis=1)
    halves = grey.reshape(-1, 2, SIDE // 2, SIDE).mean(axis=(2, 3))
    found = {"background": x[:, :, outside].mean(axis=2), "brightness": grey.mean(axis=(1, 2)),
             "contrast": grey.std(axis=(1, 2)), "light from above": halves[:, 0] - halves[:, 1],
             "detail": (abs(np.diff(grey, axis=1)).mean(axis=(1, 2))
                        + abs(np.diff(grey, axis=2)).mean(axis=(1, 2))) / 2}
    return {name: values.reshape(len(x), -1) for name, values in found.items()}


def similarities(images: Images, layers: list[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the ways in which images are near, and how near each is to each other, (n, n)."""
    for layer, masks in enumerate(layers, start=1):
        yield f"masks {layer}", analysis.overlaps(masks, masks)
    side_by_side = np.concatenate(layers, axis=1)
    yield "masks all", analysis.overlaps(side_by_side, side_by_side)
    x = scaled(images.x, images.scale, images.shift, "float32")
    yield "cosine", analysis.cosines(x)
    square = (x**2).sum(axis=1)
    yield "distance", 2 * (x @ x.T) - square[:, None] - square
    yield "centred", analysis.cosines(x - x.mean(axis=0))


def explained(near: np.ndarray, values: np.ndarray) -> float:
    """Return the share of the variance of values (n, d) that the mean of the near ones foretells.

    ``1 - sum |y - mean of y over near|^2 / sum |y - mean of y|^2`` with near, int (n, K).
    """
    left = ((values - values[near].mean(axis=1)) ** 2).sum()
    return float(1 - left / ((values - values.mean(axis=0)) ** 2).sum())


def run_cell(spec: InterpretCell, place: Place) -> dict[str, Any]:
    """Foretell the properties of images from the near ones, and take some for the picture.

    Of the class it is the share of near ones that are of the same class.
    """
    images = some_images(spec.dataset, place, spec.seed, spec.images)
    layers = masks_of(images, network(spec.width, spec.hidden, spec.p_k), spec.seed, place)
    of_images, frequency = properties(images), np.bincount(images.y) / len(images.y)
    queries = stream(spec.seed, "queries").choice(len(images.x), QUERIES, replace=False)
    result: dict[str, Any] = {"chance": float((frequency**2).sum()), "ways": {}, "picture": {}}
    for way, similarity in similarities(images, layers):
        place.raise_if_stopped()
        near = analysis.nearest(similarity, spec.neighbours)
        result["ways"][way] = {
            "class": float((images.y[near] == images.y[:, None]).mean()),
            **{name: explained(near, values) for name, values in of_images.items()}}
        if way in PICTURED:
            result["picture"][way] = picture(images.x, similarity, queries)
    return result


PICTURED = ("masks all", "cosine")


def picture(x: np.ndarray, similarity: np.ndarray, queries: np.ndarray) -> dict[str, Any]:
    """Return the nearest and the farthest images of some, in order, and how near they are.

    The pixels as text, bytes (QUERIES, 1 + NEAREST + FARTHEST, 3072) in base 64.
    """
    order = np.array([[query, *np.argsort(-np.where(np.arange(len(x)) == query, np.inf,
                                                    similarity[query]), kind="stable")[1:]]
                      for query in queries])
    shown = np.concatenate([order[:, :1 + NEAREST], order[:, -FARTHEST:]], axis=1)
    return {"similarity": similarity[queries[:, None], shown[:, 1:]].astype(float).tolist(),
            "pixels": base64.b64encode(np.ascontiguousarray(x[shown]).tobytes()).decode()}


# --- what the files say -------------------------------------------------------------------------


class Explained(NamedTuple):
    """What the cells of one p_k say.

    by : of each way and property the values of the seeds. chance : of the class.
    """

    by: dict[str, dict[str, np.ndarray]]
    chance: np.ndarray


def read(config: InterpretConfig, out: Path) -> dict[float, Explained]:
    """Return what the finished cells say, by p_k.

    Raises
    ------
    UserError
        If there is none, or one is damaged.
    """
    def values(result: dict[str, Any]) -> tuple[float, dict[str, dict[str, float]]]:
        return float(result["chance"]), {way: {name: float(result["ways"][way][name])
                                               for name in PROPERTIES} for way in config.ways}

    found = {}
    for p_k in config.p_k:
        of_seeds = [each for seed in range(config.seeds) if (
            each := cell_of(config, p_k, seed).result(out, values)) is not None]
        if of_seeds:
            found[p_k] = Explained(
                {way: {name: np.array([each[way][name] for _, each in of_seeds])
                       for name in PROPERTIES} for way in config.ways},
                np.array([chance for chance, _ in of_seeds]))
    if not found:
        raise UserError(f"{out} holds no finished cell of interpret: run it first")
    return found


def table(config: InterpretConfig, out: Path) -> str:
    """Return what masks and pixels tell of each property, and which of them tell more."""
    found = read(config, out)
    rows: list[tuple[str, ...]] = [("nearest by", "p_k", *PROPERTIES)]
    for p_k, each in found.items():
        rows += [(way, f"{p_k:g}", *(percent(each.by[way][name]) for name in PROPERTIES))
                 for way in config.ways if way not in PIXEL_WAYS]
    each = next(iter(found.values()))
    rows += [(PIXEL_WAYS[way], "-", *(percent(each.by[way][name]) for name in PROPERTIES))
             for way in PIXEL_WAYS]
    return columns(rows) + f"""
{config.dataset}, {config.images} images, means over {config.seeds} networks and draws of images in
%, with 95 % intervals; class: of the {config.neighbours} nearest images that are of the same class,
by chance {100 * each.chance.mean():.1f} %; other properties: of their variance what the mean of the
nearest foretells, by chance less than 0
""" + answer(config, found)


def answer(config: InterpretConfig, found: dict[float, Explained]) -> str:
    """Return what images with near masks share, beside those with near pixels."""
    p_k, each = next(iter(found.items()))
    masks, pixels = each.by["masks all"], each.by["cosine"]
    most = sorted(PROPERTIES[1:], key=lambda name: -masks[name].mean())
    named = ", ".join(f"{name} {percent(masks[name])} %" for name in most)
    points = {name: signed(advantage(masks[name], pixels[name], 1)) for name in PROPERTIES}
    return (f"Images of near masks (p_k = {p_k:g}, all layers) have in common, as shares of the "
            f"variance: {named}; {percent(masks['class'])} % of the nearest are of the "
            f"same class, by chance {100 * each.chance.mean():.1f} %.\n"
            "More than by the cosine of pixels, in points: "
            + ", ".join(f"{name} {value}" for name, value in points.items()) + ".")


def draw(config: InterpretConfig, out: Path) -> list[Path]:
    """Draw what the nearest tell of each property, and images sorted by nearness."""
    return [_draw_explained(config, out), *_draw_picture(config, out)]


def _draw_explained(config: InterpretConfig, out: Path) -> Path:
    plt = figures.pyplot()
    found = read(config, out)
    figure, panels = plt.subplots(1, len(PROPERTIES), figsize=(12, 3.2))
    layers = [way for way in config.ways if way not in PIXEL_WAYS]
    for axes, name in zip(panels, PROPERTIES, strict=True):
        for number, (p_k, each) in enumerate(found.items()):
            _points(axes, np.arange(len(layers)) + 0.15 * number, [
                interval(100 * each.by[way][name]) for way in layers], f"C{number}",
                f"masks, $p_k$ = {p_k:g}")
        each = next(iter(found.values()))
        for style, way in zip(("-", "--", ":"), PIXEL_WAYS, strict=True):
            axes.axhline(100 * each.by[way][name].mean(), color="0.4", linestyle=style,
                         linewidth=0.9, label=PIXEL_WAYS[way])
        if name == "class":
            axes.axhline(100 * each.chance.mean(), color="#c2477f", linewidth=0.9, label="chance")
        axes.set_title(name)
        axes.set_xticks(range(len(layers)), [way.removeprefix("masks ") for way in layers])
        axes.set_xlabel("masks of layer")
    panels[0].set_ylabel("nearest of the same class, %")
    panels[1].set_ylabel("variance that the nearest foretell, %")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4)
    figure.suptitle(f"interpret: the {config.neighbours} nearest of {config.images:,} images of "
                    f"{figures.plain(config.dataset)}, random routing N = {config.width}, "
                    f"{config.seeds} seeds, 95 % intervals", fontsize=8)
    return figures.save(figure, out / "interpret.png")


def _points(axes: Any, x: np.ndarray, found: list[Interval], color: str, label: str) -> None:
    mean, reach = np.array(found).T
    axes.errorbar(x, mean, np.nan_to_num(reach), color=color, marker="o", markersize=3,
                  linewidth=1, capsize=2, label=label)


def _draw_picture(config: InterpretConfig, out: Path) -> list[Path]:
    """Draw some images, with those nearest and farthest by masks and by pixels beside them."""
    plt = figures.pyplot()
    across, shape = 1 + NEAREST + FARTHEST, (QUERIES, 1 + NEAREST + FARTHEST, 3, SIDE, SIDE)

    def pictures(result: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {way: (np.frombuffer(base64.b64decode(each["pixels"], validate=True),
                                    np.uint8).reshape(shape),
                      np.array(each["similarity"], np.float64).reshape(QUERIES, across - 1))
                for way in PICTURED for each in [result["picture"][way]]}

    p_k = config.p_k[0]
    found = cell_of(config, p_k, 0).result(out, pictures)
    if found is None:
        return []
    figure, panels = plt.subplots(2 * QUERIES, across,
                                  figsize=(0.85 * across + 1, 1.03 * 2 * QUERIES + 0.5))
    for row, axes_row in enumerate(panels):
        pixels, similarity = found[PICTURED[row % 2]]
        for column, axes in enumerate(axes_row):
            axes.imshow(pixels[row // 2, column].transpose(1, 2, 0), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title("" if column == 0 else f"{similarity[row // 2, column - 1]:.2f}",
                           fontsize=7, pad=2)
        axes_row[0].set_ylabel(("masks", "pixels")[row % 2], fontsize=7)
    figure.suptitle(f"interpret: a random image, its {NEAREST} nearest and its {FARTHEST} farthest "
                    f"of {config.images:,}, by overlap of masks\n(all layers, $p_k$ = {p_k:g}) and "
                    "by cosine of pixels", fontsize=8)
    return [figures.save(figure, out / "interpret_images.png")]


EXPERIMENT = Experiment(
    "interpret", InterpretConfig,
    {"smoke": {"dataset": "glyphs", "width": 60, "hidden": 2, "p_k": (0.1, 0.5), "images": 200,
               "seeds": 2},
     "paper": {"images": 10_000, "width": 3000, "seeds": 10}},
    lambda config: (config.dataset,), cells, run_cell, draw, table)
