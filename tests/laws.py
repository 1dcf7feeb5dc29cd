"""Writes the laws that the tests hold as a page: `python -m tests.laws > docs/laws.md`.

The laws are those of `tests/mutants.py`, which breaks each of them and sees a test fail. The
comments between the mutants are the headings.
"""

import ast
import pathlib
import re

from tests import mutants

HEAD = """# The laws, and where they are tested

Written by `python -m tests.laws > docs/laws.md`. `python -m tests.mutants` makes the library break
each of these laws once, by one change of its source, and fails where no test notices.
"""


def page() -> str:
    """The page, in Markdown: a heading for each kind of law, and a row for each law."""
    path = pathlib.Path(mutants.__file__)
    lines = path.read_text().splitlines()
    (table,) = (
        node.value
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MUTANTS"
    )
    assert isinstance(table, ast.List)
    text = [HEAD]
    for mutant, call in zip(mutants.MUTANTS, table.elts, strict=True):
        if heading := re.fullmatch(r"    # (.+)\.", lines[call.lineno - 2]):
            text.append(f"## {heading[1]}\n\n| law | tested in |\n|---|---|")
        where = ", ".join(f"`tests/{name}`" for name in mutant.tests.split())
        text.append(f"| {mutant.law} | {where} |")
        if lines[call.end_lineno].startswith(("    #", "]")):
            text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    print(page(), end="")
