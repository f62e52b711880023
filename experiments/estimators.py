"""COMET with scikit-learn's interface: `CometClassifier` and `CometRegressor`."""

from typing import Any

import numpy as np

from .. import settings
from ..errors import UserError, unknown
from ..models.mlp import MLPConfig
from ..settings import fitting
from .datasets.own import from_arrays
from .fit import trained_on
from .training import RunConfig, TrainConfig
from .variants import VARIANTS

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
except ImportError:
    raise UserError("CometClassifier and CometRegressor need scikit-learn 1.6 or newer: "
                    "python -m pip install scikit-learn; comet_np.fit needs it not") from None

Array = Any


_PARAMETERS = """Parameters
    ----------
    widths : tuple of int
        N_l of the hidden layers.
    p_k : float
        Proportion of neurons that stay active.
    model : str
        "comet", or another model of the paper: see `comet_np.experiments.variants.VARIANTS`.
    activation, bias
        See `comet_np.models.mlp.MLPConfig`.
    optimizer, lr, epochs, batch, weight_decay
        See `comet_np.experiments.training.TrainConfig` and `comet_np.optim.OptimizerConfig`.
    precision : str
        "float64", so that predictions do not depend on which examples are predicted together, as
        scikit-learn asks; "float32" takes half the time.
    backend : str
        "numpy" or "cupy".
    random_state : int, RandomState or None
        Of the initial weights and the order of the examples.

    Attributes
    ----------
    trained_ : Trained
        The network with its weights, its metrics, and `save`.
"""


class _CometEstimator(BaseEstimator):
    """What both estimators share."""

    def __init__(self, widths: tuple[int, ...] = (200, 200), *, p_k: float = 0.5,
                 model: str = "comet", activation: str = "softplus", bias: bool = True,
                 optimizer: str = "adam", lr: float = 1e-3, epochs: int = 50, batch: int = 32,
                 weight_decay: float = 0.0, precision: str = "float64", backend: str = "numpy",
                 random_state: Any = None) -> None:
        self.widths, self.p_k, self.model = widths, p_k, model
        self.activation, self.bias = activation, bias
        self.optimizer, self.lr, self.epochs, self.batch = optimizer, lr, epochs, batch
        self.weight_decay, self.precision, self.backend = weight_decay, precision, backend
        self.random_state = random_state

    def _fit(self, x: Array, y: Array, task: str) -> None:
        if self.model not in VARIANTS:
            raise unknown("model", self.model, VARIANTS)
        widths = fitting("widths", tuple[int, ...], self.widths)
        seed = int(check_random_state(self.random_state).randint(2**31))
        data = from_arrays(x, y, task, validation=False)
        standard = MLPConfig((x.shape[1], *widths, data.outputs),
                             fitting("activation", str, self.activation), None,
                             fitting("bias", bool, self.bias))
        training = settings.build(TrainConfig, {
            name: getattr(self, name)
            for name in ("optimizer", "lr", "epochs", "batch", "weight_decay", "precision")})
        config = VARIANTS[self.model](RunConfig(standard, training, seed),
                                      fitting("p_k", float, self.p_k), "strict")
        self.trained_ = trained_on(data, config, self.backend)

    def _checked(self, x: Array) -> np.ndarray:
        check_is_fitted(self)
        checked: np.ndarray = validate_data(self, x, reset=False)
        return checked


class CometClassifier(ClassifierMixin, _CometEstimator):
    __doc__ = f"""A masked MLP that tells classes apart, with scikit-learn's interface.

    {_PARAMETERS}    classes_ : array (C,)
        The labels.
    """

    def fit(self, X: Array, y: Array) -> "CometClassifier":
        """Train on inputs (n, N_0) and labels (n,)."""
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        self.classes_ = np.unique(y)
        self._fit(X, y, "classification")
        return self

    def predict_proba(self, X: Array) -> np.ndarray:
        """Return the probability of each class: (n, C)."""
        X = self._checked(X)
        return self.trained_.predict_proba(X)

    def predict(self, X: Array) -> np.ndarray:
        """Return the likeliest class of each example: (n,)."""
        best = self.predict_proba(X).argmax(axis=1)
        labels: np.ndarray = self.classes_[best]
        return labels


class CometRegressor(RegressorMixin, _CometEstimator):
    __doc__ = f"""A masked MLP that predicts numbers, with scikit-learn's interface.

    {_PARAMETERS}    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Array, y: Array) -> "CometRegressor":
        """Train on inputs (n, N_0) and targets (n,) or (n, outputs)."""
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True)
        self._two_axes = y.ndim == 2
        self._fit(X, y, "regression")
        return self

    def predict(self, X: Array) -> np.ndarray:
        """Return the predicted targets, in the shape of those of `fit`."""
        X = self._checked(X)
        y = self.trained_.predict(X)
        return y.reshape(len(y), -1) if self._two_axes else y
