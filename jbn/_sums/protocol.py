"""The interface of an implementation of the sums: `sums`, `pair` and `spread`.

In all of them z = x - shift, 0 where masked in the sums, and E is the mean over the batch.
"""

from typing import NamedTuple, Protocol

import numpy as np
from jax import Array

from jbn._core.affine import Activation, Affine
from jbn._core.axes import Axes
from jbn._devices.named_axes import Scope


class Batch(NamedTuple):
    """The values that are normalised, and how they are laid out."""

    axes: Axes
    x: Array
    weights: Array | None


class Line(NamedTuple):
    """own + u + v z, a derivative of y's argument; per-feature vectors are (1, ..., C)."""

    own: Array  # a dx + dresidual, of x's shape
    u: Array
    v: Array
    constant: Array  # the value where a masked x is not finite: y is the bias there


class Sums(Protocol):
    """An implementation: hashable, because programs differ by it."""

    @property
    def in_blocks(self) -> bool:
        """Whether sums of bfloat16 may be taken by `jbn._xla.bfloat16` instead."""
        ...

    def sums(self, batch: Batch, shift: Array, count: Array) -> tuple[Array, Array]:
        """(E[z], E[|z|^2]) of what one device has, (1, ..., C) each. Without a derivative."""
        ...

    def pair(
        self, batch: Batch, over: Scope, shift: Array, count: Array, dx: Array
    ) -> tuple[Array, Array]:
        """(E[dx], E[z dx]) over the batch and the scope, (1, ..., C) each; linear in dx."""
        ...

    def spread(
        self,
        batch: Batch,
        at: Affine,
        line: Line,
        activation: Activation | None,
        dtype: np.dtype,
    ) -> Array:
        """The derivative of activation(a z + c) along `line`, of x's shape, in `dtype`.

        Without an activation that is own + u + v z; linear in `line`, the transpose of `pair`.
        """
        ...
