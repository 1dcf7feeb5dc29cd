"""Writes JSON lines: a header with the command and the versions, then a measurement a line."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import jbn


class Records:
    """A file of JSON lines, flushed after every line; use it as a context manager.

    With `resume_from`, the number of a training step, it continues an earlier file: it drops the
    lines about later steps, and writes a new header for the new start.
    """

    def __init__(self, path: Path, *, resume_from: int = 0, **header: Any):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_until(path, resume_from) if resume_from else []
        new = path.with_suffix(".new")  # a program that dies here loses nothing
        new.write_text("".join(kept), encoding="utf-8")
        new.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self.write("header", **header, **environment())

    def write(self, kind: str, **fields: Any) -> None:
        """Writes one line: the kind of measurement, and its values."""
        row = {k: rounded(v) if isinstance(v, float) else v for k, v in fields.items()}
        self._file.write(json.dumps({"kind": kind, **row}) + "\n")
        self._file.flush()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Returns the complete lines of a file, if it exists, that belong to no later step."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    return [line for line in whole if json.loads(line).get("step", 0) <= step]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Formats a table for the terminal: columns aligned right, as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def rounded(value: float) -> float | None:
    """Rounds to six significant digits. JSON has no infinity or NaN: a diverged loss is null."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def environment() -> dict[str, Any]:
    """Returns the versions and the hardware that a number depends on."""
    return {
        "jbn": jbn.__version__,
        **{name: metadata.version(name) for name in ("jax", "optax", "numpy")},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
    }
