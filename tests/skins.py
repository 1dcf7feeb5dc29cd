"""The Flax modules of jbn and of Flax as pure functions: one test runs over linen and over nnx.

Most of these tests compare with Flax's module. The tests of the core compare with the oracle.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx

EPS = float(jnp.finfo(jnp.float32).eps)
# In a network of a few layers each output is a sum of some hundred products, BN divides by their
# standard deviation, and gradients pass through all layers twice.
NETWORK = {"rtol": 2e3 * EPS, "atol": 2e3 * EPS}
# One layer: sums of at most 60 values.
LAYER = {"rtol": 32 * EPS, "atol": 32 * EPS}


class Skin(NamedTuple):
    """A module of jbn, the module of Flax that it replaces, and one way to use layers of both.

    `layer(cls, **options)` makes a layer of three features of one of these modules. It returns two
    pure functions: `init(x)`, which returns {"params": {...}, "batch_stats": {...}}, and
    `step(variables, x, use_running_average=False, **arrays)`, which returns (y, variables); the
    arrays are a mask, weights or a residual.
    """

    jbn: type
    flax: type
    layer: Callable[..., tuple[Callable[..., Any], Callable[..., tuple[jax.Array, Any]]]]

    def train(self, x, cls=None, call=None, **options):
        """Returns (y, batch_stats) of the first step; `cls` is jbn's module or Flax's."""
        init, step = self.layer(cls or self.jbn, **options)
        y, new = step(init(x), x, **(call or {}))
        return y, new["batch_stats"]

    def both(self, f, **tolerance):
        """Compares f(cls) of jbn's module with that of Flax's."""
        chex.assert_trees_all_close(f(self.jbn), f(self.flax), **(tolerance or NETWORK))


def linen_layer(cls, **options):
    layer = cls(**options)

    def init(x):
        return layer.init(jax.random.key(0), x, use_running_average=False)

    def step(variables, x, use_running_average=False, **arrays):
        y, new = layer.apply(variables, x, use_running_average, mutable=["batch_stats"], **arrays)
        return y, variables | new

    return init, step


def nnx_layer(cls, **options):
    def make():
        return cls(3, rngs=nnx.Rngs(0), **options)

    def variables(layer):
        _, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)
        return {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}

    def step(old, x, use_running_average=False, **arrays):
        layer = nnx.merge(nnx.graphdef(make()), old["params"], old["batch_stats"])
        y = layer(x, use_running_average, **arrays)
        return y, variables(layer)

    return lambda x: variables(make()), step


LINEN = Skin(jbn.linen.BatchNorm, flax.linen.BatchNorm, linen_layer)
NNX = Skin(jbn.nnx.BatchNorm, nnx.BatchNorm, nnx_layer)
SKINS = pytest.mark.parametrize("skin", [LINEN, NNX], ids=["linen", "nnx"])


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)
