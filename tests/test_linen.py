"""jbn.linen.BatchNorm can take the place of flax.linen.BatchNorm.

The laws that hold for nnx, too, are in `test_flax_layers.py`.
"""

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

import jbn
from jbn.linen import BatchNorm
from jbn.training import init, make_train_step
from tests.skins import LAYER, LINEN, NETWORK, normal

pytestmark = pytest.mark.usefixtures("cheap_programs")


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
def test_dtypes_without_float32_reductions_are_those_of_flax(x_dtype, affine, train):
    """Compares what `init` makes: a step of Flax stores float32 even so."""
    x = (4 * normal(0, (5, 3))).astype(x_dtype)
    with jax.numpy_dtype_promotion("standard"):
        for dtype in (None, *DTYPES):
            for param_dtype in DTYPES:
                kwargs = {
                    "use_running_average": not train,
                    "dtype": dtype,
                    "param_dtype": param_dtype,
                    "use_scale": affine,
                    "use_bias": affine,
                    "force_float32_reductions": False,
                }
                ours, theirs = (
                    jax.eval_shape(cls(**kwargs).init_with_output, jax.random.key(0), x)
                    for cls in (BatchNorm, nn.BatchNorm)
                )
                chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)


@pytest.mark.parametrize("axis", [(1, -1), (3, 0)])
def test_several_feature_axes_are_those_of_flax(axis):
    x = 2 * normal(0, (5, 4, 3, 2)) + 1

    def run(cls):
        init, step = LINEN.layer(cls, axis=axis)
        y, new = step(init(x), x)
        return init(x), y, new, step(new, x, use_running_average=True)

    chex.assert_trees_all_equal_shapes_and_dtypes(run(BatchNorm), run(nn.BatchNorm))
    LINEN.both(run, **LAYER)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_mask_is_cast_to_bool_as_in_flax(dtype):
    mask = jnp.array([1, 0.5, 0, 1, 0, 1]).astype(dtype)[:, None]
    LINEN.both(lambda cls: LINEN.train(normal(0, (6, 3)), cls, {"mask": mask}), **LAYER)


def test_complex_input():
    x = normal(0, (20, 3), jnp.complex64) + (1 - 2j)
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (LINEN.train(x, cls, dtype=x.dtype) for cls in (BatchNorm, nn.BatchNorm))
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


def test_an_axis_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"\(0, -2\).*more than once"):
        LINEN.train(normal(0, (6, 3)), axis=(0, -2))


def test_statistics_of_another_shape_are_refused():
    x, stats = normal(0, (6, 3)), {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    init, step = LINEN.layer(BatchNorm)
    with pytest.raises(ValueError, match=r"(?s)(?=.*\(1,\))(?=.*\(3,\))(?=.*\(6, 3\))"):
        step(init(x) | {"batch_stats": stats}, x)


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


def test_statistics_stored_in_bfloat16_still_move():
    """Takes a decay of 0.999, which bfloat16 would round to 1."""
    x = normal(0, (64, 3)).astype(jnp.bfloat16) + 8
    kwargs = {"param_dtype": jnp.bfloat16, "force_float32_reductions": False}
    for rule in ({"momentum": 0.999}, {"update": jbn.cumulative()}):
        stats = LINEN.train(x, **kwargs, **rule)[1]
        assert stats["mean"].dtype == jnp.bfloat16
        rate = 0.001 if "momentum" in rule else 1
        np.testing.assert_allclose(np.float32(stats["mean"]), 8 * rate, rtol=0.05)


# Transformations of linen, and further tools, with which Flax's module works.

X = normal(0, (8, 4, 3)) + 1
VARIABLES = BatchNorm(use_running_average=False).init(jax.random.key(0), X)


def test_lifted_remat():
    dy = normal(2, X.shape)

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

    LINEN.both(remat)


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

    LINEN.both(run)


def test_init_ignores_the_named_axis_and_leaves_the_statistics():
    variables = BatchNorm(use_running_average=False, axis_name="batch").init(jax.random.key(0), X)
    chex.assert_trees_all_equal(variables, VARIABLES)
    chex.assert_trees_all_equal(
        variables["batch_stats"], {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    )


def test_float64_is_that_of_flax(x64):
    x = normal(0, (8, 3), jnp.float64) + 1
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (
            LINEN.train(x, cls, dtype=jnp.float64)[0] for cls in (BatchNorm, nn.BatchNorm)
        )
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_layers_of_equal_arguments_have_equal_hashes():
    layer = BatchNorm(use_running_average=False, update=jbn.ema(0.9, debias=True))
    assert hash(layer) == hash(dataclasses.replace(layer, update=jbn.ema(0.9, debias=True)))


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
    def run(cls):
        momenta = jnp.array([0.5, 0.9])
        return jax.vmap(lambda momentum: LINEN.train(X, cls, momentum=momentum)[1])(momenta)

    LINEN.both(run, **LAYER)


def test_shared_layer_updates_twice_as_in_flax():
    class Twice(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            layer = self.norm(use_running_average=False)
            return layer(layer(x))

    def twice(cls):
        variables = Twice(cls).init(jax.random.key(0), X)
        return Twice(cls).apply(variables, X, mutable=["batch_stats"])

    LINEN.both(twice)


def test_complex_inference():
    x = normal(0, (20, 3), jnp.complex64) + (1 - 2j)
    layers = [cls(use_running_average=True) for cls in (BatchNorm, nn.BatchNorm)]
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (layer.apply(VARIABLES, x) for layer in layers)
    chex.assert_trees_all_close(ours, theirs, **LAYER)
