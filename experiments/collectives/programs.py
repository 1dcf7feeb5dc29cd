"""Compiles the network, for each way to spread it over the devices."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn

WIDTHS = (64, 128, 256)  # channels of the layers
INPUTS = 32
PER_DEVICE = 32  # examples
AXIS = "data"


class Layer(NamedTuple):
    kernel: Any  # [inputs, C]
    params: Any
    stats: Any


class Place(NamedTuple):
    """The axes of the batch that are split over axes of the mesh."""

    spec: P
    mesh: tuple[int, ...] = (-1,)  # -1: all devices that are left
    names: tuple[str, ...] = (AXIS,)
    steps: int | None = None  # length of a second axis of the batch, before that of examples


class Mode(NamedTuple):
    """One way to spread the program over the devices."""

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
    """Returns whether the combination exists and can be compiled for the target."""
    if statistics == "halves" and mode.check_vma is None:
        return False
    if mode.place != Place(P(AXIS)):
        # XLA for TPUs does not tell jbn how such an array is split (see docs/collectives.md).
        known = target == "cpu" or mode.axis_type == AxisType.Explicit
        return known and statistics in ("plain", "masked")
    if mode.set_mesh:
        return True
    # jax.device_count() counts the devices of this machine, so a target elsewhere is left out.
    return target == "cpu" and statistics in ("plain", "masked")


def train(x, mask, layers, **options) -> tuple[Array, list[Any]]:
    """Returns the network's output and its updated running statistics."""
    stats = []
    for i, layer in enumerate(layers):
        with jax.named_scope(f"layer{i}"):  # `by_layer` finds collectives by it
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
    """Makes a function of (x, dy, mask, layers) that computes the results named by `part`:

    forward: the output; statistics: also the running statistics; backward: the output, and the
    gradient of <dy, output> in x; parameters: also the gradient in the parameters; inference: the
    output.
    """
    options: dict[str, Any] = {}
    if mode.check_vma is None:
        options["groups"] = devices if statistics == "ghost" else None
    elif statistics != "ghost":  # ghost: every device normalises alone, so no axis_name
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
            if is_local(mode, statistics):  # each device keeps its own
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
        if mode.check_vma is False:  # with True, JAX has summed them
            dtrained = lax.psum(dtrained, AXIS)
        return y, dx, dtrained

    return f


def is_local(mode: Mode, statistics: str) -> bool:
    """Returns whether the running statistics differ from device to device."""
    return statistics in ("ghost", "halves") and mode.check_vma is not None


def out_specs(part: str, mode: Mode, statistics: str) -> Any:
    """Returns the PartitionSpecs of the results of `program`."""
    rows = mode.place.spec
    return {
        "inference": rows,
        "forward": rows,
        "statistics": (rows, P(AXIS) if is_local(mode, statistics) else P()),
        "backward": (rows, rows),
        "parameters": (rows, rows, P()),
    }[part]


def compiled(part: str, mode: Mode, statistics: str, devices: Sequence[Any]) -> str:
    """Compiles the program, and returns the optimised one as text."""
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
    elif mode.axis_type == AxisType.Auto:  # else XLA may replicate a result
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh) if mode.set_mesh else contextlib.nullcontext():
        text = jax.jit(f, out_shardings=shardings).lower(*args).compile().as_text()
    assert text is not None
    return text
