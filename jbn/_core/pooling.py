"""Moments of parts of a batch -> moments of the whole, in three ways.

**Gathered once** (`pool_blocks`, `pool_instances`): the parts of a layer while it runs, which are
blocks, groups, devices or program instances. Each has a shift of its own, near its own data, so
that choosing it needs no communication. What is sent is (shift, E[x - shift], var), and the count
where counts differ, in one collective. The difference of two shifts is exact where it matters, so
nothing cancels at any mean/std. Here statistics have the shape [C], or [parts, C].

**Summed twice** (`pool_by_sums`): the moments of all layers after a step, which wait for the other
devices. Two collectives for all of them together, of the size of one device's: gathering would send
as many copies as there are devices.

**On the host, in float64** (`HostSums`): the batches of a whole data set, which come one by one. In
float32 single values are lost from a count of 2^24 on, which are five batches of 256 images of
112 x 112; and of 5,000 batches, merged one by one, the variance would be off by some 1e-5, and at
mean/std = 1e4 the mean by 0.01 std. The shift is the first batch's mean, near the others: the sums
add a relative error of at most about (number of batches) * 2^-52.
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
from jbn._core.types import Moments, ShiftedMoments, square
from jbn._devices.named_axes import Scope, vary
from jbn._devices.placement import collect, together


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two batches taken together (Chan, Golub & LeVeque 1979).

    Symmetric and associative up to rounding; an empty batch (count 0) changes nothing, whatever its
    mean and variance are.

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(10.0).reshape(5, 2)
    >>> whole, parts = jbn.moments(x), jbn.merge(jbn.moments(x[:2]), jbn.moments(x[2:]))
    >>> print(whole.var, parts.var)
    [8. 8.] [8. 8.]

    Raises:
      TypeError: a or b are no Moments, or of another kind of numbers.
      ValueError: they are of different shapes.
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
    """The moments of several batches taken together: `merge` of all along the leading axis.

        count = sum n_i,  mean = sum n_i mean_i / count,
        var   = sum n_i (var_i + (mean_i - mean)^2) / count

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.arange(12.0).reshape(6, 2)
    >>> jbn.pool(jbn.moments(x, groups=3)).mean
    Array([5., 6.], dtype=float32)

    Args:
      m: mean and var are [k, C]; count is [k, C] or [k] or, the same for each, [].

    Returns:
      Moments of shape [C]. A part of count 0 changes nothing, whatever its mean and variance are;
      without any part, or any data, count, mean and variance are 0.

    Raises:
      TypeError: m is no Moments, or of another kind of numbers.
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
    if len(m.mean) == 0:  # no parts: as if of one without data
        m, count = jax.tree.map(lambda v: jnp.zeros((1, *v.shape[1:]), v.dtype), (m, count))
    some = count > 0
    mean, var = (jnp.where(some, v, jnp.zeros_like(v)) for v in m[1:])
    pooled = _pool(ShiftedMoments(mean, count, jnp.zeros_like(mean), var))
    total = pooled.count.reshape(()) if one else pooled.count
    return Moments(total, pooled.shift + pooled.mean, pooled.var)


_STACK = "Of a list ms write jbn.pool(jax.tree.map(lambda *v: jnp.stack(v), *ms))."


def _checked(m: Moments, name: str) -> Moments:
    """Moments that a user passes, as arrays; a count may be a Python number."""
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
    if var.shape != mean.shape or not fits:
        raise ValueError(
            f"{name} has a mean of shape {mean.shape}, a variance of shape {var.shape} and a count "
            f"of shape {count.shape}: the first two must be the same, and the count that or one "
            f"number for all, or for each part."
        )
    if jnp.issubdtype(count.dtype, jnp.integer):
        count = count.astype(var.dtype)
    return Moments(count, mean, var)


def pool_blocks(axes: Axes, m: ShiftedMoments, counts_differ: bool) -> ShiftedMoments:
    """[groups * blocks, C] -> [groups, C], or [C] where x has no groups."""
    m = _send(collect, 1, m, counts_differ)

    def blocks_first(v: Array) -> Array:
        v = v.reshape(axes.groups, -1, *v.shape[1:])
        return v[0] if axes.group is None else jnp.moveaxis(v, 1, 0)

    return _pool(jax.tree.map(blocks_first, m))


def pool_instances(over: Scope, m: ShiftedMoments, counts_differ: bool) -> ShiftedMoments:
    """The moments of one instance -> those of all in the scope."""
    m = _send(over.gather, 0, m, counts_differ)
    member = over.members()
    if member is not None:
        member = member.reshape(-1, *(1 for _ in m.count.shape[1:]))
        m = m._replace(count=jnp.where(member, m.count, jnp.zeros_like(m.count)))
    return _pool(m)


def _send(
    collective: Callable[[Array], Array], at: int, m: ShiftedMoments, counts_differ: bool
) -> ShiftedMoments:
    """The moments of all parts, [n, ...], by one collective; equal counts are not sent."""
    # Plus zeros: of the shape and sharding of the others.
    sent = (m.shift, m.mean, m.var, *((m.count + jnp.zeros_like(m.var),) if counts_differ else ()))
    shift, mean, var, *counts = together(collective, at, *sent)
    rest = m.count.shape[at:]
    if counts:
        # One count for all features was sent once for each.
        same = tuple(i for i, n in enumerate(counts[0].shape[1:], 1) if rest[i - 1] != n)
        count = jnp.max(counts[0], same, keepdims=True)
    else:
        count = jnp.broadcast_to(m.count if at else m.count[None], (len(shift), *rest))
    return ShiftedMoments(shift, count, mean, var)


def _pool(m: ShiftedMoments) -> ShiftedMoments:
    """The moments of parts, each with a shift of its own -> those of all, with the best of them."""

    def total(values: Array) -> Array:
        return jnp.sum(values, axis=0, keepdims=True)

    count = total(m.count)
    share = (m.count / jnp.where(count > 0, count, jnp.ones_like(count))).astype(m.var.dtype)
    # The shift nearest to the mean: its differences to the others are then small and exact.
    distance = jnp.abs(m.shift - total(share * (m.shift + m.mean)))
    nearest = jnp.argmin(distance, axis=0, keepdims=True)
    chosen = lax.broadcasted_iota(nearest.dtype, m.shift.shape, 0) == nearest
    shift = total(jnp.where(chosen, m.shift, jnp.zeros_like(m.shift)))
    offset = (m.shift - shift) + m.mean
    offset = jnp.where(m.count > 0, offset, jnp.zeros_like(offset))
    mean = total(share * offset)
    between = square(offset - mean)
    between = jnp.where(jnp.isnan(between), jnp.zeros_like(between), between)  # of inf - inf
    var = total(share * (m.var + between))
    return ShiftedMoments(shift[0], count[0], mean[0], var[0])


def pool_by_sums(moments: list[Moments], names: tuple[Any, ...]) -> list[Moments]:
    """The moments of all instances together, of many layers at once.

    The mean comes first, so that nothing cancels in the variance.
    """
    sums = [(m.count, m.count.astype(m.mean.dtype) * m.mean) for m in moments]
    totals = lax.psum(vary(sums, names), names)
    counts = [jnp.where(n > 0, n, jnp.ones_like(n)) for n, _ in totals]
    means = [s / n.astype(s.dtype) for (_, s), n in zip(totals, counts, strict=True)]
    parts = [
        m.count / n * (m.var + square(m.mean - mean))
        for m, n, mean in zip(moments, counts, means, strict=True)
    ]
    variances = lax.psum(vary(parts, names), names)
    return [Moments(n, *mv) for (n, _), *mv in zip(totals, means, variances, strict=True)]


class HostSums(NamedTuple):
    """Sums over batches on the host, float64 (complex128 for complex means), [C] each."""

    shift: np.ndarray  # the first mean that there is
    batches: np.ndarray  # how many
    weight: np.ndarray  # sum w: w is the count, or 1
    offset: np.ndarray  # sum w (mean - shift)
    within: np.ndarray  # sum w var
    between: np.ndarray  # sum w |mean - shift|^2

    @classmethod
    def of_none(cls, m: Moments) -> "HostSums":
        """Makes the sums over no batch, of the shapes of `m`."""
        mean = np.zeros(m.mean.shape, np.promote_types(m.mean.dtype, np.float64))
        var = np.zeros(m.var.shape)
        return cls(mean, var, var, mean, var, var)

    def add(self, m: Moments, *, weighted: bool) -> "HostSums":
        """The sums with one more batch, feature by feature where it has data and is finite."""
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
        """(mean, var) of all batches; `pooled` with the variance between them."""
        some = np.where(self.weight > 0, self.weight, 1.0)
        offset, var = self.offset / some, self.within / some
        if pooled:
            var = var + np.maximum(self.between / some - abs(offset) ** 2, 0.0)
        return self.shift + offset, var


def restore(m: ShiftedMoments, axes: Axes) -> Moments:
    """Moments of x - shift, of x's rank -> moments of x, of feature shape."""
    varies = any(m.count.shape[i] != 1 for i in range(len(axes.shape)))
    count = axes.squeeze(m.count) if varies else m.count.reshape(())
    return Moments(count, axes.squeeze(lax.add(m.mean, m.shift)), axes.squeeze(m.var))


def restore_pooled(m: ShiftedMoments, axes: Axes, counts_differ: bool) -> Moments:
    """`restore`, of all groups taken together."""
    return restore(m, axes) if axes.group is None else _restore_groups(axes, counts_differ, m)


@functools.partial(jax.jit, static_argnums=(0, 1))  # many operations to run one by one
def _restore_groups(axes: Axes, counts_differ: bool, m: ShiftedMoments) -> Moments:
    pooled = pool_blocks(axes.whole, jax.tree.map(axes.squeeze, m), counts_differ)
    return restore(jax.tree.map(axes.whole.unsqueeze, pooled), axes.whole)
