"""Sample arguments of every operation that backends may override by a kernel.

They cover odd sizes, empty batches, batches on both sides of the size where products change their
memory order, sizes past the threshold of the threads, ties, leading axes, and every memory layout.
"""

from itertools import cycle, product

import numpy as np

from comet_np.backends.numpy_backend import BLOCK, FEW_ROWS
from comet_np.functional.activations import ACTIVATIONS, activation
from comet_np.functional.routing import TIES, pack_masks
from comet_np.rng import key, stream

MANY = 8 * BLOCK  # elements, from which on blocks are shared among threads
BATCHES = ((0,), (1,), (5,), (FEW_ROWS,), (FEW_ROWS + 1,), (), (2, 3))
SIDE_BY_SIDE = ((3, 5), (1, 1), (2, 0), (5, 5), (2, FEW_ROWS + 1))  # networks, examples of each
WIDE = 2001  # with MANY // WIDE + 2 rows: just past the threshold, in blocks that end raggedly
LARGE = MANY // WIDE + 2


def strided(a):
    """Return a copy of `a` whose elements lie apart in memory."""
    return np.stack([a, a], axis=-1)[..., 0]


def last_axis_first(a):
    """Return a copy of `a` in which the last axis is the outermost in memory."""
    return np.moveaxis(np.moveaxis(a, -1, 0).copy(), 0, -1) if a.ndim else a.copy()


def last_axes_swapped(a):
    """Return a copy of `a` in which the last two axes are swapped in memory."""
    return np.swapaxes(np.swapaxes(a, -1, -2).copy(), -1, -2) if a.ndim > 1 else a.copy()


def row_major(a):
    """Return a copy of `a` in C order."""
    return a.copy(order="C")


def column_major(a):
    """Return a copy of `a` in Fortran order."""
    return a.copy(order="F")


LAYOUTS = ((row_major,), (column_major,), (strided,), (last_axis_first,), (last_axes_swapped,),
           (row_major, column_major), (column_major, row_major, strided))


def in_every_layout(arguments):
    """Yield the arguments with their arrays in each memory layout, and in mixtures of them."""
    for layouts in LAYOUTS:
        layout = cycle(layouts)
        yield tuple(next(layout)(a) if isinstance(a, np.ndarray) else a for a in arguments)


def samples(name, dtype):
    """Yield tuples of arguments for the operation called `name`, floats of this dtype."""
    draw = stream(0, "samples", name, dtype)

    def normal(*shape):
        return np.asarray(draw.standard_normal(shape), dtype)

    for arguments in SAMPLES[name](normal, draw):
        yield from in_every_layout(arguments)


def _project(normal, draw):
    yield from _layers(normal)
    yield normal(5, 7), normal(3, 4, 7)  # networks side by side that share their examples


def _layers(normal):
    """Yield x and W of single layers, and of those of networks side by side."""
    for batch, (N_in, N) in product((*BATCHES, (LARGE,)), ((7, 5), (1, 1), (33, 130))):
        yield normal(*batch, N_in), normal(N, N_in)
    for (S, B), (N_in, N) in product(SIDE_BY_SIDE, ((7, 5), (33, 130))):
        yield normal(S, B, N_in), normal(S, N, N_in)


def _project_back(normal, draw):
    for x, W in _layers(normal):
        yield x @ W.swapaxes(-1, -2), W


def _accumulate_outer(normal, draw):
    for x, W in _layers(normal):
        yield normal(*x.shape[:-1], W.shape[-2]), x, W


def _accumulate_sum(normal, draw):
    for batch, N in product(BATCHES, (1, 5, 130)):
        yield normal(*batch, N), normal(N)
    yield normal(LARGE, WIDE), normal(WIDE)
    for (S, B), N in product(SIDE_BY_SIDE, (1, 5, 130)):
        yield normal(S, B, N), normal(S, 1, N)


def _scores(normal, draw):
    """Yield scores: distinct, many ties, all equal, zeros of both signs and infinities."""
    for batch, N in product(BATCHES, (1, 2, 9, 100)):
        yield normal(*batch, N)
        yield np.round(normal(*batch, N))
    yield np.round(normal(LARGE, WIDE) * 100)
    yield np.full_like(normal(3, 10), 0.5)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1, -1, np.inf, 0.0, -np.inf, 1])
    yield np.array([draw.permutation(special) for _ in range(5)], normal().dtype)


def _kwta_mask(normal, draw):
    for scores in _scores(normal, draw):
        N = scores.shape[-1]
        for k, ties in product(sorted({1, max(1, N // 2), max(1, N - 1), N}), TIES):
            yield scores, k, ties


def _unpack_masks(normal, draw):
    for batch, widths in product((0, 1, 5, FEW_ROWS, FEW_ROWS + 1), ((8,), (1, 9, 16), (130, 3))):
        yield pack_masks([normal(batch, N) > 0 for N in widths]), widths
    yield pack_masks([normal(2, 5, 9) > 0]), (9,)


def _activation_arguments(normal, draw):
    """Yield s or a, b, m and f: every activation, and every combination of what may be None."""
    for f, batch in product(ACTIVATIONS.values(), ((0,), (5,), (2, 3))):
        yield normal(*batch, 7), normal(7), normal(*batch, 7) > 0, f
        magnitudes = 10 ** (4 * normal(*batch, 7).clip(-1, 1))
        yield magnitudes * np.sign(normal(7)), normal(7), None, f
    softplus = activation("softplus")
    for batch, N, with_b, with_m in product(BATCHES, (1, 130), (True, False), (True, False)):
        s = normal(*batch, N)
        yield s, normal(N) if with_b else None, normal(*batch, N) > 0 if with_m else None, softplus
    for (S, B), N in product(SIDE_BY_SIDE, (5, 130)):
        yield normal(S, B, N), normal(S, 1, N), normal(S, B, N) > 0, softplus
        packed = np.packbits(normal(S, B, N) > 0, axis=-1)
        yield normal(S, B, N), normal(S, 1, N), packed, activation("tanh")
        yield normal(B, N), normal(N), packed[0], activation("mish")
    for name in ("softplus", "gelu", "0.5*tanh"):
        s = 3 * normal(LARGE, WIDE)
        yield s, normal(WIDE), normal(*s.shape) > 0, activation(name)


def _bias_activation_mask_gradient(normal, draw):
    for a, db, m, f in _activation_arguments(normal, draw):
        yield normal(*a.shape), a, m, f, db


def _softmax_cross_entropy(normal, draw):
    for batch, C in product(BATCHES[1:], (1, 2, 10, 1000)):  # the mean of no losses is undefined
        yield 10 * normal(*batch, C), draw.integers(0, C, batch)
    yield normal(LARGE, WIDE), draw.integers(0, WIDE, LARGE, dtype="uint16")
    yield normal(3, 10) * 1e4, np.array([0, 9, 5])


def _softmax_cross_entropy_gradient(normal, draw):
    for logits, labels in _softmax_cross_entropy(normal, draw):
        yield np.abs(logits), labels, -0.01


def _check_label_range(normal, draw):
    for batch in BATCHES[1:]:
        yield draw.integers(0, 10, batch), 10


def _dropout_factor(normal, draw):
    for batch, rate in product(BATCHES, (0.0, 0.1, 0.5)):
        yield normal(*batch, 7), rate, key(0, "dropout")


def _flat(normal, draw):
    for n in (0, 1, 7, BLOCK + 1, MANY + 1):
        yield normal(n), normal(n)


def _sgd(normal, draw):
    for (p, g), weight_decay, scale in product(_flat(normal, draw), (0.0, 0.1),
                                               (1.0, np.float64(0.3))):
        yield p, g, 0.01, weight_decay, scale


def _momentum(normal, draw):
    for p, g, lr, weight_decay, scale in _sgd(normal, draw):
        yield p, g, normal(p.size), lr, 0.9, weight_decay, scale


def _adam(normal, draw):
    for p, g, lr, weight_decay, scale in _sgd(normal, draw):
        for step, decoupled in (1, False), (7, True):
            yield (p, g, normal(p.size), normal(p.size) ** 2, step, lr, 0.9, 0.999, 1e-8,
                   weight_decay, decoupled, scale)


def _squared_norm(normal, draw):
    for p, _ in _flat(normal, draw):
        yield (p,)


SAMPLES = {
    "project": _project,
    "project_back": _project_back,
    "accumulate_outer": _accumulate_outer,
    "accumulate_sum": _accumulate_sum,
    "kwta_mask": _kwta_mask,
    "kwta_bits": _kwta_mask,
    "unpack_masks": _unpack_masks,
    "bias_activation_mask": _activation_arguments,
    "bias_activation_mask_gradient": _bias_activation_mask_gradient,
    "softmax_cross_entropy": _softmax_cross_entropy,
    "softmax_cross_entropy_gradient": _softmax_cross_entropy_gradient,
    "check_label_range": _check_label_range,
    "dropout_factor": _dropout_factor,
    "sgd": _sgd,
    "momentum": _momentum,
    "adam": _adam,
    "squared_norm": _squared_norm,
}
