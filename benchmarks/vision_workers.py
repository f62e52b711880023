"""What the benchmark of vision models measures: ``...vision_workers WORK MODEL B SECONDS``.

Each work prints one line of JSON: milliseconds a training step, or MiB, by COMET and standard.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..experiments.training import RunConfig, TrainConfig
from ..models import module_of
from ..models.mixer import MixerConfig
from ..models.vit import ViTConfig
from ..optim import OptimizerConfig
from ..tree import leaves, tree_map
from .cpu_workers import LR, batch
from .steps import GATES, Map, answer, maps_of_blocks, torch_winners, works

Config = ViTConfig | MixerConfig

MODELS: dict[str, Config] = {
    "vit-512": ViTConfig(), "vit-3072": ViTConfig(hidden=3072), "mixer-512": MixerConfig(),
    "vit-512-no-dropout": ViTConfig(dropout=0.0, hidden_dropout=0.0),
    "vit-tiny": ViTConfig(patch=8, width=16, depth=2, heads=2, hidden=24),
    "mixer-tiny": MixerConfig(patch=8, width=16, depth=2, token_hidden=24, hidden=20)}


def run_of(model: str, kind: str, precision: str = "float32") -> RunConfig:
    """Return a run of a model, COMET or standard; ties as in the published code."""
    return RunConfig(replace(MODELS[model], gate=GATES[kind]),
                     TrainConfig(OptimizerConfig("adam"), precision=precision))


# --- the bare products --------------------------------------------------------------------------


def maps(config: Config, B: int) -> Iterator[Map]:
    """Yield all maps of a training step, in the order of the forward pass."""
    C, rows, columns = config.image
    patch = config.patch**2
    yield Map(1, B * rows * columns // patch, patch * C, config.width, 2)
    yield from maps_of_blocks(config, config.tokens, B)
    yield Map(1, B, config.width, config.classes, 3)


# --- PyTorch ------------------------------------------------------------------------------------


def imports() -> None:
    """Import all that PyTorch's step needs."""
    import torch

    torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True)  # imports its compiler


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
        m = torch_winners(x, V[0])
        h = m * h
    if config.hidden_dropout:
        h = F.dropout(h, config.hidden_dropout)
    return F.linear(h, *p[1])


if __name__ == "__main__":
    answer(works(run_of, torch_step, maps, imports))
