"""Test vectors as tests of pytest: one a case and level. Its options are in `comet_np_pytest`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..errors import UserError, user_path
from .adapter import load
from .conform import Checker, Expected, Result, catches, many
from .vectors import Case, read_all

RUN = "comet-np case"  # the property of a test whose level is supported


class Plugin:
    """Adds the tests, and says in the summary how many cases were run.

    Raises
    ------
    pytest.UsageError
        If there is no such adapter, no such vectors, or a wrong file of expected failures.
    """

    def __init__(self, config: pytest.Config) -> None:
        folder, expected = (config.getoption(f"--comet-{name}") for name in ("vectors", "expected"))
        try:
            self.cases = read_all(user_path(folder) if folder else None)
            self.expected = Expected(user_path(expected), self.cases) if expected else None
            self.checker = Checker(load(config.getoption("--comet-adapter")))
        except UserError as error:
            raise pytest.UsageError(str(error)) from None
        self.run: set[str] = set()

    @pytest.hookimpl(tryfirst=True)  # so that -k chooses among them
    def pytest_collection_modifyitems(self, session: pytest.Session, config: pytest.Config,
                                      items: list[pytest.Item]) -> None:
        for case in self.cases:
            parent = Vector.from_parent(session, name=case.id, nodeid=f"comet-np::{case.id}")
            parent.case, parent.plugin = case, self
            items.extend(parent.collect())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # In the process that reports, which with pytest-xdist is not the one that checks.
        self.run.update(str(case) for name, case in report.user_properties if name == RUN)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"comet-np: {many(len(self.run), 'case')} of "
                                    f"{len(self.cases)} run")


class Vector(pytest.Collector):
    """A case."""

    case: Case
    plugin: Plugin

    def collect(self) -> Iterator[pytest.Item]:
        """Yield a test a level."""
        for level in self.case.levels:
            item = Level.from_parent(self, name=level)
            if self.plugin.expected is not None and (self.case.id, level) in self.plugin.expected:
                item.add_marker(pytest.mark.xfail(reason="listed as an expected failure",
                                                  strict=True))
            yield item


class Level(pytest.Item):
    """A level of a case."""

    parent: Vector

    def runtest(self) -> None:
        """Ask the adapter, and compare."""
        case = self.parent.case
        result = self.parent.plugin.checker.check(case, self.name)
        if result.status == "unsupported":
            pytest.skip(result.reason)
        self.user_properties.append((RUN, case.id))
        if result.status == "failed":
            raise Differs(result)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException],
                     style: Any = None) -> Any:
        """Return the sentence, and of an adapter that raised its traceback."""
        if not isinstance(excinfo.value, Differs):
            return super().repr_failure(excinfo, style)
        result: Result = excinfo.value.args[0]
        lines = [result.trace, result.sentence]
        if caught := catches(result):
            lines.append(f"this case catches: {', '.join(caught)}")
        return "\n".join(filter(None, lines))

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return what stands above a failure."""
        return self.path, None, f"{self.parent.case.id}, {self.name}"


class Differs(Exception):
    """A result that is a failure."""

    def __str__(self) -> str:
        return str(self.args[0].sentence)
