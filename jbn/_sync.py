"""Sums over named axes: where statistics become those of several program instances."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jax import Array, lax

T = TypeVar("T")

AxisName = Hashable | tuple[Hashable, ...]


class Scope(NamedTuple):
    """The program instances that share statistics; `Scope()` is this one alone. Static."""

    axis_name: AxisName | None = None  # as in jax.lax.psum
    groups: tuple[tuple[int, ...], ...] | None = None  # axis_index_groups of jax.lax.psum

    def sum(self, tree: T) -> T:
        """Adds up every leaf over the scope: one collective for the whole tree."""
        if self.axis_name is None:
            return tree
        return lax.psum(tree, self.axis_name, axis_index_groups=self.groups)

    def max(self, x: Array) -> Array:
        """The largest x of the scope (of the real and imaginary parts, for complex x)."""
        if self.axis_name is None:
            return x
        if jnp.iscomplexobj(x):
            return lax.complex(self.max(x.real), self.max(x.imag))
        return lax.pmax(x, self.axis_name, axis_index_groups=self.groups)


def scope(
    axis_name: AxisName | None, axis_index_groups: Sequence[Sequence[int]] | None = None
) -> Scope:
    """Makes the arguments of `jax.lax.psum` static and hashable.

    Raises:
      ValueError: groups without the name of the axis that they group.
    """
    groups = axis_index_groups
    if groups is not None and axis_name is None:
        raise ValueError(
            f"axis_index_groups={groups} are groups of a named axis: pass axis_name= too."
        )
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    return Scope(axis_name, None if groups is None else tuple(tuple(g) for g in groups))
