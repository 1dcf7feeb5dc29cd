"""Containers for the moments of x and of x - shift, and the products that they average."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Moments(NamedTuple):
    """Count, mean and variance of each feature in a batch.

    Attributes:
      count: the number of values in each mean, or the sum of their weights. [], or [C] if it
        differs by feature (with several feature axes, a shape that broadcasts to theirs).
      mean: [C], float32 or float64 (complex for complex x). 0 where the count is 0.
      var: [C], float32 or float64: the biased variance, E[|x - mean|^2]. 0 where the count is 0.

    With `groups=g`, mean and var are [g, C], and count broadcasts to [g, C].
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (of tuple.count)
    mean: Array
    var: Array


class ShiftedMoments(NamedTuple):
    """The moments of x - shift. Fields broadcast against x, (1, ..., C), or to [C] or [parts, C].

    Attributes:
      shift: a number near the mean that is the same for all values of a feature.
      count: as in `Moments`.
      mean: E[x - shift], small beside the standard deviation.
      var: the variance, the same for x and x - shift. Where features are whitened together it is
        their covariance, (..., s, s), beside a mean of (..., s, 1); for s = 1 both are the same.
    """

    shift: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (of tuple.count)
    mean: Array
    var: Array


def dot(x: Array, y: Array) -> Array:
    """Computes x y, elementwise; for complex numbers Re(conj(x) y), which is |x|^2 for y = x."""
    return lax.real(lax.conj(x) * y) if jnp.iscomplexobj(x) else lax.mul(x, y)
