"""The ResNets as users know them, what is read out of a program, and the table of targets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jbn.linen
from experiments import models

# --- ResNet-18 and ResNet-50 ---------------------------------------------------------------------


def shapes(make, **slots):
    net = make(**slots)
    x = jnp.zeros((2, 224, 224, 3))
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), x, True))
    logits = jax.eval_shape(lambda v: net.apply(v, x, False), variables)
    return variables, logits


@pytest.mark.parametrize(
    ("make", "parameters", "features"),
    [(models.ResNet18, 11_689_512, 4_800), (models.ResNet50, 25_557_032, 26_560)],
)
def test_as_many_parameters_as_everyone_counts(make, parameters, features):
    variables, logits = shapes(make)
    count = sum(v.size for v in jax.tree.leaves(variables["params"]))
    assert count == parameters
    assert sum(v.size for v in jax.tree.leaves(variables["batch_stats"])) == 2 * features
    assert logits.shape == (2, 1000)


def test_half_precision_is_for_the_layers_only():
    variables, logits = shapes(models.ResNet50, dtype=jnp.bfloat16)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32


def test_the_stride_is_in_the_3x3():
    block = models.BottleneckBlock(4, stride=2)
    x = jnp.zeros((2, 8, 8, 3))
    outputs = []

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Conv):
            outputs.append((context.module.kernel_size, y.shape))
        return y

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: block.init(jax.random.key(0), x))
    assert outputs == [
        ((1, 1), (2, 8, 8, 4)),
        ((3, 3), (2, 4, 4, 4)),
        ((1, 1), (2, 4, 4, 16)),
        ((1, 1), (2, 4, 4, 16)),
    ]


@pytest.mark.parametrize("block", [models.ResidualBlock, models.BottleneckBlock])
def test_fused_is_the_same_network(block):
    """Same variables, same output, same gradient; with a projection and without."""
    net = functools.partial(models.ResNet, (4, 4), (1, 2), pool=True, block=block)
    x, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 8, 8, 3), (8, 10)]))
    variables = jax.jit(functools.partial(net().init, train=True))(jax.random.key(2), x)
    # A zero scale would hide the inner half of every block.
    variables = jax.tree.map(lambda v: jnp.where(v == 0, 0.5, v), variables)

    @functools.partial(jax.jit, static_argnums=0)
    def run(slots, variables):
        def output(params):
            given = {**variables, "params": params}
            model = net(norm=slots[0], fused=slots[1])
            return model.apply(given, x, True, mutable=["batch_stats"])

        y, pull, stats = jax.vjp(output, variables["params"], has_aux=True)
        return y, stats, pull(dy)

    plain = run((jbn.linen.BatchNorm, False), variables)
    fused = run((jbn.linen.BatchNorm, True), variables)
    # Rounding, through a dozen layers each of which divides by a standard deviation of a few values.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), plain, fused)
