"""What the GPU benchmark times, one framework a process: ``...gpu_workers WORK N PRESET``.

Each work prints one line of JSON: milliseconds a call by name, or why a call was left out.
"""

import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..backends import OutOfMemory
from . import language_workers, vision_workers
from .cpu_workers import CLASSES, LR, P_K, batch, examples_of, network, task_of, torch_network
from .steps import GATES

Array = Any
Call = Callable[[], Any]
Clock = Callable[[Call, int], float]  # ms of that many calls
Times = dict[str, float | str]

OTHERS: dict[str, Any] = {"vision": vision_workers, "language": language_workers}
VOCABULARY, TOKENS = 50257, 8192  # of GPT-2, and of a mini-batch of 8 of its texts
GROUPS = 5  # of calls; the time of a call is the median of their means
STEPS_AHEAD = 1000  # as in training, the order of so many examples is uploaded at once
COMPILE_SECONDS = 20.0  # no further network is compiled after these


class Sizes(NamedTuple):
    """What is measured.

    widths, batches : N and B of the training steps; N = 1000 with B = 128 also by AdamW.
    rows_of : N of the k-winner-take-all masks alone.
    numbers : elements of the arrays of single kernels, far more than the GPU's cache holds.
    vision, language : models of `vision_workers` or `language_workers`, and their batch size.
    seconds : of one timing.
    """

    widths: tuple[int, ...]
    batches: tuple[int, ...]
    rows_of: tuple[int, ...]
    numbers: int
    seconds: float
    vision: tuple[tuple[str, ...], int]
    language: tuple[tuple[str, ...], int]


PRESETS = {
    "smoke": Sizes((100,), (32,), (512,), 2**16, 0.01, (("vit-tiny", "mixer-tiny"), 4),
                   (("gpt2-tiny",), 2)),
    "full": Sizes((100, 500, 1000, 3000, 9000), (32, 128, 512, 4096), (512, 1000, 3000, 9216),
                  2**28, 0.1, (("vit-512", "vit-3072", "mixer-512"), 16),
                  (("gpt2-small-128", "gpt2-large-128"), 32))}


class Step(NamedTuple):
    """One training step: mini-batch size, optimizer, and p_k (None: the standard model)."""

    B: int
    optimizer: str
    p_k: float | None

    def __str__(self) -> str:
        return f"{self.B} {self.optimizer} {'standard' if self.p_k is None else self.p_k}"


def steps(N: int, batches: tuple[int, ...]) -> list[Step]:
    """Return the training steps that are measured at width N."""
    chosen = [Step(B, "sgd", p_k) for B in batches
              for p_k in (None, *(P_K if B == 128 else (0.5,)))]
    if N == 1000 and 128 in batches:
        chosen += [Step(128, "adamw", None), Step(128, "adamw", 0.5)]
    return chosen


# --- time ---------------------------------------------------------------------------------------


def event_clock(event: Callable[[], Any], elapsed: Callable[[Any, Any], float]) -> Clock:
    """Return the clock of a framework's CUDA events."""
    def clock(call: Call, calls: int) -> float:
        start, end = event(), event()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return elapsed(start, end)

    return clock


def cpu_clock(call: Call, calls: int) -> float:
    """Return the time of that many calls on the CPU, on which PyTorch's part can run too."""
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e3 * (time.perf_counter() - started)


class Stopwatch:
    """Times of calls by name, in ms, or why there is none.

    Parameters
    ----------
    clock : Clock
    seconds : float
        About how long one measurement lasts.
    """

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.times: Times = {}
        self._clock, self._seconds = clock, seconds

    def add(self, name: str, prepare: Callable[..., Call], *arguments: Any) -> None:
        """Measure the call that `prepare` returns, unless the GPU's memory is too small for it."""
        try:
            self.times[name] = self.median_ms(prepare(*arguments))
        except Exception as error:
            if not (isinstance(error, MemoryError | OutOfMemory)
                    or type(error).__name__ == "OutOfMemoryError"):  # of PyTorch
                raise
            self.times[name] = "no memory: the GPU's is too small"
        gc.collect()  # a captured step keeps its memory, and lies in a cycle

    def median_ms(self, call: Call) -> float:
        """Return the time of a call: the median of the means of groups of calls."""
        self._clock(call, 3)  # compiles, captures, fills the memory pool
        once = self._clock(call, 2) / 2
        calls = max(1, int(1e3 * self._seconds / GROUPS / max(once, 1e-3)))
        return statistics.median(self._clock(call, calls) / calls for _ in range(GROUPS))


# --- our side -----------------------------------------------------------------------------------


def our_stopwatch(sizes: Sizes) -> tuple[Any, Stopwatch]:
    """Return the CuPy backend and a stopwatch by its events."""
    from ..backends import get_backend

    backend = get_backend("cupy")
    cuda = backend.xp.cuda
    return backend, Stopwatch(event_clock(cuda.Event, cuda.get_elapsed_time), sizes.seconds)


def ours(N: int, sizes: Sizes) -> Times:
    """Time our training steps: as one graph, ordinary, with TF32, and with masks kept."""
    from ..experiments.tasks import TASKS
    from ..experiments.training import Learner, RunConfig, TrainConfig
    from ..optim import OptimizerConfig

    backend, watch = our_stopwatch(sizes)
    learners: dict[str, Any] = {}  # the weights do not depend on p_k and take long to draw
    for step in steps(N, sizes.batches):
        if step.optimizer not in learners:
            learners[step.optimizer] = Learner(
                RunConfig(network(N, 0.5), TrainConfig(OptimizerConfig(step.optimizer))),
                TASKS["classification"], backend)
        for how in ("graph", "ordinary", "tf32") + ("cached",) * (step.p_k is not None):
            watch.add(f"{step} {how}", our_step, backend, learners[step.optimizer], N, step, how)
    backend.synchronize()  # raises what the kernels found wrong
    return watch.times


def our_step(backend: Any, learner: Any, N: int, step: Step, how: str) -> Call:
    """Return a training step, mini-batch gathered on the device, ready to be called.

    `how` is "graph", "ordinary", "tf32" (a graph whose products, but not those of the routing, are
    TF32), or "cached" (a graph that reads masks computed before, bit-packed).
    """
    learner.model = replace(network(N, step.p_k), compute="tf32" if how == "tf32" else None)
    return step_of(backend, learner, () if step.p_k is None else learner.fixed, step.B, how)


def step_of(backend: Any, learner: Any, fixed: Any, B: int, how: str) -> Call:
    """Return a training step of the learner's model; `how` as in `our_step`."""
    from ..experiments.training.device import DeviceSteps

    learner.config = replace(learner.config, training=replace(learner.config.training, batch=B))
    examples = examples_of(learner, fixed, B, backend, keeps=how == "cached")
    order = np.arange(B)
    if how == "ordinary":
        rows = backend.asarray(order)
        return lambda: learner.step([examples.batch(rows)], examples, LR)
    ahead = DeviceSteps(learner, examples, backend, STEPS_AHEAD)
    plan, rates = np.tile(order, STEPS_AHEAD)[None], np.full(STEPS_AHEAD, LR)
    left = 0

    def graph() -> None:
        nonlocal left
        if left == 0:
            ahead.announce(plan, rates)
            left = STEPS_AHEAD
        left -= 1
        ahead.step()

    return graph


def other_ours(networks: str, model: str, sizes: Sizes) -> Times:
    """Time our training steps of another model, COMET and standard: as a graph, and ordinary."""
    from ..experiments.tasks import TASKS
    from ..experiments.training import Learner

    backend, watch = our_stopwatch(sizes)
    for kind in GATES:
        run = OTHERS[networks].run_of(model, kind)
        learner = Learner(run, TASKS[task_of(run.model)], backend)
        for how in ("graph", "ordinary"):
            watch.add(f"{kind} {how}", step_of, backend, learner, learner.fixed,
                      getattr(sizes, networks)[1], how)
    backend.synchronize()
    return watch.times


def kwta_ours(N: int, sizes: Sizes) -> Times:
    """Time our masks alone, bool and bit-packed, and copies that move the same bytes."""
    from ..functional.routing import cap, kwta_mask

    backend, watch = our_stopwatch(sizes)
    scores = scores_of(N, sizes)

    def on_device(mask: Callable[..., Array]) -> Call:
        return functools.partial(mask, backend.asarray(scores), N // 2, "threshold")

    for name, mask, out in (("bool", kwta_mask, scores.size),
                            ("bits", cap, len(scores) * -(-N // 8))):
        watch.add(name, on_device, mask)
        watch.add(f"{name} copy", copy, backend, scores.nbytes + out)
    backend.synchronize()
    return watch.times


def scores_of(N: int, sizes: Sizes) -> np.ndarray:
    """Return routing scores, `sizes.numbers` of them in rows of N."""
    return np.random.default_rng(0).standard_normal((sizes.numbers // N, N), dtype="float32")


def copy(backend: Any, moved: int) -> Call:
    """Return a copy on the device that reads and writes `moved` bytes together."""
    xp = backend.xp
    source, target = (xp.zeros(moved // 2, dtype=np.uint8) for _ in range(2))
    return functools.partial(xp.copyto, target, source)


def kernels(N: int, sizes: Sizes) -> Times:
    """Time each kernel over rows of N, and a copy that moves as many bytes as it must."""
    backend, watch = our_stopwatch(sizes)
    per_byte = watch.median_ms(copy(backend, 4 * sizes.numbers)) / (4 * sizes.numbers)
    for name, moved, prepare in kernel_calls(backend, N, sizes.numbers // 2):
        watch.add(name, prepare)
        watch.times[f"{name} copy"] = per_byte * moved
    backend.synchronize()
    return watch.times


def kernel_calls(backend: Any, N: int,
                 numbers: int) -> Iterator[tuple[str, int, Callable[[], Call]]]:
    """Yield each operation's name, the bytes that it must move, and what prepares a call of it."""
    from ..functional import attention, hidden, loss, tokens
    from ..functional.activations import activation
    from ..functional.dropout import dropout_factor, example_mask
    from ..functional.linear import Linear
    from ..functional.norm import Norm, NormCache, norm_backward, norm_forward
    from ..optim import adam, momentum, sgd, shrunk, squared_norm
    from ..rng import key

    f, rows = activation("softplus"), numbers // N
    n, bits = rows * N, rows * -(-N // 8)

    def array(*shape: int) -> Array:
        return backend.xp.full(shape, 0.5, dtype=np.float32)

    def layer(kind: str) -> tuple[Array, Linear, Array]:  # one input: the product costs no time
        mask = (backend.xp.ones((rows, N), dtype=bool) if kind == "bool"
                else backend.xp.full((rows, -(-N // 8)), 255, dtype=np.uint8))
        return array(rows, 1), Linear(array(N, 1), array(N)), mask

    def forward(kind: str) -> Call:
        return functools.partial(hidden.hidden_forward, *layer(kind), f)

    def backward(kind: str) -> Call:
        x, p, mask = layer(kind)
        cache = hidden.HiddenCache(x, array(rows, N), mask)
        return functools.partial(hidden.hidden_backward, array(rows, N), cache, p, p, f, None,
                                 False)

    for kind, mask_bytes in (("bool", n), ("bits", bits)):
        # the product written; then read, a and h written
        yield (f"hidden layer of one input, {kind}", 16 * n + mask_bytes,
               functools.partial(forward, kind))
        # dh and a read, da written; then read for dW
        yield (f"its backward, {kind}", 16 * n + mask_bytes, functools.partial(backward, kind))
    norm = Norm(array(N), array(N))
    # x, normed, y; the second time in reading x it lies in the cache
    yield ("layer norm", 12 * n, lambda: functools.partial(norm_forward, array(rows, N), norm))
    # dy and normed read for dx, dx written; both read for the sums
    yield ("layer norm's backward", 20 * n, lambda: functools.partial(
        norm_backward, array(rows, N), NormCache(array(rows, N), array(rows, 1)), norm, norm))
    T = min(N, 64)  # a head of as many tokens as it has features: products cost little
    sequences = numbers // T**2

    def of_attention(backward: bool) -> Call:
        qkv, weights = array(sequences, T, 3 * T), array(sequences, 1, T, T)
        if not backward:
            return functools.partial(attention.attention_forward, qkv, 1, True, weights)
        cache = attention.AttentionCache(qkv, weights, weights)
        return functools.partial(attention.attention_backward, array(sequences, T, T), cache, 1)

    # Of arrays (T, T), read or written: qkv copied (6), scores (3), their weights and dropout (4),
    # y (2), its copy (2)
    yield ("attention", 4 * 17 * sequences * T**2, functools.partial(of_attention, False))
    # qkv copied (6), dy copied (2), dP (3), dS (5), dq (3), dk (3), dv (3), their copy (6)
    yield ("attention's backward", 4 * 31 * sequences * T**2,
           functools.partial(of_attention, True))
    texts = backend.xp.arange(min(TOKENS, numbers // N) // 8 * 8).reshape(8, -1)
    embedding = tokens.TokenEmbedding(array(VOCABULARY, N), array(texts.shape[1], N))
    # a row of the table read, x written; positions lie in the cache
    yield ("embedding of tokens", 8 * texts.size * (N + 1),
           lambda: functools.partial(tokens.tokens_forward, texts, embedding))
    # dx read for the tokens and for the positions, both tables read and written
    yield ("its backward, of 8 texts", 4 * texts.size * (4 * N + 2), lambda: functools.partial(
        tokens.tokens_backward, array(*texts.shape, N), tokens.TokenCache(texts), embedding))
    for C in (CLASSES, 1000, VOCABULARY):
        rows = max(1, numbers // C)

        def labels(rows: int = rows) -> Array:
            return backend.xp.zeros(rows, dtype=np.int64)

        def cross_entropy(C: int = C, rows: int = rows) -> Call:
            return functools.partial(loss.softmax_cross_entropy, array(rows, C), labels(rows))

        def gradient(C: int = C, rows: int = rows) -> Call:
            return functools.partial(loss.softmax_cross_entropy_gradient, array(rows, C),
                                     labels(rows), 1.0)

        # logits, probabilities, labels, losses
        yield f"softmax cross-entropy, {C} classes", (8 * C + 12) * rows, cross_entropy
        yield f"its gradient, {C} classes", (8 * C + 8) * rows, gradient
    yield ("shrunk", 8 * numbers,
           lambda: functools.partial(shrunk, array(numbers), array(numbers), 0.01, 0.01))
    yield ("sgd", 12 * numbers,
           lambda: functools.partial(sgd, array(numbers), array(numbers), LR, 0.0, 1.0))
    yield ("momentum", 20 * numbers,
           lambda: functools.partial(momentum, *(array(numbers) for _ in range(3)), LR, 0.9, 0.0,
                                     1.0))
    yield ("squared norm", 4 * numbers, lambda: functools.partial(squared_norm, array(numbers)))
    yield ("dropout", 4 * numbers,
           lambda: functools.partial(dropout_factor, array(numbers), 0.1, key(0, "bench"), 0))
    yield ("masks of examples", n, lambda: functools.partial(
        example_mask, backend.xp.arange(rows), N, 0.5, key(0, "bench")))
    yield ("adam", 28 * numbers,
           lambda: functools.partial(adam, *(array(numbers) for _ in range(4)), 1, LR, 0.9, 0.999,
                                     1e-8, 0.0, False, 1.0))


# --- PyTorch ------------------------------------------------------------------------------------


def torch_stopwatch(sizes: Sizes, device: str) -> Stopwatch:
    """Return a stopwatch by PyTorch's events."""
    import torch

    if device == "cpu":
        return Stopwatch(cpu_clock, sizes.seconds)
    event = functools.partial(torch.cuda.Event, enable_timing=True)
    return Stopwatch(event_clock(event, lambda start, end: start.elapsed_time(end)), sizes.seconds)


def pytorch(N: int, sizes: Sizes, device: str = "cuda") -> Times:
    """Time PyTorch's training steps, eager, without and with TF32."""
    watch, prepare = torch_stopwatch(sizes, device), torch_steps(N, device)
    for how, precision in (("eager", "highest"), ("tf32", "high")):
        for step in steps(N, sizes.batches):
            watch.add(f"{step} {how}", prepare, step, precision)
    return watch.times


def pytorch_compiled(N: int, sizes: Sizes, device: str = "cuda") -> Times:
    """Time the COMET steps at p_k = 0.5 under torch.compile with CUDA graphs, while time lasts."""
    import torch

    def compiled(network: Any) -> Any:
        torch.compiler.reset()  # each shape is compiled for itself
        return torch.compile(network, mode="reduce-overhead", dynamic=False)

    watch, prepare = torch_stopwatch(sizes, device), torch_steps(N, device)
    end = time.monotonic() + COMPILE_SECONDS
    for step in steps(N, sizes.batches):
        if step.p_k == 0.5 and time.monotonic() > end:
            watch.times[f"{step} compiled"] = f"no time: others took {COMPILE_SECONDS:.0f} s"
        elif step.p_k == 0.5:
            watch.add(f"{step} compiled", prepare, step, "highest", compiled)
    return watch.times


def pytorch_captured(N: int, sizes: Sizes, device: str = "cuda") -> Times:
    """Time PyTorch's training steps, each wholly captured in one CUDA graph."""
    watch, prepare = torch_stopwatch(sizes, device), torch_steps(N, device)

    def captured(step: Step) -> Call:
        return capture(prepare(step, "highest", capturable=True))

    for step in steps(N, sizes.batches):
        watch.add(f"{step} captured", captured, step)
    return watch.times


def other_pytorch(networks: str, captured: bool, model: str, sizes: Sizes,
                  device: str = "cuda") -> Times:
    """Time PyTorch's training steps of another model, TF32 off: eager, or captured whole."""
    import torch

    torch.set_float32_matmul_precision("highest")
    watch, workers = torch_stopwatch(sizes, device), OTHERS[networks]

    def prepare(kind: str) -> Call:
        step: Call = workers.torch_step(workers.run_of(model, kind), getattr(sizes, networks)[1],
                                        device=device, capturable=captured)[2]
        return capture(step) if captured else step

    for kind in GATES:
        watch.add(f"{kind} {'captured' if captured else 'eager'}", prepare, kind)
    return watch.times


def capture(call: Call) -> Call:
    """Return the replay of a training step that PyTorch has captured as its manual says.

    The first steps run on a side stream, where the libraries set up what may not be captured; the
    captured one begins without gradients, so that they lie in the graph's own memory.
    """
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return functools.partial(_replay, graph, call)


def _replay(graph: Any, captured: Call) -> None:
    graph.replay()  # reads and writes the tensors that `captured` keeps alive


def torch_steps(N: int, device: str) -> Callable[..., Call]:
    """Return what prepares one of PyTorch's training steps at width N."""
    import torch
    from torch.nn import functional as F

    with torch.device(device):
        fc, network = torch_network(N)

    def prepare(step: Step, precision: str,
                made: Callable[[Any], Any] = lambda network: network,
                capturable: bool = False) -> Call:
        torch.set_float32_matmul_precision(precision)
        optimizer = (torch.optim.SGD(fc.parameters(), lr=LR, fused=True)
                     if step.optimizer == "sgd" else
                     torch.optim.AdamW(fc.parameters(), lr=LR, weight_decay=0.0, fused=True,
                                       capturable=capturable))
        model = made(network)
        x, y = (torch.from_numpy(array).to(device) for array in batch(step.B))

        def call() -> None:
            optimizer.zero_grad()  # to None
            F.cross_entropy(model(x, step.p_k), y).backward()
            optimizer.step()

        return call

    return prepare


def kwta_pytorch(N: int, sizes: Sizes, device: str = "cuda") -> Times:
    """Time the published form of the mask: torch.topk, then >= the k-th value."""
    import torch

    def on_device() -> Call:
        c = torch.from_numpy(scores_of(N, sizes)).to(device)
        return lambda: c >= torch.topk(c, N // 2, dim=1).values[:, -1:]

    watch = torch_stopwatch(sizes, device)
    watch.add("topk", on_device)
    return watch.times


WORKS: dict[str, Callable[..., Times]] = {
    work.__name__: work for work in (
        ours, pytorch, pytorch_captured, pytorch_compiled, kwta_ours, kwta_pytorch, kernels)} | {
    f"{networks}_{work}": functools.partial(call, networks, *options)
    for networks in OTHERS for work, call, options in (
        ("ours", other_ours, ()), ("pytorch", other_pytorch, (False,)),
        ("captured", other_pytorch, (True,)))}

if __name__ == "__main__":
    from .processes import end_with_the_parent

    end_with_the_parent()
    name, N, preset = sys.argv[1:]
    print(json.dumps(WORKS[name](int(N) if N.isdecimal() else N, PRESETS[preset])))
