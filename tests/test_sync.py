"""Statistics over a named axis are those of the whole batch: forward, running, and derivatives.

The counts of the instances differ wherever a mask says so: a mean of means would be wrong.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jbn
from tests import cases, executions, oracle, tolerance

ROWS, CHANNELS = 16, 5
CASE = cases.Case((ROWS, 3, CHANNELS), offset=2.0)


def unequal(kind):
    """A mask that leaves the four instances 3, 0, 1 and 4 of their examples; or varies further."""
    if kind == "equal":
        return None
    examples = np.array([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]], bool)
    if kind == "examples":
        return examples.reshape(ROWS, 1, 1)
    features = np.random.default_rng(0).uniform(size=(ROWS, 3, CHANNELS)) < 0.6
    return features & examples.reshape(ROWS, 1, 1)


def layer(kind, case=CASE):
    data = cases.make(case)
    return data._replace(mask=unequal(kind)), jbn.Params(data.scale, data.bias)


def train(params, x, mask, axis_name):
    """(y, running statistics)."""
    stats = jbn.init_stats(CHANNELS)
    update = jbn.ema(0.9, unbiased=True)
    return jbn.batch_norm(x, params, stats, update=update, mask=mask, axis_name=axis_name)


@pytest.mark.parametrize("kind", ["equal", "examples", "features"])
@pytest.mark.parametrize("execute", executions.ALL, ids=lambda f: f.__name__)
class TestWholeBatch:
    """Each law in every execution."""

    def test_forward_and_running_statistics(self, execute, kind):
        data, params = layer(kind)
        y, stats = jax.jit(functools.partial(execute, train))(params, data.x, data.mask)
        expected, m = oracle.normalize(data.x, *params, mask=data.mask)
        tolerance.assert_close(y, expected, "float32", ROWS * 3, ratio=CASE.ratio)
        run = oracle.running([m], 0.9, unbiased=True)
        for instance in range(4):
            mean, var, count = (v[instance] for v in stats)
            tolerance.assert_close(mean, run.mean, "float32", ROWS * 3, magnitude=2)
            tolerance.assert_close(var, run.var, "float32", ROWS * 3)
            np.testing.assert_array_equal(count, run.count)

    def test_gradient(self, execute, kind):
        # Differentiated from outside, where there is one convention: d(total loss)/d(argument).
        data, params = layer(kind)

        @jax.jit
        def gradient(params, x, dy):
            def loss(params, x):
                return (dy * execute(train, params, x, data.mask)[0]).sum()

            return jax.grad(loss, argnums=(0, 1))(params, x)

        dparams, dx = gradient(params, data.x, data.dy)
        none = np.zeros_like(data.scale)
        expected = oracle.vjp(data.x, *params, data.dy, none, none, mask=data.mask)
        tolerance.assert_close(dx, expected[0], "float32", ROWS * 3, ratio=CASE.ratio)
        tolerance.assert_close(dparams.scale, expected[1], "float32", ROWS * 3, magnitude=48)
        tolerance.assert_close(dparams.bias, expected[2], "float32", ROWS * 3, magnitude=48)


@pytest.mark.parametrize("execute", executions.ALL[:4], ids=lambda f: f.__name__)
def test_second_order(execute, x64):
    data, params = jax.tree.map(jnp.asarray, layer("examples", CASE._replace(dtype="float64")))
    direction = jnp.asarray(np.random.default_rng(1).normal(size=data.x.shape))
    valid = jnp.broadcast_to(data.mask, data.x.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def hessian_vector(execute, x):
        def f(params, x, mask, axis_name):
            y, m = jbn.normalize(x, *params, mask=mask, axis_name=axis_name)
            return y, m.var

        def loss(x):
            y, var = execute(f, params, x, data.mask)
            return (data.dy * jnp.where(valid, y, 0.0) ** 3).sum() + (data.dvar * var.mean(0)).sum()

        forward = jax.jvp(jax.grad(loss), (x,), (direction,))[1]
        reverse = jax.grad(lambda x: (jax.grad(loss)(x) * direction).sum())(x)
        return forward, reverse

    def once(f, params, x, mask):
        rows, shared = executions.whole(f, params, x, mask)
        return rows, shared[None]

    expected = hessian_vector(once, data.x)
    for actual, desired in zip(hessian_vector(execute, data.x), expected, strict=True):
        tolerance.assert_close(actual, desired, "float64", ROWS * 3)


# --- gradients taken inside --------------------------------------------------------------------


def local(params, x, dy, mask):
    """An instance's own share of the loss."""
    y, _ = jbn.batch_norm(x, params, jbn.init_stats(CHANNELS), mask=mask, axis_name="batch")
    return (dy * y).sum()


@pytest.mark.parametrize("kind", ["equal", "examples"])
def test_inside_shard_map_the_loss_is_summed_and_then_differentiated(kind):
    # JAX knows that params are the same everywhere and adds up their gradients.
    data, params = layer(kind)

    def inside(params, x, dy, mask):
        total = lambda *at: jax.lax.psum(local(*at, dy, mask), "batch")  # noqa: E731
        return jax.grad(total, argnums=(0, 1))(params, x)

    assert_whole_gradient(inside, data, params, check_vma=True)


@pytest.mark.parametrize("kind", ["equal", "examples"])
def test_inside_unchecked_shard_map_the_own_loss_is_differentiated_and_then_summed(kind):
    data, params = layer(kind)

    def inside(params, x, dy, mask):
        own = lambda *at: local(*at, dy, mask)  # noqa: E731
        dparams, dx = jax.grad(own, argnums=(0, 1))(params, x)
        return jax.lax.psum(dparams, "batch"), dx

    assert_whole_gradient(inside, data, params, check_vma=False)


def assert_whole_gradient(inside, data, params, check_vma):
    specs = (P(), P("batch"), P("batch"), P("batch"))
    run = jax.shard_map(
        inside,
        mesh=executions.mesh(),
        in_specs=specs,
        out_specs=(P(), P("batch")),
        check_vma=check_vma,
    )
    dparams, dx = jax.jit(run)(params, data.x, data.dy, data.mask)
    none = np.zeros_like(data.scale)
    expected = oracle.vjp(data.x, *params, data.dy, none, none, mask=data.mask)
    tolerance.assert_close(dx, expected[0], "float32", ROWS * 3, ratio=CASE.ratio)
    tolerance.assert_close(dparams.scale, expected[1], "float32", ROWS * 3, magnitude=48)
    tolerance.assert_close(dparams.bias, expected[2], "float32", ROWS * 3, magnitude=48)


def test_inside_pmap_gradients_are_averaged():
    # The usual recipe: the loss is the mean over an instance, gradients are averaged over them.
    data, params = layer("equal")

    def inside(params, x, dy):
        own = lambda params: local(params, x, dy, None) / ROWS * 4  # noqa: E731
        return jax.lax.pmean(jax.grad(own)(params), "batch")

    x, dy = executions.cut(4, data.x), executions.cut(4, data.dy)
    dparams = jax.pmap(inside, axis_name="batch", in_axes=(None, 0, 0))(params, x, dy)
    none = np.zeros_like(data.scale)
    expected = oracle.vjp(data.x, *params, data.dy, none, none)
    for k in range(4):
        tolerance.assert_close(dparams.scale[k], expected[1] / ROWS, "float32", 48, magnitude=3)
        tolerance.assert_close(dparams.bias[k], expected[2] / ROWS, "float32", 48, magnitude=3)


# --- scopes ------------------------------------------------------------------------------------


def test_without_an_axis_name_each_instance_is_on_its_own():
    data, params = layer("equal")
    x = executions.cut(4, data.x)
    y = jax.jit(jax.vmap(lambda x: jbn.normalize(x, *params)[0], axis_name="batch"))(x)
    for own, part in zip(y, x, strict=True):
        tolerance.assert_close(own, oracle.normalize(part, *params)[0], "float32", 12, ratio=2)


def test_several_axis_names():
    data, params = layer("examples")
    specs = (P(("a", "b")), P(("a", "b")))

    def run(x, mask):
        y, m = jbn.normalize(x, *params, mask=mask, axis_name=("a", "b"))
        return y, m.mean

    run = jax.shard_map(
        run, mesh=executions.mesh((2, 4), ("a", "b")), in_specs=specs, out_specs=(specs[0], P())
    )
    y, mean = jax.jit(run)(data.x, data.mask)
    expected, m = oracle.normalize(data.x, *params, mask=data.mask)
    tolerance.assert_close(y, expected, "float32", ROWS * 3, ratio=CASE.ratio)
    tolerance.assert_close(mean, m.mean, "float32", ROWS * 3, magnitude=2)


def test_one_of_two_axis_names():
    data, params = layer("equal")
    spec = P(("a", "b"))
    run = jax.shard_map(
        lambda x: jbn.normalize(x, *params, axis_name="b")[0],
        mesh=executions.mesh((2, 4), ("a", "b")),
        in_specs=spec,
        out_specs=spec,
    )
    y = jax.jit(run)(data.x)
    for half in (slice(0, 8), slice(8, 16)):
        expected, _ = oracle.normalize(data.x[half], *params)
        tolerance.assert_close(y[half], expected, "float32", 24, ratio=CASE.ratio)


def test_index_groups_under_pmap():
    data, params = layer("examples")
    groups = [[0, 3], [1, 2]]
    run = jax.pmap(
        lambda x, mask: jbn.normalize(
            x, *params, mask=mask, axis_name="batch", axis_index_groups=groups
        ),
        axis_name="batch",
    )
    x, mask = executions.cut(4, data.x), executions.cut(4, data.mask)
    y, m = run(x, mask)
    for group in groups:
        own = np.concatenate(x[group]), np.concatenate(mask[group])
        expected, moments = oracle.normalize(own[0], *params, mask=own[1])
        got = np.concatenate(np.asarray(y)[group])
        tolerance.assert_close(got, expected, "float32", 24, ratio=CASE.ratio)
        for k in group:
            tolerance.assert_close(m.mean[k], moments.mean, "float32", 24, magnitude=2)


def test_one_example_per_instance_is_a_batch():
    # x has no axis of its own to reduce: all examples lie on the named one.
    data = cases.make(cases.Case((8, CHANNELS)))
    run = lambda x: jbn.normalize(x, data.scale, data.bias, axis_name="batch")  # noqa: E731
    y, m = jax.jit(jax.vmap(run, axis_name="batch"))(data.x)
    expected, moments = oracle.normalize(data.x, data.scale, data.bias)
    tolerance.assert_close(y, expected, "float32", 8)
    tolerance.assert_close(m.var[0], moments.var, "float32", 8)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_accuracy_does_not_depend_on_the_split(offset):
    case = cases.Case((64, CHANNELS), offset=offset)
    data = cases.make(case)
    run = jax.vmap(lambda x: jbn.normalize(x, axis_name="batch"), axis_name="batch")
    y, m = jax.jit(run)(executions.cut(8, data.x))
    expected, moments = oracle.normalize(data.x)
    tolerance.assert_close(y.reshape(64, -1), expected, "float32", 64, ratio=case.ratio)
    tolerance.assert_close(m.var[0], moments.var, "float32", 64)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_sample_of_one_instance_spoils_its_channel_everywhere_and_no_other(bad):
    data, params = layer("equal")
    data.x[5, 0, 1] = bad
    y, stats = jax.jit(functools.partial(executions.vmap, train))(params, data.x, None)
    others = [0, 2, 3, 4]
    expected, _ = oracle.normalize(data.x[..., others], *(p[others] for p in params))
    got = np.asarray(y)[..., others]
    tolerance.assert_close(got, expected, "float32", ROWS * 3, ratio=CASE.ratio)
    np.testing.assert_array_equal(stats.count, np.tile([1, 0, 1, 1, 1], (4, 1)))
    chex.assert_tree_all_finite(stats)


def test_an_axis_name_that_is_not_there():
    with pytest.raises(NameError, match="unbound"):
        jbn.normalize(jnp.zeros((4, 3)), axis_name="nowhere")


def test_one_collective_each_way():
    # Counts without a mask are known while tracing; the sums travel together.
    data, params = layer("equal")

    def step(params, x, dy):
        own = lambda params, x: local(params, x, dy, None)  # noqa: E731
        return jax.grad(own, argnums=(0, 1))(params, x)

    run = jax.shard_map(
        step,
        mesh=executions.mesh(),
        in_specs=(P(), P("batch"), P("batch")),
        out_specs=(P("batch"), P("batch")),
        check_vma=False,
    )
    text = jax.jit(run).lower(params, data.x, data.dy).compile().as_text()
    sums = [
        line for line in text.splitlines() if " all-reduce(" in line or "all-reduce-start(" in line
    ]
    assert len(sums) <= 3, sums  # the shift's maximum, the sums forward, the sums backward
