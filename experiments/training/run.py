"""The state of a training run, and the files that it writes."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from ...backends import Backend
from ...gates import Pass
from ...schedules import schedule
from ..datasets import Dataset
from ..datasets.augment import augmentation
from ..files import METRICS
from ..tasks import task
from .config import RunConfig, evaluated_at_once, step_work
from .device import DeviceSteps
from .examples import Examples
from .ranks import ALONE, Ranks
from .step import Learner


class Record:
    """The files of a run and its times.

    Attributes
    ----------
    folder : Path
    writes : bool
        Whether files are written at all: only the first of several ranks does.
    last : dict
        The newest line of the metrics; empty before the first.
    seconds : dict of str to float
        Spent on each phase.
    """

    def __init__(self, folder: Path, writes: bool = True, **seconds: float) -> None:
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.writes, self.last = folder, writes, dict[str, Any]()
        self.seconds = seconds | {"train": 0.0, "evaluate": 0.0, "checkpoint": 0.0}
        self.saved_at, self.save_cost = time.monotonic(), 0.0
        self.metrics = open(folder / METRICS if writes else os.devnull, "ab")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *error: object) -> None:
        self.metrics.close()

    def sync(self) -> None:
        """Let the metrics be on the disk: what stands for them must not outlast them."""
        self.metrics.flush()
        os.fsync(self.metrics.fileno())


class Run:
    """The state of a training run.

    Attributes
    ----------
    config : RunConfig
    learner : Learner
    training, validation, test : Examples; the latter two may be None
    ranks : Ranks
        That train together.
    record : Record
        What is written down: metrics, checkpoints, times.
    loss_sum : float
        Of the steps since the last line of the metrics.
    """

    def __init__(self, config: RunConfig, data: Dataset, folder: Path, backend: Backend,
                 progress: Any, ranks: Ranks = ALONE) -> None:
        ranks.check(config.training.accumulate)
        started = time.monotonic()
        self.config, self.backend, self.progress, self.data = config, backend, progress, data
        self.ranks = ranks
        self.learner = learner = Learner(config, task(data.task), backend, ranks)
        dtype, augment = config.training.formats.accumulate, config.training.augment

        def examples(x: np.ndarray, y: np.ndarray, **of_training: Any) -> Examples:
            return Examples(x, y, data, learner.model, learner.fixed, backend, dtype,
                            block=evaluated_at_once(config), **of_training)

        self.training = examples(
            data.x_train, data.y_train, train=Pass(train=True, seed=config.seed),
            augmentation=None if augment is None else augmentation(augment))
        self.validation, self.test = (
            None if x is None or y is None else examples(x, y)
            for x, y in ((data.x_val, data.y_val), (data.x_test, data.y_test)))
        self.steps_an_epoch = config.training.steps_an_epoch(len(self.training))
        self.total = config.training.total(len(self.training))
        self.work = step_work(config)  # of a step, for the progress
        self.rate(0)  # a schedule that does not fit is refused now
        self.device_steps: DeviceSteps | None = None
        self.loss_sum = 0.0
        self.record = Record(folder, ranks.first, prepare=time.monotonic() - started)

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.learner.state.step

    @property
    def next_line(self) -> int:
        """After how many steps the next line of the metrics is written."""
        return self.config.training.next_line(self.step, len(self.training))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        training = self.config.training
        return training.lr * schedule(training.schedule, step, self.total, training.warmup)
