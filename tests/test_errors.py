"""What a user can get wrong: each error says what came, what was expected and what to write."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jbn
from tests import executions

X = np.zeros((8, 5), np.float32)
PARAMS, STATS = jbn.init_params(5), jbn.init_stats(5)
MESH = executions.mesh((2, 2), ("data", "model"))


def fails(error, call, *words):
    """`call` raises `error`, and the message has all of `words`."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


def train(x=X, params=PARAMS, stats=STATS, **kwargs):
    return lambda: jbn.batch_norm(x, params, stats, **kwargs)


def infer(x=X, params=PARAMS, stats=STATS, **kwargs):
    return lambda: jbn.batch_norm_inference(x, params, stats, **kwargs)


# --- x -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
def test_x_must_be_floating_point(dtype):
    x = X.astype(dtype)
    words = np.dtype(dtype).name, "x.astype(jnp.float32)", (8, 5)
    for call in (
        train(x),
        infer(x),
        lambda: jbn.moments(x),
        lambda: jbn.normalize(x),
    ):
        fails(TypeError, call, *words)


@pytest.mark.parametrize("mode", [train, infer])
def test_the_wrong_number_of_features(mode):
    three = jbn.init_params(3), jbn.init_stats(3)
    fails(ValueError, mode(params=three[0]), "scale", (3,), (8, 5), 5, "axis")
    fails(ValueError, mode(stats=three[1]), "stats.mean", (3,), (8, 5), 5, "axis")
    fails(ValueError, mode(params=PARAMS._replace(bias=jnp.zeros(3))), "bias", (3,), 5)
    fails(ValueError, mode(stats=STATS._replace(var=jnp.ones(3))), "stats.var", (3,), 5)
    fails(ValueError, mode(stats=STATS._replace(count=jnp.ones(()))), "stats.count", (), 5)


def test_features_on_another_axis():
    # The features of channels-first images: the message shows x, so that the axis is seen.
    images = np.zeros((2, 5, 4, 4), np.float32)
    fails(ValueError, train(images), "(2, 5, 4, 4)", "(5,)", "(4,)", "axis=")
    two = np.zeros((2, 3, 4, 5), np.float32)
    fails(ValueError, train(two, axis=(1, 3)), "(5,)", "(3, 5)")


def test_a_single_value_where_a_vector_is_due():
    # No broadcasting of parameters: a scalar would hide a wrong axis.
    fails(ValueError, lambda: jbn.normalize(X, jnp.float32(2.0)), "scale", "()", "(5,)")
    fails(ValueError, lambda: jbn.normalize(X, None, jnp.zeros((1, 5))), "bias", "(1, 5)", "(5,)")


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 1, 5)], ids=str)
def test_one_value_per_channel_cannot_be_trained_on(shape):
    x = np.zeros(shape, np.float32)
    ways_out = "larger batch", "axis_name", "batch_norm_inference"
    fails(ValueError, train(x), "one value per", shape, *ways_out)
    fails(ValueError, jax.jit(train(x)), "one value per")
    # All but training takes it, and so does training that shares its statistics.
    shared = lambda x: jbn.batch_norm(x, PARAMS, STATS, axis_name="i")  # noqa: E731
    jax.eval_shape(jbn.normalize, x)
    jax.eval_shape(jbn.moments, x)
    jax.eval_shape(infer(x))
    jax.eval_shape(jax.vmap(shared, axis_name="i"), np.stack([x, x]))


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [-1e-5, math.nan, math.inf, "1e-5", None, 1e-5 + 0j], ids=repr)
def test_epsilon(epsilon):
    for call in (
        train(epsilon=epsilon),
        infer(epsilon=epsilon),
        lambda: jbn.normalize(X, epsilon=epsilon),
    ):
        fails(ValueError, call, "epsilon", repr(epsilon), ">= 0", "1e-5")


@pytest.mark.parametrize("decay", [-0.1, 1.01, 99, math.nan, "0.9", None], ids=repr)
def test_decay(decay):
    fails(ValueError, lambda: jbn.ema(decay), "decay", repr(decay), "0 and 1", "0.99")


def test_a_decay_of_one_has_no_debiased_form():
    fails(ValueError, lambda: jbn.ema(1.0, debias=True), "decay=1", "cumulative()")
    jbn.ema(1.0)  # frozen statistics


def test_a_rule_instead_of_its_name():
    for update in ("ema", 0.99, None):
        fails(TypeError, train(update=update), "update", repr(update), "jbn.ema")


def test_a_rule_that_returns_no_running_statistics():
    fails(TypeError, train(update=lambda stats, m: (m.mean, m.var)), "RunningStats", "tuple")


@pytest.mark.parametrize(
    "stats",
    [(jnp.zeros(5), jnp.ones(5)), {"mean": jnp.zeros(5), "var": jnp.ones(5)}, None, PARAMS],
    ids=["pair", "dict", "none", "params"],
)
@pytest.mark.parametrize("mode", [train, infer])
def test_what_are_no_running_statistics(mode, stats):
    words = "stats", "RunningStats", type(stats).__name__, "jbn.init_stats"
    fails(TypeError, mode(stats=stats), *words)


@pytest.mark.parametrize(
    "params", [STATS, None, jnp.ones(5), 1.0], ids=["stats", "none", "array", "float"]
)
@pytest.mark.parametrize("mode", [train, infer])
def test_what_are_no_parameters(mode, params):
    fails(TypeError, mode(params=params), "params", "Params", "jbn.init_params")


def test_options_are_keywords():
    for call in (
        lambda: jbn.moments(X, -1),
        lambda: jbn.normalize(X, None, None, -1),
        lambda: jbn.batch_norm(X, PARAMS, STATS, -1),
        lambda: jbn.batch_norm_inference(X, PARAMS, STATS, -1),
        lambda: jbn.ema(0.9, True),
        lambda: jbn.cumulative(True),
    ):
        fails(TypeError, call, "positional")


def test_index_groups_need_an_axis_name():
    groups = [[0, 1], [2, 3]]
    fails(ValueError, train(axis_index_groups=groups), "axis_index_groups", "axis_name")


# --- masks and weights -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mask", "weights"])
@pytest.mark.parametrize("shape", [(8,), (5,), (), (8, 2), (3, 1), (8, 5, 1), (1, 8, 5)], ids=str)
def test_the_shape_of_mask_and_weights(name, shape):
    values = np.ones(shape, bool if name == "mask" else np.float32)
    for call in (
        train(**{name: values}),
        lambda: jbn.moments(X, **{name: values}),
        lambda: jbn.normalize(X, **{name: values}),
    ):
        fails(ValueError, call, name, shape, (8, 5), "(8, 1)")


@pytest.mark.parametrize("name", ["mask", "weights"])
def test_a_bare_vector_says_that_it_would_choose_features(name):
    # As many examples as features: NumPy's broadcasting would silently mask channels.
    square = np.zeros((5, 5), np.float32)
    values = np.ones(5, bool if name == "mask" else np.float32)
    fails(
        ValueError,
        train(square, **{name: values}),
        "features, not examples",
        f"{name}.reshape((-1, 1))",
    )
    images = np.zeros((5, 4, 4, 5), np.float32)
    fails(ValueError, train(images, **{name: values}), f"{name}.reshape((-1, 1, 1, 1))")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_mask_that_is_not_bool(dtype):
    mask = np.ones((8, 1), dtype)
    fails(TypeError, train(mask=mask), "mask", "bool", np.dtype(dtype).name, "weights")


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_weights_that_are_not_real(dtype):
    weights = np.ones((8, 1), dtype)
    fails(TypeError, train(weights=weights), "weights", np.dtype(dtype).name, "mask")


def test_errors_come_while_tracing():
    # At the public edge, before anything is compiled or run.
    x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"\(5,\).* \(8, 3\)"):
        jax.eval_shape(lambda x: jbn.batch_norm(x, PARAMS, STATS), x)


@pytest.mark.parametrize("maker", [jbn.ema, jbn.cumulative])
def test_the_maker_of_a_rule_instead_of_a_rule(maker):
    fails(TypeError, train(update=maker), "update", f"jbn.{maker.__name__}()")


def test_params_in_a_dict():
    params = {"scale": np.ones(4), "bias": np.zeros(4)}
    x = np.ones((8, 4), np.float32)
    fails(TypeError, lambda: jbn.batch_norm(x, params, jbn.init_stats(4)), "jbn.Params", "dict")


def test_a_single_number():
    fails(ValueError, lambda: jbn.normalize(np.float32(1)), "single number", "[N, ..., C]")


def test_a_traced_epsilon():
    x = np.ones((8, 4), np.float32)
    call = lambda: jax.jit(lambda e: jbn.normalize(x, epsilon=e)[0])(1e-5)  # noqa: E731
    fails(TypeError, call, "epsilon", "traced")


# --- which values share statistics -------------------------------------------------------------


@pytest.mark.parametrize("groups", [3, 16])
def test_groups_must_divide_the_batch(groups):
    for call in (
        train(groups=groups),
        lambda: jbn.normalize(X, groups=groups),
        lambda: jbn.moments(X, groups=groups),
    ):
        fails(ValueError, call, f"groups={groups}", "batch of 8", (8, 5), "1, 2, 4, 8")


@pytest.mark.parametrize("groups", [0, -2, 2.0, True, "2"])
def test_groups_is_a_positive_number(groups):
    fails(TypeError, train(groups=groups), repr(groups), "groups=8")


def test_groups_of_one_value():
    fails(ValueError, train(groups=8), "one value per channel", "in each of 8 groups", (8, 5))


def test_groups_of_nothing():
    call = lambda: jax.vmap(  # noqa: E731
        lambda x: jbn.normalize(x, axis_name="i", groups=2), axis_name="i"
    )(X)
    fails(ValueError, call, "groups=2", (5,))


def test_unbound_axis_name_says_which_are_bound():
    fails(NameError, train(axis_name="nowhere"), "'nowhere' is unbound", "none", "leave axis_name")
    stats = jbn.init_params(1), jbn.init_stats(1)
    mapped = jax.vmap(lambda x: train(x, *stats, axis_name="bath")(), axis_name="batch")
    fails(NameError, lambda: mapped(X.reshape(4, 10, 1)), "'bath'", "bound axes: 'batch'")
    sharded = jax.shard_map(train(axis_name=("data", "x")), mesh=MESH, in_specs=(), out_specs=P())
    fails(NameError, sharded, "axis_name='x' is unbound", "bound axes: 'data', 'model'")


def test_axis_name_given_twice():
    mapped = jax.vmap(lambda x: jbn.normalize(x, axis_name=("i", "i")), axis_name="i")
    fails(ValueError, lambda: mapped(X.reshape(2, 4, 5)), "('i', 'i')", "twice")


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [1, 2, 3]], [[0, 1, 2, 3, 4]], [[0], [4]]])
def test_index_groups_must_hold_every_index_once(groups):
    def run(x):
        return jbn.normalize(x, axis_name="i", axis_index_groups=groups)

    call = lambda: jax.vmap(run, axis_name="i")(X.reshape(4, 2, 5))  # noqa: E731
    fails(ValueError, call, groups, "'i'", "0 to 3")
    fails(ValueError, train(axis_index_groups=[[0]]), "pass axis_name= too")


def shard_mapped(f, check_vma=True):
    specs = {"in_specs": (P("data"), P()), "out_specs": (P("data"), P())}
    return lambda: jax.shard_map(f, mesh=MESH, check_vma=check_vma, **specs)(X, STATS)


def test_local_statistics_about_to_leave_shard_map_as_replicated():
    words = "axes 'data'", "bound axes: 'data', 'model'", "axis_name='data'", "pcast", "P('data')"
    fails(ValueError, shard_mapped(lambda x, stats: train(x, stats=stats)()), *words)
    # What the message says to write is right.
    shard_mapped(lambda x, stats: train(x, stats=stats, axis_name="data")())()

    def own(x, stats):
        y, stats = train(x, stats=jax.lax.pcast(stats, "data", to="varying"))()
        return y, jax.lax.pmean(stats, "data")

    shard_mapped(own)()


def test_an_axis_of_vmap_inside_a_checking_shard_map():
    def device(x, stats):
        run = lambda x: jbn.normalize(x, axis_name=("data", "i"))[0]  # noqa: E731
        return jax.vmap(run, axis_name="i")(x[None])[0], stats

    words = "axis_name='i'", "check_vma=False", "'data', 'model', 'i'"
    fails(NotImplementedError, shard_mapped(device), *words)
    shard_mapped(device, check_vma=False)()
