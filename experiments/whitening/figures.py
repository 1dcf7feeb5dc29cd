"""Draws the figures of `experiments.whitening`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from experiments.common.figures import new_figure, save
from experiments.whitening.comparison import Result
from experiments.whitening.warning import Curve

COLOURS = {  # distinct for colour-blind readers
    "none": "#000000", "centring": "#000000", "each feature": "#0072b2", "groups": "#e69f00",
    "all features": "#d55e00",
}  # fmt: skip
NAMES = {"mnist": "MNIST, sigmoids", "cifar": "CIFAR-10, ResNet"}


def accuracies(path: Path, name: str, chunk: int, results: Sequence[Result]) -> None:
    """Draws errors over steps and over seconds; `chunk`: steps between two measurements."""
    figure = new_figure(8.6, 3.3)
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    for row in results:
        steps = chunk * np.arange(1, 1 + len(row.runs[0].accuracies))
        draw_runs(over_steps, steps, row)
        draw_runs(over_seconds, steps * row.step_ms / 1e3, row)
    over_steps.set(xlabel="steps", ylabel="test error [%]", yscale="log")
    over_steps.set_title(NAMES[name], loc="left")
    over_seconds.set(xlabel="seconds of training steps", xscale="log")
    over_steps.legend(loc="upper right", fontsize=9)
    over_steps.yaxis.set_major_formatter("{x:g}")
    over_steps.yaxis.set_minor_formatter("{x:g}")
    save(figure, path)


def draw_runs(axes: Axes, at: np.ndarray, row: Result) -> None:
    """Draws the mean over the seeds, and a band from the lowest to the highest."""
    values = 100 - 100 * np.asarray([run.accuracies for run in row.runs])
    colour = COLOURS[row.layer]
    axes.plot(at, values.mean(0), color=colour, linewidth=1.4, label=row.layer)
    axes.fill_between(at, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)


def warning(path: Path, curves: Sequence[Curve]) -> None:
    """Draws the norm of the bias and the loss, where the bias is trained and where all is."""
    figure = new_figure(8.6, 5.4)
    grid = figure.subplots(2, 2, sharex=True)
    for (left, right), trained in zip(grid, ("bias", "all"), strict=True):
        for c in curves:
            if c.trained != trained:
                continue
            look = {"color": COLOURS[c.kind], "linestyle": "-" if c.ignored else "--"}
            through = "ignored" if c.ignored else "differentiated"
            left.plot(c.bias, label=f"{c.kind}, {through}", linewidth=1.4, **look)
            right.plot(c.loss, linewidth=1.4, **look)
        what = "only the bias learns" if trained == "bias" else "kernel and bias learn"
        left.set_title(what, loc="left")
        left.set_ylabel("norm of the bias")
        left.set_yscale("symlog", linthresh=0.1)
        right.set_ylabel("loss [nats]")
        right.set_yscale("linear" if trained == "bias" else "log")
        for axes in (left, right):
            axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=8)
    for axes in grid[1]:
        axes.set_xlabel("steps")
    save(figure, path)
