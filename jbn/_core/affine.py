"""y = scale (x - mean) / sqrt(var + epsilon) + bias as one affine map of z = x - shift a feature.

With rstd = 1 / sqrt(var + epsilon), and mean that of z,

    y = a z + c,    a = scale rstd,    c = bias - a mean.

z is exact where the shift is near x (see `moments`). So y is as accurate as from x - mean, as long
as the shift lies within a few standard deviations of the mean: see `shift`.
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
    """The map, by vectors (1, ..., C)."""

    shift: Array
    mean: Array  # of x - shift; 0 where rstd is 0
    rstd: Array
    a: Array
    c: Array


def location(mean: Array, var: Array, epsilon: float) -> tuple[Array, Array]:
    """(mean, 1 / sqrt(var + epsilon)), in mean's dtype.

    Both are 0 where there is nothing to divide by (var + epsilon = 0) or too much (var = inf, and
    the mean perhaps as well), so that y is the bias.
    """
    var = lax.add(var, np.asarray(epsilon, var.dtype))
    zero, inf = (np.asarray(value, var.dtype) for value in (0, jnp.inf))
    useless = lax.bitwise_or(lax.le(var, zero), lax.eq(var, inf))
    rstd = lax.rsqrt(replaced(var, useless, jnp.inf)).astype(mean.dtype)
    return replaced(mean, useless, 0.0), rstd


def affine(shift: Array, mean: Array, rstd: Array, scale: Array, bias: Array) -> Affine:
    """The map, with a and c made of the others."""
    a = scale.astype(rstd.dtype) * rstd
    return Affine(shift, mean, rstd, a, bias.astype(rstd.dtype) - a * mean)


def expanded(
    scale: Array | None, bias: Array | None, axes: Axes, dtype: DTypeLike
) -> tuple[Array, Array]:
    """Scale and bias, broadcast against x; 1 and 0 where None."""
    real = jnp.finfo(dtype).dtype
    scale = jnp.ones(axes.feature_shape, real) if scale is None else scale
    bias = jnp.zeros(axes.feature_shape, real) if bias is None else bias
    return axes.expand(scale), axes.expand(bias)


def transform(z: Array, a: Array, c: Array, residual: Array | None = None) -> Array:
    """a z + c + residual, in z's dtype (Alg. 1, lines 3 and 4)."""
    y = lax.add(lax.mul(z, a), c)
    return y if residual is None else lax.add(y, widened(residual, z.dtype))


def displaced(x: Array, weights: Array | None, at: Affine) -> Array:
    """x - shift at every position, masked ones included; of xhat 0 where x is not finite there."""
    z = lax.sub(x.astype(at.shift.dtype), at.shift)
    return z if weights is None else harmless(z, z * at.a, weights, otherwise=at.mean)


def harmless(values: Array, at: Array, weights: Array | None, otherwise: ArrayLike = 0.0) -> Array:
    """`values`, but `otherwise` at positions that are masked and where `at` is not finite.

    So y is a constant there, the bias, and a NaN in the padding of a batch reaches no gradient.
    """
    if weights is None:
        return values
    return jnp.where(active(weights) | jnp.isfinite(at), values, otherwise)


def where_data(count: Array, values: Array) -> Array:
    """`values`, 0 for features without data."""
    values = values + jnp.zeros_like(count, values.dtype)  # zeros that bring the counts' sharding
    return jnp.where(count > 0, values, jnp.zeros_like(values))
