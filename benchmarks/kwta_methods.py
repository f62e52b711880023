"""Three methods of the cap C_k on a GPU compared: ``python -m comet_np.benchmarks.kwta_methods``.

Bisection (``masks.cu``) against false position and a histogram (``kwta_methods.cu``), for strict
ties, float32 and a bool mask. Without a GPU, in a checkout with g++ and NVRTC (``pip
install nvidia-cuda-nvrtc``), it counts the instructions of a row: MARK(part) in the source becomes
an instruction without effect (PMTRIG) in the machine code for compute capability 9.0, and a
counter in the build for the CPU (``tests/cuda/shim.py``), which runs normal scores. A row issues
the sum over parts of instructions in the machine code x how often warps came there. With a GPU it
also measures times.

A multiprocessor issues 4 instructions of a warp per clock, and its load/store units take 1 shared
access, an atomic one as often as lanes meet in one bank (the conflict degree; lanes at the same
address are assumed to serialise too; only those with a lane active get there). Counted as taken
are, for 4 instructions each, the slow paths of divisions, and the histogram's branches around its
atomics. A copy of 5 bytes a score at the full bandwidth of an H100 (3.35 TB/s, 132 multiprocessors
at 1.755 GHz) leaves the time to issue 44 instructions a score.
"""

import argparse
import ctypes
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from ..backends import BackendError
from ..backends.cupy_backend import KERNELS, OPTIONS, WARP, cap_shape
from ..errors import UserError
from ..experiments.experiment import columns

Array = Any

METHODS = ("bisection", "false_position", "histogram")
SIZES = (512, 1024, 3072, 9216)
P_K = (0.1, 0.5, 0.9)
BINS = 256
STANDARD_ERRORS = 5.0  # of the k-th score: the width of the histogram's window

PARTS = ("LOAD", "NAN_NOTED", "START", "STEP", "WALK", "INTERPOLATE_COUNTS", "HALVE", "SPLIT",
         "NEIGHBOURS", "COUNT", "WRITE", "BIN", "SCAN", "SEEK", "HIT", "RESULT", "EDGE", "GATHER",
         "CHECK", "FOUND", "RANK", "COMPARE", "LOSER")
PASSES = ("COUNT", "BIN", "RANK")  # one each time the row's registers are gone over
BY_LANE = ("SEEK", "HIT", "CHECK", "FOUND")  # in branches that a lane takes for itself
# Where the parts of masks.cu begin: before or after these lines.
BEFORE = {"const Row<T, WARPS, ITEMS> row(": "LOAD", "mean = sum / n;": "START",
          "T threshold = guess;": "STEP", "float sum_reached = 0;": "COUNT",
          "guess = below + (above - below) / 2;": "HALVE", "const T tied = below;": "WRITE"}
AFTER = {"if (sum != sum) {  // a NaN, or infinities of both signs": "NAN_NOTED",
         "now and then makes any scores end.": "SPLIT", "// walk on towards rank k": "WALK"}
NO_MARKS = "#define MARK(part)\n"
GPU_MARKS = (f"enum Part {{ {', '.join(PARTS)} }};\n"
             '#define MARK(part) asm volatile("pmevent.mask %0;" :: "n"((int)(part) + 1));\n')
CPU_MARKS = f"""enum Part {{ {', '.join(PARTS)} }};
extern "C" {{ unsigned long long marks[{len(PARTS)}]; }}
UNWATCHED inline void mark(Part part) {{
    const bool by_lane = {' || '.join(f'part == {part}' for part in BY_LANE)};
    if (by_lane || shim_lane() == 0) ++marks[part];
}}
#define MARK(part) mark(part);
UNWATCHED inline int atomicAdd(int* at, int value) {{ return (*at += value) - value; }}
inline float __fdividef(float a, float b) {{ return a / b; }}
#define __syncwarp __syncthreads  // which the shim has, and which waits for more
"""
# Of an instruction of 128 bits, from compute capability 7.0: the opcode, its low 12 bits.
PMTRIG, EXIT, BARRIER, NOP = 0x801, 0x94D, 0xB1D, 0x918
ATOMICS = (0x38C, 0xF8C)  # ATOMS.ADD, ATOMS.POPC.INC


def source(marks: str = NO_MARKS) -> str:
    """Return the CUDA source of all three kernels; `marks` defines MARK."""
    common, masks, ours = (path.read_text(encoding="utf-8") for path in (
        KERNELS / "common.cuh", KERNELS / "masks.cu", Path(__file__).with_name("kwta_methods.cu")))
    bounds = "__launch_bounds__(block_warps(WARPS) * WARP, least_blocks<T, WARPS, ITEMS>())\n"
    changes = {f"__global__ void\n{bounds}kwta(": "__device__ inline void\nkwta("}
    changes |= {line: f"MARK({part}) {line}" for line, part in BEFORE.items()}
    changes |= {line: f"{line}\nMARK({part})" for line, part in AFTER.items()}
    for old, new in changes.items():
        assert masks.count(old) == 1, f"masks.cu no longer has one: {old}"
        masks = masks.replace(old, new)
    return marks + common + masks + ours


def kernel_name(method: str, N: int) -> str:
    """Return the kernel of a method for rows of N scores."""
    return "kwta_{}<{}, {}>".format(method, *cap_shape(N))


def launch(N: int, k: int, scores: Array, mask: Array,
           errors: Array) -> tuple[tuple[int], tuple[int], tuple[Any, ...]]:
    """Return grid, block and arguments of a kernel."""
    warps, _ = cap_shape(N)
    quantile, gap, window = spread(N, k)
    return (-(-len(scores) // max(1, 4 // warps)),), (max(4, warps) * WARP,), (
        scores, mask, np.int64(len(scores)), np.int32(N), np.int32(k), np.float32(quantile),
        np.float32(gap), np.float32(window), errors)


def spread(N: int, k: int) -> tuple[float, float, float]:
    """Return quantile and gap as masks.cu takes them, and the histogram's window."""
    if k == N:
        return 0.0, 0.0, 0.0
    p, normal = k / N, NormalDist()
    quantile = normal.inv_cdf(1 - p)
    density = normal.pdf(quantile)
    return quantile, 1.6 / (N * density), STANDARD_ERRORS * (p * (1 - p) / N) ** 0.5 / density


# --- instructions -------------------------------------------------------------------------------


class Code(NamedTuple):
    """Machine code by part: instructions, barriers and atomic ones; and how often MARK is there."""

    instructions: Counter[str]
    barriers: Counter[str]
    atomics: Counter[str]
    marks: Counter[str]


def machine_code(names: list[str], arch: int = 90) -> dict[str, Code]:
    """Return the machine code of kernels, by name, for sm_`arch`."""
    from tests.cuda import nvrtc

    library = nvrtc.library()
    if library is None:
        raise UserError("the instructions are counted in what NVRTC compiles: pip install "
                        "nvidia-cuda-nvrtc")
    program = nvrtc.Program(library, source(GPU_MARKS), names, f"--gpu-architecture=sm_{arch}")
    elf = program.result("CUBIN")
    return {name: by_part(section(elf, b".text." + program.mangled(name))) for name in names}


def section(elf: bytes, name: bytes) -> bytes:
    """Return a section of an ELF file of 64 bits."""
    table = int.from_bytes(elf[40:48], "little")
    size, count, names = np.frombuffer(elf, "<u2", 3, 58)
    headers = np.frombuffer(elf, "<u8", int(size) // 8 * int(count), table).reshape(count, -1)
    for header in headers:
        begin = int(headers[names, 3]) + int(header[0] & 0xFFFFFFFF)
        if elf[begin:elf.index(b"\0", begin)] == name:
            return elf[int(header[3]):int(header[3] + header[4])]
    raise AssertionError(f"no section {name!r}")


def by_part(code: bytes) -> Code:
    """Count machine code by part, in the order in which it lies in memory."""
    result = Code(Counter(), Counter(), Counter(), Counter())
    part: str | None = "LOAD"
    for word in np.frombuffer(code, "<u8")[::2].tolist():
        opcode = word & 0xFFF
        if opcode == PMTRIG:
            part = PARTS[(word >> 32 & 0xFFFF) - 1]
            result.marks[part] += 1
        elif part and opcode != NOP:
            result.instructions[part] += 1
            result.barriers[part] += opcode == BARRIER
            result.atomics[part] += opcode in ATOMICS
            if opcode == EXIT and word >> 12 & 15 == 7:  # by all; only slow paths lie beyond
                part = None
    return result


@functools.cache
def cpu_kernels() -> dict[str, Any]:
    """Return the kernels compiled for the CPU, by name."""
    from tests.cuda import shim

    if shim.GXX is None:
        raise UserError("how often a part runs is counted on the CPU: install g++")
    return shim.compiled(source(CPU_MARKS), tuple(
        kernel_name(method, N) for N in SIZES for method in METHODS))


def executed(method: str, scores: np.ndarray, k: int) -> Counter[str]:
    """Return how often warps came to each part, by really running the kernel on the CPU."""
    kernel = cpu_kernels()[kernel_name(method, scores.shape[1])]
    marks = (ctypes.c_ulonglong * len(PARTS)).in_dll(kernel._library, "marks")
    ctypes.memset(marks, 0, ctypes.sizeof(marks))
    mask, errors = np.empty(scores.shape, np.uint8), np.full(1, 2**64 - 1, np.uint64)
    kernel.launch(*launch(scores.shape[1], k, scores, mask, errors), False, 1)
    return Counter(dict(zip(PARTS, marks, strict=True)))


class Count(NamedTuple):
    """Means of a row.

    passes : over the registers, besides those for the moments and the mask.
    instructions : issued for a score (32 of them are one of a warp).
    barriers : of a warp.
    atomics : on shared memory, of a warp, for 32 scores.
    """

    passes: float
    instructions: float
    barriers: float
    atomics: float


def count(code: Code, runs: Counter[str], rows: int, N: int) -> Count:
    """Return what a row costs from machine code and executions by part."""
    def total(static: Counter[str]) -> float:
        return sum(static[part] * runs[part] / max(1, code.marks[part]) for part in static)

    warps = rows * cap_shape(N)[0]
    assert all(code.marks[part] for part, times in runs.items() if times)
    return Count(sum(runs[part] for part in PASSES) / warps,
                 total(code.instructions) * WARP / (rows * N), total(code.barriers) / warps,
                 total(code.atomics) * WARP / (rows * N))


def conflicts(scores: np.ndarray, k: int) -> tuple[float, float]:
    """Return the share of the histogram's atomics with any lane active, and their mean degree."""
    N = scores.shape[1]
    quantile, _, window = spread(N, k)
    mean, deviation = scores.mean(1, keepdims=True), scores.std(1, keepdims=True)
    bins = np.rint(((scores - mean) / deviation - quantile) * BINS / window + BINS / 2)
    lanes = bins.reshape(-1, WARP)
    active = (lanes >= 0) & (lanes < BINS)
    banks = np.where(active, lanes % WARP, WARP).astype(int)
    hits = np.zeros((len(lanes), WARP + 1), int)
    np.add.at(hits, (np.arange(len(lanes))[:, None], banks), 1)
    degree = hits[:, :WARP].max(1)
    return float((degree > 0).mean()), float(degree[degree > 0].mean())


def table(rows: int) -> str:
    """Return the counts of all sizes, shares and methods as a table."""
    lines = [["N, p_k, method", "passes", "instructions/score", "barriers", "atomics/32 scores",
              "of these active", "conflict degree"]]
    code = machine_code([kernel_name(method, N) for N in SIZES for method in METHODS])
    for N in SIZES:
        scores = np.random.default_rng(N).standard_normal((rows, N), dtype=np.float32)
        for p_k in P_K:
            share, degree = conflicts(scores, int(p_k * N))
            for method in METHODS:
                found = count(code[kernel_name(method, N)], executed(method, scores, int(p_k * N)),
                              rows, N)
                lines.append([f"{N}, {p_k}, {method}", f"{found.passes:.2f}",
                              f"{found.instructions:.1f}", f"{found.barriers:.1f}",
                              *(("-",) * 3 if method != "histogram" else (
                                  f"{found.atomics:.2f}", f"{share:.0%}", f"{degree:.2f}"))])
    return columns(lines)


# --- time ---------------------------------------------------------------------------------------


def times(numbers: int, seconds: float) -> str:
    """Return the times of the kernels on a GPU over that of a copy of the bytes they must move."""
    from .gpu_workers import PRESETS, copy, our_stopwatch

    backend, watch = our_stopwatch(PRESETS["full"]._replace(seconds=seconds))
    xp = backend.xp
    lines = [["N, p_k", "copy ms", *(f"{method}/copy" for method in METHODS)]]
    errors = xp.full(1, 2**64 - 1, dtype=np.uint64)
    for N in SIZES:
        scores = backend.asarray(np.random.default_rng(N).standard_normal(
            (max(1, numbers // N), N), dtype=np.float32))
        mask = xp.empty(scores.shape, dtype=bool)
        floor = watch.median_ms(copy(backend, 5 * scores.size))
        for p_k in P_K:
            arguments = launch(N, int(p_k * N), scores, mask, errors)
            ratios = [watch.median_ms(functools.partial(compiled(xp, method, N), *arguments))
                      / floor for method in METHODS]
            lines.append([f"{N}, {p_k}", f"{floor:.3f}", *(f"{ratio:.2f}" for ratio in ratios)])
    return f"{backend.describe()['device']}\n{columns(lines)}"


def compiled(xp: Any, method: str, N: int) -> Callable[..., None]:
    """Return a kernel compiled for the GPU."""
    name = kernel_name(method, N)
    return xp.RawModule(code=source(), options=OPTIONS, name_expressions=(name,)).get_function(name)


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=200,
                        help="rows of normal scores that are counted (default %(default)s)")
    options = parser.parse_args()
    try:
        print(table(options.rows))
    except (ImportError, UserError) as error:
        print(f"instructions not counted (a checkout, g++ and NVRTC are needed): {error}")
    try:
        print(times(2**28, 0.1))
    except BackendError as error:
        print(f"time not measured: {error}")


if __name__ == "__main__":
    main()
