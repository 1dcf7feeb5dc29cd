"""The package as a package: what importing costs, which way imports point, what is documented."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

import jbn
import jbn.population
import jbn.training

ROOT = pathlib.Path(__file__).parent.parent

# The direction of the library: a file imports from the lines below its own, never sideways or up.
LAYERS = (
    {"linen", "nnx", "population", "training"},
    {"_flax"},
    {"__init__"},
    {"_batch_norm"},
    {"native", "_deferred"},
    {"_normalize", "_running"},
    {"_derivative"},
    {"_checkpoint", "_moments"},
    {"_affine", "_plan"},
    {"_bfloat16", "_check", "_devices", "_kernels", "_shift"},
    {"_pool"},
    {"_sharding", "_sync"},
    {"_axes", "_elementwise", "_export", "_once", "_select"},
)
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(path.stem for path in (ROOT / "jbn").glob("*.py"))


def imports(path: pathlib.Path):
    """Every module that a file imports, "jbn.x" where it imports the name x from jbn."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute here"
            if node.module == "jbn":
                yield from (f"jbn.{alias.name}" for alias in node.names)
            else:
                yield node.module


def own(module: str) -> str:
    """The file of jbn that "jbn", "jbn._moments" or "jbn.moments" comes from."""
    name = module.removeprefix("jbn").removeprefix(".")
    return name if name in MODULES else "__init__"


def roots(modules) -> set[str]:
    """The packages outside the standard library that modules come from."""
    return {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names)


def test_every_file_has_a_layer():
    assert set(MODULES) == set(DEPTH)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    modules = list(imports(ROOT / "jbn" / f"{name}.py"))
    for module in modules:
        if module.split(".")[0] == "jbn":
            assert DEPTH[own(module)] > DEPTH[name], f"jbn/{name}.py imports {module}"
    outside = {"jax", "numpy"} | {
        "linen": {"flax"},
        "nnx": {"flax"},
        "training": {"optax"},
    }.get(name, set())
    assert roots(modules) <= outside | {"jbn"}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
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


def test_types_are_shipped():
    assert (pathlib.Path(jbn.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    "name",
    [f"jbn.{name}" for name in jbn.__all__]
    + [f"jbn.training.{name}" for name in jbn.training.__all__]
    + [f"jbn.population.{name}" for name in jbn.population.__all__]
    + ["jbn.linen.BatchNorm", "jbn.nnx.BatchNorm"],
)
def test_public_name_is_on_the_api_page(name):
    directive = rf"^\.\. auto\w+:: {re.escape(name)}(?:\(|$)"
    assert re.search(directive, (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
