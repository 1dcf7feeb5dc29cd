"""The laws on shapes, axes, masks and dtypes that nobody chose."""

import chex
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tests import compiled, oracle, tolerance

pytestmark = pytest.mark.usefixtures("cheap_programs")

DTYPES = ["float32", "bfloat16", "float16"]


@st.composite
def inputs(draw, dtypes=DTYPES, support=True):
    """(x, scale, bias, dy, {axis, mask, weights}) of any rank from 2 to 5."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=5)))
    ndim = len(shape)
    axes = draw(st.sets(st.integers(0, ndim - 1), min_size=1, max_size=ndim - 1))
    signed = tuple(a - ndim * draw(st.booleans()) for a in draw(st.permutations(sorted(axes))))
    axis = signed[0] if len(signed) == 1 and draw(st.booleans()) else signed
    dtype = draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = tuple(shape[a] for a in sorted(axes))
    given = {"axis": axis}
    if support and draw(st.booleans()):
        given["mask"] = rng.uniform(size=broadcasting(draw, shape)) < draw(
            st.sampled_from([0.3, 0.8])
        )
    if support and draw(st.booleans()):
        weights = rng.uniform(0.1, 2.0, size=broadcasting(draw, shape))
        given["weights"] = (weights * (weights > 0.4)).astype(np.float32)
    return (
        rng.normal(size=shape).astype(dtype),
        rng.normal(size=sizes).astype(np.float32),
        rng.normal(size=sizes).astype(np.float32),
        rng.normal(size=shape).astype(dtype),
        given,
    )


def broadcasting(draw, shape):
    """A shape that broadcasts against `shape`."""
    return tuple(n if draw(st.booleans()) else 1 for n in shape)


@pytest.mark.slow
@hypothesis.given(inputs())
def test_forward_and_backward_are_the_oracle(example):
    x, scale, bias, dy, given = example
    y, m, (dx, dscale, dbias) = compiled.vjp(x, scale, bias, dy, **given)
    expected, moments = oracle.normalize(x, scale, bias, **given)
    chex.assert_equal_shape([x, y, dx])
    chex.assert_type([y, dx], x.dtype)
    close = tolerance.assert_close
    close(y, expected, x.dtype, x.size)
    close(np.broadcast_to(m.count, moments.count.shape), moments.count, "float32", x.size)
    close(m.mean, moments.mean, "float32", x.size, magnitude=2)
    close(m.var, moments.var, "float32", x.size, magnitude=2)
    none = np.zeros_like(scale)
    at = x, scale, bias, dy, none, none
    backward = oracle.vjp(*at, **given)
    # Gradients cancel: what is rounded is as large as their terms. The rstd of two values of nearly
    # the same size is up to 316, and so may xhat be of a masked value.
    rstd = 1 / np.sqrt(moments.var + 1e-5)
    xhat, _ = oracle.normalize(x, np.ones_like(scale), np.zeros_like(bias), **given)
    dy = np.abs(np.asarray(dy, np.float64))
    close(dx, backward[0], x.dtype, x.size, magnitude=np.max(np.abs(scale) * rstd) * np.max(dy))
    terms = np.sum(dy * np.maximum(np.abs(xhat), 1))
    close(dscale, backward[1], "float32", x.size, magnitude=terms)
    close(dbias, backward[2], "float32", x.size, magnitude=np.sum(dy))


@pytest.mark.slow
@hypothesis.given(inputs(dtypes=["float32"]), st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
def test_what_is_masked_has_no_influence(example, junk):
    x, scale, bias, dy, given = example
    valid = oracle.position_weights(x, given.get("mask"), given.get("weights")) > 0
    x, dy = (np.where(valid, a, np.float32(0)) for a in (x, dy))
    y, m, gradient = compiled.vjp(x, scale, bias, dy, **given)
    same = compiled.vjp(np.where(valid, x, np.float32(junk)), scale, bias, dy, **given)
    np.testing.assert_array_equal(np.asarray(same[0])[valid], np.asarray(y)[valid])
    chex.assert_trees_all_equal(same[1:], (m, gradient))
    chex.assert_tree_all_finite((m, gradient))


@pytest.mark.slow
@hypothesis.given(inputs(dtypes=["float32"], support=False), st.integers(0, 2**32 - 1))
def test_the_order_of_the_examples_does_not_matter(example, seed):
    x, scale, bias, _, given = example
    _, reduced = oracle.axes(x.ndim, given["axis"])
    order = np.random.default_rng(seed).permutation(x.shape[reduced[0]])
    y, m = compiled.normalize(x, scale, bias, **given)
    shuffled, same = compiled.normalize(np.take(x, order, reduced[0]), scale, bias, **given)
    # Up to rounding, which a variance near 0 magnifies: at most by 1/sqrt(epsilon).
    size = np.max(np.abs(scale)) / np.sqrt(np.min(m.var) + 1e-5)
    tolerance.assert_close(
        shuffled, np.take(np.asarray(y), order, reduced[0]), "float32", x.size, magnitude=3 * size
    )
    chex.assert_trees_all_close(same, m, **tolerance.tol("float32", x.size))


@pytest.mark.slow
@hypothesis.settings(max_examples=15)  # each compiles twice: epsilon is static
@hypothesis.given(
    inputs(dtypes=["float32"]), st.sampled_from([0.25, 2.0, 1024.0]), st.integers(-8, 8)
)
def test_y_is_invariant_to_shift_and_scale_of_x(example, a, b):
    # a x + b with a power of two and x on a grid: no rounding, so only epsilon has to follow.
    x, scale, bias, _, given = example
    x = np.round(x * 64) / 64
    y, m = compiled.normalize(x, scale, bias, **given)
    moved, same = compiled.normalize(
        np.float32(a) * x + np.float32(a * b), scale, bias, epsilon=1e-5 * a * a, **given
    )
    size = np.max(np.abs(scale)) / np.sqrt(np.min(m.var) + 1e-5)
    tolerance.assert_close(moved, y, "float32", x.size, magnitude=3 * size, ratio=8)
    chex.assert_trees_all_close(same.var, a * a * m.var, rtol=1e-5, atol=1e-6 * a * a)


@pytest.mark.slow
@hypothesis.given(inputs(dtypes=["float32"], support=False), st.integers(0, 4))
def test_moments_of_two_parts_merge_to_those_of_the_whole(example, where):
    x, _, _, _, given = example
    _, reduced = oracle.axes(x.ndim, given["axis"])
    parts = np.split(x, [min(where, x.shape[reduced[0]])], axis=reduced[0])
    merged = compiled.merge(*(compiled.moments(part, **given) for part in parts))
    whole = oracle.moments(x, **given)
    close = tolerance.assert_close
    close(np.broadcast_to(merged.count, whole.count.shape), whole.count, "float32", x.size)
    close(merged.mean, whole.mean, "float32", x.size, magnitude=2)
    close(merged.var, whole.var, "float32", x.size, magnitude=2)
