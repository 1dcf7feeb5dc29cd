"""Functions are short and have few parameters, and one call goes through few of them."""

import jax
import jax.numpy as jnp
import pytest

from tests import functions, hops

# Functions that may exceed the limits in `functions`, and how large they may be. The lists may only
# shrink: a test fails if an exception is not needed any more.
LONG = {"nnx.batch_norm.BatchNorm.__init__": 51}
WIDE: dict[str, int] = {}
# The most that one call may go through, in all versions of Python and JAX.
CEILING = hops.Hops(calls=140, functions=102, files=21, depth=10)

FOUND = functions.of_package()


def sizes(quantity, limit):
    """Returns the sizes, by name, of the functions that are larger than the limit."""
    large = {f.name: getattr(f, quantity) for f in FOUND if getattr(f, quantity) > limit}
    public = {f.name for f in FOUND if f.public}
    return large if quantity == "lines" else {n: k for n, k in large.items() if n not in public}


@pytest.mark.parametrize(
    ("quantity", "limit", "exceptions"),
    [("lines", functions.LINES, LONG), ("parameters", functions.PARAMETERS, WIDE)],
    ids=["lines", "parameters"],
)
def test_functions_are_small(quantity, limit, exceptions):
    large = sizes(quantity, limit)
    grown = {name: n for name, n in large.items() if n > exceptions.get(name, limit)}
    assert not grown, f"more than {limit} {quantity}, or than the exception allows: {grown}"
    done = exceptions.keys() - large.keys()
    assert not done, f"not needed any more, take it from the exceptions: {done}"


def test_a_call_goes_through_no_more_of_the_library_than_before():
    found = hops.jbn_call()
    more = [what for what, n in found._asdict().items() if n > getattr(CEILING, what)]
    assert not more, f"{found}, more {', '.join(more)} than {CEILING}"
    assert all(found)


SOURCE = '''
def short(x, /, a, *rest, b=1, **others):
    """Words.

    More words.
    """
    def inner(u, v):
        return (
            u
        )
    return inner

class A:
    @staticmethod
    def f(x): return x

    @classmethod
    def g(cls, x): return x

    def _h(self): return self
'''


def test_sizes_are_those_of_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(functions, "PACKAGE", tmp_path)
    (tmp_path / "file.py").write_text(SOURCE)
    assert functions.of_file(tmp_path / "file.py") == [
        functions.Function("file.short", 6, 5, True),
        functions.Function("file.short.inner", 4, 2, False),
        functions.Function("file.A.f", 1, 1, True),
        functions.Function("file.A.g", 1, 1, True),
        functions.Function("file.A._h", 1, 0, False),
    ]


def test_public_is_what_users_call():
    public = (
        "_core.batch_norm.batch_norm",
        "_core.moments.moments",
        "linen.batch_norm.BatchNorm.__call__",
    )
    assert all(map(functions.is_public, public))
    private = (
        "_core.normalize.normalized",
        "_flax.call",
        "training._step",
        "_core.pooling._Way.merge",
    )
    assert not any(map(functions.is_public, private))


def test_hops_are_counted():
    def inner(x):
        return x.sum(0)

    def outer(x):
        return [inner(x) for _ in range(2)] + [(lambda x: -x)(x)]

    found = hops.measure(lambda: jax.make_jaxpr(outer)(jnp.ones((3, 5))), __file__, 15)
    # The calls are those of the lambda `run`, of outer, of inner twice, and of the lambda in outer.
    assert found == hops.Hops(calls=5, functions=4, files=1, depth=3)
