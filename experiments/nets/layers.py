"""Batch Normalization of jbn and of the other libraries over JAX, as pure functions of one form.

All do the same task: float32 scale and bias, statistics taken in float32 from x in its own dtype,
running statistics that move by 1/10, epsilon 1e-5, y in x's dtype. Their methods differ: Flax takes
E[x^2] - E[x]^2, and Haiku corrects its averages for their start.

Forward and backward are one program, which gets the cotangent as an argument. So a compiler may
read x once for a sum of each; in a network it cannot, since other layers come between. A program
returns all that training needs: y, the new running statistics and, with the backward pass, the
gradients of x, scale, bias and, if there is one, the residual, for a given random cotangent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array

import jbn

BASELINE = "flax.linen"  # its time is 1: all times are relative to it
DECAY = 0.9  # weight of the old running statistics: PyTorch's default
EPSILON = 1e-5

FORMS = ("bn", "bn_relu", "bn_add_relu")  # y = bn(x), relu(bn(x)), relu(bn(x) + residual)
PASSES = ("forward", "forward+backward")


class Case(NamedTuple):
    """One computation, and its data."""

    shape: tuple[int, ...]  # [N, ..., C]
    dtype: str = "float32"
    form: str = "bn"
    which: str = "forward+backward"  # one of PASSES, or "inference", or "folded"
    seed: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Data(NamedTuple):
    """The arrays of a case, on the host: every library computes with the same numbers."""

    x: np.ndarray  # [N, ..., C] float32, which each library rounds to the case's dtype
    residual: np.ndarray
    dy: np.ndarray  # the cotangent of y
    scale: np.ndarray  # [C] float32
    bias: np.ndarray


@functools.lru_cache(maxsize=1)  # the competitors of one case come one after the other
def data(case: Case) -> Data:
    """Makes random arrays: mean 1 and standard deviation 2 in every feature, scales around 1."""
    rng = np.random.default_rng(case.seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    x, residual, dy = (normal(*case.shape) for _ in range(3))
    channels = case.shape[-1]
    return Data(2 * x + 1, residual, dy, 1 + 0.1 * normal(channels), 0.1 * normal(channels))


class Layer(NamedTuple):
    """A layer as pure functions of its parameters and running statistics.

    `params` and `stats` have the library's own types. `train` is (params, stats, x, residual) ->
    (y, new stats), `infer` is (params, stats, x, residual) -> y. The residual is None in the forms
    without one.
    """

    params: Any
    stats: Any
    train: Callable[..., tuple[Array, Any]]
    infer: Callable[..., Array]
    channels_first: bool = False  # whether x is [N, C, ...]


def epilogue(form: str, y: Array, residual: Array | None) -> Array:
    """Adds the residual and applies the ReLU, for libraries that leave both to the user."""
    if residual is not None:
        y = y + residual
    return y if form == "bn" else jax.nn.relu(y)


def arguments(layer: Layer, case: Case, host: Data) -> tuple[Any, ...]:
    """Returns the arguments of `function_of`'s result, on JAX's default device."""

    def array(values: np.ndarray) -> Array:
        values = np.moveaxis(values, -1, 1) if layer.channels_first else values
        return jnp.asarray(np.ascontiguousarray(values), case.dtype)

    residual = array(host.residual) if case.form == "bn_add_relu" else None
    return layer.params, layer.stats, array(host.x), residual, array(host.dy)


def function_of(layer: Layer, which: str) -> Callable[..., Any]:
    """Makes the function (params, stats, x, residual, dy) -> the results of the passes."""

    def forward(params, stats, x, residual, dy):
        return layer.train(params, stats, x, residual)

    def both(params, stats, x, residual, dy):
        def train(params, x, residual):
            return layer.train(params, stats, x, residual)

        y, pull, stats = jax.vjp(train, params, x, residual, has_aux=True)
        return y, stats, pull(dy)

    def infer(params, stats, x, residual, dy):
        return layer.infer(params, stats, x, residual)

    return {"forward": forward, "forward+backward": both, "inference": infer}[which]


def of_jbn(case: Case, host: Data) -> Layer:
    options = {"epsilon": EPSILON, **fused(case.form)}

    def train(params, stats, x, residual):
        added = {} if residual is None else {"residual": residual}
        return jbn.batch_norm(x, params, stats, update=jbn.ema(DECAY), **options, **added)

    def infer(params, stats, x, residual):
        added = {} if residual is None else {"residual": residual}
        return jbn.batch_norm_inference(x, params, stats, **options, **added)

    params = jbn.Params(jnp.asarray(host.scale), jnp.asarray(host.bias))
    return Layer(params, jbn.init_stats(case.shape[-1]), train, infer)


def fused(form: str) -> dict[str, Any]:
    """Returns the arguments by which jbn's layer applies the ReLU itself."""
    return {} if form == "bn" else {"activation": jax.nn.relu}


def of_linen(case: Case, host: Data) -> Layer:
    module = linen.BatchNorm(momentum=DECAY, epsilon=EPSILON, dtype=jnp.dtype(case.dtype))
    channels = case.shape[-1]
    stats = {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}
    params = {"scale": jnp.asarray(host.scale), "bias": jnp.asarray(host.bias)}

    def train(params, stats, x, residual):
        variables = {"params": params, "batch_stats": stats}
        y, new = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        return epilogue(case.form, y, residual), new["batch_stats"]

    def infer(params, stats, x, residual):
        variables = {"params": params, "batch_stats": stats}
        y: Any = module.apply(variables, x, use_running_average=True)
        return epilogue(case.form, y, residual)

    return Layer(params, stats, train, infer)


def of_nnx(case: Case, host: Data) -> Layer:
    dtype = jnp.dtype(case.dtype)
    layer = nnx.BatchNorm(
        case.shape[-1], momentum=DECAY, epsilon=EPSILON, dtype=dtype, rngs=nnx.Rngs(0)
    )
    assert layer.scale is not None
    assert layer.bias is not None
    layer.scale[...], layer.bias[...] = jnp.asarray(host.scale), jnp.asarray(host.bias)
    graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def train(params, stats, x, residual):
        layer = nnx.merge(graph, params, stats, copy=True)
        y = layer(x, use_running_average=False)
        return epilogue(case.form, y, residual), nnx.state(layer, nnx.BatchStat)

    def infer(params, stats, x, residual):
        y = nnx.merge(graph, params, stats, copy=True)(x, use_running_average=True)
        return epilogue(case.form, y, residual)

    return Layer(params, stats, train, infer)


def of_haiku(case: Case, host: Data) -> Layer:
    """Makes Haiku's layer. It works in x's dtype: x is cast to float32 first, and y back."""
    import haiku as hk  # pyright: ignore[reportMissingImports]  (optional)

    def call(x, training):
        layer = hk.BatchNorm(True, True, DECAY, eps=EPSILON, name="bn")
        return layer(x.astype(jnp.float32), training).astype(x.dtype)

    net = hk.without_apply_rng(hk.transform_with_state(call))
    # Haiku's averages start with the batch that init gets: here one of mean 0 and variance 1.
    (ones,) = broadcast(case, jnp.ones(case.shape[-1]))
    _, stats = net.init(jax.random.key(0), jnp.concatenate([-ones, ones]), True)
    scale, bias = broadcast(case, jnp.asarray(host.scale), jnp.asarray(host.bias))
    params = {"bn": {"scale": scale, "offset": bias}}

    def train(params, stats, x, residual):
        y, stats = net.apply(params, stats, x, True)
        return epilogue(case.form, y, residual), stats

    def infer(params, stats, x, residual):
        y, _ = net.apply(params, stats, x, False)
        return epilogue(case.form, y, residual)

    return Layer(params, stats, train, infer)


def of_equinox(case: Case, host: Data) -> Layer:
    """Makes Equinox's layer, for [N, C, ...]. It works in x's dtype: x is cast, and y back."""
    import equinox as eqx  # pyright: ignore[reportMissingImports]  (optional)

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        case.shape[-1], "batch", eps=EPSILON, momentum=DECAY, mode="batch"
    )
    layer = eqx.tree_at(
        lambda layer: (layer.weight, layer.bias),
        layer,
        (jnp.asarray(host.scale), jnp.asarray(host.bias)),
    )
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(params, state, x, inference):
        layer = eqx.nn.inference_mode(eqx.combine(params, static), inference)
        over_batch = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = over_batch(x.astype(jnp.float32), state)
        return y.astype(x.dtype), state

    def train(params, state, x, residual):
        y, state = apply(params, state, x, False)
        return epilogue(case.form, y, residual), state

    def infer(params, state, x, residual):
        return epilogue(case.form, apply(params, state, x, True)[0], residual)

    return Layer(params, state, train, infer, channels_first=True)


def broadcast(case: Case, *vectors: Array) -> list[Array]:
    """Reshapes vectors [C] to the rank of x."""
    return [v.reshape((1,) * (len(case.shape) - 1) + (-1,)) for v in vectors]
