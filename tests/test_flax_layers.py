"""jbn.linen.BatchNorm and jbn.nnx.BatchNorm can take the place of Flax's: the laws of both.

What only one of them has is in `test_linen.py` and `test_nnx.py`.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import jbn
from tests.skins import LAYER, LINEN, NNX, SKINS, normal

pytestmark = pytest.mark.usefixtures("cheap_programs")

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
INITIALIZER = jax.nn.initializers.normal(1.0)


@SKINS
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("x_dtype", [*DTYPES, jnp.int32])
def test_dtypes_are_those_of_flax(skin, x_dtype, affine, train):
    x = (4 * normal(0, (5, 3))).astype(x_dtype)

    def outputs(cls, **options):
        init, step = skin.layer(cls, **options)
        return init(x), step(init(x), x, use_running_average=not train)

    with jax.numpy_dtype_promotion("standard"):
        for dtype in (None, *DTYPES):
            for param_dtype in DTYPES:
                options = {"dtype": dtype, "param_dtype": param_dtype}
                options |= {"use_scale": affine, "use_bias": affine}
                ours, theirs = (
                    jax.eval_shape(functools.partial(outputs, cls, **options))
                    for cls in (skin.jbn, skin.flax)
                )
                chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)


@SKINS
@pytest.mark.quick
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": 1},
        {"momentum": 0.5, "epsilon": 0.1},
        {"use_scale": False},
        {"use_bias": False},
        {"use_fast_variance": False},
        {"param_dtype": jnp.float16, "dtype": jnp.float32},
        {"scale_init": INITIALIZER, "bias_init": INITIALIZER},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_layer_computes_what_flax_computes(skin, options):
    x = 2 * normal(0, (5, 3, 4, 3)) + 1
    results = []
    with jax.numpy_dtype_promotion("standard"):
        for cls in (skin.jbn, skin.flax):
            init, step = skin.layer(cls, **options)
            variables = init(x)
            y, new = step(variables, x)
            results.append((variables, y, new, step(new, x, use_running_average=True)))
    chex.assert_trees_all_equal_shapes_and_dtypes(*results)
    chex.assert_trees_all_close(*results, **LAYER)


def test_linen_and_nnx_agree():
    x = normal(0, (6, 3)) + 1
    chex.assert_trees_all_equal(LINEN.train(x), NNX.train(x))


@SKINS
@pytest.mark.quick
@pytest.mark.parametrize(
    ("x", "mask"),
    [
        (normal(0, (6, 3)), None),
        (normal(0, (6, 3)), jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None]),
        (
            normal(0, (6, 3)),
            jnp.array([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]], bool),
        ),
        (normal(0, (4, 6, 3)), jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None]),  # lower rank
        (jnp.arange(12).reshape(4, 3), None),  # integers
        (normal(0, (1, 3)), None),  # one value per channel
        (normal(0, (3,)), None),  # one example without a batch axis
    ],
)
def test_accepts_what_flax_accepts(skin, x, mask):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        skin.both(lambda cls: skin.train(x, cls, {"mask": mask}), **LAYER)


@SKINS
def test_mask_of_features_leaves_a_finite_channel(skin):
    """Takes a (C,) mask, which chooses features, as in Flax; there the other channels are NaN."""
    x, mask = normal(0, (10, 3)), jnp.array([True, False, True])
    y, stats = skin.train(x, call={"mask": mask})
    with jax.numpy_rank_promotion("allow"):
        y_flax, stats_flax = skin.train(x, skin.flax, {"mask": mask})
    assert np.isnan(y_flax[:, 1]).all()
    chex.assert_tree_all_finite((y, stats))
    chosen = np.asarray(mask)
    chex.assert_trees_all_close(y[:, chosen], y_flax[:, chosen], **LAYER)
    chex.assert_trees_all_equal(y[:, 1], jnp.zeros(10))  # no data: the bias
    assert (stats["mean"][1], stats["var"][1]) == (0, 1)
    chex.assert_trees_all_close(stats["mean"][mask], stats_flax["mean"][mask], **LAYER)


@SKINS
def test_y_cannot_be_real_where_x_or_parameters_are_complex(skin):
    x = normal(0, (20, 3))
    complex_x = x.astype(jnp.complex64)
    for inference in (False, True):
        for x_, options in (complex_x, {}), (x, {"param_dtype": jnp.complex64}):
            init, _ = skin.layer(skin.jbn, dtype=jnp.complex64, **options)
            _, step = skin.layer(skin.jbn, dtype=jnp.float32, **options)
            variables = init(complex_x)
            with pytest.raises(TypeError, match=r"complex64.*imaginary part"):
                step(variables, x_, inference)
        init, step = skin.layer(skin.jbn)
        variables = init(x)
        with pytest.raises(TypeError, match=r"residual is complex64.*imaginary part"):
            step(variables, x, inference, residual=complex_x)


@SKINS
def test_a_single_value_enters_as_in_flax(skin):
    x, mask = normal(0, (6, 3)), jnp.arange(6)[:, None] == 2
    for given, call in (x, {"mask": mask}), (x[:1], {}):
        ours, theirs = (skin.train(given, cls, call)[1] for cls in (skin.jbn, skin.flax))
        chex.assert_trees_all_close(ours, theirs, **LAYER)
        assert (ours["var"] < 1).all()
    # With a rule of jbn only the mean enters, as in the core.
    for update, share in (jbn.ema(0.9), 0.1), (jbn.cumulative(), 1):
        _, stats = skin.train(x, call={"mask": mask}, update=update)
        chex.assert_trees_all_close(stats["mean"], share * x[2], **LAYER)
        chex.assert_trees_all_equal(stats["var"], jnp.ones(3))
        chex.assert_trees_all_equal(stats["count"], jnp.zeros(3))


@SKINS
@pytest.mark.parametrize("use", ["no", b"yes", "traced"])
def test_use_running_average_is_true_or_false(skin, use):
    x = normal(0, (4, 3))
    init, step = skin.layer(skin.jbn, use_running_average=None)

    def run(use):
        return step(init(x), x, use)[0]

    with pytest.raises(TypeError, match=r"use_running_average must be True or False"):
        jax.jit(run)(True) if use == "traced" else run(use)
    run(np.bool_(True))


@SKINS
@pytest.mark.parametrize("x", [None, "abc", {}], ids=str)
def test_an_x_that_is_no_array_is_refused(skin, x):
    init, step = skin.layer(skin.jbn)
    variables = init(normal(0, (4, 3)))
    with pytest.raises(TypeError, match=rf"x must be an array; got {type(x).__name__}"):
        step(variables, x, use_running_average=True)


@SKINS
def test_a_list_is_an_array(skin):
    x = [[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]
    y, _ = skin.train(x)
    chex.assert_trees_all_close(y, jnp.array([[-1.0] * 3, [1.0] * 3]), rtol=1e-4)


# The differences from Flax, one test each; docs/semantics lists them.


@SKINS
def test_variance_is_exact_at_a_large_offset(skin):
    x = normal(0, (64, 3)) + 1e4
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(0)) / np.sqrt(x64.var(0) + 1e-5)
    assert np.abs(skin.train(x)[0] - expected).max() < 1e-3
    assert np.abs(skin.train(x, skin.flax)[0] - expected).max() > 0.1


@SKINS
def test_nan_under_a_mask_harms_no_gradient(skin):
    x, mask = normal(0, (6, 3)), jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None]
    dy = normal(1, x.shape)

    def gradient(x, cls=None):
        def loss(x):
            return jnp.where(mask, skin.train(x, cls, {"mask": mask})[0] * dy, 0).sum()

        return jax.grad(loss)(x)

    dx = gradient(jnp.where(mask, x, jnp.nan))
    chex.assert_trees_all_equal(dx, gradient(jnp.where(mask, x, 0)))
    chex.assert_trees_all_close(dx, gradient(x, skin.flax), **LAYER)
    chex.assert_trees_all_equal(jnp.where(mask, 0, dx), jnp.zeros_like(dx))
    assert np.abs(dx).max() > 0.1


@SKINS
@pytest.mark.parametrize("bad", ["nan", "inf", "masked", "empty"])
def test_bad_batch_does_not_enter_the_statistics(skin, bad):
    x, mask = normal(0, (6, 3)), jnp.ones((6, 1), bool)
    if bad in ("nan", "inf"):
        x = x.at[2, 1].set(float(bad))
    if bad == "masked":
        mask = jnp.zeros((6, 1), bool)
    if bad == "empty":
        x, mask = x[:0], mask[:0]
    y, stats = skin.train(x, call={"mask": mask})
    healthy = np.array([bad in ("nan", "inf")] * 3)
    healthy[1] = False
    np.testing.assert_array_equal(np.asarray(stats["mean"]) == 0, ~healthy)
    np.testing.assert_array_equal(np.asarray(stats["var"]) == 1, ~healthy)
    if bad in ("nan", "inf"):
        assert not np.isfinite(y[:, 1]).all()  # the loss shows it
        chex.assert_tree_all_finite(y[:, ::2])


@SKINS
def test_statistics_carry_no_gradient(skin):
    grads = jax.grad(lambda x: skin.train(x)[1]["mean"].sum())(X)
    chex.assert_trees_all_equal(grads, jnp.zeros_like(X))


@SKINS
def test_float64_computes_y_and_leaves_the_statistics_in_float32(skin, x64):
    x = normal(0, (8, 3), jnp.float64) + 1
    init, step = skin.layer(skin.jbn, dtype=jnp.float64)
    variables = init(x)
    # `scan` raises if a type changes, as it does with Flax.
    _, y = jax.lax.scan(lambda v, x: step(v, x)[::-1], variables, x[None])
    chex.assert_trees_all_equal_dtypes(step(variables, x)[1], variables)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert y.dtype == jnp.float64
    expected = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
    chex.assert_trees_all_close(y[0], expected, rtol=1e-12, atol=1e-12)


@SKINS
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"axis": 2}, ["axis=2", "(6, 3)"]),
        ({"axis": -3}, ["axis=-3", "(6, 3)"]),
        ({"epsilon": -1e-5}, ["epsilon", "-1e-05"]),
        ({"epsilon": float("nan")}, ["epsilon", "nan"]),
        ({"momentum": 1.5}, ["1.5", "0 and 1"]),
    ],
)
def test_raises_where_flax_is_silently_wrong(skin, options, words):
    x = normal(0, (6, 3))
    variables = skin.layer(skin.jbn)[0](x)
    _, step = skin.layer(skin.jbn, **options)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the words are checked below)
        step(variables, x)
    for word in words:
        assert word in str(error.value)


# Additions of jbn.


@SKINS
def test_update_rule_takes_the_place_of_momentum(skin):
    x = normal(0, (6, 3)) + 2
    rule = jbn.ema(0.9, debias=True, unbiased=True)
    init, step = skin.layer(skin.jbn, update=rule)
    variables = initial = init(x)
    assert set(initial["batch_stats"]) == {"mean", "var", "count"}
    for number in (1.0, 2.0):
        _, variables = jax.jit(step)(variables, x)
        stats = variables["batch_stats"]
        chex.assert_trees_all_close(stats["mean"], x.mean(0), **LAYER)
        chex.assert_trees_all_close(stats["var"], x.var(0, ddof=1), **LAYER)
        chex.assert_trees_all_equal(stats["count"], jnp.full(3, number))
        chex.assert_trees_all_equal_shapes_and_dtypes(variables, initial)


@SKINS
def test_weights_repeat_examples(skin):
    x, repeats = normal(0, (4, 3)), jnp.array([1, 3, 0, 2])
    y, stats = skin.train(x, call={"weights": repeats.astype(jnp.float32)[:, None]})
    repeated, expected = skin.train(jnp.repeat(x, repeats, axis=0))
    chex.assert_trees_all_close(stats, expected, **LAYER)
    chex.assert_trees_all_close(jnp.repeat(y, repeats, axis=0), repeated, **LAYER)


# Transformations of JAX under which Flax's modules work.

X = normal(0, (8, 4, 3)) + 1


@pytest.mark.parametrize(
    "skin", [pytest.param(LINEN, marks=pytest.mark.slow), NNX], ids=["linen", "nnx"]
)
def test_jit_grad_jvp_hessian(skin):
    dx, dy, x = normal(1, X.shape), normal(2, X.shape), X[:, 0]
    skin.both(lambda cls: jax.jit(lambda x: skin.train(x, cls))(X))
    skin.both(lambda cls: jax.grad(lambda x: (skin.train(x, cls)[0] * dy).sum())(X))
    skin.both(lambda cls: jax.jvp(lambda x: skin.train(x, cls)[0], (X,), (dx,)))
    skin.both(lambda cls: jax.hessian(lambda x: (skin.train(x, cls)[0] * dy[:, 0]).sum())(x))


@SKINS
def test_vmap_scan_cond_and_checkpoint(skin):
    dy = normal(2, X.shape)

    def output(x, cls):
        return skin.train(x, cls)[0]

    def scan(cls):
        init, step = skin.layer(cls)
        return jax.lax.scan(lambda variables, x: step(variables, x)[::-1], init(X), X)

    skin.both(lambda cls: jax.vmap(lambda x: skin.train(x, cls))(X))
    skin.both(scan)
    skin.both(lambda cls: jax.lax.cond(True, lambda x: output(x, cls), lambda x: x, X))
    skin.both(lambda cls: jax.grad(jax.checkpoint(lambda x: (output(x, cls) * dy).sum()))(X))


@pytest.mark.slow
@SKINS
def test_named_axes_of_vmap_and_pmap(skin):
    def named(cls, transform, **options):
        def train(x):
            return skin.train(x, cls, axis_name="batch", **options)

        return transform(train, axis_name="batch")(X)

    skin.both(lambda cls: named(cls, jax.vmap))
    skin.both(lambda cls: named(cls, jax.pmap))
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    skin.both(lambda cls: named(cls, jax.pmap, axis_index_groups=groups))
    y, stats = named(skin.jbn, jax.pmap)
    whole, expected = skin.train(X.reshape(-1, 3))
    chex.assert_trees_all_close(y.reshape(-1, 3), whole, **LAYER)
    chex.assert_trees_all_close(jax.tree.map(lambda s: s[0], stats), expected, **LAYER)


@pytest.mark.slow
@SKINS
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(skin, check_vma):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    dy = normal(2, X.shape)

    def run(cls):
        @jax.jit
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P("batch"), P("batch")),
            out_specs=((P("batch"), P()), P("batch")),
            check_vma=check_vma,
        )
        def sharded(x, dy):
            def loss(x):
                y, stats = skin.train(x, cls, axis_name="batch")
                return y.ravel() @ dy.ravel(), (y, stats)

            dx, outputs = jax.grad(loss, has_aux=True)(x)
            return outputs, dx

        return sharded(X, dy)

    skin.both(run)
    chex.assert_trees_all_close(run(skin.jbn)[0], skin.train(X), **LAYER)


@SKINS
@pytest.mark.quick
@pytest.mark.parametrize("train", [True, False])
def test_export_with_symbolic_shapes(skin, train):
    init, step = skin.layer(skin.jbn)
    variables = init(X)

    def f(variables, x):
        return step(variables, x, use_running_average=not train)

    n, h = export.symbolic_shape("n, h")
    x = jax.ShapeDtypeStruct((n, h, 3), jnp.float32)
    exported = export.export(jax.jit(f))(variables, x)
    chex.assert_trees_all_close(exported.call(variables, X), f(variables, X), **LAYER)


@SKINS
def test_donated_buffers(skin):
    init, step = skin.layer(skin.jbn)
    variables, donating = init(X), jax.jit(step, donate_argnums=0)
    for _ in range(3):
        y, variables = donating(variables, X)
    chex.assert_trees_all_close(y, skin.train(X)[0], **LAYER)


@SKINS
@pytest.mark.parametrize("update", [jbn.ema(0.9, debias=True), jbn.cumulative()], ids=repr)
def test_one_compilation_serves_all_steps(skin, update):
    init, step = skin.layer(skin.jbn, update=update)
    variables = init(X)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(step, n=1))
    for _ in range(3):
        _, variables = step(variables, X)
    chex.assert_trees_all_equal(variables["batch_stats"]["count"], jnp.full(3, 3.0))
