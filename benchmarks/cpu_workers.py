"""What the CPU benchmark times, one framework a process: ``python -m ...cpu_workers WORK N B``.

Each work prints one line of JSON: milliseconds a call (the median of many calls) by name.
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UserError

P_K = (0.1, 0.5, 0.9)
INPUTS, CLASSES, HIDDEN = 3072, 10, 3
LR = 1e-4
KWTA_ROWS, KWTA_N, KWTA_K = 4096, 3000, 1500


def widths(N: int) -> tuple[int, ...]:
    """Return the layer sizes of the benchmarked network, 3072-N-N-N-10."""
    return (INPUTS, *[N] * HIDDEN, CLASSES)


def active(N: int, p_k: float) -> int:
    """Return k as the published code has it."""
    return max(1, int(p_k * N))


def median_ms(call: Callable[[], Any], seconds: float, before: int = 3, least: int = 5) -> float:
    """Return the median time of a call in ms, over `least` calls or more and about `seconds`.

    The calls `before` are not timed.
    """
    for _ in range(before):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def batch(B: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs (B, 3072) and labels (B,) that every framework gets."""
    draw = np.random.default_rng(0)
    return draw.standard_normal((B, INPUTS), dtype="float32"), draw.integers(0, CLASSES, B)


def task_of(model: Any) -> str:
    """Return the name of the task of a model."""
    from ..models.gpt2 import GPT2Config

    return "language" if isinstance(model, GPT2Config) else "classification"


def texts(B: int, T: int, vocabulary: int) -> np.ndarray:
    """Return texts (B, T) of random tokens."""
    return np.random.default_rng(0).integers(0, vocabulary, (B, T))


def ours(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time our training step: standard, COMET, and COMET with its masks kept bit-packed."""
    from ..backends.cpu import keep_freed_memory

    keep_freed_memory()
    times = {"standard": _our_step(N, B, None, False, seconds)}
    for p_k in P_K:
        times[f"comet {p_k}"] = _our_step(N, B, p_k, False, seconds)
        times[f"cached {p_k}"] = _our_step(N, B, p_k, True, seconds)
    return times


def _our_step(N: int, B: int, p_k: float | None, cached: bool, seconds: float) -> float:
    from ..experiments.training import RunConfig

    return median_ms(our_step(RunConfig(network(N, p_k)), B, cached)[1], seconds)


def our_step(config: Any, B: int, keeps: bool) -> tuple[Any, Callable[[], Any]]:
    """Return a learner, and its training step on one mini-batch, masks kept if `keeps`."""
    from ..backends import get_backend
    from ..experiments.tasks import TASKS
    from ..experiments.training import Learner

    backend = get_backend("numpy")
    learner = Learner(config, TASKS[task_of(config.model)], backend)
    examples = examples_of(learner, learner.fixed, B, backend, keeps)
    batches = [examples.batch(examples.rows)]
    return learner, lambda: learner.step(batches, examples, LR)


def network(N: int, p_k: float | None) -> Any:
    """Return the configuration of the benchmarked network; p_k = None is the standard model."""
    from ..gates import Comet
    from ..models.mlp import MLPConfig

    return MLPConfig(widths(N), gate=None if p_k is None else Comet(p_k))


def examples_of(learner: Any, fixed: Any, B: int, backend: Any, keeps: bool) -> Any:
    """Return a training set of one mini-batch in the backend's memory, its masks kept or not."""
    from ..experiments.datasets import Dataset
    from ..experiments.training.examples import Examples
    from ..gates import Pass

    model, dtype = learner.model, learner.config.training.formats.accumulate
    task = task_of(model)
    if task == "language":  # of a text all tokens but the last are input
        x = y = texts(B, model.context + 1, model.vocabulary)
        outputs = model.vocabulary
    else:
        x, y = batch(B)
        x, outputs = x.astype(dtype, copy=False), CLASSES
    data = Dataset("benchmark", task, x, y, x, y, None, None, outputs)
    return Examples(x, y, data, model, fixed, backend, dtype, Pass(train=True), keeps=keeps)


def pytorch(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time PyTorch's training step, eager: the standard model and the published COMET model."""
    times = {"standard": _torch_step(N, B, None, False, seconds)}
    return times | {f"comet {p_k}": _torch_step(N, B, p_k, False, seconds) for p_k in P_K}


def pytorch_compiled(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time the same under torch.compile, at p_k = 0.5 only: each model is compiled anew."""
    return {"standard": _torch_step(N, B, None, True, seconds),
            "comet 0.5": _torch_step(N, B, 0.5, True, seconds)}


def torch_network(N: int) -> tuple[Any, Callable[[Any, float | None], Any]]:
    """Return PyTorch's trained layers, and the published network as a function of x and p_k.

    It runs without routing, as the standard model, where p_k is None.
    """
    import torch
    from torch.nn import functional as F

    shapes = list(zip(widths(N), widths(N)[1:], strict=False))
    fc = torch.nn.ModuleList(torch.nn.Linear(n_in, n) for n_in, n in shapes)
    spec = torch.nn.ModuleList(torch.nn.Linear(n_in, n, bias=False) for n_in, n in shapes[:-1])
    spec.requires_grad_(False)

    def network(x: Any, p_k: float | None) -> Any:
        z = x
        for layer in range(HIDDEN):
            if p_k is not None:
                c = spec[layer](z)
                kth = torch.topk(c, active(N, p_k), dim=1).values[:, -1:]
                m = (c >= kth).to(c.dtype)
                z = m * c
            x = F.softplus(fc[layer](x))
            if p_k is not None:
                x = m * x
        return fc[HIDDEN](x)

    return fc, network


def _torch_step(N: int, B: int, p_k: float | None, compiled: bool, seconds: float) -> float:
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    fc, network = torch_network(N)
    model = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(fc.parameters(), lr=LR)
    x, y = map(torch.from_numpy, batch(B))

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, p_k), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return median_ms(step, seconds)


def jax(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time the same training step under jax.jit, compiled before."""
    times = {"standard": _jax_step(N, B, None, seconds)}
    return times | {f"comet {p_k}": _jax_step(N, B, p_k, seconds) for p_k in P_K}


def jax_weights(N: int) -> tuple[Any, Any]:
    """Return JAX's trained layers (W, b), y = x W + b, and the routing's V, drawn as PyTorch's."""
    from jax import numpy as jnp

    random = np.random.default_rng(0)

    def draw(n_in: int, *shape: int) -> Any:
        return jnp.asarray(random.uniform(-1, 1, shape) / n_in**0.5, dtype="float32")

    shapes = list(zip(widths(N), widths(N)[1:], strict=False))
    return ([(draw(n_in, n_in, n), draw(n_in, n)) for n_in, n in shapes],
            [draw(n_in, n_in, n) for n_in, n in shapes[:-1]])


def jax_network(params: Any, V: Any, x: Any, k: int | None) -> tuple[Any, list[tuple[Any, Any]]]:
    """Return the published network's outputs, and the scores and masks of its layers.

    It runs without routing, as the standard model, where k is None.
    """
    from jax.nn import softplus

    z, routed = x, []
    for layer, (W, b) in enumerate(params[:-1]):
        x = softplus(x @ W + b)
        if k is not None:
            c = z @ V[layer]
            m = c >= jax_kth_largest(c, k)
            z, x = m * c, m * x
            routed.append((c, m))
    W, b = params[-1]
    return x @ W + b, routed


def jax_kth_largest(c: Any, k: int) -> Any:
    """Return the k-th largest score of each row, (B, 1), by the fastest plain form.

    The smallest of the k largest; or, where these are more than half of the row, by the partition,
    for which JAX takes the N - k + 1 smallest. Both are XLA's top-k; ``top_k(c, k)[0][:, -1:]``
    is not, since XLA makes a whole sort of it.
    """
    from jax import lax
    from jax import numpy as jnp

    N = c.shape[1]
    if 2 * k <= N:
        return lax.top_k(c, k)[0].min(axis=1, keepdims=True)
    return jnp.partition(c, N - k, axis=1)[:, N - k, None]


def jax_step(k: int | None) -> Any:
    """Return the compiled step (params, V, x, y) -> (params, loss), its parameters donated."""
    import jax
    from jax import numpy as jnp

    def loss(params: Any, V: Any, x: Any, y: Any) -> Any:
        log_p = jax.nn.log_softmax(jax_network(params, V, x, k)[0])
        return -jnp.take_along_axis(log_p, y[:, None], axis=1).mean()

    def step(params: Any, V: Any, x: Any, y: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, V, x, y)
        return jax.tree.map(lambda p, g: p - LR * g, params, gradients), value

    return jax.jit(step, donate_argnums=0)


def _jax_step(N: int, B: int, p_k: float | None, seconds: float) -> float:
    import jax

    k = None if p_k is None else active(N, p_k)
    params, V = jax_weights(N)
    x, y = map(jax.numpy.asarray, batch(B))
    if k is not None:
        check_masks(jax.jit(jax_network, static_argnames="k")(params, V, x, k)[1], k)
    compiled = jax_step(k)

    def step() -> float:
        nonlocal params
        params, loss = jax.block_until_ready(compiled(params, V, x, y))
        return float(loss)

    return median_ms(step, seconds)


def check_masks(routed: list[tuple[Any, Any]], k: int) -> None:
    """Raise UserError unless each (scores, mask) follows the published rule."""
    for scores, mask in routed:
        c = np.asarray(scores)
        if not np.array_equal(mask, c >= np.sort(c, axis=1)[:, -k, None]):
            raise UserError(f"jax.jit's masks are not those of the published rule, c >= the {k}-th "
                            "largest c: its times would mean nothing")


def products(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time the bare matrix products of our step: SciPy's BLAS, the operands as it likes them."""
    from scipy.linalg.blas import sgemm

    draw = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return np.asfortranarray(draw.standard_normal(shape, dtype="float32"))

    shapes = list(zip(widths(N), widths(N)[1:], strict=False))
    W = [matrix(n_in, n) for n_in, n in shapes]  # (N_{l-1}, N_l) column-major: the model's W_l
    V = [matrix(n_in, n) for n_in, n in shapes[:-1]]
    x = [matrix(B, n_in) for n_in, _ in shapes]
    y = [matrix(B, n) for _, n in shapes]
    tiny = np.float32(1e-6)

    def standard() -> None:
        for x_l, y_l, W_l in zip(x, y, W, strict=True):
            sgemm(1.0, x_l, W_l, c=y_l, overwrite_c=1)
        for layer in reversed(range(len(W))):
            if layer:
                sgemm(1.0, y[layer], W[layer], trans_b=1, c=x[layer], overwrite_c=1)
            sgemm(tiny, x[layer], y[layer], trans_a=1, beta=1.0, c=W[layer], overwrite_c=1)

    def with_routing() -> None:
        for x_l, y_l, V_l in zip(x, y, V, strict=False):
            sgemm(1.0, x_l, V_l, c=y_l, overwrite_c=1)
        standard()

    def fresh() -> None:  # finite numbers of an ordinary size, whatever the calls before made
        for array in (*x, *y):
            array[...] = matrix(*array.shape)

    times = {"standard": median_ms(standard, seconds)}
    fresh()
    return times | {"comet": median_ms(with_routing, seconds)}


def memory_ours(N: int, B: int, seconds: float) -> dict[str, float]:
    """Return the peak memory of a process that trains our COMET model, in MiB."""
    from ..backends.cpu import keep_freed_memory

    keep_freed_memory()
    _our_step(N, B, 0.5, False, seconds)
    return {"peak MiB": peak_mib()}


def memory_pytorch(N: int, B: int, seconds: float) -> dict[str, float]:
    """Return the peak memory of a process that trains PyTorch's COMET model, in MiB."""
    _torch_step(N, B, 0.5, False, seconds)
    return {"peak MiB": peak_mib()}


def memory_jax(N: int, B: int, seconds: float) -> dict[str, float]:
    """Return the peak memory of a process that compiles and trains JAX's COMET model, in MiB."""
    _jax_step(N, B, 0.5, seconds)
    return {"peak MiB": peak_mib()}


def peak_mib() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def kwta_ours(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time our k-winner-take-all mask alone."""
    from ..functional.routing import kwta_mask

    scores = np.random.default_rng(0).standard_normal((B, N), dtype="float32")
    k = N // 2
    return {"kwta": median_ms(lambda: kwta_mask(scores, k, "threshold"), seconds)}


def kwta_pytorch(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time the published form: torch.topk, then >= the k-th value."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    scores = torch.from_numpy(np.random.default_rng(0).standard_normal((B, N), dtype="float32"))
    k = N // 2
    return {"kwta": median_ms(
        lambda: scores >= torch.topk(scores, k, dim=1).values[:, -1:], seconds)}


def kwta_jax(N: int, B: int, seconds: float) -> dict[str, float]:
    """Time the same mask under jax.jit."""
    import jax

    mask = jax.jit(lambda c: c >= jax_kth_largest(c, N // 2))
    scores = jax.numpy.asarray(np.random.default_rng(0).standard_normal((B, N), dtype="float32"))
    return {"kwta": median_ms(lambda: jax.block_until_ready(mask(scores)), seconds)}


WORKS = {work.__name__: work for work in (
    ours, pytorch, pytorch_compiled, jax, products, memory_ours, memory_pytorch, memory_jax,
    kwta_ours, kwta_pytorch, kwta_jax)}

if __name__ == "__main__":
    from .processes import end_with_the_parent

    end_with_the_parent()
    name, N, B, seconds = sys.argv[1:]
    print(json.dumps(WORKS[name](int(N), int(B), float(seconds))))
