"""A training step of ViT, MLP-Mixer and GPT-2 on a GPU, on paper: launches, bytes, multiply-adds.

`python -m tests.cuda.paper` takes the steps of `comet-np bench --vision` on the stand-in, whose
kernels and products compute nothing here, and counts what they would read and write. Those of
`--language` are taken at a depth of 1 and 2, which tells them at every depth, as blocks are alike.
"""

import sys
from collections import Counter
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import numpy as np

from comet_np.backends import cublas, get_backend
from comet_np.backends.cublas import Cublas
from comet_np.benchmarks import language_workers, vision_workers
from comet_np.benchmarks.cpu_workers import examples_of, task_of
from comet_np.benchmarks.steps import GATES
from comet_np.experiments.tasks import TASKS
from comet_np.experiments.training import Learner
from comet_np.models import module_of

from . import strict_cupy


class Step(NamedTuple):
    """What a step takes on the device: launches and bytes, by what is launched; multiply-adds."""

    launches: Counter[str]
    bytes: Counter[str]
    multiply_adds: int


def counted(run, batch):
    """Return what the second step of a run takes; the first compiles."""
    launches, moved, products = Counter(), Counter(), []

    def note(name, size):
        launches[name] += 1
        moved[name] += size

    def arrays(values):
        return {id(a._a): a._a for a in strict_cupy.flat(values)
                if isinstance(a, strict_cupy.ndarray)}

    def launch(name, kernel, grid, block, arguments):
        note(name.partition("<")[0], sum(a.nbytes for a in arrays(arguments).values()))

    ordinary = strict_cupy.call

    def call(name, function, args, kwargs):
        read = arrays(args)
        result = ordinary(name, function, args, kwargs)
        written = arrays([result])
        views = "out" not in kwargs and any(np.may_share_memory(one, other)
                                            for one in written.values() for other in read.values())
        if not views and not name.startswith("empty"):
            note(name, sum(a.nbytes for a in (read | written).values()))
        return result

    def gemm(self, a, b, out, beta, compute=None):
        a, b = (cublas._cast(one, compute) for one in (a, b))  # launches of their own
        note("product", a.nbytes + b.nbytes + out.nbytes)
        products.append(out.size * a.shape[-1])

    with strict_cupy.strict_cupy() as machine, mock.patch.multiple(
            strict_cupy, launch=launch, call=call), mock.patch.object(
            Cublas, "gemm", gemm):
        machine.memory = 2**40
        gpu = get_backend("cupy")
        learner = Learner(run, TASKS[task_of(run.model)], gpu)
        examples = examples_of(learner, learner.fixed, batch, gpu, False)
        batches = [examples.batch(examples.rows)]
        for _ in range(2):
            for one in launches, moved, products:
                one.clear()
            learner.step(batches, examples, 1e-4)
    return Step(launches, moved, sum(products))


def at_depth(run, batch):
    """Return what a step of a GPT-2 takes, from what it takes at a depth of 1 and of 2."""
    one, two = (counted(replace(run, model=replace(run.model, depth=depth)), batch)
                for depth in (1, 2))
    blocks = run.model.depth - 1

    def whole(first, second):
        return first + blocks * (second - first)

    launches, moved = (Counter({name: whole(first[name], second[name]) for name in second})
                       for first, second in zip(one[:2], two[:2], strict=True))
    return Step(launches, moved, whole(one.multiply_adds, two.multiply_adds))


def memory(config, batch):
    """Return the GB of weights, gradients and moments; of logits; of activations, recomputed too.
    """
    logits = config.context * config.vocabulary
    kept = [module_of(config).kept_numbers(replace(config, recompute=recompute)) - logits
            for recompute in (False, True)]
    fixed = config.depth * config.width * config.hidden if config.gate is not None else 0
    return [4 * numbers / 1e9 for numbers in (
        4 * module_of(config).parameter_count(config) + fixed, batch * logits,
        *(batch * numbers for numbers in kept))]


def line(title, step):
    """Return a line of the table."""
    largest = ", ".join(f"{name} {step.launches[name]} ({size / 1e6:.0f} MB)"
                        for name, size in step.bytes.most_common(6))
    return (f"{title}: {step.launches.total()} launches, {step.bytes.total() / 1e9:.2f} GB, "
            f"{step.multiply_adds / 1e9:.1f} G multiply-adds; {largest}")


def main(models):
    for model in models:
        for gate in GATES:
            if model not in language_workers.MODELS:
                print(line(f"{model} {gate}", counted(vision_workers.run_of(model, gate), 16)))
                continue
            batch = 32
            for precision in "float32", "float16":
                run = language_workers.run_of(model, gate, precision)
                print(line(f"{model} {gate} {precision}", at_depth(run, batch)))
            parts = zip(("weights, gradients and moments", "logits", "activations",
                         "or recomputed"), memory(run.model, batch), strict=True)
            print(f"{model} {gate} memory: "
                  + ", ".join(f"{name} {size:.2f} GB" for name, size in parts))


if __name__ == "__main__":
    main(sys.argv[1:] or ["vit-512", "mixer-512", "gpt2-small-128", "gpt2-large-128"])
