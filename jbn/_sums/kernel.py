"""Sums by a kernel, for x of [..., C] on one device, such as the C++ kernel of `jbn.native`."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jbn._core.affine import Activation, Affine
from jbn._core.axes import Axes
from jbn._devices.named_axes import Scope
from jbn._sums.protocol import Batch, Line
from jbn._sums.xla import XlaSums


class KernelSums(NamedTuple):
    """`Sums` by a kernel, and by XLA for all that the kernel does not compute.

    Attributes:
      maps: has `usable`, `sums`, `pair` and `spread`, as `jbn.native` documents them.
      in_blocks: see `Sums`.
    """

    maps: Any
    in_blocks: bool = False

    def fits(self, batch: Batch, over: Scope) -> bool:
        """Returns whether all axes but the last are summed, without weights, on one device."""
        axes, x, weights = batch
        plain = axes.features == (len(axes.shape) - 1,) and axes.group is None and weights is None
        return plain and not over.names and 0 not in x.shape and self.maps.usable(x)

    def sums(self, batch: Batch, shift: Array, count: Array) -> tuple[Array, Array]:
        """See `Sums`."""
        return _means(batch.axes, self.maps.sums(batch.x, batch.axes.squeeze(shift)), count)

    def pair(
        self, batch: Batch, over: Scope, shift: Array, count: Array, dx: Array
    ) -> tuple[Array, Array]:
        """See `Sums`."""
        return _means(batch.axes, self.maps.pair(batch.x, batch.axes.squeeze(shift), dx), count)

    def spread(
        self,
        batch: Batch,
        at: Affine,
        line: Line,
        activation: Activation | None,
        dtype: np.dtype,
    ) -> Array:
        """See `Sums`. Without an activation, or with ReLU, the kernel does it in one pass."""
        if activation not in (None, jax.nn.relu):
            return XlaSums().spread(batch, at, line, activation, dtype)
        row = batch.axes.squeeze
        gate = None if activation is None else (row(at.a), row(at.c))
        shift, u, v = map(row, (at.shift, line.u, line.v))
        return self.maps.spread(batch.x, shift, u, v, line.own, gate=gate, dtype=dtype)


def _means(axes: Axes, sums: tuple[Array, Array], count: Array) -> tuple[Array, Array]:
    """Divides sums [C] by the count; the result is (1, ..., C)."""
    first, second = (axes.expand(values) / count for values in sums)
    return first, second
