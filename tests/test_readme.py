"""What README and docs show runs as it stands there, and their links lead to what they name."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OF_CI = 2  # README's first blocks of shell lines install this package and run its tests: .ci/run


def blocks_of(page):
    """Return the blocks of a page that are to run, in order: their language and lines."""
    found = re.findall(r"^```(python|sh)\n(.*?)^```", page.read_text(encoding="utf-8"),
                       re.DOTALL | re.MULTILINE)
    shell = [i for i, (language, _) in enumerate(found) if language == "sh"]
    left_out = shell[:OF_CI] if page.name == "README.md" else []
    return [block for i, block in enumerate(found) if i not in left_out]


def run_shell(lines, folder):
    """Run lines in a shell that knows the commands of this package."""
    for name, module in (("python", ""), ("comet-np", " -m comet_np.experiments.cli")):
        command = folder / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{module} "$@"\n')
        command.chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    subprocess.run(["bash", "-euc", lines], cwd=folder, check=True, timeout=300,
                   env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)})


def run_page(blocks, folder):
    """Run the blocks of a page in a folder, Python in one namespace, and return that."""
    names = {}
    for language, lines in blocks:
        if language == "sh":
            run_shell(lines, folder)
        elif "import torch" not in lines or can_import("torch"):
            exec(lines, names)
    return names


def can_import(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)],
                         ids=lambda page: page.name)
def test_pages_run_as_they_stand(page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names = run_page(blocks_of(page), tmp_path)
    if page.name == "README.md":
        assert names.get("differ", []) == []
        assert ("differ" in names) == can_import("torch")
        assert [m.shape for m in names["t"].m] == [(5, 1000)] * 3
        assert (tmp_path / "my-run" / "quickstart.png").exists()
        assert names["model"].config.gate == names["HalfSpaces"]()


def test_the_cross_check_names_what_is_wrong():
    """Here the mask before the activation."""
    pytest.importorskip("torch")
    block, = (lines for _, lines in blocks_of(ROOT / "README.md") if "import torch" in lines)
    right = "m * torch.nn.functional.softplus(fc(x))"
    assert block.count(right) == 1
    names = {}
    exec(block.replace(right, "torch.nn.functional.softplus(m * fc(x))"), names)
    assert names["differ"][:2] == ["logits", "gradient of x"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files(page):
    for target in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings(page):
    for file, heading in re.findall(r"\]\((?!http)([^)#]*)#([a-z][^)]*)\)",
                                    page.read_text(encoding="utf-8")):
        text = (page.parent / file if file else page).read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        known = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
        assert heading in known, f"{heading} is none of {known}"


def test_links_to_functions_name_their_lines():
    links = re.findall(r"\[`(\w+)`\]\(([^)#]+)#L(\d+)\)", README)
    assert len(links) >= 5
    for name, file, line in links:
        found = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert found.startswith(f"def {name}("), f"{name} is not on line {line} of {file}"
