"""The three maps of `jbn.native` in jax.numpy, which run where the kernel does not."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array


def row(vector: Array, x: Array) -> Array:
    """Reshapes a vector [C] to [1, ..., C], with as many axes as x has."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def shifted(x: Array, shift: Array) -> Array:
    """Computes z = x - shift, in the dtype of shift."""
    return x.astype(shift.dtype) - row(shift, x)


def gated(values: Array, x: Array, shift: Array, gate: Sequence[Array]) -> Array:
    """Sets `values` to 0 unless the gate (A, B) is open, z A + B > 0; () is no gate."""
    if not gate:
        return values
    scale, bias = (row(vector, x) for vector in gate)
    active = shifted(x, shift) * scale + bias > 0
    return jnp.where(active, values, jnp.zeros_like(values))


def _sum(values: Array) -> Array:
    return jnp.sum(values, range(values.ndim - 1))


def plain_sums(x: Array, shift: Array) -> list[Array]:
    """Computes [sum z, sum z^2]."""
    z = shifted(x, shift)
    return [_sum(z), _sum(z * z)]


def plain_pair(x: Array, shift: Array, t: Array, *gate: Array) -> list[Array]:
    """Computes [sum t, sum z t], with t = 0 unless the gate is open."""
    t = gated(t.astype(shift.dtype), x, shift, gate)
    return [_sum(t), _sum(shifted(x, shift) * t)]


def plain_spread(x, shift, u, v, *rest: Array, dtype, added: bool) -> Array:
    """Computes w + u + z v, 0 unless the gate is open; `rest` is w, if `added`, and the gate."""
    values = row(u, x) + shifted(x, shift) * row(v, x)
    if added:
        values = rest[0].astype(shift.dtype) + values
    return gated(values, x, shift, rest[added:]).astype(dtype)
