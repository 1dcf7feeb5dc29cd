"""Counts the operations of the library's programs, so that a change of a program is noticed.

    python -m tests.fingerprints            # prints the table and its differences from the record
    python -m tests.fingerprints --write    # records the counts in tests/fingerprints.json

A program is traced, lowered and compiled for the CPU, and not run. The equations of its jaxpr and
its StableHLO operations are counted, because they are the cost of tracing and lowering. So are the
instructions, collectives and bytes of the program that XLA compiles. XLA's choices differ between
versions, so each version of JAX that the tests run on has an entry of its own: record with all of
them. A version takes about half a minute.
"""

import argparse
import collections
import functools
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx
import tests.conftest  # noqa: F401  eight devices, strict dtypes and ranks
from experiments.common import hlo
from experiments.common.counting import equations, operations
from experiments.nets.resnet import BottleneckBlock
from tests import executions

PATH = pathlib.Path(__file__).with_suffix(".json")
COMMAND = "python -m tests.fingerprints"

# --- The programs --------------------------------------------------------------------------------

VECTORS = (256, 128)
IMAGES = (16, 14, 14, 64)


class Program(NamedTuple):
    """A function, the shapes of its arguments, and the mesh that is set while it is traced."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    mesh: Mesh


def one_device() -> Mesh:
    """Makes a mesh of one device, on which the library does not divide a batch into blocks."""
    return executions.mesh((1,), ("only",))


def both(layer: Callable[..., Any]) -> Callable[..., Any]:
    """Turns (trained, *rest) -> (y, new) into (dy, trained, *rest) -> (y, new, gradients)."""

    def program(dy, trained, *rest):
        y, pull, new = jax.vjp(lambda trained: layer(trained, *rest), trained, has_aux=True)
        return y, new, pull(dy)

    return program


def core(
    shape: tuple[int, ...] = VECTORS,
    dtype: str = "float32",
    *,
    backward: bool = True,
    mesh: Mesh | None = None,
    rows: str | None = None,
    given: dict[str, Any] | None = None,
    **static: Any,
) -> Program:
    """Makes a program of `jbn.batch_norm`, forward and, if `backward`, of its gradients.

    `rows` is the axis of the mesh over which x lies. `given` has the shapes of masks, weights and
    residuals.
    """
    mesh = one_device() if mesh is None else mesh
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(rows)))
    params, stats = vectors(shape[-1])
    given = dict(given or {})
    trained = x, params, given.pop("residual", None)

    def layer(trained, stats, given):
        x, params, residual = trained
        return jbn.batch_norm(x, params, stats, residual=residual, **given, **static)

    if backward:
        return Program(both(layer), (x, trained, stats, given), mesh)
    return Program(layer, (trained, stats, given), mesh)


def vectors(features: int) -> tuple[jbn.Params, jbn.RunningStats]:
    """Returns the shapes of a layer's parameters and statistics."""
    return jax.eval_shape(lambda: (jbn.init_params(features), jbn.init_stats(features)))


def named_axis() -> Program:
    """Makes a program in which four devices of a shard_map share their statistics."""
    mesh = executions.mesh()
    x = jax.ShapeDtypeStruct(VECTORS, jnp.float32)
    params, stats = vectors(VECTORS[-1])

    def layer(trained, stats):
        x, params = trained
        return jbn.batch_norm(x, params, stats, axis_name=executions.AXIS)

    rows = P(executions.AXIS)
    specs = {"in_specs": (rows, (rows, P()), P()), "out_specs": (rows, P(), ((rows, P()),))}
    function = jax.shard_map(both(layer), mesh=mesh, **specs)
    return Program(function, (x, (x, params), stats), mesh)


def inference() -> Program:
    x = jax.ShapeDtypeStruct(IMAGES, jnp.float32)
    return Program(jbn.batch_norm_inference, (x, *vectors(IMAGES[-1])), one_device())


def module(layer: nn.Module, x: jax.ShapeDtypeStruct) -> Program:
    """Makes a program of a linen module in training that keeps the shape of x."""
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def apply(trained, stats):
        x, params = trained
        variables = {"params": params, "batch_stats": stats}
        return layer.apply(variables, x, mutable=["batch_stats"])

    stats, params = variables["batch_stats"], variables["params"]
    return Program(both(apply), (x, (x, params), stats), one_device())


def linen_layer(dtype: str = "float32") -> Program:
    layer = jbn.linen.BatchNorm(use_running_average=False, dtype=dtype)
    return module(layer, jax.ShapeDtypeStruct(IMAGES, dtype))


def resnet_block(dtype: str = "float32") -> Program:
    """Makes a program of a bottleneck block of constant width, with three normalisations."""
    norm = functools.partial(jbn.linen.BatchNorm, use_running_average=False, dtype=dtype)
    conv = functools.partial(nn.Conv, dtype=dtype)
    block = BottleneckBlock(IMAGES[-1] // 4, norm=norm, conv=conv)
    return module(block, jax.ShapeDtypeStruct(IMAGES, dtype))


def nnx_layer() -> Program:
    layer = jbn.nnx.BatchNorm(IMAGES[-1], rngs=nnx.Rngs(0))
    graph, *state = nnx.split(layer, nnx.Param, nnx.BatchStat)
    params, stats = jax.eval_shape(lambda: state)

    def apply(trained, stats):
        x, params = trained
        layer = nnx.merge(graph, params, stats, copy=True)  # variables of this trace
        return layer(x), nnx.state(layer, nnx.BatchStat)

    x = jax.ShapeDtypeStruct(IMAGES, jnp.float32)
    return Program(both(apply), (x, (x, params), stats), one_device())


def sharded(axis_type: AxisType) -> Program:
    """Makes a program of a batch on four devices, which XLA (Auto) or JAX (Explicit) knows."""
    return core(mesh=executions.mesh(axis_type=axis_type), rows=executions.AXIS)


_mask = jax.ShapeDtypeStruct((*IMAGES[:-1], 1), jnp.bool_)
_weights = jax.ShapeDtypeStruct((IMAGES[0], 1, 1, 1), jnp.float32)
_residual = jax.ShapeDtypeStruct(IMAGES, jnp.float32)

# Programs are forward and backward, unless the name says otherwise.
PROGRAMS: dict[str, Callable[[], Program]] = {
    "vectors, forward": functools.partial(core, backward=False),
    "vectors": core,
    "images, forward": functools.partial(core, IMAGES, backward=False),
    "images": functools.partial(core, IMAGES),
    "masked": functools.partial(core, IMAGES, given={"mask": _mask}),
    "weighted": functools.partial(core, IMAGES, given={"weights": _weights}),
    "groups": functools.partial(core, groups=4),
    "relu of a sum": functools.partial(
        core, IMAGES, given={"residual": _residual}, activation=jax.nn.relu
    ),
    "inference": inference,
    "shard_map": named_axis,
    "jit, Auto axis": functools.partial(sharded, AxisType.Auto),
    "jit, Explicit axis": functools.partial(sharded, AxisType.Explicit),
    "linen": linen_layer,
    "linen, bfloat16": functools.partial(linen_layer, "bfloat16"),
    "nnx": nnx_layer,
    "ResNet block": resnet_block,
    "ResNet block, bfloat16": functools.partial(resnet_block, "bfloat16"),
}

# --- Counting ------------------------------------------------------------------------------------

Fingerprint = dict[str, dict[str, int]]  # part -> what -> how many


def fingerprint(name: str) -> Fingerprint:
    """Traces, lowers and compiles one of `PROGRAMS`, and counts."""
    program = PROGRAMS[name]()
    with jax.set_mesh(program.mesh):
        traced = jax.jit(program.function).trace(*program.arguments)
        lowered = traced.lower()
        compiled = lowered.compile()
    text = compiled.as_text() or ""
    instructions = [i for found in hlo.computations(text).values() for i in found]
    module, memory = lowered.compiler_ir("stablehlo"), compiled.memory_analysis()
    assert module is not None
    assert memory is not None
    accessed = (compiled.cost_analysis() or {})["bytes accessed"]
    return {
        "jaxpr": counted(e.primitive.name for e in equations(traced.jaxpr.jaxpr)),
        "stablehlo": counted(operations(module.operation)),
        "optimized": counted(i.operation for i in instructions),
        "collectives": sizes(hlo.collectives(text)),
        "bytes": {"accessed": int(accessed), "temporary": memory.temp_size_in_bytes},
    }


def counted(names: Any) -> dict[str, int]:
    """Counts each name; the sum of all comes first, then the names in alphabetical order."""
    counts = collections.Counter(names)
    return {"all": counts.total(), **dict(sorted(counts.items()))}


def sizes(found: list[hlo.Collective]) -> dict[str, int]:
    """Adds up the bytes that each device sends, by kind of collective."""
    sent: dict[str, int] = {}
    for c in found:
        sent[c.kind] = sent.get(c.kind, 0) + c.sent
    return dict(sorted(sent.items()))


# --- The record ----------------------------------------------------------------------------------


def version() -> str:
    """Returns the version of JAX, which is the name of an entry."""
    jaxlib = importlib.metadata.version("jaxlib")
    return jax.__version__ + (f" with jaxlib {jaxlib}" if jaxlib != jax.__version__ else "")


def read() -> dict[str, dict[str, Fingerprint]]:
    """Reads the record: version of JAX -> name of a program -> its fingerprint."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def write(entries: dict[str, dict[str, Fingerprint]]) -> None:
    """Writes a line for each part of a fingerprint, so that a diff shows what changed."""
    versions = []
    for version, programs in sorted(entries.items()):
        names = []
        for name, parts in programs.items():
            lines = [f"   {json.dumps(part)}: {json.dumps(what)}" for part, what in parts.items()]
            names.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(names) + "\n }")
    PATH.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def changes(old: Fingerprint, new: Fingerprint) -> list[str]:
    """Lists changes such as "stablehlo reduce: 4 -> 5"; a name that is absent counts as 0."""
    found = []
    for part in dict.fromkeys([*old, *new]):
        before, after = old.get(part, {}), new.get(part, {})
        for what in dict.fromkeys([*before, *after]):
            a, b = before.get(what, 0), after.get(what, 0)
            if a != b:
                found.append(f"{part} {what}: {a} -> {b}")
    return found


# --- Command line --------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, str]] = {
    "equations": ("jaxpr", "all"),
    "jits": ("jaxpr", "jit"),
    "StableHLO": ("stablehlo", "all"),
    "optimized": ("optimized", "all"),
    "fusions": ("optimized", "fusion"),
    "reduces": ("optimized", "reduce"),
    "copies": ("optimized", "copy"),
    "bytes accessed": ("bytes", "accessed"),
    "temporary": ("bytes", "temporary"),
}


def table(programs: dict[str, Fingerprint]) -> str:
    """Returns a Markdown table of the main counts and of the bytes that collectives send."""
    rows = [["program", *COLUMNS, "sent"]]
    for name, found in programs.items():
        counts = [found[part].get(what, 0) for part, what in COLUMNS.values()]
        rows.append([name, *map(str, [*counts, sum(found["collectives"].values())])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * w for w in widths])
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 if it differs from the record and is not written."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"record it in {PATH.name}")
    args = parser.parse_args(argv)
    entries = read()
    found = {name: fingerprint(name) for name in PROGRAMS}
    print(f"jax {version()}\n\n{table(found)}\n")
    recorded = entries.get(version(), {})
    differences = [
        f"{name}: {change}"
        for name in dict.fromkeys([*recorded, *found])
        for change in changes(recorded.get(name, {}), found.get(name, {}))
    ]
    if version() in entries:
        print("\n".join(differences) or f"As recorded in {PATH.name}.")
    else:
        print(f"{PATH.name} has no entry for this version.")
    if args.write:
        write(entries | {version(): found})
        return 0
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
