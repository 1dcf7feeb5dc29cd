"""The interface of an implementation of the sums: `sums`, `pair` and `spread`.

In all three z = x - shift, and E is the mean over the batch. In the means z is 0 where masked.
"""

from typing import NamedTuple, Protocol

import numpy as np
from jax import Array

from jbn._core.affine import Activation, Affine
from jbn._core.axes import Axes
from jbn._devices.named_axes import Scope


class Batch(NamedTuple):
    """The values that are normalised, with their axes and weights."""

    axes: Axes
    x: Array
    weights: Array | None


class Line(NamedTuple):
    """The derivative own + u + v z of the activation's input; vectors are (1, ..., C)."""

    own: Array  # a dx + dresidual, of x's shape
    u: Array
    v: Array
    constant: Array  # the value where a masked x is not finite: y is the bias there


class Sums(Protocol):
    """The interface of an implementation, which is hashable, because programs depend on it."""

    @property
    def in_blocks(self) -> bool:
        """Whether sums of bfloat16 may be taken by `jbn._xla.bfloat16` instead."""
        ...

    def sums(self, batch: Batch, shift: Array, count: Array) -> tuple[Array, Array]:
        """Computes (E[z], E[|z|^2]) on one device, (1, ..., C) each. It is never differentiated."""
        ...

    def pair(
        self, batch: Batch, over: Scope, shift: Array, count: Array, dx: Array
    ) -> tuple[Array, Array]:
        """Computes (E[dx], E[z dx]) over batch and scope, (1, ..., C) each; linear in dx."""
        ...

    def spread(
        self,
        batch: Batch,
        at: Affine,
        line: Line,
        activation: Activation | None,
        dtype: np.dtype,
    ) -> Array:
        """Computes the derivative of activation(a z + c) along `line`, of x's shape, in `dtype`.

        Without an activation this is own + u + v z; linear in `line`, the transpose of `pair`.
        """
        ...
