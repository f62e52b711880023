"""Training: steps, evaluation, metrics, checkpoints and resume, divergence.

Networks that differ in their seeds alone can be trained side by side, as arrays with a leading
axis: the same results to rounding, and less overhead where networks are small.
"""

import functools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np

from .. import checkpoint
from ..backends import Backend
from ..backends.device_steps import DeviceSteps
from ..errors import UserError, unknown
from ..functional.loss import (
    mean_squared_error_backward,
    mean_squared_error_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from ..functional.routing import split_masks, unpack_masks
from ..models import mlp
from ..optim import OptimizerConfig, OptimizerState, init_state, update
from ..precision import precision
from ..rng import stream
from ..schedules import SCHEDULES, schedule
from ..tree import flatten
from .datasets import Dataset
from .datasets.augment import augmentation
from .datasets.base import scaled
from .progress import Progress

Array = Any

LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "classification": (softmax_cross_entropy_forward, softmax_cross_entropy_backward),
    "regression": (mean_squared_error_forward, mean_squared_error_backward),
}
Masks = tuple[Array | None, ...] | None

EVALUATION_BATCH = 1000
LEAST_CHECKPOINT_SECONDS = 10.0
CHECKPOINT_SHARE = 0.01  # of the run's time that may go into writing checkpoints


@dataclass(frozen=True)
class TrainConfig:
    """One training run: a model, an optimizer, a length and its seeds.

    Attributes
    ----------
    model : MLPConfig
    optimizer : OptimizerConfig
    lr : float
        Highest learning rate.
    schedule, warmup : str, int
        See `comet_np.schedules`; the warm-up in steps.
    batch, epochs : int
    seeds : tuple of int
        Of the initial weights, the order of the data and their augmentation: one network for each.
    augment : str or None
        A key of `datasets.augment.AUGMENTATIONS`.
    precision : str
        A key of `comet_np.precision.PRECISIONS`.
    """

    model: mlp.MLPConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr: float = 1e-2
    schedule: str = "constant"
    warmup: int = 0
    batch: int = 32
    epochs: int = 5
    seeds: tuple[int, ...] = (0,)
    augment: str | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.batch < 1 or self.epochs < 0:
            raise UserError("a run needs a batch of at least 1 and 0 or more epochs, got "
                            f"batch = {self.batch}, epochs = {self.epochs}")
        if self.warmup < 0:
            raise UserError(f"the warm-up is a number of steps, 0 or more, got {self.warmup}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"the learning rate must be positive and finite, got {self.lr}")
        if not self.seeds:
            raise UserError("a run needs at least 1 seed")
        if len(self.seeds) > 1 and self.optimizer.clip_norm is not None:
            raise UserError("networks side by side share their optimizer's arrays, whose norm is "
                            "not that of one network: give clip_norm with one seed at a time")
        precision(self.precision)
        if self.augment is not None:
            augmentation(self.augment)


class Diverged(UserError):
    """Training met a number that is not finite."""


class Learner:
    """Networks in training: parameters in one flat buffer, optimizer state, and the step.

    Attributes
    ----------
    params, routing : as `mlp.init` returns them, or `mlp.stack` for several seeds; the params are
        views into `flat`
    flat : array (n,)
    state : OptimizerState
    """

    def __init__(self, config: TrainConfig, task: str, backend: Backend) -> None:
        self.config, self.precision = config, precision(config.precision)
        self.precision.check(backend.name)
        self.packed = backend.reads_packed_masks
        self.loss_forward, self.loss_backward = LOSSES[task]
        networks = [mlp.init(config.model, seed, backend, self.precision.master)
                    for seed in config.seeds]
        self.stacked = len(networks) > 1
        params, self.routing = mlp.stack(networks) if self.stacked else networks[0]
        self.flat, self.params = flatten(params)
        self.state: OptimizerState = init_state(self.flat, config.optimizer)
        self.flat_grads: Array | None = None
        if not config.optimizer.updates_in_backward:
            self.flat_grads, self.grads = flatten(mlp.zeros_like(self.params))

    def loss(self, x: Array, y: Array, masks: Masks = None) -> tuple[Array, Array, Any, Any]:
        """Return the loss, a 0-d array or (S,), the output, and the caches of both forwards."""
        if masks is None and self.packed:
            masks = mlp.masks_of(x, self.routing, self.config.model, packed=True)
        a_L, cache = mlp.forward(x, self.params, self.routing, self.config.model, masks,
                                 self.precision.tf32)
        loss, loss_cache = self.loss_forward(a_L, y, self.stacked)
        return loss, a_L, cache, loss_cache

    def step(self, x: Array, y: Array, lr: float, masks: Masks = None,
             check: Callable[[Array], None] = lambda loss: None) -> Array:
        """Take one step on the mini-batch and return its loss, a 0-d array or (S,).

        `check` sees the loss before any parameter changes, and may raise.
        """
        model, tf32 = self.config.model, self.precision.tf32
        loss, _, cache, loss_cache = self.loss(x, y, masks)
        check(loss)
        if self.flat_grads is None:  # the backward pass is the update, see comet_np.optim
            mlp.backward(self.loss_backward(-lr, loss_cache), cache, self.params, self.params,
                         model, False, tf32)
            self.state = self.state._replace(step=self.state.step + 1)
            return loss
        self.flat_grads.fill(0)
        mlp.backward(self.loss_backward(1.0, loss_cache), cache, self.params, self.grads, model,
                     False, tf32)
        self.state = update(self.flat, self.flat_grads, self.state, lr, self.config.optimizer)
        return loss


class Split:
    """Examples in the backend's memory, with the masks of COMET networks kept bit-packed.

    The masks depend on the input alone, so those of a fixed data set are computed once.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, data: Dataset, config: TrainConfig,
                 backend: Backend, routing: mlp.Routing, augment: str | None = None) -> None:
        self.backend, self.dtype = backend, precision(config.precision).accumulate
        self.scale, self.shift = data.scale, data.shift
        self.augmentation = None if augment is None else augmentation(augment)
        self.x = backend.asarray(x)
        self.y = backend.asarray(y, dtype=None if y.dtype.kind in "iu" else self.dtype)
        self.widths = config.model.widths[1:-1]
        self.networks = len(config.seeds)
        self.bits: Array | None = None  # (n, bytes), or (S, n, bytes)
        if config.model.p_k is not None and self.widths and augment is None:
            xp = backend.xp
            packed = [xp.concatenate(mlp.masks_of(self._input(self.x[rows]), routing, config.model,
                                                  packed=True), axis=-1)
                      for rows in blocks(len(x), EVALUATION_BATCH)]
            self.bits = xp.concatenate(packed, axis=-2)

    def __len__(self) -> int:
        return len(self.x)

    def _input(self, x: Array) -> Array:
        return scaled(x, self.scale, self.shift, self.dtype)

    def batch(self, rows: Array, choices: Array | None = None) -> tuple[Array, Array, Masks]:
        """Return x, y and the masks of the examples `rows` (B,), or (S, B) for S networks.

        `choices`, of the same shape, are those of the augmentation.

        In line: a thread that prepared the next mini-batch meanwhile made steps slower by 1 to 10 %
        (N from 100 to 1000, batch 32), as it competes with BLAS for the cores.
        """
        x = self.x[rows]
        if self.augmentation is not None and choices is not None:
            x = self.augmentation.apply(x, choices)
        bits = self.bits
        if bits is not None and self.networks > 1:
            first = self.backend.xp.arange(self.networks)[:, None] * len(self)
            bits = bits.reshape(-1, bits.shape[-1])[rows + first]
        elif bits is not None:
            bits = bits[rows]
        return self._input(x), self.y[rows], self._masks(bits)

    def block(self, rows: slice) -> tuple[Array, Array, Masks]:
        """Return x (B, N_0), y and the masks of neighbouring examples, the same for all networks.

        y is (S, B) or (S, B, outputs) for S networks.
        """
        y = self.y[rows]
        if self.networks > 1:
            y = self.backend.xp.broadcast_to(y, (self.networks, *y.shape))
        bits = None if self.bits is None else self.bits[..., rows, :]
        return self._input(self.x[rows]), y, self._masks(bits)

    def _masks(self, bits: Array | None) -> Masks:
        if bits is None:
            return None
        read = split_masks if self.backend.reads_packed_masks else unpack_masks
        return read(bits, self.widths)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover 0..n."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def evaluate(learner: Learner, split: Split, check: Callable[[Array, np.ndarray], None]
             ) -> list[dict[str, float]]:
    """Return for each network the mean loss over a split, and the accuracy if it has classes.

    `check` sees the input and the losses (S,) of each block of examples, and may raise.
    """
    backend, networks = split.backend, len(learner.config.seeds)
    losses, hits = np.zeros(networks), np.zeros(networks, int)
    for rows in blocks(len(split), EVALUATION_BATCH):
        x, y, masks = split.block(rows)
        loss, a_L, _, _ = learner.loss(x, y, masks)
        block_losses = backend.to_host(loss).astype(float).reshape(-1)
        check(x, block_losses)
        losses += block_losses * len(x)
        if split.y.ndim == 1:
            hits += backend.to_host((backend.xp.argmax(a_L, axis=-1) == y).sum(axis=-1))
    results = [{"loss": float(loss) / len(split)} for loss in losses]
    if split.y.ndim == 1:
        for result, count in zip(results, hits, strict=True):
            result["accuracy"] = int(count) / len(split)
    return results


class Trainer:
    """One run in a folder of its own: `run()` trains, or goes on where it was stopped.

    In the folder: ``metrics.jsonl``, a line an epoch and seed; ``checkpoint`` while it runs;
    ``result.json`` when it is done. A run that was stopped at any moment ends in the same metrics
    (times aside) and weights, bit for bit, as one that was not.

    Parameters
    ----------
    config : TrainConfig
    data : Dataset
    folder : Path
    backend : Backend
    progress : Progress
    """

    def __init__(self, config: TrainConfig, data: Dataset, folder: Path, backend: Backend,
                 progress: Progress) -> None:
        started = time.monotonic()
        self.config, self.folder, self.backend, self.progress = config, folder, backend, progress
        self.notice, self.digest = data.notice, data.digest
        self.learner = Learner(config, data.task, backend)

        def split(x: np.ndarray, y: np.ndarray, augment: str | None = None) -> Split:
            return Split(x, y, data, config, backend, self.learner.routing, augment)

        self.training = split(data.x_train, data.y_train, config.augment)
        self.validation = split(data.x_val, data.y_val)
        self.test = (None if data.x_test is None or data.y_test is None
                     else split(data.x_test, data.y_test))
        self.steps_an_epoch = math.ceil(len(self.training) / config.batch)
        self.total = self.steps_an_epoch * config.epochs
        self.work = step_work(config)
        self.seconds = {"prepare": time.monotonic() - started, "train": 0.0, "evaluate": 0.0,
                        "checkpoint": 0.0}
        self.loss_sum = np.zeros(len(config.seeds))  # over the steps of this epoch
        self.device_steps: DeviceSteps | None = None
        self.last: list[dict[str, Any]] = []  # the newest lines of the metrics
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = open(folder / "metrics.jsonl", "ab")  # noqa: SIM115 (closed by run)
        self.saved_at, self.save_cost = time.monotonic(), 0.0

    def run(self) -> dict[str, Any]:
        """Train to the end and return the result, which is also written to ``result.json``.

        Raises
        ------
        Diverged
            At the first loss that is not finite; the state is left in ``diverged``.
        KeyboardInterrupt
            On Ctrl-C, after a checkpoint.
        """
        config = self.config
        with self.metrics, _ctrl_c() as interrupted, np.errstate(over="ignore", invalid="ignore"):
            self.resume()
            if not self.last:
                self.report(0)
            while self.learner.state.step < self.total:
                epoch, first = divmod(self.learner.state.step, self.steps_an_epoch)
                plan = self.plan(epoch)
                for i in range(first, self.steps_an_epoch, self.backend.losses_at_once):
                    last = min(i + self.backend.losses_at_once, self.steps_an_epoch)
                    started = time.monotonic()
                    self.take_steps(plan[..., i * config.batch:last * config.batch])
                    self.seconds["train"] += time.monotonic() - started
                    self.progress.advance(self.work * (last - i), self.folder.name, last - i)
                    if last == self.steps_an_epoch:
                        self.report(epoch + 1)
                    if interrupted.is_set() or self.due():
                        self.save()
                    if interrupted.is_set():
                        raise KeyboardInterrupt
            result = self.finish()
            if interrupted.is_set():
                raise KeyboardInterrupt
            return result

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        config = self.config
        return config.lr * schedule(config.schedule, step, self.total, config.warmup)

    def plan(self, epoch: int) -> np.ndarray:
        """Return each network's examples of an epoch in order, and the choices for them, if any.

        Returns
        -------
        int64 array (1 or 2, S, n)
        """
        config, n = self.config, len(self.training)
        plan = [[stream(seed, "order", epoch).permutation(n) for seed in config.seeds]]
        if self.training.augmentation is not None:
            plan.append([self.training.augmentation.draw(stream(seed, "augment", epoch), n)
                         for seed in config.seeds])
        return np.array(plan)

    def take_steps(self, plan: np.ndarray) -> None:
        """Take a step on each mini-batch of a part of an epoch's plan, the last maybe a short one.

        One step looks at its loss before its update. Where reading a number stalls the device,
        whole mini-batches run from the device's memory alone and their losses are read together.
        """
        batch = self.config.batch
        whole = plan.shape[-1] // batch
        if self.backend.losses_at_once > 1 and whole:
            before = [array.copy() for array in self._state().values()]
            losses = self._take_device_steps(plan[..., :whole * batch], whole)
            if np.isfinite(losses).all():
                for loss in losses:  # one by one, as on the CPU: the same sum
                    self.loss_sum += loss
                plan = plan[..., whole * batch:]
            else:  # again from before the group, to find the step and the layer
                for array, saved in zip(self._state().values(), before, strict=True):
                    array[...] = saved
                self.learner.state = self.learner.state._replace(
                    step=self.learner.state.step - whole)
        for start in range(0, plan.shape[-1], batch):
            step = self.learner.state.step
            x, y, masks = self.mini_batch(
                self.backend.asarray(plan[..., start:start + batch].copy()))
            self.learner.step(x, y, self.rate(step), masks,
                              functools.partial(self.check, step, x))

    def mini_batch(self, plan: Array) -> tuple[Array, Array, Masks]:
        """Return x, y and masks of a mini-batch from its plan (1 or 2, S, B)."""
        parts = plan if self.learner.stacked else plan[:, 0]
        return self.training.batch(*(parts[i] for i in range(len(parts))))

    def _take_device_steps(self, plan: np.ndarray, steps: int) -> np.ndarray:
        learner, state, batch = self.learner, self.learner.state, self.config.batch
        kinds, networks = plan.shape[:2]

        def one(numbers: Array, lr: Array, done: Array) -> Array:
            x, y, masks = self.mini_batch(numbers.reshape(kinds, networks, batch))
            learner.state = state._replace(step=done)
            return learner.step(x, y, lr, masks)

        if self.device_steps is None:
            self.device_steps = DeviceSteps(
                self.backend, one, self.backend.losses_at_once, kinds * networks * batch, networks,
                learner.precision.accumulate)
        rates = np.array([self.rate(state.step + i) for i in range(steps)])
        numbers = np.moveaxis(plan.reshape(kinds, networks, steps, batch), 2, 0)
        self.device_steps.begin(numbers.reshape(steps, -1), rates, state.step)
        for _ in range(steps):
            self.device_steps.run()
        learner.state = state._replace(step=state.step + steps)
        return self.device_steps.losses(steps)

    def report(self, epoch: int) -> None:
        """Measure on the validation split and add a line for each network to the metrics."""
        step = self.learner.state.step
        results = self.measure(self.validation)
        self.last = []
        for i, (seed, result) in enumerate(zip(self.config.seeds, results, strict=True)):
            line: dict[str, Any] = {"epoch": epoch, "step": step, "seed": seed}
            if epoch:
                line["train_loss"] = float(self.loss_sum[i] / self.steps_an_epoch)
                line["lr"] = self.rate(step - 1)
            line |= {f"val_{name}": value for name, value in result.items()}
            line["seconds"] = round(self.seconds["train"], 3)
            self.last.append(line)
        self.loss_sum[:] = 0
        self.metrics.writelines(json.dumps(line).encode() + b"\n" for line in self.last)
        self.metrics.flush()

    def measure(self, split: Split) -> list[dict[str, float]]:
        """Return what `evaluate` does, for losses that must be finite, and count its time."""
        started = time.monotonic()
        results = evaluate(self.learner, split,
                           functools.partial(self.check_finite, self.learner.state.step))
        self.seconds["evaluate"] += time.monotonic() - started
        return results

    def check(self, step: int, x: Array, loss: Array) -> None:
        """Add the losses of a step with input x to the epoch's sums, if they are finite."""
        losses = self.backend.to_host(loss).reshape(-1)
        self.check_finite(step, x, losses)
        self.loss_sum += losses

    def check_finite(self, step: int, x: Array, losses: np.ndarray) -> None:
        """Stop the run unless all losses (S,) on the input x are finite."""
        if not np.isfinite(losses).all():
            self.diverge(step, losses, x)

    def diverge(self, step: int, losses: np.ndarray, x: Array) -> NoReturn:
        """Save the state and raise Diverged, for losses not all of which are finite, on input x."""
        state = self.folder / "diverged"
        checkpoint.save(state, self._arrays(), self._description())
        network = int(np.argmin(np.isfinite(losses)))
        others = ", or train the other seeds without it by --together 0"
        raise Diverged(
            f"training with seed {self.config.seeds[network]} diverged at step {step} (loss "
            f"{losses[network]}): the first quantity that is not finite is "
            f"{first_not_finite(self.learner, x, network)}; lower --lr, or clip with --clip-norm"
            f"{others if self.learner.stacked else ''}; the state is in {state}")

    # --- checkpoints ---

    def _state(self) -> dict[str, Array]:
        """Return all arrays that training changes, by name."""
        arrays = {"flat": self.learner.flat, "first": self.learner.state.first,
                  "second": self.learner.state.second}
        return {name: array for name, array in arrays.items() if array is not None}

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: self.backend.to_host(array) for name, array in self._state().items()}

    def _description(self) -> dict[str, Any]:
        config = json.loads(json.dumps(asdict(self.config))) | {
            "data": self.digest, "backend": self.backend.name}
        return {"config": config, "last": self.last,
                "step": self.learner.state.step, "loss_sum": self.loss_sum.tolist(),
                "metrics_bytes": self.metrics.tell(), "seconds": self.seconds}

    def due(self) -> bool:
        """Whether it is time for a checkpoint: seldom enough to cost a small share of the time."""
        pause = max(LEAST_CHECKPOINT_SECONDS, self.save_cost / CHECKPOINT_SHARE)
        return time.monotonic() - self.saved_at > pause

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        started = time.monotonic()
        os.fsync(self.metrics.fileno())
        checkpoint.save(self.folder / "checkpoint", self._arrays(), self._description())
        self.saved_at = time.monotonic()
        self.save_cost = self.saved_at - started
        self.seconds["checkpoint"] += self.save_cost

    def resume(self) -> None:
        """Go on from the newest readable checkpoint of the folder, if there is one."""
        for unfinished in self.folder.glob("checkpoint*.tmp"):  # of a run killed while it wrote
            unfinished.unlink()
        found = checkpoint.load_latest(self.folder / "checkpoint")
        if found is None:
            self.metrics.truncate(0)
            return
        arrays, description, notice = found
        if notice:
            self.progress.message(f"{notice}; going on from the checkpoint before it")
        ours = self._description()["config"]
        differences = [f"{name} was {description['config'].get(name)}, is {ours[name]}"
                       for name in ours if description["config"].get(name) != ours[name]]
        if differences:
            raise checkpoint.CheckpointError(
                f"the checkpoint in {self.folder} belongs to another run ({'; '.join(differences)})"
                ": choose another --out, or move that folder away to start again")
        length = description["metrics_bytes"]
        if os.fstat(self.metrics.fileno()).st_size < length:
            raise checkpoint.CheckpointError(
                f"{self.folder / 'metrics.jsonl'} is shorter than when the checkpoint beside it "
                "was written: restore it, or move that folder away to start again")
        for name, array in self._state().items():
            array[...] = self.backend.asarray(arrays[name])
        self.learner.state = self.learner.state._replace(step=description["step"])
        self.loss_sum[:], self.last = description["loss_sum"], description["last"]
        self.seconds |= description["seconds"]
        self.metrics.truncate(length)
        self.metrics.seek(0, os.SEEK_END)
        self.progress.skip(description["step"] * self.work)

    def finish(self) -> dict[str, Any]:
        """Measure on the test split, write the result, and remove the checkpoints."""
        os.fsync(self.metrics.fileno())  # what a result stands for must outlast it
        networks = [{"seed": seed, "last": last}
                    for seed, last in zip(self.config.seeds, self.last, strict=True)]
        if self.test is not None:
            for network, measured in zip(networks, self.measure(self.test), strict=True):
                network |= {f"test_{name}": value for name, value in measured.items()}
        result = {"parameters": mlp.parameter_count(self.config.model), "networks": networks,
                  "notice": self.notice, "data": self.digest,
                  "seconds": {name: round(value, 3) for name, value in self.seconds.items()}}
        checkpoint.write_atomically(self.folder / "result.json",
                                    json.dumps(result, indent=1).encode() + b"\n")
        for file in self.folder.glob("checkpoint*"):
            file.unlink()
        return result


def step_work(config: TrainConfig) -> float:
    """Return the floating-point operations of a step's matrix products.

    Masks are kept, and cost nothing, unless images are augmented, and routed afresh.
    """
    model = config.model
    routed = config.augment is not None and model.p_k is not None
    V = sum(N * N_in for N_in, N in pairwise(model.widths[:-1])) if routed else 0
    return 2.0 * config.batch * len(config.seeds) * (3 * mlp.parameter_count(model) + V)


def first_not_finite(learner: Learner, x: Array, network: int) -> str:
    """Return the paper's name of the first quantity of a network's forward that is not finite."""
    trace = mlp.trace(x, learner.params, learner.routing, learner.config.model)
    for layer, a in enumerate(trace.a, start=1):
        p = learner.params[layer - 1]
        quantities = [(f"x_{layer - 1}", trace.x[layer - 1]), (f"W_{layer}", p.weight),
                      (f"b_{layer}", p.bias), (f"a_{layer}", a)]
        for name, array in quantities:
            if array is None:
                continue
            own = array[network] if learner.stacked else array
            if not np.isfinite(float(abs(own).max())):
                return f"{name} of layer {layer}"
    return "the loss itself"


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C, or SIGTERM, into an event, so that a step is not cut in two.

    A second one ends at once. Where Ctrl-C is ignored, as in the workers of a sweep, it stays so.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
