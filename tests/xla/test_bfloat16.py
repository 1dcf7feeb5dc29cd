"""Sums of bfloat16 by blocks, without a shift of x, lose no digits at any offset.

CPUs sum in another way, so the tests call the functions of other platforms, or switch them on.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn._core.axes import resolve
from jbn._xla import bfloat16
from tests import cases, compiled, oracle, tolerance

SHAPE = (32, 14, 14, 8)


def data(offset, std=1.0, shape=SHAPE):
    x = offset + std * np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(x, jnp.bfloat16)


def error_of_var(x, var):
    """Returns the largest relative error against float64, over the features that vary."""
    x = np.asarray(x, np.float64)
    expected = x.var(tuple(range(x.ndim - 1)))
    some = expected > 0
    return np.max(np.abs(np.asarray(var, np.float64) - expected)[some] / expected[some], initial=0)


@jax.jit
def in_blocks(x):
    """Computes (mean, var) as platforms other than CPUs do."""
    axes = resolve(x.shape, -1)
    inner = bfloat16.block(axes)
    assert inner
    m = bfloat16.moments_by_blocks(x, axes, inner)
    return axes.squeeze(m.shift + m.mean), axes.squeeze(m.var)


@pytest.fixture
def elsewhere(monkeypatch):
    """Runs the library as on platforms other than CPUs."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    jax.clear_caches()
    yield
    jax.clear_caches()


def bound(shape):
    """Returns the allowed error of a sum of so many terms, relative to the terms."""
    return tolerance.tol("float32", int(np.prod(shape[:-1])))["atol"]


@pytest.mark.parametrize("offset", [100, 0, 1, 2, 255.5, 1000, 1024, -1024, 1e4, 65536])
@pytest.mark.parametrize("shape", [SHAPE, (64, 8), (16, 56, 56, 3)], ids=str)
def test_variance_at_any_offset(offset, shape):
    x = data(offset, shape=shape)
    assert error_of_var(x, in_blocks(x)[1]) < bound(shape)


@pytest.mark.parametrize("offset", [1e18, -1e-15])
def test_variance_at_the_ends_of_the_range(offset):
    x = data(offset, std=abs(offset) / 100)
    assert error_of_var(x, in_blocks(x)[1]) < bound(SHAPE)


def test_the_textbook_variance_would_fail_these_tests():
    # The textbook's E[x^2] - E[x]^2 of the same numbers exceeds the bound by far.
    wide = data(1000).astype(jnp.float32)
    var = (wide**2).mean((0, 1, 2)) - wide.mean((0, 1, 2)) ** 2
    assert error_of_var(data(1000), var) > 50 * bound(SHAPE)


@pytest.mark.parametrize("outlier", [0.0, 3e4])
def test_one_odd_value_does_not_spoil_the_variance(outlier):
    x = data(1000).at[3, 2, 1].set(outlier)
    assert error_of_var(x, in_blocks(x)[1]) < bound(SHAPE)


@pytest.mark.parametrize("value", [0.1, -33333.3, 1024.0, 1e18])
def test_a_constant_channel_has_no_variance(value):
    x = jnp.full(SHAPE, value, jnp.bfloat16)
    mean, var = in_blocks(x)
    np.testing.assert_array_equal(var, 0)
    np.testing.assert_array_equal(mean, x[0, 0, 0].astype(jnp.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_one_bad_value_spoils_its_channel_alone(bad):
    x = data(2.0)
    others = [c for c in range(8) if c != 4]
    _, clean = in_blocks(x)
    _, var = in_blocks(x.at[1, 2, 3, 4].set(bad))
    np.testing.assert_array_equal(var[jnp.array(others)], clean[jnp.array(others)])
    if np.isnan(bad):
        assert np.isnan(var[4])
    else:  # as for other dtypes: y is the bias
        assert np.isposinf(var[4])


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("offset", [2.0, 300.0])
def test_y_and_gradient_on_other_platforms(offset, groups, elsewhere):
    # On eight devices the batch of 64 is divided into blocks of examples with sums of their own.
    case = cases.Case((64, 20, 3), dtype="bfloat16", offset=offset)
    values = cases.make(case)
    y, _, (dx, _, _) = compiled.vjp(
        values.x, values.scale, values.bias, values.dy, **case.kwargs, groups=groups
    )
    for part in np.split(np.arange(64), groups or 1):
        at = values.x[part], values.scale, values.bias
        expected, _ = oracle.normalize(*at)
        none = np.zeros_like(values.scale)
        gradient = oracle.vjp(*at, values.dy[part], none, none)
        n = part.size * 20
        tolerance.assert_close(np.asarray(y)[part], expected, "bfloat16", n, ratio=offset)
        tolerance.assert_close(np.asarray(dx)[part], gradient[0], "bfloat16", n, ratio=offset)


def test_running_statistics_on_other_platforms(elsewhere):
    x = data(100.0)
    _, stats = compiled.batch_norm(x, jbn.init_params(8), jbn.init_stats(8), update=jbn.ema(0.0))
    mean, var = in_blocks(x)
    chex.assert_trees_all_close((stats.mean, stats.var), (mean, var), rtol=1e-5)


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
    inner = bfloat16.block(resolve(shape, axis))
    size = lambda axes: int(np.prod([shape[i] for i in axes]))  # noqa: E731
    assert size(inner) == size(expected)
    assert set(inner) <= set(resolve(shape, axis).reduction)
