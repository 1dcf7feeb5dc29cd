"""Sphinx: `python -m sphinx -W -b html docs docs/_build`. Nothing is fetched."""

import jbn

project = "jbn"
author = "The jbn developers"
copyright = "the jbn developers"
version = release = jbn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "peers.md"]  # peers.md is included by semantics.md
html_theme = "furo"
html_title = f"jbn {release}"

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them, and the docstrings say shapes
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "literal"  # docstrings write `code` as Markdown does


def indented_paragraphs_are_literal(app, what, name, obj, options, lines: list[str]) -> None:
    """Shows the equations of a docstring, an indented paragraph each, as they are typed."""
    result: list[str] = []
    for line in lines:
        starts = line.startswith("    ") and len(result) > 1 and not result[-1]
        if starts and result[-2] and not result[-2].startswith(" "):
            result += ["::", ""]
        result.append(line)
    lines[:] = result


def setup(app) -> None:
    """Before napoleon (priority 500), which would see the equations as prose."""
    app.connect("autodoc-process-docstring", indented_paragraphs_are_literal, priority=400)
