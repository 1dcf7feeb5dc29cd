"""Which axes of x hold features, and which ones the statistics are taken over."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax import Array


class Axes(NamedTuple):
    """The axes of one input, split by their role. Everything here is static."""

    shape: tuple[int, ...]  # of x
    features: tuple[int, ...]  # sorted, not negative
    reduction: tuple[int, ...]  # the others, in order

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of scale, bias, mean and var: (C,) for one feature axis."""
        return tuple(self.shape[i] for i in self.features)

    @property
    def per_feature(self) -> tuple[int, ...]:
        """The shape in which per-feature values broadcast against x: (1, ..., C)."""
        return tuple(n if i in self.features else 1 for i, n in enumerate(self.shape))

    @property
    def per_position(self) -> tuple[int, ...]:
        """The shape in which values for all features at once broadcast against x: (N, ..., 1)."""
        return tuple(1 if i in self.features else n for i, n in enumerate(self.shape))

    @property
    def size(self) -> int:
        """How many values of x each feature has."""
        return math.prod(self.shape[i] for i in self.reduction)

    def expand(self, values: Array) -> Array:
        """Feature shape, or a scalar for all features -> a shape that broadcasts against x."""
        return values.reshape(self.per_feature if values.ndim else (1,) * len(self.shape))

    def squeeze(self, values: Array) -> Array:
        """The inverse of `expand`."""
        return values.reshape(tuple(values.shape[i] for i in self.features))


def resolve(shape: tuple[int, ...], axis: int | Sequence[int]) -> Axes:
    """Splits the axes of an array of `shape` into features (`axis`) and the rest.

    Raises:
      TypeError: `axis` is not an integer or a sequence of integers.
      numpy.exceptions.AxisError: an axis is out of range for `shape`; it is a ValueError and an
        IndexError.
      ValueError: an axis stands twice, or there is none.
    """
    ndim = len(shape)
    if ndim == 0:
        raise ValueError(
            "x of shape () is a single number: it needs a feature axis and a batch, [N, ..., C]."
        )
    features = []
    for a in _as_tuple(axis):
        if not -ndim <= a < ndim:
            raise np.exceptions.AxisError(
                f"axis={axis} is out of range for x of shape {shape}: the feature axis must lie "
                f"between {-ndim} and {ndim - 1}."
            )
        features.append(a % ndim)
    if len(set(features)) < len(features):
        raise ValueError(f"axis={axis} names an axis of x, of shape {shape}, more than once.")
    if not features:
        raise ValueError(f"axis={axis} is empty: name at least one feature axis, such as axis=-1.")
    reduction = tuple(i for i in range(ndim) if i not in features)
    return Axes(tuple(shape), tuple(sorted(features)), reduction)


def _as_tuple(axis: int | Sequence[int]) -> tuple[int, ...]:
    axes = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    try:
        if any(isinstance(a, bool) for a in axes):
            raise TypeError
        return tuple(operator.index(a) for a in axes)
    except TypeError:
        raise TypeError(
            f"axis must be an integer or a tuple of integers, such as axis=-1 or axis=(1, 3); "
            f"got {axis!r}."
        ) from None
