"""groups=g gives each part of the batch its own statistics; running statistics pool the parts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from tests import cases, compiled, executions, oracle, tolerance

pytestmark = pytest.mark.usefixtures("cheap_programs")

CASES = (
    cases.Case((8, 3, 5)),
    cases.Case((5, 64), axis=0),
    cases.Case((8, 4, 6), axis=1),
    cases.Case((8, 2, 3, 4), axis=(1, 3)),
    cases.Case((3, 64, 4), axis=(0, 2)),
    cases.Case((8, 3, 5), mask="examples"),
    cases.Case((8, 4, 6), axis=1, mask="features"),
    cases.Case((5, 64), axis=0, mask="features"),
    cases.Case((8, 3, 5), weights="examples"),
    cases.Case((8, 3, 5), dtype="bfloat16"),
    cases.Case((64, 5), offset=1e4),
)


def parts(case, groups):
    """Returns the index of each group's part of x."""
    batch = oracle.axes(len(case.shape), case.axis)[1][0]
    size = case.shape[batch] // groups
    at = [slice(g * size, (g + 1) * size) for g in range(groups)]
    return [tuple(s if a == batch else slice(None) for a in range(len(case.shape))) for s in at]


def share(values, part):
    """Returns the part of a mask or of weights, which may have size 1 where x does not."""
    if values is None:
        return None
    return values[
        tuple(p if n > 1 else slice(None) for p, n in zip(part, values.shape, strict=True))
    ]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_group_is_a_batch_of_its_own(case, groups):
    data = cases.make(case)
    given = {**case.kwargs, **data.support, "groups": groups}
    y, m, (dx, dscale, dbias) = compiled.vjp(data.x, data.scale, data.bias, data.dy, **given)
    # `moments` alone is another program, which may round a product and a sum together.
    alone, close = compiled.moments(data.x, **given), 4 * tolerance.eps("float32")
    chex.assert_trees_all_close(m, alone, rtol=close, atol=close)
    n = data.x.size // data.scale.size
    sums = np.zeros_like(data.scale, np.float64), np.zeros_like(data.scale, np.float64)
    for g, part in enumerate(parts(case, groups)):
        own = {name: share(v, part) for name, v in data.support.items()}
        at = data.x[part], data.scale, data.bias
        expected, moments = oracle.normalize(*at, **case.kwargs, **own)
        tolerance.assert_close(np.asarray(y)[part], expected, case.dtype, n, ratio=case.ratio)
        tolerance.assert_close(m.var[g], moments.var, m.var.dtype, n)
        tolerance.assert_close(m.mean[g], moments.mean, m.mean.dtype, n, magnitude=case.offset + 2)
        count = np.broadcast_to(m.count, m.mean.shape)[g]
        tolerance.assert_close(count, moments.count, "float32", n)
        none = np.zeros_like(data.scale)
        expected = oracle.vjp(*at, data.dy[part], none, none, **case.kwargs, **own)
        tolerance.assert_close(np.asarray(dx)[part], expected[0], case.dtype, n, ratio=case.ratio)
        sums = sums[0] + expected[1], sums[1] + expected[2]
    size = float(np.abs(np.asarray(data.dy, np.float64)).sum() / data.scale.size)
    wide = tolerance.accumulator(case.dtype)
    tolerance.assert_close(dscale, sums[0], wide, n, magnitude=size, ratio=case.ratio)
    tolerance.assert_close(dbias, sums[1], wide, n, magnitude=size)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_running_statistics_are_those_of_the_whole_batch(case, unbiased):
    data = cases.make(case)
    params, stats = jbn.Params(data.scale, data.bias), jbn.init_stats(data.scale.shape)
    update = jbn.ema(0.9, unbiased=unbiased)
    given = {**case.kwargs, **data.support, "update": update}
    new = compiled.batch_norm(data.x, params, stats, groups=2, **given)[1]
    whole = oracle.moments(data.x, **case.kwargs, **data.support)
    expected = oracle.running([whole], 0.9, unbiased=unbiased)
    n = data.x.size // data.scale.size
    tolerance.assert_close(new.mean, expected.mean, "float32", n, magnitude=case.offset + 1)
    tolerance.assert_close(new.var, expected.var, "float32", n)
    np.testing.assert_array_equal(new.count, expected.count)


def test_a_group_without_data_shows_the_bias_and_changes_nothing():
    x = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    mask = np.array([1, 1, 0, 0], bool).reshape(4, 1, 1)
    x[2:] = np.nan
    params, stats = jbn.Params(jnp.ones(3), jnp.arange(3.0)), jbn.init_stats(3)
    _, new = compiled.batch_norm(x, params, stats, groups=2, mask=mask)
    chex.assert_trees_all_close(new, jbn.batch_norm(x[:2], params, stats)[1], rtol=1e-6)
    for junk in (x, np.nan_to_num(x, nan=7.0)):
        y, _ = compiled.batch_norm(junk, params, stats, groups=2, mask=mask)
        np.testing.assert_array_equal(y[2:], np.broadcast_to(params.bias, (2, 6, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("count", ["one", "each group", "each feature"])
def test_pool_is_merge_of_all_and_the_moments_of_the_whole(count):
    case = cases.Case((12, 5), offset=1e3)
    data = cases.make(case)
    split = {"one": None, "each group": (12, 1), "each feature": (12, 5)}[count]
    mask = None if split is None else np.random.default_rng(0).uniform(size=split) < 0.7
    m = jbn.moments(data.x, groups=4, mask=mask)
    whole = jbn.moments(data.x, mask=mask)
    pooled = jbn.pool(m)
    chex.assert_trees_all_equal_shapes_and_dtypes(pooled, whole)
    merged = None
    for g in range(4):
        rows = slice(3 * g, 3 * g + 3)
        part = jbn.moments(data.x[rows], mask=None if mask is None else mask[rows])
        merged = part if merged is None else jbn.merge(merged, part)
    # The means of the parts, about 1e3, are rounded by half of 6e-5; squares double this error.
    for got in (pooled, merged):
        np.testing.assert_array_equal(got.count, whole.count)
        np.testing.assert_allclose(got.mean, whole.mean, rtol=2 * tolerance.eps("float32"))
        np.testing.assert_allclose(got.var, whole.var, rtol=1e-4)


def test_order_of_groups_is_that_of_the_batch():
    x = np.arange(8.0, dtype=np.float32).reshape(8, 1)
    np.testing.assert_array_equal(jbn.moments(x, groups=4).mean[:, 0], [0.5, 2.5, 4.5, 6.5])


@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_groups_of_a_sharded_batch_may_span_or_share_devices(axis_type, groups):
    # On four devices a group lies on two of them or on one, or each device has two groups.
    case = cases.Case((8, 3, 5))
    data = cases.make(case)
    params, stats = jbn.Params(data.scale, data.bias), jbn.init_stats(5)

    def step(x):
        def loss(x):
            y, new = jbn.batch_norm(x, params, stats, groups=groups)
            return (y * data.dy).sum(), (y, new)

        return jax.grad(loss, has_aux=True)(x)

    expected = jax.jit(step)(data.x)
    mesh = executions.mesh(axis_type=axis_type)
    with jax.set_mesh(mesh):
        x = jax.device_put(data.x, NamedSharding(mesh, P("batch")))
        actual = jax.jit(step)(x)
        if axis_type == AxisType.Explicit:
            assert jax.typeof(actual[0]) == jax.typeof(x)
    close = {"rtol": 1e-5, "atol": 1e-5}  # two orders of summation, through a gradient
    chex.assert_trees_all_close(*(jax.tree.map(np.asarray, v) for v in (actual, expected)), **close)
