"""Derivatives of all orders, in x, scale and bias, are those of the formula, also under masks.

The first order is compared with the oracle's closed form, in the dtypes of the table. Every order
is compared in float64 with JAX's derivatives of the formula as the paper writes it. Cotangents are
random: sum(y) is constant in x, so its gradient is zero even if the code is wrong.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jbn
from tests import cases, compiled, oracle, tolerance

pytestmark = pytest.mark.usefixtures("one_device", "cheap_programs")


def gradients(case, data):
    """Returns (dx, dscale, dbias) of sum(dy y) + sum(dmean mean) + sum(dvar var)."""
    at = data.x, data.scale, data.bias, data.dy, data.dmean, data.dvar
    return compiled.vjp(*at, **case.kwargs, **data.support)[2]


@pytest.mark.parametrize("case", cases.ALL, ids=str)
def test_gradient_against_the_oracle(case):
    data = cases.make(case)
    dx, dscale, dbias = gradients(case, data)
    at = data.x, data.scale, data.bias, data.dy, data.dmean, data.dvar
    expected = oracle.vjp(*at, **case.kwargs, **data.support)
    chex.assert_type([dx, dscale, dbias], [case.dtype, data.scale.dtype, data.bias.dtype])
    n, wide = data.x.size // data.scale.size, tolerance.accumulator(case.dtype)
    close = tolerance.assert_close
    close(dx, expected[0], case.dtype, n, ratio=case.ratio)
    # dscale and dbias sum n terms of both signs: rounding is relative to the terms, not to the
    # small result.
    size = np.abs(np.asarray(data.dy, np.float64)).sum() / data.scale.size
    close(dscale, expected[1], wide, n, magnitude=size, ratio=case.ratio)
    close(dbias, expected[2], wide, n, magnitude=size)


@pytest.mark.parametrize("kind", ["examples", "positions", "features", "channel"])
@pytest.mark.parametrize("junk", [np.nan, np.inf, 3e38])
def test_masked_values_reach_no_gradient(kind, junk):
    case = cases.Case((6, 4, 5), mask=kind)
    clean, dirty = cases.make(case), cases.make(case, masked=junk)
    # dy is that of a loss that leaves out masked positions.
    clean, dirty = (d._replace(dy=np.where(d.valid, d.dy, np.float32(0))) for d in (clean, dirty))
    expected = gradients(case, clean)
    chex.assert_tree_all_finite(expected)
    chex.assert_trees_all_equal(gradients(case, dirty), expected)


@pytest.mark.parametrize("by", ["mask", "weights"])
def test_gradient_where_a_mask_chooses_reference_examples(by):
    # The first two rows are reference examples: they alone give the statistics. For the last two
    # rows dy/dx is scale rstd; through the moments every cotangent reaches the first two.
    x = np.float32([[1.0], [3.0], [7.0], [2.0]])
    first = np.array([[True], [True], [False], [False]])
    support = {by: first if by == "mask" else first.astype(np.float32)}
    scale, bias, dy = np.float32([2.0]), np.float32([0.5]), np.float32([[0.0], [0], [1], [10]])
    y, _, (dx, dscale, dbias) = compiled.vjp(x, scale, bias, dy, epsilon=0.0, **support)
    # mean 2, var 1. The loss's derivative is -2 (1 + 10) in the mean and -2 (1 * 5 + 10 * 0) / 2 in
    # the variance; the derivatives of these in x are 1 / 2 and 2 (x - mean) / 2.
    np.testing.assert_allclose(y[:, 0], [-1.5, 2.5, 10.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(dx[:, 0], [-11 + 5, -11 - 5, 2, 20], rtol=1e-6)
    np.testing.assert_allclose([dscale[0], dbias[0]], [5, 11], rtol=1e-6)


@pytest.mark.parametrize("groups", [None, 2])
def test_gradient_where_x_differs_in_its_last_digits(groups):
    # The mean is between two float32 numbers: rounded, it is off by a third of the deviation.
    rng = np.random.default_rng(0)
    x = (1e5 + rng.integers(0, 4, size=(32, 3)) / 128).astype(np.float32)
    scale, bias, dy = rng.normal(size=3), rng.normal(size=3), rng.normal(size=(32, 3))
    scale, bias, dy = (v.astype(np.float32) for v in (scale, bias, dy))
    _, _, gradient = compiled.vjp(x, scale, bias, dy, epsilon=1e-9, groups=groups)
    none = np.zeros_like(scale)
    parts = range(0, 32, 32 // (groups or 1))
    rows = [slice(i, i + 32 // (groups or 1)) for i in parts]
    expected = [
        oracle.vjp(x[r].astype(np.float64), scale, bias, dy[r], none, none, epsilon=1e-9)
        for r in rows
    ]
    dx = np.concatenate([e[0] for e in expected])
    np.testing.assert_allclose(gradient[0], dx, rtol=1e-4, atol=1e-4 * np.abs(dx).max())
    np.testing.assert_allclose(gradient[1], sum(e[1] for e in expected), rtol=1e-4, atol=1e-4)


def test_tangents_under_a_mask_change_no_other_position():
    case = cases.Case((6, 4, 5), mask="features")
    data = cases.make(case, masked=np.nan)

    @jax.jit
    def push(dx):
        f = lambda x: jbn.normalize(x, data.scale, data.bias, **data.support)  # noqa: E731
        return jax.jvp(f, (data.x,), (dx,))[1]

    dy, dm = push(data.dy)
    chex.assert_tree_all_finite((dy, dm.mean, dm.var))
    junk = push(np.where(data.valid, data.dy, np.float32(np.nan)))
    chex.assert_trees_all_equal(junk[1][1:], dm[1:])
    np.testing.assert_array_equal(np.asarray(junk[0])[data.valid], np.asarray(dy)[data.valid])


def test_mask_weights_and_count_carry_no_gradient():
    case = cases.Case((32, 5), weights="features")
    data = cases.make(case)

    def outputs(x, weights):
        y, m = jbn.normalize(x, data.scale, data.bias, weights=weights)
        return y, m.mean, m.var, m.count

    cotangent = data.dy, data.dmean, data.dvar, data.dmean
    dx, dweights = jax.jit(lambda x, w: jax.vjp(outputs, x, w)[1](cotangent))(data.x, data.weights)
    np.testing.assert_array_equal(dweights, 0)
    same, _, _ = gradients(case, data)  # has no cotangent of the count
    tolerance.assert_close(dx, same, "float32", 32)
    moments = lambda w: jbn.moments(data.x, weights=w)[1:]  # noqa: E731
    (dweights,) = jax.jit(lambda w: jax.vjp(moments, w)[1](cotangent[1:3]))(data.weights)
    np.testing.assert_array_equal(dweights, 0)


# --- every order, in float64 -------------------------------------------------------------------


def textbook(x, scale, bias, w, epsilon=1e-5):
    """Computes Algorithm 1 as the paper writes it, for x: [..., C] with weights w.

    A channel without any weight gives its bias.
    """
    first, (channels,) = tuple(range(x.ndim - 1)), scale.shape
    wide = lambda v: jnp.broadcast_to(v.reshape((1,) * len(first) + (channels,)), x.shape)  # noqa: E731
    count = w.sum(first)
    scale = jnp.where(count > 0, scale, 0.0)
    some = jnp.where(count > 0, count, 1.0)
    mean = (w * x).sum(first) / some
    var = (w * (x - wide(mean)) ** 2).sum(first) / some
    y = wide(scale) * (x - wide(mean)) / jnp.sqrt(wide(var) + epsilon) + wide(bias)
    return y, mean, var


def derivatives(f, at, directions, cotangents):
    """Returns derivatives of f: at -> (y, mean, var), times cotangents, in nestings to order 3."""

    def loss(*at):
        return sum((c * v).sum() for c, v in zip(cotangents, f(*at), strict=True))

    def forward(g, along):
        return lambda *at: jax.jvp(g, at, along)[1]

    def reverse(g, along):
        def slope(*at):
            gradient = jax.grad(g, argnums=(0, 1, 2))(*at)
            return sum((d * v).sum() for d, v in zip(along, gradient, strict=True))

        return slope

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    u, v, _ = directions
    return {
        "jvp": jax.jvp(f, at, u)[1],
        "grad": gradient(*at),
        "jvp of grad": jax.jvp(gradient, at, u)[1],
        "grad of jvp": jax.grad(forward(loss, u), argnums=(0, 1, 2))(*at),
        "grad of grad": jax.grad(reverse(loss, u), argnums=(0, 1, 2))(*at),
        "jvp of jvp": forward(forward(loss, u), v)(*at),
        "jvp of jvp of grad": jax.jvp(lambda *at: jax.jvp(gradient, at, u)[1], at, v)[1],
        "grad of grad of grad": jax.grad(reverse(reverse(loss, u), v), argnums=(0, 1, 2))(*at),
        "grad of jvp of grad": jax.grad(forward(reverse(loss, u), v), argnums=(0, 1, 2))(*at),
    }


SUPPORTS = [
    cases.Case((4, 3, 3), dtype="float64", mask="channel"),
    cases.Case((4, 3, 3), dtype="float64", weights="examples"),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            cases.Case((4, 3, 3), dtype="float64"),
            *(c._replace(dtype="float64") for c in cases.VALUES if c.axis == -1),
        )
    ),
]


@pytest.mark.parametrize("case", SUPPORTS, ids=str)
def test_every_order_is_that_of_the_textbook_formula(case, x64):
    data = cases.make(case)
    rng = np.random.default_rng(0)
    at = data.x, data.scale, data.bias
    directions = [tuple(rng.normal(size=v.shape) for v in at) for _ in range(3)]
    w = jnp.asarray(oracle.position_weights(data.x, data.mask, data.weights))
    cotangents = data.dy, data.dmean, data.dvar
    # The third derivative of a constant channel is of the size of epsilon^(-5/2).
    epsilon = 1e-5 if case.values == "normal" else 1e-2

    def ours(*at):
        y, m = jbn.normalize(*at, **data.support, epsilon=epsilon)
        return y, m.mean, m.var

    run = jax.jit(derivatives, static_argnums=0)
    actual = run(ours, at, directions, cotangents)
    expected = run(lambda *at: textbook(*at, w, epsilon), at, directions, cotangents)
    # 1e-10: each order multiplies rounding by 1/std. That is at most 1/sqrt(epsilon) = 300, in the
    # channel without data, where eps(float64) 300^3 = 6e-9 multiplies terms that are exactly 0.
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu])
@pytest.mark.parametrize("case", cases.VALUES[1:5:3], ids=str)
def test_every_order_where_values_equal_the_mean(case, activation, x64):
    """Compares float32, which the kernel takes, with the formula in float64."""
    data = cases.make(case)
    rng = np.random.default_rng(0)
    at = data.x, data.scale, data.bias
    wide = lambda tree: jax.tree.map(np.float64, tree)  # noqa: E731
    directions = [tuple(rng.normal(size=v.shape).astype(v.dtype) for v in at) for _ in range(3)]
    cotangents = data.dy, data.dmean, data.dvar

    def ours(*at):
        y, m = jbn.normalize(*at, epsilon=0.25, activation=activation)
        return y, m.mean, m.var

    def formula(*at):
        y, *moments = textbook(*at, jnp.ones(data.x.shape), epsilon=0.25)
        return y if activation is None else activation(y), *moments

    run = jax.jit(derivatives, static_argnums=0)
    actual = run(ours, at, directions, cotangents)
    expected = run(formula, *wide((at, directions, cotangents)))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        tolerance.assert_close(a, e, "float32", 8)


@pytest.mark.slow
@pytest.mark.parametrize("over", ["groups", "instances"])
def test_every_order_in_groups_and_over_instances_where_values_equal_the_mean(over, x64):
    data = cases.make(cases.Case((8, 3), dtype="float64", values="integer"))
    at, w = (data.x, data.scale, data.bias), jnp.ones((4, 3))
    rng = np.random.default_rng(0)
    directions = [tuple(rng.normal(size=v.shape) for v in at) for _ in range(3)]
    halves = over == "groups"
    dmean, dvar = (rng.normal(size=(2, 3) if halves else 3) for _ in range(2))

    def ours(x, *params):
        if halves:
            y, m = jbn.normalize(x, *params, groups=2, epsilon=0.25)
            return y, m.mean, m.var
        instance = lambda x: jbn.normalize(x, *params, axis_name="i", epsilon=0.25)  # noqa: E731
        y, m = jax.vmap(instance, axis_name="i")(x.reshape(2, 4, 3))
        return y.reshape(8, 3), m.mean[0], m.var[1]

    def formula(x, *params):
        if not halves:
            return textbook(x, *params, jnp.ones((8, 3)), 0.25)
        parts = [textbook(part, *params, w, 0.25) for part in jnp.split(x, 2)]
        y, mean, var = zip(*parts, strict=True)
        return jnp.concatenate(y), jnp.stack(mean), jnp.stack(var)

    run = jax.jit(derivatives, static_argnums=0)
    actual, expected = (run(f, at, directions, (data.dy, dmean, dvar)) for f in (ours, formula))
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["examples", "features"])
def test_second_order_through_nan_under_a_mask(kind, x64):
    case = cases.Case((4, 3, 3), dtype="float64", mask=kind)
    clean, dirty = cases.make(case), cases.make(case, masked=np.nan)

    @jax.jit
    def hessian_vector(x):
        def loss(x, scale, bias):
            y, _ = jbn.normalize(x, scale, bias, **clean.support)
            return (clean.dy * jnp.where(clean.valid, y, 0.0) ** 2).sum()  # no NaN in the sum

        at, along = (x, clean.scale, clean.bias), (clean.dy, clean.dmean, clean.dvar)
        return jax.jvp(jax.grad(loss, argnums=(0, 1, 2)), at, along)[1]

    expected = hessian_vector(clean.x)
    chex.assert_tree_all_finite(expected)
    chex.assert_trees_all_equal(hessian_vector(dirty.x), expected)
    np.testing.assert_array_equal(np.asarray(expected[0])[~clean.valid], 0)


@pytest.mark.slow
@pytest.mark.parametrize("modes", [["fwd"], ["rev"]], ids=str)
def test_finite_differences(modes, x64):
    data = cases.make(cases.Case((5, 3), dtype="float64", mask="features"))

    @jax.jit
    def outputs(x, scale, bias):
        y, m = jbn.normalize(x, scale, bias, **data.support)
        return jnp.where(data.valid, y, 0.0), m.mean, m.var

    check_grads(outputs, (data.x, data.scale, data.bias), order=2, modes=modes, rtol=1e-5)


@pytest.mark.parametrize("support", ["none", "weights"])
def test_moments_are_differentiable_on_their_own(support, x64):
    weights = "none" if support == "none" else "features"
    data = cases.make(cases.Case((4, 3, 3), dtype="float64", weights=weights))
    run = jax.jit(lambda x: jax.vjp(lambda x: jbn.moments(x, **data.support)[1:], x)[1])
    (dx,) = run(data.x)((data.dmean, data.dvar))
    none = np.zeros_like(data.dy)
    at = data.x, data.scale, data.bias, none, data.dmean, data.dvar
    tolerance.assert_close(dx, oracle.vjp(*at, **data.support)[0], "float64", 12)


@pytest.mark.parametrize("absent", ["scale", "bias", "both"])
def test_without_scale_or_bias(absent):
    case = cases.Case((32, 5))
    data = cases.make(case)
    scale = None if absent in ("scale", "both") else data.scale
    bias = None if absent in ("bias", "both") else data.bias
    pull = jax.jit(lambda x: jax.vjp(lambda x: jbn.normalize(x, scale, bias)[0], x)[1](data.dy))
    (dx,) = pull(data.x)
    expected = oracle.vjp(data.x, scale, bias, data.dy, 0.0, 0.0)[0]
    tolerance.assert_close(dx, expected, "float32", 32)


def test_the_gradient_removes_the_mean_and_the_xhat_component_of_dy():
    # dy = 1 + xhat has no part but its mean and its xhat component. The backward pass removes both,
    # and leaves the share of epsilon in the variance.
    case = cases.Case((64, 3))
    data = cases.make(case)
    xhat, m = oracle.normalize(data.x)
    none = np.zeros_like(data.dmean)
    dy = (1 + xhat).astype(np.float32)
    dx, _, _ = gradients(case, data._replace(dy=dy, dmean=none, dvar=none))
    share = data.scale * 1e-5 / (m.var + 1e-5) / np.sqrt(m.var + 1e-5)
    tolerance.assert_close(dx, share * xhat, "float32", 64, magnitude=np.max(np.abs(dy)))


def test_gradient_of_complex_numbers(x64):
    rng = np.random.default_rng(0)
    x, r = (rng.normal(size=(6, 3)) + 1j * rng.normal(size=(6, 3)) for _ in range(2))

    def formula(x):
        centred = x - x.mean(0, keepdims=True)
        var = (centred.real**2 + centred.imag**2).mean(0, keepdims=True)
        return centred * jax.lax.rsqrt(var + 1e-5).astype(x.dtype)

    def gradient(f):
        return jax.jit(jax.grad(lambda x: (r * f(x)).real.sum()))(x)

    actual, expected = gradient(lambda x: jbn.normalize(x)[0]), gradient(formula)
    for part in (np.real, np.imag):
        tolerance.assert_close(part(actual), part(expected), "float64", 6)


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_where_y_has_another_dtype(dtype, result):
    data = cases.make(cases.Case((64, 5), dtype=dtype))
    dy = data.dy.astype(result)
    run = lambda *at: jbn.normalize(*at, dtype=result)[0]  # noqa: E731
    pull = jax.jit(lambda dy, *at: jax.vjp(run, *at)[1](dy))
    dx, dscale, _ = pull(dy, data.x, data.scale, data.bias)
    none = np.zeros_like(data.scale)
    expected = oracle.vjp(data.x, data.scale, data.bias, dy, none, none)
    chex.assert_type([dx, dscale], [dtype, "float32"])
    tolerance.assert_close(dx, expected[0], dtype, 64)
    tolerance.assert_close(dscale, expected[1], "float32", 64, magnitude=64)
