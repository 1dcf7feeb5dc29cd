"""Whitening over devices: the oracle's results in every execution, by one collective each way."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from experiments.common import hlo
from jbn.training import init, make_train_step
from jbn.whitening import WhiteningStats, init_stats, whiten
from tests import executions, oracle
from tests.test_whitening import KEEP, NONE, assert_close, data

pytestmark = pytest.mark.usefixtures("cheap_programs")


def _program(mode, support):
    def layer(params, rows, axis_name):
        def f(x, params):
            return whiten(
                x, params, init_stats(6, group_size=3), group_size=3, update=KEEP,
                axis_name=axis_name, **({"mask": rows["mask"]} if support == "mask" else {}),
            )  # fmt: skip

        y, pull, stats = jax.vjp(lambda x: f(x, params), rows["x"], has_aux=True)
        return (y, pull(rows["dy"])[0]), stats

    return lambda params, rows: mode.execute(layer, params, rows)


@functools.cache
def _rows():
    rng = np.random.default_rng(13)
    x, dy = data((16, 3, 6), offset=1e3), rng.normal(size=(16, 3, 6)).astype(np.float32)
    # Uneven: the third of four instances has no data.
    mask = (rng.random((16, 3, 1)) < 0.7) & (np.arange(16) // 4 != 2)[:, None, None]
    return {"x": x, "dy": dy, "mask": mask}


@functools.cache
def _gradient(support):
    """Computes dx by differences of the oracle in float64, for every direction at once."""
    rows, h = _rows(), 1e-4
    mask = rows["mask"] if support == "mask" else None
    x, dx = rows["x"].astype(np.float64), np.zeros(rows["x"].shape)
    for i in np.ndindex(x.shape):
        for sign in (1, -1):
            near = x.copy()
            near[i] += sign * h
            y = oracle.whiten(near, group_size=3, mask=mask)
            dx[i] += sign * (rows["dy"] * y).sum() / (2 * h)
    return dx


@pytest.mark.parametrize("support", ["none", "mask"])
@pytest.mark.parametrize("mode", [executions.WHOLE, *executions.ALL], ids=str)
def test_every_execution_gives_the_oracles_results(mode, support):
    rows = _rows()
    (y, dx), stats = mode.run(_program(mode, support), jbn.init_params(6), rows)
    mask = rows["mask"] if support == "mask" else None
    x = rows["x"].astype(np.float64)
    own = oracle.covariance(x, 3, mask=mask)
    assert_close(y, oracle.whiten(x, group_size=3, mask=mask), "float32", 48, ratio=1e3)
    assert_close(dx, _gradient(support), "float32", 48)
    for of_instance in (WhiteningStats(*values) for values in zip(*stats, strict=True)):
        assert_close(of_instance.cov, own.cov, "float32", 48)
        assert_close(of_instance.mean, own.mean, "float32", 48, condition=1.0)


@pytest.mark.slow
def test_second_derivatives_over_devices():
    rows, mode = _rows(), executions.NAMED[3]  # shard_map

    def along(params, rows, axis_name):
        def loss(x):
            y, pull = jax.vjp(lambda x: whiten(x, params, init_stats(6), axis_name=axis_name)[0], x)
            return y, pull(rows["dy"])[0]

        return jax.jvp(loss, (rows["x"],), (jnp.cos(rows["x"]),))[1], ()

    results = [
        m.run(lambda p, r, m=m: m.execute(along, p, r)[0], jbn.init_params(6), rows)
        for m in (executions.WHOLE, mode)
    ]
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-4)


PLACES = [
    ((8,), P("a"), 1),
    ((4, 2), P(("b", "a")), 1),
    ((4, 2), P("a", None, "b"), 1),  # the compiler divides groups, which need nothing else
    ((4, 2), P("a", "b"), 2),  # XLA makes one all-reduce for each axis
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "spec", "back"), PLACES, ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_one_collective_each_way(axis_type, shape, spec, back):
    where = executions.mesh(shape, ("a", "b")[: len(shape)], axis_type)
    rng = np.random.default_rng(14)
    x, dy = rng.normal(size=(2, 16, 4, 6)).astype(np.float32)
    x, dy = jax.device_put((x, dy), NamedSharding(where, spec))

    def gradient(x, dy):
        stats = init_stats(6, group_size=3)
        y, pull, new = jax.vjp(
            lambda x: whiten(x, jbn.init_params(6), stats, group_size=3), x, has_aux=True
        )
        return y, new, pull(dy)[0]

    with jax.set_mesh(where):
        out = None if axis_type == AxisType.Explicit else (x.sharding, None, x.sharding)
        compiled = jax.jit(gradient, out_shardings=out).lower(x, dy).compile()
    found = list(hlo.collectives(compiled.as_text()))
    if axis_type == AxisType.Explicit and "b" in spec[2:]:
        # Features that the user divides by an Explicit axis come together first: x and dy.
        assert [c.kind for c in found[:2]] == ["all-gather"] * 2
        found = found[2:]
    assert [c.kind for c in found] == ["all-gather"] + ["all-reduce"] * back
    parts = 2 if axis_type == AxisType.Auto and "b" in spec[2:] else 1
    sent = 4 * 6 * (3 + 2) // parts  # of each feature covariances, mean and shift
    assert found[0].sent == sent
    assert found[1].sent == 4 * 6 * (3 + 1) // parts  # the gradient of a matrix and of its offset


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_features_over_devices(axis_type, group_size):
    where = executions.mesh((2, 4), ("a", "b"), axis_type)
    x = data((16, 8))
    expected = oracle.whiten(x.astype(np.float64), group_size=group_size)
    with jax.set_mesh(where):
        placed = jax.device_put(x, NamedSharding(where, P("a", "b")))
        stats = init_stats(8, group_size=group_size)
        y, stats = jax.jit(lambda x: whiten(x, NONE, stats, group_size=group_size, update=KEEP))(
            placed
        )
        if axis_type == AxisType.Explicit:
            assert jax.typeof(y).sharding.spec == P("a", "b")
    assert_close(y, expected, "float32", 16)
    assert_close(stats.cov, oracle.covariance(x, group_size).cov, "float32", 16)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("sharing", ["instance", "all"])
def test_a_step_pools_the_statistics_of_devices(sharing, microbatches):
    x, axis_name = _rows()["x"][:, 0], "batch" if sharing == "all" else None

    def loss_fn(params, stats, x):
        y, stats = whiten(x, params, stats, group_size=3, update=KEEP, axis_name=axis_name)
        return jnp.sin(y).mean(), stats, {}

    optimizer, stats = optax.sgd(0.1), init_stats(6, group_size=3)
    state = init(jbn.init_params(6), stats, optimizer)
    step = make_train_step(loss_fn, optimizer, axis_name="batch", microbatches=microbatches)
    where = executions.mesh()
    run = jax.shard_map(step, mesh=where, in_specs=(P(), P("batch")), out_specs=P())
    new, _ = jax.jit(run)(state, x)
    own = oracle.covariance(x.astype(np.float64), 3)
    assert_close(new.stats.cov, own.cov, "float32", 16)
    assert_close(new.stats.mean, own.mean, "float32", 16, condition=1.0)
    np.testing.assert_array_equal(new.stats.count, [1, 1])


@pytest.mark.slow
def test_statistics_of_instances_do_not_leave_shard_map_as_if_they_agreed():
    f = jax.shard_map(
        lambda x: whiten(x, NONE, init_stats(6))[1],
        mesh=executions.mesh(),
        in_specs=P("batch"),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"differ along the mesh axes.*axis_name='batch'"):
        f(data((8, 6)))
