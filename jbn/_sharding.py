"""Global arrays that lie on several devices: how to cut, join and collect them.

Under `jit` the compiler decides what a device computes. Statistics need one collective a layer if
every device first reduces its own part of the batch, so the batch is cut into as many blocks as
there are devices, and the blocks' statistics are brought together at once.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from jbn._axes import Axes


def blocks(axes: Axes, x: Array) -> int:
    """Into how many blocks to cut each group of examples, so that none lies on two devices.

    The number of devices, as far as it divides the batch: of the mesh that `jax.set_mesh` has set,
    or else of all. 1 inside shard_map and pmap, where x is what one device has.
    """
    n = axes.shape[axes.reduction[0]] if axes.reduction else 0
    if not isinstance(n, int) or n == 0:  # not an int: a dimension of jax.export
        return 1
    explicit = is_explicitly_sharded(x)
    mesh = jax.typeof(x).sharding.mesh if explicit else jax.sharding.get_abstract_mesh()
    if mesh.empty:
        devices = jax.device_count()
    else:
        own = (size for name, size in mesh.shape.items() if name not in mesh.manual_axes)
        devices = math.prod(own)
    return math.gcd(n, devices // math.gcd(devices, axes.groups))


def divide(values: Array, axes: Axes) -> Array:
    """Values that broadcast against x -> the same with the axis of groups that `axes` has."""
    at = axes.group
    if at is None:
        return values
    old = slice(at, at + 1 + (values.ndim == len(axes.shape)))  # one axis, or groups already
    shape, spec = list(values.shape), _spec(values)
    size = math.prod(shape[old])
    shape[old] = axes.shape[at : at + 2] if size != 1 else (1, 1)
    if spec is None:
        return values.reshape(shape)
    if shape[at] % _shards(values, spec[at]) != 0:  # a group would lie on two devices
        spec[at] = None
        values = jax.sharding.reshard(values, PartitionSpec(*spec))
    spec[old] = (spec[at], None)
    return jnp.reshape(values, shape, out_sharding=PartitionSpec(*spec))


def join(y: Array, x: Array, axes: Axes) -> Array:
    """The inverse of `divide`: y, of the shape of `axes`, in x's shape and place."""
    if axes.group is None:
        return y
    spec = _spec(y)
    if spec is None:
        return y.reshape(x.shape)
    del spec[axes.group + 1]
    y = jnp.reshape(y, x.shape, out_sharding=PartitionSpec(*spec))
    return jax.sharding.reshard(y, jax.typeof(x).sharding)


def collect(x: Array) -> Array:
    """x, [blocks, ...], brought whole to every device, in one collective."""
    spec, mesh = _spec(x), jax.sharding.get_abstract_mesh()
    if spec is not None:
        return jax.sharding.reshard(x, PartitionSpec(None, *spec[1:]))
    if not mesh.empty and not mesh.manual_axes:
        if AxisType.Auto not in mesh.axis_types:
            return x  # explicitly everywhere
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return lax.with_sharding_constraint(x, PartitionSpec(None, *rest))
    # The compiler alone knows where x lies. A sum over all rows of one row and zeros is a sum over
    # devices to it, and exact.
    own = jnp.eye(x.shape[0], dtype=bool).reshape(*x.shape[:1] * 2, *(1 for _ in x.shape[1:]))
    return jnp.sum(jnp.where(own, x[None], jnp.zeros_like(x[None])), axis=1)


def together(operation: Callable[[Array], Array], at: int, *arrays: Array) -> list[Array]:
    """`operation` on all arrays as one, stacked along axis `at`; in its result they lie along 1."""
    parts = []
    for a in arrays:
        parts += [a.real, a.imag] if jnp.iscomplexobj(a) else [a]
    result = operation(jnp.stack(jnp.broadcast_arrays(*parts), axis=at))
    rows = iter(jnp.moveaxis(result, 1, 0))
    return [
        lax.complex(next(rows), next(rows)) if jnp.iscomplexobj(a) else next(rows) for a in arrays
    ]


def is_explicitly_sharded(x: Array) -> bool:
    """Whether x lies over a mesh axis of type Explicit, which makes sharding a part of its type."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def _spec(x: Array) -> list | None:
    """For each axis of x the mesh axes it lies over; None where the compiler decides."""
    if not is_explicitly_sharded(x):
        return None
    spec = list(jax.typeof(x).sharding.spec)
    return spec + [None] * (x.ndim - len(spec))


def _shards(x: Array, names) -> int:
    mesh = jax.typeof(x).sharding.mesh
    names = names if isinstance(names, tuple) else () if names is None else (names,)
    return math.prod(mesh.shape[name] for name in names)
