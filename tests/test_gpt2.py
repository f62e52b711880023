"""GPT-2: number by number, gradients, gates, routing, recomputation, and its own laws."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from comet_np import gates
from comet_np.backends import reference
from comet_np.errors import NaNScore, UserError
from comet_np.functional.packing import pack_masks
from comet_np.gates import Comet, Pass
from comet_np.models import gpt2, module_of
from comet_np.models.gpt2 import GPT2Config
from comet_np.selfcheck import SMALL_GPT2, check_network_gradients
from comet_np.tree import leaves, named_leaves, tree_map, zeros_like
from tests import naive
from tests.test_vit_mixer import (
    EVERY_GATE,
    assert_adds_gradients_alone,
    both,
    branch,
    cases,
    counted_products,
    plus,
    streamed,
)
from tests.tolerances import TOLERANCES, assert_close

GPT2 = SMALL_GPT2
DROPPING = replace(GPT2, dropout=0.2, hidden_dropout=0.2, weight_dropout=0.2)
CASES = {
    "GPT-2": replace(GPT2, activation="tanh"),
    "standard": replace(GPT2, gate=None),
    "stream": replace(GPT2, routing="stream"),
    "scale, eps, top-k": replace(GPT2, scale=0.3, eps=0.1, gate=gates.TopK(0.3),
                                 activation="tanh"),
}
GATES = {str(gate): replace(GPT2, gate=gate) for gate in EVERY_GATE}
IN_TRAINING = Pass(True, 3, np.array([3, 5]), 1)


def network(config, draw, batch=(2,), T=6):
    """Return tokens, parameters none of which is special, fixed weights, and a cotangent."""
    params, fixed = gpt2.init(config, dtype="float64")
    params = tree_map(lambda a: a + 0.3 * draw.standard_normal(a.shape), params)
    tokens = draw.integers(0, config.vocabulary, (*batch, T))
    return tokens, params, fixed, draw.standard_normal((*batch, T, config.vocabulary))


def run(config, tokens, params, fixed, dy, grads=None, **options):
    """Return the logits, the cache and the gradients."""
    grads = zeros_like(params) if grads is None else grads
    y, cache = gpt2.forward(tokens, params, fixed, config, **options)
    assert gpt2.backward(dy, cache, params, grads, config) is None
    return y, cache, grads


# --- number by number ---------------------------------------------------------------------------


def by_loops(tokens, params, fixed, config):
    """Return the logits of a text, and the masks of all MLPs."""
    E, P = params.embedding
    x = [[e + p for e, p in zip(E[token], P[t], strict=True)] for t, token in enumerate(tokens)]
    given = None
    if config.routing == "stream":
        given = streamed([list(fixed.embedding[token]) for token in tokens], fixed, config)
    masks = []
    for i, (p, one) in enumerate(zip(params.blocks, config.mlps, strict=True)):
        normed = [naive.norm(row, p.attention_norm, config.eps) for row in x]
        qkv = np.array([naive.affine(row, p.attention.qkv) for row in normed])
        y, _ = naive.attention(qkv, config.heads, causal=True)
        x = plus(x, [naive.affine(row, p.attention.out) for row in y])
        normed = [naive.norm(row, p.mlp_norm, config.eps) for row in x]
        if isinstance(config.gate, gates.TopK):
            W, k = p.mlp[0], int(config.gate.p_k * config.hidden)
            made, found = branch(normed, p.mlp, None, one,
                                 [naive.cap(naive.affine(row, W), k) for row in normed])
        else:
            made, found = branch(normed, p.mlp, None if given else fixed[i], one,
                                 given and given[i])
        x = plus(x, made)
        masks.append(found)
    return [naive.product(E, naive.norm(row, params.norm, config.eps)) for row in x], masks


@pytest.fixture
def gelu_new(monkeypatch):
    """Let loops know GPT-2's own activation."""
    monkeypatch.setitem(naive.ACTIVATIONS, "gelu_new", lambda a: 0.5 * a * (
        1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))))


@both
@cases(CASES)
def test_logits_and_masks_number_by_number(config, kernels, draw, gelu_new):
    tokens, params, fixed, _ = network(config, draw)
    with np.errstate() if kernels else reference():
        y, cache = gpt2.forward(tokens, params, fixed, config)
    expected = [by_loops(text, params, fixed, config) for text in tokens]
    assert_close(y, [logits for logits, _ in expected], "sum")
    for i, m in enumerate(cache.masks):
        if config.gate is None:
            assert m is None
        else:
            np.testing.assert_array_equal(m, [masks[i] for _, masks in expected])


@cases(CASES)
def test_a_position_does_not_see_what_comes_after_it(config, draw):
    tokens, params, fixed, _ = network(config, draw)
    y, cache = gpt2.forward(tokens, params, fixed, config)
    for t in range(tokens.shape[1]):
        other = tokens.copy()
        other[:, t] = (other[:, t] + 1) % config.vocabulary
        changed, of_changed = gpt2.forward(other, params, fixed, config)
        assert_close(changed[:, :t], y[:, :t], "sum")
        assert (abs(changed[:, t:] - y[:, t:]).max(axis=-1) > 1e-9).all()
        for one, two in zip(cache.masks, of_changed.masks, strict=True):
            assert one is None or (one[:, :t] == two[:, :t]).all()


def test_leading_axes_are_free_and_a_text_may_be_shorter_than_the_context(draw):
    tokens, params, fixed, dy = network(GPT2, draw, batch=(6,))
    y, _, g = run(GPT2, tokens, params, fixed, dy)
    again, _, total = run(GPT2, tokens.reshape(2, 3, -1), params, fixed, dy.reshape(2, 3, 6, -1))
    assert_close(again.reshape(y.shape), y, "sum")
    assert_close(gpt2.forward(tokens[0, :1], params, fixed, GPT2)[0], y[0, :1], "sum")
    for ours, theirs in zip(leaves(total), leaves(g), strict=True):
        assert_close(ours, theirs, "sum", np.abs(theirs) + 1)


# --- gradients ----------------------------------------------------------------------------------


@cases({name: replace(DROPPING, gate=config.gate, routing=config.routing)
        for name, config in (GATES | {"stream": CASES["stream"]}).items()})
def test_gradients_by_differences_with_every_gate(config, draw):
    tokens, *_ = network(config, draw)
    result = check_network_gradients(tokens, config, at=IN_TRAINING)
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result
    assert {array.name for array in result.arrays} == {
        f"params.{name}" for name, _ in named_leaves(gpt2.init(config)[0])}


@cases({"scale": replace(CASES["scale, eps, top-k"], gate=None), "standard": replace(
    DROPPING, gate=None)})
def test_gradients_by_complex_step(config, draw):
    tokens, *_ = network(config, draw)
    result = check_network_gradients(tokens, config, at=Pass(True), complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


def test_gradients_with_masks_from_outside(draw):
    tokens, *_ = network(GPT2, draw)
    masks = draw.random((2, 6, 10)) < 0.5, None
    result = check_network_gradients(tokens, GPT2, masks)
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result


def test_the_table_of_tokens_has_the_gradients_of_both_its_places(draw):
    """A token that does not occur has that of the head alone; the sum is known by linearity."""
    tokens, params, fixed, dy = network(GPT2, draw)
    tokens = tokens % (GPT2.vocabulary - 1)
    last = GPT2.vocabulary - 1
    _, cache, g = run(GPT2, tokens, params, fixed, dy)
    of_head = np.einsum("btv,btd->vd", dy, cache.head.x)
    assert_close(g.embedding.tokens[last], of_head[last], "sum")
    rest = g.embedding.tokens - of_head
    assert_close(rest.sum(axis=0), g.embedding.positions.sum(axis=0), "sum",
                 np.abs(of_head).sum(axis=0))
    assert np.abs(rest[tokens.ravel()]).max() > 0.01
    assert (g.embedding.positions[6:] == 0).all()  # past the text


@both
@cases(CASES)
def test_gradients_are_added_and_nothing_else_is_written(config, kernels, draw):
    with np.errstate() if kernels else reference():
        assert_adds_gradients_alone(config, *network(config, draw), IN_TRAINING)


@cases({"GPT-2": DROPPING, "recomputed": replace(DROPPING, recompute=True)})
def test_a_step_of_sgd_inside_the_backward_pass(config, draw):
    tokens, params, fixed, dy = network(config, draw)
    _, _, g = run(config, tokens, params, fixed, -0.1 * dy, at=IN_TRAINING)
    expected = tree_map(np.add, params, g)
    params = copy.deepcopy(params)
    run(config, tokens, params, fixed, -0.1 * dy, params, at=IN_TRAINING)
    for ours, theirs in zip(leaves(params), leaves(expected), strict=True):
        assert_close(ours, theirs, "sum")


# --- recomputation ------------------------------------------------------------------------------


def arrays_of(value):
    """Return the arrays in a cache, each once."""
    return {id(a): a for a in leaves(value) if isinstance(a, np.ndarray)}.values()


@cases({name: replace(DROPPING, gate=config.gate, routing=config.routing)
        for name, config in (GATES | {"stream": CASES["stream"]}).items()})
def test_what_is_computed_again_is_the_same_bit_for_bit(config, draw):
    tokens, params, fixed, dy = network(config, draw)
    y, cache, g = run(config, tokens, params, fixed, dy, at=IN_TRAINING)
    again, kept, g_again = run(replace(config, recompute=True), tokens, params, fixed, dy,
                               at=IN_TRAINING)
    np.testing.assert_array_equal(again, y)
    for ours, theirs in zip(leaves(g_again), leaves(g), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(kept.masks, cache.masks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(kept.masks) == config.depth
    size, whole = (sum(a.nbytes for a in arrays_of(each.blocks)) for each in (kept, cache))
    assert size < whole / 8
    assert (len(cache.mlps), len(kept.mlps)) == (config.depth, 0)


def test_masks_are_not_routed_again(draw, monkeypatch):
    tokens, params, fixed, dy = network(GPT2, draw)
    config = replace(GPT2, recompute=True)
    _, cache = gpt2.forward(tokens, params, fixed, config, at=IN_TRAINING)
    monkeypatch.setattr(Comet, "masks", lambda *arguments: pytest.fail("routed again"))
    gpt2.backward(dy, cache, params, zeros_like(params), config)


# --- gates and routing --------------------------------------------------------------------------


@cases({name: config for name, config in GATES.items() if config.gate is not None} | {
    "stream": CASES["stream"]})
def test_masks_from_outside(config, draw):
    tokens, params, fixed, _ = network(config, draw)
    y, cache = gpt2.forward(tokens, params, fixed, config, at=IN_TRAINING)
    packed = [pack_masks([m.reshape(-1, m.shape[-1])]).reshape(*m.shape[:-1], -1)
              for m in cache.masks]
    for masks in (list(cache.masks), packed):
        again, given = gpt2.forward(tokens, params, (), config, masks)
        np.testing.assert_array_equal(again, y)
        for ours, theirs in zip(given.masks, cache.masks, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    first, _ = gpt2.forward(tokens, params, (), config, (None, cache.masks[1]))
    ones, _ = gpt2.forward(tokens, params, (), config,
                           (np.ones_like(cache.masks[0]), cache.masks[1]))
    np.testing.assert_array_equal(first, ones)
    assert (first != y).any()


def test_masks_of_a_stream_are_a_function_of_the_token_alone(draw):
    """Not of its place, nor of its neighbours, nor of what the network has learnt."""
    config = CASES["stream"]
    tokens, params, fixed, _ = network(config, draw, batch=(8,))
    _, cache = gpt2.forward(tokens, params, fixed, config)
    learnt = tree_map(lambda a: a + draw.standard_normal(a.shape), params)
    _, after = gpt2.forward(tokens, learnt, fixed, config)
    for masks, later in zip(cache.masks, after.masks, strict=True):
        np.testing.assert_array_equal(masks, later)
        found = {}
        for token, m in zip(tokens.ravel(), masks.reshape(-1, masks.shape[-1]), strict=True):
            assert (found.setdefault(token, m) == m).all()
        assert len({m.tobytes() for m in found.values()}) > 5
    block = replace(config, routing="block")
    _, own = gpt2.forward(tokens, params, gpt2.init(block, dtype="float64")[1], block)
    places = [own.masks[0][tokens == token] for token in range(config.vocabulary)]
    assert any((m != m[0]).any() for m in places if len(m))


def test_dropout_differs_between_places_and_steps_and_ends_with_training(draw):
    tokens, params, fixed, _ = network(DROPPING, draw)

    def factors(step):
        _, cache = gpt2.forward(tokens, params, fixed, DROPPING, at=Pass(True, step, seed=2))
        return [cache.dropped.factor, *(factor for block in cache.blocks for factor in (
            block.dropped.factor, block.attention.attention.factor, block.branch.dropped.factor,
            block.branch.mlp.dropped[0].factor))]

    found, later = factors(0), factors(1)
    assert len(found) == 1 + 4 * DROPPING.depth
    for one, other in itertools.combinations(found, 2):
        n = min(one.size, other.size)
        assert (one.ravel()[:n] != other.ravel()[:n]).any()
    assert all((one != other).any() for one, other in zip(found, later, strict=True))
    evaluated, _ = gpt2.forward(tokens, params, fixed, DROPPING)
    np.testing.assert_array_equal(evaluated, gpt2.forward(tokens, params, fixed, GPT2)[0])


# --- sizes, initial weights ---------------------------------------------------------------------


@pytest.mark.parametrize(("config", "count"), [
    (GPT2Config(), 124_439_808), (GPT2Config(vocabulary=50_000), 124_242_432),
    (gpt2.of_size("small"), 124_439_808), (gpt2.of_size("medium"), 354_823_168),
    (gpt2.of_size("large", gate=None), 774_030_080)], ids=str)
def test_parameters_of_the_published_models(config, count):
    assert gpt2.parameter_count(config) == count


@cases(CASES)
def test_the_parameters_are_counted(config):
    params, _ = gpt2.init(config)
    assert gpt2.parameter_count(config) == sum(a.size for a in leaves(params))


@pytest.mark.parametrize("recompute", [False, True])
@cases({name: CASES[name] for name in ("GPT-2", "standard", "stream")})
def test_multiply_adds_are_those_of_the_products(config, recompute, draw, monkeypatch):
    count = counted_products(monkeypatch)
    config = replace(config, recompute=recompute)
    tokens, params, fixed, dy = network(config, draw, batch=(3,), T=config.context)
    run(config, tokens, params, fixed, dy, at=Pass(True))
    trained, routing = gpt2.multiply_adds(config)
    assert (count["trained"], count["fixed"]) == (3 * trained, 3 * routing)


def test_the_laws_of_the_initial_weights():
    config = GPT2Config(400, 300, width=96, depth=3, heads=2, gate=Comet())
    params, fixed = gpt2.init(config, 3)
    back = 0.02 / math.sqrt(2 * 3)
    for name, a in named_leaves(params):
        if name.endswith(("bias", "gain")):
            assert (a == name.endswith("gain")).all(), name
        else:
            std = back if name.endswith(("out.weight", "mlp[1].weight")) else 0.02
            assert abs(a.std() / std - 1) < 0.03, name
            assert abs(a.mean()) < 4 * std / a.size**0.5, name
    for (V,) in fixed:
        assert 0.95 / 96**0.5 < np.abs(V).max() <= 1 / 96**0.5


@cases(CASES)
def test_each_array_is_drawn_for_itself_in_every_dtype(config):
    config = replace(config, width=24, hidden=24)
    drawn = [(name, a) for name, a in named_leaves(gpt2.init(config, 3)) if a.std() > 0]
    for (name, one), (_, other) in itertools.combinations(drawn, 2):
        n = min(one.size, other.size)
        assert abs(np.corrcoef(one.ravel()[:n], other.ravel()[:n])[0, 1]) < 0.4, name
    double, other = (dict(named_leaves(gpt2.init(config, seed, dtype="float64")))
                     for seed in (3, 4))
    for name, a in drawn:
        assert double[name].dtype == "float64"
        np.testing.assert_array_equal(a, double[name].astype("float32"))
        assert (a != other[name]).any()
    standard, _ = gpt2.init(replace(config, gate=None, routing="block"), 3)
    for ours, theirs in zip(leaves(gpt2.init(config, 3)[0]), leaves(standard), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"heads": 5}, "5 heads do not divide the width 12: choose"),
    ({"vocabulary": 0}, "vocabulary is an integer of at least 1, got 0"),
    ({"positions": 2.5}, "positions is an integer of at least 1, got 2.5"),
    ({"context": 0}, "context is an integer of at least 1, got 0"),
    ({"context": 8}, "a text of 8 tokens, the context, is longer than the 7 positions"),
    ({"recompute": "yes"}, "recompute is True or False, got 'yes'"),
    ({"dropout": 1.0}, r"dropout rate is a probability in \[0, 1\), got 1.0"),
    ({"weight_dropout": -1}, "dropout rate is a probability"),
    ({"routing": "blocks"}, 'unknown routing "blocks"'),
    ({"routing": "stream", "gate": None}, "a routing stream is COMET's"),
    ({"activation": "gelunew"}, 'unknown activation "gelunew"; did you mean "gelu_new"')])
def test_bad_configurations(settings, message):
    with pytest.raises(UserError, match=message) as error:
        replace(GPT2, **settings)
    assert "\n" not in str(error.value)


def test_an_unknown_size():
    with pytest.raises(UserError, match='unknown size of a GPT-2 "smal"; did you mean "small"'):
        gpt2.of_size("smal")


@pytest.mark.parametrize(("change", "message"), [
    ({"tokens": np.zeros((2, 8), int)}, "a text of 8 tokens is longer than the context, .* 7:"),
    ({"tokens": np.full((2, 6), 13)}, r"tokens must lie in 0\.\.12 for a vocabulary of 13, got 13"),
    ({"tokens": np.full(3, -1)}, r"tokens must lie in 0\.\.12 .* got -1\.\.-1"),
    ({"tokens": np.zeros((2, 6))}, "an embedding needs integer tokens .* got float64"),
    ({"tokens": np.array(3)}, "an embedding needs integer tokens"),
    ({"tokens": [1, 2]}, "expected a numpy.ndarray"),
    ({"params": ()}, "this GPT2Config needs GPT2Params"),
    ({"fixed": ()}, "the fixed weights are a tree for each of the 2 gates, .* got 0"),
    ({"masks": (None,)}, "masks from outside are one for each of the 2 MLPs, got 1"),
    ({"masks": np.ones(3)}, "masks from outside are one for each of the 2 MLPs, got ndarray"),
    ({"masks": (None, np.ones((2, 6, 9), bool))},
     r"masks must be bool arrays of shapes \[\(2, 6, 10\)\]"),
    ({"config": replace(GPT2, routing="stream")}, 'routing="stream" needs the fixed weights')])
def test_bad_arguments(change, message, draw):
    tokens, params, fixed, _ = network(GPT2, draw)
    arguments = {"tokens": tokens, "params": params, "fixed": fixed, "config": GPT2} | change
    with pytest.raises(UserError, match=message) as error:
        gpt2.forward(**arguments)
    assert "\n" not in str(error.value)


def test_weights_that_are_no_number(draw):
    tokens, params, fixed, _ = network(GPT2, draw)
    params.embedding.tokens[tokens[0, 0]] = np.nan
    with pytest.raises(NaNScore, match=r"routing score .* is NaN"):
        gpt2.forward(tokens, params, fixed, GPT2)


def test_parameters_of_another_network_are_told_by_name(draw):
    tokens, _, fixed, _ = network(GPT2, draw)
    params, _ = gpt2.init(replace(GPT2, positions=8), dtype="float64")
    with pytest.raises(UserError, match=r"this GPT2Config needs GPT2Params, 28 arrays: "
                                        r"embedding.positions \(7, 12\), got \(8, 12\)$"):
        gpt2.forward(tokens, params, fixed, GPT2)


def test_gradients_that_do_not_fit_are_refused(draw):
    tokens, params, fixed, dy = network(GPT2, draw)
    _, cache = gpt2.forward(tokens, params, fixed, GPT2)
    with pytest.raises(UserError, match="dy must have the shape of the layer's output"):
        gpt2.backward(dy[:, :-1], cache, params, zeros_like(params), GPT2)
    with pytest.raises(UserError, match="the gradients"):
        gpt2.backward(dy, cache, params, (), GPT2)
    assert module_of(GPT2) is gpt2
