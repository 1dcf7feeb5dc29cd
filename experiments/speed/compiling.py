"""Times tracing, lowering and compiling with jbn's layer in the place of Flax's.

Each model is built twice, with Flax's BatchNorm and with jbn's; all else is shared. The program is
a whole training step (loss, gradients, new statistics, SGD); for a single layer it is forward and
backward. It is traced, lowered and compiled, and not run:

layer              one layer, 256 x 128, in float32 and in bfloat16
cnn                two convolutions and two dense layers, as in Flax's example for MNIST
resnet             basic blocks, ReLU after the norm
densenet           the norm before the convolution, concatenation: every norm has another width
efficientnet       depthwise convolutions, swish
regnet             grouped convolutions
scanned            blocks of one shape under `flax.linen.scan`
critic             two critics of reinforcement learning, small layers under `flax.linen.vmap`
nnx                a convolutional network in Flax nnx
resnet50           ResNet-50 for 64 x 64 pixels; slow, so it is measured only if it is named

The two libraries take turns in one process, in another order each round, from empty caches; one
more round comes first, in which Python warms up. Garbage is collected before each measurement, and
not in it. Seconds are CPU time, summed over all threads of the process (`time.process_time`): wall
time would include other work of the machine, and XLA compiles on several threads, which all cost.
Ratios are jbn : Flax within a round, median (quartiles).

Sizes are the equations of the jaxpr, with those inside of calls and loops; StableHLO operations and
lines of text before XLA optimises; instructions after it.

Command::

    python -m experiments.speed --part compile                      # five minutes on two CPU cores
    python -m experiments.speed --part compile --quick              # a few seconds
    python -m experiments.speed --part compile --models resnet50
    python -m experiments.speed --part compile --models layer resnet --target h100 v5e

A target need not be there; docs/performance lists the packages to install.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from tqdm import tqdm

from experiments.common import compilers, hlo, timing
from experiments.common.command import as_typed, at_least_one
from experiments.common.counting import equations, operations
from experiments.common.records import Records
from experiments.speed import peers
from experiments.speed import report as speed_report
from experiments.speed.small_models import FLAX, JBN, MODELS, QUICK, SLOW, Program, programs

PHASES = ("trace", "lower", "compile")
ALL = "in all"

# --- The measurement -----------------------------------------------------------------------------


class Sizes(NamedTuple):
    """The counts of the parts of a program in its three forms."""

    equations: int  # of the jaxpr
    operations: int  # StableHLO's, with functions, calls and returns
    lines: int  # of StableHLO's text
    instructions: int  # after XLA's optimisation


class Stages(NamedTuple):
    """A program in its three forms, and the seconds that each form took."""

    traced: Any
    lowered: Any
    compiled: Any
    seconds: dict[str, float]  # of PHASES, and ALL


class Case(NamedTuple):
    """One model in one dtype, compiled for one device."""

    target: str
    model: str
    dtype: str
    norms: int
    seconds: dict[str, list[dict[str, float]]]  # library -> for each round, `Stages.seconds`
    sizes: dict[str, Sizes]  # library -> sizes

    def ratio(self, phase: str) -> timing.Ratio:
        """Returns jbn : Flax, within the rounds."""
        return self._samples(phase).ratio(JBN, FLAX)

    def median(self, library: str, phase: str = ALL) -> float:
        return self._samples(phase).median(library)

    def _samples(self, phase: str) -> timing.Samples:
        return timing.Samples({k: [s[phase] for s in v] for k, v in self.seconds.items()})


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collects garbage, and then none within the block, since either library would pay for it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stages(program: Program, shapes: tuple[Any, ...], on: Any, options: Any = None) -> Stages:
    """Traces, lowers and compiles from empty caches, for a device that need not be there.

    Args:
      program: the program to compile.
      shapes: the shapes of its arguments.
      on: the device.
      options: XLA's, for compiling.
    """
    mesh = Mesh(np.asarray([on]), ("data",))
    everywhere = NamedSharding(mesh, P())
    there = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), shapes
    )
    jax.clear_caches()
    with uncollected(), jax.set_mesh(mesh):  # else jbn splits the batch for the devices here
        clock = [time.process_time()]
        traced = jax.jit(program.function).trace(*there)
        clock.append(time.process_time())
        lowered = traced.lower()
        clock.append(time.process_time())
        compiled = lowered.compile(compiler_options=options)
        clock.append(time.process_time())
    seconds = dict(zip(PHASES, np.diff(clock).tolist(), strict=True))
    return Stages(traced, lowered, compiled, {**seconds, ALL: clock[-1] - clock[0]})


def sizes(found: Stages) -> Sizes:
    """Counts the parts of a program in its three forms."""
    instructions = hlo.computations(found.compiled.as_text() or "").values()
    return Sizes(
        sum(1 for _ in equations(found.traced.jaxpr.jaxpr)),
        sum(1 for _ in operations(found.lowered.compiler_ir("stablehlo").operation)),
        len(found.lowered.as_text().splitlines()),
        sum(map(len, instructions)),
    )


def measure(name: str, dtype: str, rounds: int, target: str, on: Any) -> Case:
    """Compiles both programs of a model in turn; a first round warms up and reads the sizes."""
    made = programs(name, dtype)
    shapes = {library: jax.eval_shape(p.arguments) for library, p in made.items()}
    # Autotuning would time kernels, and there is no GPU.
    options = {"xla_gpu_autotune_level": "0"} if target == "h100" else None
    found: dict[str, Sizes] = {}
    seconds: dict[str, list[dict[str, float]]] = {library: [] for library in made}
    for number in range(rounds + 1):
        for library in list(made)[:: 1 if number % 2 else -1]:
            with peers.PEERS["jbn"].setting():  # with XLA's sums
                one = stages(made[library], shapes[library], on, options)
            if number:
                seconds[library].append(one.seconds)
            else:
                found[library] = sizes(one)
            del one
    return Case(target, name, dtype, MODELS[name].norms, seconds, found)


# --- The table -----------------------------------------------------------------------------------


def table(cases: Sequence[Case]) -> speed_report.TableText:
    """Makes ratios jbn : Flax of a target's cases, the sizes of both, and the geometric means."""
    header = ["case", "dtype", "norms", *PHASES, ALL, "seconds", *Sizes._fields]
    cells = []
    for case in cases:
        line = [case.model, case.dtype, str(case.norms)]
        line += [speed_report.with_quartiles(case.ratio(phase)) for phase in (*PHASES, ALL)]
        line.append(f"{case.median(JBN):.2f} : {case.median(FLAX):.2f}")
        pairs = zip(case.sizes[JBN], case.sizes[FLAX], strict=True)
        cells.append([*line, *(f"{own} : {other}" for own, other in pairs)])
    means = [
        timing.geometric_mean(case.ratio(phase).median for case in cases)
        for phase in (*PHASES, ALL)
    ]
    of_sizes = [
        timing.geometric_mean(c.sizes[JBN][i] / c.sizes[FLAX][i] for c in cases)
        for i in range(len(Sizes._fields))
    ]
    numbers = [*means, None, *of_sizes]
    cells.append(["mean", "-", "-", *("-" if n is None else f"{n:.2f}" for n in numbers)])
    return speed_report.TableText(f"compile, {cases[0].target}", header, cells)


NOTE = (
    "Ratios of CPU seconds, jbn : Flax, within rounds: median (quartiles). seconds: in all, "
    "medians. Sizes, jbn : Flax: the jaxpr's equations; StableHLO's operations and lines; XLA's "
    "optimised instructions. mean: geometric, of the ratios."
)


# --- Command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m experiments.speed --part compile",
        description="Tracing, lowering and compiling of training steps with jbn's layer beside "
        "Flax's, and the sizes of the programs.",
    )
    add = p.add_argument
    add("--part", nargs="+", choices=("compile",), default=["compile"], help="this one")
    default = [name for name in MODELS if name not in SLOW]
    add("--models", nargs="+", choices=MODELS, default=default, metavar="NAME",
        help=f"of {', '.join(MODELS)}; default: all but {', '.join(SLOW)}")  # fmt: skip
    add("--rounds", type=at_least_one, default=3, metavar="N", help="default: 3")
    add("--quick", action="store_true", help=f"{' and '.join(QUICK)} alone, one round")
    add("--target", nargs="+", choices=compilers.NAMES, metavar="NAME",
        help=f"compile for these, of {', '.join(compilers.NAMES)}, which need not be there; "
        "default: JAX's default device")  # fmt: skip
    add("--out", type=Path, default=Path("results/speed"), metavar="DIR",
        help="for compile.jsonl; default: results/speed")  # fmt: skip
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    return p


def devices(names: Sequence[str] | None) -> Mapping[str, Any]:
    """Maps name to device, of the named targets or of the default device."""
    if not names:
        return {jax.default_backend(): jax.devices()[0]}
    compilers.prepare()
    return {name: compilers.device(name) for name in names}


def main(argv: Sequence[str] | None = None) -> list[Case]:
    """Runs the experiment with `argv`, or with the command line's; returns the cases."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        on = devices(args.target)
    except ImportError as error:
        sys.exit(f"error: {error}")
    names, rounds = (QUICK, 1) if args.quick else (args.models, args.rounds)
    todo = [(t, name, dtype) for t in on for name in names for dtype in MODELS[name].dtypes]
    command = as_typed("speed", argv)
    cases = []
    with Records(args.out / "compile.jsonl", command=command) as records:
        for target, name, dtype in tqdm(todo, desc="compile", file=sys.stderr, leave=False):
            case = measure(name, dtype, rounds, target, on[target])
            counted = {library: s._asdict() for library, s in case.sizes.items()}
            ratios = {phase: case.ratio(phase)._asdict() for phase in (*PHASES, ALL)}
            fields = case._replace(sizes={})._asdict()
            records.write("compile", **{**fields, "sizes": counted, "ratios": ratios})
            cases.append(case)
    tables = [table([case for case in cases if case.target == target]) for target in on]
    console = Console(width=None if sys.stdout.isatty() else 200)
    for one in tables:
        console.print(speed_report.terminal_table(one))
    console.print(NOTE, markup=False)
    if args.markdown:
        text = "\n".join(map(speed_report.markdown_table, tables))
        args.markdown.write_text(f"`{command}`. {NOTE}\n\n{text}", encoding="utf-8")
    print(f"numbers: {args.out / 'compile.jsonl'}")
    return cases
