"""What the CPU kernels stand on: threads over blocks, the processor's name, freed memory kept."""

import ctypes
import math
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from pathlib import Path

BLOCK = 1 << 16  # elements a block: with its temporaries it stays in L2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@cache
def _cpuinfo() -> dict[str, str]:
    """Return what Linux tells of the first core; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().partition("\n\n")[0].splitlines() if file.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":")
                                                               for line in lines)}


def processor() -> str:
    """Return the processor's name as far as the system tells it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def kind() -> str:
    """Return what tells kinds of one name apart: family, model, and whether it has AVX-512."""
    told = _cpuinfo()
    if "flags" not in told:
        return "unknown"
    avx512 = "with" if "avx512f" in told["flags"].split() else "without"
    return f"family {told.get('cpu family')}, model {told.get('model')}, {avx512} AVX-512"


@cache
def threads() -> int:
    """Return how many threads to use: OMP_NUM_THREADS if set, else the usable cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one a nested level
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return cores()


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_memory() -> float:
    """Return how many bytes of memory this machine has; infinity where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return math.inf


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
    # In each thread numbers that are not finite are met as here: NumPy's errstate is a context.
    others = [_pool().submit(copy_context().run, drain) for _ in range(threads() - 1)]
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
