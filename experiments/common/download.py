"""Imports pooch, which fetches a file once and checks it, and explains its errors.

The error messages name the options ``--download [URL]`` and ``--data-dir DIR``, which every command
that downloads has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def import_pooch(instead: str) -> Any:
    """Imports pooch; if it is missing, raises an error that says what to do instead."""
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            "--download needs the package pooch, which is not installed: pip install pooch, or "
            f"{instead}."
        ) from error
    return pooch


@contextlib.contextmanager
def download_explained(name: str, url: str) -> Iterator[None]:
    """Adds advice for the user to the errors that pooch raises within the block."""
    instead = "name another mirror (--download URL), or give a folder that has the files with"
    try:
        yield
    except OSError as error:
        reason = str(error).rstrip(".")
        raise OSError(
            f"Could not fetch {name} from {url}: {reason}. Try again, {instead} --data-dir."
        ) from error
    except ValueError as error:  # pooch's for a wrong checksum
        reason = str(error).rstrip(".")
        raise ValueError(
            f"{url} does not serve the published {name}: {reason}. Instead, {instead} --data-dir."
        ) from error
