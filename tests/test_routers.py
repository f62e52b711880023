"""Routers: the map of each by its definition, number by number, and what holds for all of them."""

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest

from comet_np import interop
from comet_np.backends import get_backend, reference
from comet_np.benchmarks import routers as bench
from comet_np.conformance.mlp import MLPSubject
from comet_np.errors import UserError
from comet_np.experiments.files import finish
from comet_np.experiments.training import RunConfig, TrainConfig
from comet_np.experiments.training.config import run_memory
from comet_np.experiments.training.model import load_run
from comet_np.functional.activations import activation
from comet_np.gates import Comet, Pass, keep
from comet_np.gates.routers import ROUTERS, hadamard, image_of
from comet_np.models import gpt2, mlp, vit
from comet_np.models.gpt2 import GPT2Config
from comet_np.models.mlp import MLPConfig
from comet_np.models.vit import ViTConfig
from comet_np.optim import OptimizerConfig
from comet_np.selfcheck import check_mlp_gradients
from comet_np.tree import check_shapes, leaves
from tests import naive
from tests.runs import assert_bit_for_bit, small_data, stopped, trained
from tests.tolerances import assert_close

NUMPY = get_backend("numpy")
ONE_ARRAY = ("dense", "centred", "unit-norm", "orthogonal")
SMALL = [name for name in ROUTERS if name != "convolutional"]
SIZES = [(12, 10), (7, 30), (30, 7), (1, 5), (5, 1), (17, 17), (48, 20), (192, 33)]
routers = pytest.mark.parametrize("name", ROUTERS)
cheap = pytest.mark.parametrize("name", SMALL)
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])


def sizes(name):
    """Return inputs and neurons of layers that a router may have."""
    return [(N_in, N) for N_in, N in SIZES if name != "convolutional" or N_in in (48, 192)]


def weights(name, N_in, N, seed=0, layer=1, dtype="float64", backend=NUMPY):
    return ROUTERS[name].init(N_in, N, seed, layer, backend, dtype)


# --- the definitions ----------------------------------------------------------------------------


@cheap
@both
def test_no_rows_have_no_scores(name, kernels):
    with contextlib.nullcontext() if kernels else reference():
        assert ROUTERS[name].scores(np.zeros((0, 12)), weights(name, 12, 10)).shape == (0, 10)


def matrix(name, V, N_in, N):
    """Return what a router multiplies z with, number by number: a list of N rows of N_in."""
    M = [[0.0] * N_in for _ in range(N)]
    if name in ONE_ARRAY:
        for i, j in itertools.product(range(N), range(N_in)):
            M[i][j] = V[i, j] - (sum(V[i]) / N_in if name == "centred" else 0)
        return M
    for i in range(N):
        if name.startswith("sparse"):
            for j in range(min(6, N_in)):
                M[i][V.index[j, i]] += -1 if name == "sparse-signed" and j % 2 else 1
            continue
        if name == "low-rank":
            for j in range(N_in):
                M[i][j] = sum(V.A[i, r] * V.B[r, j] for r in range(V.A.shape[1]))
            continue
        output = V.outputs[i]
        if name == "kronecker":
            p, t = len(V.A), V.B.shape[1]
            for j in range(N_in):
                M[i][j] = V.A[output % p, j // t] * V.B[output // p, j % t]
        if name == "hadamard":
            n = len(V.A) * len(V.B)
            for j in range(N_in):
                # B Z^T A^T: row and column of H change places, b of them to a row
                a, b = output % n % len(V.A), output % n // len(V.A)
                bits = bin((a * len(V.B) + b) & j).count("1")
                M[i][j] = V.signs[output // n, j] * (-1)**bits / np.sqrt(n)
        if name == "block-diagonal":
            n, s, t = V.V.shape
            for j in range(t):
                if j * n + output // s < N_in:
                    M[i][j * n + output // s] = V.V[output // s, output % s, j]
        if name == "convolutional":
            F, (colours, side, _) = len(V.weight), image_of(N_in)
            patch, filter_ = divmod(output, F)
            row, column = (4 * each for each in divmod(patch, side // 4))
            for C, y, x in itertools.product(range(colours), range(4), range(4)):
                M[i][C * side**2 + (row + y) * side + column + x] = V.weight[
                    filter_, (4 * y + x) * colours + C]
    return M


@both
@routers
def test_scores_are_those_of_the_definition(name, kernels, draw):
    for N_in, N in sizes(name):
        for batch in ((5,), (2, 3), (300,), (1,), ()):
            V = weights(name, N_in, N, seed=3)
            z = draw.standard_normal((*batch, N_in))
            z[..., draw.random(N_in) < 0.3] = 0
            with np.errstate() if kernels else reference():
                c = ROUTERS[name].scores(z, V)
            assert c.shape == (*batch, N)
            M, rows = matrix(name, V, N_in, N), z.reshape(-1, N_in)[:5]
            expected = [naive.product(M, z_i if name != "unit-norm" else
                                      z_i / (np.sqrt(sum(z_i * z_i)) or 1)) for z_i in rows]
            terms = np.abs(M) @ abs(rows).T
            assert_close(c.reshape(-1, N)[:5], np.reshape(expected, (-1, N)), "sum",
                         summed=terms.T + 1e-30)


@both
@cheap
def test_masks_of_a_network_by_the_definition(name, kernels, draw):
    widths, g = (12, 20, 15, 18, 4), "tanh"
    gate = Comet(0.3, "threshold", g=g, router=name)
    config = MLPConfig(widths, gate=gate)
    params, fixed = mlp.init(config, seed=5, dtype="float64")
    x = draw.standard_normal((6, 12))
    with np.errstate() if kernels else reference():
        masks = mlp.forward(x, params, fixed, config)[1].masks
        c, m, z = gate.trace(x, fixed)
    for row in range(len(x)):
        values = x[row]
        for layer, (N_in, N) in enumerate(itertools.pairwise(widths[:-1])):
            M = matrix(name, fixed[layer], N_in, N)
            scale = (np.sqrt(sum(v * v for v in values)) or 1) if name == "unit-norm" else 1
            scores = np.array(naive.product(M, np.asarray(values) / scale))
            gap = np.diff(np.sort(scores))[N - int(0.3 * N) - 1]
            if gap < 1e-12:  # a tie, which rounding may break here
                break
            mask = naive.cap(list(scores), int(0.3 * N), "threshold")
            np.testing.assert_array_equal(masks[layer][row], mask)
            values = [np.tanh(each) if on else 0.0
                      for each, on in zip(scores, mask, strict=True)]
    assert c[-1].shape == (6, 18) and len(z) == 2 and len(m) == 3


def test_hadamard_is_orthogonal_and_its_factors_make_it():
    np.testing.assert_array_equal(hadamard(8) @ hadamard(8).T, 8 * np.eye(8))
    np.testing.assert_array_equal(np.kron(hadamard(4), hadamard(8)), hadamard(32))


@pytest.mark.parametrize(("N_in", "N"), [(20, 20), (20, 12), (8, 21)])
def test_rows_are_orthonormal(N_in, N):
    V = weights("orthogonal", N_in, N, dtype="float32")
    for start in range(0, N, N_in):
        block = V[start:start + N_in]
        assert_close(block @ block.T, np.eye(len(block)), "sum")
    assert abs(V.mean()) < 0.1
    if N_in < N:
        assert abs(V[:N_in] - V[N_in:2 * N_in]).max() > 0.1


def test_six_different_inputs_are_read_all_as_often(draw):
    index = weights("sparse-binary", 20, 20_000).index
    assert index.shape == (6, 20_000)
    assert all(len(set(column)) == 6 for column in index.T[:2000].tolist())
    counts = np.array([np.bincount(row, minlength=20) for row in index])
    assert abs(counts / 1000 - 1).max() < 0.15  # five standard deviations of 1000 each


@pytest.mark.parametrize("name", ["centred", "sparse-binary", "sparse-signed"])
def test_what_is_added_to_all_inputs_changes_no_mask(name, draw):
    z = draw.integers(-50, 50, (9, 32)).astype("float64")
    V = weights(name, 32, 25)
    masks = [np.argsort(ROUTERS[name].scores(each, V), axis=-1, kind="stable")
             for each in (z, z + 64)]
    if name == "centred":  # of ties none
        np.testing.assert_array_equal(*masks)
    c, moved = (ROUTERS[name].scores(each, V) for each in (z, z + 64))
    np.testing.assert_allclose(moved - c, 6 * 64 if name == "sparse-binary" else 0, atol=1e-9)
    dense = [np.argsort(ROUTERS["dense"].scores(each, weights("dense", 32, 25)))
             for each in (z, z + 64)]
    assert (dense[0] != dense[1]).any()


def test_sparse_scores_are_the_same_bits_in_any_order_of_memory(draw):
    z = draw.standard_normal((40, 60), dtype="float32")
    for name in ("sparse-binary", "sparse-signed"):
        V = weights(name, 60, 50)
        expected = np.zeros((40, 50), "float32")
        for j, i in itertools.product(range(6), range(50)):
            read = z[:, V.index[j, i]]
            expected[:, i] += -read if name == "sparse-signed" and j % 2 else read
        for given in (z, np.asfortranarray(z), z[:, ::-1].copy()[:, ::-1]):
            np.testing.assert_array_equal(ROUTERS[name].scores(given, V), expected)


# --- what holds for all -------------------------------------------------------------------------


@routers
def test_weights_have_their_shapes_and_a_seed(name):
    router = ROUTERS[name]
    for (N_in, N), layer in itertools.product(sizes(name), (1, 2)):
        V = weights(name, N_in, N, layer=layer)
        check_shapes(V, router.shapes(N_in, N, layer), "of a router")
        for array in leaves(V):
            assert array.dtype in ("float64", "int32")
        again, other, deeper = (list(leaves(weights(name, N_in, N, seed, at)))
                                for seed, at in ((0, layer), (1, layer), (0, layer + 2)))
        for one, two in zip(leaves(V), again, strict=True):
            np.testing.assert_array_equal(one, two)
        if min(N_in, N) > 5 and layer > 1:
            for others in other, deeper:
                assert any((one != two).any() for one, two in zip(leaves(V), others, strict=True))


def test_layers_read_outputs_of_other_orders():
    for name in ("kronecker", "block-diagonal", "hadamard", "convolutional"):
        one, two = (weights(name, 48, 40, layer=layer) for layer in (1, 2))
        if name == "convolutional":  # of which only the first layer has some
            two = weights(name, 48, 40, seed=1)
        assert (one.outputs != two.outputs).any() and len(set(one.outputs.tolist())) == 40


@routers
def test_precisions_have_the_same_weights(name):
    for N_in, N in sizes(name):
        for one, two in zip(*(leaves(weights(name, N_in, N, dtype=dtype))
                              for dtype in ("float32", "float64")), strict=True):
            if name == "hadamard" and one.ndim == 2 and len(one) == one.shape[1]:
                assert_close(one, two, "elementwise")  # 1 / sqrt(N)
            else:
                np.testing.assert_array_equal(one, two)


@routers
def test_inputs_are_left_as_they_are(name, draw):
    N_in, N = (48, 20)
    V, z = weights(name, N_in, N), draw.standard_normal((4, N_in))
    kept = [each.copy() for each in (z, *leaves(V))]
    ROUTERS[name].scores(z, V)
    for one, two in zip((z, *leaves(V)), kept, strict=True):
        np.testing.assert_array_equal(one, two)


@routers
def test_multiply_adds_are_those_of_the_products(name, draw, monkeypatch):
    spent = []

    def counted(x, W):
        spent.append(x[..., 0].size * W.size)
        return x @ W.T

    def multiplied(a, b):
        spent.append(a.size * b.shape[-1])
        return a @ b

    monkeypatch.setattr("comet_np.gates.routers.project", counted)
    monkeypatch.setattr("comet_np.gates.routers.multiply", multiplied)
    for (N_in, N), layer in itertools.product(sizes(name), (1, 2)):
        spent.clear()
        ROUTERS[name].scores(draw.standard_normal((3, N_in)), weights(name, N_in, N, layer=layer))
        found = ROUTERS[name].multiply_adds(N_in, N, layer)
        extra = {"hadamard": N_in * -(-N // 2**(N_in - 1).bit_length())}.get(name, 0)
        if name.startswith("sparse"):
            assert not spent and found == min(6, N_in) * N
        else:
            assert sum(spent) == 3 * (found - extra)


def test_the_cheap_ones_are_cheap():
    dense = ROUTERS["dense"].multiply_adds(3072, 3000, 1)
    for name in set(ROUTERS) - set(ONE_ARRAY):
        assert ROUTERS[name].multiply_adds(3072, 3000, 1) < 0.06 * dense


@cheap
def test_counts_of_a_model_are_those_of_its_router(name):
    gate, widths = Comet(router=name), (12, 20, 15, 4)
    expected = sum(ROUTERS[name].multiply_adds(*layer) for layer in ((12, 20, 1), (20, 15, 2)))
    assert gate.multiply_adds(widths) == mlp.multiply_adds(MLPConfig(widths, gate=gate))[1]
    assert gate.multiply_adds(widths) == expected
    model = ViTConfig((3, 8, 8), 4, 3, 8, 2, 2, 12, gate=gate)
    assert vit.multiply_adds(model)[1] == 2 * 5 * ROUTERS[name].multiply_adds(8, 12, 1)
    assert run_memory(RunConfig(MLPConfig(widths, gate=gate))) > 0


@cheap
def test_gradients_are_those_of_the_masks_frozen(name, draw):
    config = MLPConfig((12, 20, 15, 4), "tanh", Comet(router=name, ties="index"))
    params, fixed = mlp.init(config, seed=1, dtype="float64")
    x = draw.standard_normal((5, 12))
    masks = mlp.forward(x, params, fixed, config)[1].masks
    assert check_mlp_gradients(x, params, fixed, config, masks).error < 1e-6
    assert [int(m.sum()) for m in masks] == [50, 35]


@cheap
def test_masks_are_kept(name, draw):
    config = MLPConfig((12, 20, 15, 4), gate=Comet(0.4, router=name))
    params, fixed = mlp.init(config, seed=1)
    x = draw.standard_normal((9, 12), dtype="float32")
    bits = keep(config.gate, [(x[:4], Pass()), (x[4:], Pass())], fixed, config)
    read = mlp.with_kept_masks(config)
    ours = mlp.forward(x, params, fixed, config)[1].masks
    theirs = mlp.forward(x, params, bits, read, at=Pass(example=np.arange(9)))[1].masks
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, two)


@cheap
def test_training_goes_on_bit_for_bit_and_is_read(name, tmp_path):
    config = RunConfig(MLPConfig((12, 20, 15, 5), gate=Comet(router=name)),
                       TrainConfig(OptimizerConfig("adam"), lr=1e-2, batch=8, epochs=2))
    data = small_data()
    whole = trained(config, data, tmp_path / "whole")
    assert stopped(config, data, tmp_path / "parts")
    again = trained(config, data, tmp_path / "parts")
    assert_bit_for_bit(again, whole)
    finish(tmp_path / "parts", again.result)
    model = load_run(tmp_path / "parts")
    assert model.config == config.model
    for one, two in zip(leaves(model.fixed), leaves(mlp.init(config.model)[1]), strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype


def test_convolutional_networks_mask_all_layers(draw):
    config = MLPConfig((48, 20, 15, 5), gate=Comet(router="convolutional"))
    params, fixed = mlp.init(config)
    masks = mlp.forward(draw.standard_normal((5, 48), dtype="float32"), params, fixed,
                        config)[1].masks
    assert [m.sum(axis=-1).max() for m in masks] == [10, 7]


@pytest.mark.parametrize("name", [name for name in SMALL if name != "dense"])
@pytest.mark.parametrize("model", [
    (vit, ViTConfig((3, 8, 8), 4, 3, 8, 2, 2, 12)),
    (gpt2, GPT2Config(11, 6, 8, 1, 4))], ids=["vit", "gpt2"])
def test_blocks_have_routers_too(model, name, draw):
    module, config = model
    config = replace(config, gate=Comet(router=name))
    params, fixed = module.init(config, seed=2)
    x = (draw.integers(0, 11, (2, 5)) if module is gpt2 else
         draw.standard_normal((2, 192), dtype="float32"))
    y, cache = module.forward(x, params, fixed, config)
    assert np.isfinite(y).all()
    H = config.mlps[0].widths[1]
    for of_mlp in cache.masks:
        m = of_mlp[0] if isinstance(of_mlp, tuple) else of_mlp
        assert m.shape[-1] == H and m.sum(axis=-1).max() == H // 2
    named = interop.named_weights(params, fixed, config)
    again = interop.weights_of(named, config)
    for one, two in zip(leaves((params, fixed)), leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)


# --- names, and what is refused -----------------------------------------------------------------


@cheap
def test_only_arrays_of_v_have_published_names(name):
    config = MLPConfig((12, 20, 15, 5), gate=Comet(router=name))
    params, fixed = mlp.init(config)
    named = interop.named_weights(params, fixed, config)
    assert ("spec_1.weight" in named) == (name in ONE_ARRAY)
    assert ("fc1.weight" in named) == (name in ONE_ARRAY)
    for one, two in zip(leaves((params, fixed)), leaves(interop.weights_of(named, config)),
                        strict=True):
        np.testing.assert_array_equal(one, two)
    if name not in ONE_ARRAY:
        with pytest.raises(UserError, match="save them by themselves"):
            interop.mlp_to_torch(params, fixed)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Comet(router="desne"), 'unknown router "desne"; did you mean "dense"'),
    (lambda: Comet(router="hadamard", exact=True), 'exact routing is that of the router "dense"'),
    (lambda: ViTConfig((3, 8, 8), 4, 3, 8, 2, 2, 12, routing="stream",
                       gate=Comet(router="kronecker")),
     'a routing stream consists of dense maps: .*got router="kronecker"'),
    (lambda: ViTConfig((3, 8, 8), 4, 3, 48, 2, 2, 12, gate=Comet(router="convolutional")),
     "the convolutional router sees images, and an MLP of a block sees none"),
    (lambda: mlp.init(MLPConfig((40, 20, 5), gate=Comet(router="convolutional"))),
     "needs square images of 3 colours or 1, whose sides 4 divides, got 40 inputs"),
    (lambda: MLPSubject({}, Comet(router="low-rank"), "tanh", 1e-6),
     r'diagnose knows the router of the paper, Comet\(router="dense"\), got Comet\('),
])
def test_what_does_not_go_together_is_one_sentence(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@cheap
def test_weights_of_another_router_or_input_are_refused(name, draw):
    config = MLPConfig((12, 20, 15, 5), gate=Comet(router=name))
    params, fixed = mlp.init(config)
    other = replace(config, gate=Comet(router="low-rank" if name != "low-rank" else "dense"))
    x = draw.standard_normal((3, 12), dtype="float32")
    with pytest.raises(UserError, match="the gate Comet of a network of widths"):
        mlp.forward(x, params, fixed, other)
    with pytest.raises(UserError, match=r"x must have shape \(..., 12\)"):
        config.gate.masks(x[:, :11], fixed, config, Pass())


@cheap
def test_nan_is_told(name):
    config = MLPConfig((12, 40, 5), gate=Comet(router=name))
    params, fixed = mlp.init(config)
    x = np.ones((3, 12), "float32")
    x[1, 4] = np.nan
    with pytest.raises(UserError, match=r"routing score \(1, \d+\) of \(3, 40\) is NaN"):
        mlp.forward(x, params, fixed, config)


def test_the_unit_norm_of_zero_and_half_precision():
    V = weights("unit-norm", 6, 5, dtype="float32")
    z = np.zeros((2, 6), "float32")
    np.testing.assert_array_equal(ROUTERS["unit-norm"].scores(z, V), np.zeros((2, 5)))
    c, _, _ = Comet(router="unit-norm").trace(np.ones((2, 6), "float16"), (V,))
    assert c[0].dtype == "float32"
    assert activation("tanh").forward(c[0]).dtype == "float32"


# --- what they cost -----------------------------------------------------------------------------


def test_the_benchmark_times_each_router(monkeypatch, capsys):
    """python -m comet_np.benchmarks.routers."""
    monkeypatch.setattr("sys.argv", ["routers", "--widths", "20", "--batches", "4",
                                     "--rounds", "2"])
    bench.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(ROUTERS)
    for row in rows:
        name, N, B, counted, _, maps, routing, step, *_ = row.split()
        assert (N, B) == ("20", "4") and 0 <= float(maps) <= float(step) and float(routing) > 0
        trained, routed = mlp.multiply_adds(MLPConfig((3072, 20, 20, 20, 10),
                                                      gate=Comet(router=name)))
        assert counted == f"{100 * routed / (trained + routed):.1f}"
    assert head.split()[-1] == "step/standard"
