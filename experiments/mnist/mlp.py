"""The network of the digit experiments: an MLP over the core, with and without normalisation.

Its functions are pure, over NamedTuples: ``MLP`` holds what gradient descent changes, and ``Stats``
holds the running statistics of the Batch Normalization layers. A network without these layers has
the same type, with ``norm=None``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jbn

SIZES = (784, 100, 100, 100, 10)  # the paper's network on 28 x 28 pixels: width of every layer
NETS = {"plain": False, "batch_norm": True}  # name -> whether hidden layers are normalised


class Layer(NamedTuple):
    """One affine layer: ``x @ kernel + bias``, or ``x @ kernel`` normalised."""

    kernel: jax.Array  # [in, out]
    bias: jax.Array | None  # [out]; None if Batch Normalization adds one
    norm: jbn.Params | None  # scale, bias [out]; None in a layer without Batch Normalization


class MLP(NamedTuple):
    """The trained parameters: sigmoid hidden layers and a linear readout."""

    hidden: tuple[Layer, ...]
    readout: Layer


# Debiased moving averages do not depend on the zeros and ones that they start from. So the first
# measurements show the network, and not the start of the averages.
RUNNING_AVERAGE = jbn.ema(0.99, debias=True)

# The running statistics of every hidden layer; None for a layer that is not normalised.
Stats = tuple[jbn.RunningStats | None, ...]


def init_mlp(
    key: jax.Array, sizes: Sequence[int], init_std: jax.Array | float, batch_norm: bool
) -> tuple[MLP, Stats]:
    """Draws a network: kernels from a Gaussian, biases zero, scales one.

    The same key gives the same kernels with and without Batch Normalization.

    Args:
      key: a JAX random key.
      sizes: widths of the input, every hidden layer and the output, as in ``(784, 100, 10)``.
      init_std: standard deviation of every kernel's entries.
      batch_norm: whether the hidden layers are normalised before their sigmoid.

    Returns:
      The parameters and the running statistics.
    """
    keys = jax.random.split(key, len(sizes) - 1)
    kernels = [
        init_std * jax.random.normal(k, (fan_in, fan_out))
        for k, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    widths = sizes[1:-1]
    # Normalisation subtracts the mean, and with it any bias before it. The layer's own bias would
    # have no effect, so the paper (section 3.2) drops it.
    hidden = tuple(
        Layer(w, None, jbn.init_params(n)) if batch_norm else Layer(w, jnp.zeros(n), None)
        for w, n in zip(kernels, widths, strict=False)
    )
    stats = tuple(jbn.init_stats(n) if batch_norm else None for n in widths)
    return MLP(hidden, Layer(kernels[-1], jnp.zeros(sizes[-1]), None)), stats


def affine(layer: Layer, x: jax.Array) -> jax.Array:
    """Computes ``x @ kernel (+ bias)``, for ``x: [N, in]``."""
    y = x @ layer.kernel
    return y if layer.bias is None else y + layer.bias[None, :]


def apply_train(mlp: MLP, stats: Stats, x: jax.Array) -> tuple[jax.Array, Stats]:
    """Maps ``x: [N, in]`` to logits ``[N, out]``, by batch moments; updates the statistics."""
    updated = []
    for layer, running in zip(mlp.hidden, stats, strict=True):
        x = affine(layer, x)
        if layer.norm is not None and running is not None:
            x, running = jbn.batch_norm(x, layer.norm, running, update=RUNNING_AVERAGE)
        updated.append(running)
        x = jax.nn.sigmoid(x)
    return affine(mlp.readout, x), tuple(updated)


def apply_test(mlp: MLP, stats: Stats, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns logits ``[N, out]``, by the running statistics, and the inputs of the last sigmoids.

    Panels (b) and (c) of the paper's Figure 1 follow these inputs, ``[N, width of the last hidden
    layer]``: the layer's output before its nonlinearity, after any normalisation.
    """
    inputs = x
    for layer, running in zip(mlp.hidden, stats, strict=True):
        inputs = affine(layer, x)
        if layer.norm is not None and running is not None:
            inputs = jbn.batch_norm_inference(inputs, layer.norm, running)
        x = jax.nn.sigmoid(inputs)
    return affine(mlp.readout, x), inputs
