"""What all figures share: matplotlib loaded late, one look, curves with seed bands."""

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

# The models of `variants`: colour and name.
LOOKS = {"standard": ("#4c6a92", "standard"), "comet": ("#d9622b", "COMET"),
         "centred": ("#7d5a9e", "standard, $f - f(0)$"), "scaled": ("#7a9a4a", "standard, $p_k f$"),
         "smaller": ("#2f9c95", "smaller"), "dropout": ("#a8743d", "dropout"),
         "top-k": ("#c2477f", "top-k"), "layerwise": ("#5b8c2a", "layer-wise routing"),
         "bernoulli": ("#8a8a8a", "Bernoulli masking"),
         "example-tied": ("#c9a227", "example-tied dropout")}


def look(model: str, number: int) -> tuple[str, str]:
    """Return the colour and the name of a model, the `number`-th of a figure."""
    return LOOKS.get(model, (f"C{number}", model))  # one of the user's own


def plain(text: str) -> str:
    """Return a user's text for a figure, whose dollars are no formulas."""
    return text.replace("$", r"\$")


def pyplot() -> Any:
    """Return matplotlib.pyplot, for files only, in this project's look.

    Raises
    ------
    UserError
        If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError('figures need matplotlib: pip install "comet-np[plots]", then draw this '
                        "one with: comet-np plot") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 130, "font.size": 8, "axes.titlesize": 8,
                         "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25, "legend.fontsize": 7,
                         "legend.frameon": False, "figure.constrained_layout.use": True})
    return plt


def seed_band(axes: Any, x: np.ndarray, curves: np.ndarray, color: Any, label: str) -> None:
    """Draw the mean of the curves (seeds, points) and the band from their lowest to highest."""
    axes.plot(x, curves.mean(axis=0), color=color, label=label, linewidth=1.4)
    if len(curves) > 1:
        axes.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.2,
                          linewidth=0)


def save(figure: Any, file: Path) -> Path:
    """Write the figure as PNG, free its memory, and return the file's path."""
    try:
        figure.savefig(file)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}): choose another folder with --out"
                        ) from error
    finally:
        pyplot().close(figure)
    return file
