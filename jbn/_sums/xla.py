"""The sums by operations of JAX, for every x, mask, scope and device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbn._core.affine import Activation, Affine, displaced, harmless, transform
from jbn._core.axes import Axes
from jbn._core.shift import active
from jbn._core.types import dot
from jbn._devices.named_axes import Scope, vary_as
from jbn._devices.sharded_arrays import spread
from jbn._sums.protocol import Batch, Line
from jbn._xla.hints import unshared


class XlaSums(NamedTuple):
    """`Sums` by operations of JAX, compiled by XLA."""

    in_blocks: bool = True

    def sums(self, batch: Batch, shift: Array, count: Array) -> tuple[Array, Array]:
        """See `Sums`."""
        axes, x, weights = batch
        z = shifted(x, shift, weights)
        # Each sum has an x - shift of its own: a compiler that takes the sums one by one would
        # store a shared one.
        apart = shifted(x, unshared(shift), weights)
        return _average((z, dot(apart, apart)), count, weights, axes, Scope())

    def pair(
        self, batch: Batch, over: Scope, shift: Array, count: Array, dx: Array
    ) -> tuple[Array, Array]:
        """See `Sums`."""
        axes, x, weights = batch
        dx = only_active(dx, weights)
        z = shifted(x, shift, weights)
        return _average((dx, dot(z, dx)), count, weights, axes, over)

    def spread(
        self,
        batch: Batch,
        at: Affine,
        line: Line,
        activation: Activation | None,
        dtype: np.dtype,
    ) -> Array:
        """See `Sums`."""
        # Without `unshared` XLA for CPUs stores the z of the forward pass until the backward pass:
        # an array of x's size. If an activation or a mask selects by z, XLA stores even a new z,
        # and `late` prevents that.
        chosen = activation is not None or batch.weights is not None
        own = at if chosen else at._replace(shift=unshared(at.shift))
        z = displaced(batch.x, batch.weights, own)
        others = _of_the_batch(batch, at, line, z, late=chosen)
        if activation is None:
            return lax.add(line.own, others).astype(dtype)
        return _activated(activation, at, z, line.own, others).astype(dtype)


def _of_the_batch(batch: Batch, at: Affine, line: Line, z: Array, *, late: bool) -> Array:
    """Computes u + v z, the part that comes through the moments, scale and bias.

    `late` makes XLA for CPUs compute z only when v is known, by a selection of v by z. For finite z
    it always selects v, so that every derivative is that of z v.
    """
    u, v = (spread(batch.axes, batch.x, values) for values in (line.u, line.v))
    if late:
        v = jnp.where(jnp.isfinite(z), v, jnp.zeros_like(v))
    others = transform(z, v, u)
    if batch.weights is None:
        return others
    xhat = at.a * (batch.x.astype(at.shift.dtype) - at.shift)
    return harmless(others, xhat, batch.weights, otherwise=vary_as(batch.x, line.constant))


def _activated(activation: Activation, at: Affine, z: Array, own: Array, others: Array) -> Array:
    """Computes the derivative of the activation along own + others, each term separately.

    In the backward pass `others` gives the sums over the batch, and `own` the later pass over x.
    Each computes the input of the activation for itself: a barrier makes two inputs for the
    compiler. Else it stores the mask, or the masked cotangent, for the second: more traffic.
    """
    first = transform(z, at.a, at.c)
    a, c = unshared((at.a, at.c))
    second = transform(z, a, c)
    of_own = jax.jvp(activation, (first,), (own,))[1]
    return of_own + jax.jvp(activation, (second,), (others,))[1]


def only_active(values: Array, weights: Array | None) -> Array:
    """Sets `values` to 0 where masked."""
    if weights is None:
        return values
    return jnp.where(active(weights), values, jnp.zeros_like(values))


def shifted(x: Array, shift: Array, weights: Array | None) -> Array:
    """Computes x - shift in the accumulator's dtype; 0 where masked, whatever x is there."""
    return only_active(lax.sub(x.astype(shift.dtype), shift), weights)


def _average(
    values: tuple[Array, ...], count: Array, weights: Array | None, axes: Axes, over: Scope
) -> tuple[Array, Array]:
    """Takes the weighted mean of each of `values` over the reduction axes and the scope.

    `values` are 0 where masked. One collective sums both. Division by the total count comes last,
    so uneven instances are averaged exactly, and not by a mean of means.
    """
    if weights is not None:
        # The count is a constant, as without weights. Autodiff would divide 0 by its square.
        count = lax.stop_gradient(count)
    if weights is not None or not isinstance(axes.size, int) or axes.size == 0:
        count = jnp.where(count > 0, count, jnp.ones_like(count))
    if weights is not None and weights.dtype != jnp.bool_:
        weights, count = of_moderate_size(weights, count)
        values = tuple(v * weights.astype(v.dtype) for v in values)
    sums = (lax.expand_dims(lax.reduce_sum(v, axes.reduction), axes.reduction) for v in values)
    first, second = over.sum(tuple(sums))
    return lax.div(first, count.astype(first.dtype)), lax.div(second, count.astype(second.dtype))


def of_moderate_size(weights: Array, count: Array) -> tuple[Array, Array]:
    """Divides weights and count by about the count: a power of two, which makes no error.

    So weights with any common factor, such as 1e30, neither overflow nor vanish in w z^2. The code
    does not divide by a power of two, because XLA turns a / (b / c) into a c / b, which may
    overflow.
    """
    numbers = jnp.finfo(count.dtype)
    inverse = lax.reduce_precision(1 / count, exponent_bits=numbers.nexp, mantissa_bits=0)
    inverse = jnp.maximum(inverse, numbers.tiny)
    weights, count = weights * inverse, count * inverse
    return weights, count
