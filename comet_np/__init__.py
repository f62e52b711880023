"""COMET-NP: the reference implementation of COMET, autodiff-free, on NumPy and CuPy.

Read ``comet_np.functional.routing`` first: it holds equations (3)-(6) of the paper; then
``comet_np.functional.hidden``, equations (7) and (8).
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "backends" / "numpy_backend.py").is_file():
    # A plain checkout: `backends/`, `experiments/` and `benchmarks/` lie beside this package and
    # are installed inside it, so make them importable under their installed names here too.
    __path__.append(str(_ROOT))

from .functional.routing import kwta_mask  # noqa: E402  (needs the path above)

__version__ = "0.8.0"
__all__ = ["__version__", "diagnose", "diagnose_module", "fit", "kwta_mask",
           "load_run"]  # not what needs scikit-learn

_MODULES = ("backends", "experiments", "functional", "gates", "gradcheck", "interop", "models",
            "optim")
_LATER = {"diagnose": "conformance.diagnose", "diagnose_module": "conformance.modules",
          "fit": "experiments.fit", "load_run": "experiments.training.model",
          "CometClassifier": "experiments.estimators", "CometRegressor": "experiments.estimators"}


def __getattr__(name: str) -> _Any:
    """Return what is imported when it is asked for: readers of the equations need none of it."""
    if name in _MODULES:
        return _import_module(f".{name}", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f".{_LATER[name]}", __name__), name)
