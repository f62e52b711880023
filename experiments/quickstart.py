"""The quickstart: COMET, the standard MLP and a control on built-in data."""

from .grid_report import grid

EXPERIMENT = grid(
    "quickstart",
    smoke={"widths": (100,), "p_k": (0.5,), "seeds": 2, "epochs": 2, "train": 1000},
    paper={"widths": (1000,), "seeds": 10, "epochs": 20},
)
