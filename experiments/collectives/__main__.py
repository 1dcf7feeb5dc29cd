"""How much do devices communicate? Collectives and bytes a layer, from XLA's own compiler.

The program compiles a network of three layers, relu(batch_norm(x w)) with 64, 128 and 256 channels,
for a mesh of devices that need not be there, and reads the collectives out of the result.

Claim: in every mode a layer needs one collective forward and one backward, with or without a mask;
ghost batches (statistics of groups that are on one device each) and inference need none.

Command::

    python -m experiments.collectives                       # eight virtual CPU devices
    python -m experiments.collectives --target v5e:16x16    # 256 TPUs; needs pip install libtpu

Expected: see docs/collectives.md, which ``--markdown`` and ``--json`` write. A target takes about a
minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.collectives.programs import MODES, PER_DEVICE, STATISTICS, WIDTHS, applies
from experiments.collectives.reading import measure, to_json
from experiments.collectives.table import table
from experiments.common.command import as_typed
from experiments.common.compilers import prepare, tpus, version
from experiments.common.records import Records

CPU_DEVICES = 8


def target_devices(target: str) -> Sequence[Any]:
    """Returns the devices of "cpu", or of a TPU pod such as "v5e:16x16"."""
    return jax.devices("cpu")[:CPU_DEVICES] if target == "cpu" else tpus(target)


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
    """Runs the experiment with `argv`, or with the arguments of the command line."""
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
        command = as_typed("collectives", argv)
        about = {"command": command, "libtpu": versions["libtpu"], "widths": WIDTHS}
        with Records(args.json, **about, per_device=PER_DEVICE) as records:
            for row in rows:
                records.write("collectives", **to_json(row))


if __name__ == "__main__":
    main()
