"""Deliberately wrong kernels: each must be caught by the comparison of kernel and body."""

import numpy as np
import pytest

from comet_np.backends import cupy_kernels, get_backend
from comet_np.errors import UserError
from comet_np.functional.activations import activation, masked
from comet_np.functional.attention import AttentionCache
from comet_np.functional.loss import softmax_cross_entropy
from comet_np.functional.norm import Norm, NormCache
from comet_np.functional.tokens import (
    TokenCache,
    TokenEmbedding,
    tokens_backward,
    tokens_forward,
)
from comet_np.samples import map_arrays

from ..tolerances import assert_close
from .test_cuda_kernels import (
    awkward_rows,
    check_cap,
    check_dropout,
    check_layer,
    check_nan,
    check_threshold,
    compare,
    random,
)

ADD_TIES = "if constexpr (WARPS > 1) __syncthreads();\n        for"
MAXIMUM = "__syncthreads();\n        for (int warp = 0; warp < WARPS; ++warp) x = slots[warp] >"
# File, the right text, the wrong text, and the check that must fail.
MUTANTS = {
    "no barrier in a sum of several warps": (
        "masks", "        __syncthreads();\n        x = 0;", "        x = 0;", "cap"),
    "one buffer for sums that follow one another": (
        "masks", "slots[turn][", "slots[0][", "cap"),
    "no barrier before the ties are added up": (
        "masks", ADD_TIES, ADD_TIES.replace("__syncthreads()", ""), "cap"),
    "no barrier in a column sum": (
        "activation", "    __syncthreads();\n    if (threadIdx.y", "    if (threadIdx.y", "layer"),
    "no barrier after Adam's rates": (
        "optimizer", "    __syncthreads();\n    const T factor", "    const T factor", "adam"),
    "a shuffle that leaves out half the warp": (
        "masks", "__shfl_xor_sync(ALL, x, step)", "__shfl_xor_sync(0xffffu, x, step)", "cap"),
    "a ballot that not all lanes reach": (
        "masks", "tied_lanes = __ballot_sync(ALL, is_tied)",
        "tied_lanes = is_tied ? __ballot_sync(ALL, true) : 0", "cap"),
    "a score too many at the end of a row": (
        "masks", "score[j] = j * WARP < held ?", "score[j] = j * WARP <= held ?", "cap"),
    "a mask element too many at the end of a row": (
        "masks", "if (mask && place < row.held)", "if (mask && place <= row.held)", "cap"),
    "a byte of bits too many": (
        "masks", "place / 8 < bytes_left", "place / 8 <= bytes_left", "cap"),
    "a row too many": (
        "activation", "for (; cell.r < rows; cell.r", "for (; cell.r <= rows; cell.r", "layer"),
    "masks as if their rows lay close": (
        "activation", "m += r * pitch", "m += r * 5", "masks"),
    "the pre-activation without its bias": (
        "activation", "a[at] = value += bias", "value += bias", "layer"),
    "an index beyond a shared array": (
        "activation", "sums[threadIdx.y][threadIdx.x] = sum",
        "sums[threadIdx.y + 1][threadIdx.x] = sum", "layer"),
    "k + 1 winners": ("masks", "if (count > k) {", "if (count > k + 1) {", "cap"),
    "an element that two threads update": (
        "optimizer", "i += (long long)gridDim.x * blockDim.x)", "i += blockDim.x - 1)", "adam"),
    "a bad label that is followed": (
        "loss", "of_label = NOT_A_NUMBER", "of_label = 0", "label"),
    "a bad label that is not told": (
        "loss", "if (counts && !fits)", "if (counts && fits)", "told label"),
    "the loss of an ignored label": (
        "loss", "counts ? log_sum - (of_label - top) : 0", "log_sum - (of_label - top)", "ignored"),
    "the gradient of an ignored label": (
        "loss", "ignores && label == ignored ? 0 : value", "value", "ignored gradient"),
    "a loss that overflows": ("loss", "q[r * C + i] = exp(z[i] - top - log_sum)",
                              "q[r * C + i] = exp(z[i]) / exp(top + log_sum)", "far loss"),
    "sums before a larger logit kept as they were": (
        "loss", "sum *= exp(top - value)", "sum *= 1", "ignored"),
    "the largest logit of one warp for that of the row": (
        "loss", "top = group_max<WARPS>(top)", "top = warp_max(top)", "long loss"),
    "sums of warps added as if they had one largest logit": (
        "loss", "sum * exp(mine - top)", "sum", "long loss"),
    "no barrier before the largest logit": (
        "loss", MAXIMUM, MAXIMUM.replace("__syncthreads();", ""), "long loss"),
    "a logit too many": (
        "loss", "i < C; i += STEP) {\n        const T value",
        "i <= C; i += STEP) {\n        const T value", "ignored"),
    "all texts one": ("tokens", "r % length * n", "r * n", "tokens"),
    "a bad token that is followed": ("tokens", "fits ? table", "true ? table", "bad token"),
    "a bad token that is not told": ("tokens", "if (!fits && i == 0)", "if (false)", "bad token"),
    "a bad token that is followed backwards": (
        "tokens", "if (token < 0 || token >= V) return;", "", "bad token"),
    "every place of a token adds up": (
        "tokens", "if (group_sum<WARPS_OF_BLOCK>(before, 0)) return;",
        "if (group_sum<WARPS_OF_BLOCK>(before, 0) > 1) return;", "tokens gradient"),
    "places of the first chunk alone": (
        "tokens", "start < rows; start += THREADS", "start < place + 1; start += THREADS",
        "tokens gradient"),
    "no barrier before the places are read": (
        "tokens", "        __syncthreads();\n", "", "tokens gradient"),
    "one list of places for all chunks": (
        "tokens", "turn = 1 - turn", "turn = 0", "tokens gradient"),
    "places of a chunk as if of the first warp": (
        "tokens", "start + warp * WARP + __ffs", "start + __ffs", "tokens gradient"),
    "a feature too many": (
        "tokens", "if (first + k * THREADS < n) dtable", "if (first + k * THREADS <= n) dtable",
        "tokens gradient"),
    "features of the first thread alone": (
        "tokens", "sums[k] += dx[r * n + first + k * THREADS]", "sums[k] += dx[r * n + first]",
        "tokens gradient"),
    "the row after the NaN's": (
        "masks", "(Place)row << 32", "(Place)(row + 1) << 32", "NaN"),
    "the place of a NaN in its warp alone": (
        "masks", "note_error(error, r, row.first + place)", "note_error(error, r, place)", "NaN"),
    "the same elements dropped at every step": (
        "dropout", "drawn(block, number(step_at, step), k0", "drawn(block, 0, k0", "dropout"),
    "the step as it was when the graph was recorded": (
        "dropout", "number(step_at, step), k0", "step, k0", "dropout"),
    "key words swapped": (
        "dropout", "number(step_at, step), k0, k1)", "number(step_at, step), k1, k0)", "dropout"),
    "one mask for all examples": ("dropout", "example[r], k0", "0, k0", "dropout"),
    "the place of an example for its number": ("dropout", "example[r], k0", "r, k0", "dropout"),
    "blocks counted from 0": ("dropout", "(Word)block + 1", "(Word)block", "dropout"),
    "the higher half of a word first": ("dropout", "32 * (i % 2)", "32 * (1 - i % 2)", "dropout"),
    "9 rounds": ("dropout", "round < 10", "round < 9", "dropout"),
    "the number at the rate dropped": ("dropout", ">= least", "> least", "threshold"),
    "the number at p kept": ("dropout", "< limit", "<= limit", "threshold"),
    "a factor too many": (
        "dropout", "WORDS * block + i < n) factor", "WORDS * block + i <= n) factor", "dropout"),
    "a norm without eps": ("norm", "/ n + eps)", "/ n)", "norm"),
    "a norm of what is not centred": (
        "norm", "value = (x[first + i] - mean) * scale", "value = x[first + i] * scale", "norm"),
    "a column too many in a norm": (
        "norm", "i < n; i += WARP) {\n        const T value",
        "i <= n; i += WARP) {\n        const T value", "norm"),
    "the gradient of a norm without its mean": (
        "norm", "gain[i] - mean - normed", "gain[i] - normed", "norm gradient"),
    "the gradient of a norm as if without gain": (
        "norm", "const T dn = dy[first + i] * gain[i]", "const T dn = dy[first + i]",
        "norm gradient"),
    "no barrier in the sums of a norm": (
        "norm", "    __syncthreads();\n    if (threadIdx", "    if (threadIdx", "norm gradient"),
    "the sums of one block of rows alone": (
        "norm", "for (int b = 0; b < blocks; ++b)", "for (int b = 0; b < 1; ++b)", "norm gradient"),
    "gain and bias taken for one another": (
        "norm", "i < n ? dgain", "i >= n ? dgain + i - n", "norm gradient"),
    "attention to the token after": (
        "attention", "r % n + 1", "r % n + 2", "attention"),
    "attention to all tokens": ("attention", "causal ? r % n + 1 : n", "n", "attention"),
    "scores that are not scaled": (
        "attention", "exp(s[first + j] * scale - top)", "exp(s[first + j] - top)", "attention"),
    "weights that are not dropped": (
        "attention", "w[first + j] = p * factor[first + j]", "w[first + j] = p", "attention"),
    "the weight of a token too many": (
        "attention", "j < n; j += WARP) {\n        const T p",
        "j <= n; j += WARP) {\n        const T p", "attention"),
    "scores that overflow": ("attention", "* scale - top)", "* scale)", "far attention"),
    "the gradient of weights that were dropped": (
        "attention", "dw[first + j] * kept - sum", "dw[first + j] - sum", "attention gradient"),
    "the gradient of weights without their sum": (
        "attention", "* kept - sum)", "* kept)", "attention gradient"),
    "the gradient of scores not scaled": (
        "attention", "scale * weight *", "weight *", "attention gradient"),
}


def check(gpu, what):
    if what == "cap":
        check_cap(gpu, awkward_rows(1090, "float32")[:2], [500], ["index"])
    elif what == "NaN":
        check_nan(gpu, 1100, 1099)
    elif what == "layer":
        check_layer(gpu, activation("tanh"), random(40, 33), "bool")
    elif what == "masks":
        bits = np.packbits(random(2, 20, 64) > 0, axis=-1)
        packed = gpu.asarray(bits)[..., :5]  # rows of 8 bytes
        c, f = random(2, 20, 33), activation("tanh")
        expected = masked.body(c, bits[..., :5], f)
        assert_close(gpu.to_host(masked(gpu.asarray(c), packed, f)), expected, "elementwise")
    elif what == "label":
        logits, labels = gpu.asarray(random(2, 3)), gpu.asarray(np.array([0, 3]))
        assert np.isnan(gpu.xp.asnumpy(softmax_cross_entropy(logits, labels)[0])[1])
    elif what == "told label":
        softmax_cross_entropy(*map(gpu.asarray, (random(2, 3), np.array([0, 3]))))
        with pytest.raises(UserError, match="label of example 1 is 3"):
            gpu.check_errors()
    elif what in ("ignored", "far loss", "long loss"):
        C, scale = (1100, 1) if what == "long loss" else (40, 300 if what == "far loss" else 1)
        compare(gpu, "softmax_cross_entropy", (random(3, C, scale=scale), np.array([-1, 3, 39]),
                                               -1, False))
    elif what == "ignored gradient":
        compare(gpu, "softmax_cross_entropy_gradient", (random(3, 40), np.array([-1, 3, 39]), 0.5,
                                                        -1, True))
    elif what == "tokens":
        compare(gpu, "tokens_forward", (TOKENS.reshape(3, 200), embedding_of(40)))
    elif what == "tokens gradient":
        compare(gpu, "tokens_backward", (random(3, 200, 300), TokenCache(TOKENS.reshape(3, 200)),
                                         embedding_of(300)))
    elif what == "bad token":
        tokens, p = gpu.asarray(np.array([0, 1, 7])), map_arrays(gpu.asarray, embedding_of(40))
        x, cache = tokens_forward(tokens, p)
        tokens_backward(x, cache, p)
        assert np.isnan(gpu.xp.asnumpy(x)).all(axis=-1).tolist() == [False, False, True]
        with pytest.raises(UserError, match="token 2 of the batch is 7, which is not in the voc"):
            gpu.check_errors()
    elif what == "dropout":
        check_dropout(gpu)
    elif what == "norm":
        compare(gpu, "norm_forward", (1e-2 * random(9, 40), norm_of(40), 1e-3))
    elif what == "norm gradient":
        cache = NormCache(random(300, 40, seed=1), abs(random(300, 1)))
        compare(gpu, "norm_backward", (random(300, 40), cache, norm_of(40), norm_of(40)))
    elif what in ("attention", "far attention"):
        qkv = random(2, 40, 12, scale=100 if what == "far attention" else 1)
        compare(gpu, "attention_forward", (qkv, 2, True, abs(random(2, 2, 40, 40))))
    elif what == "attention gradient":
        cache = AttentionCache(random(2, 40, 12), abs(random(2, 2, 40, 40)),
                               abs(random(2, 2, 40, 40, seed=1)))
        compare(gpu, "attention_backward", (random(2, 40, 4), cache, 2))
    elif what == "threshold":
        check_threshold(gpu)
    else:
        p, g, u, v = (random(700, seed=i) for i in range(4))
        compare(gpu, "adam", (p, g, u, v * v, 3, 0.1, 0.9, 0.999, 1e-8, 0.01, True, 1.0))


TOKENS = np.random.default_rng(0).integers(0, 7, 600)


def embedding_of(D):
    """Return the embedding of a vocabulary of 7, of texts of 200 tokens."""
    return TokenEmbedding(random(7, D, seed=2), random(200, D, seed=3))


def norm_of(D):
    """Return gain and bias of random numbers."""
    return Norm(random(D, seed=2), random(D, seed=3))


@pytest.mark.parametrize("what", sorted({what for *_, what in MUTANTS.values()}))
def test_the_right_kernels_pass(machine, what):
    check(get_backend("cupy"), what)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(machine, monkeypatch, mutant):
    file, right, wrong, what = MUTANTS[mutant]
    source = cupy_kernels.source(file)
    assert right in source
    monkeypatch.setattr(cupy_kernels, "source",
                        lambda asked: source.replace(right, wrong) if asked == file else None)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check(get_backend("cupy"), what)
    print(f"{mutant}: {str(caught.value).strip().splitlines()[0]}")
