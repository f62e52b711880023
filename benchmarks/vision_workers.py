"""What the benchmark of vision models measures: ``...vision_workers WORK MODEL B SECONDS``.

Each work prints one line of JSON: milliseconds a training step, or MiB, by COMET and standard.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..backends import OPERATIONS, get_backend
from ..backends.cpu import keep_freed_memory, over_blocks
from ..experiments.training import RunConfig, TrainConfig
from ..gates import Comet
from ..models import module_of
from ..models.mixer import MixerConfig
from ..models.vit import ViTConfig
from ..optim import OptimizerConfig
from ..tree import leaves, tree_map
from .cpu_workers import LR, active, batch, median_ms, our_step, peak_mib

Config = ViTConfig | MixerConfig

MODELS: dict[str, Config] = {
    "vit-512": ViTConfig(), "vit-3072": ViTConfig(hidden=3072), "mixer-512": MixerConfig(),
    "vit-512-no-dropout": ViTConfig(dropout=0.0, hidden_dropout=0.0),
    "vit-tiny": ViTConfig(patch=8, width=16, depth=2, heads=2, hidden=24),
    "mixer-tiny": MixerConfig(patch=8, width=16, depth=2, token_hidden=24, hidden=20)}
P_K = 0.5
GATES = {"comet": Comet(P_K, "threshold"), "standard": None}
PAGE = 4 / 1024  # MiB: what a peak grows by at least, if it does
STEPS = 3  # of a process whose memory or whose parts are measured


def run_of(model: str, kind: str, precision: str = "float32") -> RunConfig:
    """Return a run of a model, COMET or standard; ties as in the published code."""
    return RunConfig(replace(MODELS[model], gate=GATES[kind]),
                     TrainConfig(OptimizerConfig("adam"), precision=precision))


def ours(model: str, B: int, seconds: float) -> dict[str, float]:
    """Time our training step."""
    keep_freed_memory()
    return {kind: median_ms(our_step(run_of(model, kind), B, False)[1], seconds)
            for kind in GATES}


def parts(model: str, B: int, seconds: float) -> dict[str, float]:
    """Time each operation of our training step, those that it calls not counted, and the rest."""
    keep_freed_memory()
    return {f"{kind} {name}": ms for kind in GATES
            for name, ms in parts_of(our_step(run_of(model, kind), B, False)[1]).items()}


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


def memory_ours(kind: str, model: str, B: int, seconds: float) -> dict[str, float]:
    """Return the peak memory of a process that trains our model, and what of it training took."""
    keep_freed_memory()
    return _memory(lambda: our_step(run_of(model, kind), B, False)[1])


def memory_pytorch(kind: str, model: str, B: int, seconds: float) -> dict[str, float]:
    """Return the same of PyTorch's, eager."""
    import torch

    _torch_threads()
    torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True)  # imports its compiler
    return _memory(lambda: torch_step(run_of(model, kind), B)[2])


def _memory(prepare: Callable[[], Callable[[], Any]]) -> dict[str, float]:
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


def maps(config: Config, B: int) -> Iterator[Map]:
    """Yield all maps of a training step, in the order of the forward pass."""
    D, T = config.width, config.tokens
    C, rows, columns = config.image
    patch = config.patch**2
    yield Map(1, B * rows * columns // patch, patch * C, D, 2)
    for across, one in zip(config.across, config.mlps, strict=True):
        if isinstance(config, ViTConfig):
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
    yield Map(1, B, D, config.classes, 3)


def products(model: str, B: int, seconds: float) -> dict[str, float]:
    """Time the bare matrix products of our step, each of its own operands.

    Maps by SciPy's BLAS, the many small ones of attention by NumPy's, both as our kernels do.
    """
    return {kind: median_ms(bare_products(list(maps(run_of(model, kind).model, B))), seconds)
            for kind in GATES}


def bare_products(wanted: list[Map]) -> Callable[[], None]:
    """Return a call of all products of these maps, forward and backward, in the order of a step."""
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


def pytorch(model: str, B: int, seconds: float) -> dict[str, float]:
    """Time PyTorch's training step, eager."""
    _torch_threads()
    return {kind: median_ms(torch_step(run_of(model, kind), B)[2], seconds) for kind in GATES}


def compiled(kind: str, model: str, B: int, seconds: float) -> dict[str, float]:
    """Time the same under torch.compile; the optimizer is fused anyway."""
    import torch

    _torch_threads()
    step = torch_step(run_of(model, kind), B, torch.compile)[2]
    return {"step": median_ms(step, seconds)}


def _torch_threads() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def torch_step(run: RunConfig, B: int, made: Callable[[Any], Any] = lambda network: network,
               device: str = "cpu", **of_adam: Any) -> tuple[Any, Any, Callable[[], Any]]:
    """Return PyTorch's parameters, a tree as ours with the same numbers, its Adam and its step.

    `made` makes what runs of the network. The step returns the loss, a tensor.
    """
    import torch
    from torch.nn import functional as F

    config, dtype = run.model, run.training.formats.master
    initial, fixed = module_of(config).init(config, run.seed, dtype=dtype)
    params = tree_map(lambda p: torch.tensor(p, device=device, requires_grad=True), initial)
    form = torch_vit if isinstance(config, ViTConfig) else torch_mixer
    network = made(form(params, tree_map(lambda V: torch.tensor(V, device=device), fixed), config))
    optimizer = torch.optim.Adam(list(leaves(params)), lr=LR, fused=True, **of_adam)
    images, labels = batch(B)
    x = torch.tensor(images.astype(dtype), device=device)
    y = torch.tensor(labels, device=device)

    def step() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return params, optimizer, step


def torch_vit(p: Any, V: Any, config: ViTConfig) -> Callable[[Any], Any]:
    """Return the published ViT as a function of flat images, its queries, keys, values one map."""
    import torch
    from torch.nn import functional as F

    D, heads = config.width, config.heads

    def drop(x: Any) -> Any:
        return F.dropout(x, config.dropout) if config.dropout else x

    def network(x: Any) -> Any:
        x = F.linear(torch_patches(x, config), *p.embedding.patches)  # (B, T - 1, D)
        x = torch.cat([p.embedding.token.expand(len(x), 1, D), x], dim=1) + p.embedding.positions
        x = drop(x)
        B, T, _ = x.shape
        for block, V_l in zip(p.blocks, V, strict=True):
            y = F.layer_norm(x, (D,), *block.attention_norm)
            qkv = F.linear(y, *block.attention.qkv).view(B, T, 3, heads, D // heads)
            y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (B, heads, T, d)
            y = F.linear(y.transpose(1, 2).reshape(B, T, D), *block.attention.out)
            x = x + drop(y)
            y = F.layer_norm(x, (D,), *block.mlp_norm)
            x = x + drop(torch_mlp(y, block.mlp, V_l, config))
        return F.linear(F.layer_norm(x[:, 0], (D,), *p.norm), *p.head)

    return network


def torch_mixer(p: Any, V: Any, config: MixerConfig) -> Callable[[Any], Any]:
    """Return the published MLP-Mixer likewise."""
    from torch.nn import functional as F

    D = config.width

    def network(x: Any) -> Any:
        x = F.linear(torch_patches(x, config), *p.patches)  # (B, T, D)
        for branch, V_l, across in zip(p.branches, V, config.across, strict=True):
            y = F.layer_norm(x, (D,), *branch.norm)
            if across:
                y = torch_mlp(y.transpose(1, 2), branch.mlp, V_l, config).transpose(1, 2)
            else:
                y = torch_mlp(y, branch.mlp, V_l, config)
            x = x + y
        return F.linear(F.layer_norm(x, (D,), *p.norm).mean(dim=1), *p.head)

    return network


def torch_patches(x: Any, config: Config) -> Any:
    """Return the patches (B, T, P P C) of flat images, as `comet_np.functional.patches` does."""
    (C, rows, columns), P = config.image, config.patch
    cells = x.view(-1, C, rows // P, P, columns // P, P)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(len(x), -1, P * P * C)


def torch_mlp(x: Any, p: Any, V: Any, config: Config) -> Any:
    """Return the MLP of a block; with V the winners of its scores stay, by topk and >=."""
    import torch
    from torch.nn import functional as F

    h = torch.tanh(F.linear(x, *p[0]))
    if V:
        with torch.no_grad():
            c = F.linear(x, V[0])
            kth = torch.topk(c, active(len(V[0]), P_K), dim=-1).values[..., -1:]
            m = (c >= kth).to(c.dtype)
        h = m * h
    if config.hidden_dropout:
        h = F.dropout(h, config.hidden_dropout)
    return F.linear(h, *p[1])


WORKS: dict[str, Callable[..., dict[str, float]]] = {
    work.__name__: work for work in (ours, pytorch, products, parts)} | {
    f"{work.__name__}_{kind}": functools.partial(work, kind)
    for work in (memory_ours, memory_pytorch, compiled) for kind in GATES}

if __name__ == "__main__":
    from .processes import end_with_the_parent

    end_with_the_parent()
    name, model, B, seconds = sys.argv[1:]
    print(json.dumps(WORKS[name](model, int(B), float(seconds))))
