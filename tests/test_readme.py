"""What README and docs show runs as it stands there, and their links lead to what they name."""

import re
from pathlib import Path

import pytest

from tests.pages import blocks_of, can_import, filled, run_page, table_of_mistakes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECK = ROOT / "docs" / "check-your-implementation.md"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)],
                         ids=lambda page: page.name)
def test_pages_run_as_they_stand(page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names, printed = run_page(blocks_of(page), tmp_path)
    if page.name == "README.md":
        if can_import("torch"):
            assert names["report"].mistakes == ("mask-before-activation",)
            assert names["a_L"].shape == (5, 4)
        assert [m.shape for m in names["t"].m] == [(5, 1000)] * 3
        assert (tmp_path / "my-run" / "quickstart.png").exists()
        assert names["model"].config.gate == names["HalfSpaces"]()
    else:  # if not: python -m tests.pages docs/PAGE.md
        text = page.read_text(encoding="utf-8")
        assert filled(text, printed) == text


def test_all_known_mistakes_are_on_the_page():
    """If not: python -m tests.pages docs/check-your-implementation.md"""
    table = table_of_mistakes()
    assert len(table.splitlines()) > 60
    assert table in CHECK.read_text(encoding="utf-8")


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
