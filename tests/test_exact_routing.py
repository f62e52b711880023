"""Exact routing: the grid by its definition, and masks that no order of summation changes."""

import re
from dataclasses import replace

import numpy as np
import pytest

from comet_np import interop
from comet_np.backends import get_backend, reference
from comet_np.benchmarks import exact_routing as bench
from comet_np.errors import NaNScore, UserError
from comet_np.functional.linear import project
from comet_np.functional.routing import grid_bits, on_grid, weight_on_grid
from comet_np.gates import Comet
from comet_np.models import gpt2, mixer, mlp, vit
from comet_np.models.gpt2 import GPT2Config
from comet_np.models.mixer import MixerConfig
from comet_np.models.mlp import MLPConfig
from comet_np.models.vit import ViTConfig
from tests import naive

EXACT, PLAIN = Comet(exact=True), Comet()
WIDTHS = (40, 50, 30, 34, 3)  # k = 25, 15, 17: odd, so that the last winner is one of a pair
KINDS = ("random", "pairs", "twins", "steps", "range", "huge", "tiny", "subnormal", "zeros")
LARGEST = float(np.finfo("float32").max)


def rows(kind, n, draw, N=WIDTHS[0], bits=7):
    """Return n rows, float32, that are hard for a router; of pairs see `paired`."""
    x = draw.standard_normal((n, N), dtype="float32")
    whole = draw.integers(-2**bits + 1, 2**bits, (n, N))
    row = np.ldexp(np.float32(1), draw.integers(-80, 80, (n, 1)))
    if kind == "pairs":  # whole numbers on the grid, 1 or 0 where the weights of a pair differ
        whole[:, 0], whole[:, 1:N:2] = 2**bits - 1, draw.integers(-1, 2, (n, N // 2))
        return whole.astype("float32") * row
    if kind == "twins":
        x[:, -(N // 2):] = x[:, :N // 2][:, ::-1]
    if kind == "steps":  # half way between two numbers of the grid, and one rounding off it
        off = draw.choice([1 - 2.0**-23, 1, 1 + 2.0**-23], (n, N))
        return ((whole + 0.5) * off).astype("float32") * row
    if kind == "range":
        return x * np.ldexp(np.float32(1), draw.integers(-60, 60, (n, N)))
    if kind == "huge":
        x = x / abs(x).max(axis=1, keepdims=True) * np.float32(LARGEST)
    if kind == "tiny":
        x = x * np.ldexp(np.float32(1), draw.integers(-126, -90, (n, 1)))
    if kind == "subnormal":
        x = x * np.float32(1e-40)
    if kind == "zeros":
        x = np.where(draw.random((n, N)) < 0.97, np.copysign(np.float32(0), x), x)
    return x


def paired(V, kind):
    """Return V of whose scores two each are equal, or all but: of "pairs" by 0 or one step of V."""
    V, pairs = V.copy(), np.arange(len(V) // 2)
    if kind == "pairs":
        odd = 2 * (pairs % (V.shape[1] // 2)) + 1
        V[pairs, odd], step = 0, step_of(V)
        V[pairs + len(pairs)] = V[pairs]
        V[pairs, odd] = step
    elif kind == "twins":
        V[pairs + len(pairs)] = V[pairs, ::-1]
    return V


def step_of(V):
    return abs(V[V != 0]).min()


def weights(gate, kind="random", widths=WIDTHS):
    V = list(gate.init(widths, 3, get_backend("numpy"), "float32"))
    V[0] = paired(V[0], kind)
    return V


# --- orders of summation ------------------------------------------------------------------------


def blocked(z, V):
    return sum(z[:, i:i + 7] @ V[:, i:i + 7].T for i in range(0, z.shape[1], 7))


def one_by_one(z, V):
    c = np.zeros((len(z), len(V)), z.dtype)
    for j in range(z.shape[1]):
        c += z[:, j, None] * V[:, j]
    return c


def permuted(z, V):
    order = np.random.default_rng(0).permutation(z.shape[1])
    return project(np.ascontiguousarray(z[:, order]), np.ascontiguousarray(V[:, order]))


ORDERS = {"BLAS": project, "reversed": lambda z, V: one_by_one(z[:, ::-1], V[:, ::-1]),
          "one by one": one_by_one, "blocked": blocked, "permuted": permuted}


def routed(x, V, gate, order="BLAS", dtype="float32"):
    """Return the masks of rows, with sums in an order of one's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comet_np.gates.routers.project", ORDERS[order])
        return bench.by_numpy(x.astype(dtype), [V_l.astype(dtype) for V_l in V], gate)


def differ(gate, kind, draw, n=2000):
    """Return for each way of summation how many rows have other masks than NumPy in float32."""
    x, V = rows(kind, n, draw), weights(gate, kind)
    ours = routed(x, V, gate)
    return {(order, dtype): bench.rows_that_differ(ours, routed(x, V, gate, order, dtype))
            for order in ORDERS for dtype in ("float32", "float64")}


@pytest.mark.parametrize("kind", KINDS)
def test_no_order_of_summation_and_no_precision_changes_a_mask(kind, draw):
    assert set(differ(EXACT, kind, draw).values()) == {0}
    with reference():
        assert set(differ(EXACT, kind, draw, 200).values()) == {0}


def test_these_rows_would_show_it(draw):
    """The router that is not exact has other masks in another order."""
    found = differ(PLAIN, "twins", draw)
    assert found.pop(("BLAS", "float32")) == 0
    assert min(found.values()) > 200


def test_winners_and_losers_are_one_step_of_the_grid_apart(draw):
    x, V = rows("pairs", 4000, draw), weights(EXACT, "pairs")
    c = np.sort(EXACT.trace(x, tuple(V)).c[0], axis=1)
    gap = c[:, 25] - c[:, 24]
    step = np.ldexp(np.float32(1), np.frexp(abs(x).max(axis=1))[1] - 7) * step_of(V[0])
    assert (gap == step).sum() > 1000
    assert (gap == 0).sum() > 500


@pytest.mark.parametrize("router", [
    pytest.param(by, id=f"{name}-{dtype}") for name, by in (
        ("torch", bench.by_pytorch), ("jax", bench.by_jax)) for dtype in ("float32", "float64")])
def test_other_libraries_agree(router, request, draw):
    library, dtype = request.node.callspec.id.split("-")
    pytest.importorskip(library, reason=f"{library}, of the crosscheck extra, is not installed")
    for kind in KINDS:
        x, V = rows(kind, 1000, draw), weights(EXACT, kind)
        theirs = router(x.astype(dtype), [V_l.astype(dtype) for V_l in V], EXACT)
        assert bench.rows_that_differ(routed(x, V, EXACT), theirs) == 0, kind


def test_the_benchmark_counts_masks_that_differ(monkeypatch, capsys):
    """It is what routes a million rows: python -m comet_np.benchmarks.exact_routing."""
    monkeypatch.setattr(bench, "WIDTHS", (20,))
    monkeypatch.setattr("sys.argv", ["exact_routing", "--rows", "300", "--width", "50"])
    bench.main()
    line, = (line.split() for line in capsys.readouterr().out.splitlines() if "float64" in line
             and line.startswith("NumPy"))
    _, _, plain, exact, plain_ties, exact_ties = line
    assert int(plain) < int(plain_ties)
    assert exact == exact_ties == "0"


@pytest.mark.parametrize("N", [1, 2, 1000, 1024, 1025, 3072, 12_288])
def test_wide_layers(N, draw):
    """The largest sums too: all products have one sign and all bits."""
    largest = np.full((1, N), 1 - 2.0**-24, "float32")
    x = np.concatenate([rows("random", 8, draw, N), largest, -largest])
    V = np.concatenate([*EXACT.init((N, 5, 1), 0, get_backend("numpy"), "float32"),
                        weight_on_grid(np.full((2, N), N**-0.5, "float32"))])
    bits = grid_bits(N)
    whole = [on_grid(x, bits.z), V]
    scores = [order(*(part.astype(dtype) for part in whole)) for order in ORDERS.values()
              for dtype in ("float32", "float64")]
    for c in scores:
        np.testing.assert_array_equal(c, scores[0])
    np.testing.assert_array_equal(scores[0], EXACT.trace(x, (V,)).c[0])


# --- the grid -----------------------------------------------------------------------------------


def test_bits_leave_sums_below_2_to_the_24():
    for N in (*range(1, 5000), *(2**i + d for i in range(3, 23) for d in (-1, 0, 1) if
                                 2**i + d <= 2**22)):
        b, v = grid_bits(N)
        assert 7 >= b >= v >= 1
        assert N * 2**(b + v) <= 2**24
        assert b + v == 14 or N * 2**(b + v + 1) > 2**24 // 2  # no bit is given away
    assert [grid_bits(N) for N in (1024, 1025, 3072, 4097)] == [(7, 7), (7, 6), (6, 6), (6, 5)]
    with pytest.raises(UserError, match=r"at most 4,194,304 inputs .*, got 4,194,305: .*=False"):
        grid_bits(2**22 + 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_number_by_number(kind, dtype, draw):
    x = rows(kind, 40, draw).astype(dtype)
    z = on_grid(x, 7)
    assert z.dtype == dtype
    for row, expected in zip(z, x, strict=True):
        np.testing.assert_array_equal(row, naive.on_grid(expected))


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_properties_of_the_grid(bits, draw):
    for kind in KINDS:
        x = rows(kind, 200, draw)
        z = on_grid(x, bits)
        np.testing.assert_array_equal(on_grid(z, bits), z)
        np.testing.assert_array_equal(on_grid(-x, bits), -z)
        np.testing.assert_array_equal(on_grid(x[:, None], bits), z[:, None])  # leading axes
        unit = np.ldexp(1.0, np.clip(np.frexp(abs(x).max(axis=1))[1], -100, 100) - bits)[:, None]
        assert (z / unit == np.rint(z / unit)).all()
        assert abs(z / unit).max() <= 2**bits - 1
        if kind not in ("range", "huge", "tiny", "subnormal"):
            assert (abs(z - x) <= unit).all()  # half of it but for the clip of the largest
            for i in range(-5, 6):
                np.testing.assert_array_equal(on_grid(np.ldexp(x, i), bits), np.ldexp(z, i))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_are_those_of_the_plain_gate_on_the_grid(dtype):
    widths = (3072, 20, 1000, 10, 3)
    plain, exact, same = (gate.init(widths, 5, get_backend("numpy"), each) for gate, each in (
        (PLAIN, dtype), (EXACT, dtype), (EXACT, "float32")))
    for V, V_q, V_32, N in zip(plain, exact, same, widths, strict=False):
        np.testing.assert_array_equal(V_q, V_32)
        unit = 2.0**(np.frexp(N**-0.5)[1] - grid_bits(N).V)
        assert V_q.dtype == dtype
        assert (V_q / unit == np.rint(V_q / unit)).all()
        assert abs(V_q / unit).max() < 2**grid_bits(N).V
        assert (abs(V_q - V) <= unit).all()


# --- the gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["tf32", "bfloat16", "float16"])
def test_the_format_of_products_does_not_touch_routing(compute, draw):
    if compute == "bfloat16":
        pytest.importorskip("ml_dtypes")
    config = MLPConfig(WIDTHS, gate=EXACT)
    params, V = mlp.init(config)
    x = rows("random", 100, draw)
    for ours, theirs in zip(*(mlp.forward(x, params, V, replace(config, compute=each))[1].masks
                              for each in (None, compute)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_z_of_a_trace_is_what_the_next_layer_reads(draw):
    V = weights(EXACT)
    c, m, z = EXACT.trace(rows("random", 9, draw), tuple(V))
    for layer in 1, 2:
        np.testing.assert_array_equal(z[layer - 1], on_grid(c[layer - 1] * m[layer - 1], 7))
        np.testing.assert_array_equal(c[layer], one_by_one(z[layer - 1], V[layer]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_rank(bad, draw):
    x = rows("random", 5, draw)
    x[3, 7] = bad
    with pytest.raises(NaNScore, match=re.escape("routing score (3, 0) of (5, 50) is NaN")):
        EXACT.trace(x, tuple(weights(EXACT)))


def test_what_cannot_be_exact_is_refused():
    with pytest.raises(UserError, match=r'g that does not round, identity or relu, got "tanh"'):
        Comet(g="tanh", exact=True)
    with pytest.raises(UserError, match=r'a routing stream is not exact, .*routing="block"'):
        MixerConfig((3, 8, 8), 4, 5, 12, 1, 14, 10, gate=EXACT, routing="stream")


def test_weights_from_elsewhere_must_be_on_the_grid():
    images = {"image": (3, 8, 8), "patch": 4, "classes": 5, "width": 12, "depth": 1, "hidden": 20}
    for module, config, load, save in (
            (mlp, MLPConfig(WIDTHS), interop.mlp_from_torch, interop.mlp_to_torch),
            (vit, ViTConfig(heads=2, **images), interop.vit_from_torch, interop.vit_to_torch),
            (mixer, MixerConfig(token_hidden=14, **images), interop.mixer_from_torch,
             interop.mixer_to_torch),
            (gpt2, GPT2Config(11, 9, 8, 2, 1, 12), interop.gpt2_from_torch,
             interop.gpt2_to_torch)):
        for gate in PLAIN, EXACT:
            drawn = replace(config, gate=gate)
            params, fixed = module.init(drawn)
            of_config = () if module is mlp else (drawn,)
            named = save(params, fixed, *of_config)
            if gate is EXACT:
                load(named, drawn)
                continue
            with pytest.raises(UserError, match=r'".*spec.*weight" is not on the grid of exact .*'
                                                r"weight_on_grid of it, or .*exact=False"):
                load(named, replace(config, gate=EXACT))
