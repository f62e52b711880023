"""The kernels of the CPU backend: SciPy's BLAS, and loops that are blocked for L2 and threaded.

A kernel takes the body that it replaces as its first argument, and calls it for what it does not
support, as products of rounded operands. All kernels of a backend stand in one file, in the order
of the operations: products, cap, hidden layer, tokens, layer norm, attention, loss, random masks,
optimizers. Measured on 2 cores (AVX-512, OpenBLAS 0.3.30); `benchmarks/` shows the effect of the
whole.
"""

from collections.abc import Callable, Sequence
from functools import cache
from numbers import Integral
from typing import Any

import numpy as np
from scipy.linalg import blas

from .base import (
    BackendError,
    attention_fits,
    bits_fit,
    labels_fit,
    layer_fits,
    mask_fits,
    norm_fits,
    tokens_fit,
    update_fits,
)
from .cpu import BLOCK, over_blocks

Array = np.ndarray
Body = Callable[..., Any]

KERNELS: dict[str, Callable[..., Any]] = {}
TILE = 64  # columns a tile of a change of memory order: it stays in L1
GEMM = {"f": blas.sgemm, "d": blas.dgemm, "F": blas.cgemm, "D": blas.zgemm}
GEMV = {"f": blas.sgemv, "d": blas.dgemv}
TIES = ("strict", "threshold", "index")


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function` as the kernel of the operation of its name."""
    KERNELS[function.__name__] = function
    return function


def check_float(name: str, *arrays: Array) -> None:
    """Raise unless all `arrays` share one of the dtypes float32 and float64."""
    dtype = arrays[0].dtype
    for array in arrays:  # not a set of dtypes: this runs twenty times a step
        if array.dtype != dtype or dtype.char not in "fd":
            dtypes = sorted({str(array.dtype) for array in arrays})
            raise BackendError(f"{name} on NumPy takes arrays of one dtype, float32 or float64, "
                               f"got {', '.join(dtypes)}: cast them with .astype()")


def _gradients_fit(dy: Array, x: Array, W: Array, g: Any) -> bool:
    """Return whether gradients of W can be added into `g`; bodies say what is wrong."""
    dW, db = g
    shape = dy.shape[-1:] + x.shape[-1:]
    return (W.shape == shape == dW.shape and dW.flags.writeable
            and (db is None or (db.shape == shape[:1] and db.flags.writeable)))


# --- matrix products ----------------------------------------------------------------------------
# All products of a step go through SciPy's BLAS: NumPy's wheel carries a second OpenBLAS with
# its own spinning threads, and mixing the two made steps twice as slow. SciPy's also adds into
# its output (beta = 1), which saves plain SGD a pass over the weights and the gradient buffer.
#
# A product of few rows is returned column-major: OpenBLAS then packs the weights in the order in
# which they lie (0.59 ms against 1.04 for 32 x 3072 times 3072 x 1000). The kernels below keep
# whatever memory order they are given, so a whole training step runs in that order.

FEW_ROWS = 256
MANY_COLUMNS = 1 << 14  # of a product that is row-major for any number of rows, as a GPT's logits


def _operand(a: Array) -> tuple[Array, int]:
    """Return `a`, or its transpose and the flag 1, as the column-major array that BLAS takes."""
    if a.flags.f_contiguous and not a.flags.c_contiguous:
        return a, 0
    return np.ascontiguousarray(a).T, 1


def _product(a: Array, b: Array) -> Array:
    """Return the matrix product a b: column-major if `a` has few rows, else row-major."""
    multiply = GEMM.get(a.dtype.char)
    if multiply is None or a.dtype != b.dtype:
        raise BackendError(f"a matrix product on NumPy takes two arrays of one dtype (float32, "
                           f"float64 or complex), got {a.dtype} and {b.dtype}: cast one with "
                           ".astype()")
    if 0 in a.shape or 0 in b.shape:
        return a @ b  # BLAS refuses empty operands
    of_vector = GEMV.get(a.dtype.char)
    if of_vector and 1 in (len(a), b.shape[1]):  # GEMM would pack the matrix, GEMV reads it once
        matrix, trans = _operand(b if len(a) == 1 else a)
        vector, trans = (a, 1 - trans) if len(a) == 1 else (b, trans)
        return of_vector(1.0, matrix, vector.reshape(-1), trans=trans).reshape(len(a), -1)
    few = len(a) <= FEW_ROWS and b.shape[1] < MANY_COLUMNS
    (a, trans_a), (b, trans_b) = _operand(a if few else b.T), _operand(b if few else a.T)
    product = multiply(1.0, a, b, trans_a=trans_a, trans_b=trans_b)
    return product if few else product.T


def _products(x: Array, W: Array) -> Array:
    """Return x W: x (..., K) and W (K, N) -> (..., N)."""
    if x.ndim == 2:
        return _product(x, W)
    return _product(x.reshape(-1, x.shape[-1]), W).reshape(*x.shape[:-1], W.shape[-1])


@kernel
def project(body: Body, x: Array, W: Array) -> Array:
    if not layer_fits(x, W, None):
        return body(x, W)
    return _products(x, W.T)


@kernel
def linear_forward(body: Body, x: Array, p: Any, compute: str | None = None) -> Any:
    W, b = p
    if compute is not None or not layer_fits(x, W, b):
        return body(x, p, compute)
    y = _products(x, W.T)
    if b is not None:
        check_float("linear_forward", y, b)
        y += b
    return y, (x,)


@kernel
def linear_backward(body: Body, dy: Array, cache: Any, p: Any, g: Any, compute: str | None = None,
                    input_gradient: bool = True) -> Array | None:
    x, W = cache.x, p.weight
    fit = dy.shape == (*x.shape[:-1], len(W)) and _gradients_fit(dy, x, W, g)
    if compute is not None or not fit:
        return body(dy, cache, p, g, compute, input_gradient)
    dx = _products(dy, W) if input_gradient else None
    _add_outer(dy, x, g.weight)
    if g.bias is not None:
        _add_sum(dy, g.bias)
    return dx


def _add_outer(dy: Array, x: Array, dW: Array) -> None:
    """Add dy^T x, the sum over all examples, into dW."""
    check_float("a weight's gradient", dy, x, dW)
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if dy.size == 0 or x.size == 0:
        return
    if not dW.flags.carray:  # BLAS writes into aligned, writeable, contiguous memory only
        dW += _product(dy.T, x)
        return
    (a, trans_a), (b, trans_b) = _operand(x.T), _operand(dy)
    GEMM[dW.dtype.char](1.0, a, b, beta=1.0, c=dW.T, trans_a=trans_a, trans_b=trans_b,
                        overwrite_c=1)


def _add_sum(dy: Array, db: Array) -> None:
    """Add the sum of dy over all examples into db."""
    check_float("a bias's gradient", dy, db)
    if dy.size == 0:
        return
    dy = dy.reshape(-1, dy.shape[-1])
    if not db.flags.carray:
        db += dy.sum(axis=0)
        return
    a, trans = _operand(dy)
    ones = _ones(a.shape[trans], a.dtype.char)
    GEMV[a.dtype.char](1.0, a, ones, beta=1.0, y=db, trans=1 - trans, overwrite_y=1)


@cache
def _ones(n: int, dtype: str) -> Array:
    return np.ones(n, dtype)


# --- the cap ------------------------------------------------------------------------------------


@kernel
def kwta_mask(body: Body, scores: Array, k: int, ties: str = "strict") -> Array:
    N = scores.shape[-1] if scores.ndim else 0
    if ties not in TIES or not isinstance(k, Integral) or not 1 <= k <= N:
        return body(scores, k, ties)  # raises whatever is wrong with the arguments
    check_float("kwta_mask", scores)
    rows = scores.reshape(-1, N)
    if ties == "strict" and k == N:
        return np.ones_like(scores, dtype=bool) if not np.isnan(scores).any() else body(scores, k)
    rank = N - k - 1 if ties == "strict" else N - k
    compare = np.greater_equal if ties == "threshold" else np.greater
    mask = np.empty_like(rows, dtype=bool)  # in the memory order of the scores
    threshold = np.empty((len(rows), 1), scores.dtype)
    row_major, nan_found = rows.flags.c_contiguous, []

    def work(block: slice) -> None:
        v = _copy_of_rows(rows[block])
        if np.isnan(v.min(initial=np.inf)):
            nan_found.append(block)
            return
        v.partition(rank, axis=1)
        threshold[block] = v[:, rank, None]
        if row_major:  # while the scores are in the cache
            compare(rows[block], threshold[block], out=mask[block])

    over_blocks(work, len(rows), N)
    if nan_found:
        return body(scores, k, ties)
    if not row_major:
        compare(rows, threshold, out=mask)
    if ties == "index":
        tied = rows == threshold
        places_left = k - mask.sum(axis=-1, keepdims=True)
        mask |= tied & (tied.cumsum(axis=-1) <= places_left)
    return mask.reshape(scores.shape)


def _copy_of_rows(rows: Array) -> Array:
    """Return a row-major copy, made tile by tile where the order in memory changes."""
    if rows.flags.c_contiguous:
        return rows.copy()
    copy = np.empty(rows.shape, rows.dtype)
    for start in range(0, rows.shape[1], TILE):
        copy[:, start:start + TILE] = rows[:, start:start + TILE]
    return copy


@kernel
def unpack_masks(body: Body, bits: Array, widths: Sequence[int]) -> tuple[Array, ...]:
    if bits.ndim != 2 or len(bits) > FEW_ROWS or not bits_fit(bits, widths):
        return body(bits, widths)
    # The order of the products of so few rows: bits side by side become rows one after the other.
    flags = np.unpackbits(bits, axis=-1).view(bool).T.copy()
    masks, start = [], 0
    for N in widths:
        masks.append(flags[start:start + N].T)
        start += -(-N // 8) * 8
    return tuple(masks)


# --- the hidden layer ---------------------------------------------------------------------------


def _in_memory_order(a: Array) -> tuple[Array, bool]:
    """Return `a` (..., N) as a matrix whose rows lie one after the other; are they neurons?"""
    rows = a if a.ndim == 2 else a.reshape(-1, a.shape[-1])
    if rows.flags.f_contiguous and not rows.flags.c_contiguous:
        return rows.T, True
    return rows, False


def _same_order(a: Array, neurons: bool) -> Array:
    """Return `a` (..., N) as a C-contiguous matrix, with a row a neuron or an example."""
    rows = a if a.ndim == 2 else a.reshape(-1, a.shape[-1])
    return np.ascontiguousarray(rows.T if neurons else rows)


def _unpacked(m: Array, N: int) -> Array:
    return np.unpackbits(m, axis=-1, count=N).view(bool) if m.dtype == np.uint8 else m


@kernel
def hidden_forward(body: Body, x: Array, p: Any, mask: Any, f: Any,
                   compute: str | None = None) -> Any:
    W, b = p
    if compute is not None or not layer_fits(x, W, b):
        return body(x, p, mask, f, compute)
    a = _products(x, W.T)
    if b is not None:
        check_float("hidden_forward", a, b)
    rows, neurons = _in_memory_order(a)
    if callable(mask):
        if b is not None:
            a += b
            b = None
        mask = mask(x, a)
    if mask is not None and not mask_fits(mask, a.shape):
        return body(x, p, mask, f, compute)  # raises
    m = mask if mask is None else _unpacked(mask, len(W))
    h = np.empty_like(rows)
    kept = m if m is None else _same_order(m, neurons)
    if neurons and b is not None:
        b = b[:, None]
    apply = FORWARD_INTO.get(f.name)

    def work(block: slice) -> None:
        part, out = rows[block], h[block]
        if b is not None:
            part += b[block] if neurons else b
        if apply is None:
            out[...] = f.forward(part)
        else:
            apply(part, out)
        if kept is not None:
            out *= kept[block]

    over_blocks(work, len(rows), rows.shape[1])
    return (h.T if neurons else h).reshape(a.shape), (x, a, m)


@kernel
def hidden_backward(body: Body, dh: Array, cache: Any, p: Any, g: Any, f: Any,
                    compute: str | None = None, input_gradient: bool = True) -> Array | None:
    x, a, m = cache
    if compute is not None or dh.shape != a.shape or not _gradients_fit(dh, x, p.weight, g):
        return body(dh, cache, p, g, f, compute, input_gradient)
    check_float("hidden_backward", dh, a)
    rows, neurons = _in_memory_order(a)
    upstream = _same_order(dh, neurons)
    kept = m if m is None else _same_order(_unpacked(m, a.shape[-1]), neurons)
    da = np.empty_like(rows)
    apply = DERIVATIVE_INTO.get(f.name)

    def work(block: slice) -> None:
        out = da[block]
        if apply is None:
            out[...] = f.derivative(rows[block])
        else:
            apply(rows[block], out)
        out *= upstream[block]
        if kept is not None:
            out *= kept[block]

    over_blocks(work, len(rows), rows.shape[1])
    da = (da.T if neurons else da).reshape(a.shape)
    dx = _products(da, p.weight) if input_gradient else None
    if g.bias is not None:
        _add_sum(da, g.bias)
    _add_outer(da, x, g.weight)
    return dx


def _softplus_into(a: Array, y: Array) -> None:
    """Write ``log(1 + e)``, e = exp(a), into y: a itself where a > 40, where they are equal."""
    np.minimum(a, 40, out=y)
    e = np.exp(y, out=y)
    w = e + 1
    # NumPy's log is vectorised and its log1p is not: log(w) + (e - (w - 1)) / w is log1p(e).
    lost = w - 1
    np.subtract(e, lost, out=lost)
    lost /= w
    np.log(w, out=y)
    y += lost
    np.maximum(y, a, out=y)


def _sigmoid_into(a: Array, y: Array) -> None:
    """Write ``1 / (1 + exp(-a))`` into y, by ``(1 + tanh(a / 2)) / 2``, which cannot overflow.

    Exact to the rounding of 1, not to that of a y near 0, which would take three times as long.
    """
    np.multiply(a, 0.5, out=y)
    np.tanh(y, out=y)
    y *= 0.5
    y += 0.5


def _identity_into(a: Array, y: Array) -> None:
    np.copyto(y, a)


def _tanh_derivative_into(a: Array, y: Array) -> None:
    np.tanh(a, out=y)
    np.multiply(y, y, out=y)
    np.subtract(1, y, out=y)


GELU_C = (2 / np.pi) ** 0.5  # of gelu_new: u = a (C + K a^2)
GELU_K = 0.044715 * GELU_C


def _gelu_new_into(a: Array, y: Array) -> None:
    _gelu_tanh_into(a, y)
    y += 1
    y *= a
    y *= 0.5


def _gelu_tanh_into(a: Array, y: Array) -> None:
    np.multiply(a, a, out=y)
    y *= GELU_K
    y += GELU_C
    y *= a
    np.tanh(y, out=y)


def _gelu_new_derivative_into(a: Array, y: Array) -> None:
    """Write ``(1 + t + (1 - t^2) a du/da) / 2``, t = tanh(u), into y."""
    _gelu_tanh_into(a, y)
    slope = a * a
    slope *= 3 * GELU_K
    slope += GELU_C
    slope *= a
    rest = y * y
    np.subtract(1, rest, out=rest)
    slope *= rest
    y += 1
    y += slope
    y *= 0.5


# The activations that training meets, without temporaries; the others run their bodies by blocks.
FORWARD_INTO: dict[str, Callable[[Array, Array], Any]] = {
    "softplus": _softplus_into, "sigmoid": _sigmoid_into, "tanh": np.tanh,
    "identity": _identity_into, "gelu_new": _gelu_new_into}
DERIVATIVE_INTO = {"softplus": _sigmoid_into, "tanh": _tanh_derivative_into,
                   "gelu_new": _gelu_new_derivative_into}


# --- tokens -------------------------------------------------------------------------------------


@kernel
def tokens_backward(body: Body, dx: Array, cache: Any, g: Any, first: int = 0) -> None:
    tokens = cache.tokens
    if (not tokens_fit(tokens, g.tokens, g.positions, first)
            or dx.shape != (*tokens.shape, g.tokens.shape[1])
            or not all(total.flags.writeable for total in g)):
        return body(dx, cache, g, first)  # raises
    check_float("tokens_backward", dx, *g)
    T, D = dx.shape[-2:]
    rows, flat = dx.reshape(-1, D), tokens.reshape(-1)
    if not rows.size:
        return None
    order = np.argsort(flat, kind="stable")  # each token's rows one after the other
    found, starts, counts = np.unique(flat[order], return_index=True, return_counts=True)
    once = counts == 1
    g.tokens[found[once]] += rows[order[starts[once]]]
    # Four times as fast as add.reduceat: a sum over the first axis is a pass over the rows.
    for token, start, count in zip(found[~once], starts[~once], counts[~once], strict=True):
        g.tokens[token] += rows[order[start:start + count]].sum(axis=0)
    positions = g.positions[first:first + T]
    positions += rows.reshape(-1, T, D).sum(axis=0)
    return None


# --- layer norm ---------------------------------------------------------------------------------


@kernel
def norm_forward(body: Body, x: Array, p: Any, eps: float = 1e-5) -> Any:
    gain, bias = p
    if not norm_fits(x, gain, bias):
        return body(x, p, eps)  # raises
    check_float("norm_forward", x, gain, bias)
    D = len(gain)
    rows = x.reshape(-1, D)
    y, normed = (np.empty(rows.shape, x.dtype) for _ in range(2))
    inverse = np.empty((len(rows), 1), x.dtype)

    def work(block: slice) -> None:
        part, n, out = rows[block], normed[block], y[block]
        np.subtract(part, _row_sums(part) / D, out=n)
        inverse[block] = (_row_sums(n, n) / D + eps) ** -0.5
        n *= inverse[block]
        np.multiply(n, gain, out=out)
        out += bias

    over_blocks(work, len(rows), D)
    return y.reshape(x.shape), (normed.reshape(x.shape), inverse.reshape(*x.shape[:-1], 1))


@kernel
def norm_backward(body: Body, dy: Array, cache: Any, p: Any, g: Any) -> Array:
    normed, inverse = cache
    gain, D = p.gain, dy.shape[-1] if dy.ndim else 0
    if (dy.shape != normed.shape or not norm_fits(dy, *p) or not norm_fits(dy, *g)
            or not all(total.flags.writeable for total in g)):
        return body(dy, cache, p, g)  # raises
    check_float("norm_backward", dy, normed, inverse, *p, *g)
    upstream, n, scale = dy.reshape(-1, D), normed.reshape(-1, D), inverse.reshape(-1, 1)
    dx = np.empty(upstream.shape, dy.dtype)
    sums = []

    def work(block: slice) -> None:
        part, out = upstream[block], dx[block]
        product = part * n[block]
        sums.append((block.start, product.sum(axis=0), part.sum(axis=0)))
        np.multiply(n[block], _row_sums(product, gain) / D, out=product)
        np.multiply(part, gain, out=out)
        product += _row_sums(out) / D
        out -= product
        out *= scale[block]

    over_blocks(work, len(upstream), D)
    for _, of_gain, of_bias in sorted(sums, key=lambda found: found[0]):  # in any order of threads
        np.add(g.gain, of_gain, out=g.gain)
        np.add(g.bias, of_bias, out=g.bias)
    return dx.reshape(dy.shape)


def _row_sums(*factors: Array) -> Array:
    """Return sums of a product of arrays over the last axis, (..., 1), which is not kept.

    einsum is two to four times as fast as `sum` on short rows, and wakes no thread of BLAS.
    """
    return np.einsum(",".join(["...i"] * len(factors)) + "->...", *factors)[..., None]


# --- attention ----------------------------------------------------------------------------------
# The one place where NumPy's own BLAS multiplies: it takes heads as they lie within qkv, many at a
# time, where SciPy's needs copies and a call for each (3.9 ms against 4.8 for 16 x 65 tokens, 8
# heads of 64, one thread). Its threads must not wake: they took 1.6 ms for a product that one
# thread does in 0.03. They do from 2^19 multiplications on, so longer products are cut into pieces
# of rows; ours are the threads, a block of heads each (0.6 of the time of one). A product with a
# transposed right operand is the slow one (11 us against 6.5), so keys and values are transposed
# before (3 us). One thread needs 0.7 to 0.95 of the body's time forwards, 0.6 to 0.75 backwards.

ALONE = (1 << 19) - 1  # multiplications of a product that wake no other thread


def _by_head(x: Array, heads: int) -> Array:
    """Return x (B, T, D) head by head, (B, H, T, D / H), a view."""
    B, T, D = x.shape
    return x.reshape(B, T, heads, D // heads).swapaxes(1, 2)


def _qkv_by_head(qkv: Array, heads: int) -> list[Array]:
    """Return queries, keys and values (B, T, 3 D) head by head, each (B, H, T, D / H), views."""
    D = qkv.shape[-1] // 3
    return [_by_head(qkv[..., start:start + D], heads) for start in (0, D, 2 * D)]


def _over_heads(work: Callable[[tuple[slice, slice]], None], B: int, H: int, T: int) -> None:
    """Call ``work`` for slices of examples and of heads that cover them, in blocks for L2."""
    at_once = max(1, BLOCK // (T * T))  # heads
    examples, heads = max(1, at_once // H), min(H, at_once)
    blocks = [(slice(i, i + examples), slice(j, j + heads))
              for i in range(0, B, examples) for j in range(0, H, heads)]

    def several(those: slice) -> None:
        for block in blocks[those]:
            work(block)

    over_blocks(several, len(blocks), BLOCK)


def _pieces(T: int, d: int) -> list[slice]:
    """Return slices of T tokens such that products of their T weights and d wake no thread."""
    pieces = -(-T // max(1, ALONE // (T * d)))
    step = -(-T // pieces)
    return [slice(i, min(i + step, T)) for i in range(0, T, step)]


def _transposed(x: Array, scale: float) -> Array:
    """Return the matrices of x transposed in memory, times a scale."""
    return np.multiply(x, scale, dtype=x.dtype, order="C").swapaxes(-1, -2).copy()


@kernel
def attention_forward(body: Body, qkv: Array, heads: int, causal: bool = False,
                      factor: Array | None = None, compute: str | None = None) -> Any:
    if compute is not None or not attention_fits(qkv, heads, factor):
        return body(qkv, heads, causal, factor, compute)
    check_float("attention_forward", qkv, *([] if factor is None else [factor]))
    *lead, T, D3 = qkv.shape
    q, k, v = _qkv_by_head(qkv.reshape(-1, T, D3), heads)
    B, _, _, d = q.shape
    P = np.empty((B, heads, T, T), qkv.dtype)
    F = None if factor is None else factor.reshape(P.shape)
    y = np.empty((B, T, D3 // 3), qkv.dtype)
    of_head, pieces = _by_head(y, heads), _pieces(T, d)
    later = np.triu(np.ones((T, T), bool), 1) if causal else None

    def work(block: tuple[slice, slice]) -> None:
        queries, values, weights, out = q[block], v[block], P[block], of_head[block]
        keys = _transposed(k[block], d**-0.5)
        for rows in pieces:
            seen = slice(rows.stop if causal else T)
            p = weights[..., rows, seen]
            np.matmul(queries[..., rows, :], keys[..., seen], out=p)
            if later is not None:
                np.copyto(p[..., rows], -np.inf, where=later[rows, rows])
                weights[..., rows, rows.stop:] = 0
            p -= p.max(axis=-1, keepdims=True)
            np.exp(p, out=p)
            p /= _row_sums(p)
            if F is not None:
                p = p * F[block][..., rows, seen]
            np.matmul(p, values[..., seen, :], out=out[..., rows, :])

    _over_heads(work, B, heads, T)
    return y.reshape(*lead, T, D3 // 3), (qkv, P.reshape(*lead, heads, T, T), factor)


@kernel
def attention_backward(body: Body, dy: Array, cache: Any, heads: int,
                       compute: str | None = None) -> Array:
    qkv, P, factor = cache
    shape = qkv.shape
    if (compute is not None or dy.shape != (*shape[:-1], shape[-1] // 3)
            or not attention_fits(qkv, heads, P) or not attention_fits(qkv, heads, factor)):
        return body(dy, cache, heads, compute)
    check_float("attention_backward", dy, qkv, P, *([] if factor is None else [factor]))
    T, D3 = shape[-2:]
    q, k, v = _qkv_by_head(qkv.reshape(-1, T, D3), heads)
    dY = _by_head(dy.reshape(-1, T, D3 // 3), heads)
    B, _, _, d = q.shape
    P = P.reshape(B, heads, T, T)
    F = None if factor is None else factor.reshape(P.shape)
    dqkv = np.empty((B, T, D3), dy.dtype)
    dq, dk, dv = _qkv_by_head(dqkv, heads)
    pieces = _pieces(T, d)

    def work(block: tuple[slice, slice]) -> None:
        p, upstream = P[block], dY[block]
        # Causal weights are 0 after each piece: half of the products can be left out.
        causal = len(pieces) > 1 and not any(p[..., rows, rows.stop:].any() for rows in pieces)
        dS = np.empty(p.shape, p.dtype)
        values = _transposed(v[block], d**-0.5)
        for rows in pieces:
            seen = slice(rows.stop if causal else T)
            piece, weights = dS[..., rows, seen], p[..., rows, seen]
            np.matmul(upstream[..., rows, :], values[..., seen], out=piece)
            if F is not None:
                piece *= F[block][..., rows, seen]
            piece -= _row_sums(piece, weights)
            piece *= weights
            np.matmul(piece, k[block][..., seen, :], out=dq[block][..., rows, :])
        weighted = p if F is None else p * F[block]
        for columns in pieces:
            by = slice(columns.start if causal else 0, T)  # the tokens that see them
            for a, b, out in (dS, q[block], dk), (weighted, upstream, dv):
                np.matmul(a[..., by, columns].swapaxes(-1, -2), b[..., by, :],
                          out=out[block][..., columns, :])

    _over_heads(work, B, heads, T)
    return dqkv.reshape(shape)


# --- loss ---------------------------------------------------------------------------------------


MANY_CLASSES = 256  # from which on a row is long enough for loops of its own


def _rows(a: Array, in_place: bool) -> Array | None:
    """Return a (..., C) as a matrix; None if it shall be written over and cannot be."""
    rows = a.reshape(-1, a.shape[-1])
    own = not in_place or (rows.flags.writeable and rows.flags.aligned
                           and np.may_share_memory(rows, a))
    return rows if own or a.size == 0 else None


@kernel
def softmax_cross_entropy(body: Body, logits: Array, labels: Array, ignored: int | None = None,
                          in_place: bool = False) -> tuple[Array, Array]:
    rows = _rows(logits, in_place) if labels_fit(labels, logits) else None
    if rows is None:
        return body(logits, labels, ignored, in_place)
    check_float("softmax_cross_entropy", logits)
    flat, C = labels.reshape(-1), rows.shape[1]
    left_out = None if ignored is None else flat == ignored
    if left_out is not None:
        flat = np.where(left_out, 0, flat)
    losses = np.empty(len(rows), logits.dtype)
    if C < MANY_CLASSES or not rows.flags.c_contiguous:
        # Classes first, where the memory allows it: a reduction over few classes is then a few
        # passes over long rows instead of many short loops.
        classes = rows.T
        q = np.subtract(classes, classes.max(axis=0), out=classes if in_place else None)
        of_label = q[flat, np.arange(len(flat))]
        np.exp(q, out=q)
        total = q.sum(axis=0)
        q /= total
        losses[...] = np.log(total) - of_label
        q = q.T
    else:
        q = rows if in_place else np.empty(rows.shape, rows.dtype)

        def work(block: slice) -> None:
            z, out = rows[block], q[block]
            np.subtract(z, z.max(axis=1, keepdims=True), out=out)
            of_label = out[np.arange(len(out)), flat[block]]
            np.exp(out, out=out)
            total = out.sum(axis=1, keepdims=True)
            out *= 1 / total
            losses[block] = np.log(total[:, 0]) - of_label

        over_blocks(work, len(rows), C)
    if left_out is not None:
        losses[left_out] = 0
    return losses.reshape(labels.shape), logits if in_place else q.reshape(logits.shape)


@kernel
def softmax_cross_entropy_gradient(body: Body, q: Array, labels: Array, scale: Any,
                                   ignored: int | None = None, in_place: bool = False) -> Array:
    rows = _rows(q, in_place) if labels_fit(labels, q) else None
    if rows is None:
        return body(q, labels, scale, ignored, in_place)
    check_float("softmax_cross_entropy_gradient", q)
    flat, scale = labels.reshape(-1), q.dtype.type(scale)
    left_out = None if ignored is None else flat == ignored
    if left_out is not None:
        flat = np.where(left_out, 0, flat)
    out = rows if in_place else np.empty_like(rows)

    def work(block: slice) -> None:
        part, own = out[block], flat[block]
        np.multiply(rows[block], scale, out=part)
        part[np.arange(len(own)), own] -= scale
        if left_out is not None:
            part[left_out[block]] = 0

    if rows.flags.c_contiguous:
        over_blocks(work, len(rows), rows.shape[1])
    else:  # classes first
        work(slice(None))
    return q if in_place else out.reshape(q.shape)


# --- random masks -------------------------------------------------------------------------------


def _random_bits(key: Any, n: int, counter: int, first: int = 0) -> Array:
    """Return `n` numbers of `comet_np.rng.random_bits` at one counter, by NumPy's Philox.

    They begin with the number `first`, of which 8 lie in a block. NumPy raises its counter before
    each block, so its first one is that of (1, 0, counter, 0).
    """
    philox = np.random.Philox(0)  # made from a key it would ask the system for entropy first
    state = philox.state
    state["state"] = {"counter": np.array([first // 8, 0, counter, 0], "u8"),
                      "key": np.array(key, "u8")}
    philox.state = state
    return philox.random_raw(-(-n // 2)).astype("<u8", copy=False).view("<u4")[:n]


@kernel
def dropout_factor(body: Body, x: Array, rate: float, key: Any, step: Any) -> Array:
    check_float("dropout_factor", x)
    limit, scale, step = round(rate * 2**32), x.dtype.type(1 / (1 - rate)), int(step)
    factor = np.empty(x.size, x.dtype)

    # Two threads: 2.4 ns an element, one: 4.8, of which 3.8 are Philox. BLOCK is a multiple of 8.
    def work(block: slice) -> None:
        bits = _random_bits(key, block.stop - block.start, step, block.start)
        np.multiply(bits >= limit, scale, out=factor[block])

    over_blocks(work, x.size)
    return factor.reshape(x.shape)


@kernel
def example_mask(body: Body, example: Array, N: int, p: float, key: Any) -> Array:
    limit = round(p * 2**32)
    mask = np.empty((len(example), N), bool)
    for row, number in zip(mask, example.tolist(), strict=True):
        np.less(_random_bits(key, N, number), limit, out=row)
    return mask


# --- optimizers ---------------------------------------------------------------------------------


@kernel
def shrunk(body: Body, out: Array, p: Array, decay: float, penalty: float) -> None:
    check_float("shrunk", out, p)
    if not update_fits((out,), p):
        body(out, p, decay, penalty)  # raises
    factor, penalty = 1 - float(decay), float(penalty)

    def work(block: slice) -> None:
        part, new = p[block], out[block]
        np.multiply(part, factor, out=new)
        if penalty:
            signs = np.copysign(p.dtype.type(penalty), part)  # several times as fast as sign
            signs *= part != 0
            new -= signs

    over_blocks(work, len(p))


@kernel
def sgd(body: Body, p: Array, g: Array, lr: float, weight_decay: float, scale: float) -> None:
    check_float("sgd", p, g)
    if not update_fits((p,), g):
        body(p, g, lr, weight_decay, scale)  # raises
    if np.isnan(scale):
        return

    def work(block: slice) -> None:
        step = g[block] * (lr * float(scale))
        if weight_decay:
            step += p[block] * (lr * weight_decay)
        p[block] -= step

    over_blocks(work, len(p))


@kernel
def momentum(body: Body, p: Array, g: Array, v: Array, lr: float, mu: float, weight_decay: float,
             scale: float) -> None:
    check_float("momentum", p, g, v)
    if not update_fits((p, v), g):
        body(p, g, v, lr, mu, weight_decay, scale)  # raises
    scale = float(scale)
    if np.isnan(scale):
        return

    def work(block: slice) -> None:
        velocity = v[block]
        velocity *= mu
        velocity += g[block] if scale == 1 else g[block] * scale
        if weight_decay:
            velocity += p[block] * weight_decay
        p[block] -= velocity * lr

    over_blocks(work, len(p))


@kernel
def adam(body: Body, p: Array, g: Array, first: Array, second: Array, step: int, lr: float,
         beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
         scale: float) -> None:
    check_float("adam", p, g, first, second)
    if not update_fits((p, first, second), g):
        body(p, g, first, second, step, lr, beta1, beta2, eps, weight_decay, decoupled,
             scale)  # raises
    if np.isnan(scale):
        return
    root2 = (1 - beta2**step) ** 0.5
    rate = lr / (1 - beta1**step)
    scale = float(scale)

    def work(block: slice) -> None:
        weight, gradient, u, v = p[block], g[block], first[block], second[block]
        if scale != 1:
            gradient = gradient * scale
        if decoupled:
            weight *= 1 - lr * weight_decay
        elif weight_decay:
            gradient = gradient + weight * weight_decay
        t = gradient * (1 - beta1)
        u *= beta1
        u += t
        np.multiply(gradient, gradient, out=t)
        t *= 1 - beta2
        v *= beta2
        v += t
        np.sqrt(v, out=t)
        t /= root2
        t += eps
        np.divide(u, t, out=t)
        t *= rate
        weight -= t

    over_blocks(work, len(p))


@kernel
def squared_norm(body: Body, g: Array) -> np.float64:
    check_float("squared_norm", g)
    if g.ndim != 1:
        return body(g)
    parts = []

    def work(block: slice) -> None:
        wide = g[block].astype(np.float64)
        parts.append((block.start, np.add.reduce(np.multiply(wide, wide, out=wide))))

    over_blocks(work, len(g))
    return np.float64(sum(part for _, part in sorted(parts)))  # the same sum in any thread order
