"""How many steps does Batch Normalization save a deep network, and what else does it make possible?

Figures 2 and 3 of Ioffe & Szegedy (2015, arXiv 1502.03167): an Inception network of 34 convolution
layers, with and without Batch Normalization, at the learning rate that suits the plain network and
at 5 and 30 times that, with ReLUs and with sigmoids. The claims: the normalised network reaches the
plain one's best accuracy in 7 % of its steps; it trains at rates where the plain one diverges; it
needs no Dropout; and it trains with sigmoids, where the plain one stays at chance.

On CIFAR-10, the same modules an eighth as wide, on a laptop::

    python -m experiments.inception search --data-dir DIR         # the baseline's best rate
    python -m experiments.inception --data-dir DIR --jobs 2       # the table, three seeds
    python -m experiments.inception BN-x5 --data-dir DIR          # one row of it
    python -m experiments.inception remarks ensemble band --data-dir DIR --jobs 2
    python -m experiments.inception report                        # tables and figures of all runs
    python -m experiments.inception BN-x5 --dataset smoke         # seconds: does it run?

The same command continues a run that was stopped, and does not repeat one that has ended. CIFAR-10
comes as folders of images, ``train/CLASS/*`` and ``test/CLASS/*``, or as its binary files.

Expected there (docs/experiments/inception.md has all numbers): best accuracies 61.2 % without Batch
Normalization and 64.8 % with it, which reaches the former after 55 % of the steps; BN-x5 52.7 % and
BN-x5-Sigmoid 58.9 % in a fifth of the steps; Inception-Sigmoid, Inception-x5 and BN-x30 at chance.
The paper's 7 % is not reached. The table takes about 80 minutes on two CPU cores, with three seeds
and ``--jobs 2``.

On ImageNet, ``train/WNID/*.JPEG`` and ``val/WNID/*.JPEG``, as in the paper::

    python -m experiments.inception BN-x30 --data-dir DIR --dataset imagenet --workers 32 --auto

once on every machine of a cluster. Expected there, from the paper (Figures 3 and 4, single crop):
Inception 72.2 % after 31 million steps of 32 images; BN-Baseline the same after 13.3 million and
72.7 % at best; BN-x5 after 2.1 million and 73.0 %; BN-x30 after 2.7 million and 74.8 % after 6
million; BN-x5-Sigmoid 69.8 %. Errors (top-5): 25.2 % (7.82 %) with one crop, 21.99 % (5.82 %) with
144, six networks together 20.1 % (4.9 %).

Cost: an image takes 1.95 billion multiplications forward, and three times that with the backward
pass. So a step of 32 images takes 374 GFLOP, and the 6 million steps of BN-x30 take 2.2e18 FLOP.
That is eight hours at 80 TFLOP/s over all devices, if 6,700 images a second are read: 16 processor
cores at 2.6 ms an image. Inception's 31 million steps cost five times as much. These numbers are
computed from the paper's, and not measured with this program.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.common import cluster
from experiments.common.command import NO_IMAGES, as_typed
from experiments.inception import report as inception_report
from experiments.inception import training as inception_train
from experiments.inception.jobs import deal, spawn
from experiments.inception.recipes import ENSEMBLE, INITS, RATES, RECIPES, REMARKS, SCALES, TABLE
from experiments.inception.runs import STATISTICS, Options, Run, load, results_of
from experiments.nets import bn_inception

ROWS = tuple(row.name for row in bn_inception.BN_INCEPTION)
SEARCH = (0.003, 0.01, 0.03, 0.1)  # first learning rates of the baseline
GROUPS = {
    "table": TABLE, "remarks": REMARKS, "init": INITS, "ensemble": ENSEMBLE, "band": RATES
}  # fmt: skip
# Fields of a scale that an option may change.
SIZES = "rate", "steps", "width", "modules", "repeat", "size", "batch", "evaluations"
ACTIONS = ("search", *GROUPS, "report")


def runs(args: argparse.Namespace) -> list[Run]:
    """Lists the runs that were asked for: all recipes with the first seed, then the next seed."""
    given = {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    if "modules" in given:
        given["modules"] = tuple(given["modules"])
    scale = SCALES[args.dataset]._replace(**given)
    chosen = []
    for what in args.what:
        seeds = args.seeds or ((0, 1, 2) if what == "table" else (0,))
        if what == "search":
            some = [("Inception", TABLE["Inception"], rate) for rate in SEARCH]
        elif what == "report":
            some = []
        else:
            named = GROUPS.get(what) or {what: RECIPES[what]}
            some = [(name, recipe, scale.rate) for name, recipe in named.items()]
        chosen += [Run(name, recipe, scale, rate, seed)
                   for seed in seeds for name, recipe, rate in some]  # fmt: skip
    return sorted(dict.fromkeys(chosen), key=lambda run: run.seed)


# --- Command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Makes the parser; images are the only thing without a default."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.inception",
        description="Inception with and without Batch Normalization, as in the paper's Figure 2. "
        "Writes every measurement as JSON lines and a checkpoint, so that a run that was stopped "
        "goes on when the same command is given again; `report` makes tables and figures.",
        epilog=f"Recipes: {'; '.join(RECIPES)}.",
    )
    p.add_argument("what", nargs="*", default=["table"], metavar="WHAT",
        help="table: the paper's comparison; search: the baseline's learning rate; remarks: BN-x5 "
        "with one change each; init: Inception and BN-x5 with LeCun's smaller kernels, Flax's "
        "default; ensemble: more variants of BN-x30; band: which learning rates train at all; "
        "report: tables and figures of all runs in --out; or the names of recipes, listed below "
        "(default: table)")  # fmt: skip
    add_run_options(p.add_argument_group("what to run"))
    add_device_options(p.add_argument_group("on what"))
    cluster.add_options(p.add_argument_group("as one process of several, on each of them"))
    return p


def add_run_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of the images, the length and the folder of results."""
    add = group.add_argument
    add("--data-dir", metavar="DIR", help="the images: folders train and val (or test) of classes")
    add("--dataset", choices=SCALES, default="cifar10",
        help="what they are, hence which size of network and how many steps; smoke: made-up "
        "images, seconds (default: %(default)s)")  # fmt: skip
    add(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="one run each: initial kernels, batches (default: 0 1 2; of all but the table: 0)",
    )
    add("--rate", type=float, metavar="X",
        help="the baseline's first learning rate; a recipe may multiply it (default: "
        f"{', '.join(f'{k} {s.rate:g}' for k, s in SCALES.items())})")  # fmt: skip
    add("--steps", type=int, metavar="N",
        help="of the baseline; a recipe may take a share (default: "
        f"{', '.join(f'{k} {s.steps:,}' for k, s in SCALES.items())})")  # fmt: skip
    add("--width", type=float, metavar="X", help="share of the channels of the paper's network "
        f"(default: {', '.join(f'{k} {s.width:g}' for k, s in SCALES.items())})")  # fmt: skip
    add("--modules", nargs="+", choices=ROWS, metavar="ROW",
        help=f"which rows of the paper's table the network has, of {' '.join(ROWS)} (default: all "
        f"but smoke {' '.join(SCALES['smoke'].modules)})")  # fmt: skip
    add("--repeat", type=int, metavar="N", help="how many times every module that keeps the "
        "resolution comes, for a deeper network (default: 1)")  # fmt: skip
    add("--size", type=int, metavar="PIXELS", help="of the images as the network sees them "
        f"(default: {', '.join(f'{k} {s.size}' for k, s in SCALES.items())})")  # fmt: skip
    add("--batch", type=int, metavar="N", help="images a step, over all devices (default: "
        f"{', '.join(f'{k} {s.batch}' for k, s in SCALES.items())})")  # fmt: skip
    add("--evaluations", type=int, metavar="N", help="how often accuracy is measured in the "
        "baseline's steps; twice as often a step in shorter runs (default: "
        f"{', '.join(f'{k} {s.evaluations}' for k, s in SCALES.items())})")  # fmt: skip
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="where measurements, checkpoints and figures go; "
        f"with several processes a folder that all see (default: {results_of('DATASET')})",
    )
    add("--tensorboard", action="store_true", help="write events for TensorBoard, too")
    add("--checkpoint-every", type=int, default=Options().checkpoint_every, metavar="STEPS",
        help="(default: %(default)s)")  # fmt: skip
    add("--stop-after", type=int, metavar="STEPS", help="stop each run there; it can go on later")


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of hardware, precision and statistics."""
    add, options = group.add_argument, Options()
    add(
        "--devices",
        type=int,
        metavar="N",
        help="how many the batch is spread over (default: all); on a CPU they are virtual",
    )
    add("--statistics", choices=STATISTICS, default=options.statistics,
        help="of the whole batch, of ghost batches, or of each device's part (default: "
        "%(default)s)")  # fmt: skip
    add(
        "--ghost-batch",
        type=int,
        default=options.ghost_batch,
        metavar="N",
        help="images that share statistics with --statistics ghost (default: %(default)s)",
    )
    add("--bfloat16", action="store_true", help="compute in bfloat16; parameters stay in float32")
    add("--auxiliary", action="store_true", help="two auxiliary heads, as GoogLeNet has")
    add("--workers", type=int, default=options.workers, metavar="N",
        help="processes that read images (default: threads of this one)")  # fmt: skip
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="how many runs at a time, each with one CPU thread (default: %(default)s)",
    )
    add("--job-of-several", type=int, help=argparse.SUPPRESS)


def options_of(args: argparse.Namespace) -> Options:
    """Returns the command line's options for the computation of the runs."""
    return Options(**{name: getattr(args, name) for name in Options._fields})


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message if it cannot run."""
    unknown = [what for what in args.what if what not in ACTIONS and what not in RECIPES]
    if unknown:
        p.error(f"there is no {unknown[0]!r}. Expected {', '.join(ACTIONS)}, or a recipe: "
                f"{'; '.join(RECIPES)}.")  # fmt: skip
    if args.data_dir is None and args.dataset != "smoke" and args.what != ["report"]:
        p.error(NO_IMAGES)
    for name in ("steps", "repeat", "size", "batch", "evaluations", "jobs", "devices",
                 "checkpoint_every", "stop_after", "ghost_batch"):  # fmt: skip
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}. Expected 1 or more.")
    for name in ("rate", "width"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            p.error(f"--{name} {getattr(args, name)}. Expected a number above 0.")
    if min(args.seeds or [0]) < 0 or args.workers < 0:
        p.error(f"--seeds {args.seeds}, --workers {args.workers}. Expected 0 or more.")
    if "search" in args.what and args.rate is not None:
        p.error(f"search tries the rates {', '.join(map(str, SEARCH))}: leave out --rate.")
    several = args.auto or args.num_processes > 1
    if several and (args.jobs > 1 or args.devices is not None):
        p.error("several processes share every run, on all their devices: leave out --jobs and "
                "--devices.")  # fmt: skip
    if args.statistics == "ghost" and (args.batch or SCALES[args.dataset].batch) % args.ghost_batch:
        p.error(f"--ghost-batch {args.ghost_batch} does not divide the batch.")
    cluster.check(p, args)


def check_devices(chosen: list[Run], devices: int) -> None:
    """Raises ValueError if a batch cannot be spread over the devices."""
    for run in chosen:
        for batch, what in ((run.scale.batch, "training"), (run.scale.eval_batch, "evaluation")):
            if batch % devices:
                raise ValueError(
                    f"a batch of {batch} images, in {what}, cannot be spread over {devices} "
                    "devices. Expected a divisor of it: choose --devices, or --batch."
                )


def train(chosen: list[Run], argv: Sequence[str], args: argparse.Namespace) -> None:
    """Trains one run after the other, and prints where the measurements are."""
    cluster.join(args)
    if args.devices:
        cluster.virtual_devices(args.devices)
    # So that another process does not compile the same program again.
    jax.config.update("jax_compilation_cache_dir", str((args.out / "compiled").resolve()))
    check_devices(chosen, args.devices or jax.device_count())
    sets = load(args.dataset, args.data_dir)
    about = {"command": as_typed("inception", argv, args.data_dir)}
    for run in chosen:
        print(inception_train.train(run, sets, args.out, about, options_of(args)))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment with `argv`, or with the arguments of the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    p = parser()
    args = p.parse_args(argv)
    args.out = args.out or results_of(args.dataset)
    check(p, args)
    chosen, job = runs(args), args.job_of_several
    try:
        if chosen and args.jobs > 1 and job is None:
            spawn(argv, min(args.jobs, len(chosen)), args.out)
        elif chosen:
            train(deal(chosen, args.jobs)[job or 0], argv, args)
        if "report" in args.what and job is None and jax.process_index() == 0:
            print(inception_report.report(args.out))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
