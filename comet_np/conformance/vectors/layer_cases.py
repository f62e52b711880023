"""Cases of single layers: a masked hidden layer, layer norm, attention, losses."""

from functools import partial

from ...functional.activations import activation
from ...functional.attention import (
    SelfAttention,
    self_attention_backward,
    self_attention_forward,
)
from ...functional.hidden import hidden_backward, hidden_forward
from ...functional.linear import Linear
from ...functional.loss import (
    mean_squared_error_backward,
    mean_squared_error_forward,
    softmax_cross_entropy_backward,
    softmax_cross_entropy_forward,
)
from ...functional.norm import Norm, norm_backward, norm_forward
from ...tree import zeros_like
from .making import Draw, Expected, Made, case

BITS = 6


def hidden(f: str, draw: Draw) -> Made:
    """Return eq. (7)-(8) of one layer, and its backward."""
    B, N_in, N = 6, 7, 9
    x = draw.grid("x", (B, N_in), 1.5, BITS)
    W, b = draw.grid("W_1", (N, N_in), 0.6, BITS), draw.grid("b_1", (N,), 0.5, BITS)
    m, dy = draw.integers("m_1", (B, N), 0, 1) > 0, draw.grid("dy", (B, N), 1, BITS)
    p = Linear(W, b)
    h, cache = hidden_forward(x, p, m, activation(f))
    g = zeros_like(p)
    dx = hidden_backward(dy, cache, p, g, activation(f))
    expected = Expected()
    expected.add("forward", a_1=cache.a, x_1=h)
    expected.add("gradients", dW_1=g.weight, db_1=g.bias, dx=dx)
    return expected.of({"activation": f, "N": N, "N_in": N_in},
                       {"x": x, "W_1": W, "b_1": b, "m_1": m, "dy": dy})


def norm(shape: tuple[int, ...], eps: float, draw: Draw) -> Made:
    """Return a layer norm and its backward; of x one row is nearly constant."""
    *_, D = shape
    x = draw.grid("x", shape, 2, BITS)
    x[0] = 1 + draw.grid("small", shape[1:], 2**-8, 12)
    p = Norm(1 + draw.grid("gain", (D,), 0.5, BITS), draw.grid("bias", (D,), 0.5, BITS))
    dy = draw.grid("dy", shape, 1, BITS)
    y, cache = norm_forward(x, p, eps)
    g = zeros_like(p)
    dx = norm_backward(dy, cache, p, g)
    expected = Expected()
    expected.add("forward", y=y)
    expected.add("gradients", dgain=g.gain, dbias=g.bias, dx=dx)
    return expected.of({"eps": eps}, {"x": x, "gain": p.gain, "bias": p.bias, "dy": dy})


def attention(T: int, D: int, heads: int, causal: bool, draw: Draw) -> Made:
    """Return multi-head self-attention with its projections, and its backward."""
    x, dy = draw.grid("x", (2, T, D), 2, BITS), draw.grid("dy", (2, T, D), 1, BITS)
    p = SelfAttention(
        Linear(draw.grid("W_qkv", (3 * D, D), 4 / D**0.5, BITS),
               draw.grid("b_qkv", (3 * D,), 1, BITS)),
        Linear(draw.grid("W_out", (D, D), 3 / D**0.5, BITS), draw.grid("b_out", (D,), 1, BITS)))
    y, cache = self_attention_forward(x, p, heads, causal)
    g = zeros_like(p)
    dx = self_attention_backward(dy, cache, p, g, heads)
    expected = Expected()
    expected.add("forward", qkv=cache.attention.qkv, weights=cache.attention.weights,
                 values=cache.out.x, y=y)
    expected.add("gradients", dW_out=g.out.weight, db_out=g.out.bias, dW_qkv=g.qkv.weight,
                 db_qkv=g.qkv.bias, dx=dx)
    return expected.of({"causal": causal, "heads": heads},
                       {"x": x, "W_qkv": p.qkv.weight, "b_qkv": p.qkv.bias,
                        "W_out": p.out.weight, "b_out": p.out.bias, "dy": dy})


def cross_entropy(shape: tuple[int, ...], ignored: int | None, draw: Draw) -> Made:
    """Return the mean cross-entropy and its gradient by the logits, one row of them far out."""
    x = draw.grid("x", shape, 4, BITS)
    x[0] *= 64
    labels = draw.integers("labels", shape[:-1], 0, shape[-1] - 1)
    if ignored is not None:
        labels.flat[1::3] = ignored
    loss, cache = softmax_cross_entropy_forward(x, labels, ignored)
    expected = Expected()
    expected.add("forward", loss=loss)
    expected.add("gradients", dx=softmax_cross_entropy_backward(1.0, cache))
    config = {"loss": "cross-entropy"} | ({} if ignored is None else {"ignored": ignored})
    return expected.of(config, {"x": x, "labels": labels})


def squared_error(draw: Draw) -> Made:
    """Return the mean squared error and its gradient by the output."""
    x, target = (draw.grid(name, (5, 7), 2, BITS) for name in ("x", "target"))
    loss, cache = mean_squared_error_forward(x, target)
    expected = Expected()
    expected.add("forward", loss=loss)
    expected.add("gradients", dx=mean_squared_error_backward(1.0, cache))
    return expected.of({"loss": "squared-error"}, {"x": x, "target": target})


for f in ("softplus", "tanh", "relu", "gelu"):
    case(f"hidden-layer-{f}", f"one masked hidden layer with {f}", "(7)-(8)", "hidden-layer")(
        partial(hidden, f))
for name, shape, eps in (("", (6, 9), 1e-5), ("-tokens", (2, 4, 8), 1e-12), ("-eps", (5, 16), 0.5)):
    case(f"layer-norm{name}", f"layer norm over {shape[-1]}, eps {eps}", "layer norm",
         "layer-norm", ("variance-unbiased",) if eps < 1e-9 else (
             "eps-outside-root", "variance-unbiased"))(partial(norm, shape, eps))
SCORES = ("attention-unscaled", "softmax-over-queries")
HEADS = (*SCORES, "attention-scale-width", "heads-interleaved")
CAUSAL = ("causal-excludes-self", "causal-missing", "causal-sees-next")
for name, T, D, heads, causal, flags in (
        ("", 5, 8, 2, False, HEADS), ("-one-head", 4, 6, 1, False, SCORES),
        ("-causal", 6, 12, 3, True, (*HEADS, *CAUSAL)),
        ("-one-token", 1, 4, 2, True, ("causal-excludes-self",)),
        ("-vit", 65, 256, 8, False, HEADS), ("-gpt2", 64, 384, 6, True, (*HEADS, *CAUSAL))):
    case(f"attention{name}", f"self-attention of {T} tokens, {heads} heads"
         f"{', causal' * causal}", "attention", "attention", flags, draw=int(D > 12), large=D > 12)(
             partial(attention, T, D, heads, causal))
case("loss-cross-entropy", "mean cross-entropy of softmax", "cross-entropy", "loss")(
    partial(cross_entropy, (7, 5), None))
case("loss-cross-entropy-ignored", "cross-entropy of tokens, some of which do not count",
     "cross-entropy", "loss")(partial(cross_entropy, (2, 6, 5), -100))
case("loss-squared-error", "mean squared error", "squared error", "loss")(squared_error)
