"""Flax layers over devices and groups compute what the core does, also with uneven counts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
from jbn._core.running import ema_of_flax
from tests import executions, oracle, tolerance

pytestmark = pytest.mark.usefixtures("cheap_programs")

X = np.random.default_rng(0).normal(2.0, 3.0, (4, 6, 3)).astype(np.float32)  # 4 instances
MASK = (
    np.random.default_rng(1).uniform(size=(4, 6, 1)) < np.array([0.9, 0.1, 0.5, 0.7])[:, None, None]
)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # the same operations, fused differently


def linen_layer(x, cls=jbn.linen.BatchNorm, mask=None, **options):
    """Returns (y, mean, var) of a training call from fresh variables."""
    layer = cls(use_running_average=False, momentum=0.9, **options)
    variables = layer.init(jax.random.key(0), x)
    y, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]


def nnx_layer(x, cls=jbn.nnx.BatchNorm, mask=None, **options):
    layer = cls(x.shape[-1], momentum=0.9, rngs=nnx.Rngs(0), **options)
    y = layer(x, mask=mask)
    return y, layer.mean[...], layer.var[...]


def core(x, mask=None, **options):
    update = ema_of_flax(0.9)  # one instance has a single value of some features
    params, stats = jbn.init_params(3), jbn.init_stats(3)
    y, stats = jbn.batch_norm(x, params, stats, update=update, mask=mask, **options)
    return y, stats.mean, stats.var


SKINS = pytest.mark.parametrize("skin", [linen_layer, nnx_layer], ids=["linen", "nnx"])


def mapped(layer, **options):
    run = jax.vmap(lambda x, mask: layer(x, mask=mask, **options), axis_name="batch")
    return jax.jit(run)(X, MASK)


@pytest.mark.slow
@SKINS
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 3},
        {"axis_name": "batch"},
        {"axis_name": "batch", "groups": 2},
        {"axis_name": "batch", "axis_index_groups": [[0, 3], [1, 2]]},
        {"axis_name": "batch", "axis_index_groups": [[2], [3, 0, 1]]},
    ],
    ids=str,
)
def test_options_mean_the_same_as_in_the_core(skin, options):
    chex.assert_trees_all_close(mapped(skin, **options), mapped(core, **options), **CLOSE)


@SKINS
def test_uneven_counts_are_those_of_the_whole_batch(skin):
    # Flax, however, averages the means of the instances.
    y, mean, var = mapped(skin, axis_name="batch")
    x, mask = executions.rejoin(X), executions.rejoin(MASK)
    expected, m = oracle.normalize(x, mask=mask)
    tolerance.assert_close(executions.rejoin(y), expected, "float32", 24)
    run = oracle.running([m], 0.9)
    tolerance.assert_close(mean[0], run.mean, "float32", 24)
    tolerance.assert_close(var[0], run.var, "float32", 24)
    flax = mapped(
        skin, cls=linen.BatchNorm if skin is linen_layer else nnx.BatchNorm, axis_name="batch"
    )
    assert np.abs(flax[1][0] - run.mean).max() > 0.01


@SKINS
def test_groups_under_jit_with_the_batch_sharded(skin):
    x = executions.rejoin(X)
    expected = core(x, groups=4)
    with jax.set_mesh(executions.mesh()):
        actual = jax.jit(lambda x: skin(x, groups=4))(jax.device_put(x, P("batch")))
    chex.assert_trees_all_close(*(jax.tree.map(np.asarray, v) for v in (actual, expected)), **CLOSE)


@SKINS
@pytest.mark.parametrize("check_vma", [True, False])
def test_groups_of_devices_under_shard_map(skin, check_vma):
    options = {"axis_name": "batch", "axis_index_groups": [[0, 3], [1, 2]]}

    def device(x):
        y, *stats = skin(x[0], **options)
        return y[None], *(s[None] for s in stats)

    specs = {"in_specs": P("batch"), "out_specs": P("batch")}
    run = jax.shard_map(device, mesh=executions.mesh(), check_vma=check_vma, **specs)
    expected = jax.vmap(lambda x: core(x, **options), axis_name="batch")(X)
    chex.assert_trees_all_close(jax.jit(run)(X), expected, **CLOSE)


def test_linen_init_needs_no_bound_axis_and_no_divisible_batch():
    options = {"axis_name": "batch", "axis_index_groups": [[0, 1], [2, 3]], "groups": 4}
    layer = jbn.linen.BatchNorm(use_running_average=False, **options)
    plain = jbn.linen.BatchNorm(use_running_average=False)
    # One example cannot be divided into four groups.
    variables = layer.init(jax.random.key(0), X[0, :1])
    chex.assert_trees_all_equal(variables, plain.init(jax.random.key(0), X[0]))
    assert jax.eval_shape(layer.init, jax.random.key(0), X[0]) is not None


# --- nnx's own transforms ------------------------------------------------------------------------


def fresh(**options):
    return jbn.nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0), **options)


def read(layer):
    return layer.mean[...], layer.var[...]


def test_nnx_eval_shape_outside_the_mapped_axis():
    options = {"axis_name": "batch", "groups": 2}
    abstract = nnx.eval_shape(lambda: fresh(**options))
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(abstract), nnx.state(fresh(**options)))


def test_nnx_jit_over_sharded_arrays():
    layer, x = fresh(groups=4), executions.rejoin(X)
    with jax.set_mesh(executions.mesh()):
        y = nnx.jit(lambda layer, x: layer(x))(layer, jax.device_put(x, P("batch")))
    expected = core(x, groups=4)
    actual = y, *read(layer)
    chex.assert_trees_all_close(*(jax.tree.map(np.asarray, v) for v in (actual, expected)), **CLOSE)


@pytest.mark.parametrize("transform", [nnx.vmap, nnx.pmap], ids=["vmap", "pmap"])
def test_nnx_maps_with_an_axis_name(transform):
    layer = fresh(axis_name="batch")
    run = transform(lambda layer, x: layer(x), in_axes=(None, 0), out_axes=0, axis_name="batch")
    y = run(layer, X)
    expected, mean, var = core(executions.rejoin(X))
    chex.assert_trees_all_close(
        (executions.rejoin(y), *read(layer)), (expected, mean, var), **CLOSE
    )


def test_nnx_shard_map():
    layer = fresh(axis_name="batch")
    run = nnx.shard_map(
        lambda layer, x: layer(x),
        mesh=executions.mesh(),
        in_specs=(P(), P("batch")),
        out_specs=P("batch"),
    )
    y = nnx.jit(run)(layer, executions.rejoin(X))
    expected = core(executions.rejoin(X))
    actual = y, *read(layer)
    chex.assert_trees_all_close(*(jax.tree.map(np.asarray, v) for v in (actual, expected)), **CLOSE)


def test_nnx_scan_over_steps_inside_vmap():
    steps = jnp.stack([X, X + 1, X * 2])  # [steps, instances, ...]
    layer = fresh(axis_name="batch")

    def train(layer, x):
        axes = nnx.StateAxes({...: nnx.Carry})
        return nnx.scan(lambda layer, x: layer(x), in_axes=(axes, 0), out_axes=0)(layer, x)

    run = nnx.vmap(train, in_axes=(None, 1), out_axes=1, axis_name="batch")
    run(layer, steps)
    stats = jbn.init_stats(3)
    for x in steps:
        update = jbn.ema(0.9)
        _, stats = jbn.batch_norm(executions.rejoin(x), jbn.init_params(3), stats, update=update)
    chex.assert_trees_all_close(read(layer), stats[:2], **CLOSE)


@pytest.mark.parametrize("cls", [jbn.linen.BatchNorm, jbn.nnx.BatchNorm])
def test_a_residual_by_position_is_refused(cls):
    x = jnp.asarray(X[0])
    if cls is jbn.linen.BatchNorm:
        layer = cls(use_running_average=False).bind({})
    else:
        layer = cls(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"layer\(x, residual=residual\)"):
        layer(x, x)
