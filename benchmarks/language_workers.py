"""What the benchmark of GPT-2 measures: ``...language_workers WORK MODEL B SECONDS``.

Each work prints one line of JSON: milliseconds a training step or a generated text, or MiB, by
COMET and standard.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ..backends.cpu import keep_freed_memory
from ..experiments.training import RunConfig, TrainConfig
from ..models import gpt2
from ..models.gpt2 import GPT2Config
from ..optim import OptimizerConfig
from .cpu_workers import LR, median_ms, texts
from .steps import GATES, Map, answer, maps_of_blocks, torch_threads, torch_winners, works

no_dropout = functools.partial(gpt2.of_size, dropout=0.0, weight_dropout=0.0)

MODELS = {
    "gpt2-256": no_dropout("small", width=256, depth=4, heads=8, context=128),
    "gpt2-small": no_dropout("small", context=64),
    "gpt2-small-128": no_dropout("small", context=128),
    "gpt2-large-128": no_dropout("large", context=128),
    "gpt2-tiny": no_dropout("small", width=16, depth=2, heads=2, vocabulary=50, context=12)}
WEIGHT_DECAY = 0.1  # not of biases and norms
# A step takes seconds, and so does a text.
clock = functools.partial(median_ms, before=1, least=3)


def run_of(model: str, kind: str, precision: str = "float32") -> RunConfig:
    """Return a run of a model, COMET or standard; ties as in the published code."""
    optimizer = OptimizerConfig("adamw", weight_decay=WEIGHT_DECAY, decay_biases=False)
    return RunConfig(replace(MODELS[model], gate=GATES[kind]),
                     TrainConfig(optimizer, precision=precision))


def lengths(model: str) -> tuple[int, int]:
    """Return the tokens of the prompt and of the text that is generated after it."""
    T = MODELS[model].context or 0
    return T // 2, T


def maps(config: GPT2Config, B: int) -> Iterator[Map]:
    """Yield all maps of a training step, in the order of the forward pass."""
    T = config.context or 0
    yield from maps_of_blocks(config, T, B)
    yield Map(1, B * T, config.width, config.vocabulary, 3)


def generation_ours(model: str, B: int, seconds: float) -> dict[str, float]:
    """Time our generation of B texts, greedy."""
    keep_freed_memory()
    return {kind: clock(our_generation(model, kind, B), seconds) for kind in GATES}


def our_generation(model: str, kind: str, B: int) -> Callable[[], Any]:
    """Return what generates B texts."""
    from ..generation import generate

    config: Any = run_of(model, kind).model
    prompt, count = lengths(model)
    params, fixed = gpt2.init(config)
    start = texts(B, prompt, config.vocabulary)
    return lambda: list(generate(start, params, fixed, config, count, temperature=0.0))


# --- PyTorch ------------------------------------------------------------------------------------


def imports() -> None:
    """Import all that PyTorch's step needs."""
    import torch
    from transformers import GPT2LMHeadModel

    del GPT2LMHeadModel
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # imports its compiler


def torch_network(config: Any) -> Any:
    """Return the network of transformers; with a gate, its MLPs replaced by a COMET one."""
    import torch
    import transformers

    class CometMLP(torch.nn.Module):
        """The network's own MLP, its hidden neurons masked."""

        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.mlp = mlp
            V = torch.empty(config.hidden, config.width).normal_(std=config.width**-0.5)
            self.register_buffer("V", V)

        def forward(self, x: Any) -> Any:
            h = self.mlp.act(self.mlp.c_fc(x))
            m = torch_winners(x, self.V)
            return self.mlp.c_proj(m * h)

    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=config.vocabulary, n_positions=config.positions, n_embd=config.width,
        n_layer=config.depth, n_head=config.heads, n_inner=config.hidden,
        activation_function=config.activation, layer_norm_epsilon=config.eps, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None))
    network.loss_type = "ForCausalLM"  # which transformers takes anyway, but with a warning
    if config.gate is not None:
        for block in network.transformer.h:
            block.mlp = CometMLP(block.mlp)
    return network


def torch_step(run: RunConfig, B: int, made: Callable[[Any], Any] = lambda network: network,
               device: str = "cpu", **of_adam: Any) -> tuple[Any, Any, Callable[[], Any]]:
    """Return PyTorch's network, its AdamW and its training step, which returns the loss, a tensor.

    `made` makes what runs of the network.
    """
    import torch

    config: Any = run.model
    network = torch_network(config).train().to(device)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups: Any = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, fused=True, **of_adam)
    tokens = torch.tensor(texts(B, config.context + 1, config.vocabulary), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    forward = made(network)

    def step() -> Any:
        optimizer.zero_grad()
        # labels that are shifted before, so that the last token of the input has one too
        loss = forward(x, labels=x, shift_labels=y, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return network, optimizer, step


def generation_pytorch(model: str, B: int, seconds: float) -> dict[str, float]:
    """Time the generation of transformers, greedy and with its cache."""
    torch_threads()
    return {kind: clock(torch_generation(model, kind, B), seconds) for kind in GATES}


def torch_generation(model: str, kind: str, B: int) -> Callable[[], Any]:
    """Return what generates B texts with transformers."""
    import torch

    config: Any = run_of(model, kind).model
    prompt, count = lengths(model)
    start = torch.tensor(texts(B, prompt, config.vocabulary))
    return functools.partial(torch_network(config).eval().generate, start,
                             attention_mask=torch.ones_like(start), max_new_tokens=count,
                             do_sample=False, use_cache=True)


if __name__ == "__main__":
    answer(works(run_of, torch_step, maps, imports, clock) | {
        work.__name__: work for work in (generation_ours, generation_pytorch)})
