"""Whitening is that of the float64 oracle, with every derivative."""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
import jbn.population
from jbn.training import init, make_train_step
from jbn.whitening import (
    WhiteningStats,
    init_stats,
    newton_schulz,
    whiten,
    whiten_inference,
    zca,
)
from tests import oracle, tolerance

pytestmark = pytest.mark.usefixtures("one_device", "cheap_programs")

NONE = jbn.Params(None, None)
KEEP = jbn.cumulative()  # the first batch replaces the initial statistics


def data(shape, seed=0, offset=0.0, dtype="float32"):
    """Makes features that are correlated, with a covariance of condition 10 to 30."""
    rng = np.random.default_rng(seed)
    mix = np.eye(shape[-1]) + 0.5 * rng.normal(size=(shape[-1],) * 2) / math.sqrt(shape[-1])
    return (rng.normal(size=shape) @ mix + offset).astype(dtype)


def run(x, group_size=None, params=NONE, axis=-1, **options):
    """Returns y and the statistics of the batch."""
    features, _ = oracle.axes(np.ndim(x), axis)
    stats = init_stats([x.shape[i] for i in features], group_size=group_size)
    call = functools.partial(whiten, group_size=group_size, axis=axis, update=KEEP, **options)
    return jax.jit(call)(x, params, stats)


def assert_close(actual, desired, dtype, n, condition=30.0, ratio=0.0):
    """Compares; W multiplies the rounding errors of the covariance by its condition number."""
    magnitude = condition * max(1.0, float(np.abs(desired).max()))
    tolerance.assert_close(actual, desired, dtype, n, magnitude=magnitude, ratio=ratio)


# --- The transform -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("group_size", [None, 1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "axis"), [((40, 6), -1), ((8, 6, 5), 1), ((2, 7, 3, 4), (0, 2))], ids=str
)
def test_y_and_statistics_against_the_oracle(shape, axis, group_size, dtype):
    x = data(shape, offset=3.0).astype(jnp.dtype(dtype))
    features, _ = oracle.axes(x.ndim, axis)
    rng = np.random.default_rng(1)
    scale, bias = rng.normal(size=(2, *(shape[i] for i in features))).astype(np.float32)
    y, stats = run(x, group_size, jbn.Params(scale, bias), axis, epsilon=1e-3)
    wide = np.asarray(x, np.float64)
    flat = {"scale": scale.reshape(-1), "bias": bias.reshape(-1)}
    expected = oracle.whiten(wide, **flat, group_size=group_size, axis=axis, epsilon=1e-3)
    own = oracle.covariance(wide, group_size, axis)
    n = x.size // scale.size
    chex.assert_type([y, *stats], [dtype, *["float32"] * 3])
    assert_close(y, expected, dtype, n, ratio=3.0)
    assert_close(stats.mean.reshape(-1), own.mean, "float32", n)
    assert_close(stats.cov, own.cov, "float32", n)
    np.testing.assert_array_equal(stats.count, 1)


@pytest.mark.parametrize("group_size", [None, 1, 2, 4])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_the_output_is_uncorrelated_with_unit_variance_at_any_offset(offset, group_size):
    x = data((512, 8), offset=offset)
    y, stats = run(x, group_size, epsilon=0.0)
    found, exact = oracle.covariance(np.asarray(y), group_size), oracle.covariance(x, group_size)
    # The shift is exact, so the offset adds no error. The mean of x is rounded as a float32.
    assert_close(
        found.cov, np.broadcast_to(np.eye(group_size or 8), found.cov.shape), "float32", 512
    )
    assert_close(found.mean, np.zeros(8), "float32", 512)
    assert_close(stats.cov, exact.cov, "float32", 512, condition=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("support", ["none", "mask", "weights"])
def test_groups_of_one_feature_are_batch_normalization(support):
    rng = np.random.default_rng(2)
    x, dy = data((16, 4, 5), offset=100.0), rng.normal(size=(16, 4, 5)).astype(np.float32)
    params = jbn.Params(*rng.normal(size=(2, 5)).astype(np.float32))
    given = {
        "none": {},
        "mask": {"mask": rng.random((16, 4, 1)) < 0.7},
        "weights": {"weights": rng.random((16, 1, 1)).astype(np.float32)},
    }[support]

    def both(x, params):
        y, stats = whiten(x, params, init_stats(5, group_size=1), group_size=1, **given)
        return y, stats.mean, stats.cov.reshape(5), stats.count

    def norm(x, params):
        y, stats = jbn.batch_norm(x, params, jbn.init_stats(5), **given)
        return y, *stats

    outputs = []
    for f in (both, norm):
        y, pull, rest = jax.vjp(lambda *a, f=f: (f(*a)[0], f(*a)[1:]), x, params, has_aux=True)
        outputs.append((y, pull(dy), rest))
    # Sums of 64 values and of dy, and derivatives in x of order 1.
    chex.assert_trees_all_close(*outputs, rtol=1e-5, atol=64 * tolerance.eps("float32"))


def test_zca_changes_x_least_of_all_whitenings():
    x = data((300, 5), seed=3)
    y, _ = run(x, epsilon=0.0)
    own = oracle.covariance(x)
    centred = x - own.mean
    values, vectors = np.linalg.eigh(own.cov[0])
    pca = centred @ vectors / np.sqrt(values)
    rng = np.random.default_rng(4)
    rotations = [np.linalg.qr(rng.normal(size=(5, 5)))[0] for _ in range(20)]
    small = [np.linalg.qr(np.eye(5) + 0.05 * rng.normal(size=(5, 5)))[0] for _ in range(20)]
    small = [q * np.sign(np.diagonal(q)) for q in small]

    def distance(y):
        return ((y - centred) ** 2).sum()

    least = distance(np.asarray(y, np.float64))
    others = [pca, *(np.asarray(y, np.float64) @ q for q in (*rotations, *small))]
    for other in others:  # each of them is a whitening
        np.testing.assert_allclose(oracle.covariance(other).cov[0], np.eye(5), atol=1e-5)
    assert all(distance(other) > 1.0001 * least for other in others)


@pytest.mark.slow
def test_permuting_examples_and_features_permutes_y():
    x, rng = data((32, 6), seed=5), np.random.default_rng(6)
    rows, features = rng.permutation(32), rng.permutation(6)
    y, stats = run(x)
    again, permuted = run(x[rows][:, features])
    assert_close(again, np.asarray(y, np.float64)[rows][:, features], "float32", 32)
    cov = np.asarray(stats.cov, np.float64)[:, features][:, :, features]
    assert_close(permuted.cov, cov, "float32", 32)


def test_newton_schulz_is_the_printed_algorithm(x64):
    cov = jnp.asarray(oracle.covariance(data((64, 6), dtype="float64")).cov)
    for iterations in (1, 2, 5, 8):
        found = newton_schulz(iterations)(cov, 1e-3)[0]
        expected = oracle.newton_schulz(np.asarray(cov)[0], 1e-3, iterations)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_newton_schulz_comes_close_to_zca():
    x = data((256, 16))
    exact = np.asarray(run(x)[0], np.float64)
    errors = [
        np.abs(np.asarray(run(x, method=newton_schulz(t))[0], np.float64) - exact).max()
        for t in (1, 3, 5, 9, 15, 40)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3] > errors[4]
    # It stays where it is: without iterating P and its root together it would be NaN.
    assert_close(errors[4:], np.zeros(2), "float32", 256)


@pytest.mark.slow
def test_the_documented_variance_that_newton_schulz_leaves():
    shares = np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256, 1e-3, 1e-4])
    table = {  # of the docstring of newton_schulz
        5: [1.000, 0.966, 0.586, 0.201, 0.056, 0.006],
        7: [1.000, 1.000, 0.983, 0.668, 0.251, 0.029],
        10: [1.000, 1.000, 1.000, 1.000, 0.952, 0.280],
        15: [1.000, 1.000, 1.000, 1.000, 1.000, 1.000],
    }
    for share, column in zip(shares, zip(*table.values(), strict=True), strict=True):
        cov = jnp.diag(jnp.asarray([share, 1 - share], jnp.float32))
        left = [share * float(newton_schulz(t)(cov, 0.0)[0, 0]) ** 2 for t in table]
        np.testing.assert_allclose(left, column, atol=6e-4)


# --- Derivatives -------------------------------------------------------------------------------


def differences(f, h):
    """Returns the derivatives of f at 0 of orders 1 to 3, by central differences of order h^6."""
    at = {k: f(k * h) for k in range(-4, 5)}
    one = [-1 / 60, 3 / 20, -3 / 4, 0, 3 / 4, -3 / 20, 1 / 60]
    two = [1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90]
    three = [-7 / 240, 3 / 10, -169 / 120, 61 / 30, 0, -61 / 30, 169 / 120, -3 / 10, 7 / 240]
    sums = (sum(c * at[i - len(row) // 2] for i, c in enumerate(row)) for row in (one, two, three))
    return [s / h**k for k, s in enumerate(sums, 1)]


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


DERIVATIVES = {
    "full rank": (data((12, 4), dtype="float64"), {}, 1e-3),
    "groups": (data((12, 4), dtype="float64", offset=5.0), {"group_size": 2}, 1e-3),
    "equal eigenvalues": (2.0 * hadamard(8)[:, 1:5], {}, 1e-3),
    "fewer examples than features": (data((3, 5), dtype="float64"), {}, 0.1),
    "a constant feature": (data((9, 3), dtype="float64") * [1.0, 0.0, 1.0] + 7, {}, 0.1),
    "all constant": (np.full((6, 3), 7.0), {}, 0.1),
    "mask": (
        data((12, 4), dtype="float64"),
        {"mask": np.arange(12)[:, None] % 3 > 0, "group_size": 2},
        1e-3,
    ),
    "weights": (data((12, 4), dtype="float64"), {"weights": np.linspace(0, 2, 12)[:, None]}, 1e-3),
}
METHODS = {"zca": (zca(), oracle.zca), "newton_schulz": (newton_schulz(5), None)}


# A third derivative takes seconds to compile.
RARE = ("groups", "a constant feature", "all constant", "weights", "mask")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in RARE else ()) for c in DERIVATIVES]
)
def test_derivatives_of_orders_one_to_three_against_float64(case, method, x64):
    x, options, epsilon = DERIVATIVES[case]
    ours, plain = METHODS[method]
    plain = plain or functools.partial(oracle.newton_schulz, iterations=5)
    rng = np.random.default_rng(7)
    cotangent, v = rng.normal(size=(2, *x.shape))
    stats = init_stats(x.shape[1], group_size=options.get("group_size"), dtype=jnp.float64)

    def value(t):
        y, _ = whiten(
            x + t * v, NONE, stats, method=ours, epsilon=epsilon, dtype=jnp.float64, **options
        )
        return (cotangent * jnp.sin(y)).sum()

    def expected(t):
        y = oracle.whiten(x + t * v, method=plain, epsilon=epsilon, **options)
        return (cotangent * np.sin(y)).sum()

    first = jax.grad(value)
    second = jax.grad(first)
    third = jax.grad(second)
    found = jax.jit(lambda t: (first(t), second(t), third(t)))(0.0)
    # With epsilon = 0.1 the root varies over sqrt(0.1); the others over 1.
    for k, (a, b) in enumerate(zip(found, differences(expected, 3e-3), strict=True)):
        np.testing.assert_allclose(a, b, rtol=1e-4 * 10**k, atol=1e-5 * 10**k)


@pytest.mark.slow
def test_forward_and_reverse_mode_agree(x64):
    x = data((7, 3), dtype="float64")

    def value(x):
        stats = init_stats(3, dtype=jnp.float64)
        return (jnp.cos(jnp.arange(21.0)).reshape(7, 3) * whiten(x, NONE, stats)[0]).sum()

    hessian = jax.jit(jax.jacfwd(jax.jacrev(value)))(x)
    assert np.abs(hessian).max() > 0.01
    for other in (jax.jacrev(jax.jacfwd(value)), jax.jacrev(jax.jacrev(value))):
        np.testing.assert_allclose(jax.jit(other)(x), hessian, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
@pytest.mark.parametrize("method", [zca(), newton_schulz(5)], ids=str)
@pytest.mark.parametrize("kind", ["zeros", "constant", "constant feature", "few", "one direction"])
def test_y_and_gradient_are_finite_without_variance(kind, method, epsilon):
    x = {
        "zeros": np.zeros((8, 4), np.float32),
        "constant": np.full((8, 4), -33333.3, np.float32),
        "constant feature": data((8, 4)) * np.float32([1, 0, 1, 1]) + np.float32(5),
        "few": data((3, 6)),
        "one direction": data((8, 1)) * np.float32([1, 2, 3, 4]),
    }[kind]
    dy = np.random.default_rng(8).normal(size=x.shape).astype(np.float32)
    bias = np.arange(x.shape[1], dtype=np.float32)
    f = lambda x: run(x, params=jbn.Params(None, bias), method=method, epsilon=epsilon)  # noqa: E731
    y, pull, stats = jax.vjp(f, x, has_aux=True)
    chex.assert_tree_all_finite((y, pull(dy)))
    if kind in ("zeros", "constant"):
        np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    if kind == "constant feature":
        # Rounding errors of the others, multiplied by up to 1 / sqrt(epsilon).
        assert_close(np.asarray(y)[:, 1], np.ones(8), "float32", 8, condition=316.0)
    if kind == "few" and epsilon == 0 and method == zca():
        # Whitened in the two directions that three examples have, 0 in the other four.
        values = np.linalg.eigvalsh(oracle.covariance(np.asarray(y)).cov[0])
        np.testing.assert_allclose(values, [0, 0, 0, 0, 1, 1], atol=1e-4)
        rates = np.linalg.eigvalsh(method(stats.cov, epsilon)[0])
        np.testing.assert_allclose(rates[:4], 0, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_at_equal_eigenvalues_is_that_beside_them():
    x = (2.0 * hadamard(16)[:, 1:6]).astype(np.float32)  # its covariance is 4 I
    dy = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    gradient = jax.jit(lambda x: jax.vjp(lambda x: run(x)[0], x)[1](dy)[0])
    near = x + np.float32(1e-4) * data(x.shape)
    np.testing.assert_allclose(gradient(x), gradient(near), atol=1e-3)


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_float32_keeps_its_digits_with_fewer_examples_than_features(size, x64):
    # W is up to 316 along 49 directions in which x has nothing. Multiplied out, dW = -W dS W makes
    # an error of 2 % at size 1. Without a bound for eigenvalues that are rounding errors, y is off
    # by 2 % at size 100, and the gradient by much more.
    rng = np.random.default_rng(18)
    x, dy = (rng.normal(size=(2, 16, 64)) * [[[size]], [[1.0]]]).astype(np.float32)

    @jax.jit
    def outputs(x, dy):
        stats = init_stats(64, dtype=x.dtype)
        y, pull = jax.vjp(lambda x: whiten(x, NONE, stats)[0], x)
        return y, pull(dy)[0]

    exact = outputs(x.astype(np.float64), dy.astype(np.float64))
    for found, expected in zip(outputs(x, dy), exact, strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_the_backward_pass_keeps_x_and_matrices():
    x = jnp.asarray(data((64, 6)), jnp.bfloat16)
    params = jbn.init_params(6)

    def f(x, params):
        return whiten(x, params, init_stats(6, group_size=3), group_size=3, activation=nn.relu)[0]

    kept = jax.tree.leaves(jax.jit(lambda *a: jax.vjp(f, *a)[1])(x, params))
    large = [a for a in kept if a.size > 36]
    assert [(a.dtype, a.size) for a in large] == [(jnp.bfloat16, x.size)]


# --- Masks and weights -------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [np.nan, np.inf])
@pytest.mark.parametrize("group_size", [None, 2])
def test_masked_values_take_no_part(group_size, junk):
    rng = np.random.default_rng(10)
    mask = rng.random((8, 5, 1)) < 0.6
    x, dy = data((8, 5, 4)), rng.normal(size=(8, 5, 4)).astype(np.float32) * mask
    dirty = np.where(mask, x, np.float32(junk))
    params = jbn.Params(*rng.normal(size=(2, 4)).astype(np.float32))

    @jax.jit
    def outputs(x):
        f = functools.partial(run, group_size=group_size, mask=mask)
        y, pull, stats = jax.vjp(lambda x, p: f(x, params=p), x, params, has_aux=True)
        return y, stats, pull(dy)

    (y, stats, grads), clean = outputs(dirty), outputs(x)
    expected = oracle.whiten(dirty.astype(np.float64), *params, group_size=group_size, mask=mask)
    assert_close(y, expected, "float32", 40)
    chex.assert_trees_all_close((stats, grads), clean[1:], rtol=1e-5, atol=1e-6)
    # Masked values that are finite are whitened by the statistics of the others.
    expected = oracle.whiten(x.astype(np.float64), *params, group_size=group_size, mask=mask)
    assert_close(clean[0], expected, "float32", 40)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 1e30])
def test_weights_against_the_oracle(factor):
    weights = np.float32(factor) * np.random.default_rng(11).random((30, 1)).astype(np.float32)
    weights[:5] = 0
    x = data((30, 4))
    y, stats = run(x, weights=weights)
    own = oracle.covariance(x, weights=weights)
    assert_close(stats.cov, own.cov, "float32", 30)
    assert_close(y, oracle.whiten(x.astype(np.float64), weights=weights), "float32", 30)


@pytest.mark.slow
def test_integer_weights_repeat_examples():
    x, times = data((10, 3)), np.random.default_rng(12).integers(0, 4, 10)
    repeated, _ = run(np.repeat(x, times, 0))
    weighted, _ = run(x, weights=times.astype(np.float32)[:, None])
    assert_close(repeated, np.repeat(np.asarray(weighted, np.float64), times, 0), "float32", 30)


# --- Running statistics and inference ----------------------------------------------------------


@pytest.mark.parametrize("unbiased", [False, True])
def test_updates_follow_the_rules_of_the_core(unbiased):
    batches = [data((9, 4), seed=s, offset=s) for s in range(3)]
    for rule, shares in (
        (jbn.ema(0.9, unbiased=unbiased), [0.081, 0.09, 0.1]),
        (jbn.ema(0.9, debias=True, unbiased=unbiased), np.array([0.081, 0.09, 0.1]) / 0.271),
        (jbn.cumulative(unbiased=unbiased), [1 / 3] * 3),
    ):
        stats = init_stats(4, group_size=2)
        for x in batches:
            stats = whiten(x, NONE, stats, group_size=2, update=rule)[1]
        own = [oracle.covariance(x.astype(np.float64), 2) for x in batches]
        factor = 9 / 8 if unbiased else 1.0
        cov = sum(p * factor * m.cov for p, m in zip(shares, own, strict=True))
        cov = cov + (1 - sum(shares)) * np.eye(2)
        mean = sum(p * m.mean for p, m in zip(shares, own, strict=True))
        assert_close(stats.cov, cov, "float32", 9)
        assert_close(stats.mean, mean, "float32", 9)
        np.testing.assert_array_equal(stats.count, [3, 3])


def test_a_group_that_is_not_finite_keeps_its_statistics():
    x = data((8, 4))
    x[2, 1] = np.nan
    old = WhiteningStats(jnp.arange(4.0), jnp.full((2, 2, 2), 2.0), jnp.float32([3, 3]))
    y, stats = whiten(x, NONE, old, group_size=2)
    for new, before in zip(stats, old, strict=True):
        before = np.split(np.asarray(before), 2)
        first, second = np.split(np.asarray(new), 2)
        np.testing.assert_array_equal(first, before[0])
        assert (second != before[1]).any()
    assert np.isnan(np.asarray(y)[:, :2]).all()
    assert np.isfinite(np.asarray(y)[:, 2:]).all()


@pytest.mark.slow
def test_a_batch_without_data_or_of_one_example():
    x, old = data((8, 4)), init_stats(4)._replace(mean=jnp.arange(4.0), count=jnp.ones(1))
    bias = np.float32([1, 2, 3, 4])
    y, stats = whiten(x, jbn.Params(None, bias), old, mask=np.zeros((8, 1), bool))
    chex.assert_trees_all_equal(stats, old)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    one = np.arange(8)[:, None] == 3
    _, stats = whiten(x, NONE, old, mask=one, update=jbn.ema(0.0))
    chex.assert_trees_all_equal(stats, old._replace(mean=jnp.asarray(x[3])))


@pytest.mark.slow
def test_a_rule_of_the_user():
    def keep_largest(stats, moments):
        return stats._replace(
            mean=moments.mean, var=jnp.maximum(stats.var, moments.var), count=stats.count + 1
        )

    x = data((16, 4))
    _, stats = whiten(x, NONE, init_stats(4, group_size=2), group_size=2, update=keep_largest)
    own = oracle.covariance(x, 2)
    assert_close(stats.cov, np.maximum(own.cov, np.eye(2)), "float32", 16)
    assert_close(stats.mean, own.mean, "float32", 16)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("method", [zca(), newton_schulz(5)], ids=str)
def test_inference_is_training_by_the_statistics(axis, method):
    x = data((16, 6, 6))
    params = jbn.Params(*np.random.default_rng(15).normal(size=(2, 6)).astype(np.float32))
    options = {"method": method, "axis": axis, "activation": jnp.tanh}
    y, stats = run(x, 3, params, residual=x, **options)
    again = whiten_inference(x, params, stats, residual=x, **options)
    assert_close(again, np.asarray(y, np.float64), "float32", 96)
    # One by one.
    single = whiten_inference(x[:1], params, stats, residual=x[:1], **options)
    assert_close(single, np.asarray(again, np.float64)[:1], "float32", 1)


@pytest.mark.slow
def test_inference_is_differentiable_in_its_statistics_and_can_be_exported():
    x, params = data((4, 6)), jbn.init_params(6)
    _, stats = run(data((32, 6)), 3)
    grads = jax.grad(lambda *a: jnp.sin(whiten_inference(*a)).sum(), argnums=(0, 1, 2))(
        x, params, stats
    )
    chex.assert_tree_all_finite(grads)
    assert all(np.abs(g).max() > 0.01 for g in (grads[0], *grads[1], *grads[2][:2]))
    rows = jax.export.symbolic_shape("n, 6")
    f = jax.jit(lambda x: whiten_inference(x, params, stats))
    exported = jax.export.export(f)(jax.ShapeDtypeStruct(rows, jnp.float32))
    np.testing.assert_allclose(
        jax.export.deserialize(exported.serialize()).call(x), f(x), rtol=1e-6, atol=1e-6
    )


# --- Affine, activation, composition -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [None, 2])
def test_a_coloring_matrix(group_size):
    rng = np.random.default_rng(16)
    x, dy = data((32, 4)), rng.normal(size=(32, 4)).astype(np.float32)
    coloring, bias = rng.normal(size=(4, 4)).astype(np.float32), np.arange(4, dtype=np.float32)
    f = lambda *p: run(x, group_size, jbn.Params(*p))[0]  # noqa: E731
    y, pull = jax.vjp(f, coloring, bias)
    xhat = oracle.whiten(x.astype(np.float64), group_size=group_size)
    assert_close(y, xhat @ coloring.T + bias, "float32", 32)
    dcoloring, dbias = pull(dy)
    assert_close(dcoloring, dy.T @ xhat, "float32", 32)
    assert_close(dbias, dy.sum(0), "float32", 32)
    masked = run(x, group_size, jbn.Params(coloring, bias), mask=np.ones((32, 1), bool))[0]
    assert_close(masked, np.asarray(y, np.float64), "float32", 32)


@pytest.mark.slow
def test_scale_bias_activation_and_residual():
    rng = np.random.default_rng(17)
    x, residual = data((32, 4)), rng.normal(size=(32, 4)).astype(np.float32)
    scale, bias, dy = (rng.normal(size=s).astype(np.float32) for s in (4, 4, (32, 4)))

    def f(scale, bias, residual):
        params = jbn.Params(scale, bias)
        return run(x, 2, params, activation=jnp.tanh, residual=residual)[0]

    y, pull = jax.vjp(f, scale, bias, residual)
    xhat = oracle.whiten(x.astype(np.float64), group_size=2)
    expected = np.tanh(scale * xhat + bias + residual)
    assert_close(y, expected, "float32", 32)
    along = dy * (1 - expected**2)
    grads = (along * xhat).sum(0), along.sum(0), along
    for found, exact in zip(pull(dy), grads, strict=True):
        assert_close(found, exact, "float32", 32)


@pytest.mark.slow
def test_vmap_scan_and_remat():
    xs = np.stack([data((16, 4), seed=s) for s in range(3)])
    stats = init_stats(4, group_size=2)
    step = functools.partial(whiten, group_size=2, update=jbn.ema(0.9))
    each = jax.vmap(lambda x: step(x, NONE, stats))(xs)
    for i, x in enumerate(xs):
        alone = step(x, NONE, stats)
        got = jax.tree.map(lambda v, i=i: v[i], each)
        chex.assert_trees_all_close(got, alone, rtol=1e-5, atol=1e-5)
    last, _ = jax.lax.scan(lambda s, x: step(x, NONE, s)[::-1], stats, xs)
    expected = stats
    for x in xs:
        _, expected = step(x, NONE, expected)
    chex.assert_trees_all_close(last, expected, rtol=1e-5, atol=1e-6)
    loss = lambda x: jnp.sin(step(x, NONE, stats)[0]).sum()  # noqa: E731
    chex.assert_trees_all_close(
        jax.grad(jax.checkpoint(loss))(xs[0]), jax.grad(loss)(xs[0]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_the_method_of_a_user():
    def cholesky(cov, epsilon):
        eye = jnp.eye(cov.shape[-1])
        return jnp.linalg.inv(jnp.linalg.cholesky(cov + epsilon * eye[None]))

    y, _ = run(data((64, 4)), 2, method=cholesky, epsilon=0.0)
    found = oracle.covariance(np.asarray(y), 2).cov
    assert_close(found, np.stack([np.eye(2)] * 2), "float32", 64)


# --- Errors ------------------------------------------------------------------------------------


def fails(error, call, *words):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert str(word) in str(caught.value), f"{word!r} is not in: {caught.value}"


def train(x=None, params=NONE, stats=None, **options):
    x = data((8, 6)) if x is None else x
    return lambda: whiten(x, params, init_stats(6) if stats is None else stats, **options)


def test_errors_say_what_came_and_what_to_write():
    six = init_stats(6)
    fails(ValueError, train(group_size=4), "group_size=4", "6 features", "1, 2, 3, 6")
    fails(TypeError, train(group_size=0), "group_size", "None for all")
    fails(TypeError, train(group_size=2.5), "2.5")
    fails(ValueError, lambda: init_stats(6, group_size=4), "does not divide")
    fails(TypeError, lambda: init_stats(6, dtype=jnp.complex64), "complex64")
    fails(TypeError, lambda: init_stats(6, dtype=jnp.bfloat16), "float32")
    fails(TypeError, train(data((8, 6)).astype(np.complex64)), "complex64", "x.real")
    fails(TypeError, train(np.zeros((8, 6), np.int32)), "int32", "x.astype")
    fails(ValueError, train(group_size=3), "stats.cov", (1, 6, 6), (2, 3, 3), "init_stats(6")
    fails(ValueError, train(stats=six._replace(count=jnp.zeros(6))), "stats.count", (1,))
    fails(ValueError, train(stats=six._replace(mean=jnp.zeros(5))), "stats.mean", (5,), (6,))
    narrow = six._replace(cov=six.cov.astype(jnp.bfloat16))
    fails(TypeError, train(stats=narrow), "stats.cov", "bfloat16")
    fails(TypeError, train(stats=six._replace(cov=six.cov.astype(int))), "stats.cov", "int")
    fails(TypeError, train(stats=jbn.init_stats(6)), "WhiteningStats", "RunningStats", "init_stats")
    fails(TypeError, train(method=zca), "jbn.whitening.zca()")
    fails(TypeError, train(method="zca"), "newton_schulz(iterations)")
    fails(TypeError, train(method=_Unhashable()), "hashable")
    fails(ValueError, train(method=lambda cov, _: cov[0]), (6, 6), (1, 6, 6))
    for wrong in (0, -1, 2.5, True, None):
        fails(ValueError, lambda wrong=wrong: newton_schulz(wrong), "iterations", wrong)
    fails(ValueError, train(epsilon=-1.0), "epsilon", "-1.0")
    scale = jbn.Params(jnp.ones((6, 5)), None)
    fails(ValueError, train(params=scale), (6, 5), "(6, 6) for a coloring matrix")
    fails(ValueError, train(params=jbn.Params(None, jnp.ones(5))), "bias", (5,))
    mask = np.ones((8, 6), bool)
    fails(ValueError, train(mask=mask), (8, 6), "differ between features", (8, 1))
    fails(ValueError, train(weights=mask.astype(np.float32)), "whole examples")
    fails(ValueError, train(x=data((8, 6))[:1]), "one value per channel")
    fails(TypeError, train(update=jbn.ema), "jbn.ema()")
    fails(NameError, train(axis_name="batch"), "unbound")
    fails(ValueError, train(residual=data((8, 5))), "residual")


class _Unhashable:
    __hash__ = None

    def __call__(self, cov, epsilon):
        return cov


# --- Modules -----------------------------------------------------------------------------------


def linen_layer(x, coloring=False, **options):
    layer = jbn.linen.Whitening(group_size=2, coloring=coloring, **options)
    variables = layer.init(jax.random.key(0), x, use_running_average=False)

    def step(x, inference=False, **arrays):
        nonlocal variables
        y, new = layer.apply(variables, x, inference, mutable=["batch_stats"], **arrays)
        variables = variables | new
        return y

    return step, lambda: (variables["params"], variables["batch_stats"])


def nnx_layer(x, coloring=False, **options):
    layer = jbn.nnx.Whitening(
        x.shape[-1], group_size=2, coloring=coloring, rngs=nnx.Rngs(0), **options
    )

    def step(x, inference=False, **arrays):
        return layer(x, inference, **arrays)

    def state():
        _, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    return step, state


LAYERS = pytest.mark.parametrize("skin", [linen_layer, nnx_layer], ids=["linen", "nnx"])


@pytest.mark.slow
@LAYERS
def test_a_layer_is_the_function(skin):
    x, mask = data((16, 4)), np.arange(16)[:, None] % 4 > 0
    step, state = skin(x, momentum=0.5, activation=jnp.tanh, method=newton_schulz(7))
    options = {"method": newton_schulz(7), "activation": jnp.tanh}
    stats = init_stats(4, group_size=2)
    chex.assert_trees_all_equal(state()[1], stats._asdict())  # init has not updated them
    for _ in range(2):
        y = step(x, mask=mask, residual=x)
        expected, stats = whiten(
            x, jbn.init_params(4), stats, group_size=2, update=jbn.ema(0.5), mask=mask,
            residual=x, **options,
        )  # fmt: skip
    chex.assert_trees_all_equal((y, state()[1]), (expected, stats._asdict()))
    assert sorted(state()[0]) == ["bias", "scale"]
    y = step(x, True)
    chex.assert_trees_all_equal(y, whiten_inference(x, jbn.init_params(4), stats, **options))
    chex.assert_trees_all_equal(state()[1], stats._asdict())


@pytest.mark.slow
@LAYERS
def test_a_layer_with_coloring_and_an_update_rule(skin):
    x = data((16, 4))
    step, state = skin(x, coloring=True, update=KEEP, use_bias=False, dtype=jnp.bfloat16)
    y = step(jnp.asarray(x, jnp.bfloat16))
    params, stats = state()
    chex.assert_trees_all_equal(params, {"coloring": jnp.eye(4)})
    chex.assert_type([y, *stats.values()], [jnp.bfloat16, *[jnp.float32] * 3])
    own = oracle.covariance(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64), 2)
    assert_close(stats["cov"], own.cov, "float32", 16)


@pytest.mark.slow
def test_train_and_eval_switch_an_nnx_layer():
    layer, x = jbn.nnx.Whitening(4, rngs=nnx.Rngs(0)), data((16, 4))
    layer.eval()
    y = layer(x)
    np.testing.assert_allclose(y, x / np.sqrt(np.float32(1 + 1e-5)), rtol=1e-6)
    np.testing.assert_array_equal(layer.count[...], 0)
    layer.train()
    layer(x)
    np.testing.assert_array_equal(layer.count[...], 1)


@pytest.mark.slow
def test_a_network_trains():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8)(x)
            x = jbn.linen.Whitening(not train, group_size=4, activation=nn.relu)(x)
            return nn.Dense(1)(x)[:, 0]

    net, x = Net(), data((32, 6))
    target = x[:, 0] * x[:, 1]

    def loss_fn(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        y, new = net.apply(variables, batch, True, mutable=["batch_stats"])
        return ((y - target[: len(y)]) ** 2).mean(), new["batch_stats"], {}

    variables = net.init(jax.random.key(0), x, True)
    optimizer = optax.sgd(0.05)
    state = init(variables["params"], variables["batch_stats"], optimizer)
    step = jax.jit(make_train_step(loss_fn, optimizer))
    losses = []
    for _ in range(50):
        state, metrics = step(state, x)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


@LAYERS
@pytest.mark.parametrize("rule", [jbn.ema(0.9), jbn.cumulative(unbiased=True)], ids=str)
def test_microbatches_pool(skin, rule):
    x = data((12, 4), offset=3.0)
    optimizer = optax.sgd(0.1)
    if skin is linen_layer:
        layer = jbn.linen.Whitening(group_size=2, update=rule)
        variables = layer.init(jax.random.key(0), x, use_running_average=False)

        def loss_fn(params, stats, x):
            variables = {"params": params, "batch_stats": stats}
            y, new = layer.apply(variables, x, False, mutable=["batch_stats"])
            return jnp.sin(y).mean(), new["batch_stats"], {}

        state = init(variables["params"], variables["batch_stats"], optimizer)
    else:
        layer = jbn.nnx.Whitening(4, group_size=2, update=rule, rngs=nnx.Rngs(0))
        graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

        def loss_fn(params, stats, x):
            layer = nnx.merge(graph, params, stats)
            y = layer(x)
            return jnp.sin(y).mean(), nnx.state(layer, nnx.BatchStat), {}

        state = init(params, stats, optimizer)
    new, _ = jax.jit(make_train_step(loss_fn, optimizer, microbatches=3))(state, x)
    found = new.stats if skin is linen_layer else nnx.to_pure_dict(new.stats)
    _, expected = whiten(x, NONE, init_stats(4, group_size=2), group_size=2, update=rule)
    assert_close(found["mean"], np.asarray(expected.mean, np.float64), "float32", 12)
    assert_close(found["cov"], np.asarray(expected.cov, np.float64), "float32", 12)
    np.testing.assert_array_equal(found["count"], [1, 1])


@pytest.mark.slow
def test_two_calls_in_a_deferred_step_and_a_pass_over_a_data_set():
    x, rule = data((12, 4)), jbn.ema(0.9)

    def loss_fn(params, stats, x):
        y, stats = whiten(x, params, stats, group_size=2, update=rule)
        y, stats = whiten(2 * y, params, stats, group_size=2, update=rule)
        return jnp.sin(y).mean(), stats, {}

    optimizer, old = optax.sgd(0.1), init_stats(4, group_size=2)
    state = init(jbn.init_params(4), old, optimizer)
    new, _ = make_train_step(loss_fn, optimizer, pool_stats=True)(state, x)
    expected = loss_fn(jbn.init_params(4), old, x)[1]
    chex.assert_trees_all_close(new.stats, expected, rtol=1e-6, atol=1e-6)

    def apply_fn(params, stats, x):
        return whiten(x, params, stats, group_size=2)[1]

    estimate = jbn.population.estimate
    fails(TypeError, lambda: estimate(apply_fn, jbn.init_params(4), old, [x]), "cov", "cumulative")
