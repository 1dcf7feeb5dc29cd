"""Must devices that have few images each share their batch statistics?

Data parallel training gives every device a small batch of its own. Here a small ResNet trains on
CIFAR-10 with 2 images a device, on 1, 2, 4 and 8 devices, normalised in three ways:

- ``local``: every device uses the moments of its own 2 images, without communication.
- ``ghost``: pairs of devices share moments; ``groups=`` of the global batch, under ``jit``.
- ``synchronised``: all devices share moments; ``axis_name=``, under ``shard_map``.

Claim: with local statistics more devices do not help, however large their global batch is. With
shared statistics accuracy rises with the number of images that share them. So does the fraction of
images to which training and inference give the same class.

Command::

    python -m experiments.scaling --data-dir DIR     # CIFAR-10 in DIR
    python -m experiments.scaling --download         # fetches it first, 170 MB
    python -m experiments.scaling --smoke            # seconds, on made-up images: does it run?

Expected test accuracy after 16,000 images: 38 % on one device; on eight 39 % with local statistics,
42 % with ghost batches of 4 images and 46 % with synchronised statistics. It takes 20 minutes on
two CPU cores.

The devices are virtual, shares of one CPU: they compute the same as real ones, only slower.

All runs of a seed have the same initial parameters, images in the same order, number of images
(each at most once an epoch), SGD with momentum 0.9 and a cosine schedule, a learning rate
proportional to the images a step (Goyal et al., arXiv 1706.02677), and running averages over the
last 2,000 images. So runs on equally many devices differ in nothing but the statistics.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import cluster
from experiments.common.command import as_typed, at_least_one
from experiments.common.records import Records
from experiments.images.options import add_image_options, check_image_options, load
from experiments.images.photos import Photos
from experiments.scaling import figures
from experiments.scaling.cases import Case, Config, cases
from experiments.scaling.judging import measure
from experiments.scaling.report import summaries, table
from experiments.scaling.training import train

# --- Results ------------------------------------------------------------------------------------


def scaling(config: Config, photos: Photos, path: Path, about: dict[str, str]) -> None:
    """Trains and judges every case; writes numbers and figure; prints a table.

    An interrupt (Ctrl-C) ends the training; the finished runs are summarised.
    """
    numbers, rows = path.with_suffix(".jsonl"), []
    todo = list(cases(config))
    with Records(numbers, **about, **config._asdict()) as records:
        try:
            for case in todo:
                print(f"run {len(rows) + 1} of {len(todo)}", file=sys.stderr)
                rows.append(run(config, photos, case))
                records.write("run", **rows[-1])
        except KeyboardInterrupt:
            print(f"interrupted after {len(rows)} of {len(todo)} runs")
        results = summaries(config, rows)
        for result in results:
            records.write("summary", **result)
    print(table(results))
    figures.scaling(path, results)
    print(f"figure:  {path}\nnumbers: {numbers}")


def run(config: Config, photos: Photos, case: Case) -> dict[str, Any]:
    """Trains one network and judges it; returns a JSON line."""
    began = time.perf_counter()
    variables, last_loss = train(config, photos, case)
    measured = measure(config, photos, case, variables)
    seconds = time.perf_counter() - began
    return {**case._asdict(), **measured, "last_loss": last_loss, "seconds": seconds}


# --- Command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Makes the parser; photographs are the only thing without a default."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.scaling",
        description="A small ResNet on CIFAR-10 with few images a device, on 1 to 8 devices, with "
        "local, ghost and synchronised batch statistics. Writes a figure and every result as JSON "
        "lines. The devices are virtual: shares of this machine's CPU.",
    )
    add_run_options(p.add_argument_group("what to run"))
    add_image_options(p.add_argument_group("images, one of"))
    add_training_options(p.add_argument_group("training"))
    return p


def add_run_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of the results."""
    add = group.add_argument
    add("--out", type=Path, default=Path("results/scaling"), metavar="DIR",
        help="folder for the figure and the numbers (default: %(default)s)")  # fmt: skip
    add("--tag", metavar="WORD", help="call the files scaling-WORD.png and so on")


def add_training_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options that all runs share."""
    config, add = Config(), group.add_argument
    add("--devices", type=at_least_one, nargs="+", metavar="N",
        help=f"numbers of devices (default: {' '.join(map(str, config.devices))})")  # fmt: skip
    add("--per-device", type=at_least_one, metavar="N",
        help=f"images a device and step (default: {config.per_device})")  # fmt: skip
    add("--images", type=at_least_one, metavar="N",
        help=f"that a run trains on, up to whole steps (default: {config.images})")  # fmt: skip
    add("--seeds", type=int, nargs="+", metavar="N",
        help=f"one run each (default: {' '.join(map(str, config.seeds))})")  # fmt: skip
    add("--learning-rate", type=float, metavar="X",
        help="at 16 images a step, proportionally more or less at others "
        f"(default: {config.learning_rate})")  # fmt: skip


def configure(args: argparse.Namespace) -> Config:
    """Returns the configuration: the options given, the defaults, and less for a smoke test."""
    config = Config()
    if args.smoke:
        config = Config(devices=(4,), seeds=(0,), images=1_600, window=128, every=400, judged=320,
                        widths=(8,), stem_stride=4)  # fmt: skip
    given = {name: getattr(args, name) for name in ("per_device", "images", "learning_rate")}
    given |= {name: args_tuple(getattr(args, name)) for name in ("devices", "seeds")}
    config = config._replace(**{name: value for name, value in given.items() if value is not None})
    # Whole steps for every number of devices, and chunks of one length: one compilation a case.
    whole = config.per_device * int(np.lcm.reduce(config.devices))
    every = -(-min(config.every, config.images) // whole) * whole
    return config._replace(every=every, images=-(-config.images // every) * every)


def args_tuple(values: list[int] | None) -> tuple[int, ...] | None:
    """Removes repetitions; keeps the order."""
    return None if values is None else tuple(dict.fromkeys(values))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment with `argv`, or with the arguments of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = (options := parser()).parse_args(argv)
    check_image_options(options, args)
    config = configure(args)
    cluster.virtual_devices(max(config.devices))
    try:
        photos, source = load(args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    sizes = f"{len(photos.train_images)} to train, {len(photos.test_images)} to test"
    about = {
        "command": as_typed("scaling", argv, args.data_dir),
        "images_from": f"{source}, {sizes}",
    }
    print(about["images_from"])
    scaling(config, photos, args.out / f"scaling{'-' + args.tag if args.tag else ''}.png", about)


if __name__ == "__main__":
    main()
