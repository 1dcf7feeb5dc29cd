"""Formats the measurements, beside those of flax.linen, as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.nets.layers import BASELINE
from experiments.targets.reading import Row

COLUMNS = (
    "program", "dtype", "library", "kernels", "bytes moved", "of Flax's", "temporaries",
    "of Flax's", "compiling",
)  # fmt: skip
WORDS = 3  # columns of words; the other columns are numbers


def table(rows: Sequence[Row]) -> str:
    """Formats Markdown that a terminal shows well, too: a table for each target."""
    baselines = {row.same(): row for row in rows if row.library == BASELINE}
    parts = []
    for target in dict.fromkeys(row.target for row in rows):
        own = [row for row in rows if row.target == target]
        cells = [COLUMNS, *(columns(row, baselines.get(row.same())) for row in own)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rule = ["-"] * WORDS + ["-:"] * (len(COLUMNS) - WORDS)
        lines = [aligned(line, widths) for line in cells]
        lines.insert(1, aligned(rule, widths, fill="-"))
        parts.append(f"**{target}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def aligned(cells: Sequence[str], widths: Sequence[int], fill: str = " ") -> list[str]:
    """Aligns words left and numbers right."""
    left = [cell.ljust(w, fill) for cell, w in zip(cells[:WORDS], widths[:WORDS], strict=True)]
    right = [cell.rjust(w, fill) for cell, w in zip(cells[WORDS:], widths[WORDS:], strict=True)]
    return left + right


def columns(row: Row, baseline: Row | None) -> tuple[str, ...]:
    """Returns the cells of a line of the table."""
    form = "" if row.form == "-" else f", {row.form.replace('bn', 'BN').replace('_', '+')}"
    if row.elements:
        moved = f"{row.moved / row.elements:.2f} B/element"
        temporaries = f"{row.temporaries / row.elements:.2f} B/element"
    else:
        moved, temporaries = f"{row.moved / 1e9:.2f} GB", f"{row.temporaries / 2**30:.3f} GiB"
    ratios = [
        "-" if baseline is None else ratio(row, baseline, f) for f in ("moved", "temporaries")
    ]
    return (
        row.case + form,
        row.dtype,
        row.library,
        str(row.kernels),
        moved,
        ratios[0],
        temporaries,
        ratios[1],
        f"{row.compiling:.1f} s",
    )


def ratio(row: Row, baseline: Row, field: str) -> str:
    """Returns the ratio to the baseline; "-" if a layer's temporaries are small or none."""
    own, other = getattr(row, field), getattr(baseline, field)
    small = field == "temporaries" and row.elements and max(own, other) < row.elements / 10
    return "-" if small or not other else f"{own / other:.3f}"
