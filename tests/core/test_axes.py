"""Any axis or tuple of axes can hold the features, at any rank >= 2; other axes are reduced."""

import itertools

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests import compiled, oracle, tolerance

SHAPE = (3, 2, 5, 4)
SUBSETS = [s for r in (1, 2, 3) for s in itertools.combinations(range(len(SHAPE)), r)]


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("axis", SUBSETS, ids=str)
def test_every_subset_of_axes(axis):
    x = normal(SHAPE)
    sizes = tuple(SHAPE[a] for a in axis)
    scale, bias = normal(sizes, 1), normal(sizes, 2)
    y, m = compiled.normalize(x, scale, bias, axis=axis)
    expected, moments = oracle.normalize(x, scale, bias, axis)
    chex.assert_equal_shape([m.mean, m.var, scale])
    tolerance.assert_close(y, expected, "float32", x.size)
    tolerance.assert_close(m.mean, moments.mean, "float32", x.size, magnitude=1)
    tolerance.assert_close(m.var, moments.var, "float32", x.size)


@pytest.mark.parametrize("axis", [(1, 3), (3, 1), (-1, 1), (-3, -1)], ids=str)
def test_order_and_sign_of_the_axes_do_not_matter(axis):
    # The axes of scale and bias are in the order of x's axes, however `axis` lists them.
    x = normal(SHAPE)
    scale, bias = normal((2, 4), 1), normal((2, 4), 2)
    y, m = compiled.normalize(x, scale, bias, axis=axis)
    expected, same = compiled.normalize(x, scale, bias, axis=(1, 3))
    chex.assert_trees_all_equal((y, m), (expected, same))


@pytest.mark.parametrize("axis", range(-4, 4))
def test_a_single_axis_equals_a_tuple_of_one(axis):
    x = normal(SHAPE)
    one, same = compiled.moments(x, axis=axis), compiled.moments(x, axis=(axis,))
    chex.assert_trees_all_equal(one, same)
    chex.assert_shape(one.mean, (SHAPE[axis],))


def test_moving_the_features_moves_the_output():
    x = normal((4, 6, 5))
    last, _ = compiled.normalize(x, axis=-1)
    for axis in (0, 1):
        moved, _ = compiled.normalize(np.moveaxis(x, -1, axis), axis=axis)
        tolerance.assert_close(np.moveaxis(moved, axis, -1), last, "float32", 24)


@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=str)
@pytest.mark.parametrize("function", [jbn.moments, jbn.normalize])
def test_features_on_all_axes_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"no axis to take statistics over") as error:
        function(jnp.zeros(shape), axis=tuple(range(len(shape))))
    assert str(shape) in str(error.value)
    assert "axis=-1" in str(error.value)


@pytest.mark.parametrize("axis", [2, -3, (0, 2), (1, -4)], ids=str)
@pytest.mark.parametrize("function", [jbn.moments, jbn.normalize])
def test_an_axis_out_of_range_is_refused(function, axis):
    with pytest.raises(ValueError, match=r"axis.*2"):
        function(jnp.zeros((3, 4)), axis=axis)


@pytest.mark.parametrize("axis", [(1, 1), (1, -1), (0, 1, -2)], ids=str)
def test_a_repeated_axis_is_refused(axis):
    with pytest.raises(ValueError, match="axis"):
        jbn.normalize(jnp.zeros((3, 4)), axis=axis)


@pytest.mark.parametrize("axis", [(), 1.0, "1", None, (0.0,), True], ids=repr)
def test_an_invalid_axis_is_refused(axis):
    with pytest.raises((TypeError, ValueError), match="axis"):
        jbn.normalize(jnp.zeros((3, 4)), axis=axis)


def test_a_scalar_x_is_refused():
    with pytest.raises(ValueError, match=r"shape \(\) is a single number"):
        jbn.normalize(jnp.float32(1))


def test_a_numpy_integer_is_an_axis():
    x = normal((3, 4))
    same = compiled.moments(x, axis=np.int64(1))
    chex.assert_trees_all_equal(same, compiled.moments(x, axis=1))


def test_inference_takes_the_same_axes():
    x = normal(SHAPE)
    mean, var = normal((2, 4), 1), np.exp(normal((2, 4), 2))
    stats = jbn.init_stats((2, 4))._replace(mean=mean, var=var)
    params = jbn.Params(normal((2, 4), 3), normal((2, 4), 4))
    y = compiled.batch_norm_inference(x, params, stats, axis=(3, 1))
    expected = oracle.affine(x, stats.mean, stats.var, *params, axis=(1, 3))
    tolerance.assert_close(y, expected, "float32", 1)
