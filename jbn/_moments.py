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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jbn import _bfloat16, _check, _kernels, _sharding
from jbn._axes import Axes, resolve
from jbn._devices import join_instances, measure_everywhere
from jbn._once import made_once
from jbn._pool import Moments, dot, restore, square
from jbn._reference import accumulator, active, reference
from jbn._sync import AxisName, Scope, scope


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
    over = scope(axis_name, axis_index_groups)
    problem, x, weights = prepare(x, axis, mask, weights, over, groups)
    shift, m = differentiable_measure(problem, x, weights)
    return restore(m, shift, problem.axes)


# The parts. Per-feature values keep x's rank here, (1, ..., C), so that they broadcast against x.


class Problem(NamedTuple):
    """What is static about the statistics of one input."""

    axes: Axes
    over: Scope
    kernel: Any = None  # for the sums; None for XLA's own


def prepare(
    x: ArrayLike,
    axis: int | Sequence[int],
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    over: Scope,
    groups: int | None,
) -> tuple[Problem, Array, Array | None]:
    """Checks all arguments; where there are groups, x and its weights with an axis for them."""
    x = _check.floating(x)
    axes = resolve(x.shape, axis)
    _check.reduction_axis(axes, over.names)
    weights = _check.participation(axes, mask, weights, accumulator(x.dtype))
    weights = None if weights is None else _sharding.alongside(weights, x)
    if groups is None:
        return Problem(axes, over, _kernels.suited(axes, x, weights, over.names)), x, weights
    split = axes.split(_check.groups(groups, axes))
    x = _sharding.divide(x, split)
    return Problem(split, over), x, None if weights is None else _sharding.divide(weights, split)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def differentiable_measure(
    problem: Problem, x: Array, weights: Array | None
) -> tuple[Array, Moments]:
    return measure(problem, x, weights)


@differentiable_measure.defjvp
def _measure_jvp(problem: Problem, primals, tangents):
    x, weights = primals
    shift, m = differentiable_measure(problem, x, weights)
    dx = _sharding.alongside(tangents[0], x).astype(shift.dtype)
    dx = only_active(dx, weights)
    dmean, half_dvar = derivative(problem, x, shift, dx, m.count, m.mean, weights)
    dm = Moments(jnp.zeros_like(m.count), dmean, 2 * half_dvar)
    return (shift, m), (jnp.zeros_like(shift), dm)


def derivative(
    problem: Problem,
    x: Array,
    shift: Array,
    dx: Array,
    count: Array,
    mean: Array,
    weights: Array | None,
) -> tuple[Array, Array]:
    """The derivative of the moments of z = x - K in the direction dx, (E[dx], E[(z - mean) dx]).

    The second is half of dvar. It is computed from z itself, which the forward pass has already.
    """
    if problem.kernel is not None:
        sums = problem.kernel.pair(x, problem.axes.squeeze(shift), dx)
        mean_dx, mean_z_dx = (problem.axes.expand(s) / count.astype(s.dtype) for s in sums)
    else:
        z = shifted(x, shift, weights)
        mean_dx, mean_z_dx = average((dx, dot(z, dx)), count, weights, problem)
        # In this order XLA for CPUs has, backwards, one array of x's size at a time.
        mean_z_dx, mean_dx = made_once(mean_z_dx, mean_dx)
    return mean_dx, mean_z_dx - dot(mean, mean_dx)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def measure(problem: Problem, x: Array, weights: Array | None) -> tuple[Array, Moments]:
    """K, for each feature a value of x near its mean, and the moments of x - K, over the scope.

    Not to be differentiated: `differentiable_measure` has the rule. Jitted, so that without jit
    around it is one program, and layers of one shape are traced once.
    """
    axes, over, kernel = problem
    local = functools.partial(_measure_locally, kernel=kernel)
    if kernel is None:
        shift, m = measure_everywhere(local, axes, x, weights)
    else:  # of programs for one device
        shift, m = local(axes, x, weights)
    if over.names:
        shift, m = join_instances(over, axes, shift, m, weights is not None)
    return shift, m


def _measure_locally(
    axes: Axes, x: Array, weights: Array | None, kernel: Any
) -> tuple[Array, Moments]:
    """K and the moments of x - K, of what one device has."""
    by_reference = functools.partial(_by_reference, axes=axes, kernel=kernel)
    exact = x.dtype == jnp.bfloat16 and weights is None and kernel is None
    if exact and (inner := _bfloat16.block(axes)):
        in_blocks = functools.partial(_bfloat16.shifted_moments, axes=axes, inner=inner)
        # On CPUs reductions over some axes are slow.
        return lax.platform_dependent(x, cpu=by_reference, default=in_blocks)
    return by_reference(x, weights)


def _by_reference(
    x: Array, weights: Array | None = None, *, axes: Axes, kernel: Any
) -> tuple[Array, Moments]:
    shift = reference(x, weights, axes)
    return shift, shifted_moments(x, shift, weights, axes, kernel)


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
    values: tuple[Array, ...], count: Array, weights: Array | None, problem: Problem
) -> tuple[Array, ...]:
    """The weighted mean of each of `values` over the reduction axes and the scope.

    `values` are 0 where masked. One collective carries all of them. Division comes last, by the
    whole count, so uneven instances are averaged exactly and not as a mean of means.
    """
    axes, over, _ = problem
    # A constant, but one whose derivative, times 0, would be divided by its square.
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


def shifted_moments(
    x: Array, shift: Array, weights: Array | None, axes: Axes, kernel: Any = None
) -> Moments:
    """The moments of x - K, of this instance alone."""
    z = shifted(x, shift, weights)
    count = _count(z, weights, axes)
    if kernel is not None:
        sums = kernel.sums(x, axes.squeeze(shift))
        mean, mean_square = (axes.expand(s) / count for s in sums)
    else:
        # Each sum from an x - K of its own: a compiler that takes the sums one by one would store
        # one that they share.
        apart = shifted(x, lax.optimization_barrier(shift), weights)
        mean, mean_square = average((z, square(apart)), count, weights, Problem(axes, Scope()))
    # Squares that overflow leave var = inf, not inf - inf: y is then the bias, and the running
    # statistics leave the feature out.
    var = jnp.where(mean_square == jnp.inf, jnp.inf, mean_square - square(mean))
    return Moments(count, mean, jnp.maximum(var, 0.0))


def _count(z: Array, weights: Array | None, axes: Axes) -> Array:
    """How many values of z, or how much weight, each feature has."""
    dtype = z.real.dtype
    if weights is None:
        return jnp.asarray(axes.size, dtype).reshape((1,) * len(axes.shape))
    repeats = math.prod(axes.shape[i] for i in axes.reduction if weights.shape[i] == 1)
    own = jnp.sum(weights, axes.reduction, dtype, keepdims=True)
    return own * jnp.asarray(repeats, dtype)
