"""The laws that every layer keeps: what is written where, in which order, and what is added."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from comet_np.backends import OPERATIONS, BackendError, numpy_kernels, reference
from comet_np.backends.cpu import BLOCK
from comet_np.errors import UserError
from comet_np.functional.activations import activation
from comet_np.functional.attention import (
    AttentionCache,
    SelfAttention,
    attention_backward,
    attention_forward,
    self_attention_backward,
    self_attention_forward,
)
from comet_np.functional.dropout import dropout_factor
from comet_np.functional.hidden import hidden_backward, hidden_forward
from comet_np.functional.linear import Linear, linear_backward, linear_forward
from comet_np.functional.loss import softmax_cross_entropy, softmax_cross_entropy_gradient
from comet_np.functional.norm import Norm, NormCache, norm_backward, norm_forward
from comet_np.functional.patches import Embedding, embedding_backward, embedding_forward
from comet_np.optim import squared_norm
from comet_np.precision import FORMATS, rounded
from comet_np.rng import key, stream
from comet_np.tree import leaves, tree_map, zeros_like
from tests.tolerances import assert_close

ROOT = Path(__file__).resolve().parent.parent
SOFTPLUS = activation("softplus")
N_IN, N = 7, 5


class OfLinear:
    """The affine layer, called as the layers below are."""

    name = "linear_backward"
    parameters = staticmethod(lambda normal: Linear(normal(N, N_IN), normal(N)))
    forward = staticmethod(lambda x, p, m, **options: linear_forward(x, p, **options))
    backward = staticmethod(linear_backward)


class OfHidden(OfLinear):
    """The hidden layer, with the mask m."""

    name = "hidden_backward"
    forward = staticmethod(lambda x, p, m, **options: hidden_forward(x, p, m, SOFTPLUS, **options))
    backward = staticmethod(
        lambda dy, cache, p, g, **options: hidden_backward(dy, cache, p, g, SOFTPLUS, **options))


class OfNorm:
    """The layer norm."""

    name = "norm_backward"
    parameters = staticmethod(lambda normal: Norm(normal(N_IN), normal(N_IN)))
    forward = staticmethod(lambda x, p, m: norm_forward(x, p))
    backward = staticmethod(norm_backward)


class OfAttention:
    """Attention of the tokens, the last of the leading axes, with its maps."""

    parameters = staticmethod(lambda normal: SelfAttention(
        Linear(normal(3 * N_IN, N_IN), normal(3 * N_IN)), Linear(normal(N, N_IN), normal(N))))
    forward = staticmethod(lambda x, p, m: self_attention_forward(x, p, 1, True))
    backward = staticmethod(lambda dy, cache, p, g: self_attention_backward(dy, cache, p, g, 1))


class OfEmbedding:
    """The embedding of three patches, without class token."""

    parameters = staticmethod(lambda normal: Embedding(OfLinear.parameters(normal), None,
                                                       normal(3, N)))
    forward = staticmethod(lambda x, p, m: embedding_forward(x, p))
    backward = staticmethod(embedding_backward)


layers = pytest.mark.parametrize("layer", [OfLinear, OfHidden])
token_by_token = pytest.mark.parametrize("layer", [OfLinear, OfHidden, OfNorm])
every_layer = pytest.mark.parametrize(
    "layer", [OfLinear, OfHidden, OfNorm, OfAttention, OfEmbedding])
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
pytestmark = pytest.mark.usefixtures("bodies_or_kernels")


def arguments(draw, batch=(2, 3), dtype="float64", layer=OfLinear):
    """Return x, p, m and a cotangent dy of a layer."""
    def normal(*shape):
        return draw.standard_normal(shape).astype(dtype)

    return (normal(*batch, N_IN), layer.parameters(normal), draw.random((*batch, N)) < 0.6,
            normal(*batch, N_IN if layer is OfNorm else N))


def gradients_of(layer, x, p, m, dy, g=None):
    """Return dx and the parameter gradients of a layer."""
    g = zeros_like(p) if g is None else g
    _, cache = layer.forward(x, p, m)
    return layer.backward(dy, cache, p, g), g


@both
@every_layer
def test_parameter_gradients_are_added(layer, kernels, draw):
    x, p, m, dy = arguments(draw, layer=layer)
    _, once = gradients_of(layer, x, p, m, dy)
    _, more = gradients_of(layer, x, p, m, dy, g=tree_map(np.ones_like, p))
    for a, b in zip(leaves(more), leaves(once), strict=True):
        assert_close(a, 1 + b, "sum")


@both
@every_layer
def test_a_parameter_is_last_read_before_its_gradient_is_added(layer, kernels, draw):
    """So that the gradients may be added into the parameters themselves, as plain SGD does."""
    x, p, m, dy = arguments(draw, layer=layer)
    expected_dx, g = gradients_of(layer, x, p, m, dy)
    expected = tree_map(np.add, p, g)
    dx, updated = gradients_of(layer, x, p, m, dy, g=p)
    np.testing.assert_array_equal(dx, expected_dx)
    for a, b in zip(leaves(updated), leaves(expected), strict=True):
        assert_close(a, b, "sum")


@token_by_token
def test_a_backward_that_adds_before_it_reads_breaks_that_law(layer, monkeypatch, draw):
    right = OPERATIONS[layer.name].body

    def mutant(dy, cache, p, g, *rest, **options):
        right(dy, cache, p, g, *rest, **options)
        return right(dy, cache, p, zeros_like(p), *rest, **options)

    monkeypatch.setattr(layer, "backward", staticmethod(
        lambda dy, cache, p, g: mutant(dy, cache, p, g, *[SOFTPLUS] * (layer is OfHidden))))
    with pytest.raises(AssertionError):
        test_a_parameter_is_last_read_before_its_gradient_is_added(layer, True, draw)


@both
@every_layer
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["softplus", "identity"])  # identity returns its argument
def test_nothing_but_gradients_is_written(layer, kernels, packed, name, monkeypatch, draw):
    monkeypatch.setitem(globals(), "SOFTPLUS", activation(name))
    x, p, m, dy = arguments(draw, layer=layer)
    m = np.packbits(m, axis=-1) if packed else m
    for array in (x, *leaves(p), m, dy):
        array.flags.writeable = False
    y, cache = layer.forward(x, p, m)
    kept = tree_map(np.copy, cache)
    y += 1 if name == "softplus" else 0  # a caller's own
    layer.forward(x, p, m)
    layer.backward(dy, cache, p, zeros_like(p))
    for a, b in zip(leaves(cache), leaves(kept), strict=True):
        np.testing.assert_array_equal(a, b)


@both
@layers
def test_the_input_gradient_can_be_left_out(layer, kernels, draw):
    x, p, m, dy = arguments(draw)
    _, expected = gradients_of(layer, x, p, m, dy)
    g = zeros_like(p)
    assert layer.backward(dy, layer.forward(x, p, m)[1], p, g, input_gradient=False) is None
    for a, b in zip(g, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def unaligned(shape):
    """Return zeros in float32 that begin one byte beside an address of four."""
    return np.zeros(4 * int(np.prod(shape)) + 1, "u1")[1:].view("f4").reshape(shape)


GRADIENT_MEMORY = {
    "unaligned": unaligned,
    "column-major": lambda shape: np.zeros(shape, "f4", order="F"),
    "apart": lambda shape: np.zeros((*shape, 2), "f4")[..., 0],
    "reversed": lambda shape: np.zeros(shape, "f4")[::-1],
    "read-only": lambda shape: np.broadcast_to(np.zeros(1, "f4"), shape),
    "other byte order": lambda shape: np.zeros(shape, ">f4"),
    "float64": lambda shape: np.zeros(shape),
    "integers": lambda shape: np.zeros(shape, int),
}
REFUSED = ("read-only", "other byte order", "float64", "integers")


@both
@layers
@pytest.mark.parametrize("field", Linear._fields)
@pytest.mark.parametrize("memory", GRADIENT_MEMORY)
def test_gradients_arrive_wherever_they_lie_or_are_refused(memory, field, layer, kernels, draw):
    x, p, m, dy = arguments(draw, dtype="float32")
    _, expected = gradients_of(layer, x, p, m, dy)
    g = zeros_like(p)
    g = g._replace(**{field: GRADIENT_MEMORY[memory](getattr(p, field).shape)})
    try:
        gradients_of(layer, x, p, m, dy, g)
    except (BackendError, ValueError, TypeError):  # of ours, of NumPy for what is read-only
        assert memory in REFUSED
        return
    assert not kernels or memory not in REFUSED
    for a, b in zip(g, expected, strict=True):
        assert_close(a.astype("float32"), b, "sum")


@layers
@pytest.mark.parametrize("rows", [255, 256, 257])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_batch_on_either_side_of_the_change_of_memory_order(dtype, rows, layer, draw):
    x, p, m, dy = arguments(draw, (rows,), dtype)
    y, _ = layer.forward(x, p, m)
    dx, g = gradients_of(layer, x, p, m, dy)
    assert y.flags.f_contiguous == (rows <= 256)
    x, p, dy = tree_map(lambda a: a.astype("float64"), (x, p, dy))
    with reference():
        expected, _ = layer.forward(x, p, m)
        expected_dx, expected_g = gradients_of(layer, x, p, m, dy)
    for a, b in zip((y, dx, *g), (expected, expected_dx, *expected_g), strict=True):
        assert_close(a, b, "sum")


@layers
@pytest.mark.parametrize("memory", ["C", "F"])
@pytest.mark.parametrize("rows", ["one", "several, one neuron"])
def test_a_product_with_one_vector_packs_no_matrix(rows, memory, layer, monkeypatch, draw):
    """As of the one token that a GPT-2 computes at a time: the weights are read once."""
    x, p, m, dy = arguments(draw, (1,) if rows == "one" else (6,))
    if rows != "one":
        p, m, dy = Linear(p.weight[:1], p.bias[:1]), m[:, :1], dy[:, :1]
    p = p._replace(weight=np.asarray(p.weight, order=memory))
    with reference():
        expected, _ = layer.forward(x, p, m)
    monkeypatch.setattr(numpy_kernels, "GEMM", dict.fromkeys("fd", pytest.fail))
    y, _ = layer.forward(x, p, m)
    assert_close(y, expected, "sum")
    if rows == "one":
        assert_close(numpy_kernels._product(dy, p.weight), dy @ p.weight, "sum")


@both
@token_by_token
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3, 4)])
def test_leading_axes_are_free(batch, layer, kernels, draw):
    x, p, m, dy = arguments(draw, batch, layer=layer)
    y, _ = layer.forward(x, p, m)
    dx, g = gradients_of(layer, x, p, m, dy)
    assert (y.shape, dx.shape) == (dy.shape, x.shape)
    total = zeros_like(p)
    for i in np.ndindex(batch):
        assert_close(y[i], layer.forward(x[i], p, m[i])[0], "sum")
        assert_close(dx[i], gradients_of(layer, x[i], p, m[i], dy[i], total)[0], "sum")
    for a, b in zip(g, total, strict=True):
        assert_close(a, b, "sum")


@both
@layers
def test_a_wrong_cotangent_shape(layer, kernels, draw):
    x, p, m, _ = arguments(draw, (3,))
    _, cache = layer.forward(x, p, m)
    for shape in (3, 4), (4, 5), (5,), (1, 5):
        with pytest.raises(UserError, match=re.escape(
                f"dy must have the shape of the layer's output, (3, 5), got {shape}")):
            layer.backward(np.ones(shape), cache, p, zeros_like(p))


# --- the format of products ---------------------------------------------------------------------


def slope(layer, a):
    """Return the derivative of a layer's output by its affine map a."""
    return SOFTPLUS.derivative(a) if layer is OfHidden else np.ones_like(a)


@both
@layers
@pytest.mark.parametrize("compute", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_read_rounded_operands_and_nothing_else_is_rounded(dtype, compute, layer, kernels,
                                                                    draw):
    if compute == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, p, m, dy = arguments(draw, (6,), dtype)
    near_x, near_W = rounded(x, compute), rounded(p.weight, compute)
    a = near_x.astype("float64") @ near_W.T + p.bias
    won = m if layer is OfHidden else np.ones_like(m)
    y, cache = layer.forward(x, p, m, compute=compute)
    assert y.dtype == dtype
    assert_close(y, won * SOFTPLUS.forward(a) if layer is OfHidden else a, "sum")
    assert 0 < np.abs(y - layer.forward(x, p, m)[0]).max() < 0.1
    assert cache.x is x  # kept whole

    g = zeros_like(p)
    da = (dy * slope(layer, cache.a if layer is OfHidden else a) * won).astype(dtype)
    dx = layer.backward(dy, cache, p, g, compute=compute)
    near_da = rounded(da, compute).astype("float64")
    assert_close(g.bias, da.sum(axis=0), "sum")
    assert_close(dx, near_da @ near_W, "sum")
    assert_close(g.weight, near_da.T @ near_x, "sum")


# --- the order of sums --------------------------------------------------------------------------


def of_blocks():
    """Return results of the operations that work by blocks, of enough of these for threads."""
    draw = stream(0, "blocks")

    def normal(*shape):
        return draw.standard_normal(shape, "float32")

    for n in 10, BLOCK, 16 * BLOCK + 12345:
        yield squared_norm(normal(n))
    x = normal(9 * BLOCK // 250, 250)
    p, g = Norm(normal(250), normal(250)), Norm(normal(250), normal(250))
    y, cache = norm_forward(x, p)
    yield from (y, norm_backward(x, NormCache(normal(*x.shape), cache.inverse), p, g), *g)
    F = dropout_factor(np.empty((10, 6, 98, 98), "float32"), 0.3, key(0, "blocks"), 3)
    qkv = normal(10, 98, 3 * 6 * 61)  # in pieces
    y, cache = attention_forward(qkv, 6, True, F)
    yield from (F, y, attention_backward(y, AttentionCache(qkv, cache.weights, F), 6))
    logits, labels = normal(40, 20000), draw.integers(0, 20000, 40)
    losses, q = softmax_cross_entropy(logits, labels)
    yield from (losses, q, softmax_cross_entropy_gradient(q, labels, 0.1, 7))


def test_no_result_depends_on_the_number_of_threads():
    program = ("import hashlib; from tests.test_layers import of_blocks\n"
               "for a in of_blocks(): print(hashlib.sha256(a.tobytes()).hexdigest())")
    one, two = (subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, check=True, capture_output=True,
        timeout=60, env=os.environ | {"OMP_NUM_THREADS": threads}).stdout for threads in "12")
    assert one == two
    assert len(set(one.split())) == 13


def test_no_result_depends_on_the_order_in_which_blocks_are_done(monkeypatch):
    expected = [a.copy() for a in of_blocks()]

    def backwards(work, length, row_elements=1):
        step = max(1, BLOCK // row_elements)
        for start in reversed(range(0, length, step)):
            work(slice(start, min(start + step, length)))

    monkeypatch.setattr(numpy_kernels, "over_blocks", backwards)
    for a, b in zip(of_blocks(), expected, strict=True):
        np.testing.assert_array_equal(a, b)
