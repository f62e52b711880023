"""Figure 7: CIFAR100, ViT and MLP-Mixer."""

from .vision import figure

EXPERIMENT = figure("fig7", "cifar100", epochs=4, mixer_epochs=4)
