"""Draws the figures of `experiments.inception_beyond`: a function takes numbers, writes one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.common.figures import new_figure, save

if TYPE_CHECKING:
    from experiments.inception_beyond.depth import Profile
    from experiments.inception_beyond.identity import Learned

COLORS = {"without BN": "#b2182b", "with BN": "#2166ac"}  # colour-blind readers can tell them apart
DEPTH = {
    "output_gradient": "RMS gradient of the layer's output",
    "kernel_gradient": "RMS gradient of its kernel",
    "output": "RMS of its output",
}
DASHES = ((0, (1, 1)), "solid", (0, (4, 1.5)))  # small, middle and large kernels; distinct in print


def depth(path: Path, profiles: Sequence[Profile]) -> None:
    """Draws gradients and outputs from the first layer to the last, a column an activation."""
    activations = list(dict.fromkeys(p.activation for p in profiles))
    figure = new_figure(10.0, 8.6)
    panels = figure.subplots(len(DEPTH), len(activations), sharex=True, squeeze=False)
    for column, activation in enumerate(activations):
        mine = [p for p in profiles if p.activation == activation]
        for axes, what in zip(panels[:, column], DEPTH, strict=True):
            draw_depth(axes, mine, what)
        panels[0, column].set_title(f"({'ab'[column]}) {activation}", loc="left")
        panels[-1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[-1, column].set_xlabel("layer, from the input to the output")
    for axes, label in zip(panels[:, 0], DEPTH.values(), strict=True):
        axes.set_ylabel(label)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    save(figure, path)


def draw_depth(axes: Axes, profiles: Sequence[Profile], what: str) -> None:
    """Draws a panel: for each network and size of kernels a line, the geometric mean over seeds."""
    inits = sorted({p.init for p in profiles})
    for net, color in COLORS.items():
        for init in inits:
            mine = [getattr(p, what) for p in profiles if (p.net, p.init) == (net, init)]
            mean = np.exp(np.log(mine).mean(0))
            layers = np.arange(1, len(mean) + 1)
            axes.plot(layers, mean, color=color, linestyle=DASHES[inits.index(init) % 3],
                      linewidth=1.3, label=f"{net}, kernels x{init:g}")  # fmt: skip
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def identity(path: Path, learned: Mapping[str, Learned]) -> None:
    """Draws every feature's learned scale and bias, and their errors while learning."""
    figure = new_figure(11.0, 3.5)
    scale, bias, error = figure.subplots(1, 3)
    looks = (("#b2182b", "o", DASHES[1]), ("#2166ac", "x", DASHES[2]))
    for (name, found), (color, marker, dashes) in zip(learned.items(), looks, strict=False):
        for axes, got, want in (
            (scale, found.scale[-1], found.std),
            (bias, found.bias[-1], found.mean),
        ):
            axes.plot(want, got, marker, color=color, markersize=4, fillstyle="none", label=name)
        steps = np.arange(len(found.scale))
        worst = np.maximum(found.scale_error, found.bias_error).max(1)
        error.plot(steps, worst, color=color, linestyle=dashes, linewidth=1.3, label=name)
    for axes in (scale, bias):
        axes.axline((0, 0), slope=1, color="black", linewidth=0.7)
        axes.grid(alpha=0.3)
    scale.set(xlabel="sqrt(Var[x] + epsilon) of a feature", ylabel="scale")
    scale.set_title("(a) learned scale", loc="left")
    bias.set(xlabel="E[x] of a feature", ylabel="bias")
    bias.set_title("(b) learned bias", loc="left")
    error.set(xlabel="steps of SGD", ylabel="error / standard deviation", yscale="log")
    error.set_title("(c) the feature farthest off", loc="left")
    error.grid(alpha=0.3)
    error.legend(fontsize=9)
    save(figure, path)


def ensemble(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws the accuracy of each network and of all together, a group for each kind of view."""
    groups = list(dict.fromkeys((row["crops"], row["statistics"]) for row in rows))
    figure = new_figure(1.5 + 1.9 * len(groups), 3.6)
    axes = figure.subplots()
    for at, group in enumerate(groups):
        mine = [row for row in rows if (row["crops"], row["statistics"]) == group]
        for kind, color, marker in (("member", "#7f7f7f", "o"), ("ensemble", "#2166ac", "D")):
            top1 = [100 * row["top1"] for row in mine if row["kind"] == kind]
            label = {"member": "one network", "ensemble": "all together"}[kind]
            axes.plot([at] * len(top1), top1, marker, color=color, markersize=5,
                      fillstyle="none" if kind == "member" else "full",
                      label=label if at == 0 else None)  # fmt: skip
    axes.set_xticks(range(len(groups)), [f"{crops},\n{what}" for crops, what in groups], fontsize=9)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel("validation accuracy [%]")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=9, loc="lower right")
    save(figure, path)
