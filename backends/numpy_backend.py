"""The CPU backend: NumPy, SciPy's BLAS, and kernels that are blocked to fit L2 and threaded.

Measured on 2 cores (AVX-512, OpenBLAS 0.3.30); `benchmarks/` shows the effect of the whole.
"""

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from scipy.linalg import blas
from scipy.special import erf

from .base import OPERATIONS, Backend, BackendError, register_backend

Array = np.ndarray

BLOCK = 1 << 16  # elements a block: with its temporaries it stays in L2
TILE = 64  # columns a tile of a change of memory order: it stays in L1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
GEMM = {"f": blas.sgemm, "d": blas.dgemm, "F": blas.cgemm, "D": blas.zgemm}
GEMV = {"f": blas.sgemv, "d": blas.dgemv}


class NumpyBackend(Backend):
    """NumPy on the CPU."""

    name = "numpy"
    xp = np

    def __init__(self) -> None:
        self.kernels = {}

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        return np.asarray(values, dtype=dtype)

    def to_host(self, array: Array) -> Array:
        return np.asarray(array)

    def erf(self, a: Array) -> Array:
        return erf(a)

    def synchronize(self) -> None:
        return

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "device": processor(),
                "threads": threads(), "numpy": np.__version__, "scipy": scipy.__version__}


@cache
def processor() -> str:
    """Return the processor's name as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


NUMPY = NumpyBackend()
register_backend(np.ndarray, NUMPY)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register `function` as the NumPy kernel of the operation of its name."""
    NUMPY.kernels[function.__name__] = function
    return function


def check_float(name: str, *arrays: Array) -> None:
    """Raise unless all `arrays` share one of the dtypes float32 and float64."""
    dtype = arrays[0].dtype
    for array in arrays:  # not a set of dtypes: this runs twenty times a step
        if array.dtype != dtype or dtype.char not in "fd":
            dtypes = sorted({str(array.dtype) for array in arrays})
            raise BackendError(f"{name} on NumPy takes arrays of one dtype, float32 or float64, "
                               f"got {', '.join(dtypes)}: cast them with .astype()")


# --- threads over blocks ------------------------------------------------------------------------


@cache
def threads() -> int:
    """Return how many threads to use: OMP_NUM_THREADS if set, else the usable cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads() - 1), "comet-np")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has no such threads


def over_blocks(work: Callable[[slice], None], length: int, row_elements: int = 1) -> None:
    """Call ``work(slice)`` for slices that cover `length` rows, each about BLOCK elements.

    Many blocks are shared among threads, since NumPy's loops release the interpreter lock; for
    few, waking the threads costs more than it saves.
    """
    step = max(1, BLOCK // max(1, row_elements))
    if length <= step:
        work(slice(0, length))
        return
    blocks = iter([slice(start, min(start + step, length)) for start in range(0, length, step)])

    def drain() -> None:
        for block in blocks:
            work(block)

    if threads() == 1 or length < 8 * step:
        drain()
        return
    others = [_pool().submit(drain) for _ in range(threads() - 1)]
    drain()
    for other in others:
        other.result()


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next step (glibc only; else nothing).

    Its default gives the arrays of a step back to the system and faults them in again, page by
    page, at the next: 8 % of a step at N = 3000 and 128 examples. For programs that train, as it
    concerns the whole process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, 1 << 30)


# --- matrix products ----------------------------------------------------------------------------
# All products of a step go through SciPy's BLAS: NumPy's wheel carries a second OpenBLAS with
# its own spinning threads, and mixing the two made steps twice as slow. SciPy's also adds into
# its output (beta = 1), which saves plain SGD a pass over the weights and the gradient buffer.
#
# A product of few rows is returned column-major: OpenBLAS then packs the weights in the order in
# which they lie (0.59 ms against 1.04 for 32 x 3072 times 3072 x 1000). The kernels below keep
# whatever memory order they are given, so a whole training step runs in that order.

FEW_ROWS = 256


def _operand(a: Array) -> tuple[Array, int]:
    """Return `a`, or its transpose and the flag 1, as the column-major array that BLAS takes."""
    if a.flags.f_contiguous and not a.flags.c_contiguous:
        return a, 0
    return np.ascontiguousarray(a).T, 1


def _product(a: Array, b: Array, out: Array | None = None) -> Array:
    """Return the matrix product a b: column-major if `a` has few rows, else row-major.

    It goes into `out` if that is given, which must have this memory order.
    """
    multiply = GEMM.get(a.dtype.char)
    if multiply is None or a.dtype != b.dtype:
        raise BackendError(f"a matrix product on NumPy takes two arrays of one dtype (float32, "
                           f"float64 or complex), got {a.dtype} and {b.dtype}: cast one with "
                           ".astype()")
    if 0 in a.shape or 0 in b.shape:
        return a @ b  # BLAS refuses empty operands
    few = len(a) <= FEW_ROWS
    (a, trans_a), (b, trans_b) = _operand(a if few else b.T), _operand(b if few else a.T)
    if out is None:
        product = multiply(1.0, a, b, trans_a=trans_a, trans_b=trans_b)
    else:
        product = multiply(1.0, a, b, c=out if few else out.T, trans_a=trans_a, trans_b=trans_b,
                           overwrite_c=1)
    return product if few else product.T


def _products(x: Array, W: Array) -> Array:
    """Return x W: x (..., K) and W (K, N), or network by network x (S, B, K) and W (S, K, N)."""
    if W.ndim == 2:
        if x.ndim == 2:
            return _product(x, W)
        return _product(x.reshape(-1, x.shape[-1]), W).reshape(*x.shape[:-1], W.shape[-1])
    S, B, N = len(W), x.shape[-2], W.shape[-1]
    y = np.empty((S, N, B), x.dtype).swapaxes(1, 2) if B <= FEW_ROWS else np.empty((S, B, N),
                                                                                   x.dtype)
    for s in range(S):
        _product(x[s] if x.ndim == 3 else x, W[s], y[s])
    return y


@kernel
def project(x: Array, W: Array, tf32: bool = False) -> Array:
    return _products(x, W.swapaxes(-1, -2))


@kernel
def project_back(dy: Array, W: Array, tf32: bool = False) -> Array:
    return _products(dy, W)


@kernel
def accumulate_outer(dy: Array, x: Array, dW: Array, tf32: bool = False) -> None:
    if dW.ndim == 3:
        for s in range(len(dW)):
            accumulate_outer(dy[s], x[s], dW[s])
        return
    check_float("accumulate_outer", dy, x, dW)
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if dy.size == 0 or x.size == 0:
        return
    if not dW.flags.c_contiguous:
        dW += _product(dy.T, x)
        return
    (a, trans_a), (b, trans_b) = _operand(x.T), _operand(dy)
    GEMM[dW.dtype.char](1.0, a, b, beta=1.0, c=dW.T, trans_a=trans_a, trans_b=trans_b,
                        overwrite_c=1)


@kernel
def accumulate_sum(dy: Array, db: Array) -> None:
    if db.ndim == 3:
        matrix, outer = _in_memory_order(dy)
        if outer == 1 and db.flags.c_contiguous:  # the neurons of all networks at once
            accumulate_sum(matrix.T, db.reshape(-1))
            return
        for s in range(len(db)):
            accumulate_sum(dy[s], db[s, 0])
        return
    check_float("accumulate_sum", dy, db)
    if dy.size == 0:
        return
    if not db.flags.c_contiguous:
        db += dy.reshape(-1, dy.shape[-1]).sum(axis=0)
        return
    a, trans = _operand(dy.reshape(-1, dy.shape[-1]))
    ones = np.ones(a.shape[trans], a.dtype)
    GEMV[a.dtype.char](1.0, a, ones, beta=1.0, y=db, trans=1 - trans, overwrite_y=1)


# --- the cap ------------------------------------------------------------------------------------

TIES = ("strict", "threshold", "index")


@kernel
def kwta_mask(scores: Array, k: int, ties: str = "strict") -> Array:
    body = OPERATIONS["kwta_mask"].body  # raises whatever is wrong with the arguments
    N = scores.shape[-1] if scores.ndim else 0
    if ties not in TIES or not isinstance(k, Integral) or not 1 <= k <= N:
        return body(scores, k, ties)
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
def unpack_masks(bits: Array, widths: Sequence[int]) -> tuple[Array, ...]:
    body = OPERATIONS["unpack_masks"].body
    if bits.ndim < 2 or bits.shape[-2] > FEW_ROWS:
        return body(bits, widths)
    # The order of the products of so few rows: bits side by side become rows one after the other.
    flags = np.unpackbits(bits, axis=-1).view(bool).swapaxes(-1, -2).copy()
    masks, start = [], 0
    for N in widths:
        masks.append(flags[..., start:start + N, :].swapaxes(-1, -2))
        start += -(-N // 8) * 8
    return tuple(masks)


# --- bias, activation, mask ---------------------------------------------------------------------


def _in_memory_order(a: Array) -> tuple[Array, int | None]:
    """Return `a` (..., N) as a matrix whose rows lie one after the other, and what its rows are.

    None: examples. 0: neurons, of all examples; 1: the neurons of each network in turn, for arrays
    (S, B, N) of networks side by side.
    """
    if a.ndim == 3 and not a.flags.c_contiguous:
        turned = a.swapaxes(1, 2)
        if turned.flags.c_contiguous:
            return turned.reshape(-1, a.shape[1]), 1
    rows = a.reshape(-1, a.shape[-1])
    if rows.flags.f_contiguous and not rows.flags.c_contiguous:
        return rows.T, 0
    return rows, None


def _same_order(a: Array, outer: int | None) -> Array:
    """Return `a` (..., N) as the C-contiguous matrix of the order `outer`."""
    if outer == 1:
        return np.ascontiguousarray(a.swapaxes(1, 2)).reshape(-1, a.shape[1])
    rows = a.reshape(-1, a.shape[-1])
    return np.ascontiguousarray(rows if outer is None else rows.T)


def _back_from(matrix: Array, shape: tuple[int, ...], outer: int | None) -> Array:
    """Return a matrix of the order `outer` as the array (..., N) of that shape."""
    if outer == 1:
        return matrix.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2)
    return (matrix if outer is None else matrix.T).reshape(shape)


def _mask_in_order(m: Array | None, N: int, outer: int | None) -> Array | None:
    """Return a mask, bool or bit-packed or None, in the order of its activations."""
    if m is not None and m.dtype == np.uint8:
        m = np.unpackbits(m, axis=-1, count=N).view(bool)
    return None if m is None else _same_order(m, outer)


@kernel
def bias_activation_mask(s: Array, b: Array | None, m: Array | None, f: Any) -> Any:
    check_float("bias_activation_mask", s, *([] if b is None else [b]))
    matrix, outer = _in_memory_order(s)
    if b is not None and (b.ndim > 1) != (outer == 1):  # the order of the biases is another one
        return bias_activation_mask(s + b, None, m, f)
    a = matrix if b is None else np.empty_like(matrix)
    x = np.empty_like(matrix)
    mask = _mask_in_order(m, s.shape[-1], outer)
    apply = FORWARD_INTO.get(f.name)
    if b is not None and outer is not None:
        b = b.reshape(-1, 1)

    def work(block: slice) -> None:
        if b is not None:
            np.add(matrix[block], b if outer is None else b[block], out=a[block])
        if apply is None:
            x[block] = f.forward(a[block])
        else:
            apply(a[block], x[block])
        if mask is not None:
            np.multiply(x[block], mask[block], out=x[block])

    over_blocks(work, len(matrix), matrix.shape[1])
    return _back_from(a, s.shape, outer), _back_from(x, s.shape, outer)


@kernel
def bias_activation_mask_gradient(dx: Array, a: Array, m: Array | None, f: Any,
                                  db: Array | None) -> Array:
    check_float("bias_activation_mask_gradient", dx, a)
    matrix, outer = _in_memory_order(a)
    upstream = _same_order(dx, outer)
    mask = _mask_in_order(m, a.shape[-1], outer)
    da = np.empty_like(matrix)
    apply = DERIVATIVE_INTO.get(f.name)

    def work(block: slice) -> None:
        if apply is None:
            np.multiply(f.derivative(matrix[block]), upstream[block], out=da[block])
        else:
            apply(matrix[block], da[block])
            np.multiply(da[block], upstream[block], out=da[block])
        if mask is not None:
            np.multiply(da[block], mask[block], out=da[block])

    over_blocks(work, len(matrix), matrix.shape[1])
    result = _back_from(da, a.shape, outer)
    if db is not None:
        accumulate_sum(result, db)
    return result


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


# The activations that training meets, without temporaries; the others run their bodies by blocks.
FORWARD_INTO: dict[str, Callable[[Array, Array], Any]] = {
    "softplus": _softplus_into, "sigmoid": _sigmoid_into, "tanh": np.tanh,
    "identity": _identity_into}
DERIVATIVE_INTO = {"softplus": _sigmoid_into, "tanh": _tanh_derivative_into}


# --- loss ---------------------------------------------------------------------------------------


@kernel
def softmax_cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    check_float("softmax_cross_entropy", logits)
    # Classes first, where the memory allows it: a reduction over few classes is then a few
    # passes over long rows instead of many short loops.
    classes = logits.reshape(-1, logits.shape[-1]).T
    q = classes - classes.max(axis=0)
    of_label = q[labels.reshape(-1), np.arange(labels.size)]
    np.exp(q, out=q)
    total = q.sum(axis=0)
    q /= total
    losses = np.log(total) - of_label
    return losses.reshape(labels.shape), q.T.reshape(logits.shape)


# --- optimizers ---------------------------------------------------------------------------------


@kernel
def sgd(p: Array, g: Array, lr: float, weight_decay: float, scale: float) -> None:
    check_float("sgd", p, g)

    def work(block: slice) -> None:
        step = g[block] * (lr * float(scale))
        if weight_decay:
            step += p[block] * (lr * weight_decay)
        p[block] -= step

    over_blocks(work, len(p))


@kernel
def momentum(p: Array, g: Array, v: Array, lr: float, mu: float, weight_decay: float,
             scale: float) -> None:
    check_float("momentum", p, g, v)
    scale = float(scale)

    def work(block: slice) -> None:
        velocity = v[block]
        velocity *= mu
        velocity += g[block] if scale == 1 else g[block] * scale
        if weight_decay:
            velocity += p[block] * weight_decay
        p[block] -= velocity * lr

    over_blocks(work, len(p))


@kernel
def adam(p: Array, g: Array, first: Array, second: Array, step: int, lr: float, beta1: float,
         beta2: float, eps: float, weight_decay: float, decoupled: bool, scale: float) -> None:
    check_float("adam", p, g, first, second)
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
def squared_norm(g: Array) -> np.float64:
    check_float("squared_norm", g)
    parts = []

    def work(block: slice) -> None:
        wide = g[block].astype(np.float64)
        parts.append((block.start, np.add.reduce(np.multiply(wide, wide, out=wide))))

    over_blocks(work, len(g))
    return np.float64(sum(part for _, part in sorted(parts)))  # the same sum in any thread order
