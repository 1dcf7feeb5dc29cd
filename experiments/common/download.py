"""What downloads share: pooch, which fetches a file once and checks it, and its errors in words.

The commands that download know the options ``--download [URL]`` and ``--data-dir DIR``, and the
messages name them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def import_pooch(instead: str) -> Any:
    """The package that downloads; without it an error that says what to do instead."""
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
    """What pooch raises within, in words that say what to do."""
    instead = "name another mirror (--download URL), or give a folder that has the files with"
    try:
        yield
    except OSError as error:
        reason = str(error).rstrip(".")
        raise OSError(
            f"Could not fetch {name} from {url}: {reason}. Try again, {instead} --data-dir."
        ) from error
    except ValueError as error:  # for a wrong checksum
        reason = str(error).rstrip(".")
        raise ValueError(
            f"{url} does not serve the published {name}: {reason}. Instead, {instead} --data-dir."
        ) from error
