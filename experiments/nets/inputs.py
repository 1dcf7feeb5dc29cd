"""Converts images to the input of a network."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def as_input(images: Array) -> Array:
    """Converts uint8 to float32 of about zero mean and unit variance."""
    return (images.astype(jnp.float32) - 127.5) / 64.0
