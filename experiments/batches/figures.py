"""Draws the figure of `experiments.batches`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.batches.cases import BY_IMAGE, STEP
from experiments.common.figures import new_figure, save

NORMS = {  # name, colour, marker: distinct for colour-blind readers
    "none": ("none", "#000000", ""),
    "layer": ("Layer Norm", "#cc79a7", ""),
    "group": ("Group Norm", "#009e73", ""),
    "batch": ("BN of a part", "#d55e00", "s"),
    "ghost": ("ghost BN", "#e69f00", "D"),
    "renorm": ("Renorm", "#0072b2", "o"),
}
LOOKS: tuple[tuple[str, Any, str], ...] = (
    ("inference", "-", "by running statistics"),
    ("training", (0, (3, 2)), "as in training"),
)
TITLES = {
    "iid": "(a) random images",
    "sorted parts": "(b) parts of one class",
    "sorted steps": "(c) steps of one class",
}


def batches(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Draws accuracy over the size of a part, a panel for each order of the images.

    ``results`` are the summaries of ``experiments.batches``. Synchronised statistics are where the
    lines of batch and ghost meet, at the whole step.
    """
    orders = list(dict.fromkeys(row["order"] for row in results))
    figure = new_figure(2.5 + 2.9 * len(orders), 3.6)
    panels = figure.subplots(1, len(orders), sharey=True, squeeze=False)[0]
    for axes, order in zip(panels, orders, strict=True):
        draw_order(axes, [row for row in results if row["order"] == order])
        axes.set_title(TITLES[order], loc="left")
    panels[0].set_ylabel("test accuracy [%]")
    handles, _ = panels[0].get_legend_handles_labels()
    styles = [Line2D([], [], color="gray", linestyle=style, label=label)
              for _, style, label in LOOKS]  # fmt: skip
    figure.legend(handles=[*handles, *styles], loc="outside right upper", fontsize=9)
    save(figure, path)


def draw_order(axes: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    """Draws means as lines: solid by running statistics, dashed as in training; seeds as dots."""
    for norm, (label, color, marker) in NORMS.items():
        names = (norm, "synchronised") if norm in ("batch", "ghost") else (norm,)
        mine = sorted((r for r in results if r["norm"] in names), key=lambda r: r["part"])
        if norm in BY_IMAGE:
            draw_level(axes, mine, label, color)
            continue
        parts = [row["part"] for row in mine]
        for name, style, _ in LOOKS[: 1 if norm == "ghost" else 2]:  # ghost trains as batch does
            values = [100 * row[name] for row in mine]
            filled = name == "inference"
            axes.plot(parts, values, color=color, linestyle=style, marker=marker, markersize=4,
                      markerfacecolor=color if filled else "white", linewidth=1.4,
                      label=label if filled else None)  # fmt: skip
        for row in mine:
            seeds = [100 * value for value in row["inference_seeds"]]
            axes.plot([row["part"]] * len(seeds), seeds, ".", color=color, markersize=2.5)
    axes.set_xscale("log", base=2)
    axes.set_xlim(1.7, 1.2 * STEP)
    axes.set_xticks([2, 4, 8, STEP], ["2", "4", "8", str(STEP)])
    axes.set_xlabel("images that share statistics")
    axes.grid(alpha=0.3)


def draw_level(axes: Axes, rows: Sequence[Mapping[str, Any]], label: str, color: str) -> None:
    """Draws what does not depend on the part as a horizontal line, with a band for the seeds."""
    for row in rows:
        seeds = [100 * value for value in row["inference_seeds"]]
        axes.axhline(100 * row["inference"], color=color, linewidth=1.2, label=label,
                     linestyle=(0, (1, 1)) if label == "none" else "-.")  # fmt: skip
        axes.axhspan(min(seeds), max(seeds), color=color, alpha=0.08, linewidth=0)
