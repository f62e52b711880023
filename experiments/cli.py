"""The command `comet-np`."""

import argparse
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__, settings
from ..errors import REMEDIES, UserError, nearest, of_system, unknown, user_path
from .datasets import in_folder
from .experiment import Cell, Experiment
from .registry import EXPERIMENTS
from .registry import experiment as find
from .signals import raise_on_signals
from .streams import Tolerant, tolerant_streams

CELLS_ON_A_GPU = 4  # at once, if not told otherwise
STATUS = ("exit status: 0 all is done; 1 a failure; 2 bad input; 128 + n stopped by signal n, "
          "after a checkpoint (130 by Ctrl-C, 143 by SIGTERM, 129 by a closed terminal)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, see `STATUS`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with tolerant_streams() as output:
        try:
            with raise_on_signals():
                return _heard(output, _main(arguments))
        except KeyboardInterrupt as stop:
            print("\ncomet-np: stopped; the same command goes on from here", file=sys.stderr)
            exec("")  # else `python -m` ends by SIGINT where the exception passed through an exec
            return 128 + (stop.args or (signal.SIGINT,))[0]
        except SystemExit as end:  # of argparse: help, the version, or a wrong usage
            raise SystemExit(_heard(output, end.code)) from None


def _main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["run"] and "--data-parallel" in arguments:
            from .training.ranks import joined

            with joined():
                return _command(arguments)
        return _command(arguments)
    except UserError as error:
        print(f"comet-np: {error}", file=sys.stderr)
    except OSError as error:
        if error.filename is None or error.errno not in REMEDIES:
            raise  # a fault of ours
        print(f"comet-np: {of_system('use', error.filename, error, '--out or --data')}",
              file=sys.stderr)
    return 2


def _command(arguments: list[str]) -> int:
    """Parse the arguments and do what they say."""
    parser, known = _parser(arguments)
    options, rest = parser.parse_known_args(arguments)
    if rest:
        flag = rest[0].split("=")[0]
        raise UserError(f"unknown argument {flag}{nearest(flag, known)} (comet-np "
                        f"{options.command} --help lists them)")
    with in_folder(getattr(options, "data", None)):
        status: int = options.action(options)
    return status


def _heard(output: Tolerant, status: Any) -> Any:
    """Return the exit status, a failure if what was printed could not be written.

    Who stops reading, as `head` does, has read enough: no failure.
    """
    output.flush()
    if output.error is None or isinstance(output.error, BrokenPipeError):
        return status
    print(f"comet-np: cannot write to standard output ({output.error.strerror}): what was printed "
          "is lost", file=sys.stderr)
    return status or 1


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            flag = message.split()[1].rstrip(":").split("/")[0]
            message += f"; one that begins with a dash is written {flag}=-x"
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser(arguments: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """Return the parser for these arguments, and the flags of their command."""
    for argument in arguments:
        if argument.startswith("-") and argument.endswith("=--"):  # argparse drops such a value
            raise UserError(f'{argument[:-3]} cannot be "--"')
    parser = _Parser(
        "comet-np", description="COMET (arXiv 2410.08003) on NumPy and CuPy: experiments, "
        "self-checks and benchmarks.", epilog=STATUS)
    parser.add_argument("--version", action="version", version=f"comet-np {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, action: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=STATUS,
                                  allow_abbrev=False)
        sub.set_defaults(action=action)
        return sub

    command("list", _list, "list the experiments")
    run = command("run", _run, "run an experiment (a stopped one goes on), draw its figure and "
                               "print what it means")
    _add_experiment(run, arguments)
    plot = command("plot", _plot, "draw an experiment's figure again from its files")
    plot.add_argument("name", help="experiment, see: comet-np list")
    plot.add_argument("--preset", default="laptop", help="of the run (default: laptop)")
    plot.add_argument("--out", help="folder of the run (default: runs/NAME-PRESET)")
    text = command("generate", _generate, "let a trained GPT-2 go on from a prompt")
    text.add_argument("folder", help="of a finished cell, runs/NAME-PRESET/cells/CELL, or of a "
                      "GPT-2 of Hugging Face's with its tokenizer")
    text.add_argument("--prompt", required=True, metavar="TEXT", help="what the text begins with")
    text.add_argument("--tokens", type=int, default=100, help="how many to add (default: 100)")
    text.add_argument("--temperature", type=float, default=1.0, help="of the choice among tokens; "
                      "0: the most probable one always (default: 1)")
    text.add_argument("--top-k", type=int, help="choose among so many tokens only")
    text.add_argument("--top-p", type=float, help="choose among the most probable tokens only, so "
                      "many that their probability reaches this")
    text.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    text.add_argument("--backend", default="numpy", help="numpy (the default) or cupy")
    data = command("data", _data, "list the data sets: what is there, what is missing")
    data.add_argument("--data", help="folder of the data sets (default: $COMET_DATA)")
    data.add_argument("--fetch", metavar="NAME", help="download a data set into the folder")
    check = command("check", _check, "check gradients and kernels on this machine, a line each")
    check.add_argument("--backend", default="numpy", help="numpy (the default) or cupy")
    against = command("conform", _conform, "check another implementation against test vectors, "
                      "level by level")
    against.add_argument("adapter", metavar="MODULE:CLASS", help="of three methods, cap, run and "
                         "train, each of which may be missing; modules of this folder are found")
    against.add_argument("--vectors", metavar="FOLDER", help="of the test vectors (default: those "
                         "that come with COMET-NP)")
    against.add_argument("--only", metavar="PATTERN", help='cases whose names match, as "mlp-*"')
    against.add_argument("--expected", metavar="FILE", help="of failures that are expected, a case "
                         'and a level a line, as "mlp-top-k-* routing"; # begins a comment')
    against.add_argument("--count", type=int, metavar="N", help="fail unless so many cases are "
                         "run, at one level at least")
    against.add_argument("--json", metavar="FILE", help="write all results as JSON")
    against.add_argument("--html", metavar="FILE", help="write a page to read")
    vectors = command("vectors", _vectors, "write the test vectors, by which other implementations "
                      "are checked, into a folder")
    vectors.add_argument("folder", help="a new or empty one")
    vectors.add_argument("--large", action="store_true", help="more and larger ones (some 150 MB)")
    bench = command("bench", _bench, "measure speed against PyTorch, JAX and the machine's "
                    "limits")
    bench.add_argument("--backend", default="numpy", help="numpy (the default) or cupy")
    bench.add_argument("--preset", default="full", help="full (the default): 12 minutes; smoke: "
                       "seconds")
    networks = bench.add_mutually_exclusive_group()
    networks.add_argument("--models", action="store_const", const="models", dest="networks",
                          help="all models that the paper compares, each against its form in eager "
                          "PyTorch")
    networks.add_argument("--vision", action="store_const", const="vision", dest="networks",
                          help="ViT and MLP-Mixer against PyTorch and the bare products")
    networks.add_argument("--language", action="store_const", const="language", dest="networks",
                          help="GPT-2, training and generation, against transformers and the bare "
                          "products")
    networks.add_argument("--inference", action="store_const", const="inference", dest="networks",
                          help="forward passes of 1 to 8 examples that compute the winners alone, "
                          "against eager PyTorch")
    bench.add_argument("--out", help="folder for the result and the plot "
                       "(default: runs/bench, or runs/bench-models, runs/bench-vision, "
                       "runs/bench-language, runs/bench-inference)")
    bench.add_argument("--repeats", type=int, default=5, help="processes a cell and framework "
                       "(default: 5)")
    bench.add_argument("--threads", type=int, default=None, help="threads (default: all cores)")
    bench.add_argument("--limit", type=float, default=120.0, help="seconds after which a worker "
                       "process is killed and reported, others go on (default: 120)")
    bench.add_argument("--no-compile", action="store_true", help="leave out torch.compile (slow)")
    chosen = arguments[0] if arguments and arguments[0] in commands.choices else None
    if arguments and chosen is None and not arguments[0].startswith("-"):
        raise unknown("command", arguments[0], commands.choices)
    flags = commands.choices[chosen]._option_string_actions if chosen else {}
    return parser, list(flags)


def _add_experiment(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("name", help="experiment, see: comet-np list")
    parser.add_argument("--preset", default="laptop",
                        help="smoke: seconds; laptop (the default): minutes on 2 cores; paper: its "
                        "numbers")
    parser.add_argument("--backend", default="numpy",
                        help="numpy (the default): CPU; cupy: CUDA")
    parser.add_argument("--out", help="folder for results (default: runs/NAME-PRESET)")
    parser.add_argument("--data", help="folder of the data sets (default: $COMET_DATA)")
    parser.add_argument("--jobs", type=int, help="cells run at a time (default: one a core, in "
                        f"processes that share out the threads; on a GPU {CELLS_ON_A_GPU}, each "
                        "with a stream of its own)")
    parser.add_argument("--mpi", action="store_true", help="run the cells on the ranks of MPI")
    parser.add_argument("--data-parallel", action="store_true", help="under mpiexec: run the cells "
                        "one after the other, each on all ranks, which share out the --accumulate "
                        "mini-batches of a step; the numbers are those of one process, to rounding")
    # the name is the first argument that is not the value of a flag: its settings become flags
    name = next((a for before, a in itertools.pairwise(arguments)
                 if a in EXPERIMENTS and (not before.startswith("--") or "=" in before
                                          or before in ("--mpi", "--data-parallel"))), None)
    if name is None:
        return
    group = parser.add_argument_group(f"settings of {name} (those of the preset if not given)")
    experiment = find(name)
    laptop = settings.values(experiment.configure("laptop", {}))
    for flag, field in settings.flags(experiment.config):
        default = laptop[flag]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        group.add_argument("--" + flag.replace("_", "-"), dest=f"set_{flag}", metavar="VALUE",
                           default=argparse.SUPPRESS,
                           help=f"{field.metadata['help']} (laptop: {shown})")


def _out(options: argparse.Namespace) -> Path:
    return _folder(options.out, f"runs/{options.name}-{options.preset}")


def _folder(out: str | None, default: str, flag: str = "--out") -> Path:
    if out == "":
        raise UserError(f"{flag} needs a folder, got nothing")
    return user_path(out or default)


def _list(options: argparse.Namespace) -> int:
    for name, (_, title) in EXPERIMENTS.items():
        print(f"{name:12} {title}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from ..backends import get_backend
    from ..backends.cpu import cores
    from . import datasets
    from .experiment import keep_record, make_folder
    from .progress import Progress, duration
    from .provenance import provenance
    from .sweep import Sweep, at_once, cells_of, expected_seconds, summary
    from .training.ranks import of_command

    experiment = find(options.name)
    changes = {flag: settings.parse(flag, field, getattr(options, f"set_{flag}"))
               for flag, field in settings.flags(experiment.config)
               if hasattr(options, f"set_{flag}")}
    config = experiment.configure(options.preset, changes)
    backend = get_backend(options.backend)  # a missing GPU is said before any work
    cells = experiment.cells(config)
    ranks, values = of_command(), settings.values(config)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}")
    if options.data_parallel:
        if options.mpi or options.jobs is not None:
            raise UserError("--data-parallel runs the cells one after the other, each on all "
                            "ranks: leave out --mpi and --jobs")
        if "accumulate" not in values:
            raise UserError("--data-parallel shares out the mini-batches of a step, and "
                            f"{experiment.name} has no --accumulate: run it with --mpi or --jobs")
        ranks.same({"experiment": experiment.name, "preset": options.preset, **values,
                    "backend": options.backend, "version": __version__})
        parts = values["accumulate"]
        ranks.check(min(parts) if isinstance(parts, tuple) else parts)
        ranks.place(backend)
    out = _out(options)

    def unfinished() -> list[Cell]:
        """Return the cells to run; their work is one rank's, their memory of all its neighbours."""
        missing = [cell.result(out) is None for cell in cells] if ranks.first else None
        return [cell._replace(work=cell.work / ranks.size, memory=cell.memory * ranks.neighbours)
                for cell in itertools.compress(cells, ranks.broadcast(missing))]

    if ranks.first:
        make_folder(out)
    to_run = unfinished()
    most = 1 if options.data_parallel else min(CELLS_ON_A_GPU if backend.waits else cores(),
                                               len(cells))
    jobs = at_once(experiment, to_run, backend, options.jobs, most)
    if to_run:
        datasets.look(experiment.datasets(config), options.data)
    if to_run and experiment.prepare is not None:
        prepare = functools.partial(experiment.prepare, config, options.data, Progress(1))
        prepared = prepare() if ranks.first else None
        ranks.broadcast(None)  # the others find what the first has made, if they share a disk
        cells = prepared or prepare()
        to_run = unfinished()
    chosen = getattr(config, "target", None), getattr(config, "task", None)
    found = {name: datasets.sizes_of(name, *chosen) for name in experiment.datasets(config)}
    own = {name: sizes for name, sizes in found.items() if sizes.digest}
    record = {"experiment": experiment.name, "config": values, "own data": own,
              "preset": options.preset, "jobs": jobs, "mpi": options.mpi,
              "ranks": ranks.size,
              **provenance(options.backend)}
    if ranks.first and (notice := keep_record(out, record, bool(to_run))):
        print(notice)
    for name, sizes in own.items():
        kind = "classes" if sizes.task == "classification" else "targets"
        print(f"{name}: {sizes.examples} training examples (80 %), {sizes.inputs} features, "
              f"{sizes.outputs} {kind if sizes.outputs > 1 else kind[:-1]}")
    started = time.monotonic()
    dtype = "float64" if "float64" in values.get("precision", ()) else "float32"
    expected = expected_seconds(to_run, backend, dtype)
    print(f"{experiment.name} ({options.preset}): {cells_of(len(cells))} on "
          f"{backend.describe()['device']}, "
          f"{f'about {duration(expected)}' if expected > 5 else 'some seconds'}"
          f"{_memory(to_run, jobs)}, into {out}", flush=True)
    outcomes = Sweep(experiment.name, cells, out, options.backend, options.data, jobs,
                     options.mpi).run()
    print(summary(outcomes, time.monotonic() - started))
    finished = [outcome for outcome in outcomes if outcome.status in ("done", "found")]
    if finished and ranks.first:
        _show(experiment, config, out, options.preset)
    return 0 if len(finished) == len(outcomes) else 1


def _memory(cells: list[Cell], jobs: int) -> str:
    """Return what cells take at the most that run at a time, in words; nothing if little."""
    from .sweep import memory_of

    needed, jobs = memory_of(cells, jobs), min(jobs, len(cells))
    if needed < 1e8:
        return ""
    return (f", about {needed / 1e9:.1f} GB of memory beside the data"
            + f" ({jobs} cells at a time)" * (jobs > 1))


def _plot(options: argparse.Namespace) -> int:
    from .experiment import read_record

    experiment, out = find(options.name), _out(options)
    config, preset = read_record(out, experiment)
    _show(experiment, config, out, preset)
    return 0


def _show(experiment: Experiment, config: Any, out: Path, preset: str) -> None:
    """Print the table of a run and draw its figures."""
    print(experiment.table(config, out))
    if preset == "smoke":
        print("a smoke run: it shows that everything works, its numbers mean nothing")
    for file in experiment.draw(config, out):
        print(f"figure: {file}")


def _generate(options: argparse.Namespace) -> int:
    from .generating import write_text

    try:
        write_text(options.folder, options.prompt, options.tokens, options.temperature,
                   options.top_k, options.top_p, options.seed, options.backend)
    except KeyboardInterrupt as stop:
        print("comet-np: stopped", file=sys.stderr)
        return int(128 + (stop.args or (signal.SIGINT,))[0])
    return 0


def _data(options: argparse.Namespace) -> int:
    from . import datasets

    folder = options.data or os.environ.get("COMET_DATA")
    if options.fetch:
        if not folder:
            raise UserError("--fetch needs a folder to download into: --data DIR, or COMET_DATA")
        datasets.fetch(options.fetch, folder)
    for row in datasets.report(folder):
        print("  ".join(f"{cell:13}" for cell in row).rstrip())
    return 0


def _check(options: argparse.Namespace) -> int:
    from ..backends import get_backend
    from ..selfcheck import run_checks

    return run_checks(get_backend(options.backend))


def _conform(options: argparse.Namespace) -> int:
    from ..conformance import conform
    from ..conformance.adapter import load
    from ..conformance.vectors import read_all

    folder = user_path(options.vectors) if options.vectors else None
    cases = read_all(folder)
    expected = (conform.Expected(user_path(options.expected), cases) if options.expected
                else None)
    if options.only:
        cases = conform.chosen(cases, options.only)
    report = conform.conform(load(options.adapter), cases, expected, options.adapter,
                             str(folder or ""))
    print(report)
    if options.json:
        _write(options.json, json.dumps(report.json(), indent=1) + "\n", "--json")
    if options.html:
        from ..conformance.page import page

        _write(options.html, page(report), "--html")
    if options.count is not None and report.cases != options.count:
        print(f"comet-np: expected {conform.many(options.count, 'case')} to be run, and "
              f"{report.cases} were", file=sys.stderr)
        return 1
    return 0 if report.ok else 1


def _write(file: str, text: str, flag: str) -> None:
    path = user_path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(of_system("write", file, error, flag)) from None


def _vectors(options: argparse.Namespace) -> int:
    from ..conformance.vectors import cases
    from .progress import Progress

    folder = _folder(options.folder, "", "comet-np vectors")
    total = cases.count(options.large)
    progress = Progress(total, unit="vectors")
    try:
        size = cases.write_all(folder, options.large, progress.advance)
    except KeyboardInterrupt as stop:
        print(f"\ncomet-np: stopped; {folder} has some of the vectors: delete it and start anew",
              file=sys.stderr)
        return int(128 + (stop.args or (signal.SIGINT,))[0])
    except OSError as error:
        raise UserError(of_system("write", error.filename or folder, error, "")) from None
    finally:
        progress.clear()
    print(f"{total} test vectors, {size / 1e6:.1f} MB, in {folder}; {folder / 'FORMAT.md'} says "
          "how to read them")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from ..backends import get_backend
    from ..benchmarks import bench
    from .progress import duration

    get_backend(options.backend)  # an unknown name or a missing GPU is said before any work
    default = f"runs/bench-{options.networks}" if options.networks else "runs/bench"
    started, out = time.monotonic(), _folder(options.out, default)
    try:
        all_ran = bench.run(options.backend, options.preset, out, options.repeats,
                            options.threads, not options.no_compile, options.limit,
                            options.networks)
    except KeyboardInterrupt:
        print(f"\ncomet-np: stopped; {out / 'bench.json'} has what was measured, the same command "
              "starts anew", file=sys.stderr)
        return 130
    print(f"measured in {duration(time.monotonic() - started)}")
    return 0 if all_ran else 1


if __name__ == "__main__":
    sys.exit(main())
