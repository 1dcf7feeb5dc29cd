"""Does CrossQ learn with jbn's Batch Renormalization as it does with sbx's?

CrossQ (Bhatt et al. 2024, arXiv 1902.05605) is the algorithm that made Batch Renormalization part
of reinforcement learning; sbx has its best-known implementation in JAX. This trains sbx's own
CrossQ on gymnasium's Pendulum, once with sbx's layer and once with `jbn.linen.crossq.BatchRenorm`
in its place. Parts (``--part``):

updates  the critics' loss of the first updates from the same state, on the same batches
units    where the outputs of both layers differ after the warm-up: units by their variance
finite   steps until a network with tanh is NaN
curves   return over steps, 5 seeds, with a warm-up that never ends (Batch Normalization) and with
         one of 500 steps
cost     milliseconds of an update, in interleaved rounds
report   table and figure of the files that the other parts have written; needs no sbx

Claim: during the warm-up both compute the same up to rounding. After it outputs differ by terms of
the order of epsilon / var, which shows in units that vary little in a batch. The learning curves
agree within the spread of the seeds. With tanh sbx's layer can make a network NaN; jbn's does not.

Command::

    pip install -e '.[experiments,crossq]'
    python -m experiments.crossq            # all parts, twenty minutes on two CPU cores
    python -m experiments.crossq --smoke    # minutes, to compile: does all run?

Expected: the tables in docs/experiments/crossq.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from experiments.common.command import as_typed, at_least_one
from experiments.common.records import Records
from experiments.crossq import cost, figures, finite, report, units, updates
from experiments.crossq.layers import LAYERS
from experiments.crossq.training import TASK, Config, cases, forget_programs, train

PARTS = ("updates", "units", "finite", "curves", "cost", "report")
SMOKE = Config(steps=300, every=100, episodes=2, width=16, batch=32, warmups=(50,), seeds=(0, 1))
PACKAGES = ("sbx-rl", "stable-baselines3", "gymnasium", "flax", "torch")


def parser() -> argparse.ArgumentParser:
    """Makes the parser. Every option has a default."""
    p = argparse.ArgumentParser(
        prog="python -m experiments.crossq",
        description="sbx's CrossQ on Pendulum with sbx's layer and with jbn's: first updates, "
        "learning curves, time. Writes JSON lines and a figure.",
    )
    add = p.add_argument
    add("--part", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--smoke", action="store_true", help="a few steps of a small network: does it run?")
    add(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="of units, finite and curves (default: 0 to 4)",
    )
    add("--rounds", type=at_least_one, default=15, help="rounds of times (default: %(default)s)")
    add("--out", type=Path, default=Path("results/crossq"), metavar="DIR",
        help="folder for the figure and the numbers (default: %(default)s)")  # fmt: skip
    return p


def run_part(part: str, config: Config, args: argparse.Namespace, records: Records) -> None:
    """Runs one part and writes its measurements."""
    smoke = args.smoke
    if part == "updates":
        seeds, n = ((0,), 4) if smoke else (updates.SEEDS, updates.UPDATES)
        settings = updates.SETTINGS[:1] if smoke else updates.SETTINGS
        for row in tqdm(updates.compare(config, seeds, n, settings), desc="updates"):
            records.write("updates", **row)
    elif part == "units":
        for seed in config.seeds[: 1 if smoke else 3]:
            for row in units.compare(config, seed):
                records.write("units", **row)
    elif part == "finite":
        for seed, layer in tqdm(list(itertools.product(config.seeds, LAYERS)), desc="finite"):
            records.write("finite", **finite.watch(config, seed, layer, 200 if smoke else 1_000))
    elif part == "curves":
        for case in tqdm(list(cases(config)), desc="curves"):
            records.write("curve", **case._asdict(), **train(config, case))
    else:
        for width in (config.width,) if smoke else cost.WIDTHS:
            rounds = 2 if smoke else args.rounds
            records.write("cost", **cost.measure(config._replace(width=width), rounds))


def run(args: argparse.Namespace, command: str) -> None:
    """Runs the parts that train, each into a file of its own."""
    config = SMOKE if args.smoke else Config()
    config = config._replace(seeds=tuple(args.seeds or config.seeds))
    header: dict[str, Any] = {name: metadata.version(name) for name in PACKAGES}
    header |= {"command": command, "task": TASK, **config._asdict()}
    with tempfile.TemporaryDirectory() as programs:
        # Each model makes JAX trace and compile again; programs that are equal come from here.
        jax.config.update("jax_compilation_cache_dir", programs)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for part in args.part:
            if part != "report":
                with Records(args.out / f"{part}.jsonl", **header) as records:
                    run_part(part, config, args, records)
                forget_programs()
        jax.config.update("jax_compilation_cache_dir", None)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the parts with `argv`, or with the arguments of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if set(args.part) - {"report"}:
        if importlib.util.find_spec("sbx") is None:
            sys.exit("error: sbx is not installed. Expected pip install -e '.[experiments,crossq]'")
        run(args, as_typed("crossq", argv))
    if "report" in args.part:
        rows = report.read(args.out)
        print(report.tables(rows))
        if figures.crossq(args.out / "crossq.png", rows):
            print(f"figure: {args.out / 'crossq.png'}")


if __name__ == "__main__":
    main()
