"""The MLP, standard (eq. 1-2) and COMET (eq. 4-8): every intermediate, gradients, bad input."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from comet_np.backends import BackendError, reference
from comet_np.errors import UserError
from comet_np.functional.activations import activation
from comet_np.functional.linear import Linear
from comet_np.functional.routing import TIES, pack_masks, split_masks
from comet_np.gradcheck import check_gradients, check_mlp_gradients
from comet_np.models import mlp
from comet_np.models.mlp import MLPConfig
from comet_np.optim import OptimizerConfig, init_state, update
from comet_np.tree import flatten, leaves, tree_map
from tests.tolerances import TOLERANCES, assert_close

COMET = MLPConfig((6, 10, 9, 8, 4))
STANDARD = replace(COMET, p_k=None)


def network(config, draw, batch=(5,)):
    """Return an input, parameters and routing weights in float64."""
    params, routing = mlp.init(config, seed=1, dtype="float64")
    return draw.standard_normal((*batch, config.widths[0])), params, routing


# --- forward ------------------------------------------------------------------------------------


def check_trace(trace, x, params, routing, config):
    """Assert equations (1)-(8) for one example, number by number from the layer before."""
    f, g = activation(config.activation), activation(config.routing_activation)
    L = len(config.widths) - 1
    np.testing.assert_array_equal(trace.x[0], x)
    for layer in range(L):
        W, b = params[layer]
        a = [math.fsum(w * trace.x[layer]) + (b[i] if config.bias else 0)
             for i, w in enumerate(W)]
        assert_close(trace.a[layer], a, "sum")  # eq. (7), or (1)
        if layer == L - 1:  # the output is never masked
            break
        m = np.ones(len(W), bool)
        if config.p_k is not None:
            z = x if layer == 0 else trace.z[layer - 1]
            assert_close(trace.c[layer], [math.fsum(v * z) for v in routing[layer]], "sum")  # (4)
            k = max(1, int(config.p_k * len(W)))
            m = np.array([np.sum(trace.c[layer] >= c_i) <= k for c_i in trace.c[layer]])
            np.testing.assert_array_equal(trace.m[layer], m)  # eq. (5), (3)
            assert_close(trace.z[layer], m * g.forward(trace.c[layer]), "elementwise")  # eq. (6)
        assert_close(trace.x[layer + 1], m * f.forward(trace.a[layer]), "elementwise")  # (8), (2)


@pytest.mark.parametrize("config", [
    COMET, STANDARD, replace(COMET, bias=False), replace(COMET, p_k=0.1),
    replace(COMET, activation="gelu", routing_activation="tanh"), MLPConfig((6, 4)),
    MLPConfig((6, 1, 1, 4), p_k=1.0)], ids=str)
def test_every_intermediate_satisfies_its_equation(config, draw):
    x, params, routing = network(config, draw)
    trace = mlp.trace(x, params, routing, config)
    hidden = len(config.widths) - 2
    routed = 0 if config.p_k is None else hidden
    assert [len(field) for field in trace] == [hidden + 1, hidden + 1, routed, routed, routed]
    for row in range(len(x)):
        check_trace(tree_map(lambda a, row=row: a[row], trace), x[row], params, routing, config)
    a_L, cache = mlp.forward(x, params, routing, config)
    np.testing.assert_array_equal(a_L, trace.a[-1])
    for cached, traced in zip(cache.masks, trace.m or (None,) * hidden, strict=True):
        np.testing.assert_array_equal(cached, traced)


TRACE_MUTANTS = {
    "output masked": lambda t: t._replace(a=(*t.a[:-1], t.a[-1] * (t.a[-1] > 0))),
    "hidden not masked": lambda t: t._replace(
        x=(t.x[0], activation("softplus").forward(t.a[0]), *t.x[2:])),
    "mask before the activation": lambda t: t._replace(
        x=(t.x[0], activation("softplus").forward(t.a[0] * t.m[0]), *t.x[2:])),
    "routing not masked": lambda t: t._replace(z=(t.c[0], *t.z[1:])),
    "masks of the backbone": lambda t: t._replace(
        m=tuple(a >= np.sort(a)[:, -(a.shape[1] // 2), None] for a in t.a[:-1])),
    "routing on the backbone's activity": lambda t: t._replace(z=t.x[1:]),
}


@pytest.mark.parametrize("change", TRACE_MUTANTS.values(), ids=TRACE_MUTANTS)
def test_wrong_intermediates_are_caught(change, draw):
    x, params, routing = network(COMET, draw)
    trace = change(mlp.trace(x, params, routing, COMET))
    with pytest.raises(AssertionError):
        for row in range(len(x)):
            check_trace(tree_map(lambda a, row=row: a[row], trace), x[row], params, routing, COMET)


def test_the_paper_names_every_intermediate():
    assert mlp.Trace._fields == ("a", "x", "c", "m", "z")


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("kernels", [True, False])
def test_p_k_1_is_the_standard_model_exactly(ties, kernels, draw):
    everyone = replace(COMET, p_k=1.0, ties=ties)
    x, params, routing = network(everyone, draw)
    with reference() if not kernels else np.errstate():
        a_L, cache = mlp.forward(x, params, routing, everyone)
        standard, standard_cache = mlp.forward(x, params, (), STANDARD)
        grads, standard_grads = mlp.zeros_like(params), mlp.zeros_like(params)
        dx = mlp.backward(a_L, cache, params, grads, everyone)
        standard_dx = mlp.backward(standard, standard_cache, params, standard_grads, STANDARD)
    assert all(m.all() for m in cache.masks)
    for ours, theirs in zip((a_L, dx, *leaves(grads)),
                            (standard, standard_dx, *leaves(standard_grads)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["each its own x", "one x for all"])
@pytest.mark.parametrize("config", [COMET, STANDARD, replace(COMET, bias=False)], ids=str)
def test_networks_side_by_side_are_each_as_alone(config, own, kernels, draw):
    networks = [mlp.init(config, seed, dtype="float64") for seed in range(3)]
    x = draw.standard_normal((3, 5, 6) if own else (5, 6))
    da_L = draw.standard_normal((3, 5, 4))
    params, routing = mlp.stack(networks)
    grads = mlp.zeros_like(params)
    with reference() if not kernels else np.errstate():
        a_L, cache = mlp.forward(x, params, routing, config)
        dx = mlp.backward(da_L, cache, params, grads, config)
        for s, (p, V) in enumerate(networks):
            alone, alone_cache = mlp.forward(x[s] if own else x, p, V, config)
            assert_close(a_L[s], alone, "sum")
            for ours, theirs in zip(cache.masks, alone_cache.masks, strict=True):
                assert ours is theirs is None or (ours[s] == theirs).all()
            g = mlp.zeros_like(p)
            assert_close(dx[s], mlp.backward(da_L[s], alone_cache, p, g, config), "sum")
            for ours, theirs in zip(leaves(grads), leaves(g), strict=True):
                assert_close(ours[s].reshape(theirs.shape), theirs, "sum")


def test_packed_masks_are_the_masks(draw):
    x, params, routing = network(COMET, draw)
    a_L, cache = mlp.forward(x, params, routing, COMET)
    packed = split_masks(pack_masks(cache.masks), COMET.widths[1:-1])
    assert [m.shape for m in packed] == [(5, 2), (5, 2), (5, 1)]
    again, packed_cache = mlp.forward(x, params, routing, COMET, packed)
    np.testing.assert_array_equal(again, a_L)
    results = []
    for caches in (cache, packed_cache):
        grads = mlp.zeros_like(params)
        results.append([mlp.backward(a_L, caches, params, grads, COMET), *leaves(grads)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_masks_from_outside_replace_the_routing_network(draw):
    x, params, routing = network(COMET, draw)
    masks = mlp.masks_of(x, routing, COMET)
    expected, _ = mlp.forward(x, params, routing, COMET)
    np.testing.assert_array_equal(mlp.forward(x, params, (), COMET, masks)[0], expected)
    none = [np.zeros_like(m) for m in masks]
    a_L, _ = mlp.forward(x, params, routing, COMET, none)
    np.testing.assert_array_equal(a_L, np.tile(params[-1].bias, (len(x), 1)))
    standard, _ = mlp.forward(x, params, (), STANDARD)
    np.testing.assert_array_equal(mlp.forward(x, params, routing, COMET, (None,) * 3)[0], standard)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (257,)])
def test_leading_axes_are_free(batch, draw):
    x, params, routing = network(COMET, draw, batch)
    a_L, cache = mlp.forward(x, params, routing, COMET)
    assert a_L.shape == (*batch, 4)
    assert [m.shape for m in cache.masks] == [(*batch, N) for N in (10, 9, 8)]
    for i in np.ndindex(batch):
        alone, _ = mlp.forward(x[i], params, routing, COMET)
        assert_close(a_L[i], alone, "sum")
    grads = mlp.zeros_like(params)
    assert mlp.backward(a_L, cache, params, grads, COMET).shape == x.shape


def test_memory_layout_of_the_input_does_not_matter(draw):
    x, params, routing = network(COMET, draw)
    expected, cache = mlp.forward(x, params, routing, COMET)
    for layout in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]):
        a_L, moved = mlp.forward(layout(x), params, routing, COMET)
        assert_close(a_L, expected, "sum")
        for ours, theirs in zip(moved.masks, cache.masks, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# --- backward -----------------------------------------------------------------------------------

GRADIENT_CONFIGS = [COMET, STANDARD, replace(COMET, bias=False), MLPConfig((6, 4)),
                    replace(COMET, activation="gelu", p_k=0.2), replace(COMET, activation="tanh")]


@pytest.mark.parametrize("config", GRADIENT_CONFIGS, ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients(config, frozen, draw):
    x, params, routing = network(config, draw)
    masks = mlp.masks_of(x, routing, config) if frozen else None
    result = check_mlp_gradients(x, params, routing, config, masks)
    assert result.error <= TOLERANCES["difference"]["float64"], result
    assert not result.flips


def test_full_jacobian(draw):
    config = MLPConfig((3, 5, 4, 2))
    x, params, routing = network(config, draw, (2,))
    result = check_mlp_gradients(x, params, routing, config, full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result
    assert result.perturbations == x.size + sum(leaf.size for leaf in leaves(params))


def test_gradients_by_complex_step(draw):
    config = replace(COMET, activation="tanh")
    x, params, routing = network(config, draw)
    result = check_mlp_gradients(x, params, routing, config, mlp.masks_of(x, routing, config),
                                 complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


def forgetful(change):
    """Return a backward pass that reads a cache spoilt by `change`."""
    def backward(da_L, cache, at):
        grads = mlp.zeros_like(at["params"])
        dx = mlp.backward(da_L, change(cache), at["params"], grads, COMET)
        return {"x": dx, "params": grads}

    return backward


def without_a_mask(cache):
    return cache._replace(hidden=(cache.hidden[0], cache.hidden[1]._replace(m=None),
                                  cache.hidden[2]))


def activity_of_another_layer(cache):
    linear = list(cache.linear)
    linear[3] = linear[3]._replace(x=activation("softplus").forward(cache.hidden[2].a))
    return cache._replace(linear=tuple(linear))


@pytest.mark.parametrize(("change", "ok"), [
    (lambda cache: cache, True), (without_a_mask, False), (activity_of_another_layer, False)])
def test_mutants_of_the_backward_are_caught(change, ok, draw):
    x, params, routing = network(COMET, draw)
    result = check_gradients(lambda at: mlp.forward(at["x"], at["params"], routing, COMET),
                             forgetful(change), {"x": x, "params": params})
    assert result.ok == ok, result


def test_a_step_of_sgd_inside_the_backward_pass(draw):
    x, params, routing = network(COMET, draw)
    flat, params = flatten(params)
    direct = flat.copy()
    _, views = flatten(params)
    lr, config = 0.1, OptimizerConfig()

    a_L, cache = mlp.forward(x, params, routing, COMET)
    flat_grads, grads = flatten(mlp.zeros_like(params))
    dx = mlp.backward(a_L, cache, params, grads, COMET)
    update(direct, flat_grads, init_state(direct, config), lr, config)

    scaled_dx = mlp.backward(-lr * a_L, cache, params, params, COMET)
    assert_close(flat, direct, "sum")
    assert_close(scaled_dx, -lr * dx, "sum")
    assert not np.array_equal(flat, np.concatenate([leaf.reshape(-1) for leaf in leaves(views)]))


def test_gradients_are_added_and_nothing_else_is_written(draw):
    x, params, routing = network(COMET, draw)
    inputs = [a.copy() for a in (x, *leaves(params), *routing)]
    a_L, cache = mlp.forward(x, params, routing, COMET)
    cached = [a.copy() for a in leaves(cache)]
    da_L = a_L.copy()
    once, twice = mlp.zeros_like(params), mlp.zeros_like(params)
    mlp.backward(da_L, cache, params, once, COMET)
    for _ in range(2):
        mlp.backward(da_L, cache, params, twice, COMET)
    for a, b in zip(leaves(twice), leaves(once), strict=True):
        assert_close(a, 2 * b, "sum")
    for a, b in zip((x, *leaves(params), *routing, *leaves(cache), da_L),
                    (*inputs, *cached, a_L), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("config", [COMET, STANDARD, MLPConfig((6, 4))], ids=str)
def test_the_input_gradient_can_be_left_out(config, draw):
    x, params, routing = network(config, draw)
    a_L, cache = mlp.forward(x, params, routing, config)
    grads, without = mlp.zeros_like(params), mlp.zeros_like(params)
    mlp.backward(a_L, cache, params, grads, config)
    assert mlp.backward(a_L, cache, params, without, config, input_gradient=False) is None
    for a, b in zip(leaves(without), leaves(grads), strict=True):
        np.testing.assert_array_equal(a, b)


# --- initial weights ----------------------------------------------------------------------------


def test_initial_weights_follow_their_law():
    config = MLPConfig((400, 300, 200, 10))
    params, routing = mlp.init(config, seed=3)
    for W, N_in in zip([*(p.weight for p in params), *routing], (400, 300, 200, 400, 300),
                       strict=True):
        bound = 1 / math.sqrt(N_in)
        assert W.dtype == "float32"
        assert np.abs(W).max() <= bound
        assert abs(W.mean()) < 5 * bound / math.sqrt(3 * W.size)  # five standard deviations
        assert abs((W**2).mean() - bound**2 / 3) < 5 * bound**2 * math.sqrt(4 / 45 / W.size)
    assert all(np.abs(p.bias).max() <= 1 / math.sqrt(p.weight.shape[1]) for p in params)
    assert [V.shape for V in routing] == [(300, 400), (200, 300)]
    assert abs(np.corrcoef(params[0].weight.ravel(), routing[0].ravel())[0, 1]) < 0.02


def test_models_of_one_seed_start_from_the_same_weights():
    comet, routing = mlp.init(COMET, seed=3)
    standard, none = mlp.init(STANDARD, seed=3)
    double, _ = mlp.init(COMET, seed=3, dtype="float64")
    other, _ = mlp.init(COMET, seed=4)
    assert (len(routing), none) == (3, ())
    for a, b, c, d in zip(leaves(comet), leaves(standard), leaves(double), leaves(other),
                          strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c.astype("float32"))
        assert (a != d).all()


@pytest.mark.parametrize("config", [COMET, STANDARD, replace(COMET, bias=False)], ids=str)
def test_parameter_count(config):
    params, _ = mlp.init(config)
    assert mlp.parameter_count(config) == sum(leaf.size for leaf in leaves(params))
    assert all((p.bias is None) != config.bias for p in params)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"widths": (5,)}, r"at least two and each an integer of at least 1, got \(5,\)"),
    ({"widths": (5, 0, 2)}, r"at least 1, got \(5, 0, 2\)"),
    ({"widths": (5, 2.5, 2)}, r"an integer of at least 1, got \(5, 2\.5, 2\)"),
    ({"p_k": 0.0}, r"must be in \(0, 1\], got 0\.0"),
    ({"p_k": 1.5}, r"must be in \(0, 1\], got 1\.5"),
    ({"activation": "rellu"}, 'unknown activation "rellu"; did you mean "relu"'),
    ({"routing_activation": "identitty"}, 'did you mean "identity"'),
    ({"ties": "index "}, 'unknown tie rule "index "; did you mean "index"'),
])
def test_bad_configurations(settings, message):
    with pytest.raises(UserError, match=message):
        MLPConfig(**{"widths": (5, 4, 2), **settings})


def call(draw, **changes):
    """Call `forward` on a good network with some arguments replaced, each by a function of it."""
    x, params, routing = network(COMET, draw)
    arguments = {"x": x, "params": params, "routing": routing, "config": COMET, "masks": None}
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    return mlp.forward(**arguments)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"x": lambda x: x[:, 1:]}, UserError,
     "x must have shape (..., 6) for a weight of shape (10, 6), got (5, 5)"),
    ({"x": lambda x: x.tolist()}, BackendError,
     "expected a numpy.ndarray or cupy.ndarray, got builtins.list: convert it with"),
    ({"x": lambda x: x.astype("float32")}, BackendError, "got float32 and float64: cast one"),
    ({"x": lambda x: x * np.nan}, UserError, "routing score (0, 0) of (5, 10) is NaN"),
    ({"params": lambda p: p[:-1]}, UserError,
     "the widths (6, 10, 9, 8, 4) with bias=True need weights and biases of shapes "
     "[((10, 6), (10,)), ((9, 10), (9,)), ((8, 9), (8,)), ((4, 8), (4,))], got [((10, 6), "),
    ({"params": lambda p: (Linear(p[0].weight.T, p[0].bias), *p[1:])}, UserError,
     "got [((6, 10), (10,)), "),
    ({"params": lambda p: (Linear(p[0].weight, p[1].bias), *p[1:])}, UserError,
     "got [((10, 6), (9,)), "),
    ({"params": lambda p: (Linear(p[0].weight, None), *p[1:])}, UserError,
     "got [((10, 6), None), "),
    ({"config": lambda c: replace(c, bias=False)}, UserError,
     "with bias=False need weights and biases of shapes [((10, 6), None), "),
    ({"routing": lambda V: ()}, UserError,
     "needs routing weights V of shapes [(10, 6), (9, 10), (8, 9)], got []"),
    ({"routing": lambda V: (*V, V[0])}, UserError, "(8, 9), (10, 6)]"),
    ({"params": lambda p: mlp.stack([(p, ())] * 2)[0]}, UserError,
     "masks must be bool arrays of shapes [(2, 5, 10), (2, 5, 9), (2, 5, 8)]"),
    ({"masks": lambda m: [np.ones((5, 10), bool)]}, UserError,
     "bool arrays of shapes [(5, 10), (5, 9), (5, 8)], or bit-packed uint8 arrays of shapes "
     "[(5, 2), (5, 2), (5, 1)], got ['bool (5, 10)']"),
    ({"params": lambda p: mlp.stack([(p, ())] * 2)[0], "x": lambda x: x[None, None]}, UserError,
     "2 networks side by side take x of shape (B, 6), or of shape (2, 'B', 6) for each its own, "
     "got (1, 1, 5, 6)"),
    ({"masks": lambda m: [np.ones((5, N)) for N in (10, 9, 8)]}, UserError,
     "got ['float64 (5, 10)', "),
])
def test_bad_arguments(changes, error, message, draw):
    with pytest.raises(error, match=re.escape(message)):
        call(draw, **changes)


def test_a_wrong_cotangent(draw):
    x, params, routing = network(COMET, draw)
    _, cache = mlp.forward(x, params, routing, COMET)
    with pytest.raises(UserError, match=re.escape("output, (5, 4), got (5, 3)")):
        mlp.backward(np.ones((5, 3)), cache, params, mlp.zeros_like(params), COMET)
