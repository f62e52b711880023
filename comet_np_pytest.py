"""The options of the pytest plugin of COMET-NP, which is loaded if they are given.

A module of its own, so that pytest starts without importing `comet_np` and NumPy.
"""

from typing import Any


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("comet-np", "test vectors of COMET-NP")
    group.addoption("--comet-adapter", metavar="MODULE:CLASS",
                    help="check this adapter against the test vectors, a test a case and level")
    group.addoption("--comet-vectors", metavar="FOLDER",
                    help="of the test vectors (default: those that come with COMET-NP)")
    group.addoption("--comet-expected", metavar="FILE",
                    help="of the failures that are expected, a case and a level a line")


def pytest_configure(config: Any) -> None:
    if config.getoption("--comet-adapter"):
        from comet_np.conformance import plugin

        config.pluginmanager.register(plugin.Plugin(config), "comet-np-vectors")
