"""COMET-NP: the reference implementation of COMET, autodiff-free, on NumPy and CuPy.

Read ``comet_np.functional.routing`` first: it holds equations (3)-(6) of the paper; then
``comet_np.functional.hidden``, equations (7) and (8).
"""

from pathlib import Path as _Path

_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "backends" / "numpy_backend.py").is_file():
    # A plain checkout: `backends/`, `experiments/` and `benchmarks/` lie beside this package and
    # are installed inside it, so make them importable under their installed names here too.
    __path__.append(str(_ROOT))

from .functional.routing import kwta_mask  # noqa: E402  (needs the path above)

__version__ = "0.2.0"
__all__ = ["__version__", "kwta_mask"]
