"""Parts of command lines that several experiments share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

NO_IMAGES = (
    "no images. Expected --data-dir DIR, with folders train and val (or test) of classes; or "
    "--dataset smoke, which needs none."
)


def at_least_one(text: str) -> int:
    """Parses a whole number, 1 or more: the type of a command-line argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}. Expected a whole number, 1 or more.")
    return int(text)


def as_typed(name: str, argv: Sequence[str], data_dir: str | None = None) -> str:
    """Returns the command ``python -m experiments.NAME ARGV``, for the header of a file of results.

    It shows DIR in the place of `data_dir`, the folder of the images: its path does not matter.
    """
    shown = ["DIR" if arg == data_dir else arg for arg in argv]
    return shlex.join(["python", "-m", f"experiments.{name}", *shown])
