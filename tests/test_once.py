"""Vectors of one number per feature are computed once on CPUs, not in each pass over x."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn._once import made_once

ODD = jnp.array([1.5, -0.0, jnp.inf, -jnp.inf, jnp.nan])


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "float16")], ids=str)
@pytest.mark.parametrize("shape", [(5,), (1, 1, 5)], ids=str)
def test_is_the_identity(shape, dtypes):
    a, b = (v.reshape(shape).astype(d) for v, d in zip((ODD, ODD[::-1]), dtypes, strict=True))
    for function in (made_once, jax.jit(made_once)):
        out = function(a, b)
        chex.assert_trees_all_equal(out, (a, b))
        chex.assert_trees_all_equal_dtypes(out, (a, b))
        assert all(np.array_equal(jnp.signbit(o), jnp.signbit(v)) for o, v in zip(out, (a, b)))  # noqa: B905
    mapped = jax.jit(jax.vmap(made_once, (0, 1)))(jnp.stack([a, a]), jnp.stack([b, b], 1))
    chex.assert_trees_all_equal(mapped, (jnp.stack([a, a]), jnp.stack([b, b])))
    three = jax.jit(made_once)(a, b, -a)
    chex.assert_trees_all_equal(three, (a, b, -a))
    mapped = jax.jit(jax.vmap(made_once, (0, None)))(a.reshape(5), b.reshape(5))
    chex.assert_trees_all_equal(mapped, (a.reshape(5), jnp.stack([b.reshape(5)] * 5)))


def test_is_linear():
    a, b = jnp.arange(3.0), jnp.arange(3.0, 6.0)

    def f(a, b):
        first, second = made_once(a * b, b)
        return (first * second).sum()  # a b^2

    out, tangent = jax.jvp(f, (a, b), (jnp.ones(3), jnp.zeros(3)))
    np.testing.assert_allclose(out, (a * b * b).sum())
    np.testing.assert_allclose(tangent, (b * b).sum())
    for grad in (jax.grad(f, (0, 1)), jax.jit(jax.grad(f, (0, 1)))):
        chex.assert_trees_all_close(grad(a, b), (b * b, 2 * a * b))
    hessian = jax.jit(jax.hessian(f, 1))(a, b)
    chex.assert_trees_all_close(hessian, jnp.diag(2 * a))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what XLA for CPUs does")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_pass_over_x_computes_anew(dtype, one_device):
    """What is done on [C] alone, such as a root, stands in no computation that sees all of x."""
    x = jax.ShapeDtypeStruct((64, 16, 32), dtype)
    v = jax.ShapeDtypeStruct((32,), jnp.float32)

    def both(x, scale, bias, dy):
        layer = lambda *at: jbn.normalize(*at, activation=jax.nn.relu)  # noqa: E731
        (y, m), back = jax.vjp(layer, x, scale, bias)
        return y, m, back((dy, jax.tree.map(jnp.zeros_like, m)))

    text = jax.jit(both).lower(x, v, v, x).compile().as_text()
    computations = [c for c in text.split("\n\n") if c.lstrip().startswith("%")]
    # Not the choice of the shift, which takes a few rows out of x.
    shift = re.compile(r"slice=\{\[\d+:\d+\], \[\d+:\d+\], \[0:32\]\}")
    passes = [c for c in computations if "[64,16,32]" in c and not shift.search(c)]
    assert "rsqrt(" in text
    assert len(passes) >= 3
    assert all("rsqrt(" not in c for c in passes)
    assert not any(re.search(r"\[(1,)*32\]\S* is-finite\(", c) for c in passes)
    most = max(c.count("[32]") + c.count("[1,32]") + c.count("[1,1,32]") for c in passes)
    assert most <= 25, most
