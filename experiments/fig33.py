"""Figure 33: SARCOS, 4-layer MLP, SGD with learning rate 1e-2."""

from .grid_report import PAPER_LEVELS, PAPER_MODELS, grid

EXPERIMENT = grid(
    "fig33",
    smoke={"datasets": ("arm",), "widths": (50, 100), "p_k": (0.1, 0.5), "seeds": 1, "epochs": 1,
           "train": 500},
    laptop={"datasets": ("sarcos",), "widths": (100, 500, 1000), "lr": 1e-2, "epochs": 20,
            **PAPER_LEVELS},
    paper={"datasets": ("sarcos",), "widths": (100, 500, 1000), "lr": 1e-2, "epochs": 50,
           **PAPER_LEVELS, **PAPER_MODELS},
)
