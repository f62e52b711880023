"""Figure 3: which neurons the fixed routing ever uses, over randomly drawn networks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, unknown
from ..functional.packing import unpacked
from ..gates import EVALUATION, Comet
from ..models import mlp
from ..rng import stream
from ..settings import option
from . import datasets, figures
from .datasets import IMAGES_32
from .datasets.base import Factor, scaled
from .experiment import Cell, Experiment, Place, columns
from .training.examples import BLOCK, blocks

NETWORKS_A_CELL = 25
HIDDEN = 3  # a 4-layer MLP
NETWORK_WORK = 2.0 * (3072 * 550 + 2 * 550**2)  # an image through a network of mean widths
PAPER = {"never active": 7.6e-6, "models with one": 0.02}


@dataclass(frozen=True)
class Fig3Spec:
    """One cell: the networks first..last-1, and the images that go through each."""

    first: int
    last: int
    images: int | None
    datasets: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Fig3Config:
    """Settings of Figure 3."""

    networks: int = option(300, "randomly initialised networks")
    images: int | None = option(None, "use only so many images of each data set")
    datasets: tuple[str, ...] = option(("cifar10", "cifar100"),
                                       "the data set, and one whose images may wake its sleepers")
    seed: int = option(0, "seed")

    def __post_init__(self) -> None:
        if self.networks < 1 or len(self.datasets) != 2:
            raise UserError("fig3 needs at least 1 network and exactly 2 data sets, got "
                            f"{self.networks} and {', '.join(self.datasets)}")
        for name in self.datasets:
            if name not in IMAGES_32:
                raise unknown("data set of 32x32 images", name, IMAGES_32)


def cells(config: Fig3Config) -> list[Cell]:
    """Return cells of up to 25 networks."""
    return [Cell(f"networks{first}-{last - 1}",
                 Fig3Spec(first, last, config.images, config.datasets, config.seed),
                 NETWORK_WORK * (config.images or 60_000) * len(config.datasets) * (last - first))
            for first in range(0, config.networks, NETWORKS_A_CELL)
            for last in [min(first + NETWORKS_A_CELL, config.networks)]]


def network(seed: int, index: int, inputs: int) -> mlp.MLPConfig:
    """Return the shape of a random network: N_l ~ U(100, 1000), 1 - p_k ~ U(0.05, 1)."""
    draw = stream(seed, "network", index)
    N = draw.integers(100, 1000, size=HIDDEN, endpoint=True)
    p_k = 1 - draw.uniform(0.05, 1)
    return mlp.MLPConfig((inputs, *map(int, N), 1), gate=Comet(float(p_k)))


def network_gate(config: mlp.MLPConfig) -> Comet:
    """Return the gate of a COMET network."""
    assert isinstance(config.gate, Comet)
    return config.gate


def _images(name: str, place: Place, count: int | None) -> tuple[np.ndarray, Factor, Factor]:
    """Return all images of a data set as bytes, and how they are scaled."""
    data = datasets.load(name, place.data)
    if data.notice:
        place.progress.message(f"{name}: {data.notice}")
    parts = [x for x in (data.x_train, data.x_val, data.x_test) if x is not None]
    return np.concatenate(parts)[:count], data.scale, data.shift


def utilisation(x: np.ndarray, scale: Factor, shift: Factor, fixed: mlp.Fixed,
                config: mlp.MLPConfig, place: Place) -> list[np.ndarray]:
    """Return, for each hidden layer, how many of the examples activate each neuron: int (N_l,)."""
    xp, gate = place.backend.xp, network_gate(config)
    counts = [xp.zeros(N, dtype="int64") for N in config.widths[1:-1]]
    for rows in blocks(len(x), BLOCK):
        batch = scaled(place.backend.asarray(x[rows]), scale, shift, "float32")
        masks = gate.masks(batch, fixed, config, EVALUATION)
        for count, m in zip(counts, masks, strict=True):
            count += unpacked(m, len(count)).sum(axis=0)
    return [place.backend.to_host(count) for count in counts]


def run_cell(spec: Fig3Spec, place: Place) -> dict[str, Any]:
    """Count, for each network, how often the images of both data sets activate each neuron."""
    results = []
    images = {name: _images(name, place, spec.images) for name in spec.datasets}
    examples = len(images[spec.datasets[0]][0])
    for index in range(spec.first, spec.last):
        config = network(spec.seed, index, images[spec.datasets[0]][0].shape[1])
        weights = int(stream(spec.seed, "weights", index).integers(2**63))
        _, fixed = mlp.init(config, weights, place.backend)
        used = []
        place.raise_if_stopped()
        for name in spec.datasets:
            x, scale, shift = images[name]
            used.append(utilisation(x, scale, shift, fixed, config, place))
            place.progress.advance(NETWORK_WORK * len(x), f"network {index}: {name}")
        asleep = [count == 0 for count in used[0]]
        woken = sum(int((other[sleeps] > 0).sum())
                    for other, sleeps in zip(used[1], asleep, strict=True))
        results.append({
            "p_k": network_gate(config).p_k, "widths": config.widths[1:-1],
            "never": int(sum(sleeps.sum() for sleeps in asleep)), "woken": woken,
            # how the utilisation is distributed: its quantiles, layer by layer
            "quantiles": [np.quantile(count / examples, np.linspace(0, 1, 101)).round(5).tolist()
                          for count in used[0]]})
    return {"networks": results}


def _networks(config: Fig3Config, out: Path) -> list[dict[str, Any]]:
    def networks(result: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"p_k": float(network["p_k"]), "widths": list(map(int, network["widths"])),
                 "never": int(network["never"]), "woken": int(network["woken"]),
                 "quantiles": np.array(network["quantiles"], np.float64).reshape(
                     len(network["widths"]), 101)} for network in result["networks"]]

    found = [network for cell in cells(config)
             for network in cell.result(out, networks) or ()]
    if not found:
        raise UserError(f"{out} holds no finished cell of fig3: run it first")
    return found


def statistics(networks: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Return both of the paper's statistics with 95 % confidence intervals.

    The neurons of one network are not independent, so the interval of the first is a bootstrap
    over networks.
    """
    from scipy.stats import binomtest  # here, as it takes a second to load

    never = np.array([n["never"] for n in networks])
    neurons = np.array([sum(n["widths"]) for n in networks])
    draws = stream(0, "bootstrap").integers(0, len(networks), size=(10_000, len(networks)))
    low, high = np.quantile(never[draws].sum(axis=1) / neurons[draws].sum(axis=1), [0.025, 0.975])
    some = binomtest(int((never > 0).sum()), len(networks)).proportion_ci(method="wilson")
    return {"never active": (never.sum() / neurons.sum(), low, high),
            "models with one": ((never > 0).mean(), some.low, some.high)}


def draw(config: Fig3Config, out: Path) -> list[Path]:
    """Draw the utilisation in a sparse and in a dense network, and the sleepers against p_k."""
    plt = figures.pyplot()
    networks = _networks(config, out)
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2))
    p_k = np.array([n["p_k"] for n in networks])
    for axes, level in zip(panels, (0.1, 0.5), strict=False):
        shown = networks[int(np.abs(p_k - level).argmin())]
        for layer, quantiles in enumerate(shown["quantiles"], start=1):
            axes.plot(np.linspace(0, 1, 101), quantiles, label=f"layer {layer}, N = "
                      f"{shown['widths'][layer - 1]}")
        axes.axhline(shown["p_k"], color="0.6", linewidth=0.8, linestyle=":")
        axes.set_title(f"a network with $p_k$ = {shown['p_k']:.2f} (dotted)")
        axes.set_xlabel("neurons, from the least used to the most (quantile)")
        axes.set_ylim(-0.02, 1.02)
        axes.legend()
    name = figures.plain(config.datasets[0])
    panels[0].set_ylabel(f"share of {name} images that activate a neuron")
    share = np.array([n["never"] / sum(n["widths"]) for n in networks])
    panels[2].scatter(p_k, 100 * share, s=8, color="#d9622b")
    panels[2].set_yscale("symlog", linthresh=0.1)
    panels[2].set_ylim(bottom=-0.01)
    panels[2].set_xlabel("$p_k$")
    panels[2].set_ylabel("neurons never active, %")
    panels[2].set_title(f"{len(networks)} networks")
    images = f"{config.images} images" if config.images else "all images"
    figure.suptitle(f"fig3: 4-layer COMET MLPs, N ~ U(100, 1000), 1 - p_k ~ U(0.05, 1), {images} "
                    f"of {name}", fontsize=8)
    return [figures.save(figure, out / "fig3.png")]


def table(config: Fig3Config, out: Path) -> str:
    """Return the paper's two statistics beside ours, and how many sleepers woke."""
    networks = _networks(config, out)
    rows = [("", "paper", "here", "95 % interval")]
    for name, (value, low, high) in statistics(networks).items():
        rows.append((name, f"{100 * PAPER[name]:.2g} %", f"{100 * value:.2g} %",
                     f"{100 * low:.2g}-{100 * high:.2g} %"))
    never, woken = (sum(n[key] for n in networks) for key in ("never", "woken"))
    images = config.images or "all"
    return columns(rows) + (
        f"\n{len(networks)} networks, {images} images of {config.datasets[0]}: {never} of "
        f"{sum(sum(n['widths']) for n in networks)} neurons never active; {woken} of them are "
        f"active on {images} images of {config.datasets[1]}")


EXPERIMENT = Experiment(
    "fig3", Fig3Config,
    {"smoke": {"networks": 4, "images": 500, "datasets": ("glyphs", "glyphs")},
     "paper": {"networks": 1000}},
    lambda config: config.datasets, cells, run_cell, draw, table)
