"""Every mutant is a valid program that differs from the library and names tests that exist."""

import re

import pytest

from tests import laws, mutants

PACKAGE, TESTS = mutants.ROOT / "jbn", mutants.ROOT / "tests"


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.law)
def test_each_mutant_is_a_program_and_its_tests_exist(mutant):
    assert mutants.apply(mutant, PACKAGE) != (PACKAGE / mutant.file).read_text()
    for name in mutant.tests.split():
        file, *function = name.split("::")
        text = (TESTS / file).read_text()
        assert all(re.search(rf"^def {f}\(", text, re.MULTILINE) for f in function), name


def test_laws_are_unique():
    laws = [mutant.law for mutant in mutants.MUTANTS]
    assert len(set(laws)) == len(laws)


def test_no_module_uses_an_undefined_name():
    for path in PACKAGE.rglob("*.py"):
        assert mutants.undefined(path.read_text()) == set(), path.name


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a\ndef f(x):\n    return a.b(x) + len(c)", {"c"}),
        ("class A:\n    n: int = 0\n    def f(self):\n        return [A for A in B]", {"B"}),
        ("x = y\ndef f():\n    global z\n    z = 1\n    return lambda: (x, w)", {"y", "w"}),
    ],
)
def test_undefined_names_are_found_in_every_scope(source, names):
    assert mutants.undefined(source) == names


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("no such text", "", "stands 0 times"),
        ("axes", "", r"stands \d+ times"),
        ("features.append(a % ndim)", "features.append(b % ndim)", "b undefined"),
    ],
)
def test_an_invalid_mutant_is_refused(old, new, error):
    with pytest.raises(ValueError, match=error):
        mutants.apply(
            mutants.Mutant("law", "_core/axes.py", old, new, "core/test_axes.py"), PACKAGE
        )


def test_the_page_of_laws_is_up_to_date():
    page = (mutants.ROOT / "docs" / "laws.md").read_text()
    assert page == laws.page(), "python -m tests.laws > docs/laws.md"
