"""BatchRenorm of linen and nnx computes what the core does; that of crossq what sbx computes."""

import functools
import pickle

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization

import jbn.linen
import jbn.linen.crossq
import jbn.nnx
from jbn import renorm, training
from jbn._core.running import ema_of_flax
from tests import executions, oracle, skins, tolerance
from tests.skins import LAYER, normal

pytestmark = pytest.mark.usefixtures("cheap_programs")

LINEN = skins.LINEN._replace(jbn=jbn.linen.BatchRenorm)
NNX = skins.NNX._replace(jbn=jbn.nnx.BatchRenorm)
SKINS = pytest.mark.parametrize("skin", [LINEN, NNX], ids=["linen", "nnx"])
LIMITS = {"r_max": 1.3, "d_max": 0.4}
X = 2 * normal(0, (6, 4, 3)) + 1


def core(x, stats, **options):
    """Computes a step of a fresh layer in the core, by Flax's rule."""
    stats = renorm.RenormStats(stats["mean"], stats["var"], jnp.zeros(3), stats["steps"])
    return renorm.batch_renorm(x, jbn.init_params(3), stats, update=ema_of_flax(0.9), **options)


def named(stats, *more):
    return {f: getattr(stats, f) for f in ("mean", "var", "steps", *more)}


@SKINS
@pytest.mark.parametrize(
    "options",
    [
        LIMITS,
        {"r_max": renorm.piecewise_linear((0, 2), (1, 2)), "d_max": 0.1},
        {**LIMITS, "warmup_steps": 1},
        {**LIMITS, "epsilon": 0.1, "groups": 2, "activation": jnp.tanh},
        {},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_layer_computes_what_the_core_computes(skin, options):
    init, step = skin.layer(skin.jbn, momentum=0.9, **options)
    variables = init(X)
    stats = variables["batch_stats"]
    for i in range(3):
        y, variables = step(variables, X + i)
        want, new = core(X + i, stats, **options)
        chex.assert_trees_all_close(y, want, **LAYER)
        chex.assert_trees_all_close(variables["batch_stats"], named(new), **LAYER)
        stats = variables["batch_stats"]
    assert (stats["steps"], stats["steps"].dtype) == (3, jnp.int32)
    y, same = step(variables, X, use_running_average=True)
    chex.assert_trees_all_equal(same, variables)
    want = oracle.affine(X, stats["mean"], stats["var"], epsilon=options.get("epsilon", 1e-5))
    want = want if "activation" not in options else np.tanh(want)
    tolerance.assert_close(y, want, "float32", 1)


@pytest.mark.slow
@SKINS
def test_mask_weights_and_residual_are_those_of_the_core(skin):
    mask, weights = X[..., :1] < 1.5, jnp.abs(X[..., :1])
    arrays = {"mask": mask, "weights": weights, "residual": X}
    y, stats = skin.train(X, call=arrays, momentum=0.9, **LIMITS)
    init, _ = skin.layer(skin.jbn)
    want, new = core(X, init(X)["batch_stats"], **LIMITS, **arrays)
    chex.assert_trees_all_close((y, stats), (want, named(new)), **LAYER)


@pytest.mark.slow
@SKINS
def test_a_rule_adds_a_count(skin):
    rule = renorm.ema_of_std(0.9, epsilon=1e-5)
    y, stats = skin.train(X, update=rule, **LIMITS)
    want, new = renorm.batch_renorm(
        X, jbn.init_params(3), renorm.init_stats(3), update=rule, **LIMITS
    )
    chex.assert_trees_all_close((y, stats), (want, named(new, "count")), **LAYER)


@pytest.mark.slow
@SKINS
def test_without_correction_it_is_the_layer_of_batch_norm(skin):
    plain = (jbn.linen if skin is LINEN else jbn.nnx).BatchNorm
    for x in X, X.astype(jnp.bfloat16), X[:1, 0], X[0, 0]:
        with jax.numpy_dtype_promotion("standard"):
            y, stats = skin.train(x, plain)
            ours, mine = skin.train(x, r_max=1, d_max=0)
        assert mine.pop("steps") == 1
        chex.assert_trees_all_equal((ours, mine), (y, stats))


@SKINS
def test_init_computes_batch_norm_and_makes_no_step(skin):
    init, _ = skin.layer(skin.jbn, **LIMITS)
    stats = init(X)["batch_stats"]
    want = {"mean": jnp.zeros(3), "var": jnp.ones(3), "steps": jnp.int32(0)}
    chex.assert_trees_all_equal(stats, want)
    chex.assert_trees_all_equal_dtypes(stats, want)


@pytest.mark.slow
def test_init_of_linen_returns_y_of_batch_norm():
    layer = jbn.linen.BatchRenorm(use_running_average=False, axis_name="batch", groups=3, **LIMITS)
    y, _ = layer.init_with_output(jax.random.key(0), X)
    chex.assert_trees_all_close(y, jbn.normalize(X)[0], **LAYER)


@pytest.mark.slow
def test_variables_of_batch_norm_are_enough():
    x = normal(1, (8, 3))
    variables = jbn.linen.BatchNorm().init(jax.random.key(0), x, False)
    layer = jbn.linen.BatchRenorm(**LIMITS)
    y = layer.apply(variables, x, True)  # inference
    chex.assert_trees_all_equal(y, jbn.linen.BatchNorm().apply(variables, x, True))
    _, new = layer.apply(variables, x, False, mutable=["batch_stats"])
    assert new["batch_stats"]["steps"] == 1


@pytest.mark.slow
def test_the_switch_of_linen():
    variables = jbn.linen.BatchRenorm().init(jax.random.key(0), X, False)
    for field, argument in (True, None), (None, True):
        layer = jbn.linen.BatchRenorm(use_running_average=field)
        assert layer.apply(variables, X, argument).shape == X.shape
    with pytest.raises(ValueError, match="use_running_average"):
        jbn.linen.BatchRenorm(use_running_average=True).apply(variables, X, True)
    with pytest.raises(TypeError, match="Arrays other than x are given by name"):
        jbn.linen.BatchRenorm().apply(variables, X, X)
    with pytest.raises(ValueError, match=r"r_max must be a number >= 1; got 0.5"):
        jbn.linen.BatchRenorm(False, r_max=0.5).apply(variables, X, mutable=["batch_stats"])


@pytest.mark.slow
def test_intermediates_are_recorded_once():
    layer = jbn.linen.BatchRenorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), X)
    _, found = layer.apply(variables, X, capture_intermediates=True, mutable=["intermediates"])
    assert len(found["intermediates"]["__call__"]) == 1


@pytest.mark.slow
def test_nnx_modules_train_evaluate_split_and_merge():
    model = jbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0), r_max=3, d_max=5, warmup_steps=2)

    @nnx.jit
    def step(model):
        return model(X)

    for _ in range(3):
        step(model)
    assert (model.steps[...], model.r_max, model.warmup_steps) == (3, 3, 2)
    model.eval()
    step(model)
    assert model.steps[...] == 3
    graph, state = nnx.split(model)
    again = nnx.merge(graph, state)
    chex.assert_trees_all_equal(again(X), model(X))
    assert nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))["steps"] == 3


@pytest.mark.slow
def test_classes_can_be_pickled_and_are_subclasses():
    for cls in jbn.linen.BatchRenorm, jbn.nnx.BatchRenorm, jbn.linen.crossq.BatchRenorm:
        assert pickle.loads(pickle.dumps(cls)) is cls
        assert cls.__name__ == "BatchRenorm"
    assert issubclass(jbn.linen.BatchRenorm, nn.BatchNorm)
    assert issubclass(jbn.nnx.BatchRenorm, nnx.BatchNorm)


class Net(nn.Module):
    norm: type = jbn.linen.BatchRenorm

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, use_bias=False)(x)
        return self.norm(use_running_average=not train, axis_name="batch")(x)


@pytest.mark.slow
def test_vmap_with_a_named_axis():
    model, x = Net(), normal(2, (4, 6, 3))
    variables = model.init(jax.random.key(0), x[0])

    def run(x):
        return model.apply(variables, x, mutable=["batch_stats"])

    y, new = jax.jit(jax.vmap(run, axis_name="batch"))(x)
    whole, stats = jax.vmap(run, axis_name="batch")(x.reshape(1, 24, 3))
    chex.assert_trees_all_close(executions.rejoin(y), whole[0], **LAYER)
    for field, value in stats["batch_stats"]["BatchRenorm_0"].items():
        got = new["batch_stats"]["BatchRenorm_0"][field]
        chex.assert_trees_all_close(got, jnp.broadcast_to(value, got.shape), **LAYER)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        layer = jbn.linen.BatchRenorm(use_running_average=False, **LIMITS)
        return nn.relu(layer(nn.Dense(3)(x))), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        own = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Block, prevent_cse=False), **own, length=2)()(x, None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_microbatches_make_one_step_of_each_layer(microbatches):
    model, x = Scanned(), normal(3, (8, 3))
    variables = model.init(jax.random.key(0), x)

    def loss_fn(params, stats, x):
        y, new = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return (y**2).mean(), new["batch_stats"], {}

    state = training.init(variables["params"], variables["batch_stats"], optax.sgd(0.1))
    step = training.make_train_step(
        loss_fn, optax.sgd(0.1), microbatches=microbatches, pool_stats=True
    )
    new = jax.jit(step)(state, x)[0].stats
    chex.assert_trees_all_equal_shapes_and_dtypes(new, variables["batch_stats"])
    (stats,) = jax.tree.leaves(new, is_leaf=lambda v: "steps" in v)
    np.testing.assert_array_equal(stats["steps"], [1, 1])
    ((_, block),) = variables["params"].items()
    h = x @ block["Dense_0"]["kernel"][0]
    np.testing.assert_allclose(stats["mean"][0], 0.01 * h.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_nnx_microbatches_make_one_step():
    model = jbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0), **LIMITS)
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params, stats, x):
        model = nnx.merge(graph, params, stats)
        return (model(x) ** 4).mean(), nnx.state(model, nnx.BatchStat), {}

    state = training.init(params, stats, optax.sgd(0.1))
    step = training.make_train_step(loss_fn, optax.sgd(0.1), microbatches=2)
    new = nnx.to_pure_dict(jax.jit(step)(state, X)[0].stats)
    assert new["steps"] == 1
    tolerance.assert_close(new["mean"], 0.01 * oracle.moments(X).mean, "float32", 24)


# --- sbx ------------------------------------------------------------------------------------------


def of_sbx(x, mean, var, steps, warmup, epsilon, r_max=3.0, d_max=5.0):
    """Computes y as sbx's layer does (0.28.0, sbx/common/jax_layers.py), with jax.numpy.

    It does not correct y, but the moments by which it normalises: mean_B - d sqrt(var_B) / r and
    var_B / r^2, to which epsilon is added as in Flax.
    """
    batch_mean, batch_var = jnp.mean(x, 0), jnp.var(x, 0)
    sigma = jnp.sqrt(var + epsilon)
    r = jnp.clip(jnp.sqrt(batch_var + epsilon) / sigma, 1 / r_max, r_max)
    d = jnp.clip((batch_mean - mean) / sigma, -d_max, d_max)
    r, d = jax.lax.stop_gradient((r, d))
    if steps < warmup:
        r, d = jnp.ones_like(r), jnp.zeros_like(d)
    use_mean, use_var = batch_mean - d * jnp.sqrt(batch_var) / r, batch_var / r**2
    return (x - use_mean) / jnp.sqrt(use_var + epsilon)


# With CrossQ's epsilon the formulas differ by the order of epsilon / var; sbx's own layer (0.28.0)
# differs from jbn's by up to 1.5e-4 of the largest y here, and from `of_sbx` by 7e-7 of it.
@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "rtol", "rtol_dx"), [(1e-6, 2e-6, 4e-6), (1e-3, 2e-4, 2e-3)])
def test_crossq_computes_what_sbx_computes(epsilon, rtol, rtol_dx):
    layer = jbn.linen.crossq.BatchRenorm(use_running_average=False, epsilon=epsilon, warmup_steps=2)
    variables = layer.init(jax.random.key(0), X[0])

    @jax.jit
    def step(variables, x, dy):
        f = lambda x: layer.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
        y, pull, new = jax.vjp(f, x, has_aux=True)
        return y, pull(dy)[0], variables | new

    rng = np.random.default_rng(0)
    for i in range(4):
        x = (rng.normal(size=(32, 3)) * [0.6, 1, 8] + [0, 3, -20]).astype(np.float32)
        dy = rng.normal(size=(32, 3)).astype(np.float32)
        old = variables["batch_stats"]
        y, dx, variables = step(variables, x, dy)
        with jax.numpy_rank_promotion("allow"):
            f = functools.partial(
                of_sbx, mean=old["mean"], var=old["var"], steps=i, warmup=2, epsilon=epsilon
            )
            want, pull = jax.vjp(f, x)
        np.testing.assert_allclose(y, want, rtol=0, atol=rtol * np.abs(want).max())
        (dwant,) = pull(dy)
        np.testing.assert_allclose(dx, dwant, rtol=0, atol=rtol_dx * np.abs(dwant).max())
        m, new = oracle.moments(x), variables["batch_stats"]
        tolerance.assert_close(new["mean"], 0.99 * old["mean"] + 0.01 * m.mean, "float32", 32)
        tolerance.assert_close(new["var"], 0.99 * old["var"] + 0.01 * m.var, "float32", 32)
    assert new["steps"] == 4


def test_crossq_has_the_fields_and_variables_of_sbx():
    layer = jbn.linen.crossq.BatchRenorm(
        use_running_average=None,
        axis=-1,
        momentum=0.99,
        dtype=None,
        param_dtype=jnp.float32,
        use_bias=True,
        use_scale=True,
        bias_init=nn.initializers.zeros,
        scale_init=nn.initializers.ones,
        axis_name=None,
        axis_index_groups=None,
    )
    assert (layer.epsilon, layer.warmup_steps) == (0.001, 100_000)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3), "r_max": 3, "d_max": 5, "steps": 0}
    chex.assert_trees_all_equal(
        variables, {"params": {"scale": jnp.ones(3), "bias": jnp.zeros(3)}, "batch_stats": stats}
    )
    # A file that sbx wrote has Python integers. They may be restored into these variables.
    theirs = {**variables, "batch_stats": {**variables["batch_stats"], **stats, "steps": 7}}
    restored = serialization.from_bytes(variables, serialization.to_bytes(theirs))
    for given in theirs, restored:
        y, new = layer.apply(given, X, use_running_average=False, mutable=["batch_stats"])
        assert (new["batch_stats"]["steps"], new["batch_stats"]["r_max"]) == (8, 3)
        assert layer.apply(given, X, use_running_average=True).shape == y.shape


@pytest.mark.slow
def test_crossq_takes_its_limits_from_its_variables():
    layer = jbn.linen.crossq.BatchRenorm(use_running_average=False, warmup_steps=0)
    variables = layer.init(jax.random.key(0), X)
    for r_max, d_max in (1, 0), (1.3, 0.4):
        variables["batch_stats"] |= {"r_max": jnp.float32(r_max), "d_max": jnp.float32(d_max)}
        y, new = layer.apply(variables, X, mutable=["batch_stats"])
        want, *_ = oracle.renorm(
            X, np.ones(3), np.zeros(3), (np.zeros(3), np.ones(3)), r_max, d_max, epsilon=1e-3
        )
        tolerance.assert_close(y, want, "float32", 24)
        chex.assert_trees_all_equal_structs(new["batch_stats"], variables["batch_stats"])


@pytest.mark.slow
def test_a_step_of_crossq_is_compiled_once():
    layer = jbn.linen.crossq.BatchRenorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    _, new = layer.apply(variables, X, mutable=["batch_stats"])
    chex.assert_trees_all_equal_shapes_and_dtypes(new["batch_stats"], variables["batch_stats"])
