"""The optimizers against their formulas, one parameter at a time, and gradient clipping."""

import math
from dataclasses import replace

import numpy as np
import pytest

from comet_np.backends import reference
from comet_np.errors import UserError
from comet_np.optim import OPTIMIZERS, OptimizerConfig, init_state, shrink, update
from tests.tolerances import assert_close

N, STEPS, LR = 7, 5, 0.1
MATRICES = 4  # of the N parameters; the others are biases
CONFIGS = [OptimizerConfig(name, **settings) for name in OPTIMIZERS for settings in (
    {}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "decay_biases": False}, {"l1": 0.3},
    {"clip_norm": 0.5}, {"clip_value": 0.3, "weight_decay": 0.1},
    {"clip_value": 0.9, "clip_norm": 1.0, "l1": 0.1, "decay_biases": False})]
CONFIGS += [OptimizerConfig("momentum", momentum=0.7)] + [
    OptimizerConfig(name, beta1=0.8, beta2=0.99, eps=1e-3) for name in ("adam", "adamw")]


def naive_step(p, g, state, step, config, decay):
    """Return one parameter, its moments in `state` updated, after a step; g is clipped."""
    if config.name == "adamw":
        p -= LR * decay * p
    else:
        g += decay * p
    if config.name == "sgd":
        return p - LR * g
    if config.name == "momentum":
        state[0] = config.momentum * state[0] + g
        return p - LR * state[0]
    state[0] = config.beta1 * state[0] + (1 - config.beta1) * g
    state[1] = config.beta2 * state[1] + (1 - config.beta2) * g * g
    first, second = state[0] / (1 - config.beta1**step), state[1] / (1 - config.beta2**step)
    return p - LR * first / (math.sqrt(second) + config.eps)


def check_optimizer(config, draw, step=update, dtype="float64"):
    """Assert that a few steps on random gradients are those of the formulas."""
    p = draw.standard_normal(N).astype(dtype)
    naive, moments = [float(p_i) for p_i in p], [[0.0, 0.0] for _ in p]
    state = init_state(p, config)
    for number in range(1, STEPS + 1):
        g = draw.standard_normal(N).astype(dtype)
        clipped = [float(g_i) + (config.l1 * math.copysign(1, p_i) if i < MATRICES else 0)
                   for i, (g_i, p_i) in enumerate(zip(g, naive, strict=True))]
        if config.clip_value is not None:
            clipped = [min(max(g_i, -config.clip_value), config.clip_value) for g_i in clipped]
        if config.clip_norm is not None:
            norm = math.sqrt(sum(g_i * g_i for g_i in clipped))
            clipped = [g_i * min(1, config.clip_norm / (norm + 1e-6)) for g_i in clipped]
        decays = [config.weight_decay if i < MATRICES or config.decay_biases else 0.0
                  for i in range(N)]
        naive = [naive_step(p_i, g_i, state_i, number, config, decay) for p_i, g_i, state_i, decay
                 in zip(naive, clipped, moments, decays, strict=True)]
        state = step(p, g, state, LR, config, MATRICES)
        assert state.step == number
    assert p.dtype == dtype
    assert_close(p, naive, "sum")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_formulas(config, kernels, dtype, draw):
    with reference() if not kernels else np.errstate():
        check_optimizer(config, draw, dtype=dtype)


def forgets(field):
    """Return an update whose configuration has the default in this field."""
    def step(p, g, state, lr, config, matrices):
        return update(p, g, state, lr,
                      replace(config, **{field: getattr(OptimizerConfig(), field)}), matrices)

    return step


def without_bias_correction(p, g, state, lr, config, matrices):
    late = state._replace(step=state.step + 10**6)
    return update(p, g, late, lr, config, matrices)._replace(step=state.step + 1)


def without_moments(p, g, state, lr, config, matrices):
    fresh = init_state(p, config)._replace(step=state.step)
    return update(p, g, fresh, lr, config, matrices)


def ascending(p, g, state, lr, config, matrices):
    return update(p, -g, state, lr, config, matrices)


def all_are_matrices(p, g, state, lr, config, matrices):
    return update(p, g, state, lr, config)


MUTANTS = {
    "no weight decay": (forgets("weight_decay"), OptimizerConfig(weight_decay=0.1)),
    "biases decay": (forgets("decay_biases"),
                     OptimizerConfig(weight_decay=0.1, decay_biases=False)),
    "no L1 penalty": (forgets("l1"), OptimizerConfig(l1=0.1)),
    "an L1 penalty on biases": (all_are_matrices, OptimizerConfig(l1=0.1)),
    "no clipping by norm": (forgets("clip_norm"), OptimizerConfig(clip_norm=0.5)),
    "no clipping by value": (forgets("clip_value"), OptimizerConfig(clip_value=0.3)),
    "other beta2": (forgets("beta2"), OptimizerConfig("adam", beta2=0.99)),
    "Adam without bias correction": (without_bias_correction, OptimizerConfig("adam")),
    "AdamW without bias correction": (without_bias_correction, OptimizerConfig("adamw")),
    "momentum without velocity": (without_moments, OptimizerConfig("momentum")),
    "Adam without moments": (without_moments, OptimizerConfig("adam")),
    "ascent": (ascending, OptimizerConfig()),
    "decay coupled": (lambda p, g, state, lr, config, matrices: update(
        p, g, state, lr, replace(config, name="adam"), matrices),
        OptimizerConfig("adamw", weight_decay=0.1)),
}


@pytest.mark.parametrize(("step", "config"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(step, config, draw):
    check_optimizer(config, draw)
    with pytest.raises(AssertionError):
        check_optimizer(config, draw, step)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_is_in_place(name, draw):
    config = OptimizerConfig(name)
    p, g = draw.standard_normal(N), draw.standard_normal(N)
    whole, before = np.concatenate([p, p]), g.copy()
    state = init_state(p, config)
    after = update(whole[:N], g, state, LR, config)
    update(p, g, init_state(p, config), LR, config)
    np.testing.assert_array_equal(whole[:N], p)
    np.testing.assert_array_equal(g, before)
    assert after.first is state.first
    assert after.second is state.second
    assert (state.first is None) == (name == "sgd")
    assert (state.second is None) == (name in ("sgd", "momentum"))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_scale_of_the_gradient_is_undone_before_all_else(config, kernels, draw):
    """Penalties and clipping mean the gradient that it stands for."""
    def scaled(p, g, state, lr, config, matrices):
        scale = np.float64(2.0**10)
        return update(p, scale * g, state, lr, config, matrices, 1 / scale)

    with reference() if not kernels else np.errstate():
        check_optimizer(config, draw, scaled)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("scale", [float("nan"), np.float32("nan"), np.array(np.nan)], ids=type)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_where_the_scale_is_nan_the_step_is_left_out(config, scale, kernels, draw):
    p, g = draw.standard_normal(N), draw.standard_normal(N)
    state = update(p, g, init_state(p, config), LR, config, MATRICES)
    arrays = [a for a in (p, state.first, state.second) if a is not None]
    before = [a.copy() for a in arrays]
    g[:3] = np.inf, -np.inf, np.nan
    with reference() if not kernels else np.errstate():
        assert update(p, g, state, LR, config, MATRICES, scale).step == 2  # it counts
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize("spoiled", [np.inf, np.nan])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_norm_that_is_not_finite_is_not_hidden(name, spoiled):
    """Without a scale, the parameters show it, and training stops."""
    p, config = np.ones(N), OptimizerConfig(name, clip_norm=1.0)
    with np.errstate(invalid="ignore"):
        update(p, np.array([spoiled, *(N - 1) * [0.5]]), init_state(p, config), LR, config)
    assert np.isnan(p).any()


def test_a_zero_gradient_is_clipped_to_zero():
    p = np.ones(3)
    config = OptimizerConfig(clip_norm=1.0)
    update(p, np.zeros(3), init_state(p, config), LR, config)
    np.testing.assert_array_equal(p, 1)


def test_the_norm_of_a_float32_gradient_is_summed_in_float64():
    p, g = np.zeros(2, "float32"), np.array([1e30, 1e30], "float32")  # its square overflows
    config = OptimizerConfig(clip_norm=1.0)
    for kernels in (True, False):
        with reference() if not kernels else np.errstate():
            p[:] = 0
            update(p, g, init_state(p, config), 1.0, config)
        assert_close(p, [-(0.5**0.5)] * 2, "sum")


def test_only_sgd_that_does_not_clip_updates_in_the_backward_pass():
    for config in (OptimizerConfig("sgd"), OptimizerConfig("sgd", weight_decay=0.1, l1=0.1)):
        assert config.updates_in_backward
    for config in (OptimizerConfig("adam"), OptimizerConfig("sgd", clip_norm=1.0),
                   OptimizerConfig("sgd", clip_value=1.0)):
        assert not config.updates_in_backward


@pytest.mark.parametrize("matrices", [0, MATRICES, N])
@pytest.mark.parametrize("config", [
    OptimizerConfig(), OptimizerConfig(l1=0.3), OptimizerConfig(weight_decay=0.2, l1=0.3),
    OptimizerConfig(weight_decay=0.2, l1=0.3, decay_biases=False),
    OptimizerConfig(weight_decay=0.2, decay_biases=False)], ids=str)
def test_to_shrink_and_to_add_the_gradient_is_a_step_of_sgd(config, matrices, draw):
    """Of a parameter that is 0, too, whose sign is 0."""
    p, g = draw.standard_normal(N), draw.standard_normal(N)
    p[::3] = 0
    out = np.empty(N)
    shrink(out, p, LR, config, matrices)
    out -= LR * g
    update(p, g, init_state(p, config), LR, config, matrices)
    assert_close(out, p, "elementwise")


@pytest.mark.parametrize(("settings", "message"), [
    ({"name": "adma"}, 'unknown optimizer "adma"; did you mean "adam"'),
    ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
    ({"beta1": -0.1}, r"beta1 must be in \[0, 1\), got -0\.1"),
    ({"beta2": float("nan")}, r"beta2 must be in \[0, 1\), got nan"),
    ({"clip_norm": 0.0}, r"clip_norm must be positive, got 0\.0"),
    ({"clip_value": -1.0}, r"clip_value must be positive, got -1\.0"),
    ({"eps": -1e-8}, r"eps must be at least 0, got -1e-08"),
    ({"weight_decay": -0.1}, r"weight_decay must be at least 0, got -0\.1"),
    ({"l1": -0.1}, r"l1 must be at least 0, got -0\.1"),
])
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**settings)


def test_bad_shapes():
    config = OptimizerConfig()
    with pytest.raises(UserError, match=r"of one shape .* got float64 \(3,\), float64 \(4,\)"):
        update(np.ones(3), np.ones(4), init_state(np.ones(3), config), LR, config)
