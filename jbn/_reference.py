"""K: the constant that is taken from every value of a feature before anything is summed."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jbn._axes import Axes


def reference(x: Array, weights: Array | None, axes: Axes) -> Array:
    """K: for each feature a value of x that takes part. x is what one device has.

    A value of x, and no average, so that a constant channel becomes exactly 0; 0 if there is none.
    The result of Batch Normalization does not depend on K, so K carries no gradient.
    """
    if axes.size == 0:
        shift = jnp.full(axes.per_feature, -jnp.inf, x.dtype)
    elif weights is None:
        shift = _median(*_rows(x, axes))
    else:
        shift = _median(*(_heaviest_row(x, weights, quarter, axes) for quarter in (1, 2, 3)))
    shift = shift.astype(accumulator(x.dtype))
    # From here on (1e31 for float32) x - K could overflow, by half an ulp of the largest x.
    info = jnp.finfo(shift.dtype)
    usable = jnp.abs(shift) < info.max * info.eps / 4
    return jnp.where(usable, shift, jnp.zeros_like(shift))


def _median(a: Array, b: Array, c: Array) -> Array:
    # So that one odd row, such as padding, does no harm: var has a relative error of about
    # eps (1 + (K - mean)^2 / var).
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _rows(x: Array, axes: Axes) -> list[Array]:
    """One value of each feature, a quarter, a half and three quarters down every other axis.

    With several examples all three lie half-way down the axes within an example. Those are cut
    first: a TPU may keep examples of a narrow layer side by side, and would copy x to cut there.
    """
    first = axes.reduction[:1]
    several = all(isinstance(x.shape[i], int) and x.shape[i] > 2 for i in first)

    def cut(x: Array, where: tuple[int, ...], quarter: int) -> Array:
        def at(n: int) -> slice:
            i = n * quarter // 4 if isinstance(n, int) else 0  # not: a dimension of jax.export
            return slice(i, i + 1)

        return x[tuple(at(n) if i in where else slice(None) for i, n in enumerate(x.shape))]

    left = axes.reduction
    if several:
        x, left = lax.optimization_barrier(cut(x, left[1:], 2)), first  # else both become one again
    return [cut(x, left, quarter) for quarter in (1, 2, 3)]


def _heaviest_row(x: Array, weights: Array, quarter: int, axes: Axes) -> Array:
    """For each feature the first value of the largest weight, from a quarter of the rows on.

    The search goes round the end; -inf where every weight is 0. Not just any value that takes part:
    one of a tiny weight may lie far from the others and the variance not show it.
    """

    def rows(a: Array) -> Array:
        """All reduction axes as one, the first."""
        a = jnp.moveaxis(a, axes.reduction, range(len(axes.reduction)))
        return a.reshape(axes.size, *a.shape[len(axes.reduction) :])

    per_feature = any(weights.shape[i] != 1 for i in axes.features)
    weights = rows(jnp.broadcast_to(weights, axes.shape if per_feature else axes.per_position))
    start = axes.size * quarter // 4
    index = jnp.argmax(jnp.roll(weights, -start, axis=0), axis=0, keepdims=True)
    index = (index + start) % axes.size
    found = active(jnp.take_along_axis(weights, index, axis=0, mode="clip"))
    x = rows(x)
    first = jnp.take_along_axis(x, jnp.broadcast_to(index, (1, *x.shape[1:])), axis=0, mode="clip")
    return jnp.where(found, first, jnp.full_like(first, -jnp.inf)).reshape(axes.per_feature)


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """The dtype of sums over values of `dtype`: at least float32."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def active(weights: Array) -> Array:
    """Where a value takes part: a mask as it is, or weights that are not 0."""
    return weights if weights.dtype == jnp.bool_ else weights > 0
