"""Figure 6: CIFAR10, ViT and MLP-Mixer."""

from .vision import figure

EXPERIMENT = figure("fig6", "cifar10")
