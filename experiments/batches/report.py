"""Averages the results over the seeds, and formats their table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.batches.cases import BY_IMAGE
from experiments.common.records import aligned

ACCURACIES = {"inference": "inference_accuracy", "training": "training_accuracy"}


def summaries(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Averages over the seeds for each norm, part and order; keeps each value, and its spread."""
    results = []
    for norm, part, order in dict.fromkeys((r["norm"], r["part"], r["order"]) for r in rows):
        mine = [r for r in rows if (r["norm"], r["part"], r["order"]) == (norm, part, order)]
        result = {"norm": norm, "part": part, "order": order, "rate": mine[0]["rate"]}
        for name, field in ACCURACIES.items():
            values = [row[field] for row in mine]
            result |= {name: float(np.mean(values)), f"{name}_spread": float(np.ptp(values)),
                       f"{name}_seeds": values}  # fmt: skip
        results.append(result | {"last_loss": float(np.mean([r["last_loss"] for r in mine]))})
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Formats the results, one setting a line: mean, and largest minus smallest of the seeds."""
    lines = [["order", "norm", "part", "inference", "spread", "as in training", "spread"]]
    for r in results:
        part = "-" if r["norm"] in BY_IMAGE else str(r["part"])
        values = [f"{r[n]:.1%}" for name in ACCURACIES for n in (name, f"{name}_spread")]
        lines.append([r["order"], r["norm"], part, *values])
    return aligned(lines)
