"""Summarises all runs of `experiments.inception` in tables and figures for the documentation.

Steps are compared seed by seed: with the same initial kernels where the networks have the same
layers, and with the same images. "Steps to the baseline's best" are the steps after which a run
first had the best accuracy of the baseline with that seed. Accuracies are of the validation images,
by the moving averages; the table also has the last accuracy by the exact statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from experiments.inception import figures as inception_figures
from experiments.inception.curves import (
    BASELINE,
    Curve,
    Result,
    band_curves,
    chosen_rate,
    collect,
    read,
    result_of,
    results,
)
from experiments.inception.recipes import ENSEMBLE, INITS, RATES, REMARKS, TABLE

# In the paper: first learning rate, millions of steps to 72.2 %, highest accuracy [%].
PAPER = {
    "Inception": (0.0015, 31.0, 72.2),
    "BN-Baseline": (0.0015, 13.3, 72.7),
    "BN-x5": (0.0075, 2.1, 73.0),
    "BN-x30": (0.045, 2.7, 74.8),
    "BN-x5-Sigmoid": (0.0075, None, 69.8),
    "Inception-Sigmoid": (None, None, "chance"),
    "Inception-x5": (0.0075, None, "diverges"),
}


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Formats the mean, lowest and highest of several values; an infinite one was never reached."""
    if not values:
        return "-"
    if not all(map(np.isfinite, values)):
        reached = sum(map(np.isfinite, values))
        return "never" if not reached else f"{reached} of {len(values)} seeds"
    low, mean, high = min(values), float(np.mean(values)), max(values)
    same = form(low) == form(high)
    return form(mean) if same else f"{form(mean)} ({form(low)} to {form(high)})"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def count(value: float) -> str:
    return f"{value:,.0f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table for MyST."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


# Two tables, because one with all columns is wider than a page.
STEPS = ("network", "first rate", "steps to the baseline's best", "share")
ACCURACY = ("network", "best accuracy", "at the end", "with Algorithm 2", "seeds")


def main_table(curves: Sequence[Curve]) -> str:
    """Formats the paper's table beside ours: its steps, and its accuracies."""
    found = results(curves, TABLE)
    if not found:
        return ""
    steps = [[*_steps(r), *_steps_of_paper(r.name)] for r in found]
    accuracy = [[*_accuracy(r), _accuracy_of_paper(r.name)] for r in found]
    return "\n\n".join(
        (
            markdown([*STEPS, "paper: steps", "paper: share"], steps),
            markdown([*ACCURACY, "paper: best"], accuracy),
        )
    )


def _two_tables(found: Sequence[Result]) -> str:
    if not found:
        return ""
    tables = markdown(STEPS, map(_steps, found)), markdown(ACCURACY, map(_accuracy, found))
    return "\n\n".join(tables)


def _steps(r: Result) -> list[str]:
    return [r.name, f"{r.first_rate:g}", spread(r.steps_to, count), spread(r.shares, percent)]


def _accuracy(r: Result) -> list[str]:
    diverged = f"diverged in {r.diverged} of {r.seeds}"
    return [
        r.name,
        spread(r.best, percent),
        diverged if r.diverged else spread(r.final, percent),
        spread(r.final_population, percent),
        str(r.seeds),
    ]


def _steps_of_paper(name: str) -> list[str]:
    _, steps, _ = PAPER[name]
    if steps is None:
        return ["-", "-"]
    return [f"{steps:.1f} million", percent(steps / PAPER[BASELINE][1])]


def _accuracy_of_paper(name: str) -> str:
    _, _, best = PAPER[name]
    return best if isinstance(best, str) else f"{best:.1f} %"


def variants_table(curves: Sequence[Curve], names: Iterable[str]) -> str:
    """Formats the recipes that each differ from one of the table's in one point."""
    return _two_tables(results(curves, names))


def init_table(curves: Sequence[Curve]) -> str:
    """Formats the runs with smaller initial kernels; the baseline is the best plain network."""
    plain, _ = INITS
    baseline: dict[int, Curve] = {}
    for curve in sorted((c for c in curves if c.name == plain), key=lambda c: c.best):
        baseline[curve.seed] = curve
    found = []
    for name, rate in sorted({(c.name, c.rate) for c in curves if c.name in INITS}):
        mine = [c for c in curves if (c.name, c.rate) == (name, rate) and c.seed in baseline]
        if mine:
            found.append(result_of(name, mine, baseline))
    return _two_tables(found)


def search_table(curves: Sequence[Curve]) -> str:
    """Formats the baseline's results at all rates that were tried."""
    mine = sorted((c for c in curves if c.name == BASELINE), key=lambda c: (c.rate, c.seed))
    rows = [[f"{c.rate:g}", str(c.seed), percent(c.best), percent(c.top1[-1])] for c in mine]
    return markdown(["first rate", "seed", "best accuracy", "at the end"], rows)


def better_rate(curves: Sequence[Curve]) -> str:
    """Returns a warning if the search found a better rate than that of the table."""
    rate = chosen_rate(curves)
    baseline = {c.rate: c for c in curves if c.name == BASELINE and c.seed == 0}
    best = max(baseline.values(), key=lambda c: c.best, default=None)
    if best is None or best.rate == rate:
        return ""
    return f"\n\nThe table is made with {rate:g}, but {best.rate:g} is better for the baseline."


def report(out: Path) -> str:
    """Writes the figures, and all tables as one page; returns the page."""
    curves = read(collect(out))
    rate = chosen_rate(curves)
    parts = {
        "The paper's comparison": main_table(curves),
        "The baseline's learning rate": search_table(curves),
        "One change to BN-x5": variants_table(curves, ["BN-x5", *REMARKS]),
        "Smaller initial kernels": init_table(curves),
        "Variants of BN-x30": variants_table(curves, ["BN-x30", *ENSEMBLE]),
    }
    parts["The baseline's learning rate"] += better_rate(curves)
    # A group that has not run has no table.
    page = "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text) + "\n"
    (out / "inception-table.md").write_text(page, encoding="utf-8")
    table = [c for c in curves if c.rate == rate and c.name in TABLE]
    inception_figures.figure2(out / "figure2.png", table)
    band = band_curves(curves)
    if band:
        steps = {c.steps[-1] for c in curves if c.name in RATES}
        inception_figures.band(out / "band.png", band, int(max(steps)))
    return page
