"""The embedding of tokens: values one by one, gradients, a tied head, and what it refuses."""

import re

import numpy as np
import pytest

from comet_np.backends import BackendError
from comet_np.errors import UserError
from comet_np.functional.linear import Linear, linear_backward, linear_forward
from comet_np.functional.tokens import (
    TokenCache,
    TokenEmbedding,
    tokens_backward,
    tokens_forward,
)
from comet_np.gradcheck import check_gradients
from comet_np.tree import zeros_like
from tests import naive
from tests.tolerances import TOLERANCES, assert_close

both = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "bodies"])
TOKENS = np.array([[0, 3, 3, 6], [3, 5, 0, 3]])  # one four times, one twice, two once, others never
pytestmark = pytest.mark.usefixtures("bodies_or_kernels")


def embedding(draw, V=7, P=6, D=3, dtype="float64"):
    return TokenEmbedding(draw.standard_normal((V, D)).astype(dtype),
                          draw.standard_normal((P, D)).astype(dtype))


@both
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("dtype", ["uint16", "int64"])
def test_values_and_gradients_one_by_one(dtype, first, kernels, draw):
    tokens, p, dx = TOKENS.astype(dtype), embedding(draw), draw.standard_normal((2, 4, 3))
    x, cache = tokens_forward(tokens, p, first)
    assert x.shape == (2, 4, 3) and cache.tokens is tokens
    for text, ours in zip(tokens, x, strict=True):
        assert_close(ours, naive.embedded(text, p, first), "elementwise")
        np.testing.assert_array_equal(tokens_forward(text, p, first)[0], ours)  # no leading axes
    g = TokenEmbedding(np.ones((7, 3)), np.ones((6, 3)))
    expected = TokenEmbedding(np.ones((7, 3)), np.ones((6, 3)))
    for text, t, i in np.ndindex(2, 4, 3):
        expected.tokens[tokens[text, t], i] += dx[text, t, i]
        expected.positions[first + t, i] += dx[text, t, i]
    tokens_backward(dx, cache, g, first)
    for a, b in zip(g, expected, strict=True):
        assert_close(a, b, "sum")


def forward(at, first=1):
    return tokens_forward(TOKENS, at, first)


def backward(dx, cache, at, first=1):
    g = zeros_like(at)
    tokens_backward(dx, cache, g, first)
    return g


def tied(at):
    x, cache = forward(at)
    logits, of_head = linear_forward(x, Linear(at.tokens, None))
    return logits, (cache, of_head)


def tied_backward(dlogits, caches, at):
    """Both uses of the table add into one gradient."""
    g, (cache, of_head) = zeros_like(at), caches
    dx = linear_backward(dlogits, of_head, Linear(at.tokens, None), Linear(g.tokens, None))
    tokens_backward(dx, cache, g, 1)
    return g


@both
@pytest.mark.parametrize("pair", [(forward, backward), (tied, tied_backward)],
                         ids=["embedding", "tied to the head"])
def test_gradients(pair, kernels, draw):
    result = check_gradients(*pair, embedding(draw), full=True)
    assert result.error <= TOLERANCES["difference"]["float64"], result
    result = check_gradients(*pair, embedding(draw), complex_step=True)
    assert result.error <= TOLERANCES["complex step"]["float64"], result


def of_the_last(dx, cache, at):
    """Gradients where a token that comes again writes over its earlier ones."""
    g = backward(dx, cache, at)
    g.tokens[cache.tokens] = dx
    return g


MUTANTS = {
    "a token that comes again": (forward, of_the_last),
    "positions from the first": (forward, lambda dx, cache, at: backward(dx, cache, at, 0)),
    "positions a mean over texts": (
        forward, lambda *given: (lambda g: g._replace(positions=g.positions / 2))(
            backward(*given))),
    "a tied head without its own gradient": (
        tied, lambda dlogits, caches, at: backward(dlogits @ at.tokens, caches[0], at)),
}


@pytest.mark.parametrize(("function", "mutant"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(function, mutant, draw):
    assert not check_gradients(function, mutant, embedding(draw)).ok


@both
def test_it_is_that_of_pytorch(kernels, draw):
    torch = pytest.importorskip("torch")
    p, dx = embedding(draw, D=40), draw.standard_normal((2, 4, 40))
    x, cache = tokens_forward(TOKENS, p)
    g = zeros_like(p)
    tokens_backward(dx, cache, g)
    table, positions = (torch.tensor(a, requires_grad=True) for a in p)
    theirs = torch.nn.functional.embedding(torch.tensor(TOKENS), table) + positions[:4]
    theirs.backward(torch.tensor(dx))
    for a, b in zip((x, *g), (theirs, table.grad, positions.grad), strict=True):
        error = np.abs(a - b.detach().numpy()).max() / np.abs(a).max()
        assert error <= TOLERANCES["torch"]["float64"]


@both
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)])
def test_no_tokens_add_nothing(shape, kernels, draw):
    p, g = embedding(draw), TokenEmbedding(np.ones((7, 3)), np.ones((6, 3)))
    x, cache = tokens_forward(np.zeros(shape, int), p)
    assert x.shape == (*shape, 3)
    tokens_backward(x, cache, g)
    assert all((total == 1).all() for total in g)


@both
@pytest.mark.parametrize(("tokens", "first", "message"), [
    (TOKENS[:, :1] + 7, 0, "tokens must lie in 0..6 for a vocabulary of 7, got 7..10: was the"),
    (-TOKENS, 0, "tokens must lie in 0..6 for a vocabulary of 7, got -6..0"),
    (TOKENS, 3, "a text of 7 tokens is longer than the context, which is 6"),
    (np.zeros((2, 7), int), 0, "a text of 7 tokens is longer than the context, which is 6"),
    (TOKENS.astype("float32"), 0, "needs integer tokens (..., T)"),
    (TOKENS > 3, 0, "needs integer tokens (..., T)"),
    (np.array(3), 0, "needs integer tokens (..., T)"),
    (TOKENS, -1, "a first position of at least 0, got int64 (2, 4), (7, 3), (6, 3) and -1"),
])
def test_bad_tokens(tokens, first, message, kernels, draw):
    with pytest.raises(UserError, match=re.escape(message)):
        tokens_forward(tokens, embedding(draw), first)


@both
def test_tables_that_do_not_fit_are_refused(kernels, draw):
    p = embedding(draw)
    for wrong in (TokenEmbedding(p.tokens, p.positions[:, :2]), TokenEmbedding(*p[:1], p[1][0]),
                  TokenEmbedding(p.tokens[:0], p.positions)):
        with pytest.raises(UserError, match="an embedding needs integer tokens"):
            tokens_forward(TOKENS, wrong)
    for wrong in TOKENS.tolist(), None:
        with pytest.raises(BackendError, match=r"expected a numpy\.ndarray or cupy\.ndarray"):
            tokens_forward(wrong, p)


@both
def test_gradients_that_do_not_fit_are_refused(kernels, draw):
    p, dx, cache = embedding(draw), draw.standard_normal((2, 4, 3)), TokenCache(TOKENS)
    before = zeros_like(p)
    read_only = np.broadcast_to(0.0, (7, 3))
    for wrong in (before._replace(tokens=read_only),
                  before._replace(positions=np.zeros((6, 3), "float32"))):
        with pytest.raises(UserError, match=r"the gradient of the table of (tokens|positions) is "
                                            r"added in place|takes arrays of one dtype"):
            tokens_backward(dx, cache, wrong)
    with pytest.raises(UserError, match=re.escape("output, (2, 4, 3), got (2, 4, 1)")):
        tokens_backward(dx[..., :1], cache, before)
    with pytest.raises(UserError, match="longer than the context"):
        tokens_backward(dx, cache, before, 3)
    assert not before.tokens.any() and not before.positions.any()
