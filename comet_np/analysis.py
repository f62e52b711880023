"""What masks say: how much they overlap, how many there are, and whether classes share them.

Masks are bool arrays (n, N), one row an example. Several layers are measured jointly side by side,
``concatenate(masks, axis=1)``.
"""

import math
from typing import Any

import numpy as np
from scipy.special import gammaincinv

from .backends import backend_of, xp_of
from .errors import UserError
from .functional.packing import pack_masks
from .functional.routing import log10_experts

Array = Any


def overlaps(one: Array, other: Array) -> Array:
    """Return the overlap of each mask (n, N) with each other (m, N): float32 (n, m).

    ``|m and m'| / sqrt(|m| |m'|)``: the cosine of the two, and where k neurons win in both the
    share of the active neurons that they have in common. Unrelated masks share p_k on average. An
    empty mask shares nothing.
    """
    _check(one, other)
    xp = xp_of(one)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise UserError("each mask with each needs arrays (n, N) and (m, N), got "
                        f"{one.shape} and {other.shape}")
    # Sums of ones are exact in float32.
    both = one.astype("float32") @ other.astype("float32").T
    of_one, of_other = (xp.maximum(m.sum(axis=-1), 1).astype("float32") for m in (one, other))
    return both / xp.sqrt(of_one[:, None] * of_other)


def cosines(x: np.ndarray) -> np.ndarray:
    """Return the cosine of each input (n, N_0) with each other, (n, n); of zeros it is 0."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(x.dtype).tiny)
    found: np.ndarray = unit @ unit.T
    return found


def mask_counts(masks: Array) -> np.ndarray:
    """Return how often each distinct mask of (n, N) occurs: int64 (distinct,), on the host."""
    _check(masks)
    bits = np.ascontiguousarray(backend_of(masks).to_host(pack_masks([masks])))
    rows = bits.view(np.dtype((np.void, max(bits.shape[1], 1))))[:, 0]
    return np.unique(rows, return_counts=True)[1].astype("int64")


def effective_number(counts: Any) -> float:
    """Return how many equally frequent kinds have the entropy of these counts.

    ``exp(-sum_i p_i log p_i)``,  ``p_i = counts_i / sum(counts)``

    Of masks take `mask_counts`, of neurons the column sums. Of n masks it is n at most, however
    many there would be in more: see `least_effective_number` and `code_lengths`.
    """
    counts = np.asarray(counts, np.float64)
    p = counts[counts > 0] / counts.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def least_effective_number(counts: Any) -> float:
    """Return a lower bound, with 95 % confidence, on the effective number of as many as one likes.

    Of n drawn, c of the ``n (n - 1) / 2`` pairs coincide. Their share estimates ``sum_i p_i^2``,
    and ``1 / sum_i p_i^2`` is at most the exp of the entropy; c is taken at the upper limit of the
    Poisson law, so that no coincidence at all is 3.7 of them.
    """
    counts = np.asarray(counts, np.float64)
    n, coincident = counts.sum(), (counts * (counts - 1)).sum() / 2
    return float(max(1.0, n * (n - 1) / 2 / gammaincinv(coincident + 1, 0.975)))


def chao1(counts: Any) -> float:
    """Return Chao's lower estimate of how many distinct kinds there are, seen or unseen.

    ``S + f_1 (f_1 - 1) / (2 (f_2 + 1))`` with S kinds seen, f_1 of them once and f_2 twice (Chao
    1984, without bias). If all of n are distinct it is ``n (n + 1) / 2``, which says that the
    sample is too small, not how many there are.
    """
    counts = np.asarray(counts)
    once, twice = (int((counts == times).sum()) for times in (1, 2))
    return float((counts > 0).sum() + once * (once - 1) / (2 * (twice + 1)))


def class_purity(similarity: Array, labels: Any, neighbours: int = 1) -> float:
    """Return the share of the nearest others that are of an example's own class.

    Parameters
    ----------
    similarity : array (n, n)
        As `overlaps` of masks with themselves, or any other measure; the diagonal is not read.
    labels : int array (n,)
    neighbours : int
        How many of the nearest count, of equal ones those that come first.
    """
    n = len(labels)
    if similarity.shape != (n, n) or not 1 <= neighbours < n:
        raise UserError("class purity needs the similarity of n examples with each other (n, n), n "
                        f"labels and 1 to n - 1 neighbours, got {similarity.shape}, {n} and "
                        f"{neighbours}")
    labels = backend_of(similarity).asarray(np.asarray(labels))
    return float((labels[nearest(similarity, neighbours)] == labels[:, None]).mean())


def nearest(similarity: Array, neighbours: int) -> Array:
    """Return the indices of each row's most similar others, the nearest first: int (n, K)."""
    xp = xp_of(similarity)
    others = similarity.copy()
    xp.fill_diagonal(others, -math.inf)
    return xp.argsort(-others, axis=1, kind="stable")[:, :neighbours]


def log10_separable(N: int, k: int, dimensions: int) -> float:
    """Return log10 of a bound on the masks of k winners of N that a linear router can give.

    ``min(C(N, k), 2 sum_{i=0}^{d} C(N - 1, i))`` where the inputs span d dimensions: a mask is a
    set of routing weights that a threshold on V x separates from the others, and of N points in d
    dimensions no more sets are separable (Cover 1965). Inputs in d dimensions around a mean span
    d + 1. It holds for the first layer, whose scores are linear in x.
    """
    logs = np.array([log10_experts(N - 1, i) for i in range(min(dimensions, N - 1) + 1)])
    total = logs.max() + math.log10((10 ** (logs - logs.max())).sum())
    return min(log10_experts(N, k), math.log10(2) + total)


def code_lengths(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return how many nats each of `others` (m, N) takes in the best tree code for `masks` (n, N).

    ``-log q(m)``, where ``q(m) = prod_i q(m_i | m_parent(i))`` over the tree of neurons of most
    mutual information (Chow and Liu 1968), its probabilities counted in `masks` with 1/2 added to
    each cell. If `masks` and `others` are independent samples of one law, the mean length is at
    least its entropy, whatever the law: exp of it bounds the effective number of masks in as many
    examples as there may be, not only in those at hand.
    """
    _check(masks, others)
    n, N = masks.shape
    ones = masks.astype("float32")
    active = ones.sum(axis=0, dtype="float64")  # (N,)
    both = (ones.T @ ones).astype("float64")  # (N, N)
    # cells[a][b][j, i]: how often neuron j is a and neuron i is b
    cells = ((n - active[:, None] - active + both + 0.5, active - both + 0.5),
             (active[:, None] - both + 0.5, both + 0.5))
    total = n + 2.0
    p = (n - active + 1) / total, (active + 1) / total
    information = np.zeros((N, N))
    for a in range(2):
        for b in range(2):
            q = cells[a][b] / total
            information += q * np.log(q / (p[a][:, None] * p[b]))
    parent = _tree(information)
    i = np.flatnonzero(parent >= 0)  # all but the root
    logs = np.array([[np.log(cells[a][b][parent[i], i] / (p[a][parent[i]] * total))
                      for b in range(2)] for a in range(2)])
    code = 2 * others[:, parent[i]].astype("int8") + others[:, i]  # (m, N - 1)
    lengths = np.zeros(len(others))
    for cell, of_cell in enumerate(logs.reshape(4, len(i))):
        lengths -= (code == cell) @ of_cell
    root = np.flatnonzero(parent < 0)[0]
    return lengths - np.where(others[:, root], np.log(p[1][root]), np.log(p[0][root]))


def _tree(weights: np.ndarray) -> np.ndarray:
    """Return the parent of each node in the spanning tree of most weight, -1 of the root, 0."""
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree  # takes a moment

    lowest = minimum_spanning_tree(weights.max() + 1 - weights)  # an edge of 0 would be none
    return np.maximum(breadth_first_order(lowest, 0, directed=False)[1], -1)


def _check(*masks: Any) -> None:
    backend_of(*masks)
    for m in masks:
        if m.dtype != bool or m.ndim == 0:
            raise UserError("masks are bool arrays (..., N), got an array of "
                            f"{m.dtype} of shape {m.shape}: see comet_np.unpack_masks for bits")
