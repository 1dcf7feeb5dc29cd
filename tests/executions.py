"""Modes that run a law on the whole batch, or split over devices or instances of a named axis.

Every mode runs f(params, rows, axis_name) -> (per row, shared). `rows` is a dict of arrays whose
first axis is the whole batch. A mode gives f the share of one instance, or the global arrays where
the compiler divides them. It joins the results: those per row in the order of the batch, shared
ones as [4, ...], one for each of four instances.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "batch"
INSTANCES = 4


def mesh(shape=(INSTANCES,), names=(AXIS,), axis_type=AxisType.Auto):
    """Makes a mesh of virtual CPU devices."""
    devices = jax.devices()[: functools.reduce(int.__mul__, shape)]
    return jax.make_mesh(shape, names, (axis_type,) * len(shape), devices=devices)


def cut(instances, x):
    """Reshapes [N, ...] to [instances, N / instances, ...]."""
    return x.reshape(instances, -1, *x.shape[1:])


def rejoin(x):
    """Inverts `cut`."""
    return x.reshape(-1, *x.shape[2:])


def everywhere(tree):
    return jax.tree.map(lambda v: jnp.broadcast_to(v, (INSTANCES, *v.shape)), tree)


class Mode(NamedTuple):
    """One way to run f.

    Attributes:
      execute: (f, params, rows) -> (per row, shared).
      names: the named axes among which the batch is split; None where f sees the global arrays.
      axis_type: the axis type of the mesh that is set while it runs, if one is.
      checks: whether JAX knows over which axes a value varies.
    """

    name: str
    execute: Callable
    names: Any = AXIS
    axis_type: AxisType | None = None
    checks: bool = False

    def __str__(self):
        return self.name

    def run(self, program, params, rows):
        """Runs jit(program)(params, rows) with the mesh of the mode, on which it places rows."""
        if self.names is not None:
            return jax.jit(program)(params, rows)
        where = mesh(axis_type=self.axis_type or AxisType.Auto)
        with jax.set_mesh(where) if self.axis_type else contextlib.nullcontext():
            rows = jax.device_put(rows, NamedSharding(where, P(AXIS)))
            return jax.jit(program)(params, rows)


def _whole(f, params, rows):
    per_row, shared = f(params, rows, None)
    return per_row, everywhere(shared)


def _mapped(transform, f, params, rows):
    instance = lambda params, share: f(params, share, AXIS)  # noqa: E731
    run = transform(instance, axis_name=AXIS, in_axes=(None, 0))
    per_row, shared = run(params, jax.tree.map(functools.partial(cut, INSTANCES), rows))
    # Every instance must have the same statistics: all are returned, to be compared.
    return jax.tree.map(rejoin, per_row), shared


def _nested_vmap(f, params, rows):
    instance = lambda params, share: f(params, share, ("outer", "inner"))  # noqa: E731
    inner = jax.vmap(instance, axis_name="inner", in_axes=(None, 0))
    run = jax.vmap(inner, axis_name="outer", in_axes=(None, 0))
    shares = jax.tree.map(lambda x: cut(2, cut(4, x)), rows)
    per_row, shared = run(params, shares)
    return jax.tree.map(lambda x: rejoin(rejoin(x)), per_row), jax.tree.map(rejoin, shared)


def _shard_map(check_vma, f, params, rows):
    # `shared` gets an axis for the instances, because it differs between index groups.
    def instance(params, share):
        per_row, shared = f(params, share, AXIS)
        return per_row, jax.tree.map(lambda v: v[None], shared)

    specs = {"in_specs": (P(), P(AXIS)), "out_specs": P(AXIS)}
    return jax.shard_map(instance, mesh=mesh(), check_vma=check_vma, **specs)(params, rows)


def _shard_map_of_vmap(f, params, rows):
    """Runs two instances on each of two devices.

    check_vma is False: a checking shard_map has no collectives over an axis of vmap (jax 0.12).
    """

    def instance(params, share):
        per_row, shared = f(params, share, ("device", "mapped"))
        return per_row, shared

    def device(params, share):
        run = jax.vmap(instance, axis_name="mapped", in_axes=(None, 0))
        per_row, shared = run(params, jax.tree.map(functools.partial(cut, 2), share))
        return jax.tree.map(rejoin, per_row), shared

    specs = {"in_specs": (P(), P("device")), "out_specs": P("device")}
    run = jax.shard_map(device, mesh=mesh((2,), ("device",)), check_vma=False, **specs)
    return run(params, rows)


def _two_mesh_axes(f, params, rows):
    def instance(params, share):
        per_row, shared = f(params, share, ("a", "b"))
        return per_row, jax.tree.map(lambda v: v[None], shared)

    specs = {"in_specs": (P(), P(("a", "b"))), "out_specs": P(("a", "b"))}
    return jax.shard_map(instance, mesh=mesh((2, 2), ("a", "b")), **specs)(params, rows)


WHOLE = Mode("whole", _whole, None)
NAMED = (
    Mode("vmap", functools.partial(_mapped, jax.vmap)),
    Mode("nested_vmap", _nested_vmap, ("outer", "inner")),
    Mode("pmap", functools.partial(_mapped, jax.pmap)),
    Mode("shard_map", functools.partial(_shard_map, True), checks=True),
    Mode("shard_map_unchecked", functools.partial(_shard_map, False)),
    Mode("shard_map_of_vmap", _shard_map_of_vmap, ("device", "mapped")),
    Mode("two_mesh_axes", _two_mesh_axes, ("a", "b"), checks=True),
)
GLOBAL = (
    Mode("jit", _whole, None),
    Mode("jit_set_mesh", _whole, None, AxisType.Auto),
    Mode("jit_explicit", _whole, None, AxisType.Explicit),
)
ALL = NAMED + GLOBAL
