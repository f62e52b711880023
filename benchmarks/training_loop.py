"""What training costs besides its steps: ``python -m comet_np.benchmarks.training_loop``.

Prints the share of the loop (all of training but forward, backward, update, evaluation and
checkpoints) in a step at N = 1000 and batch 32, the cost of a checkpoint at N = 3000 and its share
of the time at the pace at which they are written, and, with the data at hand, the time that loading
CIFAR10 takes.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from ..backends import get_backend
from ..backends.cpu import keep_freed_memory
from ..errors import UserError
from ..experiments import datasets
from ..experiments.progress import Progress
from ..experiments.training import Learner, RunConfig, TrainConfig, record, train
from ..experiments.training.run import Run
from ..models.mlp import MLPConfig
from ..optim import OptimizerConfig


def config(N: int, epochs: int, optimizer: str) -> RunConfig:
    """Return a run of the COMET MLP with 3 hidden layers of N on the built-in images."""
    sizes = datasets.sizes_of("glyphs")
    return RunConfig(MLPConfig((sizes.inputs, N, N, N, sizes.outputs)),
                     TrainConfig(OptimizerConfig(optimizer), lr=1e-3, epochs=epochs))


def loop() -> None:
    """Print the share of the loop."""
    steps: list[float] = []
    take = Learner.step

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        loss = take(*arguments)
        steps.append(time.perf_counter() - started)
        return loss

    data = datasets.load("glyphs")
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Learner, "step", timed):
        seconds = train(config(1000, 4, "sgd"), data, Path(folder), get_backend("numpy"))["seconds"]
    rest = seconds["train"] - sum(steps)
    print(f"loop: {1e6 * rest / len(steps):.0f} us of a step of "
          f"{1e6 * seconds['train'] / len(steps):.0f} us, {rest / seconds['train']:.1%} (N = 1000, "
          "batch 32, masks kept)")


def checkpoints() -> None:
    """Print the cost of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(config(3000, 0, "adam"), datasets.load("glyphs"), Path(folder),
                  get_backend("numpy"), Progress(1))
        with run.record:
            record.save(run)
            record.save(run)
        cost = run.record.save_cost
        pace = max(record.LEAST_CHECKPOINT_SECONDS, cost / record.CHECKPOINT_SHARE)
        size = (Path(folder) / "checkpoint").stat().st_size / 2**20
        print(f"checkpoint: {size:.0f} MiB in {cost:.2f} s, one in {pace:.0f} s: "
              f"{cost / pace:.1%} of the time (N = 3000, Adam)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("COMET_DATA"), help="folder with CIFAR10")
    options = parser.parse_args()
    keep_freed_memory()
    loop()
    checkpoints()
    try:
        started = time.perf_counter()
        datasets.load("cifar10", options.data)
        print(f"CIFAR10 loaded in {time.perf_counter() - started:.2f} s")
    except UserError as error:
        print(f"CIFAR10 not measured: {error}")


if __name__ == "__main__":
    main()
