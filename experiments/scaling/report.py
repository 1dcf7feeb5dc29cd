"""Averages the results over the seeds, and formats their table."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from experiments.common.records import aligned
from experiments.scaling.cases import STATISTICS, Config, runs_as


def summaries(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averages over the seeds for all statistics and numbers of devices; keeps each value."""
    results = []
    for devices, statistics in itertools.product(config.devices, STATISTICS):
        ran = runs_as(statistics, devices)
        mine = [row for row in rows if (row["statistics"], row["devices"]) == (ran, devices)]

        def values(name: str, mine: list[dict[str, Any]] = mine) -> list[float]:
            return [row[name] for row in mine]

        if not mine:
            continue
        accuracies = values("test_accuracy")
        gaps = np.subtract(values("train_by_running_loss"), values("train_by_batch_loss"))
        results.append(
            {
                "statistics": statistics,
                "devices": devices,
                "same_as": None if ran == statistics else ran,
                "shared_by": mine[0]["shared_by"],
                "test_accuracies": accuracies,
                "test_accuracy": float(np.mean(accuracies)),
                "train_accuracy_by_batch": float(np.mean(values("train_by_batch_accuracy"))),
                "train_accuracy_by_running": float(np.mean(values("train_by_running_accuracy"))),
                "agreements": values("agreement"),  # of predictions by batch and by running
                "agreement": float(np.mean(values("agreement"))),
                "gaps": gaps.tolist(),  # nats
                "gap": float(gaps.mean()),
            }
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Formats the results, one setting a line, which names the statistics that are the same."""
    header = "devices", "statistics", "images that share", "test", "seeds", "train, by batch"
    lines = [[*header, "train, by running", "agree", "gap [nats]"]]
    for r in results:
        if r["same_as"]:
            continue
        others = [o["statistics"] for o in results
                  if (o["same_as"], o["devices"]) == (r["statistics"], r["devices"])]  # fmt: skip
        seeds = " ".join(f"{a:.1%}" for a in r["test_accuracies"])
        names = "train_accuracy_by_batch", "train_accuracy_by_running", "agreement"
        accuracies = [r[name] for name in names]
        lines.append(
            [str(r["devices"]), " = ".join([r["statistics"], *others]), str(r["shared_by"]),
             f"{r['test_accuracy']:.1%}", seeds, *(f"{a:.1%}" for a in accuracies),
             f"{r['gap']:+.3f}"]
        )  # fmt: skip
    return aligned(lines)
