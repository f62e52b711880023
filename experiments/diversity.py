"""How many different experts do the images of a data set meet, and how different are they?

A mask is an expert, of which a layer has C(N, k). Counting says how many were met by the images at
hand. How many there are at most in the law behind the images, however many are drawn, is bounded by
the entropy of the masks, and that by a code for them that is learnt on half of the images and
tried on the others.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import analysis
from ..errors import UserError, unknown
from ..functional.routing import log10_experts, winners
from ..settings import option
from . import figures
from .datasets import IMAGES_32
from .datasets.base import scaled
from .experiment import Cell, Experiment, Place, columns
from .grid import check_lists
from .intervals import Interval, interval, number, percent, signed
from .masks import Images, masks_of, network, network_work, some_images

BINS = 12  # of the cosines of pairs, each with as many pairs
SHARES = (0.5, 0.9, 0.99)  # of the variance of the images


@dataclass(frozen=True)
class DimensionsCell:
    """The cell that counts the dimensions of the images."""

    dataset: str
    images: int | None
    seed: int


@dataclass(frozen=True)
class MasksCell(DimensionsCell):
    """The cell of one random network."""

    width: int
    p_k: float
    hidden: int
    compared: int


@dataclass(frozen=True)
class DiversityConfig:
    """Settings; the defaults are a part of CIFAR10."""

    dataset: str = option("cifar10", "32x32 images, see: comet-np data")
    sizes: tuple[int, ...] = option((20, 100, 1000), "widths N of the hidden layers")
    p_k: tuple[float, ...] = option((0.1, 0.5, 0.9), "proportions of active neurons")
    hidden: int = option(3, "hidden layers")
    images: int | None = option(20_000, "use only so many images, drawn from all splits")
    compared: int = option(1500, "images of which all pairs are compared")
    seeds: int = option(5, "number of seeds: of routing weights, and of the images' order")

    def __post_init__(self) -> None:
        if self.dataset not in IMAGES_32:
            raise unknown("data set of 32x32 images", self.dataset, IMAGES_32)
        check_lists(self)
        images = 60_000 if self.images is None else self.images
        if min(self.seeds, self.hidden) < 1 or not 2 * BINS <= self.compared <= images:
            raise UserError("diversity needs at least 1 seed and 1 hidden layer, and compares from "
                            f"{2 * BINS} images to all, got seeds = {self.seeds}, hidden = "
                            f"{self.hidden}, compared = {self.compared} of {images} images")
        for size, p_k in itertools.product(self.sizes, self.p_k):
            network(size, self.hidden, p_k)
            if p_k == 1:
                raise UserError("without a cap there is one expert: give --p-k below 1")

    @property
    def layers(self) -> tuple[str, ...]:
        """What is measured: each layer, and all jointly."""
        return (*(str(layer) for layer in range(1, self.hidden + 1)), "all")


def cells(config: DiversityConfig) -> list[Cell]:
    """Return the cell of the images, and one a network, seed by seed."""
    dimensions = Cell("dimensions", DimensionsCell(config.dataset, config.images, 0), 5e10)
    return [dimensions, *(cell_of(config, size, p_k, seed) for seed in range(config.seeds)
                          for size in config.sizes for p_k in config.p_k)]


def cell_of(config: DiversityConfig, size: int, p_k: float, seed: int) -> Cell:
    """Return the cell of a network."""
    images, neurons = config.images or 60_000, config.hidden * size
    spec = MasksCell(config.dataset, config.images, seed, size, p_k, config.hidden, config.compared)
    return Cell(f"N{size}-pk{p_k:g}-seed{seed}", spec,
                images * (network_work(size, config.hidden) + 2.0 * neurons**2),
                100 * neurons**2 + 8 * images * neurons)  # the code of all layers together


# --- a cell -------------------------------------------------------------------------------------


def run_cell(spec: DimensionsCell, place: Place) -> dict[str, Any]:
    """Measure the masks of a network, or the dimensions of the images."""
    images = some_images(spec.dataset, place, spec.seed, spec.images)
    place.raise_if_stopped()
    if not isinstance(spec, MasksCell):
        return {"dimensions": dimensions(images)}
    layers = masks_of(images, network(spec.width, spec.hidden, spec.p_k), spec.seed, place)
    x = scaled(images.x[:spec.compared], images.scale, images.shift, "float32")
    pairs = Pairs.of(x, images.y[:spec.compared])
    measured = []
    for masks in (*layers, np.concatenate(layers, axis=1)):
        place.raise_if_stopped()
        measured.append(numbers(masks) | pairs.overlaps(masks[:spec.compared]))
    return {"images": len(images.x), "cosine": pairs.middles, "layers": measured}


def dimensions(images: Images) -> list[int]:
    """Return how many principal components have the `SHARES` of the variance of the images."""
    x = images.x.astype("float32")
    x -= x.mean(axis=0)
    smaller = x @ x.T if len(x) < x.shape[1] else x.T @ x  # either has the same eigenvalues
    variance = np.linalg.eigvalsh(smaller.astype("float64"))[::-1].cumsum()
    return [int(np.searchsorted(variance, share * variance[-1])) + 1 for share in SHARES]


def numbers(masks: np.ndarray) -> dict[str, Any]:
    """Return how many masks the images met, and how many there are at most.

    images, distinct : after so many images so many distinct masks were met. once : how many of
    the masks one image alone has. chao1, least, effective : see `analysis`. nats : of the code, see
    `analysis.code_lengths`. neurons : the effective number of neurons.
    """
    n = len(masks)
    counts = analysis.mask_counts(masks)
    parts = np.unique(np.geomspace(10, n, 16).astype(int))
    return {"images": parts.tolist(),
            "distinct": [len(analysis.mask_counts(masks[:part])) for part in parts],
            "once": int((counts == 1).sum()), "chao1": analysis.chao1(counts),
            "least": analysis.least_effective_number(counts),
            "effective": analysis.effective_number(counts),
            "nats": float(analysis.code_lengths(masks[::2], masks[1::2]).mean()),
            "neurons": analysis.effective_number(masks.sum(axis=0))}


class Pairs(NamedTuple):
    """All pairs of some images, each once, in `BINS` of the cosine of the two.

    i, j : of the two. of_bin : the pair's. same : whether the two are of one class. cosine : of
    the pairs. middles : the mean cosine of each bin.
    """

    i: np.ndarray
    j: np.ndarray
    of_bin: np.ndarray
    same: np.ndarray
    cosine: np.ndarray
    middles: list[float]

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray) -> "Pairs":
        """Return the pairs of inputs x (n, N_0) of classes y (n,)."""
        i, j = np.triu_indices(len(x), 1)
        cosine = analysis.cosines(x)[i, j]
        of_bin = np.empty(len(i), int)
        of_bin[np.argsort(cosine)] = np.arange(len(i)) * BINS // len(i)
        middles = np.bincount(of_bin, cosine) / np.bincount(of_bin)
        return cls(i, j, of_bin, y[i] == y[j], cosine, middles.tolist())

    def overlaps(self, masks: np.ndarray) -> dict[str, Any]:
        """Return the mean overlaps of the masks (n, N) of pairs within and between classes.

        Of all and in each bin (None of no pairs); and the correlation with the inputs' cosine.
        """
        overlap = analysis.overlaps(masks, masks)[self.i, self.j].astype("float64")
        found: dict[str, Any] = {"correlation": float(np.corrcoef(overlap, self.cosine)[0, 1])
                                 if overlap.std() > 0 else 0.0}
        for name, chosen in (("within", self.same), ("between", ~self.same)):
            count = np.bincount(self.of_bin[chosen], minlength=BINS)
            total = np.bincount(self.of_bin[chosen], overlap[chosen], BINS)
            found[name] = float(total.sum() / max(count.sum(), 1))
            found[f"{name} by cosine"] = [float(t / c) if c else None
                                          for t, c in zip(total, count, strict=True)]
        return found


# --- what the files say -------------------------------------------------------------------------

SINGLE = ("once", "chao1", "least", "effective", "nats", "neurons", "correlation", "within",
          "between")
LISTS = ("images", "distinct", "within by cosine", "between by cosine")


class Kind(NamedTuple):
    """A kind of mask: of layers of N neurons with p_k, in one layer or all."""

    size: int
    p_k: float
    layer: str


class Measured(NamedTuple):
    """What the finished cells of one kind measured, a row a network.

    single, lists : by name, see `numbers` and `Pairs`.
    """

    single: dict[str, np.ndarray]
    lists: dict[str, np.ndarray]


class Found(NamedTuple):
    """What the files say: of each kind of mask, and the dimensions if they were counted."""

    kinds: dict[Kind, Measured]
    dimensions: list[int] | None


def read(config: DiversityConfig, out: Path) -> Found:
    """Return what the finished cells say.

    Raises
    ------
    UserError
        If none of a network is finished, or one is damaged.
    """
    def measured(result: dict[str, Any]) -> list[tuple[dict[str, float], dict[str, np.ndarray]]]:
        layers = [({name: float(layer[name]) for name in SINGLE},
                   {name: np.array(layer[name], np.float64) for name in LISTS}
                   | {"cosine": np.array(result["cosine"], np.float64)})
                  for layer in result["layers"]]
        for single, lists in layers:
            at_least_one = np.array([single["effective"], single["least"], *lists["images"],
                                     *lists["distinct"]])
            if (not (at_least_one >= 1).all() or lists["images"].shape != lists["distinct"].shape
                    or {lists[name].shape for name in (*LISTS[2:], "cosine")} != {(BINS,)}):
                raise ValueError("these are no measures of masks")
        if len(layers) != len(config.layers):
            raise ValueError("another number of layers")
        return layers

    kinds = {}
    for size, p_k in itertools.product(config.sizes, config.p_k):
        found = [each for seed in range(config.seeds) if (each := cell_of(
            config, size, p_k, seed).result(out, measured)) is not None]
        for place, layer in enumerate(config.layers if found else ()):
            rows = [each[place] for each in found]
            kinds[Kind(size, p_k, layer)] = Measured(
                {name: np.array([single[name] for single, _ in rows]) for name in SINGLE},
                {name: np.array([lists[name] for _, lists in rows])
                 for name in (*LISTS, "cosine")})
    if not kinds:
        raise UserError(f"{out} holds no finished cell of diversity: run it first")
    return Found(kinds, cells(config)[0].result(
        out, lambda result: [int(d) for d in result["dimensions"][:len(SHARES)]]))


def log10_possible(config: DiversityConfig, kind: Kind) -> float:
    """Return log10 of C(N, k), of all layers together if it is of all."""
    layers = config.hidden if kind.layer == "all" else 1
    return layers * log10_experts(kind.size, winners(kind.p_k, kind.size))


def table(config: DiversityConfig, out: Path) -> str:
    """Return the numbers of experts and their overlaps, and what they say together."""
    found = read(config, out)
    rows: list[tuple[str, ...]] = [
        ("N", "p_k", "layer", "C(N, k)", "at least", "at most", "met", "effective", "Chao",
         "new, %", "neurons", "within", "between", "correlation")]
    for kind, measured in found.kinds.items():
        single, lists = measured
        rows.append((str(kind.size), f"{kind.p_k:g}", kind.layer,
                     f"10^{log10_possible(config, kind):.1f}",
                     f"10^{np.log10(single['least']).mean():.1f}",
                     f"10^({number(interval(log10_at_most(config, kind, single)))})",
                     number(interval(lists["distinct"][:, -1]), 0),
                     f"{single['effective'].mean():,.0f}", f"{single['chao1'].mean():,.0f}",
                     f"{(100 * single['once'] / lists['images'][:, -1]).mean():.1f}",
                     f"{single['neurons'].mean():.0f}",
                     *(number(interval(single[name]), 3) for name in
                       ("within", "between", "correlation"))))
    return columns(rows) + f"""
{figures.plain(config.dataset)}, means over networks with 95 % intervals
at least, at most: bounds on the effective number of masks in as many images as one likes, from
pairs of images of one mask, and by a code; met: distinct masks of the images at hand, and effective
number by the entropy of their counts; Chao: lower estimate of those seen and unseen; new: images
whose mask no other has, which is the chance that one more meets a new one; neurons: effective
number; within, between: overlap of the masks of two images of one class, of two; correlation: of
the overlap and the cosine of the images
""" + answer(config, found)


def log10_at_most(config: DiversityConfig, kind: Kind, single: dict[str, np.ndarray]) -> np.ndarray:
    """Return log10 of the bound by the code, or of all possible masks if these are fewer."""
    return np.minimum(single["nats"] / np.log(10), log10_possible(config, kind))


def answer(config: DiversityConfig, found: Found) -> str:
    """Return what the numbers say of the widest first layer, at the first p_k."""
    size = max(kind.size for kind in found.kinds)
    kind = next(kind for kind in found.kinds if (kind.size, kind.layer) == (size, "1"))
    measured = found.kinds[kind]
    bound = interval(log10_at_most(config, kind, measured.single))
    met = interval(measured.lists["distinct"][:, -1])
    images = int(measured.lists["images"][0, -1])
    share = (log10_at_most(config, kind, measured.single) - log10_possible(config, kind)).mean()
    shared = {name: percent(measured.single[name]) for name in ("within", "between")}
    beyond = of_equal_cosine(measured)
    text = (f"Of the 10^{log10_possible(config, kind):.1f} experts of a first layer with N = "
            f"{kind.size} and p_k = {kind.p_k:g}, {images:,} images meet {number(met, 0)}; the "
            f"effective number in all images of their law is between 10^"
            f"{np.log10(measured.single['least']).mean():.1f} and 10^({number(bound)}), at most a "
            f"share of 10^{share:.1f} of all.\n"
            f"These overlap: two images of one class share {shared['within']} % of their active "
            f"neurons, of two classes {shared['between']} %, unrelated masks {100 * kind.p_k:g} %")
    text += "." if np.isnan(beyond.mean) else (
        f"; of images that are as alike by their cosine those of one class share {signed(beyond)} "
        "points more.")
    if found.dimensions is not None:
        allowed = [log10_separable_of(kind, d) for d in found.dimensions]
        text += ("\nImages of few dimensions could meet no more than " + ", ".join(
            f"10^{each:.0f} ({d}, which hold {share:.0%} of the variance)"
            for share, d, each in zip(SHARES, found.dimensions, allowed, strict=True)) + ".")
    return text


def of_equal_cosine(measured: Measured) -> Interval:
    """Return how many points more images of one class share than of two, of an equal cosine.

    The mean over the bins that hold pairs of both; NaN if none does.
    """
    more = 100 * (measured.lists["within by cosine"] - measured.lists["between by cosine"])
    return interval(np.array([each[known].mean() for each in more
                              if (known := ~np.isnan(each)).any()]))


def log10_separable_of(kind: Kind, dimensions: int) -> float:
    """Return `analysis.log10_separable` of inputs in so many dimensions around their mean."""
    return analysis.log10_separable(kind.size, winners(kind.p_k, kind.size), dimensions + 1)


def draw(config: DiversityConfig, out: Path) -> list[Path]:
    """Draw the masks that were met, how many there are at most, and their overlaps."""
    plt = figures.pyplot()
    found = read(config, out)
    figure, panels = plt.subplots(1, 3, figsize=(14, 4))
    _draw_met(panels[0], config, found)
    _draw_numbers(panels[1], config, found)
    _draw_overlaps(panels[2], config, found)
    images = f"{config.images:,} images" if config.images else "all images"
    figure.suptitle(f"diversity: random COMET routing of {config.hidden} layers, {images} of "
                    f"{figures.plain(config.dataset)}, {config.seeds} networks, band: lowest to "
                    "highest", fontsize=8)
    return [figures.save(figure, out / "diversity.png")]


MARKS = ("-", "--", ":", "-.")  # of the p_k


def _draw_met(axes: Any, config: DiversityConfig, found: Found) -> None:
    most = 1.0
    for row, size in enumerate(config.sizes):
        for style, p_k in zip(itertools.cycle(MARKS), config.p_k, strict=False):
            measured = found.kinds.get(Kind(size, p_k, "1"))
            if measured is None:
                continue
            images, met = (measured.lists[name] for name in ("images", "distinct"))
            axes.plot(images[0], met.mean(axis=0), color=f"C{row}", linestyle=style,
                      label=f"N = {size}, $p_k$ = {p_k:g}")
            axes.fill_between(images[0], met.min(axis=0), met.max(axis=0), color=f"C{row}",
                              alpha=0.2, linewidth=0)
            most = max(most, images.max())
    axes.plot([1, most], [1, most], color="0.6", linewidth=0.8, label="an expert an image")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("images")
    axes.set_ylabel("distinct masks of layer 1")
    axes.set_title("(a) experts that were met")
    axes.legend()


def _draw_numbers(axes: Any, config: DiversityConfig, found: Found) -> None:
    """Draw by kind of layer: all masks, the bound by the code, and those that were met."""
    groups = [(size, p_k) for size in config.sizes for p_k in config.p_k
              if Kind(size, p_k, "1") in found.kinds]
    looks = {"C(N, k)": ("_", "0.2"), "effective number, at most": ("v", "#d9622b"),
             "effective number, at least": ("^", "#e0a458"), "met": (".", "#4c6a92")}
    for group, (size, p_k) in enumerate(groups):
        for step, layer in enumerate(config.layers):
            kind = Kind(size, p_k, layer)
            single, lists = found.kinds[kind]
            place = group + 0.7 * (step + 0.5) / len(config.layers) - 0.35
            values = (log10_possible(config, kind), log10_at_most(config, kind, single).mean(),
                      np.log10(single["least"]).mean(), np.log10(lists["distinct"][:, -1]).mean())
            for (name, (mark, color)), value in zip(looks.items(), values, strict=True):
                axes.scatter(place, value, marker=mark, s=22, color=color, linewidths=1.2,
                             label=name if group == step == 0 else None)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(groups)), [f"{size}\n{p_k:g}" for size, p_k in groups])
    axes.set_xlabel(f"N, and $p_k$; in each from the left: layers {', '.join(config.layers)}")
    axes.set_ylabel("$\\log_{10}$ of the number of experts")
    axes.set_title("(b) possible, at most, and met")
    axes.legend()


def _draw_overlaps(axes: Any, config: DiversityConfig, found: Found) -> None:
    size = config.sizes[-1]
    for row, p_k in enumerate(config.p_k):
        measured = found.kinds.get(Kind(size, p_k, "1"))
        if measured is not None:
            for style, name in (("-", "within"), ("--", "between")):
                axes.plot(measured.lists["cosine"].mean(axis=0),
                          measured.lists[f"{name} by cosine"].mean(axis=0), color=f"C{row}",
                          linestyle=style, marker=".", linewidth=1.2,
                          label=f"$p_k$ = {p_k:g}, {name} classes")
            axes.axhline(p_k, color=f"C{row}", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("cosine of two images")
    axes.set_ylabel("overlap of their masks in layer 1")
    axes.set_title(f"(c) N = {size}; dotted: unrelated masks")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


EXPERIMENT = Experiment(
    "diversity", DiversityConfig,
    {"smoke": {"dataset": "glyphs", "sizes": (20, 60), "p_k": (0.1, 0.5), "hidden": 2,
               "images": 600, "compared": 100, "seeds": 2},
     "paper": {"sizes": (20, 100, 500, 1000, 3000), "images": None}},
    lambda config: (config.dataset,), cells, run_cell, draw, table)
