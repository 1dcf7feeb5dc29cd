"""What do the devices tell each other? Collectives and bytes a layer, from XLA's own compiler.

Compiles a network of three layers, relu(batch_norm(x w)) with 64, 128 and 256 channels, for a mesh
of devices that need not be there, and reads the collectives out of the optimised program.

Claim: in every mode a layer needs one collective forward and one backward, with or without a mask;
ghost batches (statistics of groups that lie on one device each) and inference need none.

Command::

    python -m experiments.collectives                       # eight virtual CPU devices
    python -m experiments.collectives --target v5e:16x16    # 256 TPUs; needs pip install libtpu

Expected: see docs/collectives.md, which ``--markdown`` and ``--json`` write. About a minute a
target on two CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jbn
from experiments.common.hlo import Collective, Traffic, collectives, traffic
from experiments.common.records import Records
from experiments.targets.__main__ import prepare, tpus, version

# --- The network ---------------------------------------------------------------------------------

WIDTHS = (64, 128, 256)  # channels of the layers
INPUTS = 32
PER_DEVICE = 32  # examples
AXIS = "data"


class Layer(NamedTuple):
    kernel: Any  # [inputs, C]
    params: Any
    stats: Any


class Place(NamedTuple):
    """Which axes of the batch lie over which axes of the mesh."""

    spec: P
    mesh: tuple[int, ...] = (-1,)  # -1: all devices that are left
    names: tuple[str, ...] = (AXIS,)
    steps: int | None = None  # the length of a second axis of the batch, before that of examples


class Mode(NamedTuple):
    """How the program is spread over the devices."""

    name: str
    axis_type: AxisType = AxisType.Auto
    check_vma: bool | None = None  # None: jit of global arrays; else shard_map
    set_mesh: bool = True
    place: Place = Place(P(AXIS))


TIME_MAJOR = Place(P(None, AXIS), steps=16)
TWO_AXES = Place(P("space", AXIS), (2, -1), ("space", AXIS), steps=16)
MODES = (
    Mode("jit, Auto axes"),
    Mode("jit, Auto axes, no `jax.set_mesh`", set_mesh=False),
    Mode("jit, Explicit axes", AxisType.Explicit),
    Mode("shard_map", check_vma=True),
    Mode("shard_map, check_vma=False", check_vma=False),
    Mode("jit, Auto axes, second axis sharded", place=TIME_MAJOR),
    Mode("jit, Explicit axes, second axis sharded", AxisType.Explicit, place=TIME_MAJOR),
    Mode("jit, Auto axes, two axes sharded", place=TWO_AXES),
    Mode("jit, Explicit axes, two axes sharded", AxisType.Explicit, place=TWO_AXES),
)
STATISTICS = ("plain", "masked", "ghost", "halves", "inference")  # halves: two axis_index_groups


def applies(mode: Mode, statistics: str, target: str) -> bool:
    """Whether that combination exists, and the compiler can be asked about it."""
    if statistics == "halves" and mode.check_vma is None:
        return False
    if mode.place != Place(P(AXIS)):
        # XLA for TPUs does not say where such an array lies (see docs/collectives.md).
        known = target == "cpu" or mode.axis_type == AxisType.Explicit
        return known and statistics in ("plain", "masked")
    if mode.set_mesh:
        return True
    # jax.device_count() counts the devices that are here: nothing to learn about others.
    return target == "cpu" and statistics in ("plain", "masked")


def train(x, mask, layers, **options) -> tuple[Array, list[Any]]:
    """The network's output and its updated running statistics."""
    stats = []
    for i, layer in enumerate(layers):
        with jax.named_scope(f"layer{i}"):  # by which a collective is found again
            z = x @ layer.kernel
            y, new = jbn.batch_norm(z, layer.params, layer.stats, mask=mask, **options)
            x = jax.nn.relu(y)
        stats.append(new)
    return x, stats


def infer(x, layers) -> Array:
    for i, layer in enumerate(layers):
        with jax.named_scope(f"layer{i}"):
            y = jbn.batch_norm_inference(x @ layer.kernel, layer.params, layer.stats)
            x = jax.nn.relu(y)
    return x


def program(part: str, mode: Mode, statistics: str, devices: int) -> Callable[..., Any]:
    """A function of (x, dy, mask, layers) that computes, by the name of the part:

    forward: the output; statistics: also the running statistics; backward: the output, and the
    gradient of <dy, output> in x; parameters: also in the parameters; inference: the output.
    """
    options: dict[str, Any] = {}
    if mode.check_vma is None:
        options["groups"] = devices if statistics == "ghost" else None
    elif statistics != "ghost":  # ghost: every device on its own, so no axis_name
        options["axis_name"] = AXIS
    if statistics == "halves":
        options["axis_index_groups"] = np.arange(devices).reshape(2, -1).tolist()

    def f(x, dy, mask, layers):
        if part == "inference":
            return infer(x, layers)
        if mode.check_vma and is_local(mode, statistics):
            own = [lax.pcast(layer.stats, AXIS, to="varying") for layer in layers]
            layers = [layer._replace(stats=s) for layer, s in zip(layers, own, strict=True)]
        outputs = functools.partial(train, mask=mask if statistics == "masked" else None, **options)
        if part == "forward":
            return outputs(x, layers=layers)[0]
        if part == "statistics":
            y, running = outputs(x, layers=layers)
            if is_local(mode, statistics):  # devices keep their own
                running = jax.tree.map(lambda s: s[None], running)
            return y, running
        trained = [(layer.kernel, layer.params) for layer in layers]

        def output(x, trained):
            now = [
                layer._replace(kernel=t[0], params=t[1])
                for t, layer in zip(trained, layers, strict=True)
            ]
            return outputs(x, layers=now)[0]

        if part == "backward":
            y, pull = jax.vjp(lambda x: output(x, trained), x)
            return y, pull(dy)[0]
        y, pull = jax.vjp(output, x, trained)
        dx, dtrained = pull(dy)
        if mode.check_vma is False:  # with True, JAX has added them up
            dtrained = lax.psum(dtrained, AXIS)
        return y, dx, dtrained

    return f


def is_local(mode: Mode, statistics: str) -> bool:
    """Whether the running statistics differ from device to device."""
    return statistics in ("ghost", "halves") and mode.check_vma is not None


def out_specs(part: str, mode: Mode, statistics: str) -> Any:
    """How the results of `program` lie on the devices."""
    rows = mode.place.spec
    return {
        "inference": rows,
        "forward": rows,
        "statistics": (rows, P(AXIS) if is_local(mode, statistics) else P()),
        "backward": (rows, rows),
        "parameters": (rows, rows, P()),
    }[part]


def compiled(part: str, mode: Mode, statistics: str, devices: Sequence[Any]) -> str:
    """The optimised program, as text."""
    place = mode.place
    grid = np.asarray(devices).reshape(place.mesh)
    mesh = Mesh(grid, place.names, axis_types=(mode.axis_type,) * grid.ndim)

    def everywhere(a: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P()))

    def rows(columns: int, dtype: Any = jnp.float32) -> Any:
        n = PER_DEVICE * len(devices)
        shape = (n, columns) if place.steps is None else (place.steps, n // place.steps, columns)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, place.spec))

    layers = [
        Layer(np.zeros((m, c), np.float32), jbn.init_params(c), jbn.init_stats(c))
        for m, c in itertools.pairwise((INPUTS, *WIDTHS))
    ]
    args = rows(INPUTS), rows(WIDTHS[-1]), rows(1, jnp.bool_), jax.tree.map(everywhere, layers)
    f = program(part, mode, statistics, len(devices))
    specs = out_specs(part, mode, statistics)
    shardings = None
    if mode.check_vma is not None:
        into = P(AXIS), P(AXIS), P(AXIS), P()
        f = jax.shard_map(f, mesh=mesh, in_specs=into, out_specs=specs, check_vma=mode.check_vma)
    elif mode.axis_type == AxisType.Auto:  # or XLA may give every device all of a result
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh) if mode.set_mesh else contextlib.nullcontext():
        text = jax.jit(f, out_shardings=shardings).lower(*args).compile().as_text()
    assert text is not None
    return text


# --- The measurement -----------------------------------------------------------------------------


class Row(NamedTuple):
    """One line of the table: a mode, and which statistics."""

    target: str
    devices: int
    mode: str
    statistics: str
    forward: list[Traffic]  # of each layer
    backward: list[Traffic]  # of each layer
    running: Traffic  # what the running statistics add, in all layers together
    parameters: Traffic  # what the gradients of the parameters add, in all layers together


def measure(target: str, devices: Sequence[Any], mode: Mode, statistics: str) -> Row:
    """Compiles program after program, each of which computes more than the one before."""

    def found(part: str) -> list[Collective]:
        return collectives(compiled(part, mode, statistics, devices))

    about = target, len(devices), mode.name, statistics
    if statistics == "inference":
        return Row(*about, by_layer(found("inference")), by_layer([]), traffic([]), traffic([]))
    forward, backward = found("forward"), found("backward")
    both = zip(by_layer(backward), by_layer(forward), strict=True)
    return Row(
        *about,
        by_layer(forward),
        [b.minus(f) for b, f in both],
        traffic(found("statistics")).minus(traffic(forward)),
        traffic(found("parameters")).minus(traffic(backward)),
    )


def by_layer(found: Sequence[Collective]) -> list[Traffic]:
    """Sorts collectives by the layer that they come from; last those that say no layer."""
    layers: list[list[Collective]] = [[] for _ in (*WIDTHS, "no layer")]
    for c in found:
        scope = re.search(r"layer(\d+)", c.op_name)
        layers[int(scope[1]) if scope else -1].append(c)
    return [traffic(layer) for layer in layers]


# --- Devices that need not be there --------------------------------------------------------------

CPU_DEVICES = 8


def target_devices(target: str) -> Sequence[Any]:
    """The devices of "cpu", or of a TPU pod such as "v5e:16x16"."""
    return jax.devices("cpu")[:CPU_DEVICES] if target == "cpu" else tpus(target)


# --- The table -----------------------------------------------------------------------------------

COLUMNS = (
    "program",
    "statistics",
    "forward, a layer",
    "bytes",
    "backward, a layer",
    "bytes",
    "running statistics",
    "gradients of the parameters",
)


def table(rows: Sequence[Row]) -> str:
    """Markdown that a terminal shows well, too: a table for each target."""
    parts = []
    for target in dict.fromkeys(row.target for row in rows):
        own = [row for row in rows if row.target == target]
        cells = [COLUMNS, *map(columns, own)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        ]
        lines.insert(1, " | ".join("-" * width for width in widths))
        title = f"**{target}**, {own[0].devices} devices\n\n"
        parts.append(title + "\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def columns(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    return (
        row.mode,
        row.statistics,
        *each_layer(row.forward),
        *each_layer(row.backward),
        *(whole_net(t) for t in (row.running, row.parameters)),
    )


def whole_net(total: Traffic) -> str:
    operations, sizes = each_layer([total, traffic([])])
    return f"{operations}, {sizes} B" if total.counts else "-"


def each_layer(layers: Sequence[Traffic]) -> tuple[str, str]:
    """Operations, "1 all-reduce", and bytes sent (and received, if that differs) of each layer.

    If some operation says no layer, it stands last, as one more.
    """
    *own, elsewhere = layers
    if elsewhere.counts:
        own.append(elsewhere)
    if not any(t.counts for t in own):
        return "-", "-"
    names = [" + ".join(f"{n} {kind}" for kind, n in t.counts.items()) or "-" for t in own]
    sent = " / ".join(f"{t.sent:,}" for t in own)
    received = " / ".join(f"{t.received:,}" for t in own)
    operations = names[0] if len(set(names)) == 1 else " / ".join(names)
    return operations, sent if sent == received else f"{sent} → {received}"


# --- Command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m experiments.collectives",
        description="Collectives and bytes a layer of Batch Normalization, in the programs that "
        "XLA compiles for devices which need not be there.",
    )
    add = p.add_argument
    add("--target", nargs="+", default=["cpu"], metavar="NAME",
        help="cpu (the default), or v5e:2x2, v5e:16x16, v5p:4x4x4, v6e:16x16 ...")  # fmt: skip
    add("--statistics", nargs="+", choices=STATISTICS, default=STATISTICS, help="default: all")
    add("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    add("--json", type=Path, metavar="FILE", help="write JSON lines there, one a row")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from Python with a list of arguments."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    prepare(CPU_DEVICES)
    try:
        targets = {name: target_devices(name) for name in args.target}
    except (ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    cases = [
        (name, mode, statistics)
        for name in targets
        for mode in MODES
        for statistics in args.statistics
        if applies(mode, statistics, name)
    ]
    bar = tqdm(cases, desc="compiling", unit=" rows", file=sys.stderr, leave=False)
    rows = [measure(name, targets[name], mode, statistics) for name, mode, statistics in bar]
    print(table(rows), end="")
    versions = {name: version(name) for name in ("jax", "libtpu")}
    if args.markdown:
        compilers = ", ".join(f"{name} {v}" for name, v in versions.items() if v)
        args.markdown.write_text(f"Compiled with {compilers}.\n\n{table(rows)}", encoding="utf-8")
    if args.json:
        command = shlex.join(["python", "-m", "experiments.collectives", *argv])
        about = {"command": command, "libtpu": versions["libtpu"], "widths": WIDTHS}
        with Records(args.json, **about, per_device=PER_DEVICE) as records:
            for row in rows:
                records.write("collectives", **to_json(row))


def to_json(row: Row) -> dict[str, Any]:
    """A row as numbers, texts, lists and dictionaries."""
    values = row._asdict()
    for part in ("forward", "backward"):
        values[part] = [t._asdict() for t in values[part]]
    for part in ("running", "parameters"):
        values[part] = values[part]._asdict()
    return values


def from_json(values: dict[str, Any]) -> Row:
    """The inverse of `to_json`."""
    layers = {k: [Traffic(**t) for t in values[k]] for k in ("forward", "backward")}
    whole = {k: Traffic(**values[k]) for k in ("running", "parameters")}
    fields: dict[str, Any] = {k: values[k] for k in Row._fields} | layers | whole
    return Row(**fields)


if __name__ == "__main__":
    main()
