"""Arrays sharded over a mesh: under `jit` with either type of axis, and inside shard_map."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
from tests import tolerance

X = jax.random.normal(jax.random.key(0), (8, 6, 4)) + 3
DY = jax.random.normal(jax.random.key(1), X.shape)
SUPPORT = {
    "plain": {},
    "mask": {"mask": jax.random.bernoulli(jax.random.key(2), 0.7, (8, 6, 1))},
    "features": {"mask": jax.random.bernoulli(jax.random.key(3), 0.7, X.shape)},
    "weights": {"weights": jax.random.uniform(jax.random.key(4), (8, 1, 1))},
}
# Two orders of summation of 48 values, through a gradient of order 10.
CLOSE = {"rtol": 100 * tolerance.eps("float32"), "atol": 100 * tolerance.eps("float32")}


def mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def step(x, params, stats, support):
    """y, new statistics and gradients."""

    def loss(x, params):
        y, new = jbn.batch_norm(x, params, stats, **support)
        return (y * DY).sum(), (y, new)

    (_, outputs), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, params)
    return outputs, grads


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "spec", [P("data"), P(None, "model"), P(None, None, "model"), P("data", None, "model")], ids=str
)
@pytest.mark.parametrize("support", SUPPORT)
def test_sharding_changes_nothing(support, spec, axis_type):
    args = jbn.init_params(4), jbn.init_stats(4), SUPPORT[support]
    expected = jax.tree.map(np.asarray, jax.jit(step)(X, *args))
    with jax.set_mesh(mesh(axis_type)) as m:
        x = jax.device_put(X, NamedSharding(m or mesh(axis_type), spec))
        sharded = jax.tree.map(np.asarray, jax.jit(step)(x, *args))
    chex.assert_trees_all_close(sharded, expected, **CLOSE)


def test_params_sharded_otherwise_than_x():
    params, stats = jbn.init_params(4), jbn.init_stats(4)
    expected = jax.tree.map(np.asarray, jax.jit(step)(X, params, stats, {}))
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x, params = jax.device_put(X, P("data")), jax.device_put(params, P("model"))
        sharded = jax.tree.map(np.asarray, jax.jit(step)(x, params, stats, {}))
    chex.assert_trees_all_close(sharded, expected, **CLOSE)


def test_linen_layer_on_an_explicit_mesh():
    layers = [cls(use_running_average=False) for cls in (jbn.linen.BatchNorm, nn.BatchNorm)]
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x = jax.device_put(X, P("data", None, "model"))
        results = []
        for layer in layers:
            variables = jax.jit(layer.init)(jax.random.key(0), x)
            apply = jax.jit(functools.partial(layer.apply, mutable=["batch_stats"]))
            results.append(apply(variables, x))
        assert jax.typeof(results[0][0]) == jax.typeof(results[1][0])
    chex.assert_trees_all_close(*(jax.tree.map(np.asarray, r) for r in results), **CLOSE)


@pytest.mark.parametrize("check_vma", [True, False])
def test_mask_split_over_fewer_axes_than_x(check_vma):
    mask = jnp.arange(8)[:, None, None] % 3 != 0  # one for each example, the same for all locations

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh(AxisType.Auto),
        in_specs=(P("data", "model"), P("data")),
        out_specs=(P("data", "model"), P()),
        check_vma=check_vma,
    )
    def sharded(x, mask):
        return jbn.normalize(x, mask=mask, axis_name=("data", "model"))

    chex.assert_trees_all_close(sharded(X, mask), jbn.normalize(X, mask=mask), **CLOSE)


def test_axis_names_in_a_list():
    def gradient(x, names):
        return jax.grad(lambda x: (jbn.normalize(x, axis_name=names)[0] ** 3).sum())(x)

    both = [jax.vmap(lambda x, n=n: gradient(x, n), axis_name="i")(X) for n in (["i"], ("i",))]
    chex.assert_trees_all_equal(*both)
