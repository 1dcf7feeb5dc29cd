"""A training step gives the parameters and statistics of one device in every execution."""

import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn import training
from tests import nets
from tests.executions import AXIS, cut, mesh
from tests.tolerance import eps

pytestmark = pytest.mark.usefixtures("cheap_programs")

STEPS, N = 20, 16


def promoting(optimizer):
    """Allows promotion in an optimizer: Optax's Adam raises a float to an integer power."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: promoting(optax.adamw(1e-2, weight_decay=1e-2, mask=training.decay_mask)),
}
# Each of twenty steps rounds by eps times a gradient of order 1, and the errors hardly grow.
CLOSE = {"rtol": 1e4 * eps("float64"), "atol": 1e4 * eps("float64")}
# In float32, 1 / sqrt(var + epsilon) also magnifies the errors of units that are seldom active.
CLOSE_FLOAT32 = {"rtol": 2e3 * eps("float32"), "atol": 2e3 * eps("float32")}


def test_arguments_of_a_wrong_type_are_refused():
    def loss_fn(params, stats, batch):
        return batch.mean(), stats, {}

    sgd, stats, params = optax.sgd(0.1), jbn.init_stats(2), jbn.init_params(2)
    for microbatches in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match=rf"microbatches .*integer.*got {microbatches!r}"):
            training.make_train_step(loss_fn, sgd, microbatches=microbatches)
    with pytest.raises(TypeError, match=r"loss_fn must be a function .*GradientTransformation"):
        training.make_train_step(sgd, loss_fn)  # pyright: ignore[reportArgumentType]
    for optimizer, name in (optax.sgd, "sgd"), ("sgd", "str"), (stats, "RunningStats"):
        with pytest.raises(TypeError, match=rf"optimizer .*optax.sgd\(0.1\).*got {name}"):
            training.init(params, stats, optimizer)
        with pytest.raises(TypeError, match=rf"optimizer .*optax.sgd\(0.1\).*got {name}"):
            training.make_train_step(loss_fn, optimizer)
    state = training.init(params, stats, sgd)
    with pytest.raises(TypeError, match=r"metric_fn must be a function .*NoneType"):
        training.evaluate(None, state, [jnp.ones(2)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"TrainState.*got tuple"):
        training.evaluate(lambda *_: {}, (params, stats), [jnp.ones(2)])  # pyright: ignore


def whole(step):
    return jax.jit(step), lambda batch: batch


def pmap(step):
    run = jax.pmap(
        step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=jax.devices()[:4]
    )
    return run, functools.partial(jax.tree.map, functools.partial(cut, 4))


def shard_map(step, check_vma=True):
    specs = {"in_specs": (P(), P(AXIS)), "out_specs": P()}
    run = jax.shard_map(step, mesh=mesh(), check_vma=check_vma, **specs)
    return jax.jit(run), lambda batch: batch


def vmap(step):
    run = jax.vmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, axis_size=4)
    return jax.jit(run), pmap(step)[1]


def shard_map_unchecked(step):
    return shard_map(step, check_vma=False)


def sharded_jit(step):
    sharding = NamedSharding(mesh(), P(AXIS))
    return jax.jit(step), lambda batch: jax.device_put(batch, sharding)


@functools.cache
def train(mode, net, optimizer, microbatches, dtype="float64", steps=STEPS):
    """Trains for `steps` steps; returns (state, metrics of the last step)."""
    axis_name = None if mode in (whole, sharded_jit) else AXIS
    optimizer = OPTIMIZERS[optimizer]()
    params, stats, loss_fn = nets.BUILD[net](axis_name, dtype)
    step = training.make_train_step(
        loss_fn, optimizer, axis_name=axis_name, microbatches=microbatches
    )
    run, place = mode(step)
    state, metrics = training.init(params, stats, optimizer), None
    for seed in range(steps):
        state, metrics = run(state, place(nets.batch(seed, N, dtype)))
    return jax.tree.map(np.asarray, (state, metrics))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [pmap, shard_map, pytest.param(shard_map_unchecked, marks=pytest.mark.slow), sharded_jit],
)
@pytest.mark.parametrize(
    ("net", "optimizer", "microbatches"),
    [("core", "momentum", 1), pytest.param("core", "adamw", 2, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("x64")
def test_every_mode_gives_the_results_of_one_device(mode, net, optimizer, microbatches):
    expected = train(whole, net, optimizer, microbatches)
    chex.assert_trees_all_close(train(mode, net, optimizer, microbatches), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("net", "mode"), [("linen", shard_map), ("nnx", pmap)])
@pytest.mark.usefixtures("x64")
def test_flax_gives_the_results_of_one_device_in_other_modes(net, mode):
    expected = train(whole, net, "momentum", 2)
    chex.assert_trees_all_close(train(mode, net, "momentum", 2), expected, **CLOSE)


@pytest.mark.slow
def test_float32():
    expected = train(whole, "core", "momentum", 1, "float32")
    actual = train(shard_map, "core", "momentum", 1, "float32")
    chex.assert_trees_all_close(actual, expected, **CLOSE_FLOAT32)


@pytest.mark.usefixtures("x64")
def test_one_device_gives_the_results_of_a_plain_loop():
    """Compares a loop with the gradient of total / weight, Optax and the layers' statistics."""
    optimizer = OPTIMIZERS["momentum"]()
    params, stats, loss_fn = nets.core(None, jnp.float64)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, stats, opt_state, batch):
        def loss(params):
            loss, new, _ = loss_fn(params, stats, batch)
            return loss.total / loss.weight.astype(loss.total.dtype), new

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, value

    value = None
    for seed in range(STEPS):
        batch = nets.batch(seed, N, "float64")
        params, stats, opt_state, value = step(params, stats, opt_state, batch)
    state, metrics = train(whole, "core", "momentum", 1)
    chex.assert_trees_all_close(state[1:], (params, stats, opt_state), **CLOSE)
    chex.assert_trees_all_close(metrics["loss"], value, **CLOSE)
    assert state.step == STEPS


# Small problems with known answers.


def linear(params, stats, batch, *_):
    """Computes the mean of params * x over the examples, whose gradient is the mean of x."""
    return jnp.mean(params * batch), stats, {"largest": batch.max()}


def start(optimizer, params=1.0, stats=()):
    return training.init(jnp.asarray(params), stats, optimizer)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_accumulated_gradient_is_that_of_the_whole_batch(microbatches):
    optimizer = optax.sgd(1.0)
    step = training.make_train_step(linear, optimizer, microbatches=microbatches)
    state, metrics = jax.jit(step)(start(optimizer), jnp.arange(8.0))
    np.testing.assert_allclose(state.params, 1 - 3.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 3.5, rtol=1e-6)


def test_microbatch_i_has_every_kth_example():
    def loss_fn(params, stats, x):
        return params * 0, stats, {"seen": x}

    step = training.make_train_step(loss_fn, optax.sgd(0.1), microbatches=2)
    _, metrics = step(start(optax.sgd(0.1)), jnp.array([1.0, 10.0, 2.0, 20.0]))
    np.testing.assert_allclose(metrics["seen"], [5.5, 11])  # means of (1, 10) and (2, 20)


def test_half_precision_gradients_add_up_in_float32():
    def loss_fn(params, stats, x):
        return (params * x.astype(jnp.bfloat16)).sum().astype(jnp.float32), stats, {}

    # In bfloat16 each addition of 0.5 to 256 would be lost.
    x = jnp.concatenate([jnp.array([256.0]), jnp.full(255, 0.5)])
    optimizer = optax.sgd(1.0)
    state = training.init(jnp.zeros((), jnp.bfloat16), (), optimizer)
    step = training.make_train_step(loss_fn, optimizer, microbatches=256, pool_stats=False)
    state, _ = jax.jit(step)(state, x)
    assert state.params.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(state.params), -(256 + 127.5) / 256, rtol=2**-8)


@pytest.mark.parametrize("mode", [vmap, pmap, shard_map, shard_map_unchecked])
def test_uneven_weights(mode):
    def loss_fn(params, stats, batch):
        x, w = batch
        return training.Mean((params * x * w).sum(), w.sum()), stats, {"w": w.mean()}

    optimizer = optax.sgd(1.0)
    x, w = np.arange(8, dtype=np.float32), np.array([1, 1, 0, 0, 1, 0, 3, 0], np.float32)
    run, place = mode(training.make_train_step(loss_fn, optimizer, axis_name=AXIS))
    state, metrics = run(start(optimizer), place((x, w)))
    np.testing.assert_allclose(metrics["loss"], (x * w).sum() / w.sum(), rtol=1e-6)
    np.testing.assert_allclose(state.params, 1 - (x * w).sum() / w.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["w"], w.mean(), rtol=1e-6)


def test_keys_are_new_everywhere():
    """Checks that steps, microbatches and devices draw other numbers, a repeated step the same."""

    def loss_fn(params, stats, x, rng):
        bit = jax.nn.one_hot(jax.random.randint(rng, (), 0, 64), 64)
        return params * 0, stats, {"drawn": bit}  # the mean shows which of 64 numbers came

    optimizer = optax.sgd(0.0)
    step = training.make_train_step(
        loss_fn, optimizer, axis_name=AXIS, microbatches=2, rng=jax.random.key(0)
    )
    run, place = shard_map(step)
    state = start(optimizer)
    new, first = run(state, place(jnp.zeros(8)))
    _, second = run(new, place(jnp.zeros(8)))
    _, again = run(state, place(jnp.zeros(8)))
    assert (first["drawn"] > 0).sum() > 5  # of 8 draws; equal keys would give 1, 2 or 4
    assert not jnp.array_equal(first["drawn"], second["drawn"])
    np.testing.assert_array_equal(first["drawn"], again["drawn"])


# Steps that are not taken.


def spiky(params, stats, x):
    """Computes a loss and, as another library's layer does, statistics; a bad x spoils both."""
    stats = {"mean": 0.9 * stats["mean"] + 0.1 * x.mean()}
    return jnp.mean(params * x), stats, {}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("mode", [whole, shard_map])
def test_a_step_that_is_not_finite_is_taken_back(mode, bad, scaled):
    optimizer = promoting(optax.adam(0.1))
    if scaled:
        optimizer = training.dynamic_loss_scale(optimizer, initial=8.0, growth_interval=2)
    axis_name = None if mode is whole else AXIS

    def loss_fn(params, stats, x):
        if axis_name is None:
            return spiky(params, stats, x)
        loss, stats, metrics = spiky(params, stats, x)
        return loss, jax.lax.pmean(stats, axis_name), metrics

    step = training.make_train_step(loss_fn, optimizer, axis_name=axis_name, pool_stats=False)
    run, place = mode(step)
    before = start(optimizer, stats={"mean": jnp.zeros(())})
    before, metrics = run(before, place(jnp.arange(8.0)))
    assert not metrics["skipped"]
    after, metrics = run(before, place(jnp.arange(8.0).at[5].set(bad)))  # on one device only
    assert metrics["skipped"]
    assert after.step == 2
    if scaled:
        assert before.opt_state.scale == 8
        assert (after.opt_state.scale, after.opt_state.good_steps) == (4, 0)
        before, after = (s._replace(opt_state=s.opt_state.inner, step=0) for s in (before, after))
    chex.assert_trees_all_equal(before._replace(step=0), after._replace(step=0))


def test_a_loss_that_is_not_finite_is_enough():
    def loss_fn(params, stats, x):
        return params * x.mean() + jnp.inf, stats, {}  # the gradient is finite

    step = jax.jit(training.make_train_step(loss_fn, optax.sgd(0.1)))
    state, metrics = step(start(optax.sgd(0.1)), jnp.ones(4))
    assert metrics["skipped"]
    assert state.params == 1


def test_a_step_without_weight_is_not_taken():
    def loss_fn(params, stats, x):
        return training.Mean((params * x).sum(), jnp.zeros(())), stats, {}

    optimizer = training.dynamic_loss_scale(optax.sgd(0.1))
    before = start(optimizer)
    after, metrics = jax.jit(training.make_train_step(loss_fn, optimizer))(before, jnp.ones(4))
    assert metrics["skipped"]
    assert after.params == before.params
    assert after.opt_state.scale == before.opt_state.scale  # nothing overflowed


def test_loss_scale_saves_small_gradients():
    def loss_fn(params, stats, x):
        half = (params.astype(jnp.float16) * x.astype(jnp.float16)) * jnp.float16(2**-12)
        return jnp.float32(2**-14) * half.astype(jnp.float32).sum(), stats, {}

    plain, x = optax.sgd(1.0), jnp.ones(1)
    scaled = training.dynamic_loss_scale(plain, initial=2.0**10)
    ends = []
    for optimizer in (plain, scaled):
        step = jax.jit(training.make_train_step(loss_fn, optimizer))
        state = training.init(jnp.zeros(()), (), optimizer)
        state, metrics = step(state, x)
        ends.append(float(state.params))
    assert ends[0] == 0  # 2**-26 is less than half of float16's smallest number
    assert ends[1] == -(2.0**-26)
    assert metrics["loss_scale"] == 2**10


def test_loss_scale_grows():
    optimizer = optax.chain(
        optax.clip(1.0),
        training.dynamic_loss_scale(optax.sgd(0.1), initial=4.0, growth_interval=3),
    )
    step = jax.jit(training.make_train_step(linear, optimizer))
    state, scales = start(optimizer), []
    for _ in range(7):
        state, metrics = step(state, jnp.ones(4))
        scales.append(float(metrics["loss_scale"]))
    assert scales == [4, 4, 4, 8, 8, 8, 16]


# Compilation and memory.


def test_one_compile_and_donation():
    traced = []

    def loss_fn(params, stats, batch):
        traced.append(1)
        return net_loss(params, stats, batch)

    params, stats, net_loss = nets.core(None, jnp.float32)
    optimizer = OPTIMIZERS["adamw"]()
    step = jax.jit(training.make_train_step(loss_fn, optimizer), donate_argnums=0)
    state = training.init(params, stats, optimizer)
    for seed in range(STEPS):
        old, (state, _) = state, step(state, nets.batch(seed, N, np.float32))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert len(traced) == 1
    assert step._cache_size() == 1


# Evaluation.


def test_evaluate_weighs_a_ragged_last_batch():
    def metric_fn(params, stats, batch):
        mask = (batch > 2).astype(batch.dtype)
        masked = training.Mean((batch * mask).sum(), mask.sum())
        return {"mean": (params * batch).mean(), "masked": masked}

    state = start(optax.sgd(0.1), params=2.0)
    x = np.arange(10, dtype=np.float32)
    results = training.evaluate(metric_fn, state, [x[:4], x[4:8], x[8:]])
    assert results == {"mean": 9.0, "masked": 6.0}
    sharded = jax.device_put(x[:8], NamedSharding(mesh(), P(AXIS)))
    assert training.evaluate(metric_fn, state, [sharded, x[8:]]) == results


def test_evaluate_compiles_once_a_shape():
    traced = []

    def metric_fn(params, stats, batch):
        traced.append(batch.shape)
        return {"mean": batch.mean()}

    state = start(optax.sgd(0.1))
    for _ in range(2):
        training.evaluate(metric_fn, state, [np.ones(4, np.float32)] * 3 + [np.ones(2, np.float32)])
    assert traced == [(4,), (2,)]


def test_evaluate_refuses_an_empty_list_of_batches():
    with pytest.raises(ValueError, match="batches is empty"):
        training.evaluate(lambda *_: {}, start(optax.sgd(0.1)), [])


# Weight decay.


@pytest.mark.parametrize("net", nets.BUILD)
def test_decay_mask(net):
    params, _, _ = nets.BUILD[net](None, jnp.float32)
    mask = training.decay_mask(params)
    kept = jax.tree.map(lambda p, m: bool(m) == (p.ndim == 2), params, mask)
    assert all(jax.tree.leaves(kept))  # kernels have two axes here, scales and biases one
    optimizer = promoting(optax.adamw(0.1, weight_decay=1.0, mask=training.decay_mask))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    moved = jax.tree.map(lambda u, p: bool(jnp.any(u != 0)) == (p.ndim == 2), updates, params)
    assert all(jax.tree.leaves(moved))


def test_decay_mask_goes_by_name():
    params = {"embedding": jnp.ones(3), "norm": jbn.init_params((2, 3)), "none": None}
    assert training.decay_mask(params) == {
        "embedding": True,
        "norm": jbn.Params(False, False),  # pyright: ignore[reportArgumentType]
        "none": None,
    }
    assert training.decay_mask({"scale": nnx.Param(jnp.ones(3))})["scale"].get_value() is False


def test_pickles_name_the_package_and_not_its_files():
    state = training.LossScaleState(np.float32(2), np.int32(0), training.Mean(1.0, 2.0))
    state = training.TrainState(np.int32(0), (), (), state)  # pyright: ignore[reportArgumentType]
    text = pickle.dumps(state, protocol=0)
    assert pickle.loads(text) == state
    assert set(re.findall(rb"c(jbn[\w.]*)\n", text)) == {b"jbn.training"}


# Errors.


def raises(error, match, loss_fn, batch=None, state=None, mode=whole, **options):
    optimizer = optax.sgd(0.1)
    run, _ = mode(training.make_train_step(loss_fn, optimizer, **options))
    with pytest.raises(error, match=match):
        run(start(optimizer) if state is None else state, jnp.ones(8) if batch is None else batch)


def test_errors():
    raises(ValueError, r"microbatches=3 must divide.*\(8,\)", linear, microbatches=3)
    raises(TypeError, "tuple of 2", lambda p, s, x: (p * x.mean(), s))
    raises(TypeError, "must be a dictionary.*got tuple", lambda p, s, x: (p * x.mean(), s, ()))
    raises(ValueError, r"shape \(\); got.*\(8,\)", lambda p, s, x: (p * x, s, {}))
    raises(ValueError, r"\['loss'\] are the step's", lambda p, s, x: (p, s, {"loss": p}))
    raises(ValueError, 'return updates\\["batch_stats"\\]', lambda p, s, x: (p, {"a": s}, {}))
    raises(NameError, "axis_name='batch' is unbound", linear, axis_name=AXIS)
    with pytest.raises(ValueError, match="microbatches must be at least 1; got 0"):
        training.make_train_step(linear, optax.sgd(0.1), microbatches=0)
    twice = training.dynamic_loss_scale(training.dynamic_loss_scale(optax.sgd(0.1)))
    raises(ValueError, "at most one|loss scales", linear, state=start(optax.chain(twice, twice)))


def test_state_that_varies_over_devices():
    def everywhere(step):
        specs = {"in_specs": (P(AXIS), P(AXIS)), "out_specs": P(AXIS)}
        return jax.jit(jax.shard_map(step, mesh=mesh(), **specs)), None

    state = training.TrainState(jnp.zeros(4, jnp.int32), jnp.ones(4), (), ())
    message = r"state\.step varies over axis_name=\('batch',\).*in_specs=\(P\(\), P\('batch'\)\)"
    raises(ValueError, message, linear, state=state, mode=everywhere, axis_name=AXIS)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_local_statistics_that_are_not_pooled(microbatches):
    def loss_fn(params, stats, x):
        return jnp.mean(params * x), {"mean": 0.9 * stats["mean"] + 0.1 * x.mean()}, {}

    state = start(optax.sgd(0.1), stats={"mean": jnp.zeros(())})
    options = {"axis_name": AXIS, "pool_stats": False, "microbatches": microbatches}
    message = r"\['mean'\] differ between the devices of axis_name"
    raises(ValueError, message, loss_fn, state=state, mode=shard_map, **options)
