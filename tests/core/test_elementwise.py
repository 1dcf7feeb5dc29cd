"""`mixes` tells functions that mix the elements of an array from those that do not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jbn._core.elementwise import mixes

SHAPE = (4, 6)
TABLE = jnp.arange(10.0) ** 2


def cut(f, y):
    """Applies f to y while the axis of features is split into two."""
    return f(y.reshape(4, 2, 3)).reshape(y.shape)


ELEMENTWISE = {
    "identity": lambda y: y,
    "constant": jnp.ones_like,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "exact gelu": functools.partial(jax.nn.gelu, approximate=False),
    "swish": nn.swish,
    "mish": jax.nn.mish,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "relu6": jax.nn.relu6,
    "hard_tanh": jax.nn.hard_tanh,
    "hard_swish": jax.nn.hard_swish,
    "softplus": jax.nn.softplus,
    "sparse_plus": jax.nn.sparse_plus,
    "where": lambda y: jnp.where(y > 0, y, 0.1 * y),
    "clip": lambda y: jnp.clip(y, 0, 1),
    "nan_to_num": jnp.nan_to_num,
    "a slope for each feature": lambda y: y * jnp.arange(6.0)[None],
    "vmap of a scalar function": jax.vmap(jax.vmap(lambda v: jnp.where(v > 0, v, 0 * v))),
    "vmap over features": jax.vmap(jnp.tanh, in_axes=1, out_axes=1),
    "vectorize": jnp.vectorize(jnp.tanh),
    "flat and back": lambda y: jnp.tanh(y.reshape(-1)).reshape(y.shape),
    "cut and back": functools.partial(cut, jnp.tanh),
    "transposed and back": lambda y: jnp.tanh(y.T).T,
    "an axis more and back": lambda y: jnp.squeeze(jnp.tanh(y[None]), 0),
    "halves": lambda y: jnp.concatenate([jax.nn.relu(y[:, :3]), y[:, 3:]], 1),
    "half by .at": lambda y: y.at[:, :3].set(jax.nn.relu(y[:, :3])),
    "padded and cut": lambda y: jnp.pad(y, ((0, 0), (1, 1)))[:, 1:-1],
    "the larger of two": lambda y: jnp.stack([y, 0.1 * y]).max(0),
    "a sum over copies": lambda y: (y[..., None] * jnp.arange(3.0)[None, None]).sum(-1),
    "a product with coefficients": lambda y: jnp.stack([y, y * y], -1) @ jnp.ones(2),
    "a polynomial": lambda y: jnp.polyval(jnp.ones(4), y),
    "a table": lambda y: TABLE[jnp.clip(y.astype(int), 0, 9)],
    "interpolation": lambda y: jnp.interp(y, jnp.arange(10.0), TABLE),
    "pieces": lambda y: jnp.piecewise(y, [y < 0, y > 1], [lambda v: 0 * v, lambda v: v, jnp.sqrt]),
    "a loop": lambda y: jax.lax.fori_loop(0, 3, lambda _, v: 0.5 * v + y, y),
    "a loop over rows": lambda y: jax.lax.map(jnp.tanh, y),
    "a faster branch": lambda y: jax.lax.cond(jnp.all(y > 0), lambda v: v, jax.nn.relu, y),
    "a special function": lambda y: jax.scipy.special.gammainc(2.0, jnp.abs(y)),
    "rematerialised": jax.checkpoint(jnp.tanh),
    "jitted": jax.jit(jnp.tanh),
    "with a print of the largest": lambda y: (jax.debug.print("{}", y.max()), y)[1],
}

MIXING = {
    "softmax": jax.nn.softmax,
    "softmax of each example": jax.vmap(jax.nn.softmax),
    "jitted softmax": jax.jit(jax.nn.softmax),
    "softmax in two parts": functools.partial(cut, jax.nn.softmax),
    "log_softmax": jax.nn.log_softmax,
    "standardize": jax.nn.standardize,
    "centred": lambda y: y - y.mean(),
    "of length one": lambda y: y / jnp.linalg.norm(y, axis=-1, keepdims=True),
    "largest so far": lambda y: jax.lax.cummax(y, axis=0),
    "sum so far, flat": lambda y: jnp.cumsum(y).reshape(y.shape),
    "the maximum of the batch": lambda y: jnp.maximum(y, y.max(0, keepdims=True)),
    "winners": lambda y: jnp.where(y >= jax.lax.top_k(y, 2)[0][:, -1:], y, 0 * y),
    "all or nothing": lambda y: jnp.where(jnp.any(y > 5), y, 0 * y),
    "sorted": jnp.sort,
    "reversed": lambda y: y[::-1],
    "rolled": lambda y: jnp.roll(y, 1, axis=1),
    "shifted": lambda y: jnp.pad(y, ((0, 0), (1, 0)))[:, :-1],
    "halves in the other order": lambda y: jnp.concatenate([y[:, 3:], y[:, :3]], 1),
    "a product of matrices": lambda y: y @ jnp.ones((6, 6)),
    "spectrum": lambda y: jnp.fft.fft(y).real,
    "max pooling": lambda y: nn.max_pool(y[..., None], (3,), padding="SAME")[..., 0],
}


def traced(f, shape=SHAPE):
    return jax.make_jaxpr(f)(jax.ShapeDtypeStruct(shape, jnp.float32)).jaxpr


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions_do_not_mix(name):
    assert not mixes(traced(ELEMENTWISE[name]))


@pytest.mark.parametrize("name", MIXING)
def test_other_functions_mix(name):
    assert mixes(traced(MIXING[name]))


def test_a_transpose_mixes_where_it_keeps_the_shape():
    assert mixes(traced(jnp.transpose, (4, 4)))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (1, 1, 5)], ids=str)
def test_small_arrays(shape):
    assert not mixes(traced(jax.nn.gelu, shape))
    ones = tuple(i for i, n in enumerate(shape) if n == 1)
    assert not mixes(traced(lambda y: y + y.sum(ones, keepdims=True), shape))
