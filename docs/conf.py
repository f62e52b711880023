"""The site, by ``python -m sphinx -W --keep-going -b html docs OUT`` (extra `docs`).

It needs no network, neither to be built nor to be read.
"""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

from docutils import nodes
from sphinx.directives.code import LiteralInclude
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import comet_np  # noqa: E402  (of this checkout)

project = "COMET-NP"
author = copyright = "the COMET-NP authors"
version = release = comet_np.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.viewcode",
              "sphinx-mathjax-offline"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
numpydoc_show_class_members = False  # autodoc lists them
autodoc_default_options = {"members": True, "member-order": "bysource"}
default_role = "code"
html_theme = "furo"
html_title = f"COMET-NP {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

INCLUDED = {"../comet_np/conformance/vectors/FORMAT.md": "vectors.md",
            "../CHANGELOG.md": "changelog.md"}


class Body(LiteralInclude):
    """A function of the project as it stands, ``:pyobject:``, without its docstring."""

    def run(self):
        found = super().run()
        for block in nodes.container("", *found).findall(nodes.literal_block):
            code = re.sub(r'\n *""".*?"""(?=\n)', "", block.rawsource, count=1, flags=re.DOTALL)
            block[:] = [nodes.Text(code)]
            block.rawsource = code
        return found


class Gallery(SphinxDirective):
    """The figures of a page, each with the heading above it and the first sentence below it."""

    required_arguments = 1

    def run(self):
        page = DOCS / f"{self.arguments[0]}.md"
        self.env.note_dependency(str(page))
        heading, figures = "", []
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
            elif image := re.fullmatch(r"!\[(.*)\]\((.*)\)", line):
                figures.append([heading, *image.groups(), ""])
            elif (figures and figures[-1][0] == heading and not figures[-1][-1]
                  and line[:1] not in ("", "|", "`")):
                figures[-1][-1] = re.split(r"(?<=[a-z)]\.) |(?<=\.\*\*) ", line)[0]
        lines = ["::::{container} gallery"]
        for heading, name, file, sentence in figures:
            anchor = re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
            lines += [":::{container}", f"[![{name}]({file})]({page.name}#{anchor})", "",
                      f"[{heading}]({page.name}#{anchor}): {sentence or name}", ":::"]
        return self.parse_text_to_nodes("\n".join([*lines, "::::"]))


def as_written(app, what, name, item, options, signature, result):
    """Return the signature of a function with its annotations as they stand in the file."""
    if what not in ("function", "method") or not inspect.isfunction(inspect.unwrap(item)):
        return None
    function = ast.parse(textwrap.dedent(inspect.getsource(item))).body[0]
    if what == "method":
        function.args.args = function.args.args[1:]
    return (f"({ast.unparse(function.args)})",
            ast.unparse(function.returns) if function.returns else None)


def is_left_out(app, what, name, item, skip, options):
    """Leave out fields of tuples, checks of arguments, and what scikit-learn adds."""
    if getattr(item, "__module__", None) == "comet_np.gradcheck":
        return None
    return True if type(item).__name__ == "_tuplegetter" or re.match(
        r"check_|.*_metadata_routing|set_.*_request", name) else None


def leads_to_pages(app, page, lines):
    """Let links to texts outside of docs lead to the pages that include them."""
    for file, name in INCLUDED.items():
        lines[0] = lines[0].replace(f"]({file}", f"]({name}")


def setup(app):
    app.add_directive("body", Body)
    app.add_directive("gallery", Gallery)
    app.connect("source-read", leads_to_pages)
    app.connect("autodoc-process-signature", as_written)
    app.connect("autodoc-skip-member", is_left_out)
