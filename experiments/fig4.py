"""Figure 4: CIFAR10, 4-layer MLP, SGD with learning rate 1e-4."""

from .grid_report import PAPER_LEVELS, PAPER_MODELS, grid

EXPERIMENT = grid(
    "fig4",
    smoke={"datasets": ("glyphs",), "widths": (50, 100), "p_k": (0.1, 0.5), "seeds": 1,
           "epochs": 1, "train": 500, "lr": 1e-3},
    laptop={"datasets": ("cifar10",), "widths": (100, 500, 1000), "lr": 1e-3, "epochs": 10,
            "train": 10_000, **PAPER_LEVELS},
    paper={"datasets": ("cifar10",), "widths": (100, 500, 1000, 3000), "lr": 1e-4, "epochs": 100,
           **PAPER_LEVELS, **PAPER_MODELS},
)
