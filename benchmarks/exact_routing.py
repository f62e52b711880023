"""Exact routing against the paper's: ``python -m comet_np.benchmarks.exact_routing``.

Routes random rows by NumPy, PyTorch and JAX, in float32 and float64, and prints how many have other
masks than NumPy's in float32, with `gates.Comet()` and with `gates.Comet(exact=True)`; the same of
rows whose first scores are equal but for rounding; what exact routing costs in time; and how much
of the masks the two routers share.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..backends import get_backend
from ..experiments.experiment import columns
from ..functional.routing import grid_bits, winners
from ..gates import Comet
from ..rng import stream

Array = Any
Router = Callable[[np.ndarray, Sequence[np.ndarray], Comet], list[np.ndarray]]
BLOCK = 10_000  # rows at once
LEVELS = 0.1, 0.5, 0.9  # p_k
WIDTHS = 100, 500, 1000, 3000
ODD = 0.5  # p_k of which k of 250 is odd, so that the last of the winners is one of a pair


def by_numpy(x: np.ndarray, V: Sequence[np.ndarray], gate: Comet) -> list[np.ndarray]:
    """Return the masks of rows x by ours."""
    return list(gate.trace(x, tuple(V)).m)


def by_pytorch(x: np.ndarray, V: Sequence[np.ndarray], gate: Comet) -> list[np.ndarray]:
    """Return the same, strict, as one would write it in PyTorch."""
    import torch

    z, masks = torch.from_numpy(x), []
    for V_l in map(torch.from_numpy, V):
        N, N_in = V_l.shape
        if gate.exact:
            bits = grid_bits(N_in).z
            top = z.abs().amax(-1, keepdim=True)
            unit = torch.ldexp(torch.ones_like(top),
                               torch.frexp(top).exponent.clamp(-100, 100) - bits)
            z = (z / unit).round().clamp(1 - 2**bits, 2**bits - 1) * unit
        c, k = z @ V_l.T, winners(gate.p_k, N)
        m = c > c.sort().values[:, N - k - 1, None] if k < N else c == c
        masks.append(m.numpy())
        z = c * m
    return masks


def by_jax(x: np.ndarray, V: Sequence[np.ndarray], gate: Comet) -> list[np.ndarray]:
    """Return the same, strict, as one would write it in JAX."""
    import jax
    import jax.numpy as jnp

    def masks(z: Array, V: Sequence[Array]) -> list[Array]:
        found = []
        for V_l in V:
            N, N_in = V_l.shape
            if gate.exact:
                bits = grid_bits(N_in).z
                top = jnp.abs(z).max(-1, keepdims=True)
                unit = jnp.ldexp(jnp.ones_like(top),
                                 jnp.clip(jnp.frexp(top)[1], -100, 100) - bits)
                z = jnp.clip(jnp.round(z / unit), 1 - 2**bits, 2**bits - 1) * unit
            c, k = z @ V_l.T, winners(gate.p_k, N)
            found.append(c > jnp.sort(c)[:, N - k - 1, None] if k < N
                         else jnp.ones(c.shape, bool))
            z = c * found[-1]
        return found

    with jax.enable_x64(x.dtype == np.float64):
        return list(map(np.asarray, jax.jit(masks)(x, list(V))))


def routers() -> Iterator[tuple[str, Router, str]]:
    """Yield name, router and dtype of all that can be had here but the first, NumPy's in float32.
    """
    yield "NumPy float64", by_numpy, "float64"
    for name, package, router in (("PyTorch", "torch", by_pytorch), ("JAX", "jax", by_jax)):
        if find_spec(package):
            for dtype in "float32", "float64":
                yield f"{name} {dtype}", router, dtype


def rows_that_differ(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> int:
    """Return of how many rows the mask of some layer differs."""
    differs = [(a != b).any(axis=-1) for a, b in zip(ours, theirs, strict=True)]
    return int(np.any(differs, axis=0).sum())


def with_ties(x: np.ndarray, V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and weights of which each score comes twice, summed in opposite order."""
    half, pairs = x.shape[1] // 2, len(V) // 2
    x, V = x.copy(), V.copy()
    x[:, -half:] = x[:, :half][:, ::-1]
    V[-pairs:] = V[:pairs, ::-1]
    return x, V


def disagreement(N: int, rows: int, p_k: float) -> list[list[str]]:
    """Return a table: of how many rows a router has other masks than NumPy in float32."""
    gates = Comet(p_k), Comet(p_k, exact=True)
    drawn = [gate.init((N, N, N, N, 1), 0, get_backend("numpy"), "float32") for gate in gates]
    counts = {name: [0] * 4 for name, *_ in routers()}
    for start in range(0, rows, BLOCK):
        shape = min(BLOCK, rows - start), N
        random = stream(0, "rows", start).standard_normal(shape, dtype="float32")
        for i, (tied, gate) in enumerate(itertools.product((False, True), gates)):
            x, V = random, list(drawn[i % 2])
            if tied:
                x, V[0] = with_ties(x, V[0])
            ours = by_numpy(x, V, gate)
            for name, router, dtype in routers():
                theirs = router(x.astype(dtype), [V_l.astype(dtype) for V_l in V], gate)
                counts[name][i] += rows_that_differ(ours, theirs)
    return [["masks unlike NumPy float32", "plain", "exact", "of ties: plain", "exact"],
            *([name, *(f"{n:,}" for n in found)] for name, found in counts.items())]


def cost(widths: Sequence[int], batch: int, repeats: int = 7) -> list[str]:
    """Return the time of exact routing over that of the paper's, and the masks that they share."""
    x = stream(0, "rows").standard_normal((batch, widths[0]), dtype="float32")
    row = ["-".join(map(str, widths)), str(batch)]
    for p_k in LEVELS:
        gates = Comet(p_k), Comet(p_k, exact=True)
        V = [gate.init((*widths, 1), 0, get_backend("numpy"), "float32") for gate in gates]
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            for i, gate in enumerate(gates):
                started = time.perf_counter()
                gate.trace(x, V[i])
                times[i].append(time.perf_counter() - started)
        masks = zip(*(by_numpy(x, V[i], gate) for i, gate in enumerate(gates)), strict=True)
        shared = " ".join(f"{(a & b).sum() / a.sum():.3f}" for a, b in masks)
        row += [f"{min(times[1]) / min(times[0]):.2f}", shared]
    return row


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows routed by each router")
    parser.add_argument("--width", type=int, default=250, help="neurons in each of three layers")
    options = parser.parse_args()
    print(f"{options.rows:,} rows, three layers of {options.width}, p_k = {ODD}")
    print(columns(disagreement(options.width, options.rows, ODD)))
    print("\ntime exact/plain, and the share of plain's winners that win in exact, layer by layer")
    head = [text for p_k in LEVELS for text in (f"time, p_k {p_k}", "winners")]
    print(columns([["widths", "batch", *head], *(
        cost((3072, N, N, N), batch) for N in WIDTHS for batch in (32, 1000))]))


if __name__ == "__main__":
    main()
