"""Sphinx: `python -m sphinx -W -b html docs docs/_build`. Nothing is fetched."""

import jbn

project = "jbn"
author = "The jbn developers"
copyright = "the jbn developers"
version = release = jbn.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
# The tables are included, peers.md by semantics.md.
exclude_patterns = [
    "_build",
    "jupyter_execute",  # what myst-nb writes beside _build
    "peers.md",
    "experiments/inception/inception-table.md",
    "collectives-table.md",
    "performance-compile.md",
    "performance-table.md",
    "performance-targets.md",
]
html_theme = "furo"
html_title = f"jbn {release}"

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# Notebooks are committed without outputs. A build executes them, and fails if a cell does.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # update=ema(0.99), as it is written
autodoc_typehints = "none"  # the signatures have them, and the docstrings say shapes
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "literal"  # docstrings write `code` as Markdown does


def plain_text_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: indented paragraphs are equations, and |x| is a magnitude."""
    result: list[str] = []
    equation = False
    for line in lines:
        after_blank = len(result) > 1 and not result[-1]
        if line.startswith("    ") and after_blank and result[-2] and result[-2][0] != " ":
            equation = True
            result += ["::", ""]
        elif line and line[0] != " ":
            equation = False
        code = equation or "`" in line or line.lstrip().startswith((">>>", "..."))
        result.append(line if code else line.replace("|", r"\|"))
    lines[:] = result


def setup(app) -> None:
    """Before napoleon (priority 500), which would see the equations as prose."""
    app.connect("autodoc-process-docstring", plain_text_to_rst, priority=400)
