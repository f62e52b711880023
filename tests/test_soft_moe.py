"""The soft mixture of experts: against naive loops, differences, PyTorch, and its own laws."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from comet_np.backends import reference
from comet_np.errors import UserError
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.training.model import KNOWN
from comet_np.functional.products import multiply
from comet_np.functional.softmax import softmax
from comet_np.models import mlp, soft_moe
from comet_np.models.soft_moe import SoftMoEConfig, SoftMoEParams
from comet_np.optim import OptimizerConfig, init_state, update
from comet_np.precision import rounded
from comet_np.selfcheck import check_soft_moe_gradients
from comet_np.settings import record, restored
from comet_np.tree import flatten, leaves, matrix_elements, tree_map, zeros_like
from tests import naive
from tests.tolerances import TOLERANCES, assert_close

CONFIG = SoftMoEConfig((5, 7, 6, 3), experts=4, slots=2, activation="tanh")
CASES = [CONFIG, replace(CONFIG, slots=1, bias=False), replace(CONFIG, experts=1, slots=3),
         SoftMoEConfig((5, 3), experts=1), SoftMoEConfig((5, 8, 5), experts=7)]
cases = pytest.mark.parametrize("config", CASES, ids=str)
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


def layer(config, draw, batch=(2,), tokens=6):
    """Return tokens, parameters large enough that the weights are far from equal, a cotangent."""
    x = draw.standard_normal((*batch, tokens, config.widths[0]))
    params, _ = soft_moe.init(config, dtype="float64")
    params = tree_map(lambda a: draw.standard_normal(a.shape), params)
    return x, params, draw.standard_normal((*batch, tokens, config.widths[-1]))


def run(config, x, params, dy, grads=None, **options):
    """Return y, dx and the gradients."""
    grads = zeros_like(params) if grads is None else grads
    y, cache = soft_moe.forward(x, params, (), config, **options)
    return y, soft_moe.backward(dy, cache, params, grads, config), grads


# --- values -------------------------------------------------------------------------------------


def of_expert(slot, params):
    """Return what an expert of tanh makes of a slot, neuron by neuron."""
    for i, (W, b) in enumerate(params, start=1):
        slot = [a + (0 if b is None else b[n]) for n, a in enumerate(naive.product(W, slot))]
        if i < len(params):
            slot = [math.tanh(a) for a in slot]
    return slot


def weights(scores):
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def by_loops(X, params, config):
    """Return Y (T, D_out) of the tokens X (T, D), one number at a time."""
    logits = [naive.product(params.slots, x) for x in X]
    outputs = []
    for s in range(config.experts * config.slots):
        D = weights([row[s] for row in logits])
        slot = [sum(D[t] * X[t][d] for t in range(len(X))) for d in range(len(X[0]))]
        outputs.append(of_expert(slot, params.experts[s // config.slots]))
    rows = []
    for row in logits:
        C = weights(row)
        rows.append([sum(c * y[d] for c, y in zip(C, outputs, strict=True))
                     for d in range(len(outputs[0]))])
    return np.array(rows)


@both
@pytest.mark.parametrize("config", [replace(config, activation="tanh") for config in CASES],
                         ids=str)
def test_it_is_that_of_the_definition(config, kernels, draw):
    x, params, _ = layer(config, draw)
    with np.errstate() if kernels else reference():
        y, cache = soft_moe.forward(x, params, (), config)
    assert_close(y, [by_loops(X, params, config) for X in x], "sum")
    assert_close(cache.dispatch.weights.sum(axis=-2), np.ones((2, len(params.slots))), "sum")
    assert_close(cache.combine.weights.sum(axis=-1), np.ones((2, 6)), "sum")


def test_one_expert_with_one_slot_gives_every_token_the_same(draw):
    """What it sees is one mean of the tokens: why it cannot know the norm of all."""
    config = SoftMoEConfig((5, 8, 3), experts=1)
    x, params, _ = layer(config, draw)
    y, cache = soft_moe.forward(x, params, (), config)
    slot = (cache.dispatch.weights * x).sum(axis=-2)
    expected, _ = mlp.forward(slot, params.experts[0], (), config.expert)
    for t in range(6):
        assert_close(y[:, t], expected, "sum")


def test_without_logits_all_weights_are_equal(draw):
    x, params, _ = layer(CONFIG, draw)
    y, _ = soft_moe.forward(x, params._replace(slots=np.zeros_like(params.slots)), (), CONFIG)
    mean = x.mean(axis=-2)
    outputs = [mlp.forward(mean, p, (), CONFIG.expert)[0] for p in params.experts]
    for t in range(6):
        assert_close(y[:, t], np.mean(outputs, axis=0), "sum")


@cases
def test_permuted_tokens_give_permuted_outputs(config, draw):
    x, params, dy = layer(config, draw)
    order = draw.permutation(6)
    y, dx, g = run(config, x, params, dy)
    permuted = run(config, x[:, order], params, dy[:, order])
    assert_close(permuted[0], y[:, order], "sum")
    assert_close(permuted[1], dx[:, order], "sum")
    for ours, theirs in zip(leaves(permuted[2]), leaves(g), strict=True):
        assert_close(ours, theirs, "sum")


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (0,)])
def test_leading_axes_are_free(batch, draw):
    x, params, dy = layer(CONFIG, draw, batch)
    y, dx, g = run(CONFIG, x, params, dy)
    expected = zeros_like(params)
    for i in np.ndindex(batch):
        y_i, dx_i, _ = run(CONFIG, x[i], params, dy[i], expected)
        assert_close(y[i], y_i, "sum")
        assert_close(dx[i], dx_i, "sum")
    assert (y.shape, dx.shape) == (dy.shape, x.shape)
    for ours, theirs in zip(leaves(g), leaves(expected), strict=True):
        assert_close(ours, theirs, "sum")


def test_extreme_logits_are_finite(draw):
    x, params, dy = layer(CONFIG, draw)
    y, dx, g = run(CONFIG, 1e4 * x, params, dy)
    assert all(np.isfinite(a).all() for a in (y, dx, *leaves(g)))


def test_experts_that_are_kept(draw):
    """The weights of the others are 0, and those of the kept ones in proportion as before."""
    x, params, _ = layer(CONFIG, draw)
    everyone, whole = soft_moe.forward(x, params, (), CONFIG)
    kept = np.array([[True, False, True, False], [False, False, False, True]])
    y, cache = soft_moe.forward(x, params, (), CONFIG, kept)
    C = whole.combine.weights * kept.repeat(2, axis=-1)[:, None, :]
    C /= C.sum(axis=-1, keepdims=True)
    assert_close(cache.combine.weights, C, "sum")
    assert_close(y, C @ whole.combine.slots, "sum")
    assert not cache.combine.weights[1, :, :6].any()
    all_kept, _ = soft_moe.forward(x, params, (), CONFIG, np.ones((2, 4), bool))
    np.testing.assert_array_equal(all_kept, everyone)


def test_a_kept_expert_is_found_however_small_its_weight():
    """Its weight among all would be 0: the others are left out before the softmax."""
    assert softmax(np.array([0.0, -2000.0]), -1, np.array([False, True])).tolist() == [0, 1]


def test_products_are_taken_in_the_format_that_is_asked_for(draw):
    """But for the logits."""
    config = replace(CONFIG, compute="float16")
    x, params, _ = layer(config, draw)
    y, cache = soft_moe.forward(x, params, (), config)
    np.testing.assert_array_equal(cache.logits, soft_moe.forward(x, params, (), CONFIG)[1].logits)
    C, slots = (rounded(a, "float16") for a in (cache.combine.weights, cache.combine.slots))
    assert_close(y, C @ slots, "sum")
    assert np.abs(y - cache.combine.weights @ cache.combine.slots).max() > 1e-6


# --- gradients ----------------------------------------------------------------------------------


@both
@cases
def test_gradients(config, kernels, draw):
    with np.errstate() if kernels else reference():
        result = check_soft_moe_gradients(layer(config, draw)[0], config)
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result


def test_full_jacobian(draw):
    config = SoftMoEConfig((2, 3, 2), experts=2)
    x = draw.standard_normal((1, 3, 2))
    result = check_soft_moe_gradients(x, config, full=True)
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result
    assert result.perturbations == x.size + soft_moe.parameter_count(config)


@pytest.mark.parametrize("kept", [None, np.array([[True, False, True, True],
                                                  [False, False, True, False]])])
def test_gradients_by_complex_step(kept, draw):
    result = check_soft_moe_gradients(layer(CONFIG, draw)[0], CONFIG, kept, complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


@cases
def test_a_step_of_sgd_inside_the_backward_pass(config, draw):
    """With grads = params and the cotangent scaled by -lr it is the step with a buffer."""
    x, params, dy = layer(config, draw)
    _, dx, g = run(config, x, params, -0.1 * dy)
    expected = tree_map(np.add, params, g)
    params = copy.deepcopy(params)
    _, inside, _ = run(config, x, params, -0.1 * dy, params)
    assert_close(inside, dx, "sum")
    for ours, theirs in zip(leaves(params), leaves(expected), strict=True):
        assert_close(ours, theirs, "sum")


@both
def test_gradients_are_added_and_nothing_else_is_written(kernels, draw):
    x, params, dy = layer(CONFIG, draw)
    with np.errstate() if kernels else reference():
        _, _, once = run(CONFIG, x, params, dy)
        for array in (x, dy, *leaves(params)):
            array.flags.writeable = False
        _, cache = soft_moe.forward(x, params, (), CONFIG)
        before, grads = copy.deepcopy(cache), tree_map(np.ones_like, params)
        soft_moe.backward(dy, cache, params, grads, CONFIG)
    for ours, theirs in zip(leaves(cache), leaves(before), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(leaves(grads), leaves(once), strict=True):
        assert_close(ours, theirs + 1, "sum")


@cases
def test_the_input_gradient_can_be_left_out(config, draw):
    x, params, dy = layer(config, draw)
    _, _, expected = run(config, x, params, dy)
    _, cache = soft_moe.forward(x, params, (), config)
    grads = zeros_like(params)
    assert soft_moe.backward(dy, cache, params, grads, config, False) is None
    for ours, theirs in zip(leaves(grads), leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- PyTorch ------------------------------------------------------------------------------------


def torch_forward(torch, x, params, config):
    """Return the layer's output by PyTorch, as its paper's listing has it."""
    Phi, experts = params
    logits = torch.einsum("btd,nd->btn", x, Phi)
    D, C = torch.softmax(logits, dim=1), torch.softmax(logits, dim=2)
    slots = torch.einsum("btd,btn->bnd", x, D).chunk(config.experts, dim=1)
    outputs = []
    for h, weights_and_biases in zip(slots, experts, strict=True):
        for i, (W, b) in enumerate(weights_and_biases, start=1):
            h = torch.nn.functional.linear(h, W, b)
            h = torch.tanh(h) if i < len(weights_and_biases) else h
        outputs.append(h)
    return torch.einsum("bnd,btn->btd", torch.cat(outputs, dim=1), C)


@pytest.mark.parametrize("config", [replace(config, activation="tanh") for config in CASES],
                         ids=str)
def test_pytorch_agrees_and_so_do_ten_steps_of_adam(config, draw):
    torch = pytest.importorskip("torch")
    x, params, _ = layer(config, draw)
    target = draw.standard_normal((2, 6, config.widths[-1]))
    flat, params = flatten(params)
    theirs = tree_map(lambda a: torch.tensor(a, requires_grad=True), params)
    their_x = torch.tensor(x, requires_grad=True)
    adam = torch.optim.Adam(list(leaves(theirs)), lr=0.01)
    g, grads = flatten(zeros_like(params))
    optimizer = OptimizerConfig("adam")
    state = init_state(flat, optimizer)
    for step in range(10):
        adam.zero_grad()
        their_x.grad = None
        their_y = torch_forward(torch, their_x, theirs, config)
        ((their_y - torch.tensor(target)) ** 2).mean().backward()
        g.fill(0)
        y, cache = soft_moe.forward(x, params, (), config)
        dx = soft_moe.backward(2 * (y - target) / y.size, cache, params, grads, config)
        if step == 0:
            assert_close(y, their_y.detach().numpy(), "torch")
            assert_close(dx, their_x.grad.numpy(), "torch")
            for ours, their in zip(leaves(grads), leaves(theirs), strict=True):
                assert_close(ours, their.grad.numpy(), "torch")
        adam.step()
        state = update(flat, g, state, 0.01, optimizer, matrix_elements(params))
    for ours, their in zip(leaves(params), leaves(theirs), strict=True):
        assert_close(ours, their.detach().numpy(), "training")


# --- initial weights, counts, configurations ----------------------------------------------------


@cases
def test_parameter_count(config):
    params, fixed = soft_moe.init(config)
    assert fixed == ()
    assert soft_moe.parameter_count(config) == sum(a.size for a in leaves(params))


def test_initial_weights_are_drawn_apart():
    config = SoftMoEConfig((50, 50, 50), experts=3, slots=50)
    params, _ = soft_moe.init(config, seed=3)
    arrays = [params.slots[:50], *(p.weight for expert in params.experts for p in expert)]
    assert all(0.98 / 50**0.5 < np.abs(a).max() <= 1 / 50**0.5 for a in arrays)
    for one, other in itertools.combinations(arrays, 2):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1
    again, other = (soft_moe.init(config, seed)[0] for seed in (3, 4))
    for a, b, c in zip(leaves(params), leaves(again), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()


def test_a_run_of_it_is_read_from_its_record():
    config = RunConfig(CONFIG, TrainConfig())
    assert restored(record(config), {each.__name__: each for each in KNOWN}) == config


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"experts": 0}, "at least 1 expert, each of at least 1 slot, got experts = 0"),
    ({"slots": 0}, "got slots = 0"),
    ({"experts": 2.5}, "got experts = 2.5"),
    ({"widths": (5,)}, "widths are the layers' sizes"),
    ({"activation": "tanhh"}, 'unknown activation "tanhh"'),
    ({"compute": "float8"}, 'unknown format of products "float8"')])
def test_bad_configurations(settings, message):
    with pytest.raises(UserError, match=message):
        SoftMoEConfig(**{"widths": (5, 3), "experts": 2} | settings)


X, PARAMS = np.zeros((2, 6, 5)), soft_moe.init(CONFIG, dtype="float64")[0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"x": np.zeros(5)}, r"x must have shape \(..., T, 5\), got \(5,\)"),
    ({"x": np.zeros((2, 6, 4))}, r"x must have shape \(..., T, 5\), got \(2, 6, 4\)"),
    ({"x": np.zeros((2, 1, 5))}, "more slots than tokens make no sense, .* got 2 slots an expert "
                                 "and T = 1"),
    ({"x": [[1.0]]}, "expected a numpy.ndarray"),
    ({"params": PARAMS._replace(slots=PARAMS.slots[:-1])}, "need SoftMoEParams"),
    ({"params": PARAMS._replace(experts=PARAMS.experts[:-1])}, "need SoftMoEParams"),
    ({"params": PARAMS.experts[0]}, "need SoftMoEParams"),
    ({"params": SoftMoEParams(PARAMS.slots, PARAMS.experts[:3] + ((),))}, "need SoftMoEParams"),
    ({"kept": np.ones((2, 5), bool)}, r"a bool array \(2, 4\), got bool \(2, 5\)"),
    ({"kept": np.ones((2, 4))}, r"a bool array \(2, 4\), got float64 \(2, 4\)"),
    ({"kept": np.eye(2, 4, 3) > 0}, "leaves an input without an expert")])
def test_bad_arguments(changes, message):
    arguments = {"x": X, "params": PARAMS, "fixed": (), "config": CONFIG} | changes
    with pytest.raises(UserError, match=message) as error:
        soft_moe.forward(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("dy", "grads", "message"), [
    (np.zeros((2, 6, 4)), PARAMS, r"dy must have the shape of the layer's output, \(2, 6, 3\)"),
    (np.zeros((2, 6, 3)), PARAMS._replace(experts=()), "need SoftMoEParams.* the gradients")])
def test_bad_gradients(dy, grads, message):
    _, cache = soft_moe.forward(X, PARAMS, (), CONFIG)
    with pytest.raises(UserError, match=message):
        soft_moe.backward(dy, cache, PARAMS, grads, CONFIG)


@pytest.mark.parametrize("shapes", [((3,), (3, 4)), ((2, 3), (4, 2)), ((5, 2, 3), (3, 2)),
                                    ((2, 2, 3), (1, 3, 2))])
def test_products_are_not_broadcast(shapes):
    with pytest.raises(UserError, match="products of matrices need shapes"):
        multiply(*map(np.zeros, shapes))
