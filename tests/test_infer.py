"""`mlp.infer`: the winners alone, the same numbers."""

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.gates import Comet, Layerwise, TopK
from comet_np.models import mlp


def made(dtype="float64", B=3, **changes):
    config = mlp.MLPConfig(**{"widths": (11, 40, 30, 20, 4), "gate": Comet(0.2)} | changes)
    params, fixed = mlp.init(config, dtype=dtype)
    x = np.random.default_rng(0).normal(size=(B, config.widths[0])).astype(dtype)
    return x, params, fixed, config


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("changes", [
    {}, {"gate": Comet(0.9)}, {"gate": None}, {"bias": False}, {"activation": "relu", "scale": 0.5},
    {"widths": (11, 4)}, {"widths": (11, 1, 4)}, {"gate": Comet(0.1, "threshold")}, {"B": 1},
    {"B": 40}, {"dropout": 0.5}, {"compute": "float16"}], ids=str)
def test_it_is_what_forward_gives(dtype, changes):
    x, params, fixed, config = made(dtype, **changes)
    x[0] = 0  # with strict ties none wins
    want, cache = mlp.forward(x, params, fixed, config)
    np.testing.assert_allclose(mlp.infer(x, params, fixed, config), want,
                               rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-6)
    if config.gate is not None:
        given = mlp.infer(x, params, (), config, cache.masks)
        np.testing.assert_array_equal(given, mlp.infer(x, params, fixed, config))


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_rows_are_gathered_a_few_at_once(rows, monkeypatch):
    x, params, fixed, config = made()
    monkeypatch.setattr(mlp, "GATHERED", rows * x.size)
    sizes, whole = [], mlp.linear_forward
    monkeypatch.setattr(mlp, "linear_forward", lambda x, p, compute: (
        sizes.append(len(p.weight)), whole(x, p, compute))[1])
    got = mlp.infer(x, params, fixed, config)
    np.testing.assert_allclose(got, mlp.forward(x, params, fixed, config)[0], rtol=1e-12)
    assert sizes[0] == rows and len(sizes) > 4


def test_bit_packed_masks_may_be_given():
    x, params, fixed, config = made()
    want, cache = mlp.forward(x, params, fixed, config)
    packed = tuple(np.packbits(m, axis=-1) for m in cache.masks)
    np.testing.assert_allclose(mlp.infer(x, params, (), config, packed), want, rtol=1e-12)


def test_what_does_not_win_is_not_read():
    x, params, fixed, config = made(B=1)
    want, cache = mlp.forward(x, params, fixed, config)
    for p, m in zip(params, cache.masks, strict=False):
        p.weight[~m[0]] = np.nan
    np.testing.assert_allclose(mlp.infer(x, params, fixed, config), want, rtol=1e-12)


@pytest.mark.parametrize("gate", [TopK(0.5), Layerwise(0.5)])
def test_masks_that_are_not_known_before_are_refused(gate):
    x, params, fixed, config = made(gate=gate)
    with pytest.raises(UserError, match=f"winners alone, which the gate {type(gate).__name__}"):
        mlp.infer(x, params, fixed, config)


def test_bad_shapes_are_refused():
    x, params, fixed, config = made()
    with pytest.raises(UserError, match=r"examples as rows \(B, N_0\), got shape \(11,\)"):
        mlp.infer(x[0], params, fixed, config)
    with pytest.raises(UserError, match="masks must be bool arrays"):
        mlp.infer(x, params, fixed, config, (np.ones((3, 40), bool),))
    for function in mlp.infer, mlp.forward:
        with pytest.raises(UserError, match="masks must be a tuple with one array, or None, for"):
            function(x, params, fixed, config, np.ones((3, 40), bool))
