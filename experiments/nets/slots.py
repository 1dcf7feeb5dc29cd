"""The slots of a network: the makers of its normalisation layers, convolutions and blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

ModuleMaker = Callable[..., nn.Module]  # a module class, or a functools.partial of one


def norm_activation(
    norm: ModuleMaker,
    fused: bool,
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
    **kwargs: Any,
) -> Callable[..., jax.Array]:
    """Makes a layer (x, residual=None) -> ``activation(BN(x) + residual)``; fused: in the norm."""
    layer: Any = norm(**kwargs, activation=activation) if fused else norm(**kwargs)

    def apply(x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        if fused:
            return layer(x, residual=residual)
        y = layer(x)
        return activation(y if residual is None else y + residual)

    return apply
