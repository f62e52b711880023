"""A training step of ViT and MLP-Mixer on a GPU, on paper: launches, bytes, multiply-adds.

`python -m tests.cuda.paper` takes the steps of `comet-np bench --vision` on the stand-in, whose
kernels and products compute nothing here, and counts what they would read and write.
"""

import sys
from collections import Counter
from typing import NamedTuple
from unittest import mock

import numpy as np

from comet_np.backends import get_backend
from comet_np.backends.cublas import Cublas
from comet_np.benchmarks.cpu_workers import examples_of
from comet_np.benchmarks.vision_workers import GATES, run_of
from comet_np.experiments.tasks import TASKS, Batch
from comet_np.experiments.training import Learner

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
        note("product", a.nbytes + b.nbytes + out.nbytes)
        products.append(out.size * a.shape[-1])

    with strict_cupy.strict_cupy() as machine, mock.patch.multiple(
            strict_cupy, launch=launch, call=call), mock.patch.object(
            Cublas, "gemm", gemm):
        machine.memory = 2**40
        gpu = get_backend("cupy")
        learner = Learner(run, TASKS["classification"], gpu)
        examples = examples_of(learner, learner.fixed, batch, gpu, False)
        batches = [Batch(examples.x, examples.y, examples.rows)]
        for _ in range(2):
            for one in launches, moved, products:
                one.clear()
            learner.step(batches, examples, 1e-4)
    return Step(launches, moved, sum(products))


def main(models):
    for model in models:
        for gate in GATES:
            step = counted(run_of(model, gate), 16)
            largest = ", ".join(f"{name} {step.launches[name]} ({size / 1e6:.0f} MB)"
                                for name, size in step.bytes.most_common(6))
            print(f"{model} {gate}: {step.launches.total()} launches, "
                  f"{step.bytes.total() / 1e9:.2f} GB, {step.multiply_adds / 1e9:.1f} G "
                  f"multiply-adds; {largest}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["vit-512", "mixer-512"])
