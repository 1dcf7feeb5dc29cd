"""Makes the two networks, with each layer in the place of their normalisation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

import jbn
import jbn.linen
from experiments.images.photos import N_CLASSES
from experiments.nets.convolution import matmul_conv
from experiments.nets.norms import ScaleAndBias, by_image
from experiments.nets.resnet import ResNet
from experiments.nets.slots import ModuleMaker

MOVING = jbn.ema(0.99, debias=True)
LAYERS: dict[str, Callable[[int], ModuleMaker]] = {  # name -> maker, of the size of a group
    "none": lambda size: by_image(ScaleAndBias),
    "each feature": lambda size: functools.partial(jbn.linen.BatchNorm, update=MOVING),
    "groups": lambda size: functools.partial(
        jbn.linen.Whitening, group_size=size, epsilon=1e-3, update=MOVING
    ),
    "all features": lambda size: functools.partial(
        jbn.linen.Whitening, epsilon=1e-3, update=MOVING
    ),
}


class Sigmoids(nn.Module):
    """The network of Figure 1: hidden layers of sigmoids behind a norm, and a linear readout."""

    norm: ModuleMaker
    widths: Sequence[int] = (100, 100, 100)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps ``x: [N, pixels]`` to logits ``[N, 10]``."""
        for width in self.widths:
            layer = self.norm(use_running_average=not train)
            x = jax.nn.sigmoid(layer(nn.Dense(width, use_bias=False)(x)))
        return nn.Dense(10)(x)


def sigmoids(layer: str) -> nn.Module:
    """Makes the network for digits; groups have 10 of the 100 features."""
    return Sigmoids(LAYERS[layer](10))


def resnet(layer: str) -> nn.Module:
    """Makes a ResNet of 8 layers for images of 16 x 16; groups have 8 channels."""
    return ResNet(
        stem_stride=2,
        n_classes=N_CLASSES,
        norm=LAYERS[layer](8),
        conv=functools.partial(
            nn.Conv, kernel_init=nn.initializers.he_normal(), conv_general_dilated=matmul_conv
        ),
    )


def from_bits(images: jax.Array) -> jax.Array:
    """Converts black-and-white pixels to float32."""
    return images.astype(jnp.float32)
