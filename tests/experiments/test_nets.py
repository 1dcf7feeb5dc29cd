"""BN-Inception has the rows of the paper's appendix, and each part works on its own.

The network at 224 x 224 is checked by its shapes only; networks that compute have few channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jbn.linen
from experiments.nets import bn_inception, convolution
from tests.tolerance import assert_close, tol

FULL = (2, 224, 224, 3)
TINY = {  # a convolution and a module
    "rows": bn_inception.rows("3c", width=1 / 32),
    "stem": ((6, 3, 2),),
    "n_classes": 5,
    "separable": None,
}
# Compiling takes most of the time, so XLA does not optimise here.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
pytestmark = pytest.mark.usefixtures("one_device")


def shapes_of(net, shape, train=False):
    """Returns (variables, {path: (module, output)}), as shapes without any computation."""
    outputs = {}

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.method_name == "__call__":
            outputs["/".join(context.module.path)] = context.module, y
        return y

    def init():
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        return net.init(keys, jnp.zeros(shape), train)

    with nn.intercept_methods(record):
        variables = jax.eval_shape(init)
    return variables, outputs


def n_parameters(variables):
    return sum(v.size for v in jax.tree.leaves(variables["params"]))


def images(n=4, size=12):
    return jax.random.normal(jax.random.key(7), (n, size, size, 3))


def init(net, *args, **kwargs):
    """Draws all variables of a network at random, also scales, biases and statistics."""
    shapes = jax.eval_shape(functools.partial(net.init, **kwargs), jax.random.key(0), *args)
    rng = np.random.default_rng(0)

    def draw(path, like):
        values = rng.standard_normal(like.shape)
        if path[-1].key == "kernel":
            values *= np.prod(like.shape[:-1]) ** -0.5
        else:
            values = 0.1 * values + (path[-1].key in ("scale", "var"))
        return jnp.asarray(values, like.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def value_and_gradient(net, variables, x):
    """Returns logits and statistics of training, and the gradient of a random sum of the logits."""

    @jit
    def run(variables, x):
        def output(params):
            given = {**variables, "params": params}
            return net.apply(given, x, train=True, mutable=["batch_stats"])

        logits, pull, stats = jax.vjp(output, variables["params"], has_aux=True)
        (gradient,) = pull(jax.random.normal(jax.random.key(3), logits.shape))
        return logits, stats, gradient

    return run(variables, x)


def assert_same(got, want):
    """Compares the results of two ways to compute a small network in float32.

    The longest sum is that of a kernel's gradient, over 4 x 6 x 6 positions. Batch Normalization
    subtracts what a whole batch has in common, from gradients, too. The result is smaller than the
    terms that were summed, hence the magnitude.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        magnitude = 10 * max(1, float(np.max(np.abs(b))))
        assert_close(a, b, jnp.float32, 4 * 6 * 6, magnitude=magnitude)


# --- The network of the appendix ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower():
    return shapes_of(bn_inception.BNInception(), FULL)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ConvUnit_0", (112, 112, 64)),
        ("ConvUnit_1", (56, 56, 64)),  # after the pooling: the 1x1 before the 3x3
        ("ConvUnit_2", (56, 56, 192)),
        ("inception_3a", (28, 28, 256)),
        ("inception_3b", (28, 28, 320)),
        ("inception_3c", (14, 14, 576)),  # printed: 28 x 28, which is its input
        ("inception_4a", (14, 14, 576)),
        ("inception_4b", (14, 14, 576)),
        ("inception_4c", (14, 14, 608)),  # 160 + 160 + 160 + 128; printed: 576
        ("inception_4d", (14, 14, 608)),  # 96 + 192 + 192 + 128; printed: 576
        ("inception_4e", (7, 7, 1056)),  # 192 + 256 + 608; printed: 14 x 14 x 1024
        ("inception_5a", (7, 7, 1024)),
        ("inception_5b", (7, 7, 1024)),
        ("Dropout_0", (1024,)),
        ("readout", (1000,)),
        ("", (1000,)),
    ],
)
def test_every_row_has_its_shape(tower, name, shape):
    assert tower[1][name][1].shape == (2, *shape)


def test_the_first_module_sees_what_the_second_pooling_leaves(tower):
    kernel = tower[0]["params"]["inception_3a"]["ConvUnit_0"]["Conv_0"]["kernel"]
    assert kernel.shape == (1, 1, 192, 64)
    assert tower[1]["inception_3a"][1].shape[1:3] == (28, 28)


# The columns of the appendix: output channels of a module's convolutions, in the order 1x1,
# 3x3 reduce, 3x3, double 3x3 reduce, twice double 3x3, projection of the pooling.
PRINTED = {
    "3a": (64, 64, 64, 64, 96, 96, 32),
    "3b": (64, 64, 96, 64, 96, 96, 64),
    "3c": (128, 160, 64, 96, 96),
    "4a": (224, 64, 96, 96, 128, 128, 128),
    "4b": (192, 96, 128, 96, 128, 128, 128),
    "4c": (160, 128, 160, 128, 160, 160, 128),
    "4d": (96, 128, 192, 160, 192, 192, 128),
    "4e": (128, 192, 192, 256, 256),
    "5a": (352, 192, 320, 160, 224, 224, 128),
    "5b": (352, 192, 320, 192, 224, 224, 128),
}
SIZES = {7: (1, 1, 3, 1, 3, 3, 1), 5: (1, 3, 1, 3, 3)}  # of the kernels
STRIDES = {7: (1,) * 7, 5: (1, 2, 1, 1, 2)}


@pytest.mark.parametrize("name", PRINTED)
def test_every_convolution_of_a_row(tower, name):
    convs = [
        module
        for path, (module, _) in tower[1].items()
        if path.startswith(f"inception_{name}/") and isinstance(module, nn.Conv)
    ]
    channels = tuple(conv.features for conv in convs)
    # The order is that of the calls: the first of the double ones comes after its reduction.
    assert channels == PRINTED[name]
    assert tuple(conv.kernel_size[0] for conv in convs) == SIZES[len(channels)]
    assert tuple(conv.strides for conv in convs) == STRIDES[len(channels)]


def test_the_channels_of_a_row_are_the_sum_of_its_branches():
    channels = 192
    for row in bn_inception.BN_INCEPTION:
        branches = [row.conv_1x1, row.conv_3x3, row.double_3x3, row.proj or channels]
        channels = sum(branches)
        assert row.width(sum(branches[3:]) if not row.proj else 0) == channels
    assert channels == 1024


@pytest.mark.parametrize(("separable", "count"), [(None, 11_285_224), (8, 11_278_528)])
def test_as_many_parameters_as_the_printed_tower_has(separable, count):
    """Expects 11.29 million; the text says 13.6 million, which no variant of the table has."""
    variables, outputs = shapes_of(bn_inception.BNInception(separable=separable), FULL)
    assert n_parameters(variables) == count
    units = [module for module, _ in outputs.values() if isinstance(module, bn_inception.ConvUnit)]
    convs = [module for module, _ in outputs.values() if isinstance(module, nn.Conv)]
    assert len(units) == 3 + 8 * 7 + 2 * 5
    assert len(convs) == len(units) + (separable is not None)
    features = sum(unit.features for unit in units)
    assert sum(v.size for v in jax.tree.leaves(variables["batch_stats"])) == 2 * features


def test_the_longest_path_has_34_convolutions():
    """Counts the separable convolution as two, 1x1 and 3x3, and three in each of ten modules."""
    net = bn_inception.BNInception()
    variables, _ = shapes_of(net, FULL)
    jaxpr = jax.make_jaxpr(functools.partial(net.apply, train=False))(variables, jnp.zeros(FULL))
    depth = {}
    for equation in jaxpr.jaxpr.eqns:
        inputs = [depth.get(v, 0) for v in equation.invars if not hasattr(v, "val")]
        below = max(inputs, default=0) + (equation.primitive.name == "conv_general_dilated")
        depth |= dict.fromkeys(equation.outvars, below)
    assert max(depth.values()) == 34


def test_the_first_layer_is_separable(tower):
    params = tower[0]["params"]["ConvUnit_0"]
    assert params["Conv_0"]["kernel"].shape == (7, 7, 1, 24)  # 8 filters for each colour
    assert params["Conv_1"]["kernel"].shape == (1, 1, 24, 64)
    assert tower[1]["ConvUnit_0/Conv_0"][0].feature_group_count == 3
    assert [m.feature_group_count for m, _ in tower[1].values() if isinstance(m, nn.Conv)][1:] == (
        [1] * 69
    )


def test_the_plain_network_of_the_comparison():
    """Expects only local normalisation, Dropout of 40 %, and a bias in every convolution."""
    net = bn_inception.PlainInception()
    variables, outputs = shapes_of(net, FULL)
    assert set(variables) == {"params"}
    assert (net.lrn, net.dropout) == (True, 0.4)
    units = [module for module, _ in outputs.values() if isinstance(module, bn_inception.ConvUnit)]
    features = sum(unit.features for unit in units)
    assert n_parameters(variables) == 11_278_528 - features  # a bias, no scale


def test_a_convolution_has_a_bias_only_where_no_norm_has_one():
    for norm, names in [(None, {"kernel", "bias"}), (jbn.linen.BatchNorm, {"kernel"})]:
        variables, _ = shapes_of(bn_inception.Inception(norm=norm), FULL)
        found = {path: set(layer) for path, layer in kernels(variables["params"])}
        assert found.pop("ConvUnit_0/Conv_0") == {"kernel"}  # the separable one's filters
        assert found.pop("readout") == {"kernel", "bias"}
        assert len(found) == 69
        assert all(value == names for value in found.values())


def kernels(tree, path=""):
    """Returns (path, layer) of every layer with a kernel."""
    if "kernel" in tree:
        return [(path, tree)]
    inside = [(k, v) for k, v in tree.items() if isinstance(v, dict)]
    return [pair for k, v in inside for pair in kernels(v, f"{path}/{k}" if path else k)]


# --- Slots ----------------------------------------------------------------------------------------


@functools.cache
def reference(activation):
    """Returns (variables, results) of the network with the default slots."""
    net = bn_inception.Inception(**TINY, activation=activation)
    variables = init(net, images(), train=False)
    return variables, value_and_gradient(net, variables, images())


@pytest.mark.parametrize("activation", [nn.relu, nn.sigmoid])
def test_fused_is_the_same_network(activation):
    variables, want = reference(activation)
    net = bn_inception.Inception(**TINY, activation=activation, fused=True)
    assert_same(value_and_gradient(net, variables, images()), want)


@pytest.mark.parametrize("slots", [{"norm": nn.BatchNorm}, {"conv": convolution.CPU_CONV}])
def test_other_layers_fit_the_slots(slots):
    """Takes Flax's normalisation, or matrix products; variables and results are the same."""
    variables, want = reference(nn.relu)
    net = bn_inception.Inception(**TINY, **slots)
    like = jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), images())
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, variables)
    assert_same(value_and_gradient(net, variables, images()), want)


def test_flax_batch_norm_infers_the_same():
    variables, _ = reference(nn.relu)
    got, want = (
        jit(functools.partial(bn_inception.Inception(**TINY, norm=n).apply, train=False))(
            variables, images()
        )
        for n in (nn.BatchNorm, jbn.linen.BatchNorm)
    )
    assert_same(got, want)


@pytest.mark.parametrize("slots", [{"norm": None}, {"fused": False}, {"fused": True}])
def test_the_activation_is_in_every_unit_and_last(slots):
    net = bn_inception.Inception(
        bn_inception.rows("3a", "3c", width=1 / 32), auxiliary=("3a",),
        activation=lambda x: jnp.full_like(x, 7), **slots,
    )  # fmt: skip
    x = images(2, 32)
    variables = init(net, x, train=False)

    def units(variables, x):
        only = lambda module, _: isinstance(module, bn_inception.ConvUnit)  # noqa: E731
        return net.apply(variables, x, train=False, capture_intermediates=only)[1]

    values = jax.tree.leaves(jit(units)(variables, x))
    assert len(values) == 3 + 7 + 5 + 1
    assert all(np.all(v == 7) for v in values)


def test_half_precision_is_for_the_layers_only():
    for slots in ({"lrn": True, "norm": None}, {"fused": True, "auxiliary": ("4a",)}):
        net = bn_inception.Inception(dtype=jnp.bfloat16, dropout=0.4, **slots)
        variables, outputs = shapes_of(net, FULL, train=True)
        assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
        assert len(jax.tree.leaves(outputs[""][1])) == 1 + len(net.auxiliary)
        of_units = {y.dtype for m, y in outputs.values() if isinstance(m, bn_inception.ConvUnit)}
        assert of_units == {jnp.dtype("bfloat16")}
        convs = [y.dtype for m, y in outputs.values() if isinstance(m, nn.Conv)]
        assert set(convs) == {jnp.dtype("bfloat16")}
        assert {v.dtype for v in jax.tree.leaves(outputs[""][1])} == {jnp.dtype("float32")}
        assert outputs["Dropout_0"][1].dtype == jnp.float32


def test_rows_by_name():
    assert [row.name for row in bn_inception.rows("3c", "3a")] == ["3a", "3c"]
    with pytest.raises(ValueError, match=r"no row '3z'\. Expected 3a, 3b, 3c, 4a"):
        bn_inception.rows("3a", "3z")


def test_modules_that_keep_the_resolution_are_repeated():
    deeper = bn_inception.rows("3a", "3c", "5b", width=1 / 32, repeat=3)
    names = ["3a", "3a_2", "3a_3", "3c", "5b", "5b_2", "5b_3"]
    assert [row.name for row in deeper] == names
    first, *_ = bn_inception.rows("3a", width=1 / 32)
    assert deeper[2] == first._replace(name="3a_3")


def test_a_narrow_row_keeps_its_branches():
    for row, narrow in zip(bn_inception.rows(), bn_inception.rows(width=1 / 1000), strict=True):
        assert [n > 0 for n in narrow[1:6]] == [n > 0 for n in row[1:6]]
        assert (narrow.proj > 0, narrow.pool, narrow.stride) == (row.proj > 0, row.pool, row.stride)


# --- Layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["3a", "3c", "5b"])  # mean and 1x1, max, max and 1x1
def test_a_module_is_its_branches_side_by_side(name):
    [row] = bn_inception.rows(name, width=1 / 32)
    module, x = bn_inception.InceptionModule(row), images(2, 6)
    params = init(module, x)["params"]

    def unit(i, features, size, x, stride=1):
        layer = bn_inception.ConvUnit(features, size, stride)
        return layer.apply({"params": params[f"ConvUnit_{i}"]}, x)

    def by_hand(x):
        at, branches = 0, []
        if row.conv_1x1:
            at, branches = 1, [unit(0, row.conv_1x1, 1, x)]
        y = unit(at, row.reduce_3x3, 1, x)
        branches.append(unit(at + 1, row.conv_3x3, 3, y, row.stride))
        # Units are numbered when they are made, and this one is made after the 3x3 that takes it.
        y = unit(at + 3, row.reduce_double, 1, x)
        y = unit(at + 2, row.double_3x3, 3, y)
        branches.append(unit(at + 4, row.double_3x3, 3, y, row.stride))
        edge = (1, 1) if row.stride == 1 else (0, 1)
        filled = jnp.pad(
            x, ((0, 0), edge, edge, (0, 0)), constant_values=0.0 if row.pool == "avg" else -jnp.inf
        )
        steps = range(0, 6, row.stride)
        windows = [[filled[:, i : i + 3, j : j + 3] for j in steps] for i in steps]
        reduce = jnp.mean if row.pool == "avg" else jnp.max
        y = jnp.stack([jnp.stack([reduce(w, (1, 2)) for w in line], 1) for line in windows], 1)
        branches.append(unit(at + 5, row.proj, 1, y) if row.proj else y)
        return jnp.concatenate(branches, -1)

    got, want = jit(lambda x: module.apply({"params": params}, x))(x), jit(by_hand)(x)
    assert got.shape[-1] == row.width(3)
    assert_close(got, want, jnp.float32, 9 * 8)


@pytest.mark.parametrize("stride", [1, 2])
def test_separable_is_depthwise_then_pointwise(stride):
    """Expects that filter j of colour c makes channel 8 c + j, and that the 1x1 mixes them all."""
    unit = bn_inception.ConvUnit(4, 3, stride, depth_multiplier=8, activation=lambda x: x)
    x = images(2, 6)
    params = init(unit, x)["params"]
    filters, mix, bias = (
        np.asarray(v, np.float64)
        for v in (params["Conv_0"]["kernel"], *map(params["Conv_1"].get, ("kernel", "bias")))
    )
    low = 1 if stride == 1 else 0  # SAME pads 6 + 2 pixels for a stride of 1, 6 + 1 for one of 2
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (low, 1), (low, 1), (0, 0)))
    n = 6 // stride
    spread = np.zeros((2, n, n, 24))
    for row, column, channel in np.ndindex(n, n, 24):
        at = np.s_[:, row * stride : row * stride + 3, column * stride : column * stride + 3]
        window = padded[at][..., channel // 8]
        spread[:, row, column, channel] = (window * filters[:, :, 0, channel]).sum((1, 2))
    want = spread @ mix[0, 0] + bias
    assert_close(jit(unit.apply)({"params": params}, x), want, jnp.float32, 9 * 24)


def local_response_oracle(x, size=5, alpha=1e-4, beta=0.75):
    """Computes section 3.3 of Krizhevsky et al. 2012 with k = 1 and alpha / n, as Caffe does."""
    y = np.empty_like(x)
    channels = x.shape[-1]
    for i in range(channels):
        low, high = max(0, i - size // 2), min(channels - 1, i + size // 2)
        total = (x[..., low : high + 1] ** 2).sum(-1)  # beyond the edges there is nothing
        y[..., i] = x[..., i] / (1 + alpha / size * total) ** beta
    return y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 3, 8, 9])
def test_local_response_norm(channels, dtype):
    x = jnp.asarray(300 * np.random.default_rng(channels).standard_normal((2, 3, 3, channels)))
    x = x.astype(dtype)
    want = local_response_oracle(np.asarray(x, np.float64))
    # The normalisation is strong enough to be seen.
    assert abs(want).max() < 0.9 * abs(np.asarray(x, np.float64)).max()
    got = bn_inception.local_response_norm(x)
    assert got.dtype == x.dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, **tol(x.dtype, 5) | {"atol": 1e-5 * abs(want).max()}
    )


def test_local_response_norm_has_its_options():
    x = np.random.default_rng(0).standard_normal((2, 7))
    options = {"size": 3, "alpha": 2.0, "beta": 0.5}
    got = bn_inception.local_response_norm(jnp.float32(x), **options)
    assert_close(got, local_response_oracle(x, **options), jnp.float32, 3)


def test_mean_pool_counts_the_zeros_around_an_image():
    x = jnp.ones((1, 4, 4, 1))
    got = bn_inception.mean_pool(x, (3, 3), (1, 1), "SAME")[0, :, :, 0]
    np.testing.assert_allclose(got[0], np.array([4, 6, 6, 4]) / 9, rtol=1e-6)
    np.testing.assert_allclose(got[1:3, 1:3], 1, rtol=1e-6)
    y = bn_inception.mean_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), (2, 2), "VALID")
    assert y[0, :, :, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]


@pytest.mark.parametrize("lrn", [True, False])
def test_local_response_norm_is_in_the_stem_if_wanted(lrn):
    stem = ((6, 3, 2), "lrn", "pool", (4, 1, 1))
    slots = {"n_classes": 5, "separable": None, "norm": None}
    net, x = bn_inception.Inception((), stem, **slots, lrn=lrn), 1000 * images()
    params = init(net, x, train=False)["params"]

    def by_hand(params, x):
        y = bn_inception.ConvUnit(6, 3, 2).apply({"params": params["ConvUnit_0"]}, x)
        y = bn_inception.local_response_norm(y) if lrn else y
        y = nn.max_pool(y, (3, 3), (2, 2), "SAME")
        y = bn_inception.ConvUnit(4, 1).apply({"params": params["ConvUnit_1"]}, y)
        return y.mean((1, 2)) @ params["readout"]["kernel"] + params["readout"]["bias"][None]

    got = jit(functools.partial(net.apply, train=False))({"params": params}, x)
    want = jit(by_hand)(params, x)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    other = net.clone(lrn=not lrn)
    got = jit(functools.partial(other.apply, train=False))({"params": params}, x)
    assert not np.allclose(got, want, rtol=1e-2)


@pytest.mark.parametrize("rate", [0.4, 0.05])
def test_dropout_hides_its_share_of_the_features_in_training_only(rate):
    """Counts the zeros among 64 images x 30 features; all other values are scaled up."""
    net = bn_inception.Inception((), ((30, 3, 2),), 5, separable=None, norm=None,
                           activation=nn.sigmoid, dropout=rate)  # fmt: skip
    x = images(64, 4)
    variables = init(net, x, train=False)

    @functools.partial(jit, static_argnums=0)
    def features(train, key):
        keep = lambda module, _: isinstance(module, nn.Dropout)  # noqa: E731
        _, state = net.apply(
            variables, x, train=train, rngs={"dropout": key}, capture_intermediates=keep
        )
        return jax.tree.leaves(state)[0]

    whole = features(False, jax.random.key(0))
    assert float(abs(whole).min()) > 0
    hidden = features(True, jax.random.key(0))
    n = hidden.size
    dropped = np.asarray(hidden == 0)
    assert abs(dropped.mean() - rate) < 4 * (rate * (1 - rate) / n) ** 0.5
    np.testing.assert_allclose(
        hidden, np.where(dropped, 0, np.asarray(whole) / (1 - rate)), rtol=1e-5
    )
    assert not np.array_equal(dropped, features(True, jax.random.key(1)) == 0)
    np.testing.assert_array_equal(whole, features(False, jax.random.key(1)))


# --- Auxiliary heads ------------------------------------------------------------------------------


def test_auxiliary_heads_are_googlenets(tower):
    variables, outputs = shapes_of(
        bn_inception.BNInception(auxiliary=("4a", "4d")), FULL, train=True
    )
    logits, heads = outputs[""][1]
    assert [v.shape for v in (logits, *heads)] == [(2, 1000)] * 3
    head = variables["params"]["AuxiliaryHead_0"]
    assert head["ConvUnit_0"]["Conv_0"]["kernel"].shape == (1, 1, 576, 128)
    assert head["Dense_0"]["kernel"].shape == (4 * 4 * 128, 1024)  # after the pooling: 4 x 4
    assert head["Dense_1"]["kernel"].shape == (1024, 1000)
    assert outputs["AuxiliaryHead_1"][0].name == "AuxiliaryHead_1"
    assert variables["params"]["AuxiliaryHead_1"]["ConvUnit_0"]["Conv_0"]["kernel"].shape[2] == 608
    assert outputs["AuxiliaryHead_0/Dropout_0"][0].rate == 0.7
    without = {k: v for k, v in variables["params"].items() if not k.startswith("AuxiliaryHead")}
    assert jax.tree.map(jnp.shape, without) == jax.tree.map(jnp.shape, tower[0]["params"])


def test_auxiliary_heads_give_logits_in_training_only():
    first, second = (bn_inception.rows("3c", width=1 / 32)[0]._replace(name=n) for n in "ab")
    net = bn_inception.Inception(**TINY | {"rows": (first, second)}, auxiliary=("a",))
    x = images()
    variables = init(net, x, train=False)
    logits = jax.eval_shape(functools.partial(net.apply, train=False), variables, x)
    assert logits.shape == (4, 5)

    @jit
    def gradient(params):
        def loss(params):
            given = {**variables, "params": params}
            (_, heads), _ = net.apply(
                given, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(5)}
            )
            assert len(heads) == 1
            return heads[0][:, 0].sum()

        return jax.grad(loss)(params)

    sizes = {k: float(abs(v["kernel"]).max()) for k, v in kernels(gradient(variables["params"]))}
    reached = {name for name, size in sizes.items() if size > 0}
    assert all(np.isfinite(list(sizes.values())))
    after = {name for name in sizes if name.startswith(("inception_b", "readout"))}
    assert reached == set(sizes) - after


# --- The network for small images -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ConvUnit_0", (16, 16, 24)),
        ("inception_3a", (8, 8, 32)),
        ("inception_3c", (4, 4, 72)),
        ("inception_4e", (2, 2, 132)),
        ("inception_5b", (2, 2, 128)),
        ("", (10,)),
    ],
)
def test_small_inception_has_the_shapes_of_narrow_modules(small, name, shape):
    assert small[1][name][1].shape == (2, *shape)


@pytest.fixture(scope="module")
def small():
    return shapes_of(bn_inception.small_inception(), (2, 32, 32, 3))


def test_small_inception_has_all_modules(small, tower):
    assert {k for k in small[0]["params"] if k.startswith("inception")} == {
        k for k in tower[0]["params"] if k.startswith("inception")
    }
    for row in bn_inception.BN_INCEPTION:
        convs = [
            module.features
            for path, (module, _) in small[1].items()
            if path.startswith(f"inception_{row.name}/") and isinstance(module, nn.Conv)
        ]
        assert convs == [n // 8 for n in PRINTED[row.name]]


def test_small_inception_learns_everywhere():
    """Checks that every parameter has a finite gradient that is not zero, down to 2 x 2 pixels."""
    some = bn_inception.rows("3a", "3c", "4e", "5b", width=1 / 32)
    net = bn_inception.small_inception(1 / 32, rows=some, fused=True, activation=nn.sigmoid)
    variables = init(net, images(4, 32), train=False)
    logits, _, gradient = value_and_gradient(net, variables, images(4, 32))
    assert logits.shape == (4, 10)
    for value in jax.tree.leaves(gradient):
        assert np.isfinite(value).all()
        assert float(abs(value).max()) > 0


def test_wide_inception_is_the_tower_with_a_share_of_its_channels(tower):
    variables, _ = shapes_of(bn_inception.wide_inception(), FULL)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, tower[0])
    _, outputs = shapes_of(bn_inception.wide_inception(1 / 8), FULL)
    convs = [module.features for module, _ in outputs.values() if isinstance(module, nn.Conv)]
    assert convs[:4] == [24, 8, 8, 24]  # the first layer always has eight filters for each colour
    assert convs[4:] == [n // 8 for row in PRINTED.values() for n in row]
