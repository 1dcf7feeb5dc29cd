"""Several sets of statistics: each set is Batch Normalization of its own examples alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn.linen
import jbn.nnx
from experiments.common import hlo
from jbn import sets, training
from tests import cases, executions, oracle, tolerance
from tests.core.test_derivatives import derivatives, textbook
from tests.core.test_residuals import kept
from tests.executions import AXIS

pytestmark = pytest.mark.usefixtures("cheap_programs")

SETS, ROWS, PLACES, CHANNELS = 4, 16, 3, 5
# No example is of set 2, two are of no set, and the examples of a set lie on different devices.
INDEX = np.array([0, 1, 3, 0, 1, -1, 0, 0, 3, 0, 1, 1, 4, 3, 0, 1], np.int32)
RULE = jbn.cumulative()


def make(dtype="float32", offset=2.0, **support):
    """Makes (rows, params, stats): x, dy and index, and for each set params and statistics."""
    data = cases.make(cases.Case((ROWS, PLACES, CHANNELS), dtype=dtype, offset=offset))
    rng = np.random.default_rng(0)
    rows = {"x": data.x, "dy": data.dy, "index": INDEX}
    if support.get("mask"):
        rows["mask"] = rng.uniform(size=(ROWS, PLACES, 1)) < 0.7
    if support.get("weights"):
        rows["weights"] = rng.uniform(0.1, 3.0, (ROWS, 1, CHANNELS)).astype(data.scale.dtype)
    wide = data.scale.dtype
    params = jbn.Params(*rng.uniform(0.5, 2.0, (2, SETS, CHANNELS)).astype(wide))
    stats = rng.uniform(0.5, 2.0, (2, SETS, CHANNELS)).astype(wide)
    stats = jbn.RunningStats(*stats, np.full((SETS, CHANNELS), 3, wide))
    return rows, params, jax.tree.map(jnp.asarray, stats)


def support(rows, part=slice(None)):
    return {name: rows[name][part] for name in ("mask", "weights") if name in rows}


# --- an index per example ------------------------------------------------------------------------

QUICK = ("whole", "vmap", "shard_map", "jit", "jit_explicit")
KINDS = {
    "plain": {},
    "offset": {"offset": 1e4},
    "mask": {"mask": True},
    "weights": {"weights": True},
    "bfloat16": {"dtype": "bfloat16", "mask": True},
    "float16": {"dtype": "float16"},
}


MODES = [
    pytest.param(mode, marks=() if mode.name in QUICK else pytest.mark.slow)
    for mode in (executions.WHOLE, *executions.ALL)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_each_set_is_that_of_its_examples_alone(mode, kind):
    options = KINDS[kind]
    rows, params, stats = make(**options)

    def layer(params, rows, axis_name):
        return sets.split_batch_norm(
            rows["x"],
            params,
            stats,
            rows["index"],
            update=RULE,
            axis_name=axis_name,
            **support(rows),
        )

    def program(params, rows):
        def loss(params, x):
            y, new = mode.execute(layer, params, {**rows, "x": x})
            return (rows["dy"] * y).astype(jnp.float32).sum(), (y, new)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, rows["x"])

    (dparams, dx), (y, new) = mode.run(program, params, rows)
    chex.assert_type([y, dx], options.get("dtype", "float32"))
    assert_oracle(rows, params, stats, (y, dx, dparams, new), **options)


def assert_oracle(rows, params, stats, results, dtype="float32", offset=2.0, **_):
    y, dx, dparams, new = jax.tree.map(np.asarray, results)
    n = ROWS * PLACES
    close = functools.partial(tolerance.assert_close, ratio=offset)
    for s in range(SETS):
        own = rows["index"] == s
        scale, bias = params.scale[s], params.bias[s]
        after = [v[:, s] for v in new]  # on each instance
        if not own.any():
            for value, before in zip(after, stats, strict=True):
                np.testing.assert_array_equal(value, np.tile(before[s], (len(value), 1)))
            assert not np.any([v[s] for v in dparams])
            continue
        x, dy, given = rows["x"][own], rows["dy"][own], support(rows, own)
        expected, m = oracle.normalize(x, scale, bias, **given)
        close(y[own], expected, dtype, n)
        none = np.zeros(CHANNELS)
        gradient = oracle.vjp(x, scale, bias, dy, none, none, **given)
        close(dx[own], gradient[0], dtype, n)
        close(dparams.scale[s], gradient[1], "float32", n, magnitude=n)
        close(dparams.bias[s], gradient[2], "float32", n, magnitude=n)
        for instance in range(len(after[0])):
            mean, var, count = (v[instance] for v in after)
            close(mean, (3 * stats.mean[s] + m.mean) / 4, "float32", n)
            close(var, (3 * stats.var[s] + m.var) / 4, "float32", n)
            np.testing.assert_array_equal(count, 4)
    outside = (rows["index"] < 0) | (rows["index"] >= SETS)
    assert not y[outside].any()
    assert not dx[outside].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("support_of", "orders"),
    [
        ("weights", ["grad of grad", "grad of jvp of grad"]),
        *(pytest.param(s, None, marks=pytest.mark.slow) for s in ("none", "mask", "weights")),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_every_order_is_that_of_the_textbook_formula(support_of, orders, x64):
    rng = np.random.default_rng(0)
    x, index = rng.normal(size=(6, 3, 2)), np.array([0, 1, 0, 2, 1, -1])
    at = x, *rng.normal(size=(2, 3, 2))
    w = {
        "none": np.ones((6, 3, 1)),
        "mask": (rng.uniform(size=(6, 3, 1)) < 0.8).astype(float),
        "weights": rng.uniform(0.1, 2.0, (6, 1, 2)),
    }[support_of]
    given = {} if support_of == "none" else {support_of: w > 0 if support_of == "mask" else w}
    stats = sets.init_stats(3, 2, jnp.float64)

    def ours(x, scale, bias):
        params = jbn.Params(scale, bias)
        return sets.split_batch_norm(x, params, stats, index, epsilon=1e-2, **given)[:1]

    def formula(x, scale, bias):
        y = jnp.zeros_like(x)
        for s in range(3):
            own = np.flatnonzero(index == s)
            part = jnp.asarray(np.broadcast_to(w, x.shape)[own])
            y = y.at[own].set(textbook(x[own], scale[s], bias[s], part, 1e-2)[0])
        return (y,)

    directions = [tuple(rng.normal(size=v.shape) for v in at) for _ in range(3)]
    cotangent = (rng.normal(size=x.shape),)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f):
        every = derivatives(f, at, directions, cotangent)
        return {name: every[name] for name in orders or every}

    actual, expected = run(ours), run(formula)
    # 1e-10 as for the core: each order multiplies rounding by 1/std, at most 10 here.
    chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_groups_have_statistics_of_their_own_in_each_set(groups):
    rows, params, stats = make()
    x, index = jnp.asarray(rows["x"]), INDEX
    run = functools.partial(sets.split_batch_norm, params=params, stats=stats, update=RULE)
    y, new = run(x, index=index, groups=groups)
    for part in np.split(np.arange(ROWS), groups):
        expected, _ = run(x[part], index=index[part])
        tolerance.assert_close(y[part], expected, "float32", ROWS * PLACES)
    # The running statistics are those of the whole batch.
    chex.assert_trees_all_close(new, run(x, index=index)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sets_of_a_named_axis_and_groups_of_instances():
    rows, params, stats = make()
    groups = [[0, 3], [1, 2]]
    run = functools.partial(sets.split_batch_norm, params=params, stats=stats, update=RULE)
    each = functools.partial(run, axis_name=AXIS, axis_index_groups=groups)
    x, index = (executions.cut(4, rows[name]) for name in ("x", "index"))
    y, new = jax.vmap(lambda x, i: each(x, index=i), axis_name=AXIS)(x, index)
    for group in groups:
        expected, after = run(executions.rejoin(x[group,]), index=executions.rejoin(index[group,]))
        tolerance.assert_close(executions.rejoin(y[group,]), expected, "float32", ROWS * PLACES)
        for i in group:
            chex.assert_trees_all_close(
                jax.tree.map(lambda v, i=i: v[i], new), after, rtol=1e-5, atol=1e-5
            )


@pytest.mark.slow
def test_an_instance_may_be_one_example():
    rows, params, stats = make()
    run = functools.partial(sets.split_batch_norm, params=params, stats=stats, axis_name=AXIS)
    y, new = jax.vmap(lambda x, i: run(x[None], index=i[None]), axis_name=AXIS)(rows["x"], INDEX)
    expected, after = sets.split_batch_norm(rows["x"], params, stats, INDEX)
    tolerance.assert_close(y[:, 0], expected, "float32", ROWS * PLACES)
    chex.assert_trees_all_close(jax.tree.map(lambda v: v[0], new), after, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [1, (1, 3), 0])
def test_features_and_examples_along_any_axes(axis):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 2, 5)).astype(np.float32)
    features, reduced = oracle.axes(4, axis)
    index = np.arange(x.shape[reduced[0]]) % 2
    shape = tuple(x.shape[i] for i in features)
    params = jbn.Params(*rng.normal(size=(2, 2, *shape)).astype(np.float32))
    stats = sets.init_stats(2, shape)
    y, _ = sets.split_batch_norm(x, params, stats, index, axis=axis)
    inferred = sets.split_batch_norm_inference(x, params, stats, index, axis=axis)
    for s in range(2):
        own = tuple(index == s if i == reduced[0] else slice(None) for i in range(4))
        at = x[own], params.scale[s], params.bias[s]
        tolerance.assert_close(y[own], oracle.normalize(*at, axis=axis)[0], "float32", 40)
        expected = oracle.affine(x[own], np.zeros(shape), np.ones(shape), *at[1:], axis=axis)
        tolerance.assert_close(inferred[own], expected, "float32", 1)


def test_what_belongs_to_no_set_may_be_anything():
    rows, params, stats = make()
    x = jnp.asarray(rows["x"])
    outside = (INDEX < 0) | (INDEX >= SETS)

    def run(x):
        y, pull, new = jax.vjp(
            lambda x: sets.split_batch_norm(x, params, stats, INDEX), x, has_aux=True
        )
        return y, new, pull(jnp.asarray(rows["dy"]))

    expected = run(x)
    for junk in np.nan, np.inf:
        results = run(x.at[outside].set(junk))
        chex.assert_tree_all_finite(results)
        chex.assert_trees_all_equal(results, expected)


@pytest.mark.slow
def test_a_value_that_is_not_finite_stays_in_its_set():
    rows, params, stats = make()
    x = jnp.asarray(rows["x"]).at[0, 0, 1].set(jnp.nan)  # of set 0
    clean, before = sets.split_batch_norm(rows["x"], params, stats, INDEX)
    y, new = sets.split_batch_norm(x, params, stats, INDEX)
    others = INDEX != 0
    np.testing.assert_array_equal(y[others], clean[others])
    assert np.isnan(y[~others, :, 1]).all()
    chex.assert_tree_all_finite(new)
    for value, old, healthy in zip(new, stats, before, strict=True):
        np.testing.assert_array_equal(value[0, 1], old[0, 1])  # keeps its statistics
        np.testing.assert_array_equal(value[1:], healthy[1:])


@pytest.mark.slow
@pytest.mark.parametrize("junk", ["inf", "overflow", "nan under a mask", "outlier"])
def test_what_the_core_does_with_hard_data(junk):
    rows, params, stats = make()
    x, mask = jnp.asarray(rows["x"]), jnp.ones((ROWS, PLACES, CHANNELS), bool)
    if junk == "overflow":
        x = x * 1e25
    else:
        bad = {"inf": jnp.inf, "outlier": 1e6}.get(junk, jnp.nan)
        x = x.at[0, 0, 1].set(bad)
    if junk == "nan under a mask":
        mask = mask.at[0, 0, 1].set(False)

    def run(f, x, dy, mask):
        y, pull, new = jax.vjp(lambda x: f(x, mask=mask), x, has_aux=True)
        return y, pull(jnp.where(mask, dy, 0))[0], new

    split = functools.partial(sets.split_batch_norm, params=params, stats=stats, index=INDEX)
    y, dx, new = run(split, x, rows["dy"], mask)
    for s in 0, 1:
        own = s == INDEX
        one = jax.tree.map(lambda v, s=s: v[s], {"params": params, "stats": stats})
        f = functools.partial(jbn.batch_norm, **one)
        expected = run(f, x[own], jnp.asarray(rows["dy"])[own], mask[own])
        got = y[own], dx[own], jax.tree.map(lambda v, s=s: v[s], new)
        chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 2), (1, 4, 2)])
def test_a_set_of_one_example(shape):
    """Normalises a single value to the bias, and lets only its mean enter, as the core does."""
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    index = jnp.arange(shape[0]) + 1
    params, stats = sets.init_params(SETS, 2), sets.init_stats(SETS, 2)
    y, new = sets.split_batch_norm(x, params, stats, index, update=jbn.ema(0.5))
    for i, s in enumerate(index):
        own, after = jnp.zeros(2), jbn.init_stats(2)
        if len(shape) == 3:
            own, after = jbn.batch_norm(x[i], jbn.init_params(2), after, update=jbn.ema(0.5))
        else:
            after = after._replace(mean=x[i] / 2)
        np.testing.assert_allclose(y[i], own, atol=1e-6)
        chex.assert_trees_all_close(jax.tree.map(lambda v, s=s: v[s], new), after, rtol=1e-6)


@pytest.mark.slow
def test_an_empty_batch_and_constants():
    params, stats = sets.init_params(2, 3), sets.init_stats(2, 3)
    y, new = sets.split_batch_norm(jnp.zeros((0, 4, 3)), params, stats, jnp.zeros(0, jnp.int32))
    assert y.shape == (0, 4, 3)
    chex.assert_trees_all_equal(new, stats)
    y, new = sets.split_batch_norm(jnp.full((4, 3), 7.5), params, stats, jnp.array([0, 1, 0, 1]))
    np.testing.assert_array_equal(y, 0)
    chex.assert_tree_all_finite(new)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("one_device")
def test_a_backward_pass_keeps_x_and_vectors(dtype):
    rows, params, stats = make(dtype, mask=True)
    x = jnp.asarray(rows["x"])

    def f(x, params, residual):
        return sets.split_batch_norm(
            x, params, stats, INDEX, mask=rows["mask"], activation=jnp.tanh, residual=residual
        )

    large = [a for a in kept(f, x, params, x + x) if a.size > ROWS * SETS]
    assert sorted(str(a.dtype) for a in large) == [dtype, dtype]


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("a"), P(("a", "b")), P("a", "b")], ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_arrays(axis_type, spec):
    _, params, stats = make()
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, ROWS, 4, CHANNELS)).astype(np.float32)

    def run(x, dy, index):
        y, pull, new = jax.vjp(
            lambda x, params: sets.split_batch_norm(x, params, stats, index),
            x,
            params,
            has_aux=True,
        )
        return y, new, pull(dy)

    expected = run(x, dy, INDEX)
    where = executions.mesh((4, 2), ("a", "b"), axis_type)
    with jax.set_mesh(where):
        x, dy = jax.device_put((x, dy), NamedSharding(where, spec))
        index = jax.device_put(INDEX, NamedSharding(where, P(spec[0])))
        got = jax.jit(run)(x, dy, index)
        assert got[0].sharding.is_equivalent_to(x.sharding, 3)
    chex.assert_trees_all_close(
        *(jax.tree.map(np.asarray, t) for t in (got, expected)), rtol=1e-4, atol=1e-4
    )


@pytest.fixture
def optimized():
    """XLA compiles as for users: only then are equal collectives combined."""
    jax.config.update("jax_disable_most_optimizations", False)


def gradient(x, dy, index, params, stats, axis_name):
    y, pull, new = jax.vjp(
        lambda x, params: sets.split_batch_norm(x, params, stats, index, axis_name=axis_name),
        x,
        params,
        has_aux=True,
    )
    return y, new, pull(dy)[0]


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("check_vma", [True, False])
def test_one_collective_each_way_serves_all_sets(check_vma):
    rows, params, stats = make()
    run = jax.shard_map(
        functools.partial(gradient, params=params, stats=stats, axis_name=AXIS),
        mesh=executions.mesh(),
        in_specs=P(AXIS),
        out_specs=(P(AXIS), P(), P(AXIS)),
        check_vma=check_vma,
    )
    text = jax.jit(run).lower(rows["x"], rows["dy"], INDEX).compile().as_text()
    found = [c.kind for c in hlo.collectives(text)]
    assert found == ["all-gather", "all-reduce"]


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_arrays_gather_once_forward(axis_type):
    rows, params, stats = make()
    where = executions.mesh(axis_type=axis_type)
    run = lambda x, i: sets.split_batch_norm(x, params, stats, i)  # noqa: E731
    with jax.set_mesh(where):
        x = jax.device_put(rows["x"], NamedSharding(where, P(AXIS)))
        index = jax.device_put(INDEX, NamedSharding(where, P()))
        text = jax.jit(run).lower(x, index).compile().as_text()
    assert [c.kind for c in hlo.collectives(text)] == ["all-gather"]


# --- one set for the call ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int", "name", "traced", "uint8"])
def test_one_set_is_batch_norm_bit_for_bit_and_the_others_stay(kind):
    rows, params, stats = make(mask=True)
    x, names = jnp.asarray(rows["x"]), ("a", "b", "c", "d")
    chosen = {"int": 2, "name": "c", "traced": jnp.int32(2), "uint8": jnp.uint8(2)}[kind]
    static = kind in ("int", "name")
    options = {"activation": jax.nn.relu, "residual": x / 2, **support(rows)}

    def split(x, index):
        index = chosen if static else index
        return sets.split_batch_norm(x, params, stats, index, names=names, **options)

    def plain(x):
        at = (jax.tree.map(lambda v: v[2], tree) for tree in (params, stats))
        return jbn.batch_norm(x, *at, **options)

    y, new = jax.jit(split)(x, 2 if static else chosen)
    expected, after = jax.jit(plain)(x)
    np.testing.assert_array_equal(y, expected)
    chex.assert_trees_all_equal(jax.tree.map(lambda v: v[2], new), after)
    for value, before in zip(new, stats, strict=True):
        np.testing.assert_array_equal(np.delete(value, 2, 0), np.delete(before, 2, 0))


@pytest.mark.slow
def test_sets_that_are_not_used_stay_whatever_they_hold():
    rows, params, stats = make()
    odd = jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45, 3e38])
    stats = jax.tree.map(lambda v: v.at[2].set(odd), stats)
    for index in 0, jnp.int32(1), INDEX:
        _, new = sets.split_batch_norm(rows["x"], params, stats, index)
        for value in new:
            np.testing.assert_array_equal(
                np.asarray(value[2]).view(np.int32), np.asarray(odd).view(np.int32)
            )


@pytest.mark.parametrize("index", [-1, SETS, 2**31 - 1])
@pytest.mark.parametrize("affine", ["per_set", "shared", "none"])
def test_a_traced_index_out_of_range_is_no_set(index, affine):
    rows, params, stats = make()
    if affine == "shared":
        params = jax.tree.map(lambda v: v[0], params)
    if affine == "none":
        params = jbn.Params(None, None)

    @jax.jit
    def run(x, index):
        y, pull, new = jax.vjp(
            lambda x: sets.split_batch_norm(x, params, stats, index), x, has_aux=True
        )
        inferred = sets.split_batch_norm_inference(x, params, stats, index)
        return y, inferred, pull(rows["dy"])[0], new

    y, inferred, dx, new = run(rows["x"], jnp.int32(index))
    np.testing.assert_array_equal([y, inferred, dx], 0)
    chex.assert_trees_all_equal(new, stats)


@pytest.mark.slow
def test_a_loop_over_the_steps_of_an_unrolled_network():
    rows, params, stats = make()

    def body(carry, step):
        h, stats = carry
        h, stats = sets.split_batch_norm(h + 1, params, stats, step)
        return (jnp.tanh(h), stats), None

    (h, new), _ = jax.lax.scan(body, (jnp.asarray(rows["x"]), stats), jnp.arange(SETS))
    h_, each = jnp.asarray(rows["x"]), []
    for s in range(SETS):
        at = (jax.tree.map(lambda v, s=s: v[s], tree) for tree in (params, stats))
        h_, own = jbn.batch_norm(h_ + 1, *at)
        h_ = jnp.tanh(h_)
        each.append(own)
    chex.assert_trees_all_close(h, h_, rtol=1e-5, atol=1e-5)
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *each)
    chex.assert_trees_all_close(new, stacked, rtol=1e-5, atol=1e-6)


# --- inference, parameters and rules -------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inference_by_each_kind_of_index(dtype):
    rows, params, stats = make(dtype)
    x, names = jnp.asarray(rows["x"]), ("a", "b", "c", "d")
    run = functools.partial(sets.split_batch_norm_inference, params=params, stats=stats)
    of_examples = jax.jit(lambda i: run(x, index=i, activation=jnp.tanh, residual=x))(INDEX)
    for s in range(SETS):
        at = (jax.tree.map(lambda v, s=s: v[s], tree) for tree in (params, stats))
        expected = jbn.batch_norm_inference(x, *at, activation=jnp.tanh, residual=x)
        options = {"activation": jnp.tanh, "residual": x, "names": names}
        for index in s, names[s], jnp.int32(s):
            np.testing.assert_array_equal(run(x, index=index, **options), expected)
        own = s == INDEX
        # Two programs: one may contract a product and a sum to one operation.
        tolerance.assert_close(of_examples[own], expected[own], dtype, 1)
    outside = (INDEX < 0) | (INDEX >= SETS)
    expected = jnp.tanh(x.astype(jnp.float32)).astype(x.dtype)
    tolerance.assert_close(of_examples[outside], expected[outside], dtype, 1)


@pytest.mark.slow
def test_inference_exports_with_a_symbolic_batch():
    rows, params, stats = make()
    run = jax.jit(lambda x, i: sets.split_batch_norm_inference(x, params, stats, i))
    (n,) = export.symbolic_shape("n")
    shapes = [
        jax.ShapeDtypeStruct((n, PLACES, CHANNELS), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    ]
    exported = export.export(run)(*shapes)
    chex.assert_trees_all_close(exported.call(rows["x"], INDEX), run(rows["x"], INDEX), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, INDEX], ids=["one", "each"])
def test_shared_params_are_those_of_every_set(index):
    rows, params, stats = make()
    shared = jax.tree.map(lambda v: v[0], params)
    same = jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), params)

    def run(params):
        f = lambda params: sets.split_batch_norm(rows["x"], params, stats, index)[0]  # noqa: E731
        y, pull = jax.vjp(f, params)
        return y, pull(jnp.asarray(rows["dy"]))[0]

    (y, gradient), (expected, each) = run(shared), run(same)
    np.testing.assert_array_equal(y, expected)
    chex.assert_trees_all_close(
        gradient, jax.tree.map(lambda v: v.sum(0), each), rtol=1e-5, atol=1e-5
    )


def test_a_rule_of_the_users_sees_one_set_at_a_time():
    rows, params, stats = make()
    weight = jnp.linspace(0.0, 1.0, CHANNELS)  # [C]: it would not fit [sets, C]

    def rule(stats, moments):
        chex.assert_shape([stats.mean, moments.mean], (CHANNELS,))
        return stats._replace(mean=stats.mean + weight * (moments.mean - stats.mean))

    for index in 1, INDEX:
        _, new = sets.split_batch_norm(rows["x"], params, stats, index, update=rule)
        x = jnp.asarray(rows["x"] if index is not INDEX else rows["x"][INDEX == 1])
        own = jax.tree.map(lambda v: v[1], stats)
        expected = rule(own, jbn.moments(x))
        chex.assert_trees_all_close(
            jax.tree.map(lambda v: v[1], new), expected, rtol=1e-5, atol=1e-5
        )
        np.testing.assert_array_equal(new.mean[2], stats.mean[2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["each", "traced"])
def test_microbatches_pool_in_each_set(kind, x64):
    rows, params, stats = make("float64")
    batch = {"x": rows["x"], "index": INDEX}

    def loss_fn(params, stats, batch):
        index = batch["index"] if kind == "each" else jnp.int32(1)
        y, stats = sets.split_batch_norm(batch["x"], params, stats, index, update=RULE)
        return jnp.mean(y**4), stats, {}

    optimizer = optax.sgd(0.0)
    state = training.init(params, stats, optimizer)
    step = jax.jit(training.make_train_step(loss_fn, optimizer, microbatches=4))
    new = step(state, batch)[0].stats
    _, whole, _ = loss_fn(params, stats, batch)
    chex.assert_trees_all_close(new, whole, rtol=1e-12, atol=1e-12)


# --- errors --------------------------------------------------------------------------------------

X, PARAMS, STATS = jnp.ones((6, 3)), sets.init_params(2, 3), sets.init_stats(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"index": 2}, ValueError, ["index=2 is out of range", "2 sets, 0 to 1"]),
        ({"index": -1}, ValueError, ["index=-1 is out of range"]),
        ({"index": "clean"}, ValueError, ["'clean'", "names= is not given"]),
        ({"index": "c", "names": ("a", "b")}, ValueError, ["'c'", "('a', 'b')"]),
        ({"index": 0, "names": ("a",)}, ValueError, ["('a',)", "2 sets"]),
        ({"index": 0, "names": "ab"}, ValueError, ["'ab'", "2 sets"]),
        ({"index": True}, TypeError, ["bool"]),
        ({"index": 0.5}, TypeError, ["float32", "astype(jnp.int32)"]),
        ({"index": None}, TypeError, ["index must be an array", "NoneType"]),
        ({"index": jnp.zeros(5, jnp.int32)}, ValueError, ["(5,)", "(6,)"]),
        ({"index": jnp.zeros((6, 1), jnp.int32)}, ValueError, ["(6, 1)", "(6,)"]),
        ({"stats": jbn.init_stats(3)}, ValueError, ["(3,)", "jbn.sets.init_stats"]),
        ({"stats": sets.init_stats(2, 4)}, ValueError, ["(4,)", "(3,)"]),
        ({"stats": (1, 2)}, TypeError, ["RunningStats", "tuple"]),
        ({"params": sets.init_params(3, 3)}, ValueError, ["scale of 2 sets", "(2, 3)", "(3, 3)"]),
        ({"params": None}, TypeError, ["jbn.Params(scale, bias)"]),
        ({"x": jnp.ones((6, 3), jnp.int32)}, TypeError, ["x must be floating point"]),
        ({"update": jbn.ema}, TypeError, ["jbn.ema()"]),
        ({"groups": 4, "index": jnp.zeros(6, jnp.int32)}, ValueError, ["groups=4", "6"]),
        ({"groups": 6, "index": jnp.zeros(6, jnp.int32)}, ValueError, ["one value per channel"]),
    ],
)
def test_errors(change, error, words):
    given = {"x": X, "params": PARAMS, "stats": STATS, "index": 0, **change}
    with pytest.raises(error) as raised:
        sets.split_batch_norm(**given)
    for word in words:
        assert word in str(raised.value)
    if set(change) & {"update", "groups"}:
        return
    with pytest.raises(error):
        sets.split_batch_norm_inference(**given)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        *((number, ValueError) for number in (0, (), ("a", "a"))),
        *((number, TypeError) for number in ("ab", None, 1.5, (1, 2))),
    ],
)
def test_sets_are_a_number_or_names(number, error):
    for make_one in sets.init_params, sets.init_stats:
        with pytest.raises(error, match="sets"):
            make_one(number, 3)


def test_an_index_that_differs_between_devices_is_refused():
    rows, params, stats = make()
    run = jax.shard_map(
        lambda x, i: sets.split_batch_norm(x, params, stats, i[0], axis_name=AXIS),
        mesh=executions.mesh(),
        in_specs=P(AXIS),
        out_specs=(P(AXIS), P()),
    )
    with pytest.raises(ValueError, match="differ along the mesh axes"):
        jax.jit(run)(rows["x"], INDEX)


# --- the modules ---------------------------------------------------------------------------------

NAMES = ("clean", "adversarial")
TWO = jnp.array([0, 1, 1, 0, 1, 0])
Z = jax.random.normal(jax.random.key(0), (6, 4, 3)) + 1


def linen_layer(**options):
    layer = jbn.linen.SplitBatchNorm(**{"sets": NAMES, **options})
    variables = layer.init(jax.random.key(0), Z, 0, use_running_average=False)

    def step(variables, x, index, train=True, **arrays):
        y, new = layer.apply(
            variables, x, index, use_running_average=not train, mutable=["batch_stats"], **arrays
        )
        return y, variables | new

    return variables, step


def nnx_layer(**options):
    options = {"sets": NAMES, **options}
    layer = jbn.nnx.SplitBatchNorm(3, rngs=nnx.Rngs(0), **options)
    graph, _, _ = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def variables(layer):
        _, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)
        return {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}

    def step(old, x, index, train=True, **arrays):
        layer = nnx.merge(graph, old["params"], old["batch_stats"])
        layer.train() if train else layer.eval()
        y = layer(x, index, **arrays)
        return y, variables(layer)

    return variables(layer), step


LAYERS = pytest.mark.parametrize("skin", [linen_layer, nnx_layer], ids=["linen", "nnx"])


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("index", ["adversarial", 1, "traced", "each"])
@pytest.mark.parametrize("update", [None, jbn.cumulative()], ids=["momentum", "update"])
def test_a_layer_computes_the_pure_function(skin, index, update):
    variables, step = skin(momentum=0.9, update=update, activation=jnp.tanh)
    at = {"traced": jnp.int32(1), "each": TWO}.get(index, index)
    mask = jnp.ones((6, 4, 1), bool).at[0].set(False)
    residual = Z / 2
    y, new = step(variables, Z, at, mask=mask, residual=residual)
    params, stats = jbn.Params(**variables["params"]), sets.init_stats(2, 3)
    options = {"names": NAMES, "activation": jnp.tanh, "residual": residual}
    rule = update or jbn.ema(0.9)
    expected, after = sets.split_batch_norm(Z, params, stats, at, mask=mask, update=rule, **options)
    np.testing.assert_array_equal(y, expected)
    fields = ("mean", "var", "count") if update else ("mean", "var")
    assert set(new["batch_stats"]) == set(fields)
    for field in fields:
        np.testing.assert_array_equal(new["batch_stats"][field], getattr(after, field))
    y, same = step(new, Z, at, train=False, residual=residual)
    np.testing.assert_array_equal(
        y, sets.split_batch_norm_inference(Z, params, after, at, **options)
    )
    chex.assert_trees_all_equal(same, new)


@pytest.mark.slow
@LAYERS
@pytest.mark.parametrize("shared", [True, False])
def test_parameters_of_a_layer(skin, shared):
    with jax.numpy_dtype_promotion("standard"):
        variables, step = skin(sets=3, share_params=shared, param_dtype=jnp.float16)
    shape = (3,) if shared else (3, 3)
    chex.assert_shape(jax.tree.leaves(variables["params"]), shape)
    chex.assert_type(jax.tree.leaves(variables["params"]), jnp.float16)
    chex.assert_shape(jax.tree.leaves(variables["batch_stats"]), (3, 3))
    chex.assert_type(jax.tree.leaves(variables["batch_stats"]), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        assert step(variables, Z, 2)[0].dtype == jnp.float32
    variables, step = skin(use_scale=False, use_bias=False, dtype=jnp.bfloat16)
    assert not variables.get("params")
    assert step({"params": {}, **variables}, Z, 1)[0].dtype == jnp.bfloat16


@pytest.mark.slow
@LAYERS
def test_a_layer_under_jit_scan_and_named_axes(skin):
    variables, step = skin(update=jbn.cumulative())
    index = jnp.stack([TWO] * 2)

    def body(variables, index):
        return step(variables, Z, index)[::-1]

    after, _ = jax.lax.scan(body, variables, index)
    np.testing.assert_array_equal(after["batch_stats"]["count"], 2.0)
    variables, step = skin(axis_name=AXIS)
    y, new = jax.vmap(lambda x, i: step(variables, x, i), axis_name=AXIS)(
        executions.cut(2, Z), executions.cut(2, TWO)
    )
    _, plain = skin()
    expected, after = plain(variables, Z, TWO)
    chex.assert_trees_all_close(executions.rejoin(y), expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        jax.tree.map(lambda v: v[0], new["batch_stats"]), after["batch_stats"], rtol=1e-5
    )


@LAYERS
def test_errors_of_a_layer(skin):
    variables, step = skin()
    with pytest.raises(ValueError, match=r"'dirty' is not the name.*clean"):
        step(variables, Z, "dirty")
    with pytest.raises((TypeError, ValueError), match="sets"):
        skin(sets="clean")
    with pytest.raises(TypeError, match="floating point"):
        step(variables, jnp.ones((6, 4, 3), jnp.int32), 0)


@pytest.mark.slow
def test_a_linen_block_with_dynamic_sets_keeps_its_state_types():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, domain, train):
            x = nn.Dense(4)(x)
            x = jbn.linen.SplitBatchNorm(sets=3, activation=nn.relu)(x, domain, not train)
            return nn.Dense(1)(x)

    x, domain = Z[:, 0], jnp.array([0, 0, 1, 1, 2, 2])
    variables = Net().init(jax.random.key(0), x, domain, train=False)
    step = jax.jit(lambda v, i: Net().apply(v, x, i, train=True, mutable=["batch_stats"]))
    _, new = step(variables, domain)
    chex.assert_trees_all_equal_shapes_and_dtypes(new["batch_stats"], variables["batch_stats"])
