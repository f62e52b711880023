"""The benchmark, and its CPU form: every framework in processes of its own, in turn."""

import functools
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ..backends import get_backend
from ..backends.cpu import kind, processor
from ..backends.cpu import threads as usable_threads
from ..errors import UserError, unknown
from ..experiments.experiment import columns, make_folder
from . import gpu, inference, language, models, vision
from .cpu_workers import KWTA_K, KWTA_N, KWTA_ROWS, P_K
from .processes import Plan, Results, in_a_process, own_compile_cache, show_progress
from .ratios import NO_GOAL, Point, Row, draw, print_settings, shown

WIDTHS = {"smoke": (100,), "full": (100, 500, 1000, 3000)}
BATCHES = {"smoke": (32,), "full": (32, 128)}
SECONDS = {"smoke": 0.05, "full": 0.5}  # a timing, before its median is taken
PEERS = {"pytorch": "PyTorch", "jax": "jax.jit"}  # as the tables say
PACKAGES = {"pytorch": "torch", "jax": "jax"}
# Our time over PyTorch's, or over the other quantity named: what we set out to reach.
GOALS: dict[str, Any] = {
    "comet": {32: 0.60, 128: 0.75}, "cached": {32: 0.45, 128: 0.60},
    "standard": {32: 1.0, 128: 1.0}, "cached/standard": 1.05, "comet/products": 1.20,
    "kwta": 1 / 20, "memory": 1.0}
# benchmarks of other things than a training step of 3072-N-N-N-10
OTHERS = {"models": models, "vision": vision, "language": language, "inference": inference}


def run(backend: str, preset: str, out: Path, repeats: int, threads: int | None, compiled: bool,
        limit: float, networks: str | None = None) -> bool:
    """Measure, print the tables, and write ``bench.json`` and ``bench.png`` into `out`.

    ``bench.json`` is written after each worker. Return whether all workers, none of which may take
    more than `limit` seconds, returned their times. With `networks`, a name of `OTHERS`, those are
    measured, and no figure is drawn but of "language".
    """
    if preset not in SECONDS:
        raise unknown("preset", preset, SECONDS)
    for flag, value in (("--repeats", repeats), ("--threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    if not 0 < limit < math.inf:
        raise UserError(f"--limit takes seconds, more than 0, got {limit:g}")
    on_gpu = get_backend(backend).waits
    other = OTHERS.get(networks or "")
    if on_gpu and networks in ("models", "inference"):
        raise UserError(f"--{networks} measures on the CPU: leave out --backend or --{networks}")
    make_folder(out)
    if on_gpu:
        return gpu.run(preset, out, repeats, compiled, limit, networks)
    threads = threads or usable_threads()
    versions, missing = {}, {}
    for peer, packages in (other.PACKAGES if other else PACKAGES).items():
        for package in packages.split():
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                missing[peer] = f"not installed: python -m pip install {package}"
    settings = {
        "machine": processor(), "kind of processor": kind(), "cores": os.cpu_count(),
        "threads": threads, "python": platform.python_version(),
        "numpy": metadata.version("numpy"), "scipy": metadata.version("scipy"), **versions,
        **{name: os.environ.get(name, "not set")
           for name in ("OPENBLAS_CORETYPE", "OPENBLAS_THREAD_TIMEOUT")},
        "pytorch settings": f"eager, float32, torch.set_num_threads({threads}), torch.optim.SGD"
                            + "; compiled: torch.compile with its defaults" * (not other),
        **(other.SETTINGS if other else {
            "jax settings": "one jax.jit of value_and_grad and SGD, float32, parameters donated, "
                            f"compiled before; NPROC and PJRT_NPROC are {threads}, which XLA's "
                            "threads follow (not OMP_NUM_THREADS, nor XLA_FLAGS); its top-k has "
                            "one thread"}),
        "repeats": repeats, "seconds a worker": f"at most {limit:g}", "preset": preset}
    print_settings(settings)
    environment = {"JAX_PLATFORMS": "cpu"} | {name: str(threads) for name in (
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC", "PJRT_NPROC")}
    with own_compile_cache() as cache:
        worker = functools.partial(in_a_process, other.WORKERS if other else "cpu_workers",
                                   environment | cache, limit)
        results = Results(out / "bench.json", settings,
                          lambda *work: worker(*work, SECONDS[preset]))
        results.left_out.update(missing)
        measure(results, [(other.plan if other else plan)(results, preset,
                                                          compiled and repeat == 0)
                          for repeat in range(repeats)])
    named = "".join(f", {name} {version}" for name, version in versions.items())
    if other:
        print(other.report(results, preset))
        if other is language:
            title = f"{settings['machine']}, {threads} threads" + named
            print(language.draw(results, preset, title, out / "bench.png"))
        return results.all_ran
    print(report(results, preset))
    points: list[Point] = [(N, B, p_k, row) for N, B in cells(preset)
                           for p_k, row in ratios(results, N, B)]
    title = ("training step 3072-N-N-N-10, softplus, SGD (dotted: goal)\n"
             f"{settings['machine']}, {threads} threads{named}")
    print(draw(points, {"PyTorch": "eager PyTorch", "jax.jit": "jax.jit"}, title,
               out / "bench.png"))
    return results.all_ran


def cells(preset: str) -> list[tuple[int, int]]:
    """Return the widths and batch sizes of a preset."""
    return [(N, B) for N in WIDTHS[preset] for B in BATCHES[preset]]


def measure(results: Results, plans: list[Plan]) -> None:
    """Run all workers, those of each repeat in turn."""
    for repeat, workers in enumerate(plans, start=1):
        for work, size, B in workers:
            show_progress(f"repeat {repeat} of {len(plans)}: {work} {size} batch {B}")
            results.add(work, size, B)
    show_progress("")


def plan(results: Results, preset: str, compiled: bool) -> Plan:
    """Return the workers of a repeat."""
    frameworks = ["ours", *(peer for peer in PEERS if peer not in results.left_out)]
    largest = max(cells(preset))
    workers: Plan = [(work, N, B) for N, B in cells(preset) for work in (*frameworks, "products")]
    workers += [(f"memory_{name}", *largest) for name in frameworks]
    workers += [(f"kwta_{name}", KWTA_N, KWTA_ROWS) for name in frameworks]
    if compiled and "pytorch" in frameworks:
        workers += [("pytorch_compiled", N, B) for N, B in cells(preset)]
    return workers


def ratios(results: Results, N: int, B: int) -> list[tuple[float, Row]]:
    """Return, for each p_k, the ratios of one network and batch size, as "comet/PyTorch"."""
    rows = []
    for p_k in P_K:
        models = {name: f"ours {N} {B} {key}" for name, key in (
            ("comet", f"comet {p_k}"), ("cached", f"cached {p_k}"), ("standard", "standard"))}
        pairs = {}
        for peer, label in PEERS.items():
            for model, ours in models.items():
                theirs = "standard" if model == "standard" else f"comet {p_k}"
                pairs[f"{model}/{label}"] = (ours, f"{peer} {N} {B} {theirs}",
                                             GOALS[model][B] if peer == "pytorch" else NO_GOAL)
        products = f"products {N} {B}"
        rows.append((p_k, results.ratios(pairs | {
            "cached/standard": (models["cached"], models["standard"],
                                GOALS["cached/standard"]),
            "comet/products": (models["comet"], f"{products} comet",
                               GOALS["comet/products"] if N >= 1000 else NO_GOAL),
            "cached/products": (models["cached"], f"{products} standard", NO_GOAL)})))
    return rows


def report(results: Results, preset: str) -> str:
    """Return the tables: times and ratios of steps, memory, and the mask alone."""
    works = {"comet": "ours {} comet {}", "cached": "ours {} cached {}",
             "standard": "ours {} standard", "PyTorch": "pytorch {} comet {}",
             "compiled": "pytorch_compiled {} comet {}", "jax.jit": "jax {} comet {}",
             "PyTorch standard": "pytorch {} standard", "jax.jit standard": "jax {} standard"}
    ratio_names = [[f"{model}/{peer}" for peer in PEERS.values()
                    for model in ("comet", "cached", "standard")],
                   ["cached/standard", "comet/products", "cached/products"]]
    heads = [list(works), *ratio_names]
    tables = [[["N, batch, p_k", *head]] for head in heads]
    for N, B in cells(preset):
        for p_k, row in ratios(results, N, B):
            times = [results.shown(key.format(f"{N} {B}", p_k)) for key in works.values()]
            for table, values in zip(tables, (times, *(shown(row, *names)
                                                       for names in ratio_names)), strict=True):
                table.append([f"{N}, {B}, {p_k}", *values])
    lines = ["training step of 3072-N-N-N-10, softplus: ms, then ratios",
             *map(columns, tables),
             "ratio of medians (lowest-highest of the repeats); * misses the goal: PyTorch "
             "0.60 (batch 32), 0.75 (128); cached 0.45, 0.60; standard 1.0; cached/standard "
             "1.05; products 1.20 from N = 1000", ""]
    for title, work, key, unit in (
            (f"k-winner-take-all {KWTA_ROWS} x {KWTA_N}, k = {KWTA_K}", "kwta",
             f"{KWTA_N} {KWTA_ROWS} kwta", "ms"),
            ("peak memory of a training process", "memory",
             "{} {} peak MiB".format(*max(cells(preset))), "MiB")):
        ours = f"{work}_ours {key}"
        parts = [f"ours {results.shown(ours)}"]
        for peer, label in PEERS.items():
            theirs, goal = f"{work}_{peer} {key}", GOALS[work] if peer == "pytorch" else NO_GOAL
            ratio = results.ratios({label: (ours, theirs, goal)})
            parts.append(f"{label} {results.shown(theirs)}, ratio {shown(ratio, label)[0]}")
        lines.append(f"{title}, {unit}: {'; '.join(parts)}")
    return "\n".join([*lines, *results.why_left_out()])
