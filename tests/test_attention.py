"""Attention: values one by one, gradients, PyTorch, causality, dropout, and what it refuses."""

import re

import numpy as np
import pytest

from comet_np.backends import BackendError, numpy_kernels
from comet_np.errors import UserError
from comet_np.functional.attention import (
    SelfAttention,
    attention_backward,
    attention_forward,
    self_attention_backward,
    self_attention_forward,
)
from comet_np.functional.dropout import dropout_factor
from comet_np.functional.linear import Linear, linear_forward
from comet_np.gradcheck import check_gradients
from comet_np.precision import rounded
from comet_np.rng import key
from comet_np.samples import formats
from comet_np.tree import leaves, tree_map, zeros_like
from tests import naive
from tests.tolerances import TOLERANCES, assert_close

T, D, H = 6, 8, 2
KEY = key(0, "test attention")
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
pytestmark = pytest.mark.usefixtures("bodies_or_kernels")


def packed(draw, batch=(2,), tokens=T):
    return draw.standard_normal((*batch, tokens, 3 * D))


def factor_of(draw, batch=(2,), tokens=T):
    return (draw.random((*batch, H, tokens, tokens)) < 0.7) / 0.7


def maps(draw):
    """Return the maps of the layer, large enough that its weights are far from equal."""
    return SelfAttention(Linear(draw.standard_normal((3 * D, D)), draw.standard_normal(3 * D)),
                         Linear(draw.standard_normal((D, D)), draw.standard_normal(D)))


# --- values -------------------------------------------------------------------------------------


@both
@causal_or_not
@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_values_one_by_one(heads, drops, causal, kernels, draw):
    qkv = packed(draw)
    factor = (draw.random((2, heads, T, T)) < 0.7) / 0.7 if drops else None
    y, cache = attention_forward(qkv, heads, causal, factor)
    for i in range(2):
        expected, P = naive.attention(qkv[i], heads, causal, None if factor is None else factor[i])
        assert_close(y[i], expected, "sum")
        assert_close(cache.weights[i], P, "sum")
    assert_close(cache.weights.sum(axis=-1), np.ones((2, heads, T)), "sum")


@both
@causal_or_not
def test_scores_however_large_are_finite(causal, kernels, draw):
    """The largest takes all, as the softmax has it in the limit."""
    y, cache = attention_forward(1e3 * packed(draw), H, causal)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(cache.weights.sum(axis=-1), 1)


@both
def test_equal_keys_give_the_mean_of_the_values(kernels, draw):
    qkv = packed(draw)
    qkv[..., D:2 * D] = qkv[:, :1, D:2 * D]
    values = qkv[..., 2 * D:]
    assert_close(attention_forward(qkv, H)[0], np.repeat(
        values.mean(axis=1, keepdims=True), T, axis=1), "sum")
    means = values.cumsum(axis=1) / np.arange(1, T + 1)[:, None]
    assert_close(attention_forward(qkv, H, True)[0], means, "sum")


@both
@pytest.mark.parametrize("tokens", [T, 130])  # 130: in pieces of rows
def test_a_later_token_changes_no_earlier_output(tokens, kernels, draw):
    qkv = draw.standard_normal((2, tokens, 3 * 32))
    changed = qkv.copy()
    changed[:, tokens // 2:] = draw.standard_normal(changed[:, tokens // 2:].shape)
    for causal in (True, False):
        before, after = (attention_forward(given, 1, causal)[0][:, :tokens // 2]
                         for given in (qkv, changed))
        assert np.array_equal(before, after) == causal


@pytest.mark.parametrize("d", [1, 3, 31, 64, 80])
def test_products_are_cut_so_short_that_no_thread_of_blas_wakes(d):
    for tokens in (1, 2, 17, 65, 90, 91, 128, 197, 257, 1000, 1024):
        pieces = numpy_kernels._pieces(tokens, d)
        assert [i for piece in pieces for i in range(tokens)[piece]] == list(range(tokens))
        longest = max(piece.stop - piece.start for piece in pieces)
        assert longest * tokens * d < 2**19


@both
def test_tokens_have_no_order_unless_it_is_causal(kernels, draw):
    qkv, order = packed(draw), draw.permutation(T)
    for causal in (True, False):
        y, permuted = (attention_forward(given, H, causal)[0] for given in (qkv, qkv[:, order]))
        assert np.allclose(permuted, y[:, order]) != causal


@both
@causal_or_not
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)])
def test_leading_axes_are_free(batch, causal, kernels, draw):
    qkv, factor = packed(draw, batch), factor_of(draw, batch)
    y, cache = attention_forward(qkv, H, causal, factor)
    dqkv = attention_backward(y, cache, H)
    assert (y.shape, dqkv.shape, cache.weights.shape) == (
        (*batch, T, D), qkv.shape, (*batch, H, T, T))
    for i in np.ndindex(batch):
        y_i, of_one = attention_forward(qkv[i], H, causal, factor[i])
        assert_close(y[i], y_i, "sum")
        assert_close(dqkv[i], attention_backward(y[i], of_one, H), "sum")


@causal_or_not
@pytest.mark.parametrize("compute", formats())
def test_products_read_rounded_operands_and_nothing_else_is_rounded(compute, causal, draw):
    qkv = packed(draw)
    q, k, v = (qkv[..., i * D:(i + 1) * D] for i in range(3))

    def near(a):
        return rounded(a, compute)

    S = near(q) @ near(k).swapaxes(1, 2) / np.sqrt(D)
    P = np.exp(np.where(np.tri(T) > 0, S, -np.inf) if causal else S)
    P /= P.sum(axis=-1, keepdims=True)
    y, cache = attention_forward(qkv, 1, causal, compute=compute)
    assert_close(y, near(P) @ near(v), "sum")
    assert 0 < np.abs(y - attention_forward(qkv, 1, causal)[0]).max() < 0.1

    dy = draw.standard_normal(y.shape)
    dP = near(dy) @ near(v).swapaxes(1, 2)
    dS = P * (dP - (dP * P).sum(axis=-1, keepdims=True)) / np.sqrt(D)
    expected = (near(dS) @ near(k), near(dS).swapaxes(1, 2) @ near(q),
                near(P).swapaxes(1, 2) @ near(dy))
    assert_close(attention_backward(dy, cache, 1, compute), np.concatenate(expected, -1), "sum")


# --- gradients ----------------------------------------------------------------------------------


@both
@causal_or_not
@pytest.mark.parametrize("drops", [True, False])
def test_gradients(drops, causal, kernels, draw):
    factor = factor_of(draw) if drops else None

    def check(**options):
        return check_gradients(lambda at: attention_forward(at["qkv"], H, causal, factor),
                               lambda dy, cache, at: {"qkv": attention_backward(dy, cache, H)},
                               {"qkv": packed(draw)}, **options)

    for full in (True, False):
        result = check(full=full)
        assert result.error <= TOLERANCES["difference"]["float64"], result
    result = check(complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


def layer_point(draw):
    return {"x": draw.standard_normal((2, T, D)), "p": maps(draw)}


def layer_gradients(dy, cache, at):
    g = zeros_like(at["p"])
    return {"x": self_attention_backward(dy, cache, at["p"], g, H), "p": g}


@both
@causal_or_not
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_gradients_of_the_layer(rate, causal, kernels, draw):
    def forward(at):
        return self_attention_forward(at["x"], at["p"], H, causal, rate, KEY, 3)

    result = check_gradients(forward, layer_gradients, layer_point(draw))
    assert result.error <= TOLERANCES["difference of a network"]["float64"], result


MUTANTS = {
    "queries and keys exchanged": lambda dqkv, dy, cache: np.concatenate(
        [dqkv[..., D:2 * D], dqkv[..., :D], dqkv[..., 2 * D:]], axis=-1),
    "scores not scaled": lambda dqkv, dy, cache: np.concatenate(
        [dqkv[..., :2 * D] * np.sqrt(D / H), dqkv[..., 2 * D:]], axis=-1),
    "dropout forgotten": lambda dqkv, dy, cache: attention_backward(
        dy, cache._replace(factor=None), H),
    "weights forgotten": lambda dqkv, dy, cache: attention_backward(
        dy, cache._replace(weights=np.full_like(cache.weights, 1 / T)), H),
    "no gradient of values": lambda dqkv, dy, cache: np.concatenate(
        [dqkv[..., :2 * D], 0 * dy], axis=-1),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(mutant, draw):
    factor, qkv = factor_of(draw), packed(draw)

    def verdict(change):
        return check_gradients(
            lambda at: attention_forward(at["qkv"], H, True, factor),
            lambda dy, cache, at: {"qkv": change(attention_backward(dy, cache, H), dy, cache)},
            {"qkv": qkv}).ok

    assert verdict(lambda dqkv, dy, cache: dqkv)
    assert not verdict(mutant)


# --- PyTorch ------------------------------------------------------------------------------------


def assert_equal_to_theirs(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        b = b.detach().numpy()
        assert np.abs(a - b).max() / np.abs(b).max() <= TOLERANCES["torch"]["float64"]


@both
@causal_or_not
def test_it_is_that_of_pytorch(causal, kernels, draw):
    torch = pytest.importorskip("torch")
    qkv, dy = packed(draw), draw.standard_normal((2, T, D))
    y, cache = attention_forward(qkv, H, causal)
    there = torch.tensor(qkv, requires_grad=True)
    q, k, v = there.reshape(2, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    theirs = theirs.transpose(1, 2).reshape(2, T, D)
    theirs.backward(torch.tensor(dy))
    assert_equal_to_theirs((y, attention_backward(dy, cache, H)), (theirs, there.grad))


@both
def test_the_layer_is_that_of_pytorch(kernels, draw):
    torch = pytest.importorskip("torch")
    at, dy = layer_point(draw), draw.standard_normal((2, T, D))
    y, cache = self_attention_forward(at["x"], at["p"], H)
    gradients = layer_gradients(dy, cache, at)
    module = torch.nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64)
    theirs = (module.in_proj_weight, module.in_proj_bias, *module.out_proj.parameters())
    with torch.no_grad():
        for there, here in zip(theirs, leaves(at["p"]), strict=True):
            there.copy_(torch.from_numpy(here))
    x = torch.tensor(at["x"], requires_grad=True)
    out, _ = module(x, x, x)
    out.backward(torch.tensor(dy))
    assert_equal_to_theirs((y, gradients["x"], *leaves(gradients["p"])),
                           (out, x.grad, *(there.grad for there in theirs)))


# --- dropout on the weights ---------------------------------------------------------------------


@both
def test_weights_are_dropped_where_the_factor_says(kernels, draw):
    at = layer_point(draw)
    y, cache = self_attention_forward(at["x"], at["p"], H, True, 0.3, KEY, 5)
    factor = dropout_factor(np.empty((2, H, T, T)), 0.3, KEY, 5)
    np.testing.assert_array_equal(cache.attention.factor, factor)
    qkv, _ = linear_forward(at["x"], at["p"].qkv)
    expected, _ = linear_forward(attention_forward(qkv, H, True, factor)[0], at["p"].out)
    assert_close(y, expected, "sum")
    assert_close(cache.attention.weights.sum(axis=-1), np.ones((2, H, T)), "sum")  # kept whole
    other, _ = self_attention_forward(at["x"], at["p"], H, True, 0.3, KEY, 6)
    assert np.abs(y - other).max() > 0.1


@both
def test_without_a_key_or_a_rate_nothing_is_dropped(kernels, draw):
    at = layer_point(draw)
    expected, _ = self_attention_forward(at["x"], at["p"], H)
    for options in {"rate": 0.3}, {"rate": 0.0, "key": KEY}:
        y, cache = self_attention_forward(at["x"], at["p"], H, **options)
        np.testing.assert_array_equal(y, expected)
        assert cache.attention.factor is None


@both
def test_neither_input_nor_cache_is_written(kernels, draw):
    qkv, factor, dy = packed(draw), factor_of(draw), draw.standard_normal((2, T, D))
    for array in qkv, factor, dy:
        array.flags.writeable = False
    _, cache = attention_forward(qkv, H, True, factor)
    kept = tree_map(np.copy, cache)
    cache.weights.flags.writeable = False
    first = attention_backward(dy, cache, H)
    np.testing.assert_array_equal(attention_backward(dy, cache, H), first)
    for a, b in zip(cache, kept, strict=True):
        np.testing.assert_array_equal(a, b)


# --- what is refused ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("shape", "heads"), [
    ((T, 3 * D), 3), ((T, 3 * D), 0), ((T, 3 * D), -2), ((T, 3 * D), 2.0), ((T, D), 2),
    ((3 * D,), 2), ((), 1), ((0, 3 * D), 2), ((T, 0), 1)])
def test_what_is_not_of_heads_is_refused(shape, heads, kernels):
    with pytest.raises(UserError, match=re.escape(
            "attention needs queries, keys and values of at least one token side by side, (..., T, "
            f"3 D), and a number of heads that divides D, got {shape} and {heads} heads")):
        attention_forward(np.ones(shape), heads)


@both
def test_a_factor_or_a_cotangent_of_another_shape_is_refused(kernels, draw):
    qkv = packed(draw)
    with pytest.raises(UserError, match=r"shape of the weights, \(2, 2, 6, 6\), got \(2, 6, 6\)"):
        attention_forward(qkv, H, factor=np.ones((2, T, T)))
    y, cache = attention_forward(qkv, H)
    for dy in (y[:1], y[..., :4], y[:, :1]):
        with pytest.raises(UserError, match=r"dy must have the shape .*\(2, 6, 8\), got"):
            attention_backward(dy, cache, H)


def test_dtypes_without_a_kernel(draw):
    with pytest.raises(BackendError, match="attention_forward on NumPy takes arrays of one dtype"):
        attention_forward(packed(draw), H, factor=factor_of(draw).astype("float32"))
