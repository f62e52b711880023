"""Figure 4: CIFAR10, 4-layer MLP, SGD with learning rate 1e-4."""

from .grid_report import CIFAR10_LAPTOP, PAPER_LEVELS, PAPER_MODELS, SMOKE, grid

EXPERIMENT = grid(
    "fig4",
    smoke=SMOKE | {"lr": 1e-3},
    laptop=CIFAR10_LAPTOP | {"lr": 1e-2},
    paper={"datasets": ("cifar10",), "widths": (100, 500, 1000, 3000), "lr": 1e-4, "epochs": 100,
           "models": PAPER_MODELS, **PAPER_LEVELS},
)
