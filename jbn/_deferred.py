"""Running statistics that wait: the moments of a step's parts, pooled, enter once as one batch's.

A batch may be seen in parts: microbatches whose gradients are accumulated, or shares of devices
that normalise on their own. Updated from each part, running averages move several times a step, and
by variances within parts, which are too small. So a step can hand its layers statistics that wait:

    defer(tree)         each array becomes Deferred(value)
    absorb(...)         a layer given Deferred statistics returns Updates: the rule and the moments
    settle(tree, ...)   pools the moments of all parts, and only then applies the rule

Whoever wants the moments themselves, such as `jbn.population`, takes the `cells` instead; and with
`defer(tree, fixed=True)` layers normalise by the statistics that they are given, as at inference,
and return the moments of their batch all the same.

Deferred and Update are pytree nodes, and each stands for one array of the tree (a mean, a variance
or a count) without needing the others. So they pass through scan, remat and vmap, and through any
container: tuples of RunningStats, Flax's `batch_stats`, nnx's State.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn import _running
from jbn._pool import Moments, pool, square
from jbn._running import RunningStats, UpdateRule
from jbn._sync import AxisName, Scope, varying

T = TypeVar("T")


class _Waiting:
    """What only a layer of jbn can read: everything else is told which statistics these are."""

    path: str

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(_not_ours(self.path))

    __jax_array__ = __array__ = __getitem__ = __neg__ = __abs__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = (
        _refuse
    )
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


def _not_ours(path: str) -> str:
    return (
        f"the statistics at {path or 'the root'} belong to a layer that is not jbn's: only jbn's "
        f"say what their batch's moments are, so that those of several batches, microbatches or "
        f"devices can be pooled. Use jbn.batch_norm, jbn.linen.BatchNorm or jbn.nnx.BatchNorm "
        f"there. A training step can do without, by pool_stats=False: each microbatch then updates "
        f"the statistics in turn, and synchronising devices is the layers' own affair."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred(_Waiting):
    """One array of the running statistics, to be read by a layer and updated later."""

    value: Array
    path: str = ""  # where it stands in the tree, for error messages
    fixed: bool = False  # the layer is to normalise by these statistics, not by its batch's

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """Of the array."""
        return self.value.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Update(_Waiting):
    """What one array of the running statistics will be, once all moments are known.

    Attributes:
      stats: before the step.
      moments: of each call of the layer, in order; count, mean and var all of shape [C].
      rules: of each call.
      over: of each call, the program instances whose moments these are already.
      field: which field of RunningStats this is.
      path: where it stands in the tree.
      fixed: whether the layer normalised by `stats`.
    """

    stats: RunningStats
    moments: tuple[Moments, ...]
    rules: tuple[UpdateRule, ...]
    over: tuple[Scope, ...]
    field: str
    path: str = ""
    fixed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return getattr(self.stats, self.field).shape

    @property
    def dtype(self) -> Any:
        """Of the array."""
        return getattr(self.stats, self.field).dtype

    def settled(self) -> RunningStats:
        """The statistics after the calls, one by one, as without deferral."""
        stats = self.stats
        for rule, moments in zip(self.rules, self.moments, strict=True):
            stats = _running.absorb(rule, stats, moments)
        return stats


jax.tree_util.register_dataclass(Deferred, ["value"], ["path", "fixed"])
jax.tree_util.register_dataclass(
    Update, ["stats", "moments"], ["rules", "over", "field", "path", "fixed"]
)


def defer(tree: T, *, fixed: bool = False) -> T:
    """Every array of a tree of statistics, marked as to be updated later.

    With `fixed`, layers are to normalise by them, and not by their batch's.
    """

    def mark(path: Any, value: Array) -> Any:
        return Deferred(jnp.asarray(value), jax.tree_util.keystr(path), fixed)

    return jax.tree_util.tree_map_with_path(mark, tree)


def read(stats: RunningStats) -> RunningStats:
    """The arrays that a layer sees: those before the step; after a call in the step, its own.

    Statistics that are fixed stay as they were before the step.
    """
    if not waits(stats):
        return stats
    for cell in stats:
        if isinstance(cell, Update):
            return cell.stats if cell.fixed else cell.settled()
    return RunningStats(*(v.value if isinstance(v, Deferred) else v for v in stats))


def absorb(
    rule: UpdateRule,
    stats: RunningStats,
    moments: Moments,
    given: RunningStats,
    over: Scope,
) -> RunningStats:
    """`_running.absorb`; if the statistics `given` to the layer wait, what it will have to do.

    Args:
      rule: as for `_running.absorb`.
      stats: `read(given)`.
      moments: of the batch that this call saw.
      given: arrays, Deferred, or the Updates of an earlier call in the same step.
      over: the program instances whose moments these are.
    """
    new = _running.absorb(rule, stats, moments)  # checks rule and result, now
    if not waits(given):
        return new
    moments = lax.stop_gradient(moments)
    # Of full shape, so that a leading axis (of nn.scan, say) is one of every field.
    moments = moments._replace(count=moments.count + jnp.zeros_like(moments.var))
    earlier = next((v for v in given if isinstance(v, Update)), None)
    if earlier is None:
        calls = (moments,), (rule,), (over,)
    else:
        stats = earlier.stats
        calls = (*earlier.moments, moments), (*earlier.rules, rule), (*earlier.over, over)
    stats = lax.stop_gradient(stats)
    updates: Any = [  # in the place of arrays
        Update(stats, *calls, field, getattr(getattr(given, field), "path", ""), fixed(given))
        for field in RunningStats._fields
    ]
    return RunningStats(*updates)


def settle(tree: T, *, stacked: bool = False, axis_name: AxisName | None = None) -> T:
    """The updated arrays: each rule applied once to the moments of all parts, pooled by count.

    Args:
      tree: what the layers made of `defer(stats)`.
      stacked: whether every array has a further leading axis, that of the microbatches.
      axis_name: pool over the program instances of these axes too, where the layer has not.

    Returns:
      A tree of arrays, of the shape of `stats`. What no layer updated is as it was.

    Raises:
      TypeError: a leaf is an array: its layer does not know of deferral.
    """
    arrays = [
        getattr(cell.settled(), cell.field) if isinstance(cell, Update) else cell.value
        for cell in cells(tree, stacked=stacked, axis_name=axis_name)
    ]
    return jax.tree.unflatten(_structure(tree), arrays)


def cells(tree: Any, *, stacked: bool = False, axis_name: AxisName | None = None) -> list[Any]:
    """Of every array Update or Deferred, in the order of the tree, with moments of all parts.

    Arguments and errors are those of `settle`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_waiting)
    for path, leaf in leaves:
        if not is_waiting(leaf):
            raise TypeError(_not_ours(jax.tree_util.keystr(path)))
    found = [_unstack(cell) if stacked else cell for _, cell in leaves]
    if axis_name is None:
        return found
    return _pool_instances(found, axis_name if isinstance(axis_name, tuple) else (axis_name,))


def check_structure(function: str, new: Any, old: Any) -> None:
    """The statistics that come back from the user's function are those that went in, updated."""
    if _structure(new) != _structure(old):
        raise ValueError(
            f"{function} must return statistics of the structure that it was given; given\n"
            f"{_structure(old)}\nand returned\n{_structure(new)}\nFrom linen's "
            f'apply(..., mutable=["batch_stats"]) return updates["batch_stats"].'
        )


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=is_waiting)


def is_waiting(value: Any) -> bool:
    """Whether this is a Deferred or an Update."""
    return isinstance(value, _Waiting)


def waits(stats: Any) -> bool:
    """Whether any field of these statistics is a Deferred or an Update."""
    return isinstance(stats, tuple) and any(map(is_waiting, stats))


def fixed(stats: Any) -> bool:
    """Whether a layer is to normalise by these statistics in training, too."""
    return waits(stats) and any(is_waiting(value) and value.fixed for value in stats)


def _unstack(cell: Any) -> Any:
    """The microbatches' moments as one; before the step all have the same statistics."""
    if isinstance(cell, Deferred):
        return dataclasses.replace(cell, value=cell.value[0])
    stats = jax.tree.map(lambda values: values[0], cell.stats)
    return dataclasses.replace(cell, stats=stats, moments=tuple(map(pool, cell.moments)))


def _pool_instances(cells: Sequence[Any], axis_names: tuple[Any, ...]) -> list[Any]:
    """Two collectives for all cells together: one for counts and means, one for variances."""
    own = [
        (m, over)
        for cell in cells
        if isinstance(cell, Update)
        for m, over in zip(cell.moments, cell.over, strict=True)
    ]
    pooled: dict[int, Moments] = {}
    scopes = [_different(over, axis_names) for _, over in own]
    for names in dict.fromkeys(scopes):
        chosen = [i for i, scope in enumerate(scopes) if scope == names]
        alike = [_share(*own[i], names) for i in chosen]
        pooled.update(zip(chosen, _pool_over(alike, names) if names else alike, strict=True))
    moments = iter([pooled[i] for i in range(len(own))])
    return [
        dataclasses.replace(cell, moments=tuple(next(moments) for _ in cell.moments))
        if isinstance(cell, Update)
        else cell
        for cell in cells
    ]


def _different(over: Scope, names: tuple[Any, ...]) -> tuple[Any, ...]:
    """The axes over which instances have different moments."""
    return names if over.groups else tuple(n for n in names if n not in over.names)


def _share(m: Moments, over: Scope, names: tuple[Any, ...]) -> Moments:
    """Of moments that a group of instances has in common, each brings its part of the count."""
    if over.groups is None or not set(names) & set(over.names):
        return m
    sizes = {len(group) for group in over.groups}
    size = over.sum(jnp.ones_like(m.count)) if len(sizes) > 1 else sizes.pop()
    return m._replace(count=m.count / size)


def _pool_over(moments: list[Moments], names: tuple[Any, ...]) -> list[Moments]:
    """The moments of all instances together: the mean first, so that nothing cancels in var."""
    sums = [(m.count, m.count.astype(m.mean.dtype) * m.mean) for m in moments]
    totals = lax.psum(vary(sums, names), names)
    counts = [jnp.where(n > 0, n, jnp.ones_like(n)) for n, _ in totals]
    means = [s / n.astype(s.dtype) for (_, s), n in zip(totals, counts, strict=True)]
    parts = [
        m.count / n * (m.var + square(m.mean - mean))
        for m, n, mean in zip(moments, counts, means, strict=True)
    ]
    variances = lax.psum(vary(parts, names), names)
    return [Moments(n, *mv) for (n, _), *mv in zip(totals, means, variances, strict=True)]


# Under shard_map(check_vma=True) JAX knows of every array over which axes it varies.


def is_typed(name: Any) -> bool:
    """Whether arrays are typed by how they vary over an axis: not in pmap, nor in vmap."""
    return name in varying(lax.axis_index(name))


def vary(tree: T, names: Sequence[Any]) -> T:
    """The same values, typed as varying over the axes, where there are such types."""
    typed = [n for n in names if is_typed(n)]

    def mark(x: Any) -> Any:
        missing = tuple(n for n in typed if n not in varying(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)
