"""jbn.nnx.BatchNorm can take the place of flax.nnx.BatchNorm.

The laws that hold for linen, too, are in `test_flax_layers.py`.
"""

import functools
import inspect
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jbn
from jbn.nnx import BatchNorm
from tests.skins import LAYER, NETWORK, NNX, normal

pytestmark = pytest.mark.usefixtures("cheap_programs")


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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "kwargs",
    [{"promote_dtype": lambda arrays, **_: arrays}, {"use_running_average": True}],
    ids=list,
)
def test_own_arguments_mean_what_they_mean_in_flax(kwargs):
    x, results = 2 * normal(0, (5, 4, 3)) + 1, []
    for cls in (BatchNorm, nnx.BatchNorm):
        layer = cls(3, rngs=nnx.Rngs(0), **kwargs)
        results.append((layer(x), state(layer)))
    chex.assert_trees_all_equal_shapes_and_dtypes(*results)
    chex.assert_trees_all_close(*results, **LAYER)


def test_complex_mean_keeps_its_imaginary_part():
    """Differs from Flax, which stores only the real part."""
    x = normal(0, (20, 3), jnp.complex64) + (1 - 2j)
    with jax.numpy_dtype_promotion("standard"):
        _, stats = NNX.train(x, momentum=0.0)
    chex.assert_trees_all_close(stats, {"mean": x.mean(0), "var": x.var(0)}, **LAYER)


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


@pytest.mark.parametrize("features", [1, 4])
def test_another_number_of_features_is_refused(features):
    layer, words = BatchNorm(features, rngs=nnx.Rngs(0)), rf"(?=.*\({features},\))(?=.*\(3,\))"
    with pytest.raises(ValueError, match=rf"(?s){words}(?=.*\(6, 3\))"):
        layer(normal(0, (6, 3)))


MISUSES = {
    "flag missing": lambda cls, x: cls(3, use_running_average=None, rngs=nnx.Rngs(0))(x),
    "rngs missing": lambda cls, x: cls(3)(x),
    "integer mask": lambda cls, x: NNX.train(x, cls, {"mask": jnp.ones((6, 1), jnp.int32)}),
    "tuple axis": lambda cls, x: NNX.train(x, cls, axis=(0, 1)),
    "dtype int": lambda cls, x: NNX.train(x, cls, dtype=jnp.int32),
    "unbound axis": lambda cls, x: NNX.train(x, cls, axis_name="batch"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_raises_what_flax_raises(misuse):
    x = normal(0, (6, 3))
    with pytest.raises(Exception) as theirs:  # noqa: PT011  (whatever Flax raises)
        MISUSES[misuse](nnx.BatchNorm, x)
    with pytest.raises(theirs.type):
        MISUSES[misuse](BatchNorm, x)


# Transformations of nnx, under which Flax's module works.

X = normal(0, (8, 4, 3)) + 1


def test_nnx_vmap_scan_remat_cond_jit_and_grad():
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

    def gradient_of_layer(cls):
        layer = cls(3, rngs=nnx.Rngs(0))
        grads = nnx.jit(nnx.grad(lambda layer: (layer(X) * dy).sum()))(layer)
        return state(layer), nnx.to_pure_dict(grads)

    for f in (vmap, scan, remat, cond, gradient_of_layer):
        NNX.both(f)


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


def test_shared_layer_updates_twice_as_in_flax():
    def twice(cls):
        layer = cls(3, rngs=nnx.Rngs(0))
        return layer(layer(X)), state(layer)

    NNX.both(twice)


def test_one_compilation_of_nnx_serves_all_steps():
    layer = BatchNorm(3, update=jbn.cumulative(), rngs=nnx.Rngs(0))

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(layer, x):
        return layer(x)

    for _ in range(3):
        step(layer, X)
    assert layer.count[...][0] == 3
