"""ResNet (He et al., arXiv 1512.03385), in Flax linen.

Its slots: ``norm`` makes a normalisation layer, ``conv`` a convolution, ``block`` a residual block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jbn.linen
from experiments.nets.slots import ModuleMaker, norm_activation


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
        """Lists (channels of the output, height and width of the kernel, stride) of each."""
        return [(self.width, 3, self.stride), (self.width, 3, 1)]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``x: [N, H, W, C]`` to ``[N, H / stride, W / stride, channels of the output]``."""
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
        return norm_activation(self.norm, self.fused, **kwargs)


class BottleneckBlock(ResidualBlock):
    """1x1 to ``width`` channels, 3x3 with the stride, 1x1 to four times as many ("v1.5")."""

    def convolutions(self) -> list[tuple[int, int, int]]:
        return [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over all positions, a linear readout.

    Attributes:
      widths: the blocks' width in every stage; each stage after the first halves the resolution.
      blocks: the number of residual blocks in every stage.
      stem_size: height and width of the first convolution's kernel.
      stem_stride: of the first convolution.
      pool: whether a 3x3 max pooling of stride 2 follows the first convolution.
      n_classes: logits a picture.
      norm: makes a normalisation layer; takes ``use_running_average`` and ``scale_init``.
      conv: makes a convolution; takes what ``flax.linen.Conv`` takes.
      block: makes a residual block.
      fused: the norm takes ``activation``, too, and its layers ``residual``, as jbn's do.
      dtype: dtype of all layers except the readout; None: float32, as the parameters.
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
        """Maps ``x: [N, H, W, C]`` to logits ``[N, n_classes]``; ``train``: by batch moments."""
        norm = functools.partial(self.norm, use_running_average=not train)
        conv = self.conv
        if self.dtype is not None:
            x = x.astype(self.dtype)
            norm, conv = (functools.partial(f, dtype=self.dtype) for f in (norm, conv))
        kernel = (self.stem_size, self.stem_size)
        stem: Any = conv(self.widths[0], kernel, strides=self.stem_stride, use_bias=False)
        x = norm_activation(norm, self.fused)(stem(x))
        if self.pool:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, (width, n_blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for block in range(n_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                made: Any = self.block(width, stride, norm, conv, self.fused)
                x = made(x)
        return nn.Dense(self.n_classes)(x.mean((1, 2)).astype(jnp.float32))


# The usual forms, for 224 x 224 pixels and the 1000 classes of ImageNet.
_imagenet = functools.partial(
    ResNet, widths=(64, 128, 256, 512), stem_size=7, stem_stride=2, pool=True, n_classes=1000
)
ResNet18 = functools.partial(_imagenet, blocks=(2, 2, 2, 2))
ResNet50 = functools.partial(_imagenet, blocks=(3, 4, 6, 3), block=BottleneckBlock)
