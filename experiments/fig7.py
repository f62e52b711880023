"""Figure 7: CIFAR100, ViT and MLP-Mixer."""

from .vision import figure

EXPERIMENT = figure("fig7", "cifar100")
