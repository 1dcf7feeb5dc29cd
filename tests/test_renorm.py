"""Batch Renormalization is its paper's formula, and Batch Normalization where nothing is corrected.

The first derivatives are compared with the oracle, all orders in float64 with JAX's derivatives of
the formula as the paper writes it.
"""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.population
from experiments.common import hlo
from jbn import renorm, training
from tests import cases, executions, oracle, tolerance
from tests.devices import test_named_axes

pytestmark = pytest.mark.usefixtures("cheap_programs")

STATIC = ("r_max", "d_max", "warmup_steps", "axis", "epsilon", "update", "groups", "activation")
batch_renorm = jax.jit(renorm.batch_renorm, static_argnames=STATIC)
batch_norm = jax.jit(jbn.batch_norm, static_argnames=STATIC[3:])
LIMITS = {"r_max": 1.3, "d_max": 0.4}  # about half of the features exceed one of them


CASE = cases.Case((32, 5))


def layer(case=CASE, dtype=jnp.float32, steps=7):
    """Returns (data, params, statistics that differ from those of the data)."""
    data, rng = cases.make(case), np.random.default_rng(3)
    shape = data.scale.shape
    mean = case.offset + case.std * rng.normal(0, 0.7, shape)
    var = (case.std * rng.uniform(0.5, 2.0, shape)) ** 2
    stats = renorm.RenormStats(
        jnp.asarray(mean, dtype),
        jnp.asarray(var, dtype),
        jnp.full(shape, 3.0, dtype),
        jnp.int32(steps),
    )
    return data, jbn.Params(data.scale, data.bias), stats


def expected(data, params, stats, r_max, d_max, **options):
    """Returns (y, moments, r, d) of the oracle."""
    return oracle.renorm(data.x, *params, stats[:2], r_max, d_max, **options, **data.support)


# --- the formula ---------------------------------------------------------------------------------

CASES = [
    cases.Case((32, 5)),
    cases.Case((4, 6, 16), axis=1, mask="positions"),
    cases.Case((3, 4, 5, 6), axis=(1, 3), mask="features"),
    cases.Case((32, 5), weights="examples", offset=1e3),
    cases.Case((64, 5), dtype="bfloat16", mask="channel"),
    pytest.param(cases.Case((64, 5), dtype="float16"), marks=pytest.mark.slow),
    cases.Case((512, 3), std=1e-3),  # the variance is a tenth of epsilon
    pytest.param(cases.Case((8, 4), values="integer"), marks=pytest.mark.slow),
    cases.Case((8, 3), values="constant", offset=-3.0),
    pytest.param(cases.Case((6, 8), values="one_hot"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_y_statistics_and_gradient_are_those_of_the_oracle(case):
    data, params, stats = layer(case)

    @jax.jit
    def run(x, params, stats):
        f = lambda x, params: renorm.batch_renorm(  # noqa: E731
            x, params, stats, update=jbn.ema(0.9), **LIMITS, **case.kwargs, **data.support
        )
        y, pull, new = jax.vjp(f, x, params, has_aux=True)
        return y, new, pull(jnp.asarray(data.dy))

    y, new, (dx, dparams) = run(data.x, params, stats)
    want, m, r, d = expected(data, params, stats, **LIMITS, **case.kwargs)
    n = data.x.size // data.scale.size
    tolerance.assert_close(y, want, case.dtype, n, ratio=case.ratio)
    had = m.count > 0
    mean, var = (np.where(had, 0.9 * o + 0.1 * v, o) for o, v in zip(stats, m[1:], strict=False))
    tolerance.assert_close(new.mean, mean, "float32", n, ratio=case.ratio)
    tolerance.assert_close(new.var, var, "float32", n)
    np.testing.assert_array_equal(new.count, 3 + had)
    assert new.steps == 8
    chex.assert_type(y, case.dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, stats)
    at = data.x, *params, data.dy, r, d
    grads = oracle.renorm_vjp(*at, **case.kwargs, **data.support)
    size = np.abs(np.asarray(data.dy, np.float64)).sum() / data.scale.size
    tolerance.assert_close(dx, grads[0], case.dtype, n, ratio=case.ratio)
    tolerance.assert_close(dparams.scale, grads[1], "float32", n, magnitude=size, ratio=case.ratio)
    tolerance.assert_close(dparams.bias, grads[2], "float32", n, magnitude=size)


@pytest.mark.slow
def test_the_oracle_of_the_gradient_is_the_slope_of_its_formula():
    data, params, stats = layer()
    _, _, r, d = expected(data, params, stats, **LIMITS)
    rng = np.random.default_rng(0)
    at = [np.asarray(v, np.float64) for v in (data.x, *params)]
    along = [rng.normal(size=v.shape) for v in at]

    def loss(t):
        x, scale, bias = (v + t * dv for v, dv in zip(at, along, strict=True))
        return (data.dy * oracle.normalize(x, scale * r, bias + scale * d)[0]).sum()

    slope = sum(
        (g * dv).sum() for g, dv in zip(oracle.renorm_vjp(*at, data.dy, r, d), along, strict=True)
    )
    np.testing.assert_allclose((loss(1e-5) - loss(-1e-5)) / 2e-5, slope, rtol=1e-7)


def of_the_paper(x, scale, bias, mean, var, r_max, d_max, epsilon=1e-5):
    """Computes y in jax.numpy, for JAX to differentiate."""
    own = jnp.sqrt(jnp.var(x, 0) + epsilon)
    std = jnp.sqrt(var + epsilon)
    r = jax.lax.stop_gradient(jnp.clip(own / std, 1 / r_max, r_max))
    d = jax.lax.stop_gradient(jnp.clip((jnp.mean(x, 0) - mean) / std, -d_max, d_max))
    return scale * ((x - jnp.mean(x, 0)) / own * r + d) + bias


def test_derivatives_up_to_the_third_order(x64):
    data, params, stats = layer(cases.Case((6, 3), dtype="float64"), jnp.float64)
    rng = np.random.default_rng(0)
    at = jnp.asarray(data.x), *map(jnp.asarray, params)
    ways = [tuple(rng.normal(size=v.shape) for v in at) for _ in range(3)]

    def derivatives(f):
        def first(*at):
            return jax.vjp(lambda *at: f(*at) ** 2, *at)[1](jnp.asarray(data.dy))

        def second(*at):
            return jax.jvp(first, at, ways[0])[1]

        def third(*at):
            return jax.jvp(second, at, ways[1])[1]

        return jax.jit(lambda *at: (first(*at), second(*at), third(*at)))(*at)

    with jax.numpy_rank_promotion("allow"):
        ours = derivatives(lambda x, *p: renorm.batch_renorm(x, jbn.Params(*p), stats, **LIMITS)[0])
        theirs = derivatives(lambda *at: of_the_paper(*at, *stats[:2], **LIMITS))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_r_and_d_are_of_the_statistics_before_the_batch():
    data, params, stats = layer()
    y, new = batch_renorm(data.x, params, stats, r_max=np.inf, d_max=np.inf, update=jbn.ema(0.0))
    want = oracle.affine(data.x, *stats[:2], *params)
    tolerance.assert_close(y, want, "float32", 32)
    tolerance.assert_close(new.mean, oracle.moments(data.x).mean, "float32", 32, magnitude=1)


def test_both_limits_count():
    x = jnp.array([[-10.0, 1.0], [10.0, 3.0]])
    stats = renorm.init_stats(2)
    y, _ = batch_renorm(x, jbn.Params(None, None), stats, r_max=2.0, d_max=0.5, epsilon=0.0)
    # Feature 0: sigma_B = 10, r = 2, d = 0. Feature 1: sigma_B = 1, r = 1, mean_B = 2, d = 0.5.
    np.testing.assert_allclose(y, [[-2, -0.5], [2, 1.5]], rtol=1e-6)
    y, _ = batch_renorm(0.01 * x, jbn.Params(None, None), stats, r_max=2.0, d_max=0.5, epsilon=0.0)
    np.testing.assert_allclose(y, [[-0.5, -0.48], [0.5, 0.52]], rtol=1e-6)  # r = 1 / 2


@pytest.mark.slow
def test_groups_have_an_r_and_a_d_of_their_own():
    data, params, stats = layer(cases.Case((32, 5), mask="features"))
    y, new = batch_renorm(data.x, params, stats, groups=4, mask=data.mask, **LIMITS)
    for part in np.split(np.arange(32), 4):
        given = data._replace(x=data.x[part], mask=data.mask[part])
        want = expected(given, params, stats, **LIMITS)[0]
        tolerance.assert_close(np.asarray(y)[part], want, "float32", 8)
    m = oracle.moments(data.x, mask=data.mask)
    tolerance.assert_close(new.var, 0.99 * stats.var + 0.01 * m.var, "float32", 32)
    chex.assert_shape(new.var, (5,))


@pytest.mark.slow
def test_groups_add_up_the_gradients_of_the_parameters():
    data, params, stats = layer()

    def f(params):
        return renorm.batch_renorm(data.x, params, stats, groups=4, **LIMITS)[0]

    (got,) = jax.jit(lambda params: jax.vjp(f, params)[1](data.dy))(params)
    want = np.zeros((2, 5))
    for part in np.split(np.arange(32), 4):
        given = data._replace(x=data.x[part])
        _, _, r, d = expected(given, params, stats, **LIMITS)
        want += oracle.renorm_vjp(given.x, *params, data.dy[part], r, d)[1:]
    tolerance.assert_close(got.scale, want[0], "float32", 32, magnitude=32)
    tolerance.assert_close(got.bias, want[1], "float32", 32, magnitude=32)


@pytest.mark.slow
def test_complex_x():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(32, 3, 2)) @ [1, 1j] + 2).astype(np.complex64)
    stats = renorm.init_stats(3, jnp.complex64)._replace(mean=jnp.array([2.1j, 2.1, -4j], "F"))
    y, _ = batch_renorm(x, jbn.Params(None, None), stats, r_max=1.2, d_max=0.5)
    wide = x.astype(np.complex128)
    mean, var = wide.mean(0), wide.var(0)  # NumPy's is E|x - mean|^2
    own, std = np.sqrt(var + 1e-5), np.sqrt(1 + 1e-5)
    d = (mean - np.asarray(stats.mean)) / std
    d = d * np.minimum(1, 0.5 / abs(d))  # the modulus is limited
    want = (wide - mean) / own * np.clip(own / std, 1 / 1.2, 1.2) + d
    chex.assert_trees_all_close(y, want.astype(np.complex64), **tolerance.tol("float32", 32))


@pytest.mark.slow
def test_activation_and_residual():
    data, params, stats = layer()
    residual = jnp.asarray(data.dy)
    f = functools.partial(batch_renorm, data.x, params, stats, **LIMITS)
    want = np.maximum(np.asarray(f()[0]) + residual, 0)
    got = f(residual=residual, activation=jax.nn.relu)[0]
    tolerance.assert_close(got, want, "float32", 1)


# --- as Batch Normalization, and as inference ----------------------------------------------------


@pytest.fixture
def usual_programs(cheap_programs):
    """XLA compiles with all optimisations, in which last bits depend on what is fused."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def never(least):
    return renorm.piecewise_linear((10**6, 2 * 10**6), (least, least + 1))


@pytest.mark.parametrize(
    "limits",
    [
        {"r_max": never(1), "d_max": never(0)},
        {"r_max": 1, "d_max": 0},
        {"r_max": jnp.float32(1), "d_max": np.float64(0)},
        {"r_max": 3, "d_max": 5, "warmup_steps": 8},
    ],
    ids=["schedules", "static", "arrays", "warmup"],
)
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (cases.Case((32, 5)), {}),
        (cases.Case((32, 5), mask="features"), {"groups": 2}),
        (cases.Case((64, 5), dtype="bfloat16", weights="examples"), {"activation": jax.nn.relu}),
        (cases.Case((8, 3), values="constant", offset=-3.0), {"epsilon": 0.0}),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else str(value),
)
def test_without_correction_it_is_batch_norm_bit_for_bit(case, options, limits, usual_programs):
    data, params, stats = layer(case)

    def run(f, stats):
        call = lambda x, params: f(x, params, stats, **options, **data.support)  # noqa: E731
        y, pull, new = jax.vjp(call, jnp.asarray(data.x), params, has_aux=True)
        return y, pull(jnp.asarray(data.dy)), tuple(new[:3])

    ours = jax.jit(functools.partial(run, functools.partial(renorm.batch_renorm, **limits)))(stats)
    theirs = jax.jit(functools.partial(run, jbn.batch_norm))(stats.running)
    if limits == {"r_max": 1, "d_max": 0}:  # the same program
        chex.assert_trees_all_equal(ours, theirs)
        return
    (y, grads, new), (y_plain, grads_plain, new_plain) = ours, theirs
    chex.assert_trees_all_equal((y, new), (y_plain, new_plain))
    # With jax 0.10.0 last bits depend on the operations that the compiler fuses in backward.
    ulp = tolerance.eps(case.dtype)
    chex.assert_trees_all_close(grads, grads_plain, rtol=2 * ulp, atol=2 * ulp)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_without_limits_it_is_inference(dtype, offset):
    case = cases.Case((64, 5), dtype=dtype, offset=offset)
    data, params, stats = layer(case)
    y, _ = batch_renorm(data.x, params, stats, r_max=jnp.inf, d_max=np.inf)
    same = jax.jit(renorm.batch_renorm_inference)(data.x, params, stats)
    tolerance.assert_close(y, same, dtype, 64, ratio=offset)
    chex.assert_trees_all_equal(same, jbn.batch_norm_inference(data.x, params, stats.running))


@pytest.mark.slow
def test_inference_of_an_exported_program():
    data, params, stats = layer()
    options = {"activation": jnp.tanh, "epsilon": 1e-3}
    f = jax.jit(functools.partial(renorm.batch_renorm_inference, **options))
    blob = jax.export.export(f)(data.x, params, stats).serialize()
    again = jax.export.deserialize(blob).call(data.x, params, stats)
    want = np.tanh(oracle.affine(data.x, *stats[:2], *params, epsilon=1e-3))
    tolerance.assert_close(again, want, "float32", 1)


# --- batches that are empty, constant or not finite -----------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_an_unsound_feature_changes_no_statistics_and_no_other_feature(bad):
    data, params, stats = layer()
    x = data.x.copy()
    x[3, 1] = bad
    y, new = batch_renorm(x, params, stats, r_max=3.0, d_max=5.0)
    others = [0, 2, 3, 4]
    want, _ = batch_renorm(data.x, params, stats, r_max=3.0, d_max=5.0)
    np.testing.assert_array_equal(np.asarray(y)[:, others], np.asarray(want)[:, others])
    assert (new.mean[1], new.var[1], new.count[1]) == (stats.mean[1], stats.var[1], 3)
    np.testing.assert_array_equal(np.asarray(new.count)[others], 4)
    assert new.steps == 8
    rest = np.delete(np.asarray(y)[:, 1], 3)
    if np.isnan(bad):
        assert np.isnan(rest).all()
    else:  # squares overflow: y is the bias
        np.testing.assert_array_equal(rest, np.full(31, params.bias[1]))


def test_an_empty_batch_gives_the_bias_and_makes_a_step():
    data, params, stats = layer()
    y, new = batch_renorm(data.x, params, stats, mask=np.zeros((32, 1), bool), **LIMITS)
    np.testing.assert_array_equal(y, np.broadcast_to(params.bias, (32, 5)))
    chex.assert_trees_all_equal(new, stats._replace(steps=jnp.int32(8)))


@pytest.mark.slow
def test_masked_values_reach_nothing():
    case = cases.Case((32, 5), mask="features")
    (clean, params, stats), dirty = layer(case), cases.make(case, masked=np.nan)
    dy = np.where(clean.valid, clean.dy, np.float32(0))

    @jax.jit
    def run(x):
        f = lambda *at: renorm.batch_renorm(*at, stats, mask=clean.mask, **LIMITS)  # noqa: E731
        y, pull, new = jax.vjp(f, x, params, has_aux=True)
        return y, new, pull(dy)

    (y, *others), (y_clean, *same) = run(dirty.x), run(clean.x)
    chex.assert_trees_all_equal(others, same)
    np.testing.assert_array_equal(np.asarray(y)[clean.valid], np.asarray(y_clean)[clean.valid])
    _, _, _, d = expected(clean, params, stats, **LIMITS)  # as for x at the mean of the batch
    want = np.broadcast_to(params.scale * d + params.bias, y.shape)[~clean.valid]
    tolerance.assert_close(np.asarray(y)[~clean.valid], want, "float32", 32)


@pytest.mark.slow
def test_a_constant_feature_without_epsilon():
    x, stats = jnp.full((4, 2), 3.0), renorm.init_stats(2)._replace(var=jnp.array([4.0, 0.0]))
    params = jbn.init_params(2)._replace(bias=jnp.array([1.0, 1.0]))
    y, _ = batch_renorm(x, params, stats, r_max=np.inf, d_max=np.inf, epsilon=0.0)
    # xhat is 0 and d is 3 / 2; where the running variance is 0, y is the bias, as in inference.
    np.testing.assert_allclose(y, np.tile([2.5, 1.0], (4, 1)), rtol=1e-6)
    chex.assert_tree_all_finite(y)


# --- schedules ------------------------------------------------------------------------------------


def test_the_schedules_of_the_paper():
    steps = jnp.array([0, 5_000, 15_000, 22_500, 25_000, 40_000, 10**9], jnp.int32)
    r_max, d_max = (jax.jit(jax.vmap(s))(steps) for s in (renorm.R_MAX, renorm.D_MAX))
    np.testing.assert_allclose(r_max, [1, 1, 1 + 2 * 10 / 35, 2, 1 + 2 * 20 / 35, 3, 3], rtol=1e-6)
    np.testing.assert_array_equal(d_max, [0, 0, 2.5, 4.375, 5, 5, 5])


@pytest.mark.slow
def test_a_schedule_goes_through_its_points():
    schedule = renorm.piecewise_linear((10, 20, 40), (1, 3, 2))
    values = [float(schedule(step)) for step in (0, 10, 15, 20, 30, 40, 50)]
    np.testing.assert_allclose(values, [1, 1, 2, 3, 2.5, 2, 2], rtol=1e-6)
    assert schedule == renorm.piecewise_linear([10, 20, 40], [1.0, 3.0, 2.0])
    assert hash(schedule) == hash(renorm.piecewise_linear([10, 20, 40], [1.0, 3.0, 2.0]))
    assert repr(schedule) == "piecewise_linear((10.0, 20.0, 40.0), (1.0, 3.0, 2.0))"
    assert float(renorm.piecewise_linear((5,), (2,))(0)) == 2


def closure(steps):
    return jnp.where(steps < 5, 1.0, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [optax.linear_schedule(1.0, 2.0, 2, 3), closure, renorm.piecewise_linear([4, 5], [1, 2])],
)
def test_the_limits_follow_the_steps_of_the_layer(schedule):
    data, params, stats = layer(steps=4)

    @jax.jit
    def two(stats):
        f = lambda s, _: renorm.batch_renorm(  # noqa: E731
            data.x, params, s, r_max=schedule, d_max=0, update=jbn.ema(1.0)
        )[::-1]
        return jax.lax.scan(f, stats, length=2)

    new, ys = two(stats)
    for y, r_max in zip(ys, (float(schedule(jnp.int32(4))), 2.0), strict=True):
        tolerance.assert_close(y, expected(data, params, stats, r_max, 0)[0], "float32", 32)
    assert new.steps == 6


def test_warm_up_ends_at_its_step():
    data, params, stats = layer()
    for steps, limits in (6, (1, 0)), (7, (3, 5)), (8, (3, 5)):
        stats = stats._replace(steps=jnp.int32(steps))
        y, _ = batch_renorm(data.x, params, stats, r_max=3, d_max=5, warmup_steps=7)
        tolerance.assert_close(y, expected(data, params, stats, *limits)[0], "float32", 32)


def test_a_schedule_that_turns_to_nonsense_gives_batch_norm():
    data, params, stats = layer()
    for value in (np.nan, -1.0, 0.5):
        late = lambda steps, v=value: jnp.where(steps == 7, v, 2.0)  # noqa: E731
        run = functools.partial(renorm.batch_renorm, r_max=late, d_max=0.0)
        y, _ = jax.jit(run)(data.x, params, stats)
        tolerance.assert_close(y, expected(data, params, stats, 1, 0)[0], "float32", 32)
        with pytest.raises(ValueError, match=r"r_max must be a number >= 1"):
            run(data.x, params, stats)  # where values are known


@pytest.mark.slow
def test_limits_may_be_traced():
    data, params, stats = layer()
    run = jax.jit(lambda r, d: renorm.batch_renorm(data.x, params, stats, r_max=r, d_max=d)[0])
    y = run(*LIMITS.values())
    tolerance.assert_close(y, expected(data, params, stats, **LIMITS)[0], "float32", 32)
    tolerance.assert_close(run(0.5, -1.0), expected(data, params, stats, 1, 0)[0], "float32", 32)


# --- the standard deviation, and Keras ------------------------------------------------------------


def test_ema_of_std_averages_the_standard_deviation():
    rule, stats = renorm.ema_of_std(0.9, epsilon=1e-3), jbn.init_stats(3)
    xs = np.random.default_rng(0).normal(size=(4, 8, 3), scale=(0.001, 1, 30)).astype(np.float32)
    std, mean = np.sqrt(np.ones(3) + 1e-3), np.zeros(3)
    for x in xs:
        stats = jax.jit(rule)(stats, jax.jit(jbn.moments)(x))
        m = oracle.moments(x)
        std, mean = 0.9 * std + 0.1 * np.sqrt(m.var + 1e-3), 0.9 * mean + 0.1 * m.mean
    tolerance.assert_close(np.sqrt(stats.var + 1e-3), std, "float32", 8)
    tolerance.assert_close(stats.mean, mean, "float32", 8)
    np.testing.assert_array_equal(stats.count, 4)
    debiased = jax.jit(renorm.ema_of_std(0.9, epsilon=0.0, debias=True))
    debiased = debiased(jbn.init_stats(3), jax.jit(jbn.moments)(x))
    tolerance.assert_close(debiased.var, m.var, "float32", 8)
    assert rule == renorm.ema_of_std(0.9, epsilon=1e-3)
    assert hash(rule) == hash(renorm.ema_of_std(0.9, epsilon=1e-3))
    assert repr(rule) == "ema_of_std(0.9, epsilon=0.001, debias=False)"


def test_ema_of_std_leaves_out_what_other_rules_leave_out():
    rule, stats = renorm.ema_of_std(0.5, epsilon=1e-3), jbn.init_stats(4)
    x = jnp.array([[np.nan, 1.0, 2.0, 1.0], [1.0, 5.0, 4.0, 1.0]])
    mask = jnp.array([[True, True, True, False], [True, False, True, False]])
    new = jax.jit(rule)(stats, jax.jit(jbn.moments)(x, mask=mask))
    np.testing.assert_array_equal(new.count, [0, 0, 1, 0])
    np.testing.assert_allclose(new.mean, [0, 0.5, 1.5, 0])
    np.testing.assert_array_equal(np.asarray(new.var)[[0, 1, 3]], 1)


# Computed by Keras 2.15.0 (TensorFlow 2.15.1) on CPU, for the arrays of the test:
#   tf.compat.v1.keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-3, renorm=True,
#       renorm_momentum=0.9, renorm_clipping={"rmin": 1 / 1.5, "rmax": 1.5, "dmax": 0.5})
# A row for each step: y and dx of the first two rows, dgamma, renorm_mean, renorm_stddev.
KERAS = (
    (
        [[0.192296982, -0.083535433, 1.737127542], [0.175421953, -0.909181595, 1.377511621]],
        [[-43.910156250, -3.576246977, -0.091220155], [6.646142006, 2.556667089, 0.057279520]],
        [-1.150641203, -0.992080450, 11.868122101],
        [0.009737501, 0.190887511, -0.674849987],
        [0.903950632, 0.965241849, 2.644569397],
    ),
    (
        [[0.363515019, 0.067340374, 0.089514196], [-0.286742568, -1.076414347, 0.971548080]],
        [[-43.718620300, -3.620485544, -0.034879673], [1.213462830, 2.501331329, 0.062866896]],
        [-3.113568306, -1.394719362, -2.580564022],
        [0.019126251, 0.377948761, 0.665934920],
        [0.817246437, 0.944743574, 4.838436604],
    ),
    (
        [[0.735085130, 2.505177498, 1.148399472], [-0.229229927, -0.287114620, 1.485614777]],
        [[-40.064552307, -1.796497345, -0.036824878], [4.954868793, 2.427523375, 0.089000106]],
        [-1.015934467, -6.142931938, -9.790241241],
        [0.026826125, 0.553316355, 1.641791344],
        [0.739669800, 0.939563453, 6.350275993],
    ),
)
# moving_mean and moving_stddev are the same as renorm_mean and renorm_stddev there.
KERAS_INFERENCE = [[0.102983624, 1.798498631, 2.147289276], [0.101631671, 0.938524723, 1.488656640]]


def test_keras_computes_the_same():
    rng = np.random.default_rng(0)
    xs = (rng.normal(size=(3, 8, 3)) * [0.02, 1, 30] + [0.1, 2, -3]).round(3).astype(np.float32)
    dy = np.arange(24, dtype=np.float32).reshape(8, 3) % 7 - 3
    params = jbn.Params(jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, -1.0, 1.0]))
    # Keras starts the standard deviation at 1: sqrt(var + epsilon) = 1.
    stats = renorm.init_stats(3)._replace(var=jnp.full(3, 1 - 1e-3))
    rule = renorm.ema_of_std(0.9, epsilon=1e-3)

    @jax.jit
    def step(x, stats):
        f = lambda x, params: renorm.batch_renorm(  # noqa: E731
            x, params, stats, r_max=1.5, d_max=0.5, epsilon=1e-3, update=rule
        )
        y, pull, new = jax.vjp(f, x, params, has_aux=True)
        return y, pull(dy), new

    for x, (y, dx, dgamma, mean, std) in zip(xs, KERAS, strict=True):
        ours, (gradient, dparams), stats = step(x, stats)
        # Float32 on both sides, and sums of 8 values of a magnitude of 3: dx up to 44, dgamma 12.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
        close(ours[:2], y, atol=1e-5)
        close(gradient[:2], dx, atol=1e-4)
        close(dparams.scale, dgamma, atol=1e-4)
        close(stats.mean, mean, atol=1e-6)
        close(np.sqrt(stats.var + 1e-3), std, atol=1e-6)
    y = renorm.batch_renorm_inference(xs[0], params, stats, epsilon=1e-3)
    close(y[:2], KERAS_INFERENCE, atol=1e-5)


# --- where the batch lies -------------------------------------------------------------------------

ROWS, PLACES, CHANNELS = 16, 3, 5


KINDS = [
    kind
    for kind in test_named_axes.KINDS
    if kind.name in ("masked", "groups_masked", "index_groups")
]


@pytest.mark.slow
@test_named_axes.matrix(KINDS, quick=("vmap", "shard_map", "jit_explicit"))
def test_y_statistics_and_gradient_in_every_mode(mode, kind):
    rows, params = test_named_axes.make(kind)
    _, _, stats = layer(cases.Case((ROWS, PLACES, CHANNELS), offset=2.0))
    schedule = renorm.piecewise_linear((0, 14), (1.0, 1.6))  # 1.3 at step 7

    def one(params, rows, axis_name):
        old = stats
        if mode.checks and kind.index_groups:  # each group has its own statistics
            old = jax.tree.map(lambda v: jax.lax.pcast(v, axis_name, to="varying"), stats)
        options = {**test_named_axes.arguments(kind, mode), **test_named_axes.support(rows)}
        options |= {"axis_name": axis_name, "update": jbn.ema(0.9)}
        return renorm.batch_renorm(rows["x"], params, old, r_max=schedule, d_max=0.4, **options)

    def program(params, rows):
        def loss(params, x):
            y, new = mode.execute(one, params, {**rows, "x": x})
            return (rows["dy"] * y).sum(), (y, new)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, rows["x"])

    (dparams, dx), (y, new) = mode.run(program, params, rows)
    n, dscale, dbias = ROWS * PLACES, 0.0, 0.0
    for part in test_named_axes.parts(kind, mode):
        given = test_named_axes.support(rows, part)
        at = rows["x"][part], *params
        want, m, r, d = oracle.renorm(*at, stats[:2], **LIMITS, **given)
        tolerance.assert_close(np.asarray(y)[part], want, "float32", n, ratio=2)
        grads = oracle.renorm_vjp(*at, rows["dy"][part], r, d, **given)
        tolerance.assert_close(np.asarray(dx)[part], grads[0], "float32", n, ratio=2)
        dscale, dbias = dscale + grads[1], dbias + grads[2]
        if kind.index_groups:
            assert_moved(new, stats, m, sorted({row // 4 for row in part}))
    if not kind.index_groups:
        m = oracle.moments(rows["x"], **test_named_axes.support(rows))
        assert_moved(new, stats, m, range(4))
    tolerance.assert_close(dparams.scale, dscale, "float32", n, magnitude=n, ratio=2)
    tolerance.assert_close(dparams.bias, dbias, "float32", n, magnitude=n)


def assert_moved(new, old, m, instances):
    for i in instances:
        tolerance.assert_close(new.var[i], 0.9 * old.var + 0.1 * m.var, "float32", 48)
        tolerance.assert_close(new.mean[i], 0.9 * old.mean + 0.1 * m.mean, "float32", 48)
        assert new.steps[i] == 8


def collectives(f, stats, *at):
    """Returns kinds and sizes of the collectives of a forward and backward pass of `f`."""

    def both(x, params, dy):
        y, pull, new = jax.vjp(lambda *at: f(*at, stats), x, params, has_aux=True)
        return y, new, pull(dy)

    return [c[:3] for c in hlo.collectives(jax.jit(both).lower(*at).compile().as_text())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis_type", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit], ids=str
)
def test_sharded_arrays_take_the_collectives_of_batch_norm(axis_type):
    data, params, stats = layer(cases.Case((ROWS, PLACES, CHANNELS)))
    with jax.set_mesh(executions.mesh(axis_type=axis_type)) as where:
        place = NamedSharding(where or executions.mesh(axis_type=axis_type), P("batch"))
        x, dy = jax.device_put((data.x, data.dy), place)
        plain = collectives(jbn.batch_norm, stats.running, x, params, dy)
        ours = collectives(functools.partial(renorm.batch_renorm, **LIMITS), stats, x, params, dy)
    assert ours == plain
    assert [c[0] for c in ours] == ["all-gather", "all-reduce"]


@pytest.mark.slow
def test_named_axes_take_the_collectives_of_batch_norm():
    data, params, stats = layer(cases.Case((ROWS, PLACES, CHANNELS)))
    specs = {"in_specs": (P("batch"), P(), P()), "out_specs": (P("batch"), P())}

    def sharded(f):
        run = functools.partial(f, axis_name="batch")
        return jax.shard_map(run, mesh=executions.mesh(), **specs)

    plain = collectives(sharded(jbn.batch_norm), stats.running, data.x, params, data.dy)
    run = functools.partial(renorm.batch_renorm, **LIMITS)
    assert collectives(sharded(run), stats, data.x, params, data.dy) == plain


@pytest.mark.slow
def test_local_statistics_may_not_leave_shard_map_as_replicated():
    data, params, stats = layer(cases.Case((ROWS, PLACES, CHANNELS)))
    run = jax.shard_map(
        lambda x: renorm.batch_renorm(x, params, stats, **LIMITS),
        mesh=executions.mesh(),
        in_specs=P("batch"),
        out_specs=(P("batch"), P()),
    )
    with pytest.raises(ValueError, match="statistics of this batch differ"):
        jax.jit(run)(data.x)


@pytest.mark.slow
def test_a_backward_pass_keeps_x_and_vectors(one_device):
    data, params, stats = layer(cases.Case((16, 8, CHANNELS), dtype="bfloat16", mask="examples"))

    def f(x, params):
        return renorm.batch_renorm(x, params, stats, mask=data.mask, **LIMITS)[0]

    leaves = jax.tree.leaves(jax.jit(lambda *at: jax.vjp(f, *at)[1])(data.x, params))
    large = [a for a in leaves if a.size > data.mask.size]
    assert [a.dtype for a in large] == [jnp.bfloat16]
    policy = jax.checkpoint(f, policy=jbn.checkpoint_policy)
    saved = jax.jit(lambda *at: jax.vjp(policy, *at)[1])(data.x, params)
    assert sum(a.size > data.mask.size for a in jax.tree.leaves(saved)) == 1


def test_x_is_summed_as_often_as_by_batch_norm(one_device):
    data, params, stats = layer()

    def reductions(f, stats):
        def both(x, params):
            y, pull = jax.vjp(lambda *at: f(*at, stats)[0], x, params)
            return y, pull(y)

        return jax.jit(both).lower(data.x, params).as_text().count("stablehlo.reduce(")

    ours = reductions(functools.partial(renorm.batch_renorm, **LIMITS), stats)
    assert ours == reductions(jbn.batch_norm, stats.running) > 0


@pytest.mark.slow
def test_vmap_is_a_loop():
    data, params, stats = layer(cases.Case((3, 8, 5)))
    many = jax.tree.map(lambda v: jnp.stack([v, v + 1, v + 2]), stats)
    f = lambda x, s: renorm.batch_renorm(x, params, s, **LIMITS)  # noqa: E731
    got = jax.jit(jax.vmap(f))(data.x, many)
    for i in range(3):
        one = jax.jit(f)(data.x[i], jax.tree.map(lambda v, i=i: v[i], many))
        chex.assert_trees_all_close(
            jax.tree.map(lambda v, i=i: v[i], got), one, rtol=1e-6, atol=1e-6
        )


# --- training steps -------------------------------------------------------------------------------


def training_step(devices=False, **options):
    """Returns (step, state, batch) of one layer that takes the schedule's limits."""
    x = jnp.asarray(cases.make(cases.Case((16, 4), offset=1.0)).x)

    def loss_fn(params, stats, x):
        y, stats = renorm.batch_renorm(x, params, stats, r_max=renorm.R_MAX, d_max=0.5)
        return jnp.mean(y**4), stats, {}

    state = training.init(jbn.init_params(4), renorm.init_stats(4), optax.sgd(0.0))
    return training.make_train_step(loss_fn, optax.sgd(0.0), **options), state, x


@pytest.mark.parametrize("microbatches", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_microbatches_make_one_step_and_pool_their_moments(microbatches):
    step, state, x = training_step(microbatches=microbatches, pool_stats=True)
    step = jax.jit(step)
    new = step(step(state, x)[0], x)[0].stats
    m = oracle.moments(x)
    tolerance.assert_close(new.mean, (1 - 0.99**2) * m.mean, "float32", 16)
    tolerance.assert_close(new.var, 0.99**2 + (1 - 0.99**2) * m.var, "float32", 16)
    assert (new.steps, new.steps.dtype) == (2, jnp.int32)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state.stats)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_devices_make_one_step_and_pool_their_moments(check_vma):
    step, state, x = training_step(axis_name="batch", microbatches=2)
    specs = {"in_specs": (P(), P("batch")), "out_specs": P(), "check_vma": check_vma}
    new = jax.jit(jax.shard_map(step, mesh=executions.mesh(), **specs))(state, x)[0].stats
    tolerance.assert_close(new.var, 0.99 + 0.01 * oracle.moments(x).var, "float32", 16)
    assert new.steps == 1


@pytest.mark.slow
def test_microbatches_in_turn_are_steps():
    step, state, x = training_step(microbatches=4, pool_stats=False)
    assert jax.jit(step)(state, x)[0].stats.steps == 4


def test_population_statistics_leave_the_steps():
    data, params, stats = layer()

    def apply_fn(params, stats, x):
        return renorm.batch_renorm(x, params, stats, **LIMITS)[1]

    for by_layer in (False, True):
        batches = [data.x[:16], data.x[16:]]
        new = jbn.population.estimate(apply_fn, params, stats, batches, layer_by_layer=by_layer)
        tolerance.assert_close(new.var, oracle.moments(data.x).var, "float32", 32)
        assert new.steps == 7


# --- errors ---------------------------------------------------------------------------------------

X = jnp.ones((4, 2))


def call(**options):
    return renorm.batch_renorm(X, jbn.init_params(2), renorm.init_stats(2), **options)


@pytest.mark.parametrize("value", [0.99, 0, -3, np.nan, "3", True, [1, 2], jnp.ones(2), None])
def test_r_max_is_at_least_one(value):
    with pytest.raises(ValueError, match=r"r_max must be a number >= 1; got"):
        call(r_max=value, d_max=0)


@pytest.mark.parametrize("value", [-1e-9, -jnp.inf, np.nan, "5", False, jnp.zeros(2)])
def test_d_max_is_not_negative(value):
    with pytest.raises(ValueError, match=r"d_max must be a number >= 0; got"):
        call(r_max=1, d_max=value)


@pytest.mark.parametrize("value", [-1, 1.5, "7", None, True])
def test_warm_up_is_a_number_of_steps(value):
    with pytest.raises(ValueError, match=r"warmup_steps must be a whole number of steps >= 0"):
        call(warmup_steps=value)


@pytest.mark.parametrize("value", [0.5, np.nan, jnp.ones(2), "a", None, (1, 2)])
def test_what_a_schedule_returns_is_checked_while_tracing(value):
    with pytest.raises(ValueError, match=r"r_max at step 0 must be a number >= 1; got"):
        jax.jit(lambda: call(r_max=lambda _: value, d_max=0.0))()


@pytest.mark.slow
def test_a_schedule_that_fails_later_is_found_while_tracing():
    with pytest.raises(ValueError, match=r"d_max at step 1000 must be a number >= 0; got -1"):
        jax.jit(lambda: call(d_max=lambda s: jnp.where(s < 500, 0.0, -1.0)))()


@pytest.mark.slow
def test_the_points_of_a_schedule_are_limits():
    schedule = renorm.piecewise_linear((0, 70_000, 80_000), (1, 0.5, 3))
    with pytest.raises(ValueError, match=r"r_max at step 70000 must be a number >= 1; got 0.5"):
        call(r_max=schedule, d_max=0)
    chex.assert_shape(call(r_max=1, d_max=schedule)[0], (4, 2))


@pytest.mark.slow
def test_a_schedule_may_use_traced_values():
    data, params, stats = layer()

    @jax.jit
    def run(top):
        schedule = lambda steps: jnp.where(steps < 7, 1.0, top)  # noqa: E731
        return renorm.batch_renorm(data.x, params, stats, r_max=schedule, d_max=0.4)[0]

    with jax.checking_leaks():
        y = run(1.3)
    tolerance.assert_close(y, expected(data, params, stats, **LIMITS)[0], "float32", 32)


def test_a_schedule_is_a_function_of_the_step_that_jax_can_trace():
    for schedule in (lambda: 1.0, lambda steps: 2.0 if steps < 5 else 3.0, lambda s: s.nothing):
        with pytest.raises(TypeError, match=r"r_max must be a number or a function of the number"):
            jax.jit(lambda s, f=schedule: renorm.batch_renorm(X, (None, None), s, r_max=f))(
                renorm.init_stats(2)
            )


@pytest.mark.slow
def test_traced_limits_have_one_number():
    for bad in jnp.ones(2), jnp.ones((), bool), jnp.ones((), jnp.complex64):
        with pytest.raises(TypeError, match=r"r_max must be a real number, one for all features"):
            jax.jit(lambda r: call(r_max=r, d_max=0.0))(bad)


@pytest.mark.parametrize(
    ("steps", "values", "match"),
    [
        ((5, 5), (1, 3), "steps must increase"),
        ((5, 4), (1, 3), "steps must increase"),
        ((5, 6), (1,), "one value for each step"),
        ((), (), "one value for each step"),
        ((-1, 6), (1, 2), "each of steps must be a number >= 0"),
        ((1, np.nan), (1, 2), "steps of a schedule must be a sequence of finite numbers"),
        ((1, 2), (1, np.inf), "values of a schedule must be a sequence of finite numbers"),
        (5, 3, "steps of a schedule must be a sequence"),
        (("a",), (3,), "steps of a schedule must be a sequence"),
    ],
)
def test_schedules_have_increasing_steps(steps, values, match):
    with pytest.raises(ValueError, match=match):
        renorm.piecewise_linear(steps, values)


def test_the_state_is_that_of_this_layer():
    params, stats = jbn.init_params(2), renorm.init_stats(2)
    for wrong in jbn.init_stats(2), tuple(stats), None, {"mean": 1}:
        with pytest.raises(TypeError, match=r"stats must be jbn.renorm.RenormStats\(mean, var"):
            renorm.batch_renorm(X, params, wrong)
    for steps in jnp.zeros(2, jnp.int32), jnp.float32(1), None:
        with pytest.raises(TypeError, match=r"stats.steps must be"):
            renorm.batch_renorm(X, params, stats._replace(steps=steps))
    _, new = renorm.batch_renorm(X, params, stats._replace(steps=3))
    assert new.steps == 4
    for missing in stats, stats.running:
        chex.assert_shape(renorm.batch_renorm_inference(X, params, missing), (4, 2))


def test_other_errors_are_those_of_batch_norm():
    with pytest.raises(ValueError, match="one value per channel"):
        renorm.batch_renorm(X[:1], jbn.init_params(2), renorm.init_stats(2))
    with pytest.raises(TypeError, match="x must be floating point"):
        renorm.batch_renorm(jnp.ones((4, 2), int), jbn.init_params(2), renorm.init_stats(2))
    with pytest.raises(ValueError, match=r"stats\.mean has shape"):
        renorm.batch_renorm(X, jbn.init_params(2), renorm.init_stats(3))
    with pytest.raises(ValueError, match="decay"):
        renorm.ema_of_std(2, epsilon=1e-3)
    with pytest.raises(ValueError, match="epsilon"):
        renorm.ema_of_std(epsilon=-1)
