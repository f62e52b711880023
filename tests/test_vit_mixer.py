"""The ViT and the MLP-Mixer: number by number, gradients, gates, routing, and their own laws."""

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from comet_np import gates
from comet_np.backends import get_backend, reference
from comet_np.errors import NaNScore, UserError
from comet_np.experiments.fit import trained_on
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.training.model import KNOWN, load_run
from comet_np.functional.packing import pack_masks
from comet_np.gates import Comet, Pass
from comet_np.models import mixer, mlp, module_of, vit
from comet_np.models.stream import Stream
from comet_np.optim import OptimizerConfig
from comet_np.selfcheck import SMALL_MIXER, SMALL_VIT, check_network_gradients
from comet_np.settings import record, restored
from comet_np.tree import leaves, named_leaves, tree_map, zeros_like
from tests import naive
from tests.runs import small_data
from tests.tolerances import TOLERANCES, assert_close

VIT, MIXER = replace(SMALL_VIT, dropout=0.0, hidden_dropout=0.0), SMALL_MIXER
CASES = {
    "ViT": VIT,
    "ViT, standard": replace(VIT, gate=None, qkv_bias=True, final_norm="tokens"),
    "ViT, mean pooling": replace(VIT, pooling="mean", final_norm=None, gate=Comet(0.3)),
    "ViT, mean pooling, norm of all tokens": replace(VIT, pooling="mean", final_norm="tokens"),
    "ViT, scale, eps": replace(VIT, scale=0.3, eps=0.1),
    "ViT, stream": replace(VIT, routing="stream"),
    "ViT, mean pooling, stream": replace(VIT, pooling="mean", routing="stream"),
    "Mixer": MIXER,
    "Mixer, standard": replace(MIXER, gate=None),
    "Mixer, scale, eps": replace(MIXER, scale=0.3, eps=0.1),
    "Mixer, stream": replace(MIXER, routing="stream"),
}
ONE = {"ViT": VIT, "Mixer": MIXER}
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


def cases(which=CASES):
    return pytest.mark.parametrize("config", which.values(), ids=which)


def network(config, draw, batch=(2,)):
    """Return images, parameters none of which is special, fixed weights, and a cotangent."""
    params, fixed = module_of(config).init(config, dtype="float64")
    params = tree_map(lambda a: a + 0.3 * draw.standard_normal(a.shape), params)
    x = draw.standard_normal((*batch, math.prod(config.image)))
    return x, params, fixed, draw.standard_normal((*batch, config.classes))


def run(config, x, params, fixed, dy, grads=None, **options):
    """Return the logits, dx and the gradients."""
    model, grads = module_of(config), zeros_like(params) if grads is None else grads
    y, cache = model.forward(x, params, fixed, config, **options)
    return y, model.backward(dy, cache, params, grads, config), grads


# --- number by number ---------------------------------------------------------------------------


def patches_of(image, config):
    """Return the patches of a flat image, pixel by pixel: rows, columns, then colours."""
    (C, rows, columns), P = config.image, config.patch
    planes = image.reshape(C, rows, columns)
    return [[planes[c, i + di, j + dj] for di in range(P) for dj in range(P) for c in range(C)]
            for i in range(0, rows, P) for j in range(0, columns, P)]


def norm(x, p, eps):
    mean = math.fsum(x) / len(x)
    variance = math.fsum((v - mean)**2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(variance + eps) * g + b
            for v, g, b in zip(x, *p, strict=True)]


def attention(tokens, p, heads):
    """Return attention of tokens to one another, head by head."""
    qkv = [naive.affine(x, p.qkv) for x in tokens]
    D = len(qkv[0]) // 3
    d, out = D // heads, [[] for _ in tokens]
    for head in range(heads):
        q, k, v = ([row[part * D + head * d:part * D + (head + 1) * d] for row in qkv]
                   for part in range(3))
        for y, query in zip(out, q, strict=True):
            scores = [math.fsum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(d)
                      for key in k]
            total = math.fsum(map(math.exp, scores))
            y += [math.fsum(math.exp(s) / total * value[i] for s, value in
                            zip(scores, v, strict=True)) for i in range(d)]
    return [naive.affine(y, p.out) for y in out]


def plus(x, y):
    return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(x, y, strict=True)]


def turned(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def mean(rows):
    return [math.fsum(column) / len(column) for column in turned(rows)]


def winners(config, hidden):
    return max(1, int(config.gate.p_k * hidden))


def branch(tokens, p, V, one, masks):
    """Return the MLP of each row, whose mask is in `masks`, or the cap of V x."""
    made, found = [], []
    p = p[0], p[1]._replace(weight=one.scale * p[1].weight)
    for x, m in zip(tokens, masks or itertools.repeat(None), strict=False):
        def mask_of(layer, x, a, m=m):
            return ([True] * len(a) if one.gate is None else m if m is not None else
                    naive.cap(naive.product(V[0], x), winners(one, len(a))))

        masks_of_row, y = naive.network(x, p, one.activation, mask_of)
        made.append(y)
        found.append(masks_of_row[0])
    return made, np.array(found)


def streamed(s, stream, config):
    """Return the masks of all MLPs by a stream of rows s: their scores, cap, and map back."""
    masks = []
    for (V, U), across in zip(stream.maps, config.across, strict=True):
        rows, found, after = turned(s) if across else s, [], []
        for row in rows:
            c = naive.product(V, row)
            m = naive.cap(c, winners(config, len(c)))
            found.append(m)
            z = [c_i * won for c_i, won in zip(c, m, strict=True)]
            after.append(None if U is None else naive.product(U, z))
        masks.append(found)
        if U is not None:
            s = turned(after) if across else after
    return masks


def by_loops(image, params, fixed, config):
    """Return the logits of a flat image, and the masks of all MLPs."""
    patches = patches_of(image, config)
    masks, heads, given = [], isinstance(config, vit.ViTConfig), None
    if config.routing == "stream":
        s = [naive.product(fixed.embedding, patch) for patch in patches]
        given = streamed([mean(s), *s] if heads and config.pooling == "class" else s, fixed, config)
    p = params.embedding if heads else params
    tokens = [naive.affine(patch, p.patches) for patch in patches]
    if heads:
        tokens = plus([list(p.token), *tokens] if p.token is not None else tokens, p.positions)
    for i, one in enumerate(config.mlps):
        if heads:
            b = params.blocks[i]
            normed = [norm(x, b.attention_norm, config.eps) for x in tokens]
            tokens = plus(tokens, attention(normed, b.attention, config.heads))
            of_norm, maps = b.mlp_norm, b.mlp
        else:
            of_norm, maps = params.branches[i]
        normed = [norm(x, of_norm, config.eps) for x in tokens]
        rows = turned(normed) if config.across[i] else normed
        made, found = branch(rows, maps, None if given else fixed[i], one,
                             given and given[i])
        tokens = plus(tokens, turned(made) if config.across[i] else made)
        masks.append(found)
    if not heads or config.final_norm == "tokens":
        tokens = [norm(x, params.norm, config.eps) for x in tokens]
    pooled = tokens[0] if heads and config.pooling == "class" else mean(tokens)
    if heads and config.final_norm == "pooled":
        pooled = norm(pooled, params.norm, config.eps)
    return naive.affine(pooled, params.head), masks


@both
@cases()
def test_logits_and_masks_number_by_number(config, kernels, draw):
    x, params, fixed, _ = network(config, draw)
    with np.errstate() if kernels else reference():
        y, cache = module_of(config).forward(x, params, fixed, config)
    expected = [by_loops(image, params, fixed, config) for image in x]
    assert_close(y, [logits for logits, _ in expected], "sum")
    for i, m in enumerate(cache.masks):
        if config.gate is None:
            assert m is None
        else:
            np.testing.assert_array_equal(m, [masks[i] for _, masks in expected])


# --- gradients ----------------------------------------------------------------------------------


@cases()
def test_gradients_by_differences(config, draw):
    # With dropout: without it the biases that token mixing adds to whole tokens have no gradient,
    # since the next norm takes a token's mean away.
    x, *_ = network(config, draw)
    result = check_network_gradients(x, replace(config, dropout=0.2), at=Pass(True, 3))
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result
    assert {array.name for array in result.arrays} == {
        "x", *(f"params.{name}" for name, _ in named_leaves(module_of(config).init(config)[0]))}


@cases({name: replace(config, gate=None) for name, config in ONE.items()})
def test_gradients_by_complex_step(config, draw):
    x, *_ = network(config, draw)
    result = check_network_gradients(x, replace(config, dropout=0.2), at=Pass(True),
                                     complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


def test_what_token_mixing_adds_to_a_whole_token_has_no_gradient(draw):
    x, params, fixed, dy = network(MIXER, draw)
    _, _, g = run(MIXER, x, params, fixed, dy)
    for across, branch, one in zip(MIXER.across, g.branches, params.branches, strict=True):
        of_bias = np.abs(branch.mlp[-1].bias).max()
        assert (of_bias < 1e-13 * np.abs(one.mlp[-1].bias).max()) == across, of_bias


@cases()
@pytest.mark.parametrize("train", [True, False])
def test_a_step_of_sgd_inside_the_backward_pass(config, train, draw):
    x, params, fixed, dy = network(config, draw)
    at = Pass(train)
    _, dx, g = run(config, x, params, fixed, -0.1 * dy, at=at)
    expected = tree_map(np.add, params, g)
    params = copy.deepcopy(params)
    _, inside, _ = run(config, x, params, fixed, -0.1 * dy, params, at=at)
    assert_close(inside, dx, "sum")
    for ours, theirs in zip(leaves(params), leaves(expected), strict=True):
        assert_close(ours, theirs, "sum")


@both
@cases()
def test_gradients_are_added_and_nothing_else_is_written(config, kernels, draw):
    with np.errstate() if kernels else reference():
        assert_adds_gradients_alone(config, *network(config, draw), Pass(train=True))


def assert_adds_gradients_alone(config, x, params, fixed, dy, at):
    """Assert that gradients are added, and that nothing else is written."""
    model, once = module_of(config), zeros_like(params)
    model.backward(dy, model.forward(x, params, fixed, config, at=at)[1], params, once, config)
    for array in (x, dy, *leaves((params, fixed))):
        array.flags.writeable = False
    _, cache = model.forward(x, params, fixed, config, at=at)
    before, grads = copy.deepcopy(cache), tree_map(np.ones_like, params)
    model.backward(dy, cache, params, grads, config)
    for ours, theirs in zip(leaves(cache), leaves(before), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(leaves(grads), leaves(once), strict=True):
        assert_close(ours, theirs + 1, "sum", np.abs(theirs) + 1)


@cases()
def test_the_input_gradient_can_be_left_out(config, draw):
    x, params, fixed, dy = network(config, draw)
    _, _, expected = run(config, x, params, fixed, dy)
    model, grads = module_of(config), zeros_like(params)
    _, cache = model.forward(x, params, fixed, config)
    assert model.backward(dy, cache, params, grads, config, False) is None
    for ours, theirs in zip(leaves(grads), leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@cases()
def test_leading_axes_are_free(config, draw):
    x, params, fixed, dy = network(config, draw, batch=(6,))
    y, dx, g = run(config, x, params, fixed, dy)
    for shape in ((6, *config.image), (2, 3, math.prod(config.image)), (2, 3, *config.image)):
        lead = (6,) if shape[0] == 6 else (2, 3)
        again, dx_again, g_again = run(config, x.reshape(shape), params, fixed,
                                       dy.reshape(*lead, -1))
        assert_close(again.reshape(y.shape), y, "sum")
        assert_close(dx_again.reshape(dx.shape), dx, "sum")
        for ours, theirs in zip(leaves(g_again), leaves(g), strict=True):
            assert_close(ours, theirs, "sum", np.abs(theirs).max() + np.ones_like(theirs))


@cases(ONE | {f"{name}, standard": replace(config, gate=None) for name, config in ONE.items()})
def test_a_format_of_products_is_that_of_every_product_but_the_routings(config, draw, monkeypatch):
    """Forward and backward: each operation with products is called with the format."""
    places = {"project": None, "linear_forward": 2, "hidden_forward": 4, "attention_forward": 4,
              "linear_backward": 4, "hidden_backward": 5, "attention_backward": 3}
    kernels, called = get_backend("numpy").kernels, []
    for name, place in places.items():
        def watched(body, *args, name=name, place=place, kernel=kernels[name]):
            called.append((name, None if place is None or len(args) <= place else args[place]))
            return kernel(body, *args)

        monkeypatch.setitem(kernels, name, watched)
    config = replace(config, compute="float16", hidden_dropout=0.0)
    run(config, *network(config, draw))
    assert {name for name, _ in called} >= {"linear_forward", "linear_backward", "hidden_forward",
                                            "hidden_backward"}
    assert {compute for name, compute in called if name != "project"} == {"float16"}


# --- gates and routing --------------------------------------------------------------------------

EVERY_GATE = [None, Comet(0.3, "index"), gates.Layerwise(), gates.TopK(), gates.Bernoulli(),
              gates.ExampleTied()]


@pytest.mark.parametrize("gate", EVERY_GATE, ids=str)
@cases(ONE)
def test_any_gate_works_in_any_architecture(config, gate, draw):
    """It trains as in an MLP: the masks are those that the gate gives on the MLP's own input."""
    config = replace(config, gate=gate)
    x, params, fixed, _ = network(config, draw)
    at = Pass(train=True, example=np.array([3, 5]), seed=1)
    y, cache = module_of(config).forward(x, params, fixed, config, at=at)
    for made, V, one in zip(cache.mlps, fixed, config.mlps, strict=True):
        hidden = made.hidden[0]
        if gate is None:
            assert hidden.m is None
            continue
        assert made.masks[0].shape == hidden.a.shape
        if isinstance(gate, gates.Comet | gates.Layerwise | gates.TopK):
            c = hidden.a if isinstance(gate, gates.TopK) else hidden.x @ V[0].T
            k = max(1, int(gate.p_k * one.widths[1]))
            for row, m in zip(c.reshape(-1, c.shape[-1]),
                              made.masks[0].reshape(-1, c.shape[-1]), strict=True):
                np.testing.assert_array_equal(m, naive.cap(row, k, gate.ties))
        else:
            assert (made.masks[0] == made.masks[0][:, :1]).all()  # one mask for all tokens
            assert 0.2 < made.masks[0].mean() < 0.95
    masks = None if gate is None else cache.masks
    again, _ = module_of(config).forward(x, params, fixed, config, masks, at=at)
    np.testing.assert_array_equal(again, y)
    check = check_network_gradients(x, replace(config, dropout=0.2), masks, at)
    assert check.ok, check


@cases(ONE)
def test_kept_masks_are_a_gate_as_any_other(config, draw):
    x, params, fixed, _ = network(config, draw)
    model = module_of(config)
    y, cache = model.forward(x, params, fixed, config)
    bits = tuple(pack_masks([np.concatenate([m, ~m])]) for m in cache.masks)
    kept = replace(config, gate=gates.Kept())
    again, _ = model.forward(x, params, bits, kept, at=Pass(example=np.array([0, 1])))
    np.testing.assert_array_equal(again, y)
    other, _ = model.forward(x, params, bits, kept, at=Pass(example=np.array([3, 2])))
    assert (other != y).any()


@cases(ONE)
def test_example_gates_of_two_blocks_draw_other_masks(config, draw):
    config = replace(config, gate=gates.Bernoulli())
    x, params, fixed, _ = network(config, draw)
    at = Pass(train=True, example=np.array([3, 5]))
    _, cache = module_of(config).forward(x, params, fixed, config, at=at)
    step = len(config.mlps) // config.depth
    assert (cache.masks[0] != cache.masks[step]).any()


@cases({name: config for name, config in CASES.items() if config.gate is not None})
def test_masks_from_outside(config, draw):
    x, params, fixed, _ = network(config, draw)
    model = module_of(config)
    y, cache = model.forward(x, params, fixed, config)
    again, given = model.forward(x, params, (), config, list(cache.masks))
    np.testing.assert_array_equal(again, y)
    for ours, theirs in zip(given.masks, cache.masks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other, _ = model.forward(x, params, (), config, [~m for m in cache.masks])
    assert (other != y).any()
    unmasked, _ = model.forward(x, params, (), config, (None,) * len(config.mlps))
    standard = replace(config, gate=None, routing="block")
    expected, _ = model.forward(x, params, model.init(standard)[1], standard)
    np.testing.assert_array_equal(unmasked, expected)


@cases({name: replace(config, routing="stream") for name, config in ONE.items()})
def test_a_stream_sees_the_input_alone(config, draw):
    """The masks stay as the network learns, and move with the image; a gate in a block's do not."""
    x, params, fixed, _ = network(config, draw)
    model = module_of(config)

    def masks(x, params, config, fixed):
        return model.forward(x, params, fixed, config)[1].masks

    learnt = tree_map(lambda a: a + draw.standard_normal(a.shape), params)
    before, after = (masks(x, p, config, fixed) for p in (params, learnt))
    for ours, theirs in zip(before, after, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for one, other in zip(before, masks(x[::-1], params, config, fixed), strict=True):
        assert (one != other).any()
        np.testing.assert_array_equal(one[::-1], other)
    block = replace(config, routing="block")
    own = model.init(block, dtype="float64")[1]
    moved = zip(*(masks(x, p, block, own) for p in (params, learnt)), strict=True)
    assert any((one != other).any() for one, other in moved)


@cases({name: replace(config, routing="stream", gate=Comet(0.5, g="tanh"))
        for name, config in ONE.items()})
def test_a_streams_own_activation(config, draw):
    """g acts on what is mapped back: the first MLP's masks do not know it, the next one's do."""
    x, params, fixed, _ = network(config, draw)
    fixed = tree_map(lambda a: 10 * a, fixed)
    model = module_of(config)
    _, cache = model.forward(x, params, fixed, config)
    _, identity = model.forward(x, params, fixed, replace(config, gate=Comet(0.5)))
    np.testing.assert_array_equal(cache.masks[0], identity.masks[0])
    assert any((one != other).any()
               for one, other in zip(cache.masks[1:], identity.masks[1:], strict=True))


@cases({name: replace(config, dropout=0.4, hidden_dropout=0.4) for name, config in ONE.items()})
def test_dropout_differs_between_blocks_and_steps_and_ends_with_training(config, draw):
    x, params, fixed, _ = network(config, draw)
    model = module_of(config)

    def factors(step):
        _, cache = model.forward(x, params, fixed, config, at=Pass(True, step, seed=2))
        parts = [block.branch for block in cache.blocks] if hasattr(cache, "blocks") else (
            cache.branches)
        return [branch.dropped.factor for branch in parts] + [
            made.dropped[0].factor for made in cache.mlps] + (
            [cache.dropped.factor, *(block.dropped.factor for block in cache.blocks)]
            if hasattr(cache, "blocks") else [])

    found, later = factors(0), factors(1)
    assert len(found) == (2 * len(config.mlps) if config.across[0] else 3 * config.depth + 1)
    for one, other in itertools.combinations(found, 2):
        assert one.shape != other.shape or (one != other).any()
    assert all((one != other).any() for one, other in zip(found, later, strict=True))
    evaluated, _ = model.forward(x, params, fixed, config)
    expected, _ = model.forward(x, params, fixed, replace(config, dropout=0.0, hidden_dropout=0.0))
    np.testing.assert_array_equal(evaluated, expected)


def test_weights_of_attention_are_dropped_in_training_alone(draw):
    config = replace(VIT, weight_dropout=0.5)
    x, params, fixed, _ = network(config, draw)
    _, cache = vit.forward(x, params, fixed, config, at=Pass(True))
    factors = [block.attention.attention.factor for block in cache.blocks]
    assert all(set(np.unique(factor)) == {0, 2} for factor in factors)
    assert (factors[0] != factors[1]).any()
    _, both = vit.forward(x, params, fixed, replace(config, dropout=0.5), at=Pass(True))
    for block in both.blocks:  # of streams of their own
        weights = block.attention.attention.factor.ravel()[:block.dropped.factor.size]
        assert (weights != block.dropped.factor.ravel()[:weights.size]).any()
    _, cache = vit.forward(x, params, fixed, config)
    assert all(block.attention.attention.factor is None for block in cache.blocks)


# --- sizes, initial weights, records ------------------------------------------------------------


@pytest.mark.parametrize(("config", "count"), [
    (vit.ViTConfig(), 9_523_722), (vit.ViTConfig(hidden=3072), 25_267_722),
    (vit.ViTConfig(hidden=6144), 44_160_522), (mixer.MixerConfig(), 1_819_530),
    (mixer.MixerConfig(width=3072, hidden=1536), 57_110_410)], ids=str)
def test_parameters_of_the_papers_models(config, count):
    """As derived from the definitions of the code on which the paper builds."""
    assert module_of(config).parameter_count(config) == count


@cases()
def test_the_parameters_are_counted(config):
    model = module_of(config)
    params, _ = model.init(config)
    assert model.parameter_count(config) == sum(a.size for a in leaves(params))


def counted_products(monkeypatch):
    """Return the multiply-adds of trained maps and of fixed ones, counted as they are called."""
    count, kernels = {"trained": 0, "fixed": 0}, get_backend("numpy").kernels

    def counted(name, of, kind):
        kernel = kernels.get(name, lambda body, *args: body(*args))

        def watched(body, *args):
            count[kind] += of(*args)
            return kernel(body, *args)

        monkeypatch.setitem(kernels, name, watched)

    def rows(x):
        return x.size // x.shape[-1]

    def attention_products(qkv, *rest):
        *_, T, width = qkv.shape
        return 2 * rows(qkv) * T * (width // 3)

    counted("project", lambda x, W: rows(x) * W.size, "fixed")
    counted("linear_forward", lambda x, p, *rest: rows(x) * p.weight.size, "trained")
    counted("hidden_forward", lambda x, p, *rest: rows(x) * p.weight.size, "trained")
    for name in ("linear_backward", "hidden_backward"):
        counted(name, lambda dy, cache, p, g, *rest: rows(cache.x) * p.weight.size * (
            1 + (rest[-1] if isinstance(rest[-1], bool) else True)), "trained")
    counted("attention_forward", attention_products, "trained")
    counted("attention_backward", lambda dy, cache, *rest: 2 * attention_products(cache.qkv),
            "trained")
    return count


@cases()
def test_multiply_adds_are_those_of_the_products(config, draw, monkeypatch):
    """Every product of a step is one of these operations."""
    count = counted_products(monkeypatch)
    x, params, fixed, dy = network(config, draw, batch=(3,))
    model = module_of(config)
    _, cache = model.forward(x, params, fixed, config)
    model.backward(dy, cache, params, zeros_like(params), config, False)
    trained, routing = model.multiply_adds(config)
    assert (count["trained"], count["fixed"]) == (3 * trained, 3 * routing)


@cases()
def test_each_array_is_drawn_for_itself(config):
    config = replace(config, width=24, hidden=24)
    model = module_of(config)
    drawn = [(name, a) for name, a in named_leaves(model.init(config, 3)) if a.std() > 0]
    for (name, one), (_, other) in itertools.combinations(drawn, 2):
        n = min(one.size, other.size)
        if n > 50:
            assert abs(np.corrcoef(one.ravel()[:n], other.ravel()[:n])[0, 1]) < 0.5, name
    again, other = (dict(named_leaves(model.init(config, seed))) for seed in (3, 4))
    for name, a in drawn:
        np.testing.assert_array_equal(a, again[name])
        assert (a != other[name]).any()
        assert (a == dict(named_leaves(model.init(config, 3, dtype="float64")))[name]).all()


@pytest.mark.parametrize("routing", ["block", "stream"])
@cases(ONE)
def test_models_of_one_seed_begin_with_the_same_weights(config, routing):
    """Whatever their gates and their routing."""
    model = module_of(config)
    standard, _ = model.init(replace(config, gate=None), 5)
    params, _ = model.init(replace(config, routing=routing), 5)
    for ours, theirs in zip(leaves(params), leaves(standard), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_laws_of_the_initial_weights():
    config = vit.ViTConfig(width=64, depth=1, heads=2, hidden=100)
    params, (V,) = vit.init(config)
    (block,) = params.blocks
    for W, N_in in ((params.embedding.patches.weight, 48), (block.attention.qkv.weight, 64),
                    (block.attention.out.weight, 64), (block.mlp[0].weight, 64),
                    (block.mlp[1].weight, 100), (params.head.weight, 64), (V[0], 64)):
        assert 0.95 / N_in**0.5 < np.abs(W).max() <= 1 / N_in**0.5
    assert abs(params.embedding.positions.std() - 1) < 0.05
    assert (block.mlp_norm.gain == 1).all()
    assert (block.mlp_norm.bias == 0).all()
    _, stream = vit.init(replace(config, routing="stream"))
    assert [a.shape for a in leaves(stream)] == [(64, 48), (100, 64)]  # the last U routes nothing
    _, stream = vit.init(replace(config, routing="stream", depth=2))
    assert [a.shape for a in leaves(stream)] == [(64, 48), (100, 64), (64, 100), (100, 64)]
    assert 0.95 / 10 < np.abs(stream.maps[0][1]).max() <= 1 / 10


@cases()
def test_a_run_of_it_is_read_from_its_record(config):
    run = RunConfig(config, TrainConfig())
    assert restored(record(run), {each.__name__: each for each in KNOWN}) == run


@cases(CASES)
def test_a_finished_run_is_read_again(config, tmp_path):
    data = small_data()
    config = replace(config, image=(3, 2, 2), patch=1, classes=5)
    training = TrainConfig(OptimizerConfig("adam"), lr=3e-3, batch=8, epochs=2)
    model = trained_on(data, RunConfig(config, training), folder=tmp_path)
    again = load_run(tmp_path)
    assert again.config == config
    for ours, theirs in zip(leaves((again.params, again.fixed)),
                            leaves((model.params, model.fixed)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(again.output(data.x_test), model.output(data.x_test))


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "settings", "message"), [
    (VIT, {"patch": 3}, "an image of 8x8 pixels cannot be cut into patches of 3x3: choose a patch"),
    (MIXER, {"image": (3, 8, 6)}, "an image of 8x6 pixels cannot be cut into patches of 4x4"),
    (VIT, {"image": (8, 8)}, r"image is \(colours, rows, columns\), .*, got \(8, 8\)"),
    (VIT, {"image": (0, 8, 8)}, "each an integer of at least 1"),
    (VIT, {"image": 32}, r"image is \(colours, rows, columns\), .*, got \(32,\)"),
    (MIXER, {"dropout": "a"}, "dropout rate is a probability .*, got 'a'"),
    (MIXER, {"eps": None}, "eps is a finite number above 0, got None"),
    (VIT, {"scale": float("nan")}, "scale is a finite number, got nan"),
    (VIT, {"heads": 5}, "5 heads do not divide the width 12"),
    (VIT, {"depth": 0}, "depth is an integer of at least 1, got 0"),
    (MIXER, {"token_hidden": 2.5}, "token_hidden is an integer of at least 1, got 2.5"),
    (VIT, {"dropout": 1.0}, r"dropout rate is a probability in \[0, 1\), got 1.0"),
    (VIT, {"weight_dropout": -1}, "dropout rate is a probability"),
    (MIXER, {"eps": 0.0}, "eps is a finite number above 0, got 0.0"),
    (VIT, {"pooling": "max"}, 'unknown pooling "max"'),
    (VIT, {"final_norm": "all"}, "final_norm is one of"),
    (MIXER, {"routing": "blocks"}, 'unknown routing "blocks"'),
    (VIT, {"routing": "stream", "gate": gates.TopK()}, "a routing stream is COMET's"),
    (VIT, {"gate": 0.5}, "gate is None or a gate"),
    (MIXER, {"activation": "tanhh"}, 'unknown activation "tanhh"'),
    (VIT, {"compute": "float8"}, 'unknown format of products "float8"')])
def test_bad_configurations(config, settings, message):
    with pytest.raises(UserError, match=message) as error:
        replace(config, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"x": np.zeros((2, 100))}, r"images of 3 colours and 8x8 pixels were expected, "
                                r"\(\.\.\., 3, 8, 8\) or flat \(\.\.\., 192\), got \(2, 100\)"),
    ({"x": np.zeros((2, 1, 8, 8))}, r"images of 3 colours .* got \(2, 1, 8, 8\)"),
    ({"x": [[0.0] * 192]}, "expected a numpy.ndarray"),
    ({"params": ()}, "needs (ViT|Mixer)Params"),
    ({"fixed": ()}, "the fixed weights are a tree for each of the . gates, .* got 0"),
    ({"masks": ()}, "masks from outside are one for each of the . MLPs, got 0"),
    ({"masks": np.ones(3)}, "masks from outside are one for each of the . MLPs, got ndarray"),
    ({"x": np.full((2, 192), np.nan)}, "routing score .* is NaN")])
@cases(ONE)
def test_bad_arguments(config, change, message, draw):
    x, params, fixed, _ = network(config, draw)
    arguments = {"x": x, "params": params, "fixed": fixed, "config": config} | change
    with pytest.raises(NaNScore if "NaN" in message else UserError, match=message) as error:
        module_of(config).forward(**arguments)
    assert "\n" not in str(error.value)


@cases({name: replace(config, routing="stream") for name, config in ONE.items()})
def test_weights_of_another_stream_are_refused(config, draw):
    x, params, fixed, _ = network(config, draw)
    for wrong in ((), Stream(fixed.embedding[:-1], fixed.maps), fixed._replace(maps=())):
        with pytest.raises(UserError, match=r'routing="stream" needs the fixed weights Stream'):
            module_of(config).forward(x, params, wrong, config)


def test_parameters_of_another_network_are_told_by_name(draw):
    x, _, fixed, _ = network(VIT, draw)
    params, _ = vit.init(replace(VIT, hidden=9), dtype="float64")
    with pytest.raises(UserError) as error:
        vit.forward(x, params, fixed, VIT)
    assert str(error.value) == (
        "this ViTConfig needs ViTParams, 30 arrays: blocks[0].mlp[0].weight (10, 12), got (9, 12); "
        "blocks[0].mlp[0].bias (10,), got (9,); blocks[0].mlp[1].weight (12, 10), got (12, 9), and "
        "3 more that differ")


@pytest.mark.parametrize("masks", [np.ones((2, 5, 9), bool), np.ones((2, 5, 10))])
def test_masks_that_do_not_fit_are_refused(masks, draw):
    x, params, fixed, _ = network(VIT, draw)
    with pytest.raises(UserError, match=r"masks must be bool arrays of shapes \[\(2, 5, 10\)\]"):
        vit.forward(x, params, fixed, VIT, (masks, masks))


@cases(ONE)
def test_gradients_that_do_not_fit_are_refused(config, draw):
    x, params, fixed, dy = network(config, draw)
    model = module_of(config)
    _, cache = model.forward(x, params, fixed, config)
    with pytest.raises(UserError, match="dy must have the shape of the layer's output"):
        model.backward(dy[:, :-1], cache, params, zeros_like(params), config)
    with pytest.raises(UserError, match="the gradients"):
        model.backward(dy, cache, params, (), config)


def test_an_mlp_in_a_block_is_the_mlp(draw):
    """Its output on the cache's own input is what the block added to its tokens."""
    x, params, fixed, _ = network(VIT, draw)
    _, cache = vit.forward(x, params, fixed, VIT)
    made = cache.mlps[1]
    again, whole = mlp.forward(made.hidden[0].x, params.blocks[1].mlp, fixed[1], VIT.mlps[1])
    assert_close(again, mlp.forward(made.hidden[0].x, params.blocks[1].mlp, (), VIT.mlps[1],
                                    (made.masks[0],))[0], "sum")
    np.testing.assert_array_equal(whole.masks[0], made.masks[0])
