"""Running statistics follow built-in and users' rules; batches without information never enter."""

import dataclasses
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbn
from jbn import training
from jbn._core import running
from tests import compiled, oracle, tolerance

pytestmark = pytest.mark.usefixtures("cheap_programs")

STEPS, ROWS, CHANNELS = 6, 9, 4
RULES = [
    (kind, decay, debias, unbiased)
    for kind, decay, debias in [
        ("ema", 0.9, False),
        ("ema", 0.9, True),
        ("ema", 0.5, True),
        ("ema", 0.999, True),
        ("ema", 0.0, False),
        ("cumulative", None, False),
    ]
    for unbiased in (False, True)
]


def rule_of(kind, decay, debias, unbiased):
    if kind == "cumulative":
        return jbn.cumulative(unbiased=unbiased)
    assert kind == "ema"
    return jbn.ema(decay, debias=debias, unbiased=unbiased)


def batches(steps=STEPS, rows=ROWS, offset=2.0):
    rng = np.random.default_rng(0)
    shape = (rows, CHANNELS)
    return [(offset + (1 + k) * rng.normal(size=shape)).astype(np.float32) for k in range(steps)]


def run(rule, xs, supports=None, stats=None):
    """Returns the statistics after every batch, by batch_norm."""
    stats = jbn.init_stats(CHANNELS) if stats is None else stats
    params, history = jbn.init_params(CHANNELS), []
    for x, support in zip(xs, supports or [{}] * len(xs), strict=True):
        _, stats = compiled.batch_norm(x, params, stats, update=rule, **support)
        history.append(stats)
    return history


def assert_stats(actual, expected, steps=STEPS, magnitude=None):
    for a, e in zip(actual[:2], expected[:2], strict=True):
        tolerance.assert_close(a, e, "float32", ROWS * steps, magnitude=magnitude)
    np.testing.assert_array_equal(actual.count, expected.count)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_step_is_the_weighted_sum_of_the_batches(rule):
    xs = batches()
    history = run(rule_of(*rule), xs)
    moments = [oracle.moments(x) for x in xs]
    for t, stats in enumerate(history, 1):
        assert_stats(stats, oracle.running(moments[:t], *rule[1:]))


@pytest.mark.parametrize("rule", [r for r in RULES if r[2] or r[1] in (None, 0.0)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_equal_batches_give_exactly_their_statistics_after_every_step(rule, offset):
    (x,) = batches(1, offset=offset)
    unbiased = rule[-1]
    history = run(rule_of(*rule), [x] * 5)
    m = oracle.moments(x)
    bessel = ROWS / (ROWS - 1) if unbiased else 1.0
    tolerance.assert_close(history[0].mean, m.mean, "float32", ROWS, ratio=offset)
    tolerance.assert_close(history[0].var, m.var * bessel, "float32", ROWS)
    for stats in history[1:]:
        chex.assert_trees_all_equal(stats[:2], history[0][:2])


def test_debias_holds_for_many_steps_and_slow_decays():
    # 1 - 0.9999^t, computed directly, loses half of its digits in float32.
    rule, stats = jbn.ema(0.9999, debias=True), jbn.init_stats(1)
    m = [oracle.Moments(np.array(4.0), np.array([k % 3]), np.array([1.0])) for k in range(50)]
    for moments in m:
        stats = jax.jit(rule)(stats, jbn.Moments(*(jnp.float32(v) for v in moments)))
    tolerance.assert_close(stats.mean, oracle.running(m, 0.9999, True).mean, "float32", 50)


def test_the_initial_statistics_are_those_of_standard_data():
    for features, shape in [(3, (3,)), ((2, 3), (2, 3)), ([4], (4,))]:
        stats, params = jbn.init_stats(features), jbn.init_params(features)
        expected = jbn.RunningStats(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(shape))
        chex.assert_trees_all_equal(stats, expected)
        chex.assert_trees_all_equal(params, jbn.Params(jnp.ones(shape), jnp.zeros(shape)))
        # The count has the mean's dtype, so that a pmean of the whole state keeps its types.
        chex.assert_type([*stats, *params], jnp.float32)


def test_initial_dtypes(x64):
    for dtype in (jnp.float32, jnp.float64):
        chex.assert_type([*jbn.init_stats(3, dtype), *jbn.init_params(3, dtype)], dtype)


def the_batch(stats, moments):
    """Forgets all but the last batch, as a user's rule; returns the batch's dtype."""
    return jbn.RunningStats(moments.mean, moments.var, stats.count + 1)


def halved(stats, dtype):
    """Casts mean and variance, as Flax layers do on request; the count stays in float32."""
    return stats._replace(mean=stats.mean.astype(dtype), var=stats.var.astype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_statistics_in_half_precision_are_averaged_and_counted_in_float32(dtype):
    # bfloat16 cannot hold 257, and would round 0.63 and each step of the average. Only the result
    # may be rounded.
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, 64)).astype(np.float32)
    stats = halved(jbn.init_stats(64), dtype)
    stats = stats._replace(mean=jnp.asarray(old, dtype), count=jnp.full(64, 256.0))
    moments = jbn.Moments(jnp.float32(4), jnp.asarray(new), jnp.ones(64))
    moved = jax.jit(jbn.ema(0.63))(stats, moments)
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, stats)
    expected = 0.63 * np.asarray(stats.mean, np.float64) + 0.37 * new
    tolerance.assert_close(moved.mean, expected, dtype, 1)
    np.testing.assert_array_equal(moved.count, 257)


def test_decay_is_the_weight_of_the_old_value():
    moments = jbn.Moments(jnp.float32(4), jnp.array([10.0]), jnp.array([2.0]))
    stats = jbn.ema(0.75)(jbn.init_stats(1), moments)
    chex.assert_trees_all_close(stats[:2], (jnp.array([2.5]), jnp.array([1.25])))


def test_a_rate_of_one_stores_exactly_the_new_value():
    stats = jbn.init_stats(3)._replace(mean=jnp.full(3, 1e10))
    new = jbn.ema(1e-9)(stats, jbn.Moments(jnp.float32(4), jnp.ones(3), jnp.ones(3)))
    np.testing.assert_array_equal(new.mean, 1)  # 1 - 1e-9 is 1 in float32


@pytest.mark.parametrize(
    "rule", [jbn.ema(0.9), jbn.ema(0.9, debias=True), jbn.cumulative()], ids=str
)
def test_rules_take_arrays_of_numpy(rule):
    stats, moments = jbn.init_stats(3), jbn.Moments(jnp.float32(4), jnp.ones(3), jnp.ones(3))
    of_numpy = jax.tree.map(np.asarray, (stats, moments))
    chex.assert_trees_all_equal(rule(*of_numpy), rule(stats, moments))


def test_the_unbiased_variance_knows_the_count_of_each_channel():
    moments = jbn.Moments(jnp.array([2.0, 5.0, 1.0, 0.5]), jnp.arange(4.0), jnp.full(4, 8.0))
    stats = jbn.cumulative(unbiased=True)(jbn.init_stats(4), moments)
    # The factor is n/(n-1). With fewer than two observations there is no unbiased variance, and the
    # channel keeps its old values.
    chex.assert_trees_all_close(stats.var, jnp.array([16.0, 10.0, 1.0, 1.0]))
    chex.assert_trees_all_close(stats.mean, jnp.array([0.0, 1.0, 0.0, 0.0]))
    np.testing.assert_array_equal(stats.count, [1, 1, 0, 0])


# --- batches that never enter ------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_channel_without_data_or_with_nan_stays_and_the_others_move(rule):
    xs = batches()
    xs[1][3, 0] = np.nan
    xs[2][3, 1] = np.inf
    xs[4][3, 0] = -np.inf
    ones = np.ones((ROWS, CHANNELS), bool)
    without_2 = ones.copy()
    without_2[:, 2] = False
    supports = [{"mask": m} for m in (ones, ones, ones, without_2, ones, ~ones)]
    history = run(rule_of(*rule), xs, supports)
    with np.errstate(invalid="ignore"):
        moments = [oracle.moments(x, **s) for x, s in zip(xs, supports, strict=True)]
    for t, stats in enumerate(history, 1):
        chex.assert_tree_all_finite(stats)
        assert_stats(stats, oracle.running(moments[:t], *rule[1:]))
    np.testing.assert_array_equal(history[-1].count, [3, 4, 4, 5])
    # The last batch is masked everywhere, so every channel keeps exactly its old values.
    chex.assert_trees_all_equal(history[-1], history[-2])


@pytest.mark.parametrize("kind", ["empty", "masked", "weightless", "nan"])
@pytest.mark.parametrize("rule", RULES[:4] + RULES[-2:], ids=str)
def test_a_batch_without_information_changes_nothing(rule, kind):
    before = run(rule_of(*rule), batches(2))[-1]
    x, support = batches(1)[0], {}
    if kind == "empty":
        x = x[:0]
    elif kind == "nan":
        x = np.full_like(x, np.nan)
    elif kind == "masked":
        support["mask"] = np.zeros((ROWS, 1), bool)
    else:
        support["weights"] = np.zeros((ROWS, 1), np.float32)
    (after,) = run(rule_of(*rule), [x], [support], stats=before)
    chex.assert_trees_all_equal(after, before)


@pytest.mark.parametrize("unbiased", [False, True])
def test_weights_below_one_in_total_have_no_unbiased_variance(unbiased):
    (x,) = batches(1)
    light = {"weights": np.full((ROWS, 1), 0.1, np.float32)}  # 0.9 in total
    (stats,) = run(jbn.ema(0.9, unbiased=unbiased), [x], [light])
    np.testing.assert_array_equal(stats.count, 0 if unbiased else 1)


def test_weights_that_add_up_to_one_have_no_unbiased_variance():
    # Rounding makes their sum 1 - 1e-7 or 1 + 1e-7; 1 / (sum - 1) can then be any large number.
    x = np.random.default_rng(1).normal(size=(32, 200)).astype(np.float32)
    w = np.random.default_rng(0).uniform(0.1, 1, size=(32, 200)).astype(np.float32)
    w /= w.sum(0)
    m = compiled.moments(x, weights=w)
    assert 20 < (np.asarray(m.count) > 1).sum() < 180  # both sums occur
    stats = jbn.init_stats(200)
    for rule in (jbn.ema(0.9, unbiased=True), jbn.cumulative(unbiased=True)):
        chex.assert_trees_all_equal(rule(stats, m), stats)
    two = compiled.moments(x, weights=2 * w)
    new = jbn.cumulative(unbiased=True)(stats, two)
    np.testing.assert_array_equal(new.count, 1)
    # 2 / (2 - 1) up to the rounding of the sum of 32 weights.
    np.testing.assert_allclose(new.var / two.var, 2, rtol=32 * tolerance.eps("float32"))


def test_the_unbiased_variance_is_bounded():
    m = jbn.Moments(jnp.linspace(0, 4, 401), jnp.zeros(401), jnp.ones(401))
    var = np.asarray(
        jbn.cumulative(unbiased=True)(jbn.init_stats(401)._replace(var=jnp.zeros(401)), m).var
    )
    assert var.max() == 3  # at a count of 1.5
    np.testing.assert_array_equal(var > 0, np.asarray(m.count) >= 1.5)
    assert (np.diff(var[150:]) < 0).all()


# --- a single value ----------------------------------------------------------------------------

SINGLE = np.arange(ROWS)[:, None] == 3


@pytest.mark.parametrize("rule", [r for r in RULES if not r[-1]], ids=str)
@pytest.mark.parametrize("by", ["mask", "weights"])
def test_a_single_value_moves_the_mean_and_not_the_variance(rule, by):
    first, x = batches(2)
    one = {by: SINGLE if by == "mask" else SINGLE.astype(np.float32)}
    before, after = run(rule_of(*rule), [first, x], [{}, one])
    assert (np.asarray(after.mean) != before.mean).all()
    chex.assert_trees_all_equal(after[1:], before[1:])
    # The next batch enters the variance as if there had been no single value before.
    (without,) = run(rule_of(*rule), [x], stats=before)
    (with_one,) = run(rule_of(*rule), [x], stats=after)
    chex.assert_trees_all_equal(with_one[1:], without[1:])


@pytest.mark.parametrize("rule", [jbn.ema(0.9, debias=True), jbn.cumulative()], ids=str)
def test_a_single_value_at_first_leaves_no_trace_of_the_initial_statistics(rule):
    x = batches(1)[0]
    one, all_of_it = run(rule, [x, x], [{"mask": SINGLE}, {}])
    np.testing.assert_array_equal(one.mean, x[3])
    np.testing.assert_array_equal(one[1:], [np.ones(CHANNELS), np.zeros(CHANNELS)])
    tolerance.assert_close(all_of_it.var, oracle.moments(x).var, "float32", ROWS)
    np.testing.assert_array_equal(all_of_it.count, 1)


def test_a_single_value_in_one_channel_alone():
    mask = np.ones((ROWS, CHANNELS), bool)
    mask[:, 1:2] = SINGLE
    for rule in (jbn.ema(0.5), largest_variance):
        x = batches(1)[0]
        (stats,) = run(rule, [x], [{"mask": mask}])
        np.testing.assert_array_equal(stats.count, [1, 0, 1, 1])
        assert stats.var[1] == 1
        assert stats.mean[1] != 0


def test_light_weights_on_many_values_have_a_variance():
    # These are several values, whatever the sum of their weights is.
    x = batches(1)[0]
    w = np.random.default_rng(0).uniform(0.1, 1, size=(ROWS, 1)).astype(np.float32)
    for total in (1e-3, 0.5, 1.0, 1.2, 40.0):
        (stats,) = run(jbn.ema(0.0), [x], [{"weights": w * np.float32(total / w.sum())}])
        tolerance.assert_close(stats.var, oracle.moments(x, weights=w).var, "float32", ROWS)
        np.testing.assert_array_equal(stats.count, 1)


@pytest.mark.parametrize("left", [1, 2])
def test_only_a_single_value_over_all_microbatches_leaves_the_variance(left):
    x, mask = batches(1, rows=8)[0], np.arange(8)[:, None] < left  # one in each microbatch

    def loss_fn(params, stats, batch):
        y, stats = jbn.batch_norm(batch["x"], params, stats, mask=batch["mask"])
        return (y**2).mean(), stats, {}

    step = jax.jit(training.make_train_step(loss_fn, optax.sgd(0.1), microbatches=2))
    state = training.init(jbn.init_params(CHANNELS), jbn.init_stats(CHANNELS), optax.sgd(0.1))
    new = step(state, {"x": x, "mask": mask})[0].stats
    m = oracle.moments(x[:left])
    tolerance.assert_close(new.mean, 0.01 * m.mean, "float32", 2)
    tolerance.assert_close(new.var, 1 if left == 1 else 0.99 + 0.01 * m.var, "float32", 2)
    np.testing.assert_array_equal(new.count, left - 1)


def test_a_constant_channel_has_a_variance_of_zero():
    (stats,) = run(jbn.ema(0.0), [np.ones((ROWS, CHANNELS), np.float32)])
    np.testing.assert_array_equal(stats.var, 0)


# --- the dtype that statistics are stored in ---------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_batch_makes_statistics_in_half_precision_infinite(dtype):
    # The largest finite value of the dtype, and a value that is finite in float32 but not in it.
    largest = float(jnp.finfo(dtype).max)
    below, above = largest, float(np.float32(largest) * np.float32(1.0 + 2.0**-8))
    assert np.isfinite(np.float32(above))
    assert jnp.isinf(jnp.float32(above).astype(dtype))
    old = halved(jbn.init_stats(4), dtype)
    mean, var = jnp.array([0.0, 0.0, above, -above]), jnp.array([below, above, 1.0, 1.0])
    for rule in (jbn.ema(0.0), jbn.cumulative(), the_batch):
        new = running.absorb(rule, old, jbn.Moments(jnp.float32(4), mean, var))
        chex.assert_trees_all_equal_shapes_and_dtypes(new, old)
        np.testing.assert_array_equal(new.count, [1, 0, 0, 0])
        chex.assert_trees_all_equal(*(jax.tree.map(lambda v: v[1:], s) for s in (new, old)))
        assert float(new.var[0]) == below


def test_no_float64_batch_makes_float32_statistics_infinite(x64):
    # The variances 1e40 and 1e50 are finite in float64 only.
    x = np.random.default_rng(0).normal(size=(ROWS, CHANNELS)) * np.array([1, 1e20, 1, 1e25])
    params, stats = jbn.init_params(CHANNELS), jbn.init_stats(CHANNELS)
    for rule in (jbn.ema(0.9), jbn.cumulative(), the_batch):
        _, new = compiled.batch_norm(x, params, stats, update=rule)
        chex.assert_tree_all_finite(new)
        np.testing.assert_array_equal(new.count, [1, 0, 1, 0])
        np.testing.assert_array_equal(new.var[1::2], 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_training_keeps_no_statistics_below_float32(dtype):
    x = batches(1)[0]
    stats = jbn.init_stats(CHANNELS)
    for field in stats._fields:
        narrow = stats._replace(**{field: getattr(stats, field).astype(dtype)})
        with pytest.raises(TypeError, match=rf"stats\.{field} is {dtype}.*astype\(jnp.float32\)"):
            jbn.batch_norm(x, jbn.init_params(CHANNELS), narrow)
    with pytest.raises(TypeError, match=rf"dtype is {dtype}.*float32"):
        jbn.init_stats(4, dtype)


def test_inference_takes_statistics_of_half_precision_and_computes_in_float32():
    # epsilon is 1e-8, which is 0 in float16.
    x = batches(1)[0]
    stats = jbn.init_stats(CHANNELS)._replace(var=jnp.array([1e-7, 1e-3, 1.0, 3e4]))
    stats = halved(stats, "float16")
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), stats)
    args = x, jbn.init_params(CHANNELS)
    y, expected = (compiled.batch_norm_inference(*args, s, epsilon=1e-8) for s in (stats, wide))
    chex.assert_trees_all_equal(y, expected)


def test_an_integer_count_is_a_count():
    # PyTorch's num_batches_tracked is an integer, too.
    x = batches(1)[0]
    stats = jbn.init_stats(CHANNELS)
    of_integers = stats._replace(count=jnp.full(CHANNELS, 3))
    of_floats = stats._replace(count=jnp.full(CHANNELS, 3.0))
    for rule in (jbn.ema(0.9, debias=True), jbn.cumulative()):
        (new,), (expected,) = (run(rule, [x], stats=s) for s in (of_integers, of_floats))
        chex.assert_trees_all_equal(new[:2], expected[:2])
        np.testing.assert_array_equal(new.count, np.full(CHANNELS, 4, np.int32))
        assert new.count.dtype == jnp.int32


# --- rules -------------------------------------------------------------------------------------


def test_rules_compare_hash_and_pickle_by_value():
    for make in (
        lambda: jbn.ema(0.9),
        lambda: jbn.ema(0.9, debias=True),
        lambda: jbn.ema(0.9, unbiased=True),
        lambda: jbn.cumulative(),
        lambda: jbn.cumulative(unbiased=True),
    ):
        rule = make()
        assert rule == make()
        assert rule is not make()
        assert hash(rule) == hash(make())
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert dataclasses.is_dataclass(rule)
    assert jbn.ema(0.9) != jbn.ema(0.99)
    assert jbn.ema(0.9) != jbn.ema(0.9, debias=True)
    assert jbn.ema(0.9) != jbn.ema(0.9, unbiased=True)
    assert jbn.cumulative() != jbn.cumulative(unbiased=True)
    assert "0.9" in repr(jbn.ema(0.9))
    assert "debias=True" in repr(jbn.ema(0.9, debias=True))


def test_the_default_is_ema_of_099():
    assert jbn.ema() == jbn.ema(0.99)
    (x,) = batches(1)
    params, stats = jbn.init_params(CHANNELS), jbn.init_stats(CHANNELS)
    default = jax.jit(jbn.batch_norm)(x, params, stats)
    given = compiled.batch_norm(x, params, stats, update=jbn.ema(0.99))
    chex.assert_trees_all_close(default, given)


def largest_variance(stats, moments):
    """Keeps the largest variance, as the plainest form of a user's rule."""
    return jbn.RunningStats(
        moments.mean, jnp.maximum(stats.var, moments.var), stats.count + jnp.ones_like(stats.count)
    )


def test_batch_norm_applies_a_users_rule():
    xs = batches()
    stats = run(largest_variance, xs)[-1]
    moments = [oracle.moments(x) for x in xs]
    tolerance.assert_close(stats.mean, moments[-1].mean, "float32", ROWS)
    largest = np.max([[1.0] * CHANNELS, *(m.var for m in moments)], axis=0)
    tolerance.assert_close(stats.var, largest, "float32", ROWS)


@pytest.mark.parametrize("kind", ["masked", "nan"])
def test_the_result_of_a_users_rule_is_checked_too(kind):
    (x,) = batches(1)
    mask = np.ones((ROWS, CHANNELS), bool)
    if kind == "nan":
        x[2, 1] = np.nan
    else:
        mask[:, 1] = False
    (stats,) = run(largest_variance, [x], [{"mask": mask}])
    np.testing.assert_array_equal(stats.count, [1, 0, 1, 1])
    assert stats.mean[1] == 0
    assert stats.var[1] == 1


def test_a_rule_of_a_user_keeps_the_types(x64):
    # A rule that computes in float64 by accident must not change what the next step traces.
    def careless(stats, moments):
        return jbn.RunningStats(
            *(jnp.asarray(v, jnp.float64) for v in largest_variance(stats, moments))
        )

    (x,) = batches(1)
    stats = jbn.init_stats(CHANNELS)
    _, new = compiled.batch_norm(x, jbn.init_params(CHANNELS), stats, update=careless)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, stats)


@pytest.mark.parametrize(
    "update",
    [jbn.ema(0.9), jbn.cumulative(), largest_variance],
    ids=lambda rule: type(rule).__name__,
)
def test_the_statistics_carry_no_gradient(update):
    (x,) = batches(1)
    params = jbn.init_params(CHANNELS)
    mean, var, count = jbn.init_stats(CHANNELS)

    @jax.jit
    def gradient(x, mean, var):
        def total(x, mean, var):
            stats = jbn.RunningStats(mean, var, count)
            _, new = jbn.batch_norm(x, params, stats, update=update)
            return (x[0] * new.mean).sum() + (x[1] * new.var).sum()

        return jax.grad(total, argnums=(0, 1, 2))(x, mean, var)

    dx, dmean, dvar = gradient(x, mean, var)
    np.testing.assert_array_equal(dx[2:], 0)  # `total` itself uses rows 0 and 1
    np.testing.assert_array_equal([dmean, dvar], 0)


def test_a_traced_decay_gives_the_same_statistics():
    moments = jbn.moments(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32))
    for debias in (False, True):
        traced = jax.jit(lambda d, b=debias: jbn.ema(d, debias=b)(jbn.init_stats(3), moments))(0.9)
        chex.assert_trees_all_close(traced, jbn.ema(0.9, debias=debias)(jbn.init_stats(3), moments))


def test_results_of_a_users_rule_are_broadcast_or_refused():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    params, stats = jbn.init_params(3), jbn.init_stats(3)

    def after(rule):
        return jbn.batch_norm(x, params, stats, update=rule)[1]

    chex.assert_trees_all_equal(  # numbers stand for all features
        after(lambda s, m: jbn.RunningStats(1.0, 2.0, 3)),
        jbn.RunningStats(*jnp.ones((3, 3)) * jnp.array([[1.0], [2], [3]])),
    )
    for bad in ({"count": np.nan}, {"var": -1.0}, {"mean": np.inf}):
        chex.assert_trees_all_equal(after(lambda s, m, b=bad: s._replace(**b)), stats)
    with pytest.raises(TypeError, match=r"returned mean in complex64.*expected float32"):
        after(lambda s, m: s._replace(mean=jax.lax.complex(s.mean, s.mean)))
    with pytest.raises(ValueError, match=r"mean of shape \(3, 4\); expected \(3,\)"):
        after(lambda s, m: s._replace(mean=jnp.ones((3, 4))))


def test_rules_show_how_they_were_made():
    assert repr(jbn.ema(0.9, debias=True)) == "ema(0.9, debias=True, unbiased=False)"
    assert repr(jbn.cumulative()) == "cumulative(unbiased=False)"
