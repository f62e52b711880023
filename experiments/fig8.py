"""Figure 8: Tiny ImageNet, ViT and MLP-Mixer.

The paper's patch of 4 cuts its 64x64 pixels into 256 tokens.
"""

from .vision import figure

EXPERIMENT = figure("fig8", "tiny_imagenet", patch=16, epochs=4,
                    mixer_epochs=4)
