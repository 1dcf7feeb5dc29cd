"""Steps take update rules with traced values, the state of other layers and missing counts."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
from jbn import training
from jbn.population import estimate
from tests.executions import AXIS, cut, mesh
from tests.tolerance import eps

pytestmark = pytest.mark.usefixtures("cheap_programs")

FIXED = optax.sgd(0.0)  # so that only the statistics change
X = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32) * 2 + 1
# 16 values of order 1 are summed in two orders, in float32.
CLOSE = {"rtol": 50 * eps("float32"), "atol": 50 * eps("float32")}
ONE = jbn.init_params(3), jbn.init_stats(3)


def one_step(loss_fn, params, stats, batch: Any = X, **options):
    state = training.init(params, stats, FIXED)
    return jax.jit(training.make_train_step(loss_fn, FIXED, **options))(state, batch)[0].stats


def on_devices(
    mode, loss_fn, params, stats, batch: Any = X, axis_name: str | None = AXIS, **options
):
    """Returns the statistics after one step on four devices."""
    step = training.make_train_step(loss_fn, FIXED, axis_name=axis_name, **options)
    state = training.init(params, stats, FIXED)
    if mode == "jit":
        return jax.jit(step)(state, batch)[0].stats
    if mode in ("pmap", "vmap"):
        run = {
            "pmap": functools.partial(jax.pmap, devices=jax.devices()[:4]),
            "vmap": lambda *args, **kwargs: jax.jit(jax.vmap(*args, **kwargs)),
        }[mode](step, axis_name=AXIS, in_axes=(None, 0))
        new = run(state, cut(4, batch))[0].stats
        chex.assert_trees_all_equal(new, jax.tree.map(lambda v: jnp.stack([v[0]] * 4), new))
        return jax.tree.map(lambda v: v[0], new)
    specs = {"in_specs": (P(), P(AXIS)), "out_specs": P()}
    run = jax.shard_map(step, mesh=mesh(), check_vma=mode == "shard_map", **specs)
    return jax.jit(run)(state, batch)[0].stats


# Update rules with traced values.


def decaying(decay: Any, **options):
    return lambda params, x: jbn.ema(decay(params, x), **options)


def closing_over_a_flag(params, x):
    warm = x.max() > -100  # True, and traced
    return lambda stats, moments: jax.tree.map(
        lambda new, old: jnp.where(warm, new, old), jbn.cumulative()(stats, moments), stats
    )


def closing_over_a_vector(params, x):
    rate = params.scale / 4 + 0 * x.mean(0)  # of shape [C], and with a gradient
    return lambda stats, moments: stats._replace(
        mean=stats.mean + rate * (moments.mean - stats.mean), var=moments.var
    )


RULES = {
    "average": decaying(lambda params, x: jnp.float32(0.5) + 0 * x.mean()),
    "of_the_batch": decaying(lambda params, x: 0.5 + 0.1 * jnp.tanh(x).mean()),
    "debiased": decaying(lambda params, x: 0.5 * params.scale[0], debias=True, unbiased=True),
    "flag": closing_over_a_flag,
    "vector": closing_over_a_vector,
}


def layer_with(rule, axis_name=None, times=1):
    def loss_fn(params, stats, x):
        y = x
        for _ in range(times):
            y, stats = jbn.batch_norm(x, params, stats, update=rule(params, x), axis_name=axis_name)
        return jnp.mean(y**4), stats, {}

    return loss_fn


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_microbatches_give_the_numbers_of_one_pass_with_traced_rules(rule):
    expected = one_step(layer_with(rule), *ONE)
    chex.assert_trees_all_close(one_step(layer_with(rule), *ONE, microbatches=2), expected, **CLOSE)


def test_two_calls_apply_their_traced_rules_one_after_the_other():
    loss_fn = layer_with(RULES["debiased"], times=2)
    expected = one_step(loss_fn, *ONE)
    chex.assert_trees_all_close(one_step(loss_fn, *ONE, microbatches=2), expected, **CLOSE)


@pytest.mark.parametrize("mode", ["pmap", "shard_map", "shard_map_unchecked"])
@pytest.mark.parametrize("rule", ["of_the_batch", "vector"])
def test_devices_give_the_numbers_of_one_pass_with_traced_rules(mode, rule):
    """Gives the part of each device another decay."""
    expected = one_step(layer_with(RULES[rule]), *ONE)
    new = on_devices(mode, layer_with(RULES[rule]), *ONE, microbatches=2)
    chex.assert_trees_all_close(new, expected, **CLOSE)


@pytest.mark.parametrize("closes", [False, True])
def test_scanned_layers_take_traced_rules(closes):
    """Gives each layer a decay of its own."""
    params = jbn.init_params((2, 3))
    stats = jbn.init_stats((2, 3))
    decays = jnp.float32([0.25, 0.75])

    def loss_fn(params, stats, x):
        def layer(x, own):
            params, stats, decay = own
            closing = lambda s, m: jbn.ema(decay)(s, m)  # noqa: E731
            rule = closing if closes else jbn.ema(decay)
            return jbn.batch_norm(x, params, stats, update=rule)

        y, stats = jax.lax.scan(layer, x, (params, stats, decays))
        return jnp.mean(y**4), stats, {}

    expected = one_step(loss_fn, params, stats)
    new = one_step(loss_fn, params, stats, microbatches=2)
    chex.assert_trees_all_close(new.mean[0], expected.mean[0], **CLOSE)
    np.testing.assert_allclose(new.mean[0], 0.75 * X.mean(0), rtol=1e-5)
    # The second layer's input was normalised by the microbatch in the first layer.
    np.testing.assert_allclose(new.var[1], 0.75 + 0.25 * np.ones(3), rtol=1e-4)


def test_traced_decays_carry_no_gradient():
    def loss(decay):
        return jbn.batch_norm(X, *ONE, update=jbn.ema(decay))[1].mean.sum()

    assert jax.grad(loss)(0.5) == 0
    closing = lambda d: jbn.batch_norm(X, *ONE, update=lambda s, m: jbn.ema(d)(s, m))  # noqa: E731
    assert jax.grad(lambda d: closing(d)[1].mean.sum())(0.5) == 0


@pytest.mark.parametrize("options", [{}, {"debias": True}])
def test_a_schedule_of_the_decay_is_one_program(options):
    from jbn._core.running import _absorb_once_a_shape

    x, params, stats = jnp.asarray(X), *ONE
    sizes, means = [], []
    for decay in [0.9, 0.5, 0.123, 1 / 3]:
        _, stats = jbn.batch_norm(x, params, stats, update=jbn.ema(decay, **options))
        sizes.append(_absorb_once_a_shape._cache_size())  # pyright: ignore[reportAttributeAccessIssue]
        means.append(stats.mean)
    assert sizes[-1] == sizes[0]
    weight = 0.9 if not options else 0.0
    np.testing.assert_allclose(means[0], (1 - weight) * X.mean(0), rtol=1e-5)


# Branches.


def branching(params, stats, batch):
    def train(stats):
        return jbn.batch_norm(batch, params, stats)

    def infer(stats):
        return jbn.batch_norm_inference(batch, params, stats), stats

    y, stats = jax.lax.cond(batch.max() > -100, train, infer, stats)
    return jnp.mean(y**4), stats, {}


def carried(params, stats, batch):
    def body(stats, x):
        y, stats = jbn.batch_norm(x, params, stats)
        return stats, y

    stats, y = jax.lax.scan(body, stats, jnp.stack([batch, batch]))
    return jnp.mean(y**4), stats, {}


@pytest.mark.parametrize("loss_fn", [branching, carried])
def test_branches_and_loops_that_mix_deferred_statistics_say_what_to_write(loss_fn):
    words = r"branch of lax\.cond.*outside of the branch.*jnp\.where.*pool_stats=False"
    with pytest.raises(TypeError, match=words):
        one_step(loss_fn, *ONE, microbatches=2)
    with pytest.raises(TypeError, match=words):
        estimate(lambda *args: loss_fn(*args)[1], *ONE, [X])
    one_step(loss_fn, *ONE, microbatches=2, pool_stats=False)


@pytest.mark.parametrize("train", [True, False])
def test_the_code_that_the_error_about_branches_suggests_works(train):
    def loss_fn(params, old, batch):
        train = batch["train"][0]
        decay: Any = jnp.where(train, 0.99, 1.0)
        rule = jbn.ema(decay)
        y, stats = jbn.batch_norm(batch["x"], params, old, update=rule)
        y = jnp.where(train, y, jbn.batch_norm_inference(batch["x"], params, old))
        return jnp.mean(y), stats, {"y": y.mean(0)}

    batch = {"x": X, "train": jnp.full(16, train)}
    new = one_step(loss_fn, *ONE, batch, microbatches=2)
    expected = jbn.ema(0.99)(ONE[1], jbn.moments(jnp.asarray(X))) if train else ONE[1]
    chex.assert_trees_all_close(new[:2], expected[:2], **CLOSE)


# The state of other layers.


class Discriminator(nn.Module):
    """A net of SpectralNorm, a counter and Batch Normalization, in this order."""

    axis_name: str | None = None
    update: jbn.UpdateRule | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
        steps = self.variable("batch_stats", "steps", lambda: jnp.zeros((), jnp.int32))
        if train and not self.is_initializing():
            steps.value += 1
        return jbn.linen.BatchNorm(
            use_running_average=not train, axis_name=self.axis_name, update=self.update
        )(x)


def of_linen(net):
    variables = net.init(jax.random.key(0), X, train=False)

    def loss_fn(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        y, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean(y**4), new["batch_stats"], {}

    return loss_fn, variables["params"], variables["batch_stats"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap", "shard_map", "shard_map_unchecked", "vmap"])
def test_other_layers_keep_their_state(mode):
    expected = one_step(*of_linen(Discriminator()))
    axis_name = None if mode == "jit" else AXIS
    loss_fn, params, stats = of_linen(Discriminator())
    if axis_name:
        loss_fn = of_linen(Discriminator(axis_name))[0]
    new = on_devices(mode, loss_fn, params, stats, axis_name=axis_name, microbatches=2)
    assert new["steps"] == 1
    assert (new["SpectralNorm_0"]["Dense_0/kernel/u"] != 0).all()
    chex.assert_trees_all_close(new, expected, **CLOSE)


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_populations_pass_the_state_of_other_layers_through(layer_by_layer):
    loss_fn, params, stats = of_linen(Discriminator())
    apply_fn = lambda *args: loss_fn(*args)[1]  # noqa: E731
    new = estimate(apply_fn, params, stats, [X[:8], X[8:]], layer_by_layer=layer_by_layer)
    once = apply_fn(params, stats, X)
    for name in "SpectralNorm_0", "steps":
        chex.assert_trees_all_close(new[name], once[name], **CLOSE)
    kernel, bias = params["Dense_0"]["kernel"], params["Dense_0"]["bias"]
    seen = X @ (kernel / once["SpectralNorm_0"]["Dense_0/kernel/sigma"]) + bias[None]
    np.testing.assert_allclose(new["BatchNorm_0"]["mean"], seen.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["BatchNorm_0"]["var"], seen.var(0), rtol=1e-4)


class WithQueue(nnx.Module):
    """A model whose queue takes the first two examples of a batch by an operation of `lax`."""

    def __init__(self, rngs):
        self.norm = jbn.nnx.BatchNorm(3, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.queue = nnx.BatchStat(jnp.zeros((4, 3)))

    def __call__(self, x):
        self.queue[...] = jax.lax.dynamic_update_slice(self.queue[...], x[:2], (self.calls[...], 0))
        self.calls[...] = self.calls[...] + 1
        return self.norm(x)


def of_nnx(model):
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params, stats, x):
        model = nnx.merge(graphdef, params, stats)
        return jnp.mean(model(x) ** 4), nnx.state(model, nnx.BatchStat), {}

    return loss_fn, params, stats


def test_state_of_nnx_is_that_of_the_last_microbatch():
    loss_fn, params, stats = of_nnx(WithQueue(nnx.Rngs(0)))
    new = one_step(loss_fn, params, stats, microbatches=2)
    assert new["calls"][...] == 1
    np.testing.assert_array_equal(new["queue"][...], np.concatenate([X[1:4:2], np.zeros((2, 3))]))
    np.testing.assert_allclose(new["norm"]["mean"][...], 0.01 * X.mean(0), rtol=1e-5)


def test_statistics_of_jbn_are_known_by_any_name():
    stats = {"m": jnp.zeros(3), "v": jnp.ones(3), "n": jnp.zeros(3), "largest": jnp.zeros(())}

    def loss_fn(params, stats, x):
        old = jbn.RunningStats(stats["m"], stats["v"], stats["n"])
        layer = jax.checkpoint(lambda x, old: jbn.batch_norm(x, params, old))
        y, new = jax.jit(layer)(x, old)
        own = {"largest": jnp.maximum(stats["largest"], x.max())}
        return jnp.mean(y**4), {"m": new.mean, "v": new.var, "n": new.count} | own, {}

    new = one_step(loss_fn, jbn.init_params(3), stats, microbatches=2)
    expected = jbn.ema(0.99)(jbn.init_stats(3), jbn.moments(jnp.asarray(X)))
    chex.assert_trees_all_close([new["m"], new["v"], new["n"]], list(expected), **CLOSE)
    assert new["largest"] == X[1::2].max()
    many = on_devices("shard_map", loss_fn, jbn.init_params(3), stats)
    np.testing.assert_allclose(many["largest"], cut(4, X).max((1, 2)).mean(), rtol=1e-6)


def test_normalisation_layers_not_of_jbn_are_refused_beside_other_state():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
            return nn.BatchNorm(use_running_average=not train)(x)

    with pytest.raises(TypeError, match=r"\['BatchNorm_0'\]\['mean'\].*not jbn's"):
        one_step(*of_linen(Net()), microbatches=2)


# Models that count batches, and statistics without counts.


@pytest.mark.parametrize("options", [{}, {"microbatches": 2}, {"pool_stats": True}])
def test_training_of_linen_starts_counts_from_zero(options):
    _, params, old = of_linen(Discriminator())
    loss_fn, _, fresh = of_linen(Discriminator(update=jbn.cumulative()))
    assert "count" not in old["BatchNorm_0"]
    new = one_step(loss_fn, params, old, **options)
    chex.assert_trees_all_close(new, one_step(loss_fn, params, fresh, **options), **CLOSE)
    assert (new["BatchNorm_0"]["count"] == 1).all()
    again = one_step(loss_fn, params, new, **options)
    assert (again["BatchNorm_0"]["count"] == 2).all()


def test_counts_start_from_zero_where_microbatches_update_in_turn():
    _, params, old = of_linen(Discriminator())
    loss_fn = of_linen(Discriminator(update=jbn.cumulative()))[0]
    new = one_step(loss_fn, params, old, microbatches=2, pool_stats=False)
    assert (new["BatchNorm_0"]["count"] == 2).all()


def test_inference_of_linen_needs_no_counts():
    net = Discriminator(update=jbn.cumulative())
    _, params, old = of_linen(Discriminator())
    variables = {"params": params, "batch_stats": old}
    y = net.apply(variables, X, train=False)
    chex.assert_trees_all_equal(y, Discriminator().apply(variables, X, train=False))
    _, same = net.apply(variables, X, train=False, mutable=["batch_stats"])
    assert "count" not in same["batch_stats"]["BatchNorm_0"]


def test_populations_of_a_checkpoint_without_counts():
    _, params, old = of_linen(Discriminator())
    loss_fn = of_linen(Discriminator(update=jbn.cumulative()))[0]
    apply_fn = lambda *args: loss_fn(*args)[1]  # noqa: E731
    new = estimate(apply_fn, params, old, iter([X[:8], X[8:]]))
    assert (new["BatchNorm_0"]["count"] == 2).all()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_rule_given_to_an_nnx_layer_later_counts_from_zero(microbatches):
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer)
    model(X)
    layer.update = jbn.cumulative()
    y = nnx.view(model, use_running_average=True)(X)
    assert y.shape == X.shape
    loss_fn, params, stats = of_nnx(model)
    new = one_step(loss_fn, params, stats, microbatches=microbatches)["layers"][0]
    np.testing.assert_allclose(new["mean"][...], X.mean(0), rtol=1e-5)
    assert (new["count"][...] == 1).all()
    model(X)
    layer.update = jbn.ema(0.5)  # keeps the count
    assert (layer.count[...] == 1).all()


# Containers.


def test_frozen_dictionaries_are_dictionaries():
    loss_fn, params, stats = of_linen(Discriminator())
    expected = one_step(loss_fn, params, stats, microbatches=2)
    new = one_step(loss_fn, params, freeze(stats), microbatches=2)
    assert type(new) is type(freeze({}))
    chex.assert_trees_all_equal(new.unfreeze(), expected)
    frozen = lambda *args: (args[0]["Dense_0"]["bias"].sum(), freeze(loss_fn(*args)[1]), {})  # noqa: E731
    assert type(one_step(frozen, params, stats)) is dict


def test_the_error_about_another_structure_says_where_it_differs():
    stats = {"a": jbn.init_stats(3), "b": jbn.init_stats(3)}

    def raises(match, change, given=stats):
        def loss_fn(params, stats, x):
            return jnp.mean(x), change(stats), {}

        with pytest.raises(ValueError, match=match) as raised:
            one_step(loss_fn, jbn.init_params(3), given)
        assert len(str(raised.value)) < 400

    where = r"\['batch_stats'\]\['a'\]\.mean and 5 more were returned and not given"
    raises(where + r'.*return updates\["batch_stats"\]', lambda s: {"batch_stats": s})
    where = r"\['batch_stats'\]\['a'\]\.mean and 5 more were given and not returned"
    whole = {"batch_stats": stats}
    raises(where + r'.*give variables\["batch_stats"\]', lambda s: s["batch_stats"], whole)
    raises(r"\['b'\]\.mean and 2 more were given.*Return all", lambda s: {"a": s["a"]})
    raises(r"\['c'\] was returned and not given", lambda s: s | {"c": s["a"].mean})


# Layers that share statistics over axes that were not given to the step.


@pytest.mark.parametrize("pool_stats", [None, False])
@pytest.mark.parametrize("mode", ["pmap", "shard_map", "shard_map_unchecked", "vmap"])
def test_layers_that_share_statistics_want_gradients_added_up(mode, pool_stats):
    words = r"over axis_name='batch', which is bound outside.*axis_name='batch'\)"
    loss_fn = layer_with(lambda params, x: jbn.ema(0.9), AXIS)
    with pytest.raises(ValueError, match=words):
        on_devices(mode, loss_fn, *ONE, axis_name=None, pool_stats=pool_stats)


def test_one_axis_of_two_is_not_enough():
    loss_fn = layer_with(lambda params, x: jbn.ema(0.9), ("a", "b"))
    step = training.make_train_step(loss_fn, FIXED, axis_name="a")
    specs = {"in_specs": (P(), P(("a", "b"))), "out_specs": P()}
    run = jax.jit(jax.shard_map(step, mesh=mesh((2, 2), ("a", "b")), check_vma=False, **specs))
    with pytest.raises(ValueError, match=r"'b', which is bound outside.*axis_name=\('a', 'b'\)"):
        run(training.init(*ONE, FIXED), X)


def test_other_named_axes_are_free():
    """Maps an ensemble over an outer axis; its layers share statistics over an inner axis."""

    def loss_fn(params, stats, x):
        layer = lambda x: jbn.batch_norm(x, params, stats, axis_name="within")  # noqa: E731
        y, new = jax.vmap(layer, axis_name="within", out_axes=(0, None))(cut(2, x))
        return jnp.mean(y**4), new, {}

    step = training.make_train_step(loss_fn, FIXED)
    members = jax.vmap(step, axis_name="member", in_axes=(None, 0))
    state, _ = jax.jit(members)(training.init(*ONE, FIXED), cut(2, X))
    assert state.stats.mean.shape == (2, 3)


def test_a_loss_that_is_the_mean_of_devices_is_one_step():
    """Uses shard_map with check_vma, which adds up the gradients of replicated parameters."""
    inner = layer_with(lambda params, x: jbn.ema(0.9), AXIS)

    def loss_fn(params, stats, x):
        loss, stats, metrics = inner(params, stats, x)
        return jax.lax.pmean(loss, AXIS), stats, metrics

    expected = one_step(layer_with(lambda params, x: jbn.ema(0.9)), *ONE)
    new = on_devices("shard_map", loss_fn, *ONE, axis_name=None)
    chex.assert_trees_all_close(new, expected, **CLOSE)


# Export.


def through_bytes(function, *args):
    exported = jax.export.export(jax.jit(function))(*args)
    return jax.export.deserialize(exported.serialize()).call(*args)


def test_containers_go_through_bytes():
    x = jnp.asarray(X)

    def layer(x, params, stats):
        y, new = jbn.batch_norm(x, params, stats)
        return y, new, jbn.moments(x)

    chex.assert_trees_all_close(through_bytes(layer, x, *ONE), layer(x, *ONE), **CLOSE)
    inner = {"rate": jnp.float32(1)}
    scale = training.LossScaleState(jnp.float32(4), jnp.int32(1), inner)
    state = training.TrainState(jnp.int32(3), ONE[0], ONE[1], scale)

    def step(state, mean):
        return state._replace(step=state.step + 1), training.Mean(mean.total * 2, mean.weight)

    mean = training.Mean(jnp.float32(1), jnp.float32(2))
    new, mean_ = through_bytes(step, state, mean)
    chex.assert_trees_all_equal((new, mean_), step(state, mean))
    assert [type(v) for v in (new, mean_)] == [training.TrainState, training.Mean]
