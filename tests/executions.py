"""One law, several executions: the batch whole, and split over the instances of a named axis.

Every execution has the signature of `whole`: x is the whole batch, whose first axis is cut into the
instances' shares; the result is what the whole batch gives, put together again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "batch"


def mesh(shape=(4,), names=(AXIS,)):
    """A mesh of virtual CPU devices, with the axis types that shard_map and jit both take."""
    devices = jax.devices()[: functools.reduce(int.__mul__, shape)]
    return jax.make_mesh(shape, names, (AxisType.Auto,) * len(shape), devices=devices)


def cut(instances, x):
    """[N, ...] -> [instances, N / instances, ...]."""
    return x.reshape(instances, -1, *x.shape[1:])


def whole(f, params, x, mask):
    """f itself, without a named axis: f(params, x, mask, axis_name) -> (per row, shared)."""
    return f(params, x, mask, None)


def _mapped(transform, f, params, x, mask):
    def instance(params, x, *mask):
        return f(params, x, mask[0] if mask else None, AXIS)

    shares = [cut(4, v) for v in (x, mask) if v is not None]
    run = transform(instance, axis_name=AXIS, in_axes=(None, *(0 for _ in shares)))
    rows, shared = run(params, *shares)
    # Every instance must have the same statistics: all are returned, to be compared.
    return rows.reshape(x.shape), shared


def vmap(f, params, x, mask):
    return _mapped(jax.vmap, f, params, x, mask)


def pmap(f, params, x, mask):
    return _mapped(jax.pmap, f, params, x, mask)


def _shard_map(check_vma, f, params, x, mask):
    run = jax.shard_map(
        lambda params, x, mask: f(params, x, mask, AXIS),
        mesh=mesh(),
        in_specs=(P(), P(AXIS), P(AXIS)),
        out_specs=(P(AXIS), P()),
        check_vma=check_vma,
    )
    rows, shared = run(params, x, mask)
    return rows, jax.tree.map(lambda v: jnp.broadcast_to(v, (4, *v.shape)), shared)


def shard_map(f, params, x, mask):
    return _shard_map(True, f, params, x, mask)


def shard_map_unchecked(f, params, x, mask):
    return _shard_map(False, f, params, x, mask)


def sharded_jit(f, params, x, mask):
    """The global array under jit, cut by the compiler: no named axis."""
    sharding = NamedSharding(mesh(), P(AXIS))
    x = jax.lax.with_sharding_constraint(x, sharding)
    rows, shared = f(params, x, mask, None)
    rows = jax.lax.with_sharding_constraint(rows, sharding)
    return rows, jax.tree.map(lambda v: jnp.broadcast_to(v, (4, *v.shape)), shared)


ALL = [vmap, pmap, shard_map, shard_map_unchecked, sharded_jit]
