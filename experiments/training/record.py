"""What a run writes down: metrics, checkpoints, the state when it diverged; and how it resumes."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ... import checkpoint
from ...errors import NaNScore, UserError
from ...models import module_of
from ...settings import record as as_record
from ...tree import named_leaves, tree_map
from ..files import METRICS
from ..tasks import Batch
from .examples import Examples
from .model import Data, Trained
from .run import Run
from .step import Forward, evaluate

LEAST_CHECKPOINT_SECONDS = 10.0
CHECKPOINT_SHARE = 0.01  # of the run's time that may go into writing checkpoints


class Diverged(UserError):
    """Training met a number that is not finite."""


def report(run: Run) -> None:
    """Measure on the validation set, if there is one, and add a line to the metrics."""
    step, epoch = run.step, run.step / run.steps_an_epoch
    line: dict[str, Any] = {"epoch": int(epoch) if epoch.is_integer() else epoch, "step": step}
    if step:
        line |= {"train_loss": run.loss_sum / (step - run.record.last["step"]),
                 "lr": run.rate(run.step - 1)}
    if run.learner.scaling is not None:
        scale, _, left_out = run.backend.to_host(run.learner.scaling).tolist()
        line |= {"loss_scale": scale, "left_out": int(left_out)}
    if run.validation is not None:
        line |= {f"val_{name}": value for name, value in measure(run, run.validation).items()}
    line["seconds"] = round(run.record.seconds["train"], 3)
    run.loss_sum, run.record.last = 0.0, line
    run.record.metrics.write(json.dumps(line).encode() + b"\n")
    run.record.metrics.flush()


def measure(run: Run, examples: Examples) -> dict[str, float]:
    """Return what `evaluate` does, for losses that must be finite, and count its time."""
    started = time.monotonic()
    results = evaluate(run.learner, examples,
                       lambda batch, made: check_finite(run, run.step, batch, made))
    run.record.seconds["evaluate"] += time.monotonic() - started
    return results


def finish(run: Run) -> dict[str, Any]:
    """Measure on the test set, write the model down and return the result."""
    result = {"parameters": module_of(run.config.model).parameter_count(run.config.model),
              "last": run.record.last}
    if run.test is not None:
        result |= {f"test_{name}": value for name, value in measure(run, run.test).items()}
    learner, to_host = run.learner, run.backend.to_host
    if run.record.writes:
        run.record.sync()
        Trained(learner.model, tree_map(to_host, learner.params), tree_map(to_host, learner.fixed),
                run.config, learner.task, Data.of(run.data)).save_model(run.record.folder)
    return result | {"notice": run.data.notice, "data": run.data.digest,
                     "seconds": {name: round(value, 3)
                                 for name, value in run.record.seconds.items()}}


# --- divergence ---------------------------------------------------------------------------------


def check_finite(run: Run, step: int, batch: Batch, made: Forward) -> None:
    """Raise Diverged unless the loss of a mini-batch is finite."""
    loss = run.backend.to_host(made.loss).item()
    if not np.isfinite(loss):
        raise _diverged(run, f"at step {step} (loss {loss}): the first quantity that is not finite "
                             f"is {first_not_finite(run, batch, made)}")


@contextmanager
def scores_finite(run: Run) -> Iterator[None]:
    """Raise Diverged for a routing score that is NaN.

    A gate that reads what the network computed meets such numbers before the loss does.
    """
    try:
        yield
    except NaNScore as error:
        raise _diverged(run, f"at step {run.step}: a routing score is NaN") from error


def _diverged(run: Run, what: str) -> Diverged:
    return Diverged(f"training diverged {what}; lower --lr, or clip with --clip-norm; the state is "
                    f"in {_state(run)}")


def _state(run: Run) -> Path:
    """Return where the state is left when a run diverges."""
    return run.record.folder / "diverged"


@contextmanager
def keep_if_diverged(run: Run) -> Iterator[None]:
    """Save the state if Diverged is raised, on whichever rank."""
    try:
        yield
    except Diverged:
        with run.ranks.together():
            if run.record.writes:
                checkpoint.save(_state(run), _arrays(run), _description(run))
        raise


def first_not_finite(run: Run, batch: Batch, made: Forward) -> str:
    """Return the name of the first quantity of a forward pass that is not finite.

    By the paper's names, if the model says its `quantities`.
    """
    params, functions = run.learner.params, module_of(run.config.model)
    if hasattr(functions, "quantities"):
        found = functions.quantities(params, made.cache, made.output)
    else:
        found = named_leaves({"input": batch.x, "parameter": params, "output": made.output})
    for name, array in found:
        if not np.isfinite(float(abs(array).max())):
            return str(name)
    return "the loss itself"


# --- checkpoints --------------------------------------------------------------------------------


def due(run: Run) -> bool:
    """Whether it is time for a checkpoint: seldom enough to cost a small share of the time."""
    pause = max(LEAST_CHECKPOINT_SECONDS, run.record.save_cost / CHECKPOINT_SHARE)
    return time.monotonic() - run.record.saved_at > pause


def save(run: Run) -> None:
    """Write a checkpoint of this moment."""
    if not run.record.writes:
        return
    started = time.monotonic()
    run.record.sync()
    checkpoint.save(run.record.folder / "checkpoint", _arrays(run), _description(run))
    run.record.saved_at = time.monotonic()
    run.record.save_cost = run.record.saved_at - started
    run.record.seconds["checkpoint"] += run.record.save_cost


def resume(run: Run) -> None:
    """Go on from the newest readable checkpoint of the folder, if there is one.

    The first of several ranks reads it for all, as they may have no disk in common.
    """
    settings = _flat(_description(run)["config"])
    run.ranks.same({".".join(path): value for path, value in settings.items()})
    if run.record.writes:
        _restore(run)
    step, run.loss_sum, run.record.last = run.ranks.broadcast(
        (run.step, run.loss_sum, run.record.last))
    run.learner.state = run.learner.state._replace(step=step)
    for array in run.learner.arrays().values():
        run.ranks.copy_(array)


def _restore(run: Run) -> None:
    """Read the newest readable checkpoint of the folder, if there is one."""
    record = run.record
    for unfinished in record.folder.glob("checkpoint*.tmp"):  # of a run killed while it wrote
        unfinished.unlink()
    found = checkpoint.load_latest(record.folder / "checkpoint")
    if found is None:
        record.metrics.truncate(0)
        return
    arrays, description, notice = found
    if notice:
        run.progress.message(f"{notice}; going on from the checkpoint before it")
    try:
        theirs, step = _flat(description["config"]), int(description["step"])
        length, loss_sum = int(description["metrics_bytes"]), float(description["loss_sum"])
        last = dict(description["last"])
        seconds = {name: float(value) for name, value in description["seconds"].items()}
        if min(step, length, step - int(last["step"])) < 0:
            raise ValueError(f"step {step}, {length} bytes, last line {last}")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise checkpoint.CheckpointError(
            f"the checkpoint in {record.folder} does not hold what a run writes ({error!r}): move "
            "that folder away to start again") from error
    ours = _flat(_description(run)["config"])
    differences = [f"{_name(path)} was {theirs.get(path)}, is {ours.get(path)}"
                   for path in ours | theirs if theirs.get(path) != ours.get(path)]
    if differences:
        raise checkpoint.CheckpointError(
            f"the checkpoint in {record.folder} belongs to another run ({'; '.join(differences)})"
            ": choose another --out, or move that folder away to start again")
    own = run.learner.arrays()
    if {name: (array.dtype.str, array.shape) for name, array in arrays.items()} != {
            name: (array.dtype.str, array.shape) for name, array in own.items()}:
        raise checkpoint.CheckpointError(
            f"the checkpoint in {record.folder} does not hold the arrays of this run: move that "
            "folder away to start again")
    if os.fstat(record.metrics.fileno()).st_size < length:
        raise checkpoint.CheckpointError(
            f"{record.folder / METRICS} is shorter than when the checkpoint beside it "
            "was written: restore it, or move that folder away to start again")
    for name, array in own.items():
        array[...] = run.backend.asarray(arrays[name])
    run.learner.state = run.learner.state._replace(step=step)
    run.loss_sum, record.last = loss_sum, last
    record.seconds |= seconds
    record.metrics.truncate(length)
    record.metrics.seek(0, os.SEEK_END)
    run.progress.skip(step * run.work)


def _arrays(run: Run) -> dict[str, np.ndarray]:
    return {name: run.backend.to_host(array) for name, array in run.learner.arrays().items()}


def _description(run: Run) -> dict[str, Any]:
    config = as_record(run.config) | {"data": run.data.digest, "backend": run.backend.name}
    return {"config": config, "last": run.record.last, "step": run.step, "loss_sum": run.loss_sum,
            "metrics_bytes": run.record.metrics.tell(), "seconds": run.record.seconds}


def _flat(config: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return the settings of a nested configuration by their paths."""
    found: dict[tuple[str, ...], Any] = {}
    for name, value in config.items():
        here = (*path, name)
        found |= _flat(value, here) if isinstance(value, dict) else {here: value}
    return found


def _name(path: tuple[str, ...]) -> str:
    """Return how a person calls a setting: a gate's class is "gate", a learning rate "lr"."""
    return path[-2] if path[-1] == "class" and len(path) > 1 else path[-1]
