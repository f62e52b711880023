"""README's Python runs as it stands there, and its links lead to what they name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(snippet):
    names = {}
    exec(snippet, names)
    return names


def test_every_intermediate_by_its_name():
    trace = run(SNIPPETS[0])["t"]
    assert [m.shape for m in trace.m] == [(5, 1000)] * 3


def test_the_cross_check():
    pytest.importorskip("torch")
    names = run(SNIPPETS[1])
    assert names["named"].keys() == {f"fc{layer}.{what}" for layer in range(1, 5)
                                     for what in ("weight", "bias")}
    assert [m.shape for m in names["cache"].masks] == [(5, 64)] * 3


def test_there_is_no_other_snippet():
    assert len(SNIPPETS) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_links_to_functions_name_their_lines():
    links = re.findall(r"\[`(\w+)`\]\(([^)#]+)#L(\d+)\)", README)
    assert len(links) >= 5
    for name, file, line in links:
        found = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert found.startswith(f"def {name}("), f"{name} is not on line {line} of {file}"
