"""Training on arrays of one's own, in one call."""

import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import settings
from ..backends import Backend, get_backend
from ..errors import UserError, of_system, user_path
from ..gates import Comet, Gate
from ..models.mlp import MLPConfig
from ..settings import fitting, record
from .datasets import Dataset
from .datasets.own import from_arrays
from .files import RESULT, finish, locked
from .progress import Progress
from .tasks import task as task_of
from .training import Diverged, RunConfig, TrainConfig, run_work, train
from .training.model import Data, Trained, load_run

Array = Any

COMET = Comet(p_k=0.5)
DEFAULTS = {"optimizer": "adam", "lr": 1e-3, "epochs": 50}  # what differs from TrainConfig


def fit(x: Array, y: Array, *, gate: Gate | None = COMET, widths: tuple[int, ...] = (200, 200),
        activation: str = "softplus", bias: bool = True, dropout: float = 0.0,
        task: str | None = None, validation: bool = True, seed: int = 0,
        backend: str | Backend = "numpy", folder: str | Path | None = None,
        progress: bool = True, **training: Any) -> Trained:
    """Train an MLP on arrays and return it.

    >>> import numpy as np, comet_np
    >>> x = np.random.default_rng(0).normal(size=(500, 4))
    >>> model = comet_np.fit(x, x[:, 0] * x[:, 1], epochs=2, progress=False)
    >>> model.predict(x[:3]).shape
    (3,)

    Parameters
    ----------
    x : array (n, N_0) of numbers
        Standardised here, column by column; predictions take inputs as these are.
    y : array (n,) or (n, outputs)
        Real numbers: a regression. Strings, whole numbers, booleans: classes.
    gate : Gate or None
        Where the masks come from, see `comet_np.gates`; None is the standard MLP.
    widths : tuple of int
        N_l of the hidden layers.
    activation, bias, dropout
        See `comet_np.models.mlp.MLPConfig`.
    task : {"classification", "regression"}, optional
        If the type of `y` says it wrongly.
    validation : bool
        Whether to hold out 20 % of the examples, on which each epoch is measured.
    seed : int
        Of the initial weights, the order of the examples, and which are held out.
    backend : str or Backend
        "numpy" or "cupy".
    folder : path, optional
        Where checkpoints and the finished run are kept: called again, a stopped training goes on
        there, and a finished one is read.
    progress : bool
        Whether to show a line with the time left, on a terminal, and what is odd about the data.
    **training
        Settings of `TrainConfig` and `OptimizerConfig` by the names of their flags: lr, epochs,
        batch, optimizer, weight_decay, ... The defaults are Adam, lr 1e-3, 50 epochs, batch 32.

    Returns
    -------
    Trained
        With `predict`, `predict_proba`, `save`, and the metrics of each epoch.

    Raises
    ------
    UserError
        If an array or a setting does not fit, or the folder holds another run.
    Diverged
        If the loss is no longer finite.
    """
    if "p_k" in training:
        raise UserError("p_k is a setting of the gate: fit(x, y, gate=comet_np.gates.Comet(p_k="
                        f"{training['p_k']}))")
    widths = fitting("widths", tuple[int, ...], widths)
    seed = fitting("seed", int, seed)
    data = from_arrays(x, y, task, validation, seed)
    config = RunConfig(
        MLPConfig((data.x_train.shape[1], *widths, data.outputs),
                  fitting("activation", str, activation), gate, fitting("bias", bool, bias),
                  fitting("dropout", float, dropout)),
        settings.build(TrainConfig, DEFAULTS | training), seed)
    return trained_on(data, config, backend, folder, progress)


def trained_on(data: Dataset, config: RunConfig, backend: str | Backend = "numpy",
               folder: str | Path | None = None, progress: bool = False) -> Trained:
    """Train as `config` says and return the model; `backend`, `folder`, `progress` as in `fit`."""
    place = get_backend(backend) if isinstance(backend, str) else backend
    if folder is not None:
        return _trained(data, config, place, user_path(folder), progress)
    with tempfile.TemporaryDirectory(prefix="comet-np-") as scratch:
        try:
            return _trained(data, config, place, Path(scratch), progress)
        except Diverged as error:  # what it says of the state is gone with the folder
            raise Diverged(str(error).partition("; the state is in")[0]) from None


def _trained(data: Dataset, config: RunConfig, backend: Backend, folder: Path,
             progress: bool) -> Trained:
    if not os.path.exists(folder / RESULT):  # unlike Path.exists, no error of a name too long
        _train(data, config, backend, folder, progress)
    found = load_run(folder, backend, [*_classes(config), type(task_of(data.task))])
    if (record(found.run), found.data.as_json()) != (record(config), Data.of(data).as_json()):
        raise UserError(f"{folder} holds a finished run of other settings or data: choose "
                        "another folder")
    return found


def _train(data: Dataset, config: RunConfig, backend: Backend, folder: Path,
           progress: bool) -> None:
    """Train to the end in a folder that nobody else is at."""
    line = Progress(run_work(config, len(data.x_train)), None if progress else io.StringIO())
    if data.notice:
        line.message(data.notice)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock") as ours:
            if not ours:
                raise UserError(f"another training is at work in {folder}: wait for its end, or "
                                "choose another folder")
            if not (folder / RESULT).exists():  # finished by another meanwhile
                finish(folder, train(config, data, folder, backend, line))
    except OSError as error:
        raise UserError(of_system("write into", folder, error, "folder=")) from error
    finally:
        line.clear()


def _classes(config: Any) -> Iterator[type]:
    """Yield the classes of a configuration and of all its parts."""
    if dataclasses.is_dataclass(config):
        yield type(config)
        for field in dataclasses.fields(config):
            yield from _classes(getattr(config, field.name))
    elif isinstance(config, tuple):
        for part in config:
            yield from _classes(part)
