"""The layer norm: values one by one, gradients, PyTorch, and what it refuses."""

import re

import numpy as np
import pytest

from comet_np.backends import BackendError
from comet_np.errors import UserError
from comet_np.functional.norm import Norm, norm_backward, norm_forward
from comet_np.gradcheck import check_gradients
from comet_np.tree import zeros_like
from tests import naive
from tests.tolerances import TOLERANCES, assert_close

both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
pytestmark = pytest.mark.usefixtures("bodies_or_kernels")


def point(draw, D=5):
    return {"x": 3 + draw.standard_normal((2, 3, D)),
            "p": Norm(draw.standard_normal(D), draw.standard_normal(D))}


def forward(at):
    return norm_forward(at["x"], at["p"])


def backward(dy, cache, at):
    g = zeros_like(at["p"])
    return {"x": norm_backward(dy, cache, at["p"], g), "p": g}


@both
@pytest.mark.parametrize("eps", [1e-16, 1e-5, 1.0])
def test_values_one_by_one(eps, kernels, draw):
    at = point(draw)
    y, cache = norm_forward(at["x"], at["p"], eps)
    for i in np.ndindex(2, 3):
        assert_close(y[i], naive.norm(at["x"][i], at["p"], eps), "sum")
    assert_close(cache.normed.mean(axis=-1) + 1, np.ones((2, 3)), "sum")
    if eps == 1e-16:
        assert_close(cache.normed.var(axis=-1), np.ones((2, 3)), "sum")
        assert_close(cache.inverse[..., 0], 1 / at["x"].std(axis=-1), "sum")


@both
def test_neither_a_shift_nor_a_scale_of_the_input_is_seen(kernels, draw):
    at = point(draw)
    y, _ = norm_forward(at["x"], at["p"], 1e-5)
    assert_close(norm_forward(4 * at["x"] + 1, at["p"], 16e-5)[0], y, "sum")


@both
@pytest.mark.parametrize("width", [1, 2, 6])
def test_a_row_of_one_value_gives_the_bias(width, kernels):
    p = Norm(np.full(width, 3.0), np.arange(width) + 1.0)
    y, cache = norm_forward(np.full((4, width), 7.0), p)
    np.testing.assert_array_equal(y, np.tile(p.bias, (4, 1)))
    assert np.isfinite(cache.inverse).all()


@both
@pytest.mark.parametrize("D", [1, 3, 5, 40])
def test_gradients(D, kernels, draw):
    result = check_gradients(forward, backward, point(draw, D), full=D < 40)
    assert result.error <= TOLERANCES["difference"]["float64"], result
    result = check_gradients(forward, backward, point(draw, D), complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


def changed(**parts):
    """Return a mutant: the backward with some of its gradients changed by functions."""
    def mutant(dy, cache, at):
        g = backward(dy, cache, at)
        g = {"x": g["x"], **g["p"]._asdict()}
        g |= {name: change(g, dy, cache, at) for name, change in parts.items()}
        return {"x": g["x"], "p": Norm(g["gain"], g["bias"])}

    return mutant


MUTANTS = {
    "means left out": changed(x=lambda g, dy, cache, at: dy * at["p"].gain * cache.inverse),
    "gain left out": changed(x=lambda g, dy, cache, at: norm_backward(
        dy / at["p"].gain, cache, at["p"], zeros_like(at["p"]))),
    "not divided by the deviation": changed(x=lambda g, dy, cache, at: g["x"] / cache.inverse),
    "dgain without the normed": changed(gain=lambda g, dy, *rest: dy.sum(axis=(0, 1))),
    "dgain a mean": changed(gain=lambda g, *rest: g["gain"] / 6),
    "no dbias": changed(bias=lambda g, *rest: 0 * g["bias"]),
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(mutant, draw):
    assert check_gradients(forward, changed(), point(draw)).ok
    assert not check_gradients(forward, mutant, point(draw)).ok


@both
def test_it_is_that_of_pytorch(kernels, draw):
    torch = pytest.importorskip("torch")
    at, dy = point(draw, 40), draw.standard_normal((2, 3, 40))
    y, cache = norm_forward(at["x"], at["p"], 1e-3)
    gradients = backward(dy, cache, at)
    x, gain, bias = (torch.tensor(a, requires_grad=True) for a in (at["x"], *at["p"]))
    theirs = torch.nn.functional.layer_norm(x, (40,), gain, bias, 1e-3)
    theirs.backward(torch.tensor(dy))
    for a, b in zip((y, gradients["x"], *gradients["p"]), (theirs, x.grad, gain.grad, bias.grad),
                    strict=True):
        error = np.abs(a - b.detach().numpy()).max() / np.abs(a).max()
        assert error <= TOLERANCES["torch"]["float64"]


@both
@pytest.mark.parametrize("shape", [(3, 5), (), (4, 0)])
def test_a_wrong_shape_is_refused(shape, kernels):
    p = Norm(np.ones(4), np.ones(4))
    message = re.escape("a layer norm needs x of shape (..., D), D at least 1, and gain and bias "
                        f"of shape (D,), got {shape}, (4,) and (4,)")
    with pytest.raises(UserError, match=message):
        norm_forward(np.ones(shape), p)
    with pytest.raises(UserError, match=r"got \(3, 4\), \(4,\) and \(1, 4\)"):
        norm_forward(np.ones((3, 4)), Norm(p.gain, p.bias[None]))


@both
def test_gradients_that_do_not_fit_are_refused(kernels):
    p = Norm(np.ones(4), np.ones(4))
    y, cache = norm_forward(np.ones((3, 4)), p)
    for field, wrong in (("gain", np.ones(3)), ("bias", np.ones((1, 4))),
                         ("gain", np.broadcast_to(1.0, 4)), ("bias", np.ones(4, "float32"))):
        with pytest.raises(UserError, match=rf"the gradient of a norm's {field} is added in place|"
                                            "takes arrays of one dtype"):
            norm_backward(y, cache, p, zeros_like(p)._replace(**{field: wrong}))
    with pytest.raises(UserError, match=r"the layer's output, \(3, 4\), got \(2, 4\)"):
        norm_backward(y[:2], cache, p, zeros_like(p))
    assert p.gain.sum() == p.bias.sum() == 4


def test_dtypes_without_a_kernel():
    p = Norm(np.ones(4), np.ones(4))
    with pytest.raises(BackendError, match="norm_forward on NumPy takes arrays of one dtype"):
        norm_forward(np.ones((3, 4), "float32"), p)
