"""Measures the lengths of the package's functions and counts their parameters."""

import ast
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import jbn

PACKAGE = pathlib.Path(__file__).parent.parent / "jbn"
LINES, PARAMETERS = 40, 8  # at most; public functions may have more parameters


class Function(NamedTuple):
    """A function or method, or one that is defined in another."""

    name: str  # such as "_core.moments.moments" or "nnx.BatchNorm.__call__"
    lines: int  # with the signature, without decorators and docstring
    parameters: int  # without self and cls
    public: bool


def of_package() -> list[Function]:
    """Returns all functions of jbn/."""
    return [f for path in sorted(PACKAGE.rglob("*.py")) for f in of_file(path)]


def of_file(path: pathlib.Path) -> list[Function]:
    """Returns all functions of one file of the package."""
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return list(_of_scope(ast.parse(path.read_text()), module, hidden=False, method=False))


def _of_scope(scope: ast.AST, name: str, hidden: bool, method: bool) -> Iterator[Function]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own = f"{name}.{node.name}"
            public = not hidden and is_public(own)
            yield Function(own, _lines(node), _parameters(node, method), public)
            yield from _of_scope(node, own, hidden=True, method=False)
        elif isinstance(node, ast.ClassDef):
            yield from _of_scope(node, f"{name}.{node.name}", hidden, method=True)
        else:
            yield from _of_scope(node, name, hidden, method)


def is_public(name: str) -> bool:
    """Tells whether users call "file.function", by its own name or as a name of `jbn`."""
    *_, top = parts = name.split(".")
    if any(part.startswith("_") and not part.endswith("__") for part in parts[1:]):
        return False
    exported = getattr(jbn, top, None) if top in jbn.__all__ else None
    where = getattr(exported, "__module__", "").removeprefix("jbn.")
    return not name.startswith("_") or f"{where}.{top}" == name


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    words = 0 if docstring is None else (docstring.end_lineno or 0) - docstring.lineno + 1
    return node.end_lineno - node.lineno + 1 - words


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> int:
    a = node.args
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    named = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) - (method and not static)
    return named + (a.vararg is not None) + (a.kwarg is not None)


def lines_of_package() -> int:
    """Counts the lines of the Python files of jbn/, with docstrings and comments."""
    return sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
