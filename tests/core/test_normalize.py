"""The forward pass is y = scale (x - mean) / sqrt(var + epsilon) + bias, also under masks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests import cases, compiled, oracle, tolerance

pytestmark = pytest.mark.usefixtures("one_device")


def forward(case, data, **kwargs):
    """Returns (y, moments)."""
    given = case.kwargs | data.support | kwargs
    return compiled.normalize(data.x, data.scale, data.bias, **given)


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_against_the_oracle(case):
    data = cases.make(case)
    y, _ = forward(case, data)
    expected, _ = oracle.normalize(data.x, data.scale, data.bias, **case.kwargs, **data.support)
    chex.assert_shape(y, case.shape)
    chex.assert_type(y, case.dtype)
    tolerance.assert_close(y, expected, case.dtype, data.x.size, ratio=case.ratio)


@pytest.mark.parametrize("case", [c for c in cases.MASKS if c.dtype == "float32"], ids=str)
def test_the_moments_are_those_of_moments(case):
    data = cases.make(case)
    _, m = forward(case, data)
    same = compiled.moments(data.x, **case.kwargs, **data.support)
    chex.assert_trees_all_equal_shapes_and_dtypes(m, same)
    eps = tolerance.eps("float32")  # the mean's error, in units of std
    chex.assert_trees_all_close(m, same, rtol=2 * eps, atol=eps)


def test_float64(x64):
    case = cases.Case((64, 5), dtype="float64", offset=1e4, mask="features")
    data = cases.make(case)
    y, _ = forward(case, data)
    expected, _ = oracle.normalize(data.x, data.scale, data.bias, **data.support)
    chex.assert_type(y, jnp.float64)
    tolerance.assert_close(y, expected, "float64", 64, ratio=1e4)


@pytest.mark.parametrize("shape", [(64, 5), (4096, 3), (16, 16, 16, 8)], ids=str)
@pytest.mark.parametrize(("ratio", "bound"), [(1e3, 1e-4), (1e4, 1e-3)])
def test_the_promised_accuracy_on_the_first_call(shape, ratio, bound):
    # The library promises these bounds for float32; they do not depend on `tol`.
    case = cases.Case(shape, offset=ratio)
    data = cases.make(case)
    unit = {"scale": np.ones_like(data.scale), "bias": np.zeros_like(data.bias)}
    params, stats = jbn.Params(**unit), jbn.init_stats(shape[-1])
    y, _ = compiled.batch_norm(data.x, params, stats)
    expected, _ = oracle.normalize(data.x, **unit)
    assert np.max(np.abs(np.asarray(y, np.float64) - expected)) < bound


@pytest.mark.parametrize("kind", ["none", "mask", "weights"])
@pytest.mark.parametrize("row", [0, 1, 2048, 4095])
def test_one_far_row_does_not_spoil_the_sums(row, kind):
    # The far row is like a black corner pixel. A simple shift might be taken from this very row,
    # which is the first one that counts: row 0, or row 1 where row 0 is masked.
    data = cases.make(cases.Case((4096, 3), offset=1e4))
    data.x[row] = 0.0
    counts = np.arange(4096)[:, None] > 0
    support = {
        "none": {},
        "mask": {"mask": counts},
        "weights": {"weights": counts.astype(np.float32)},
    }[kind]
    y, m = compiled.normalize(data.x, **support)
    expected, moments = oracle.normalize(data.x, **support)
    ratio = np.max(moments.mean / np.sqrt(moments.var))  # 64, the far row widens the variance
    tolerance.assert_close(y, expected, "float32", 4096, ratio=ratio)
    tolerance.assert_close(m.var, moments.var, "float32", 4096)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scale_and_bias_are_optional(scale, bias):
    case = cases.Case((64, 5), dtype="bfloat16")
    data = cases.make(case)
    given = data.scale if scale else None, data.bias if bias else None
    y, _ = compiled.normalize(data.x, *given)
    chex.assert_type(y, jnp.bfloat16)
    tolerance.assert_close(y, oracle.normalize(data.x, *given)[0], "bfloat16", 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("params", ["float32", "bfloat16", "float16"])
def test_y_has_the_dtype_of_x_whatever_the_parameters_have(dtype, params):
    data = cases.make(cases.Case((64, 5), dtype=dtype))
    scale, bias = data.scale.astype(params), data.bias.astype(params)
    y, m = compiled.normalize(data.x, scale, bias)
    chex.assert_type([y, m.mean, m.var], [dtype, jnp.float32, jnp.float32])
    tolerance.assert_close(y, oracle.normalize(data.x, scale, bias)[0], dtype, 64)


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 1e-3, 1.0])
def test_epsilon_is_added_to_the_variance(epsilon):
    case = cases.Case((64, 5), std=0.1)
    data = cases.make(case)
    y, _ = forward(case, data, epsilon=epsilon)
    expected, _ = oracle.normalize(data.x, data.scale, data.bias, epsilon=epsilon)
    tolerance.assert_close(y, expected, "float32", 64)


# --- masks and weights -------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("kind", ["examples", "positions", "features", "channel"])
@pytest.mark.parametrize("by", ["mask", "weights"])
def test_masked_values_change_nothing_elsewhere(kind, junk, by):
    case = cases.Case((6, 4, 5), mask=kind)
    clean, dirty = cases.make(case), cases.make(case, masked=junk)
    support = {by: clean.mask if by == "mask" else clean.mask.astype(np.float32)}
    (y, m), (same, same_m) = (
        compiled.normalize(x, clean.scale, clean.bias, **support) for x in (clean.x, dirty.x)
    )
    chex.assert_trees_all_equal(m, same_m)
    np.testing.assert_array_equal(np.asarray(y)[clean.valid], np.asarray(same)[clean.valid])


def test_a_masked_position_is_normalised_with_the_statistics_of_the_others():
    x = np.float32([[1.0], [3.0], [50.0], [np.nan]])
    mask = np.array([[True], [True], [False], [False]])
    y, _ = compiled.normalize(x, bias=np.float32([5.0]), mask=mask, epsilon=1e-12)
    np.testing.assert_allclose(y[:, 0], [4, 6, 53, 5], rtol=1e-6)  # the bias in the place of NaN


@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_a_masked_value_that_is_not_finite_gives_the_bias_to_full_precision(junk):
    # The mean, rounded to a number as large as x, is off by up to 4e-3 standard deviations here.
    case = cases.Case((8, 64), offset=1e5, mask="examples")
    data = cases.make(case, masked=junk)
    y, _ = forward(case, data)
    shown = np.asarray(y)[~data.mask[:, 0]]
    np.testing.assert_allclose(shown, np.broadcast_to(data.bias, shown.shape), rtol=1e-6)


def test_masking_examples_equals_leaving_them_out():
    case = cases.Case((32, 5), mask="examples")
    data = cases.make(case)
    rows = data.mask[:, 0]
    y, m = forward(case, data)
    without, same = compiled.normalize(data.x[rows], data.scale, data.bias)
    tolerance.assert_close(np.asarray(y)[rows], without, "float32", 32)
    tolerance.assert_close(m.var, same.var, "float32", 32)
    assert np.all(m.count == float(rows.sum()))


@pytest.mark.parametrize("kind", ["examples", "positions", "features", "channel"])
def test_weight_zero_is_masked_and_one_is_not(kind):
    case = cases.Case((6, 4, 5), mask=kind)
    data = cases.make(case)
    y, m = forward(case, data)
    same, same_m = forward(case, data._replace(mask=None, weights=data.mask.astype(np.float32)))
    tolerance.assert_close(same, y, "float32", 24)
    chex.assert_trees_all_close(same_m, m, **tolerance.tol("float32", 24))


def test_a_mask_of_ones_is_no_mask():
    case = cases.Case((32, 5))
    data = cases.make(case)
    plain = forward(case, data)
    for shape in [(32, 1), (32, 5), (1, 5), (1, 1)]:
        masked = forward(case, data._replace(mask=np.ones(shape, bool)))
        tolerance.assert_close(masked[0], plain[0], "float32", 32)
        assert np.all(masked[1].count == 32)


def test_an_integer_weight_is_a_repeated_row():
    case = cases.Case((8, 5))
    data = cases.make(case)
    times = np.array([1, 2, 0, 3, 1, 1, 4, 0])
    y, m = forward(case, data._replace(weights=times[:, None].astype(np.float32)))
    repeated, same = compiled.normalize(np.repeat(data.x, times, axis=0), data.scale, data.bias)
    tolerance.assert_close(np.repeat(y, times, axis=0), repeated, "float32", 12)
    tolerance.assert_close(m.var, same.var, "float32", 12)
    assert np.all(m.count == 12)


def test_the_unit_of_the_weights_does_not_matter_to_y():
    case = cases.Case((32, 5), weights="features")
    data = cases.make(case)
    y, m = forward(case, data)
    for factor in (1e-6, 1e6):
        scaled, same = forward(case, data._replace(weights=data.weights * np.float32(factor)))
        tolerance.assert_close(scaled, y, "float32", 32)
        tolerance.assert_close(same.count, factor * np.asarray(m.count), "float32", 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_may_have_another_dtype_than_x(dtype):
    case = cases.Case((64, 5), dtype=dtype, weights="examples")
    data = cases.make(case)
    for other in ("float32", "bfloat16", "float16"):
        weights = data.weights.astype(other)
        y, m = forward(case, data._replace(weights=weights))
        expected, _ = oracle.normalize(data.x, data.scale, data.bias, weights=weights)
        chex.assert_type([y, m.count], [dtype, jnp.float32])
        tolerance.assert_close(y, expected, dtype, 64)


def test_a_negative_or_nan_weight_counts_as_none():
    data = cases.make(cases.Case((8, 5)))
    weights = np.float32([1, -1, 2, np.nan, 0, 1, -np.inf, 3])[:, None]
    clean = np.where(weights > 0, weights, np.float32(0))
    got = compiled.normalize(data.x, data.scale, data.bias, weights=weights)
    expected = compiled.normalize(data.x, data.scale, data.bias, weights=clean)
    chex.assert_trees_all_equal(got, expected)


# --- other dtypes and complex numbers ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("result", ["float32", "bfloat16", "float16"])
def test_y_in_another_dtype_is_rounded_once(dtype, result):
    data = cases.make(cases.Case((64, 5), dtype=dtype))
    params, stats = jbn.Params(data.scale, data.bias), jbn.init_stats(5)
    expected, _ = oracle.normalize(data.x, *params)
    inferred = oracle.affine(data.x, stats.mean, stats.var, *params)
    run = functools.partial(jax.jit, static_argnames="dtype")
    y, _ = run(jbn.normalize)(data.x, *params, dtype=result)
    same, _ = run(jbn.batch_norm)(data.x, params, stats, dtype=result)
    z = run(jbn.batch_norm_inference)(data.x, params, stats, dtype=result)
    chex.assert_type([y, same, z], result)
    tolerance.assert_close(y, expected, result, 64)
    tolerance.assert_close(same, expected, result, 64)
    tolerance.assert_close(z, inferred, result, 1)


def test_complex_numbers_are_scaled_by_their_modulus():
    # var = E|x - mean|^2, as in Flax: y has mean 0 and mean squared modulus 1.
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(2, 64, 5)) + np.float64(3)
    x = (parts[0] + 1j * parts[1]).astype(np.complex64)
    y, m = compiled.normalize(x)
    wide = x.astype(np.complex128)
    mean = wide.mean(0)
    var = (np.abs(wide - mean) ** 2).mean(0)
    chex.assert_type([y, m.mean, m.var], [np.complex64, np.complex64, np.float32])
    for part in (np.real, np.imag):
        expected = part((wide - mean) / np.sqrt(var + 1e-5))
        tolerance.assert_close(part(np.asarray(y)), expected, "float32", 64, ratio=3)
        tolerance.assert_close(part(np.asarray(m.mean)), part(mean), "float32", 64)
    tolerance.assert_close(m.var, var, "float32", 64)


def test_the_rounding_of_the_mean_does_not_reach_y(one_device):
    # Half an ulp of a mean of 1e4 is 5e-4 standard deviations here.
    x = (1e4 + np.random.default_rng(0).normal(size=(4096, 3))).astype(np.float32)
    y, _ = compiled.normalize(x, epsilon=0.0)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(0)) / wide.std(0)
    tolerance.assert_close(y, expected, "float32", 4096, magnitude=1.0)
    assert np.abs(np.asarray(y) - expected).max() < 1e-4
