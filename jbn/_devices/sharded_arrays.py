"""Reductions over an array that is sharded over several devices, by one collective each.

Every device first reduces its own part of x. Then the results are joined: `pooling` joins
statistics, where each device has a shift of its own, and a sum joins the sums of a backward pass.
How the part of a device becomes known depends on the mesh axes:

- Axes of type Explicit are known while tracing: `shard_map` over these axes.
- Auto axes are known when the compiler has decided: on CPUs and GPUs XLA's partitioner asks a
  primitive for the program of one device (`jax.experimental.custom_partitioning`).
- Inside shard_map and pmap the user names the axes.

XLA for TPUs has no custom partitioning (libtpu 0.0.42: "Custom emitter for CustomSPMDPartitioning
not found"), a serialised program cannot call back into Python, and in a mesh with several types of
axes the compiler decides only on some of them. In these cases, and for float64, the first reduction
axis is divided into as many blocks as there are devices, and the compiler adds up: one collective
if x is sharded over that axis.
"""

import functools
import hashlib
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, reshard

from jbn._core.axes import Axes
from jbn._core.pooling import pool_blocks, pool_instances, pool_sets
from jbn._core.types import ShiftedMoments
from jbn._devices import placement
from jbn._devices.named_axes import Scope, vary_as

# (axes, x, weights) -> the moments of arrays on one device.
Local = Callable[[Axes, Array, Array | None], ShiftedMoments]


def measure_everywhere(
    local: Local, axes: Axes, x: Array, weights: Array | None, *, together: int = 0
) -> ShiftedMoments:
    """Applies `local` to x, however x is sharded; results broadcast against x, (1, ..., C).

    `local` needs the last axes, `together` of them, undivided; in Explicit meshes the caller sees
    to that.
    """
    if placement.is_explicitly_sharded(x):
        return _measure_over_explicit_axes(local, axes, x, weights)
    devices = _automatic_devices(axes)
    if devices == 1:
        return local(axes, x, weights)
    if not _partitions(x):
        return _in_blocks(local, axes, devices, x, weights)
    args = (x,) if weights is None else (x, weights)
    return ShiftedMoments(*_bind(_measure, _Measure(local, together), axes, *args))


def join_sets(axes: Axes, m: ShiftedMoments, member: Array) -> ShiftedMoments:
    """Applies `pool_sets` to the moments of the examples of x, wherever the examples lie.

    Args:
      axes: those of x.
      m: the moments of each example, [N, C].
      member: [N, sets], bool, the same on all devices.
    """
    if placement.is_explicitly_sharded(m.mean):
        fields = placement.together(placement.collect, 1, *m)
        return pool_sets(ShiftedMoments(*fields), member)
    blocks = math.gcd(len(member), _automatic_devices(axes))
    if blocks == 1:
        return pool_sets(m, member)
    # First within blocks, each of which lies on one device: then one collective is enough.
    part, member = jax.tree.map(lambda v: v.reshape(blocks, -1, *v.shape[1:]), (m, member))
    return pool_blocks(axes, jax.vmap(pool_sets)(part, member), counts_differ=True)


def spread(axes: Axes, x: Array, values: Array) -> Array:
    """Prepares `values`, (1, ..., C), for a pass over x, as large as x if that saves collectives.

    The transpose is a sum over all axes of x but those of features and groups. XLA makes one
    all-reduce for each sharded axis, although one is enough for all. In a shard_map with check_vma
    each instance must sum before the devices sum, or they would send arrays of x's size: so
    `values` become device-varying before they are broadcast.

    Values of each example, (N, 1, ..., C), have sums of their own, and are returned.
    """
    values = vary_as(x, values)
    if len(axes.reduction) < 2 or any(values.shape[i] > 1 for i in axes.reduction):
        return values
    if placement.is_explicitly_sharded(x):
        where = _Explicit.of(x, axes)
        if sum(map(bool, where.reduced)) < 2:
            return values
        place = where.place(values.shape)
        whole = where.place(x.shape)
        run = where.map(lambda v, x: jnp.broadcast_to(v, x.shape), (place, whole), whole)
        return run(reshard(values, NamedSharding(where.mesh, place)), lax.stop_gradient(x))
    if _automatic_devices(axes) == 1 or not _partitions(x):
        return values
    return _spread.bind(jnp.broadcast_to(values, axes.per_feature), axes=axes)


# --- Axes of type Explicit -----------------------------------------------------------------------


class _Explicit(NamedTuple):
    """The Explicit mesh axes over which an array is sharded."""

    mesh: Any
    spec: tuple[Any, ...]
    reduced: tuple[tuple, ...]  # for each reduction axis the mesh axes

    @classmethod
    def of(cls, x: Array, axes: Axes) -> "_Explicit":
        spec = placement.full_spec(x) or [None] * x.ndim
        return cls(
            jax.typeof(x).sharding.mesh,
            tuple(spec),
            tuple(placement.names(spec[i]) for i in axes.reduction),
        )

    def place(self, shape: Sequence[int]) -> PartitionSpec:
        """Returns the spec of an array of that shape, which broadcasts against x."""
        return PartitionSpec(*(s if n > 1 else None for s, n in zip(self.spec, shape, strict=True)))

    def reduce(self, spec: PartitionSpec, axes: Axes) -> PartitionSpec:
        """Returns the spec of an array after a sum over its reduction axes."""
        return PartitionSpec(*(None if i in axes.reduction else s for i, s in enumerate(spec)))

    def map(self, f: Callable[..., Any], into: Any, out: Any) -> Callable[..., Any]:
        # check_vma=False, because JAX cannot infer that one count for all features is replicated.
        every = {name for s in self.spec for name in placement.names(s)}
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=into, out_specs=out, axis_names=every, check_vma=False
        )


def _measure_over_explicit_axes(
    local: Local, axes: Axes, x: Array, weights: Array | None
) -> ShiftedMoments:
    where = _Explicit.of(x, axes)
    over = Scope(tuple(name for names in where.reduced for name in names))

    def device(x: Array, weights: Array | None = None) -> ShiftedMoments:
        part = axes._replace(shape=x.shape)
        m = measure_everywhere(local, part, x, weights)
        return pool_instances(over, m, weights is not None) if over.names else m

    args, into = [x], [where.place(x.shape)]
    count = PartitionSpec()
    if weights is not None:
        into.append(where.place(weights.shape))
        args.append(placement.alongside(weights, x))
        count = where.reduce(into[1], axes)
    statistics = where.reduce(into[0], axes)
    moments: Any = ShiftedMoments
    results = moments(statistics, count, statistics, statistics)
    return where.map(device, tuple(into), results)(*args)


# --- Axes of type Auto ---------------------------------------------------------------------------


def _automatic_devices(axes: Axes) -> int:
    """Counts the devices over which the compiler may partition this computation."""
    if not axes.reduction or axes.size == 0 or not all(isinstance(n, int) for n in axes.shape):
        return 1  # nothing to reduce, or a dimension of jax.export
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in kinds if kind == AxisType.Auto)


def _partitions(x: Array) -> bool:
    """Returns whether custom partitioning works: all mesh axes are Auto, and x is not float64.

    When the compiler asks for the program of one device, JAX may have left the
    `with jax.enable_x64()` of this trace, and cannot make a program for float64.
    """
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return all(kind == AxisType.Auto for kind in kinds) and jnp.finfo(x.dtype).bits <= 32


class _Measure(NamedTuple):
    """The reduction to moments. All results are (1, ..., C).

    Attributes:
      local: the moments of one device.
      together: the number of last axes of x that no device may divide, as a covariance needs.
    """

    local: Local
    together: int = 0

    def of_part(self, axes: Axes, *args: Array) -> tuple[Array, ...]:
        return tuple(self.local(axes, args[0], args[1] if args[1:] else None))

    def join(self, over: "_Devices", axes: Axes, results: Any, several: bool) -> tuple[Array, ...]:
        return tuple(pool_instances(over, ShiftedMoments(*results), several))

    def unpartitioned(self, axes: Axes, devices: int, *args: Array) -> tuple[Array, ...]:
        weights = args[1] if args[1:] else None
        return tuple(_in_blocks(self.local, axes, devices, args[0], weights))


class _Sum(NamedTuple):
    """The reduction to a sum."""

    together: int = 0

    def of_part(self, axes: Axes, x: Array) -> tuple[Array, ...]:
        return (jnp.sum(x, axes.reduction, keepdims=True),)

    def join(self, over: "_Devices", axes: Axes, results: Any, several: bool) -> tuple[Array, ...]:
        return lax.psum(results, over.NAME, axis_index_groups=over.groups)

    def unpartitioned(self, axes: Axes, devices: int, x: Array) -> tuple[Array, ...]:
        return self.of_part(axes, x)


class _Devices(NamedTuple):
    """Groups of devices that share one result each, with the methods of a `Scope`."""

    groups: tuple[tuple[int, ...], ...]
    NAME = "devices"  # of one axis of all devices

    def gather(self, x: Array) -> Array:
        return lax.all_gather(x, self.NAME, axis_index_groups=self.groups)

    def members(self) -> None:
        return None


def _bind(primitive: Any, reduction: Any, axes: Axes, *args: Array) -> list[Array]:
    jaxpr = jax.make_jaxpr(_partitioned(reduction, axes, args))(*args)
    return primitive.bind(*args, jaxpr=jaxpr, reduction=reduction, axes=axes)


def _partitioned(reduction: Any, axes: Axes, args: Sequence[Array]) -> Callable[..., Any]:
    """Makes a function of the reduction that XLA partitions by `_partition`."""

    @custom_partitioning
    def whole(*args):
        return reduction.of_part(axes, *args)

    results = jax.eval_shape(whole.fun, *args)
    ones = (f"one{i}" for i in range(len((*args, *results)) * len(axes.shape)))

    def mapping(a: Any) -> ArrayMapping:
        """Gives the axes of `a` the names of x's axes; an axis of size 1 has its own name."""
        alike = zip(a.shape, axes.shape, strict=True)
        return ArrayMapping(
            *(f"axis{i}" if m == n > 1 else next(ones) for i, (m, n) in enumerate(alike))
        )

    whole.def_partition(
        functools.partial(_partition, reduction, axes),
        functools.partial(_result_shardings, reduction, axes),
        decode_shardings=False,  # shardings may use parts of a mesh axis
        sharding_rule=SdyShardingRule(tuple(map(mapping, args)), tuple(map(mapping, results))),
    )
    return whole


def _partition(reduction: Any, axes: Axes, mesh: Any, args: Any, results: Any) -> Any:
    """Returns (mesh, program of one device, shardings of its results, and of its arguments)."""
    like, layout = args[0].sharding, _layout(axes, args[0], reduction.together)
    members = np.moveaxis(layout, axes.reduction, range(-len(axes.reduction), 0))
    members = members.reshape(-1, math.prod(members.shape[-len(axes.reduction) :]))
    over = _Devices(tuple(map(tuple, members.tolist())))

    def device(*args):
        part = axes._replace(shape=args[0].shape)
        results = reduction.of_part(part, *args)
        if members.shape[1] == 1:
            return results
        return reduction.join(over, part, results, len(args) > 1)

    every = Mesh(np.array(like._device_assignment), (_Devices.NAME,))
    into = tuple(_sharding_of(a.shape, axes.shape, layout, like) for a in args)
    return every, device, _result_shardings(reduction, axes, mesh, args, results), into


def _result_shardings(reduction: Any, axes: Axes, mesh: Any, args: Any, results: Any) -> Any:
    layout = _layout(axes, args[0], reduction.together)
    layout = _restrict(layout, set(range(len(axes.shape))) - set(axes.reduction))
    return tuple(_sharding_of(r.shape, axes.shape, layout, args[0].sharding) for r in results)


def _layout(axes: Axes, x: Any, together: int) -> np.ndarray:
    """Returns the devices that have each part of x: [parts along each axis of x ..., copies].

    The last axes, `together` of them, are not divided, nor is an axis that cannot be divided
    evenly: the compiler would pad it with values that do not belong to the batch.
    """
    ndim, hlo = len(axes.shape), x.sharding._to_xla_hlo_sharding(len(axes.shape))
    if not hlo.is_tiled():
        return np.arange(x.sharding.num_devices).reshape(*(1,) * ndim, -1)
    parts = hlo.tile_assignment_dimensions()
    layout = np.reshape(hlo.tile_assignment_devices(), (*parts[:ndim], -1))
    free = range(ndim - together)
    return _restrict(layout, {i for i in free if axes.shape[i] % parts[i] == 0})


def _restrict(layout: np.ndarray, kept: set[int]) -> np.ndarray:
    """Returns the layout of an array that is divided only along the axes `kept`."""
    ndim = layout.ndim - 1
    others = [i for i in range(ndim) if i not in kept]
    moved = np.moveaxis(layout, others, range(-1 - len(others), -1))
    return moved.reshape(*(n if i in kept else 1 for i, n in enumerate(layout.shape[:-1])), -1)


def _sharding_of(shape: Sequence[int], whole: Sequence[int], layout: np.ndarray, like: Any) -> Any:
    """Makes the sharding, of `like`'s type, of an array that broadcasts against x, [whole]."""
    layout = _restrict(layout, {i for i, n in enumerate(whole) if shape[i] == n})
    hlo = like._to_xla_hlo_sharding(len(shape))
    proto = hlo.to_proto()
    proto.type = type(proto).Type.OTHER
    proto.tile_assignment_dimensions = list(layout.shape)
    proto.tile_assignment_devices = layout.ravel().tolist()
    proto.iota_reshape_dims, proto.iota_transpose_perm, proto.last_tile_dims = [], [], []
    proto.replicate_on_last_tile_dim = True
    return type(like)(like._device_assignment, type(hlo).from_proto(proto))


def _lower(partitions: bool, ctx, *args, jaxpr, reduction, axes):
    module = ctx.module_context
    devices = getattr(module.axis_context, "num_devices", 1)
    if devices == 1 or (partitions and not module.lowering_parameters.for_export):
        f = jax.extend.core.jaxpr_as_fun(jaxpr)  # of one device, or for the partitioner
    else:
        f = functools.partial(reduction.unpartitioned, axes, devices)
    results = mlir.lower_fun(f, multiple_results=True)(ctx, *args)
    if devices > 1:
        whole = jaxpr.eqns[0].params.get("call")
        _name_by_content(ctx, results[0], (type(reduction).__name__, axes, whole))
    return results


def _name_by_content(ctx, result: Any, content: Any) -> None:
    """Gives the custom call that computes `result` the same text in each process.

    Cause: JAX (0.10 to 0.12) writes an address into the call, by which it finds the functions of
    `_partition`. Effect: its persistent cache of compiled programs would never hit. So a hash of
    all that these functions depend on replaces the address. If JAX has changed, nothing is done.
    Check: tests/devices/test_sharded_arrays.py, `..._has_the_same_text_every_time`.
    """
    call = result.owner
    known = getattr(sys.modules.get("jax._src.custom_partitioning"), "_sharding_callbacks", {})
    if call.name != "stablehlo.custom_call" or "backend_config" not in call.attributes:
        return
    partitioning = known.get(str(call.attributes["backend_config"]).strip('"').encode())
    module = ctx.module_context
    devices = getattr(module.axis_context, "device_assignment", None)
    if partitioning is None or not devices:
        return
    content = (_sources(), content, [d.id for d in devices], module.platforms)
    name = "jbn_" + hashlib.sha256(repr(content).encode()).hexdigest()
    # The table does not keep its values alive. A value of another program may be there: also good.
    module.add_keepalive(known.setdefault(name.encode(), partitioning))
    call.attributes["backend_config"] = mlir.ir.StringAttr.get(name)


@functools.cache
def _sources() -> str:
    files = sorted(pathlib.Path(__file__).parent.parent.glob("_*/*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _batch(primitive: Any, args, dims, *, jaxpr, reduction, axes):
    """Keeps the axis that vmap adds: every element along it has results of its own."""
    del jaxpr
    axes, args = _batched(axes, args, dims)
    args[0] = jnp.broadcast_to(args[0], axes.shape)
    results = _bind(primitive, reduction, axes, *args)
    # The count may be the same for all elements.
    dims = [0 if r.shape[0] == axes.shape[0] else None for r in results]
    return [r[0] if d is None else r for r, d in zip(results, dims, strict=True)], dims


def _batched(axes: Axes, args: Any, dims: Any) -> tuple[Axes, list[Array]]:
    """Adds vmap's axis in front of the axes of x, and moves it to the front of the arguments."""
    pairs = list(zip(args, dims, strict=True))
    size = next(a.shape[d] for a, d in pairs if d is not None)
    more = Axes(
        (size, *axes.shape),
        (0, *(i + 1 for i in axes.features)),
        tuple(i + 1 for i in axes.reduction),
        None if axes.group is None else axes.group + 1,
    )
    return more, [a[None] if d is None else jnp.moveaxis(a, d, 0) for a, d in pairs]


def _primitive(name: str) -> Any:
    p = jax.extend.core.Primitive(name)
    p.multiple_results = True
    p.def_impl(lambda *args, jaxpr, **_: jax.extend.core.jaxpr_as_fun(jaxpr)(*args))
    p.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals)
    batching.primitive_batchers[p] = functools.partial(_batch, p)
    mlir.register_lowering(p, functools.partial(_lower, True))
    mlir.register_lowering(p, functools.partial(_lower, False), platform="tpu")
    return p


_measure = _primitive("jbn_measure")
_sum = _primitive("jbn_sum")


def _spread_out(values: Array, *, axes: Axes) -> Array:
    return jnp.broadcast_to(values, axes.shape)


def _sum_up(x: Array, axes: Axes) -> Array:
    return _bind(_sum, _Sum(), axes, x)[0]


def _batch_spread(args, dims, *, axes):
    axes, (values,) = _batched(axes, args, dims)
    return _spread.bind(values, axes=axes), 0


# `_spread` and `_sum` are linear, and each is the transpose of the other.
_spread = jax.extend.core.Primitive("jbn_spread")
_spread.def_impl(_spread_out)
_spread.def_abstract_eval(lambda v, *, axes: v.update(shape=axes.shape, weak_type=False))
batching.primitive_batchers[_spread] = _batch_spread
mlir.register_lowering(_spread, mlir.lower_fun(_spread_out, multiple_results=False))
ad.deflinear2(_spread, lambda ct, _, *, axes: [_sum_up(ct, axes)])
ad.primitive_jvps[_sum] = lambda primals, tangents, *, axes, **_: (
    [_sum_up(primals[0], axes)],
    [_sum_up(ad.instantiate_zeros(tangents[0]), axes)],
)
ad.primitive_transposes[_sum] = lambda cts, _, *, axes, **__: [
    _spread.bind(ad.instantiate_zeros(cts[0]), axes=axes)
]


# --- Without custom partitioning -----------------------------------------------------------------


def _in_blocks(
    local: Local, axes: Axes, devices: int, x: Array, weights: Array | None
) -> ShiftedMoments:
    """Divides the first reduction axis, or each group, into blocks, and pools `local` of each."""
    n = axes.shape[axes.reduction[0]]
    blocks = math.gcd(n, devices // math.gcd(devices, axes.groups))
    if blocks == 1:
        return local(axes, x, weights)
    view = axes.split(blocks)
    weights = None if weights is None else placement.divide(weights, view)
    m = local(view, placement.divide(x, view), weights)
    pooled = pool_blocks(axes, jax.tree.map(view.squeeze, m), weights is not None)
    return jax.tree.map(axes.unsqueeze, pooled)
