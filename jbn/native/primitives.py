"""The sums of Batch Normalization on CPU, by a C++ kernel that is compiled on request.

XLA reads x once for each sum and does not share a sum out over threads. `kernel.cc` does both sums
in one read on all threads, several times faster. It needs a C++ compiler, once:

    python -m jbn.native            # compiles it into a cache directory, and says where
    python -m jbn.native --check    # says whether that was done, and whether it loads

and then `jbn.native.enable()`, or JBN_NATIVE=1 in the environment. Without either, nothing is
compiled or loaded.

With z = x - K, in float32, there are three maps:

    sums(x, K)            = (sum z, sum z^2)
    pair(x, K, t)         = (sum t, sum z t)      linear in t
    spread(x, K, u, v, w) = w + u + z v           linear in (u, v, w); the transpose of pair

pair and spread are primitives of JAX, each the transpose of the other, so derivatives of every
order are made of them. On CPU, in a program for one device, sums and pair are the kernel's; in
every other place, for other dtypes and under vmap all three are their equations in jax.numpy.

With `gate=(A, B)`, pair reads t, and spread gives its result, only where z A + B > 0; all else is
0. That is the derivative of relu(z A + B), without an array for the mask.
"""

import argparse
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jax.typing import DTypeLike

from jbn import _kernels
from jbn._once import made_once

Gate = tuple[Array, Array]

_SOURCE = pathlib.Path(__file__).with_name("kernel.cc")
# No -ffast-math: NaN and infinity are data here. The kernel says itself what may be reordered.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-pthread",
)
_HANDLERS = ("jbn_sums", "jbn_pair", "jbn_gated_pair")
_ELEMENTS = ("float32", "bfloat16", "float16")  # of x and t in the kernel; all else is float32


# Whether the kernel is in use.

_targets: dict[str, str] = {}  # handler -> its name in XLA; empty until the library is loaded
_enabled = False


def enable(build: bool = False) -> None:
    """Makes jbn use the kernel on CPU, in programs that are traced from now on.

    JAX's caches are cleared, so that what was traced before is traced again.

    Args:
      build: compile the kernel first if that has not been done.

    Raises:
      FileNotFoundError: it has not been built.
      RuntimeError: it cannot be built (see `build`), or not be loaded.
    """
    global _enabled
    path = library()
    if not path.exists():
        if not build:
            raise FileNotFoundError(
                f"jbn's C++ kernel is not built: expected {path}. Run `python -m jbn.native`, or "
                "call jbn.native.enable(build=True)."
            )
        _compile(path)
    if not _targets:
        _load(path)
    if not _enabled:
        _enabled = True
        _kernels.use(sys.modules[__name__])
        jax.clear_caches()


def disable() -> None:
    """Undoes `enable`."""
    global _enabled
    if _enabled:
        _enabled = False
        _kernels.use(None)
        jax.clear_caches()


def is_enabled() -> bool:
    """Whether `enable` was called last, and not `disable`."""
    return _enabled


def from_environment() -> None:
    """Calls `enable()` if JBN_NATIVE is set to other than 0; a warning where that fails."""
    if os.environ.get("JBN_NATIVE", "0") in ("", "0"):
        return
    try:
        enable()
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"JBN_NATIVE is set, but without effect. {error}", RuntimeWarning, stacklevel=2
        )


def usable(x: Array) -> bool:
    """Whether to use `sums`, `pair` and `spread` for the sums of x over all axes but the last.

    They are then enabled, x is of a dtype that the kernel reads, and the program is for one CPU
    device: the primitives say nothing about sharding, and what varies over which axis.
    """
    if not _enabled or x.ndim == 0 or jnp.dtype(x.dtype).name not in _ELEMENTS:
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
    """(sum z, sum z^2) of z = x - K over all axes but the last. Not differentiable.

    Args:
      x: [..., C], floating point.
      shift: [C], K; its dtype is that of z and of the results.

    Raises:
      ValueError: shift is not [C].
    """
    _check(x, shift=shift)
    return tuple(_sums.bind(x, shift))


def pair(x: Array, shift: Array, t: Array, *, gate: Gate | None = None) -> tuple[Array, Array]:
    """(sum t, sum z t) over all axes but the last, of z = x - K.

    Args:
      x: [..., C], floating point.
      shift: [C], K; its dtype is that of z and of the results.
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
    """w + u + z v, [..., C], of z = x - K: the transpose of `pair`.

    Args:
      x: [..., C], floating point.
      shift: [C], K; its dtype is that of z and of the sum.
      u: [C], of shift's dtype.
      v: [C], of shift's dtype.
      w: [..., C], floating point; None for 0. Here so that the sum is rounded to dtype only once.
      gate: (A, B), [C] each, of shift's dtype. The result is 0 unless z A + B > 0.
      dtype: of the result. A cotangent of it goes into `pair` as it is.

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


# Their equations.


def _row(vector: Array, x: Array) -> Array:
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _shifted(x: Array, shift: Array) -> Array:
    return x.astype(shift.dtype) - _row(shift, x)


def _gated(values: Array, x: Array, shift: Array, gate: Sequence[Array]) -> Array:
    if not gate:
        return values
    scale, bias = (_row(vector, x) for vector in gate)
    active = _shifted(x, shift) * scale + bias > 0
    return jnp.where(active, values, jnp.zeros_like(values))


def _sum(values: Array) -> Array:
    return jnp.sum(values, range(values.ndim - 1))


def _plain_sums(x: Array, shift: Array) -> list[Array]:
    z = _shifted(x, shift)
    return [_sum(z), _sum(z * z)]


def _plain_pair(x: Array, shift: Array, t: Array, *gate: Array) -> list[Array]:
    t = _gated(t.astype(shift.dtype), x, shift, gate)
    return [_sum(t), _sum(_shifted(x, shift) * t)]


def _plain_spread(x, shift, u, v, *rest: Array, dtype, added: bool) -> Array:
    values = _row(u, x) + _shifted(x, shift) * _row(v, x)
    if added:
        values = rest[0].astype(shift.dtype) + values
    return _gated(values, x, shift, rest[added:]).astype(dtype)


# What JAX has to know about them: types, eager evaluation, vmap, lowering.


def _primitive(name: str, plain: Callable[..., Any], result: Callable[..., Any], several: bool):
    """A primitive with results of the types that `result` gives, computed by `plain`."""
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


_sums = _primitive("jbn_sums", _plain_sums, lambda x, shift: [_vector(shift)] * 2, True)
_pair = _primitive("jbn_pair", _plain_pair, lambda x, shift, t, *gate: [_vector(shift)] * 2, True)
_spread = _primitive(
    "jbn_spread",
    _plain_spread,
    lambda x, *rest, dtype, added: x.update(dtype=dtype, weak_type=False),
    False,
)


def _spread_apart(x, shift, u, v, *rest: Array, dtype, added: bool) -> Array:
    """`_plain_spread` by vectors that are computed once."""
    vectors = made_once(*(vector[None] for vector in (shift, u, v, *rest[added:])))
    shift, u, v, *gate = (vector[0] for vector in vectors)
    return _plain_spread(x, shift, u, v, *rest[:added], *gate, dtype=dtype, added=added)


def _handled_by(handler: Callable[..., str]):
    """A lowering to one of the kernel's handlers, which is chosen by the operands."""

    def lowering(ctx, *operands, **_):
        return jax.ffi.ffi_lowering(_targets[handler(*operands)])(ctx, *operands)

    return lowering


def _lower_on_cpu(primitive, native, plain, several: bool = True) -> None:
    """The lowering `native` where the kernel can be had, and the function `plain` elsewhere."""
    in_jax_numpy = mlir.lower_fun(plain, multiple_results=several)

    def lowering(ctx, *operands, **params):
        return (native if _kernel_fits(ctx) else in_jax_numpy)(ctx, *operands, **params)

    mlir.register_lowering(primitive, lowering, platform="cpu")


def _kernel_fits(ctx) -> bool:
    module = ctx.module_context
    return (
        _enabled
        and all(aval.dtype.name in _ELEMENTS for aval in ctx.avals_in)
        and all(shift.dtype == jnp.float32 for shift in ctx.avals_in[1:2])
        and getattr(module.axis_context, "num_devices", 0) == 1  # none inside shard_map and pmap
        and not module.lowering_parameters.for_export  # another process may not have the kernel
    )


_lower_on_cpu(_sums, _handled_by(lambda *_: "jbn_sums"), _plain_sums)
_lower_on_cpu(
    _pair, _handled_by(lambda x, k, t, *gate: "jbn_gated_pair" if gate else "jbn_pair"), _plain_pair
)
_lower_on_cpu(
    _spread, mlir.lower_fun(_spread_apart, multiple_results=False), _plain_spread, several=False
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
        dsecond += pair(_gated(t, x, shift, gate), jnp.zeros_like(shift), dx)[1]
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
        dz = _shifted(ad.instantiate_zeros(dx), ad.instantiate_zeros(dshift))
        parts.append(_gated(dz * _row(v, x), x, shift, gate).astype(dtype))
    if not parts:  # of a gate alone
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
        out[4] = _gated(ct, x, shift, gate).astype(rest[0].aval.dtype)
    return out


def _or_none(gate: Sequence[Array]) -> Any:
    return tuple(gate) or None


ad.primitive_jvps[_pair] = _pair_jvp
ad.primitive_jvps[_spread] = _spread_jvp
ad.primitive_transposes[_pair] = _pair_transpose
ad.primitive_transposes[_spread] = _spread_transpose


# Compiling and loading.


def build() -> pathlib.Path:
    """Compiles the kernel for this machine, if that has not been done.

    The compiler is $CXX or else the first of c++, g++ and clang++ that there is.

    Returns:
      The library's path: in $JBN_CACHE, $XDG_CACHE_HOME/jbn or ~/.cache/jbn, named by what it
      depends on: the source, the flags, jaxlib's version and the processor.

    Raises:
      RuntimeError: there is no compiler, it fails, or the directory cannot be written to.
    """
    path = library()
    if not path.exists():
        _compile(path)
    return path


def library() -> pathlib.Path:
    """Where `build` puts the library, whether or not it is there."""
    jaxlib = importlib.metadata.version("jaxlib")
    parts = (_SOURCE.read_text(), *_flags(), jaxlib, platform.system(), _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return _cache() / f"native-{key}.so"


def _cache() -> pathlib.Path:
    if chosen := os.environ.get("JBN_CACHE"):
        return pathlib.Path(chosen).absolute()  # a name without a slash is looked up elsewhere
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jbn"


def _flags() -> tuple[str, ...]:
    """All for this very processor: the library does not travel."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return (*_FLAGS, "-march=native")
    return (*_FLAGS, "-mcpu=native")


def _processor() -> str:
    """What -march=native goes by: the architecture and, on Linux, the features of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return " ".join([platform.machine(), platform.processor(), *sorted(set(features))])


def _compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if command and shutil.which(command[0]):
            return command
        raise RuntimeError(
            f"CXX is {chosen!r}, and there is no such command; expected a C++ compiler."
        )
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError(
        "No C++ compiler: looked for c++, g++ and clang++. Install one (Debian and Ubuntu: apt "
        "install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or name one: "
        "CXX=/path/to/compiler python -m jbn.native. jbn works without it."
    )


def _compile(path: pathlib.Path) -> None:
    compiler = _compiler()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise RuntimeError(
            f"Cannot write to {path.parent} ({error.strerror}): the compiled kernel goes there. "
            "Name another directory: JBN_CACHE=/some/directory"
        ) from error
    with directory as name:
        output = pathlib.Path(name) / path.name
        include = ("-isystem", jax.ffi.include_dir())
        command = [*compiler, *_flags(), *include, str(_SOURCE), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = "\n".join((done.stderr or done.stdout).splitlines()[-20:])
            raise RuntimeError(f"The C++ compiler failed: {shlex.join(command)}\n{last}")
        output.replace(path)  # at once: another process sees all of it or nothing


def _load(path: pathlib.Path) -> None:
    if os.name == "posix" and path.stat().st_uid not in (0, os.geteuid()):
        raise RuntimeError(
            f"{path} belongs to another user, and loading it would run that user's code. Name a "
            "directory of yours, JBN_CACHE=/some/directory, and run `python -m jbn.native`."
        )
    try:
        loaded = ctypes.CDLL(str(path))
        handlers = {handler: getattr(loaded, handler) for handler in _HANDLERS}
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"{path} cannot be loaded: {error}. Remove it and run `python -m jbn.native` again."
        ) from error
    # By the library's name as well: JAX's persistent cache of programs tells kernels apart.
    targets = {handler: f"{handler}.{path.stem}" for handler in handlers}
    for handler, function in handlers.items():
        jax.ffi.register_ffi_target(targets[handler], jax.ffi.pycapsule(function), "cpu")
    _targets.update(targets)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m jbn.native`; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m jbn.native", description="jbn's C++ kernel.")
    parser.add_argument("--check", action="store_true", help="compile nothing; does it load?")
    check = parser.parse_args(arguments).check
    try:
        if check:
            enable()
            print(f"{library()} is built, and loads.")
        else:
            print(build())
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
