"""Mean, a sum with its weight, which add up over parts and are divided last."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jbn._core.shift import accumulator


class Mean(NamedTuple):
    """A weighted mean that is not divided yet; the Means of parts add up to the Mean of the batch.

    Attributes:
      total: the sum of weight * value over the examples.
      weight: the sum of the weights; for a mask, the number of examples that take part.
    """

    total: Array
    weight: Array


def as_mean(name: str, value: Any) -> Mean:
    """Converts a Mean, or a plain mean, which weighs 1, to a Mean of float32 or wider.

    Raises:
      TypeError: `value` is complex.
    """
    total, weight = value if isinstance(value, Mean) else (value, jnp.float32(1))
    return Mean(_real(name, total), lax.stop_gradient(_real(f"the weight of {name}", weight)))


def _real(name: str, value: Any) -> Array:
    """Converts `value` to float32, unless it is wider."""
    value = jnp.asarray(value)
    if jnp.iscomplexobj(value):
        raise TypeError(f"{name} must be real; got {value.dtype}.")
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return value.astype(accumulator(value.dtype) if floating else jnp.float32)


def divide(mean: Mean) -> Array:
    """Computes total / weight, which is NaN where the weight is 0."""
    return mean.total / mean.weight.astype(mean.total.dtype)
