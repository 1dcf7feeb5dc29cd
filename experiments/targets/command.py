"""The command line of `experiments.targets`, which ``experiments.speed --target`` uses, too."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from experiments.common.command import as_typed, at_least_one
from experiments.common.compilers import NAMES, device, prepare, version
from experiments.common.records import Records
from experiments.targets.programs import BATCH, DTYPES, SHAPES, Program, op, step
from experiments.targets.reading import Row, measure
from experiments.targets.table import table


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m experiments.targets",
        description="Kernels, bytes moved and temporaries of jbn beside flax.linen, in programs "
        "that XLA compiles for devices which need not be there.",
    )
    add = p.add_argument
    add("--target", nargs="+", choices=NAMES, default=["cpu"], metavar="NAME",
        help=f"any of {', '.join(NAMES)}; default: cpu")  # fmt: skip
    add("--part", nargs="+", choices=("op", "step"), default=["op", "step"], help="default: both")
    add("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE",
        help="default: both for op, bfloat16 for step")  # fmt: skip
    add("--batch", type=at_least_one, default=BATCH, metavar="N", help=f"images; default: {BATCH}")
    add("--library", nargs="+", metavar="NAME", help="rows of these names only, such as jbn")
    add("--quick", action="store_true", help="one shape, and one block of the network")
    add("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    add("--json", type=Path, metavar="FILE", help="write JSON lines there, one a row")
    return p


def programs(args: argparse.Namespace) -> list[Program]:
    """Lists the programs that the command line asks for."""
    found: list[Program] = []
    if "op" in args.part:
        shapes = SHAPES[-1:] if args.quick else SHAPES
        found += op(args.batch, shapes, args.dtype or DTYPES)
    if "step" in args.part:
        found += step(args.batch, args.dtype or DTYPES[:1], args.quick)
    names = {p.library for p in found}
    for name in args.library or ():
        if name not in names:
            sys.exit(f"error: --library {name}: expected some of {', '.join(sorted(names))}.")
    return [p for p in found if not args.library or p.library in args.library]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs the experiment with `argv`, or with the command line's arguments; returns the rows."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    prepare()
    try:
        devices = {name: device(name) for name in args.target}
    except ImportError as error:
        sys.exit(f"error: {error}")
    cases = [(name, program) for name in devices for program in programs(args)]
    versions = {name: version(name) for name in ("jax", "libtpu", "jax-cuda12-plugin")}
    rows = []
    with contextlib.ExitStack() as files:
        records = None
        if args.json:
            command = as_typed("targets", argv)
            records = files.enter_context(Records(args.json, command=command, compilers=versions))
        for name, program in tqdm(cases, desc="compiling", file=sys.stderr, leave=False):
            rows.append(measure(name, devices[name], program))
            if records:
                records.write("target", **rows[-1]._asdict())
    print(table(rows), end="")
    if args.markdown:
        compilers = ", ".join(f"{package} {v}" for package, v in versions.items() if v)
        args.markdown.write_text(f"Compiled with {compilers}.\n\n{table(rows)}", encoding="utf-8")
    return rows
