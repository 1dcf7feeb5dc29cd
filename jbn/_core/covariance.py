"""x -> mean and covariance of features that are whitened together, as moments of x - shift.

Here x is [N, ..., G, s, 1]: G groups of s features, and an axis of size 1, beside which a
covariance (1, ..., G, s, s) has x's rank. So all that joins the variances of blocks and devices
joins covariances too (`pooling`, `sharded_arrays`): by one collective, of s + 2 or s + 3 numbers a
feature from each device.

With z = x - shift and E the mean over the batch,

    dmean = E[dx],    dcov = D + D^T,    D = E[dx z^T] - E[dx] mean^T,    mean that of z.

Both come from one product, E[dx (z, 1)^T]: a sum over the batch that is one collective, and so is
its transpose.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jbn._core.axes import Axes
from jbn._core.moments import moments_by_shift
from jbn._core.plan import Spec
from jbn._core.pooling import pool_instances
from jbn._core.shift import active
from jbn._core.types import ShiftedMoments
from jbn._devices import placement
from jbn._devices.named_axes import vary_as
from jbn._devices.sharded_arrays import measure_everywhere
from jbn._sums.protocol import Sums
from jbn._sums.xla import of_moderate_size, only_active
from jbn._xla.hints import recomputed


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0, inline=True)
def covariance(spec: Spec, x: Array, weights: Array | None) -> ShiftedMoments:
    """Computes the moments of x: [N, ..., G, s, 1] over the batch and the scope.

    `var` is the covariance, (1, ..., G, s, s). Differentiable to any order. Weights are the same
    for all features.
    """
    local = functools.partial(_of_part, spec.sums)
    m = measure_everywhere(local, spec.axes, x, weights, together=2)
    return pool_instances(spec.over, m, weights is not None) if spec.over.names else m


@covariance.defjvp
def _covariance_jvp(spec: Spec, primals, tangents):
    x, weights = primals
    m = covariance(spec, x, weights)
    dx = placement.alongside(tangents[0], x).astype(m.shift.dtype)
    # Rematerialised, so that only x is saved for backward, in its own dtype.
    along = recomputed(functools.partial(_along, spec))(x, weights, m.shift, m.count, dx)
    dmean = along[..., -1:]
    half = along[..., :-1] - dmean * jnp.swapaxes(m.mean, -1, -2)
    dcov = half + jnp.swapaxes(half, -1, -2)
    return m, ShiftedMoments(jnp.zeros_like(m.shift), jnp.zeros_like(m.count), dmean, dcov)


def with_one(x: Array, weights: Array | None, shift: Array) -> Array:
    """Computes (z, 1), [N, ..., G, s + 1, 1], z = x - shift; 0 in groups that take no part.

    A masked group that is finite takes part here.
    """
    z = x.astype(shift.dtype) - shift
    one = jnp.ones_like(z[..., :1, :])
    z = jnp.concatenate([z, one], axis=-2)
    return z if weights is None else jnp.where(usable(z, weights), z, jnp.zeros_like(z))


def usable(z: Array, weights: Array) -> Array:
    """Returns where a group of features is not masked, or is masked but finite."""
    return active(weights) | jnp.all(jnp.isfinite(z), -2, keepdims=True)


def _of_part(sums: Sums, axes: Axes, x: Array, weights: Array | None) -> ShiftedMoments:
    """Computes the moments on one device, in two passes: a covariance of centred values."""
    m = moments_by_shift(sums, axes, x, weights)
    z = only_active(x.astype(m.shift.dtype) - m.shift - m.mean, weights)
    return m._replace(var=_average(Spec(axes), z, z, weights, m.count))


def _along(
    spec: Spec, x: Array, weights: Array | None, shift: Array, count: Array, dx: Array
) -> Array:
    """Computes E[dx (z, 1)^T], (1, ..., G, s, s + 1), over batch and scope; linear in dx."""
    z = with_one(x, weights, vary_as(x, shift))
    return _average(spec, only_active(dx, weights), only_active(z, weights), weights, count)


def _average(spec: Spec, a: Array, b: Array, weights: Array | None, count: Array) -> Array:
    """Computes E[a b^T] over batch and scope. Both are 0 where masked."""
    count = lax.stop_gradient(count)
    count = jnp.where(count > 0, count, jnp.ones_like(count))
    if weights is not None and weights.dtype != jnp.bool_:
        weights, count = of_moderate_size(weights, count)
        b = b * weights.astype(b.dtype)
    return spec.over.sum(_products(spec.axes, a, b)) / count


def _products(axes: Axes, a: Array, b: Array) -> Array:
    """Sums a b^T over the batch: [N, ..., G, s, 1] and [N, ..., G, t, 1] -> (1, ..., G, s, t)."""
    batch = tuple(i for i in range(a.ndim - 2) if i not in axes.reduction)
    where = None
    if placement.is_explicitly_sharded(a):
        spec = placement.full_spec(a) or []
        where = NamedSharding(
            jax.typeof(a).sharding.mesh, PartitionSpec(*(spec[i] for i in batch), None, None)
        )
    sums = lax.dot_general(
        a[..., 0],
        b[..., 0],
        ((axes.reduction, axes.reduction), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        out_sharding=where,
    )
    kept = [i for i in range(a.ndim) if i not in axes.reduction]
    return jnp.expand_dims(sums, [i for i in range(a.ndim) if i not in kept])
