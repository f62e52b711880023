"""What is measured of a training step, COMET and standard: time, parts, memory, bare products.

The workers of a benchmark say what their models, PyTorch's step and the maps of a step are.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..backends import OPERATIONS, get_backend
from ..backends.cpu import keep_freed_memory, over_blocks
from ..experiments.training import RunConfig
from ..gates import Comet
from ..models.mixer import MixerConfig
from .cpu_workers import active, median_ms, our_step, peak_mib

Call = Callable[[], Any]
Work = Callable[[str, int, float], dict[str, float]]  # of a model, batch size, seconds a timing

P_K = 0.5
GATES = {"comet": Comet(P_K, "threshold"), "standard": None}  # ties as in the published code
PAGE = 4 / 1024  # MiB: what a peak grows by at least, if it does
STEPS = 3  # of a process whose memory or whose parts are measured


def works(run_of: Callable[[str, str], RunConfig], torch_step: Callable[..., Any],
          maps: Callable[[Any, int], Iterable["Map"]], imports: Call,
          clock: Callable[[Call, float], float] = median_ms) -> dict[str, Work]:
    """Return the works of a benchmark of training steps, by name.

    Parameters
    ----------
    run_of : of a model's name and a kind of `GATES`, its run
    torch_step : of a run, a batch size and what makes something of the network, PyTorch's
        parameters or network, its optimizer, and its step
    maps : of a model's configuration and a batch size, the products of a step
    imports : imports all that PyTorch's step needs
    clock : returns the ms of a call, measured for some seconds
    """
    def our(model: str, kind: str, B: int) -> Call:
        step: Call = our_step(run_of(model, kind), B, False)[1]
        return step

    def theirs(model: str, kind: str, B: int, *made: Callable[[Any], Any]) -> Call:
        torch_threads()
        step: Call = torch_step(run_of(model, kind), B, *made)[2]
        return step

    def ours(model: str, B: int, seconds: float) -> dict[str, float]:
        keep_freed_memory()
        return {kind: clock(our(model, kind, B), seconds) for kind in GATES}

    def pytorch(model: str, B: int, seconds: float) -> dict[str, float]:
        return {kind: clock(theirs(model, kind, B), seconds) for kind in GATES}

    def compiled(kind: str, model: str, B: int, seconds: float) -> dict[str, float]:
        import torch

        return {"step": clock(theirs(model, kind, B, torch.compile), seconds)}

    def products(model: str, B: int, seconds: float) -> dict[str, float]:
        return {kind: clock(bare_products(maps(run_of(model, kind).model, B)), seconds)
                for kind in GATES}

    def parts(model: str, B: int, seconds: float) -> dict[str, float]:
        keep_freed_memory()
        return {f"{kind} {name}": ms for kind in GATES
                for name, ms in parts_of(our(model, kind, B)).items()}

    def memory_ours(kind: str, model: str, B: int, seconds: float) -> dict[str, float]:
        keep_freed_memory()
        return memory(lambda: our(model, kind, B))

    def memory_pytorch(kind: str, model: str, B: int, seconds: float) -> dict[str, float]:
        imports()
        return memory(lambda: theirs(model, kind, B))

    plain: dict[str, Work] = {work.__name__: work for work in (ours, pytorch, products, parts)}
    return plain | {f"{work.__name__}_{kind}": functools.partial(work, kind)
                    for work in (memory_ours, memory_pytorch, compiled) for kind in GATES}


def answer(works: dict[str, Work]) -> None:
    """Print what the work that the command line names returns: the whole of a worker's process."""
    from .processes import end_with_the_parent

    end_with_the_parent()
    name, model, B, seconds = sys.argv[1:]
    print(json.dumps(works[name](model, int(B), float(seconds))))


def parts_of(step: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds that a step spends in each operation itself, and elsewhere."""
    kernels, spent, within = get_backend("numpy").kernels, dict.fromkeys(OPERATIONS, 0.0), [0.0]

    def timed(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            within.append(0.0)
            started = time.perf_counter()
            result = kernel(*arguments, **keywords)
            took = time.perf_counter() - started
            spent[name] += took - within.pop()
            within[-1] += took
            return result
        return call

    def body(body: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        return body(*arguments, **keywords)

    step()
    before = dict(kernels)
    kernels.update({name: timed(name, kernels.get(name, body)) for name in OPERATIONS})
    try:
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        whole = time.perf_counter() - started
    finally:
        kernels.clear()
        kernels.update(before)
    spent["elsewhere"] = whole - within[0]
    return {name: 1e3 * took / STEPS for name, took in spent.items() if took}


def memory(prepare: Callable[[], Call]) -> dict[str, float]:
    """Return the peak memory of this process that trains, and what of it training took."""
    before = peak_mib()
    step = prepare()
    for _ in range(STEPS):
        step()
    return {"peak MiB": peak_mib(), "growth MiB": max(peak_mib() - before, PAGE)}


# --- the bare products --------------------------------------------------------------------------


class Map(NamedTuple):
    """Products ``y = W x`` of `pairs` of matrices, x (rows, N_in) and W (N_out, N_in).

    products : 3 with dx and dW, as of the scores Q K^T and of the mean P V of attention too; 2
        without dx; 1 for y alone, as of the routing.
    """

    pairs: int
    rows: int
    N_in: int
    N_out: int
    products: int


def maps_of_blocks(config: Any, T: int, B: int) -> Iterator[Map]:
    """Yield the maps of all blocks, of B examples of T tokens, in the order of the forward pass."""
    D = config.width
    for across, one in zip(config.across, config.mlps, strict=True):
        if not isinstance(config, MixerConfig):
            heads, d = config.heads, D // config.heads
            yield Map(1, B * T, D, 3 * D, 3)
            yield Map(B * heads, T, d, T, 3)
            yield Map(B * heads, T, T, d, 3)
            yield Map(1, B * T, D, D, 3)
        n, (N, H, _) = B * (D if across else T), one.widths
        if config.gate is not None:
            yield Map(1, n, N, H, 1)
        yield Map(1, n, N, H, 3)
        yield Map(1, n, H, N, 3)


def bare_products(wanted: Iterable[Map]) -> Callable[[], None]:
    """Return a call of all products of these maps, forward and backward, in the order of a step.

    Each has its own operands. Maps by SciPy's BLAS, the many small ones of attention by NumPy's,
    both as our kernels do.
    """
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype="float32")

    forward: list[Callable[[], Any]] = []
    backward: list[Callable[[], Any]] = []
    for pairs, rows, N_in, N_out, passes in wanted:
        if pairs == 1:
            x, W, dy = draw(rows, N_in), draw(N_out, N_in), draw(rows, N_out)
            y, dx, dW = _gemm(x, W.T, 0.0), _gemm(dy, W, 0.0), _gemm(dy.T, x, 1.0)
        else:  # row-major operands, which NumPy's likes best
            y, dx, dW = (_matmul(draw(pairs, M, K), draw(pairs, K, N)) for M, K, N in (
                (rows, N_in, N_out), (rows, N_out, N_in), (N_out, rows, N_in)))
        forward.append(y)
        backward = [dx, dW][3 - passes:][:passes - 1] + backward
    calls = forward + backward

    def step() -> None:
        for call in calls:
            call()

    return step


def _gemm(a: np.ndarray, b: np.ndarray, beta: float) -> Callable[[], Any]:
    """Return a call that writes a b, or adds it for beta = 1, into a row-major matrix."""
    from scipy.linalg.blas import sgemm

    (left, trans_a), (right, trans_b) = ((one, 0) if one.flags.f_contiguous else (one.T, 1)
                                         for one in (b.T, a.T))
    out = np.zeros((len(a), b.shape[1]), "float32").T
    return functools.partial(sgemm, 1.0, left, right, beta=beta, c=out, trans_a=trans_a,
                             trans_b=trans_b, overwrite_c=1)


def _matmul(a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
    """Return a call that writes the products of two stacks, shared among the threads."""
    out = np.empty((*a.shape[:-1], b.shape[-1]), "float32")

    def work(block: slice) -> None:
        np.matmul(a[block], b[block], out=out[block])

    return functools.partial(over_blocks, work, len(out), out[0].size)


# --- PyTorch ------------------------------------------------------------------------------------


def torch_threads() -> None:
    """Give PyTorch as many threads as the environment says."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def torch_winners(x: Any, V: Any) -> Any:
    """Return the mask of a straightforward COMET, as numbers: topk of the scores, and >=."""
    import torch
    from torch.nn import functional as F

    with torch.no_grad():
        c = F.linear(x, V)
        kth = torch.topk(c, active(len(V), P_K), dim=-1).values[..., -1:]
        return (c >= kth).to(c.dtype)
