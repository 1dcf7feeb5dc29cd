"""Results stay finite for input that leaves nothing to normalise, forward and backward."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn._core import pooling
from tests import cases, compiled, executions, oracle, tolerance

pytestmark = pytest.mark.usefixtures("one_device")


def parts(shape, seed=0):
    """Returns scale, bias and dy for x of this shape."""
    rng = np.random.default_rng(seed)
    sizes = [shape[-1], shape[-1], shape]
    return [rng.normal(size=size).astype(np.float32) for size in sizes]


def assert_constant(x, channels, support=None):
    """Checks that y is the bias and the variance 0 in `channels`, where valid x are constant."""
    support = support or {}
    scale, bias, dy = parts(x.shape)
    valid = oracle.position_weights(x, **support) > 0
    dy = np.where(valid, dy, np.float32(0))
    y, m, gradient = compiled.vjp(x, scale, bias, dy, **support)
    for c in channels:
        np.testing.assert_array_equal(np.asarray(y)[..., c][valid[..., c]], bias[c])
        assert m.var[c] == 0
        assert gradient[1][c] == 0  # dscale: xhat is 0
    chex.assert_tree_all_finite(gradient)
    none = np.zeros_like(scale)
    expected = oracle.vjp(x, scale, bias, dy, none, none, **support)
    n = x.size // x.shape[-1]
    tolerance.assert_close(gradient[0], expected[0], "float32", n)


@pytest.mark.parametrize("offset", [0.0, 0.1, -33333.3, 1e-20, 1e8, -1e25])
@pytest.mark.parametrize("rows", [2, 3, 75, 4096])
def test_a_constant_channel_gives_the_bias_exactly(offset, rows):
    # A mean by sum and division is not exactly the constant: at -33333.3 over 75 rows it is an ulp
    # off, which 1/sqrt(epsilon) = 316 makes visible.
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    x[:, 1] = offset
    assert_constant(x, [1])


@pytest.mark.parametrize("rows", [2, 75, 4096])
def test_a_constant_channel_at_the_end_of_the_range_gives_the_bias_exactly(rows):
    # From max * eps / 4 on, x - shift could overflow, so the shift is 0. The sum of two such values
    # is then infinite, and so are mean and variance; y is still the bias.
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    x[:, 1] = np.finfo(np.float32).max
    scale, bias, dy = parts(x.shape)
    y, _, gradient = compiled.vjp(x, scale, bias, dy)
    np.testing.assert_array_equal(np.asarray(y)[:, 1], np.broadcast_to(bias[1], rows))
    chex.assert_tree_all_finite((y, gradient))


@pytest.mark.parametrize("offset", [0.1, -33333.3, 1e8])
@pytest.mark.parametrize("kind", ["examples", "positions", "features", "weights"])
def test_a_channel_that_is_constant_where_it_counts(offset, kind):
    case = cases.Case(
        (15, 5, 3), **({"weights": "features"} if kind == "weights" else {"mask": kind})
    )
    data = cases.make(case)
    x = np.where(data.valid, np.float32(offset), np.float32(7.0))
    assert_constant(x, range(3), data.support)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_constant_channel_in_half_precision(dtype):
    x = np.full((75, 2), 333.3).astype(dtype)
    scale, bias, _ = parts(x.shape)
    y, m = compiled.normalize(x, scale, bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias.astype(dtype), x.shape))
    np.testing.assert_array_equal(m.mean, np.float32(x[0]))


@pytest.mark.parametrize("axis", [-1, (-2, -1)], ids=str)
def test_one_row_gives_the_bias(axis):
    x = (
        np.random.default_rng(0)
        .normal(size=(1, 4, 3))
        .astype(np.float32)[:, : 1 if axis == -1 else 4]
    )
    sizes = (3,) if axis == -1 else (4, 3)
    rng = np.random.default_rng(1)
    scale, bias = (rng.normal(size=sizes).astype(np.float32) for _ in range(2))
    dy = rng.normal(size=x.shape).astype(np.float32)
    y, m, (dx, dscale, dbias) = compiled.vjp(x, scale, bias, dy, axis=axis)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    np.testing.assert_array_equal(m.mean, x.reshape(sizes))
    np.testing.assert_array_equal(m.var, 0)
    # dx = a dy - a E[dy] is exactly 0, or the rounding of one product where the other is fused.
    a_dy = np.abs(scale * dy.reshape(sizes)).max() / np.sqrt(1e-5)
    np.testing.assert_allclose(dx, 0, atol=tolerance.eps("float32") * a_dy)
    np.testing.assert_array_equal(dscale, 0)
    np.testing.assert_array_equal(dbias, dy.reshape(sizes))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 4, 4, 3)], ids=str)
def test_an_empty_batch(shape):
    x = np.zeros(shape, np.float32)
    scale, bias, dy = parts(shape)
    y, m, gradient = compiled.vjp(x, scale, bias, dy)
    chex.assert_shape([y, gradient[0]], shape)
    for value in (*m, *gradient[1:]):
        np.testing.assert_array_equal(value, 0)
    same = compiled.moments(x)
    chex.assert_trees_all_equal(same, m)
    stats = jbn.init_stats(3)
    y, new = compiled.batch_norm(x, jbn.Params(scale, bias), stats)
    chex.assert_shape(y, shape)
    chex.assert_trees_all_equal(new, stats)
    chex.assert_shape(compiled.batch_norm_inference(x, jbn.Params(scale, bias), stats), shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_empty_batch_in_half_precision(dtype):
    y, m = compiled.normalize(np.zeros((0, 3), dtype))
    chex.assert_type([y, m.mean, m.var, m.count], [dtype] + [np.float32] * 3)


def test_no_features():
    y, stats = compiled.batch_norm(
        np.zeros((4, 0), np.float32), jbn.init_params(0), jbn.init_stats(0)
    )
    chex.assert_shape([y, stats.mean], [(4, 0), (0,)])


@pytest.mark.parametrize("junk", [7.0, np.nan, np.inf])
@pytest.mark.parametrize("by", ["mask", "weights"])
def test_everything_masked(junk, by):
    x = np.full((6, 4, 3), junk, np.float32)
    x[0] = 1.0
    scale, bias, dy = parts(x.shape)
    support = {by: np.zeros((6, 1, 1), bool if by == "mask" else np.float32)}
    y, m, gradient = compiled.vjp(x, scale, bias, dy, **support)
    for value in (*m, *gradient[:2]):
        np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    tolerance.assert_close(gradient[2], dy.sum((0, 1)), "float32", 24)


@pytest.mark.parametrize("size", [1e25, 1e37, 3e38])
@pytest.mark.parametrize("support", ["none", "mask"])
def test_squares_that_overflow(size, support):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3)).astype(np.float32)
    x[:, 1] = size * rng.uniform(-1, 1, size=64)
    scale, bias, dy = parts(x.shape)
    given = {"mask": np.arange(64)[:, None] > 0} if support == "mask" else {}
    y, _, gradient = compiled.vjp(x, scale, bias, dy, **given)
    chex.assert_tree_all_finite((y, gradient))
    push = jax.jit(
        lambda x, dx: jax.jvp(lambda x: jbn.normalize(x, scale, **given)[0], (x,), (dx,))
    )
    chex.assert_tree_all_finite(push(x, dy))
    # The other channels are not affected.
    none = np.zeros_like(scale)
    expected = oracle.normalize(x, scale, bias, **given)[0]
    backward = oracle.vjp(x, scale, bias, dy, none, none, **given)
    for c in (0, 2):
        tolerance.assert_close(y[:, c], expected[:, c], "float32", 64)
        tolerance.assert_close(gradient[0][:, c], backward[0][:, c], "float32", 64)
    _, stats = compiled.batch_norm(x, jbn.Params(scale, bias), jbn.init_stats(3), **given)
    chex.assert_tree_all_finite(stats)


def test_the_scale_has_finite_second_derivatives_where_squares_overflow():
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    x[:, 1] = np.float32(3e38) * np.clip(x[:, 1], -1, 1)
    scale, bias, dy = parts(x.shape)
    dx = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    @jax.jit
    @jax.grad
    def second(scale):
        layer = lambda x: jbn.normalize(x, scale, bias)[0]  # noqa: E731
        return (jax.jvp(layer, (x,), (dx,))[1] * dy).sum()

    chex.assert_tree_all_finite(second(scale))


def test_squares_that_overflow_only_around_zero():
    # 1e20 squared overflows float32, but the variance, 1e34, does not.
    case = cases.Case((64, 3), offset=1e20, std=1e17)
    data = cases.make(case)
    y, _ = compiled.normalize(data.x, data.scale, data.bias)
    expected, _ = oracle.normalize(data.x, data.scale, data.bias)
    tolerance.assert_close(y, expected, "float32", 64, ratio=case.ratio)


def test_float16_at_its_limits():
    # Both the sum of 4096 values of 60000 and a square overflow float16.
    x = np.where(np.random.default_rng(0).uniform(size=(4096, 2)) < 0.5, -6e4, 6e4).astype(
        np.float16
    )
    y, m = compiled.normalize(x)
    expected, moments = oracle.normalize(x)
    tolerance.assert_close(y, expected, "float16", 4096)
    tolerance.assert_close(m.var, moments.var, "float32", 4096)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 5])
def test_one_bad_sample_spoils_its_channel_alone(bad, row):
    data = cases.make(cases.Case((16, 4)))
    clean = data.x[:, [0, 2, 3]]
    data.x[row, 1] = bad
    y, m, gradient = compiled.vjp(data.x, data.scale, data.bias, data.dy)
    others = [0, 2, 3]
    part = data.scale[others], data.bias[others], data.dy[:, others]
    expected, moments = oracle.normalize(clean, *part[:2])
    backward = oracle.vjp(clean, *part, np.zeros(3), np.zeros(3))
    # The bad value shows: a NaN makes the mean NaN; where the variance is infinite, the other rows
    # are the bias.
    shown = np.isnan(np.asarray(y)[:, 1])
    assert shown.all() if np.isnan(bad) else shown[row]
    tolerance.assert_close(y[:, others], expected, "float32", 16)
    tolerance.assert_close(m.mean[np.array(others)], moments.mean, "float32", 16, magnitude=2)
    tolerance.assert_close(gradient[0][:, others], backward[0], "float32", 16)
    for k in (1, 2):
        tolerance.assert_close(
            gradient[k][np.array(others)], backward[k], "float32", 16, magnitude=16
        )
    stats = jbn.init_stats(4)
    _, new = compiled.batch_norm(data.x, jbn.Params(data.scale, data.bias), stats)
    chex.assert_tree_all_finite(new)
    np.testing.assert_array_equal(new.count, [1, 0, 1, 1])
    np.testing.assert_array_equal([new.mean[1], new.var[1]], [0, 1])


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_epsilon_zero_is_finite_for_a_constant(epsilon):
    x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    x[:, 1] = 4.0
    scale, bias, dy = parts(x.shape)
    y, _, gradient = compiled.vjp(x, scale, bias, dy, epsilon=epsilon)
    chex.assert_tree_all_finite((y, gradient))
    np.testing.assert_array_equal(y[:, 1], np.broadcast_to(bias[1], 8))


def overflowing():
    """Returns x, [4, 8, 3], whose channel 1 overflows when squared, and a mask without part 0."""
    x = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)
    x[..., 1] = 1e25
    x[1, :, 1] = -1e25
    return x, np.broadcast_to((np.arange(4) > 0)[:, None, None], (4, 8, 1))


@pytest.mark.parametrize("where", ["instances", "devices", "groups"])
def test_a_part_without_data_beside_squares_that_overflow(where):
    """The variance of the parts that have data is infinite, and 0 times that would be NaN."""
    x, mask = overflowing()
    params, old = jbn.Params(jnp.ones(3), jnp.arange(3.0)), jbn.init_stats(3)
    if where == "instances":
        layer = functools.partial(jbn.batch_norm, axis_name="parts")
        run = jax.vmap(lambda x, mask: layer(x, params, old, mask=mask), axis_name="parts")
        y, stats = jax.jit(run)(x, mask)
        stats = jax.tree.map(lambda s: s[0], stats)
    else:
        groups = 4 if where == "groups" else None
        flat = x.reshape(32, 3), mask.reshape(32, 1)
        run = jax.jit(lambda x, mask: jbn.batch_norm(x, params, old, mask=mask, groups=groups))
        with jax.set_mesh(executions.mesh((4,), ("parts",))):
            y, stats = jax.device_get(run(*flat))
    chex.assert_tree_all_finite((y, stats))
    if where != "groups":
        np.testing.assert_array_equal(y[..., 1], 1)
    for new, before in zip(stats, old, strict=True):
        assert new[1] == before[1]


def test_an_index_group_beside_one_whose_squares_overflow():
    x, _ = overflowing()
    x[2:, :, 1] = x[2:, :, 0]

    def layer(x):
        m = jbn.moments(x, axis_name="parts", axis_index_groups=[[0, 1], [2, 3]])
        return m.mean, m.var

    mean, var = jax.jit(jax.vmap(layer, axis_name="parts"))(x)
    chex.assert_tree_all_finite((mean[2:], var[2:]))
    assert (var[:2, 1] == np.inf).all()


def test_moments_without_data_beside_a_mean_whose_square_overflows():
    count, mean = jnp.float32([0, 4]), jnp.float32([[0], [1e25]])
    parts = jbn.Moments(count, mean, jnp.ones((2, 1)))
    expected = jbn.Moments(jnp.float32(4), jnp.float32([1e25]), jnp.ones(1))
    chex.assert_trees_all_equal(jax.jit(jbn.pool)(parts), expected)
    empty, full = (jbn.Moments(count[i], mean[i], jnp.ones(1)) for i in (0, 1))
    chex.assert_trees_all_equal(jax.jit(jbn.merge)(empty, full), expected)

    def by_sums(m):
        return pooling.pool_by_sums([m._replace(count=m.count[None])], ("parts",))[0]

    found = jax.jit(jax.vmap(by_sums, axis_name="parts"))(parts)
    np.testing.assert_array_equal(found.mean, np.float32(1e25))
    np.testing.assert_array_equal(found.var, 1)
