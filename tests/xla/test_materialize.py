"""Vectors of one number per feature are stored on CPUs before a pass over x reads them."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn._xla.materialize import materialize

ODD = jnp.array([1.5, -0.0, jnp.inf, -jnp.inf, jnp.nan])


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "float16")], ids=str)
@pytest.mark.parametrize("shape", [(5,), (1, 1, 5)], ids=str)
def test_materialize_is_the_identity(shape, dtypes):
    a, b = (v.reshape(shape).astype(d) for v, d in zip((ODD, ODD[::-1]), dtypes, strict=True))
    for function in (materialize, jax.jit(materialize)):
        out = function(a, b)
        chex.assert_trees_all_equal(out, (a, b))
        chex.assert_trees_all_equal_dtypes(out, (a, b))
        assert all(np.array_equal(jnp.signbit(o), jnp.signbit(v)) for o, v in zip(out, (a, b)))  # noqa: B905
    mapped = jax.jit(jax.vmap(materialize, (0, 1)))(jnp.stack([a, a]), jnp.stack([b, b], 1))
    chex.assert_trees_all_equal(mapped, (jnp.stack([a, a]), jnp.stack([b, b])))
    three = jax.jit(materialize)(a, b, -a)
    chex.assert_trees_all_equal(three, (a, b, -a))
    mapped = jax.jit(jax.vmap(materialize, (0, None)))(a.reshape(5), b.reshape(5))
    chex.assert_trees_all_equal(mapped, (a.reshape(5), jnp.stack([b.reshape(5)] * 5)))
    chex.assert_trees_all_equal(jax.jit(materialize)(a), (a,))


def test_materialize_is_linear():
    a, b = jnp.arange(3.0), jnp.arange(3.0, 6.0)

    def f(a, b):
        first, second = materialize(a * b, b)
        return (first * second).sum()  # a b^2

    out, tangent = jax.jvp(f, (a, b), (jnp.ones(3), jnp.zeros(3)))
    np.testing.assert_allclose(out, (a * b * b).sum())
    np.testing.assert_allclose(tangent, (b * b).sum())
    for grad in (jax.grad(f, (0, 1)), jax.jit(jax.grad(f, (0, 1)))):
        chex.assert_trees_all_close(grad(a, b), (b * b, 2 * a * b))
    hessian = jax.jit(jax.hessian(f, 1))(a, b)
    chex.assert_trees_all_close(hessian, jnp.diag(2 * a))


on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what XLA for CPUs does")
SHAPE = (64, 16, 32)


def layer(x, scale, bias, dy, activation=None):
    """Returns y, the moments and the gradients of a layer and a ReLU after it."""

    def apply(*at):
        y, m = jbn.normalize(*at, activation=activation)
        return jax.nn.relu(y), m

    (y, m), back = jax.vjp(apply, x, scale, bias)
    return y, m, back((dy, jax.tree.map(jnp.zeros_like, m)))


fused = functools.partial(layer, activation=jax.nn.relu)


def compiled(function, dtype):
    x, v = jax.ShapeDtypeStruct(SHAPE, dtype), jax.ShapeDtypeStruct(SHAPE[-1:], jnp.float32)
    args = (x, v, v) if function is jbn.normalize else (x, v, v, x)
    return jax.jit(function).lower(*args).compile()


@on_cpu
@pytest.mark.parametrize("function", [jbn.normalize, layer], ids=["forward", "gradients"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_pass_over_x_finds_the_shift_or_takes_a_root(function, dtype, one_device):
    text = compiled(function, dtype).as_text()
    assert "rsqrt(" in text
    assert "minimum(" in text
    computations = [c for c in text.split("\n\n") if c.lstrip().startswith("%")]
    shift_itself = [c for c in computations if "minimum(" in c]
    large = f"[{','.join(map(str, SHAPE))}]"
    results = [c for c in computations if re.search(rf"ROOT \S+ = \S*{re.escape(large)}", c)]
    assert results
    assert all("rsqrt(" not in c for c in results)
    assert not set(results) & set(shift_itself)


@on_cpu
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="XLA of older versions stores what each sum takes"
)
@pytest.mark.parametrize(
    "function", [jbn.normalize, layer, fused], ids=["forward", "gradients", "with activation"]
)
def test_nothing_of_the_size_of_x_is_stored_between_passes(function, one_device):
    program = compiled(function, "float32").memory_analysis()
    assert program.temp_size_in_bytes < 0.1 * 4 * np.prod(SHAPE)
