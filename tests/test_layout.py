"""The shape of the project: what imports what, and what the core needs."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each may import what comes before it in this list, and itself.
ORDER = ("backends", "errors", "rng", "tree", "checkpoint", "schedules", "precision", "optim",
         "functional", "models", "interop", "gradcheck", "experiments", "benchmarks")
OPTIONAL = {"backends/cupy_backend.py": {"cupy", "cupyx"}}  # of the one file that may import it
INSIDE = ("backends", "experiments", "benchmarks")  # top level here, comet_np.NAME when imported
LAZY = {("experiments", "benchmarks")}  # the command `comet-np bench` imports it when called


def python_files(*folders):
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def path(file):
    return file.relative_to(ROOT).as_posix()


def module_of(file):
    """Return the dotted name of a file as a list, the package's own files ending in __init__."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ["comet_np", *parts] if parts[0] in INSIDE else parts


def imports_of(file):
    """Yield the absolute dotted name of all that a file imports."""
    package = module_of(file)[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def place_of(name):
    """Return the part of the project that a dotted name of comet_np belongs to."""
    part = name.split(".")[1]
    return part if part in ORDER else "functional"  # a name of comet_np/__init__.py is from there


@pytest.mark.parametrize("file", python_files("comet_np", *INSIDE), ids=path)
def test_imports_go_downward(file):
    module = module_of(file)
    if module == ["comet_np", "__init__"]:
        return
    part = module[1]
    assert part in ORDER, f"give {part} a place in the order of imports"
    for name in imports_of(file):
        if name.startswith("comet_np.") and (part, other := place_of(name)) not in LAZY:
            assert ORDER.index(other) <= ORDER.index(part), f"{part} must not import {name}"


@pytest.mark.parametrize("file", python_files("comet_np", "backends"), ids=path)
def test_the_core_needs_numpy_and_scipy_only(file):
    allowed = {"comet_np", "numpy", "scipy", *sys.stdlib_module_names,
               *OPTIONAL.get(path(file), ())}
    assert {name.split(".")[0] for name in imports_of(file)} <= allowed


def test_the_checker_sees_relative_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "comet_np" / "functional" / "norm.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ..models import mlp\nfrom .routing import winners\nfrom .. import optim\n"
                    "def f():\n    import torch\n")
    assert list(imports_of(file)) == ["comet_np.models.mlp", "comet_np.functional.routing.winners",
                                      "comet_np.optim", "torch"]
    with pytest.raises(AssertionError, match=r"functional must not import comet_np\.models\.mlp"):
        test_imports_go_downward(file)
    with pytest.raises(AssertionError):
        test_the_core_needs_numpy_and_scipy_only(file)
