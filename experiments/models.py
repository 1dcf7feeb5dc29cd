"""The networks that the experiments train: an MLP over the core, a ResNet in Flax linen.

The MLP is made of pure functions over NamedTuples: ``MLP`` holds what gradient descent changes,
``Stats`` what it does not, the running statistics of the Batch Normalization layers. A network
without them is the same type with ``norm=None``.

``ResNet`` has slots: ``norm`` makes a normalisation layer, ``conv`` a convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

import jbn
import jbn.linen

SIZES = (784, 100, 100, 100, 10)  # the paper's network on 28 x 28 pixels: width of every layer
NETS = {"plain": False, "batch_norm": True}  # name -> whether hidden layers are normalised


class Layer(NamedTuple):
    """One affine layer: ``x @ kernel + bias``, or ``x @ kernel`` normalised."""

    kernel: jax.Array  # [in, out]
    bias: jax.Array | None  # [out]; None where a Batch Normalization layer brings its own
    norm: jbn.Params | None  # scale, bias [out]; None in a layer without Batch Normalization


class MLP(NamedTuple):
    """Sigmoid hidden layers and a linear readout: everything that training changes."""

    hidden: tuple[Layer, ...]
    readout: Layer


# Moving averages without a trace of the zeros and ones that they start from: so the first
# measurements tell of the network and not of the averages.
RUNNING_AVERAGE = jbn.ema(0.99, debias=True)

# The running statistics of every hidden layer; None for a layer that is not normalised.
Stats = tuple[jbn.RunningStats | None, ...]


def init_mlp(
    key: jax.Array, sizes: Sequence[int], init_std: jax.Array | float, batch_norm: bool
) -> tuple[MLP, Stats]:
    """Draw a network: kernels from a Gaussian, biases zero, scales one.

    The same key gives the same kernels with and without Batch Normalization.

    Args:
      key: a JAX random key.
      sizes: width of the input, of every hidden layer and of the output, as in ``(784, 100, 10)``.
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
    # Normalisation subtracts the mean and with it any bias before it: the layer's own bias would be
    # a parameter without effect, so the paper (section 3.2) drops it.
    hidden = tuple(
        Layer(w, None, jbn.init_params(n)) if batch_norm else Layer(w, jnp.zeros(n), None)
        for w, n in zip(kernels, widths, strict=False)
    )
    stats = tuple(jbn.init_stats(n) if batch_norm else None for n in widths)
    return MLP(hidden, Layer(kernels[-1], jnp.zeros(sizes[-1]), None)), stats


def affine(layer: Layer, x: jax.Array) -> jax.Array:
    """``x @ kernel (+ bias)``, for ``x: [N, in]``."""
    y = x @ layer.kernel
    return y if layer.bias is None else y + layer.bias[None, :]


def apply_train(mlp: MLP, stats: Stats, x: jax.Array) -> tuple[jax.Array, Stats]:
    """Logits ``[N, out]`` for ``x: [N, in]``, normalised by the batch; the updated statistics."""
    updated = []
    for layer, running in zip(mlp.hidden, stats, strict=True):
        x = affine(layer, x)
        if layer.norm is not None and running is not None:
            x, running = jbn.batch_norm(x, layer.norm, running, update=RUNNING_AVERAGE)
        updated.append(running)
        x = jax.nn.sigmoid(x)
    return affine(mlp.readout, x), tuple(updated)


def apply_test(mlp: MLP, stats: Stats, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits ``[N, out]``, normalised by the running statistics; inputs of the last sigmoids.

    The latter, ``[N, width of the last hidden layer]``, are what panels (b) and (c) of the
    paper's Figure 1 follow: the layer's output before its nonlinearity, after any normalisation.
    """
    inputs = x
    for layer, running in zip(mlp.hidden, stats, strict=True):
        inputs = affine(layer, x)
        if layer.norm is not None and running is not None:
            inputs = jbn.batch_norm_inference(inputs, layer.norm, running)
        x = jax.nn.sigmoid(inputs)
    return affine(mlp.readout, x), inputs


# --- ResNet -------------------------------------------------------------------------------------

ModuleMaker = Callable[..., nn.Module]  # a module class, or a functools.partial of one


class ResidualBlock(nn.Module):
    """``relu(x + BN(conv(relu(BN(conv(x))))))``: the basic block of He et al. (arXiv 1512.03385).

    Where the block changes width or resolution, a 1x1 convolution with its own norm fits x to it.

    Attributes:
      width: channels of the output.
      stride: of the first convolution.
      norm: makes a normalisation layer; takes ``scale_init``.
      conv: makes a convolution; takes what ``flax.linen.Conv`` takes.
      fused: the norm takes ``activation``, too, and its layers ``residual``, as jbn's do.
    """

    width: int
    stride: int = 1
    norm: ModuleMaker = functools.partial(jbn.linen.BatchNorm, use_running_average=False)
    conv: ModuleMaker = nn.Conv
    fused: bool = False

    def convolutions(self) -> list[tuple[int, int, int]]:
        """(channels of the output, height and width of the kernel, stride) of each."""
        return [(self.width, 3, self.stride), (self.width, 3, 1)]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``x: [N, H, W, C]`` becomes ``[N, H / stride, W / stride, channels of the last one]``."""
        *inner, (channels, last_size, _) = self.convolutions()
        y = x
        for features, size, stride in inner:
            y = self._norm()(self._conv(features, size, stride)(y))
        y = self._conv(channels, last_size, 1)(y)
        # A scale of 0 makes a new block the identity, which trains without a warm-up
        # (Goyal et al., arXiv 1706.02677, section 5.1).
        last = self._norm(scale_init=nn.initializers.zeros)
        if x.shape != y.shape:
            x = self.norm()(self._conv(channels, 1, self.stride)(x))
        return last(y, x)

    def _conv(self, features: int, size: int, stride: int) -> Any:
        return self.conv(features, (size, size), strides=stride, use_bias=False)  # the norm has one

    def _norm(self, **kwargs: Any) -> Callable[..., jax.Array]:
        return norm_relu(self.norm, self.fused, **kwargs)


def norm_relu(norm: ModuleMaker, fused: bool, **kwargs: Any) -> Callable[..., jax.Array]:
    """A layer (x, residual=None) -> ``relu(BN(x) + residual)``; fused: the norm does all of it."""
    layer: Any = norm(**kwargs, activation=nn.relu) if fused else norm(**kwargs)

    def apply(x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        if fused:
            return layer(x, residual=residual)
        y = layer(x)
        return nn.relu(y if residual is None else y + residual)

    return apply


class BottleneckBlock(ResidualBlock):
    """1x1 to ``width`` channels, 3x3 with the stride, 1x1 to four times as many ("v1.5")."""

    def convolutions(self) -> list[tuple[int, int, int]]:
        return [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over all positions, a linear readout.

    Attributes:
      widths: of the blocks of every stage; each stage after the first halves the resolution.
      blocks: residual blocks of every stage.
      stem_size: height and width of the first convolution's kernel.
      stem_stride: of the first convolution.
      pool: whether a 3x3 max pooling of stride 2 follows on it.
      n_classes: logits a picture.
      norm: makes a normalisation layer; takes ``use_running_average`` and ``scale_init``.
      conv: makes a convolution; takes what ``flax.linen.Conv`` takes.
      block: makes a residual block.
      fused: the norm takes ``activation``, too, and its layers ``residual``, as jbn's do.
      dtype: what the layers compute in, but for the readout; None: float32, as the parameters.
    """

    widths: Sequence[int] = (16, 32, 64)
    blocks: Sequence[int] = (1, 1, 1)
    stem_size: int = 3
    stem_stride: int = 1
    pool: bool = False
    n_classes: int = 10
    norm: ModuleMaker = jbn.linen.BatchNorm
    conv: ModuleMaker = nn.Conv
    block: ModuleMaker = ResidualBlock
    fused: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits ``[N, n_classes]`` for ``x: [N, H, W, C]``; ``train``: by the batch's moments."""
        norm = functools.partial(self.norm, use_running_average=not train)
        conv = self.conv
        if self.dtype is not None:
            x = x.astype(self.dtype)
            norm, conv = (functools.partial(f, dtype=self.dtype) for f in (norm, conv))
        kernel = (self.stem_size, self.stem_size)
        stem: Any = conv(self.widths[0], kernel, strides=self.stem_stride, use_bias=False)
        x = norm_relu(norm, self.fused)(stem(x))
        if self.pool:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, (width, n_blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for block in range(n_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                made: Any = self.block(width, stride, norm, conv, self.fused)
                x = made(x)
        return nn.Dense(self.n_classes)(x.mean((1, 2)).astype(jnp.float32))


# As users know them, for 224 x 224 pixels and the 1000 classes of ImageNet.
_imagenet = functools.partial(
    ResNet, widths=(64, 128, 256, 512), stem_size=7, stem_stride=2, pool=True, n_classes=1000
)
ResNet18 = functools.partial(_imagenet, blocks=(2, 2, 2, 2))
ResNet50 = functools.partial(_imagenet, blocks=(3, 4, 6, 3), block=BottleneckBlock)


def matmul_conv(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **plain: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` of images, as one matrix product over shifted copies.

    For CPUs: a training step of a small ResNet takes half as long as with XLA's own convolution.
    Use it as ``flax.linen.Conv(..., conv_general_dilated=matmul_conv)``.

    Args:
      x: ``[N, H, W, C]``.
      kernel: ``[height, width, C, features]``.
      window_strides: of H and W.
      padding: ``"SAME"``, ``"VALID"``, or ``(low, high)`` of H and W.
      **plain: the other arguments that Flax passes; only their defaults are supported.

    Returns:
      ``[N, H / stride, W / stride, features]``.

    Raises:
      NotImplementedError: dilation, or groups of features.
    """
    dilated = {k: v for k, v in plain.items() if k.endswith("_dilation") and set(v) != {1}}
    if dilated or plain.get("feature_group_count", 1) != 1:
        raise NotImplementedError(f"matmul_conv is for plain convolutions; given {plain}.")
    height, width, channels, features = kernel.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], (height, width), window_strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        range(size - window + 1)[::stride]
        for size, window, stride in zip(x.shape[1:3], (height, width), window_strides, strict=True)
    )
    copies = [
        x[:, i : i + rows[-1] + 1 : rows.step, j : j + columns[-1] + 1 : columns.step]
        for i in range(height)
        for j in range(width)
    ]
    windows = copies[0] if len(copies) == 1 else jnp.concatenate(copies, axis=-1)
    y = windows.reshape(-1, height * width * channels) @ kernel.reshape(-1, features)
    return y.reshape(len(x), len(rows), len(columns), features)
