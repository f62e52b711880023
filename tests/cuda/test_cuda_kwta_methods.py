"""The other methods of the cap on the GPU: their masks, and what their comparison rests on."""

from types import SimpleNamespace

import numpy as np
import pytest

from comet_np.backends.cupy_backend import cap_shape
from comet_np.benchmarks import kwta_methods
from comet_np.benchmarks.kwta_methods import METHODS, PARTS, SIZES
from comet_np.functional.routing import kwta_mask

from . import nvrtc, shim, strict_cupy

LIBRARY = nvrtc.library()
needs_gxx = pytest.mark.skipif(shim.GXX is None, reason="g++ compiles the kernels for the CPU, and "
                                                        "is not installed")
needs_nvrtc = pytest.mark.skipif(LIBRARY is None, reason="needs NVRTC: pip install "
                                                         "nvidia-cuda-nvrtc")
SMALL = (2, 9, 33, 250)  # besides SIZES


@pytest.fixture(scope="module")
def kernels():
    """Return all kernels of the methods by name, for the CPU, without their marks."""
    marks = kwta_methods.CPU_MARKS.replace("#define MARK(part) mark(part);", kwta_methods.NO_MARKS)
    return shim.compiled(kwta_methods.source(marks), tuple(sorted({
        kwta_methods.kernel_name(method, N) for N in (*SMALL, *SIZES) for method in METHODS})))


def awkward_rows(N):
    """Return rows of N scores that a method may get wrong."""
    rng = np.random.default_rng(N)
    normal = rng.normal(size=N)
    one_bin = np.where(np.arange(N) % 2, 1e4 * normal, 1 + 1e-6 * rng.integers(0, 5, N))
    rows = [normal, np.round(normal), np.zeros(N), np.full(N, -np.inf), np.full(N, 1e38),
            np.where(rng.random(N) < 0.5, 0.0, -0.0), np.where(normal > 0, normal, -0.0),
            np.where(rng.random(N) < 0.3, rng.choice([-np.inf, np.inf], N), normal), one_bin,
            1e-45 * rng.integers(-3, 4, N), np.exp(3 * normal), 7 + np.abs(normal)]
    return np.array(rows).astype(np.float32)


def check(kernels, scores, ks, watch=True):
    N = scores.shape[1]
    for k in ks:
        expected = kwta_mask.body(scores, k)
        for method in METHODS:
            mask = np.full(scores.shape, 7, np.uint8)
            errors = np.full(1, 2**64 - 1, np.uint64)
            kernels[kwta_methods.kernel_name(method, N)].launch(
                *kwta_methods.launch(N, k, scores, mask, errors), watch, k)
            np.testing.assert_array_equal(mask, expected, f"{method}, {N = }, {k = }")


@needs_gxx
@pytest.mark.parametrize("N", SMALL[:3])
def test_masks_for_every_k(kernels, N):
    check(kernels, awkward_rows(N), range(1, N + 1))


@needs_gxx
@pytest.mark.parametrize("N", SMALL[3:] + SIZES)
def test_masks_of_every_size(kernels, N):
    check(kernels, awkward_rows(N)[[0, 8]], [N // 3])
    check(kernels, awkward_rows(N), [1, N // 10, N // 2, N - 1, N], False)


@needs_gxx
def test_a_nan_is_noted():
    kernels = kwta_methods.cpu_kernels()
    for method in METHODS:
        scores = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
        scores[1, 40] = np.nan
        mask, errors = np.empty(scores.shape, np.uint8), np.full(1, 2**64 - 1, np.uint64)
        kernels[kwta_methods.kernel_name(method, 512)].launch(
            *kwta_methods.launch(512, 99, scores, mask, errors), False, 1)
        assert divmod(int(errors[0]), 2**32) == (1, 40)


@needs_nvrtc
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills(arch):
    names = [kwta_methods.kernel_name(method, N) for N in SIZES for method in METHODS]
    found = nvrtc.compile_kernels(LIBRARY, kwta_methods.source(), names, arch)
    for name, resources in found.items():
        print(f"sm_{arch} {name:35} {resources}")
        assert resources.spilled == 0, f"{name} spills {resources.spilled} bytes on sm_{arch}"


@pytest.fixture(scope="module")
def counts():
    """Return what each method costs, by N and p_k and method, from 30 normal rows."""
    if shim.GXX is None or LIBRARY is None:
        pytest.skip("needs g++ and NVRTC")
    names = [kwta_methods.kernel_name(method, N) for N in SIZES for method in METHODS]
    code, found = kwta_methods.machine_code(names), {}
    for N in SIZES:
        scores = np.random.default_rng(N).standard_normal((30, N), dtype=np.float32)
        for p_k in kwta_methods.P_K:
            for method in METHODS:
                runs = kwta_methods.executed(method, scores, int(p_k * N))
                found[N, p_k, method] = kwta_methods.count(
                    code[kwta_methods.kernel_name(method, N)], runs, 30, N)
                assert runs["LOAD"] == runs["START"] == 30 * cap_shape(N)[0]
                assert runs["LOAD"] == runs["WRITE"] + runs["EDGE"]
                assert set(runs) == set(PARTS) and runs["NAN_NOTED"] == 0
    return found


def test_order_of_the_methods(counts):
    """What masks.cu says: bisection is the best for short rows, and near the best for long ones."""
    for N in SIZES:
        for p_k in kwta_methods.P_K:
            bisection, false_position, histogram = (counts[N, p_k, method] for method in METHODS)
            assert 1 <= histogram.passes < 2 < false_position.passes < 8
            assert histogram.atomics == pytest.approx(1, abs=0.1) and not bisection.atomics
            assert bisection.instructions < 1.12 * false_position.instructions
            assert bisection.instructions < 1.18 * histogram.instructions
            if N != 3072:  # where the two are close
                assert (bisection.instructions < histogram.instructions) == (N < 3072)


def test_instructions_are_those_of_the_machine_code():
    """A word of 128 bits counts by its opcode; only what all threads leave ends the code."""
    def word(opcode, mark=0, guard=7):
        return np.array([opcode | guard << 12 | mark << 32, 0], "<u8").tobytes()

    code = kwta_methods.by_part(
        word(0x224) + word(0x94D, guard=0) + word(0x801, PARTS.index("COUNT") + 1) + word(0xB1D)
        + word(0xF8C) + word(0x918) + word(0x94D) + word(0x224))
    assert +code.instructions == {"LOAD": 2, "COUNT": 3} and code.marks["COUNT"] == 1
    assert +code.barriers == {"COUNT": 1} and +code.atomics == {"COUNT": 1}


def test_conflicts_of_a_known_row():
    """With k = N / 2 the window of 256 bins lies around the mean, and a bin's bank is bin % 32."""
    scores = np.where(np.arange(1024) % 2, 1e3, -1e3)[None]  # all outside
    scores[0, :4] = [0, 0, 0, 32 * kwta_methods.spread(1024, 512)[2] / 256 * scores.std()]
    scores[0, 4:7] -= scores.sum() / 3  # the mean is 0
    share, degree = kwta_methods.conflicts(scores, 512)
    assert (share, degree) == (1 / 32, 4)


@needs_gxx
def test_times_on_the_stand_in(monkeypatch, capsys):
    monkeypatch.setattr(kwta_methods, "SIZES", (512,))
    marks = kwta_methods.CPU_MARKS.replace("#define MARK(part) mark(part);", kwta_methods.NO_MARKS)
    monkeypatch.setattr(strict_cupy, "shim", SimpleNamespace(
        kernel=lambda code, name: shim.kernel(kwta_methods.source(marks), name)))
    with strict_cupy.strict_cupy() as machine:
        machine.watch = False
        lines = kwta_methods.times(1024, 0.0).splitlines()
    assert len(lines) == 5 and all(float(number) > 0 for number in lines[-1].split()[2:])
