"""Reports the measurements of `experiments.speed`: rows, tables, means, and slower groups."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from experiments.common import timing
from experiments.nets.layers import BASELINE


class Row(NamedTuple):
    """One library in one case. Ratios are over `layers.BASELINE`: below 1 is less than that."""

    part: str  # op, inference, step or dispatch
    case: str  # the shape of x, or the name of a network
    dtype: str
    form: str
    quantity: str  # of the ratio: the time of forward, step, compile ...; or temporaries
    library: str
    seconds: float | None = None  # median over the rounds
    ratio: float | None = None  # median over the rounds of the ratio within a round
    low: float | None = None  # its quartiles
    high: float | None = None
    bandwidth: float | None = None  # useful bytes a second
    of_copy: float | None = None  # that bandwidth over the copy's, in the same rounds
    accessed: float | None = None  # bytes an element that XLA's cost analysis counts
    temporaries: int | None = None  # bytes

    @property
    def line(self) -> tuple[str, ...]:
        """The fields that the rows of all libraries in one case have in common."""
        return self.part, self.case, self.dtype, self.form, self.quantity

    @property
    def group(self) -> str:
        """The group that a geometric mean is taken over, as one text."""
        return " / ".join((self.part, self.quantity, self.dtype, self.form, self.library))


# --- Tables --------------------------------------------------------------------------------------

WORDS = ("case", "form", "part", "of", "dtype")  # columns that hold no numbers


class TableText(NamedTuple):
    """The texts of a table, without a format."""

    title: str
    header: list[str]
    cells: list[list[str]]


def tables(rows: Sequence[Row]) -> Iterator[TableText]:
    """Yields a table for every part, pass and dtype, and one of the means of all of them."""
    sections: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        sections.setdefault((row.part, row.quantity, row.dtype), []).append(row)
    for about, own in sections.items():
        yield TableText(", ".join(about), *lines(own))
    means = mean_lines(rows)
    if means[1]:
        yield TableText("geometric means over the cases", *means)


def lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Makes header and cells: a line for each case, a column for each library's ratio of times."""
    libraries = [name for name in dict.fromkeys(r.library for r in rows) if name != BASELINE]
    header = ["case", "form", f"{BASELINE} [ms]", *libraries]
    header += ["of copy", "bytes/element", "temporaries [MB]"]
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.case, row.form), {})[row.library] = row
    cells = []
    for about, found in cases.items():
        ratios = [ratio_text(found.get(name)) for name in libraries]
        cells.append([*about, milliseconds(found.get(BASELINE)), *ratios, *beside(found)])
    return used(header, cells)


def beside(found: Mapping[str, Row]) -> list[str]:
    """Formats jbn : baseline: the share of the copy, bytes an element, else temporaries."""
    pair = [found.get("jbn")]
    pair.append(found.get(BASELINE))

    def both(field: str, form: str, unit: float = 1) -> str:
        values = [getattr(row, field, None) for row in pair]
        if all(v is None for v in values):
            return "-"
        return " : ".join("-" if v is None else format(v / unit, form) for v in values)

    accessed = both("accessed", ".1f")
    temporaries = both("temporaries", ".1f", 1e6) if accessed == "-" else "-"
    return [both("of_copy", ".0%"), accessed, temporaries]


def used(header: list[str], cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leaves out the columns that are "-" in every line."""
    keep = [i for i in range(len(header)) if any(line[i] != "-" for line in cells)]
    return [header[i] for i in keep], [[line[i] for i in keep] for line in cells]


def ratio_text(row: Row | None) -> str:
    """Formats the ratio of a row, "-" if it has none."""
    if row is None or row.ratio is None or row.low is None or row.high is None:
        return "-"
    return with_quartiles(timing.Ratio(row.ratio, row.low, row.high))


def with_quartiles(ratio: timing.Ratio) -> str:
    """Formats a ratio and its quartiles, "0.61 (0.60-0.63)"."""
    median, low, high = (f"{v:.2f}" if v < 10 else f"{v:.0f}" for v in ratio)
    return f"{median} ({low}-{high})"


def milliseconds(row: Row | None) -> str:
    return "-" if row is None or row.seconds is None else f"{1e3 * row.seconds:.3g}"


def terminal_table(table: TableText) -> Table:
    """Makes a table of rich; columns of words are aligned left, those of numbers right."""
    out = Table(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in table.header:
        words = name in WORDS
        out.add_column(name, justify="left" if words else "right", no_wrap=words, overflow="fold")
    for line in table.cells:
        out.add_row(*line)
    return out


def markdown_table(table: TableText) -> str:
    ruler = [":--" if name in WORDS else "--:" for name in table.header]
    body = "\n".join(f"| {' | '.join(line)} |" for line in (table.header, ruler, *table.cells))
    return f"**{table.title}**\n\n{body}\n"


def mean_lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Makes header and cells: the geometric mean of every group, a column a library."""
    libraries = [name for name in dict.fromkeys(r.library for r in rows) if name != BASELINE]
    means = group_means(rows)
    about = list(dict.fromkeys((r.part, r.quantity, r.dtype, r.form) for r in rows))
    cells = []
    for key in about:
        values = [means.get(" / ".join((*key, library))) for library in libraries]
        if any(values):
            cells.append([*key, *("-" if v is None else f"{v:.2f}" for v in values)])
    return used(["part", "of", "dtype", "form", *libraries], cells)


# --- Regressions of ratios: absolute times hold for one machine only -----------------------------


def group_means(rows: Iterable[Row]) -> dict[str, float]:
    """Computes the geometric mean of the ratios of every group."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.ratio is not None and row.library != BASELINE:
            ratios.setdefault(row.group, []).append(row.ratio)
    return {group: timing.geometric_mean(values) for group, values in ratios.items()}


class Comparison(NamedTuple):
    """A comparison of this run with the committed ratios."""

    slower: dict[str, tuple[float, float]]  # group -> the mean then and now
    compared: int  # groups
    unmeasured: list[str]  # groups of the file that this run lacks


def compare(then: Mapping[str, float], now: Mapping[str, float], tolerance: float) -> Comparison:
    """Finds the groups whose means grew by more than the fraction `tolerance`."""
    both = [group for group in then if group in now]
    slower = {g: (then[g], now[g]) for g in both if now[g] > then[g] * (1 + tolerance)}
    return Comparison(slower, len(both), [group for group in then if group not in now])


def write_baseline(path: Path, rows: Sequence[Row], **about: Any) -> None:
    """Writes the means of jbn's groups, and the settings of their measurement."""
    means = {g: round(v, 4) for g, v in jbn_means(rows).items()}
    text = json.dumps({**about, "groups": means}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def jbn_means(rows: Iterable[Row]) -> dict[str, float]:
    """Computes `group_means` of jbn alone: the speed of other libraries is not checked."""
    return group_means(row for row in rows if row.library.startswith("jbn"))


def read_baseline(path: Path, measured: Mapping[str, Any]) -> dict[str, float]:
    """Reads the means that `write_baseline` wrote.

    Raises:
      ValueError: there is no such file, or it was measured in other cases or on another device.
    """
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        then, before = file["groups"], file["measured"]
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}. Write it with --update {path}.") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a file of ratios ({error!r}). Write one with --update {path}."
        ) from None
    if before != measured:
        raise ValueError(f"{path} has ratios of {before}, which do not compare with {measured}.")
    return then


def check(
    path: Path, then: Mapping[str, float], rows: Sequence[Row], tolerance: float
) -> tuple[int, str]:
    """Compares a run with the file; returns the exit status, 0 or 1, and a text for the user.

    Raises:
      ValueError: the file and the run have no group in common.
    """
    found = compare(then, jbn_means(rows), tolerance)
    if not found.compared:
        raise ValueError(
            f"{path} has no group that this run measured. It has: {'; '.join(then) or 'none'}. Run "
            f"with the arguments that it was written with, or write it anew with --update {path}."
        )
    said = [f"{found.compared} groups compared with {path}, tolerance {tolerance:.0%}."]
    if found.unmeasured:
        said.append(f"Not measured in this run: {'; '.join(found.unmeasured)}.")
    for group, (before, after) in found.slower.items():
        said.append(f"SLOWER: {group}: {before:.3f} -> {after:.3f} of {BASELINE}'s time")
    return int(bool(found.slower)), "\n".join(said)
