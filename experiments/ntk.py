"""The empirical neural tangent kernel, eq. (9)-(11): is COMET's 'a narrower effective kernel'?

``K(x, x') = J(x') J(x)^T`` with ``J(x) = d a_L / d theta``, and ``J_l(x) = d a_L / d a_l`` by the
hand-written backward of `jacobians`. What W_l contributes is

``<x_{l-1}, x'_{l-1}> J_l(x') J_l(x)^T``,   and b_l:   ``J_l(x') J_l(x)^T``

see docs/derivations/ntk.md. Eq. (11) has a_{l-1} in place of x_{l-1}, the masked activations that
W_l reads: how far that is off is measured too.

Measured is the trace of K, divided by ``sqrt(tr K(x, x) tr K(x', x'))``: the cosine of the two
Jacobians. Of what W_l contributes it is a product of two cosines, of the activations x_{l-1}
('forward'), of which the paper speaks, and of J_l ('backward'). A kernel that is nearly the same
for all inputs still tells them apart by what is left when it is centred (K less its means over the
inputs, as of Jacobians less their mean), which is what learns all but a common shift of the output.

Narrow is a kernel that falls fast with the angle between the inputs: measured by the angle at which
it has fallen to a half, 60 degrees for a linear kernel, and by its mean height between 0 and 90
degrees, 2 / pi for a linear kernel. Angles are those of all pairs of inputs, and, as few pairs of
inputs are close, of each input and those on the way to another.
"""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..backends import xp_of
from ..errors import UserError, unknown
from ..models import mlp
from ..settings import option
from ..tree import tree_map, zeros_like
from . import datasets, figures
from .datasets.base import scaled
from .experiment import Cell, Experiment, Place, columns
from .fig2 import Fig2Spec, input_pair
from .grid import DataCell, check_lists, examples, load
from .intervals import Interval, interval, number
from .training import RunConfig, TrainConfig, run_memory, run_work, train
from .training.model import read_weights
from .variants import VARIANTS, WITHOUT_P_K

Array = Any

MODELS = ("standard", "centred", "top-k", "layerwise", "comet")
BIN = 5  # degrees
BINS = 180 // BIN
RIGHT = 90 // BIN  # the bins up to a right angle
WAY = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # shares of the way from an input to another


@dataclass(frozen=True)
class NtkConfig:
    """Settings; the defaults are Figure 2's networks, and small ones on a part of CIFAR10."""

    models: tuple[str, ...] = option(("standard", "centred", "top-k", "comet"),
                                     f"networks, of {', '.join(MODELS)}")
    p_k: tuple[float, ...] = option((0.1, 0.25, 0.5, 0.9),
                                    "proportions of active neurons")
    activation: str = option("softplus", "activation f of all networks")
    points: int = option(50, "inputs of Figure 2's law for each seed")
    inputs: int = option(100, "length of such an input")
    std: float = option(25.0, "standard deviation of its components")
    width: int = option(512, "neurons in each hidden layer of Figure 2's networks")
    hidden: int = option(10, "their hidden layers, L - 1")
    dataset: str = option("cifar10", "images to classify, see: comet-np data")
    images: int = option(80, "validation images whose kernel is measured")
    image_width: int = option(500, "neurons in each hidden layer of the networks of images")
    image_hidden: int = option(3, "their hidden layers")
    train: int | None = option(2000, "use only so many training images")
    validation: int | None = option(1000, "use only so many validation images")
    seeds: int = option(5, "number of seeds: of weights, inputs and data order")
    training: TrainConfig = field(default=TrainConfig(lr=5e-2, epochs=5))

    target: ClassVar[None] = None
    task: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_lists(self)
        for model in self.models:
            if model not in MODELS:
                raise unknown("model", model, MODELS)
        if datasets.sizes_of(self.dataset).task != "classification":
            raise UserError(f"{self.dataset} has no classes: give another --dataset")
        if min(self.points, self.images, 2 if self.validation is None else self.validation) < 2:
            raise UserError("a kernel is one of pairs: points, images and validation must each be "
                            "at least 2")
        if min(self.seeds, self.inputs, self.width, self.hidden, self.image_width,
               self.image_hidden, 1 if self.train is None else self.train) < 1:
            raise UserError("seeds, inputs, width, hidden, image_width, image_hidden and train "
                            "must each be at least 1")
        cells(self)  # bad settings are refused before the first cell runs


@dataclass(frozen=True)
class RandomCell:
    """One cell: a random network and inputs of Figure 2's law."""

    model: mlp.MLPConfig
    points: int
    std: float
    seed: int


@dataclass(frozen=True)
class TrainedCell(DataCell):
    """One cell: a network before and after training, and how many images it is measured on."""

    images: int
    run: RunConfig


class Network(NamedTuple):
    """What the cells of several seeds have in common.

    dataset : None is Figure 2's law. p_k : None of the networks that have none.
    """

    dataset: str | None
    model: str
    p_k: float | None


def networks(config: NtkConfig) -> list[Network]:
    """Return what is compared, on Figure 2's inputs and on images."""
    return [Network(dataset, model, p_k) for dataset in (None, config.dataset)
            for model in config.models
            for p_k in ((None,) if model in WITHOUT_P_K else config.p_k)]


def cells(config: NtkConfig) -> list[Cell]:
    """Return the cells, seed by seed."""
    return [cell_of(config, network, seed) for seed in range(config.seeds)
            for network in networks(config)]


def cell_of(config: NtkConfig, network: Network, seed: int) -> Cell:
    """Return the cell of a network and a seed."""
    dataset, model, p_k = network
    name = "-".join([dataset or "random", model, *[f"pk{p_k}"] * (p_k is not None), f"seed{seed}"])
    sizes = datasets.sizes_of(config.dataset)
    widths = ((config.inputs, *[config.width] * config.hidden, 1) if dataset is None else
              (sizes.inputs, *[config.image_width] * config.image_hidden, sizes.outputs))
    run = RunConfig(mlp.MLPConfig(widths, config.activation, None, bias=dataset is not None),
                    config.training, seed)
    run = VARIANTS[model](run, 1.0 if p_k is None else p_k, "strict")
    if dataset is None:
        spec = RandomCell(run.model, config.points, config.std, seed)
        return Cell(name, spec, _work(run.model, config.points))
    trained = TrainedCell(dataset, config.train, config.validation, None, None, sizes.digest,
                          config.images, run)
    return Cell(name, trained, run_work(run, examples(config, dataset))
                + 2 * _work(run.model, config.images), run_memory(run))


def _work(model: mlp.MLPConfig, inputs: int) -> float:
    """Return about what a measurement takes, in operations: its Jacobians, and their products."""
    points, outputs = inputs * (1 + len(WAY)), model.widths[-1]
    return 2.0 * points * outputs * (mlp.parameter_count(model) + points * sum(model.widths[1:]))


# --- the kernel ---------------------------------------------------------------------------------


class Factors(NamedTuple):
    """What the kernel is made of: for each layer l = 1..L of n examples.

    x : x_{l-1}, (n, N_{l-1}), what W_l reads. a : a_{l-1}, as eq. (11) has it; a_0 = x_0.
    J : d a_L / d a_l, (n, N_L, N_l).
    """

    x: tuple[Array, ...]
    a: tuple[Array, ...]
    J: tuple[Array, ...]


def factors(x: Array, params: mlp.Params, fixed: mlp.Fixed, config: mlp.MLPConfig) -> Factors:
    """Run the network on examples (n, N_0), in evaluation, and return its kernel's factors."""
    _, cache = mlp.forward(x, params, fixed, config)
    return Factors((*(layer.x for layer in cache.hidden), cache.output.x),
                   (x, *(layer.a for layer in cache.hidden)), jacobians(cache, params, config))


def jacobians(cache: mlp.MLPCache, params: mlp.Params, config: mlp.MLPConfig) -> tuple[Array, ...]:
    """Return J_l = d a_L / d a_l, (n, N_L, N_l), for l = 1..L.

    ``J_L = 1``,   ``J_l = J_{l+1} W_{l+1} diag(m_l o f'(a_l))``
    """
    output = params[-1].weight
    xp, n = xp_of(output), len(cache.output.x)
    J = xp.broadcast_to(xp.eye(len(output), dtype=output.dtype), (n, len(output), len(output)))
    found = [J]
    for hidden, m, p in zip(cache.hidden[::-1], cache.masks[::-1], params[:0:-1], strict=True):
        slope = config.f.derivative(hidden.a)
        if m is not None:
            slope = slope * m
        J = (J @ p.weight) * slope[:, None]
        found.append(J)
    return tuple(found[::-1])


def contribution(layer: int, one: Factors, other: Factors) -> tuple[Array, Array]:
    """Return what W_l and b_l, l = `layer` + 1, contribute to K(x, x'): (n, n', N_L, N_L) each.

    The examples x are of `one`, x' of `other`; rows are outputs for x', columns for x.
    """
    x, J = one.x[layer], one.J[layer]
    xp = xp_of(x)
    of_bias = xp.einsum("moi,npi->nmop", other.J[layer], J)
    return (x @ other.x[layer].T)[..., None, None] * of_bias, of_bias


def full_contributions(x: Array, params: mlp.Params, fixed: mlp.Fixed,
                       config: mlp.MLPConfig) -> list[Array]:
    """Return what each W_l contributes to K of all pairs of examples x, from whole Jacobians.

    Each example and output has a pass of `mlp.backward` of its own.
    """
    xp = xp_of(x)
    rows: list[list[Array]] = [[] for _ in params]
    for example in x:
        a_L, cache = mlp.forward(example[None], params, fixed, config)
        for cotangent in xp.eye(a_L.shape[1], dtype=a_L.dtype):
            grads = zeros_like(params)
            mlp.backward(cotangent[None], cache, params, grads, config, input_gradient=False)
            for of_layer, g in zip(rows, grads, strict=True):
                of_layer.append(g.weight.ravel())
    J = [xp.stack(of_layer).reshape(len(x), -1, of_layer[0].size) for of_layer in rows]
    return [xp.einsum("moi,npi->nmop", J_l, J_l) for J_l in J]


# --- what is measured ---------------------------------------------------------------------------


def with_ways(x: np.ndarray) -> np.ndarray:
    """Return inputs (n, N_0), and then those on the way from each to the next, share by share."""
    following = np.roll(x, -1, axis=0)
    return np.concatenate([x, *((1 - share) * x + share * following for share in WAY)])


def compared(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of both of each pair: all pairs of inputs, then each with its ways."""
    i, j = np.triu_indices(n, 1)
    base = np.tile(np.arange(n), len(WAY))
    return np.concatenate([i, base]), np.concatenate([j, np.arange(n, n * (1 + len(WAY)))])


def normalised(K: np.ndarray) -> np.ndarray:
    """Return ``K_ij / sqrt(K_ii K_jj)``; 0 where that is 0 / 0, of inputs that nothing reaches."""
    diagonal = np.sqrt(np.maximum(np.diag(K), 0))
    product = np.outer(diagonal, diagonal)
    found: np.ndarray = np.divide(K, product, out=np.zeros_like(K), where=product > 0)
    return found


def centred(K: np.ndarray, n: int) -> np.ndarray:
    """Return the kernel of Jacobians less their mean over the first n inputs."""
    to_mean = K[:, :n].mean(axis=1)
    found: np.ndarray = K - to_mean[:, None] - to_mean + to_mean[:n].mean()
    return found


def measure(x: np.ndarray, classes: np.ndarray | None, params: mlp.Params, fixed: mlp.Fixed,
            config: mlp.MLPConfig, place: Place) -> dict[str, Any]:
    """Return what is measured of a network on inputs (n, N_0): sums by angle, and numbers.

    All is computed in float64: centring subtracts what may be nearly the same.
    """
    n, backend = len(x), place.backend
    params, fixed = (tree_map(lambda p: p.astype("float64"), each) for each in (params, fixed))
    points = with_ways(x)
    found = factors(backend.asarray(points), params, fixed, config)

    def gram(u: Array) -> np.ndarray:
        u = u.reshape(len(u), -1)
        product: np.ndarray = backend.to_host(u @ u.T)
        return product

    forward, backward = [gram(u) for u in found.x], [gram(J) for J in found.J]
    W = [one * other for one, other in zip(forward, backward, strict=True)]
    K = sum(W) + (sum(backward) if config.bias else 0)
    i, j = compared(n)
    cosine = normalised(forward[0])[i, j]
    bins = np.minimum(np.degrees(np.arccos(np.clip(cosine, -1, 1))) // BIN, BINS - 1).astype(int)

    def by_angle(values: np.ndarray) -> list[float]:
        return np.bincount(bins, normalised(values)[i, j], BINS).tolist()

    in_middle = centred(K, n)
    result = {
        "pairs": np.bincount(bins, minlength=BINS).tolist(),
        "kernel": by_angle(K), "centred": by_angle(in_middle),
        "forward": [by_angle(each) for each in forward],
        "backward": [by_angle(each) for each in backward],
        "share": [float(np.trace(each) / np.trace(K)) for each in W],
        "printed": [_printed(gram(a), of_x, of_J, n) for a, of_x, of_J in
                    zip(found.a[1:], forward[1:], backward[1:], strict=True)]}
    if classes is not None:
        pairs = slice(n * (n - 1) // 2)
        within = classes[i[pairs]] == classes[j[pairs]]
        result["classes"] = [told_apart(normalised(each)[i, j][pairs], within)
                             for each in (forward[0], K, in_middle)]
    return result


def difference_of_full(x: Array, params: mlp.Params, fixed: mlp.Fixed,
                       config: mlp.MLPConfig) -> float:
    """Return the largest difference of a W_l's contribution from that of the full Jacobians.

    Relative to the largest element of the latter, in float64.
    """
    params, fixed = (tree_map(lambda p: p.astype("float64"), each) for each in (params, fixed))
    found = factors(x, params, fixed, config)
    return max(float(abs(contribution(layer, found, found)[0] - expected).max()
                     / abs(expected).max())
               for layer, expected in enumerate(full_contributions(x, params, fixed, config)))


def _printed(of_a: np.ndarray, of_x: np.ndarray, backward: np.ndarray,
             n: int) -> tuple[float, float]:
    """Return how far eq. (11) as printed is off, of all pairs of the first n inputs.

    The Frobenius norm of the difference over that of what W_l contributes; and the share of pairs
    for which it has the other sign.
    """
    off = ~np.eye(n, dtype=bool)
    printed, true = ((each * backward)[:n, :n][off] for each in (of_a, of_x))
    return (float(np.linalg.norm(printed - true) / np.linalg.norm(true)),
            float((printed * true < 0).mean()))


def told_apart(values: np.ndarray, within: np.ndarray) -> float:
    """Return the probability that a pair within a class has more than one of two; 1/2 is chance.

    The area under the ROC curve; of equal values half counts.
    """
    between = np.sort(values[~within])
    below = (np.searchsorted(between, values[within], "left")
             + np.searchsorted(between, values[within], "right"))
    return float(below.mean() / (2 * len(between)))


def images_of(spec: TrainedCell, examples: int) -> np.ndarray:
    """Return which validation images a cell is measured on: of each seed others, while they last.
    """
    count = min(spec.images, examples)
    return (spec.run.seed * count + np.arange(count)) % examples


def run_cell(spec: RandomCell | TrainedCell, place: Place) -> dict[str, Any]:
    """Measure a random network; or one before and after its training."""
    if isinstance(spec, RandomCell):
        law = Fig2Spec(0, spec.points, 1, (), spec.model.widths[0], 1, 1, spec.std, "", spec.seed)
        pairs = [input_pair(law, pair) for pair in range(-(-spec.points // 2))]
        params, fixed = mlp.init(spec.model, spec.seed, place.backend)
        place.raise_if_stopped()
        x = np.concatenate(pairs)[:spec.points].astype("float64")
        result = {"before": measure(x, None, params, fixed, spec.model, place),
                  "full": difference_of_full(place.backend.asarray(x[:2]), params, fixed,
                                             spec.model)}
        place.progress.advance(_work(spec.model, spec.points), "measured")
        return result
    data, model = load(spec, place), spec.run.model
    result = train(spec.run, data, place.folder, place.backend, place.progress, place.stop)
    if not place.first:
        return result
    assert data.x_val is not None and data.y_val is not None  # all data sets of images have them
    rows = images_of(spec, len(data.x_val))
    x = scaled(data.x_val[rows], data.scale, data.shift, "float64")
    for name, (params, fixed) in (
            ("before", mlp.init(model, spec.run.seed, place.backend)),
            ("after", read_weights(place.folder, model, place.backend))):
        result[name] = measure(x, data.y_val[rows], params, fixed, model, place)
        place.progress.advance(_work(model, spec.images), f"measured {name}")
    return result


# --- what the files say -------------------------------------------------------------------------


class Curve(NamedTuple):
    """A normalised kernel against the angle of the inputs, from one seed: of bins that hold pairs.

    angles : degrees, (bins,). values : means over the pairs, (bins,).
    """

    angles: np.ndarray
    values: np.ndarray

    @property
    def half(self) -> float:
        """The angle at which the kernel has fallen from 1 to 1/2; infinity if it never does."""
        low = np.flatnonzero(self.values <= 0.5)
        if not len(low):
            return np.inf
        end = low[0]
        before = (self.angles[end - 1], self.values[end - 1]) if end else (0.0, 1.0)
        falls = (before[1] - 0.5) / (before[1] - self.values[end])
        return float(before[0] + falls * (self.angles[end] - before[0]))

    @property
    def height(self) -> float:
        """The mean of the kernel between 0 and 90 degrees."""
        degrees = np.arange(90) + 0.5
        return float(np.interp(degrees, [0, *self.angles], [1, *self.values]).mean())


class Measured(NamedTuple):
    """What the files say of a network in one state.

    kernel, centred : Curve. forward, backward : one Curve a layer. share : of the trace of K that
    each W_l contributes. printed : how far eq. (11) as printed is off, and for which share of pairs
    it has the other sign, of layers 2..L. classes : how well pairs within a class are told from
    others by the inputs, the kernel and the centred kernel.
    """

    kernel: Curve
    centred: Curve
    forward: tuple[Curve, ...]
    backward: tuple[Curve, ...]
    share: np.ndarray
    printed: np.ndarray
    classes: np.ndarray


def _measured(stored: dict[str, Any], layers: int) -> Measured:
    pairs = np.array(stored["pairs"], np.float64)
    held = pairs > 0

    def curve(sums: Any) -> Curve:
        values = np.array(sums, np.float64)
        if values.shape != (BINS,) or not np.isfinite(values).all():
            raise ValueError(f"these are no sums of {BINS} bins")
        return Curve(BIN * (np.flatnonzero(held) + 0.5), values[held] / pairs[held])

    if pairs.shape != (BINS,) or not held.any():
        raise ValueError("these are no pairs")
    if not len(stored["forward"]) == len(stored["backward"]) == layers:
        raise ValueError(f"these are not the curves of {layers} layers")
    return Measured(curve(stored["kernel"]), curve(stored["centred"]),
                    tuple(map(curve, stored["forward"])), tuple(map(curve, stored["backward"])),
                    np.array(stored["share"], np.float64).reshape(layers),
                    np.array(stored["printed"], np.float64).reshape(layers - 1, 2),
                    np.array(stored.get("classes", 3 * [np.nan]), np.float64).reshape(3))


class Result(NamedTuple):
    """What a cell says: the kernel before and after training, the accuracy, the full Jacobian."""

    before: Measured
    after: Measured | None
    accuracy: float
    full: float


Found = dict[Network, dict[int, Result]]


def read(config: NtkConfig, out: Path) -> Found:
    """Return what the finished cells say, by network and seed.

    Raises
    ------
    UserError
        If there is none, or its files are damaged.
    """
    found: Found = {}
    for network in networks(config):
        layers = 1 + (config.hidden if network.dataset is None else config.image_hidden)

        def use(result: dict[str, Any], layers: int = layers) -> Result:
            after = result.get("after")
            return Result(_measured(result["before"], layers),
                          None if after is None else _measured(after, layers),
                          float(result.get("test_accuracy", np.nan)),
                          float(result.get("full", np.nan)))

        of_seeds = {seed: cell_of(config, network, seed).result(out, use)
                    for seed in range(config.seeds)}
        finished = {seed: each for seed, each in of_seeds.items() if each is not None}
        if finished:
            found[network] = finished
    if not found:
        raise UserError(f"{out} holds no finished cell of ntk: run it first")
    return found


def table(config: NtkConfig, out: Path) -> str:
    """Return how narrow each kernel is, and how far eq. (11) as printed is off."""
    found = read(config, out)
    parts = []
    for dataset, state, title in ((None, "before", "Figure 2's inputs, random networks"),
                                  (config.dataset, "before", f"{config.dataset}, before training"),
                                  (config.dataset, "after", f"{config.dataset}, after training")):
        here = {network: {seed: measured for seed, result in of_seeds.items()
                          if (measured := getattr(result, state)) is not None}
                for network, of_seeds in found.items() if network.dataset == dataset}
        if any(here.values()):
            parts.append(f"{title}\n" + columns(_rows(here, found, state)))
    return "\n\n".join([*parts, _explained(config), *_equation_11(found), *_verdict(found)])


def _rows(here: dict[Network, dict[int, Measured]], found: Found,
          state: str) -> list[tuple[str, ...]]:
    """Return the rows of a table, the first of which names its columns."""
    classes = any(network.dataset for network in here)
    rows = [("network", "p_k", "half at", "height", "over standard", "forward", "backward",
             "centred: half at",
             *(("classes: inputs", "kernel", "centred") if classes else ()),
             *(("test accuracy",) if state == "after" else ()))]
    for network, of_seeds in here.items():
        measured = list(of_seeds.values())
        if not measured:
            continue
        rows.append((
            network.model, "-" if network.p_k is None else f"{network.p_k:g}",
            _angle([each.kernel.half for each in measured]),
            _number([each.kernel.height for each in measured]),
            *[_signed(_over_standard(network, found, state)) if network.model != "standard"
              else "-"],
            *(_number([sum(share * curve.height for share, curve in
                           zip(each.share / each.share.sum(), getattr(each, name), strict=True))
                       for each in measured]) for name in ("forward", "backward")),
            _angle([each.centred.half for each in measured]),
            *(map(_number, np.array([each.classes for each in measured]).T) if classes else ()),
            *((_number([result.accuracy for result in found[network].values()]),)
              if state == "after" else ())))
    return rows


def _over_standard(network: Network, found: Found, state: str, name: str = "kernel") -> Interval:
    """Return by how much a kernel is higher than the standard network's, of the same seeds."""
    ours, standard = (found.get(each, {}) for each in
                      (network, Network(network.dataset, "standard", None)))
    return interval(np.array([getattr(getattr(ours[seed], state), name).height
                              - getattr(getattr(standard[seed], state), name).height
                              for seed in sorted(ours.keys() & standard.keys())]))


def _number(values: Any) -> str:
    return number(interval(np.asarray(values, np.float64)), 2)


def _signed(found: Interval) -> str:
    if np.isnan(found.mean):
        return "-"
    return f"{found.mean:+.2f}" + ("" if np.isnan(found.reach) else f" +-{found.reach:.2f}")


def _angle(values: list[float]) -> str:
    """Return the mean angle, "never", or in how many of the seeds it is reached."""
    finite = np.array([each for each in values if np.isfinite(each)])
    if not len(finite):
        return "never"
    if finite.max() <= BIN / 2:  # within the first bin, where the curve is not known
        return f"< {BIN / 2:g}"
    return (number(interval(finite), 0)
            + ("" if len(finite) == len(values) else f" ({len(finite)} of {len(values)})"))


def _explained(config: NtkConfig) -> str:
    return ("K: the cosine of two Jacobians, against the angle of the inputs; means over seeds "
            "with 95 % intervals\n"
            "half at: degrees at which K has fallen to 1/2 (60 if it is linear); height: its mean "
            f"between 0 and 90 degrees ({2 / np.pi:.2f} if linear)\n"
            "forward, backward: heights of the cosines of x_{l-1} and of d a_L / d a_l, whose "
            "product is what W_l contributes; means over layers by their share of K\n"
            "centred: K less its means over the inputs; classes: the probability that two images "
            "of a class have a larger cosine, K or centred K than two of different classes")


def _equation_11(found: Found) -> list[str]:
    """Return the lines on eq. (11), of the random networks."""
    lines = []
    for network, of_seeds in found.items():
        if network.dataset is not None or network.model not in ("standard", "comet"):
            continue
        results = list(of_seeds.values())
        off, sign = np.mean([each.before.printed for each in results], axis=0).T
        name = network.model + ("" if network.p_k is None else f" p_k = {network.p_k:g}")
        lines.append(f"{name}: with x_{{l-1}} within {max(each.full for each in results):.0e} of "
                     f"the full Jacobian; with a_{{l-1}} off by {100 * off.min():.0f} % to "
                     f"{100 * off.max():.0f} % (l = 2..L), of the other sign for up to "
                     f"{100 * sign.max():.0f} % of the pairs")
    return ["eq. (11), Figure 2's inputs\n" + "\n".join(lines)] if lines else []


def _verdict(found: Found) -> list[str]:
    """Return the answer: how many of COMET's kernels are narrower than the standard network's."""
    lines = []
    for state in ("before", "after"):
        for name in ("kernel", "centred"):
            leads = [_over_standard(network, found, state, name)
                     for network, of_seeds in found.items() if network.model == "comet"
                     and all(getattr(each, state) is not None for each in of_seeds.values())]
            leads = [lead for lead in leads if not np.isnan(lead.reach)]
            if leads:
                lower = sum(lead.mean < 0 and lead.excludes_zero for lead in leads)
                lines.append(f"{state.capitalize()} training {lower} of {len(leads)} "
                             f"{'centred ' * (name == 'centred')}kernels of COMET are lower than "
                             "the standard network's (interval without 0), from which they "
                             f"differ by {min(lead.mean for lead in leads):+.2f} to "
                             f"{max(lead.mean for lead in leads):+.2f}.")
    return ["\n".join(lines)] if lines else []


def draw(config: NtkConfig, out: Path) -> list[Path]:
    """Draw the kernels against the angle, and the heights of their factors layer by layer."""
    plt = figures.pyplot()
    found = read(config, out)
    figure, panels = plt.subplots(2, 3, figsize=(9.4, 6.2))
    colors = plt.get_cmap("YlOrRd_r")(np.linspace(0.05, 0.75, len(config.p_k)))
    looks = {network: ((colors[config.p_k.index(network.p_k)], f"COMET, $p_k$ = {network.p_k:g}")
                       if network.p_k is not None else figures.LOOKS[network.model])
             for network in found if network.model in ("standard", "centred", "comet")}
    for axes, dataset, state, name, title in (
            (panels[0, 0], None, "before", "kernel", "Figure 2's inputs: kernel"),
            (panels[0, 1], None, "before", "centred", "Figure 2's inputs: centred kernel"),
            (panels[1, 0], config.dataset, "before", "kernel",
             f"{config.dataset}: kernel, before training"),
            (panels[1, 1], config.dataset, "after", "kernel",
             f"{config.dataset}: kernel, after training"),
            (panels[1, 2], config.dataset, "after", "centred",
             f"{config.dataset}: centred kernel, after")):
        for network, (color, label) in looks.items():
            if network.dataset == dataset:
                curves = [getattr(measured, name) for each in found[network].values()
                          if (measured := getattr(each, state)) is not None]
                if curves:
                    _draw_curves(axes, curves, color, label)
        angles = np.arange(0, 181, BIN)
        axes.plot(angles, np.cos(np.radians(angles)), color="0.6", linewidth=0.8, linestyle=":",
                  label="linear network")
        axes.axhline(0.5 * (name == "kernel"), color="0.85", linewidth=0.6, zorder=0)
        axes.set_xlim(0, 125)
        axes.set_ylim(-0.45 if name == "centred" else 0, 1.03)
        axes.set_xlabel("angle of the inputs, degrees")
        axes.set_title(title)
    _draw_layers(panels[0, 2], found, looks)
    named = {label: line for axes in panels.flat
             for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=5)
    training = config.training
    figure.suptitle(textwrap.fill(
        f"ntk: normalised kernels (trace), {config.activation}; {config.hidden} x {config.width} "
        f"without biases, {config.points} inputs; {config.dataset}: {config.image_hidden} x "
        f"{config.image_width}, {training.optimizer.name}, lr {training.lr:g}, batch "
        f"{training.batch}, epochs {training.epochs}, {config.train} training images, measured on "
        f"{config.images}; {config.seeds} seeds, band: lowest to highest", 150), fontsize=8)
    return [figures.save(figure, out / "ntk.png")]


def _draw_curves(axes: Any, curves: list[Curve], color: Any, label: str) -> None:
    """Draw a kernel from all seeds, at the angles that each has."""
    shared = sorted(set.intersection(*(set(curve.angles) for curve in curves)))
    values = np.array([curve.values[np.isin(curve.angles, shared)] for curve in curves])
    figures.seed_band(axes, np.array([0, *shared]),
                      np.column_stack([np.ones(len(values)), values]), color, label)


def _draw_layers(axes: Any, found: Found, looks: dict[Network, tuple[Any, str]]) -> None:
    """Draw the mean heights of both factors of what W_l contributes, on Figure 2's inputs."""
    for network, (color, _) in looks.items():
        if network.dataset is None:
            for name, line in (("forward", "-"), ("backward", "--")):
                heights = np.array([[curve.height for curve in getattr(each.before, name)]
                                    for each in found[network].values()]).mean(axis=0)
                axes.plot(1 + np.arange(len(heights)), heights, color=color, linestyle=line)
    for label, line in (("cosine of $x_{l-1}$", "-"), ("cosine of $da_L / da_l$", "--")):
        axes.plot([], [], color="0.3", linestyle=line, label=label)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("layer $l$")
    axes.set_ylabel("mean between 0 and 90 degrees")
    axes.set_title("Figure 2's inputs: factors of $W_l$'s part")


EXPERIMENT = Experiment(
    "ntk", NtkConfig,
    {"smoke": {"dataset": "glyphs", "models": ("standard", "comet"), "p_k": (0.1, 0.5),
               "points": 12, "width": 48, "hidden": 4, "images": 20, "image_width": 32,
               "image_hidden": 2, "train": 300, "validation": 200, "epochs": 1, "seeds": 2},
     "paper": {"models": MODELS, "p_k": (0.05, 0.1, 0.25, 0.5, 0.75, 0.9), "points": 200,
               "image_width": 1000, "images": 500, "train": None, "validation": None, "lr": 1e-3,
               "epochs": 100, "seeds": 10}},
    lambda config: (config.dataset,), cells, run_cell, draw, table)
