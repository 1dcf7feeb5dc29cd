"""Replacement of values of an array, in two operations of XLA.

Cause: `jax.numpy.where` (jax 0.10 to 0.12) is a jitted function: each call adds a function call and
up to four operations to the program, which take time to trace and to lower. Effect: a layer of
Batch Normalization had 19 such calls. Check: `python -m experiments.speed --part compile`.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax


def replaced(values: Array, where: Array, by: float) -> Array:
    """Replaces `values` by the number `by` where `where`, which broadcasts to them, is true."""
    a, b = jax.typeof(where), jax.typeof(values)
    if a.shape != b.shape or a.sharding != b.sharding:  # the latter over Explicit mesh axes
        return jnp.where(where, by, values)
    return lax.select(where, lax.full_like(values, by), values)
