"""Draws the figures of `experiments.inception`: a function takes numbers and writes one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.figures import new_figure, save

if TYPE_CHECKING:
    from experiments.inception.curves import Curve

# Colour and dashes of a curve, which colour-blind readers can tell apart, also in print.
LOOKS = {
    "Inception": ("black", (0, (4, 1.5))),
    "BN-Baseline": ("#b2182b", (0, (1, 1))),
    "BN-x5": ("#2166ac", "solid"),
    "BN-x30": ("#67a9cf", (0, (6, 1, 1, 1))),
    "BN-x5-Sigmoid": ("#762a83", (0, (3, 1, 1, 1, 1, 1))),
    "Inception-Sigmoid": ("#7f7f7f", (0, (1, 2))),
    "Inception-x5": ("#e08214", (0, (2, 2))),
}
BN = {"Inception": ("without BN", *LOOKS["Inception"]), "BN": ("with BN", *LOOKS["BN-x5"])}


def figure2(path: Path, curves: Sequence[Curve]) -> None:
    """Draws the paper's Figure 2: accuracy over all steps, and over the first fifth of them."""
    figure = new_figure(10.0, 4.0)
    whole, start = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
    last = max(curve.steps[-1] for curve in curves) / 1000
    for axes, until in ((whole, last), (start, last / 5)):
        for name, (color, dashes) in LOOKS.items():
            for i, curve in enumerate(c for c in curves if c.name == name):
                axes.plot(
                    curve.steps / 1000,
                    100 * curve.top1,
                    color=color,
                    linestyle=dashes,
                    linewidth=1.3,
                    alpha=0.9 if i == 0 else 0.4,
                    label=name if i == 0 else None,
                )
        axes.set_xlim(0, until)
        axes.set_xlabel("training steps [thousands]")
        axes.grid(alpha=0.3)
    whole.set_ylabel("validation accuracy [%]")
    whole.set_title("(a) all steps", loc="left")
    start.set_title("(b) the first fifth of them", loc="left")
    figure.legend(
        *whole.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9
    )
    save(figure, path)


def band(path: Path, found: Mapping[str, tuple[list[float], list[float]]], steps: int) -> None:
    """Draws the best accuracy within a few steps over the learning rate; means over the seeds."""
    figure = new_figure(5.5, 3.6)
    axes = figure.subplots()
    for name, (rates, best) in found.items():
        label, color, dashes = BN[name]
        each, inverse = np.unique(rates, return_inverse=True)
        at = 100 * np.bincount(inverse, best) / np.bincount(inverse)
        axes.plot(each, at, color=color, linestyle=dashes, marker="o", markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (constant)")
    axes.set_ylabel(f"best accuracy within {steps:,} steps [%]")
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save(figure, path)
