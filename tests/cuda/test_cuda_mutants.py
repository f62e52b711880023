"""Deliberately wrong kernels: each must be caught by the comparison of kernel and body."""

import numpy as np
import pytest

from comet_np.backends import cupy_backend, get_backend
from comet_np.functional.activations import (
    activation,
    bias_activation_mask,
    bias_activation_mask_gradient,
)

from ..tolerances import assert_close
from .test_cuda_kernels import awkward_rows, check_cap, check_layer, compare, random

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
    "the bias of the first network for all": (
        "activation", "b[(long long)blockIdx.z * n + cell.i]", "b[cell.i]", "networks"),
    "the column sums of all networks in the first": (
        "activation", "out += ((long long)blockIdx.z * gridDim.y + blockIdx.y) * n;",
        "out += (long long)blockIdx.y * n;", "networks"),
    "masks as if their rows lay close": (
        "activation", "(blockIdx.z * rows + r) * pitch", "(blockIdx.z * rows + r) * 5",
        "networks"),
    "an index beyond a shared array": (
        "activation", "sums[threadIdx.y][threadIdx.x] = sum",
        "sums[threadIdx.y + 1][threadIdx.x] = sum", "layer"),
    "k + 1 winners": ("masks", "if (count > k) {", "if (count > k + 1) {", "cap"),
    "an element that two threads update": (
        "optimizer", "i += (long long)gridDim.x * blockDim.x)", "i += blockDim.x - 1)", "adam"),
    "a bad label that is followed": (
        "loss", "fits ? log_sum - (z[label] - top) : (T)NOT_A_NUMBER",
        "log_sum - (z[label] - top)", "label"),
}


def check(gpu, what):
    if what == "cap":
        check_cap(gpu, awkward_rows(1090, "float32")[:2], [500], ["index"])
    elif what == "layer":
        check_layer(gpu, "tanh", random(40, 33), "bool")
    elif what == "networks":
        bits = np.packbits(random(2, 40, 64) > 0, axis=-1)
        packed = gpu.asarray(bits)[..., :5]  # rows of 8 bytes
        b, s, f = random(2, 1, 33), random(2, 40, 33, seed=1), activation("tanh")
        on_device, db = gpu.asarray(s), gpu.asarray(b)
        x = bias_activation_mask(on_device, gpu.asarray(b), packed, f)[1]
        expected = bias_activation_mask.body(s, b, bits[..., :5], f)[1]
        assert_close(gpu.to_host(x), expected, "elementwise")
        bias_activation_mask_gradient(on_device, on_device, packed, f, db)
        bias_activation_mask_gradient.body(s, s, bits[..., :5], f, b)
        assert_close(gpu.to_host(db), b, "sum")
    elif what == "label":
        logits, labels = gpu.asarray(random(2, 3)), gpu.asarray(np.array([0, 3]))
        assert np.isnan(gpu.xp.asnumpy(gpu.softmax_cross_entropy(logits, labels)[0])[1])
    else:
        p, g, u, v = (random(700, seed=i) for i in range(4))
        compare(gpu, "adam", (p, g, u, v * v, 3, 0.1, 0.9, 0.999, 1e-8, 0.01, True, 1.0))


@pytest.mark.parametrize("what", sorted({what for *_, what in MUTANTS.values()}))
def test_the_right_kernels_pass(machine, what):
    check(get_backend("cupy"), what)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(machine, monkeypatch, mutant):
    file, right, wrong, what = MUTANTS[mutant]
    source = cupy_backend.source(file)
    assert right in source
    monkeypatch.setattr(cupy_backend, "source",
                        lambda asked: source.replace(right, wrong) if asked == file else None)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check(get_backend("cupy"), what)
    print(f"{mutant}: {str(caught.value).strip().splitlines()[0]}")
