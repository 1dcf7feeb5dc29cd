"""x -> Moments(count, mean, var): one pass over x with the accuracy of two.

The textbook one-pass variance E[x^2] - E[x]^2 cancels when the mean is large beside the standard
deviation: at mean/std = 1e4 float32 has no correct digit left. But variance does not change when
a constant is taken from x, and Batch Normalization as a whole does not either. So all sums here are
sums of z = x - shift, where the shift is some value of x in the same channel. That subtraction is
exact where it matters (Sterbenz: x and shift within a factor of two), z is about as large as the
standard deviation, and E[z^2] - E[z]^2 then loses nothing.

(bfloat16 needs no shift, see `jbn._xla.bfloat16`.)

This file sums the part of the batch that one device has; `pooling` joins the moments of the parts.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jbn._core import check
from jbn._core.axes import Axes
from jbn._core.plan import Spec, plan_moments
from jbn._core.pooling import pool_instances, restore
from jbn._core.shift import shift_for
from jbn._core.types import Moments, ShiftedMoments, dot
from jbn._devices import placement
from jbn._devices.named_axes import AxisName, scope
from jbn._devices.sharded_arrays import measure_everywhere
from jbn._sums.protocol import Batch, Sums
from jbn._xla import bfloat16


def moments(
    x: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    groups: int | None = None,
) -> Moments:
    """Computes count, mean and biased variance of every feature of x (Alg. 1, lines 1 and 2).

    >>> import jax.numpy as jnp, jbn
    >>> m = jbn.moments(jnp.array([[1.0, 10.0], [3.0, 10.0]]))
    >>> print(m.count, m.mean, m.var)
    2.0 [ 2. 10.] [1. 0.]

    Args:
      x: [N, ..., C], floating point. Half precision is summed in float32.
      axis: the feature axis or axes, C; the moments are taken over all others.
      mask: bool, of x's rank, broadcasts against x. False: the value takes no part and may be NaN.
      weights: real and not negative, broadcasts like `mask`. Zero is the same as masked; a
        negative or NaN weight counts as zero.
      axis_name: take the moments over these named axes (of vmap, pmap, shard_map) as well.
      axis_index_groups: as in `jax.lax.psum`.
      groups: take the moments of each of this many equal, consecutive parts of the batch.

    Returns:
      The moments, differentiable in x to any order. Mask and weights carry no gradient.

    Raises:
      NameError: no vmap, pmap or shard_map binds axis_name.
      TypeError: x is not floating point, or mask is not bool.
      ValueError: axis, mask, weights or groups do not fit x's shape.
    """
    x = check.floating(x)
    over = scope(axis_name, axis_index_groups)
    spec, inputs = plan_moments(x, axis=axis, over=over, mask=mask, weights=weights, groups=groups)
    return restore(measure(spec, inputs.x, inputs.weights), spec.axes)


# The internal functions. Per-feature values keep x's rank, (1, ..., C), to broadcast against x.


# Jitted: an eager call runs one program, and layers of equal shape are traced once.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0, inline=True)
def measure(spec: Spec, x: Array, weights: Array | None) -> ShiftedMoments:
    """Computes the moments of x over the batch and the scope, differentiable to any order."""
    blocks = spec.sums.in_blocks and x.dtype == jnp.bfloat16 and weights is None
    local = functools.partial(_moments_by_blocks if blocks else moments_by_shift, spec.sums)
    m = measure_everywhere(local, spec.axes, x, weights)
    return pool_instances(spec.over, m, weights is not None) if spec.over.names else m


@measure.defjvp
def _measure_jvp(spec: Spec, primals, tangents):
    x, weights = primals
    m = measure(spec, x, weights)
    dx = placement.alongside(tangents[0], x).astype(m.shift.dtype)
    dmean, half_dvar = derivative(spec, x, weights, m, dx)
    return m, ShiftedMoments(jnp.zeros_like(m.shift), jnp.zeros_like(m.count), dmean, 2 * half_dvar)


def derivative(
    spec: Spec, x: Array, weights: Array | None, m: ShiftedMoments, dx: Array
) -> tuple[Array, Array]:
    """Computes the derivative of the moments along dx: (E[dx], E[(z - mean) dx]), z = x - shift.

    The second number is half of dvar.
    """
    batch = Batch(spec.axes, x, weights)
    mean_dx, mean_z_dx = spec.sums.pair(batch, spec.over, m.shift, m.count, dx)
    return mean_dx, mean_z_dx - dot(m.mean, mean_dx)


def _moments_by_blocks(
    sums: Sums, axes: Axes, x: Array, weights: Array | None = None
) -> ShiftedMoments:
    """Computes the moments of bfloat16 x on one device, by exact sums of blocks if blocks fit."""
    by_shift = functools.partial(moments_by_shift, sums, axes)
    inner = bfloat16.block(axes)
    return bfloat16.moments(x, axes, inner, by_shift) if inner else by_shift(x, weights)


def moments_by_shift(
    sums: Sums, axes: Axes, x: Array, weights: Array | None = None
) -> ShiftedMoments:
    """Computes the moments of x on one device, by sums of x - shift and of its square."""
    shift = shift_for(x, weights, axes)
    count = _count(jnp.finfo(shift.dtype).dtype, weights, axes)
    mean, mean_square = sums.sums(Batch(axes, x, weights), shift, count)
    # If squares overflow, var is inf, and not inf - inf = NaN: y is then the bias, and the running
    # statistics of this feature do not change.
    var = lax.sub(mean_square, dot(mean, mean))
    var = lax.select(lax.eq(mean_square, np.asarray(jnp.inf, var.dtype)), mean_square, var)
    return ShiftedMoments(shift, count, mean, lax.max(var, np.asarray(0, var.dtype)))


def _count(dtype: DTypeLike, weights: Array | None, axes: Axes) -> Array:
    """Counts the values of each feature, or adds up their weights."""
    if weights is None:
        return jnp.asarray(axes.size, dtype).reshape((1,) * len(axes.shape))
    repeats = math.prod(axes.shape[i] for i in axes.reduction if weights.shape[i] == 1)
    own = jnp.sum(weights, axes.reduction, dtype, keepdims=True)
    return own * jnp.asarray(repeats, dtype)
