"""A backward pass keeps x in its own dtype and vectors with one number per channel."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from tests import cases

pytestmark = pytest.mark.usefixtures("one_device")

CHANNELS = 5
CASES = [
    cases.Case((16, 8, CHANNELS), dtype=dtype, mask=mask)
    for dtype in ("float32", "bfloat16", "float16")
    for mask in ("none", "examples", "features")
]


def kept(f, *at):
    """Returns the arrays that jax.vjp saves for backward under jit."""
    return jax.tree.leaves(jax.jit(lambda *at: jax.vjp(f, *at)[1])(*at))


def assert_only_x_and_vectors(leaves, data):
    """Checks that only x, beside the mask, is larger than vectors with one value per feature."""
    large = [a for a in leaves if a.size > CHANNELS]
    if data.mask is not None:
        large = [a for a in large if a.dtype != bool or a.size > data.mask.size]
    assert len(large) == 1, [f"{a.dtype}{list(a.shape)}" for a in leaves]
    chex.assert_type(large[0], data.x.dtype)
    np.testing.assert_array_equal(large[0], data.x)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_normalize_keeps_x_and_vectors(case):
    data = cases.make(case)

    def outputs(x, scale, bias):
        y, m = jbn.normalize(x, scale, bias, **data.support)
        return y, m.mean, m.var

    leaves = kept(outputs, data.x, data.scale, data.bias)
    assert_only_x_and_vectors(leaves, data)
    # The vectors are few: count, mean, rstd, scale and shift. A second copy of each would show.
    assert len(leaves) <= 10


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_batch_norm_keeps_no_more(case):
    data = cases.make(case)
    stats = jbn.init_stats(CHANNELS)

    def outputs(x, params):
        y, new = jbn.batch_norm(x, params, stats, **data.support)
        return y, new

    params = jbn.Params(data.scale, data.bias)
    leaves = kept(outputs, data.x, params)
    assert_only_x_and_vectors([a for a in leaves if a.size], data)


def test_the_gradient_of_x_alone_needs_no_more():
    data = cases.make(CASES[3])
    leaves = kept(lambda x: jbn.normalize(x)[0], data.x)
    assert_only_x_and_vectors(leaves, data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inference_keeps_x_and_vectors(dtype):
    # This is the case of a frozen layer in the middle of a network that trains.
    data = cases.make(cases.Case((16, 8, CHANNELS), dtype=dtype))
    stats = jbn.init_stats(CHANNELS)
    run = lambda x, params: jbn.batch_norm_inference(x, params, stats)  # noqa: E731
    leaves = kept(run, data.x, jbn.Params(data.scale, data.bias))
    assert_only_x_and_vectors(leaves, data)


def test_two_layers_keep_their_two_inputs():
    data = cases.make(cases.Case((64, CHANNELS), dtype="bfloat16"))

    def net(x, scale, bias):
        for _ in range(2):
            x = jax.nn.relu(jbn.normalize(x, scale, bias)[0])
        return x

    leaves = kept(net, data.x, data.scale, data.bias)
    # The second layer's x is the output of the first relu. For its own derivative relu keeps a mask
    # of one byte a value, or its input.
    size = sum(a.size * a.dtype.itemsize for a in leaves if a.size > CHANNELS)
    relu = sum(a.size * a.dtype.itemsize for a in kept(jax.nn.relu, data.x) if a.size > CHANNELS)
    assert size <= 2 * (data.x.nbytes + relu)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_notices_the_arrays_that_autodiff_of_the_formula_keeps(dtype):
    # Without a derivative rule of its own, the formula keeps more than one large array.
    data = cases.make(cases.Case((16, 8, CHANNELS), dtype=dtype))

    def formula(x):
        z = x.astype(jnp.float32)
        z = z - z.mean((0, 1), keepdims=True)
        return (z / jnp.sqrt((z**2).mean((0, 1), keepdims=True) + 1e-5)).astype(x.dtype)

    with pytest.raises(AssertionError):
        assert_only_x_and_vectors(kept(formula, data.x), data)
