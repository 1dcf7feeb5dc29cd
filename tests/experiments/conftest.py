"""Compiles cheaply: most of the time of these tests is compiling, and none of them judges times."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _cheap_programs(cheap_programs):
    """Applies to all fixtures and tests of a module."""
