"""The kernels of the GPU backend: cuBLAS, and the CUDA code of ``kernels/``, compiled when first
used.

A kernel takes the body that it replaces as its first argument, and calls it for what it does not
support. None makes the host wait: what they find wrong (a NaN among routing scores, a label that is
no class, a token that is not in the vocabulary) they note on the device, for `check_errors`.
"""

import functools
import itertools
import math
import re
import threading
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from statistics import NormalDist
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import NaNScore, UserError
from .base import (
    BackendError,
    attention_fits,
    bits_fit,
    described,
    labels_fit,
    layer_fits,
    mask_fits,
    norm_fits,
    products_fit,
    tokens_fit,
    weights_shape,
)
from .cublas import FORMATS, Cublas

Array = Any  # cupy.ndarray
Body = Callable[..., Any]

FOLDER = Path(__file__).resolve().parent / "kernels"
OPTIONS = ("--std=c++17",)
CTYPES = {"f": "float", "d": "double"}
NULL = np.uint64(0)

WARP = 32
BLOCK_ROWS = 8  # of activation.cu: a block is WARP columns by BLOCK_ROWS rows
WARP_ROWS = 4  # of loss.cu, norm.cu, attention.cu: a block is so many warps, each with a row
LONG_ROW, ROW_WARPS = 1024, 32  # of loss.cu: so many warps take a row that is longer
FEATURES = 4  # a thread, of tokens.cu
WORDS = 8  # random numbers a thread, of dropout.cu
THREADS = 256  # a block, of the kernels over flat buffers and of tokens.cu
MOST_BLOCKS = 1024  # of these: each thread then takes several elements
MOST_GRID_ROWS = 65535  # CUDA's limit for the second axis of a grid
SUM_BLOCKS, SUM_ROWS = 128, 32  # column sums: at most so many blocks over the rows, of so many

# masks.cu: the longest row for which `warps` warps hold it in registers, `items` scores a thread.
CAPS = {32: (1, 1), 128: (1, 4), 256: (1, 8), 512: (1, 16), 1024: (1, 32), 1536: (4, 12),
        2048: (4, 16), 3072: (4, 24), 4096: (4, 32), 6144: (8, 24), 9216: (8, 36)}
LONG_CAP = (16, 0)  # the row stays in memory
TIES = {"strict": 0, "threshold": 1, "index": 2}
NO_MASK, BYTES, BITS = 0, 1, 2  # kinds of masks, of activation.cu

NO_ERROR = np.uint64(2**64 - 1)
ERRORS = (  # what follows from another comes after it
    (UserError, "token {row} of the batch is {low}, which is not in the vocabulary: was the text "
                "prepared with another tokenizer?"),
    (NaNScore, "routing score {low} of example {row} is NaN, which has no rank: look for NaN or "
               "infinity in the input or in the routing weights"),
    (UserError, "the label of example {row} is {low}, which is no class of the network: check its "
                "number of classes or the labels of the data set"),
)

NAMES: list[str] = []  # of the kernels


def kernel(method: Callable[..., Any]) -> Callable[..., Any]:
    """Register a method of `CupyKernels` as the kernel of the operation of its name."""
    NAMES.append(method.__name__)
    return method


def source(file: str) -> str:
    """Return the CUDA source of ``kernels/<file>.cu`` with what all kernels share before it."""
    return "".join((FOLDER / name).read_text(encoding="utf-8")
                   for name in ("common.cuh", f"{file}.cu"))


ACTIVATIONS = tuple(re.findall(r"^ACTIVATION\((\w+)", source("activation"), re.MULTILINE))


class OfThread:
    """What a thread of the host has of its own on the device, so that several can compute at once.

    errors : places for what its kernels find wrong. bad_token, nan_score, bad_label : the parts of
    it. stream, cublas : made when first used.
    """

    def __init__(self, cupy: ModuleType) -> None:
        self._cupy = cupy
        self.errors = cupy.full(len(ERRORS), NO_ERROR, dtype=np.uint64)
        self.bad_token, self.nan_score, self.bad_label = (
            self.errors[i:i + 1] for i in range(len(ERRORS)))

    @functools.cached_property
    def stream(self) -> Any:
        return self._cupy.cuda.Stream(non_blocking=True)

    @functools.cached_property
    def cublas(self) -> Cublas:
        return Cublas(self._cupy)


class CupyKernels:
    """The kernels, methods of the names of their operations, and what they stand on."""

    def __init__(self, cupy: ModuleType) -> None:
        self.xp = cupy
        self.table = {name: getattr(self, name) for name in NAMES}
        self._compiled: dict[tuple[str, str], Callable[..., None]] = {}
        self._threads: dict[int, OfThread] = {}

    @property
    def mine(self) -> OfThread:
        """What the running thread has of its own.

        A thread may get the number of one that has ended, and takes over what that one had: graphs
        may need it still, so nothing of it is ever given back.
        """
        number = threading.get_ident()
        if number not in self._threads:
            self._threads[number] = OfThread(self.xp)
        return self._threads[number]

    def check_errors(self) -> None:
        """Raise a UserError for what this thread's kernels found wrong since the last call."""
        errors = self.mine.errors
        for place, (kind, message) in zip(self.xp.asnumpy(errors), ERRORS, strict=True):
            if place != NO_ERROR:
                errors.fill(NO_ERROR)
                row, low = divmod(int(place), 2**32)
                raise kind(message.format(row=row, low=np.uint32(low).view(np.int32)))

    def launch(self, file: str, name: str, grid: tuple[int, ...], block: tuple[int, ...],
               *arguments: Any) -> None:
        """Start a kernel, compiled if this is its first use; CuPy keeps compiled ones on disk.

        Arguments are arrays and NumPy scalars of the very types of the kernel's parameters, since
        CuPy converts nothing.
        """
        compiled = self._compiled.get((file, name))
        if compiled is None:
            module = self.xp.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,))
            compiled = self._compiled[file, name] = module.get_function(name)
        compiled(grid, block, arguments)

    def _check(self, operation: str, *arrays: Array | None) -> str:
        """Return CUDA's name of the one dtype, float32 or float64, of `arrays`; None is left out.
        """
        present = [array for array in arrays if array is not None]
        dtypes = {array.dtype for array in present}
        if len(dtypes) > 1 or present[0].dtype.char not in CTYPES:
            raise BackendError(f"{operation} on CuPy takes arrays of one dtype, float32 or float64,"
                               f" got {', '.join(sorted(map(str, dtypes)))}: cast them with "
                               ".astype()")
        return CTYPES[present[0].dtype.char]

    def _check_shape(self, operation: str, array: Array, shape: tuple[int, ...]) -> None:
        if array.shape != shape:
            raise BackendError(f"{operation} on CuPy expected shape {shape}, got {array.shape}")

    # --- matrix products, by cuBLAS ---

    def _multiply(self, operation: str, a: Array, b: Array, out: Array, beta: float,
                  compute: str | None) -> None:
        """out = a b + beta out, for matrices."""
        self._check(operation, a, b, out)
        if a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
            raise BackendError(f"{operation}: the shapes {a.shape}, {b.shape} and {out.shape} do "
                               "not fit together")
        if 0 not in (a.size, out.size):  # cuBLAS refuses empty operands
            self.mine.cublas.gemm(a, b, out, beta, compute)

    def _product(self, operation: str, x: Array, W: Array, compute: str | None = None) -> Array:
        """Return x W: x (..., K) and W (K, N) -> (..., N)."""
        rows = x.reshape(-1, x.shape[-1])
        y = self.xp.empty((len(rows), W.shape[1]), dtype=x.dtype)
        self._multiply(operation, rows, W, y, 0.0, compute)
        return y.reshape(*x.shape[:-1], W.shape[1])

    def _sums_of(self, total: Array) -> Array:
        """Return `total` to be added to in place, or zeros if its memory is not contiguous."""
        return total if total.flags.c_contiguous else self.xp.zeros(total.shape, total.dtype)

    def _gradients(self, operation: str, dy: Array, x: Array, p: Any, g: Any, compute: str | None,
                   input_gradient: bool) -> Array | None:
        """Return dx = dy W, if it is asked for, and then add dW = dy^T x."""
        dx = self._product(operation, dy, p.weight, compute) if input_gradient else None
        dW = g.weight
        sums = self._sums_of(dW)
        self._multiply(operation, dy.reshape(-1, dy.shape[-1]).T, x.reshape(-1, x.shape[-1]), sums,
                       1.0, compute)
        if sums is not dW:
            dW += sums
        return dx

    @kernel
    def project(self, body: Body, x: Array, W: Array) -> Array:
        if not _fit(x, W):
            return body(x, W)
        return self._product("project", x, W.T)

    @kernel
    def linear_forward(self, body: Body, x: Array, p: Any, compute: str | None = None) -> Any:
        W, b = p
        if not _fit(x, W, compute, b):
            return body(x, p, compute)
        y = self._product("linear_forward", x, W.T, compute)
        if b is not None:
            self._check("linear_forward", y, b)
            y += b
        return y, (x,)

    @kernel
    def linear_backward(self, body: Body, dy: Array, cache: Any, p: Any, g: Any,
                        compute: str | None = None, input_gradient: bool = True) -> Array | None:
        x, W = cache.x, p.weight
        if not _fit(x, W, compute) or dy.shape != (*x.shape[:-1], len(W)):
            return body(dy, cache, p, g, compute, input_gradient)
        if g.bias is not None:
            real = self._check("linear_backward", dy, g.bias)
            self._sum_columns(f"column_sum<{real}>", (self.xp.ascontiguousarray(dy),), dy.shape,
                              g.bias)
        return self._gradients("linear_backward", dy, x, p, g, compute, input_gradient)

    @kernel
    def multiply(self, body: Body, a: Array, b: Array, compute: str | None = None) -> Array:
        if not (products_fit(a, b) and _readable(a, compute)):
            return body(a, b, compute)
        self._check("multiply", a, b)
        shape = (*a.shape[:-1], b.shape[-1])
        if 0 in (a.size, b.size):  # cuBLAS refuses empty operands
            return self.xp.zeros(shape, dtype=a.dtype)
        out = self.xp.empty((math.prod(shape[:-2]), *shape[-2:]), dtype=a.dtype)
        self.mine.cublas.gemm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), out, 0.0,
                              compute)
        return out.reshape(shape)

    # --- the cap ---

    @kernel
    def kwta_mask(self, body: Body, scores: Array, k: int, ties: str = "strict") -> Array:
        return self._cap(body, scores, k, ties, packed=False)

    @kernel
    def cap(self, body: Body, scores: Array, k: int, ties: str = "strict") -> Array:
        return self._cap(body, scores, k, ties, packed=True)

    def _cap(self, body: Body, scores: Array, k: int, ties: str, packed: bool) -> Array:
        N = scores.shape[-1] if scores.ndim else 0
        if ties not in TIES or not isinstance(k, Integral) or not 1 <= k <= N:
            return body(scores, k, ties)  # raises whatever is wrong with the arguments
        real, T = self._check("kwta_mask", scores), scores.dtype.type
        mask = self.xp.empty((*scores.shape[:-1], -(-N // 8) if packed else N),
                             dtype=np.uint8 if packed else bool)
        rows, (warps, items) = scores.size // N, cap_shape(N)
        quantile = gap = 0.0
        if k < N:
            quantile = NormalDist().inv_cdf(1 - k / N)
            # 1.6 times the mean distance of scores at the quantile: the second guess shall
            # overshoot, so that the answer lies between the two.
            gap = 1.6 / (N * NormalDist().pdf(quantile))
        if rows:
            self.launch("masks", f"kwta<{real}, {warps}, {items}>",
                        (-(-rows // max(1, 4 // warps)),), (max(4, warps) * WARP,),
                        self.xp.ascontiguousarray(scores), NULL if packed else mask,
                        mask if packed else NULL, np.int64(rows), np.int32(N), np.int32(k),
                        np.int32(TIES[ties]), T(quantile), T(gap), self.mine.nan_score)
        return mask

    @kernel
    def unpack_masks(self, body: Body, bits: Array, widths: Sequence[int]) -> tuple[Array, ...]:
        """Return them packed, as layers read bits as fast."""
        if not bits_fit(bits, widths):
            return body(bits, widths)  # raises
        ends = itertools.accumulate((-(-N // 8) for N in widths), initial=0)
        return tuple(bits[..., start:end] for start, end in itertools.pairwise(ends))

    # --- the hidden layer: bias, activation and mask in one pass, their gradient, column sums ---

    def _mask_arguments(self, m: Array | None, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Return a mask, bool or bit-packed or None, its kind, and the bytes from row to row."""
        if m is None:
            return NULL, np.int32(NO_MASK), np.int64(0)
        if not (isinstance(m, self.xp.ndarray) and mask_fits(m, shape)):
            raise BackendError(f"a mask for activations of shape {shape} is a cupy.ndarray, bool "
                               f"of that shape or bit-packed uint8, got {described(m)}")
        packed = m.dtype == np.uint8
        pitch = m.strides[-2] if m.ndim > 1 else m.size
        if not _rows_apart_equally(m):
            m, pitch = self.xp.ascontiguousarray(m), m.shape[-1]
        return m, np.int32(BITS if packed else BYTES), np.int64(pitch)

    def _activated(self, operation: str, a: Array, b: Array | None, m: Array | None,
                   name: str) -> Array:
        """Return m o f(a + b), for the f called `name`; b is added to the contiguous a in place."""
        real, N = self._check(operation, a, b), a.shape[-1]
        if b is not None:
            self._check_shape("the bias", b, (N,))
            b = self.xp.ascontiguousarray(b)
        h = self.xp.empty(a.shape, dtype=a.dtype)
        if h.size:
            rows = h.size // N
            self.launch("activation", f"forward<{real}, f_{name}>", *cells(rows, N), a,
                        NULL if b is None else b, *self._mask_arguments(m, a.shape), h,
                        np.int64(rows), np.int32(N))
        return h

    @kernel
    def masked(self, body: Body, c: Array, m: Array, g: Any) -> Array:
        if g.name not in ACTIVATIONS:
            return body(c, m, g)
        return self._activated("masked", self.xp.ascontiguousarray(c), None, m, g.name)

    @kernel
    def hidden_forward(self, body: Body, x: Array, p: Any, mask: Any, f: Any,
                       compute: str | None = None) -> Any:
        W, b = p
        if not _fit(x, W, compute, b):
            return body(x, p, mask, f, compute)
        a = self._product("hidden_forward", x, W.T, compute)
        known = f.name in ACTIVATIONS
        if b is not None and (callable(mask) or not known):
            self._check("hidden_forward", a, b)
            a += b
            b = None
        m = mask(x, a) if callable(mask) else mask
        # Of others f runs as it stands, and the mask alone is left to the kernel. The body would
        # not do: within a graph CuPy takes no products.
        h = (self._activated("hidden_forward", a, b, m, f.name) if known else
             self._activated("hidden_forward", f.forward(a), None, m, "identity"))
        return h, (x, a, m)

    @kernel
    def hidden_backward(self, body: Body, dh: Array, cache: Any, p: Any, g: Any, f: Any,
                        compute: str | None = None, input_gradient: bool = True) -> Array | None:
        x, a, m = cache
        if not _fit(x, p.weight, compute) or dh.shape != a.shape:
            return body(dh, cache, p, g, f, compute, input_gradient)
        real, name = self._check("hidden_backward", dh, a, g.bias), f.name
        if name not in ACTIVATIONS:
            dh, name = dh * f.derivative(a), "identity"
        da = self.xp.empty(a.shape, dtype=a.dtype)
        self._sum_columns(f"gradient<{real}, f_{name}>",
                          (self.xp.ascontiguousarray(dh), self.xp.ascontiguousarray(a),
                           *self._mask_arguments(m, a.shape), da), a.shape, g.bias)
        return self._gradients("hidden_backward", da, x, p, g, compute, input_gradient)

    def _sum_columns(self, name: str, inputs: tuple[Any, ...], shape: tuple[int, ...],
                     db: Array | None) -> None:
        """Launch a kernel of activation.cu that adds column sums to db, in a fixed order."""
        N = shape[-1]
        rows = math.prod(shape[:-1])
        if db is not None:
            self._check_shape("the bias's gradient", db, (N,))
        if rows * N == 0:
            return
        size = np.int64(rows), np.int32(N)
        if db is None:
            self.launch("activation", name, *cells(rows, N), *inputs, NULL, *size)
            return
        total = self._sums_of(db)
        grid, block = cells(rows, N, min(SUM_BLOCKS, -(-rows // SUM_ROWS)))
        blocks = grid[1]
        sums = self.xp.empty((blocks, N), dtype=db.dtype) if blocks > 1 else total
        self.launch("activation", name, grid, block, *inputs, sums, *size)
        if blocks > 1:
            self.launch("activation", f"column_sum<{CTYPES[db.dtype.char]}>", (grid[0], 1), block,
                        sums, total, np.int64(blocks), np.int32(N))
        if total is not db:
            db += total

    # --- tokens ---

    @kernel
    def check_token_range(self, body: Body, tokens: Array, V: int) -> None:
        """Do nothing: `tokens_forward` notes bad tokens on the device."""

    @kernel
    def tokens_forward(self, body: Body, tokens: Array, p: Any, first: int = 0) -> Any:
        if not tokens_fit(tokens, p.tokens, p.positions, first):
            return body(tokens, p, first)  # raises
        real, (V, D), T = self._check("tokens_forward", *p), p.tokens.shape, tokens.shape[-1]
        x = self.xp.empty((*tokens.shape, D), dtype=p.tokens.dtype)
        if x.size:
            positions = self.xp.ascontiguousarray(p.positions[first:first + T])
            self.launch("tokens", f"tokens_forward<{real}>", *cells(tokens.size, D),
                        self._integers(tokens), self.xp.ascontiguousarray(p.tokens), positions, x,
                        np.int64(tokens.size), np.int32(V), np.int32(T), np.int32(D),
                        self.mine.bad_token)
        return x, (tokens,)

    @kernel
    def tokens_backward(self, body: Body, dx: Array, cache: Any, g: Any, first: int = 0) -> None:
        tokens = cache.tokens
        if (not tokens_fit(tokens, g.tokens, g.positions, first)
                or dx.shape != (*tokens.shape, g.tokens.shape[1])):
            return body(dx, cache, g, first)  # raises
        real, T, (V, D) = self._check("tokens_backward", dx, *g), tokens.shape[-1], g.tokens.shape
        if dx.size == 0:
            return None
        dx = self.xp.ascontiguousarray(dx)
        total = self._sums_of(g.tokens)
        self.launch("tokens", f"tokens_backward<{real}>",
                    (tokens.size, -(-D // (THREADS * FEATURES))), (THREADS,), dx,
                    self._integers(tokens), total, np.int64(tokens.size), np.int32(V), np.int32(D))
        positions = g.positions[first:first + T]
        sums = self._sums_of(positions)
        self._sum_columns(f"column_sum<{real}>", (dx,), (tokens.size // T, T * D),
                          sums.reshape(-1))
        for mine, whole in (total, g.tokens), (sums, positions):
            if mine is not whole:
                whole += mine
        return None

    # --- layer norm ---

    @kernel
    def norm_forward(self, body: Body, x: Array, p: Any, eps: float = 1e-5) -> Any:
        if not norm_fits(x, *p):
            return body(x, p, eps)  # raises
        real, D = self._check("norm_forward", x, *p), x.shape[-1]
        y, normed = (self.xp.empty(x.shape, dtype=x.dtype) for _ in range(2))
        inverse = self.xp.empty((*x.shape[:-1], 1), dtype=x.dtype)
        if x.size:
            self.launch("norm", f"norm_forward<{real}>", *warps_of(inverse.size),
                        *map(self.xp.ascontiguousarray, (x, *p)), x.dtype.type(eps), y, normed,
                        inverse, np.int64(inverse.size), np.int32(D))
        return y, (normed, inverse)

    @kernel
    def norm_backward(self, body: Body, dy: Array, cache: Any, p: Any, g: Any) -> Array:
        if dy.shape != cache.normed.shape or not (norm_fits(dy, *p) and norm_fits(dy, *g)):
            return body(dy, cache, p, g)  # raises
        real, D = self._check("norm_backward", dy, *cache, *p, *g), dy.shape[-1]
        dx, rows = self.xp.empty(dy.shape, dtype=dy.dtype), dy.size // D
        if rows == 0:
            return dx
        dy, normed, inverse, gain = map(self.xp.ascontiguousarray, (dy, *cache, p.gain))
        self.launch("norm", f"norm_backward<{real}>", *warps_of(rows), dy, normed, inverse, gain,
                    dx, np.int64(rows), np.int32(D))
        grid, block = cells(rows, D, min(SUM_BLOCKS, -(-rows // SUM_ROWS)))
        sums = self.xp.empty((grid[1], 2, D), dtype=dy.dtype)
        self.launch("norm", f"norm_sums<{real}>", grid, block, dy, normed, sums, np.int64(rows),
                    np.int32(D))
        totals = [self._sums_of(total) for total in g]
        self.launch("norm", f"norm_totals<{real}>", (-(-2 * D // THREADS),), (THREADS,), sums,
                    *totals, np.int32(grid[1]), np.int32(D))
        for mine, total in zip(totals, g, strict=True):
            if mine is not total:
                total += mine
        return dx

    # --- attention: products of heads by cuBLAS, which takes them one after the other in memory ---

    def _by_head(self, x: Array, parts: int, heads: int) -> Array:
        """Return a copy of x (B, T, parts H d) head by head, (parts, B H, T, d)."""
        B, T, width = x.shape
        d = width // (parts * heads)
        apart = x.reshape(B, T, parts, heads, d).transpose(2, 0, 3, 1, 4)
        return self.xp.ascontiguousarray(apart).reshape(parts, B * heads, T, d)

    def _joined(self, x: Array, heads: int, shape: tuple[int, ...]) -> Array:
        """Undo `_by_head`: return x (parts, B H, T, d) in the shape (..., T, parts H d)."""
        parts, matrices, T, d = x.shape
        apart = x.reshape(parts, matrices // heads, heads, T, d).transpose(1, 3, 0, 2, 4)
        return self.xp.ascontiguousarray(apart).reshape(shape)

    @kernel
    def attention_forward(self, body: Body, qkv: Array, heads: int, causal: bool = False,
                          factor: Array | None = None, compute: str | None = None) -> Any:
        if not (attention_fits(qkv, heads, factor) and _readable(qkv, compute)):
            return body(qkv, heads, causal, factor, compute)
        real, (*lead, T, D3) = self._check("attention_forward", qkv, factor), qkv.shape
        P = self.xp.empty(weights_shape(qkv, heads), dtype=qkv.dtype)
        shape = (*lead, T, D3 // 3)
        if P.size == 0:
            return self.xp.empty(shape, dtype=qkv.dtype), (qkv, P, factor)
        gemm = self.mine.cublas.gemm
        q, k, v = self._by_head(qkv.reshape(-1, T, D3), 3, heads)
        S = P.reshape(-1, T, T)
        gemm(q, k.swapaxes(-1, -2), S, 0.0, compute)
        given, weighted = self._dropped(factor, S)
        self.launch("attention", f"attention_weights<{real}>", *warps_of(P.size // T), S, given,
                    NULL if factor is None else weighted, qkv.dtype.type(q.shape[-1] ** -0.5),
                    np.int32(causal), np.int64(P.size // T), np.int32(T))
        y = self.xp.empty(q.shape, dtype=qkv.dtype)
        gemm(weighted, v, y, 0.0, compute)
        return self._joined(y[None], heads, shape), (qkv, P, factor)

    @kernel
    def attention_backward(self, body: Body, dy: Array, cache: Any, heads: int,
                           compute: str | None = None) -> Array:
        qkv, P, factor = cache
        *lead, T, D3 = qkv.shape
        if not (attention_fits(qkv, heads, P) and attention_fits(qkv, heads, factor)
                and dy.shape == (*lead, T, D3 // 3) and _readable(qkv, compute)):
            return body(dy, cache, heads, compute)
        real = self._check("attention_backward", dy, qkv, P, factor)
        if P.size == 0:
            return self.xp.empty(qkv.shape, dtype=qkv.dtype)
        gemm = self.mine.cublas.gemm
        q, k, v = self._by_head(qkv.reshape(-1, T, D3), 3, heads)
        (dY,) = self._by_head(dy.reshape(-1, T, D3 // 3), 1, heads)
        P = self.xp.ascontiguousarray(P).reshape(-1, T, T)
        dS = self.xp.empty(P.shape, dtype=P.dtype)
        gemm(dY, v.swapaxes(-1, -2), dS, 0.0, compute)
        given, weighted = self._dropped(factor, P)
        self.launch("attention", f"attention_gradient<{real}>", *warps_of(P.size // T), dS, P,
                    given, NULL if factor is None else weighted,
                    qkv.dtype.type(q.shape[-1] ** -0.5), np.int64(P.size // T), np.int32(T))
        dqkv = self.xp.empty((3, *q.shape), dtype=qkv.dtype)
        gemm(dS, k, dqkv[0], 0.0, compute)
        gemm(dS.swapaxes(-1, -2), q, dqkv[1], 0.0, compute)
        gemm(weighted.swapaxes(-1, -2), dY, dqkv[2], 0.0, compute)
        return self._joined(dqkv, heads, qkv.shape)

    def _dropped(self, factor: Array | None, P: Array) -> tuple[Any, Array]:
        """Return F for a kernel, and where it shall write P o F: P itself without dropout."""
        if factor is None:
            return NULL, P
        return self.xp.ascontiguousarray(factor), self.xp.empty(P.shape, dtype=P.dtype)

    # --- loss ---

    @kernel
    def check_label_range(self, body: Body, labels: Array, C: int,
                          ignored: int | None = None) -> None:
        """Do nothing: `softmax_cross_entropy` notes bad labels on the device."""

    @kernel
    def softmax_cross_entropy(self, body: Body, logits: Array, labels: Array,
                              ignored: int | None = None,
                              in_place: bool = False) -> tuple[Array, Array]:
        if not labels_fit(labels, logits):
            return body(logits, labels, ignored, in_place)  # raises
        real, C = self._check("softmax_cross_entropy", logits), logits.shape[-1]
        q = self._over(logits, in_place)
        losses = self.xp.empty(labels.shape, dtype=logits.dtype)
        if labels.size:
            warps, shape = 1, warps_of(labels.size)
            if C > LONG_ROW:
                warps, shape = ROW_WARPS, ((labels.size,), (ROW_WARPS * WARP,))
            self.launch("loss", f"softmax_cross_entropy<{real}, {warps}>", *shape,
                        self.xp.ascontiguousarray(logits), self._integers(labels), q, losses,
                        np.int64(labels.size), np.int32(C), *_ignored(ignored),
                        self.mine.bad_label)
        return losses, self._written(q, logits, in_place)

    @kernel
    def softmax_cross_entropy_gradient(self, body: Body, q: Array, labels: Array, scale: Any,
                                       ignored: int | None = None,
                                       in_place: bool = False) -> Array:
        if not labels_fit(labels, q):
            return body(q, labels, scale, ignored, in_place)  # raises
        real = self._check("softmax_cross_entropy_gradient", q)
        dlogits = self._over(q, in_place)
        rows, C = labels.size, q.shape[-1]
        if rows:
            self.launch("loss", f"softmax_cross_entropy_gradient<{real}>", *cells(rows, C),
                        self.xp.ascontiguousarray(q), self._integers(labels), dlogits,
                        *self._number(scale), np.int64(rows), np.int32(C), *_ignored(ignored))
        return self._written(dlogits, q, in_place)

    def _over(self, a: Array, in_place: bool) -> Array:
        """Return what a kernel writes in the place of `a`, or beside it: contiguous memory."""
        return a if in_place and a.flags.c_contiguous else self.xp.empty(a.shape, dtype=a.dtype)

    def _written(self, made: Array, a: Array, in_place: bool) -> Array:
        """Return what has been written to `_over`: with `in_place`, a itself."""
        if in_place and made is not a:
            a[...] = made
        return a if in_place else made

    def _integers(self, labels: Array) -> Array:
        return self.xp.ascontiguousarray(labels, dtype=np.int64)

    # --- numbers from the host or the device ---

    def _number(self, value: Any) -> tuple[Any, np.float64]:
        """Return the arguments of `number` in common.cuh: a place on the device, and a value."""
        if isinstance(value, self.xp.ndarray):
            self._check_shape("a number on the device", value, ())
            return value.astype(np.float64, copy=False), np.float64(0)
        return NULL, np.float64(value)

    def _step(self, step: Any) -> tuple[Any, np.int64]:
        """Return the arguments of `number` for a counter, which a graph must read afresh."""
        if not isinstance(step, self.xp.ndarray):
            return NULL, np.int64(step)
        if step.shape != () or step.dtype != np.int64:
            raise BackendError("a step on CuPy is a Python integer or a 0-d int64 array, got "
                               f"{step.dtype} of shape {step.shape}")
        return step, np.int64(0)

    # --- random masks ---

    @kernel
    def dropout_factor(self, body: Body, x: Array, rate: float, key: Any, step: Any) -> Array:
        real = self._check("dropout_factor", x)
        factor = self.xp.empty(x.shape, dtype=x.dtype)
        if factor.size:
            self.launch("dropout", f"dropout_factor<{real}>",
                        (-(-factor.size // (WORDS * THREADS)),), (THREADS,), factor,
                        np.int64(factor.size), *self._step(step), np.uint64(key.k0),
                        np.uint64(key.k1), np.uint64(round(rate * 2**32)),
                        x.dtype.type(1 / (1 - rate)))
        return factor

    @kernel
    def example_mask(self, body: Body, example: Array, N: int, p: float, key: Any) -> Array:
        mask = self.xp.empty((len(example), N), dtype=bool)
        if mask.size:
            self.launch("dropout", "example_mask", (-(-len(example) * -(-N // WORDS) // THREADS),),
                        (THREADS,), self.xp.ascontiguousarray(example, dtype=np.int64), mask,
                        np.int64(len(example)), np.int32(N), np.uint64(key.k0), np.uint64(key.k1),
                        np.uint64(round(p * 2**32)))
        return mask

    # --- optimizers ---

    def _check_in_place(self, operation: str, *arrays: Array) -> str:
        """Check flat `arrays` that are changed in place or read beside such, as `_check` does."""
        real = self._check(operation, *arrays)
        if any(not a.flags.c_contiguous or a.shape != arrays[0].shape for a in arrays):
            raise BackendError(f"{operation} on CuPy takes C-contiguous arrays of one shape, got "
                               f"{', '.join(str(a.shape) for a in arrays)}: copy them with "
                               ".copy() before")
        return real

    def _launch_flat(self, operation: str, arrays: tuple[Array, ...], *numbers: Any) -> None:
        """Launch a kernel of optimizer.cu; its first parameters are flat arrays and their size."""
        real, n = self._check_in_place(operation, *arrays), arrays[0].size
        if n:
            self.launch("optimizer", f"{operation}<{real}>", flat_grid(n), (THREADS,), *arrays,
                        np.int64(n), *numbers)

    @kernel
    def shrunk(self, body: Body, out: Array, p: Array, decay: Any, penalty: Any) -> None:
        self._launch_flat("shrunk", (out, p), *self._number(decay), *self._number(penalty))

    @kernel
    def sgd(self, body: Body, p: Array, g: Array, lr: Any, weight_decay: float,
            scale: Any) -> None:
        self._launch_flat("sgd", (p, g), *self._number(lr), *self._number(scale),
                          p.dtype.type(weight_decay))

    @kernel
    def momentum(self, body: Body, p: Array, g: Array, v: Array, lr: Any, mu: float,
                 weight_decay: float, scale: Any) -> None:
        T = p.dtype.type
        self._launch_flat("momentum", (p, g, v), *self._number(lr), *self._number(scale), T(mu),
                          T(weight_decay))

    @kernel
    def adam(self, body: Body, p: Array, g: Array, first: Array, second: Array, step: Any, lr: Any,
             beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
             scale: Any) -> None:
        self._launch_flat("adam", (p, g, first, second), *self._number(lr), *self._number(scale),
                          *self._step(step), np.float64(beta1), np.float64(beta2),
                          p.dtype.type(eps), np.float64(weight_decay), np.int32(decoupled))

    @kernel
    def squared_norm(self, body: Body, g: Array) -> Array:
        real = self._check_in_place("squared_norm", g)
        parts = self.xp.empty(flat_grid(g.size), dtype=np.float64)
        self.launch("optimizer", f"squared_norm<{real}>", parts.shape, (THREADS,), g, parts,
                    np.int64(g.size))
        return parts.sum()


def _fit(x: Array, W: Array, compute: str | None = None, b: Array | None = None) -> bool:
    """Return whether W x + b can be had here; bodies take others, or say what is wrong."""
    return layer_fits(x, W, b) and _readable(x, compute)


def _readable(x: Array, compute: str | None) -> bool:
    """Return whether cuBLAS reads operands of the dtype of x in the format `compute`."""
    return compute is None or (x.dtype.char, compute) in FORMATS


def _ignored(label: int | None) -> tuple[np.int32, np.int64]:
    """Return the arguments of a kernel of loss.cu for the label that is ignored, if any."""
    return np.int32(label is not None), np.int64(0 if label is None else label)


def cap_shape(N: int) -> tuple[int, int]:
    """Return the warps a row and the scores a thread with which `kwta` takes rows of N scores."""
    return next((shape for longest, shape in CAPS.items() if longest >= N), LONG_CAP)


def cells(rows: int, N: int, blocks: int = MOST_GRID_ROWS) -> tuple[tuple[int, int],
                                                                    tuple[int, int]]:
    """Return grid and block of WARP x BLOCK_ROWS threads, with at most `blocks` over the rows."""
    return (-(-N // WARP), min(blocks, -(-rows // BLOCK_ROWS))), (WARP, BLOCK_ROWS)


def warps_of(rows: int) -> tuple[tuple[int], tuple[int]]:
    """Return grid and block of a kernel in which a warp takes a row."""
    return (-(-rows // WARP_ROWS),), (WARP_ROWS * WARP,)


def _rows_apart_equally(m: Array) -> bool:
    """Return whether the rows of m (..., N) each lie whole, all equally far from the next."""
    strides = m.strides
    return strides[-1:] == (1,) and all(strides[i] == strides[i + 1] * m.shape[i + 1]
                                        for i in range(m.ndim - 2))


def flat_grid(n: int) -> tuple[int]:
    """Return the grid of a kernel over n elements; a thread takes several if n is large."""
    return (max(1, min(MOST_BLOCKS, -(-n // THREADS))),)
