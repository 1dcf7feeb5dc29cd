"""Chooses the layer that sbx's actor and critic normalise with: its own, or jbn's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jbn.linen.crossq

LAYERS = ("sbx", "jbn")


@contextlib.contextmanager
def using(layer: str, **fields: Any) -> Iterator[None]:
    """Makes sbx normalise with `layer`; keep every call of the model inside.

    sbx looks the class up by its name in `sbx.crossq.policies`, each time that JAX traces the
    actor or the critic. So this replaces the name, and puts sbx's class back at the end.

    Args:
      layer: "sbx" or "jbn".
      **fields: of the layer, which sbx does not set, such as epsilon.
    """
    from sbx.crossq import policies  # pyright: ignore[reportMissingImports]  (optional)

    theirs = policies.BatchRenorm
    chosen = {"sbx": theirs, "jbn": jbn.linen.crossq.BatchRenorm}[layer]
    policies.BatchRenorm = functools.partial(chosen, **fields)
    try:
        yield
    finally:
        policies.BatchRenorm = theirs
