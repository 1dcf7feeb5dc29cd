"""Global arrays on several devices: how to place, divide into groups, join and collect them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from jbn._core.axes import Axes


def alongside(values: Array, x: Array) -> Array:
    """Shards `values`, which broadcast against x, like x if x is explicitly sharded."""
    if (spec := full_spec(x)) is None:
        return values
    spec = (s if n > 1 else None for s, n in zip(spec, values.shape, strict=True))
    return reshard(values, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec)))


def divide(values: Array, axes: Axes) -> Array:
    """Adds the axis of groups of `axes` to values that broadcast against x."""
    at = axes.group
    if at is None:
        return values
    old = slice(at, at + 1 + (values.ndim == len(axes.shape)))  # one axis, or groups already
    shape, spec = list(values.shape), full_spec(values)
    size = math.prod(shape[old])
    shape[old] = axes.shape[at : at + 2] if size != 1 else (1, 1)
    if spec is None:
        return values.reshape(shape)
    mesh = jax.typeof(values).sharding.mesh
    spec[old] = _divided(spec[at], mesh, shape[at : at + 2])
    whole = [*spec[:at], (*spec[at], *spec[at + 1]), *spec[at + 2 :]]
    values = reshard(values, NamedSharding(mesh, PartitionSpec(*whole)))
    return jnp.reshape(values, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def _divided(entry: Any, mesh: Any, shape: Sequence[int]) -> tuple[tuple, tuple]:
    """Distributes the mesh axes in `entry`, those of one array axis, over [groups, examples].

    It stops at the first mesh axis that divides neither the groups nor a single group evenly,
    because one mesh axis cannot shard both.
    """
    lies_over, (groups, examples) = ([], []), shape
    for name in names(entry):
        size = mesh.shape[name]
        if groups % size == 0 and not lies_over[1]:
            lies_over[0].append(name)
            groups //= size
        elif groups == 1 and examples % size == 0:
            lies_over[1].append(name)
            examples //= size
        else:
            break
    return tuple(lies_over[0]), tuple(lies_over[1])


def join(y: Array, x: Array, axes: Axes) -> Array:
    """Inverts `divide`: gives y, of the shape of `axes`, the shape and sharding of x."""
    if axes.group is None:
        return y
    if not is_explicitly_sharded(x):
        return y.reshape(x.shape)
    sharding, at = jax.typeof(x).sharding, axes.group
    if (spec := full_spec(y)) is None:
        return reshard(y.reshape(x.shape), sharding)
    spec[at : at + 2] = [(*names(spec[at]), *names(spec[at + 1]))]
    y = jnp.reshape(y, x.shape, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))
    return reshard(y, sharding)


def collect(x: Array) -> Array:
    """Gathers all of x, [blocks, ...], on every device, by one collective."""
    spec, mesh = full_spec(x), jax.sharding.get_abstract_mesh()
    if spec is not None:
        whole = PartitionSpec(None, *spec[1:])
        return reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, whole))
    if not mesh.empty and not mesh.manual_axes:
        if AxisType.Auto not in mesh.axis_types:
            return x  # explicitly replicated
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return lax.with_sharding_constraint(x, PartitionSpec(None, *rest))
    # Only the compiler knows how x is sharded. A sum over all rows, of one row and zeros, is exact,
    # and the compiler makes it a sum over devices.
    own = jnp.eye(x.shape[0], dtype=bool).reshape(*x.shape[:1] * 2, *(1 for _ in x.shape[1:]))
    return jnp.sum(jnp.where(own, x[None], jnp.zeros_like(x[None])), axis=1)


def together(operation: Callable[[Array], Array], at: int, *arrays: Array) -> list[Array]:
    """Applies `operation` to arrays stacked along axis `at`; its result has them along axis 1."""
    parts = []
    for a in arrays:
        parts += [a.real, a.imag] if jnp.iscomplexobj(a) else [a]
    result = operation(jnp.stack(jnp.broadcast_arrays(*parts), axis=at))
    rows = iter(jnp.moveaxis(result, 1, 0))
    return [
        lax.complex(next(rows), next(rows)) if jnp.iscomplexobj(a) else next(rows) for a in arrays
    ]


def side_by_side(operation: Callable[[Array], Array], *arrays: Array) -> list[Array]:
    """Applies `operation` to arrays joined along their last axis, in which their sizes differ."""
    ends = np.cumsum([a.shape[-1] for a in arrays])[:-1]
    return jnp.split(operation(jnp.concatenate(arrays, axis=-1)), ends, axis=-1)


def regroup(values: Array, last: int, tail: Sequence[int]) -> Array:
    """Reshapes the last axes, `last` of them, to `tail`; no device divides them afterwards."""
    shape = (*values.shape[: values.ndim - last], *tail)
    if (spec := full_spec(values)) is None:
        return values.reshape(shape)
    mesh, rest = jax.typeof(values).sharding.mesh, spec[: values.ndim - last]
    values = reshard(values, NamedSharding(mesh, PartitionSpec(*rest, *[None] * last)))
    whole = PartitionSpec(*rest, *[None] * len(tail))
    return jnp.reshape(values, shape, out_sharding=NamedSharding(mesh, whole))


def is_explicitly_sharded(x: Array) -> bool:
    """Returns whether x is sharded over an Explicit mesh axis, so that its type has a sharding."""
    return any(axis is not None for axis in jax.typeof(x).sharding.spec)


def full_spec(x: Array) -> list | None:
    """Returns, for each axis of x, the mesh axes that shard it; None if the compiler decides."""
    if not is_explicitly_sharded(x):
        return None
    spec = list(jax.typeof(x).sharding.spec)
    return spec + [None] * (x.ndim - len(spec))


def names(entry: Any) -> tuple:
    """Converts an entry of a PartitionSpec to a tuple of mesh axes."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)
