"""Number formats: `rounded` against the definition of rounding, and what reads rounded operands."""

import math

import numpy as np
import pytest

from comet_np import gates
from comet_np import precision as precisions
from comet_np.errors import UserError
from comet_np.functional.activations import activation
from comet_np.functional.hidden import hidden_forward
from comet_np.functional.linear import Linear, linear_forward
from comet_np.models import mlp
from comet_np.optim import OptimizerConfig, init_state, squared_norm, update
from comet_np.precision import (
    FORMATS,
    PRECISIONS,
    adjust,
    check_format,
    first_scaling,
    precision,
    rounded,
    unscaled,
)
from comet_np.tree import leaves, zeros_like
from tests.tolerances import assert_close

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes, for bfloat16, is not installed")

# Bits of mantissa, the least exponent of a normal number, the largest exponent.
SHAPE = {"tf32": (10, -126, 127), "float16": (10, -14, 15), "bfloat16": (7, -126, 127)}


def nearest(v, compute, ties_away):
    """Return the number of the format that is nearest to v, by its definition."""
    if math.isnan(v) or math.isinf(v) or v == 0:
        return v
    bits, least, most = SHAPE[compute]
    exponent = max(math.frexp(v)[1] - 1, least)  # 2^exponent <= |v|, or v is subnormal
    spacing = 2.0 ** (exponent - bits)
    steps = abs(v) / spacing  # exact: a power of two
    whole = math.floor(steps)
    rest = steps - whole
    up = rest > 0.5 or (rest == 0.5 and (ties_away or whole % 2 == 1))
    size = (whole + up) * spacing
    return math.copysign(math.inf if size >= 2.0 ** (most + 1) else size, v)


def scales_by_hand(overflows, growth):
    """Return scale, good steps since it changed and steps left out, after each step."""
    scale, good, left_out, states = 2.0**16, 0, 0, []
    for overflow in overflows:
        if overflow:
            scale, good, left_out = scale / 2, 0, left_out + 1
        elif good + 1 == growth:
            scale, good = (scale * 2 if scale < 2.0**127 else scale), 0
        else:
            good += 1
        states.append((scale, good, left_out))
    return states


OVERFLOWS = np.random.default_rng(0).random(60) < 0.2


@pytest.mark.parametrize(("overflows", "growth"), [
    (OVERFLOWS, 3), (OVERFLOWS, 1), (300 * [False], 2), ([*2001 * [False], True], 2000)])
def test_the_scale_of_the_loss_follows_its_rule(overflows, growth, monkeypatch):
    assert (precisions.GROWTH_INTERVAL, precisions.FIRST_SCALE) == (2000, 65536)
    monkeypatch.setattr(precisions, "GROWTH_INTERVAL", growth)
    scaling = first_scaling(np)
    for overflow, expected in zip(overflows, scales_by_hand(overflows, growth), strict=True):
        finite = ~np.bool_(overflow)
        by = float(unscaled(scaling, finite))
        assert math.isnan(by) if overflow else by == 1 / scaling[0]
        adjust(scaling, finite)
        assert tuple(scaling) == expected
    assert scaling.dtype == "float32"


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 0.5}, {"clip_value": 0.5}], ids=str)
def test_steps_are_left_out_where_pytorchs_gradscaler_leaves_them_out(settings, draw, monkeypatch):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    monkeypatch.setattr(precisions, "GROWTH_INTERVAL", 3)
    config, scaling = OptimizerConfig("momentum", **settings), first_scaling(np)
    p = draw.standard_normal(9).astype("float32")
    theirs = torch.nn.Parameter(torch.tensor(p))
    optimizer = torch.optim.SGD([theirs], 0.1, momentum=0.9)
    scaler, state = torch.amp.GradScaler("cpu", growth_interval=3), init_state(p, config)
    for overflow in OVERFLOWS:
        g = draw.standard_normal(9).astype("float32")
        g[4] = [g[4], np.inf, -np.inf, np.nan][overflow * draw.integers(1, 4)]
        assert scaling[0] == scaler.get_scale() or scaler._scale is None
        scaler.scale((theirs * torch.tensor(g)).sum()).backward()
        scaler.unscale_(optimizer)
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([theirs], config.clip_norm)
        if config.clip_value is not None:
            torch.nn.utils.clip_grad_value_([theirs], config.clip_value)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        g *= scaling[0]
        finite = np.isfinite(squared_norm(g))
        by = unscaled(scaling, finite)
        adjust(scaling, finite)
        state = update(p, g, state, 0.1, config, scale=by)
        assert_close(p, theirs.detach().numpy(), "sum")
    assert scaling[0] == scaler.get_scale() != 2.0**16
    assert scaling[2] == sum(OVERFLOWS)


SPECIAL = [
    0.0, 1.0, 1.5, 1 / 3,
    *(1 + n * 2.0**-11 for n in range(1, 8)),  # ties of 10 bits, and what lies between
    *(1 + n * 2.0**-8 for n in range(1, 8)),  # of 7 bits
    *(1 + n * 2.0**-11 + 2.0**-22 for n in range(1, 4)), 2 - 2.0**-20,  # up to the next power
    65504.0, 65519.0, 65520.0, 65536.0, 1e5,  # the end of float16
    *(n * 2.0**-25 for n in range(1, 8)), 2.0**-14, 2.0**-14 - 2.0**-25,  # its subnormals
    2.0**-126, 2.0**-126 - 2.0**-140, *(n * 2.0**-137 for n in range(1, 8)),  # those of tf32
    *(n * 2.0**-134 for n in range(1, 8)), 2.0**-149,  # of bfloat16, the least of float32
    float(np.finfo("float32").max), 3.39e38, 2.0**127 * (2 - 2.0**-8), 2.0**127 * (2 - 2.0**-11),
    math.inf]


@pytest.mark.parametrize("compute", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounded_is_the_nearest_number_of_the_format(dtype, compute, draw):
    random_bits = draw.integers(0, 1 << 32, 5000, dtype="uint32").view("float32")
    numbers = random_bits[np.isfinite(random_bits)]
    values = np.array([*SPECIAL, *(-v for v in SPECIAL), *numbers, np.nan], "float32").astype(dtype)
    got = rounded(values, compute)
    assert got.dtype == dtype
    for v, ours in zip(values.tolist(), got.tolist(), strict=True):
        expected = nearest(v, compute, ties_away=compute == "tf32")
        assert ours == expected or (math.isnan(ours) and math.isnan(expected)), (v, ours)
        assert math.isnan(v) or math.copysign(1, ours) == math.copysign(1, v)


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
def test_the_definition_is_that_of_ml_dtypes_and_numpy(compute, draw):
    values = draw.integers(0, 1 << 32, 5000, dtype="uint32").view("float32")
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[compute]
    with np.errstate(over="ignore", invalid="ignore"):
        theirs = values.astype(kind).astype("float64")
    np.testing.assert_array_equal(theirs, [nearest(float(v), compute, False) for v in values])


def test_not_a_number_stays_so_whatever_its_bits():
    """A GPU's own is 7fffffff, whose neighbours are infinity and -0."""
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000, 0x7F800001], "uint32")
    for compute in FORMATS:
        with np.errstate(invalid="ignore"):  # the last one is a signalling one
            assert np.isnan(rounded(bits.view("float32"), compute)).all()


@pytest.mark.parametrize("compute", FORMATS)
def test_beyond_the_largest_number_lies_infinity(compute):
    np.testing.assert_array_equal(rounded(np.array([1e300, -1e300]), compute), [np.inf, -np.inf])


@pytest.mark.parametrize("compute", FORMATS)
@pytest.mark.parametrize("layout", [np.asfortranarray, lambda a: np.repeat(a, 2, -1)[..., ::2]])
def test_every_layout_and_shape(layout, compute, draw):
    a = draw.standard_normal((3, 5)).astype("float32")
    before = a.copy()
    np.testing.assert_array_equal(rounded(layout(a), compute), rounded(a, compute))
    np.testing.assert_array_equal(rounded(rounded(a, compute), compute), rounded(a, compute))
    assert rounded(a[0, 0].reshape(()), compute).shape == ()
    np.testing.assert_array_equal(a, before)
    assert rounded(a, None) is a


# --- in the network -----------------------------------------------------------------------------

COMET = mlp.MLPConfig((6, 10, 9, 4), gate=gates.Comet())


@pytest.mark.parametrize("compute", FORMATS)
def test_masks_do_not_depend_on_the_format(compute, draw):
    config = mlp.MLPConfig((40, 200, 100, 4), compute=compute)
    params, fixed = mlp.init(config, seed=1)
    x = draw.standard_normal((300, 40)).astype("float32")
    whole, expected = mlp.forward(x, params, fixed, mlp.MLPConfig(config.widths))
    near, cache = mlp.forward(x, params, fixed, config)
    for ours, theirs in zip(cache.masks, expected.masks, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(near, whole)
    # Had the routing read rounded numbers, others would have won.
    _, other = mlp.forward(rounded(x, compute), params,
                           tuple(rounded(V, compute) for V in fixed), config)
    assert any((a != b).any() for a, b in zip(other.masks, cache.masks, strict=True))


@pytest.mark.parametrize("compute", FORMATS)
def test_every_layer_of_the_network_reads_rounded_operands(compute, draw):
    config = mlp.MLPConfig(COMET.widths, compute=compute)
    params, fixed = mlp.init(config, seed=1)
    x = draw.standard_normal((5, 6)).astype("float32")
    a_L, cache = mlp.forward(x, params, fixed, config)
    h = x
    for p, m in zip(params[:-1], cache.masks, strict=True):
        h, _ = hidden_forward(h, p, m, activation("softplus"), compute)
    np.testing.assert_array_equal(a_L, linear_forward(h, params[-1], compute)[0])

    grads, whole = zeros_like(params), zeros_like(params)
    mlp.backward(a_L, cache, params, grads, config)
    mlp.backward(a_L, cache, params, whole, COMET)
    for p, (ours, theirs) in enumerate(zip(grads, whole, strict=True)):
        assert not np.array_equal(ours.weight, theirs.weight), p
    assert all(g.dtype == "float32" for g in leaves(grads))


def test_a_format_that_is_not_known():
    p, x = Linear(np.ones((2, 3), "float32"), None), np.ones((4, 3), "float32")
    message = 'unknown format of products "float17"; did you mean "float16"\\? \\(known: bfloat16, '
    for use in (lambda: rounded(x, "float17"), lambda: check_format("float17"),
                lambda: linear_forward(x, p, "float17"),
                lambda: hidden_forward(x, p, None, activation("tanh"), "float17"),
                lambda: mlp.MLPConfig((3, 4, 2), compute="float17")):
        with pytest.raises(UserError, match=message):
            use()


def test_bfloat16_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    for use in (lambda: precision("bfloat16"), lambda: mlp.MLPConfig((3, 2), compute="bfloat16"),
                lambda: rounded(np.ones(3), "bfloat16")):
        with pytest.raises(UserError, match="needs the package ml_dtypes: python -m pip install"):
            use()


def test_precisions():
    for name in PRECISIONS:
        found = precision(name)
        assert found.compute == (name if name in FORMATS else None)
        assert found.accumulate == found.master == ("float64" if name == "float64" else "float32")
    with pytest.raises(UserError, match='unknown precision "flaot32"; did you mean "float32"'):
        precision("flaot32")


def test_products_of_float16_are_summed_whole():
    x = np.full((1, 4096), 1.0, "float32")
    y, _ = linear_forward(x, Linear(x, None), "float16")
    assert_close(y, [[4096.0]], "elementwise")
    y, _ = linear_forward(x * 200, Linear(x * 200, None), "float16")  # float16 ends at 65504
    assert_close(y, [[4096 * 4e4]], "elementwise")
