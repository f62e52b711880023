"""One training step: forward, loss, backward, update. The loop, a captured graph and the benchmarks
take this one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...backends import Backend, backend_of, xp_of
from ...gates import Pass
from ...models import module_of
from ...optim import OptimizerState, init_state, shrink, squared_norm, update
from ...precision import adjust, first_scaling, unscaled
from ...tree import flatten, matrix_elements, zeros_like
from ..tasks import Batch, Task
from .config import RunConfig, computing
from .examples import Examples
from .ranks import ALONE, Ranks

Array = Any


class Learner:
    """A network in training: parameters in one flat buffer, the optimizer's state, gradients.

    Attributes
    ----------
    config : RunConfig
    task : Task
    model : the configuration of the model, with the run's format of products
    params, fixed : as the model's `init` returns them; the params are views into `flat`
    flat : array (n,)
    state : OptimizerState
    scaling : array (3,) or None
        Of the loss, in float16: see `comet_np.precision.first_scaling`.
    ranks : Ranks
        That take its steps together.
    """

    def __init__(self, config: RunConfig, task: Task, backend: Backend,
                 ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        formats = config.training.formats
        self.config, self.task, self.model = config, task, computing(config)
        self._functions = module_of(self.model)
        params, self.fixed = self._functions.init(self.model, config.seed, backend, formats.master)
        if config.routing_seed is not None:
            _, self.fixed = self._functions.init(self.model, config.routing_seed, backend,
                                                 formats.master)
        self.flat, self.params = flatten(params)
        self._matrices = matrix_elements(self.params)
        optimizer = config.training.optimizer
        self.state: OptimizerState = init_state(self.flat, optimizer)
        self.scaling = first_scaling(backend.xp) if formats.compute == "float16" else None
        self._flat_grads: Array | None = None
        self._next, self._grads = self.flat, self.params  # what a backward pass adds into
        # In float16 a gradient times the learning rate would vanish before it is added.
        if not (optimizer.updates_in_backward and config.training.accumulate == 1
                and formats.compute != "float16"):
            self._flat_grads, self._grads = flatten(zeros_like(self.params))
        elif optimizer.shrinks:
            self._next, self._grads = flatten(self.params)

    def arrays(self) -> dict[str, Array]:
        """Return all arrays that training changes, by name."""
        arrays = {"flat": self.flat, "first": self.state.first, "second": self.state.second,
                  "scaling": self.scaling}
        return {name: array for name, array in arrays.items() if array is not None}

    def forward(self, batch: Batch, examples: Examples, train: bool = False,
                part: int = 0) -> "Forward":
        """Return what a forward pass makes of a mini-batch, up to the loss.

        `part` is the number of the mini-batch in its step: each drops other elements.
        """
        step, parts = self.state.step, self.config.training.accumulate
        at = Pass(train, step if parts == 1 else step * parts + part, batch.rows, self.config.seed)
        output, cache = self._functions.forward(batch.x, self.params, examples.fixed,
                                                examples.model, at=at)
        loss, loss_cache = self.task.loss_forward(output, batch.y)
        return Forward(loss, output, cache, loss_cache)

    def backward(self, dloss: Array | float, made: "Forward", grads: Any) -> None:
        """Add the gradients of the loss, times `dloss`, into `grads`."""
        self._functions.backward(self.task.loss_backward(dloss, made.loss_cache), made.cache,
                                 self.params, grads, self.model, False)

    def counts(self, made: "Forward", batch: Batch) -> dict[str, Array]:
        """Return the metrics besides the loss, of the task and of the model, summed over examples.
        """
        counts = self.task.counts(made.output, batch.y)
        if hasattr(self._functions, "counts"):
            counts = counts | self._functions.counts(made.cache, self.model)
        return counts

    def step(self, batches: Sequence[Batch], examples: Examples, lr: Array | float,
             check: Callable[[Batch, "Forward"], None] = lambda batch, made: None) -> Array:
        """Take one step on some mini-batches and return its mean loss, a 0-d array.

        `check` sees each mini-batch and what the forward pass made of it before any parameter
        changes, and may raise.
        """
        if self._flat_grads is None:  # the backward pass is the update, see comet_np.optim
            (batch,) = batches
            made = self.forward(batch, examples, True)
            check(batch, made)
            if self._next is not self.flat:
                shrink(self._next, self.flat, lr, self.config.training.optimizer, self._matrices)
            self.backward(-lr, made, self._grads)
            if self._next is not self.flat:
                self.flat[...] = self._next
            self.state = self.state._replace(step=self.state.step + 1)
            return made.loss
        backend_of(self._flat_grads).clear(self._flat_grads)
        total = sum(len(batch.rows) for batch in batches)
        mean: Any = 0.0
        for part in self.ranks.parts(len(batches)):
            batch = batches[part]
            made, share = self.forward(batch, examples, True, part), len(batch.rows) / total
            check(batch, made)
            self.backward(share if self.scaling is None else share * self.scaling[0], made,
                          self._grads)
            mean = made.loss if share == 1 else mean + share * made.loss
            del made  # before the next forward pass keeps as much
        mean = self.ranks.sum_(self._flat_grads, mean)
        self._update(self._flat_grads, lr)
        return mean

    def _update(self, g: Array, lr: Array | float) -> None:
        """Take a step of the optimizer; in float16 it is left out if g (n,) is not finite."""
        scale: Any = 1.0
        if self.scaling is not None:
            finite = xp_of(g).isfinite(squared_norm(g))
            scale = unscaled(self.scaling, finite)
            adjust(self.scaling, finite)
        self.state = update(self.flat, g, self.state, lr, self.config.training.optimizer,
                            self._matrices, scale)


class Forward(NamedTuple):
    """What a forward pass made: the loss, a 0-d array; the output; what the backwards read."""

    loss: Array
    output: Array
    cache: Any
    loss_cache: Any


def evaluate(learner: Learner, examples: Examples,
             check: Callable[[Batch, Forward], None] = lambda batch, made: None
             ) -> dict[str, float]:
    """Return the mean loss over all examples, and the other metrics as means over them.

    `check` sees each block of examples and what the forward pass made of it, and may raise.
    """
    to_host = backend_of(learner.flat).to_host
    ours: list[dict[str, float]] = []
    for batch in examples.blocks(learner.ranks):
        made = learner.forward(batch, examples)
        check(batch, made)
        found = {"loss": float(to_host(made.loss)) * len(batch.rows)}
        found |= {name: to_host(count).item()
                  for name, count in learner.counts(made, batch).items()}
        ours.append(found)
        del made  # before the next forward pass keeps as much
    sums: dict[str, float] = {}
    for found in learner.ranks.in_order(ours):  # so the sums do not depend on the ranks
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + value
    return learner.task.measures({name: value / len(examples) for name, value in sums.items()})
