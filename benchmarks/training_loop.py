"""What training costs besides its steps: ``python -m comet_np.benchmarks.training_loop``.

Prints the share of the loop (all of training but forward, backward, update, evaluation and
checkpoints) in a step at N = 1000 and batch 32, the cost of a checkpoint at N = 3000 and its share
of the time at the pace at which they are written, how much sooner 3 seeds are trained side by side
than one by one (on one thread, as in a sweep), and, with the data at hand, the time that loading
CIFAR10 takes.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..backends import get_backend
from ..backends.numpy_backend import keep_freed_memory
from ..errors import UserError
from ..experiments import datasets, training
from ..experiments.progress import Progress
from ..experiments.training import TrainConfig, Trainer
from ..models.mlp import MLPConfig
from ..optim import OptimizerConfig

SEEDS = (0, 1, 2)
REPEATS = 3  # of the training side by side; the shortest counts


def trainer(N: int, epochs: int, optimizer: str, folder: str, data: str = "glyphs",
            seeds: tuple[int, ...] = (0,)) -> Trainer:
    """Return a run of the COMET MLP with 3 hidden layers of N on built-in data."""
    loaded = datasets.load(data)
    widths = (loaded.x_train.shape[1], N, N, N, loaded.outputs)
    config = TrainConfig(MLPConfig(widths), OptimizerConfig(optimizer), lr=1e-3, epochs=epochs,
                         seeds=seeds)
    return Trainer(config, loaded, Path(folder), get_backend("numpy"), Progress(1))


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return `function`, with the time of each call appended to `seconds`."""
    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        seconds.append(time.perf_counter() - started)
        return result

    return call


def gain_side_by_side(data: str, N: int) -> float:
    """Return the time of training `SEEDS` one by one over that side by side."""
    def seconds(*seeds: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return float(trainer(N, 1, "sgd", folder, data, seeds).run()["seconds"]["train"])

    keep_freed_memory()
    together = [seconds(*SEEDS) for _ in range(REPEATS)]
    return min(sum(map(seconds, SEEDS)) for _ in range(REPEATS)) / min(together)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("COMET_DATA"), help="folder with CIFAR10")
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(1000, 4, "sgd", folder)
        steps: list[float] = []
        checks: list[float] = []  # of the loss, called within a step
        run.learner.step = timed(run.learner.step, steps)  # type: ignore[method-assign]
        run.check = timed(run.check, checks)  # type: ignore[method-assign]
        started = time.perf_counter()
        seconds = run.run()["seconds"]
        whole = time.perf_counter() - started - seconds["evaluate"] - seconds["checkpoint"]
        loop = whole - sum(steps) + sum(checks)
        print(f"loop: {1e6 * loop / len(steps):.0f} us of a step of {1e6 * whole / len(steps):.0f} "
              f"us, {loop / whole:.1%} (N = 1000, batch 32, masks kept)")
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(3000, 0, "adam", folder)
        run.save()
        run.save()
        pace = max(training.LEAST_CHECKPOINT_SECONDS, run.save_cost / training.CHECKPOINT_SHARE)
        size = (Path(folder) / "checkpoint").stat().st_size / 2**20
        print(f"checkpoint: {size:.0f} MiB in {run.save_cost:.2f} s, one in {pace:.0f} s: "
              f"{run.save_cost / pace:.1%} of the time (N = 3000, Adam)")
        run.metrics.close()
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the BLAS of the new process
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for data, N_0 in (("arm", 21), ("glyphs", 3072)):
            gains = [f"{pool.submit(gain_side_by_side, data, N).result():.2f} (N = {N})"
                     for N in (50, 100, 200, 500)]
            print(f"{len(SEEDS)} seeds side by side, {N_0} inputs, batch 32, one thread: "
                  f"{', '.join(gains)} times as fast as one by one")
    try:
        started = time.perf_counter()
        datasets.load("cifar10", options.data)
        print(f"CIFAR10 loaded in {time.perf_counter() - started:.2f} s")
    except UserError as error:
        print(f"CIFAR10 not measured: {error}")


if __name__ == "__main__":
    main()
