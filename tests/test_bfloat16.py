"""bfloat16 without a K: sums of blocks lose nothing, at any offset; and when the blocks exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn import _bfloat16
from jbn._axes import resolve
from tests import compiled

SHAPE = (32, 14, 14, 8)


def data(offset, std=1.0, shape=SHAPE):
    x = offset + std * np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(x, jnp.bfloat16)


def error_of_var(x, var):
    """Largest relative error against float64, over the features that vary at all."""
    x = np.asarray(x, np.float64)
    expected = x.var(tuple(range(x.ndim - 1)))
    some = expected > 0
    return np.max(np.abs(np.asarray(var, np.float64) - expected)[some] / expected[some], initial=0)


@pytest.mark.parametrize("offset", [0, 1, 2, 100, 255.5, 1000, 1024, -1024, 1e4, 65536])
@pytest.mark.parametrize("shape", [SHAPE, (64, 8), (16, 56, 56, 3)], ids=str)
def test_variance_at_any_offset(offset, shape, one_device):
    x = data(offset, shape=shape)
    assert _bfloat16.block(resolve(x.shape, -1))
    assert error_of_var(x, compiled.moments(x).var) < 1e-6


@pytest.mark.parametrize("offset", [1e18, -1e-15])
def test_the_ends_of_the_range(offset, one_device):
    x = data(offset, std=abs(offset) / 100)
    assert error_of_var(x, compiled.moments(x).var) < 1e-6


def test_without_the_shift_afterwards_nothing_would_be_left(one_device):
    # What the tests above measure: the textbook's E[x^2] - E[x]^2 of the same numbers.
    wide = data(1000).astype(jnp.float32)
    var = (wide**2).mean((0, 1, 2)) - wide.mean((0, 1, 2)) ** 2
    assert error_of_var(data(1000), var) > 1e-3


@pytest.mark.parametrize("outlier", [0.0, 3e4])
def test_one_odd_value(outlier, one_device):
    x = data(1000).at[3, 2, 1].set(outlier)
    assert error_of_var(x, compiled.moments(x).var) < 1e-5  # var is 1e-3 of the mean squared


@pytest.mark.parametrize("value", [0.1, -33333.3, 1024.0, 1e18])
def test_a_constant_channel_gives_the_bias_exactly(value, one_device):
    x = jnp.full(SHAPE, value, jnp.bfloat16)
    bias = jnp.linspace(-1.0, 1.0, 8)
    y, m = compiled.normalize(x, jnp.ones(8), bias)
    np.testing.assert_array_equal(m.var, 0)
    np.testing.assert_array_equal(y, jnp.broadcast_to(bias, SHAPE).astype(jnp.bfloat16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_one_bad_value_spoils_its_channel_alone(bad, one_device):
    x = data(2.0)
    clean, _ = compiled.normalize(x)
    y, m = compiled.normalize(x.at[1, 2, 3, 4].set(bad))
    others = [c for c in range(8) if c != 4]
    np.testing.assert_array_equal(y[..., others], clean[..., others])
    assert not np.isfinite(m.var[4])
    if bad == 3e38:  # squares that overflow
        np.testing.assert_array_equal(y[..., 4], 0)


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((128, 56, 56, 64), -1, (0,)),
        ((256, 8, 8, 64), -1, (1, 2)),
        ((128, 1, 1, 64), -1, (0, 1, 2)),
        ((512, 64), -1, ()),  # no axis of at most 128
        ((4, 64), -1, ()),  # of 4 values: as many partial sums as values
        ((3, 32, 20), 0, (1,)),
    ],
)
def test_blocks(shape, axis, expected):
    inner = _bfloat16.block(resolve(shape, axis))
    size = lambda axes: int(np.prod([shape[i] for i in axes]))  # noqa: E731
    assert size(inner) == size(expected)
    assert set(inner) <= set(resolve(shape, axis).reduction)


def test_derivatives_do_not_notice(one_device):
    x, dy = data(5.0), data(0.0)

    def gradient(x, dtype):
        f = lambda x: jbn.normalize(x.astype(dtype), dtype=jnp.float32)[0]  # noqa: E731
        return jax.vjp(f, x)[1](dy.astype(jnp.float32))[0]

    run = jax.jit(gradient, static_argnums=1)
    actual, expected = run(x, jnp.bfloat16), run(x, jnp.float32)
    np.testing.assert_allclose(
        actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-8, atol=1e-4
    )
