"""Deliberately wrong kernels: each must be caught by the comparison of kernel and body."""

import numpy as np
import pytest

from comet_np.backends import cupy_kernels, get_backend
from comet_np.functional.activations import activation, masked
from comet_np.functional.attention import AttentionCache
from comet_np.functional.loss import softmax_cross_entropy
from comet_np.functional.norm import Norm, NormCache

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
        "loss", "fits ? log_sum - (z[label] - top) : (T)NOT_A_NUMBER",
        "log_sum - (z[label] - top)", "label"),
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
