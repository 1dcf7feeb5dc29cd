"""Scale and bias for each example, given at the call."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn.linen
import jbn.nnx
from experiments.common import hlo
from jbn import training
from jbn._core.deferral import defer, settle
from jbn.conditional import conditional_batch_norm, conditional_batch_norm_inference
from tests import cases, executions, oracle, tolerance
from tests.core.test_derivatives import derivatives, textbook
from tests.core.test_residuals import kept
from tests.executions import AXIS

pytestmark = pytest.mark.usefixtures("cheap_programs")

ROWS, PLACES, CHANNELS = 16, 3, 5
STATS = jbn.init_stats(CHANNELS)
FORMS = {"examples": (ROWS, CHANNELS), "places": (ROWS, PLACES, CHANNELS)}


def make(dtype="float32", offset=2.0, form="examples", masked=7.0, **support):
    """Makes the arrays of one batch, with the batch as their first axis."""
    kind = {name: "examples" if name == "weights" else "positions" for name in support}
    case = cases.Case((ROWS, PLACES, CHANNELS), dtype=dtype, offset=offset, **kind)
    data, rng = cases.make(case, masked), np.random.default_rng(0)
    scale, bias = rng.normal(size=(2, *FORMS[form])).astype(data.scale.dtype)
    rows = {"x": data.x, "dy": data.dy, "scale": scale, "bias": bias}
    return rows | {name: v for name, v in data.support.items() if v is not None}


def support(rows):
    return {name: rows[name] for name in ("mask", "weights") if name in rows}


def layer(rows, **options):
    at = rows["x"], rows["scale"], rows["bias"]
    return conditional_batch_norm(*at, STATS, **support(rows), **options)


def wide(values):
    """Gives scale or bias x's rank, in float64."""
    values = np.asarray(values, np.float64)
    return values if values.ndim == 3 else values[:, None]


def expected_of(rows):
    """Returns y, (dx, dscale, dbias) and the moments by the oracle."""
    scale, bias, dy = (wide(rows[name]) for name in ("scale", "bias", "dy"))
    xhat, m = oracle.normalize(rows["x"], **support(rows))
    none = np.zeros(CHANNELS)
    # The derivative through xhat is that of a layer without scale, of the cotangent dy scale.
    dx, _, _ = oracle.vjp(rows["x"], None, None, dy * scale, none, none, **support(rows))
    gradients = dx, dy * xhat, dy
    if rows["scale"].ndim == 2:
        gradients = dx, *(v.sum(1) for v in gradients[1:])
    return scale * xhat + bias, gradients, m


QUICK = ("whole", "vmap", "shard_map", "jit", "jit_explicit")
KINDS = {
    "plain": {},
    "offset": {"offset": 1e4},
    "mask": {"mask": True},
    "weights": {"weights": True},
    "places": {"form": "places"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "mask": True},
}


MODES = [
    pytest.param(mode, marks=() if mode.name in QUICK else pytest.mark.slow)
    for mode in (executions.WHOLE, *executions.ALL)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_y_statistics_and_gradients_are_those_of_the_oracle(mode, kind):
    options = KINDS[kind]
    rows = make(**options)

    def instance(_, rows, axis_name):
        return layer(rows, update=jbn.cumulative(), axis_name=axis_name)

    def program(params, rows):
        def loss(x, scale, bias):
            given = {**rows, "x": x, "scale": scale, "bias": bias}
            y, new = mode.execute(instance, params, given)
            return (rows["dy"] * y).astype(jnp.float32).sum(), (y, new)

        at = rows["x"], rows["scale"], rows["bias"]
        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*at)

    gradients, (y, stats) = mode.run(program, jbn.Params(None, None), rows)
    dtype, offset = options.get("dtype", "float32"), options.get("offset", 2.0)
    chex.assert_type([y, *gradients], [dtype, dtype, jnp.float32, jnp.float32])
    close = functools.partial(tolerance.assert_close, n=ROWS * PLACES, ratio=offset)
    expected, (dx, dscale, dbias), m = expected_of(rows)
    close(y, expected, dtype)
    close(gradients[0], dx, dtype)
    close(gradients[1], dscale, "float32", magnitude=PLACES)
    close(gradients[2], dbias, "float32", magnitude=PLACES)
    for instance in range(4):
        mean, var, _ = (v[instance] for v in stats)
        close(mean, m.mean, "float32")
        close(var, m.var, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 4},
        {"activation": jax.nn.relu, "residual": True},
        {"activation": jax.nn.silu, "mask": True, "residual": True, "groups": 2},
        {"weights": True, "epsilon": 0.1, "dtype": jnp.bfloat16},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_same_for_all_examples_is_batch_norm(options):
    rows = make(**{k: v for k, v in options.items() if k in ("mask", "weights")})
    options = {k: v for k, v in options.items() if k not in ("mask", "weights")}
    x, scale, bias = rows["x"], rows["scale"][0], rows["bias"][0]
    if options.get("residual"):
        options["residual"] = x / 2
    options |= support(rows)
    expected, after = jax.jit(
        lambda *at: jbn.batch_norm(at[0], jbn.Params(*at[1:]), STATS, **options)
    )(x, scale, bias)
    run = jax.jit(lambda *at: conditional_batch_norm(*at, STATS, **options))
    every = (), (1,), (ROWS,), (1, 1), (ROWS, PLACES)
    for repeats in every if len(options) == 1 else every[2:3]:
        at = (np.broadcast_to(v, (*repeats, CHANNELS)) for v in (scale, bias))
        y, new = run(x, *at)
        dtype = str(y.dtype)
        tolerance.assert_close(y, expected, dtype, 1)
        chex.assert_trees_all_equal(new, after)


def test_each_of_scale_and_bias_may_be_left_out():
    rows = make()
    one, zero = np.ones_like(rows["scale"]), np.zeros_like(rows["bias"])
    for scale, bias in (None, rows["bias"]), (rows["scale"], None), (None, None):
        y, _ = conditional_batch_norm(rows["x"], scale, bias, STATS)
        at = one if scale is None else scale, zero if bias is None else bias
        np.testing.assert_array_equal(y, conditional_batch_norm(rows["x"], *at, STATS)[0])


@pytest.mark.parametrize("axis", [0, 1, (1, 3), (0, 2)])
def test_features_and_examples_along_any_axes(axis):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 2, 5)).astype(np.float32)
    features, reduced = oracle.axes(4, axis)
    shape = tuple(x.shape[i] for i in features)
    scale, bias = rng.normal(size=(2, x.shape[reduced[0]], *shape)).astype(np.float32)
    stats = jbn.init_stats(shape)
    y, _ = conditional_batch_norm(x, scale, bias, stats, axis=axis)
    inferred = conditional_batch_norm_inference(x, scale, bias, stats, axis=axis)
    xhat, _ = oracle.normalize(x, axis=axis)
    for i in range(x.shape[reduced[0]]):
        one = tuple(slice(i, i + 1) if a == reduced[0] else slice(None) for a in range(4))
        own = [np.expand_dims(v[i], reduced) for v in (scale, bias)]
        tolerance.assert_close(y[one], own[0] * xhat[one] + own[1], "float32", 40)
        expected = own[0] * x[one] / np.sqrt(1 + 1e-5) + own[1]
        tolerance.assert_close(inferred[one], expected, "float32", 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_plus_scale_is_added_without_rounding(dtype):
    rows = make(dtype)
    gamma = (1e-3 * jnp.asarray(rows["scale"])).astype(dtype)  # 1 + gamma is 1 in bfloat16
    exact = 1 + np.asarray(gamma, np.float32)
    stats = STATS._replace(mean=jnp.full(CHANNELS, 2.0))
    options = {"stats": stats, "bias": None, "dtype": jnp.float32}
    for f in conditional_batch_norm, conditional_batch_norm_inference:
        run = jax.jit(functools.partial(f, rows["x"], **options), static_argnames="one_plus_scale")
        y, expected = run(scale=gamma, one_plus_scale=True), run(scale=exact)
        chex.assert_trees_all_close(y, expected, rtol=1e-6, atol=1e-6)
        if f is conditional_batch_norm:
            without = run(scale=None, one_plus_scale=True)[0]
            np.testing.assert_array_equal(without, run(scale=None)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "orders"),
    [
        ("examples", ["grad of grad", "grad of jvp of grad"]),
        pytest.param("places", None, marks=pytest.mark.slow),
        pytest.param("examples", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_every_order_is_that_of_the_textbook_formula(form, orders, x64):
    rng = np.random.default_rng(0)
    shape = (4, 2) if form == "examples" else (4, 3, 2)
    at = rng.normal(size=(4, 3, 2)), *rng.normal(size=(2, *shape))
    mask = rng.uniform(size=(4, 3, 1)) < 0.8
    stats = jbn.init_stats(2, jnp.float64)

    def ours(x, scale, bias):
        options = {"epsilon": 1e-2, "mask": mask, "activation": jnp.tanh, "residual": x**2}
        return conditional_batch_norm(x, scale, bias, stats, **options)[:1]

    def formula(x, scale, bias):
        w = jnp.broadcast_to(mask, x.shape).astype(float)
        xhat, *_ = textbook(x, jnp.ones(2), jnp.zeros(2), w, 1e-2)
        scale, bias = (v[:, None] if v.ndim == 2 else v for v in (scale, bias))
        return (jnp.tanh(scale * xhat + bias + x**2),)

    directions = [tuple(rng.normal(size=v.shape) for v in at) for _ in range(3)]
    cotangent = (rng.normal(size=at[0].shape),)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f):
        every = derivatives(f, at, directions, cotangent)
        return {name: every[name] for name in orders or every}

    # 1e-10 as for the core: each order multiplies rounding by 1/std, at most 10 here.
    chex.assert_trees_all_close(run(ours), run(formula), rtol=1e-10, atol=1e-10)


@pytest.mark.quick  # each form and dtype: the dtypes that are kept tell them apart
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("one_device")
def test_a_backward_pass_keeps_x_and_what_was_given(dtype, form):
    rows = make(dtype, form=form)
    x, scale, bias = (rows[name].astype(dtype) for name in ("x", "scale", "bias"))
    options = {"activation": jnp.tanh, "one_plus_scale": True}

    def f(x, scale, bias, residual):
        return conditional_batch_norm(x, scale, bias, STATS, residual=residual, **options)

    def inference(x, scale, bias, residual):
        at = x, scale, bias, STATS
        return conditional_batch_norm_inference(*at, residual=residual, **options)

    arrays = x, x + x, *((scale, bias) if form == "places" else ())
    wanted = sorted(str(a.dtype) for a in arrays)
    for g in f, inference:
        large = [a for a in kept(g, x, scale, bias, x + x) if a.size > ROWS * CHANNELS]
        assert sorted(str(a.dtype) for a in large) == wanted


def test_masked_values_reach_no_gradient():
    rows = make(mask=True, form="places")
    mask = np.broadcast_to(rows["mask"], rows["x"].shape)
    rows["dy"] = np.where(mask, rows["dy"], np.float32(0))

    def gradients(junk):
        names = ("x", "scale", "bias", "residual")
        values = {**rows, "residual": rows["x"] / 2}
        at = [np.where(mask, values[name], np.float32(junk)) for name in names]

        def f(x, scale, bias, residual):
            options = {"mask": rows["mask"], "residual": residual, "activation": jnp.tanh}
            return conditional_batch_norm(x, scale, bias, STATS, **options)

        y, pull, new = jax.vjp(f, *at, has_aux=True)
        return np.where(mask, y, 0), new, pull(jnp.asarray(rows["dy"]))

    expected = gradients(7.0)
    for junk in np.nan, np.inf:
        results = gradients(junk)
        chex.assert_tree_all_finite(results)
        chex.assert_trees_all_equal(results, expected)


@pytest.mark.slow
def test_without_data_y_is_the_bias():
    rows = make()
    y, new = layer({**rows, "mask": np.zeros((ROWS, 1, 1), bool)})
    np.testing.assert_array_equal(y, np.broadcast_to(wide(rows["bias"]), y.shape))
    chex.assert_trees_all_equal(new, STATS)
    constant = np.full_like(rows["x"], 3.5)
    y, _ = layer({**rows, "x": constant})
    tolerance.assert_close(y, np.broadcast_to(wide(rows["bias"]), y.shape), "float32", 1)


def pulled(x, dy, scale, bias, axis_name=None):
    f = lambda *at: conditional_batch_norm(*at, STATS, axis_name=axis_name)  # noqa: E731
    y, pull, new = jax.vjp(f, x, scale, bias, has_aux=True)
    return y, pull(dy), new


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("a"), P(("a", "b")), P("a", "b")], ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_arrays(axis_type, spec):
    x, dy = np.random.default_rng(0).normal(size=(2, ROWS, 4, CHANNELS)).astype(np.float32)
    rows = make()
    expected = pulled(x, dy, rows["scale"], rows["bias"])
    where = executions.mesh((4, 2), ("a", "b"), axis_type)
    with jax.set_mesh(where):
        x, dy = jax.device_put((x, dy), NamedSharding(where, spec))
        at = jax.device_put((rows["scale"], rows["bias"]), NamedSharding(where, P("b")))
        got = jax.jit(pulled)(x, dy, *at)
        assert got[0].sharding.is_equivalent_to(x.sharding, 3)
    both = (jax.tree.map(np.asarray, t) for t in (got, expected))
    chex.assert_trees_all_close(*both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["named", "named unchecked", "named places", "Auto", "Explicit"])
def test_one_collective_each_way(way):
    jax.config.update("jax_disable_most_optimizations", False)  # equal collectives are combined
    rows = make(form="places" if way == "named places" else "examples")
    at = [rows[name] for name in ("x", "dy", "scale", "bias")]
    if way.startswith("named"):
        run = jax.shard_map(
            functools.partial(pulled, axis_name=AXIS),
            mesh=executions.mesh(),
            in_specs=P(AXIS),
            out_specs=(P(AXIS), P(AXIS), P()),
            check_vma=way != "named unchecked",
        )
        text = jax.jit(run).lower(*at).compile().as_text()
    else:
        where = executions.mesh(axis_type=getattr(AxisType, way))
        with jax.set_mesh(where):
            at = jax.device_put(at, NamedSharding(where, P(AXIS)))
            text = jax.jit(pulled).lower(*at).compile().as_text()
    assert [c.kind for c in hlo.collectives(text)] == ["all-gather", "all-reduce"]


@pytest.mark.slow
def test_an_instance_may_be_one_example_without_a_batch_axis():
    rows = make()
    run = jax.vmap(
        lambda x, s, b: conditional_batch_norm(x, s, b, STATS, axis_name=AXIS), axis_name=AXIS
    )
    y, new = run(rows["x"], rows["scale"], rows["bias"])
    expected, after = layer(rows)
    tolerance.assert_close(y, expected, "float32", ROWS * PLACES)
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[0], new), after, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inference(dtype):
    rows = make(dtype)
    stats = STATS._replace(mean=jnp.arange(5.0), var=jnp.arange(1.0, 6.0))
    y = conditional_batch_norm_inference(rows["x"], rows["scale"], rows["bias"], stats)
    xhat = oracle.affine(rows["x"], np.arange(5.0), np.arange(1.0, 6.0))
    expected = wide(rows["scale"]) * xhat + wide(rows["bias"])
    tolerance.assert_close(y, expected, dtype, 1, ratio=4)


@pytest.mark.slow
def test_inference_exports_with_a_symbolic_batch():
    rows = make()
    run = jax.jit(lambda x, s: conditional_batch_norm_inference(x, s, None, STATS))
    (n,) = export.symbolic_shape("n")
    shapes = [(n, PLACES, CHANNELS), (n, CHANNELS)]
    exported = export.export(run)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    at = rows["x"], rows["scale"]
    chex.assert_trees_all_close(exported.call(*at), run(*at), rtol=1e-6)


@pytest.mark.slow
def test_microbatches_pool(x64):
    rows = make("float64")
    batch = {name: rows[name] for name in ("x", "scale", "bias")}
    stats = jbn.init_stats(CHANNELS, jnp.float64)

    def loss_fn(params, stats, batch):
        at = batch["x"], params * batch["scale"], batch["bias"]
        y, stats = conditional_batch_norm(*at, stats, update=jbn.cumulative())
        return jnp.mean(y**4), stats, {}

    optimizer = optax.sgd(0.0)
    state = training.init(jnp.float64(1), stats, optimizer)
    step = jax.jit(training.make_train_step(loss_fn, optimizer, microbatches=4))
    _, whole, _ = loss_fn(1.0, stats, batch)
    new = step(state, batch)[0].stats
    chex.assert_trees_all_close(new, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_by_fixed_statistics_y_is_that_of_inference_and_the_moments_are_of_the_batch():
    rows = make()
    stats = STATS._replace(mean=jnp.arange(5.0))
    at = rows["x"], rows["scale"], rows["bias"]
    y, waiting = conditional_batch_norm(*at, defer(stats, fixed=True), update=jbn.cumulative())
    np.testing.assert_array_equal(y, conditional_batch_norm_inference(*at, stats))
    _, expected = conditional_batch_norm(*at, stats, update=jbn.cumulative())
    chex.assert_trees_all_close(settle(waiting), expected, rtol=1e-6)


# --- errors --------------------------------------------------------------------------------------

X = jnp.ones((6, 4, 3))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scale": jnp.ones((5, 3))}, ValueError, ["scale of shape (5, 3)", "(6, 3)", "(6, 1, 3)"]),
        ({"bias": jnp.ones((6, 4))}, ValueError, ["bias of shape (6, 4)", "(6, 4, 3)"]),
        ({"scale": jnp.ones(6)}, ValueError, ["scale of shape (6,)", "(3,)"]),
        ({"scale": jnp.ones((6, 4, 3, 1))}, ValueError, ["(6, 4, 3, 1)"]),
        ({"scale": jnp.ones((6, 3), jnp.int32)}, TypeError, ["scale must be floating point"]),
        ({"scale": "relu"}, TypeError, ["scale must be an array", "str"]),
        ({"bias": jnp.ones((6, 3), jnp.complex64)}, TypeError, ["bias is complex64"]),
        ({"stats": jbn.init_params(3)}, TypeError, ["stats must be jbn.RunningStats"]),
        ({"stats": jbn.init_stats(4)}, ValueError, ["(4,)", "(3,)"]),
        ({"x": jnp.ones((6, 4, 3), jnp.int32)}, TypeError, ["x must be floating point"]),
        ({"activation": jax.nn.softmax}, ValueError, ["elementwise"]),
        ({"residual": jnp.ones((6, 3))}, ValueError, ["residual"]),
    ],
)
def test_errors(change, error, words):
    given = {"x": X, "scale": None, "bias": None, "stats": jbn.init_stats(3), **change}
    for f in conditional_batch_norm, conditional_batch_norm_inference:
        with pytest.raises(error) as raised:
            f(**given)
        for word in words:
            assert word in str(raised.value)


def test_one_value_per_channel_is_refused():
    with pytest.raises(ValueError, match="one value per channel"):
        conditional_batch_norm(jnp.ones((1, 3)), None, None, jbn.init_stats(3))


# --- the modules ---------------------------------------------------------------------------------

Z, GAMMA, BETA = (
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(6, 4, 3), (6, 3), (6, 1, 3)])
)


def linen_layer(**options):
    module = jbn.linen.ConditionalBatchNorm(**options)
    x = options.get("x", Z)
    variables = module.init(jax.random.key(0), x, GAMMA, BETA, use_running_average=False)

    def step(stats, x, scale, bias, train=True, **arrays):
        y, new = module.apply(
            {"batch_stats": stats},
            *(x, scale, bias),
            use_running_average=not train,
            mutable=["batch_stats"],
            **arrays,
        )
        return y, new["batch_stats"]

    assert set(variables) == {"batch_stats"}
    return variables["batch_stats"], step


def nnx_layer(**options):
    module = jbn.nnx.ConditionalBatchNorm(3, **options)
    graph, state = nnx.split(module)

    def step(stats, x, scale, bias, train=True, **arrays):
        module = nnx.merge(graph, stats)
        module.train() if train else module.eval()
        y = module(x, scale, bias, **arrays)
        return y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return nnx.to_pure_dict(state), step


LAYERS = pytest.mark.parametrize("skin", [linen_layer, nnx_layer], ids=["linen", "nnx"])


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("update", [None, jbn.cumulative()], ids=["momentum", "update"])
def test_a_layer_computes_the_pure_function(skin, update):
    stats, step = skin(momentum=0.9, update=update, activation=jnp.tanh, one_plus_scale=True)
    mask, residual = jnp.ones((6, 4, 1), bool).at[0].set(False), Z / 2
    y, new = step(stats, Z, GAMMA, BETA, mask=mask, residual=residual)
    options = {"activation": jnp.tanh, "one_plus_scale": True, "residual": residual}
    expected, after = conditional_batch_norm(
        *(Z, GAMMA, BETA, jbn.init_stats(3)), mask=mask, update=update or jbn.ema(0.9), **options
    )
    np.testing.assert_array_equal(y, expected)
    fields = ("mean", "var", "count") if update else ("mean", "var")
    assert set(new) == set(fields)
    for field in fields:
        np.testing.assert_array_equal(new[field], getattr(after, field))
    y, same = step(new, Z, GAMMA, BETA, train=False, residual=residual)
    at = Z, GAMMA, BETA, after
    np.testing.assert_array_equal(y, conditional_batch_norm_inference(*at, **options))
    chex.assert_trees_all_equal(same, new)


@pytest.mark.slow
@LAYERS
def test_dtypes_of_a_layer(skin):
    x = Z.astype(jnp.bfloat16)
    stats, step = skin()
    with jax.numpy_dtype_promotion("standard"):
        assert step(stats, x, GAMMA, BETA)[0].dtype == jnp.float32  # promoted, as in Flax
    assert step(stats, x, None, None)[0].dtype == jnp.bfloat16
    stats, step = skin(dtype=jnp.bfloat16)
    y, new = step(stats, x, GAMMA, BETA)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(new, stats)


@pytest.mark.slow
@LAYERS
def test_a_layer_under_scan_and_named_axes(skin):
    stats, step = skin(update=jbn.cumulative())
    after, _ = jax.lax.scan(
        lambda stats, scale: step(stats, Z, scale, BETA)[::-1], stats, jnp.stack([GAMMA] * 2)
    )
    np.testing.assert_array_equal(after["count"], 2.0)
    stats, step = skin()
    expected, whole = step(stats, Z, GAMMA, BETA)
    _, step = skin(axis_name=AXIS)
    run = jax.vmap(lambda *at: step(stats, *at), axis_name=AXIS)
    y, new = run(*(executions.cut(2, v) for v in (Z, GAMMA, BETA)))
    chex.assert_trees_all_close(executions.rejoin(y), expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[0], new), whole, rtol=1e-5, atol=1e-6)


@LAYERS
def test_errors_of_a_layer(skin):
    stats, step = skin()
    with pytest.raises(ValueError, match=r"scale of shape \(5, 3\)"):
        step(stats, Z, jnp.ones((5, 3)), None)
    with pytest.raises(TypeError, match="floating point"):
        step(stats, jnp.ones((6, 4, 3), jnp.int32), None, None)
