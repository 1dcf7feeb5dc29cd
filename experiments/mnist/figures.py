"""Draws the figures of `experiments.mnist`: a function takes numbers and writes one PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from experiments.common.figures import new_figure, save

if TYPE_CHECKING:
    from experiments.mnist.comparison import History
    from experiments.mnist.sweep import Grid


TITLES = {"plain": "without BN", "batch_norm": "with BN"}
COLORS = {"plain": "#b2182b", "batch_norm": "#2166ac"}  # colour-blind readers can tell them apart
DASHES = {"plain": (0, (4, 1.5)), "batch_norm": "solid"}  # distinct in print
STEPS = "training steps [thousands]"


def figure1(path: Path, histories: Mapping[str, History], unit: int) -> None:
    """Draws the paper's Figure 1: (a) test accuracy; (b, c) percentiles of one unit's input."""
    figure = new_figure(9.0, 3.1)
    accuracy, *inputs = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    draw_accuracy(accuracy, histories)
    inputs[1].sharey(inputs[0])
    for axes, letter, (net, history) in zip(inputs, "bc", histories.items(), strict=True):
        draw_percentiles(axes, history, unit, COLORS[net])
        axes.set_title(f"({letter}) inputs {TITLES[net]}", loc="left")
    inputs[0].set_ylabel(f"percentiles of sigmoid {unit}'s input")
    save(figure, path)


def draw_accuracy(axes: Axes, histories: Mapping[str, History]) -> None:
    """Draws panel (a): one curve a network, with its last value in the legend."""
    steps = np.zeros(1)
    for net, history in histories.items():
        steps, accuracy = history.steps / 1000, 100 * history.test_accuracy
        axes.plot(
            steps,
            accuracy,
            color=COLORS[net],
            linestyle=DASHES[net],
            linewidth=1.4,
            label=f"{TITLES[net]}: {accuracy[-1]:.1f} %",
        )
    axes.set_title("(a) test accuracy", loc="left")
    axes.set_ylabel("test accuracy [%]")
    axes.set_ylim(0, 103)
    axes.legend(loc="lower right", fontsize=9)
    label_steps(axes, steps)


def draw_percentiles(axes: Axes, history: History, unit: int, color: str) -> None:
    """Draws panels (b, c): three percentiles of a unit's input during training."""
    low, median, high = history.percentiles[:, :, unit].T
    steps = history.steps / 1000
    axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    axes.plot(steps, median, color=color, linewidth=1.4)
    for line, name in ((high, "85th"), (median, "50th"), (low, "15th")):
        axes.plot(steps, line, color=color, linewidth=0.7)
        at = steps[-1], line[-1]
        axes.annotate(name, at, xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    label_steps(axes, steps)


def label_steps(axes: Axes, steps: np.ndarray) -> None:
    """Draws the common parts of all panels over training time."""
    axes.set_xlabel(STEPS)
    axes.set_xlim(0, steps[-1])
    axes.grid(alpha=0.3)


def sweep(path: Path, grid: Grid, accuracies: Mapping[str, np.ndarray]) -> None:
    """Draws heat maps of the final test accuracy over initial scale and learning rate."""
    figure = new_figure(9.0, 3.6)
    panels = figure.subplots(1, len(accuracies), sharey=True)
    percent = Normalize(0, 100)
    for axes, (net, accuracy) in zip(panels, accuracies.items(), strict=True):
        axes.imshow(100 * accuracy, norm=percent, aspect="auto", origin="lower")
        for (i, j), value in np.ndenumerate(accuracy):
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                      color="black" if value > 0.6 else "white")  # fmt: skip
        axes.set_xticks(range(len(grid.learning_rates)), [f"{v:g}" for v in grid.learning_rates])
        axes.set_yticks(range(len(grid.init_stds)), [f"{v:g}" for v in grid.init_stds])
        axes.set_xlabel("learning rate")
        axes.set_title(TITLES[net], loc="left")
    panels[0].set_ylabel("std of the initial kernels")
    image = ScalarMappable(percent)
    figure.colorbar(image, ax=panels, label=f"test accuracy after {grid.steps:,} steps [%]")
    save(figure, path)
