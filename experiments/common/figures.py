"""The figures of the experiments. Each function takes measurements and writes one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from experiments.mnist.__main__ import History
    from experiments.mnist.sweep import Grid

TITLES = {"plain": "without BN", "batch_norm": "with BN"}
COLORS = {"plain": "#b2182b", "batch_norm": "#2166ac"}  # apart for colour-blind readers too
DASHES = {"plain": (0, (4, 1.5)), "batch_norm": "solid"}  # and in print
STEPS = "training steps [thousands]"


def figure1(path: Path, histories: Mapping[str, History], unit: int) -> None:
    """The paper's Figure 1: (a) test accuracy; (b, c) percentiles of one unit's input."""
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
    """Panel (a): one curve a network, with its last value in the legend."""
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
    """Panels (b, c): the 15th, 50th and 85th percentile of a unit's input during training."""
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
    """What all panels over training time share."""
    axes.set_xlabel(STEPS)
    axes.set_xlim(0, steps[-1])
    axes.grid(alpha=0.3)


def sweep(path: Path, grid: Grid, accuracies: Mapping[str, np.ndarray]) -> None:
    """Heat maps of the final test accuracy over initial scale and learning rate."""
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


STATISTICS = {  # colour, dashes, marker: apart for colour-blind readers, and in print
    "local": ("#b2182b", (0, (4, 1.5)), "s"),
    "ghost": ("#7f7f7f", (0, (1, 1)), "D"),
    "synchronised": ("#2166ac", "solid", "o"),
}


def scaling(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy and train/eval gap over the number of devices, a line for each kind of statistics.

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
    """Means as lines, every seed as a small mark. What ran under another name is drawn too."""
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


def new_figure(width: float, height: float) -> Figure:
    """A figure (inches) without pyplot: no window, no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the PNG; the folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


SPEED_COLORS = {
    "flax.nnx": "#bdbdbd",
    "jbn": "#2166ac",
    "jbn native": "#67a9cf",
    "haiku": "#fdae61",
    "equinox": "#b2182b",
    "torch": "#7b3294",
    "torch without cuDNN": "#c2a5cf",
    "copy": "black",
}
SPEED_TOP = 2.6  # bars above that are cut, and say so


def speed(path: Path, rows: Sequence[Any], form: str = "bn_relu") -> None:
    """Bars of the ratio of times over flax.linen, a group for each shape; whiskers are quartiles.

    ``rows`` are those of `experiments.speed`, part op. A panel for each dtype and pass. What has
    another form is left out, unless nothing has this one.
    """
    rows = [row for row in rows if row.part == "op" and row.ratio is not None]
    rows = [row for row in rows if row.form == form] or rows
    if not rows:
        return
    panels = list(dict.fromkeys((row.dtype, row.quantity) for row in rows))
    figure = new_figure(5.0 * min(len(panels), 2), 2.9 * -(-len(panels) // 2))
    grid = figure.subplots(-(-len(panels) // 2), min(len(panels), 2), squeeze=False, sharey=True)
    for axes, (dtype, quantity) in zip(grid.flat, panels, strict=False):
        own = [row for row in rows if (row.dtype, row.quantity) == (dtype, quantity)]
        draw_speed(axes, own)
        axes.set_title(f"{own[0].form}, {dtype}, {quantity}", loc="left", fontsize=10)
    top = min(max(row.ratio for row in rows) * 1.08, SPEED_TOP)
    for axes in grid[:, 0]:
        axes.set_ylabel("time / flax.linen's")
        axes.set_ylim(0, top)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    save(figure, path)


def draw_speed(axes: Axes, rows: Sequence[Any]) -> None:
    """One panel: the libraries' bars side by side for each shape."""
    cases = list(dict.fromkeys(row.case for row in rows))
    libraries = [name for name in SPEED_COLORS if any(row.library == name for row in rows)]
    width = 0.85 / max(len(libraries), 1)
    for i, library in enumerate(libraries):
        own = [row for row in rows if row.library == library]
        at = [cases.index(row.case) + (i - (len(libraries) - 1) / 2) * width for row in own]
        ratio = np.array([row.ratio for row in own])
        spread = [ratio - [row.low for row in own], [row.high for row in own] - ratio]
        axes.bar(at, ratio, width, yerr=np.maximum(spread, 0), color=SPEED_COLORS[library],
                 label=library, error_kw={"linewidth": 0.7, "ecolor": "#444444"})  # fmt: skip
        for x, value in zip(at, ratio, strict=True):
            if value > SPEED_TOP:
                axes.text(x, SPEED_TOP, f" {value:.1f}", rotation=90, va="top", ha="center",
                          fontsize=6, color="white")  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.7)
    axes.set_xticks(range(len(cases)), cases, fontsize=7, rotation=15)
    axes.grid(alpha=0.3, axis="y")
