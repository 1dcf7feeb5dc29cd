"""Slices of single rows of x, without a copy of x.

Cause: XLA for TPUs stores the examples of a narrow layer side by side, and copies x to slice along
them (jax 0.10.2, libtpu 0.0.42). Effect: the copy moves 12 bytes for each value of x. So on TPUs
the axes within an example are sliced first, and a barrier keeps XLA from merging the two slices.
Check: `python -m experiments.speed --target v5e --part op`.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from jbn._core.axes import Axes

_LANES = 128  # values that a TPU stores side by side


def rows(x: Array, axes: Axes, where: Sequence[dict[int, int]]) -> list[Array]:
    """Reads the value of every feature at each of several places, (1, ..., C) each.

    Args:
      x: of the shape of `axes`.
      axes: of x.
      where: the places, an index for each reduction axis.
    """

    def directly(x: Array) -> list[Array]:
        return [_cut(x, at) for at in where]

    if len(axes.reduction) < 2 or math.prod(axes.feature_shape) >= _LANES:
        return directly(x)
    first, *inner = axes.reduction
    examples, draws = axes.shape[first], len(where)
    if isinstance(examples, int) and examples <= draws:
        return directly(x)
    size = math.prod(axes.shape[i] for i in inner if isinstance(axes.shape[i], int))
    places = 1 if size <= draws + 1 else 3 if len(inner) == 1 else draws
    middle = (draws - places) // 2
    chosen = [{i: at[i] for i in inner} for at in where[middle : middle + places]]

    def places_first(x: Array) -> list[Array]:
        lines = jnp.concatenate([_cut(x, at) for at in chosen], inner[0])
        lines = lax.optimization_barrier(lines)
        within = [{first: at[first], inner[0]: draw % places} for draw, at in enumerate(where)]
        return [_cut(lines, at) for at in within]

    return lax.platform_dependent(x, tpu=places_first, default=directly)


def _cut(x: Array, at: dict[int, int]) -> Array:
    starts = [at.get(i, 0) for i in range(x.ndim)]
    return lax.slice(x, starts, [at[i] + 1 if i in at else n for i, n in enumerate(x.shape)])
