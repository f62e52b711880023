"""Patches and their embedding: values one by one, PyTorch's convolution, gradients, refusals."""

import re

import numpy as np
import pytest

from comet_np.errors import UserError
from comet_np.functional.linear import Linear
from comet_np.functional.patches import (
    Embedding,
    embedding_backward,
    embedding_forward,
    from_patches,
    to_patches,
)
from comet_np.gradcheck import check_gradients
from comet_np.tree import leaves, zeros_like
from tests import naive
from tests.tolerances import TOLERANCES, assert_close

IMAGE, P = (3, 4, 6), 2  # colours, rows, columns; T' = 2 x 3
D = 5
both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
kinds = pytest.mark.parametrize(("token", "positions"), [
    (True, True), (False, True), (True, False), (False, False)])
pytestmark = pytest.mark.usefixtures("bodies_or_kernels")


def point(draw, token=True, positions=True, batch=(2,)):
    normal = draw.standard_normal
    return {"x": normal((*batch, 6, P * P * 3)),
            "p": Embedding(Linear(normal((D, P * P * 3)), normal(D)), normal(D) if token else None,
                           normal((6 + token, D)) if positions else None)}


def forward(at):
    return embedding_forward(at["x"], at["p"])


def backward(dx, cache, at):
    g = zeros_like(at["p"])
    return {"x": embedding_backward(dx, cache, at["p"], g), "p": g}


# --- patches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
@pytest.mark.parametrize("flat", [True, False])
def test_every_pixel_is_where_it_belongs(flat, batch, draw):
    x = draw.standard_normal((*batch, *IMAGE))
    patches = to_patches(x.reshape(*batch, 72) if flat else x, IMAGE, P)
    assert patches.shape == (*batch, 6, P * P * 3)
    for c, i, j in np.ndindex(IMAGE):
        place = ((i % P) * P + j % P) * 3 + c
        np.testing.assert_array_equal(patches[..., i // P * 3 + j // P, place], x[..., c, i, j])
    np.testing.assert_array_equal(from_patches(patches, IMAGE, P), x.reshape(*batch, 72))


def test_of_patches_of_one_pixel_and_of_the_whole_image(draw):
    x = draw.standard_normal((2, 3, 4, 4))
    np.testing.assert_array_equal(to_patches(x, (3, 4, 4), 1), x.reshape(2, 3, 16).swapaxes(1, 2))
    whole = to_patches(x, (3, 4, 4), 4)
    np.testing.assert_array_equal(whole, x.reshape(2, 1, 3, 16).swapaxes(2, 3).reshape(2, 1, 48))


def test_the_other_way_is_the_gradient(draw):
    """``<to(x), w> = <x, from(w)>``: the transposed map."""
    x, w = draw.standard_normal((2, 72)), draw.standard_normal((2, 6, 12))
    assert np.isclose((to_patches(x, IMAGE, P) * w).sum(), (x * from_patches(w, IMAGE, P)).sum())


@pytest.mark.parametrize("shape", [(2, 71), (3, 6, 4), (), (2, 4, 6)])
def test_another_image_is_refused(shape):
    with pytest.raises(UserError, match=re.escape(
            "images of 3 colours and 4x6 pixels were expected, (..., 3, 4, 6) or flat (..., 72), "
            f"got {shape}: configure the model with image=(colours, rows, columns)")):
        to_patches(np.ones(shape), IMAGE, P)


@pytest.mark.parametrize("patch", [0, -2, 3, 4, 6])
def test_a_patch_that_does_not_divide_the_image_is_refused(patch):
    with pytest.raises(UserError, match=f"4x6 pixels cannot be cut into patches of {patch}x"):
        to_patches(np.ones(IMAGE), IMAGE, patch)


# --- the embedding ------------------------------------------------------------------------------


@both
@kinds
def test_values_one_by_one(token, positions, kernels, draw):
    at = point(draw, token, positions)
    x, _ = forward(at)
    assert x.shape == (2, 6 + token, D)
    for b in range(2):
        rows = [naive.affine(patch, at["p"].patches) for patch in at["x"][b]]
        rows = [at["p"].token] * token + rows
        if positions:
            rows = [[a + e for a, e in zip(row, place, strict=True)]
                    for row, place in zip(rows, at["p"].positions, strict=True)]
        assert_close(x[b], rows, "sum")


@both
@kinds
def test_gradients(token, positions, kernels, draw):
    at = point(draw, token, positions)
    result = check_gradients(forward, backward, at, full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result
    result = check_gradients(forward, backward, at, complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


def of_embedding(**changes):
    """Return a mutant: the backward with fields of the embedding's gradient changed."""
    def mutant(dx, cache, at):
        g = backward(dx, cache, at)
        return g | {"p": g["p"]._replace(**{name: change(getattr(g["p"], name), dx)
                                            for name, change in changes.items()})}

    return mutant


MUTANTS = {
    "no gradient of the token": of_embedding(token=lambda g, dx: 0 * g),
    "of all tokens": of_embedding(token=lambda g, dx: dx.sum(axis=(0, 1))),
    "positions of one example": of_embedding(positions=lambda g, dx: dx[0]),
    "positions of a mean": of_embedding(positions=lambda g, dx: g / 2),
    "the class token taken for a patch": lambda dx, cache, at: backward(dx, cache, at) | {
        "x": dx[:, :-1] @ at["p"].patches.weight},
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(mutant, draw):
    assert check_gradients(forward, of_embedding(), point(draw)).ok
    assert not check_gradients(forward, mutant, point(draw)).ok


@both
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_leading_axes_are_free(batch, kernels, draw):
    at = point(draw, batch=batch)
    x, cache = forward(at)
    dx = draw.standard_normal(x.shape)
    dpatches = backward(dx, cache, at)["x"]
    assert (x.shape, dpatches.shape) == ((*batch, 7, D), at["x"].shape)
    for i in np.ndindex(batch):
        one = at | {"x": at["x"][i]}
        x_i, of_one = forward(one)
        assert_close(x[i], x_i, "sum")
        assert_close(dpatches[i], backward(dx[i], of_one, one)["x"], "sum")


@both
def test_it_is_the_convolution_of_pytorch(kernels, draw):
    torch = pytest.importorskip("torch")
    x, at = draw.standard_normal((2, *IMAGE)), point(draw, token=False, positions=False)
    at["x"] = to_patches(x, IMAGE, P)
    y, cache = forward(at)
    dy = draw.standard_normal(y.shape)
    gradients = backward(dy, cache, at)
    W, b = at["p"].patches
    there = [torch.tensor(a, requires_grad=True)
             for a in (x, W.reshape(D, P, P, 3).transpose(0, 3, 1, 2), b)]
    theirs = torch.nn.functional.conv2d(*there, stride=P).flatten(2).transpose(1, 2)
    theirs.backward(torch.tensor(dy))
    dx, dW, db = (a.grad.numpy() for a in there)
    dW = dW.transpose(0, 2, 3, 1).reshape(D, -1)
    for a, b in zip((y, from_patches(gradients["x"], IMAGE, P), *leaves(gradients["p"])),
                    (theirs.detach().numpy(), dx.reshape(2, -1), dW, db), strict=True):
        assert np.abs(a - b).max() / np.abs(b).max() <= TOLERANCES["torch"]["float64"]


@both
def test_the_input_gradient_can_be_left_out(kernels, draw):
    at = point(draw)
    x, cache = forward(at)
    expected, g = backward(x, cache, at)["p"], zeros_like(at["p"])
    assert embedding_backward(x, cache, at["p"], g, input_gradient=False) is None
    for a, b in zip(leaves(g), leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@both
def test_shapes_that_do_not_fit_are_refused(kernels, draw):
    at = point(draw)
    x, cache = forward(at)
    p = at["p"]
    for message, wrong in (
            (r"as the others, 5, got shape \(4,\)", p._replace(token=p.token[:4])),
            (r"for each token, the class token first, \(7, 5\), got shape \(6, 5\)",
             p._replace(positions=p.positions[:6])),
            (r"for each token, .*\(6, 5\), got shape \(7, 5\)", p._replace(token=None))):
        with pytest.raises(UserError, match=message):
            embedding_forward(at["x"], wrong)
    for dx in x[:, 1:], x[:1], x[..., :4]:
        with pytest.raises(UserError, match=r"dy must have the shape .*\(2, 7, 5\), got"):
            embedding_backward(dx, cache, p, zeros_like(p))
