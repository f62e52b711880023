"""The table of claims: each has a place, a verdict, evidence and a command that is one."""

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from comet_np import settings
from comet_np.experiments import cli
from comet_np.experiments.registry import experiment

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
VERDICTS = {"holds": "hold", "holds in part": "hold in part", "does not hold": "do not hold",
            "cannot be tested here": "cannot be tested here"}
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines()
        if re.match(r"\| \d", line)]
COMMANDS = sorted({command for row in ROWS for command in re.findall(r"`([^`]+)`", row[-1])})


def test_the_table_is_whole():
    assert [row[0].strip() for row in ROWS] == [str(n) for n in range(1, len(ROWS) + 1)]
    for row in ROWS:
        assert len(row) == 6 and all(row), row
        assert row[3] in VERDICTS, row
        assert row[5].startswith("`"), row


def test_the_verdicts_are_counted():
    counts = Counter(row[3] for row in ROWS)
    said = ", ".join(f"{counts[verdict]} {verdict if counts[verdict] == 1 else words}"
                     for verdict, words in VERDICTS.items())
    assert f"Of {len(ROWS)} claims {said}." in PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_right(command):
    program, *arguments = shlex.split(command)
    if program == "python":
        assert arguments[0] == "-m"
        name = arguments[1]
        assert name == "pytest" or (ROOT / f"{name.removeprefix('comet_np.').replace('.', '/')}.py"
                                    ).exists()
        if name == "pytest":
            assert (ROOT / arguments[2]).exists()
        return
    assert program == "comet-np"
    options = cli._parser(arguments)[0].parse_args(arguments)
    if options.command == "run":
        found = experiment(options.name)
        changes = {flag: settings.parse(flag, field, getattr(options, f"set_{flag}"))
                   for flag, field in settings.flags(found.config)
                   if hasattr(options, f"set_{flag}")}
        assert found.cells(found.configure(options.preset, changes))
