"""The steps of an optimizer as a function of decisions, in plain NumPy and float64.

With the decisions of `Training.right` this is `comet_np.optim` and `comet_np.schedules`, and a test
holds it against them; with another value of one of them it is what a mistake computes.

Each step is computed from the parameters that the step before has *returned*, and the moments from
the gradients there, so that nothing drifts apart and one wrong step does not make all later ones
differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..optim import OptimizerConfig
from ..rng import stream
from ..schedules import schedule
from .mistakes import GRADIENTS, TRAINING, Choices, Mistake
from .mlp import MLPSubject
from .search import Agreement, NotApplicable

Array = Any
STEPS = 6
SAMPLE = 4096  # elements of each parameter that are compared
QUICK = 3, 64  # steps and elements, by which most mistakes are refuted and numbers are fitted
DETAIL = 50  # a change that is not so many times its rounding says nothing


class Plan(NamedTuple):
    """What the training loop should be."""

    optimizer: OptimizerConfig
    lr: float
    schedule: str
    total: int | None
    warmup: int

    @property
    def steps(self) -> int:
        """How many steps are looked at."""
        steps = STEPS + min(self.warmup, STEPS)
        return steps if self.total is None else min(steps, self.total)

    def check(self) -> None:
        """Raise a UserError if this cannot be followed."""
        if not self.lr > 0:
            raise UserError(f"lr must be positive, got {self.lr}")
        if self.schedule != "constant" and self.total is None:
            raise UserError(f"the schedule {self.schedule} needs total=, the number of steps of "
                            "the run")
        if self.total is not None and self.total < 1:
            raise UserError(f"total must be at least 1, got {self.total}")
        schedule(self.schedule, 0, self.total or 0, self.warmup if self.total else 0)
        config = self.optimizer
        if config.clip_norm is not None and (config.l1 or config.clip_value is not None):
            raise UserError("a loop that clips by norm and has an L1 penalty or clips by value "
                            "too cannot be diagnosed: leave one of them out")


class Moments(NamedTuple):
    """The state of an optimizer: the number of steps, the moments, and the largest second one.

    rounding : (n,), by how much the gradients so far may be wrong.
    """

    step: int
    first: Array
    second: Array
    largest: Array
    rounding: Array


class Training:
    """A training loop whose steps were seen.

    Parameters
    ----------
    subjects : sequence of MLPSubject
        The network before each step.
    batches : sequence of (x, labels)
        Of each step, x in float64.
    points : sequence of mappings of str to array
        The parameters before the first step and after each.
    plan : Plan
    allowed : float
        What a relative difference may be.
    sample : int
        How many elements of each parameter are compared at most.
    """

    unit = "changes of parameters"

    def __init__(self, subjects: Sequence[MLPSubject], batches: Sequence[tuple[Array, Array]],
                 points: Sequence[Mapping[str, Array]], plan: Plan, allowed: float,
                 sample: int = SAMPLE) -> None:
        self.subjects, self.batches, self.plan, self.allowed = subjects, batches, plan, allowed
        self.T = len(subjects)
        start = points[0]
        self.names = [*subjects[0].parameters, *(name for name in start
                                                if name not in subjects[0].parameters)]
        draw = stream(5, "diagnose")
        self.sample = {name: np.sort(draw.permutation(start[name].size)[:sample])
                       for name in self.names}
        sizes = [len(self.sample[name]) for name in self.names]
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.of = np.repeat(np.arange(len(sizes)), sizes)  # the parameter of each element

        def each(values: Sequence[bool]) -> Array:
            return np.array(values, bool)[self.of]

        # Routing weights lie behind, and have no gradient.
        self.fixed = each([name not in subjects[0].parameters for name in self.names])
        self.matrix = each([start[name].ndim > 1 for name in self.names])
        last = f"fc{subjects[0].L}."
        self.frozen = {"none": each([False] * len(sizes)),
                       "biases": ~self.matrix,
                       "first": each([name.startswith("fc1.") for name in self.names]),
                       "output": each([name.startswith(last) for name in self.names]),
                       "hidden": each([not name.startswith(last) for name in self.names]),
                       "all": each([True] * len(sizes))}
        self.p = np.array([np.concatenate([
            point[name].ravel()[self.sample[name]].astype("float64") for name in self.names])
            for point in points])
        self.seen = np.diff(self.p, axis=0)
        eps = np.array([np.finfo(start[name].dtype).eps for name in self.names])[self.of]
        self.rounding = 2 * eps * np.maximum(np.abs(self.p[:-1]), np.abs(self.p[1:]))
        self._gradients: dict[tuple[Any, ...], tuple[Array, Array]] = {}
        self._decided: Array | None = None
        steps, few = QUICK
        self.quick = None if sample <= few else Training(
            subjects[:steps], batches[:steps], points[:steps + 1], plan, allowed, few)

    @property
    def right(self) -> Choices:
        """The decisions of the specification, but for the gradients'."""
        config = self.plan.optimizer
        clip = "norm" if config.clip_norm else "value" if config.clip_value else "none"
        return {"V_training": "fixed", "frozen": "none", "sign": -1, "repeat": 1, "late": False,
                "schedule": "given", "rate": self.plan.lr, "weight_decay": config.weight_decay,
                "decay": "decoupled" if config.name == "adamw" else "coupled",
                "decay_biases": config.decay_biases, "momentum_form": "heavy",
                "momentum": config.momentum, "correction": "both", "eps_place": "outside",
                "eps": config.eps, "betas": "given", "beta1": config.beta1,
                "beta2": config.beta2, "second": "mean", "clip": clip, "l1": "weights",
                "optimizer": "adam" if config.name == "adamw" else config.name}

    @property
    def mistakes(self) -> list[Mistake]:
        """What may be wrong with this loop, the likeliest first."""
        return [mistake for mistake in TRAINING if self._fits(mistake)] + list(GRADIENTS)

    @property
    def visible(self) -> list[Mistake]:
        """Those of which it is worth saying that they would not have shown."""
        config = self.plan.optimizer
        return [mistake for mistake in TRAINING if self._fits(mistake)
                and (config.weight_decay or mistake.decision not in ("decay", "V_training"))]

    def _fits(self, mistake: Mistake) -> bool:
        config, name = self.plan.optimizer, mistake.name
        adam = config.name in ("adam", "adamw")
        planned = self.plan.schedule != "constant"
        if name.startswith("adam-"):
            return adam
        if name == "momentum-times-rate":
            return config.name == "momentum" and planned
        if name.startswith("momentum-"):
            return config.name == "momentum"
        if name == "optimizer-other":
            return {"sgd": adam, "adam": not adam}.get(mistake.value, config.name != "momentum")
        if mistake.decision == "schedule":
            warm = mistake.value in ("no warmup", "from one", "within")
            return self.plan.schedule == "warmup_cosine" if warm else planned
        if mistake.value in ("schedule only", "unscheduled") and not planned:
            return False
        if mistake.value in ("coupled", "decoupled"):
            return config.name != "sgd"
        if mistake.decision in ("decay", "decay_biases") or name == "V-decayed":
            return bool(config.weight_decay)
        if mistake.decision == "clip":
            return self.right["clip"] != "none" and (self.right["clip"] == "norm"
                                                     or mistake.value in ("none", "norm"))
        return bool(config.l1) if mistake.decision == "l1" else True

    def compare(self, choices: Choices, quick: bool) -> Agreement:
        """Return how the changes of all parameters in all steps differ from these decisions'."""
        if quick and self.quick is not None:
            return self.quick.compare(choices, False)
        want, slack = self.changes(choices)
        if choices["V_training"] == "trained":
            if not self.seen[:, self.fixed].any():
                raise NotApplicable
            want = np.where(self.fixed, self.seen, want)
        size = np.maximum.reduceat(np.abs(want), self.starts, axis=1)
        # The floor is for changes of which all terms cancel.
        size = np.maximum(size, self.allowed * size.max(axis=1, keepdims=True))
        room = size[:, self.of] + slack / self.allowed
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.where(self.seen == want, 0.0, np.abs(self.seen - want) / room)
        error = np.where(np.isnan(error), np.inf, error)
        return Agreement(np.maximum.reduceat(error, self.starts, axis=1).ravel(),
                         self.decided(choices).ravel())

    def decided(self, choices: Choices) -> Array:
        """Return (T, parameters) whether the changes are large enough to be compared.

        As the specification says, which is asked first: no mistake may make its own choice.
        """
        if self._decided is None:
            want, slack = self.changes(choices)
            clear = (np.abs(want) >= DETAIL * slack) & (want != 0)
            size = np.maximum.reduceat(np.abs(want), self.starts, axis=1)
            self._decided = np.maximum.reduceat(clear, self.starts, axis=1) | (size == 0)
            if self.quick is not None:
                self.quick.decided(choices)
        return self._decided

    def item(self, number: int) -> str:
        """Return what an item is, in words."""
        step, name = divmod(number, len(self.names))
        return f"{self.names[name]} in step {step + 1}"

    def changes(self, choices: Choices) -> tuple[Array, Array]:
        """Return the change of every element in each step, and what rounding makes of it.

        Returns
        -------
        change, slack : (T, n)
        """
        gradients, products = self._gradients_of(choices)
        zero = np.zeros(len(self.of))
        state = Moments(0, zero, zero, zero, zero)
        weights = np.zeros(self.T)  # of the gradients of the steps, in the one that is used
        changes, slacks = [], []
        for t in range(self.T):
            if choices["late"] and t == 0:
                changes.append(zero)
                slacks.append(self.rounding[t])
                continue
            if choices["calls"] != "accumulate":
                weights = 0 * weights
            weights[t] += 1
            p = self.p[t]
            g, factor = self._clipped(weights @ gradients, weights, products, p, choices)
            weights = factor * weights
            # By how much a sum over the batch may be wrong: Adam makes much of little.
            largest = np.maximum.reduceat(np.abs(g), self.starts)
            noise = ~self.fixed * np.maximum(largest, 0.01 * largest.max(initial=0.0))[self.of]
            state = state._replace(rounding=np.maximum(state.rounding, 0.1 * self.allowed * noise))
            slack = self.rounding[t]
            for _ in range(choices["repeat"]):
                new, state, more = self._stepped(p, g, state, t, choices)
                still = self.frozen[choices["frozen"]]
                if choices["V_training"] != "decayed":
                    still = still | self.fixed
                p, slack = np.where(still, p, new), slack + np.where(still, 0.0, more)
            changes.append(p - self.p[t])
            slacks.append(slack)
        return np.array(changes), np.array(slacks)

    def rate(self, choices: Choices, t: int) -> float:
        """Return the learning rate of step t, from 0."""
        plan, how = self.plan, choices["schedule"]

        def factor(step: int, name: str = plan.schedule, more: int = 0,
                   warmup: int = plan.warmup) -> float:
            if name == "constant":
                return 1.0
            total = (plan.total or 0) + more
            return schedule(name, min(max(step, 0), total), total, min(warmup, total))

        warming = plan.schedule == "warmup_cosine" and t < plan.warmup
        if how == "compounded":
            found = float(np.prod([factor(each) for each in range(t + 1)]))
        elif how == "linear" and not warming:
            first = plan.warmup if plan.schedule == "warmup_cosine" else 0
            found = 1 - (t - first) / max(1, (plan.total or 0) - first)
        elif how == "from one" and warming:
            found = (t + 1) / plan.warmup
        elif how == "no warmup" or (how == "within" and not warming):
            found = factor(t, "cosine")
        else:
            found = {"late": lambda: factor(t - 1), "early": lambda: factor(t + 1),
                     "missing": lambda: 1.0, "shorter": lambda: factor(t, more=-1),
                     "longer": lambda: factor(t, more=1)}.get(how, lambda: factor(t))()
        return float(choices["rate"] * found)

    def _gradients_of(self, choices: Choices) -> tuple[Array, Array]:
        """Return the gradients of all steps (T, n), and their products (parameters, T, T)."""
        key = (choices["late"], *(choices[decision] for decision in self.subjects[0].right
                                  if decision != "calls"))
        if key not in self._gradients:
            fresh = choices | {"calls": "fresh"}
            batches = [*self.batches[:1], *self.batches[:-1]] if choices["late"] else self.batches
            whole = [subject.gradients(x, labels, fresh)
                     for subject, (x, labels) in zip(self.subjects, batches, strict=True)]
            products = np.zeros((len(self.names), self.T, self.T))
            parts = []
            for i, name in enumerate(self.names):
                if name in whole[0]:
                    rows = np.array([each[name].ravel() for each in whole])
                    products[i] = rows @ rows.T
                    parts.append(rows[:, self.sample[name]])
                else:
                    parts.append(np.zeros((self.T, len(self.sample[name]))))
            self._gradients[key] = np.concatenate(parts, axis=1), products
        return self._gradients[key]

    def _clipped(self, g: Array, weights: Array, products: Array, p: Array, choices: Choices
                 ) -> tuple[Array, float]:
        """Return the gradient with its L1 penalty, clipped, and the factor if it is one."""
        config, how = self.plan.optimizer, choices["clip"]
        if config.l1 and choices["l1"] != "none":
            of = ~self.fixed & (self.matrix | (choices["l1"] == "all"))
            g = g + config.l1 * np.sign(p) * of
        limit = config.clip_norm or config.clip_value
        if how == "none" or limit is None:
            return g, 1.0
        if how == "value":
            return np.clip(g, -limit, limit), 1.0
        norms = np.sqrt(np.maximum(weights @ products @ weights, 0.0))
        if how == "each":
            return g * np.minimum(limit / (norms + 1e-6), 1.0)[self.of], 1.0
        norm = float(np.sqrt((norms**2).sum()))
        factor = limit / max(norm + 1e-6 * (how != "no eps"), 1e-300)
        factor = factor if how == "always" else min(factor, 1.0)
        return factor * g, factor

    def _stepped(self, p: Array, g: Array, state: Moments, t: int, choices: Choices
                 ) -> tuple[Array, Moments, Array]:
        """Return the parameters after a step, the state, and what rounding makes of them."""
        rate, how = self.rate(choices, t), choices["decay"]
        decay = choices["weight_decay"] * (self.matrix | choices["decay_biases"])
        if how == "coupled":
            g = g + decay * p
        step = state.step + 1
        optimizer, number = choices["optimizer"], choices["momentum"]
        if type(optimizer) is tuple:
            optimizer, number = optimizer
        slack = 0 * p
        if optimizer == "sgd" or (optimizer == "momentum" and choices["momentum_form"] == "none"):
            state, move = state._replace(step=step), rate * g
        elif optimizer == "momentum":
            form = choices["momentum_form"]
            new = (1 - number) * g if form == "dampened" or (
                form == "dampened later" and step > 1) else g
            v = number * state.first + (rate if form == "times rate" else 1.0) * new
            state = state._replace(step=step, first=v)
            move = v if form == "times rate" else rate * (
                g + number * v if form == "nesterov" else v)
        else:
            state, move, slack = _adam(g, state, rate, choices)
        # Of a decoupled decay: by how much p shrinks.
        shrinking = {"coupled": 0.0, "none": 0.0, "without rate": 1.0,
                     "schedule only": rate / choices["rate"],
                     "unscheduled": choices["rate"]}.get(how, rate)
        kept = 1 - shrinking * decay
        new = kept * (p + choices["sign"] * move) if how == "after" else (
            kept * p + choices["sign"] * move)
        return new, state, slack


def _adam(g: Array, state: Moments, rate: float, choices: Choices) -> tuple[Moments, Array, Array]:
    """Return the state after a step of Adam, lr u / (sqrt(v) + eps), and its rounding."""
    beta1, beta2, eps = choices["beta1"], choices["beta2"], choices["eps"]
    if choices["betas"] == "swapped":
        beta1, beta2 = beta2, beta1
    step = state.step + 1
    u = beta1 * state.first + (1 - beta1) * g
    v = beta2 * state.second + (1 - beta2) * g * g
    largest = np.maximum(state.largest, v)
    state = state._replace(step=step, first=u, second=v, largest=largest)
    how = choices["correction"]
    counted = step + (how == "late")
    u = u / (1 - beta1**counted) if how not in ("none", "second") else u
    corrected = 1 - beta2**counted if how not in ("none", "first") else 1.0
    v = (largest if choices["second"] == "amsgrad" else v) / corrected
    if choices["second"] == "no root":
        root = v
    elif choices["eps_place"] == "inside":
        root = np.sqrt(v + eps)
    else:
        root = np.sqrt(v)
    below = root + {"inside": 0.0, "none": 0.0, "uncorrected": eps / np.sqrt(corrected)}.get(
        choices["eps_place"], eps)
    with np.errstate(divide="ignore", invalid="ignore"):
        move = np.where(u == 0, 0.0, rate * u / below)
        slack = rate * state.rounding / below * (1 + np.abs(u) / below)
    slack = np.where(state.rounding == 0, 0.0, slack)
    return state, move, np.where(np.isnan(slack), np.inf, slack)
