"""The training loop: named steps over one explicit state."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from ...backends import Backend
from ...rng import stream
from ..datasets import Dataset
from ..datasets.augment import augmentation
from ..progress import Progress
from ..signals import Stop, stop_on_signals
from ..tasks import Batch
from .config import RunConfig
from .device import DeviceSteps
from .ranks import Ranks, of_command
from .record import check_finite, due, finish, keep_if_diverged, report, resume, save, scores_finite
from .run import Run
from .step import Forward

STEPS_AHEAD = 100  # that a device takes before their losses are read, as reading stalls it


def train(config: RunConfig, data: Dataset, folder: Path, backend: Backend,
          progress: Any = None, stop: Stop | None = None,
          ranks: Ranks | None = None) -> dict[str, Any]:
    """Train to the end, or go on where the run of this folder was stopped; return the result.

    In the folder: ``metrics.jsonl``, a line before training and one an evaluation; ``checkpoint``;
    at the end ``config.json`` and ``weights.npz``. A run that was stopped at any moment ends in the
    same metrics (times aside) and weights, bit for bit, as one that was not.

    Parameters
    ----------
    config : RunConfig
    data : Dataset
    folder : Path
    backend : Backend
    progress : Progress, optional
    stop : Stop, optional
        By which another thread asks for the end; if not given, Ctrl-C, SIGTERM and SIGHUP do.
    ranks : Ranks, optional
        That train together; if not given, those of the command line. Only the first writes.

    Raises
    ------
    Diverged
        At the first loss that is not finite; the state is left in ``diverged``.
    KeyboardInterrupt
        When asked to stop, after a checkpoint.
    """
    ranks = of_command() if ranks is None else ranks
    with ranks.together():
        run = Run(config, data, Path(folder), backend, progress or Progress(1), ranks)
    with run.record, keep_if_diverged(run), ranks.together(), scores_finite(run), stop_on_signals(
            stop) as stop, np.errstate(over="ignore", invalid="ignore"):
        resume(run)
        if not run.record.last:
            report(run)
        group = STEPS_AHEAD if _ahead(run) else 1
        while run.step < run.total:
            epoch, first = divmod(run.step, run.steps_an_epoch)
            plan = order(run, epoch)
            end = min(run.steps_an_epoch, first + run.total - run.step)
            while first < end:
                line = run.next_line
                last = min(first + group, first + line - run.step, end)
                take_steps(run, plan, first, last)
                if run.step == line:
                    report(run)
                ranks.agree(stop)
                if stop.asked or due(run):
                    save(run)
                stop.raise_if_asked()
                first = last
        result = finish(run)
        ranks.agree(stop)
        if stop.asked:  # within the last evaluation
            save(run)
        stop.raise_if_asked()
        return result


def order(run: Run, epoch: int) -> np.ndarray:
    """Return the examples of an epoch in order, and the choices of their augmentation, if any.

    Returns
    -------
    int64 array (1 or 2, n)
    """
    seed, augment, n = run.config.seed, run.config.training.augment, len(run.training)
    plan = [stream(seed, "order", epoch).permutation(n)]
    if augment is not None:
        plan.append(augmentation(augment).draw(stream(seed, "augment", epoch), n))
    return np.array(plan)


def take_steps(run: Run, plan: np.ndarray, first: int, last: int) -> None:
    """Take the steps first..last-1 of an epoch by its plan; the epoch's last may be a short one.

    One step looks at its loss before its update. Where reading a number stalls the device, whole
    steps run from the device's memory alone and their losses are read together.
    """
    started, size = time.monotonic(), run.config.training.examples_a_step
    whole = min(last, plan.shape[1] // size)
    if _ahead(run) and whole > first and _taken_on_device(run, plan, first, whole):
        first = whole
    for i in range(first, last):
        _take_step(run, plan[:, i * size:(i + 1) * size])
    run.record.seconds["train"] += time.monotonic() - started
    run.progress.advance(run.work * (last - first), run.record.folder.name, last - first)


def _ahead(run: Run) -> bool:
    """Whether the device takes several steps before their losses are read.

    Not with other ranks: what they exchange is no part of a captured step.
    """
    return run.backend.waits and run.ranks.size == 1


def _take_step(run: Run, plan: np.ndarray) -> None:
    """Take one step, on the examples of a part of the plan, and look at every loss."""
    size, step = run.config.training.batch, run.step
    on_device = [run.backend.asarray(np.ascontiguousarray(plan[:, start:start + size]))
                 for start in range(0, plan.shape[1], size)]
    batches = [run.training.batch(*rows) for rows in on_device]

    def check(batch: Batch, made: Forward) -> None:
        check_finite(run, step, batch, made)

    loss = run.learner.step(batches, run.training, run.rate(step), check)
    run.loss_sum += float(run.backend.to_host(loss))


def _taken_on_device(run: Run, plan: np.ndarray, first: int, last: int) -> bool:
    """Take steps on the device; False, and all as before, if one of their losses is not finite."""
    learner, size = run.learner, run.config.training.examples_a_step
    if run.device_steps is None:
        run.device_steps = DeviceSteps(learner, run.training, run.backend, STEPS_AHEAD)
    before = {name: array.copy() for name, array in learner.arrays().items()}
    state = learner.state
    rates = np.array([run.rate(run.step + i) for i in range(last - first)])
    losses = run.device_steps.run(plan[:, first * size:last * size], rates)
    if np.isfinite(losses).all():
        for loss in losses:  # one by one, as on the CPU: the same sum
            run.loss_sum += float(loss)
        return True
    for name, array in learner.arrays().items():  # so that the step and the layer are found
        array[...] = before[name]
    learner.state = state
    return False
