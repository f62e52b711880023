"""A trained model: what a finished run leaves, and how it is used again."""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__, gates
from ...backends import Backend, backend_of, get_backend
from ...checkpoint import write_atomically
from ...errors import UserError, unknown, user_path
from ...interop import named_weights, weights_of
from ...models import module_of
from ...models.gpt2 import GPT2Config
from ...models.mixer import MixerConfig
from ...models.mlp import MLPConfig
from ...models.moe import MoEConfig
from ...models.soft_moe import SoftMoEConfig
from ...models.vit import ViTConfig
from ...optim import OptimizerConfig
from ...records import DamagedRecord, believed, read_arrays, read_json, read_known, write_json
from ...settings import record, restored
from ...tree import leaves, tree_map
from ..datasets.base import AS_THEY_CAME, Dataset, Factor, Preparation
from ..files import CONFIG, METRICS, RESULT, WEIGHTS, read_result, write_result
from ..pooled import PooledConfig
from ..tasks import TASKS, Language, Task
from .config import RunConfig, TrainConfig, computing, evaluated_at_once
from .examples import blocks

Array = Any

KNOWN = (RunConfig, TrainConfig, OptimizerConfig, MLPConfig, MoEConfig, SoftMoEConfig, PooledConfig,
         ViTConfig, MixerConfig, GPT2Config,
         *(getattr(gates, name) for name in gates.__all__ if isinstance(getattr(gates, name), type)
           and dataclasses.is_dataclass(getattr(gates, name))))


@dataclass(frozen=True)
class Data:
    """What a trained model knows of the data that it was trained on.

    name, digest : of the `Dataset`. scale, shift, preparation : what was done to its examples.
    """

    name: str
    digest: str
    scale: Factor = 1.0
    shift: Factor = 0.0
    preparation: Preparation = AS_THEY_CAME

    @classmethod
    def of(cls, data: Dataset) -> "Data":
        """Return what a model that is trained on these data keeps of them."""
        return cls(data.name, data.digest, data.scale, data.shift, data.preparation)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        arrays = {name: value.tolist() if isinstance(value, np.ndarray) else value
                  for name, value in self.preparation._asdict().items()}
        return vars(self) | {"preparation": arrays}


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network with all that is needed to use it: ``config, params, fixed = trained``.

    Attributes
    ----------
    config : MLPConfig, or the configuration of another model
    params, fixed : trees of arrays
        Learned, and fixed (the routing weights V_l of COMET); see ``init`` of the model.
    run : RunConfig
        How it was trained, and from which seed.
    task : Task
    data : Data
    result : dict
        Of the finished run: the number of parameters, the last metrics, times.
    metrics : tuple of dict
        A line an epoch.
    """

    config: Any
    params: Any
    fixed: Any
    run: RunConfig
    task: Task
    data: Data
    result: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[dict[str, Any], ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.config, self.params, self.fixed))

    def __repr__(self) -> str:
        columns = ", ".join(self.data.preparation.columns)
        return (f"Trained({self.config}, on {self.data.name!r}{columns and f' of {columns}'}, "
                f"{', '.join(f'{k} {v:.4g}' for k, v in self.result.get('last', {}).items())})")

    def output(self, x: Array) -> np.ndarray:
        """Return the network's output for examples as they came: float array (n, N_L).

        Of texts these are the logits of what follows each token, (n, T, V).

        Parameters
        ----------
        x : NumPy array (n, N_0), or of images (n, colours, rows, columns) for a ViT or MLP-Mixer
            Or integers (n, T), the tokens of texts, for a GPT-2. Else in the units and with the
            columns, in their order, of the data that the network was trained on
            (`data.preparation.columns`, if they had names).

        Raises
        ------
        UserError
            If the shape does not fit, or a number is not finite.
        """
        x = np.asarray(x)
        if isinstance(self.task, Language):
            if x.dtype.kind not in "iu" or x.ndim != 2:
                raise UserError("predictions need the tokens of texts, integers (n, T), got an "
                                f"array of type {x.dtype} and shape {x.shape}: the run's tokenizer "
                                "makes tokens of a text, and one text is tokens.reshape(1, -1)")
            return self._outputs(x, lambda texts: texts.astype("int64"))
        if x.dtype.kind not in "biuf" or x.ndim < 2:
            raise UserError("predictions need an array of numbers (n, features), got one of type "
                            f"{x.dtype} and shape {x.shape}: one example is x.reshape(1, -1), and "
                            "numbers in strings become some by x.astype(float)")
        if not np.isfinite(x).all():
            raise UserError("x holds numbers that are not finite (NaN or infinity): fill them in, "
                            "or leave those examples out")
        if isinstance(self.config, ViTConfig | MixerConfig):
            image = self.config.image
            N = math.prod(image)
            if x.shape[1:] not in (image, (N,)):
                raise UserError(f"the network was trained on images of {image[0]} colours and "
                                f"{image[1]}x{image[2]} pixels: x must have shape (n, {N}) or "
                                f"(n, {', '.join(map(str, image))}), got {x.shape}")
            x = x.reshape(len(x), N)
        data, first = self.data, next(leaves(self.params))
        width = None if data.preparation.x_mean is None else len(data.preparation.x_mean)
        if width not in (None, x.shape[-1]):
            raise UserError(f"the network was trained on {width} features, got {x.shape[-1]}: x "
                            f"must have shape (n, {width})")
        backend = backend_of(first)

        def inputs(part: np.ndarray) -> Array:
            prepared = backend.asarray(data.preparation.inputs(part))
            return self.task.inputs(prepared, data.scale, data.shift, first.dtype)

        return self._outputs(x, inputs)

    def _outputs(self, x: np.ndarray, inputs: Callable[[np.ndarray], Array]) -> np.ndarray:
        """Return the outputs of all examples, some at a time as `inputs` makes them ready."""
        backend, forward = backend_of(next(leaves(self.params))), module_of(self.config).forward
        return np.concatenate([
            backend.to_host(forward(backend.asarray(inputs(x[part])), self.params, self.fixed,
                                    self.config)[0])
            for part in blocks(max(len(x), 1), evaluated_at_once(self.run))])

    def predict(self, x: Array) -> np.ndarray:
        """Return what the network says of examples as they came, in the units of the targets.

        Classes (n,), or numbers (n,), or (n, outputs) if there are several. Of texts the most
        probable token after each, (n, T).
        """
        return self.task.predicted(self.output(x), self.data.preparation)

    def predict_proba(self, x: Array) -> np.ndarray:
        """Return the probability of each class: (n, C); of tokens (n, T, V); of no regression."""
        return self.task.probabilities(self.output(x))

    def save_model(self, folder: Path) -> None:
        """Write ``config.json`` and ``weights.npz``."""
        content = io.BytesIO()
        weights: dict[str, Any] = named_weights(self.params, self.fixed, self.config)
        weights = {name: backend_of(array).to_host(array) for name, array in weights.items()}
        np.savez(content, **weights)
        write_atomically(folder / WEIGHTS, content.getbuffer())
        task = next((name for name, task in TASKS.items() if type(task) is type(self.task)),
                    type(self.task).__name__)
        write_json(folder / CONFIG, {
            "comet-np": __version__, "run": record(self.run), "task": task,
            "data": self.data.as_json()})

    def save(self, folder: str | Path) -> Path:
        """Write the model into a folder, from which `load_run` reads it; return the folder.

        Raises
        ------
        UserError
            If the folder holds something else than a model, or cannot be written.
        """
        folder = user_path(folder)
        try:
            if folder.exists() and not (folder.is_dir() and (
                    (folder / CONFIG).exists() or not any(folder.iterdir()))):
                raise UserError(f"{folder} is there and is no model's folder: choose another name")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RESULT).unlink(missing_ok=True)  # so that files half written are no model
        except OSError as error:
            raise UserError(f"cannot write into {folder} ({error.strerror})") from error
        self.save_model(folder)
        write_atomically(folder / METRICS, "".join(
            json.dumps(line) + "\n" for line in self.metrics).encode())
        write_result(folder, self.result)
        return folder


def load_run(folder: str | Path, backend: str | Backend = "numpy",
             known: Sequence[type] = ()) -> Trained:
    """Return the trained model in the folder of a finished cell, or where one was saved.

    Parameters
    ----------
    folder : path
        A cell's folder, ``runs/NAME-PRESET/cells/CELL``, or what `Trained.save` wrote.
    backend : str or Backend
        Where the weights go: "numpy" or "cupy".
    known : sequence of types
        The configurations, gates and tasks of one's own that the run used: classes that a file
        names are never imported.

    Raises
    ------
    UserError
        If there is no finished run, or one of its files is damaged.
    """
    folder = user_path(folder)
    result, files = _result(folder)
    with believed(folder / RESULT):
        if not all(isinstance(value, Real) for value in result["last"].values()):
            raise TypeError("the last metrics are no numbers")
    run, task, data = _described(folder / CONFIG, files, known)
    config, weights = computing(run), folder / WEIGHTS
    named, _ = read_arrays(io.BytesIO(read_known(weights, files)), str(weights))
    try:
        params, fixed = weights_of(named, config)
    except UserError as error:
        raise DamagedRecord(f"{weights} does not fit the {CONFIG} beside it: {error}") from error
    if {leaf.dtype.name for leaf in leaves(params)} != {run.training.formats.master}:
        raise DamagedRecord(f"{weights} does not hold numbers in {run.training.formats.master}")
    with believed(folder / METRICS):
        metrics = [dict(json.loads(line))
                   for line in read_known(folder / METRICS, files).splitlines()]
    place = get_backend(backend) if isinstance(backend, str) else backend
    return Trained(config, tree_map(place.asarray, params), tree_map(place.asarray, fixed), run,
                   task, data, result, tuple(metrics))


def read_weights(folder: Path, config: Any, backend: Backend) -> tuple[Any, Any]:
    """Return the parameters and the fixed weights that a training of this process has left."""
    file = folder / WEIGHTS
    named, _ = read_arrays(io.BytesIO(file.read_bytes()), str(file))
    params, fixed = weights_of(named, config)
    return tree_map(backend.asarray, params), tree_map(backend.asarray, fixed)


def run_of(folder: Path) -> RunConfig:
    """Return what a finished cell says of its run; its weights are not read."""
    return _described(folder / CONFIG, _result(folder)[1], ())[0]


def _result(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the result of a run that left a model, and the hashes of its files."""
    try:
        result, files = read_result(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise _no_run(folder) from None
    if WEIGHTS not in files:
        what = (f"a run that left no network ({result['diverged']})" if "diverged" in result else
                "an experiment that trains no network")
        raise UserError(f"{folder} is of {what}: there is no model in it")
    return result, files


def _described(file: Path, files: dict[str, str],
               known: Sequence[type]) -> tuple[RunConfig, Task, Data]:
    """Return what ``config.json`` says: the run, its task, and its data."""
    read_known(file, files)
    classes = {each.__name__: each for each in (*KNOWN, *known)}
    with believed(file):
        values = read_json(file)
        described, name, stored = values["run"], str(values["task"]), values["data"]
        data = Data(str(stored["name"]), str(stored["digest"]), _factor(stored["scale"]),
                    _factor(stored["shift"]), _preparation(stored["preparation"]))
    try:
        run = restored(described, classes)
        if name not in TASKS and name not in classes:
            raise unknown("task", name, TASKS)
    except UserError as error:
        raise UserError(f"{file}: {error}; classes of your own are given with known=[...]"
                        ) from error
    task = TASKS.get(name) or classes[name]()
    if not (isinstance(run, RunConfig) and isinstance(run.training, TrainConfig)
            and hasattr(module_of(run.model), "forward") and isinstance(task, Task)):
        raise DamagedRecord(f"{file} is damaged: it describes no run")
    return run, task, data


def _no_run(folder: Path) -> UserError:
    """Return the error for a folder without a finished run: what it holds instead."""
    if not folder.is_dir():
        return UserError(f"there is no folder {folder}")
    cells = sorted(file.parent.relative_to(folder) for runs in ("", "cells/", "*/cells/")
                   for file in folder.glob(f"{runs}*/{RESULT}"))
    if cells:
        return UserError(f"{folder} holds {len(cells)} finished runs: name the folder of one, as "
                         f"{folder / cells[0]}")
    return UserError(f"{folder} holds no finished run, which has a {RESULT}")


def _factor(stored: Any) -> Factor:
    return tuple(map(float, stored)) if isinstance(stored, list) else float(stored)


def _preparation(stored: dict[str, Any]) -> Preparation:
    moments: list[Any] = [None if stored[name] is None else np.array(stored[name], np.float64)
                          for name in ("x_mean", "x_std", "y_mean", "y_std")]
    for mean, std in (moments[:2], moments[2:]):
        if (mean is None) != (std is None) or np.ndim(mean) > 1 or np.shape(mean) != np.shape(std):
            raise ValueError("means and deviations do not belong together")
    classes = stored["classes"]
    x_mean, x_std, y_mean, y_std = moments
    return Preparation(x_mean, x_std, y_mean, y_std, None if classes is None else tuple(classes),
                       tuple(map(str, stored["columns"])))
