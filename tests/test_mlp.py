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
from comet_np.functional.packing import pack_masks, split_masks
from comet_np.functional.routing import TIES
from comet_np.gates import Bernoulli, Comet, ExampleTied, Kept, Layerwise, Pass, TopK, keep
from comet_np.gradcheck import check_gradients
from comet_np.models import mlp
from comet_np.models.mlp import MLPConfig
from comet_np.optim import OptimizerConfig, init_state, update
from comet_np.selfcheck import check_mlp_gradients
from comet_np.tree import flatten, leaves, tree_map
from tests.tolerances import TOLERANCES, assert_close

COMET = MLPConfig((6, 10, 9, 8, 4))
STANDARD = replace(COMET, gate=None)
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


def network(config, draw, batch=(5,)):
    """Return an input, parameters and the gate's fixed weights in float64."""
    params, fixed = mlp.init(config, seed=1, dtype="float64")
    return draw.standard_normal((*batch, config.widths[0])), params, fixed


# --- forward ------------------------------------------------------------------------------------


def check_trace(trace, x, params, fixed, config):
    """Assert equations (1)-(8) for one example, number by number from the layer before."""
    f = activation(config.activation)
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
        if config.gate is not None:
            z = x if layer == 0 else trace.z[layer - 1]
            assert_close(trace.c[layer], [math.fsum(v * z) for v in fixed[layer]], "sum")  # (4)
            k = max(1, int(config.gate.p_k * len(W)))
            m = np.array([np.sum(trace.c[layer] >= c_i) <= k for c_i in trace.c[layer]])
            np.testing.assert_array_equal(trace.m[layer], m)  # eq. (5), (3)
            g = activation(config.gate.g)
            if layer < L - 2:  # the last one's would route nothing
                z = m * g.forward(trace.c[layer])
                assert_close(trace.z[layer], z, "elementwise")  # eq. (6)
        assert_close(trace.x[layer + 1], config.scale * m * f.forward(trace.a[layer]),
                     "elementwise")  # (8), (2)


@both
@pytest.mark.parametrize("config", [
    COMET, STANDARD, replace(COMET, bias=False), replace(COMET, gate=Comet(p_k=0.1)),
    replace(COMET, activation="gelu", gate=Comet(g="tanh")), MLPConfig((6, 4)),
    MLPConfig((6, 1, 1, 4), gate=Comet(p_k=1.0)), replace(COMET, scale=0.5),
    replace(STANDARD, scale=-2.0, activation="tanh")], ids=str)
def test_every_intermediate_satisfies_its_equation(config, kernels, draw):
    x, params, fixed = network(config, draw)
    with np.errstate() if kernels else reference():
        trace = mlp.trace(x, params, fixed, config)
        a_L, cache = mlp.forward(x, params, fixed, config)
    hidden = len(config.widths) - 2
    routed = 0 if config.gate is None else hidden
    assert [len(field) for field in trace] == [
            hidden + 1, hidden + 1, routed, hidden, max(routed - 1, 0)]
    for row in range(len(x)):
        check_trace(tree_map(lambda a, row=row: a[row], trace), x[row], params, fixed, config)
    np.testing.assert_array_equal(a_L, trace.a[-1])
    for cached, traced in zip(cache.masks, trace.m, strict=True):
        np.testing.assert_array_equal(cached, traced)
        assert (cached is None) == (config.gate is None)


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
    x, params, fixed = network(COMET, draw)
    trace = change(mlp.trace(x, params, fixed, COMET))
    with pytest.raises(AssertionError):
        for row in range(len(x)):
            check_trace(tree_map(lambda a, row=row: a[row], trace), x[row], params, fixed, COMET)


def test_the_paper_names_every_intermediate(draw):
    assert mlp.Trace._fields == ("a", "x", "c", "m", "z")
    x, params, fixed = network(COMET, draw, (1,))
    a_L, cache = mlp.forward(x, params, fixed, COMET)
    names = dict(mlp.quantities(params, cache, a_L))
    assert list(names)[:4] == [f"{name} of layer 1" for name in ("x_0", "W_1", "b_1", "a_1")]
    assert list(names)[-1] == "a_4 of layer 4"
    assert len(names) == 16
    np.testing.assert_array_equal(names["a_4 of layer 4"], a_L)


@pytest.mark.parametrize("gate", [Layerwise(), TopK()], ids=str)
def test_the_trace_of_other_gates_has_their_masks(gate, draw):
    config = replace(COMET, gate=gate)
    x, params, fixed = network(config, draw)
    trace = mlp.trace(x, params, fixed, config)
    assert trace.c == trace.z == ()
    for m, expected in zip(trace.m, mlp.forward(x, params, fixed, config)[1].masks, strict=True):
        np.testing.assert_array_equal(m, expected)
        assert (m.sum(axis=-1) == m.shape[-1] // 2).all()


@both
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("gate", [Comet, Layerwise, TopK])
def test_p_k_1_is_the_standard_model_exactly(gate, ties, kernels, draw):
    everyone = replace(COMET, gate=gate(p_k=1.0, ties=ties))
    x, params, fixed = network(everyone, draw)
    with np.errstate() if kernels else reference():
        a_L, cache = mlp.forward(x, params, fixed, everyone)
        standard, standard_cache = mlp.forward(x, params, (), STANDARD)
        grads, standard_grads = mlp.zeros_like(params), mlp.zeros_like(params)
        dx = mlp.backward(a_L, cache, params, grads, everyone)
        standard_dx = mlp.backward(standard, standard_cache, params, standard_grads, STANDARD)
    assert all(m.all() for m in cache.masks)
    for ours, theirs in zip((a_L, dx, *leaves(grads)),
                            (standard, standard_dx, *leaves(standard_grads)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@both
def test_packed_masks_are_the_masks(kernels, draw):
    x, params, fixed = network(COMET, draw)
    results = []
    with np.errstate() if kernels else reference():
        _, cache = mlp.forward(x, params, fixed, COMET)
        packed = split_masks(pack_masks(cache.masks), COMET.widths[1:-1])
        assert [m.shape for m in packed] == [(5, 2), (5, 2), (5, 1)]
        for masks in None, packed, cache.masks:
            a_L, found = mlp.forward(x, params, fixed, COMET, masks)
            grads = mlp.zeros_like(params)
            dx = mlp.backward(a_L, found, params, grads, COMET)
            results.append([a_L, dx, *leaves(grads), *found.masks])
    for ours, *theirs in zip(*results, strict=True):
        for other in theirs:
            np.testing.assert_array_equal(ours, other)


def test_masks_from_outside_replace_the_gate(draw):
    x, params, fixed = network(COMET, draw)
    expected, cache = mlp.forward(x, params, fixed, COMET)
    np.testing.assert_array_equal(mlp.forward(x, params, (), COMET, cache.masks)[0], expected)
    for gate in (None, TopK(), Bernoulli()):  # not asked
        other = mlp.forward(x, params, (), replace(COMET, gate=gate), list(cache.masks))[0]
        np.testing.assert_array_equal(other, expected)
    none = [np.zeros_like(m) for m in cache.masks]
    a_L, _ = mlp.forward(x, params, fixed, COMET, none)
    np.testing.assert_array_equal(a_L, np.tile(params[-1].bias, (len(x), 1)))
    standard, _ = mlp.forward(x, params, (), STANDARD)
    np.testing.assert_array_equal(mlp.forward(x, params, fixed, COMET, (None,) * 3)[0], standard)


@pytest.mark.parametrize("gate", [Comet(), Layerwise(), TopK(), None], ids=str)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (257,)])
def test_leading_axes_are_free(batch, gate, draw):
    config = replace(COMET, gate=gate)
    x, params, fixed = network(config, draw, batch)
    a_L, cache = mlp.forward(x, params, fixed, config)
    assert a_L.shape == (*batch, 4)
    if gate is not None:
        assert [m.shape for m in cache.masks] == [(*batch, N) for N in (10, 9, 8)]
    for i in np.ndindex(batch):
        alone, _ = mlp.forward(x[i], params, fixed, config)
        assert_close(a_L[i], alone, "sum")
    grads = mlp.zeros_like(params)
    assert mlp.backward(a_L, cache, params, grads, config).shape == x.shape


def test_memory_layout_of_the_input_does_not_matter(draw):
    x, params, fixed = network(COMET, draw)
    expected, cache = mlp.forward(x, params, fixed, COMET)
    for layout in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=1)[:, ::2]):
        a_L, moved = mlp.forward(layout(x), params, fixed, COMET)
        assert_close(a_L, expected, "sum")
        for ours, theirs in zip(moved.masks, cache.masks, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# --- backward -----------------------------------------------------------------------------------

GRADIENT_CONFIGS = [
    COMET, STANDARD, replace(COMET, bias=False), MLPConfig((6, 4)),
    replace(COMET, activation="gelu", gate=Comet(p_k=0.2)), replace(COMET, activation="tanh"),
    replace(COMET, scale=0.5), replace(COMET, gate=Layerwise()), replace(COMET, gate=TopK()),
    replace(COMET, activation="mish", gate=TopK(of="activation"))]


@both
@pytest.mark.parametrize("config", GRADIENT_CONFIGS, ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients(config, frozen, kernels, draw):
    x, params, fixed = network(config, draw)
    with np.errstate() if kernels else reference():
        masks = mlp.forward(x, params, fixed, config)[1].masks if frozen else None
        result = check_mlp_gradients(x, params, fixed, config, masks)
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result
    assert not result.flips


def test_full_jacobian(draw):
    config = MLPConfig((3, 5, 4, 2))
    x, params, fixed = network(config, draw, (2,))
    result = check_mlp_gradients(x, params, fixed, config, full=True)
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result
    assert result.perturbations == x.size + sum(leaf.size for leaf in leaves(params))


def test_gradients_by_complex_step(draw):
    config = replace(COMET, activation="tanh")
    x, params, fixed = network(config, draw)
    _, cache = mlp.forward(x, params, fixed, config)
    result = check_mlp_gradients(x, params, fixed, config, cache.masks, complex_step=True)
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


def unmasked_input_of_the_output_layer(cache):
    return cache._replace(output=cache.output._replace(
        x=activation("softplus").forward(cache.hidden[2].a)))


@pytest.mark.parametrize(("change", "ok"), [
    (lambda cache: cache, True), (without_a_mask, False),
    (unmasked_input_of_the_output_layer, False)])
def test_mutants_of_the_backward_are_caught(change, ok, draw):
    x, params, fixed = network(COMET, draw)
    result = check_gradients(lambda at: mlp.forward(at["x"], at["params"], fixed, COMET),
                             forgetful(change), {"x": x, "params": params})
    assert result.ok == ok, result


def test_a_step_of_sgd_inside_the_backward_pass(draw):
    x, params, fixed = network(COMET, draw)
    flat, params = flatten(params)
    before, direct = flat.copy(), flat.copy()
    lr, config = 0.1, OptimizerConfig()

    a_L, cache = mlp.forward(x, params, fixed, COMET)
    flat_grads, grads = flatten(mlp.zeros_like(params))
    dx = mlp.backward(a_L, cache, params, grads, COMET)
    update(direct, flat_grads, init_state(direct, config), lr, config)

    scaled_dx = mlp.backward(-lr * a_L, cache, params, params, COMET)
    assert_close(flat, direct, "sum")
    assert_close(scaled_dx, -lr * dx, "sum")
    assert not np.array_equal(flat, before)


@both
def test_gradients_are_added_and_nothing_else_is_written(kernels, draw):
    x, params, fixed = network(COMET, draw)
    inputs = [a.copy() for a in (x, *leaves(params), *fixed)]
    with np.errstate() if kernels else reference():
        a_L, cache = mlp.forward(x, params, fixed, COMET)
        cached = [a.copy() for a in leaves(cache)]
        da_L = a_L.copy()
        once, twice = mlp.zeros_like(params), mlp.zeros_like(params)
        mlp.backward(da_L, cache, params, once, COMET)
        for _ in range(2):
            mlp.backward(da_L, cache, params, twice, COMET)
    for a, b in zip(leaves(twice), leaves(once), strict=True):
        assert_close(a, 2 * b, "sum")
    for a, b in zip((x, *leaves(params), *fixed, *leaves(cache), da_L),
                    (*inputs, *cached, a_L), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("config", [COMET, STANDARD, MLPConfig((6, 4))], ids=str)
def test_the_input_gradient_can_be_left_out(config, draw):
    x, params, fixed = network(config, draw)
    a_L, cache = mlp.forward(x, params, fixed, config)
    grads, without = mlp.zeros_like(params), mlp.zeros_like(params)
    mlp.backward(a_L, cache, params, grads, config)
    assert mlp.backward(a_L, cache, params, without, config, input_gradient=False) is None
    for a, b in zip(leaves(without), leaves(grads), strict=True):
        np.testing.assert_array_equal(a, b)


# --- dropout ------------------------------------------------------------------------------------

DROPPED = replace(COMET, dropout=0.3)
TRAIN = Pass(train=True, step=5, seed=2)


def test_outside_training_nothing_is_dropped(draw):
    x, params, fixed = network(COMET, draw)
    expected, _ = mlp.forward(x, params, fixed, COMET)
    for at in Pass(), Pass(step=5, seed=2):
        a_L, cache = mlp.forward(x, params, fixed, DROPPED, at=at)
        np.testing.assert_array_equal(a_L, expected)
        assert cache.dropped == ()
    a_L, _ = mlp.forward(x, params, fixed, DROPPED)
    np.testing.assert_array_equal(a_L, expected)
    a_L, _ = mlp.forward(x, params, fixed, COMET, at=TRAIN)  # a rate of 0
    np.testing.assert_array_equal(a_L, expected)


@both
def test_what_is_dropped_is_a_function_of_seed_step_and_layer(kernels, draw):
    config = MLPConfig((6, 40, 40, 4), dropout=0.5)
    x, params, fixed = network(config, draw)

    def factors(at):
        with np.errstate() if kernels else reference():
            return [drop.factor for drop in mlp.forward(x, params, fixed, config, at=at)[1].dropped]

    first, second = factors(TRAIN)
    assert {float(r) for r in np.unique(first)} == {0.0, 2.0}
    for again in TRAIN, TRAIN._replace(step=np.array(5)), TRAIN._replace(example=np.arange(5)):
        np.testing.assert_array_equal(factors(again)[0], first)
    for other in (second, factors(TRAIN._replace(step=6))[0], factors(TRAIN._replace(seed=3))[0]):
        assert abs((other != first).mean() - 0.5) < 5 * (0.25 / first.size) ** 0.5


@both
def test_dropped_activations_are_those_that_the_next_layer_reads(kernels, draw):
    x, params, fixed = network(DROPPED, draw)
    with np.errstate() if kernels else reference():
        _, cache = mlp.forward(x, params, fixed, DROPPED, at=TRAIN)
    inputs = [layer.x for layer in cache.hidden[1:]] + [cache.output.x]
    f = activation("softplus")
    for layer, drop, read in zip(cache.hidden, cache.dropped, inputs, strict=True):
        factor = drop.factor
        assert ((factor == 0) | (np.abs(factor - 1 / 0.7) < 1e-15)).all()
        assert_close(read, layer.m * f.forward(layer.a) * factor, "elementwise")


def test_dropout_keeps_the_mean(draw):
    """Over steps, of what the output layer reads."""
    config = MLPConfig((6, 50, 4), dropout=0.3, gate=None)
    x, params, fixed = network(config, draw, (40,))
    expected = mlp.forward(x, params, fixed, config)[1].output.x
    steps, total, squares = 200, 0.0, (expected**2).sum()
    for step in range(steps):
        total += mlp.forward(x, params, fixed, config, at=Pass(True, step))[1].output.x.sum()
    deviation = (squares * 0.3 / 0.7 / steps) ** 0.5  # of a mean of sums of x r / 0.7
    assert abs(total / steps - expected.sum()) < 5 * deviation


@both
@pytest.mark.parametrize("config", [DROPPED, replace(DROPPED, gate=TopK()),
                                    replace(DROPPED, gate=None)], ids=str)
def test_gradients_with_dropout(config, kernels, draw):
    x, params, fixed = network(config, draw)
    with np.errstate() if kernels else reference():
        result = check_mlp_gradients(x, params, fixed, config, at=TRAIN)
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result


def test_a_backward_without_dropout_or_with_that_of_another_layer_is_caught(draw):
    config = MLPConfig((6, 9, 9, 4), dropout=0.3)
    x, params, fixed = network(config, draw)
    for change in (lambda dropped: (), lambda dropped: dropped[::-1]):
        def backward(da_L, cache, at, change=change):
            grads = mlp.zeros_like(at["params"])
            cache = cache._replace(dropped=change(cache.dropped))
            return {"x": mlp.backward(da_L, cache, at["params"], grads, config), "params": grads}

        assert not check_gradients(
            lambda at: mlp.forward(at["x"], at["params"], fixed, config, at=TRAIN), backward,
            {"x": x, "params": params}).ok


# --- initial weights ----------------------------------------------------------------------------


def test_initial_weights_follow_their_law():
    config = MLPConfig((400, 300, 200, 10))
    params, fixed = mlp.init(config, seed=3)
    for W, N_in in zip([*(p.weight for p in params), *fixed], (400, 300, 200, 400, 300),
                       strict=True):
        bound = 1 / math.sqrt(N_in)
        assert W.dtype == "float32"
        assert np.abs(W).max() <= bound
        assert abs(W.mean()) < 5 * bound / math.sqrt(3 * W.size)  # five standard deviations
        assert abs((W**2).mean() - bound**2 / 3) < 5 * bound**2 * math.sqrt(4 / 45 / W.size)
    assert all(np.abs(p.bias).max() <= 1 / math.sqrt(p.weight.shape[1]) for p in params)
    assert [V.shape for V in fixed] == [(300, 400), (200, 300)]
    assert abs(np.corrcoef(params[0].weight.ravel(), fixed[0].ravel())[0, 1]) < 0.02


def test_weights_of_he_follow_their_law():
    """And the biases are 0, and the gate's weights are what they are without it."""
    config = MLPConfig((400, 300, 200, 10), initial="he")
    params, fixed = mlp.init(config, seed=3)
    for W, b in params:
        w, variance = W.ravel() * math.sqrt(W.shape[1] / 2), 1 / W.size
        assert (W.dtype, b.dtype) == ("float32", "float32")
        assert not b.any()
        for power, moment, of_moment in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):  # of N(0, 1)
            assert abs((w**power).mean() - moment) < 5 * math.sqrt(of_moment * variance)
    first, second = params[0].weight[:200, :300], params[1].weight
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    for V, same in zip(fixed, mlp.init(replace(config, initial="paper"), seed=3)[1], strict=True):
        np.testing.assert_array_equal(V, same)
    assert mlp.init(replace(config, bias=False))[0][0].bias is None


def test_the_paper_is_the_default_and_draws_what_it_drew():
    """The first numbers of each array, of a version without a choice."""
    params, _ = mlp.init(MLPConfig((6, 10, 4), initial="paper"), seed=3)
    for a, b in zip(leaves(params), leaves(mlp.init(MLPConfig((6, 10, 4)), seed=3)[0]),
                    strict=True):
        np.testing.assert_array_equal(a, b)
    assert [leaf.ravel()[0].item() for leaf in leaves(params)] == [
        0.1252775490283966, -0.2369108647108078, 0.12728537619113922, 0.2866203784942627]


@pytest.mark.parametrize("initial", mlp.INITIALS)
def test_models_of_one_seed_start_from_the_same_weights(initial):
    COMET = MLPConfig((6, 10, 9, 8, 4), bias=initial == "paper", initial=initial)
    comet, routing = mlp.init(COMET, seed=3)
    double, _ = mlp.init(COMET, seed=3, dtype="float64")
    other, other_routing = mlp.init(COMET, seed=4)
    for gate in (None, Layerwise(), TopK(), Bernoulli(), ExampleTied(), Kept()):
        same, fixed = mlp.init(replace(COMET, gate=gate), seed=3)
        assert len(fixed) == (3 if gate == Layerwise() else 0)
        for a, b in zip(leaves(comet), leaves(same), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b, c in zip(leaves(comet), leaves(double), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b.astype("float32"))
        assert (a != c).all()
    assert all((V != U).all() for V, U in zip(routing, other_routing, strict=True))


@pytest.mark.parametrize("config", [COMET, STANDARD, replace(COMET, bias=False)], ids=str)
def test_parameter_count(config):
    params, _ = mlp.init(config)
    assert mlp.parameter_count(config) == sum(leaf.size for leaf in leaves(params))
    assert all((p.bias is None) != config.bias for p in params)


def test_masks_that_can_be_kept(draw):
    kept = {gate: mlp.with_kept_masks(replace(COMET, gate=gate))
            for gate in (Comet(), Bernoulli(), ExampleTied(), Kept(), Layerwise(), TopK(), None)}
    assert {gate for gate, config in kept.items() if config is None} == {Layerwise(), TopK(), None}
    assert all(config is None or config == replace(COMET, gate=Kept()) for config in kept.values())
    assert mlp.with_kept_masks(MLPConfig((6, 4))) is None
    x, params, fixed = network(COMET, draw)
    bits = keep(COMET.gate, [(x[:2], Pass()), (x[2:], Pass())], fixed, COMET)
    at = Pass(example=np.array([4, 1, 1]))
    ours, _ = mlp.forward(x[at.example], params, bits, kept[Comet()], at=at)
    np.testing.assert_array_equal(ours, mlp.forward(x[at.example], params, fixed, COMET)[0])


# --- bad input ----------------------------------------------------------------------------------


def test_configurations_are_values():
    assert MLPConfig([6, 10, 4]) == MLPConfig((6, 10, 4), gate=Comet(0.5, "strict"))
    assert len({MLPConfig((6, 10, 4)), MLPConfig([6, 10, 4]), MLPConfig((6, 4)),
                MLPConfig((6, 10, 4), gate=Layerwise())}) == 3


@pytest.mark.parametrize(("settings", "message"), [
    ({"widths": (5,)}, r"at least two and each an integer of at least 1, got \(5,\)"),
    ({"widths": (5, 0, 2)}, r"at least 1, got \(5, 0, 2\)"),
    ({"widths": (5, 2.5, 2)}, r"an integer of at least 1, got \(5, 2\.5, 2\)"),
    ({"activation": "rellu"}, 'unknown activation "rellu"; did you mean "relu"'),
    ({"gate": 0.5}, r"gate is None or a gate, as comet_np\.gates\.Comet\(p_k=0\.5\), got 0\.5"),
    ({"gate": Comet}, r"gate is None or a gate, .* got <class"),
    ({"dropout": 1.0}, r"dropout rate is a probability in \[0, 1\), got 1\.0"),
    ({"dropout": -0.1}, r"dropout rate is a probability in \[0, 1\), got -0\.1"),
    ({"initial": "hee"}, 'unknown initialisation "hee"; did you mean "he"'),
    ({"compute": "fp16"}, 'unknown format of products "fp16"'),
])
def test_bad_configurations(settings, message):
    with pytest.raises(UserError, match=message):
        MLPConfig(**{"widths": (5, 4, 2), **settings})


def call(draw, **changes):
    """Call `forward` on a good network with some arguments replaced, each by a function of it."""
    x, params, fixed = network(COMET, draw)
    arguments = {"x": x, "params": params, "fixed": fixed, "config": COMET, "masks": None}
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    return mlp.forward(**arguments)


NEED = "with bias=True need weights and biases of shapes "
SHAPES = "(((10, 6), (10,)), ((9, 10), (9,)), ((8, 9), (8,)), ((4, 8), (4,)))"
V_NEEDED = ("the gate Comet of a network of widths (6, 10, 9, 8, 4) needs fixed weights V of "
            "shapes ((10, 6), (9, 10), (8, 9)), got ")


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"x": lambda x: x[:, 1:]}, UserError,
     "x must have shape (..., 6) for a weight of shape (10, 6), got (5, 5)"),
    ({"x": lambda x: x[0, 0]}, UserError,  # a scalar
     "x must have shape (..., 6) for a weight of shape (10, 6), got ()"),
    ({"x": lambda x: x.tolist()}, BackendError,
     "expected a numpy.ndarray or cupy.ndarray, got builtins.list: convert it with"),
    ({"x": lambda x: x.astype("float32")}, BackendError, "got float32 and float64: cast one"),
    ({"x": lambda x: x * np.nan}, UserError, "routing score (0, 0) of (5, 10) is NaN"),
    ({"params": lambda p: p[:-1]}, UserError,
     f"the widths (6, 10, 9, 8, 4) {NEED}{SHAPES}, got (((10, 6), "),
    ({"params": lambda p: (Linear(p[0].weight.T, p[0].bias), *p[1:])}, UserError,
     "got (((6, 10), (10,)), "),
    ({"params": lambda p: (Linear(p[0].weight, p[1].bias), *p[1:])}, UserError,
     "got (((10, 6), (9,)), "),
    ({"params": lambda p: (Linear(p[0].weight, None), *p[1:])}, UserError,
     "got (((10, 6), None), "),
    ({"config": lambda c: replace(c, bias=False)}, UserError,
     "with bias=False need weights and biases of shapes (((10, 6), None), "),
    ({"fixed": lambda V: ()}, UserError, V_NEEDED + "()"),
    ({"fixed": lambda V: (*V, V[0])}, UserError, V_NEEDED + "((10, 6), (9, 10), (8, 9), (10, 6))"),
    ({"fixed": list}, UserError, V_NEEDED + "list"),
    ({"config": lambda c: replace(c, gate=TopK())}, UserError,
     "the gate TopK of a network of widths (6, 10, 9, 8, 4) needs fixed weights V of shapes ()"),
    ({"masks": lambda m: [np.ones((5, 10), bool)]}, UserError,
     "bool arrays of shapes [(5, 10), (5, 9), (5, 8)], or bit-packed uint8 arrays of shapes "
     "[(5, 2), (5, 2), (5, 1)], got ['bool (5, 10)']"),
    ({"masks": lambda m: [np.ones((5, N)) for N in (10, 9, 8)]}, UserError,
     "got ['float64 (5, 10)', "),
])
def test_bad_arguments(changes, error, message, draw):
    with pytest.raises(error, match=re.escape(message)):
        call(draw, **changes)


def test_a_wrong_cotangent(draw):
    x, params, fixed = network(COMET, draw)
    _, cache = mlp.forward(x, params, fixed, COMET)
    with pytest.raises(UserError, match=re.escape("output, (5, 4), got (5, 3)")):
        mlp.backward(np.ones((5, 3)), cache, params, mlp.zeros_like(params), COMET)
