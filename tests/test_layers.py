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
from comet_np.functional.hidden import hidden_backward, hidden_forward
from comet_np.functional.linear import Linear, linear_backward, linear_forward
from comet_np.optim import squared_norm
from comet_np.precision import FORMATS, rounded
from comet_np.rng import stream
from comet_np.tree import leaves, tree_map, zeros_like
from tests.tolerances import assert_close

ROOT = Path(__file__).resolve().parent.parent
SOFTPLUS = activation("softplus")
N_IN, N = 7, 5


class OfLinear:
    """The affine layer, called as the layers below are."""

    name = "linear_backward"
    forward = staticmethod(lambda x, p, m, **options: linear_forward(x, p, **options))
    backward = staticmethod(linear_backward)


class OfHidden:
    """The hidden layer, with the mask m."""

    name = "hidden_backward"
    forward = staticmethod(lambda x, p, m, **options: hidden_forward(x, p, m, SOFTPLUS, **options))
    backward = staticmethod(
        lambda dy, cache, p, g, **options: hidden_backward(dy, cache, p, g, SOFTPLUS, **options))


layers = pytest.mark.parametrize("layer", [OfLinear, OfHidden])
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


@pytest.fixture(autouse=True)
def bodies_or_kernels(request):
    """Turn kernels off for the tests that are asked for bodies."""
    kernels = request.node.callspec.params.get("kernels", True) if hasattr(
        request.node, "callspec") else True
    with np.errstate() if kernels else reference():
        yield


def arguments(draw, batch=(2, 3), dtype="float64"):
    """Return x, p, m and a cotangent dy of a layer."""
    def normal(*shape):
        return draw.standard_normal(shape).astype(dtype)

    return (normal(*batch, N_IN), Linear(normal(N, N_IN), normal(N)),
            draw.random((*batch, N)) < 0.6, normal(*batch, N))


def gradients_of(layer, x, p, m, dy, g=None):
    """Return dx and the parameter gradients of a layer."""
    g = zeros_like(p) if g is None else g
    _, cache = layer.forward(x, p, m)
    return layer.backward(dy, cache, p, g), g


@both
@layers
def test_parameter_gradients_are_added(layer, kernels, draw):
    x, p, m, dy = arguments(draw)
    _, once = gradients_of(layer, x, p, m, dy)
    _, more = gradients_of(layer, x, p, m, dy, g=tree_map(np.ones_like, p))
    for a, b in zip(more, once, strict=True):
        assert_close(a, 1 + b, "sum")


@both
@layers
def test_a_parameter_is_last_read_before_its_gradient_is_added(layer, kernels, draw):
    """So that the gradients may be added into the parameters themselves, as plain SGD does."""
    x, p, m, dy = arguments(draw)
    expected_dx, g = gradients_of(layer, x, p, m, dy)
    expected = tree_map(np.add, p, g)
    dx, updated = gradients_of(layer, x, p, m, dy, g=p)
    np.testing.assert_array_equal(dx, expected_dx)
    for a, b in zip(updated, expected, strict=True):
        assert_close(a, b, "sum")


@layers
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
@layers
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["softplus", "identity"])  # identity returns its argument
def test_nothing_but_gradients_is_written(layer, kernels, packed, name, monkeypatch, draw):
    monkeypatch.setitem(globals(), "SOFTPLUS", activation(name))
    x, p, m, dy = arguments(draw)
    m = np.packbits(m, axis=-1) if packed else m
    for array in (x, *p, m, dy):
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


@both
@layers
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3, 4)])
def test_leading_axes_are_free(batch, layer, kernels, draw):
    x, p, m, dy = arguments(draw, batch)
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


def test_the_order_of_sums_does_not_depend_on_the_number_of_threads():
    program = """if True:
        import numpy as np
        from comet_np.optim import squared_norm
        from comet_np.rng import stream
        for n in 10, 1 << 16, (1 << 20) + 12345:
            print(squared_norm(stream(0, n).standard_normal(n).astype("float32")).hex())
        """
    one, two = (subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, check=True, capture_output=True,
        timeout=60, env=os.environ | {"OMP_NUM_THREADS": threads}).stdout for threads in "12")
    assert one == two
    assert len(one.split()) == 3


def test_the_order_of_sums_does_not_depend_on_the_order_in_which_blocks_are_done(monkeypatch):
    g = stream(0, "sum").standard_normal(10 * BLOCK + 7).astype("float32")
    expected = squared_norm(g)

    def backwards(work, length):
        for start in reversed(range(0, length, BLOCK)):
            work(slice(start, min(start + BLOCK, length)))

    monkeypatch.setattr(numpy_kernels, "over_blocks", backwards)
    assert squared_norm(g) == expected
