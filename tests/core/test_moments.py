"""`moments` gives the weighted count, mean and biased variance; `merge` combines two parts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests import cases, compiled, oracle, tolerance

pytestmark = pytest.mark.usefixtures("one_device")


def fields(m, shape):
    """Returns the three arrays in float64, the count with one value per channel."""
    return [np.broadcast_to(np.asarray(v, np.float64), shape) for v in m]


def assert_moments(actual, desired, dtype, n, std=1.0, ratio=0.0):
    """Compares the mean in units of std, and the variance relative to itself, free of offsets."""
    count, mean, var = fields(actual, np.shape(desired.mean))
    wide = tolerance.accumulator(dtype)
    tolerance.assert_close(count, desired.count, wide, n)
    tolerance.assert_close(mean, desired.mean, wide, n, magnitude=2 * std, ratio=ratio)
    tolerance.assert_close(var, desired.var, wide, n)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_against_the_oracle(case):
    data = cases.make(case)
    m = compiled.moments(data.x, **case.kwargs, **data.support)
    expected = oracle.moments(data.x, **case.kwargs, **data.support)
    chex.assert_type([m.mean, m.var, m.count], tolerance.accumulator(case.dtype))
    chex.assert_shape([m.mean, m.var], expected.mean.shape)
    assert m.count.shape in ((), expected.mean.shape)
    assert_moments(m, expected, case.dtype, data.x.size, case.std, case.ratio)


def test_float64(x64):
    case = cases.Case((64, 5), dtype="float64", offset=1e4)
    data = cases.make(case)
    m = compiled.moments(data.x)
    chex.assert_type([m.mean, m.var], jnp.float64)
    assert_moments(m, oracle.moments(data.x), "float64", 64, ratio=1e4)


def test_the_variance_is_biased():
    m = compiled.moments(jnp.array([[1.0], [3.0]]))
    chex.assert_trees_all_equal(m, jbn.Moments(jnp.float32(2), jnp.float32([2]), jnp.float32([1])))


def test_the_count_is_the_sum_of_the_weights_that_are_not_masked():
    x = jnp.zeros((4, 3))
    mask, weights = np.array([[True], [True], [False], [True]]), np.float32([[0.5], [2], [9], [0]])
    assert np.all(compiled.moments(x).count == 4)
    assert np.all(compiled.moments(x, mask=mask).count == 3)
    assert np.all(compiled.moments(x, weights=weights).count == 11.5)
    assert np.all(compiled.moments(x, mask=mask, weights=weights).count == 2.5)


def test_one_row_is_its_own_mean():
    m = compiled.moments(jnp.array([[3.0, -4.0]]))
    chex.assert_trees_all_equal(m.mean, jnp.array([3.0, -4.0]))
    chex.assert_trees_all_equal(m.var, jnp.zeros(2))


# --- merge -------------------------------------------------------------------------------------


def parts(offset=0.0, sizes=(3, 7, 1), features=4):
    rng = np.random.default_rng(1)
    return [(offset + rng.normal(size=(n, features))).astype(np.float32) for n in sizes]


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_merge_of_the_parts_is_the_whole(offset):
    a, b, c = parts(offset)
    merge, moments = compiled.merge, compiled.moments
    merged = merge(merge(moments(a), moments(b)), moments(c))
    whole = oracle.moments(np.concatenate([a, b, c]))
    # The parts' means are rounded at the offset; their differences carry this error into the
    # variance.
    assert_moments(merged._replace(var=whole.var), whole, "float32", 11, ratio=offset)
    tolerance.assert_close(merged.var, whole.var, "float32", 11, ratio=2 * offset)


def test_merge_against_the_oracle_with_counts_per_feature():
    rng = np.random.default_rng(2)
    a, b = (
        oracle.Moments(rng.uniform(0, 9, 4), rng.normal(size=4), rng.uniform(0.5, 2, size=4))
        for _ in range(2)
    )
    single = [jbn.Moments(*(jnp.float32(v) for v in m)) for m in (a, b)]
    assert_moments(compiled.merge(*single), oracle.merge(a, b), "float32", 2)


def test_merge_commutes_and_associates():
    a, b, c = map(compiled.moments, parts())
    merge = compiled.merge
    close = {"rtol": 4 * tolerance.eps("float32"), "atol": 4 * tolerance.eps("float32")}
    chex.assert_trees_all_close(merge(a, b), merge(b, a), **close)
    chex.assert_trees_all_close(merge(merge(a, b), c), merge(a, merge(b, c)), **close)


@pytest.mark.parametrize("per_feature", [False, True])
def test_merging_an_empty_part_changes_nothing(per_feature):
    x = parts(1e3)[0]
    m = compiled.moments(x, mask=np.ones(x.shape, bool) if per_feature else None)
    empty = jbn.Moments(jnp.zeros_like(m.count), jnp.zeros(4), jnp.zeros(4))
    chex.assert_trees_all_equal(compiled.merge(m, empty), m)
    chex.assert_trees_all_equal(compiled.merge(empty, m), m)
    chex.assert_trees_all_equal(compiled.merge(empty, empty), empty)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 3.4e38])
def test_the_values_in_an_empty_part_change_nothing(junk):
    m = compiled.moments(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    empty = jbn.Moments(jnp.float32(0), jnp.full(3, junk), jnp.full(3, abs(junk)))
    chex.assert_trees_all_equal(compiled.merge(m, empty), m)
    chex.assert_trees_all_equal(compiled.merge(empty, m), m)
    nothing = jbn.Moments(jnp.float32(0), jnp.zeros(3), jnp.zeros(3))
    chex.assert_trees_all_equal(compiled.merge(empty, empty), nothing)
    # The same holds for single features, and for three parts.
    count = jnp.float32([[0, 4, 4], [4, 0, 0], [4, 4, 0]])
    held = jnp.where(count > 0, m.mean[None], junk), jnp.where(count > 0, m.var[None], abs(junk))
    clean = jnp.where(count > 0, m.mean[None], 0), jnp.where(count > 0, m.var[None], 0)
    pooled, expected = (jax.jit(jbn.pool)(jbn.Moments(count, *v)) for v in (held, clean))
    chex.assert_trees_all_equal(pooled, expected)
    tolerance.assert_close(pooled.var, m.var, "float32", 8)
    # The derivative of the other part is not NaN either.
    gradient = jax.grad(lambda mean: jbn.merge(m._replace(mean=mean), empty).mean.sum())(m.mean)
    np.testing.assert_array_equal(gradient, 1)


@pytest.mark.parametrize("count", [4, 4.0, np.int64(4), [4, 4, 4], np.full((3, 2), 4)], ids=repr)
def test_a_count_may_be_a_python_number(count):
    mean, var = np.random.default_rng(0).uniform(size=(2, 3, 2)).astype(np.float32)
    pooled = jbn.pool(jbn.Moments(count, mean, var))
    expected = jbn.pool(jbn.Moments(jnp.float32(4), jnp.asarray(mean), jnp.asarray(var)))
    chex.assert_trees_all_close(pooled[1:], expected[1:])
    np.testing.assert_array_equal(pooled.count, 12)
    chex.assert_type(pooled, jnp.float32)
    if np.ndim(count) == 0:
        merged = jbn.merge(*(jbn.Moments(count, mean[i], var[i]) for i in (0, 1)))
        np.testing.assert_array_equal(merged.count, 8)


@pytest.mark.parametrize("count", [(), (0,), (0, 3)], ids=str)
def test_pooling_no_parts_gives_empty_moments(count):
    none = jbn.Moments(jnp.zeros(count), jnp.zeros((0, 3)), jnp.zeros((0, 3)))
    pooled = jax.jit(jbn.pool)(none)
    chex.assert_shape(pooled.mean, (3,))
    m = compiled.moments(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    chex.assert_trees_all_close(compiled.merge(pooled, m)[1:], m[1:])
    for value in pooled:
        np.testing.assert_array_equal(value, 0)


def test_merge_keeps_types(x64):
    a = compiled.moments(parts()[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(compiled.merge(a, a), a)


def test_merge_is_differentiable_even_into_an_empty_part(x64):
    empty = jbn.Moments(jnp.float64(0), jnp.zeros(3), jnp.zeros(3))

    def merged(x):
        a, b = compiled.moments(x[:2]), compiled.moments(x[2:])
        m = compiled.merge(compiled.merge(a, empty), b)
        return m.mean, m.var

    def whole(x):
        return x.mean(0), ((x - x.mean(0, keepdims=True)) ** 2).mean(0)

    x = np.random.default_rng(0).normal(size=(7, 3))
    direction = np.random.default_rng(1).normal(size=(2, 3))
    actual, expected = (jax.vjp(f, x)[1](tuple(direction))[0] for f in (merged, whole))
    tolerance.assert_close(actual, expected, "float64", 7)


@pytest.mark.parametrize("light", [1e-12, 1e-20])
def test_a_far_value_of_little_weight_is_not_the_shift(light):
    """Gives most values a weight so small that their distance does not show in the variance."""
    rng = np.random.default_rng(0)
    x, w = np.full((1000, 1), 1e4, np.float32), np.full((1000, 1), light, np.float32)
    x[3::10], w[3::10] = rng.normal(size=(100, 1)), 1
    w64, x64 = w.astype(np.float64), x.astype(np.float64)
    mean = (w64 * x64).sum() / w64.sum()
    var = (w64 * (x64 - mean) ** 2).sum() / w64.sum()
    tolerance.assert_close(jbn.moments(x, weights=w).var[0], var, "float32", 1000)


def test_second_derivative_of_the_variance_of_a_constant(x64):
    x = jnp.full((3, 1), 2.0)
    hessian = jax.hessian(lambda x: jbn.moments(x).var[0])(x).reshape(3, 3)
    np.testing.assert_allclose(hessian, 2 / 3 * (np.eye(3) - 1 / 3), rtol=1e-12)
