"""Statistics of a whole data set agree with float64 NumPy, for any models, batches, devices."""

import functools
import os
import pathlib
import socket
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
from jbn.population import estimate
from tests import nets, oracle, processes
from tests.executions import AXIS, mesh
from tests.tolerance import assert_close, eps

pytestmark = pytest.mark.usefixtures("cheap_programs")

# Some dozen values are summed in two orders, in float64, through two layers.
CLOSE = {"rtol": 1e3 * eps("float64"), "atol": 1e3 * eps("float64")}
SIZES = (12, 16, 7)  # of the batches; the last one is ragged


def data(sizes=SIZES, dtype=np.float64):
    """Makes batches with masks, which leave out whole quarters of the examples."""
    return [nets.batch(seed, n, dtype) for seed, n in enumerate(sizes)]


def together(batches):
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def one_layer(params, stats, batch):
    """Returns the statistics of a single layer that sees the batch itself."""
    return jbn.batch_norm(batch, params, stats)[1]


def of_one_layer(batches, features, dtype=jnp.float32, **options):
    args = jbn.init_params(features, dtype), jbn.init_stats(features, dtype)
    return estimate(one_layer, *args, batches, **options)


def net(name="core", axis_name=None, dtype=jnp.float64):
    """Returns (params, statistics, apply_fn) of `nets`."""
    params, stats, loss_fn = nets.BUILD[name](axis_name, dtype)
    return params, stats, lambda *args: loss_fn(*args)[1]


def kernels(name, params):
    """Returns [(kernel, scale, bias)] of each normalised layer in a net of `nets`."""
    if name == "core":
        return [
            (kernel, *norm)
            for kernel, norm in zip(params["kernels"], params["norms"], strict=False)
        ]
    if name == "linen":
        pairs = [(params[f"Dense_{i}"], params[f"BatchNorm_{i}"]) for i in range(2)]
    else:
        params = nnx.to_pure_dict(params)
        pairs = [(params["dense"][i], params["norms"][i]) for i in range(2)]
    return [(dense["kernel"], norm["scale"], norm["bias"]) for dense, norm in pairs]


def by_layer(name, stats):
    """Returns [(mean, var)] of a tree of statistics."""
    if name == "core":
        return [(s.mean, s.var) for s in stats]
    if name == "linen":
        return [(stats[f"BatchNorm_{i}"]["mean"], stats[f"BatchNorm_{i}"]["var"]) for i in range(2)]
    norms = nnx.to_pure_dict(stats)["norms"]
    return [(norms[i]["mean"], norms[i]["var"]) for i in range(2)]


# Comparison with the oracle.


@pytest.mark.parametrize("layer_by_layer", [True, False], ids=["layer_by_layer", "one_pass"])
@pytest.mark.parametrize("variance", ["pooled", "paper"])
@pytest.mark.parametrize("name", nets.BUILD)
@pytest.mark.usefixtures("x64")
def test_models(name, variance, layer_by_layer):
    params, stats, apply_fn = net(name)
    batches = data()
    options = {"variance": variance, "layer_by_layer": layer_by_layer}
    new = estimate(apply_fn, params, stats, batches, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, stats)
    expected = oracle.population(
        [(b["x"], b["mask"]) for b in batches],
        kernels(name, params),
        paper=variance == "paper",
        layer_by_layer=layer_by_layer,
    )
    pairs = [(s.mean, s.var) for s in expected]
    chex.assert_trees_all_close(by_layer(name, new), pairs, **CLOSE)
    if name == "core":
        assert all((s.count == len(SIZES)).all() for s in new)


def forward(params, stats, x, train):
    """Applies dense or convolutional layers, each normalised without epsilon, and relu between.

    The normalisation has no scale and no bias. Returns the normalised output of each layer, and
    their statistics.
    """
    outputs, new = [], []
    x = x.astype(params[0].dtype)
    for kernel, old in zip(params, stats, strict=True):
        h = (
            x @ kernel
            if kernel.ndim == 2
            else jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
        if train:
            y, updated = jbn.batch_norm(h, jbn.Params(None, None), old, epsilon=0)
            new.append(updated)
        else:
            y = jbn.batch_norm_inference(h, jbn.Params(None, None), old, epsilon=0)
        outputs.append(y)
        x = jax.nn.relu(y)
    return outputs, new


def updated(params, stats, batch):
    return forward(params, stats, batch, train=True)[1]


def random_net(*shapes, dtype=jnp.float32):
    """Makes kernels under which no channel is dead, and initial statistics."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = [
        jax.random.normal(k, s, dtype) / np.sqrt(np.prod(s[:-1])).astype(dtype)
        for k, s in zip(keys, shapes, strict=True)
    ]
    return params, [jbn.init_stats(s[-1], dtype) for s in shapes]


DIGITS = ((784, 32), (32, 24), (24, 16))


@functools.cache
def images():
    """[4000, 784], 0 or 1. As in images of digits, many pixels are rarely or never set."""
    rng = np.random.default_rng(0)
    how_often = np.clip(rng.normal(0.1, 0.3, 784), 0, 0.9)
    return (rng.uniform(size=(4000, 784)) < how_often).astype(np.float32)


def batches_of(size):
    return [images()[i : i + size] for i in range(0, len(images()), size)]


def wide(params):
    return [(np.asarray(kernel, np.float64), None, None) for kernel in params]


@pytest.mark.slow
@pytest.mark.parametrize("layer_by_layer", [False, True], ids=["one_pass", "layer_by_layer"])
@pytest.mark.parametrize("variance", ["pooled", "paper"])
def test_a_whole_data_set(variance, layer_by_layer):
    """Takes 4,000 images, in 15 batches of 256 and one of 160."""
    params, stats = random_net(*DIGITS)
    batches = batches_of(256)
    assert len(batches[-1]) == 160
    options = {"variance": variance, "layer_by_layer": layer_by_layer}
    new = estimate(updated, params, stats, batches, **options)
    expected = oracle.population(
        [(b, None) for b in batches],
        wide(params),
        paper=variance == "paper",
        layer_by_layer=layer_by_layer,
        epsilon=0,
    )
    for ours, exact in zip(new, expected, strict=True):
        for field in "mean", "var":
            assert_close(getattr(ours, field), getattr(exact, field), "float32", 784, magnitude=1)
        assert (ours.count == 16).all()


@pytest.mark.parametrize("layer_by_layer", [False, True], ids=["one_pass", "layer_by_layer"])
def test_convolutions_at_an_offset(layer_by_layer):
    params, stats = random_net((3, 3, 2, 4), (3, 3, 4, 5))
    x = 100 + np.random.default_rng(0).standard_normal((40, 9, 8, 2)).astype(np.float32)
    batches = [x[:16], x[16:32], x[32:]]
    new = estimate(updated, params, stats, batches, layer_by_layer=layer_by_layer)
    expected = oracle.population(
        [(b, None) for b in batches], wide(params), layer_by_layer=layer_by_layer, epsilon=0
    )
    for ours, exact in zip(new, expected, strict=True):
        for field in "mean", "var":
            # The convolution itself rounds at 100, which is 100 standard deviations.
            close = {"magnitude": abs(getattr(exact, field)).max(), "ratio": 100}
            assert_close(getattr(ours, field), getattr(exact, field), "float32", 18, **close)


@pytest.mark.parametrize("variance", ["pooled", "paper"])
def test_large_offsets(variance):
    """Takes batches whose means differ, at mean / std = 1e4."""
    rng = np.random.default_rng(1)
    batches = [
        (1e4 + rng.standard_normal(3) + rng.standard_normal((n, 3))).astype(np.float32)
        for n in (64, 64, 64, 33)
    ]
    new = of_one_layer(batches, 3, variance=variance)
    kernel = [(np.eye(3), None, None)]
    (exact,) = oracle.population([(b, None) for b in batches], kernel, paper=variance == "paper")
    np.testing.assert_allclose(new.mean, exact.mean, rtol=eps("float32"))
    # Each batch's mean is a float32 near 1e4, off by up to 5e-4, beside distances of about 1.
    np.testing.assert_allclose(new.var, exact.var, rtol=1e4 * eps("float32"))


@pytest.mark.usefixtures("x64")
def test_nothing_cancels():
    """Takes mean / std = 1e6, where sums of x^2 would lose 12 of 16 digits."""
    rng = np.random.default_rng(2)
    batches = [1e6 + rng.standard_normal((n, 3)) for n in (8, 8, 5)]
    new = of_one_layer(batches, 3, jnp.float64)
    # The means of batches are off by 1e6 eps / 2.
    np.testing.assert_allclose(new.var, np.concatenate(batches).var(0), rtol=1e6 * eps("float64"))


# Batches for which averages of averages, or float32, would be wrong.


def weighted(params, stats, batch):
    return jbn.batch_norm(batch["x"], params, stats, weights=batch["w"])[1]


def test_counts_above_two_to_the_24():
    """Adds single values to a count of 2^24, where a float32 count would not grow."""
    first = {"x": np.float32([[0], [0]]), "w": np.float32([[2**23], [2**23]])}
    other = {"x": np.float32([[3000], [1000]]), "w": np.float32([[0.5], [0.5]])}
    args = weighted, jbn.init_params(1), jbn.init_stats(1)
    new = estimate(*args, [first, *[other] * 1000])
    n, square = 2**24 + 1000, 1000 * 5e6
    mean = 1000 * 2000 / n
    assert_close(new.mean, [mean], "float32", 2)
    assert_close(new.var, [square / n - mean**2], "float32", 2)
    # A float32 count would be off by 6e-5, which the comparison above notices.
    assert abs(n / 2**24 - 1) > 100 * eps("float32")


def test_thousands_of_batches():
    rng = np.random.default_rng(3)
    x = (1e3 + rng.standard_normal((3000, 4, 2))).astype(np.float32)
    new = of_one_layer(list(x), 2)
    exact = x.reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(new.mean, exact.mean(0), rtol=eps("float32"))
    # The error is that of a batch's mean, 3e-5, squared and averaged, as for a single batch.
    np.testing.assert_allclose(new.var, exact.var(0), rtol=16 * eps("float32"))
    assert (new.count == 3000).all()


@pytest.mark.usefixtures("x64")
def test_batches_are_any_cut_of_the_data():
    x = np.random.default_rng(4).standard_normal((40, 3)) + 5
    cuts = [[x], [x[:20], x[20:]], [x[30:], x[2:30], x[:2]]]
    found = [of_one_layer(cut, 3, jnp.float64) for cut in cuts]
    for one in found[1:]:
        chex.assert_trees_all_close(one[:2], found[0][:2], **CLOSE)
    assert [one.count[0] for one in found] == [1, 2, 3]


@pytest.mark.parametrize("variance", ["pooled", "paper"])
def test_order_does_not_matter(variance):
    params, stats = random_net(*DIGITS)
    batches = batches_of(500)
    one = estimate(updated, params, stats, batches, variance=variance)
    other = estimate(updated, params, stats, batches[::-1], variance=variance)
    # The sums are in float64, so results differ at most in the last bit of float32.
    chex.assert_trees_all_close(one, other, rtol=eps("float32"))


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_a_second_call_gives_the_same_bits(layer_by_layer):
    params, stats = random_net(*DIGITS)
    args = updated, params, stats, batches_of(500)
    one, other = (estimate(*args, layer_by_layer=layer_by_layer) for _ in range(2))
    chex.assert_trees_all_equal(one, other)


# Batches without information on some features, or on all.


def masked(params, stats, batch):
    return jbn.batch_norm(batch["x"], params, stats, mask=batch["mask"])[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, "empty"])
@pytest.mark.parametrize("variance", ["pooled", "paper"])
def test_what_says_nothing_is_left_out(variance, bad):
    x = np.random.default_rng(5).standard_normal((3, 8, 2)).astype(np.float32)
    mask = np.ones((3, 8, 2), bool)
    if bad == "empty":
        mask[0, :, 1] = False
    else:
        x[0, 4, 1] = bad
    batches = [{"x": x[i], "mask": mask[i]} for i in range(3)]
    args = masked, jbn.init_params(2), jbn.init_stats(2)
    new = estimate(*args, batches, variance=variance)
    (whole,) = [estimate(*args, batches[1:], variance=variance)]
    assert_close([v[1] for v in new], [v[1] for v in whole], "float32", 8)
    assert new.count.tolist() == [3, 2]
    assert_close(new.mean[0], x[:, :, 0].astype(np.float64).mean(), "float32", 24)


def test_without_any_data_statistics_stay():
    batches = [{"x": np.ones((4, 2), np.float32), "mask": np.array([[True, False]])}] * 2
    batches[0] = batches[0] | {"mask": np.zeros((1, 2), bool)}
    old = jbn.RunningStats(*(jnp.float32([3, value]) for value in (5, 7, 11)))
    new = estimate(masked, jbn.init_params(2), old, batches)
    chex.assert_trees_all_equal(new, jbn.RunningStats(*map(jnp.float32, ([1, 5], [0, 7], [1, 11]))))


def test_one_value_has_no_unbiased_variance():
    x = np.float32([[1], [3], [8]])
    mask = np.array([[True], [False], [False]])
    batches = [{"x": x, "mask": mask}, {"x": x, "mask": ~mask}]
    args = masked, jbn.init_params(1), jbn.init_stats(1), batches
    paper, pooled = (estimate(*args, variance=how) for how in ("paper", "pooled"))
    assert [float(v[0]) for v in paper] == [5.5, 12.5, 1]  # of 3 and 8 alone
    np.testing.assert_allclose([v[0] for v in pooled], [4, 26 / 3, 2], rtol=eps("float32"))


@pytest.mark.parametrize("size", [64, 1])
def test_a_last_batch_of_one_example(size):
    """Takes one example in the last batch or in all; with fixed statistics this is allowed."""
    params, stats = random_net(*DIGITS)
    x = images()[:65]
    batches = [x[i : i + size] for i in range(0, 65, size)]
    new = estimate(updated, params, stats, batches, layer_by_layer=True)
    assert all((layer.count == len(batches)).all() for layer in new)
    assert_normalised(params, new, x)


def test_one_example_normalises_nothing():
    """Refuses such a batch in a single pass: deeper layers would see the bias for any example."""
    params, stats = random_net(*DIGITS)
    x = images()[:65]
    with pytest.raises(ValueError, match="one value per channel"):
        estimate(updated, params, stats, [x[:64], x[64:]])
    across = {"mesh": mesh((8,)), "axis_name": AXIS}
    with pytest.raises(ValueError, match="one value per channel"):
        estimate(updated, params, stats, [x[:8]], **across)


@pytest.mark.parametrize("variance", ["pooled", "paper"])
def test_no_data_at_all(variance):
    args = masked, jbn.init_params(2), jbn.init_stats(2)
    x = np.full((4, 2), np.nan, np.float32)
    empty = [{"x": x, "mask": np.ones((4, 2), bool)}, {"x": x, "mask": np.zeros((4, 2), bool)}]
    with pytest.raises(ValueError, match="no batch has data"):
        estimate(*args, empty, variance=variance)


# Layer by layer.


def assert_normalised(params, stats, x):
    for y in forward(params, stats, x, train=False)[0]:
        y = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
        assert_close(y.mean(0), np.zeros(y.shape[1]), "float32", 784, magnitude=1)
        assert_close(y.var(0), np.ones(y.shape[1]), "float32", 784, magnitude=1)


def test_inference_normalises_every_layer():
    """Checks that layers are normalised at inference; after one pass only the first layer is."""
    params, stats = random_net(*DIGITS)
    batches = batches_of(64)
    x = np.concatenate(batches)
    exact = estimate(updated, params, stats, batches, layer_by_layer=True)
    assert_normalised(params, exact, x)
    one_pass = estimate(updated, params, stats, batches)
    assert_normalised(params[:1], one_pass[:1], x)
    for layer in 1, 2:
        y = forward(params, one_pass, x, train=False)[0][layer]
        assert abs(y.var(0) - 1).max() > 0.003


def test_one_batch_is_exact_in_one_pass():
    params, stats = random_net(*DIGITS)
    batches = batches_of(500)
    whole = estimate(updated, params, stats, [np.concatenate(batches)])
    parts = estimate(updated, params, stats, batches, layer_by_layer=True)
    for one, other in zip(whole, parts, strict=True):
        assert_close(other.mean, one.mean, "float32", 4000, magnitude=1)
        assert_close(other.var, one.var, "float32", 4000, magnitude=1)


def test_deep_nets():
    """Takes 24 layers: passes in between may be far off in deep layers, the last one is exact."""
    params, stats = random_net(*[(16, 16)] * 24)
    x = np.random.default_rng(9).standard_normal((512, 16)).astype(np.float32)
    exact = estimate(updated, params, stats, list(x.reshape(8, 64, 16)), layer_by_layer=True)
    assert_normalised(params, exact, x)


class Counted:
    """Batches that count how often they were read."""

    def __init__(self, batches):
        self.batches, self.times = batches, 0

    def __call__(self):
        self.times += 1
        return iter(self.batches)


def test_there_is_one_pass_for_each_layer():
    params, stats = random_net(*DIGITS)
    batches = Counted(batches_of(256))
    estimate(updated, params, stats, batches)
    assert batches.times == 1
    estimate(updated, params, stats, batches, layer_by_layer=True)
    assert batches.times == 1 + len(DIGITS)


def test_parallel_branches_need_no_pass_each():
    def branches(params, stats, x):
        both = [jbn.batch_norm(x, params, s)[1] for s in stats["branches"]]
        y = sum(jbn.batch_norm(x, params, s)[0] for s in stats["branches"])
        last = jbn.batch_norm(jax.nn.relu(y), params, stats["last"])[1]
        return {"branches": both, "last": last}

    x = np.random.default_rng(6).standard_normal((40, 3)).astype(np.float32)
    stats = {"branches": [jbn.init_stats(3)] * 5, "last": jbn.init_stats(3)}
    batches = Counted([x[:20], x[20:]])
    new = estimate(branches, jbn.init_params(3), stats, batches, layer_by_layer=True)
    assert batches.times in (3, 4)  # two passes, and one or two in which nothing changes; not six
    assert_close(new["last"].var, np.maximum(5 * oracle.normalize(x)[0], 0).var(0), "float32", 40)


def full_layer(params, stats, batch):
    """Applies a layer with many options, then another layer to its result."""
    y, first = jbn.batch_norm(
        batch["x"],
        params,
        stats[0],
        epsilon=0.5,
        mask=batch["mask"],
        groups=2,
        activation=jnp.tanh,
        residual=batch["x"] * 0.5,
    )
    return [first, jbn.batch_norm(y, params, stats[1], mask=batch["mask"])[1]]


def test_layers_normalise_as_in_inference():
    rng = np.random.default_rng(7)
    x = rng.standard_normal((2, 10, 3)).astype(np.float32) * 3 + 1
    batches = [{"x": x[i], "mask": rng.random((10, 1)) < 0.7} for i in range(2)]
    params = jbn.Params(jnp.float32([1, 2, 3]), jnp.float32([0, 1, 0]))
    stats = [jbn.init_stats(3)] * 2
    new = estimate(full_layer, params, stats, batches, layer_by_layer=True)
    all_of_it, mask = together(batches)["x"], together(batches)["mask"]
    assert_close(new[0].var, oracle.moments(all_of_it, mask=mask).var, "float32", 20)
    y = oracle.affine(all_of_it, new[0].mean, new[0].var, *params, epsilon=0.5)
    expected = oracle.moments(np.tanh(y + 0.5 * all_of_it), mask=mask)
    assert_close(new[1].mean, expected.mean, "float32", 20)
    assert_close(new[1].var, expected.var, "float32", 20)


# Models.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(4)(x)
        return nn.relu(jbn.linen.BatchNorm(use_running_average=False)(x)), None


class Scanned(nn.Module):
    axis: int = 0  # the axis of the statistics that counts layers

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": self.axis}
        blocks = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=5)
        return blocks()(x, None)[0]


X = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32) * 2 + 1
PARTS = [X[:16], X[16:32], X[32:]]


def of_linen(model):
    variables = jax.jit(model.init)(jax.random.key(0), X)

    def apply_fn(params, stats, x):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    return apply_fn, variables["params"], variables["batch_stats"]


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_layers_are_layers(axis):
    apply_fn, params, stats = of_linen(Scanned(axis))
    whole = estimate(apply_fn, params, stats, [X])
    parts = estimate(apply_fn, params, stats, PARTS, layer_by_layer=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(parts, stats)
    chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = jbn.linen.BatchNorm(use_running_average=False, update=jbn.ema(0.9))
        return layer(layer(x[:, ::2]) * 2 + 1) + layer(x[:, 1::2])


def test_calls_of_one_layer_are_pooled():
    apply_fn, params, stats = of_linen(Shared())
    new = estimate(apply_fn, params, stats, [X])["BatchNorm_0"]
    a, b = X[:, ::2].astype(np.float64), X[:, 1::2].astype(np.float64)
    seen = np.concatenate([a, oracle.normalize(a)[0] * 2 + 1, b])
    assert_close(new["mean"], seen.mean(0), "float32", 120)
    assert_close(new["var"], seen.var(0), "float32", 120)
    assert (new["count"] == 3).all()


class ThenFrozen(nn.Module):
    """A layer that is called in training, then in inference, and another layer after it."""

    @nn.compact
    def __call__(self, x):
        layer = jbn.linen.BatchNorm(epsilon=0.1)
        y = nn.relu(layer(x, use_running_average=False))
        y = layer(y, use_running_average=True)
        return jbn.linen.BatchNorm(use_running_average=False)(y)


def test_frozen_calls_see_what_is_fixed():
    apply_fn, params, stats = of_linen(ThenFrozen())
    new = estimate(apply_fn, params, stats, PARTS, layer_by_layer=True)
    mean, var = X.mean(0, dtype=np.float64), X.var(0, dtype=np.float64)
    y = oracle.affine(X, mean, var, epsilon=0.1)
    y = oracle.affine(np.maximum(y, 0), mean, var, epsilon=0.1)
    assert_close(new["BatchNorm_1"]["mean"], y.mean(0), "float32", 40)
    assert_close(new["BatchNorm_1"]["var"], y.var(0), "float32", 40)


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jbn.linen.BatchNorm(use_running_average=True)(x)
        return jbn.linen.BatchNorm(use_running_average=False)(x)


def test_frozen_layers_stay():
    apply_fn, params, stats = of_linen(Frozen())
    stats = jax.tree.map(lambda v: v + 1, stats)
    new = estimate(apply_fn, params, stats, PARTS, layer_by_layer=True)
    chex.assert_trees_all_equal(new["BatchNorm_0"], stats["BatchNorm_0"])
    y = oracle.affine(X, 1.0 * np.ones(4), 2.0 * np.ones(4))
    assert_close(new["BatchNorm_1"]["var"], y.var(0), "float32", 40)


def narrow_layer(dtype):
    """Makes a Flax layer that stores statistics in half precision: (apply_fn, statistics)."""
    layer = jbn.linen.BatchNorm(
        use_running_average=False,
        use_scale=False,
        use_bias=False,
        param_dtype=dtype,
        force_float32_reductions=False,
    )

    def updated(params, stats, x):
        return layer.apply({"batch_stats": stats}, x, mutable=["batch_stats"])[1]["batch_stats"]

    return updated, layer.init(jax.random.key(0), jnp.ones((2, 3)))["batch_stats"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64], ids=["bfloat16", "complex64"])
def test_dtypes_stay(dtype):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2, 8, 3)) + 1j * rng.standard_normal((2, 8, 3)) + 5
    x = x.astype(np.complex64) if dtype == jnp.complex64 else x.real.astype(np.float32)
    if dtype == jnp.complex64:
        stats = jbn.init_stats(3, dtype)
        with jax.numpy_dtype_promotion("standard"):  # complex numbers times real ones
            new = estimate(one_layer, jbn.init_params(3), stats, list(x))
    else:
        updated, stats = narrow_layer(dtype)
        new = estimate(updated, None, stats, list(x))
        stats, new = (jbn.RunningStats(**s, count=jnp.zeros(3)) for s in (stats, new))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, stats)
    exact = x.reshape(-1, 3).astype(np.complex128)
    np.testing.assert_allclose(
        np.asarray(new.mean, np.complex128), exact.mean(0), rtol=eps(jnp.finfo(dtype).dtype)
    )
    np.testing.assert_allclose(
        np.asarray(new.var, np.float64), exact.var(0), rtol=4 * eps(jnp.finfo(dtype).dtype)
    )


@pytest.mark.parametrize("variance", ["pooled", "paper"])
def test_what_the_dtype_cannot_hold_is_not_written(variance):
    updated, stats = narrow_layer(jnp.float16)
    x = np.random.default_rng(0).standard_normal((3, 8, 3)).astype(np.float32)
    x *= np.float32([1, 400, 1])  # a variance of 160000
    new = estimate(updated, None, stats, list(x), variance=variance)
    assert (new["mean"][1], new["var"][1]) == (0, 1)
    assert all(abs(new["var"][i] - 1) < 0.9 and new["mean"][i] != 0 for i in (0, 2))


def test_a_variance_between_batches_that_float32_cannot_hold_is_not_written():
    x = np.float32([[[1, 1e25], [2, 1e25]], [[3, -1e25], [4, -1e25]]])
    stats = jbn.init_stats(2)
    new = estimate(one_layer, jbn.init_params(2), stats, list(x))
    np.testing.assert_allclose(new.var, [1.25, 1])
    np.testing.assert_array_equal(new.count, [2, 0])


def test_batches_whose_weights_add_up_to_one_have_no_unbiased_variance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 32, 200)).astype(np.float32)
    w = rng.uniform(0.1, 1, size=x.shape).astype(np.float32)
    w /= w.sum(1, keepdims=True)

    def weighted(params, stats, batch):
        return jbn.batch_norm(batch["x"], params, stats, weights=batch["w"])[1]

    args = weighted, jbn.init_params(200), jbn.init_stats(200)
    light = [{"x": a, "w": b} for a, b in zip(x, w, strict=True)]
    with pytest.raises(ValueError, match="no batch has data"):
        estimate(*args, light, variance="paper")
    heavy = [{"x": a, "w": 2 * b} for a, b in zip(x, w, strict=True)]
    new = estimate(*args, heavy, variance="paper")
    each = [oracle.moments(a, weights=b).var for a, b in zip(x, w, strict=True)]
    np.testing.assert_allclose(new.var, 2 * np.mean(each, axis=0), rtol=1e-5)


def test_the_model_compiles_once_a_shape():
    traced = []

    def apply_fn(params, stats, batch):
        traced.append(batch.shape)
        return one_layer(params, stats, batch)

    args = apply_fn, jbn.init_params(2), jbn.init_stats(2)
    batches = [np.ones((n, 2), np.float32) for n in (4, 4, 4, 2)]
    for _ in range(2):
        estimate(*args, batches)
    assert traced == [(4, 2), (2, 2)]


# Devices.

GROUPS = [[0, 2], [1, 3]]


@pytest.mark.slow
@pytest.mark.parametrize("layer_by_layer", [False, True], ids=["one_pass", "layer_by_layer"])
@pytest.mark.usefixtures("x64")
def test_sharded_batches(layer_by_layer):
    params, stats, apply_fn = net()
    batches = data((16, 16, 8))
    one = estimate(apply_fn, params, stats, batches, layer_by_layer=layer_by_layer)
    everything = mesh((8,))
    with jax.set_mesh(everything):
        cut = jax.device_put(batches, NamedSharding(everything, P(AXIS)))
        many = estimate(apply_fn, params, stats, cut, layer_by_layer=layer_by_layer)
    chex.assert_trees_all_close(many, one, **CLOSE)


@pytest.mark.parametrize("layer_by_layer", [False, True], ids=["one_pass", "layer_by_layer"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "core" else pytest.mark.slow) for n in nets.BUILD]
)
@pytest.mark.usefixtures("x64")
def test_shard_map(name, layer_by_layer):
    batches = data((32, 32, 16))  # some devices have masked examples only
    options = {"layer_by_layer": layer_by_layer}
    params, stats, apply_fn = net(name)
    one = estimate(apply_fn, params, stats, batches, **options)
    across = {"mesh": mesh((8,)), "axis_name": AXIS}
    synced = net(name, AXIS)[-1]
    many = estimate(synced, params, stats, batches, **across, **options)
    chex.assert_trees_all_close(many, one, **CLOSE)
    # These layers normalise on each device alone, which changes the input of deeper layers, unless
    # layer by layer.
    local = by_layer(name, estimate(apply_fn, params, stats, batches, **across, **options))
    exact = by_layer(name, one)
    chex.assert_trees_all_close(local[0], exact[0], **CLOSE)
    if layer_by_layer:
        chex.assert_trees_all_close(local[1], exact[1], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["pooled", pytest.param("paper", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("x64")
def test_groups_of_devices(variance):
    params, stats, loss_fn = nets.core(AXIS, jnp.float64, axis_index_groups=GROUPS)
    apply_fn = lambda *args: loss_fn(*args)[1]  # noqa: E731
    batches = data((16, 16, 8))
    options = {"variance": variance, "layer_by_layer": True}
    across = {"mesh": mesh((2, 2), ("a", "b")), "axis_name": ("a", "b")}
    two_axes = net(axis_name="b")[-1]
    one = estimate(net()[-1], params, stats, batches, **options)
    many = estimate(apply_fn, params, stats, batches, mesh=mesh(), axis_name=AXIS, **options)
    chex.assert_trees_all_close(many, one, **CLOSE)
    many = estimate(two_axes, params, stats, batches, **across, **options)
    chex.assert_trees_all_close(many, one, **CLOSE)


def test_statistics_lie_where_they_lay():
    x = np.ones((8, 2), np.float32)
    args = one_layer, jbn.init_params(2)
    free = estimate(*args, jbn.init_stats(2), [x])
    assert not free.mean.committed
    assert not estimate(*args, jax.tree.map(np.asarray, jbn.init_stats(2)), [x]).mean.committed
    everywhere = NamedSharding(mesh((8,)), P())
    placed = estimate(*args, jax.device_put(jbn.init_stats(2), everywhere), [x])
    assert all(v.sharding == everywhere for v in placed)


PROCESS = """
    import functools, sys, jax, numpy as np, jbn, jbn.population
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    # To a file: the threads of JAX's transport write to the standard output, in between.
    say = functools.partial(print, file=open(sys.argv[3], "w"), flush=True)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))

    def apply_fn(params, stats, x):
        return jbn.batch_norm(x, params, stats)[1]

    x = np.random.default_rng(0).standard_normal((3, 16, 8)).astype(np.float32)
    for spec in P("data"), P(None, "data"):  # examples over the processes, then features
        lies = NamedSharding(mesh, spec)
        batches = [jax.make_array_from_callback(b.shape, lies, lambda i, b=b: b[i]) for b in x]
        with jax.set_mesh(mesh):
            args = jbn.init_params(8), jbn.init_stats(8)
            new = jbn.population.estimate(apply_fn, *args, batches)
        say(*[np.asarray(v).tobytes().hex() for v in new])
    across, mine = ({"mesh": m, "axis_name": "data"} for m in (
        mesh, jax.sharding.Mesh(jax.local_devices(), "data")))
    args = jbn.init_params(8), jbn.init_stats(8)  # on this process' first device
    for how in {}, across, mine:
        try:
            new = jbn.population.estimate(apply_fn, *args, list(x + jax.process_index()), **how)
            say(*np.asarray(new.mean))
        except ValueError as error:
            say(error)
"""


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=2"
    files = [tmp_path / str(i) for i in range(2)]
    program = textwrap.dedent(PROCESS)
    processes.outputs(
        [[sys.executable, "-c", program, address, str(i), files[i]] for i in range(2)],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )
    x = np.random.default_rng(0).standard_normal((3, 16, 8)).astype(np.float32)
    said = [file.read_text().splitlines() for file in files]
    ours, theirs = (lines[:2] for lines in said)
    assert ours == theirs
    for i, (*_, no_mesh, global_mesh, own) in enumerate(said):
        assert no_mesh.startswith("batches lie in this process alone")
        assert global_mesh == no_mesh
        alone = (x + np.float32(i)).reshape(-1, 8).mean(0, dtype=np.float64)
        assert_close(np.float32(own.split()), alone, "float32", 48)
    exact = x.reshape(-1, 8).astype(np.float64)
    for line in ours:
        mean, var, _ = (np.frombuffer(bytes.fromhex(v), np.float32) for v in line.split())
        assert_close(mean, exact.mean(0), "float32", 48)
        assert_close(var, exact.var(0), "float32", 48)


# Errors.


def raises(error, match, batches=PARTS, apply_fn=one_layer, **options):
    with pytest.raises(error, match=match):
        estimate(apply_fn, jbn.init_params(4), jbn.init_stats(4), batches, **options)


def test_errors():
    again = {"layer_by_layer": True}
    raises(ValueError, "batches is empty", [])
    raises(ValueError, "batches is empty", iter([]))
    raises(ValueError, "generator, which is used up", (x for x in PARTS), **again)
    raises(ValueError, 'must be "pooled".*"paper".*got \'unbiased\'', variance="unbiased")
    raises(ValueError, "mesh and axis_name belong together.*'data'", axis_name="data")
    raises(ValueError, "mesh and axis_name belong together", mesh=mesh())
    raises(ValueError, "structure that it was given", apply_fn=lambda p, s, x: (x, s))
    raises(ValueError, "apply_fn must return", apply_fn=lambda p, s, x: x)
    raises(TypeError, r"got an array.*pass \[batch\]", X)
    raises(TypeError, "got an array", jnp.asarray(X))
    raises(TypeError, "got a dictionary", {"x": X})
    raises(TypeError, "not jbn's", apply_fn=lambda p, s, x: s._replace(mean=x.mean(0)))


def test_arguments_of_a_wrong_type_are_refused():
    args = jbn.init_params(2), jbn.init_stats(2)
    with pytest.raises(TypeError, match=r"apply_fn must be a function .*got NoneType"):
        estimate(None, *args, [np.ones((4, 2))])
    for batches in (None, 3, "train"):
        with pytest.raises(TypeError, match=rf"batches must be .*got {type(batches).__name__}"):
            estimate(one_layer, *args, batches)


def test_a_function_that_returns_what_is_used_up():
    params, stats = random_net(*DIGITS)
    batches = iter(batches_of(256))
    with pytest.raises(ValueError, match="batches were 16 in the first pass and 0 in pass 2"):
        estimate(updated, params, stats, lambda: batches, layer_by_layer=True)


def test_a_model_in_inference_is_an_error():
    model = nnx.Sequential(jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    model.eval()
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def apply_fn(params, stats, x):
        model = nnx.merge(graphdef, params, stats)
        model(x)
        return nnx.state(model, nnx.BatchStat)

    with pytest.raises(ValueError, match=r"updated no statistics.*model\.train\(\)"):
        estimate(apply_fn, params, stats, PARTS)


def test_layers_not_of_jbn_are_refused_by_name():
    apply_fn, params, stats = of_linen(nn.BatchNorm(use_running_average=False))
    with pytest.raises(TypeError, match=r"at \['mean'\] belong to a layer that is not jbn's"):
        estimate(apply_fn, params, stats, PARTS)
