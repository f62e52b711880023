"""Run the blocks of a page of README and docs, and fill in what they print.

``python -m tests.pages docs/check-your-implementation.md`` writes that page anew.
"""

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from comet_np import conformance
from comet_np.conformance.mistakes import Between, Mistake
from comet_np.conformance.search import number

ROOT = Path(__file__).resolve().parent.parent
OF_CI = 2  # README's first blocks of shell lines install this package and run its tests: .ci/run
# A block that is to run; a block of text that follows is what it prints.
BLOCK = re.compile(r"(^```(python|sh)\n(.*?)^```\n)(\n```text\n.*?^```\n)?",
                   re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"^\| mistake \|.*?(?=\n\n|\n?\Z)", re.DOTALL | re.MULTILINE)
STAGES = {"MLP": "output", "GRADIENTS": "gradients", "TRAINING": "training"}


def blocks_of(page):
    """Return the blocks of a page that are to run, in order: their language and lines."""
    found = [match.group(2, 3) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    shell = [i for i, (language, _) in enumerate(found) if language == "sh"]
    left_out = shell[:OF_CI] if page.name == "README.md" else []
    return [block for i, block in enumerate(found) if i not in left_out]


def run_shell(lines, folder):
    """Run lines in a shell that knows the commands of this package, and return what they print."""
    for name, module in (("python", ""), ("comet-np", " -m comet_np.experiments.cli")):
        command = folder / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{module} "$@"\n')
        command.chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return subprocess.run(["bash", "-euc", lines], cwd=folder, check=True, timeout=300, text=True,
                          stdout=subprocess.PIPE,
                          env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}).stdout


def run_page(blocks, folder):
    """Run the blocks of a page in a folder, Python in one namespace.

    Returns
    -------
    names : dict
        That namespace.
    printed : list of str
        What each block prints; None of one that needs what is not installed.
    """
    names, printed = {}, []
    for language, lines in blocks:
        if language == "sh":
            printed.append(run_shell(lines, folder))
        elif all(can_import(name) for name in re.findall(
                r"^(?:import|from) (torch|jax|sklearn)\b", lines, re.MULTILINE)):
            with redirect_stdout(io.StringIO()) as text:
                exec(lines, names)
            printed.append(text.getvalue())
        else:
            printed.append(None)
    return names, printed


def can_import(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def filled(text, printed):
    """Return the text of a page with what its blocks print, and the table of mistakes."""
    left = iter(printed)

    def with_output(match):
        block, _, _, output = match.groups()
        now = next(left)
        return block + (output or "" if output is None or now is None else
                        f"\n```text\n{now.rstrip()}\n```\n")

    return TABLE.sub(lambda _: table_of_mistakes(), BLOCK.sub(with_output, text))


def table_of_mistakes():
    """Return the rows of all known mistakes, a row a name, as the tables have them."""
    rows = {}
    modules = [conformance.mistakes] + [
        import_module(f"{conformance.__name__}.{module.name}")
        for module in iter_modules(conformance.__path__) if not module.ispkg]
    for module in modules:
        for table, entries in vars(module).items():
            if isinstance(entries, tuple) and entries and all(
                    isinstance(entry, Mistake) for entry in entries):
                for entry in entries:
                    value = "..." if isinstance(number(entry), Between) else str(number(entry))
                    said = entry.sentence.removeprefix("in the MLPs: ").replace("{value}", value)
                    rows.setdefault(entry.name, {})[said] = None
                    if table in STAGES:
                        rows[entry.name].setdefault("stage", STAGES[table])
    lines = ["| mistake | shows in | what was done |", "|---|---|---|"]
    for name, sentences in rows.items():
        stage = sentences.pop("stage", "layers")
        said = "; or ".join(sentences).replace("|", r"\|")
        lines.append(f"| `{name}` | {stage} | {said} |")
    return "\n".join(lines)


def write(page):
    """Run a page in a new folder, and write it with what its blocks print."""
    blocks, text = blocks_of(page), page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _, printed = run_page(blocks, Path(folder))
    page.write_text(filled(text, printed), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]).resolve())
