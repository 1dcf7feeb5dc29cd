"""The shift is near the mean of any data, so that one pass is as accurate as two.

The error may be ten times that of two float32 passes by the same compiler on the same data. The
mean and y are compared in units of the standard deviation, the variance relative to itself.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests import oracle, tolerance

pytestmark = pytest.mark.usefixtures("one_device")

IMAGES, SEQUENCES, ROWS = (16, 28, 28, 2), (28, 40, 3), (4099, 2)
SUPPORTS = ("plain", "mask", "weights")


@functools.partial(jax.jit, static_argnames="groups")
def one_pass(x, groups=None, **support):
    y, m = jbn.normalize(x, epsilon=0.0, groups=groups, **support)
    return m.mean, m.var, y


@jax.jit
def two_passes(x, **support):
    w = next(iter(support.values()), jnp.ones((1,) * x.ndim)).astype(x.dtype)
    w = jnp.broadcast_to(w, x.shape)
    reduced = tuple(range(x.ndim - 1))
    total = lambda v: jnp.sum(v, reduced, keepdims=True)  # noqa: E731
    mean = total(w * x) / total(w)
    var = total(w * (x - mean) ** 2) / total(w)
    return mean.ravel(), var.ravel(), (x - mean) / jnp.sqrt(var)


def errors(results, x, support):
    """Returns the largest errors of mean, variance and y; of y where its weight is not 0."""
    exact = oracle.moments(x, **support)
    w = oracle.position_weights(x, **support)
    y = oracle.affine(x, exact.mean, exact.var, epsilon=0.0)
    mean, var, actual = (np.asarray(v, np.float64) for v in results)
    std = np.sqrt(exact.var)
    largest = lambda v: np.max(np.abs(v))  # noqa: E731
    return (
        largest((mean - exact.mean) / std),
        largest(var / exact.var - 1),
        largest(np.where(w > 0, (actual - y) / np.maximum(1, np.abs(y)), 0)),
    )


def assert_as_good_as_two_passes(data, support=None):
    """Checks each of `data` against the largest error of two passes on any of them.

    The data are of one kind: on a single one the error of two passes may be small by chance.
    """
    support = support or {}
    data = [x.astype(np.float32) for x in data]
    ours = np.array([errors(one_pass(x, **support), x, support) for x in data])
    theirs = np.array([errors(two_passes(x, **support), x, support) for x in data])
    bound = 10 * np.maximum(theirs.max(0), tolerance.eps("float32"))
    for error in ours:
        assert np.all(error <= bound), (error, bound)


def normal(shape, offset=0.0):
    return offset + np.random.default_rng(0).normal(size=shape)


def with_odd(x, places, value):
    """Puts about `value` at these places: sums of equal round numbers may be exact by chance."""
    odd, x = value * np.random.default_rng(2).normal(1.0, 0.1, size=x.shape), x.copy()
    for place in places:
        x[place] = odd[place]
    return x


def support_of(kind, shape):
    """Returns a support that leaves out few positions, so that odd values take part, too."""
    rng = np.random.default_rng(1)
    if kind == "mask":
        return {"mask": rng.random((*shape[:-1], 1)) < 0.9}
    if kind == "weights":
        return {"weights": rng.uniform(0.1, 3.0, (*shape[:-1], 1)).astype(np.float32)}
    return {}


@pytest.mark.parametrize("kind", SUPPORTS)
def test_one_odd_place_in_every_image(kind):
    support, x = support_of(kind, IMAGES), normal(IMAGES)
    lines = range(28)
    places = [(slice(None), i, j) for i, j in itertools.product(lines[::3], lines[1::3])]
    places += [(slice(None), i) for i in lines] + [(slice(None), slice(None), j) for j in lines]
    places += [(slice(None), i, i) for i in lines]
    assert_as_good_as_two_passes([with_odd(x, [place], 300.0) for place in places], support)


@pytest.mark.parametrize("kind", SUPPORTS)
def test_a_cross_or_a_border_in_every_image(kind):
    support, x = support_of(kind, IMAGES), normal(IMAGES, offset=3.0)
    full = slice(None)
    crosses = [
        with_odd(x, [(full, i), (full, full, j)], 1e3)
        for i, j in itertools.product(range(0, 28, 3), range(1, 28, 3))
    ]
    assert_as_good_as_two_passes(crosses, support)
    borders = []
    for width in (1, 2, 3):
        edges = slice(0, width), slice(-width, None)
        places = [(full, e) for e in edges] + [(full, full, e) for e in edges]
        borders.append(with_odd(x, places, 1e3))
    assert_as_good_as_two_passes(borders, support)


@pytest.mark.parametrize("kind", [*SUPPORTS, "padding"])
def test_one_odd_token_in_every_sequence(kind):
    support, x, tokens = support_of(kind, SEQUENCES), normal(SEQUENCES, offset=-5.0), range(40)
    if kind == "padding":  # all of one length: equal shares of the weight are then whole sequences
        x, tokens = normal((28, 256, 2)), (0, 1, 30, 63, 64, 100, 126, 127)
        support = {"mask": np.broadcast_to(np.arange(256) < 128, (28, 256))[..., None]}
    odd = [with_odd(x, [(slice(None), token)], 1e3) for token in tokens]
    assert_as_good_as_two_passes(odd, support)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUPPORTS)
@pytest.mark.parametrize(("examples", "tokens"), [(7, 64), (14, 64), (28, 64), (8, 47), (9, 23)])
def test_one_odd_token_in_every_sequence_of_a_flattened_batch(examples, tokens, kind):
    # Rows a seventh of such a batch apart are the same token of different sequences.
    shape = (examples * tokens, 2)
    support, x = support_of(kind, shape), normal(shape)
    odd = [with_odd(x, [slice(token, None, tokens)], 3e3) for token in range(0, tokens, 4)]
    assert_as_good_as_two_passes(odd, support)


@pytest.mark.parametrize("kind", SUPPORTS)
def test_any_two_odd_rows(kind):
    support, x = support_of(kind, ROWS), normal(ROWS)
    n = len(x)
    # A fixed rule might draw the shift at such places: fractions of the batch, and its ends.
    parts = [0, n - 1, *(n * i // k for k in (2, 3, 4, 7, 14) for i in range(1, k))]
    pairs = itertools.combinations(sorted(set(parts)), 2)
    assert_as_good_as_two_passes([with_odd(x, pair, 1e4) for pair in pairs], support)


@pytest.mark.parametrize("kind", SUPPORTS)
@pytest.mark.parametrize(
    "values",
    [
        lambda rng: np.exp(3 * rng.normal(size=ROWS)),
        lambda rng: rng.standard_cauchy(size=ROWS),
        lambda rng: np.where(rng.random(ROWS) < 0.02, rng.exponential(size=ROWS), 0.0),
        lambda rng: rng.integers(0, 2, size=ROWS) * 1e3,
        lambda rng: np.where(np.arange(ROWS[0])[:, None] == 17, 3e3, rng.normal(size=ROWS)),
    ],
    ids=["exp(3 normal)", "cauchy", "sparse", "two values", "outlier"],
)
def test_heavy_tails_and_sparse_data(values, kind):
    data = [values(np.random.default_rng(seed)) for seed in range(5)]
    assert_as_good_as_two_passes(data, support_of(kind, ROWS))


@pytest.mark.parametrize("per", ["row", "value"])
def test_values_of_tiny_weight_do_not_count(per):
    x, w = normal(ROWS), np.ones((ROWS[0], 1 if per == "row" else ROWS[1]), np.float32)
    for odd in (0, 77, slice(0, None, 2), slice(100, 3000)):
        value, weight = x.copy(), w.copy()
        value[odd], weight[odd] = 1e6, 1e-20
        assert_as_good_as_two_passes([value], {"weights": weight})


def test_the_heaviest_value_may_be_odd():
    x = normal(ROWS)
    support = support_of("weights", ROWS)
    x[np.argmax(support["weights"])] = 1e3
    assert_as_good_as_two_passes([x], support)


def test_few_rows_have_a_weight():
    x = np.full(ROWS, 1e6)
    w = np.zeros((ROWS[0], 1), np.float32)
    kept = [5, 1111, 4098]
    x[kept], w[kept] = normal((3, 2)), 1.0
    assert_as_good_as_two_passes([x], {"weights": w})


@pytest.mark.parametrize("groups", [2, 8])
def test_each_group_has_a_shift_of_its_own(groups):
    x = normal(IMAGES) + 1e4 * np.arange(16).reshape(16, 1, 1, 1) // (16 // groups)
    x[:, 14, 14] += 30
    x = x.astype(np.float32)
    mean, var, y = one_pass(x, groups=groups)
    parts = np.split(x, groups)
    results = zip(mean, var, np.split(np.asarray(y), groups), strict=True)
    ours = np.array([errors(r, part, {}) for r, part in zip(results, parts, strict=True)])
    theirs = np.array([errors(two_passes(part), part, {}) for part in parts])
    assert np.all(ours <= 10 * np.maximum(theirs.max(0), tolerance.eps("float32")))


def test_a_constant_channel_is_shifted_to_zero():
    for kind in SUPPORTS:
        x = np.full(IMAGES, 0.1, np.float32)
        _, var, y = one_pass(x, **support_of(kind, IMAGES))
        np.testing.assert_array_equal(var, 0)
        np.testing.assert_array_equal(y, 0)


# --- Weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "std"), [(1e5, 1.0), (0.0, 1e-4), (-30.0, 1e-8)])
@pytest.mark.parametrize("per", ["row", "value"])
def test_a_common_factor_of_the_weights_changes_nothing(offset, std, per):
    rng = np.random.default_rng(0)
    x = (offset + std * rng.normal(size=(1000, 3))).astype(np.float32)
    w = rng.uniform(0.1, 3.0, size=(1000, 1 if per == "row" else 3))
    dy = rng.normal(size=x.shape).astype(np.float32)

    @jax.jit
    def run(weights):
        f = lambda x: jbn.normalize(x, weights=weights, epsilon=0.0)  # noqa: E731
        (y, m), pull = jax.vjp(f, x)
        return y, m.var, std * pull((dy, jax.tree.map(jnp.zeros_like, m)))[0], m.count

    expected = run(w.astype(np.float32))
    for factor in (1e-30, 1e-15, 1e15, 1e30):
        *results, count = run((w * factor).astype(np.float32))
        for actual, value in zip(results, expected[:3], strict=True):
            tolerance.assert_close(actual, value, "float32", 1000)
        np.testing.assert_allclose(count / factor, expected[3], rtol=1e-5)


def test_weights_at_the_ends_of_their_range(x64):
    x = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    same = one_pass(x)
    # The sum of the largest weights is finite.
    for weight in (np.float32(1e38), np.float32(np.inf)):
        m = jbn.moments(x, weights=np.full((1000, 1), weight))
        assert 0 < m.count < np.inf
        tolerance.assert_close(m.var, same[1], "float32", 1000)
    # All other weights vanish beside an infinite one.
    w = np.ones((1000, 1), np.float32)
    w[17] = np.inf
    m = jbn.moments(x, weights=w)
    np.testing.assert_allclose(m.mean, x[17], rtol=1e-6)
    # A weight too small for the dtype of the sums leaves the value out of count, mean and shift.
    w = np.ones((1000, 1))
    w[0] = 1e-60
    x[0] = 1e6
    m, without = jbn.moments(x, weights=w), jbn.moments(x[1:])
    assert m.count == 999
    tolerance.assert_close(m.var, without.var, "float32", 1000)
    for weight in (np.float64(1e-60), np.float32(1e-40)):
        assert jbn.moments(x, weights=np.full((1000, 1), weight)).count == 0
    assert jbn.moments(x.astype(np.float64), weights=w).count == 999 + 1e-60
