"""Running statistics as variables of a linen module: declared, read and stored."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jax import Array

from jbn import _flax
from jbn._core.running import RunningStats

# These are functions, not methods, because Flax wraps and records every method of a module.


def declare(
    module: nn.Module, shape: tuple[int, ...], counts: bool, *others: Dtype | None
) -> list[nn.Variable[Array]]:
    """Declares mean, var and, if batches are counted, count, in `batch_stats`, in float32.

    The mean is complex if one of the dtypes `others` is.
    """
    mean = _flax.mean_dtype(jnp.float32, *others)
    initial: dict[str, tuple[Callable[..., Array], Any]]
    initial = {"mean": (jnp.zeros, mean), "var": (jnp.ones, jnp.float32)}
    if counts:
        initial["count"] = (jnp.zeros, jnp.float32)
    return [
        module.variable("batch_stats", name, init, shape, dtype)
        for name, (init, dtype) in initial.items()
    ]


def read(variables: Sequence[nn.Variable[Array]]) -> RunningStats:
    """Returns the statistics; a count that is not declared is 0."""
    mean, var, *count = (v.value for v in variables)
    return RunningStats(mean, var, *(count or [jnp.zeros(var.shape, jnp.float32)]))


def store(variables: Sequence[nn.Variable[Array]], stats: Sequence[Array]) -> None:
    """Stores the statistics, if there are new ones, in the variables that are declared."""
    for variable, value in zip(variables, stats, strict=False):
        variable.value = value
