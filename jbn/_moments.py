"""x -> Moments(count, mean, var): one pass over x with the accuracy of two.

The textbook one-pass variance E[x^2] - E[x]^2 cancels when the mean is large beside the standard
deviation: at mean/std = 1e4 float32 has no correct digit left. But variance does not change when
a constant K is taken from x, and Batch Normalization as a whole does not either, so all sums here
are sums of x - K, with K some value of x in the same channel. That subtraction is exact where it
matters (Sterbenz: x and K within a factor of two), x - K is about as large as the standard
deviation, and E[(x-K)^2] - E[x-K]^2 then loses nothing.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jbn import _check
from jbn._axes import Axes, resolve
from jbn._sync import AxisName, Scope, scope


class Moments(NamedTuple):
    """What a batch says about each feature.

    Attributes:
      count: the number of values behind each mean, or the sum of their weights. []; or [C] (for
        several feature axes, a shape that broadcasts to theirs) where these differ by feature.
      mean: [C], float32 or float64 (complex for complex x). 0 where the count is 0.
      var: [C], float32 or float64: the biased variance, E[|x - mean|^2]. 0 where the count is 0.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (of tuple.count)
    mean: Array
    var: Array


def moments(
    x: ArrayLike,
    *,
    axis: int | Sequence[int] = -1,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
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

    Returns:
      The moments, differentiable in x to any order. Mask and weights carry no gradient.

    Raises:
      TypeError: x is not floating point, or mask is not bool.
      ValueError: axis, mask or weights do not fit x's shape.
    """
    x = _check.floating(x)
    axes = resolve(x.shape, axis)
    _check.reduction_axis(axes, axis_name)
    weights = _check.participation(axes, mask, weights)
    over = scope(axis_name, axis_index_groups)
    shift = reference(x, weights, axes, over)
    return restore(shifted_moments(x, shift, weights, axes, over), shift, axes)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two batches taken together (Chan, Golub & LeVeque 1979).

    Symmetric and associative up to rounding; an empty batch (count 0) changes nothing.

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> whole, parts = jbn.moments(x), jbn.merge(jbn.moments(x[:2]), jbn.moments(x[2:]))
    >>> print(whole.var, parts.var)
    [8. 8.] [8. 8.]
    """
    count = a.count + b.count
    share = b.count / jnp.where(count > 0, count, jnp.ones_like(count))
    delta = b.mean - a.mean
    return Moments(
        count,
        a.mean + share * delta,
        (1 - share) * a.var + share * b.var + share * (1 - share) * square(delta),
    )


# The parts. Per-feature values keep x's rank here, (1, ..., C), so that they broadcast against x.


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The dtype of sums over values of `dtype`: at least float32."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def square(x: Array) -> Array:
    """|x|^2, real."""
    return dot(x, x)


def dot(x: Array, y: Array) -> Array:
    """x y, elementwise; for complex numbers Re(conj(x) y)."""
    return lax.real(lax.conj(x) * y) if jnp.iscomplexobj(x) else x * y


def reference(x: Array, weights: Array | None, axes: Axes, over: Scope) -> Array:
    """K: for each feature a value of x that takes part, the same throughout `over`.

    A value of x, and no average, so that a constant channel becomes exactly 0; 0 if there is none.
    The result of Batch Normalization does not depend on K, so K carries no gradient.
    """
    x = lax.stop_gradient(x)
    if axes.size == 0:
        shift = jnp.full(axes.per_feature, -jnp.inf, x.dtype)
    elif is_explicitly_sharded(x):  # such an x has no rows to index: any value will do
        values = x if weights is None else jnp.where(active(weights), x, -jnp.inf)
        shift = jnp.max(values, axes.reduction, keepdims=True)
    elif weights is None:
        shift = _median(*(_row(x, quarter, axes) for quarter in (1, 2, 3)))
    else:
        shift = _median(*(_heaviest_row(x, weights, quarter, axes) for quarter in (1, 2, 3)))
    shift = over.max(shift.astype(accumulator(x.dtype)))
    # From here on (1e31 for float32) x - K could overflow, by half an ulp of the largest x.
    info = jnp.finfo(shift.dtype)
    usable = jnp.abs(shift) < info.max * info.eps / 4
    return jnp.where(usable, shift, jnp.zeros_like(shift))


def _median(a: Array, b: Array, c: Array) -> Array:
    # So that one odd row, such as padding, does no harm: var has a relative error of about
    # eps (1 + (K - mean)^2 / var).
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _row(x: Array, quarter: int, axes: Axes) -> Array:
    """One value of each feature, a quarter, a half or three quarters down every other axis."""

    def at(n: int) -> slice:
        i = n * quarter // 4 if isinstance(n, int) else 0  # not an int: a dimension of jax.export
        return slice(i, i + 1)

    return x[tuple(at(n) if i in axes.reduction else slice(None) for i, n in enumerate(axes.shape))]


def _heaviest_row(x: Array, weights: Array, quarter: int, axes: Axes) -> Array:
    """For each feature the first value of the largest weight, from a quarter of the rows on.

    The search goes round the end; -inf where every weight is 0. Not just any value that takes part:
    one of a tiny weight may lie far from the others and the variance not show it.
    """

    def rows(a: Array) -> Array:
        a = jnp.moveaxis(a, axes.reduction, range(len(axes.reduction)))
        return a.reshape(axes.size, -1)

    per_feature = any(weights.shape[i] != 1 for i in axes.features)
    weights = rows(jnp.broadcast_to(weights, axes.shape if per_feature else axes.per_position))
    start = axes.size * quarter // 4
    index = jnp.argmax(jnp.roll(weights, -start, axis=0), axis=0, keepdims=True)
    index = (index + start) % axes.size
    found = active(jnp.take_along_axis(weights, index, axis=0, mode="clip"))
    x = rows(x)
    first = jnp.take_along_axis(x, jnp.broadcast_to(index, (1, x.shape[1])), axis=0, mode="clip")
    return jnp.where(found, first, jnp.full_like(first, -jnp.inf)).reshape(axes.per_feature)


def is_explicitly_sharded(x: Array) -> bool:
    """Whether x lies over a mesh axis of type Explicit, which makes sharding a part of its type."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def active(weights: Array) -> Array:
    """Where a value takes part: a mask as it is, or weights that are not 0."""
    return weights if weights.dtype == jnp.bool_ else weights > 0


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
    values: tuple[Array, ...], count: Array, weights: Array | None, axes: Axes, over: Scope
) -> tuple[Array, ...]:
    """The weighted mean of each of `values` over the reduction axes and `over`.

    `values` are 0 where masked. One collective carries all of them. Division comes last, by the
    whole count, so uneven instances are averaged exactly and not as a mean of means.
    """
    if weights is not None and weights.dtype != jnp.bool_:
        values = tuple(v * weights.astype(v.real.dtype) for v in values)
    sums = over.sum(tuple(jnp.sum(v, axes.reduction, keepdims=True) for v in values))
    count = jnp.where(count > 0, count, jnp.ones_like(count))
    return tuple(s / count.astype(s.dtype) for s in sums)


def total_count(z: Array, weights: Array | None, axes: Axes, over: Scope) -> Array:
    """How many values of z, or how much weight, each feature has in `over`."""
    dtype = z.real.dtype
    if weights is None:
        # Known while tracing: psum of a Python number is the size of the axis, no collective.
        return jnp.asarray(axes.size * over.sum(1), dtype).reshape((1,) * len(axes.shape))
    repeats = math.prod(axes.shape[i] for i in axes.reduction if weights.shape[i] == 1)
    own = jnp.sum(weights, axes.reduction, dtype, keepdims=True)
    # Under shard_map weights may be the same along an axis over which x is split. These zeros vary
    # as z does, and psum wants that.
    own = own * jnp.asarray(repeats, dtype) + jnp.zeros_like(z.real, shape=own.shape)
    return over.sum(own)


def shifted_moments(
    x: Array, shift: Array, weights: Array | None, axes: Axes, over: Scope
) -> Moments:
    """The moments of x - K."""
    z = shifted(x, shift, weights)
    count = total_count(z, weights, axes, over)
    mean, mean_square = average((z, square(z)), count, weights, axes, over)
    # Squares that overflow leave var = inf, not inf - inf: y is then the bias, and the running
    # statistics leave the feature out.
    var = jnp.where(jnp.isinf(mean_square), mean_square, mean_square - square(mean))
    # Not jnp.maximum, which would halve the second derivative where var is 0.
    return Moments(count, mean, jnp.where(var < 0, jnp.zeros_like(var), var))


def restore(m: Moments, shift: Array, axes: Axes) -> Moments:
    """Moments of x - K, of x's rank -> moments of x, of feature shape."""
    varies = any(m.count.shape[i] != 1 for i in axes.features)
    count = axes.squeeze(m.count) if varies else m.count.reshape(())
    return Moments(count, axes.squeeze(m.mean + shift), axes.squeeze(m.var))
