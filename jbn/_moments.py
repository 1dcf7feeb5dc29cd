"""x -> Moments(count, mean, var): one pass over x with the accuracy of two.

The textbook one-pass variance E[x^2] - E[x]^2 cancels when the mean is large beside the standard
deviation: at mean/std = 1e4 float32 has no correct digit left. But variance does not change when
a constant K is taken from x, and Batch Normalization as a whole does not either, so all sums here
are sums of x - K, with K some value of x in the same channel. That subtraction is exact where it
matters (Sterbenz: x and K within a factor of two), x - K is about as large as the standard
deviation, and E[(x-K)^2] - E[x-K]^2 then loses nothing.

(bfloat16 can do without K, see `_bfloat16`.)

That is done for what one device has of the batch; `_pool` makes the moments of the whole of it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jbn import _bfloat16, _check, _sharding
from jbn._axes import Axes
from jbn._devices import join_instances, measure_everywhere
from jbn._plan import Spec, plan_moments
from jbn._pool import Moments, ShiftedMoments, dot, restore, square
from jbn._shift import active, shift_for
from jbn._sync import AxisName, scope


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
    """Count, mean and biased variance of every feature of x (Alg. 1, lines 1 and 2).

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
    x = _check.floating(x)
    over = scope(axis_name, axis_index_groups)
    spec, inputs = plan_moments(x, axis=axis, over=over, mask=mask, weights=weights, groups=groups)
    return restore(measure(spec, inputs.x, inputs.weights), spec.axes)


# The parts. Per-feature values keep x's rank here, (1, ..., C), so that they broadcast against x.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def measure(spec: Spec, x: Array, weights: Array | None) -> ShiftedMoments:
    """The moments of x over the batch and the scope, differentiable in x to any order."""
    return _measure(spec, x, weights)


@measure.defjvp
def _measure_jvp(spec: Spec, primals, tangents):
    x, weights = primals
    m = measure(spec, x, weights)
    dx = _sharding.alongside(tangents[0], x).astype(m.shift.dtype)
    dx = only_active(dx, weights)
    dmean, half_dvar = derivative(spec, x, weights, m, dx)
    return m, ShiftedMoments(jnp.zeros_like(m.shift), jnp.zeros_like(m.count), dmean, 2 * half_dvar)


def derivative(
    spec: Spec, x: Array, weights: Array | None, m: ShiftedMoments, dx: Array
) -> tuple[Array, Array]:
    """The derivative of the moments of z = x - shift along dx: (E[dx], E[(z - mean) dx]).

    The second is half of dvar. It is computed from z itself, which the forward pass has already.
    """
    if spec.kernel is not None:
        sums = spec.kernel.pair(x, spec.axes.squeeze(m.shift), dx)
        mean_dx, mean_z_dx = (spec.axes.expand(s) / m.count.astype(s.dtype) for s in sums)
    else:
        z = shifted(x, m.shift, weights)
        mean_dx, mean_z_dx = average((dx, dot(z, dx)), m.count, weights, spec)
    return mean_dx, mean_z_dx - dot(m.mean, mean_dx)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _measure(spec: Spec, x: Array, weights: Array | None) -> ShiftedMoments:
    """`measure`, without a derivative.

    Jitted, so that without jit around it is one program, and layers of one shape are traced once.
    """
    local = functools.partial(_measure_locally, kernel=spec.kernel)
    if spec.kernel is None:
        m = measure_everywhere(local, spec.axes, x, weights)
    else:  # of programs for one device
        m = local(spec.axes, x, weights)
    if not spec.over.names:
        return m
    return join_instances(spec.over, spec.axes, m, weights is not None)


def _measure_locally(axes: Axes, x: Array, weights: Array | None, kernel: Any) -> ShiftedMoments:
    """The moments of what one device has."""
    by_shift = functools.partial(_moments_by_shift, axes=axes, kernel=kernel)
    exact = x.dtype == jnp.bfloat16 and weights is None and kernel is None
    if exact and (inner := _bfloat16.block(axes)):
        by_blocks = functools.partial(_bfloat16.moments_by_blocks, axes=axes, inner=inner)
        # On CPUs reductions over some axes are slow.
        return lax.platform_dependent(x, cpu=by_shift, default=by_blocks)
    return by_shift(x, weights)


def only_active(values: Array, weights: Array | None) -> Array:
    """`values`, 0 where masked."""
    if weights is None:
        return values
    return jnp.where(active(weights), values, jnp.zeros_like(values))


def shifted(x: Array, shift: Array, weights: Array | None) -> Array:
    """x - K in the accumulator's dtype; 0 where masked, whatever x holds there."""
    z = x.astype(shift.dtype) - shift
    return only_active(z, weights)


def average(
    values: tuple[Array, ...], count: Array, weights: Array | None, spec: Spec
) -> tuple[Array, ...]:
    """The weighted mean of each of `values` over the reduction axes and the scope.

    `values` are 0 where masked. One collective carries all of them. Division comes last, by the
    whole count, so uneven instances are averaged exactly and not as a mean of means.
    """
    axes, over = spec.axes, spec.over
    if weights is not None:
        # A constant, as without weights, but one whose derivative, times 0, would be divided by its
        # square.
        count = lax.stop_gradient(count)
    if weights is not None or not isinstance(axes.size, int) or axes.size == 0:
        count = jnp.where(count > 0, count, jnp.ones_like(count))
    if weights is not None and weights.dtype != jnp.bool_:
        inverse = _inverse(count)
        weights, count = weights * inverse, count * inverse
        values = tuple(v * weights.astype(v.dtype) for v in values)
    sums = over.sum(tuple(jnp.sum(v, axes.reduction, keepdims=True) for v in values))
    return tuple(s / count.astype(s.dtype) for s in sums)


def _inverse(count: Array) -> Array:
    """1 / count, rounded to a power of two, by which weights are multiplied without an error.

    So weights of any common factor, such as 1e30, neither overflow nor vanish in w (x - K)^2. Not
    a division by a power of two: XLA turns a / (b / c) into a c / b, which may overflow.
    """
    numbers = jnp.finfo(count.dtype)
    inverse = lax.reduce_precision(1 / count, exponent_bits=numbers.nexp, mantissa_bits=0)
    return jnp.maximum(inverse, numbers.tiny)


def _moments_by_shift(
    x: Array, weights: Array | None = None, *, axes: Axes, kernel: Any
) -> ShiftedMoments:
    """The moments of what one device has, by sums of x - shift and of its square."""
    shift = shift_for(x, weights, axes)
    z = shifted(x, shift, weights)
    count = _count(z, weights, axes)
    if kernel is not None:
        sums = kernel.sums(x, axes.squeeze(shift))
        mean, mean_square = (axes.expand(s) / count for s in sums)
    else:
        # Each sum from an x - shift of its own: a compiler that takes the sums one by one would
        # store one that they share.
        apart = shifted(x, lax.optimization_barrier(shift), weights)
        mean, mean_square = average((z, square(apart)), count, weights, Spec(axes))
    # Squares that overflow leave var = inf, not inf - inf: y is then the bias, and the running
    # statistics leave the feature out.
    var = mean_square - square(mean)
    var = lax.select(mean_square == jnp.inf, mean_square, var)
    return ShiftedMoments(shift, count, mean, jnp.maximum(var, 0.0))


def _count(z: Array, weights: Array | None, axes: Axes) -> Array:
    """How many values of z, or how much weight, each feature has."""
    dtype = z.real.dtype
    if weights is None:
        return jnp.asarray(axes.size, dtype).reshape((1,) * len(axes.shape))
    repeats = math.prod(axes.shape[i] for i in axes.reduction if weights.shape[i] == 1)
    own = jnp.sum(weights, axes.reduction, dtype, keepdims=True)
    return own * jnp.asarray(repeats, dtype)
