"""Figure 33: SARCOS, 4-layer MLP, SGD with learning rate 1e-2."""

from .grid_report import PAPER_LEVELS, PAPER_MODELS, SMOKE, grid

EXPERIMENT = grid(
    "fig33",
    smoke=SMOKE | {"datasets": ("arm",)},
    laptop={"datasets": ("sarcos",), "widths": (100, 500, 1000), "lr": 1e-2, "epochs": 10,
            "models": PAPER_MODELS, **PAPER_LEVELS},
    paper={"datasets": ("sarcos",), "widths": (100, 500, 1000), "lr": 1e-2, "epochs": 50,
           "models": PAPER_MODELS, **PAPER_LEVELS},
)
