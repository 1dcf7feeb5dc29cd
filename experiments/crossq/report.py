"""Reads the records of all parts, and formats their tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.records import aligned
from experiments.crossq.layers import LAYERS

SOLVED = -200.0  # mean return; a random policy has about -1200

Rows = dict[str, list[dict[str, Any]]]


def read(folder: Path) -> Rows:
    """Returns the rows of all files of a folder, by their kind."""
    rows: Rows = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            rows.setdefault(row["kind"], []).append(row)
    return rows


def curves(rows: Rows, warmup: int, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and the mean returns of the seeds, ``[seeds, steps]``."""
    mine = [r for r in rows["curve"] if (r["warmup"], r["layer"]) == (warmup, layer)]
    mine.sort(key=lambda r: r["seed"])
    return np.array(mine[0]["steps"]), np.array([r["returns"] for r in mine])


def solved_at(steps: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Returns the first step at which each seed's return is `SOLVED`; infinity if none is."""
    above = returns >= SOLVED
    return np.where(above.any(-1), steps[above.argmax(-1)], np.inf)


def spread(values: np.ndarray) -> float:
    """Returns the standard deviation over the seeds, 0 of a single one."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def curve_summaries(rows: Rows) -> list[dict[str, Any]]:
    """Summarises the curves of each warm-up and layer, over the seeds."""
    results = []
    for warmup in sorted({r["warmup"] for r in rows["curve"]}, reverse=True):
        for layer in LAYERS:
            steps, returns = curves(rows, warmup, layer)
            whole, last = returns.mean(-1), returns[:, -1]
            results.append(
                {
                    "warmup": warmup,
                    "layer": layer,
                    "seeds": len(returns),
                    "mean": float(whole.mean()),  # of all evaluations: the area under the curve
                    "spread": spread(whole),
                    "last": float(last.mean()),
                    "last_spread": spread(last),
                    "solved": solved_at(steps, returns).tolist(),
                }
            )
    return results


def outside(rows: Rows, warmup: int) -> tuple[int, int]:
    """Counts the evaluations at which the layers' means differ by more than the seeds do.

    That is the larger standard deviation of the two layers. Returns the count, and how many
    evaluations there are.
    """
    sbx, jbn = (curves(rows, warmup, layer)[1] for layer in LAYERS)
    ddof = int(len(sbx) > 1)
    limit = np.maximum(sbx.std(0, ddof=ddof), jbn.std(0, ddof=ddof))
    return int((abs(sbx.mean(0) - jbn.mean(0)) > limit).sum()), sbx.shape[1]


def update_summaries(rows: Rows) -> list[dict[str, Any]]:
    """Returns the largest difference over the seeds, after some updates, for each setting."""
    results = []
    for name in dict.fromkeys(r["name"] for r in rows["updates"]):
        for variant in ("control", "jbn"):
            mine = [r for r in rows["updates"] if (r["name"], r["variant"]) == (name, variant)]
            worst = np.array([r["differences"] for r in mine], float).max(0)
            results.append({"name": name, "variant": variant, "worst": worst})
    return results


def tables(rows: Rows) -> str:
    """Formats a table of each kind of measurement that there is."""
    parts = {"updates": update_table, "units": unit_table, "finite": finite_table,
             "curve": curve_table, "cost": cost_table}  # fmt: skip
    return "\n\n".join(table(rows) for kind, table in parts.items() if kind in rows)


def update_table(rows: Rows) -> str:
    """Formats the differences of the losses after the first, the third, the tenth, ... update."""
    summaries = update_summaries(rows)
    updates = [n for n in (1, 3, 10, 30) if n <= len(summaries[0]["worst"])]
    lines = [["loss differs from sbx's", "by", *(f"update {n}" for n in updates)]]
    for s in summaries:
        lines.append([s["name"], s["variant"], *(f"{s['worst'][n - 1]:.1e}" for n in updates)])
    return aligned(lines)


def unit_table(rows: Rows) -> str:
    """Formats the differences of the outputs, for units grouped by their variance."""
    lines = [["variance in the batch", "seed", "units", "median difference", "largest"]]
    for r in rows["units"]:
        share = f"{r['units']} of {r['of']}"
        cells = [f"{r[name]:.1e}" if r["units"] else "" for name in ("median", "largest")]
        lines.append([r["variance"], str(r["seed"]), share, *cells])
    return aligned(lines)


def finite_table(rows: Rows) -> str:
    """Formats the steps after which the loss was not finite."""
    lines = [["tanh, seed", *LAYERS]]
    found = {(r["seed"], r["layer"]): r["not_finite_at"] for r in rows["finite"]}
    for seed in dict.fromkeys(r["seed"] for r in rows["finite"]):
        each = [found[seed, layer] for layer in LAYERS]
        lines.append([str(seed), *("finite" if n is None else f"NaN at {n}" for n in each)])
    return aligned(lines)


def curve_table(rows: Rows) -> str:
    """Formats the returns of each warm-up and layer."""
    lines = [["warm-up", "layer", "mean return", "at the end", f"steps to {SOLVED:.0f}", "outside"]]
    for s in curve_summaries(rows):
        count, n = outside(rows, s["warmup"])
        mean = f"{s['mean']:.0f} +- {s['spread']:.0f}"
        last = f"{s['last']:.0f} +- {s['last_spread']:.0f}"
        solved = " ".join(f"{n:.0f}" for n in s["solved"])
        lines.append([str(s["warmup"]), s["layer"], mean, last, solved, f"{count} of {n}"])
    return aligned(lines)


def cost_table(rows: Rows) -> str:
    """Formats the milliseconds of an update."""
    lines = [["width", "sbx [ms]", "jbn [ms]", "jbn / sbx", "quartiles"]]
    for r in rows["cost"]:
        quartiles = f"{r['low']:.2f} to {r['high']:.2f}"
        lines.append([str(r["width"]), *(f"{r[layer]:.2f}" for layer in LAYERS),
                      f"{r['median']:.2f}", quartiles])  # fmt: skip
    return aligned(lines)
