"""Named axes: the program instances that share statistics, and their collectives.

`Scope.gather` sends the moments of every instance to every instance, and `pooling` joins them.
`Scope.sum` adds up numbers; it is linear, so that JAX can transpose it in a backward pass. Each is
one collective.
"""

import contextlib
import contextvars
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbn._core.axes import integer

T = TypeVar("T")

AxisName = Hashable | tuple[Hashable, ...]


class Scope(NamedTuple):
    """The program instances that share statistics; `Scope()` is this one alone. Static."""

    names: tuple[Hashable, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None  # axis_index_groups of jax.lax.psum

    def gather(self, x: Array) -> Array:
        """Stacks x of every instance: [...] -> [n, ...]; some instances may not be `members`."""
        if self.groups is not None and self._native_groups(checked=True):
            return lax.all_gather(x, self.names, axis_index_groups=self.groups)
        shape = x.shape
        mesh = tuple(name for name in self.names if name in _mesh_axes())
        axes = [name for name in self.names if name not in mesh]  # of vmap: no communication
        for name in reversed(axes):
            x = lax.all_gather(x, name)
        if mesh:
            # "invarying": the result is replicated, and shard_map may know it. tiled=True joins
            # along an existing axis: JAX (to 0.12) puts a new axis in the wrong place if vmap adds
            # another one that is sharded over an Explicit mesh axis.
            x = lax.all_gather(x[None], mesh, to="invarying", tiled=True)
        axes = [*mesh, *axes]
        x = x.reshape(*(lax.axis_size(name) for name in axes), *shape)
        x = jnp.moveaxis(x, [axes.index(name) for name in self.names], range(len(axes)))
        return x.reshape(-1, *shape)

    def members(self) -> Array | None:
        """Returns [n] bool, which of `gather`'s values are of this group; None for all."""
        if self.groups is None or self._native_groups(checked=True):
            return None
        return jnp.asarray(self._table()) == self._group()

    def sum(self, tree: T) -> T:
        """Adds up every leaf over the scope: one collective for the whole tree."""
        if not self.names:
            return tree
        if self.groups is None or self._native_groups(checked=False):
            return lax.psum(tree, self.names, axis_index_groups=self.groups)
        # Every group adds up in a row of its own.
        own = jnp.arange(len(self.groups), dtype=np.int32) == self._group()

        def place(x: Array) -> Array:
            return jnp.where(own.reshape(-1, *(1 for _ in jnp.shape(x))), x, jnp.zeros_like(x))

        def take(x: Array) -> Array:
            return jnp.sum(jnp.where(own.reshape(-1, *(1 for _ in x.shape[1:])), x, 0), axis=0)

        return jax.tree.map(take, lax.psum(jax.tree.map(place, tree), self.names))

    def _table(self) -> np.ndarray:
        """Returns [n], the group of each instance."""
        assert self.groups is not None
        table = np.zeros(sum(map(len, self.groups)), np.int32)
        for i, group in enumerate(self.groups):
            table[list(group)] = i
        return table

    def _group(self) -> Array:
        """Returns the group of this instance."""
        return jnp.asarray(self._table())[lax.axis_index(self.names)]

    def _native_groups(self, checked: bool) -> bool:
        """Returns whether JAX's collectives take the groups here, so that only they communicate.

        Collectives of vmap do not, nor does psum in a shard_map with check_vma (jax 0.12). Groups
        of unequal sizes do not work on every platform.
        """
        assert self.groups is not None
        if len({len(group) for group in self.groups}) > 1:
            return False
        if not all(name in _mesh_axes() for name in self.names):
            return False
        return checked or not varying(lax.axis_index(self.names))


def scope(
    axis_name: AxisName | None, axis_index_groups: Sequence[Sequence[int]] | None = None
) -> Scope:
    """Makes the arguments of `jax.lax.psum` static and hashable.

    Raises:
      NameError: no vmap, pmap or shard_map has bound a name.
      NotImplementedError: JAX has no collectives over this axis here.
      TypeError: axis_name is not a name, or axis_index_groups are not groups of indices.
      ValueError: a name is given twice, or the groups do not fit.
    """
    names = () if axis_name is None else _names(axis_name)
    if not names:
        if axis_index_groups is not None:
            raise ValueError(
                f"axis_index_groups={axis_index_groups} are groups of a named axis: pass "
                f"axis_name= too."
            )
        return Scope()
    if len(set(names)) < len(names):
        raise ValueError(f"axis_name={axis_name!r} names an axis twice: name each once.")
    size = math.prod(_axis_size(name) for name in names)
    for name in names:
        _reduces_here(name)
    if (shared := _shared.get()) is not None:
        shared.update(dict.fromkeys(names))
    if axis_index_groups is None:
        return Scope(names)
    groups = _index_groups(axis_index_groups)
    if sorted(i for group in groups for i in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups={axis_index_groups} must hold each index of axis_name="
            f"{axis_name!r}, 0 to {size - 1}, exactly once."
        )
    return Scope(names, groups)


def _names(axis_name: AxisName) -> tuple[Hashable, ...]:
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    for name in names:
        # JAX's collectives take a number for the position of an axis of the array.
        if not isinstance(name, Hashable) or isinstance(name, int | float | np.generic | Array):
            raise TypeError(
                f"axis_name is what a surrounding vmap, pmap or shard_map calls its axis, such as "
                f"axis_name='batch'; got {axis_name!r}. The feature axis of x is axis=."
            )
    return names


def _index_groups(groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    try:
        found = tuple(tuple(map(integer, group)) for group in groups)
    except TypeError:  # not a sequence of sequences
        found = ((None,),)
    if any(index is None for group in found for index in group):
        raise TypeError(
            f"axis_index_groups must be groups of indices, such as [[0, 1], [2, 3]]; got "
            f"{groups!r}."
        )
    return tuple(tuple(i for i in group if i is not None) for group in found)


# The axes over which layers share statistics while a step is traced; None outside of a step.
_shared: contextvars.ContextVar[dict[Hashable, None] | None] = contextvars.ContextVar(
    "shared", default=None
)


@contextlib.contextmanager
def recorded() -> Iterator[dict[Hashable, None]]:
    """Collects the names of the axes of every `scope` that is made inside, in order."""
    names: dict[Hashable, None] = {}
    token = _shared.set(names)
    try:
        yield names
    finally:
        _shared.reset(token)


def varying(x: Array) -> frozenset[Hashable]:
    """Returns the axes of a shard_map over which x is device-varying; none without check_vma."""
    return jax.typeof(x).manual_axis_type.varying


def vary_as(x: Array, values: Array) -> Array:
    """Makes `values` device-varying over the axes over which x is device-varying."""
    missing = tuple(sorted(varying(x) - varying(values), key=str))
    return lax.pcast(values, missing, to="varying") if missing else values


def is_typed(name: Any) -> bool:
    """Returns whether array types record variation over this axis; not in pmap and vmap."""
    return name in varying(lax.axis_index(name))


def vary(tree: T, names: Sequence[Any]) -> T:
    """Makes values device-varying over the axes for which there are such types."""
    typed = [n for n in names if is_typed(n)]

    def mark(x: Any) -> Any:
        missing = tuple(n for n in typed if n not in varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def _mesh_axes() -> tuple[Hashable, ...]:
    """Returns the axes of shard_map and pmap, whose instances are devices; not those of vmap."""
    return jax.sharding.get_abstract_mesh().manual_axes


def _axis_size(name: Hashable) -> int:
    try:
        return lax.axis_size(name)
    except NameError:
        bound = ", ".join(map(repr, bound_axes())) or "none"
        raise NameError(
            f"axis_name={name!r} is unbound here (bound axes: {bound}). It must be an axis of a "
            f"surrounding shard_map, pmap or vmap(..., axis_name={name!r}). Under jit with sharded "
            f"arrays leave axis_name out: x is the global array there, and so are its statistics."
        ) from None


def _reduces_here(name: Hashable) -> None:
    """Refuses an axis of vmap in a shard_map with check_vma, where JAX (to 0.12) only asserts."""
    checked = any(varying(lax.axis_index(axis)) for axis in _mesh_axes())
    if checked and name not in _mesh_axes():
        raise NotImplementedError(
            f"axis_name={name!r} is an axis of vmap inside a shard_map that checks what varies, "
            f"where JAX has no collectives over it. Pass check_vma=False to shard_map, or make "
            f"{name!r} an axis of the mesh (bound axes: {', '.join(map(repr, bound_axes()))})."
        )


def bound_axes() -> tuple[Hashable, ...]:
    """Returns the names of all bound axes, for messages."""
    names = getattr(jax.extend.core, "unsafe_get_axis_names_DO_NOT_USE", _mesh_axes)
    return tuple(names())
