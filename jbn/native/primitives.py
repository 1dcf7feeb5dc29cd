"""The three maps of `jbn.native` as JAX primitives: types, vmap, lowering and derivatives."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jax.typing import DTypeLike

from jbn._xla.materialize import materialize
from jbn.native.equations import gated, plain_pair, plain_spread, plain_sums, row, shifted

Gate = tuple[Array, Array]

_ELEMENTS = ("float32", "bfloat16", "float16")  # of x and t in the kernel; all else is float32

_targets: dict[str, str] = {}  # handler -> its name in XLA; empty while the kernel is not in use


def use(targets: Mapping[str, str]) -> None:
    """Lowers to these handlers from now on (see `compile.load`); to the equations if there is none.

    Programs that were compiled before do not change until JAX's caches are cleared.
    """
    _targets.clear()
    _targets.update(targets)


def in_use() -> bool:
    """Returns whether there are handlers to lower to."""
    return bool(_targets)


def usable(x: Array) -> bool:
    """Returns whether `sums`, `pair` and `spread` can sum x over all axes but the last.

    The kernel is then enabled, x has a dtype that it reads, and the program is for one CPU device:
    the primitives have no rules for sharded or device-varying arrays.
    """
    if not in_use() or x.ndim == 0 or jnp.dtype(x.dtype).name not in _ELEMENTS:
        return False
    if not all(isinstance(size, int) for size in x.shape):  # a dimension of jax.export
        return False
    meshes = (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh)
    for mesh in meshes:
        if any(kind != AxisType.Auto for kind in mesh.axis_types):
            return False
    devices = jax.device_count() if meshes[0].empty else meshes[0].size
    return devices == 1 and jax.default_backend() == "cpu"


# The three maps.


def sums(x: Array, shift: Array) -> tuple[Array, Array]:
    """Computes (sum z, sum z^2), z = x - shift, over all axes but the last. Not differentiable.

    Args:
      x: [..., C], floating point.
      shift: [C]; its dtype is that of z and of the results.

    Raises:
      ValueError: shift is not [C].
    """
    _check(x, shift=shift)
    return tuple(_sums.bind(x, shift))


def pair(x: Array, shift: Array, t: Array, *, gate: Gate | None = None) -> tuple[Array, Array]:
    """Computes (sum t, sum z t), z = x - shift, over all axes but the last.

    Args:
      x: [..., C], floating point.
      shift: [C]; its dtype is that of z and of the results.
      t: [..., C], floating point of any size.
      gate: (A, B), [C] each. t counts as 0 unless z A + B > 0.

    Raises:
      ValueError: shift or gate are not [C], or t is not of x's shape.
    """
    _check(x, shift=shift, gate=gate, t=t)
    return tuple(_pair.bind(x, shift, t, *(g.astype(shift.dtype) for g in gate or ())))


def spread(
    x: Array,
    shift: Array,
    u: Array,
    v: Array,
    w: Array | None = None,
    *,
    gate: Gate | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """Computes w + u + z v, [..., C], z = x - shift: the transpose of `pair`.

    Args:
      x: [..., C], floating point.
      shift: [C]; its dtype is that of z and of the sum.
      u: [C], of shift's dtype.
      v: [C], of shift's dtype.
      w: [..., C], floating point; None for 0. With it the sum is rounded to dtype only once.
      gate: (A, B), [C] each, of shift's dtype. The result is 0 unless z A + B > 0.
      dtype: of the result. A cotangent of this dtype goes into `pair` without a conversion.

    Raises:
      ValueError: shift, u, v or gate are not [C], or w is not of x's shape.
    """
    _check(x, shift=shift, u=u, v=v, gate=gate, w=w)
    rest = (() if w is None else (w,)) + (gate or ())
    return _spread.bind(x, shift, u, v, *rest, dtype=jnp.dtype(dtype), added=w is not None)


def _check(x: Array, **others: Array | Gate | None) -> None:
    for name, value in others.items():
        expected = x.shape if name in ("t", "w") else x.shape[-1:]
        for part in value if isinstance(value, tuple) else (value,):
            if part is not None and part.shape != expected:
                raise ValueError(
                    f"{name} has shape {part.shape}; expected {expected} for x: {x.shape}"
                )


# Rules of JAX for the three maps: types, eager evaluation, vmap, lowering.


def _primitive(name: str, plain: Callable[..., Any], result: Callable[..., Any], several: bool):
    """Makes a primitive with results of the types that `result` gives, computed by `plain`."""
    primitive = jax.extend.core.Primitive(name)
    primitive.multiple_results = several
    primitive.def_abstract_eval(result)

    @functools.lru_cache(maxsize=256)
    def compiled(**params):
        return jax.jit(functools.partial(primitive.bind, **params))

    def batched(args, dims, **params):
        axes = tuple(dim if isinstance(dim, int) else None for dim in dims)
        out = jax.vmap(functools.partial(plain, **params), in_axes=axes)(*args)
        return out, [0] * len(out) if several else 0

    primitive.def_impl(lambda *args, **params: compiled(**params)(*args))
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=several))
    return primitive


def _vector(shift):
    return shift.update(weak_type=False)


_sums = _primitive("jbn_sums", plain_sums, lambda x, shift: [_vector(shift)] * 2, True)
_pair = _primitive("jbn_pair", plain_pair, lambda x, shift, t, *gate: [_vector(shift)] * 2, True)
_spread = _primitive(
    "jbn_spread",
    plain_spread,
    lambda x, *rest, dtype, added: x.update(dtype=dtype, weak_type=False),
    False,
)


def _spread_apart(x, shift, u, v, *rest: Array, dtype, added: bool) -> Array:
    """Computes `plain_spread` from vectors that are stored before the pass over x."""
    vectors = materialize(shift, u, v, *rest[added:])
    shift, u, v, *gate = vectors
    return plain_spread(x, shift, u, v, *rest[:added], *gate, dtype=dtype, added=added)


def _handled_by(handler: Callable[..., str]):
    """Makes a lowering to one of the kernel's handlers; `handler` chooses it by the operands."""

    def lowering(ctx, *operands, **_):
        return jax.ffi.ffi_lowering(_targets[handler(*operands)])(ctx, *operands)

    return lowering


def _lower_on_cpu(primitive, native, plain, several: bool = True) -> None:
    """Registers for CPUs the lowering `native` where the kernel fits, and `plain` elsewhere."""
    in_jax_numpy = mlir.lower_fun(plain, multiple_results=several)

    def lowering(ctx, *operands, **params):
        return (native if _kernel_fits(ctx) else in_jax_numpy)(ctx, *operands, **params)

    mlir.register_lowering(primitive, lowering, platform="cpu")


def _kernel_fits(ctx) -> bool:
    module = ctx.module_context
    return (
        in_use()
        and all(aval.dtype.name in _ELEMENTS for aval in ctx.avals_in)
        and all(shift.dtype == jnp.float32 for shift in ctx.avals_in[1:2])
        and getattr(module.axis_context, "num_devices", 0) == 1  # 0 inside shard_map and pmap
        and not module.lowering_parameters.for_export  # another process may not have the kernel
    )


_lower_on_cpu(_sums, _handled_by(lambda *_: "jbn_sums"), plain_sums)
_lower_on_cpu(
    _pair, _handled_by(lambda x, k, t, *gate: "jbn_gated_pair" if gate else "jbn_pair"), plain_pair
)
_lower_on_cpu(
    _spread, mlir.lower_fun(_spread_apart, multiple_results=False), plain_spread, several=False
)


# Derivatives. The gate has none: it is a step.


def _pair_jvp(primals, tangents):
    x, shift, t, *gate = primals
    dx, dshift, dt, *_ = tangents
    first, second = pair(x, shift, t, gate=_or_none(gate))
    dfirst = dsecond = jnp.zeros_like(first)
    if not isinstance(dt, ad.Zero):
        dfirst, dsecond = pair(x, shift, dt, gate=_or_none(gate))
    if not isinstance(dx, ad.Zero):  # sum t dx
        dsecond += pair(gated(t, x, shift, gate), jnp.zeros_like(shift), dx)[1]
    if not isinstance(dshift, ad.Zero):
        dsecond -= dshift * first
    return [first, second], [dfirst, dsecond]


def _pair_transpose(cotangents, x, shift, t, *gate):
    u, v = (ad.instantiate_zeros(c) for c in cotangents)
    ct = spread(x, shift, u, v, gate=_or_none(gate), dtype=t.aval.dtype)
    return [None, None, ct, *(None for _ in gate)]


def _spread_jvp(primals, tangents, *, dtype, added):
    x, shift, _, v, *rest = primals
    gate = rest[added:]
    out = _spread.bind(*primals, dtype=dtype, added=added)
    dx, dshift, *linear = tangents
    linear = linear[: 2 + added]
    parts = []
    if not all(isinstance(d, ad.Zero) for d in linear):
        dw = [d for d in linear[2:] if not isinstance(d, ad.Zero)]
        du, dv = (ad.instantiate_zeros(d) for d in linear[:2])
        parts.append(spread(x, shift, du, dv, *dw, gate=_or_none(gate), dtype=dtype))
    if not isinstance(dx, ad.Zero) or not isinstance(dshift, ad.Zero):
        dz = shifted(ad.instantiate_zeros(dx), ad.instantiate_zeros(dshift))
        parts.append(gated(dz * row(v, x), x, shift, gate).astype(dtype))
    if not parts:  # only the gate has a tangent
        return out, jnp.zeros_like(out)
    return out, functools.reduce(jnp.add, parts)


def _spread_transpose(ct, x, shift, u, v, *rest, dtype, added):
    gate = rest[added:]
    out: list[Array | None] = [None] * (4 + len(rest))
    if isinstance(ct, ad.Zero):
        ct = ad.instantiate_zeros(ct)
    if ad.is_undefined_primal(u) or ad.is_undefined_primal(v):
        first, second = pair(x, shift, ct, gate=_or_none(gate))
        out[2] = first if ad.is_undefined_primal(u) else None
        out[3] = second if ad.is_undefined_primal(v) else None
    if added and ad.is_undefined_primal(rest[0]):
        out[4] = gated(ct, x, shift, gate).astype(rest[0].aval.dtype)
    return out


def _or_none(gate: Sequence[Array]) -> Any:
    return tuple(gate) or None


ad.primitive_jvps[_pair] = _pair_jvp
ad.primitive_jvps[_spread] = _spread_jvp
ad.primitive_transposes[_pair] = _pair_transpose
ad.primitive_transposes[_spread] = _spread_transpose
