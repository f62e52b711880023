"""Measures of masks against naive counting."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from comet_np import analysis
from comet_np.errors import UserError
from comet_np.functional.routing import log10_experts


def some_masks(draw, n=12, N=11):
    masks = draw.random((n, N)) < 0.4
    masks[3], masks[5] = masks[0], False
    return masks


def naive_overlap(one, other):
    sets = [set(np.flatnonzero(m)) for m in (one, other)]
    return len(sets[0] & sets[1]) / math.sqrt(max(len(sets[0]) * len(sets[1]), 1))


def test_overlaps_are_the_shares_of_common_neurons(draw):
    one, other = some_masks(draw), some_masks(draw)[:7]
    expected = [[naive_overlap(a, b) for b in other] for a in one]
    np.testing.assert_allclose(analysis.overlaps(one, other), expected, rtol=1e-6)


def test_cosines_of_inputs(draw):
    x = draw.standard_normal((5, 4))
    x[3] = 0
    expected = [[0 if 3 in (i, j) else x[i] @ x[j] / math.sqrt(x[i] @ x[i] * (x[j] @ x[j]))
                 for j in range(5)] for i in range(5)]
    np.testing.assert_allclose(analysis.cosines(x), expected, atol=1e-15)


@pytest.mark.parametrize("N", [3, 8, 11])
def test_mask_counts(draw, N):
    masks = draw.random((200, N)) < 0.2
    expected = Counter(m.tobytes() for m in masks)
    assert sorted(analysis.mask_counts(masks)) == sorted(expected.values())


def test_effective_number():
    assert analysis.effective_number([5, 5, 0, 5, 5]) == pytest.approx(4)
    assert analysis.effective_number([7]) == pytest.approx(1)
    p = [0.5, 0.25, 0.25]
    assert analysis.effective_number([2, 1, 1]) == pytest.approx(
        math.prod(q**-q for q in p))


def test_chao1():
    assert analysis.chao1([5, 4, 3]) == 3  # none seen once: none unseen
    assert analysis.chao1([1, 1, 1, 2, 2, 7]) == 6 + 3 * 2 / (2 * 3)
    assert analysis.chao1(np.ones(10)) == 10 * 11 / 2
    draw = np.random.default_rng(0)
    seen = np.bincount(draw.integers(0, 1000, 1500), minlength=1000)
    assert (seen > 0).sum() < 800
    assert analysis.chao1(seen) == pytest.approx(1000, rel=0.1)


def test_a_lower_bound_from_coincidences(draw):
    """Right in nearly all samples, and near if there are many coincidences."""
    p = np.arange(1, 501) / (500 * 501 / 2)
    true, order_2 = np.exp(-(p * np.log(p)).sum()), 1 / (p**2).sum()
    bounds = [analysis.least_effective_number(draw.multinomial(n, p)) for n in 50 * [60, 3000]]
    assert (np.array(bounds) < true).all()
    assert np.mean(np.array(bounds) < order_2) >= 0.95
    assert np.mean(bounds[1::2]) == pytest.approx(order_2, rel=0.05)
    none = analysis.least_effective_number(np.ones(200))
    assert none == pytest.approx(200 * 199 / 2 / -math.log(0.025))  # P(no coincidence) = 2.5 %
    assert analysis.least_effective_number([5]) == 1


def test_class_purity_reads_the_nearest_others():
    similarity = np.array([[9, 3, 2, 1], [3, 9, 1, 2], [4, 1, 9, 2], [4, 3, 4, 9.0]])
    labels = np.array([0, 0, 1, 1])
    assert analysis.nearest(similarity, 2).tolist() == [[1, 2], [0, 3], [0, 3], [0, 2]]
    assert analysis.class_purity(similarity, labels) == 2 / 4
    assert analysis.class_purity(similarity, labels, 2) == 4 / 8
    assert similarity[0, 0] == 9


@pytest.mark.parametrize(("N", "d"), [(7, 2), (6, 1), (5, 9)])
def test_a_linear_router_gives_no_more_masks_than_are_separable(draw, N, d):
    """Counted over many directions."""
    V = draw.standard_normal((N, d))
    x = draw.standard_normal((50_000, d))
    for k in range(1, N):
        scores = x @ V.T
        masks = scores > np.sort(scores, axis=1)[:, -k - 1, None]
        found = len(analysis.mask_counts(masks))
        bound = 10 ** analysis.log10_separable(N, k, d)
        expected = min(math.comb(N, k), 2 * sum(math.comb(N - 1, i) for i in range(d + 1)))
        assert found <= bound + 1e-6
        assert bound == pytest.approx(expected)


def test_the_bound_of_few_dimensions_is_far_below_all():
    assert analysis.log10_separable(3000, 300, 3) == pytest.approx(
        math.log10(2 * sum(math.comb(2999, i) for i in range(4))))
    assert analysis.log10_separable(1000, 100, 3072) == log10_experts(1000, 100)


def test_code_lengths_are_those_of_a_probability(draw):
    """Over all masks they add up to 1."""
    masks = some_masks(draw, 40, 6)
    every = np.array(list(itertools.product([False, True], repeat=6)))
    assert np.exp(-analysis.code_lengths(masks, every)).sum() == pytest.approx(1)


def test_a_tree_code_reaches_the_entropy_of_a_chain(draw):
    """m_i is m_{i-1}, flipped with probability q: entropy log 2 + (N - 1) H(q)."""
    n, N, q = 20_000, 12, 0.1
    flips = draw.random((n, N)) < q
    flips[:, 0] = draw.random(n) < 0.5
    masks = np.logical_xor.accumulate(flips, axis=1)[:, draw.permutation(N)]
    entropy = math.log(2) - (N - 1) * (q * math.log(q) + (1 - q) * math.log(1 - q))
    lengths = analysis.code_lengths(masks[::2], masks[1::2])
    assert lengths.mean() == pytest.approx(entropy, abs=5 * lengths.std() / (n / 2) ** 0.5)
    independent = N * math.log(2)
    assert entropy < 0.6 * independent


@pytest.mark.parametrize(("call", "message"), [
    (lambda m: analysis.overlaps(m, m[:, :2]), r"arrays \(n, N\) and \(m, N\)"),
    (lambda m: analysis.mask_counts(m.astype("uint8")), "bool arrays .* got an array of uint8"),
    (lambda m: analysis.class_purity(np.eye(3), [0, 1]), "n labels"),
    (lambda m: analysis.class_purity(np.eye(2), [0, 1], 2), "1 to n - 1 neighbours")])
def test_bad_arguments(draw, call, message):
    with pytest.raises(UserError, match=message):
        call(some_masks(draw))
