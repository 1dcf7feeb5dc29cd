"""Reads the curves of all runs, and summarises them over the seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.inception.notebook import lines
from experiments.inception.recipes import BAND, TABLE

BASELINE = "Inception"
NUMBERS = "inception.jsonl"  # one file with all runs


class Curve(NamedTuple):
    """The measurements of one run."""

    name: str
    seed: int
    rate: float  # the baseline's first rate
    first_rate: float  # of this run
    steps: np.ndarray  # [T] at which accuracy was measured
    top1: np.ndarray  # [T] fraction of the validation images
    end: dict[str, Any]  # the last line

    @property
    def best(self) -> float:
        """The highest accuracy."""
        return float(self.top1.max())

    def steps_to(self, accuracy: float) -> float:
        """Returns the first step with this accuracy or more; infinity if there is none."""
        reached = self.top1 >= accuracy
        return float(self.steps[reached.argmax()]) if reached.any() else np.inf


def collect(out: Path) -> Path:
    """Writes one file of the measurements of all runs that have a folder in `out`."""
    files = sorted(out.glob("*/measurements.jsonl"))
    if files:
        rows = [json.dumps(row) + "\n" for path in files for row in lines(path)]
        (out / NUMBERS).write_text("".join(rows), encoding="utf-8")
    if not (out / NUMBERS).is_file():
        raise FileNotFoundError(
            f"{out} has neither runs nor a file {NUMBERS}. Expected the folder that the runs were "
            "given with --out."
        )
    return out / NUMBERS


def read(path: Path) -> list[Curve]:
    """Reads all runs in the file that have ended: others may still reach their best accuracy."""
    found: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    header: dict[str, Any] = {}
    for row in lines(path):
        if row["kind"] == "header":
            header = row
        found.setdefault((header["run"], header["rate"], header["seed"]), []).append(row)
    curves = [curve_of(*key, rows) for key, rows in found.items()]
    return [curve for curve in curves if len(curve.steps) and curve.end]


def curve_of(name: str, rate: float, seed: int, rows: list[dict[str, Any]]) -> Curve:
    measured = [row for row in rows if row["kind"] == "measurement"]
    end = next((row for row in rows if row["kind"] == "end"), {})
    first_rate = rate * rows[0]["recipe"]["rate"]
    steps = np.array([row["step"] for row in measured])
    top1 = np.array([row["top1"] for row in measured])
    return Curve(name, seed, rate, first_rate, steps, top1, end)


class Result(NamedTuple):
    """One recipe over its seeds."""

    name: str
    first_rate: float
    seeds: int
    steps_to: list[float]  # to the baseline's best accuracy, for every seed
    shares: list[float]  # those steps, over the baseline's
    best: list[float]
    final: list[float]
    final_population: list[float]
    diverged: int


def chosen_rate(curves: Iterable[Curve]) -> float:
    """Returns the rate at which the baseline was best, among those of the table's runs."""
    table = {curve.rate for curve in curves if curve.name in {*TABLE} - {BASELINE}} or None
    baseline = [c for c in curves if c.name == BASELINE and (table is None or c.rate in table)]
    if not baseline:
        raise ValueError(f"No run of {BASELINE} was found: everything is compared with it.")
    return max(baseline, key=lambda curve: curve.best).rate


def results(curves: Sequence[Curve], names: Iterable[str]) -> list[Result]:
    """Summarises the recipes that have run, by name, in this order."""
    rate = chosen_rate(curves)
    baseline = {c.seed: c for c in curves if (c.name, c.rate) == (BASELINE, rate)}
    found = []
    for name in names:
        mine = [c for c in curves if (c.name, c.rate) == (name, rate) and c.seed in baseline]
        if mine:
            found.append(result_of(name, mine, baseline))
    return found


def result_of(name: str, mine: list[Curve], baseline: dict[int, Curve]) -> Result:
    goals = [baseline[c.seed].best for c in mine]
    steps = [c.steps_to(goal) for c, goal in zip(mine, goals, strict=True)]
    own = [baseline[c.seed].steps_to(goal) for c, goal in zip(mine, goals, strict=True)]
    return Result(
        name,
        mine[0].first_rate,
        len(mine),
        steps,
        [a / b for a, b in zip(steps, own, strict=True)],
        [c.best for c in mine],
        [c.end["top1"] for c in mine],
        [c.end["top1_population"] for c in mine if "top1_population" in c.end],
        sum(bool(c.end.get("diverged")) for c in mine),
    )


def band_curves(curves: Sequence[Curve]) -> dict[str, tuple[list[float], list[float]]]:
    """Returns rates and best accuracies without and with Batch Normalization."""
    rate = chosen_rate(curves)
    found: dict[str, tuple[list[float], list[float]]] = {}
    for prefix in (BASELINE, "BN"):
        names = [f"{prefix} at x{multiple:g}" for multiple in BAND]
        mine = [c for name in names for c in curves if (c.name, c.rate) == (name, rate)]
        if mine:
            found[prefix] = [c.first_rate for c in mine], [c.best for c in mine]
    return found
