"""How fast is Batch Normalization? jbn beside Flax, Haiku, Equinox and PyTorch, on this machine.

All libraries take turns in one process (`experiments.common.timing`), and do the same mathematics
on the same numbers (`experiments.nets.layers`). The results are ratios of times over flax.linen
within a round, with their quartiles: 0.50 is half of flax.linen's time. Parts (``--part``):

op         one layer, forward and forward+backward: BN, BN+ReLU, BN+add+ReLU; float32 and bfloat16
step       whole training steps: a small ResNet on random images of CIFAR-10's shape; ResNet-50's
           compilation and memory, and with ``--run`` or on an accelerator its time, too
dispatch   tiny layers: a call, tracing and lowering, compiling; tracing and lowering ResNet-50
inference  one layer with the running statistics, and folded into y = a x + b
compile    tracing, lowering and compiling of small models; only if asked for, and alone, as it has
           arguments of its own (`experiments.speed.compiling`)

**Of copy.** A layer moves memory, so its floor is a copy of x, measured in the same rounds. The
useful bytes, counted in elements of x, are: forward 3 (x twice, once for the statistics, and y),
backward 5 (x and dy twice, and dx), hence forward+backward 8. With a residual r the forward pass
reads it, too (4); the backward pass (7) reads x, dy and y for the two sums, writes dr, reads x and
dr again, and writes dx: 11 together. Inference takes 2, with a residual 3; a copy takes 2. "Of
copy" is useful bytes a second over those of the copy. A layer that keeps x in a cache between its
two reads can exceed 100 %. **Bytes/element** is XLA's own count of the bytes that the compiled
program accesses, if there is one.

Command::

    pip install -e '.[experiments,peers]'
    python -m jbn.native                 # optional: jbn's C++ sums, for the row "jbn native"
    python -m experiments.speed          # a quarter of an hour on two CPU cores
    python -m experiments.speed --quick  # about a minute: does everything run?
    python -m experiments.speed --part op --update FILE    # write jbn's ratios down, and later
    python -m experiments.speed --part op --check FILE     # exit with 1 if they have become worse
    python -m experiments.speed --target h100 v5e          # compile only, without the hardware

The same commands run on CPUs, GPUs and TPUs: on JAX's default device, or on the CPU if
JAX_PLATFORMS=cpu stands before them. On Linux the process starts itself again with environment
variables for glibc and OpenMP (`timing.ENVIRONMENT` says why).
"""

from __future__ import annotations

import sys

from experiments.common import timing

if __name__ == "__main__":
    timing.restart_with_environment("experiments.speed", sys.argv[1:])

import argparse
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
from rich.console import Console

from experiments.common.command import as_typed, at_least_one
from experiments.common.records import Records
from experiments.nets.layers import BASELINE, FORMS
from experiments.speed import compiling, peers
from experiments.speed import report as speed_report
from experiments.speed.cases import DTYPES, Config, shapes_of
from experiments.speed.dispatch import dispatch
from experiments.speed.report import Row
from experiments.speed.single_layer import inference, op
from experiments.speed.training_steps import step

PARTS = {"op": op, "step": step, "dispatch": dispatch, "inference": inference}
COMPILE = "compile"  # a part that `compiling` measures


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
        "given goes to experiments.speed.compiling",
    )
    add("--shapes", nargs="+", default=["some"], metavar="SHAPE",
        help="some (default), resnet50 (all of it, and the MLP's), or 32x56x56x64 ...")  # fmt: skip
    add("--batch", type=at_least_one, default=32, metavar="N",
        help="images in resnet50's shapes and in training steps; default: 32")  # fmt: skip
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    add("--form", nargs="+", choices=FORMS, default=FORMS, help="default: all")
    add("--libraries", nargs="+", choices=peers.PEERS, metavar="NAME",
        help=f"of {', '.join(peers.PEERS)}; default: all that are installed")  # fmt: skip
    add("--rounds", type=at_least_one, default=21, metavar="N", help="default: 21")
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


def config_of(args: argparse.Namespace) -> Config:
    """Returns the configuration that the command line asks for."""
    installed = peers.installed()
    libraries = args.libraries or list(installed)
    for name in libraries:
        if name not in installed:
            install = peers.PEERS[name].install or "another machine"
            raise ValueError(f"{name} cannot run here. It takes: {install}.")
    libraries = list(dict.fromkeys((BASELINE, *libraries)))  # all ratios are over the baseline
    if args.quick:
        shapes = ((8, 8, 8, 32), (256, 128))
        return Config(shapes, DTYPES[:1], ("bn_relu",), libraries, 3, 8, False, True)
    shapes = shapes_of(args.shapes, args.batch)
    return Config(shapes, args.dtype, args.form, libraries, args.rounds, args.batch, args.run)


def measure(parts: Sequence[str], config: Config, records: Records) -> list[Row]:
    """Measures all rows, and writes each as soon as it is there."""
    rows = []
    for part in parts:
        for row in PARTS[part](config):
            records.write("speed", **row._asdict())
            rows.append(row)
    return rows


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that are compared."""
    packages = ("jax", "flax", "dm-haiku", "equinox", "torch")
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {name: found[name] for name in packages if name in found}


NOTE = (
    f"Ratios over {BASELINE}, of times if nothing else is said: median (quartiles). "
    f"Of copy, bytes/element, temporaries: jbn : {BASELINE}."
)


def report(rows: Sequence[Row], args: argparse.Namespace, about: str) -> None:
    """Writes tables in the terminal and in Markdown, and the figure."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    tables = list(speed_report.tables(rows))
    for table in tables:
        console.print(speed_report.terminal_table(table))
    console.print(NOTE, markup=False)
    if args.markdown:
        text = "\n".join(map(speed_report.markdown_table, tables))
        args.markdown.write_text(f"{about} {NOTE}\n\n{text}", encoding="utf-8")
    from experiments.speed import figures  # matplotlib takes a second to import

    if any(row.part == "op" and row.library != BASELINE for row in rows):
        figures.speed(args.out / "speed.png", rows)
        print(f"figure:  {args.out / 'speed.png'}")
    print(f"numbers: {args.out / 'speed.jsonl'}")


def check_files(*paths: Path | None) -> None:
    """Checks, before anything is measured, that results can be written to these files.

    Raises:
      OSError: one of them cannot be written.
    """
    for path in paths:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8"):
                pass


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment with `argv`, or with the command line's; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if COMPILE in argv or f"--part={COMPILE}" in argv:
        compiling.main(argv)
        return 0
    if any(argument.split("=")[0] == "--target" for argument in argv):
        from experiments.targets import command as targets

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
    command = as_typed("speed", argv)
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
