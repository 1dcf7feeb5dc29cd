"""Statistics of one array that lies on several devices, by one collective.

Every device first reduces the part of x that it has, with a shift of its own, and `_pool` joins the
results. Which part that is, is known

- for mesh axes of type Explicit while tracing: `shard_map` over these axes;
- for Auto axes once the compiler has decided it: a primitive, which XLA's partitioner asks for the
  program of one device (`jax.experimental.custom_partitioning`), on CPUs and GPUs;
- inside shard_map and pmap by the user, who names the axes.

XLA for TPUs has no custom partitioning (libtpu 0.0.42: "Custom emitter for CustomSPMDPartitioning
not found"), a serialised program cannot call back into Python, and a shard_map over some axes of a
mesh leaves the others to the compiler. There the first reduction axis is cut into as many blocks as
there are devices: one collective if x lies over that axis.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, Mesh, PartitionSpec, reshard

from jbn import _sharding
from jbn._axes import Axes
from jbn._pool import Moments, pool_blocks, pool_instances
from jbn._sync import Scope

# (axes, x, weights) -> (shift, moments of x - shift), of arrays that lie on one device.
Local = Callable[[Axes, Array, Array | None], tuple[Array, Moments]]


def measure_everywhere(
    local: Local, axes: Axes, x: Array, weights: Array | None
) -> tuple[Array, Moments]:
    """`local` of the whole of x, wherever it lies; the results broadcast against x, (1, ..., C)."""
    if _sharding.is_explicitly_sharded(x):
        return _over_explicit_axes(local, axes, x, weights)
    mesh = jax.sharding.get_abstract_mesh()
    automatic = math.prod(
        size
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    )
    devices = jax.device_count() if mesh.empty else automatic
    static = all(isinstance(n, int) for n in axes.shape)  # else a dimension of jax.export
    if devices == 1 or not static or axes.size == 0:
        return local(axes, x, weights)
    if mesh.manual_axes:
        return _in_blocks(local, axes, devices, x, weights)
    return _over_automatic_axes(local, axes, x, weights)


def join_instances(
    over: Any, axes: Axes, shift: Array, m: Moments, counts_differ: bool
) -> tuple[Array, Moments]:
    """`pool_instances` of statistics that broadcast against x."""
    squeezed = axes.squeeze(shift), jax.tree.map(axes.squeeze, m)
    shift, m = pool_instances(over, *squeezed, counts_differ)
    return axes.unsqueeze(shift), jax.tree.map(axes.unsqueeze, m)


def _over_explicit_axes(
    local: Local, axes: Axes, x: Array, weights: Array | None
) -> tuple[Array, Moments]:
    mesh, spec = jax.typeof(x).sharding.mesh, _sharding.full_spec(x)
    names = [_sharding.names(s) for s in spec]
    over = Scope(tuple(name for i in axes.reduction for name in names[i]))

    def of(shape: Sequence[int], dims: Sequence[int]) -> PartitionSpec:
        """Where an array of that shape lies that has the axes `dims` of x."""
        return PartitionSpec(*(s if i in dims and shape[i] > 1 else None for i, s in enumerate(spec)))

    def device(x: Array, weights: Array | None = None) -> tuple[Array, Moments]:
        part = axes._replace(shape=x.shape)
        shift, m = measure_everywhere(local, part, x, weights)
        if not over.names:
            return shift, m
        return join_instances(over, part, shift, m, weights is not None)

    every, kept = range(x.ndim), [i for i in range(x.ndim) if i not in axes.reduction]
    args, into = [x], [of(x.shape, every)]
    count = PartitionSpec()
    if weights is not None:
        into.append(of(weights.shape, every))
        args.append(reshard(weights, jax.NamedSharding(mesh, into[1])))
        count = of(weights.shape, kept)
    statistics = of(x.shape, kept)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=tuple(into),
        out_specs=(statistics, Moments(count, statistics, statistics)),
        axis_names={name for some in names for name in some},
        check_vma=False,  # it cannot know that one count for all features is the same everywhere
    )(*args)


# --- Axes of type Auto ---------------------------------------------------------------------------


def _over_automatic_axes(
    local: Local, axes: Axes, x: Array, weights: Array | None
) -> tuple[Array, Moments]:
    args = (x,) if weights is None else (x, weights)
    shift, count, mean, var = _bind(local, axes, *args)
    return shift, Moments(count, mean, var)


def _bind(local: Local, axes: Axes, *args: Array) -> list[Array]:
    jaxpr = jax.make_jaxpr(_partitioned(local, axes, args))(*args)
    return _measure.bind(*args, jaxpr=jaxpr, local=local, axes=axes)


def _partitioned(local: Local, axes: Axes, args: Sequence[Array]) -> Callable[..., Any]:
    """`local` as a function that XLA partitions as `_partition` says."""

    @custom_partitioning
    def whole(*args):
        shift, m = local(axes, args[0], args[1] if args[1:] else None)
        return shift, *m

    results = jax.eval_shape(whole.fun, *args)
    fresh = (f"one{i}" for i in range(len((*args, *results)) * len(axes.shape)))

    def factors(a: Any) -> ArrayMapping:
        return ArrayMapping(
            *(
                f"axis{i}" if size == axes.shape[i] and size > 1 else next(fresh)
                for i, size in enumerate(a.shape)
            )
        )

    rule = SdyShardingRule(tuple(map(factors, args)), tuple(map(factors, results)))
    whole.def_partition(
        functools.partial(_partition, local, axes),
        infer_sharding_from_operands=functools.partial(_result_shardings, axes),
        decode_shardings=False,  # which has no form for parts of a mesh axis
        sharding_rule=rule,
    )
    return whole


def _result_shardings(axes: Axes, mesh: Any, args: Any, results: Any) -> Any:
    layout = _layout(axes, args[0])
    return tuple(_sharding_of(args[0].sharding, layout, r.shape, axes, False) for r in results)


def _partition(local: Local, axes: Axes, mesh: Any, args: Any, results: Any) -> Any:
    """What `custom_partitioning` asks for: (mesh, program of a device, shardings)."""
    like, layout = args[0].sharding, _layout(axes, args[0])
    shared = math.prod(layout.shape[i] for i in axes.reduction)  # devices with one result
    members = np.moveaxis(layout, axes.reduction, range(-len(axes.reduction), 0))
    over = _Devices(tuple(map(tuple, members.reshape(-1, shared).tolist())))

    def device(*args):
        x, weights = args[0], args[1] if args[1:] else None
        part = axes._replace(shape=x.shape)
        shift, m = local(part, x, weights)
        if shared > 1:
            shift, m = join_instances(over, part, shift, m, weights is not None)
        return shift, *m

    every = Mesh(np.array(like._device_assignment), (_Devices.NAME,))
    into = tuple(_sharding_of(like, layout, a.shape, axes, True) for a in args)
    return every, device, _result_shardings(axes, mesh, args, results), into


class _Devices(NamedTuple):
    """As a `Scope`: groups of devices, each of which shares one result."""

    groups: tuple[tuple[int, ...], ...]
    NAME = "devices"  # of the one axis of all of them

    def gather(self, x: Array) -> Array:
        return lax.all_gather(x, self.NAME, axis_index_groups=self.groups)

    def members(self) -> None:
        return None


def _layout(axes: Axes, x: Any) -> np.ndarray:
    """Which device has which part of x: [parts along each axis of x ..., copies].

    An axis that is not divided evenly is not divided: the compiler would fill it up, with values
    that are not of the batch.
    """
    ndim, hlo = len(axes.shape), x.sharding._to_xla_hlo_sharding(len(axes.shape))
    if not hlo.is_tiled():
        return np.arange(x.sharding.num_devices).reshape(*(1,) * ndim, -1)
    parts = hlo.tile_assignment_dimensions()
    layout = np.reshape(hlo.tile_assignment_devices(), (*parts[:ndim], -1))
    return _restrict(layout, [i for i in range(ndim) if axes.shape[i] % layout.shape[i] == 0])


def _restrict(layout: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """The layout of an array that is divided along `kept` only."""
    ndim = layout.ndim - 1
    others = [i for i in range(ndim) if i not in kept]
    moved = np.moveaxis(layout, others, range(-1 - len(others), -1))
    return moved.reshape(*(n if i in kept else 1 for i, n in enumerate(layout.shape[:-1])), -1)


def _sharding_of(
    like: Any, layout: np.ndarray, shape: Sequence[int], axes: Axes, reduced: bool
) -> Any:
    """The sharding, of the type of `like`, of an array whose axes are those of x or of size 1."""
    kept = [
        i
        for i in range(len(shape))
        if shape[i] == axes.shape[i] and (reduced or i not in axes.reduction)
    ]
    layout = _restrict(layout, kept)
    hlo = like._to_xla_hlo_sharding(len(shape))
    proto = hlo.to_proto()
    proto.type = type(proto).Type.OTHER
    proto.tile_assignment_dimensions = list(layout.shape)
    proto.tile_assignment_devices = layout.ravel().tolist()
    proto.iota_reshape_dims, proto.iota_transpose_perm, proto.last_tile_dims = [], [], []
    proto.replicate_on_last_tile_dim = True
    return type(like)(like._device_assignment, type(hlo).from_proto(proto))


def _lower(ctx, *args, jaxpr, local, axes, partitions: bool):
    module = ctx.module_context
    devices = getattr(module.axis_context, "num_devices", 1)
    if devices == 1 or (partitions and not module.lowering_parameters.for_export):
        f = jax.extend.core.jaxpr_as_fun(jaxpr)  # of one device: `local` as it stands
    else:

        def f(*args):
            weights = args[1] if args[1:] else None
            shift, m = _in_blocks(local, axes, devices, args[0], weights)
            return shift, *m

    return mlir.lower_fun(f, multiple_results=True)(ctx, *args)


def _batch(args, dims, *, jaxpr, local, axes):
    """What vmap adds is one more axis, of which every element has statistics of its own."""
    del jaxpr
    if all(d is batching.not_mapped for d in dims[:1]):
        size = args[1].shape[dims[1]]
        args, dims = (jax.numpy.broadcast_to(args[0], (size, *args[0].shape)), args[1]), (0, dims[1])
    args = [
        a[None] if d is batching.not_mapped else jax.numpy.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    more = Axes(
        args[0].shape,
        (0, *(i + 1 for i in axes.features)),
        tuple(i + 1 for i in axes.reduction),
        None if axes.group is None else axes.group + 1,
    )
    results = _bind(local, more, *args)
    alike = [r.shape[0] != args[0].shape[0] for r in results]  # the count, if nothing varies it
    return [r[0] if a else r for r, a in zip(results, alike, strict=True)], [
        batching.not_mapped if a else 0 for a in alike
    ]


_measure = jax.extend.core.Primitive("jbn_measure")
_measure.multiple_results = True
_measure.def_impl(lambda *args, jaxpr, **_: jax.extend.core.jaxpr_as_fun(jaxpr)(*args))
_measure.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
batching.primitive_batchers[_measure] = _batch
mlir.register_lowering(_measure, functools.partial(_lower, partitions=True))
mlir.register_lowering(_measure, functools.partial(_lower, partitions=False), platform="tpu")


# --- Where the compiler does not say -------------------------------------------------------------


def _in_blocks(
    local: Local, axes: Axes, devices: int, x: Array, weights: Array | None
) -> tuple[Array, Moments]:
    """The first reduction axis, or each group of examples, is cut into `devices` blocks."""
    n = axes.shape[axes.reduction[0]]
    blocks = math.gcd(n, devices // math.gcd(devices, axes.groups))
    if blocks == 1:
        return local(axes, x, weights)
    view = axes.split(blocks)
    divided = (None if a is None else _sharding.divide(a, view) for a in (x, weights))
    shift, m = local(view, *divided)
    squeezed = view.squeeze(shift), jax.tree.map(view.squeeze, m)
    shift, m = pool_blocks(axes, *squeezed, weights is not None)
    return axes.unsqueeze(shift), jax.tree.map(axes.unsqueeze, m)
