"""The masks of many images in a random COMET network, for the experiments that look at masks."""

from typing import Any, NamedTuple

import numpy as np

from ..functional.packing import unpacked
from ..gates import EVALUATION, Comet
from ..models import mlp
from ..rng import stream
from .datasets.base import Factor, scaled
from .experiment import Place
from .grid import DataCell, load
from .training.examples import BLOCK, blocks

PIXELS = 3072


class Images(NamedTuple):
    """Images x, uint8 (n, 3072), their classes y (n,), and how pixels are scaled."""

    x: np.ndarray
    y: np.ndarray
    scale: Factor
    shift: Factor


def some_images(name: str, place: Place, seed: int, count: int | None) -> Images:
    """Return so many of all images of a data set (of all splits), or all, in random order."""
    data = load(DataCell(name, None, None, None, None, ""), place)
    x, y = (np.concatenate([part for part in parts if part is not None])
            for parts in ((data.x_train, data.x_val, data.x_test),
                          (data.y_train, data.y_val, data.y_test)))
    chosen = stream(seed, "images").permutation(len(x))[:count]
    return Images(x[chosen], y[chosen], data.scale, data.shift)


def network(width: int, hidden: int, p_k: float) -> mlp.MLPConfig:
    """Return the shape of an MLP for images of which only the routing is used."""
    return mlp.MLPConfig((PIXELS, *[width] * hidden, 1), gate=Comet(p_k))


def network_work(width: int, hidden: int) -> float:
    """Return the operations of one image in the routing network."""
    return 2.0 * width * (PIXELS + (hidden - 1) * width)


def masks_of(images: Images, config: mlp.MLPConfig, seed: int, place: Place) -> list[np.ndarray]:
    """Return the masks of the images in each hidden layer, bool (n, N) on the host."""
    gate: Any = config.gate
    fixed = gate.init(config.widths, seed, place.backend, "float32")
    layers: list[list[np.ndarray]] = [[] for _ in config.widths[1:-1]]
    for rows in blocks(len(images.x), BLOCK):
        place.raise_if_stopped()
        x = scaled(place.backend.asarray(images.x[rows]), images.scale, images.shift, "float32")
        for layer, m, N in zip(layers, gate.masks(x, fixed, config, EVALUATION),
                               config.widths[1:-1], strict=True):
            layer.append(place.backend.to_host(unpacked(m, N)))
    return [np.concatenate(layer) for layer in layers]
