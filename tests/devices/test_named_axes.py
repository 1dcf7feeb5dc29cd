"""Statistics over devices equal those of the whole batch, for each kind of input in each mode.

A row of the matrix is a mode of `executions`, a column is a kind of input. All are compared with
the same float64 oracle on one device. Masks make the counts of the instances differ, so that a
mean of means would be wrong.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jbn
from tests import cases, executions, oracle, tolerance
from tests.core.test_derivatives import textbook

pytestmark = pytest.mark.usefixtures("cheap_programs")

ROWS, PLACES, CHANNELS = 16, 3, 5
SHARE = ROWS // executions.INSTANCES


class Kind(NamedTuple):
    """One kind of input."""

    name: str
    dtype: str = "float32"
    offsets: tuple = (2.0,)  # of the data, whose standard deviation is 1
    mask: str | None = None  # examples | features
    weights: bool = False
    groups: bool = False
    index_groups: list | None = None

    def __str__(self):
        return self.name


KINDS = (
    Kind("plain", offsets=(2.0, 1e4)),
    Kind("masked", mask="examples", offsets=(2.0, -1e4)),
    Kind("features", mask="features"),
    Kind("weights", weights=True),
    Kind("groups", groups=True, offsets=(2.0, 1e4)),
    Kind("groups_masked", groups=True, mask="examples"),
    Kind("index_groups", index_groups=[[0, 3], [1, 2]], mask="examples"),
    Kind("unequal_index_groups", index_groups=[[2], [3, 0, 1]], mask="examples"),
    Kind("bfloat16", dtype="bfloat16", mask="examples"),
    Kind("float16", dtype="float16"),
)


def make(kind, offset=2.0):
    """Makes (rows, params), the arrays of one batch."""
    case = cases.Case((ROWS, PLACES, CHANNELS), dtype=kind.dtype, offset=offset)
    data = cases.make(case)
    rows = {"x": data.x, "dy": data.dy}
    # The four instances keep 3, 0, 1 and 4 of their examples.
    examples = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]], bool)
    if kind.mask:
        rows["mask"] = examples.reshape(ROWS, 1, 1)
    if kind.mask == "features":
        rows["mask"] = rows["mask"] & (np.random.default_rng(0).uniform(size=data.x.shape) < 0.6)
    if kind.weights:
        uniform = np.random.default_rng(1).uniform(0.1, 3.0, (ROWS, 1, 1)).astype(np.float32)
        rows["weights"] = uniform * examples.reshape(ROWS, 1, 1)
    return rows, jbn.Params(data.scale, data.bias)


def arguments(kind, mode):
    """Returns the arguments that say which values share statistics."""
    given = {}
    if kind.groups:
        given["groups"] = 4 if mode.names is None else 2
    if kind.index_groups:
        given["axis_index_groups"] = kind.index_groups
    return given


def parts(kind, mode):
    """Returns the sets of rows that share statistics."""
    instances = np.arange(ROWS).reshape(-1, SHARE)
    if kind.index_groups:
        return [instances[group].ravel() for group in kind.index_groups]
    if kind.groups and mode.names is None:
        return list(np.arange(ROWS).reshape(4, -1))
    if kind.groups:  # the first halves of all instances, and the second
        return [half.ravel() for half in np.split(instances, 2, axis=1)]
    return [np.arange(ROWS)]


def support(rows, part=slice(None)):
    return {name: rows[name][part] for name in ("mask", "weights") if name in rows}


def psums(mode, kind):
    return kind.index_groups and mode.name in ("pmap", "shard_map_unchecked")


def matrix(kinds, modes=executions.ALL, quick=None):
    """Crosses modes with kinds; index groups need a named axis.

    All modes are among the quick tests, or those of which `quick` has the names.
    """

    def marks(mode, kind):
        if quick is None:  # a psum over index groups is in two modes only
            return pytest.mark.quick if psums(mode, kind) else ()
        return () if mode.name in quick else pytest.mark.slow

    return pytest.mark.parametrize(
        ("mode", "kind"),
        [
            pytest.param(mode, kind, marks=marks(mode, kind))
            for mode in modes
            for kind in kinds
            if mode.names is not None or not kind.index_groups
        ],
        ids=str,
    )


@matrix(KINDS)
def test_y_statistics_and_gradient_are_those_of_the_oracle(mode, kind):
    def layer(params, rows, axis_name):
        stats = jbn.init_stats(CHANNELS)
        keywords = {**arguments(kind, mode), **support(rows), "axis_name": axis_name}
        if mode.checks and kind.index_groups:
            # Each group has its own statistics.
            stats = jax.lax.pcast(stats, axis_name, to="varying")
        return jbn.batch_norm(rows["x"], params, stats, update=jbn.cumulative(), **keywords)

    def program(params, rows):
        # The gradient is taken outside of the mode, where there is one convention:
        # d(total loss)/d(argument).
        def loss(params, x):
            y, stats = mode.execute(layer, params, {**rows, "x": x})
            return (rows["dy"] * y).astype(jnp.float32).sum(), (y, stats)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, rows["x"])

    for offset in kind.offsets:  # with one compilation
        rows, params = make(kind, offset)
        result = mode.run(program, params, rows)
        assert_oracle(kind, mode, params, rows, abs(offset), *result)


def assert_oracle(kind, mode, params, rows, ratio, gradients, outputs):
    (dparams, dx), (y, stats) = gradients, outputs
    n = ROWS * PLACES
    close, none = tolerance.assert_close, np.zeros(CHANNELS)
    dscale, dbias = np.zeros(CHANNELS), np.zeros(CHANNELS)
    for part in parts(kind, mode):
        given = support(rows, part)
        at = rows["x"][part], *params
        expected, m = oracle.normalize(*at, **given)
        close(np.asarray(y)[part], expected, kind.dtype, n, ratio=ratio)
        expected = oracle.vjp(*at, rows["dy"][part], none, none, **given)
        close(np.asarray(dx)[part], expected[0], kind.dtype, n, ratio=ratio)
        dscale, dbias = dscale + expected[1], dbias + expected[2]
        if kind.index_groups:
            assert_statistics(stats, m, sorted({r // SHARE for r in part}))
    if not kind.index_groups:
        assert_statistics(stats, oracle.moments(rows["x"], **support(rows)), range(4))
    close(dparams.scale, dscale, "float32", n, magnitude=n, ratio=ratio)
    close(dparams.bias, dbias, "float32", n, magnitude=n)


def assert_statistics(stats, m, instances):
    for instance in instances:
        mean, var, count = (v[instance] for v in stats)
        tolerance.assert_close(mean, m.mean, "float32", ROWS * PLACES)
        tolerance.assert_close(var, m.var, "float32", ROWS * PLACES)
        np.testing.assert_array_equal(count, np.broadcast_to(m.count > 0, (CHANNELS,)))


SECOND = [k for k in KINDS if k.name in ("masked", "groups_masked", "index_groups")]


@matrix(SECOND, quick=("vmap", "shard_map", "jit"))
def test_second_derivatives_are_those_of_the_textbook(mode, kind, x64):
    rows, params = jax.tree.map(jnp.asarray, make(kind._replace(dtype="float64")))
    direction = jnp.asarray(np.random.default_rng(1).normal(size=rows["x"].shape))
    rows["direction"] = direction

    def layer(params, rows, axis_name):
        keywords = {**arguments(kind, mode), **support(rows), "axis_name": axis_name}
        y, m = jbn.normalize(rows["x"], *params, **keywords)
        return y, m.var if m.var.ndim == 1 else m.var.mean(0)

    def second(f):
        """Takes forward over reverse and reverse over reverse of a loss not linear in y."""

        def program(params, rows):
            def loss(x):
                y = f(params, {**rows, "x": x})
                y = jnp.where(jnp.broadcast_to(rows["mask"], y.shape), y, 0.0)
                return (rows["dy"] * y**3).sum()

            x, along = rows["x"], rows["direction"]
            forward = jax.jvp(jax.grad(loss), (x,), (along,))[1]
            return forward, jax.grad(lambda x: (jax.grad(loss)(x) * along).sum())(x)

        return program

    def in_parts(params, rows):
        y = jnp.zeros(rows["x"].shape)
        for part in parts(kind, mode):
            mask = jnp.broadcast_to(rows["mask"][part], rows["x"][part].shape)
            y = y.at[part].set(textbook(rows["x"][part], *params, mask.astype(float))[0])
        return y

    actual = mode.run(second(lambda *at: mode.execute(layer, *at)[0]), params, rows)
    expected = jax.jit(second(in_parts))(params, rows)
    for a, e in zip(actual, expected, strict=True):
        tolerance.assert_close(a, e, "float64", ROWS * PLACES)


@matrix(KINDS[1:2], executions.NAMED, quick=("vmap", "shard_map"))
def test_derivatives_of_the_moments(mode, kind, x64):
    rows, params = jax.tree.map(jnp.asarray, make(kind._replace(dtype="float64")))

    def layer(params, rows, axis_name):
        del params
        m = jbn.moments(rows["x"], axis_name=axis_name, **support(rows))
        return rows["x"], m

    def gradient(execute):
        def program(params, rows):
            def loss(x):
                m = execute(layer, params, {**rows, "x": x})[1]
                # Two instances give the moments, and both are those of one batch.
                return (m.mean[2] ** 2 * m.var[0]).sum()

            return jax.grad(lambda x: (jax.grad(loss)(x) * rows["dy"]).sum())(rows["x"])

        return program

    actual = mode.run(gradient(mode.execute), params, rows)
    expected = executions.WHOLE.run(gradient(executions.WHOLE.execute), params, rows)
    tolerance.assert_close(actual, expected, "float64", ROWS * PLACES)


# --- scopes ------------------------------------------------------------------------------------


def test_without_an_axis_name_each_instance_is_on_its_own():
    rows, params = make(KINDS[0])
    x = executions.cut(4, rows["x"])
    y = jax.jit(jax.vmap(lambda x: jbn.normalize(x, *params)[0], axis_name="batch"))(x)
    for own, part in zip(y, x, strict=True):
        tolerance.assert_close(own, oracle.normalize(part, *params)[0], "float32", 12, ratio=2)


def test_one_of_two_axis_names():
    rows, params = make(KINDS[0])
    spec = P(("a", "b"))
    run = jax.shard_map(
        lambda x: jbn.normalize(x, *params, axis_name="b")[0],
        mesh=executions.mesh((2, 4), ("a", "b")),
        in_specs=spec,
        out_specs=spec,
    )
    y = jax.jit(run)(rows["x"])
    for half in (slice(0, 8), slice(8, 16)):
        expected, _ = oracle.normalize(rows["x"][half], *params)
        tolerance.assert_close(y[half], expected, "float32", 24, ratio=2)


def test_index_groups_count_in_the_order_of_the_names():
    # Two devices have two instances each. Counted device by device these are 0, 1, 2, 3; counted in
    # the order of the names they are 0, 2, 1, 3, as jax.lax.axis_index counts them.
    rows, params = make(KINDS[0])
    options = {"axis_name": ("mapped", "device"), "axis_index_groups": [[2], [3, 0, 1]]}
    instance = lambda x: jbn.normalize(x, *params, **options)[0]  # noqa: E731
    run = jax.shard_map(
        jax.vmap(instance, axis_name="mapped"),
        mesh=executions.mesh((2,), ("device",)),
        in_specs=P("device"),
        out_specs=P("device"),
        check_vma=False,
    )
    y = np.asarray(jax.jit(run)(executions.cut(4, rows["x"])))
    for group in [1], [0, 2, 3]:
        x = executions.rejoin(executions.cut(4, rows["x"])[group])
        expected, _ = oracle.normalize(x, *params)
        tolerance.assert_close(executions.rejoin(y[group]), expected, "float32", 36, ratio=2)


def test_one_example_per_instance_is_a_batch():
    # x has no axis of its own to reduce: all examples are on the named axis.
    data = cases.make(cases.Case((8, CHANNELS)))
    run = lambda x: jbn.normalize(x, data.scale, data.bias, axis_name="batch")  # noqa: E731
    y, m = jax.jit(jax.vmap(run, axis_name="batch"))(data.x)
    expected, moments = oracle.normalize(data.x, data.scale, data.bias)
    tolerance.assert_close(y, expected, "float32", 8)
    tolerance.assert_close(m.var[0], moments.var, "float32", 8)


@pytest.mark.parametrize("instances", [2, 8, 64])
@pytest.mark.parametrize("offset", [1e3, 1e4, 1e6])
def test_accuracy_does_not_depend_on_the_split(offset, instances):
    case = cases.Case((64, CHANNELS), offset=offset)
    data = cases.make(case)
    run = jax.vmap(lambda x: jbn.normalize(x, axis_name="batch"), axis_name="batch")
    y, m = jax.jit(run)(executions.cut(instances, data.x))
    expected, moments = oracle.normalize(data.x)
    tolerance.assert_close(y.reshape(64, -1), expected, "float32", 64, ratio=case.ratio)
    tolerance.assert_close(m.var[0], moments.var, "float32", 64)


def test_instances_whose_data_lie_far_apart():
    # The variance is mostly between the instances; each has a shift of its own.
    x = np.random.default_rng(0).normal(size=(8, 16, 3)) + 1e3 * np.arange(8).reshape(8, 1, 1)
    x = x.astype(np.float32)
    run = jax.vmap(lambda x: jbn.normalize(x, axis_name="batch"), axis_name="batch")
    y, m = jax.jit(run)(x)
    expected, moments = oracle.normalize(executions.rejoin(x))
    tolerance.assert_close(executions.rejoin(y), expected, "float32", 128)
    tolerance.assert_close(m.var[0], moments.var, "float32", 128)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("mode", [executions.NAMED[3], executions.GLOBAL[0]], ids=str)
def test_a_bad_sample_of_one_instance_spoils_its_channel_everywhere_and_no_other(mode, bad):
    rows, params = make(KINDS[0])
    rows["x"][5, 0, 1] = bad

    def layer(params, rows, axis_name):
        return jbn.batch_norm(rows["x"], params, jbn.init_stats(CHANNELS), axis_name=axis_name)

    y, stats = mode.run(lambda *at: mode.execute(layer, *at), params, rows)
    others = [0, 2, 3, 4]
    expected, _ = oracle.normalize(rows["x"][..., others], *(p[others] for p in params))
    tolerance.assert_close(np.asarray(y)[..., others], expected, "float32", 48, ratio=2)
    np.testing.assert_array_equal(stats.count, np.tile([1, 0, 1, 1, 1], (4, 1)))
    chex.assert_tree_all_finite(stats)
    if np.isinf(bad):  # inf shows only at its own position; the rest of the channel is the bias
        y = np.delete(np.asarray(y)[..., 1].ravel(), 5 * PLACES)
        np.testing.assert_array_equal(y, np.full_like(y, params.bias[1]))


def test_a_constant_channel_is_exactly_the_bias_in_every_instance():
    x = np.full((4, 6, 2), -33333.3, np.float32)
    run = jax.vmap(lambda x: jbn.normalize(x, axis_name="batch"), axis_name="batch")
    y, m = jax.jit(run)(x)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(m.var, 0)


# --- gradients taken inside ----------------------------------------------------------------------


def local(params, x, dy, mask):
    """Returns an instance's own share of the loss."""
    y, _ = jbn.batch_norm(x, params, jbn.init_stats(CHANNELS), mask=mask, axis_name="batch")
    return (dy * y).sum()


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_inside_shard_map(check_vma, kind):
    # With check_vma JAX knows that params are replicated and adds up their gradients: here the
    # summed loss is differentiated. Without it the gradients are summed afterwards.
    rows, params = make(kind)

    def inside(params, x, dy, mask):
        own = lambda *at: local(*at, dy, mask)  # noqa: E731
        if check_vma:
            total = lambda *at: jax.lax.psum(own(*at), "batch")  # noqa: E731
            return jax.grad(total, argnums=(0, 1))(params, x)
        dparams, dx = jax.grad(own, argnums=(0, 1))(params, x)
        return jax.lax.psum(dparams, "batch"), dx

    run = jax.shard_map(
        inside,
        mesh=executions.mesh(),
        in_specs=(P(), P("batch"), P("batch"), P("batch")),
        out_specs=(P(), P("batch")),
        check_vma=check_vma,
    )
    mask = rows.get("mask")
    dparams, dx = jax.jit(run)(params, rows["x"], rows["dy"], mask)
    none = np.zeros(CHANNELS)
    expected = oracle.vjp(rows["x"], *params, rows["dy"], none, none, mask=mask)
    tolerance.assert_close(dx, expected[0], "float32", ROWS * 3, ratio=2)
    tolerance.assert_close(dparams.scale, expected[1], "float32", ROWS * 3, magnitude=48)
    tolerance.assert_close(dparams.bias, expected[2], "float32", ROWS * 3, magnitude=48)


def test_inside_pmap_gradients_are_averaged():
    # The usual recipe: the loss is the mean over an instance, and gradients are averaged over the
    # instances.
    rows, params = make(KINDS[0])

    def inside(params, x, dy):
        own = lambda params: local(params, x, dy, None) / ROWS * 4  # noqa: E731
        return jax.lax.pmean(jax.grad(own)(params), "batch")

    x, dy = executions.cut(4, rows["x"]), executions.cut(4, rows["dy"])
    dparams = jax.pmap(inside, axis_name="batch", in_axes=(None, 0, 0))(params, x, dy)
    none = np.zeros(CHANNELS)
    expected = oracle.vjp(rows["x"], *params, rows["dy"], none, none)
    for k in range(4):
        tolerance.assert_close(dparams.scale[k], expected[1] / ROWS, "float32", 48, magnitude=3)
        tolerance.assert_close(dparams.bias[k], expected[2] / ROWS, "float32", 48, magnitude=3)
