"""activation= and residual= give the values of the composition and save less for backward."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
from tests import cases
from tests.core.test_derivatives import derivatives
from tests.core.test_residuals import kept

pytestmark = pytest.mark.usefixtures("cheap_programs")

SHAPE, CHANNELS = (8, 4, 5), 5
FORMS = {  # activation, residual
    "relu": (jax.nn.relu, False),
    "silu": (jax.nn.silu, False),
    "add": (None, True),
    "add relu": (jax.nn.relu, True),
    "add silu": (jax.nn.silu, True),
}
each_form = pytest.mark.parametrize("form", FORMS)


def residual_of(case):
    return np.random.default_rng(7).normal(size=case.shape).astype(case.dtype)


def fused(form, x, scale, bias, r, **options):
    activation, adds = FORMS[form]
    residual = r if adds else None
    y, m = jbn.normalize(x, scale, bias, activation=activation, residual=residual, **options)
    return y, m.mean, m.var


def composed(form, x, scale, bias, r, **options):
    """Applies activation and residual after the layer, in the accumulator's dtype; rounds once."""
    activation, adds = FORMS[form]
    dtype = jbn._core.shift.accumulator(x.dtype)
    y, m = jbn.normalize(x, scale, bias, dtype=dtype, **options)
    y = y + r.astype(dtype) if adds else y
    return (y if activation is None else activation(y)).astype(x.dtype), m.mean, m.var


@each_form
@pytest.mark.parametrize(
    "case",
    [
        cases.Case(SHAPE),
        cases.Case((CHANNELS, 8, 4), axis=0),
        cases.Case(SHAPE, dtype="bfloat16"),
        cases.Case(SHAPE, mask="features"),
        cases.Case(SHAPE, weights="examples"),
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [None, 2])
def test_value_and_gradient_are_those_of_the_composition(form, case, groups):
    data, r = cases.make(case), residual_of(case)
    options = {**case.kwargs, **data.support, "groups": groups}

    def value_and_gradient(f, dy):
        run = lambda *at: f(form, *at, **options)[0]  # noqa: E731
        y, pull = jax.vjp(run, data.x, data.scale, data.bias, r)
        return y, pull(dy)

    run = jax.jit(value_and_gradient, static_argnums=0)
    actual, expected = run(fused, data.dy), run(composed, data.dy)
    chex.assert_trees_all_equal_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=2e-6, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["add silu", pytest.param("silu", marks=pytest.mark.slow)])
def test_every_order_is_that_of_the_composition(form, x64):
    case = cases.Case((4, 3, 3), dtype="float64", mask="examples")
    data, r = cases.make(case), residual_of(case)
    rng = np.random.default_rng(0)
    at = data.x, data.scale, data.bias
    directions = [tuple(rng.normal(size=v.shape) for v in at) for _ in range(3)]
    run = jax.jit(derivatives, static_argnums=0)

    def of(f):
        outputs = lambda *at: f(form, *at, r, **data.support)  # noqa: E731
        cotangents = data.dy, data.dmean, data.dvar
        return run(outputs, at, directions, cotangents)

    chex.assert_trees_all_close(of(fused), of(composed), rtol=1e-10, atol=1e-10)


def test_an_activation_may_hold_constants():
    x, slope = jax.random.normal(jax.random.key(0), SHAPE), jnp.float32(0.1)
    leaky = lambda y: jnp.where(y > 0, y, slope * y)  # noqa: E731
    actual = jax.jit(lambda x: jbn.normalize(x, activation=leaky)[0])(x)
    chex.assert_trees_all_close(actual, leaky(jbn.normalize(x)[0]), rtol=1e-5, atol=1e-6)


def test_an_activation_with_a_learned_slope_goes_behind_the_layer():
    x = jax.random.normal(jax.random.key(0), SHAPE)

    def loss(slope):
        return jbn.normalize(x, activation=lambda y: jnp.where(y > 0, y, slope * y))[0].sum()

    for transformed in (jax.jit(loss), jax.grad(loss)):
        with pytest.raises(TypeError, match=r"static.*learned slope\. Apply it behind the layer"):
            transformed(0.1)


# --- Saved for backward --------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backward_pass_keeps_x_and_at_most_y_or_the_residual(form, dtype, one_device):
    case = cases.Case(SHAPE, dtype=dtype)
    data, r = cases.make(case), residual_of(case)
    at = data.x, data.scale, data.bias, r
    leaves = kept(lambda *at: fused(form, *at)[0], *at)
    large = [a for a in leaves if a.size > CHANNELS]
    # With add and relu it keeps y, which the next layer stores anyway as its input; with add and
    # another activation it keeps the residual.
    y = jax.jit(lambda *at: fused(form, *at)[0])(*at)
    expected = [data.x, *{"add relu": [y], "add silu": [r]}.get(form, [])]
    assert len(large) == len(expected), [f"{a.dtype}{list(a.shape)}" for a in leaves]
    for values in expected:
        assert any(a.dtype == values.dtype and np.array_equal(a, values) for a in large)


def test_an_activation_after_the_layer_keeps_more(one_device):
    # This shows that the test above can fail: the composition also keeps the activation's input or
    # its mask.
    data = cases.make(cases.Case(SHAPE))
    leaves = kept(lambda x: jax.nn.relu(jbn.normalize(x)[0]), data.x)
    assert sum(a.size > CHANNELS for a in leaves) > 1


def network(kernels, x, wrap=lambda f: f):
    def block(x, kernel):
        y = jax.lax.conv(x, kernel, (1, 1), "SAME")
        return jbn.normalize(y, axis=1, activation=jax.nn.relu)[0]

    for kernel in kernels:
        x = wrap(block)(x, kernel)
    return (x**2).sum()


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_the_policy_rematerialises_neither_convolutions_nor_moments(one_device):
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 8))
    kernels = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 3))

    def cost(wrap):
        run = lambda kernels: network(kernels, x, wrap)  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(run))(kernels).jaxpr
        names = [eqn.primitive.name for eqn in equations(jaxpr)]
        held = [a for a in jax.tree.leaves(jax.vjp(run, kernels)[1]) if a.size == x.size]
        return names.count("conv_general_dilated"), names.count("reduce_sum"), len(held)

    plain = cost(lambda f: f)
    ours = cost(lambda f: jax.checkpoint(f, policy=jbn.checkpoint_policy))
    everything = cost(jax.checkpoint)
    assert ours[:2] == plain[:2]
    assert everything[0] > plain[0]
    assert everything[1] > plain[1]
    # Each block keeps the result of its convolution, and its input, which jax.checkpoint always
    # keeps.
    assert ours[2] <= plain[2]


@pytest.mark.parametrize("policy", [None, jbn.checkpoint_policy], ids=["all again", "policy"])
def test_gradients_under_a_checkpoint_are_the_same(policy):
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 8))
    kernels = jax.random.normal(jax.random.key(1), (2, 3, 3, 3, 3))
    wrap = lambda f: jax.checkpoint(f, policy=policy)  # noqa: E731
    actual = jax.jit(jax.grad(lambda k: network(k, x, wrap)))(kernels)
    expected = jax.jit(jax.grad(lambda k: network(k, x)))(kernels)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


# --- The core, Flax layers and several devices ---------------------------------------------------


def test_core_training_and_inference():
    case = cases.Case(SHAPE)
    data, r = cases.make(case), residual_of(case)
    params, stats = jbn.Params(data.scale, data.bias), jbn.init_stats(CHANNELS)
    y, new = jbn.batch_norm(data.x, params, stats, activation=jax.nn.relu, residual=r)
    plain, same = jbn.batch_norm(data.x, params, stats)
    chex.assert_trees_all_close(y, jax.nn.relu(plain + r), rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(new, same, rtol=1e-6)
    y = jbn.batch_norm_inference(data.x, params, new, activation=jax.nn.relu, residual=r)
    expected = jax.nn.relu(jbn.batch_norm_inference(data.x, params, new) + r)
    chex.assert_trees_all_close(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_linen(inference, dtype):
    case = cases.Case(SHAPE)
    data, r = cases.make(case), residual_of(case)
    layer = jbn.linen.BatchNorm(inference, dtype=dtype, activation=jax.nn.relu)
    variables = layer.init(jax.random.key(0), data.x, residual=r)
    y, new = layer.apply(variables, data.x, residual=r, mutable="batch_stats")
    plain = linen.BatchNorm(inference)
    expected, same = plain.apply(variables, data.x, mutable="batch_stats")
    expected = jax.nn.relu(expected + r).astype(y.dtype)
    chex.assert_type(y, jnp.float32 if dtype is None else dtype)
    tight = {"rtol": 1e-2, "atol": 1e-2} if dtype else {"rtol": 1e-5, "atol": 1e-5}
    chex.assert_trees_all_close(y, expected, **tight)
    chex.assert_trees_all_close(new, same, rtol=1e-5)


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
def test_nnx(inference):
    case = cases.Case(SHAPE)
    data, r = cases.make(case), residual_of(case)
    options = {"use_running_average": inference, "rngs": nnx.Rngs(0)}
    y = jbn.nnx.BatchNorm(CHANNELS, activation=jax.nn.relu, **options)(data.x, residual=r)
    expected = jax.nn.relu(nnx.BatchNorm(CHANNELS, **options)(data.x) + r)
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_linen_layer_takes_a_single_example():
    layer = jbn.linen.BatchNorm(use_running_average=False, activation=jax.nn.relu)
    x, r = jnp.array([1.0, -2.0]), jnp.array([3.0, -4.0])
    variables = layer.init(jax.random.key(0), x)
    y, _ = layer.apply(variables, x, residual=r, mutable="batch_stats")
    np.testing.assert_array_equal(y, [3.0, 0.0])  # one value is its own mean


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("groups", [None, 4])
def test_sharded(axis_type, groups):
    case = cases.Case(SHAPE)
    data, r = cases.make(case), residual_of(case)
    mesh = jax.make_mesh((4,), ("data",), (axis_type,), devices=jax.devices()[:4])

    def value_and_gradient(f, x, r, dy):
        run = lambda x, r: f("add relu", x, data.scale, data.bias, r, groups=groups)[0]  # noqa: E731
        y, pull = jax.vjp(run, x, r)
        return y, pull(dy)

    expected = jax.jit(value_and_gradient, static_argnums=0)(composed, data.x, r, data.dy)
    with jax.set_mesh(mesh):
        at = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (data.x, r, data.dy)]
        actual = jax.jit(value_and_gradient, static_argnums=0)(fused, *at)
    chex.assert_trees_all_close(actual, jax.device_get(expected), rtol=1e-5, atol=1e-5)


def test_shard_map():
    case = cases.Case(SHAPE)
    data, r = cases.make(case), residual_of(case)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    spread = {"in_specs": (P(), P("data"), P("data"), P("data")), "out_specs": (P("data"), P())}

    def value_and_gradient(f, scale, x, r, dy):
        run = lambda scale, x: f("add relu", x, scale, data.bias, r, **options)[0]  # noqa: E731
        y, pull = jax.vjp(run, scale, x)
        return y, pull(dy)[0]

    options = {}
    at = data.scale, data.x, r, data.dy
    expected = jax.jit(value_and_gradient, static_argnums=0)(composed, *at)
    options = {"axis_name": "data"}
    local = lambda *at: value_and_gradient(fused, *at)  # noqa: E731
    actual = jax.jit(jax.shard_map(local, mesh=mesh, **spread))(*at)
    chex.assert_trees_all_close(actual, jax.device_get(expected), rtol=1e-5, atol=1e-5)


# --- Wrong arguments -----------------------------------------------------------------------------


class Unhashable(list):
    def __call__(self, y):
        return y


@pytest.mark.parametrize("inference", [False, True], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"activation": "relu"}, TypeError, r"function of an array, such as jax\.nn\.relu; got"),
        ({"activation": jnp.sum}, ValueError, r"elementwise.*\(4, 2\).*returned \(\)"),
        ({"activation": lambda y: None}, ValueError, "returned None"),
        ({"activation": Unhashable()}, TypeError, "must be hashable"),
        ({"residual": jnp.ones((4, 1))}, ValueError, r"x's shape, \(4, 2\); got \(4, 1\)"),
        ({"residual": jnp.ones((4, 2), int)}, TypeError, "residual must be floating point"),
    ],
    ids=["name", "not elementwise", "nothing", "unhashable", "shape", "int"],
)
def test_errors(inference, given, error, message):
    x, params, stats = jnp.ones((4, 2)), jbn.init_params(2), jbn.init_stats(2)
    call = jbn.batch_norm_inference if inference else jbn.batch_norm
    with pytest.raises(error, match=message):
        call(x, params, stats, **given)


@pytest.mark.parametrize("form", ["silu", "add relu", "add silu"])
@pytest.mark.parametrize("junk", [np.nan, -np.inf, 1e30])
def test_a_masked_value_that_is_not_finite_reaches_no_gradient(form, junk):
    case = cases.Case(SHAPE, mask="positions")
    data, r = cases.make(case, masked=junk), residual_of(case)
    r = np.where(data.valid, r, np.float32(junk))
    dy = np.where(data.valid, data.dy, np.float32(0))

    @jax.jit
    def gradient(x, r):
        run = lambda *at: fused(form, *at, **data.support)[0]  # noqa: E731
        return jax.vjp(run, x, data.scale, data.bias, r)[1](dy)

    same = gradient(cases.make(case).x, np.where(data.valid, r, np.float32(0)))
    chex.assert_tree_all_finite(same)
    chex.assert_trees_all_close(gradient(data.x, r), same, rtol=1e-6, atol=1e-6)


def test_widening_by_bits_is_exact_and_differentiated():
    r = residual_of(cases.Case(SHAPE, dtype="bfloat16"))
    widened = lambda r: jbn._xla.hints.widened(r, np.dtype("float32"))  # noqa: E731
    np.testing.assert_array_equal(widened(jnp.asarray(r)), r.astype(np.float32))
    (dr,) = jax.vjp(widened, jnp.asarray(r))[1](jnp.full(SHAPE, 2.0))
    np.testing.assert_array_equal(dr.astype(jnp.float32), 2.0)
