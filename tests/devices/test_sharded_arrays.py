"""Sharded arrays give the results of one device, under `jit` and inside shard_map."""

import collections
import functools
import math
import re

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
from experiments.common import hlo
from tests import executions, oracle, tolerance

pytestmark = pytest.mark.usefixtures("cheap_programs")

X = jax.random.normal(jax.random.key(0), (8, 6, 4)) + 3
DY = jax.random.normal(jax.random.key(1), X.shape)
SUPPORT = {
    "plain": {},
    "mask": {"mask": jax.random.bernoulli(jax.random.key(2), 0.7, (8, 6, 1))},
    "features": {"mask": jax.random.bernoulli(jax.random.key(3), 0.7, X.shape)},
    "weights": {"weights": jax.random.uniform(jax.random.key(4), (8, 1, 1))},
}
# 48 values are summed in two orders, in a gradient of order 10.
CLOSE = {"rtol": 100 * tolerance.eps("float32"), "atol": 100 * tolerance.eps("float32")}


def mesh(axis_type):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def step(x, params, stats, support):
    """Returns y, new statistics and gradients."""

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


@pytest.mark.slow
@pytest.mark.parametrize("support", SUPPORT)
def test_tangents_may_lie_elsewhere_than_x_on_an_explicit_mesh(support):
    def tangent(x, dx):
        moments = functools.partial(jbn.moments, **SUPPORT[support])
        layer = functools.partial(jbn.normalize, **SUPPORT[support])
        return jax.jvp(lambda x: (layer(x), moments(x)), (x,), (dx,))[1]

    expected = jax.tree.map(np.asarray, jax.jit(tangent)(X, DY))
    with jax.set_mesh(mesh(AxisType.Explicit)):
        x = jax.device_put(X, P("data", None, "model"))
        sharded = jax.tree.map(np.asarray, jax.jit(tangent)(x, DY))
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


# --- Any axis of the batch over any axis of the mesh ---------------------------------------------

TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
IMAGES = np.random.default_rng(0).normal(3, 2, (8, 8, 4, 4)).astype(np.float32)
PLACES = (
    ((8,), P("a")),
    ((8,), P(None, "a")),
    ((2,), P(None, None, "a")),
    ((4, 2), P("a")),
    ((4, 2), P("b")),
    ((4, 2), P("a", "b")),
    ((2, 4), P("b", "a")),
    ((4, 2), P(("b", "a"))),
    ((4, 2), P(None, ("a", "b"))),
    ((4, 2), P(None, "a", None, "b")),
    ((2, 4), P("a", None, None, "b")),
    ((2, 2, 2), P("c", "a", "b")),
    ((2, 2, 2), P(("a", "c"), None, None, "b")),
)


# A group lies on several devices or on one, or several groups lie on one; also along other axes.
GROUPED = (
    ((8,), P("a"), 2),
    ((8,), P("a"), 4),
    ((4, 2), P("a"), 4),
    ((4, 2), P("a", "b"), 4),
    ((4, 2), P(("b", "a")), 2),
    ((4, 2), P(("b", "a")), 8),
    ((2, 4), P("a", None, None, "b"), 8),
    ((4, 2), P(None, ("a", "b")), 4),
    ((4, 2), P(("b", "a")), None),
    ((2, 2, 2), P("c", "a", "b"), None),
)
TRIPLE = (IMAGES, *np.random.default_rng(1).normal(size=(2, *IMAGES.shape)).astype(np.float32))


def gradient(x, dy, **options):
    """Returns y, the moments and the gradient in x."""
    y, pull, m = jax.vjp(lambda x: jbn.normalize(x, **options), x, has_aux=True)
    return y, m, pull(dy)[0]


def second(x, dy, v, groups=None):
    """Returns y, the gradient and the moments, and their derivatives in the direction v."""

    def outputs(x):
        y, m, dx = gradient(x, dy, groups=groups)
        return (y, dx, m.mean, m.var)

    return jax.jvp(outputs, (x,), (v,))


def placed(shape, axis_type, spec, *arrays):
    where = executions.mesh(shape, ("a", "b", "c")[: len(shape)], axis_type)
    return where, jax.device_put(arrays, NamedSharding(where, spec))


def assert_close(got, expected):
    chex.assert_trees_all_close(*(jax.tree.map(np.asarray, t) for t in (got, expected)), **CLOSE)


@functools.cache
def on_one_device(f, groups=None):
    return jax.jit(functools.partial(f, groups=groups))(*TRIPLE[: 2 if f is gradient else 3])


@TYPES
@pytest.mark.parametrize(("shape", "spec"), PLACES, ids=str)
def test_one_collective_each_way_wherever_the_batch_lies(shape, spec, axis_type):
    where, arrays = placed(shape, axis_type, spec, *TRIPLE[:2])
    out = None if axis_type == AxisType.Explicit else arrays[0].sharding
    with jax.set_mesh(where):
        shardings = None if out is None else (out, None, out)
        compiled = jax.jit(gradient, out_shardings=shardings).lower(*arrays).compile()
        assert_close(compiled(*arrays), on_one_device(gradient))
    names = [n if isinstance(n, tuple) else (n,) for n in (*spec, *(None,) * (4 - len(spec)))]
    sizes = [math.prod(where.shape[n] for n in some if n) for some in names]
    channels, parts = 4 // sizes[3], math.prod(sizes[:3])
    there = ("all-gather", 12 * channels, 12 * channels * parts)
    back = ("all-reduce", 8 * channels, 8 * channels)
    assert [c[:3] for c in hlo.collectives(compiled.as_text())] == [there, back]


@TYPES
@pytest.mark.parametrize(("shape", "spec", "groups"), GROUPED, ids=str)
def test_groups_and_second_derivatives_wherever_the_batch_lies(shape, spec, groups, axis_type):
    where, arrays = placed(shape, axis_type, spec, *TRIPLE)
    with jax.set_mesh(where):
        got = jax.jit(functools.partial(second, groups=groups))(*arrays)
        if axis_type == AxisType.Explicit:
            assert jax.typeof(got[1][1]) == jax.typeof(arrays[0])
    assert_close(got, on_one_device(second, groups))


@pytest.mark.slow
@TYPES
@pytest.mark.parametrize("spec", [P(), P("a", "b")], ids=str)
def test_weights_that_lie_elsewhere_than_x(spec, axis_type):
    weights = np.random.default_rng(2).uniform(size=(8, 8, 1, 1)).astype(np.float32)
    where, arrays = placed((2, 2, 2), axis_type, P("c", "a", None, "b"), *TRIPLE[:2])
    run = jax.jit(lambda x, dy, weights: gradient(x, dy, weights=weights))
    expected = run(*TRIPLE[:2], weights)
    with jax.set_mesh(where):
        assert_close(run(*arrays, jax.device_put(weights, NamedSharding(where, spec))), expected)


@pytest.mark.slow
@TYPES
def test_vmap_of_a_sharded_batch(axis_type):
    where, arrays = placed((4, 2), axis_type, P(None, "a", "b"), *TRIPLE[:2])
    masks = np.random.default_rng(3).uniform(size=(3, 8, 4, 1)) < 0.7

    def several(x, dy, masks):
        of_all = jax.vmap(lambda mask: jbn.moments(x, mask=mask[None]))(masks)
        each = jax.vmap(lambda x, dy: gradient(x, dy, mask=masks[0]))
        return each(x, dy), of_all

    expected = jax.jit(several)(*TRIPLE[:2], masks)
    with jax.set_mesh(where):
        got = jax.jit(several)(*arrays, masks)
    assert_close(got, expected)


def test_what_fills_up_an_uneven_share_is_not_of_the_batch():
    where, (x,) = placed((8,), AxisType.Auto, P("a"), IMAGES)

    @jax.jit
    def f(x):
        return jbn.moments(jax.lax.with_sharding_constraint(x[:5], NamedSharding(where, P("a"))))

    assert_close(f(x), jbn.moments(IMAGES[:5]))


@TYPES
@pytest.mark.parametrize("odd", ["value", "weight"])
def test_each_device_chooses_a_shift_of_its_own(axis_type, odd):
    x = np.random.default_rng(0).normal(size=(2**15, 2)).astype(np.float32)
    x[5] = 3e3  # the largest: with it as the shift the error is 1e-3
    weights = np.ones((2**15, 1), np.float32)
    weights[5] = 1 if odd == "value" else 1e-20
    expected = oracle.moments(x, axis=-1, weights=weights)
    where = executions.mesh((8,), ("a",), axis_type)
    with jax.set_mesh(where):
        x, weights = jax.device_put((x, weights), NamedSharding(where, P("a")))
        got = jax.jit(lambda x, w: jbn.moments(x, weights=w))(x, weights)
    np.testing.assert_allclose(got.var, expected.var, rtol=20 * tolerance.eps("float32"))


def operations(lowered):
    """Counts each kind of operation in the compiled program."""
    return collections.Counter(re.findall(r"= \S+ ([a-z][\w-]*)\(", lowered.compile().as_text()))


def test_a_batch_on_one_device_is_not_cut_into_blocks():
    assert jax.device_count() > 1
    apart = jax.jit(step).lower(X, jbn.init_params(4), jbn.init_stats(4), {})
    with jax.set_mesh(executions.mesh((1,), ("a",))):
        alone = jax.jit(step).lower(X, jbn.init_params(4), jbn.init_stats(4), {})
    assert operations(apart) == operations(alone)


def test_a_program_for_several_devices_can_be_kept():
    _, (x,) = placed((8,), AxisType.Auto, P("a"), IMAGES)
    exported = jax.export.export(jax.jit(lambda x: jbn.normalize(x)[0]))(x)
    # Such a call would need this process.
    assert "CustomSPMDPartitioning" not in exported.mlir_module()
    assert_close(exported.call(x), jbn.normalize(IMAGES)[0])


def test_a_partitioned_program_has_the_same_text_every_time():
    _, (x,) = placed((8,), AxisType.Auto, P("a"), IMAGES)
    texts = []
    for _ in range(2):
        jax.clear_caches()
        texts.append(jax.jit(lambda x: jbn.normalize(x)[0]).lower(x).as_text())
    assert "CustomSPMDPartitioning" in texts[0]
    assert texts[0] == texts[1]
