"""jbn.nnx.BatchNorm can take the place of flax.nnx.BatchNorm."""

import functools
import inspect
import pickle

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax import export
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
from jbn.nnx import BatchNorm

pytestmark = pytest.mark.usefixtures("cheap_programs")

EPS = float(jnp.finfo(jnp.float32).eps)
NETWORK = {"rtol": 2e3 * EPS, "atol": 2e3 * EPS}  # as in test_linen.py
LAYER = {"rtol": 32 * EPS, "atol": 32 * EPS}


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


class Block(nnx.Module):
    """A residual block with a projection."""

    def __init__(self, norm, features, filters, strides, rngs):
        def conv(n, size, strides=1):
            return nnx.Conv(n, filters, (size, size), strides, use_bias=False, rngs=rngs)

        self.conv1, self.norm1 = conv(features, 3, strides), norm(filters, rngs=rngs)
        self.conv2, self.norm2 = conv(filters, 3), norm(filters, rngs=rngs)
        self.project, self.norm3 = conv(features, 1, strides), norm(filters, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.norm3(self.project(x)))


class ResNet(nnx.Module):
    """A small ResNet whose normalisation is an argument."""

    def __init__(self, norm, rngs):
        norm = functools.partial(norm, momentum=0.9)
        self.stem = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(8, rngs=rngs)
        self.blocks = nnx.List([Block(norm, 8, 8, 1, rngs), Block(norm, 8, 16, 2, rngs)])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


IMAGES, LABELS = normal(0, (6, 8, 8, 3)) + 0.5, jnp.arange(6)


@functools.cache
def trained(norm, steps=3):
    """Returns the initial state, losses and gradients of a few SGD steps, and the final model."""
    model = ResNet(norm, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
    initial = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            losses = optax.softmax_cross_entropy_with_integer_labels(model(IMAGES), LABELS)
            return losses.mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value, nnx.to_pure_dict(grads)

    history = [step(model, optimizer) for _ in range(steps)]
    return initial, history, model


def state(model):
    return nnx.to_pure_dict(nnx.state(model))


def test_resnet_has_the_trees_of_flax():
    ours, theirs = trained(BatchNorm), trained(nnx.BatchNorm)
    chex.assert_trees_all_equal(ours[0], theirs[0])  # every name, shape, dtype and random draw

    def kinds(model):
        leaves = jax.tree.leaves(nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable))
        return [type(v) for v in leaves]

    assert kinds(ours[2]) == kinds(theirs[2])


def test_resnet_trains_as_with_flax():
    (_, ours, model), (_, theirs, expected) = trained(BatchNorm), trained(nnx.BatchNorm)
    chex.assert_trees_all_close(ours, theirs, **NETWORK)
    chex.assert_trees_all_close(state(model), state(expected), **NETWORK)


def test_checkpoint_written_with_flax_loads_and_infers(tmp_path):
    written = trained(nnx.BatchNorm)[2]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(written))
        checkpointer.wait_until_finished()
        model = nnx.eval_shape(lambda: ResNet(BatchNorm, nnx.Rngs(1)))
        graph, abstract = nnx.split(model)
        model = nnx.merge(graph, checkpointer.restore(tmp_path / "model", abstract))
    chex.assert_trees_all_equal(state(model), state(written))
    model.eval()
    expected = nnx.merge(*nnx.split(written))
    expected.eval()
    chex.assert_trees_all_close(model(IMAGES), expected(IMAGES), **NETWORK)


def test_arguments_are_those_of_flax_then_our_own():
    def parameters(function):
        return list(inspect.signature(function).parameters.values())

    ours, theirs = parameters(BatchNorm.__init__), parameters(nnx.BatchNorm.__init__)
    assert [(p.name, p.kind) for p in ours[:-3]] == [(p.name, p.kind) for p in theirs]
    added = [("update", None), ("groups", None), ("activation", None)]
    assert [(p.name, p.default) for p in ours[-3:]] == added
    for p, q in zip(ours, theirs, strict=False):
        if not p.name.endswith("_init"):  # initialisers are new functions every time
            assert p.default == q.default, p.name
    call = [p.name for p in parameters(nnx.BatchNorm.__call__)]
    assert [p.name for p in parameters(BatchNorm.__call__)] == [*call, "weights", "residual"]
    assert issubclass(BatchNorm, nnx.BatchNorm)
    assert BatchNorm.__name__ == "BatchNorm"


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_random_draws_are_those_of_flax(scale, bias):
    """Compares also the next key, which depends on how many keys the layer drew."""
    kwargs = {"scale_init": nnx.initializers.normal(), "bias_init": nnx.initializers.normal()}
    kwargs |= {"use_scale": scale, "use_bias": bias}
    draws = []
    for cls in (BatchNorm, nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        draws.append((state(cls(3, rngs=rngs, **kwargs)), jax.random.key_data(rngs.params())))
    chex.assert_trees_all_equal(*draws)


def test_metadata_is_kept():
    layer = BatchNorm(3, rngs=nnx.Rngs(0), scale_metadata={"tag": "s"}, bias_metadata={"tag": "b"})
    assert (layer.scale.tag, layer.bias.tag) == ("s", "b")


def run(x, cls=BatchNorm, call=None, **kwargs):
    """Returns (y, mean, var) of one training step."""
    layer = cls(kwargs.pop("num_features", 3), rngs=nnx.Rngs(0), **kwargs)
    y = layer(x, **(call or {}))
    return y, layer.mean[...], layer.var[...]


DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("x_dtype", [*DTYPES, jnp.int32])
def test_dtypes_are_those_of_flax(x_dtype, affine, train):
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
                }
                ours, theirs = (
                    jax.eval_shape(functools.partial(run, cls=cls, **kwargs), x)
                    for cls in (BatchNorm, nnx.BatchNorm)
                )
                chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"axis": 1, "num_features": 4},
        {"momentum": 0.5, "epsilon": 0.1},
        {"use_scale": False},
        {"use_bias": False},
        {"use_fast_variance": False},
        {"param_dtype": jnp.float16, "dtype": jnp.float32},
        {"promote_dtype": lambda arrays, **_: arrays},
        {"use_running_average": True},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "defaults",
)
def test_layer_computes_what_flax_computes(kwargs):
    x = 2 * normal(0, (5, 4, 3)) + 1
    with jax.numpy_dtype_promotion("standard"):
        results = [run(x, cls, **kwargs) for cls in (BatchNorm, nnx.BatchNorm)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*results)
    chex.assert_trees_all_close(*results, **LAYER)


@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (normal(0, (6, 3)), jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None]),
        (normal(0, (4, 6, 3)), jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None]),  # lower rank
        (jnp.arange(12).reshape(4, 3), None),  # integers
        (normal(0, (1, 3)), None),  # one value per channel
        (normal(0, (3,)), None),  # one example without a batch axis
    ],
)
def test_accepts_what_flax_accepts(x, mask):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        ours, theirs = (run(x, cls, {"mask": mask}) for cls in (BatchNorm, nnx.BatchNorm))
    chex.assert_trees_all_close(ours, theirs, **LAYER)


def test_mask_of_features_leaves_a_finite_channel():
    y, mean, var = run(normal(0, (10, 3)), call={"mask": jnp.array([True, False, True])})
    chex.assert_trees_all_equal(y[:, 1], jnp.zeros(10))
    assert (mean[1], var[1]) == (0, 1)


def test_complex_mean_keeps_its_imaginary_part():
    """Differs from Flax, which stores only the real part."""
    x = normal(0, (20, 3), jnp.complex64) + (1 - 2j)
    with jax.numpy_dtype_promotion("standard"):
        _, mean, var = run(x, momentum=0.0)
    chex.assert_trees_all_close(mean, x.mean(0), **LAYER)
    chex.assert_trees_all_close(var, x.var(0), **LAYER)


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_complex_layers_have_a_complex_mean_from_the_start(name):
    x = normal(0, (4, 20, 3), jnp.complex64) + (1 - 2j)
    layer = BatchNorm(3, **{name: jnp.complex64}, rngs=nnx.Rngs(0))
    before = jax.tree.map(lambda v: v.dtype, state(layer))
    assert (before["mean"], before["var"]) == (jnp.complex64, jnp.float32)
    graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def step(stats, x):
        layer = nnx.merge(graph, params, stats)
        y = layer(x)
        return nnx.state(layer, nnx.BatchStat), y

    with jax.numpy_dtype_promotion("standard"):
        stats, _ = jax.lax.scan(step, stats, x)  # scan refuses a step that changes a type
    weights = 0.01 * 0.99 ** np.arange(4)[::-1]
    expected = np.einsum("k,knc->c", weights, np.asarray(x, np.complex128)) / 20
    chex.assert_trees_all_close(stats["mean"][...], expected.astype(np.complex64), **LAYER)


def test_y_cannot_be_real_where_x_or_parameters_are_complex():
    x = normal(0, (20, 3))
    for x_, kwargs in (x.astype(jnp.complex64), {}), (x, {"param_dtype": jnp.complex64}):
        layer = BatchNorm(3, dtype=jnp.float32, **kwargs, rngs=nnx.Rngs(0))
        for inference in (False, True):
            with pytest.raises(TypeError, match=r"complex64.*imaginary part"):
                layer(x_, use_running_average=inference)


def test_a_single_value_enters_as_in_flax():
    x, mask = normal(0, (6, 3)), jnp.arange(6)[:, None] == 2
    for given, call in (x, {"mask": mask}), (x[:1], {}):
        layers = [cls(3, rngs=nnx.Rngs(0)) for cls in (BatchNorm, nnx.BatchNorm)]
        for layer in layers:
            layer(given, **call)
        chex.assert_trees_all_close(*map(state, layers), **LAYER)
        assert (layers[0].var[...] < 1).all()
    layer = BatchNorm(3, update=jbn.cumulative(), rngs=nnx.Rngs(0))  # as in the core
    layer(x, mask=mask)
    chex.assert_trees_all_close(layer.mean[...], x[2], **LAYER)
    chex.assert_trees_all_equal(layer.var[...], jnp.ones(3))
    chex.assert_trees_all_equal(layer.count[...], jnp.zeros(3))


def test_no_finite_batch_makes_converted_statistics_infinite():
    layer = BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    for variable in (layer.mean, layer.var):
        variable.set_value(variable[...].astype(jnp.float16))
    x = normal(0, (64, 3)) * jnp.array([[1.0, 400.0, 1.0]])
    with jax.numpy_dtype_promotion("standard"):
        layer(x)
    mean, var = layer.mean[...], layer.var[...]
    assert (mean.dtype, var.dtype) == (jnp.float16, jnp.float16)
    assert (mean[1], var[1]) == (0, 1)
    assert (var[0] != 1) & (mean[0] != 0)


@pytest.mark.parametrize("use", ["no", b"yes", "traced"])
def test_use_running_average_is_true_or_false(use):
    layer, x = BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0)), normal(0, (4, 3))

    def run(use):
        return layer(x, use)

    with pytest.raises(TypeError, match=r"use_running_average must be True or False"):
        jax.jit(run)(True) if use == "traced" else run(use)
    run(np.bool_(True))


@pytest.mark.parametrize("x", [None, "abc", {}], ids=str)
def test_an_x_that_is_no_array_is_refused(x):
    layer, use = BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0)), True
    with pytest.raises(TypeError, match=rf"x must be an array; got {type(x).__name__}"):
        layer(x, use)


def test_a_list_is_an_array():
    layer, use = BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0)), False
    x = [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]
    y = layer(x, use)
    chex.assert_trees_all_close(y, jnp.array([[-1.0] * 3, [1.0] * 3]), rtol=1e-4)


def test_train_eval_and_call_switch_as_in_flax():
    x = normal(0, (6, 3)) + 1
    for cls in (BatchNorm, nnx.BatchNorm):
        layer = cls(3, rngs=nnx.Rngs(0))
        trained_y = layer(x)
        mean = layer.mean[...]
        layer.eval()
        evaluated = layer(x)
        chex.assert_trees_all_equal(layer.mean[...], mean)
        assert not np.allclose(trained_y, evaluated)
        layer(x, use_running_average=False)  # the argument of the call overrides the attribute
        assert not np.allclose(layer.mean[...], mean)
        layer.train()
        chex.assert_trees_all_close(layer(x), trained_y, **LAYER)
        view = nnx.view(layer, use_running_average=True)
        assert view.use_running_average is True
        assert view.mean is layer.mean


# The differences from Flax.


def test_variance_is_exact_at_a_large_offset():
    x = normal(0, (64, 3)) + 1e4
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(0)) / np.sqrt(x64.var(0) + 1e-5)
    assert np.abs(run(x)[0] - expected).max() < 1e-3
    assert np.abs(run(x, nnx.BatchNorm)[0] - expected).max() > 0.1


def test_evaluation_in_half_precision_keeps_the_statistics_in_float32():
    x = normal(0, (256, 3)) + 100.3
    layers = [
        cls(3, dtype=jnp.bfloat16, momentum=0.0, rngs=nnx.Rngs(0))
        for cls in (BatchNorm, nnx.BatchNorm)
    ]
    with jax.numpy_dtype_promotion("standard"):
        for layer in layers:
            layer(x)
            layer.eval()
        ours, theirs = (np.asarray(layer(x), np.float32) for layer in layers)
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float64)
    expected = (rounded - rounded.mean(0)) / np.sqrt(rounded.var(0) + 1e-5)
    half_ulp = float(jnp.finfo(jnp.bfloat16).eps) / 2
    np.testing.assert_allclose(ours, expected, rtol=1.1 * half_ulp, atol=1e-3)
    assert np.abs(theirs - expected).max() > 0.1


@pytest.mark.parametrize("bad", ["nan", "inf", "masked", "empty"])
def test_bad_batch_does_not_enter_the_statistics(bad):
    x, mask = normal(0, (6, 3)), jnp.ones((6, 1), bool)
    if bad in ("nan", "inf"):
        x = x.at[2, 1].set(float(bad))
    if bad == "masked":
        mask = jnp.zeros((6, 1), bool)
    if bad == "empty":
        x, mask = x[:0], mask[:0]
    y, mean, var = run(x, call={"mask": mask})
    healthy = np.array([bad in ("nan", "inf")] * 3)
    healthy[1] = False
    np.testing.assert_array_equal(np.asarray(mean) == 0, ~healthy)
    np.testing.assert_array_equal(np.asarray(var) == 1, ~healthy)
    if bad in ("nan", "inf"):
        assert not np.isfinite(y[:, 1]).all()


def test_nan_under_a_mask_harms_no_gradient():
    x, mask = normal(0, (6, 3)), jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None]
    dy = normal(1, x.shape)

    def gradient(x):
        return jax.grad(lambda x: jnp.where(mask, run(x, call={"mask": mask})[0] * dy, 0).sum())(x)

    dx = gradient(jnp.where(mask, x, jnp.nan))
    chex.assert_trees_all_equal(dx, gradient(jnp.where(mask, x, 0)))
    chex.assert_trees_all_equal(jnp.where(mask, 0, dx), jnp.zeros_like(dx))
    assert np.abs(dx).max() > 0.1


@pytest.mark.parametrize(
    ("x", "kwargs", "words"),
    [
        (normal(0, (6, 3)), {"axis": 2}, ["axis=2", "(6, 3)"]),
        (normal(0, (6, 3)), {"axis": -3}, ["axis=-3", "(6, 3)"]),
        (normal(0, (6, 3)), {"epsilon": -1.0}, ["epsilon", "-1.0"]),
        (normal(0, (6, 3)), {"num_features": 1}, ["(1,)", "(3,)", "(6, 3)"]),
        (normal(0, (6, 3)), {"num_features": 4}, ["(4,)", "(3,)", "(6, 3)"]),
    ],
)
def test_raises_where_flax_is_silently_wrong_or_unclear(x, kwargs, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the words are checked below)
        run(x, **kwargs)
    for word in words:
        assert word in str(error.value)


MISUSES = {
    "flag missing": lambda cls, x: cls(3, use_running_average=None, rngs=nnx.Rngs(0))(x),
    "rngs missing": lambda cls, x: cls(3)(x),
    "integer mask": lambda cls, x: run(x, cls, {"mask": jnp.ones((6, 1), jnp.int32)}),
    "tuple axis": lambda cls, x: run(x, cls, axis=(0, 1)),
    "dtype int": lambda cls, x: run(x, cls, dtype=jnp.int32),
    "unbound axis": lambda cls, x: run(x, cls, axis_name="batch"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_raises_what_flax_raises(misuse):
    x = normal(0, (6, 3))
    with pytest.raises(Exception) as theirs:  # noqa: PT011  (whatever Flax raises)
        MISUSES[misuse](nnx.BatchNorm, x)
    with pytest.raises(theirs.type):
        MISUSES[misuse](BatchNorm, x)


# Additions of jbn.


def test_update_rule_takes_the_place_of_momentum():
    x = normal(0, (6, 3)) + 2
    layer = BatchNorm(3, update=jbn.ema(0.9, debias=True, unbiased=True), rngs=nnx.Rngs(0))
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))) == {"mean", "var", "count"}
    for step in (1, 2):
        nnx.jit(lambda layer, x: layer(x))(layer, x)
        chex.assert_trees_all_close(layer.mean[...], x.mean(0), **LAYER)
        chex.assert_trees_all_close(layer.var[...], x.var(0, ddof=1), **LAYER)
        chex.assert_trees_all_equal(layer.count[...], jnp.full(3, float(step)))


def test_weights_repeat_examples():
    x, repeats = normal(0, (4, 3)), jnp.array([1, 3, 0, 2])
    y, *stats = run(x, call={"weights": repeats.astype(jnp.float32)[:, None]})
    repeated, *expected = run(jnp.repeat(x, repeats, axis=0))
    chex.assert_trees_all_close(stats, expected, **LAYER)
    chex.assert_trees_all_close(jnp.repeat(y, repeats, axis=0), repeated, **LAYER)


def test_linen_and_nnx_agree():
    x = normal(0, (6, 3)) + 1
    layer = jbn.linen.BatchNorm(use_running_average=False)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    expected = (y, new["batch_stats"]["mean"], new["batch_stats"]["var"])
    chex.assert_trees_all_equal(run(x), expected)


# All transformations under which Flax's module works.

X = normal(0, (8, 4, 3)) + 1


def both(f):
    """Compares f of our class with f of Flax's."""
    chex.assert_trees_all_close(f(BatchNorm), f(nnx.BatchNorm), **NETWORK)


def test_jit_grad_jvp_hessian():
    dx, dy, x = normal(1, X.shape), normal(2, X.shape), X[:, 0]
    both(lambda cls: jax.jit(lambda x: run(x, cls))(X))
    both(lambda cls: jax.grad(lambda x: (run(x, cls)[0] * dy).sum())(X))
    both(lambda cls: jax.jvp(lambda x: run(x, cls)[0], (X,), (dx,)))
    both(lambda cls: jax.hessian(lambda x: (run(x, cls)[0] * dy[:, 0]).sum())(x))

    def gradient_of_layer(cls):
        layer = cls(3, rngs=nnx.Rngs(0))
        grads = nnx.jit(nnx.grad(lambda layer: (layer(X) * dy).sum()))(layer)
        return state(layer), nnx.to_pure_dict(grads)

    both(gradient_of_layer)


def test_nnx_vmap_scan_remat_and_cond():
    dy = normal(2, X.shape)

    def vmap(cls):
        layers = nnx.vmap(lambda rngs: cls(3, rngs=rngs))(nnx.Rngs(0).split(8))
        return nnx.vmap(lambda layer, x: layer(x))(layers, X), state(layers)

    def scan(cls):
        layer = cls(3, rngs=nnx.Rngs(0))
        axes = nnx.StateAxes({...: nnx.Carry})
        y = nnx.scan(lambda layer, x: layer(x), in_axes=(axes, 0), out_axes=0)(layer, X)
        return y, state(layer)

    def remat(cls):
        layer = cls(3, rngs=nnx.Rngs(0))

        def loss(layer, x):
            return (nnx.remat(lambda layer, x: layer(x))(layer, x) * dy).sum()

        return nnx.grad(loss, argnums=1)(layer, X), state(layer)

    def cond(cls):
        layer = cls(3, rngs=nnx.Rngs(0))
        y = nnx.cond(True, lambda layer, x: layer(x), lambda layer, x: x, layer, X)
        return y, state(layer)

    for f in (vmap, scan, remat, cond):
        both(f)


def test_named_axes_of_vmap_and_pmap():
    def named(cls, transform, **kwargs):
        return transform(lambda x: run(x, cls, axis_name="batch", **kwargs), axis_name="batch")(X)

    both(lambda cls: named(cls, jax.vmap))
    both(lambda cls: named(cls, jax.pmap))
    both(lambda cls: named(cls, jax.pmap, axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]))
    y, *stats = named(BatchNorm, jax.pmap)
    whole, *expected = run(X.reshape(-1, 3))
    chex.assert_trees_all_close(y.reshape(-1, 3), whole, **LAYER)
    chex.assert_trees_all_close([s[0] for s in stats], expected, **LAYER)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    dy = normal(2, X.shape)

    def sharded(cls):
        @jax.jit
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P("batch"), P("batch")),
            out_specs=((P("batch"), P(), P()), P("batch")),
            check_vma=check_vma,
        )
        def step(x, dy):
            def loss(x):
                outputs = run(x, cls, axis_name="batch")
                return outputs[0].ravel() @ dy.ravel(), outputs

            dx, outputs = jax.grad(loss, has_aux=True)(x)
            return outputs, dx

        return step(X, dy)

    both(sharded)
    chex.assert_trees_all_close(sharded(BatchNorm)[0], run(X), **LAYER)


def test_eval_shape_and_split_merge():
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: BatchNorm(3, rngs=nnx.Rngs(0)))
    chex.assert_trees_all_equal_shapes_and_dtypes(state(abstract), state(layer))
    again = nnx.merge(*nnx.split(layer))
    chex.assert_trees_all_equal(again(X), layer(X))
    assert nnx.graphdef(layer) == nnx.graphdef(BatchNorm(3, rngs=nnx.Rngs(1)))
    ruled = [BatchNorm(3, update=jbn.ema(0.9), rngs=nnx.Rngs(0)) for _ in range(2)]
    assert nnx.graphdef(ruled[0]) == nnx.graphdef(ruled[1])  # rules are equal by value
    assert pickle.loads(pickle.dumps(jbn.ema(0.9))) == jbn.ema(0.9)


def test_one_compilation_serves_all_steps():
    layer = BatchNorm(3, update=jbn.cumulative(), rngs=nnx.Rngs(0))

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(layer, x):
        return layer(x)

    for _ in range(3):
        step(layer, X)
    assert layer.count[...][0] == 3


def test_donated_buffers():
    graph, variables = nnx.split(BatchNorm(3, rngs=nnx.Rngs(0)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(variables, x):
        layer = nnx.merge(graph, variables)
        y = layer(x)
        return nnx.state(layer), y

    for _ in range(3):
        variables, y = step(variables, X)
    chex.assert_trees_all_close(y, run(X)[0], **LAYER)


@pytest.mark.parametrize("train", [True, False])
def test_export_with_symbolic_shapes(train):
    def f(x):
        return run(x, use_running_average=not train)

    n, h = export.symbolic_shape("n, h")
    exported = export.export(jax.jit(f))(jax.ShapeDtypeStruct((n, h, 3), jnp.float32))
    chex.assert_trees_all_close(exported.call(X), f(X), **LAYER)


def test_statistics_keep_their_dtype(x64):
    x = normal(0, (6, 3), jnp.float64)
    layer = BatchNorm(3, dtype=jnp.float64, rngs=nnx.Rngs(0))
    y = layer(x)
    assert (y.dtype, layer.mean.dtype, layer.var.dtype) == (jnp.float64, jnp.float32, jnp.float32)
    y64 = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
    chex.assert_trees_all_close(y, y64, rtol=1e-12, atol=1e-12)


def test_statistics_carry_no_gradient():
    chex.assert_trees_all_equal(jax.grad(lambda x: run(x)[1].sum())(X), jnp.zeros_like(X))


def test_shared_layer_updates_twice_as_in_flax():
    def twice(cls):
        layer = cls(3, rngs=nnx.Rngs(0))
        return layer(layer(X)), state(layer)

    both(twice)

    class Twice(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            layer = self.norm(use_running_average=False)
            return layer(layer(x))

    def twice_linen(cls):
        variables = Twice(cls).init(jax.random.key(0), X)
        return Twice(cls).apply(variables, X, mutable=["batch_stats"])

    ours, theirs = twice_linen(jbn.linen.BatchNorm), twice_linen(nn.BatchNorm)
    chex.assert_trees_all_close(ours, theirs, **NETWORK)
