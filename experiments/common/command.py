"""What the command lines of several experiments have in common."""

from __future__ import annotations

import argparse

NO_IMAGES = (
    "no images. Expected --data-dir DIR, with folders train and val (or test) of classes; or "
    "--dataset smoke, which needs none."
)


def at_least_one(text: str) -> int:
    """A count, the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}. Expected a whole number, 1 or more.")
    return int(text)
