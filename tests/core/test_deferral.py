"""Deferred statistics pool the moments of all parts of a step, as if it were one batch."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
from jbn import training
from jbn._core.deferral import defer, settle
from tests import nets
from tests.executions import AXIS, cut, mesh
from tests.tolerance import eps

pytestmark = pytest.mark.usefixtures("cheap_programs")

# A dozen values are summed in two orders, in float64.
CLOSE = {"rtol": 1e3 * eps("float64"), "atol": 1e3 * eps("float64")}
FIXED = optax.sgd(0.0)  # so that only the statistics change


def layer(axis_name=None, axis_index_groups=None):
    """Returns (params, statistics, loss) of a single layer."""
    n = nets.SIZES[0]

    def loss_fn(params, stats, batch):
        mask = batch["mask"][:, None]
        y, stats = jbn.batch_norm(
            batch["x"],
            params,
            stats,
            mask=mask,
            update=nets.UPDATE,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
        )
        return jnp.mean(jnp.where(mask, y, 0) ** 4), stats, {}

    return jbn.init_params(n, jnp.float64), jbn.init_stats(n, jnp.float64), loss_fn


def of_whole(stats, batch):
    """Returns `stats` after one update with the moments of the whole batch."""
    moments = jbn.moments(jnp.asarray(batch["x"]), mask=jnp.asarray(batch["mask"])[:, None])
    return nets.UPDATE(stats, moments)


def one_step(loss_fn, params, stats, batch, **options):
    state = training.init(params, stats, FIXED)
    return jax.jit(training.make_train_step(loss_fn, FIXED, **options))(state, batch)[0].stats


@pytest.mark.parametrize("microbatches", [2, 6])
@pytest.mark.usefixtures("x64")
def test_microbatches_pool(microbatches):
    batch = nets.batch(0, 12, np.float64)
    params, stats, loss_fn = layer()
    new = one_step(loss_fn, params, stats, batch, microbatches=microbatches)
    chex.assert_trees_all_close(new, of_whole(stats, batch), **CLOSE)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_deeper_layers_pool_what_their_microbatches_saw():
    batch = nets.batch(0, 12, np.float64)
    params, stats, loss_fn = nets.core(None, jnp.float64)
    new = one_step(loss_fn, params, stats, batch, microbatches=2)

    def of_moments(stats, moments):  # stores the moments themselves
        return stats._replace(mean=moments.mean, var=moments.var)

    _, _, recording = nets.core(None, jnp.float64, of_moments)
    moments = []
    for i in range(2):
        part = jax.tree.map(lambda x, i=i: x[i::2], batch)
        seen = jax.jit(recording)(params, stats, part)[1][1]
        moments.append(jbn.Moments(part["mask"].sum(dtype=np.float64), seen.mean, seen.var))
    expected = nets.UPDATE(stats[1], jbn.merge(*moments))
    chex.assert_trees_all_close(new[1], expected, **CLOSE)


def across(mode, step, state, batch):
    """Runs one step on four devices, which must agree on the result."""
    if mode == "pmap":
        run = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), devices=jax.devices()[:4])
        state, metrics = run(state, jax.tree.map(functools.partial(cut, 4), batch))
        for leaf in jax.tree.leaves((state, metrics)):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        return jax.tree.map(lambda v: v[0], (state, metrics))
    run = jax.shard_map(
        step,
        mesh=mesh(),
        in_specs=(P(), P(AXIS)),
        out_specs=P(),
        check_vma=mode == "shard_map",
    )
    return jax.jit(run)(state, batch)


ACROSS = ["pmap", "shard_map", "shard_map_unchecked"]
GROUPS = [[0, 2], [1, 3]]
LAYERS = {"local": (None,), "synced": (AXIS,), "grouped": (AXIS, GROUPS)}


@pytest.mark.parametrize("mode", ACROSS)
@pytest.mark.parametrize(
    ("sharing", "microbatches"), [("local", 1), ("local", 2), ("synced", 2), ("grouped", 1)]
)
@pytest.mark.usefixtures("x64")
def test_devices_pool(mode, sharing, microbatches):
    batch = nets.batch(0, 16, np.float64)
    params, stats, loss_fn = layer(*LAYERS[sharing])
    step = training.make_train_step(loss_fn, FIXED, axis_name=AXIS, microbatches=microbatches)
    new = across(mode, step, training.init(params, stats, FIXED), batch)[0].stats
    chex.assert_trees_all_close(new, of_whole(stats, batch), **CLOSE)


def test_collectives_of_local_layers():
    """Counts one collective for the gradients and two for the moments of all layers together."""
    params, stats, loss_fn = nets.core(None, jnp.float32)
    step = training.make_train_step(loss_fn, FIXED, axis_name=AXIS)
    state = training.init(params, stats, FIXED)
    run = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=(P(), P(AXIS)), out_specs=P()))
    hlo = run.lower(state, nets.batch(0, 16, np.float32)).compile().as_text()
    assert len(re.findall(r"\ball-reduce(?:-start)?\(", hlo)) == 3
    assert "all-gather" not in hlo


def test_uneven_devices_keep_digits_at_large_means():
    """Takes mean / std = 1e4, where a plain psum of mean and mean square would lose all digits."""
    x = 1e4 + jax.random.normal(jax.random.key(0), (16, 4))

    def loss_fn(params, stats, x):
        y, stats = jbn.batch_norm(x, params, stats, update=jbn.cumulative())
        return jnp.mean(y**4), stats, {}

    state = training.init(jbn.init_params(4), jbn.init_stats(4), FIXED)
    step = training.make_train_step(loss_fn, FIXED, axis_name=AXIS)
    new = across("shard_map", step, state, x)[0].stats
    exact = np.asarray(x, np.float64)
    # Each device's mean is a float32 near 1e4, so it is off by up to 1e4 eps / 2.
    np.testing.assert_allclose(new.var, exact.var(0), rtol=1e4 * eps("float32"))
    np.testing.assert_allclose(new.mean, exact.mean(0), rtol=2 * eps("float32"))


# Layers of linen and nnx, also in Flax's transformations: deferral of one part changes nothing.


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = jbn.linen.BatchNorm(use_running_average=False, update=nets.UPDATE)
        return layer(layer(x) * 2 + 1)


class ThenFrozen(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = jbn.linen.BatchNorm(momentum=0.5)
        return layer(layer(x, use_running_average=False), use_running_average=True)


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jbn.linen.BatchNorm(use_running_average=True)(x)
        return jbn.linen.BatchNorm(use_running_average=False)(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(4)(x)
        return nn.relu(jbn.linen.BatchNorm(use_running_average=False)(x)), None


# Each lifted layer has parameters and statistics of its own.
OF_ITS_OWN = {
    "variable_axes": {"params": 0, "batch_stats": 0},
    "split_rngs": {"params": True},
}


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(Block, **OF_ITS_OWN, length=3)
        return blocks()(x, None)[0]


class Rematerialised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)()(x)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.vmap(Block, **OF_ITS_OWN, in_axes=None, axis_size=3)
        return blocks()(x)[0]


X = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32) * 2 + 1


@pytest.mark.parametrize(
    "net", [Twice, ThenFrozen, Frozen, Scanned, Rematerialised, Mapped], ids=lambda n: n.__name__
)
def test_linen(net):
    net = net()
    variables = jax.jit(net.init)(jax.random.key(0), X)

    def loss_fn(params, stats, x):
        y, updates = net.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean(y**4), updates.get("batch_stats", stats), {}

    stats = variables["batch_stats"]
    run = functools.partial(one_step, loss_fn, variables["params"], stats, X)
    close = {"rtol": 10 * eps("float32"), "atol": 10 * eps("float32")}
    chex.assert_trees_all_close(run(pool_stats=True), run(), **close)
    in_parts = jax.eval_shape(functools.partial(run, microbatches=2))
    chex.assert_trees_all_equal_shapes_and_dtypes(in_parts, stats)


def test_scanned_layers_pool():
    net = Scanned()
    variables = jax.jit(net.init)(jax.random.key(0), X)

    def loss_fn(params, stats, x):
        y, updates = net.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean(y**4), updates["batch_stats"], {}

    args = loss_fn, variables["params"], variables["batch_stats"], X
    parts, whole = one_step(*args, microbatches=2), one_step(*args)
    ours, theirs = jax.tree.map(lambda v: v[0], (parts, whole))  # the first block sees X itself
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = jbn.nnx.BatchNorm(4, update=nets.UPDATE, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


def plain(model, x):
    return model(x)


def twice(model, x):
    return model(model(x))


def rematerialised(model, x):
    return nnx.remat(lambda m, x: m(x))(model, x)


def scanned(model, x):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(block, x):
        return block(x)

    return forward(model, x)


@pytest.mark.slow
@pytest.mark.parametrize("forward", [plain, twice, rematerialised, scanned])
def test_nnx(forward):
    if forward is scanned:
        model = nnx.vmap(NnxBlock)(nnx.Rngs(0).split(3))
    else:
        model = NnxBlock(nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params, stats, x):
        model = nnx.merge(graphdef, params, stats)
        y = forward(model, x)
        return jnp.mean(y**4), nnx.state(model, nnx.BatchStat), {}

    run = functools.partial(one_step, loss_fn, params, stats, X)
    close = {"rtol": 10 * eps("float32"), "atol": 10 * eps("float32")}
    chex.assert_trees_all_close(run(pool_stats=True), run(), **close)
    in_parts = jax.eval_shape(functools.partial(run, microbatches=2))
    chex.assert_trees_all_equal_shapes_and_dtypes(in_parts, stats)


# Refused statistics.


def test_linen_layers_not_of_jbn_are_refused_by_name():
    net = nn.BatchNorm(use_running_average=False)
    variables = net.init(jax.random.key(0), X)

    def loss_fn(params, stats, x):
        y, updates = net.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.mean(y**4), updates["batch_stats"], {}

    run = functools.partial(one_step, loss_fn, variables["params"], variables["batch_stats"], X)
    with pytest.raises(TypeError, match=r"at \['mean'\].*not jbn's.*pool_stats=False"):
        run(microbatches=2)
    mean, momentum = run(microbatches=2, pool_stats=False)["mean"], 0.99
    halves = [X[0::2].mean(0), X[1::2].mean(0)]  # the halves update one after the other
    expected = (1 - momentum) * (momentum * halves[0] + halves[1])
    np.testing.assert_allclose(mean, expected, rtol=1e-4)


def test_nnx_layers_not_of_jbn_are_refused_by_name():
    model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params, stats, x):
        model = nnx.merge(graphdef, params, stats)
        return jnp.mean(model(x) ** 4), nnx.state(model, nnx.BatchStat), {}

    with pytest.raises(TypeError, match=r"'mean'.*not jbn's"):
        one_step(loss_fn, params, stats, X, microbatches=2)


def test_statistics_computed_by_hand_are_refused_by_name():
    def loss_fn(params, stats, x):
        return jnp.mean(x**2), {"mean": jnp.mean(x, 0)}, {}

    with pytest.raises(TypeError, match=r"\['mean'\].*not jbn's"):
        one_step(loss_fn, jbn.init_params(4), {"mean": jnp.zeros(4)}, X, microbatches=2)


@pytest.mark.parametrize("use", [jnp.sin, lambda v: 0.9 * v, lambda v: v[...], np.asarray])
def test_using_a_deferred_array_says_that_it_belongs_to_a_layer(use):
    with pytest.raises(TypeError, match=r"the statistics at \['mean'\] belong to a layer"):
        use(defer({"mean": jnp.zeros(4)})["mean"])


def test_statistics_that_no_layer_updates_stay_unchanged():
    stats = {"a": jbn.init_stats(3), "b": jnp.arange(3.0)}
    chex.assert_trees_all_equal(settle(defer(stats)), stats)
