"""Figure 11: CIFAR10, 4-layer MLP, SGD with learning rate 1e-3."""

from .grid_report import PAPER_LEVELS, PAPER_MODELS, grid

EXPERIMENT = grid(
    "fig11",
    smoke={"datasets": ("glyphs",), "widths": (50, 100), "p_k": (0.1, 0.5), "seeds": 1,
           "epochs": 1, "train": 500},
    laptop={"datasets": ("cifar10",), "widths": (100, 500, 1000), "lr": 1e-2, "epochs": 10,
            "train": 10_000, **PAPER_LEVELS},
    paper={"datasets": ("cifar10",), "widths": (100, 500, 1000, 3000, 9000), "lr": 1e-3,
           "epochs": 100, **PAPER_LEVELS, **PAPER_MODELS},
)
