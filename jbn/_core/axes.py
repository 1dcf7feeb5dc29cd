"""The roles of x's axes: feature axes, reduction axes, and an axis of groups."""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


class Axes(NamedTuple):
    """The axes of one input, split by their role. Everything here is static.

    Each layer reads several properties; each property caches 128 small results at most.
    """

    shape: tuple[int, ...]  # of x
    features: tuple[int, ...]  # sorted, not negative
    reduction: tuple[int, ...]  # all other axes, in order, without `group`
    group: int | None = None  # the axis of groups of examples; each group has its own statistics

    @property
    def groups(self) -> int:
        """The number of groups of examples."""
        return 1 if self.group is None else self.shape[self.group]

    @property
    def whole(self) -> "Axes":
        """The axes of x without the axis of groups, the inverse of `split`."""
        if self.group is None:
            return self
        at, shape = self.group, self.shape
        return Axes(
            (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]),
            tuple(i - (i > at) for i in self.features),
            tuple(i - 1 for i in self.reduction),
        )

    @property
    @functools.lru_cache  # noqa: B019
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of scale, bias, mean and var: (C,) for one feature axis."""
        return tuple(self.shape[i] for i in self.features)

    @property
    @functools.lru_cache  # noqa: B019
    def per_feature(self) -> tuple[int, ...]:
        """The shape (1, ..., C), which broadcasts against x; the axis of groups is kept."""
        return tuple(1 if i in self.reduction else n for i, n in enumerate(self.shape))

    @property
    @functools.lru_cache  # noqa: B019
    def per_position(self) -> tuple[int, ...]:
        """The shape (N, ..., 1), in which one value per position broadcasts against x."""
        return tuple(1 if i in self.features else n for i, n in enumerate(self.shape))

    @property
    @functools.lru_cache  # noqa: B019
    def size(self) -> int:
        """The number of values of each feature, in each group."""
        return math.prod(self.shape[i] for i in self.reduction)

    def expand(self, values: Array) -> Array:
        """Reshapes values of feature shape, or one for all features, to broadcast against x.

        Values of x's rank, such as one scale per example and feature, already do.
        """
        if values.ndim == len(self.shape):
            return values
        where = (n if i in self.features else 1 for i, n in enumerate(self.shape))
        return values.reshape(tuple(where) if values.ndim else (1,) * len(self.shape))

    def expand_examples(self, values: Array) -> Array:
        """Reshapes [N, *feature_shape] to broadcast against x; N is its first reduction axis."""
        return jnp.squeeze(self.split(1).unsqueeze(values), self.reduction[0] + 1)

    def squeeze(self, values: Array) -> Array:
        """Inverts `expand`; with groups the result is [groups, *feature_shape]."""
        if self.group is not None:
            values = jnp.moveaxis(values, self.group, 0)
            kept = (0, *(i + (i < self.group) for i in self.features))
        else:
            kept = self.features
        return values.reshape(tuple(values.shape[i] for i in kept))

    def unsqueeze(self, values: Array) -> Array:
        """Inverts `squeeze`; some axes of the values may have size 1."""
        where = [1] * len(self.shape)
        sizes = values.shape if self.group is None else values.shape[1:]
        for i, n in zip(self.features, sizes, strict=True):
            where[i] = n
        if self.group is None:
            return values.reshape(where)
        del where[self.group]
        return jnp.moveaxis(values.reshape(values.shape[0], *where), 0, self.group)

    def split(self, groups: int) -> "Axes":
        """Divides the first reduction axis, or each group, into `groups` groups."""
        if self.group is not None:
            shape = list(self.shape)
            shape[self.group] *= groups
            shape[self.reduction[0]] //= groups
            return self._replace(shape=tuple(shape))
        at = self.reduction[0]
        return Axes(
            (*self.shape[:at], groups, self.shape[at] // groups, *self.shape[at + 1 :]),
            tuple(i + (i >= at) for i in self.features),
            tuple(i + 1 for i in self.reduction),
            at,
        )


def resolve(shape: tuple[int, ...], axis: int | Sequence[int]) -> Axes:
    """Divides the axes of an array of `shape` into feature axes (`axis`) and reduction axes.

    Raises:
      TypeError: `axis` is not an integer or a sequence of integers.
      numpy.exceptions.AxisError: an axis is out of range for `shape`; it is a ValueError and an
        IndexError.
      ValueError: `axis` names an axis twice or is empty, or `shape` is ().
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
    if isinstance(axis, Tracer):
        raise TypeError(
            f"axis must be a Python integer, because it decides shapes; got a traced value, "
            f'{axis}. Under jax.jit name it, static_argnames="axis", or close over it: '
            f"jax.jit(lambda x: jbn.normalize(x, axis=1))."
        )
    axes: tuple[int | None, ...] = (integer(axis),)
    if axes == (None,) and isinstance(axis, Iterable):  # an array of shape () is an integer
        axes = tuple(map(integer, axis))
    if None in axes:
        raise TypeError(
            f"axis must be an integer or a tuple of integers, such as axis=-1 or axis=(1, 3); "
            f"got {axis!r}."
        )
    return tuple(a for a in axes if a is not None)


def integer(value: Any) -> int | None:
    """Converts an integer of Python, NumPy or an array of shape () to int; all else to None."""
    if isinstance(value, bool | Tracer):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
