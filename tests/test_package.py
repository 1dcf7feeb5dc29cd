"""Importing the package costs JAX alone, imports point one way, and public names are documented."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

import jbn
import jbn.conditional
import jbn.linen
import jbn.native
import jbn.nnx
import jbn.population
import jbn.renorm
import jbn.sets
import jbn.training
import jbn.whitening

ROOT = pathlib.Path(__file__).parent.parent
JBN = ROOT / "jbn"
MODULES = sorted(p.relative_to(JBN).with_suffix("").as_posix() for p in JBN.rglob("*.py"))
# Packages that a file or a folder of files may import besides jbn, JAX and NumPy.
OUTSIDE = {"linen": {"flax"}, "nnx": {"flax"}, "training": {"optax"}}


def order(text: str) -> dict[str, int]:
    """Returns the line of each file in the table of CONTRIBUTING.md, counted from the top.

    The table is the first block of text under "## Layout". A file imports from the lines below its
    own, never sideways or up.
    """
    table = text.split("\n## Layout\n")[1].split("\n```text\n")[1].split("\n```\n")[0]
    lines = {}
    for number, line in enumerate(table.splitlines()):
        for name in line.split("  ")[0].split(", "):
            assert name not in lines, f"CONTRIBUTING.md, Layout: {name} stands twice"
            lines[name] = number
    return lines


LINE = order((ROOT / "CONTRIBUTING.md").read_text())


def imports(path: pathlib.Path):
    """Yields every module that a file imports, "a.x" where it imports the name x from a."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(module: str) -> str:
    """Returns the file that defines a module or a name, such as "jbn.ema", "jbn._core.moments"."""
    parts = module.split(".")[1:]
    for n in range(len(parts), 0, -1):
        name = "/".join(parts[:n])
        if name in MODULES:
            return name
        if f"{name}/__init__" in MODULES:
            return f"{name}/__init__"
    return "__init__"


def roots(modules) -> set[str]:
    """Returns the packages outside the standard library that modules come from."""
    return {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names)


def test_every_file_has_its_line_in_the_order():
    assert set(MODULES) == set(LINE)


def test_the_order_is_read_from_its_table():
    table = "a, b/c  what they are for\n_d  another"
    page = f"# Title\n\n## Layout\n\nWords.\n\n```text\n{table}\n```\n\n```text\ne\n```\n"
    assert order(page) == {"a": 0, "b/c": 0, "_d": 1}
    with pytest.raises(AssertionError, match="a stands twice"):
        order(page.replace("_d", "a"))


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    modules = list(imports(JBN / f"{name}.py"))
    for module in modules:
        if module.split(".")[0] == "jbn":
            above = f"jbn/{name}.py imports {module}, which CONTRIBUTING.md does not have below it"
            assert LINE[own(module)] > LINE[name], above
    assert roots(modules) <= {"jax", "numpy", "jbn"} | OUTSIDE.get(name.split("/")[0], set())


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda p: p.stem)
def test_experiments_use_public_names(path):
    assert not re.findall(r"\bjbn\.(?:\w+\.)*_(?!_)\w+", path.read_text())
    for module in imports(path):
        assert not re.search(r"^jbn\b.*\._", module)


def test_oracle_uses_numpy_only():
    assert roots(imports(ROOT / "tests" / "oracle.py")) <= {"numpy"}


def test_import_costs_jax_alone():
    program = (
        "import jax, sys; before = set(sys.modules); import jbn; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert roots(run.stdout.split()) <= {"jax", "jaxlib", "numpy", "jbn"}


def test_version():
    assert importlib.metadata.version("jbn") == jbn.__version__
    assert f"## [{jbn.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall("^version: (.*)$", citation, re.MULTILINE) == [jbn.__version__]


def test_types_are_shipped():
    assert (pathlib.Path(jbn.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    "name",
    [f"jbn.{name}" for name in jbn.__all__]
    + [f"jbn.training.{name}" for name in jbn.training.__all__]
    + [f"jbn.conditional.{name}" for name in jbn.conditional.__all__]
    + [f"jbn.sets.{name}" for name in jbn.sets.__all__]
    + [f"jbn.population.{name}" for name in jbn.population.__all__]
    + [f"jbn.renorm.{name}" for name in jbn.renorm.__all__]
    + ["jbn.linen.crossq.BatchRenorm"]
    + [f"jbn.native.{name}" for name in jbn.native.__all__]
    + [f"jbn.whitening.{name}" for name in jbn.whitening.__all__]
    + [f"jbn.linen.{name}" for name in jbn.linen.__all__]
    + [f"jbn.nnx.{name}" for name in jbn.nnx.__all__],
)
def test_public_name_is_on_the_api_page(name):
    directive = rf"^\.\. auto\w+:: {re.escape(name)}(?:\(|$)"
    assert re.search(directive, (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
