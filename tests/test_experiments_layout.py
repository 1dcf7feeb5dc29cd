"""experiments/ has a folder for each question, and its imports make no circle."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "experiments"
SHARED = ("common", "images", "nets")  # each may import those before it
QUESTIONS = sorted({p.parent.name for p in FOLDER.glob("*/__main__.py")})
FILES = sorted(FOLDER.rglob("*.py"))

# Questions that may import from another question, and why.
ALLOWED = {
    ("inception_beyond", "inception"): "looks at the networks that the other has trained",
    ("speed", "targets"): "`experiments.speed --target` is the command of the other",
}


def name_of(path: pathlib.Path, root: pathlib.Path = ROOT) -> str:
    """Returns the module of a file, "experiments.mnist" for experiments/mnist/__init__.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


def imported(source: str, modules: set[str]) -> set[str]:
    """Returns those of `modules` that a source imports at its top, in a function or for types."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            each = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in each]
        else:
            continue
        found |= {name for name in names if name in modules}
    return found


IMPORTS = {name_of(path): imported(path.read_text(), MODULES) for path in FILES}


def folder_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\nif TYPE_CHECKING:\n    from a import c\ndef f():\n    from a.d import x\n"
    assert imported(source, {"a", "a.b", "a.c", "a.d", "a.e"}) == {"a.b", "a.c", "a.d"}


@pytest.mark.parametrize("path", [p for p in FILES if p.stem == "__main__"], ids=name_of)
def test_a_command_runs_when_all_of_its_file_is_defined(path):
    body = ast.parse(path.read_text()).body
    assert ast.unparse(body[-1]).startswith("if __name__ == '__main__'")


def test_imports_make_no_circle():
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())  # CycleError names the circle
    assert set(order) == MODULES


def test_a_circle_is_found():
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


@pytest.mark.parametrize(
    "folder", sorted(p.name for p in FOLDER.iterdir() if (p / "__init__.py").is_file())
)
def test_a_folder_is_a_question_or_shared(folder):
    assert (folder in QUESTIONS) != (folder in SHARED)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_no_command_line_and_no_other_question(module):
    """Checks also that shared folders import only the shared folders before them."""
    assert not [name for name in IMPORTS[module] if name.endswith(".__main__")]
    folder = folder_of(module)
    others = {folder_of(name) for name in IMPORTS[module]} - {folder}
    if folder in SHARED:
        assert others <= set(SHARED[: SHARED.index(folder)])
    else:
        assert all((folder, other) in ALLOWED for other in others - set(SHARED))


def test_exceptions_are_needed():
    pairs = {(folder_of(a), folder_of(b)) for a, names in IMPORTS.items() for b in names}
    assert pairs >= set(ALLOWED)
