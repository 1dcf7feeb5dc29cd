"""batch_norm equals normalize and then the update, and works under every transformation."""

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

import jbn
from tests import cases, compiled, oracle, tolerance

RULES = [jbn.ema(0.9), jbn.ema(0.9, debias=True, unbiased=True), jbn.cumulative()]
CASE = cases.Case((32, 5))


def layer(case=CASE, dtype=jnp.float32):
    """Returns (data, params, fresh statistics)."""
    data = cases.make(case)
    return data, jbn.Params(data.scale, data.bias), jbn.init_stats(data.scale.shape, dtype)


# --- the composition ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        cases.Case((4, 6, 16), axis=1, mask="positions"),
        cases.Case((3, 4, 5, 6), axis=(1, 3), mask="features"),
        cases.Case((32, 5), weights="examples", offset=1e3),
        cases.Case((64, 5), dtype="bfloat16", mask="channel"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_batch_norm_is_normalize_and_the_update_rule(case, rule):
    data, params, stats = layer(case)
    y, new = compiled.batch_norm(
        data.x, params, stats, update=rule, epsilon=1e-3, **case.kwargs, **data.support
    )
    expected, m = oracle.normalize(data.x, *params, epsilon=1e-3, **case.kwargs, **data.support)
    n = data.x.size // data.scale.size
    tolerance.assert_close(y, expected, case.dtype, n, ratio=case.ratio)
    decay = getattr(rule, "decay", None)
    flags = getattr(rule, "debias", False), rule.unbiased
    run = oracle.running([m], decay, *flags)
    tolerance.assert_close(new.mean, run.mean, "float32", n, magnitude=2, ratio=case.ratio)
    tolerance.assert_close(new.var, run.var, "float32", n)
    np.testing.assert_array_equal(new.count, run.count)
    chex.assert_type(y, case.dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, stats)


def test_the_gradient_is_that_of_normalize():
    data, params, stats = layer(cases.Case((32, 5), mask="features"))

    @jax.jit
    def gradient(x, params):
        f = lambda x, params: jbn.batch_norm(x, params, stats, mask=data.mask)[0]  # noqa: E731
        return jax.vjp(f, x, params)[1](data.dy)

    dx, dparams = gradient(data.x, params)
    none = np.zeros_like(data.scale)
    expected = oracle.vjp(data.x, *params, data.dy, none, none, mask=data.mask)
    tolerance.assert_close(dx, expected[0], "float32", 32)
    tolerance.assert_close(dparams.scale, expected[1], "float32", 32, magnitude=32)
    tolerance.assert_close(dparams.bias, expected[2], "float32", 32, magnitude=32)


def test_parameters_may_be_absent():
    data, _, stats = layer()
    y, new = compiled.batch_norm(data.x, jbn.Params(None, None), stats)
    tolerance.assert_close(y, oracle.normalize(data.x)[0], "float32", 32)
    y = compiled.batch_norm_inference(data.x, jbn.Params(None, None), new)
    expected = oracle.affine(data.x, new.mean, new.var)
    tolerance.assert_close(y, expected, "float32", 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
def test_inference_uses_the_running_statistics(dtype, epsilon):
    data, params, _ = layer(CASE._replace(dtype=dtype))
    stats = jbn.init_stats(5)._replace(mean=data.dmean, var=data.dvar**2 + np.float32(0.1))
    y = compiled.batch_norm_inference(data.x, params, stats, epsilon=epsilon)
    chex.assert_type(y, dtype)
    expected = oracle.affine(data.x, stats.mean, stats.var, *params, epsilon=epsilon)
    tolerance.assert_close(y, expected, dtype, 1)


def test_inference_of_one_example_and_of_large_offsets():
    data, params, _ = layer(CASE._replace(offset=1e4))
    m = oracle.moments(data.x)
    stats = jbn.init_stats(5)._replace(mean=np.float32(m.mean), var=np.float32(m.var))
    y = compiled.batch_norm_inference(data.x[:1], params, stats)
    expected = oracle.affine(data.x[:1], stats.mean, stats.var, *params)
    # x - mean is exact (Sterbenz), so the offset costs no accuracy.
    tolerance.assert_close(y, expected, "float32", 1)


def test_inference_gradient_is_the_slope():
    data, params, _ = layer()
    stats = jbn.init_stats(5)._replace(mean=data.dmean, var=data.dvar**2 + 1)
    infer = lambda x: jbn.batch_norm_inference(x, params, stats)  # noqa: E731
    (dx,) = jax.jit(lambda x: jax.vjp(infer, x)[1](data.dy))(data.x)
    slope = data.scale / np.sqrt(stats.var + 1e-5)
    tolerance.assert_close(dx, data.dy * slope, "float32", 1)


# --- transformations ---------------------------------------------------------------------------


def test_vmap_is_a_loop():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8, 4)).astype(np.float32)
    mask = rng.uniform(size=(3, 8, 1)) < 0.7
    scale, bias = rng.normal(size=(2, 3, 4)).astype(np.float32)
    params, stats = jbn.Params(scale, bias), jbn.init_stats((3, 4))

    def one(x, params, stats, mask):
        return jbn.batch_norm(x, params, stats, mask=mask)

    together = jax.jit(jax.vmap(one))(x, params, stats, mask)
    each = [
        jax.jit(one)(*jax.tree.map(lambda a, k=k: a[k], (x, params, stats, mask))) for k in range(3)
    ]
    chex.assert_trees_all_close(
        together, jax.tree.map(lambda *a: jnp.stack(a), *each), **tolerance.tol("float32", 8)
    )


@pytest.mark.parametrize("mapped", ["x", "scale", "mask"])
def test_vmap_of_one_argument_and_of_its_gradient(mapped):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 8, 4)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 4)).astype(np.float32)
    at = {"x": x, "scale": scale, "mask": rng.uniform(size=(8, 1)) < 0.7}
    several = {
        "x": rng.normal(size=(3, 8, 4)).astype(np.float32),
        "scale": rng.normal(size=(3, 4)).astype(np.float32),
        "mask": rng.uniform(size=(3, 8, 1)) < 0.7,
    }[mapped]

    def gradient(value):
        given = at | {mapped: value}
        f = lambda x, scale: jbn.normalize(x, scale, bias, mask=given["mask"])[0]  # noqa: E731
        y, pull = jax.vjp(f, given["x"], given["scale"])
        return y, pull(dy)

    together, one = jax.jit(jax.vmap(gradient))(several), jax.jit(gradient)
    each = jax.tree.map(lambda *a: jnp.stack(a), *(one(v) for v in several))
    # The gradient of scale is a sum of 8 terms: the tolerance follows their size, not the sum's.
    close = tolerance.tol("float32", 8)
    chex.assert_trees_all_close(together, each, rtol=close["rtol"], atol=8 * close["atol"])


def test_hessian_by_vmap(x64):
    # jax.hessian is jacfwd of jacrev: vmap of jvp of vmap of vjp.
    x = np.random.default_rng(0).normal(size=(4, 2))
    r = np.random.default_rng(1).normal(size=(4, 2))

    def textbook(x):
        mean = x.mean(0, keepdims=True)
        var = ((x - mean) ** 2).mean(0, keepdims=True)
        return (r * (x - mean) / jnp.sqrt(var + 1e-5)).sum()

    ours = jax.jit(jax.hessian(lambda x: (r * jbn.normalize(x)[0]).sum()))(x)
    tolerance.assert_close(ours, jax.jit(jax.hessian(textbook))(x), "float64", 8)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scan_is_a_loop(rule):
    data, params, stats = layer(cases.Case((6, 8, 5)))

    @jax.jit
    def scanned(stats, xs):
        def step(stats, x):
            y, stats = jbn.batch_norm(x, params, stats, update=rule)
            return stats, y

        return jax.lax.scan(step, stats, xs)

    final, ys = scanned(stats, data.x)
    for x, y in zip(data.x, ys, strict=True):
        same, stats = compiled.batch_norm(x, params, stats, update=rule)
        chex.assert_trees_all_close(y, same, **tolerance.tol("float32", 8))
    chex.assert_trees_all_close(final, stats, **tolerance.tol("float32", 8))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable"])
def test_remat_changes_nothing(policy):
    data, params, stats = layer(cases.Case((16, 5), mask="features"))

    def loss(x, params):
        for _ in range(2):
            x, new = jbn.batch_norm(jnp.tanh(x), params, stats, mask=data.mask)
        return (data.dy * x).sum(), new

    plain = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(data.x, params)
    again = jax.checkpoint(loss, policy=getattr(jax.checkpoint_policies, policy))
    remat = jax.jit(jax.value_and_grad(again, argnums=(0, 1), has_aux=True))(data.x, params)
    close = tolerance.tol("float32", 16)
    chex.assert_trees_all_close(remat, plain, rtol=1e-5, atol=16 * close["atol"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_eval_shape(dtype):
    data, params, stats = layer(cases.Case((4, 6, 16), axis=1, dtype=dtype))
    run = lambda x: jbn.batch_norm(x, params, stats, axis=1)  # noqa: E731
    promised, actual = jax.eval_shape(run, data.x), jax.jit(run)(data.x)
    chex.assert_trees_all_equal_shapes_and_dtypes(promised, actual)


def test_one_trace_for_many_steps():
    # If a step returned a weak type or another dtype, JAX would trace the next step again.
    data, params, stats = layer()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, stats, x):
        def loss(params):
            y, new = jbn.batch_norm(x, params, stats, update=jbn.ema(0.9, debias=True))
            return (data.dy * y).sum(), new

        gradient, new = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, params, gradient), new

    params = jax.tree.map(jnp.asarray, params)
    for _ in range(4):
        params, stats = step(params, stats, data.x)
    chex.assert_tree_all_finite((params, stats))
    chex.clear_trace_counter()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("of_stats", ["float64", "float32"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_types_of_the_state_are_a_fixed_point(dtype, of_stats, rule, x64):
    data, params, stats = layer(cases.Case((8, 5), dtype=dtype), of_stats)
    y, new = jax.eval_shape(lambda x: jbn.batch_norm(x, params, stats, update=rule), data.x)
    chex.assert_type(y, dtype)
    for was, now in zip(stats, new, strict=True):
        assert (was.shape, was.dtype, was.weak_type) == (now.shape, now.dtype, now.weak_type)
    m = jax.eval_shape(jbn.moments, data.x)
    chex.assert_type([m.mean, m.var], "float64" if dtype == "float64" else "float32")
    # jax.lax.scan compares the types itself.
    step = lambda s, x: (jbn.batch_norm(x, params, s, update=rule)[1], None)  # noqa: E731
    jax.eval_shape(lambda s, xs: jax.lax.scan(step, s, xs), stats, data.x[None])


def test_types_without_x64_are_a_fixed_point():
    data, params, stats = layer()
    for rule in RULES:
        _, new = compiled.batch_norm(data.x, params, stats, update=rule)
        for was, now in zip(stats, new, strict=True):
            assert (was.dtype, was.weak_type) == (now.dtype, now.weak_type)


def test_the_old_statistics_can_be_donated():
    # Warnings are errors here: "some donated buffers were not usable" would be one.
    data, params, stats = layer()
    step = jax.jit(lambda x, stats: jbn.batch_norm(x, params, stats), donate_argnums=(0, 1))
    x = jnp.asarray(data.x)
    y, new = step(x, stats)
    assert all(leaf.is_deleted() for leaf in (x, *stats))
    expected, _ = oracle.normalize(data.x, *params)
    tolerance.assert_close(y, expected, "float32", 32)
    chex.assert_tree_all_finite(new)


def test_the_state_is_a_pytree_of_named_leaves():
    stats = jbn.init_stats(3)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(stats)]
    assert paths == [".mean", ".var", ".count"]
    assert jbn.Params._fields == ("scale", "bias")
    assert jbn.Moments._fields == ("count", "mean", "var")
    doubled = jax.tree.map(lambda v: v + v, stats)
    assert isinstance(doubled, jbn.RunningStats)


def test_jit_and_eager_agree():
    data, params, stats = layer(cases.Case((4, 6, 16), axis=1, mask="features"))
    given = {"axis": 1, "mask": data.mask}
    eager = jbn.batch_norm(data.x, params, stats, **given)
    jitted = compiled.batch_norm(data.x, params, stats, **given)
    chex.assert_trees_all_close(eager, jitted, **tolerance.tol("float32", 64))


def test_export_with_a_symbolic_batch():
    # One exported program serves every batch size, in training and at inference.
    data, params, stats = layer()
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 5), jnp.float32)
    for run in (
        lambda x: jbn.batch_norm(x, params, stats)[0],
        lambda x: jbn.batch_norm_inference(x, params, stats),
    ):
        exported = jax.export.export(jax.jit(run))(x)
        for rows in (2, 32):
            y = exported.call(jnp.asarray(data.x[:rows]))
            chex.assert_trees_all_close(y, run(data.x[:rows]), **tolerance.tol("float32", 32))


def test_inference_has_a_taylor_series():
    x, stats = jax.random.normal(jax.random.key(0), (4, 3)), jbn.init_stats(3)
    square = lambda x: jbn.batch_norm_inference(x, jbn.init_params(3), stats, epsilon=0.25) ** 2  # noqa: E731
    one, none = jnp.ones_like(x), jnp.zeros_like(x)
    y, (first, second) = jet.jet(square, (x,), ((one, none),))
    # The derivatives of x^2 / 1.25 are 2 x / 1.25 and 2 / 1.25.
    np.testing.assert_allclose(y, x**2 / 1.25, rtol=1e-5)
    np.testing.assert_allclose(first, 2 * x / 1.25, rtol=1e-5)
    np.testing.assert_allclose(second, np.full(x.shape, 1.6), rtol=1e-5)
