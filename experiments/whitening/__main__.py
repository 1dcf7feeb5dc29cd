"""How much does it cost to whiten features jointly, and which statistics serve inference best?

Parts (``--part``):

cost   one layer, forward and backward: operations and time against the number of features and the
       size of the groups, beside `jbn.batch_norm`, which whitens each feature by itself
state  errors at inference by the mean covariance of the batches, and by their mean whitening matrix

Claim: whitening groups of s features takes about 10 s operations an element; the mean covariance
serves inference better than the mean matrix, most of all for small batches.

Command::

    python -m experiments.whitening                  # both, about a minute on two CPU cores
    python -m experiments.whitening --part cost
    python -m experiments.whitening --smoke          # seconds: does it run?

Expected: the tables in docs/guide/whitening.md.
"""

from __future__ import annotations

import os
import sys

from experiments.common import timing

if __name__ == "__main__":
    # Eigenvalues come from SciPy's OpenBLAS, whose threads wait for each other: if other programs
    # run as well, 128 features take 136 ms with two threads and 1.2 ms with one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    timing.restart_with_environment("experiments.whitening", sys.argv[1:])

import argparse
from collections.abc import Sequence

from experiments.common.command import at_least_one
from experiments.whitening import cost, state

PARTS = ("cost", "state")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m experiments.whitening",
        description="Cost of whitening layers, and errors of their running statistics.",
    )
    add = p.add_argument
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--rounds", type=at_least_one, default=7, help="rounds of times (default 7)")
    add("--smoke", action="store_true", help="little data: does it run?")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the parts with `argv`, or with the arguments of the command line."""
    args = parser().parse_args(argv)
    if "cost" in args.part:
        widths, sizes = ((32,), {"positions": 64}) if args.smoke else (cost.WIDTHS, {})
        rounds = 1 if args.smoke else args.rounds
        print(cost.table([row for c in widths for row in cost.measure(c, rounds, **sizes)]))
    if "state" in args.part:
        batches, size = ((8,), {"seeds": 1, "steps": 200}) if args.smoke else (state.BATCHES, {})
        rows = [state.measure(drift, n, **size) for drift in state.DRIFTS for n in batches]
        print(state.table(rows))


if __name__ == "__main__":
    main()
