"""Figure 2: similar inputs get similar masks, and similar activations, the more so the sparser."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends import Backend
from ..errors import UserError
from ..functional.linear import Linear
from ..gates import Comet
from ..models import mlp
from ..rng import stream
from ..settings import option
from . import figures
from .experiment import Cell, Experiment, Place, columns

PAIRS_A_CELL = 50
WORK_A_WEIGHT = 400.0  # drawing a weight takes as long as so many operations of a product


@dataclass(frozen=True)
class Fig2Spec:
    """One cell: the pairs first..last-1 of the experiment."""

    first: int
    last: int
    networks: int
    p_k: tuple[float, ...]
    inputs: int
    width: int
    hidden: int
    std: float
    activation: str
    seed: int


@dataclass(frozen=True)
class Fig2Config:
    """Settings of Figure 2; the defaults are the paper's full size.

    The paper draws inputs from N(mu, 25) and does not name the activation. With 25 as the standard
    deviation the cosines of the pairs spread from 0 to 1; with 5 (25 as the variance) nine in ten
    lie above 0.9. The activation is that of the MLP experiments.
    """

    pairs: int = option(500, "pairs of inputs")
    networks: int = option(10, "random networks a pair")
    p_k: tuple[float, ...] = option((0.05, 0.1, 0.25, 0.5, 0.75, 1.0),
                                    "proportions of active neurons; 1 is the vanilla MLP")
    inputs: int = option(100, "length of an input")
    width: int = option(512, "neurons in each hidden layer")
    hidden: int = option(10, "hidden layers, L - 1")
    std: float = option(25.0, "standard deviation of an input's components")
    activation: str = option("softplus", "activation f of the backbone")
    seed: int = option(0, "seed")

    def __post_init__(self) -> None:
        if min(self.pairs, self.networks, self.inputs, self.width, self.hidden) < 1:
            raise UserError("pairs, networks, inputs, width and hidden must each be at least 1")
        for p_k in self.p_k:
            mlp.MLPConfig(_widths(self), self.activation, Comet(p_k))


def _widths(config: Fig2Config | Fig2Spec) -> tuple[int, ...]:
    return (config.inputs, *[config.width] * config.hidden, 1)


def network_work(config: Fig2Config | Fig2Spec) -> float:
    """Return what drawing and running a network costs, in operations of a matrix product."""
    return WORK_A_WEIGHT * 2 * mlp.parameter_count(mlp.MLPConfig(_widths(config)))


def cells(config: Fig2Config) -> list[Cell]:
    """Return cells of up to 50 pairs."""
    work = network_work(config)
    found = []
    for first in range(0, config.pairs, PAIRS_A_CELL):
        last = min(first + PAIRS_A_CELL, config.pairs)
        spec = Fig2Spec(first, last, config.networks, config.p_k, config.inputs, config.width,
                        config.hidden, config.std, config.activation, config.seed)
        found.append(Cell(f"pairs{first}-{last - 1}", spec,
                          work * config.networks * (last - first)))
    return found


def input_pair(spec: Fig2Spec, pair: int) -> np.ndarray:
    """Return two inputs (2, N_0), components iid N(mu, std^2), each mu an integer in 0..100."""
    draw = stream(spec.seed, "pair", pair)
    mu = draw.integers(0, 100, size=(2, 1), endpoint=True)
    return draw.normal(mu, spec.std, size=(2, spec.inputs)).astype("float32")


class Networks:
    """Random networks, drawn anew in place: drawing them is most of this experiment's work."""

    def __init__(self, spec: Fig2Spec, backend: Backend) -> None:
        self._widths, self._seed, self._backend = _widths(spec), spec.seed, backend
        self._drawn = {name: [np.empty((N, N_in), "float32")
                              for N_in, N in zip(self._widths, self._widths[1:], strict=False)]
                       for name in ("W", "V")}
        self._pool = ThreadPoolExecutor(2)

    def draw(self, pair: int, network: int) -> tuple[mlp.Params, mlp.Fixed]:
        """Return W and V ~ U(-1/sqrt(N_{l-1}), 1/sqrt(N_{l-1})), no biases as in eq. (7)."""

        def fill(name: str) -> list[Any]:
            numbers = stream(self._seed, "network", pair, network, name)
            for W in self._drawn[name]:
                numbers.random(dtype="float32", out=W)
                W -= 0.5
                W *= 2 / W.shape[1] ** 0.5
            return [self._backend.asarray(W) for W in self._drawn[name]]

        W, V = self._pool.map(fill, ("W", "V"))
        return tuple(Linear(W_l, None) for W_l in W), tuple(V[:-1])


def cosine(pair: Any) -> float:
    """Return the cosine of the two rows of an array (2, n)."""
    u, v = pair.astype("float64")
    return float((u * v).sum() / ((u * u).sum() * (v * v).sum()) ** 0.5)


def run_cell(spec: Fig2Spec, place: Place) -> dict[str, Any]:
    """Measure the cosines of inputs, of masks (eq. 5) and of activations (eq. 8) of the pairs."""
    xp = place.backend.xp
    networks = Networks(spec, place.backend)
    work = network_work(spec)
    result: dict[str, Any] = {"input": [], "mask": [], "activation": []}
    for pair in range(spec.first, spec.last):
        place.raise_if_stopped()
        host_x = input_pair(spec, pair)
        x = place.backend.asarray(host_x)
        sums = np.zeros((2, len(spec.p_k)))
        for network in range(spec.networks):
            params, routing = networks.draw(pair, network)
            for i, p_k in enumerate(spec.p_k):
                config = mlp.MLPConfig(_widths(spec), spec.activation, Comet(p_k), bias=False)
                trace = mlp.trace(x, params, routing, config)
                sums[:, i] += (cosine(xp.concatenate(trace.m, axis=1)),
                               cosine(xp.concatenate(trace.x[1:], axis=1)))
            place.progress.advance(work, f"pair {pair}")
        mask, activation = sums / spec.networks
        result["input"].append(cosine(host_x))
        result["mask"].append(mask.tolist())
        result["activation"].append(activation.tolist())
    return result


def _points(config: Fig2Config, out: Path) -> dict[str, np.ndarray]:
    """Return the cosines of all finished pairs: input (P,), mask and activation (P, p_k)."""
    def points(result: dict[str, Any]) -> np.ndarray:
        rows = np.column_stack([np.array(result[key], np.float64)
                                for key in ("input", "mask", "activation")])
        if rows.shape != (max(len(rows), 1), 1 + 2 * levels) or not np.isfinite(rows[:, 0]).all():
            raise ValueError(f"these are no pairs at {levels} p_k")
        return rows

    levels = len(config.p_k)
    found = [rows for cell in cells(config) if (rows := cell.result(out, points)) is not None]
    if not found:
        raise UserError(f"{out} holds no finished cell of fig2: run it first")
    rows = np.concatenate(found)
    return {"input": rows[:, 0], "mask": rows[:, 1:1 + levels], "activation": rows[:, 1 + levels:]}


def draw(config: Fig2Config, out: Path) -> list[Path]:
    """Draw both panels: mask and activation cosine against input cosine, a colour a p_k."""
    plt = figures.pyplot()
    points = _points(config, out)
    figure, panels = plt.subplots(1, 2, figsize=(8.8, 3.6), sharex=True)
    colors = plt.get_cmap("viridis_r")(np.linspace(0.05, 1, len(config.p_k)))
    for axes, key, label in zip(panels, ("mask", "activation"),
                                ("(a) cosine of masks $(m_1..m_{L-1})$",
                                 "(b) cosine of activations $(x_1..x_{L-1})$"), strict=True):
        for i, p_k in enumerate(config.p_k):
            name = f"{p_k:g}" + (" (vanilla MLP)" if p_k == 1 else "")
            axes.scatter(points["input"], points[key][:, i], s=4, color=colors[i], linewidth=0,
                         alpha=0.7, label=name)
        axes.plot([-1, 1], [-1, 1], color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xlim(points["input"].min() - 0.02, 1.02)
        axes.set_ylim(min(points[key].min(), points["input"].min()) - 0.02, 1.02)
        axes.set_xlabel("cosine of inputs")
        axes.set_ylabel(label)
    panels[1].legend(title="$p_k$", markerscale=3, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"fig2: {len(points['input'])} pairs, {config.networks} networks of "
                    f"{config.hidden} x {config.width} a pair, {config.activation}, inputs "
                    f"N(mu, {config.std:g}$^2$)", fontsize=8)
    return [figures.save(figure, out / "fig2.png")]


def table(config: Fig2Config, out: Path) -> str:
    """Return, for each p_k, both cosines for dissimilar and for similar inputs."""
    points = _points(config, out)
    low, high = np.quantile(points["input"], [0.2, 0.8])
    apart, alike = points["input"] <= low, points["input"] >= high
    rows = [("p_k", "masks: apart", "alike", "activations: apart", "alike", "correlation")]
    for i, p_k in enumerate(config.p_k):
        mask, activation = points["mask"][:, i], points["activation"][:, i]
        rows.append((f"{p_k:g}", f"{mask[apart].mean():.3f}", f"{mask[alike].mean():.3f}",
                     f"{activation[apart].mean():.3f}", f"{activation[alike].mean():.3f}",
                     f"{np.corrcoef(points['input'], activation)[0, 1]:.3f}"))
    return columns(rows) + (f"\nmean cosines over the fifth of the pairs with the least similar "
                            f"inputs (cosine up to {low:.2f}) and the most similar (from "
                            f"{high:.2f}); correlation of input and activation cosine")


EXPERIMENT = Experiment(
    "fig2", Fig2Config,
    {"smoke": {"pairs": 20, "networks": 2, "width": 64, "hidden": 4}},
    lambda config: (), cells, run_cell, draw, table)
