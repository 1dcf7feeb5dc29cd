"""Draws the figure of `experiments.speed`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from experiments.common.figures import new_figure, save

if TYPE_CHECKING:
    pass


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
SPEED_TOP = 2.6  # higher bars are cut, and show their value


def speed(path: Path, rows: Sequence[Any], form: str = "bn_relu") -> None:
    """Draws ratios of times over flax.linen: a group of bars for each shape; whiskers: quartiles.

    ``rows`` are those of `experiments.speed`, part op. There is a panel for each dtype and pass.
    Rows of other forms are left out, unless no row has this form.
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
    """Draws one panel: the libraries' bars side by side for each shape."""
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
