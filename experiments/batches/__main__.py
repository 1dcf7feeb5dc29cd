"""Which normalisation trains with few images that share statistics, and with sorted images?

Every step of a small ResNet on CIFAR-10 has 32 images, which come in parts of b = 2, 4, 8 or 32, as
from 32 / b devices. Steps, images and optimiser are the same; only the normalisation differs:

- ``none``: scale and bias only. ``group``, ``layer``: Flax's, which look at one image at a time.
- ``batch``: each part has statistics of its own, and its own running averages; their mean serves
  inference. It is what devices compute that know nothing of each other.
- ``ghost``: the same training, by ``groups=``; running averages of the whole step.
- ``renorm``: Batch Renormalization, whose parts are those of ghost.
- ``synchronised``: statistics of all 32. With b = 32 batch and ghost are the same.

The images come in three orders: ``iid``, at random; ``sorted parts``, four classes a step of eight
images each, so that a part of up to eight images has one class; ``sorted steps``, one class a step.

Claim: with random images BN is no better than no normalisation where 2 images share, better than
Group Norm from 4 on, and best at 32; Renorm helps with 2. In parts of one class BN learns to use
what a part says about its class, which inference does not have; Group and Layer Norm do not.

Command::

    python -m experiments.batches --data-dir DIR     # CIFAR-10 in DIR
    python -m experiments.batches --download         # fetches it first, 170 MB
    python -m experiments.batches --smoke            # seconds, on made-up images: does it run?

Expected test accuracy with random images: BN 52, 55, 57 and 59 % for b = 2, 4, 8 and 32, Group Norm
53 %. In sorted parts of 2 to 8: BN 12 to 14 %, Renorm 20 to 33 %, Group Norm 54 %. It takes forty
minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.batches import figures
from experiments.batches.cases import (
    ORDERS,
    STEP,
    Case,
    Config,
    cases,
    tuned_as,
    tuning_cases,
)
from experiments.batches.judging import measure
from experiments.batches.report import summaries, table
from experiments.batches.training import train
from experiments.common.command import as_typed, at_least_one
from experiments.common.records import Records
from experiments.images.options import add_image_options, check_image_options, load
from experiments.images.photos import Photos, half_size

# --- Results ------------------------------------------------------------------------------------


def batches(config: Config, photos: Photos, path: Path, about: dict[str, str]) -> None:
    """Chooses rates; trains and judges every case; writes numbers and figure; prints a table.

    An interrupt (Ctrl-C) ends the training; the finished runs are summarised.
    """
    numbers, rows = path.with_suffix(".jsonl"), []
    todo = list(cases(config))
    with Records(numbers, **about, **config._asdict()) as records:
        rates = chosen_rates(config, photos, records)
        records.write("rates", **rates)
        try:
            for case in todo:
                rows.append(run(config, photos, case, rates[tuned_as(case.norm)]))
                records.write("run", **rows[-1])
                print(f"run {len(rows)} of {len(todo)}: {brief(rows[-1])}", file=sys.stderr)
        except KeyboardInterrupt:
            print(f"interrupted after {len(rows)} of {len(todo)} runs")
        results = summaries(rows)
        for result in results:
            records.write("summary", **result)
    print(table(results))
    figures.batches(path, results)
    print(f"figure:  {path}\nnumbers: {numbers}")


def chosen_rates(config: Config, photos: Photos, records: Records) -> dict[str, float]:
    """Returns the learning rate of each normalisation: the best on held-out training images.

    The runs that choose are as long as the others. Where there is one rate, there is no choice.
    """
    if len(config.rates) == 1:
        return {case.norm: config.rates[0] for case in tuning_cases(config)}
    held_out = config.judged * STEP
    shuffled = np.random.default_rng(0).permutation(len(photos.train_labels))
    rates = {}
    for case in tuning_cases(config):
        accuracies = {}
        for rate in config.rates:
            variables, last_loss = train(
                config, case, rate, photos.train_images, photos.train_labels, shuffled[held_out:]
            )
            unseen = shuffled[:held_out]
            images, labels = photos.train_images[unseen], photos.train_labels[unseen]
            measured = measure(config, case, variables, images, labels)
            row = {**case._asdict(), "rate": rate, **measured, "last_loss": last_loss}
            records.write("tuning", **row)
            print(f"rate {rate}: {brief(row)}", file=sys.stderr)
            accuracies[rate] = measured["inference_accuracy"]
        rates[case.norm] = max(accuracies, key=lambda rate: accuracies[rate])
    return rates


def run(config: Config, photos: Photos, case: Case, rate: float) -> dict[str, Any]:
    """Trains one network and judges it; returns a JSON line."""
    began = time.perf_counter()
    variables, last_loss = train(config, case, rate, photos.train_images, photos.train_labels)
    measured = measure(config, case, variables, photos.test_images, photos.test_labels)
    seconds = time.perf_counter() - began
    row = {**case._asdict(), "rate": rate, **measured, "last_loss": last_loss}
    return {**row, "seconds": seconds}


def brief(row: Mapping[str, Any]) -> str:
    """Formats a run for the terminal."""
    inference, training = row["inference_accuracy"], row["training_accuracy"]
    name = f"{row['norm']}, parts of {row['part']}, {row['order']}, seed {row['seed']}"
    return f"{name}: {inference:.1%} in inference, {training:.1%} as in training"


# --- Command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Makes the parser; photographs are the only thing without a default."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.batches",
        description="A small ResNet on CIFAR-10 in small and in sorted batches, normalised in "
        "seven ways. Writes a figure and every result as JSON lines.",
    )
    add = p.add_argument_group("what to run").add_argument
    add("--out", type=Path, default=Path("results/batches"), metavar="DIR",
        help="folder for the figure and the numbers (default: %(default)s)")  # fmt: skip
    add("--tag", metavar="WORD", help="call the files batches-WORD.png and so on")
    add_image_options(p.add_argument_group("images, one of"))
    add_training_options(p.add_argument_group("training"))
    return p


def add_training_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options that all runs share."""
    config, add = Config(), group.add_argument
    add("--orders", choices=tuple(ORDERS), nargs="+",
        help="of the images (default: all)")  # fmt: skip
    add("--seeds", type=int, nargs="+", metavar="N",
        help=f"one run each (default: {' '.join(map(str, config.seeds))})")  # fmt: skip
    add("--steps", type=at_least_one, metavar="N",
        help=f"of a run (default: {config.steps})")  # fmt: skip
    add("--rates", type=float, nargs="+", metavar="X",
        help="learning rates that each normalisation chooses from (default: "
        f"{' '.join(map(str, config.rates))}); one needs no choice")  # fmt: skip


def configure(args: argparse.Namespace) -> Config:
    """Returns the configuration: the options given, the defaults, and less for a smoke test."""
    config = Config()
    if args.smoke:
        config = Config(parts=(2, 32), seeds=(0,), steps=2, judged=2, rates=(0.1, 0.03),
                        tuned_part=2, widths=(8,))  # fmt: skip
    given = {name: getattr(args, name) for name in ("orders", "seeds", "steps", "rates")}
    # Without repetitions, in the order given.
    given = {name: tuple(dict.fromkeys(v)) if isinstance(v, list) else v
             for name, v in given.items()}  # fmt: skip
    return config._replace(**{name: value for name, value in given.items() if value is not None})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment with `argv`, or with the arguments of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = (options := parser()).parse_args(argv)
    check_image_options(options, args)
    try:
        photos, source = load(args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    photos = photos._replace(
        train_images=half_size(photos.train_images), test_images=half_size(photos.test_images)
    )
    sizes = f"{len(photos.train_images)} to train, {len(photos.test_images)} to test"
    about = {
        "command": as_typed("batches", argv, args.data_dir),
        "images_from": f"{source}, {sizes}, 16 x 16 pixels",
    }
    print(about["images_from"])
    path = args.out / f"batches{'-' + args.tag if args.tag else ''}.png"
    batches(configure(args), photos, path, about)


if __name__ == "__main__":
    main()
