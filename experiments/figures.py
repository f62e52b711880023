"""What all figures share: matplotlib loaded late, one look, curves with seed bands."""

import errno
import importlib
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import CheckpointError, write_atomically
from ..errors import UserError, of_system

# The models of `variants`, and that of `ewc`: colour and name.
LOOKS = {"standard": ("#4c6a92", "standard"), "comet": ("#d9622b", "COMET"),
         "comet-stream": ("#8c1d18", "COMET, one stream"),
         "comet-exact": ("#e0a458", "COMET, exact routing"),
         "comet-block-diagonal": ("#f0956b", "COMET, block-diagonal router"),
         "centred": ("#7d5a9e", "standard, $f - f(0)$"), "scaled": ("#7a9a4a", "standard, $p_k f$"),
         "smaller": ("#2f9c95", "smaller"), "dropout": ("#a8743d", "dropout"),
         "top-k": ("#c2477f", "top-k"), "layerwise": ("#5b8c2a", "layer-wise routing"),
         "moe": ("#3b3b98", "MoE, trained gate"), "moe-fixed": ("#9aa0e0", "MoE, fixed gate"),
         "l1": ("#704214", "L1"),
         "bernoulli": ("#8a8a8a", "Bernoulli masking"),
         "example-tied": ("#c9a227", "example-tied dropout"),
         "ewc": ("#222222", "standard with EWC")}


def look(model: str, number: int) -> tuple[str, str]:
    """Return the colour and the name of a model, the `number`-th of a figure."""
    return LOOKS.get(model, (f"C{number}", plain(model)))  # one of the user's own


def plain(text: str) -> str:
    """Return a text of the user's for a title, in which a ``$`` begins no formula."""
    return text.replace("$", r"\$")


def matplotlib(need: str) -> Any:
    """Return matplotlib, also where MPLBACKEND names a backend that it does not know.

    Raises
    ------
    UserError
        If it is not installed: `need` says what for.
    """
    chosen = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        loaded = importlib.import_module("matplotlib")
    except ImportError:
        raise UserError(f"{need}: python -m pip install matplotlib") from None
    finally:
        if chosen is not None:
            os.environ["MPLBACKEND"] = chosen
    if chosen:
        with suppress(ValueError):  # it is for windows, which we do not open
            loaded.rcParams["backend"] = chosen
    return loaded


def pyplot() -> Any:
    """Return matplotlib.pyplot, for files only, in this project's look.

    Raises
    ------
    UserError
        If matplotlib is not installed.
    """
    matplotlib("figures need matplotlib, with which comet-np plot draws this one").use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 130, "font.size": 8, "axes.titlesize": 8,
                         "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25, "legend.fontsize": 7,
                         "legend.frameon": False, "figure.constrained_layout.use": True})
    return plt


def seed_band(axes: Any, x: np.ndarray, curves: np.ndarray, color: Any, label: str,
              strong: bool = True, dashed: bool = False) -> None:
    """Draw the mean of the curves (seeds, points) and the band from their lowest to highest.

    Of many curves the `strong` ones lie above the others, which are thin.
    """
    axes.plot(x, curves.mean(axis=0), color=color, label=label, linewidth=1.5 if strong else 0.8,
              linestyle="--" if dashed else "-", zorder=3 if strong else 2)
    if len(curves) > 1:
        axes.fill_between(x, curves.min(axis=0), curves.max(axis=0), color=color,
                          alpha=0.2 if strong else 0.08, linewidth=0)


def save(figure: Any, file: Path) -> Path:
    """Write the figure as PNG, whole or not at all, free its memory, and return the file's path.

    Raises
    ------
    UserError
        If it cannot be written.
    """
    try:
        png = io.BytesIO()
        figure.savefig(png, format="png")
        write_atomically(file, png.getbuffer())
    except CheckpointError as error:
        raise UserError(_unwritten(file, error.__cause__)) from error
    finally:
        pyplot().close(figure)
    return file


def _unwritten(file: Path, error: Any) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):  # of a finished run, say
        return (f"the figure cannot be written to {file} ({error.strerror}): copy the folder to "
                "where you may write, and draw it there with: comet-np plot --out COPY")
    return of_system("write the figure", file, error)
