"""Cases of training: optimizers and schedules alone, and ten steps of an MLP."""

from functools import partial
from typing import Any

import numpy as np

from ...models import mlp
from ...models.mlp import MLPConfig
from ...optim import OptimizerConfig, init_state, update
from ...schedules import schedule
from ...tree import flatten, matrix_elements
from .making import Draw, Expected, Made, case, linear_names, trees
from .mlp_cases import ALL, SMALL, given, settings, step

BITS = 6
STEPS = 10


def train(config: MLPConfig, rule: OptimizerConfig, lr: float, course: str, warmup: int,
          draw: Draw) -> Made:
    """Return the parameters after some of ten steps on one batch, and the loss before each."""
    arrays, expected = given(draw, config, 8, False, 4), Expected()
    params, fixed = trees(arrays, config)
    masks = mlp.trace(arrays["x"], params, fixed, config).m
    arrays |= {f"m_{i}": np.asarray(m) for i, m in enumerate(masks, start=1)}
    flat, params = flatten(params)
    state, losses = init_state(flat, rule), []
    for t in range(STEPS):
        _, loss, _, grads, _ = step(arrays["x"], arrays["labels"], params, fixed, config)
        losses.append(loss)
        state = update(flat, flatten(grads)[0], state, lr * schedule(course, t, STEPS, warmup),
                       rule, matrix_elements(params))
        if t + 1 in (1, 2, STEPS):
            expected.add("trajectory", **{
                f"{name}_after_{t + 1}": p.copy() for name, p in linear_names(params)})
    expected.add("trajectory", losses=np.array(losses))
    return expected.of(settings(config) | optimizer_settings(rule, lr) | {
        "schedule": course, "steps": STEPS, "warmup": warmup}, arrays)


def factors(name: str, total: int, warmup: int, draw: Draw) -> Made:
    """Return the factor of the learning rate at each step."""
    step = np.arange(total)
    expected = Expected()
    expected.add("forward", factor=np.array([schedule(name, int(t), total, warmup) for t in step]))
    return expected.of({"schedule": name, "steps": total, "warmup": warmup}, {"step": step})


def optimizer(rule: OptimizerConfig, lr: float, draw: Draw) -> Made:
    """Return parameters after each of some steps with gradients that are given.

    Gradients are of very different sizes, and one element never has any.
    """
    n, steps = 12, 4
    p = draw.grid("p", (n,), 1, BITS)
    arrays = {"p": p.copy()}
    state = init_state(p, rule)
    expected = Expected()
    for t in range(1, steps + 1):
        g = draw.grid(f"dp_{t}", (n,), 1, BITS)
        g *= 2.0 ** -(np.arange(n) % 4 * 4)
        g[-1] = 0
        arrays[f"dp_{t}"] = g.copy()
        state = update(p, g, state, lr, rule)
        expected.add("trajectory", **{f"p_after_{t}": p.copy()})
    return expected.of(optimizer_settings(rule, lr) | {"steps": steps}, arrays)


def optimizer_settings(rule: OptimizerConfig, lr: float) -> dict[str, Any]:
    """Return what a stranger needs of an optimizer."""
    names = {"sgd": (), "momentum": ("momentum",)}.get(rule.name, ("beta1", "beta2", "eps"))
    return {"optimizer": rule.name, "lr": lr, "weight_decay": rule.weight_decay,
            "decay_biases": rule.decay_biases, "clip_norm": rule.clip_norm or 0.0,
            "clip_value": rule.clip_value or 0.0, **{name: getattr(rule, name) for name in names}}


def flags(rule: OptimizerConfig, course: str = "constant") -> set[str]:
    """Return the mistakes that a case catches."""
    found = {"sgd": set(), "momentum": {"momentum-dampened", "momentum-nesterov"}}.get(
        rule.name, {"adam-uncorrected"})
    if rule.eps > 1e-6:
        found |= {"adam-eps-inside"}
    if rule.weight_decay:
        found |= {"decay-without-rate"} | ({"decay-coupled"} if rule.name == "adamw" else set())
    if not rule.decay_biases:
        found |= {"decay-of-biases"}
    if course != "constant":
        found |= {"schedule-early", "schedule-late", "schedule-missing"}
    return found


COURSES = {
    "sgd": (OptimizerConfig("sgd"), 0.5, "constant", 0),
    "sgd-decay": (OptimizerConfig("sgd", weight_decay=0.1), 0.5, "constant", 0),
    "sgd-decay-of-weights": (OptimizerConfig("sgd", weight_decay=0.1, decay_biases=False), 0.5,
                             "constant", 0),
    "momentum": (OptimizerConfig("momentum", momentum=0.9), 0.1, "constant", 0),
    "momentum-decay": (OptimizerConfig("momentum", momentum=0.9, weight_decay=0.1), 0.1,
                       "constant", 0),
    "adam": (OptimizerConfig("adam"), 0.01, "constant", 0),
    "adam-decay": (OptimizerConfig("adam", weight_decay=0.1, eps=1e-3), 0.01, "constant", 0),
    "adamw": (OptimizerConfig("adamw", weight_decay=0.1, eps=1e-3), 0.01, "constant", 0),
    "sgd-cosine": (OptimizerConfig("sgd"), 0.5, "cosine", 0),
    "adamw-warmup": (OptimizerConfig("adamw", weight_decay=0.1), 0.01, "warmup_cosine", 3)}
for name, (rule, lr, course, warmup) in COURSES.items():
    case(f"mlp-train-{name}", f"ten steps of {name.replace('-', ' ')} on one batch", ALL, "mlp",
         flags(rule, course) | {"gradients-accumulate", "parameter-frozen"})(
             partial(train, MLPConfig(SMALL), rule, lr, course, warmup))
for name, total, warmup in (("constant", 7, 0), ("cosine", 10, 0), ("warmup_cosine", 12, 4)):
    case(f"schedule-{name.replace('_', '-')}", f"the learning rate's schedule {name}",
         "schedule", "schedule", flags(OptimizerConfig(), name))(
             partial(factors, name, total, warmup))
for name, rule, lr in (
        ("sgd", OptimizerConfig("sgd", weight_decay=0.1), 0.5),
        ("sgd-clip-norm", OptimizerConfig("sgd", clip_norm=0.5), 0.5),
        ("sgd-clip-value", OptimizerConfig("sgd", clip_value=0.25), 0.5),
        ("momentum", OptimizerConfig("momentum", weight_decay=0.1), 0.1),
        ("adam", OptimizerConfig("adam", weight_decay=0.1, eps=1e-4), 0.125),
        ("adamw", OptimizerConfig("adamw", weight_decay=0.1, eps=1e-4), 0.125)):
    case(f"optimizer-{name}", f"steps of {name.replace('-', ' ')} with given gradients",
         "optimizer", "optimizer", flags(rule))(partial(optimizer, rule, lr))
