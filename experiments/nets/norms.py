"""Makers of layers for the ``norm`` slot of a network that look at one image at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class ScaleAndBias(nn.Module):
    """Computes ``scale x + bias``: a normalisation layer without the normalisation."""

    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", self.scale_init, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


def by_image(layer: Any, **fixed: Any) -> Any:
    """Makes the maker of a layer that does the same in training and inference."""

    def make(use_running_average: bool | None = None, **given: Any) -> nn.Module:
        del use_running_average
        return layer(**fixed, **given)

    return make
