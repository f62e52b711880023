"""What a package index would show and give: `.ci/run` builds, checks and installs it."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def description():
    """Return the README as setup.py gives it to an index."""
    pytest.importorskip("setuptools", reason="only needed to build the package")
    spec = importlib.util.spec_from_file_location("setup_of_comet_np", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.description()


def test_all_links_of_the_description_lead_somewhere(description):
    """An index has no files beside it, and no headings to jump to."""
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert targets
    assert all(target.startswith("https://") for target in targets), targets


def test_the_description_says_what_the_readme_says(description):
    assert description.startswith("# COMET-NP\n")
    code = re.findall(r"^```.*?^```", README, re.DOTALL | re.MULTILINE)
    assert len(code) > 5
    assert re.findall(r"^```.*?^```", description, re.DOTALL | re.MULTILINE) == code
    plain = re.sub(r"^!.*\n\n", "", README, flags=re.MULTILINE)
    words = re.sub(r"\]\([^)]*\)|[][]", "", plain).split()
    assert re.sub(r"\]\([^)]*\)|[][]", "", description).split() == words
