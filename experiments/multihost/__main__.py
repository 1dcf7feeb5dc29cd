"""Do several processes, as on a cluster, compute what one process does?

A small network with Batch Normalization learns to read digits. The batch is spread over all devices
of all processes; statistics and gradients are those of the whole batch. So all processes must end
with the same parameters and running statistics, bit for bit. One process with as many devices must
end with the same, up to the order of its sums.

On this machine, as a small cluster (virtual CPU devices, nothing to download)::

    python -m experiments.multihost                                 # 2 processes x 2 devices
    python -m experiments.multihost --processes 4 --devices 1

Expected: accuracy on the training batches rises from chance to about 0.9 in 40 steps; "the
processes agree"; they differ from one process by about 1e-6. It takes half a minute on two CPU
cores.

On a real cluster, the same command once on every machine::

    python -m experiments.multihost --coordinator HOST:PORT --num-processes 8 --process-id 0...7
    python -m experiments.multihost --auto      # SLURM, Open MPI, TPU pods, GKE: JAX finds out

HOST:PORT is a free port of the machine that runs process 0; the other machines must reach it. Your
own program needs three things: ``jax.distributed.initialize``; a mesh of ``jax.devices()``, which
are then those of all machines; and batches of which every process makes its own part (``spread``).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType

from experiments.common import cluster
from experiments.multihost.processes import largest_difference, launch, read
from experiments.multihost.training import AXIS, BATCH, MODES, fingerprint, train


def work(args: argparse.Namespace) -> None:
    """Trains as one process of several, and saves the final state."""
    if args.out is not None and not args.out.is_dir():
        sys.exit(f"--out {args.out} is no folder: make it first.")
    cluster.join(args)
    i, n = jax.process_index(), jax.process_count()
    print(f"process {i} of {n}: {jax.local_device_count()} of {jax.device_count()} devices")
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), (AxisType.Auto,))
    for mode in MODES:
        state = train(mesh, mode, args.steps, quiet=i != 0)
        print(f"process {i}, {mode}: parameters and statistics {fingerprint(state)}", flush=True)
        if args.out is not None:
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            np.savez(args.out / f"{mode}-{i}.npz", *leaves)


def compare(args: argparse.Namespace) -> int:
    """Compares the final states of several processes here, and of one with as many devices."""
    with tempfile.TemporaryDirectory() as directory:
        several, one = Path(directory, "several"), Path(directory, "one")
        several.mkdir()
        one.mkdir()
        print(f"{args.processes} processes of {args.devices} devices each")
        print("".join(launch(args.processes, args.devices, args.steps, several)), end="")
        print(f"one process of {args.processes * args.devices} devices")
        print("".join(launch(1, args.processes * args.devices, args.steps, one)), end="")
        agree = True
        for mode in MODES:
            ends = [read(several, mode, i) for i in range(args.processes)]
            equal = all(
                np.array_equal(x, y) for end in ends for x, y in zip(end, ends[0], strict=True)
            )
            difference = largest_difference(ends[0], read(one, mode, 0))
            agree &= equal and difference < 1e-3
            print(
                f"{mode}: the processes {'agree' if equal else 'DIFFER'} bit for bit; "
                f"from one process they differ by {difference:.1e}"
            )
    return 0 if agree else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.multihost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=40, help="training steps (40)")
    here = parser.add_argument_group("start processes on this machine")
    here.add_argument("--processes", type=int, default=2, help="how many (2)")
    here.add_argument("--devices", type=int, default=2, help="virtual CPU devices of each (2)")
    several = parser.add_argument_group("be one process of several")
    cluster.add_options(several)
    several.add_argument("--out", type=Path, help="save the final state in this folder")
    args = parser.parse_args(argv)
    cluster.check(parser, args)
    if BATCH % (2 * args.processes * args.devices):
        parser.error(f"processes x devices must divide {BATCH // 2}, half of the batch")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.auto or args.coordinator is not None:
        work(args)
        return 0
    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
