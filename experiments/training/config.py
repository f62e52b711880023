"""What a training run is told: the model, how it is trained, and the seed."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...errors import UserError, unknown
from ...gates.comet import Routed
from ...models import module_of
from ...models.stream import stream_shapes
from ...optim import MOMENTS, OptimizerConfig
from ...precision import Precision, precision
from ...schedules import SCHEDULES
from ...settings import option
from ...tree import elements
from ..datasets.augment import augmentation
from . import examples

# What a step costs beside its products: some 0.2 ms of the interpreter, in operations of one core.
OVERHEAD = 6e6
MOST_KEPT = 2**26  # numbers of the examples that are evaluated at once


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the help texts of the fields are those of the command line."""

    optimizer: OptimizerConfig = field(default=OptimizerConfig())
    lr: float = option(1e-2, "highest learning rate")
    schedule: str = option("constant", "constant, cosine or warmup_cosine")
    warmup: int = option(0, "steps of warm-up, for warmup_cosine")
    batch: int = option(32, "examples in a mini-batch")
    accumulate: int = option(1, "mini-batches whose gradients are summed up for a step")
    epochs: int = option(5, "passes over the training set")
    steps: int | None = option(None, "steps in all, instead of --epochs")
    evaluations: int = option(1, "evaluations on the validation set, and lines of the metrics, in "
                                 "an epoch, or in the whole run with --steps")
    augment: str | None = option(None, "augment images: flip, crop or crop_flip")
    precision: str = option("float32", "float32, float64, or with products of operands rounded to "
                                       "tf32, float16 or bfloat16")
    recompute: bool = option(False, "compute the inside of a block again in its backward pass, "
                                    "instead of keeping it: less memory, more time")

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.batch < 1 or self.accumulate < 1 or self.epochs < 0:
            raise UserError("a run needs a batch of at least 1, of which at least 1 makes a step, "
                            f"and 0 or more epochs, got batch = {self.batch}, accumulate = "
                            f"{self.accumulate}, epochs = {self.epochs}")
        if self.evaluations < 1 or (self.steps is not None and self.steps < 0):
            raise UserError("a run needs at least 1 evaluation, and 0 or more steps where they are "
                            f"given, got evaluations = {self.evaluations}, steps = {self.steps}")
        if self.warmup < 0:
            raise UserError(f"the warm-up is a number of steps, 0 or more, got {self.warmup}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"the learning rate must be positive and finite, got {self.lr}")
        precision(self.precision)
        if self.augment is not None:
            augmentation(self.augment)

    @property
    def formats(self) -> Precision:
        """The number formats of the run."""
        return precision(self.precision)

    @property
    def examples_a_step(self) -> int:
        """How many examples a step sees, but for the last of an epoch."""
        return self.batch * self.accumulate

    def steps_an_epoch(self, examples: int) -> int:
        """Return how many steps a pass over so many examples takes."""
        return math.ceil(examples / self.examples_a_step)

    def total(self, examples: int) -> int:
        """Return how many steps a run on so many examples takes."""
        return self.epochs * self.steps_an_epoch(examples) if self.steps is None else self.steps

    def next_line(self, step: int, examples: int) -> int:
        """Return after how many steps the first line of the metrics later than `step` is written.

        Lines are evenly spread over an epoch, or over the whole run where its steps are given, and
        the last stands at its end; where there are more lines than steps, each step has one.
        """
        span = self._span(examples)
        first = step - step % span
        k = (step - first) * self.evaluations // span + 1  # of the span's lines
        return first + -(-k * span // self.evaluations)

    def _span(self, examples: int) -> int:
        """Return over how many steps the evaluations are spread."""
        return self.steps_an_epoch(examples) if self.steps is None else self.steps

    def lines(self, examples: int) -> int:
        """Return how many lines the metrics of a run have, that before training included."""
        each = min(self.evaluations, self._span(examples))
        return 1 + (each * self.epochs if self.steps is None else each)


@dataclass(frozen=True)
class RunConfig:
    """One training run, whole.

    Attributes
    ----------
    model : MLPConfig, or the configuration of another model
    training : TrainConfig
    seed : int
        Of the initial weights, the order of the data, their augmentation, dropout and masks.
    routing_seed : int or None
        Of the fixed weights alone, as V of COMET; None: they are drawn from `seed`, too.
    """

    model: Any
    training: TrainConfig = field(default=TrainConfig())
    seed: int = 0
    routing_seed: int | None = None


def computing(config: RunConfig) -> Any:
    """Return the model of a run with the run's format of products, and recomputation if it asks.

    Raises
    ------
    UserError
        If the model has its own format only, or cannot recompute.
    """
    model, compute = config.model, config.training.formats.compute
    if compute is not None:
        if not hasattr(model, "compute"):
            raise UserError(f"{type(model).__name__} has no field `compute`, so its products "
                            "cannot be taken in another format: train it with precision float32 "
                            "or float64")
        model = replace(model, compute=compute)
    if config.training.recompute:
        if not hasattr(model, "recompute"):
            raise UserError(f"{type(model).__name__} has no field `recompute`, so nothing of it "
                            "can be computed again in the backward pass: train it without "
                            "recompute")
        model = replace(model, recompute=True)
    return model


def multiply_adds(model: Any) -> tuple[int, int]:
    """Return the multiply-adds of one example in a training step: trained layers, fixed weights.

    Of a model that does not say them, three for each parameter.
    """
    module = module_of(model)
    count = getattr(module, "multiply_adds", lambda model: (3 * module.parameter_count(model), 0))
    found: tuple[int, int] = count(model)
    return found


def routes_once(config: RunConfig) -> bool:
    """Return whether masks are routed before the first step and then kept."""
    kept = getattr(module_of(config.model), "with_kept_masks", lambda model: None)(config.model)
    return (kept is not None and config.training.augment is None
            and multiply_adds(config.model)[1] > 0)


def example_multiply_adds(config: RunConfig) -> int:
    """Return the multiply-adds of one example in a step; masks that can be kept cost nothing."""
    trained, routing = multiply_adds(computing(config))
    return trained + routing * (not routes_once(config))


def spent(config: RunConfig, epochs: Any, routed: bool = False) -> Any:
    """Return the multiply-adds of so many epochs for each training example.

    Masks that are kept are routed once; with `routed` at each step.
    """
    whole = sum(multiply_adds(computing(config)))
    each = whole if routed else example_multiply_adds(config)
    return epochs * each + whole - each


def kept_numbers(model: Any) -> int:
    """Return about how many numbers a forward pass keeps of an example; 0 if the model says none.
    """
    count: int = getattr(module_of(model), "kept_numbers", lambda model: 0)(model)
    return count


def evaluated_at_once(config: RunConfig) -> int:
    """Return how many examples are evaluated at once: as many as a mini-batch has, or more if what
    is kept of them is little.
    """
    few = MOST_KEPT // max(1, kept_numbers(computing(config)))
    return min(examples.BLOCK, max(config.training.batch, few))


def run_memory(config: RunConfig) -> int:
    """Return about how many bytes a run takes on the device, its data aside.

    Weights, gradients and the optimizer's moments; and what a forward pass keeps of a block in
    evaluation, or of a mini-batch, of which the backward pass needs about a third more, or what is
    written at the end. Of a model that does not say what it keeps, the weights alone.
    """
    model, training = config.model, config.training
    module = module_of(model)
    learned = module.parameter_count(model)
    routing = (stream_shapes(model) if getattr(model, "routing", None) == "stream" else
               tuple(one.gate.shapes(one.widths) for one in getattr(model, "mlps", (model,))
                     if isinstance(getattr(one, "gate", None), Routed)))
    weights = learned + sum(map(elements, routing))
    numbers = weights + learned * (1 + MOMENTS[training.optimizer.name]) + max(
        weights, max(evaluated_at_once(config), 4 * training.batch // 3)
        * kept_numbers(computing(config)))
    return numbers * np.dtype(training.formats.master).itemsize


def step_work(config: RunConfig) -> float:
    """Return about how long a step takes, as a number of floating-point operations of products."""
    return 2.0 * config.training.examples_a_step * example_multiply_adds(config) + OVERHEAD


def run_work(config: RunConfig, examples: int) -> float:
    """Return about how long a run on so many examples takes, as `step_work` does of a step."""
    training = config.training
    whole = training.epochs * examples / training.examples_a_step  # an epoch's last may be short
    return step_work(config) * (whole if training.steps is None else training.steps)
