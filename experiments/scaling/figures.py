"""Draws the figure of `experiments.scaling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from experiments.common.figures import new_figure, save

if TYPE_CHECKING:
    pass


STATISTICS = {  # colour, dashes, marker: distinct for colour-blind readers and in print
    "local": ("#b2182b", (0, (4, 1.5)), "s"),
    "ghost": ("#7f7f7f", (0, (1, 1)), "D"),
    "synchronised": ("#2166ac", "solid", "o"),
}


def scaling(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Draws accuracy and train/eval gap over the number of devices, a line for each statistics.

    ``results`` are the summaries of ``experiments.scaling``: means, and a value for every seed.
    """
    figure = new_figure(10.5, 3.3)
    accuracy, agreement, gap = figure.subplots(1, 3)
    draw_scaling(accuracy, results, "test_accuracy", "test_accuracies", 100)
    accuracy.set_title("(a) test accuracy [%]", loc="left")
    accuracy.legend(loc="upper left", fontsize=9)
    draw_scaling(agreement, results, "agreement", "agreements", 100)
    agreement.set_title("(b) same class in train and eval [%]", loc="left")
    draw_scaling(gap, results, "gap", "gaps", 1)
    gap.axhline(0, color="black", linewidth=0.7)
    gap.set_title("(c) loss in eval - in train [nats]", loc="left")
    save(figure, path)


def draw_scaling(
    axes: Axes, results: Sequence[Mapping[str, Any]], mean: str, each: str, unit: float
) -> None:
    """Draws means as lines, every seed as a small mark; also cases that ran as another one."""
    for statistics, (color, dashes, marker) in STATISTICS.items():
        mine = [row for row in results if row["statistics"] == statistics]
        devices = [row["devices"] for row in mine]
        means = [unit * row[mean] for row in mine]
        axes.plot(devices, means, color=color, linestyle=dashes, marker=marker, markersize=4,
                  label=statistics)  # fmt: skip
        for row in mine:
            values = unit * np.asarray(row[each])
            axes.plot([row["devices"]] * len(values), values, ".", color=color, markersize=3)
    devices = sorted({row["devices"] for row in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices, [str(n) for n in devices])
    axes.set_xlabel("devices")
    axes.grid(alpha=0.3)
