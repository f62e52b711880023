"""The shape of the project: what imports what, what the core needs, and what loads when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Each may import what comes before it in this list, and itself. The command is the top of all: it
# is where `experiments` and `benchmarks` come together.
ORDER = ("errors", "backends", "settings", "rng", "tree", "checkpoint", "records", "schedules",
         "precision", "optim", "functional", "gates", "models", "analysis", "generation",
         "interop", "gradcheck", "samples", "conformance", "selfcheck", "experiments",
         "benchmarks", "experiments.cli")
OPTIONAL = {  # what the core may import besides NumPy and SciPy, and where
    "backends/cupy_backend.py": {"cupy", "cupyx"}, "backends/cublas.py": {"ml_dtypes"},
    "comet_np/precision.py": {"ml_dtypes"}, "comet_np/interop/tensors.py": {"safetensors"}}
INSIDE = ("backends", "experiments", "benchmarks")  # top level here, comet_np.NAME when imported


def python_files(*folders):
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


ALL_FILES = python_files("comet_np", *INSIDE)


def path(file):
    return file.relative_to(ROOT).as_posix()


def name_of(file):
    """Return the dotted name of a file as a list; a package's own ends in __init__."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ["comet_np", *parts] if parts[0] in INSIDE else parts


def imports_of(file):
    """Yield the absolute dotted name of all that a file imports, wherever in it."""
    package = name_of(file)[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def place_of(name):
    """Return the part of the project that a dotted name of comet_np belongs to."""
    parts = name.split(".")[1:]
    for part in (".".join(parts[:2]), parts[0]):
        if part in ORDER:
            return part
    return "functional"  # a name of comet_np/__init__.py is from there


@pytest.mark.parametrize("file", ALL_FILES, ids=path)
def test_imports_go_downward(file):
    module = name_of(file)
    if module == ["comet_np", "__init__"]:
        return
    assert module[1] in ORDER, f"give {module[1]} a place in the order of imports"
    part = place_of(".".join(module))
    for name in imports_of(file):
        if name.startswith("comet_np."):
            other = place_of(name)
            assert ORDER.index(other) <= ORDER.index(part), f"{part} must not import {name}"


# --- circles ------------------------------------------------------------------------------------


def import_graph(files):
    """Return the modules that each of the files imports, both by dotted name."""
    modules = {".".join(name_of(file)).removesuffix(".__init__"): file for file in files}

    def module_of(name):  # the longest beginning of the name that is a module
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    return {module: {module_of(name) for name in imports_of(file)} - {""}
            for module, file in modules.items()}


def circles(graph):
    """Return the sets of modules of which each imports, in some steps, each other."""
    def reached(module, found):
        for other in graph[module] - found:
            found.add(other)
            reached(other, found)
        return found

    reach = {module: reached(module, set()) for module in graph}
    return {frozenset(other for other in reach[module] if module in reach[other])
            for module in graph if module in reach[module]}


def test_there_is_no_import_circle():
    """Imports within functions count too."""
    assert circles(import_graph(ALL_FILES)) == set()


def test_circles_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    folder = tmp_path / "comet_np" / "gates"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from .comet import Comet\n")
    (folder / "comet.py").write_text("def f():\n    from . import kept\n")
    (folder / "kept.py").write_text("from ..gates.comet import Comet\nfrom . import base\n")
    (folder / "base.py").write_text("import numpy\n")
    files = python_files("comet_np")
    assert circles(import_graph(files)) == {frozenset({"comet_np.gates.comet",
                                                       "comet_np.gates.kept"})}
    (folder / "base.py").write_text("from . import Comet\n")  # from the package itself
    assert any("comet_np.gates" in circle for circle in circles(import_graph(files)))


# --- what is needed, and when it is loaded ------------------------------------------------------


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


def loaded_after(code):
    """Return the names of all modules that a fresh Python has loaded after some code."""
    answer = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"],
        cwd=ROOT, capture_output=True, text=True, check=True)
    return set(answer.stderr.split())


def test_the_package_loads_no_statistics():
    assert not {"scipy.stats", "matplotlib"} & loaded_after(
        "import comet_np.gates, comet_np.models.mlp, comet_np.optim")


def test_the_list_of_experiments_comes_without_scipy():
    loaded = loaded_after("from comet_np.experiments.cli import main\nmain(['list'])")
    assert not {"scipy", "matplotlib", "comet_np.experiments.fig2"} & loaded
