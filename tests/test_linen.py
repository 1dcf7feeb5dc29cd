"""jbn.linen.BatchNorm can take the place of flax.linen.BatchNorm."""

import dataclasses
import functools
import inspect

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import jbn
from jbn.linen import BatchNorm
from jbn.training import init, make_train_step

pytestmark = pytest.mark.usefixtures("cheap_programs")

EPS = float(jnp.finfo(jnp.float32).eps)
# In a network of a few layers each output is a sum of some hundred products, BN divides by their
# standard deviation, and gradients pass through all layers twice.
NETWORK = {"rtol": 2e3 * EPS, "atol": 2e3 * EPS}
# One layer: sums of at most 60 values.
LAYER = {"rtol": 32 * EPS, "atol": 32 * EPS}


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


class Block(nn.Module):
    """A residual block with a projection, as users of ResNet-18 know it."""

    norm: type[nn.Module]
    filters: int
    strides: int

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train, momentum=0.9)
        strides = (self.strides, self.strides)
        y = nn.Conv(self.filters, (3, 3), strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = nn.Conv(self.filters, (3, 3), use_bias=False)(y)
        y = norm(scale_init=nn.initializers.constant(0.5))(y)
        if y.shape != x.shape:
            x = norm(name="norm_proj")(nn.Conv(self.filters, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A small ResNet whose normalisation is an argument."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(self.norm(use_running_average=not train, momentum=0.9, name="bn_init")(x))
        x = Block(self.norm, 8, 1)(x, train)
        x = Block(self.norm, 16, 2)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


IMAGES, LABELS = normal(0, (6, 8, 8, 3)) + 0.5, jnp.arange(6)


@functools.cache
def trained(norm, steps=3):
    """Returns initial variables, losses and gradients of a few SGD steps, and final variables."""
    model, optimizer = ResNet(norm), optax.sgd(0.05, momentum=0.9)
    initial = model.init(jax.random.key(1), IMAGES)

    @jax.jit
    def step(params, stats, state):
        def loss(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats}, IMAGES, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
            return losses.mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, value, grads

    params, stats = initial["params"], initial["batch_stats"]
    state, history = optimizer.init(params), []
    for _ in range(steps):
        params, stats, state, value, grads = step(params, stats, state)
        history.append((value, grads))
    return initial, history, {"params": params, "batch_stats": stats}


@pytest.mark.slow
def test_resnet_has_the_trees_of_flax():
    ours, theirs = trained(BatchNorm)[0], trained(nn.BatchNorm)[0]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    chex.assert_trees_all_equal(ours, theirs)  # every name, shape, dtype and random draw


@pytest.mark.slow
def test_resnet_trains_as_with_flax():
    (_, ours, final), (_, theirs, expected) = trained(BatchNorm), trained(nn.BatchNorm)
    chex.assert_trees_all_close(ours, theirs, **NETWORK)
    chex.assert_trees_all_close(final, expected, **NETWORK)


@pytest.mark.slow
def test_resnet_infers_as_with_flax():
    variables = trained(nn.BatchNorm)[2]
    y, expected = (
        ResNet(n).apply(variables, IMAGES, train=False) for n in (BatchNorm, nn.BatchNorm)
    )
    chex.assert_trees_all_close(y, expected, **NETWORK)


@pytest.mark.slow
def test_checkpoint_written_with_flax_loads(tmp_path):
    written = trained(nn.BatchNorm)[2]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", written)
        checkpointer.wait_until_finished()
        target = jax.eval_shape(ResNet(BatchNorm).init, jax.random.key(1), IMAGES)
        read = checkpointer.restore(tmp_path / "orbax", target)
    chex.assert_trees_all_equal(read, written)
    data = flax.serialization.to_bytes(written)
    chex.assert_trees_all_equal(flax.serialization.from_bytes(target, data), written)


def test_arguments_are_those_of_flax_then_our_own():
    def names(cls):
        return [f.name for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]

    assert names(BatchNorm) == [*names(nn.BatchNorm), "update", "groups", "activation"]
    theirs = {f.name: f.default for f in dataclasses.fields(nn.BatchNorm)}
    ours = {f.name: f.default for f in dataclasses.fields(BatchNorm)}
    assert ours == theirs | {"update": None, "groups": None, "activation": None}
    call = list(inspect.signature(nn.BatchNorm.__call__).parameters.values())
    assert list(inspect.signature(BatchNorm.__call__).parameters) == [
        *(p.name for p in call),
        "weights",
        "residual",
    ]
    assert issubclass(BatchNorm, nn.BatchNorm)
    assert BatchNorm.__name__ == "BatchNorm"  # gives the automatic names, BatchNorm_0


DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("x_dtype", [*DTYPES, jnp.int32])
def test_dtypes_are_those_of_flax(x_dtype, affine, train):
    x = (4 * normal(0, (5, 3))).astype(x_dtype)
    with jax.numpy_dtype_promotion("standard"):
        for dtype in (None, *DTYPES):
            for param_dtype in DTYPES:
                for reductions in (True, False):
                    kwargs = {
                        "use_running_average": not train,
                        "dtype": dtype,
                        "param_dtype": param_dtype,
                        "use_scale": affine,
                        "use_bias": affine,
                        "force_float32_reductions": reductions,
                    }
                    ours, theirs = (
                        jax.eval_shape(cls(**kwargs).init_with_output, jax.random.key(0), x)
                        for cls in (BatchNorm, nn.BatchNorm)
                    )
                    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"axis": 1},
        {"axis": (1, -1)},
        {"axis": (3, 0)},
        {"momentum": 0.5, "epsilon": 0.1},
        {"use_scale": False},
        {"use_bias": False},
        {"use_fast_variance": False},
        {"param_dtype": jnp.float16, "dtype": jnp.float32},
        {"scale_init": nn.initializers.normal(1.0), "bias_init": nn.initializers.normal(1.0)},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "defaults",
)
def test_layer_computes_what_flax_computes(kwargs):
    x = 2 * normal(0, (5, 4, 3, 2)) + 1
    results = []
    with jax.numpy_dtype_promotion("standard"):
        for cls in (BatchNorm, nn.BatchNorm):
            layer = cls(**kwargs)
            variables = layer.init(jax.random.key(1), x, use_running_average=False)
            y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
            results.append((variables, y, new, layer.apply(variables | new, x, True)))
    chex.assert_trees_all_equal_shapes_and_dtypes(*results)
    chex.assert_trees_all_close(*results, **LAYER)


def apply(x, cls=BatchNorm, variables=None, call=None, **kwargs):
    """Returns (y, new batch_stats) of one training step."""
    layer = cls(use_running_average=False, **kwargs)
    if variables is None:
        variables = layer.init(jax.random.key(0), x)
    y, new = layer.apply(variables, x, mutable=["batch_stats"], **(call or {}))
    return y, new["batch_stats"]


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (normal(0, (6, 3)), None),
        (normal(0, (6, 3)), jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None]),
        (normal(0, (6, 3)), jnp.array([1, 1, 0, 1, 0, 1], jnp.int32)[:, None]),
        (normal(0, (6, 3)), jnp.array([1, 0.5, 0, 1, 0, 1])[:, None]),  # cast to bool, as in Flax
        (
            normal(0, (6, 3)),
            jnp.array([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]], bool),
        ),
        (normal(0, (4, 6, 3)), jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None]),  # lower rank
        (jnp.arange(12).reshape(4, 3), None),  # integers
        (normal(0, (1, 3)), None),  # one value per channel
        (normal(0, (3,)), None),  # one example without a batch axis
    ],
)
def test_accepts_what_flax_accepts(x, mask):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        ours, theirs = (apply(x, cls, call={"mask": mask}) for cls in (BatchNorm, nn.BatchNorm))
    chex.assert_trees_all_close(ours, theirs, **LAYER)


def test_mask_of_features_leaves_a_finite_channel():
    """Takes a (C,) mask, which chooses features, as in Flax; there the other channels are NaN."""
    x, mask = normal(0, (10, 3)), jnp.array([True, False, True])
    y, stats = apply(x, call={"mask": mask})
    with jax.numpy_rank_promotion("allow"):
        y_flax, stats_flax = apply(x, nn.BatchNorm, call={"mask": mask})
    assert np.isnan(y_flax[:, 1]).all()
    chex.assert_tree_all_finite((y, stats))
    chosen = np.asarray(mask)
    chex.assert_trees_all_close(y[:, chosen], y_flax[:, chosen], **LAYER)
    chex.assert_trees_all_equal(y[:, 1], jnp.zeros(10))  # no data: the bias
    assert (stats["mean"][1], stats["var"][1]) == (0, 1)
    chex.assert_trees_all_close(stats["mean"][mask], stats_flax["mean"][mask], **LAYER)


def test_complex_input():
    x = normal(0, (20, 3), jnp.complex64) + (1 - 2j)
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (apply(x, cls, dtype=jnp.complex64) for cls in (BatchNorm, nn.BatchNorm))
    chex.assert_trees_all_close(ours, theirs, **LAYER)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"param_dtype": jnp.complex64}, {"dtype": jnp.complex64}, {"use_scale": False}],
    ids=str,
)
@pytest.mark.parametrize("complex_x", [True, False])
def test_complex_layers_have_statistics_of_the_right_type_from_init_on(kwargs, complex_x):
    x = normal(0, (4, 20, 3), jnp.complex64 if complex_x else jnp.float32) + 1
    layer = BatchNorm(use_running_average=False, momentum=0.5, **kwargs)
    with jax.numpy_dtype_promotion("standard"):
        variables = layer.init(jax.random.key(0), x[0])
        is_complex = complex_x or bool({"dtype", "param_dtype"} & set(kwargs))
        expected = {"mean": jnp.complex64 if is_complex else jnp.float32, "var": jnp.float32}
        assert {k: v.dtype for k, v in variables["batch_stats"].items()} == expected

        @jax.jit
        def epoch(variables, x):
            def step(stats, x):
                given = variables | {"batch_stats": stats}
                y, new = layer.apply(given, x, mutable=["batch_stats"])
                return new["batch_stats"], y

            return jax.lax.scan(step, variables["batch_stats"], x)

        stats, y = epoch(variables, x)  # scan refuses a step that changes a type
        # As in Flax, y is complex for real x and complex parameters.
        flax = nn.BatchNorm(use_running_average=False, momentum=0.5, **kwargs)
        given = variables
        for x_, y_ in zip(x, y, strict=True):
            theirs, new = flax.apply(given, x_, mutable=["batch_stats"])
            given = variables | new
            chex.assert_trees_all_close(y_, theirs, **LAYER)
            assert y_.dtype == theirs.dtype
        new = jax.tree.map(lambda v, like: v.astype(like.dtype), new["batch_stats"], stats)
        chex.assert_trees_all_close(stats, new, **LAYER)


def test_complex_steps_compile_once():
    x = normal(0, (20, 3), jnp.complex64)
    layer = BatchNorm(use_running_average=False, use_scale=False, use_bias=False)

    @jax.jit
    @chex.assert_max_traces(1)
    def step(variables, x):
        _, new = layer.apply(variables, x, mutable=["batch_stats"])
        return variables | new

    with jax.numpy_dtype_promotion("standard"):
        variables = layer.init(jax.random.key(0), x)
        for _ in range(3):
            variables = step(variables, x)


def test_complex_parameters_and_real_x_keep_the_imaginary_part():
    x = normal(0, (20, 3))
    kwargs = {"param_dtype": jnp.complex64, "scale_init": nn.initializers.constant(1 + 2j)}
    with jax.numpy_dtype_promotion("standard"):
        for train in (True, False):
            kwargs["use_running_average"] = not train
            layers = BatchNorm(**kwargs), nn.BatchNorm(**kwargs)
            ours, theirs = (layer.init_with_output(jax.random.key(0), x)[0] for layer in layers)
            chex.assert_trees_all_close(ours, theirs, **LAYER)
            assert jnp.abs(ours.imag).max() > 1


@pytest.mark.parametrize("train", [True, False])
def test_y_cannot_be_real_where_x_or_parameters_are_complex(train):
    x, key = normal(0, (20, 3)), jax.random.key(0)
    for x_, kwargs in (x.astype(jnp.complex64), {}), (x, {"param_dtype": jnp.complex64}):
        layer = BatchNorm(use_running_average=not train, dtype=jnp.float32, **kwargs)
        with pytest.raises(TypeError, match=r"complex64.*imaginary part"):
            layer.init(key, x_)
    layer = BatchNorm(use_running_average=not train)
    with pytest.raises(TypeError, match=r"residual is complex64.*imaginary part"):
        layer.init(key, x, residual=x.astype(jnp.complex64))


# Single values, and dtypes that cannot hold the statistics of a batch.


def test_a_single_value_enters_as_in_flax():
    x, mask = normal(0, (6, 3)), jnp.arange(6)[:, None] == 2
    for given, call in (x, {"mask": mask}), (x[:1], {}):
        ours, theirs = (apply(given, cls, call=call)[1] for cls in (BatchNorm, nn.BatchNorm))
        chex.assert_trees_all_close(ours, theirs, **LAYER)
        assert (ours["var"] < 1).all()
    # With a rule of jbn only the mean enters, as in the core.
    _, stats = apply(x, update=jbn.ema(0.9), call={"mask": mask})
    chex.assert_trees_all_close(stats["mean"], 0.1 * x[2], **LAYER)
    chex.assert_trees_all_equal(stats["var"], jnp.ones(3))
    chex.assert_trees_all_equal(stats["count"], jnp.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_finite_batch_makes_statistics_infinite(dtype, microbatches):
    # A variance of 160000 overflows float16; one of 3.4e38 fits float32 but overflows bfloat16.
    scale = 400 if dtype == jnp.float16 else 1.8443e19
    sign = 1 - 2 * (jnp.arange(64) // 2 % 2).astype(jnp.float32)
    x = normal(0, (64, 3)).at[:, 1].set(scale * sign)
    kwargs = {"param_dtype": dtype, "force_float32_reductions": False}
    layer = BatchNorm(use_running_average=False, momentum=0.0, **kwargs)

    def loss_fn(params, stats, x):
        given = {"params": params, "batch_stats": stats}
        y, new = layer.apply(given, x, mutable=["batch_stats"])
        return (y.astype(jnp.float32) ** 2).mean(), new["batch_stats"], {}

    with jax.numpy_dtype_promotion("standard"):
        variables = layer.init(jax.random.key(0), x)
        step = jax.jit(make_train_step(loss_fn, optax.sgd(0.1), microbatches=microbatches))
        state = init(variables["params"], variables["batch_stats"], optax.sgd(0.1))
        state, metrics = step(state, x)
        assert not metrics["skipped"]
        stats = state.stats
        chex.assert_trees_all_equal_shapes_and_dtypes(stats, variables["batch_stats"])
        chex.assert_tree_all_finite(stats)
        assert (stats["mean"][1], stats["var"][1]) == (0, 1)
        assert (stats["mean"][0] != 0) & (stats["var"][0] != 1)
        stats = step(state, normal(1, (64, 3)))[0].stats  # and later batches enter
    assert abs(stats["var"][1] - 1) < 0.5
    assert stats["mean"][1] != 0


@pytest.mark.parametrize("use", ["no", b"yes", "traced"])
def test_use_running_average_is_true_or_false(use):
    layer, x = BatchNorm(use_running_average=None), normal(0, (4, 3))

    def run(use):
        return layer.init_with_output(jax.random.key(0), x, use)[0]

    with pytest.raises(TypeError, match=r"use_running_average must be True or False"):
        jax.jit(run)(True) if use == "traced" else run(use)
    run(np.bool_(True))


@pytest.mark.parametrize("x", [None, "abc", {}], ids=str)
def test_an_x_that_is_no_array_is_refused(x):
    layer, use = BatchNorm(use_running_average=None), True
    with pytest.raises(TypeError, match=rf"x must be an array; got {type(x).__name__}"):
        layer.init_with_output(jax.random.key(0), x, use)[0]


def test_a_list_is_an_array():
    layer, use = BatchNorm(use_running_average=None), False
    x = [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]
    y = layer.init_with_output(jax.random.key(0), x, use)[0]
    chex.assert_trees_all_close(y, jnp.array([[-1.0] * 3, [1.0] * 3]), rtol=1e-4)


# The differences from Flax, one test each; docs/semantics lists them.


def test_variance_is_exact_at_a_large_offset():
    x = normal(0, (64, 3)) + 1e4
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(0)) / np.sqrt(x64.var(0) + 1e-5)
    assert np.abs(apply(x)[0] - expected).max() < 1e-3
    assert np.abs(apply(x, nn.BatchNorm)[0] - expected).max() > 0.1


def test_nan_under_a_mask_harms_no_gradient():
    x, mask = normal(0, (6, 3)), jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None]
    dy = jnp.where(mask, normal(1, x.shape), 0)

    def gradient(x, cls):
        def loss(x):
            return jnp.where(mask, apply(x, cls, call={"mask": mask})[0] * dy, 0).sum()

        return jax.grad(loss)(x)

    dx = gradient(jnp.where(mask, x, jnp.nan), BatchNorm)
    chex.assert_trees_all_close(dx, gradient(x, nn.BatchNorm), **LAYER)
    chex.assert_trees_all_equal(jnp.where(mask, 0, dx), jnp.zeros_like(dx))


@pytest.mark.parametrize("bad", ["nan", "inf", "masked", "empty"])
def test_bad_batch_does_not_enter_the_statistics(bad):
    x, mask = normal(0, (6, 3)), jnp.ones((6, 1), bool)
    if bad in ("nan", "inf"):
        x = x.at[2, 1].set(float(bad))
    if bad == "masked":
        mask = jnp.zeros((6, 1), bool)
    if bad == "empty":
        x, mask = x[:0], mask[:0]
    y, stats = apply(x, call={"mask": mask})
    healthy = np.array([bad in ("nan", "inf")] * 3)
    healthy[1] = False
    np.testing.assert_array_equal(np.asarray(stats["mean"]) == 0, ~healthy)
    np.testing.assert_array_equal(np.asarray(stats["var"]) == 1, ~healthy)
    if bad in ("nan", "inf"):
        assert not np.isfinite(y[:, 1]).all()  # the loss shows it
        chex.assert_tree_all_finite(y[:, ::2])


def test_failed_step_leaves_no_trace_under_apply_if_finite():
    """Lets optax restore the parameters; the NaN never enters the statistics."""
    model = nn.Sequential([nn.Dense(3), BatchNorm(use_running_average=False)])
    optimizer = optax.apply_if_finite(optax.sgd(0.1), max_consecutive_errors=5)
    x = normal(0, (6, 4))
    variables = model.init(jax.random.key(1), x)
    params, stats = variables["params"], variables["batch_stats"]

    @jax.jit
    def step(params, stats, state, x):
        def loss(params):
            y, new = model.apply(
                {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            return (y**2).sum() + (y * normal(2, y.shape)).sum(), new["batch_stats"]

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    after = step(params, stats, optimizer.init(params), x.at[0, 0].set(jnp.nan))
    chex.assert_trees_all_equal(after[:2], (params, stats))
    params, stats, _ = step(*after, x)
    chex.assert_tree_all_finite((params, stats))
    assert not np.array_equal(stats["layers_1"]["mean"], after[1]["layers_1"]["mean"])


def test_statistics_carry_no_gradient():
    x = normal(0, (6, 3))
    grads = jax.grad(lambda x: apply(x)[1]["mean"].sum())(x)
    chex.assert_trees_all_equal(grads, jnp.zeros_like(x))


def test_statistics_keep_their_dtype(x64):
    x = normal(0, (6, 3), jnp.float64)
    layer = BatchNorm(use_running_average=False, dtype=jnp.float64)
    variables = layer.init(jax.random.key(0), x)

    def step(variables, x):
        _, new = layer.apply(variables, x, mutable=["batch_stats"])
        return variables | new, None

    jax.lax.scan(step, variables, x[None])  # raises if a type changes, as it does with Flax
    chex.assert_trees_all_equal_dtypes(step(variables, x)[0], variables)


@pytest.mark.parametrize(
    ("kwargs", "stats", "words"),
    [
        ({"axis": 2}, None, ["axis=2", "(6, 3)"]),
        ({"axis": -3}, None, ["axis=-3", "(6, 3)"]),
        ({"axis": (0, -2)}, None, ["(0, -2)", "more than once"]),
        ({"epsilon": -1e-5}, None, ["epsilon", "-1e-05"]),
        ({"epsilon": float("nan")}, None, ["epsilon", "nan"]),
        ({"momentum": 1.5}, None, ["1.5", "0 and 1"]),
        ({}, {"mean": jnp.zeros(1), "var": jnp.ones(1)}, ["(1,)", "(3,)", "(6, 3)"]),
    ],
)
def test_raises_where_flax_is_silently_wrong(kwargs, stats, words):
    x = normal(0, (6, 3))
    variables = BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    if stats:
        variables = variables | {"batch_stats": stats}
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the words are checked below)
        apply(x, variables=variables, **kwargs)
    for word in words:
        assert word in str(error.value)


MISUSES = {
    "flag missing": lambda cls, v, x: cls().apply(v, x),
    "flag twice": lambda cls, v, x: cls(use_running_average=True).apply(v, x, True),
    "stats immutable": lambda cls, v, x: cls(use_running_average=False).apply(v, x),
    "no stats": lambda cls, v, x: cls(use_running_average=True).apply({"params": v["params"]}, x),
    "no params": lambda cls, v, x: cls(use_running_average=True).apply(
        {"batch_stats": v["batch_stats"]}, x
    ),
    "dtype int": lambda cls, v, x: cls(use_running_average=True, dtype=jnp.int32).apply(v, x),
    "unbound axis": lambda cls, v, x: cls(use_running_average=False, axis_name="batch").apply(
        v, x, mutable=["batch_stats"]
    ),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_raises_what_flax_raises(misuse):
    x = normal(0, (6, 3))
    variables = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    with pytest.raises(Exception) as theirs:  # noqa: PT011  (whatever Flax raises)
        MISUSES[misuse](nn.BatchNorm, variables, x)
    with pytest.raises(theirs.type):
        MISUSES[misuse](BatchNorm, variables, x)


# Additions of jbn.


def test_update_rule_takes_the_place_of_momentum():
    x = normal(0, (6, 3)) + 2
    layer = BatchNorm(use_running_average=False, update=jbn.ema(0.9, debias=True, unbiased=True))
    variables = layer.init(jax.random.key(0), x)
    assert set(variables["batch_stats"]) == {"mean", "var", "count"}
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    stats = new["batch_stats"]
    chex.assert_trees_all_close(stats["mean"], x.mean(0), **LAYER)
    chex.assert_trees_all_close(stats["var"], x.var(0, ddof=1), **LAYER)
    chex.assert_trees_all_equal(stats["count"], jnp.ones(3))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, {"batch_stats": variables["batch_stats"]})


def test_statistics_stored_in_bfloat16_still_move():
    """Takes a decay of 0.999, which bfloat16 would round to 1."""
    x = normal(0, (64, 3)).astype(jnp.bfloat16) + 8
    kwargs = {"param_dtype": jnp.bfloat16, "force_float32_reductions": False}
    for rule in ({"momentum": 0.999}, {"update": jbn.cumulative()}):
        stats = apply(x, **kwargs, **rule)[1]
        assert stats["mean"].dtype == jnp.bfloat16
        rate = 0.001 if "momentum" in rule else 1
        np.testing.assert_allclose(np.float32(stats["mean"]), 8 * rate, rtol=0.05)


def test_weights_repeat_examples():
    x, repeats = normal(0, (4, 3)), jnp.array([1, 3, 0, 2])
    y, stats = apply(x, call={"weights": repeats.astype(jnp.float32)[:, None]})
    repeated, expected = apply(jnp.repeat(x, repeats, axis=0))
    chex.assert_trees_all_close(stats, expected, **LAYER)
    chex.assert_trees_all_close(jnp.repeat(y, repeats, axis=0), repeated, **LAYER)


# All transformations under which Flax's module works.

X = normal(0, (8, 4, 3)) + 1
VARIABLES = BatchNorm(use_running_average=False).init(jax.random.key(0), X)


def output(x, cls=BatchNorm, **kwargs):
    return apply(x, cls, VARIABLES, **kwargs)[0]


def both(f):
    """Compares f of our class with f of Flax's."""
    chex.assert_trees_all_close(f(BatchNorm), f(nn.BatchNorm), **NETWORK)


@pytest.mark.slow
def test_jit_grad_jvp_hessian():
    dx, dy = normal(1, X.shape), normal(2, X.shape)
    x = X[:, 0]
    both(lambda cls: jax.jit(lambda x: apply(x, cls))(X))
    both(lambda cls: jax.grad(lambda x: (output(x, cls) * dy).sum())(X))
    both(lambda cls: jax.jvp(lambda x: output(x, cls), (X,), (dx,)))
    both(lambda cls: jax.hessian(lambda x: (output(x, cls) * dy[:, 0]).sum())(x))


def test_vmap_scan_cond_and_remat():
    dy = normal(2, X.shape)
    both(lambda cls: jax.vmap(lambda x: apply(x, cls))(X))

    def scan(cls):
        layer = cls(use_running_average=False)

        def step(variables, x):
            y, new = layer.apply(variables, x, mutable=["batch_stats"])
            return variables | new, y

        return jax.lax.scan(step, VARIABLES, X)

    both(scan)
    both(lambda cls: jax.lax.cond(True, lambda x: output(x, cls), lambda x: x, X))
    both(lambda cls: jax.grad(jax.checkpoint(lambda x: (output(x, cls) * dy).sum()))(X))

    class Rematerialised(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            return nn.remat(self.norm)(use_running_average=False, name="bn")(x)

    def remat(cls):
        variables = jax.tree.map(lambda v: v, {k: {"bn": v} for k, v in VARIABLES.items()})
        layer = Rematerialised(cls)

        def loss(x):
            y, new = layer.apply(variables, x, mutable=["batch_stats"])
            return (y * dy).sum(), new

        return jax.grad(loss, has_aux=True)(X)

    both(remat)


def test_lifted_vmap_and_scan():
    class Stack(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            vmapped = nn.vmap(self.norm, variable_axes=axes, split_rngs={"params": True})
            x = vmapped(use_running_average=False)(x)
            layer = self.norm(use_running_average=False)
            layer(x[0])  # nn.scan needs its carry to exist
            scan = nn.scan(
                lambda layer, carry, x: (carry, layer(x)),
                variable_carry="batch_stats",
                variable_broadcast="params",
                split_rngs={"params": False},
            )
            return scan(layer, 0, x)[1]

    def run(cls):
        variables = Stack(cls).init(jax.random.key(0), X)
        return variables, Stack(cls).apply(variables, X, mutable=["batch_stats"])

    both(run)


def test_named_axes_of_vmap_and_pmap():
    for transform in (jax.vmap, jax.pmap):
        both(
            lambda cls, transform=transform: transform(
                lambda x: apply(x, cls, VARIABLES, axis_name="batch"), axis_name="batch"
            )(X)
        )
    y, stats = jax.pmap(
        lambda x: apply(x, variables=VARIABLES, axis_name="batch"), axis_name="batch"
    )(X)
    whole, expected = apply(X.reshape(-1, 3), variables=VARIABLES)
    chex.assert_trees_all_close(y.reshape(-1, 3), whole, **LAYER)
    chex.assert_trees_all_close(jax.tree.map(lambda s: s[0], stats), expected, **LAYER)


def test_axis_index_groups_under_pmap():
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]

    def run(cls):
        kwargs = {"axis_name": "batch", "axis_index_groups": groups}
        return jax.pmap(lambda x: apply(x, cls, VARIABLES, **kwargs), axis_name="batch")(X)

    both(run)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    dy = normal(2, X.shape)

    def run(cls):
        @jax.jit
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P("batch"), P("batch")),
            out_specs=(P("batch"), P(), P("batch")),
            check_vma=check_vma,
        )
        def sharded(x, dy):
            (_, (y, stats)), dx = jax.value_and_grad(
                lambda x: (
                    (r := apply(x, cls, VARIABLES, axis_name="batch"))[0].ravel() @ dy.ravel(),
                    r,
                ),
                has_aux=True,
            )(x)
            return y, stats, dx

        return sharded(X, dy)

    both(run)
    whole, expected = apply(X, variables=VARIABLES)
    chex.assert_trees_all_close(run(BatchNorm)[:2], (whole, expected), **LAYER)


def test_init_ignores_the_named_axis_and_leaves_the_statistics():
    variables = BatchNorm(use_running_average=False, axis_name="batch").init(jax.random.key(0), X)
    chex.assert_trees_all_equal(variables, VARIABLES)
    chex.assert_trees_all_equal(
        variables["batch_stats"], {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    )


@pytest.mark.parametrize("train", [True, False])
def test_export_with_symbolic_shapes(train):
    layer = BatchNorm(use_running_average=not train)

    def f(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    n, h = export.symbolic_shape("n, h")
    x = jax.ShapeDtypeStruct((n, h, 3), jnp.float32)
    exported = export.export(jax.jit(f))(VARIABLES, x)
    chex.assert_trees_all_close(exported.call(VARIABLES, X), f(VARIABLES, X), **LAYER)


def test_donated_buffers():
    layer = BatchNorm(use_running_average=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(variables, x):
        y, new = layer.apply(variables, x, mutable=["batch_stats"])
        return variables | new, y

    variables = jax.tree.map(jnp.copy, VARIABLES)
    for _ in range(3):
        variables, y = step(variables, X)
    chex.assert_trees_all_close(y, output(X), **LAYER)


def test_one_compilation_serves_all_steps():
    layer = BatchNorm(use_running_average=False, update=jbn.ema(0.9, debias=True))
    variables = layer.init(jax.random.key(0), X)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(variables, x):
        _, new = layer.apply(variables, x, mutable=["batch_stats"])
        return variables | new

    for _ in range(3):
        variables = step(variables, X)
    assert hash(layer) == hash(dataclasses.replace(layer, update=jbn.ema(0.9, debias=True)))


def test_x64(x64):
    x = normal(0, (8, 3), jnp.float64) + 1
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (apply(x, cls, dtype=jnp.float64)[0] for cls in (BatchNorm, nn.BatchNorm))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_flax_sees_one_method():
    """Checks that tools that record the methods of a module see the same as with Flax's."""
    layer = BatchNorm(use_running_average=False)

    @jax.jit
    def capture(variables, x):
        return layer.apply(
            variables, x, mutable=["batch_stats", "intermediates"], capture_intermediates=True
        )

    intermediates = capture(VARIABLES, X)[1]["intermediates"]
    assert set(intermediates) == {"__call__"}
    seen = []

    def note(call, args, kwargs, context):
        seen.append(context.method_name)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        layer.apply(VARIABLES, X, mutable=["batch_stats"])
    assert seen == ["__call__"]
    assert "batch_stats" in layer.tabulate(jax.random.key(0), X)  # and no warning, which would fail


def test_traced_momentum():
    def step(momentum, cls):
        return apply(X, cls, VARIABLES, momentum=momentum)[1]

    ours, theirs = (
        jax.vmap(lambda m, c=c: step(m, c))(jnp.array([0.5, 0.9]))
        for c in (BatchNorm, nn.BatchNorm)
    )
    chex.assert_trees_all_close(ours, theirs, **LAYER)


def test_complex_inference():
    x = normal(0, (20, 3), jnp.complex64) + (1 - 2j)
    layers = [cls(use_running_average=True) for cls in (BatchNorm, nn.BatchNorm)]
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (layer.apply(VARIABLES, x) for layer in layers)
    chex.assert_trees_all_close(ours, theirs, **LAYER)
