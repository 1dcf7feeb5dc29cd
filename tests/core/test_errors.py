"""Errors say what was given, what was expected and what to write instead."""

import math

import chex
import flax.linen as nn
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
    """Checks that `call` raises `error` and that the message has all of `words`."""
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
    # For channels-first images the message shows x's shape, so that the wrong axis is visible.
    images = np.zeros((2, 5, 4, 4), np.float32)
    fails(ValueError, train(images), "(2, 5, 4, 4)", "(5,)", "(4,)", "axis=")
    two = np.zeros((2, 3, 4, 5), np.float32)
    fails(ValueError, train(two, axis=(1, 3)), "(5,)", "(3, 5)")


def test_parameters_do_not_broadcast():
    # A scalar that broadcasts would hide a wrong axis.
    fails(ValueError, lambda: jbn.normalize(X, jnp.float32(2.0)), "scale", "()", "(5,)")
    fails(ValueError, lambda: jbn.normalize(X, None, jnp.zeros((1, 5))), "bias", "(1, 5)", "(5,)")


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 1, 5)], ids=str)
def test_one_value_per_channel_cannot_be_trained_on(shape):
    x = np.zeros(shape, np.float32)
    ways_out = "larger batch", "axis_name", "batch_norm_inference"
    fails(ValueError, train(x), "one value per", shape, *ways_out)
    fails(ValueError, jax.jit(train(x)), "one value per")
    # Everything but training takes such x, and so does training that shares its statistics.
    shared = lambda x: jbn.batch_norm(x, PARAMS, STATS, axis_name="i")  # noqa: E731
    jax.eval_shape(jbn.normalize, x)
    jax.eval_shape(jbn.moments, x)
    jax.eval_shape(infer(x))
    jax.eval_shape(jax.vmap(shared, axis_name="i"), np.stack([x, x]))


# --- arguments ---------------------------------------------------------------------------------


NO_NUMBERS = [
    [1, [2]],
    {},
    "1e-5",
    b"1e-5",
    None,
    1e-5 + 0j,
    True,
    np.True_,
    np.array([0.5]),
    [0.5],
]


@pytest.mark.parametrize("epsilon", [-1e-5, math.nan, math.inf, 1e39, *NO_NUMBERS], ids=repr)
def test_epsilon(epsilon):
    for call in (
        train(epsilon=epsilon),
        infer(epsilon=epsilon),
        lambda: jbn.normalize(X, epsilon=epsilon),
    ):
        fails(ValueError, call, "epsilon", repr(epsilon), ">= 0", "1e-5")


@pytest.mark.parametrize("decay", [-0.1, 1.01, 99, math.nan, *NO_NUMBERS], ids=repr)
def test_decay(decay):
    fails(ValueError, lambda: jbn.ema(decay), "decay", repr(decay), "0 and 1", "0.99")


@pytest.mark.parametrize("digits", [400, 5000])  # 5000: more than Python prints
def test_numbers_that_no_float_can_hold(digits):
    for value in (10**digits, -(10**digits)):
        fails(ValueError, train(epsilon=value), "epsilon", "1e-5", "got ")
        fails(ValueError, infer(epsilon=value), "epsilon", "1e-5", "got ")
        fails(ValueError, lambda value=value: jbn.ema(value), "decay", "0.99", "got ")


@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), jnp.array(0.5), 1, 0], ids=repr)
def test_numbers_of_numpy_and_jax(number):
    jax.eval_shape(train(epsilon=number))
    assert jbn.ema(number) == jbn.ema(float(number))


def test_a_decay_of_one_has_no_debiased_form():
    fails(ValueError, lambda: jbn.ema(1.0, debias=True), "decay=1", "cumulative()")
    jbn.ema(1.0)  # frozen statistics


def test_a_name_or_a_number_instead_of_a_rule_is_refused():
    for update in ("ema", 0.99, None, np.ones(4), jnp.ones(5)):
        fails(TypeError, train(update=update), "update", repr(update), "jbn.ema")


def test_a_rule_that_returns_no_running_statistics():
    fails(TypeError, train(update=lambda stats, m: (m.mean, m.var)), "RunningStats", "tuple")


@pytest.mark.parametrize(
    "stats",
    [(jnp.zeros(5), jnp.ones(5)), {"mean": jnp.zeros(5), "var": jnp.ones(5)}, None, PARAMS],
    ids=["pair", "dict", "none", "params"],
)
@pytest.mark.parametrize("mode", [train, infer])
def test_only_running_stats_are_taken_as_statistics(mode, stats):
    words = "stats", "RunningStats", type(stats).__name__, "jbn.init_stats"
    fails(TypeError, mode(stats=stats), *words)


@pytest.mark.parametrize("mode", [train, infer])
@pytest.mark.parametrize("field", STATS._fields)
def test_running_statistics_are_floating_point(mode, field):
    ones, words = np.ones(5), (f"stats.{field}", "init_stats(C)", "astype(jnp.float32)")
    wrong = [np.bool_, np.int32, np.int8] if field != "count" else [np.bool_]
    wrong += [np.complex64] if field != "mean" else []
    for dtype in wrong:
        values = STATS._replace(**{field: ones.astype(dtype)})
        fails(TypeError, mode(stats=values), np.dtype(dtype).name, *words)
    for what in (None, "abc", object()):
        values = STATS._replace(**{field: what})
        fails(TypeError, mode(stats=values), words[0], "array", type(what).__name__)


@pytest.mark.parametrize("dtype", [jnp.int32, int, bool, "int4", jnp.float8_e8m0fnu])
def test_parameters_and_statistics_are_made_of_floating_point(dtype):
    for make in (jbn.init_stats, jbn.init_params):
        fails(TypeError, lambda make=make: make(5, dtype), np.dtype(dtype).name, "jnp.float32")


@pytest.mark.parametrize("dtype", ["float31", 3, X])
def test_an_invalid_dtype_is_refused(dtype):
    for call in (
        lambda: jbn.init_stats(5, dtype),
        lambda: jbn.init_params(5, dtype),
        train(dtype=dtype),
        infer(dtype=dtype),
    ):
        fails(TypeError, call, "dtype", "jnp.float32", "got ")


@pytest.mark.parametrize("features", [5.0, "5", None, -1, True, X, (5, 2.0)], ids=str)
def test_the_number_of_features(features):
    for make in (jbn.init_stats, jbn.init_params):
        fails(TypeError, lambda make=make: make(features), "features", "x.shape[-1]", "got ")


@pytest.mark.parametrize(
    "params", [STATS, None, jnp.ones(5), 1.0], ids=["stats", "none", "array", "float"]
)
@pytest.mark.parametrize("mode", [train, infer])
def test_only_params_are_taken_as_parameters(mode, params):
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


# --- dtypes ------------------------------------------------------------------------------------

COMPLEX = X.astype(np.complex64)
COMPLEX_STATS = jbn.init_stats(5, jnp.complex64)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, bool, "int4", jnp.float8_e8m0fnu], ids=str)
def test_y_is_floating_point(dtype):
    for call in (
        train(dtype=dtype),
        infer(dtype=dtype),
        lambda: jbn.normalize(X, dtype=dtype),
    ):
        fails(TypeError, call, "dtype", np.dtype(dtype).name, "floating point", "jnp.float32")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_real_y_of_complex_x(dtype):
    for call in (
        train(COMPLEX, stats=COMPLEX_STATS, dtype=dtype),
        infer(COMPLEX, stats=COMPLEX_STATS, dtype=dtype),
        lambda: jbn.normalize(COMPLEX, dtype=dtype),
    ):
        fails(TypeError, call, "complex64", np.dtype(dtype).name, "imaginary part", "x.real")


@pytest.mark.parametrize("name", ["scale", "bias", "residual"])
@pytest.mark.parametrize("dtype", [None, jnp.complex64], ids=str)
def test_complex_parts_of_a_layer_for_real_x(name, dtype):
    values = COMPLEX if name == "residual" else jnp.ones(5, jnp.complex64)
    given = {"residual": values} if name == "residual" else {}
    params = PARAMS if name == "residual" else PARAMS._replace(**{name: values})
    for call in (
        train(params=params, dtype=dtype, **given),
        infer(params=params, dtype=dtype, **given),
        lambda: jbn.normalize(X, *params, dtype=dtype, **given),
    ):
        fails(TypeError, call, name, "complex64", "float32", "x.astype(jnp.complex64)")


def test_complex_statistics_for_real_x_and_real_ones_for_complex_x():
    words = "stats.mean", "complex64", "float32"
    for mode in (train, infer):
        fails(TypeError, mode(stats=COMPLEX_STATS), *words, "x.astype(complex64)")
    fails(TypeError, train(COMPLEX), *words, "jbn.init_stats(C, dtype=complex64)")
    jax.eval_shape(infer(COMPLEX))  # no imaginary part is lost


def test_a_dtype_without_a_sign_is_refused():
    x = X.astype(jnp.float8_e8m0fnu)
    for call in (train(x), infer(x), lambda: jbn.moments(x), lambda: jbn.normalize(x)):
        fails(TypeError, call, "x is float8_e8m0fnu", "sign", "x.astype(jnp.float32)")
    fails(TypeError, train(residual=x), "residual is float8_e8m0fnu", "residual.astype")


@pytest.mark.parametrize("name", ["x", "mask", "weights", "residual", "scale"])
@pytest.mark.parametrize("what", ["abc", {"a": X}, object()], ids=lambda v: type(v).__name__)
def test_arguments_that_are_no_arrays_are_refused(name, what):
    def call():
        given = {} if name in ("x", "scale") else {name: what}
        return jbn.normalize(what if name == "x" else X, what if name == "scale" else None, **given)

    fails(TypeError, call, name, "array", type(what).__name__)


# --- what must be static -----------------------------------------------------------------------


def test_a_traced_axis_is_refused():
    for f in (jbn.moments, jbn.normalize):
        fails(TypeError, lambda f=f: jax.jit(f)(X, axis=1), "axis", "traced", "static_argnames")
    call = lambda: jax.jit(jbn.batch_norm)(X, PARAMS, STATS, axis=1)  # noqa: E731
    fails(TypeError, call, "axis", "traced", "static_argnames", "close over it")
    call = lambda: jax.jit(jbn.batch_norm_inference)(X, PARAMS, STATS, axis=1)  # noqa: E731
    fails(TypeError, call, "axis", "traced", "static_argnames", "close over it")


def test_a_traced_number_of_groups_is_refused():
    for f in (jbn.moments, jbn.normalize):
        fails(TypeError, lambda f=f: jax.jit(f)(X, groups=2), "groups", "traced", "close over it")
    call = lambda: jax.jit(jbn.batch_norm)(X, PARAMS, STATS, groups=2)  # noqa: E731
    fails(TypeError, call, "groups", "traced", "static_argnames")


@pytest.mark.parametrize("integer", [np.int8, np.array, jnp.array])
def test_axis_and_groups_may_be_integers_of_numpy_and_jax(integer):
    expected = jbn.normalize(X.T, axis=0, groups=4)
    chex.assert_trees_all_equal(jbn.normalize(X.T, axis=integer(0), groups=integer(4)), expected)


@pytest.mark.parametrize("name", [3, True, 1.5, np.array(1), {}, {"i"}, (3,), ("i", 0)], ids=repr)
def test_an_invalid_axis_name_is_refused(name):
    mapped = jax.vmap(lambda x: train(x, axis_name=name)(), axis_name="i")
    fails(TypeError, lambda: mapped(X[None]), "axis_name", repr(name), "'batch'", "axis=")


def test_an_empty_tuple_of_axis_names_is_no_axis_name():
    fails(ValueError, train(X[:1], axis_name=()), "one value per channel", "axis_name")
    fails(ValueError, train(axis_name=(), axis_index_groups=[[0]]), "pass axis_name= too")
    chex.assert_trees_all_equal(train(axis_name=())(), train()())


@pytest.mark.parametrize("groups", [[0, 1], 3, "ab", [["a"]], [[0.0, 1.0]], [[0], 1]], ids=repr)
def test_index_groups_are_groups_of_indices(groups):
    run = lambda x: jbn.normalize(x, axis_name="i", axis_index_groups=groups)[0]  # noqa: E731
    call = lambda: jax.vmap(run, axis_name="i")(X.reshape(4, 2, 5))  # noqa: E731
    fails(TypeError, call, "axis_index_groups", "[[0, 1], [2, 3]]", repr(groups))


# --- activations -------------------------------------------------------------------------------


def twice(y):
    return y if y > 0 else 2 * y


@pytest.mark.parametrize(
    "activation",
    [np.tanh, math.tanh, twice, jnp.add, nn.PReLU()],
    ids=["numpy", "math", "branches", "two arguments", "module"],
)
def test_activations_that_cannot_be_traced(activation):
    for mode in (train, infer):
        call = mode(activation=activation)
        fails(TypeError, call, "activation", "raised", "jnp.tanh for np.tanh", "jnp.where")


@pytest.mark.parametrize("mixing", [jax.nn.softmax, jnp.sort, lambda y: y - y.mean()])
def test_activations_that_are_not_elementwise(mixing):
    for mode in (train, infer):
        fails(ValueError, mode(activation=mixing), "elementwise", "depends", "activation(y)")
        fails(ValueError, jax.jit(mode(activation=mixing)), "elementwise")


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        (lambda y: y > 0, "bool"),
        (lambda y: y.astype(int), "int32"),
        (lambda y: jax.lax.complex(y, y), "complex64"),
    ],
    ids=["bool", "int32", "complex64"],
)
def test_activations_that_return_another_kind_of_number(activation, dtype):
    for mode in (train, infer):
        fails(TypeError, mode(activation=activation), "activation", "floating point", dtype)


@jax.tree_util.register_pytree_node_class
class LearnedSlope:
    """A module with a parameter, as those of Flax nnx and Equinox are."""

    def __init__(self, slope=0.1):
        self.slope = jnp.asarray(slope)

    def __call__(self, y):
        return jnp.where(y > 0, y, self.slope * y)

    def tree_flatten(self):
        return (self.slope,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_an_activation_with_parameters_is_refused():
    for mode in (train, infer):
        call = mode(activation=LearnedSlope())
        fails(TypeError, call, "activation", "static", "arrays", "activation(y)")


# --- moments that a user passes ----------------------------------------------------------------


def test_only_moments_are_pooled_and_merged():
    m = jbn.moments(X)
    fails(TypeError, lambda: jbn.pool([m, m]), "jbn.Moments", "list", "jnp.stack(v), *ms")
    for wrong in (None, tuple(m), STATS, X):
        name = type(wrong).__name__
        fails(TypeError, lambda w=wrong: jbn.merge(m, w), "b must be jbn.Moments", name)
        fails(TypeError, lambda w=wrong: jbn.merge(w, m), "a must be jbn.Moments", name)


def test_moments_of_different_shapes_are_refused():
    m = jbn.moments(X)
    fails(ValueError, lambda: jbn.merge(m, jbn.moments(X[:, :1])), "(5,)", "(1,)", "same features")
    fails(ValueError, lambda: jbn.pool(jbn.Moments(1, 1.0, 1.0)), "leading axis", "()", "jnp.stack")
    three = jnp.ones((3, 5))
    fails(ValueError, lambda: jbn.pool(jbn.Moments(1, three, three[0])), "(3, 5)", "(5,)")
    fails(ValueError, lambda: jbn.pool(jbn.Moments(jnp.ones(4), three, three)), "(4,)", "each part")
    fails(
        TypeError, lambda: jbn.pool(jbn.Moments(1, three.astype(int), three)), "int32", "moments(x)"
    )


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
    # With as many examples as features, NumPy's broadcasting would silently mask channels.
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


def test_errors_are_raised_while_tracing():
    # The public function raises, before anything is compiled or run.
    x = jax.ShapeDtypeStruct((8, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"\(5,\).* \(8, 3\)"):
        jax.eval_shape(lambda x: jbn.batch_norm(x, PARAMS, STATS), x)


@pytest.mark.parametrize("maker", [jbn.ema, jbn.cumulative])
def test_a_rule_without_its_parentheses_is_refused(maker):
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


# --- groups and named axes ---------------------------------------------------------------------


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


def test_groups_without_a_batch_axis_are_refused():
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


@pytest.mark.slow
def test_local_statistics_may_not_leave_shard_map_as_replicated():
    words = "axes 'data'", "bound axes: 'data', 'model'", "axis_name='data'", "pcast", "P('data')"
    fails(ValueError, shard_mapped(lambda x, stats: train(x, stats=stats)()), *words)
    # The code that the message suggests works.
    shard_mapped(lambda x, stats: train(x, stats=stats, axis_name="data")())()

    def own(x, stats):
        y, stats = train(x, stats=jax.lax.pcast(stats, "data", to="varying"))()
        return y, jax.lax.pmean(stats, "data")

    shard_mapped(own)()


def test_an_axis_of_vmap_inside_a_checking_shard_map_is_refused():
    def device(x, stats):
        run = lambda x: jbn.normalize(x, axis_name=("data", "i"))[0]  # noqa: E731
        return jax.vmap(run, axis_name="i")(x[None])[0], stats

    words = "axis_name='i'", "check_vma=False", "'data', 'model', 'i'"
    fails(NotImplementedError, shard_mapped(device), *words)
    shard_mapped(device, check_vma=False)()
