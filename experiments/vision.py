"""Figures 5 to 8: ViT and MLP-Mixer on images, standard and with COMET in the MLPs of their blocks.

The settings are those of the paper (Sec. 4.2.2) and of the code on which it builds, but for these:
the cosine schedule is the plain one, from the first epoch to 0, which that code steps two epochs
late; there is no RandAugment; products are in float32, where that code has mixed precision, for
which there is --precision.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError, unknown
from ..models.mixer import MixerConfig
from ..models.vit import ViTConfig
from ..optim import OptimizerConfig
from ..settings import option
from . import datasets
from .datasets import Dataset
from .experiment import Experiment, Place
from .grid import Comparison, GridCell, Panel, load, sizes_of
from .grid_report import grid
from .training import TrainConfig, train
from .training.examples import BLOCK, blocks
from .variants import VARIANTS_OF_BLOCKS, Variant

ARCHITECTURES = ("vit", "mixer")


@dataclass(frozen=True)
class VisionConfig(Comparison):
    """ViT and MLP-Mixer; the defaults are the paper's.

    The MLP of a block of ViT has H hidden neurons. Of the MLP-Mixer tokens have the width D, the
    token mixing's MLP has four times as many hidden neurons as there are tokens, the channel
    mixing's D / 2, as in the code on which the paper builds.
    """

    datasets: tuple[str, ...] = option(("cifar10",), "data sets of images, see: comet-np data")
    models: tuple[str, ...] = option(("standard", "comet"),
                                     f"models to compare, of {', '.join(VARIANTS_OF_BLOCKS)}")
    p_k: tuple[float, ...] = option((0.5,), "proportion of neurons that stay active")
    architectures: tuple[str, ...] = option(ARCHITECTURES, f"of {' and '.join(ARCHITECTURES)}")
    vit_hidden: tuple[int, ...] = option((512, 3072, 6144), "hidden neurons of a ViT's MLPs, H")
    mixer_widths: tuple[int, ...] = option((512, 3072), "width of an MLP-Mixer's tokens, D")
    vit_width: int = option(512, "width of a ViT's tokens")
    heads: int = option(8, "attention heads of a ViT")
    vit_dropout: float = option(0.1, "rate of dropout in a ViT")
    depth: int = option(6, "blocks")
    patch: int = option(4, "side of a patch, in pixels")
    activation: str = option("tanh", "activation f of the MLPs")
    mixer_lr: float = option(1e-3, "highest learning rate for the MLP-Mixer; --lr is the ViT's")
    mixer_epochs: int = option(500, "epochs of the MLP-Mixer; --epochs are the ViT's")
    training: TrainConfig = field(default=TrainConfig(
        OptimizerConfig("adam"), 1e-4, "cosine", batch=512, epochs=200, augment="crop_flip"))

    variants: ClassVar[dict[str, Variant]] = VARIANTS_OF_BLOCKS
    said: ClassVar[tuple[str, ...]] = (*Comparison.said, "architectures", "vit_hidden",
                                       "mixer_widths", "mixer_lr", "mixer_epochs")
    shown: ClassVar[tuple[str, ...]] = ("lr", "batch", "epochs", "vit_width", "heads",
                                        "vit_dropout", "depth", "patch", "activation", "schedule",
                                        "augment")
    only: ClassVar[dict[str, str]] = dict.fromkeys(("vit_width", "heads", "vit_dropout"), "vit")
    kind_name: ClassVar[str] = "network"
    target: ClassVar[None] = None
    task: ClassVar[None] = None

    def __post_init__(self) -> None:
        for name in self.architectures:
            if name not in ARCHITECTURES:
                raise unknown("architecture", name, ARCHITECTURES)
        for name in self.datasets:
            check_images(name, "--datasets")
        if min(self.mixer_widths, default=2) < 2:
            raise UserError("--mixer-widths are each at least 2, as the channel mixing has half as "
                            f"many hidden neurons, got {min(self.mixer_widths)}")
        super().__post_init__()

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.architectures

    @property
    def across(self) -> str:
        return "size"

    def sizes(self, kind: str) -> tuple[int, ...]:
        return self.vit_hidden if kind == "vit" else self.mixer_widths

    def letter(self, kind: str) -> str:
        return "H" if kind == "vit" else "D"

    def standard(self, panel: Panel) -> ViTConfig | MixerConfig:
        sizes, size = sizes_of(self, panel.dataset), panel.size
        shared: dict[str, Any] = {"image": sizes.image, "patch": self.patch, "depth": self.depth,
                                  "classes": sizes.outputs, "activation": self.activation,
                                  "gate": None}
        if panel.kind == "vit":
            return ViTConfig(**shared, width=self.vit_width, heads=self.heads, hidden=size,
                             dropout=self.vit_dropout, hidden_dropout=self.vit_dropout)
        tokens = MixerConfig(**shared).tokens
        return MixerConfig(**shared, width=size, token_hidden=4 * tokens, hidden=size // 2)

    def training_of(self, kind: str) -> TrainConfig:
        if kind == "vit":
            return self.training
        return replace(self.training, lr=self.mixer_lr, epochs=self.mixer_epochs)


def check_images(name: str, flag: str) -> None:
    """Raise a UserError, which says to give another flag, unless a data set has images to classify.
    """
    sizes = datasets.sizes_of(name)
    if sizes.image is None or sizes.task != "classification":
        raise UserError(f"{name} has no images to classify: choose others by {flag}")


def normalised(data: Dataset) -> Dataset:
    """Return images whose colours are normalised by those for training.

    The mean is that of all pixels, the deviation the mean of that within an image: of CIFAR10 the
    (0.4914, 0.4822, 0.4465) and (0.2023, 0.1994, 0.2010) of the code on which the paper builds.
    """
    assert data.image is not None
    moments = []
    for block in blocks(len(data.x_train), BLOCK):
        x = data.x_train[block].reshape(-1, data.image[0], math.prod(data.image[1:])) / 255
        moments.append(np.array([x.mean(axis=2), x.std(axis=2)]))  # (2, images, colours)
    # To four digits, as they are published: sums differ in the last ones from machine to machine.
    mean, std = np.concatenate(moments, axis=1).mean(axis=1).round(4).tolist()
    return data.normalised(tuple(mean), tuple(std))


def run_cell(spec: GridCell, place: Place) -> dict[str, Any]:
    """Train the cell's model on normalised images."""
    return train(spec.run, normalised(load(spec, place)), place.folder, place.backend,
                 place.progress, place.stop)


SMOKE = {"datasets": ("glyphs",), "vit_hidden": (24,), "mixer_widths": (16,), "vit_width": 16,
         "heads": 2, "depth": 2, "patch": 16, "seeds": 2, "train": 300, "validation": 200,
         "batch": 50, "epochs": 2, "mixer_epochs": 2, "lr": 1e-3}


def figure(name: str, dataset: str, **laptop: Any) -> Experiment:
    """Return the experiment of a figure."""
    return grid(name, VisionConfig, run_cell, smoke=SMOKE, paper={"datasets": (dataset,)},
                laptop=LAPTOP | {"datasets": (dataset,)} | laptop)


LAPTOP = {"vit_hidden": (128, 768), "mixer_widths": (128, 384), "vit_width": 128, "heads": 4,
          "depth": 3, "patch": 8, "seeds": 3, "train": 10_000, "validation": 2000, "batch": 50,
          "epochs": 8, "mixer_epochs": 8, "lr": 1e-3, "mixer_lr": 2e-3, "vit_dropout": 0.0,
          "augment": "flip"}
