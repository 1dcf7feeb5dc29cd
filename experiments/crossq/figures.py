"""Draws the figure of `experiments.crossq`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.common.figures import new_figure, save
from experiments.crossq.report import Rows, curves, update_summaries

LAYERS = {  # colour and dashes: distinct for colour-blind readers and in print
    "sbx": ("#b2182b", (0, (4, 1.5))),
    "jbn": ("#2166ac", "solid"),
}
SETTINGS = {"BN": "#1b7837", "renorm": "#762a83", "renorm, tanh, epsilon 1e-8": "#e08214"}


def crossq(path: Path, rows: Rows) -> bool:
    """Draws the curves of every warm-up, and the first updates; False if a part is missing."""
    if not {"curve", "updates"} <= rows.keys():
        return False
    warmups = sorted({r["warmup"] for r in rows["curve"]}, reverse=True)
    figure = new_figure(3.7 * (len(warmups) + 1), 3.5)
    *lefts, right = figure.subplots(1, len(warmups) + 1)
    for letter, axes, warmup in zip("abcdefgh", lefts, warmups, strict=False):
        draw_curves(axes, rows, warmup)
        title = f"({letter}) return, {warmup:,} steps of warm-up"
        axes.set_title(title, loc="left", fontsize=10)
    lefts[0].set_ylabel("mean return of the same episodes")
    lefts[0].legend(loc="lower right", fontsize=9)
    draw_updates(right, rows)
    save(figure, path)
    return True


def draw_curves(axes: Axes, rows: Rows, warmup: int) -> None:
    """Draws the mean over the seeds, and one standard deviation around it."""
    for layer, (color, dashes) in LAYERS.items():
        steps, returns = curves(rows, warmup, layer)
        mean, deviation = returns.mean(0), returns.std(0, ddof=int(len(returns) > 1))
        axes.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.15)
        axes.plot(steps, mean, color=color, linestyle=dashes, linewidth=2, label=layer)
    axes.set_xlabel("steps of the environment")
    axes.grid(alpha=0.3)


def draw_updates(axes: Axes, rows: Rows) -> None:
    """Draws how far the loss of each update is from sbx's, at most over the seeds."""
    for summary in update_summaries(rows):
        name, ours = summary["name"], summary["variant"] == "jbn"
        if name in SETTINGS:
            worst = np.maximum(summary["worst"], 1e-8)  # 0 has no place on the axis
            axes.plot(np.arange(1, len(worst) + 1), worst, color=SETTINGS[name],
                      linestyle="solid" if ours else (0, (1, 1)),
                      label=name if ours else None)  # fmt: skip
    axes.plot([], [], color="black", linestyle=(0, (1, 1)), label="sbx, last bits changed")
    axes.set_yscale("log")
    axes.set_ylim(1e-12, 1)  # the legend stands below the curves
    axes.set_xlabel("updates from the same state")
    axes.set_title("(c) relative difference of the loss from sbx's", loc="left", fontsize=10)
    axes.legend(loc="lower right", fontsize=7.5)
    axes.grid(alpha=0.3)
