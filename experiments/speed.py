"""How fast is Batch Normalization? jbn beside Flax, Haiku, Equinox and PyTorch, on this machine.

All libraries take turns in one process (`experiments.timing`), do the same mathematics on the same
numbers (`experiments.peers`), and are reported as ratios over flax.linen within a round, with the
quartiles of that ratio: 0.50 is half of flax.linen's time. Parts (``--part``):

op         one layer, forward and forward+backward: BN, BN+ReLU, BN+add+ReLU; float32 and bfloat16
step       whole training steps: a small ResNet on random images of CIFAR-10's shape; of ResNet-50
           the compilation and the memory, and with ``--run`` or on an accelerator the time, too
dispatch   tiny layers: a call, tracing and lowering, compiling; tracing and lowering ResNet-50
inference  one layer with the running statistics, and folded into y = a x + b
compile    tracing, lowering and compiling of small models; only if asked for, and alone, as it has
           arguments of its own (`experiments.compiling`)

**Of copy.** A layer moves memory, so its floor is a copy of x, measured in the same rounds. The
bytes that are useful, counted in elements of x: forward 3 (x twice, once for the statistics, and
y), backward 5 (x and dy twice, and dx), hence forward+backward 8. Adding a residual r reads it
forward (4), and backward (7) reads x, dy and y for the two sums, writes dr, reads x and dr again,
and writes dx: 11. Inference 2, with a residual 3; a copy 2. "Of copy" is useful bytes a second over
those of the copy. A layer that keeps x in a cache between its two reads can exceed 100 %.
**Bytes/element** is XLA's own count of what the compiled program accesses, where there is one.

Command::

    pip install -e '.[experiments,peers]'
    python -m jbn.native                 # optional: jbn's C++ sums, for the row "jbn native"
    python -m experiments.speed          # a quarter of an hour on two CPU cores
    python -m experiments.speed --quick  # about a minute: does everything run?
    python -m experiments.speed --part op --update FILE    # write jbn's ratios down, and later
    python -m experiments.speed --part op --check FILE     # exit with 1 if they have become worse
    python -m experiments.speed --target h100 v5e          # compiled for what need not be there

The same commands run on CPUs, GPUs and TPUs: on JAX's default device, or with JAX_PLATFORMS=cpu
before them on the CPU. On Linux the process starts itself again with what glibc and OpenMP have to
be told (`timing.ENVIRONMENT` says why).
"""

from __future__ import annotations

import sys

from experiments import timing

if __name__ == "__main__":
    timing.restart_with_environment("experiments.speed", sys.argv[1:])

import argparse
import functools
import gc
import itertools
import math
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from tqdm import tqdm

from experiments import models, peers, speed_report
from experiments.peers import BASELINE, FORMS, PASSES, Case, Program
from experiments.records import Records
from experiments.speed_report import Row
from experiments.steps import SLOTS, Network, TrainingStep, small_resnet, tiny_resnet

DTYPES = ("float32", "bfloat16")
COPY = "copy"  # the name of the floor among the libraries
FOLDED = "jbn folded"

SOME_SHAPES = ((32, 56, 56, 64), (32, 28, 28, 256), (32, 7, 7, 2048), (4096, 1024), (256, 128))
TINY_SHAPES = ((8, 4), (256, 128))
RESNET50_SHAPES = (  # [H, W, C] of all layers of Batch Normalization for images of 224 x 224
    (112, 112, 64),
    (56, 56, 64),
    (56, 56, 128),
    (56, 56, 256),
    (28, 28, 128),
    (28, 28, 256),
    (28, 28, 512),
    (14, 14, 256),
    (14, 14, 512),
    (14, 14, 1024),
    (7, 7, 512),
    (7, 7, 2048),
)
MLP_SHAPE = (60, 100)  # of the paper's network for digits

USEFUL = {  # elements that have to be moved, for each element of x; the module's docstring says why
    ("bn", "forward"): 3,
    ("bn_relu", "forward"): 3,
    ("bn_add_relu", "forward"): 4,
    ("bn", "forward+backward"): 8,
    ("bn_relu", "forward+backward"): 8,
    ("bn_add_relu", "forward+backward"): 11,
    ("bn", "inference"): 2,
    ("bn_relu", "inference"): 2,
    ("bn_add_relu", "inference"): 3,
}


class Config(NamedTuple):
    """What is measured, and how long."""

    shapes: Sequence[tuple[int, ...]] = SOME_SHAPES
    dtypes: Sequence[str] = DTYPES
    forms: Sequence[str] = FORMS
    libraries: Sequence[str] = ()  # names in `peers.PEERS`
    rounds: int = 21
    batch: int = 32  # images a training step
    run: bool = False  # ResNet-50's steps, too
    quick: bool = False


# --- op and inference ----------------------------------------------------------------------------


def op(config: Config) -> Iterator[Row]:
    """One layer in training."""
    for shape, dtype, form, which in bar(
        config.shapes, config.dtypes, config.forms, PASSES, about="op"
    ):
        case = Case(shape, dtype, form, which)
        programs = programs_of(config, case) | {COPY: peers.copy_program(case)}
        yield from time_programs("op", case, programs, config)


def inference(config: Config) -> Iterator[Row]:
    """One layer with its running statistics; and folded into an affine map."""
    for shape, dtype, form in bar(config.shapes, config.dtypes, config.forms, about="inference"):
        case = Case(shape, dtype, form, "inference")
        programs = programs_of(config, case)
        programs |= {FOLDED: peers.folded_program(case), COPY: peers.copy_program(case)}
        yield from time_programs("inference", case, programs, config)


def programs_of(config: Config, case: Case) -> dict[str, Program]:
    return {name: peers.PEERS[name].program(case) for name in config.libraries}


def time_programs(
    part: str, case: Case, programs: Mapping[str, Program], config: Config
) -> list[Row]:
    """Rows of programs that compute the same layer."""
    samples = timing.interleave({name: p.run for name, p in programs.items()}, config.rounds)
    itemsize = jnp.dtype(case.dtype).itemsize
    about = part, "x".join(map(str, case.shape)), case.dtype, case.form, case.which
    rows = []
    for name, program in programs.items():
        useful = 2 if name == COPY else USEFUL[case.form, case.which]
        row = Row(*about, name, **times(samples, name), **analysis(program, case.elements))
        row = row._replace(bandwidth=useful * itemsize * case.elements / samples.median(name))
        if COPY in programs:
            row = row._replace(of_copy=useful / 2 * samples.ratio(COPY, name).median)
        rows.append(row)
    return rows


def times(samples: timing.Samples, name: str) -> dict[str, Any]:
    """The fields of a row that say how long."""
    fields: dict[str, Any] = {"seconds": samples.median(name)}
    if BASELINE in samples.seconds:
        ratio = samples.ratio(name, BASELINE)
        fields |= {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
    return fields


def analysis(program: Program, elements: int | None = None) -> dict[str, Any]:
    """The fields of a row that XLA knows: bytes accessed, an element, and temporaries."""
    if program.compiled is None:
        return {}
    cost = program.compiled.cost_analysis() or {}  # None: on some platforms XLA does not count
    memory = program.compiled.memory_analysis()
    fields: dict[str, Any] = {}
    if elements and cost.get("bytes accessed", 0) > 0:
        fields["accessed"] = cost["bytes accessed"] / elements
    if memory is not None:
        fields["temporaries"] = memory.temp_size_in_bytes
    return fields


# --- Training steps ------------------------------------------------------------------------------


def slots_of(config: Config) -> list[str]:
    """Names of the networks whose libraries are to be measured."""
    return [name for name, slot in SLOTS.items() if slot.peer in config.libraries]


def step(config: Config) -> Iterator[Row]:
    """Whole training steps."""
    if config.quick:
        yield from time_steps(Network("tiny ResNet", tiny_resnet, 32, config.batch), config)
        return
    on_cpu = jax.default_backend() == "cpu"
    for dtype in config.dtypes:
        if dtype == "float32" or not on_cpu:  # on CPUs convolutions in bfloat16 are emulated
            small = Network("small ResNet", small_resnet, 32, config.batch, dtype)
            yield from time_steps(small, config)
        resnet50 = Network("ResNet-50", models.ResNet50, 224, config.batch, dtype)
        yield from time_steps(resnet50, config, run=config.run or not on_cpu)


def time_steps(network: Network, config: Config, run: bool = True) -> Iterator[Row]:
    """The memory that a step needs beside its arguments and, if it is to be run, its time."""
    programs = {}
    for (name,) in bar(slots_of(config), about=f"{network.name}: compiling"):
        with peers.PEERS[SLOTS[name].peer].setting():
            training = network.training(SLOTS[name])
            programs[name] = runner(training, training.lower().compile(), run)
    baseline = analysis(programs[BASELINE]) if BASELINE in programs else {}
    for name, program in programs.items():
        row = Row("step", *network.about(), "temporaries", name, **analysis(program))
        if row.temporaries and baseline.get("temporaries"):
            ratio = row.temporaries / baseline["temporaries"]
            row = row._replace(ratio=ratio, low=ratio, high=ratio)
        yield row
    if not run:
        return
    samples = timing.interleave({n: p.run for n, p in programs.items()}, config.rounds)
    for name in programs:
        yield Row("step", *network.about(), "step", name, **times(samples, name))


def runner(training: TrainingStep, compiled: Any, run: bool) -> Program:
    """Trains with the same images at each call; allocates nothing unless it is to run."""
    if not run:
        return Program(lambda: None, compiled)
    state = jax.jit(training.init)(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), training.images.shape, training.images.dtype)
    labels = jnp.arange(len(images), dtype=training.labels.dtype) % 10

    def call() -> Any:
        nonlocal state
        state, loss = compiled(state, images, labels)
        return jax.block_until_ready((state, loss))

    return Program(call, compiled)


# --- dispatch ------------------------------------------------------------------------------------


def dispatch(config: Config) -> Iterator[Row]:
    """What a layer costs besides moving memory: calls of tiny layers, tracing, compiling."""
    shapes = TINY_SHAPES[:1] if config.quick else TINY_SHAPES
    for shape, which in bar(shapes, PASSES, about="dispatch: calls"):
        case = Case(shape, which=which)
        for row in time_programs("dispatch", case, programs_of(config, case), config):
            yield row._replace(quantity=f"{which}, a call", bandwidth=None, temporaries=None)
    over_jax = [name for name in config.libraries if peers.PEERS[name].layer]
    for shape in shapes:
        case = Case(shape, form="bn_relu")
        stages = {name: functools.partial(layer_stages, name, case) for name in over_jax}
        about = "x".join(map(str, shape)), "float32", "bn_relu"
        rounds = max(config.rounds // 3, 2)
        yield from time_stages(about, stages, rounds, rounds)
    yield from net_dispatch(config)


def net_dispatch(config: Config) -> Iterator[Row]:
    """Tracing and compiling the training step of a whole network."""
    network = Network("ResNet-50", models.ResNet50, 224, config.batch)
    if config.quick:
        network = Network("tiny ResNet", tiny_resnet, 32, config.batch)
    stages = {name: functools.partial(net_stages, name, network) for name in slots_of(config)}
    rounds = (2, 0) if config.quick else (9, 3)  # compiling ResNet-50 takes 20 seconds
    yield from time_stages(network.about(), stages, *rounds)


class Stages(NamedTuple):
    """Seconds of what happens before the first call."""

    trace: float  # Python runs, and the result is written as StableHLO
    compile: float | None


def layer_stages(name: str, case: Case, compile: bool) -> Stages:
    peer = peers.PEERS[name]
    assert peer.layer is not None
    with peer.setting():
        host = peers.data(case)
        layer = peer.layer(case, host)
        args = peers.arguments(layer, case, host)
        f = jax.jit(peers.function_of(layer, case.which))
        return time_both(lambda: f.trace(*args).lower(), compile)


def net_stages(name: str, network: Network, compile: bool) -> Stages:
    slot = SLOTS[name]
    with peers.PEERS[slot.peer].setting():
        return time_both(network.training(slot).lower, compile)


def time_both(lower: Callable[[], Any], compile: bool) -> Stages:
    """Tracing and compiling from nothing: JAX's caches are emptied, and garbage is collected."""
    jax.clear_caches()
    gc.collect()
    began = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    if not compile:
        return Stages(traced - began, None)
    lowered.compile()
    return Stages(traced - began, time.perf_counter() - traced)


def time_stages(
    about: tuple[str, str, str],
    stages: Mapping[str, Callable[[bool], Stages]],
    rounds: int,
    compiled: int,
) -> Iterator[Row]:
    """Rows of both stages: `rounds` of tracing, the last `compiled` of which compile as well.

    In one more round before these Python itself warms up.
    """
    found: dict[str, list[Stages]] = {name: [] for name in stages}
    for (number,) in bar(range(rounds + 1), about=f"dispatch: {about[0]}"):
        for name in timing.shuffled(stages, number):
            found[name].append(stages[name](number > rounds - compiled))
    for quantity, seconds_of in STAGES.items():
        measured = {name: map(seconds_of, values[1:]) for name, values in found.items()}
        seconds = {name: [s for s in values if s is not None] for name, values in measured.items()}
        samples = timing.Samples(seconds)
        for name in stages if all(seconds.values()) else ():
            yield Row("dispatch", *about, quantity, name, **times(samples, name))


STAGES: dict[str, Callable[[Stages], float | None]] = {
    "trace+lower": lambda s: s.trace,
    "compile": lambda s: s.compile,
    "trace+lower+compile": lambda s: None if s.compile is None else s.trace + s.compile,
}

PARTS = {"op": op, "step": step, "dispatch": dispatch, "inference": inference}
COMPILE = "compile"  # a part that `experiments.compiling` measures


# --- Command line --------------------------------------------------------------------------------


def bar(*axes: Any, about: str) -> Iterator[tuple[Any, ...]]:
    """All combinations, with a progress bar."""
    return iter(tqdm(list(itertools.product(*axes)), desc=about, file=sys.stderr, leave=False))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m experiments.speed",
        description="jbn's Batch Normalization beside Flax's, Haiku's, Equinox's and PyTorch's: "
        "times as ratios over flax.linen within interleaved rounds. Below 1 is faster.",
    )
    add = p.add_argument
    add(
        "--part",
        nargs="+",
        choices=(*PARTS, COMPILE),
        default=list(PARTS),
        help=f"what to measure; default: all but {COMPILE}, which is measured alone: what else is "
        "given goes to experiments.compiling",
    )
    add("--shapes", nargs="+", default=["some"], metavar="SHAPE",
        help="some (default), resnet50 (all of it, and the MLP's), or 32x56x56x64 ...")  # fmt: skip
    add("--batch", type=positive, default=32, metavar="N",
        help="images in resnet50's shapes and in training steps; default: 32")  # fmt: skip
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    add("--form", nargs="+", choices=FORMS, default=FORMS, help="default: all")
    add("--libraries", nargs="+", choices=peers.PEERS, metavar="NAME",
        help=f"of {', '.join(peers.PEERS)}; default: all that are installed")  # fmt: skip
    add("--rounds", type=positive, default=21, metavar="N", help="default: 21")
    add("--run", action="store_true", help="run ResNet-50's training steps on a CPU, too")
    add("--quick", action="store_true", help="two small shapes, one dtype and form, 3 rounds")
    add("--out", type=Path, default=Path("results/speed"), metavar="DIR",
        help="for speed.jsonl and speed.png; default: results/speed")  # fmt: skip
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    add("--update", type=Path, metavar="FILE", help="write jbn's mean ratios there")
    add("--check", type=Path, metavar="FILE",
        help="compare jbn's mean ratios with those; exit with 1 if one became worse")  # fmt: skip
    add("--tolerance", type=float, default=0.15, metavar="FRACTION",
        help="by how much a mean ratio may be worse; default: 0.15")  # fmt: skip
    add("--target", nargs="+", metavar="NAME",
        help="compile for h100, v5e, v5p, v6e ... instead, which need not be there; what else is "
        "given goes to experiments.targets, which has a --help of its own")  # fmt: skip
    return p


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def shapes_of(names: Sequence[str], batch: int) -> list[tuple[int, ...]]:
    """The shapes that arguments of ``--shapes`` stand for.

    Raises:
      ValueError: a name is none of "some" and "resnet50", nor numbers such as "32x56x56x64".
    """
    shapes: list[tuple[int, ...]] = []
    for name in names:
        if name == "some":
            shapes += SOME_SHAPES
        elif name == "resnet50":
            shapes += [(batch, *shape) for shape in RESNET50_SHAPES] + [MLP_SHAPE]
        else:
            sizes = name.split("x")
            if len(sizes) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
                raise ValueError(
                    f"--shapes {name} is not a shape. Expected some, resnet50, or sizes above 0 "
                    f"with the channels last, as in 32x56x56x64 or 256x128."
                )
            shapes.append(tuple(map(int, sizes)))
    for shape in shapes:
        if math.prod(shape[:-1]) < 2:
            raise ValueError(f"shape {shape} has one value a channel: there is no variance in it.")
    return shapes


def config_of(args: argparse.Namespace) -> Config:
    """The configuration that the command line asks for."""
    installed = peers.installed()
    libraries = args.libraries or list(installed)
    for name in libraries:
        if name not in installed:
            install = peers.PEERS[name].install or "another machine"
            raise ValueError(f"{name} cannot run here. It takes: {install}.")
    libraries = list(dict.fromkeys((BASELINE, *libraries)))  # all ratios are over the first
    if args.quick:
        shapes = ((8, 8, 8, 32), (256, 128))
        return Config(shapes, DTYPES[:1], ("bn_relu",), libraries, 3, 8, False, True)
    shapes = shapes_of(args.shapes, args.batch)
    return Config(shapes, args.dtype, args.form, libraries, args.rounds, args.batch, args.run)


def measure(parts: Sequence[str], config: Config, records: Records) -> list[Row]:
    """All rows; each is written as soon as it is there."""
    rows = []
    for part in parts:
        for row in PARTS[part](config):
            records.write("speed", **row._asdict())
            rows.append(row)
    return rows


def versions() -> dict[str, str]:
    """Of the libraries that are compared."""
    packages = ("jax", "flax", "dm-haiku", "equinox", "torch")
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {name: found[name] for name in packages if name in found}


NOTE = (
    f"Ratios over {BASELINE}, of times if nothing else is said: median (quartiles). "
    f"Of copy, bytes/element, temporaries: jbn : {BASELINE}."
)


def report(rows: Sequence[Row], args: argparse.Namespace, about: str) -> None:
    """Tables in the terminal and in Markdown; the figure."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    tables = list(speed_report.tables(rows))
    for table in tables:
        console.print(speed_report.terminal_table(table))
    console.print(NOTE, markup=False)
    if args.markdown:
        text = "\n".join(map(speed_report.markdown_table, tables))
        args.markdown.write_text(f"{about} {NOTE}\n\n{text}", encoding="utf-8")
    from experiments import figures  # matplotlib takes a second to import

    if any(row.part == "op" and row.library != BASELINE for row in rows):
        figures.speed(args.out / "speed.png", rows)
        print(f"figure:  {args.out / 'speed.png'}")
    print(f"numbers: {args.out / 'speed.jsonl'}")


def check_files(*paths: Path | None) -> None:
    """Whether results can be written there, before they are measured.

    Raises:
      OSError: they cannot.
    """
    for path in paths:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8"):
                pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line, or from Python with arguments; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if COMPILE in argv or f"--part={COMPILE}" in argv:
        from experiments import compiling  # which imports this file

        compiling.main(argv)
        return 0
    if any(argument.split("=")[0] == "--target" for argument in argv):
        from experiments import targets  # which imports this file

        targets.main(argv)
        return 0
    args = parser().parse_args(argv)
    try:
        config = config_of(args)
        device = jax.devices()[0].device_kind
        measured = {
            "device": device,
            "batch": config.batch,
            "shapes": list(map(list, config.shapes)),
        }
        then = speed_report.read_baseline(args.check, measured) if args.check else {}
        check_files(args.markdown, args.update)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for name, install in peers.missing().items():
        print(f"without {name}: {install}", file=sys.stderr)
    command = shlex.join(["python", "-m", "experiments.speed", *argv])
    with Records(args.out / "speed.jsonl", command=command, versions=versions()) as records:
        rows = measure(args.part, config, records)
    listed = ", ".join(f"{name} {version}" for name, version in versions().items())
    report(rows, args, f"`{command}` on {device}, with {listed}.")
    if args.update:
        speed_report.write_baseline(
            args.update, rows, command=command, versions=versions(), measured=measured
        )
    if not args.check:
        return 0
    try:
        status, said = speed_report.check(args.check, then, rows, args.tolerance)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
