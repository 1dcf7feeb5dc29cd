"""Formats the measurements as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.collectives.reading import Row
from experiments.common.hlo import Traffic, traffic

COLUMNS = (
    "program",
    "statistics",
    "forward, a layer",
    "bytes",
    "backward, a layer",
    "bytes",
    "running statistics",
    "gradients of the parameters",
)


def table(rows: Sequence[Row]) -> str:
    """Formats Markdown that a terminal shows well, too: a table for each target."""
    parts = []
    for target in dict.fromkeys(row.target for row in rows):
        own = [row for row in rows if row.target == target]
        cells = [COLUMNS, *map(columns, own)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        ]
        lines.insert(1, " | ".join("-" * width for width in widths))
        title = f"**{target}**, {own[0].devices} devices\n\n"
        parts.append(title + "\n".join(f"| {line} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def columns(row: Row) -> tuple[str, ...]:
    """Returns the cells of a line of the table."""
    return (
        row.mode,
        row.statistics,
        *each_layer(row.forward),
        *each_layer(row.backward),
        *(whole_net(t) for t in (row.running, row.parameters)),
    )


def whole_net(total: Traffic) -> str:
    operations, sizes = each_layer([total, traffic([])])
    return f"{operations}, {sizes} B" if total.counts else "-"


def each_layer(layers: Sequence[Traffic]) -> tuple[str, str]:
    """Formats operations ("1 all-reduce") and bytes sent (and received, if different) by layer.

    Operations that name no layer form one more entry, the last.
    """
    *own, elsewhere = layers
    if elsewhere.counts:
        own.append(elsewhere)
    if not any(t.counts for t in own):
        return "-", "-"
    names = [" + ".join(f"{n} {kind}" for kind, n in t.counts.items()) or "-" for t in own]
    sent = " / ".join(f"{t.sent:,}" for t in own)
    received = " / ".join(f"{t.received:,}" for t in own)
    operations = names[0] if len(set(names)) == 1 else " / ".join(names)
    return operations, sent if sent == received else f"{sent} → {received}"
