"""Moments of the parts of a batch -> moments of the batch, in three ways.

**Gathered once** (`pool_blocks`, `pool_instances`), for the parts of one layer while it runs:
blocks, groups, devices or program instances. Each part has a shift of its own, near its own data,
so that choosing it needs no communication. One collective sends (shift, E[x - shift], var), and the
count if counts differ. The difference of two shifts is exact where it matters, so nothing cancels
at any mean/std. `pool_blocks` takes statistics of shape [parts, C], `pool_instances` those of any
shape, the same on all instances.

**Summed twice** (`pool_by_sums`), for the deferred moments of all layers after a step. Two
collectives serve all layers together, and each has the size of one device's moments: gathering
would send as many copies as there are devices.

**On the host, in float64** (`HostSums`), for the batches of a data set, which come one by one. In
float32 single values are lost from a count of 2^24 on, which is five batches of 256 images of
112 x 112. After 5,000 batches, merged one by one, the variance would be wrong by about 1e-5, and at
mean/std = 1e4 the mean by 0.01 std. The shift is the first batch's mean, near those of the later
batches: the sums add a relative error of at most about (number of batches) * 2^-52.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbn._core.axes import Axes
from jbn._core.types import Moments, ShiftedMoments, dot
from jbn._devices.named_axes import vary
from jbn._devices.placement import collect, side_by_side, together


def merge(a: Moments, b: Moments) -> Moments:
    """Combines the moments of two batches (Chan, Golub & LeVeque 1979).

    Symmetric and associative up to rounding; an empty batch (count 0) changes nothing, whatever its
    mean and variance are.

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> whole, parts = jbn.moments(x), jbn.merge(jbn.moments(x[:2]), jbn.moments(x[2:]))
    >>> print(whole.var, parts.var)
    [8. 8.] [8. 8.]

    Raises:
      TypeError: a or b is not Moments with a real count and floating-point mean and variance.
      ValueError: the shapes do not fit each other.
    """
    a, b = _checked(a, "a"), _checked(b, "b")
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"merge takes moments of the same features; got means of shapes {a.mean.shape} and "
            f"{b.mean.shape}. To take together the parts along a leading axis, write jbn.pool(m)."
        )
    return pool(
        Moments(*(jnp.stack(jnp.broadcast_arrays(*pair)) for pair in zip(a, b, strict=True)))
    )


def pool(m: Moments) -> Moments:
    """Combines the moments of several batches, by `merge` of all along the leading axis.

        count = sum n_i,  mean = sum n_i mean_i / count,
        var   = sum n_i (var_i + (mean_i - mean)^2) / count

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(12.0).reshape(6, 2)
    >>> jbn.pool(jbn.moments(x, groups=3)).mean
    Array([5., 6.], dtype=float32)

    Args:
      m: mean and var are [k, C]; count is [k, C], [k] or, if all are equal, [].

    Returns:
      Moments of shape [C]. A part of count 0 changes nothing, whatever its mean and variance are;
      without any part, or any data, count, mean and variance are 0.

    Raises:
      TypeError: m is not Moments with a real count and floating-point mean and variance.
      ValueError: the shapes do not fit each other, or there is no leading axis.
    """
    m = _checked(m, "m")
    if m.mean.ndim == 0:
        raise ValueError(
            f"pool takes moments of several batches along a leading axis; got a mean of shape (). "
            f"{_STACK}"
        )
    count, rank = m.count, m.mean.ndim
    one = count.ndim < rank or (count.size < m.mean.size and math.prod(count.shape[1:]) == 1)
    count = count.reshape(*(count.shape or (1,)), *(1 for _ in range(rank - max(count.ndim, 1))))
    count = jnp.broadcast_to(count, (m.mean.shape[0], *count.shape[1:]))
    if len(m.mean) == 0:  # no parts: the same as one part without data
        m, count = jax.tree.map(lambda v: jnp.zeros((1, *v.shape[1:]), v.dtype), (m, count))
    some = count > 0
    mean, var = (jnp.where(some, v, jnp.zeros_like(v)) for v in m[1:])
    pooled = _pool(ShiftedMoments(mean, count, jnp.zeros_like(mean), var), gaps=True)
    total = pooled.count.reshape(()) if one else pooled.count
    return Moments(total, pooled.shift + pooled.mean, pooled.var)


_STACK = "Of a list ms write jbn.pool(jax.tree.map(lambda *v: jnp.stack(v), *ms))."


def _checked(m: Moments, name: str) -> Moments:
    """Checks the Moments that a user passes; a count may be a Python number."""
    if tuple(getattr(m, "_fields", ())) != Moments._fields:
        raise TypeError(
            f"{name} must be jbn.Moments(count, mean, var), such as jbn.moments(x); got "
            f"{type(m).__name__}. {_STACK}"
        )
    count, mean, var = (jnp.asarray(value) for value in m)
    real = jnp.issubdtype(count.dtype, jnp.floating) or jnp.issubdtype(count.dtype, jnp.integer)
    floating = jnp.issubdtype(mean.dtype, jnp.inexact) and jnp.issubdtype(var.dtype, jnp.floating)
    if not (real and floating):
        raise TypeError(
            f"{name} must have a real count and a mean and variance of floating point; got "
            f"{count.dtype}, {mean.dtype} and {var.dtype}. Take them from jbn.moments(x)."
        )
    whole = mean.shape, mean.shape[:1]
    fits = (
        count.ndim == 0
        or count.shape in whole
        or (
            count.ndim == mean.ndim
            and all(n in (1, k) for n, k in zip(count.shape, mean.shape, strict=True))
        )
    )
    covariances = (
        mean.ndim > 1 and mean.shape[-1] == 1 and var.shape == (*mean.shape[:-1], mean.shape[-2])
    )  # of features that are whitened together
    if not (var.shape == mean.shape or covariances) or not fits:
        raise ValueError(
            f"{name} has a mean of shape {mean.shape}, a variance of shape {var.shape} and a count "
            f"of shape {count.shape}: the first two must be the same, and the count that or one "
            f"number for all, or for each part."
        )
    if jnp.issubdtype(count.dtype, jnp.integer):
        count = count.astype(var.dtype)
    return Moments(count, mean, var)


def pool_blocks(axes: Axes, m: ShiftedMoments, counts_differ: bool) -> ShiftedMoments:
    """Pools [groups * blocks, C] to [groups, C], or to [C] if x has no groups."""
    m = _send(collect, 1, m, counts_differ)

    def blocks_first(v: Array) -> Array:
        v = v.reshape(axes.groups, -1, *v.shape[1:])
        return v[0] if axes.group is None else jnp.moveaxis(v, 1, 0)

    return _pool(jax.tree.map(blocks_first, m), gaps=counts_differ)


def pool_instances(over: Any, m: ShiftedMoments, counts_differ: bool) -> ShiftedMoments:
    """Pools the moments of all program instances in the scope; shapes do not change."""
    m = _send(over.gather, 0, m, counts_differ)
    member = over.members()
    if member is not None:
        member = member.reshape(-1, *(1 for _ in m.count.shape[1:]))
        m = m._replace(count=jnp.where(member, m.count, jnp.zeros_like(m.count)))
    return _pool(m, gaps=counts_differ or member is not None)


def pool_sets(m: ShiftedMoments, member: Array) -> ShiftedMoments:
    """Pools [parts, C] to [sets, C]: those parts of each set for which `member` is true.

    Args:
      m: the moments of the parts; count may be [parts, 1].
      member: [parts, sets], bool. A part of no set may hold anything, also NaN.
    """

    def one(own: Array) -> ShiftedMoments:
        own = own.reshape(-1, *(1 for _ in m.mean.shape[1:]))
        return _pool(jax.tree.map(lambda v: jnp.where(own, v, jnp.zeros_like(v)), m), gaps=True)

    return jax.vmap(one, in_axes=1)(member)


def _send(
    collective: Callable[[Array], Array], at: int, m: ShiftedMoments, counts_differ: bool
) -> ShiftedMoments:
    """Sends the moments of all parts, [n, ...], by one collective; equal counts are not sent."""
    # Adding zeros gives the count the shape and sharding of the variance.
    covariances = m.var.shape != m.mean.shape
    like = m.mean if covariances else m.var
    sent = (m.shift, m.mean, m.var, *((m.count + jnp.zeros_like(like),) if counts_differ else ()))
    if covariances:
        shift, mean, var, *counts = side_by_side(collective, *sent)
    else:
        shift, mean, var, *counts = together(collective, at, *sent)
    rest = m.count.shape[at:]
    if counts:
        # A count that all features share was sent once for each feature.
        same = tuple(i for i, n in enumerate(counts[0].shape[1:], 1) if rest[i - 1] != n)
        count = jnp.max(counts[0], same, keepdims=True)
    else:
        count = jnp.broadcast_to(m.count if at else m.count[None], (len(shift), *rest))
    return ShiftedMoments(shift, count, mean, var)


def _pool(m: ShiftedMoments, *, gaps: bool) -> ShiftedMoments:
    """Pools moments of parts that have different shifts; the best of these shifts stays.

    With `gaps`, parts may be without data, and var is right where squares overflow, too.
    """
    total = functools.partial(jnp.sum, axis=0, keepdims=True)
    count = total(m.count)
    share = (m.count / jnp.where(count > 0, count, jnp.ones_like(count))).astype(m.var.dtype)
    # Keep the shift nearest to the mean: its differences to the other shifts are small and exact.
    distance = jnp.abs(m.shift - total(share * (m.shift + m.mean)))
    nearest = jnp.argmin(distance, axis=0, keepdims=True)
    chosen = lax.broadcasted_iota(nearest.dtype, m.shift.shape, 0) == nearest
    shift = total(jnp.where(chosen, m.shift, jnp.zeros_like(m.shift)))
    offset = (m.shift - shift) + m.mean
    offset = jnp.where(m.count > 0, offset, jnp.zeros_like(offset))
    mean = total(share * offset)
    between = _between(offset - mean, m)
    between = jnp.where(jnp.isnan(between), jnp.zeros_like(between), between)  # of inf - inf
    if gaps:  # else a part without a share would make 0 inf
        between = jnp.where(m.count > 0, between, jnp.zeros_like(between))
    var = total(share * (m.var + between))
    return ShiftedMoments(shift[0], count[0], mean[0], var[0])


def _between(offset: Array, m: Moments | ShiftedMoments) -> Array:
    """Computes |offset|^2, or with covariances offset offset^T, (..., s, s), of (..., s, 1)."""
    if m.var.shape == m.mean.shape:
        return dot(offset, offset)
    return lax.mul(*jnp.broadcast_arrays(offset, jnp.swapaxes(offset, -1, -2)))


def pool_by_sums(moments: list[Moments], names: tuple[Any, ...]) -> list[Moments]:
    """Pools the moments of all program instances, for many layers at once.

    The mean is computed first, so that nothing cancels in the variance.
    """
    sums = [(m.count, m.count.astype(m.mean.dtype) * m.mean) for m in moments]
    totals = lax.psum(vary(sums, names), names)
    counts = [jnp.where(n > 0, n, jnp.ones_like(n)) for n, _ in totals]
    means = [s / n.astype(s.dtype) for (_, s), n in zip(totals, counts, strict=True)]
    parts = []
    for m, n, mean in zip(moments, counts, means, strict=True):
        offset = jnp.where(m.count > 0, m.mean - mean, jnp.zeros_like(mean))
        parts.append(m.count / n * (m.var + _between(offset, m)))
    variances = lax.psum(vary(parts, names), names)
    return [Moments(n, *mv) for (n, _), *mv in zip(totals, means, variances, strict=True)]


class HostSums(NamedTuple):
    """Sums over batches on the host, float64 (complex128 for complex means), [C] each."""

    shift: np.ndarray  # the mean of the first batch with data
    batches: np.ndarray  # the number of batches
    weight: np.ndarray  # sum w, where w is the count or 1
    offset: np.ndarray  # sum w (mean - shift)
    within: np.ndarray  # sum w var
    between: np.ndarray  # sum w |mean - shift|^2

    @classmethod
    def of_none(cls, m: Moments) -> "HostSums":
        """Makes the sums over no batch, in the shapes of `m`."""
        mean = np.zeros(m.mean.shape, np.promote_types(m.mean.dtype, np.float64))
        var = np.zeros(m.var.shape)
        return cls(mean, var, var, mean, var, var)

    def add(self, m: Moments, *, weighted: bool) -> "HostSums":
        """Adds one batch, for the features in which it has data and is finite."""
        count, var = np.asarray(m.count, np.float64), np.asarray(m.var, np.float64)
        mean = np.asarray(m.mean, np.promote_types(m.mean.dtype, np.float64))
        sound = (count > 0) & np.isfinite(count) & np.isfinite(mean) & np.isfinite(var)
        weight = np.where(sound, count if weighted else 1.0, 0.0)
        shift = np.where((self.batches == 0) & sound, mean, self.shift)
        offset = np.where(sound, mean, shift) - shift
        return HostSums(
            shift,
            self.batches + sound,
            self.weight + weight,
            self.offset + weight * offset,
            self.within + weight * np.where(sound, var, 0.0),
            self.between + weight * abs(offset) ** 2,
        )

    def divide(self, *, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
        """Computes (mean, var) of all batches; `pooled` adds the variance between batches."""
        some = np.where(self.weight > 0, self.weight, 1.0)
        offset, var = self.offset / some, self.within / some
        if pooled:
            var = var + np.maximum(self.between / some - abs(offset) ** 2, 0.0)
        return self.shift + offset, var


def restore(m: ShiftedMoments, axes: Axes) -> Moments:
    """Converts moments of x - shift, of x's rank, to moments of x, of feature shape."""
    varies = any(m.count.shape[i] != 1 for i in range(len(axes.shape)))
    count = axes.squeeze(m.count) if varies else m.count.reshape(())
    return Moments(count, axes.squeeze(lax.add(m.mean, m.shift)), axes.squeeze(m.var))


def restore_pooled(m: ShiftedMoments, axes: Axes, counts_differ: bool) -> Moments:
    """Pools the moments of all groups, and applies `restore`."""
    return restore(m, axes) if axes.group is None else _restore_groups(axes, counts_differ, m)


@functools.partial(jax.jit, static_argnums=(0, 1))  # eager, it would be many operations
def _restore_groups(axes: Axes, counts_differ: bool, m: ShiftedMoments) -> Moments:
    pooled = pool_blocks(axes.whole, jax.tree.map(axes.squeeze, m), counts_differ)
    return restore(jax.tree.map(axes.whole.unsqueeze, pooled), axes.whole)
