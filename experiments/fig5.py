"""Figure 5: SVHN, ViT and MLP-Mixer."""

from .vision import figure

EXPERIMENT = figure("fig5", "svhn")
