"""The Python code in README and in the guides runs, each page from top to bottom.

Notebooks are executed where the documentation is built.
"""

import json
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text())]


def test_the_pages_with_code_are_found():
    names = {page.name for page in WITH_CODE}
    assert {"README.md", "core.md", "linen.md", "nnx.md"} <= names


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page.stem in ("README", "index") else pytest.mark.slow)
        for page in WITH_CODE
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
@pytest.mark.usefixtures("cheap_programs")
def test_code_runs(page):
    text = page.read_text()
    namespace = {"__name__": page.stem}
    # Readers have JAX's default promotion, not the strict one of the other tests.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in BLOCK.finditer(text):
            # The empty lines give tracebacks the page's line numbers.
            above = "\n" * text[: block.start(1)].count("\n")
            exec(compile(above + block[1], page, "exec"), namespace)


def test_notebooks_are_committed_without_outputs():
    notebooks = sorted((ROOT / "docs").glob("*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        for cell in json.loads(notebook.read_text())["cells"]:
            assert not cell.get("outputs"), f"{notebook.name}: clear the outputs of all cells"
