"""Sample arguments of every operation: for tests of kernels, for `comet-np check`, for benchmarks.

An operation has one function here, which yields its arguments for given sizes: first a typical call
of each size, then at the first few sizes all else that may make a difference, as every activation,
masks of every kind, ties, or what may be None.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, product
from typing import Any, NamedTuple

import numpy as np

from . import optim  # noqa: F401  (all operations shall be registered)
from .backends.cpu import BLOCK
from .backends.numpy_kernels import FEW_ROWS
from .functional.activations import ACTIVATIONS, activation, scaled
from .functional.attention import attention_forward
from .functional.hidden import HiddenCache
from .functional.linear import Linear, LinearCache
from .functional.loss import counted_labels
from .functional.norm import Norm, NormCache
from .functional.packing import pack_masks, unpacked
from .functional.routing import TIES
from .functional.tokens import TokenCache, TokenEmbedding
from .precision import FORMATS
from .rng import key, stream
from .tree import leaves, tree_map

Array = Any
Arguments = tuple[Any, ...]
Samples = Iterator[Arguments]


class Size(NamedTuple):
    """Leading axes, and features before and after a layer; elements of flat arrays: all of batch N.
    """

    batch: tuple[int, ...]
    N_in: int
    N: int

    @property
    def rows(self) -> int:
        return math.prod(self.batch)


MANY = 8 * BLOCK  # elements, from which on blocks are shared among threads
WIDE = 2001  # with LARGE rows: just past that number, in blocks that end raggedly
LARGE = MANY // WIDE + 2
VARIED = 3  # sizes at which all else is varied: one with no rows and one of two leading axes too
BATCHES = ((5,), (2, 3), (0,), (1,), (FEW_ROWS,), (FEW_ROWS + 1,), ())

# Odd sizes, empty batches, batches on both sides of the size where products change their memory
# order, one row and one column, sizes past the threshold of the threads.
LAYERS = [Size(batch, N_in, N) for N_in, N in ((7, 5), (1, 1), (9, 1), (33, 130))
          for batch in (*BATCHES, (LARGE,))] + [Size((LARGE,), 3, WIDE)]
PRODUCTS = [Size(batch, N_in, N) for N_in, N in ((7, 5), (1, 1), (33, 20))
            for batch in ((5,), (2, 3), (0,), (1,), ())]
ROWS = [Size(batch, 1, N) for N in (9, 1, 2, 100) for batch in BATCHES] + [
    Size((LARGE,), 1, WIDE)]
# Tokens the last leading axis, the width of a head, heads: few, one, many examples and heads to a
# block of the cache, products that must be cut into pieces, and so many blocks that threads run.
HEADS = [Size((2, 5), 3, 2), Size((0, 5), 3, 2), Size((2, 3, 4), 1, 1), Size((7,), 4, 3),
         Size((3, 1), 2, 1), Size((40, 33), 2, 3), Size((131,), 31, 2), Size((3, 182), 2, 3)]
CLASSES = [Size(batch, 1, C) for C in (10, 1, 2, 1000) for batch in BATCHES] + [
    Size((3,), 1, WIDE), Size((LARGE,), 1, WIDE)]
# Tokens the last leading axis, the vocabulary, the width: tokens that come often, and none twice.
TEXTS = [Size((2, 5), 7, 4), Size((0, 5), 7, 4), Size((2, 3, 4), 3, 2), Size((6,), 1, 3),
         Size((2, 0), 5, 3), Size((3, 1), 50, 33), Size((5, 60), 20, 9)]
FLAT = [Size((n,), 1, 1) for n in (7, 0, 1, BLOCK + 1, MANY + 1)]


class Draw:
    """Random arrays, the same at each run."""

    def __init__(self, name: str, dtype: str) -> None:
        self._dtype = dtype
        self.stream = stream(0, "samples", name, dtype)

    def normal(self, *shape: int) -> Array:
        return np.asarray(self.stream.standard_normal(shape), self._dtype)

    def mask(self, *shape: int) -> Array:
        return self.normal(*shape) > 0

    def linear(self, size: Size) -> Linear:
        return Linear(self.normal(size.N, size.N_in), self.normal(size.N))


def samples(name: str, dtype: str, sizes: Sequence[Size] | None = None) -> Samples:
    """Yield arguments for the operation called `name`: NumPy arrays, floats of this dtype.

    The first is a typical call of the first size. The default sizes are those of the tests.
    """
    make, usual = SAMPLES[name]
    return make(Draw(name, dtype), usual if sizes is None else sizes)


# --- what is done with them ---------------------------------------------------------------------


def map_arrays(change: Callable[[Array], Array], arguments: Arguments) -> Arguments:
    """Return the arguments with `change` applied to each array; what was one array stays one."""
    changed: dict[int, Array] = {}

    def leaf(value: Any) -> Any:
        if not hasattr(value, "dtype") or isinstance(value, np.generic):
            return value
        if id(value) not in changed:
            changed[id(value)] = change(value)
        return changed[id(value)]

    return tree_map(leaf, arguments)


def outcome(function: Callable[..., Any], arguments: Arguments,
            place: Callable[[Array], Array]) -> list[Array]:
    """Return all arrays that a function returns for its arguments, and these as it leaves them.

    `place` makes the copy of an array that the function is given.
    """
    arguments = map_arrays(place, arguments)
    return [leaf for leaf in leaves((function(*arguments), arguments)) if hasattr(leaf, "dtype")]


def alike(a: Array, b: Array) -> tuple[Array, Array]:
    """Return two outcomes that should be the same; a mask unpacked, if one of them has it so."""
    if a.dtype == bool:
        return a, unpacked(b, a.shape[-1]) if b.dtype == "uint8" else b
    return (unpacked(a, b.shape[-1]) if b.dtype == bool and a.dtype == "uint8" else a), b


def in_tf32(arguments: Arguments) -> bool:
    """Return whether a call's products are in TF32: a GPU rounds the operands as it likes."""
    return any(isinstance(value, str) and value == "tf32" for value in arguments)


def in_every_layout(arguments: Arguments) -> Samples:
    """Yield the arguments with their arrays in each memory layout, and in mixtures of them."""
    for layouts in LAYOUTS:
        yield map_arrays(partial(_laid_out, cycle(layouts)), arguments)


def _laid_out(layouts: Iterator[Callable[[Array], Array]], a: Array) -> Array:
    return next(layouts)(a)


def strided(a: Array) -> Array:
    """Return a copy of `a` whose elements lie apart in memory."""
    return np.stack([a, a], axis=-1)[..., 0]


def last_axis_first(a: Array) -> Array:
    """Return a copy of `a` in which the last axis is the outermost in memory."""
    return np.moveaxis(np.moveaxis(a, -1, 0).copy(), 0, -1) if a.ndim else a.copy()


def last_axes_swapped(a: Array) -> Array:
    """Return a copy of `a` in which the last two axes are swapped in memory."""
    return np.swapaxes(np.swapaxes(a, -1, -2).copy(), -1, -2) if a.ndim > 1 else a.copy()


def row_major(a: Array) -> Array:
    """Return a copy of `a` in C order."""
    return a.copy(order="C")


def column_major(a: Array) -> Array:
    """Return a copy of `a` in Fortran order."""
    return a.copy(order="F")


LAYOUTS: tuple[tuple[Callable[[Array], Array], ...], ...] = (
    (row_major,), (column_major,), (strided,), (last_axis_first,), (last_axes_swapped,),
    (row_major, column_major), (column_major, row_major, strided))

# --- the operations -----------------------------------------------------------------------------

SOFTPLUS, RELU = activation("softplus"), activation("relu")
# Every activation, and one of one's own.
EVERY_F = (*ACTIVATIONS.values(), scaled(activation("tanh"), 0.5))


def formats() -> list[str]:
    """Return the formats of products that can be had here."""
    return [name for name in FORMATS
            if name != "bfloat16" or importlib.util.find_spec("ml_dtypes")]


def positive(x: Array, a: Array) -> Array:
    """Return a mask that is a function of the pre-activation, as of a gate."""
    return a > 0


def _project(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        yield draw.normal(*size.batch, size.N_in), draw.normal(size.N, size.N_in)


def _linear_forward(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        yield draw.normal(*size.batch, size.N_in), draw.linear(size), None
    for size in sizes[:VARIED]:
        x, p = draw.normal(*size.batch, size.N_in), draw.linear(size)
        yield x, p._replace(bias=None), None
        for compute in formats():
            yield x, p, compute


def _linear_backward(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        x, dy = draw.normal(*size.batch, size.N_in), draw.normal(*size.batch, size.N)
        yield dy, LinearCache(x), draw.linear(size), draw.linear(size), None, True
    for size in sizes[:VARIED]:
        x, dy = draw.normal(*size.batch, size.N_in), draw.normal(*size.batch, size.N)
        p, g = draw.linear(size), draw.linear(size)
        yield dy, LinearCache(x), p, g, None, False
        yield dy, LinearCache(x), p, p, None, True  # the update itself
        yield (dy, LinearCache(x), p._replace(bias=None), g._replace(bias=None), None, True)
        for compute in formats():
            yield dy, LinearCache(x), p, g, compute, True


def _multiply(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        lead = size.batch[:1]
        yield draw.normal(*lead, size.N, size.N_in), draw.normal(*lead, size.N_in, size.N), None
    for size in sizes[:VARIED]:
        a, b = draw.normal(*size.batch, 4, size.N_in), draw.normal(*size.batch, size.N_in, size.N)
        yield a, b, None
        yield b.swapaxes(-1, -2), a.swapaxes(-1, -2), None
        for compute in formats():
            yield a, b, compute


def _hidden_forward(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        m = draw.mask(*size.batch, size.N)
        yield draw.normal(*size.batch, size.N_in), draw.linear(size), m, SOFTPLUS, None
    for size in sizes[:VARIED]:
        x, p, m = (draw.normal(*size.batch, size.N_in), draw.linear(size),
                   draw.mask(*size.batch, size.N))
        for f in EVERY_F:
            yield x, p, m, f, None
            yield x * 10 ** (4 * draw.normal(*x.shape).clip(-1, 1)), p, None, f, None
        for mask, bias in product((m, np.packbits(m, axis=-1), positive, None), (p.bias, None)):
            yield x, Linear(p.weight, bias), mask, activation("mish"), None
        for compute in formats():
            yield x, p, m, RELU, compute
    for f in (activation("gelu"), EVERY_F[-1]):
        m = draw.mask(*sizes[-1].batch, sizes[-1].N)
        yield draw.normal(*sizes[-1].batch, sizes[-1].N_in), draw.linear(sizes[-1]), m, f, None


def _hidden_backward(draw: Draw, sizes: Sequence[Size]) -> Samples:
    # The rectifier's derivative is exact, so that no rounding of it moves what `compute` rounds.
    for x, p, mask, f, compute in _hidden_forward(draw, sizes):
        a = draw.normal(*x.shape[:-1], len(p.weight))
        dh = draw.normal(*a.shape)
        m = mask(x, a) if callable(mask) else mask
        g = Linear(draw.normal(*p.weight.shape),
                   None if p.bias is None else draw.normal(*p.bias.shape))
        yield dh, HiddenCache(x, a, m), p, g, f, compute, True
    for size in sizes[:VARIED]:
        shape = (*size.batch, size.N)
        dh, p, g = draw.normal(*shape), draw.linear(size), draw.linear(size)
        cache = HiddenCache(draw.normal(*size.batch, size.N_in), draw.normal(*shape),
                            draw.mask(*shape))
        yield dh, cache, p, p, SOFTPLUS, None, True  # the update itself
        yield dh, cache, p, g, SOFTPLUS, None, False


def _kwta_mask(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        distinct, N = draw.normal(*size.batch, size.N), size.N
        ks = tuple(dict.fromkeys((max(1, N // 2), 1, max(1, N - 1), N)))
        for k in ks:
            yield distinct, k, "strict"
        for k, ties in product(ks, TIES):
            yield np.round(2 * distinct), k, ties
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1, -1, np.inf, 0.0, -np.inf, 1])
    rows = np.array([draw.stream.permutation(special) for _ in range(5)], draw.normal().dtype)
    for scores, k, ties in product((rows, np.full_like(rows, 0.5)), (1, 5, 9, 10), TIES):
        yield scores, k, ties


def _masked(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        shape = (*size.batch, size.N)
        yield draw.normal(*shape), draw.mask(*shape), activation("identity")
    for size in sizes[:VARIED]:
        c, m = draw.normal(*size.batch, size.N), draw.mask(*size.batch, size.N)
        for f in EVERY_F:
            yield c, m, f
        yield c, np.packbits(m, axis=-1), SOFTPLUS


def _unpack_masks(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for batch, _, N in sizes:
        for widths in (N, N), (N, 9, 16):
            yield pack_masks([draw.mask(*batch, width) for width in widths]), widths


def _norm(draw: Draw, size: Size) -> Norm:
    return Norm(draw.normal(size.N), draw.normal(size.N))


def _norm_forward(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        yield draw.normal(*size.batch, size.N), _norm(draw, size), 1e-5
    for size, eps in product(sizes[:VARIED], (1e-12, 1.0)):
        yield 3 + draw.normal(*size.batch, size.N), _norm(draw, size), eps


def _norm_backward(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for i, size in enumerate(sizes):
        # No outcome of the forward: of rows of two it leaves a dx that is rounding alone.
        cache = NormCache(draw.normal(*size.batch, size.N), abs(draw.normal(*size.batch, 1)))
        dy, p = draw.normal(*size.batch, size.N), _norm(draw, size)
        yield dy, cache, p, _norm(draw, size)
        if i < VARIED:
            yield dy, cache, p, p  # the update itself


def _attention(draw: Draw, sizes: Sequence[Size]) -> Samples:
    varied = [(causal, drops, compute) for causal, (drops, compute) in
              product((False, True), ((True, None), *((False, name) for name in formats())))]
    for i, ((*lead, T), d, heads) in enumerate(sizes):
        heads = min(heads, 3)  # of sizes that are meant for other operations
        usual = [(False, False, None), (True, False, None), (True, True, None)]
        for causal, drops, compute in usual + varied * (i < VARIED):
            qkv = draw.normal(*lead, T, 3 * heads * d)
            kept = draw.mask(*lead, heads, T, T) if drops else None
            yield qkv, heads, causal, kept if kept is None else kept / qkv.dtype.type(0.75), compute


def _attention_backward(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for qkv, heads, causal, F, compute in _attention(draw, sizes):
        y, cache = attention_forward.body(qkv, heads, causal, F)
        yield draw.normal(*y.shape), cache, heads, compute


def _tokens(draw: Draw, sizes: Sequence[Size]) -> Iterator[tuple[Array, TokenEmbedding, int]]:
    for i, ((*lead, T), V, D) in enumerate(sizes):
        for first in (0, 2)[:2 if i < VARIED else 1]:
            tokens = draw.stream.integers(0, V, (*lead, T), dtype="uint16" if first else "int64")
            yield tokens, TokenEmbedding(draw.normal(V, D), draw.normal(T + 3, D)), first


def _tokens_backward(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for tokens, g, first in _tokens(draw, sizes):
        yield draw.normal(*tokens.shape, g.tokens.shape[1]), TokenCache(tokens), g, first


def _check_token_range(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for tokens, p, _ in _tokens(draw, sizes):
        yield tokens, len(p.tokens)


IGNORED = -100


def _softmax_cross_entropy(draw: Draw, sizes: Sequence[Size]) -> Samples:
    def labels(size: Size) -> Array:
        return draw.stream.integers(0, size.N, size.batch)

    for size in sizes:
        yield 10 * draw.normal(*size.batch, size.N), labels(size), None, False
    for size in sizes[:VARIED]:
        yield 1e4 * draw.normal(*size.batch, size.N), labels(size).astype("uint16"), None, False
    for size in (*sizes[:VARIED], sizes[-1]):
        some = np.where(draw.mask(*size.batch), labels(size), IGNORED)
        for ignored, in_place in (IGNORED, False), (None, True), (IGNORED, True):
            yield (draw.normal(*size.batch, size.N), labels(size) if ignored is None else some,
                   ignored, in_place)


def _softmax_cross_entropy_gradient(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for logits, labels, ignored, in_place in _softmax_cross_entropy(draw, sizes):
        yield np.abs(logits), labels, -0.01, ignored, in_place


def _check_label_range(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for _, labels, ignored, _ in _softmax_cross_entropy(draw, sizes):
        if counted_labels(labels, ignored).any():  # there is no mean loss of none
            yield labels, int(labels.max()) + 1, ignored


def _dropout_factor(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        yield draw.normal(*size.batch, size.N), 0.1, key(0, "samples"), 3
    for size in sizes[:VARIED]:
        for rate, step in product((0.0, 0.5, 1 - 1e-12), (0, 2**40, np.array(7))):
            yield draw.normal(*size.batch, size.N), rate, key(1, "samples"), step


def _example_mask(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        yield draw.stream.permutation(size.rows), size.N, 0.5, key(0, "samples")
    for size, p in product(sizes[:VARIED], (0.0, 0.1, 1.0)):
        yield draw.stream.integers(0, 2**40, size.rows), size.N, p, key(1, "samples")


def _sgd(draw: Draw, sizes: Sequence[Size]) -> Samples:
    scales = 1.0, np.float64(0.3), np.float32("nan")
    for size, weight_decay, scale in product(sizes, (0.0, 0.1), scales):
        n = size.rows * size.N
        yield draw.normal(n), draw.normal(n), 0.01, weight_decay, scale


def _shrunk(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size, decay, penalty in product(sizes, (0.0, 0.1), (0.0, 0.3)):
        p = draw.normal(size.rows * size.N)
        p[::3] = 0
        yield draw.normal(p.size), p, decay, penalty


def _momentum(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for p, g, lr, weight_decay, scale in _sgd(draw, sizes):
        yield p, g, draw.normal(p.size), lr, 0.9, weight_decay, scale


def _adam(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for p, g, lr, weight_decay, scale in _sgd(draw, sizes):
        for step, decoupled in (1, False), (7, True):
            u = draw.normal(p.size)
            v = u**2 + draw.normal(p.size) ** 2  # at least the square of the first
            yield p, g, u, v, step, lr, 0.9, 0.999, 1e-8, weight_decay, decoupled, scale


def _squared_norm(draw: Draw, sizes: Sequence[Size]) -> Samples:
    for size in sizes:
        yield (draw.normal(size.rows * size.N),)


Make = Callable[[Draw, Sequence[Size]], Samples]
SAMPLES: dict[str, tuple[Make, Sequence[Size]]] = {
    "project": (_project, LAYERS),
    "linear_forward": (_linear_forward, LAYERS),
    "linear_backward": (_linear_backward, LAYERS),
    "multiply": (_multiply, PRODUCTS),
    "hidden_forward": (_hidden_forward, LAYERS),
    "hidden_backward": (_hidden_backward, LAYERS),
    "kwta_mask": (_kwta_mask, ROWS),
    "cap": (_kwta_mask, ROWS),
    "masked": (_masked, ROWS),
    "unpack_masks": (_unpack_masks, ROWS),
    "norm_forward": (_norm_forward, ROWS),
    "norm_backward": (_norm_backward, ROWS),
    "attention_forward": (_attention, HEADS),
    "attention_backward": (_attention_backward, HEADS),
    "tokens_forward": (_tokens, TEXTS),
    "tokens_backward": (_tokens_backward, TEXTS),
    "check_token_range": (_check_token_range, TEXTS),
    "softmax_cross_entropy": (_softmax_cross_entropy, CLASSES),
    "softmax_cross_entropy_gradient": (_softmax_cross_entropy_gradient, CLASSES),
    "check_label_range": (_check_label_range, CLASSES),
    "dropout_factor": (_dropout_factor, ROWS),
    "example_mask": (_example_mask, ROWS),
    "shrunk": (_shrunk, FLAT),
    "sgd": (_sgd, FLAT),
    "momentum": (_momentum, FLAT),
    "adam": (_adam, FLAT),
    "squared_norm": (_squared_norm, FLAT),
}
