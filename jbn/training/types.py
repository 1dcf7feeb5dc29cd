"""Names for the types that a step takes."""

from collections.abc import Callable, Mapping
from typing import Any

Tree = Any  # of arrays

# (params, stats, batch[, key]) -> (loss, stats, metrics)
LossFn = Callable[..., tuple[Any, Tree, Mapping[str, Any]]]
