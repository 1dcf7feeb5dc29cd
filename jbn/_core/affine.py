"""The transform y = scale (x - mean) / sqrt(var + epsilon) + bias, as an affine map of x - shift.

With z = x - shift, rstd = 1 / sqrt(var + epsilon), and mean the mean of z,

    y = a z + c,    a = scale rstd,    c = bias - a mean.

z is exact where the shift is near x (see `moments`). So y is as accurate as y from x - mean, as
long as the shift is within a few standard deviations of the mean (see `shift`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jbn._core.axes import Axes
from jbn._core.shift import active
from jbn._xla.hints import widened
from jbn._xla.select import replaced

Activation = Callable[[Array], Array]


class Affine(NamedTuple):
    """Per-feature constants of the affine map, (1, ..., C) each."""

    shift: Array
    mean: Array  # of x - shift; 0 where rstd is 0
    rstd: Array
    a: Array
    c: Array


def location(mean: Array, var: Array, epsilon: float) -> tuple[Array, Array]:
    """Computes (mean, 1 / sqrt(var + epsilon)), in mean's dtype.

    Both are 0 where var + epsilon = 0, and where var = inf (the mean may then be infinite too), so
    that y is the bias.
    """
    var = lax.add(var, np.asarray(epsilon, var.dtype))
    zero, inf = (np.asarray(value, var.dtype) for value in (0, jnp.inf))
    useless = lax.bitwise_or(lax.le(var, zero), lax.eq(var, inf))
    rstd = lax.rsqrt(replaced(var, useless, jnp.inf)).astype(mean.dtype)
    return replaced(mean, useless, 0.0), rstd


def affine(shift: Array, mean: Array, rstd: Array, scale: Array, bias: Array) -> Affine:
    """Makes the map: computes a and c from the arguments."""
    a = scale.astype(rstd.dtype) * rstd
    return Affine(shift, mean, rstd, a, bias.astype(rstd.dtype) - a * mean)


def expanded(
    scale: Array | None, bias: Array | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array]:
    """Reshapes scale and bias to broadcast against x; 1 and 0 replace None."""
    real = jnp.finfo(dtype).dtype
    scale = jnp.ones(axes.feature_shape, real) if scale is None else scale
    bias = jnp.zeros(axes.feature_shape, real) if bias is None else bias
    return axes.expand(scale), axes.expand(bias)


def transform(z: Array, a: Array, c: Array, residual: Array | None = None) -> Array:
    """Computes a z + c + residual, in z's dtype (Alg. 1, lines 3 and 4)."""
    y = lax.add(lax.mul(z, a), c)
    return y if residual is None else lax.add(y, widened(residual, z.dtype))


def displaced(x: Array, weights: Array | None, at: Affine) -> Array:
    """Computes x - shift, also where masked; a masked x that is not finite gets xhat = 0."""
    z = lax.sub(x.astype(at.shift.dtype), at.shift)
    return z if weights is None else harmless(z, z * at.a, weights, otherwise=at.mean)


def harmless(values: Array, at: Array, weights: Array | None, otherwise: ArrayLike = 0.0) -> Array:
    """Replaces `values` by `otherwise` at masked positions where `at` is not finite.

    So y is a constant there, the bias, and a NaN in the padding of a batch reaches no gradient.
    """
    if weights is None:
        return values
    return jnp.where(active(weights) | jnp.isfinite(at), values, otherwise)


def where_data(count: Array, values: Array) -> Array:
    """Sets `values` to 0 for features without data."""
    values = values + jnp.zeros_like(count, values.dtype)  # zeros with the sharding of the counts
    return jnp.where(count > 0, values, jnp.zeros_like(values))
