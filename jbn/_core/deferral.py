"""Running statistics that wait: the moments of a step's parts, pooled, enter once as one batch's.

A batch may be seen in parts: microbatches whose gradients are accumulated, or shares of devices
that normalise on their own. Updated from each part, running averages move several times a step, and
by variances within parts, which are too small. So a step can hand its layers statistics that wait:

    defer(tree)         each array becomes Deferred(value)
    absorb(...)         a layer given Deferred statistics returns Updates: the rule and the moments
    settle(tree, ...)   pools the moments of all parts, and only then applies the rule

A rule may use traced values, such as a decay that the batch brings. An Update carries them along as
data, so that they can leave a scan. Where they differ between the parts, the statistics are the
mean of what the rules of all parts make of the pooled moments.

`batch_stats` may hold the state of other layers, too, which read arrays. `chosen` tells them apart:
what layers of jbn update is deferred, what is called mean or var is taken to be the statistics of
some normalisation, and all else passes through as it is.

Whoever wants the moments themselves, such as `jbn.population`, takes the `cells` instead; and with
`defer(tree, fixed=True)` layers normalise by the statistics that they are given, as at inference,
and return the moments of their batch all the same.

Deferred and Update are pytree nodes, and each stands for one array of the tree (a mean, a variance
or a count) without needing the others. So they pass through scan, remat and vmap, and through any
container: tuples of RunningStats, Flax's `batch_stats`, nnx's State.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun

from jbn._core import running
from jbn._core.pooling import pool, pool_by_sums
from jbn._core.running import RunningStats, UpdateRule
from jbn._core.types import Moments
from jbn._devices.named_axes import AxisName, Scope, is_typed, vary, varying

T = TypeVar("T")


class NotOurs(TypeError):
    """A layer that is not jbn's reads or writes statistics that are to be pooled."""


class _Waiting:
    """What only a layer of jbn can read: everything else is told which statistics these are."""

    path: str
    fixed: bool

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotOurs(_not_ours(self.path))

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
class Rule:
    """An update rule that can leave the scan in which it was made: its traced values are data.

    Attributes:
      values: the traced values that the rule uses, perhaps none.
      function: (stats, moments, *values) -> RunningStats; static.
      ndim: of the statistics where it was made. Further axes lead, those of a scan over layers.
    """

    values: tuple[Array, ...]
    function: Callable[..., RunningStats]
    ndim: int

    def __call__(self, stats: RunningStats, moments: Moments) -> RunningStats:
        """Applies the rule, layer by layer where there are several."""
        if not self.values:
            return running.absorb(self.function, stats, moments)
        function = self.function
        for _ in range(stats.mean.ndim - self.ndim):
            function = jax.vmap(function)
        return function(stats, moments, *self.values)


@dataclasses.dataclass(frozen=True, eq=False)
class Update(_Waiting):
    """What one array of the running statistics will be, once all moments are known.

    Attributes:
      stats: before the step.
      moments: of each call of the layer, in order; count, mean and var all of shape [C].
      rules: of each call, with the traced values of this part.
      over: of each call, the program instances whose moments these are already.
      field: which field of RunningStats this is.
      path: where it stands in the tree.
      fixed: whether the layer normalised by `stats`.
      stacked: whether the values of the rules have a leading axis, that of the microbatches.
    """

    stats: RunningStats
    moments: tuple[Moments, ...]
    rules: tuple[Rule, ...]
    over: tuple[Scope, ...]
    field: str
    path: str = ""
    fixed: bool = False
    stacked: bool = False

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
        if not (self.stacked and self.traced):
            return self._after(self.rules)
        each = jax.vmap(self._after)(self.rules)  # by the values of each microbatch

        def mean(values: Array) -> Array:
            return values[0] + jnp.mean(values - values[:1], 0)  # exact where all are the same

        return jax.tree.map(mean, each)

    @property
    def traced(self) -> bool:
        """Whether a rule uses traced values, which may differ between the parts."""
        return any(rule.values for rule in self.rules)

    def _after(self, rules: tuple[Rule, ...]) -> RunningStats:
        stats = self.stats
        for rule, moments in zip(rules, self.moments, strict=True):
            stats = rule(stats, moments)
        return stats


jax.tree_util.register_dataclass(Deferred, ["value"], ["path", "fixed"])
jax.tree_util.register_dataclass(Rule, ["values"], ["function", "ndim"])
jax.tree_util.register_dataclass(
    Update, ["stats", "moments", "rules"], ["over", "field", "path", "fixed", "stacked"]
)


def _portable(rule: UpdateRule, stats: RunningStats, moments: Moments) -> Rule:
    """The rule without what is bound to this trace; `stats` and `moments` show it its arguments."""
    ndim = stats.mean.ndim
    function, numbers = running.split(rule)
    if function is not rule:  # an average: its decay is a number, or traced
        traced = any(isinstance(number, Array) for number in numbers)
        return Rule(numbers, function, ndim) if traced else Rule((), rule, ndim)
    program = jax.make_jaxpr(lambda *args: tuple(running.absorb(rule, *args)))(stats, moments)
    if _is_hashable(rule) and not any(isinstance(v, Tracer) for v in program.consts):
        return Rule((), rule, ndim)
    values = tuple(lax.stop_gradient(jnp.asarray(v)) for v in program.consts)
    if not values:
        values = (jnp.zeros((), jnp.int32),)  # applied from its program all the same
    return Rule(values, _Program(program), ndim)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """A rule as it was traced, of the values that it closes over."""

    program: ClosedJaxpr

    def __call__(self, stats: RunningStats, moments: Moments, *values: Array) -> RunningStats:
        closed = ClosedJaxpr(self.program.jaxpr, list(values[: len(self.program.consts)]))
        args = [
            vary(
                x, [n for n in aval.manual_axis_type.varying if is_typed(n)]
            )  # as when it was traced
            for x, aval in zip((*stats, *moments), self.program.in_avals, strict=True)
        ]
        return RunningStats(*jaxpr_as_fun(closed)(*args))


def defer(tree: T, *, fixed: bool = False, only: Collection[str] | None = None) -> T:
    """Every array of a tree of statistics, marked as to be updated later.

    With `fixed`, layers are to normalise by them, and not by their batch's. With `only`, these
    places, as `chosen` returns them; the other arrays stay arrays.
    """

    def mark(path: Any, value: Array) -> Any:
        where = jax.tree_util.keystr(path)
        if only is not None and where not in only:
            return value
        return Deferred(jnp.asarray(value), where, fixed)

    return jax.tree_util.tree_map_with_path(mark, tree)


def chosen(update: Callable[[Any], Any], stats: Any, *, fixed: bool = False) -> frozenset[str]:
    """The places of the arrays to be deferred: those of normalisations, and what jbn updates.

    Args:
      update: the user's function of statistics, which returns the new ones. It is traced where
        there are arrays of which the names do not tell whose they are.
      stats: a tree of arrays.
      fixed: as for `defer`.
    """
    leaves = {jax.tree_util.keystr(path): (path, leaf) for path, leaf in _leaves(stats)}
    by_name = frozenset(where for where in leaves if _is_statistic(where, leaves))
    if len(by_name) == len(leaves):
        return by_name
    places: list[str] = []

    def returned() -> list[Any]:
        new = _leaves(update(defer(stats, fixed=fixed, only=by_name)))
        arrays = [(jax.tree_util.keystr(path), v) for path, v in new if not is_waiting(v)]
        places[:] = [where for where, _ in arrays]
        return [v for _, v in arrays]

    try:
        jaxpr = jax.make_jaxpr(returned)().jaxpr
    except NotOurs:
        raise
    except Exception:  # it will come again when the function runs, deferred as a whole
        return frozenset(leaves)
    ours = _from_layers(jaxpr, [False] * len(jaxpr.invars))
    return by_name | {where for where, own in zip(places, ours, strict=True) if own}


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_waiting)


def _named(path: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """(the path of the layer, the name of the array in it)."""
    names = [getattr(e, "key", getattr(e, "name", getattr(e, "idx", None))) for e in path]
    if len(names) > 1 and names[-1] == "value":  # of an nnx.Variable
        names.pop()
    return tuple(names[:-1]), names[-1] if names else None


def _is_statistic(where: str, leaves: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether this is called mean or var, or is the count beside them."""
    path, leaf = leaves[where]
    layer, name = _named(path)
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return False
    if name != "count":
        return name in ("mean", "var")
    beside = {own[1]: v for p, v in leaves.values() if (own := _named(p))[0] == layer}
    return {"mean", "var"} <= set(beside) and jnp.shape(beside["var"]) == jnp.shape(leaf)


_MARK = "jbn.running_stats"


def _marked(stats: RunningStats) -> RunningStats:
    """The same, under a name by which `chosen` finds it in a traced program."""
    if not isinstance(stats.mean, Tracer):
        return stats
    return RunningStats(*(checkpoint_name(v, _MARK) for v in stats))


def _from_layers(jaxpr: Any, given: Sequence[bool]) -> list[bool]:
    """Finds for each result of a program whether it depends on what a layer of jbn updated.

    `given` says the same of its arguments.
    """
    found = {v for v, own in zip(jaxpr.invars, given, strict=True) if own}
    for eqn in jaxpr.eqns:
        args = [isinstance(v, Var) and v in found for v in eqn.invars]
        inner = list(_programs(eqn.params.values()))
        if eqn.primitive.name == "name" and eqn.params["name"] == _MARK:
            found.update(eqn.outvars)
        elif not inner:
            found.update(eqn.outvars if any(args) else ())
        for program in inner:
            n = len(program.invars)  # a condition comes before the arguments of its branches
            own = args[-n:] if 0 < n <= len(args) else [any(args)] * n
            results = _from_layers(program, own)
            if len(results) != len(eqn.outvars):
                results = [any(results)] * len(eqn.outvars)
            found.update(v for v, mine in zip(eqn.outvars, results, strict=True) if mine)
    return [isinstance(v, Var) and v in found for v in jaxpr.outvars]


def _programs(params: Any) -> Any:
    """The programs among the parameters of an operation: of a scan, a branch, a call."""
    for value in params:
        if isinstance(value, tuple | list):
            yield from _programs(value)
        elif hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


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
    """`running.absorb`; if the statistics `given` to the layer wait, what it will have to do.

    Args:
      rule: as for `running.absorb`.
      stats: `read(given)`.
      moments: of the batch that this call saw.
      given: arrays, Deferred, or the Updates of an earlier call in the same step.
      over: the program instances whose moments these are.
    """
    new = running.absorb(rule, stats, moments)  # checks rule and result, now
    if not waits(given):
        return _marked(new)
    # Of full shape, so that a leading axis (of nn.scan, say) is one of every field.
    moments = moments._replace(count=moments.count + jnp.zeros_like(moments.var))
    mine = _portable(rule, lax.stop_gradient(stats), moments)
    earlier = next((v for v in given if isinstance(v, Update)), None)
    if earlier is None:
        calls = (moments,), (mine,), (over,)
    else:
        stats = earlier.stats
        calls = (*earlier.moments, moments), (*earlier.rules, mine), (*earlier.over, over)
    stats = lax.stop_gradient(stats)
    updates: Any = [  # in the place of arrays
        Update(stats, *calls, field, getattr(getattr(given, field), "path", ""), fixed(given))
        for field in RunningStats._fields
    ]
    return RunningStats(*updates)


def settle(
    tree: T,
    *,
    stacked: bool = False,
    axis_name: AxisName | None = None,
    deferred: Collection[str] | None = None,
) -> T:
    """The updated arrays: each rule applied once to the moments of all parts, pooled by count.

    Args:
      tree: what the layers made of `defer(stats)`.
      stacked: whether what was deferred has a further leading axis, that of the microbatches.
      axis_name: pool over the program instances of these axes too, where the layer has not.
      deferred: the `only` of `defer`.

    Returns:
      A tree of arrays, of the shape of `stats`. What no layer updated is as it was. What was not
      deferred, and what depends on traced values of a rule, is the mean over the instances of
      axis_name; of integers it is the largest value.

    Raises:
      TypeError: a leaf is an array that was deferred: its layer does not know of deferral.
    """
    found = cells(tree, stacked=stacked, axis_name=axis_name, deferred=deferred)
    arrays = [_value(cell) for cell in found]
    traced = [i for i, cell in enumerate(found) if isinstance(cell, Update) and cell.traced]
    agreed = _agreed([arrays[i] for i in traced], axis_name)
    for i, value in zip(traced, agreed, strict=True):
        arrays[i] = value
    return jax.tree.unflatten(_structure(tree), arrays)


def _value(cell: Any) -> Array:
    """Settles one array, deferred or not."""
    if isinstance(cell, Update):
        return getattr(cell.settled(), cell.field)
    return cell.value if isinstance(cell, Deferred) else cell


def cells(
    tree: Any,
    *,
    stacked: bool = False,
    axis_name: AxisName | None = None,
    deferred: Collection[str] | None = None,
) -> list[Any]:
    """Of every array Update or Deferred, in the order of the tree, with moments of all parts.

    Arguments and errors are those of `settle`; what was not deferred is an array.
    """
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in _leaves(tree)]
    for where, leaf in leaves:
        if not is_waiting(leaf) and (deferred is None or where in deferred):
            raise NotOurs(_not_ours(where))
    found = [_unstack(v) if stacked and is_waiting(v) else v for _, v in leaves]
    if axis_name is None:
        return found
    others = [i for i, cell in enumerate(found) if not is_waiting(cell)]
    agreed = _agreed([found[i] for i in others], axis_name)
    for i, value in zip(others, agreed, strict=True):
        found[i] = value
    return _pool_instances(found, axis_name if isinstance(axis_name, tuple) else (axis_name,))


def _agreed(arrays: list[Array], axis_name: AxisName | None) -> list[Array]:
    """One value for all instances: the mean, of integers the largest; itself where known to be one.

    One collective for all means over the same axes.
    """
    if axis_name is None:
        return arrays
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    agreed = [jnp.asarray(x) for x in arrays]

    def key(x: Array) -> tuple[tuple[Any, ...], bool]:
        over = tuple(n for n in names if not is_typed(n) or n in varying(x))
        return over, jnp.issubdtype(x.dtype, jnp.inexact)

    keys = [key(x) for x in agreed]
    for over, inexact in dict.fromkeys(keys):
        chosen = [i for i, k in enumerate(keys) if k == (over, inexact)]
        if over:
            reduce = lax.pmean if inexact else _largest
            values = vary([agreed[i] for i in chosen], over)
            for i, value in zip(chosen, reduce(values, over), strict=True):
                agreed[i] = value
    return agreed


def _largest(values: list[Array], names: tuple[Any, ...]) -> list[Array]:
    wide = [v.astype(jnp.int32) if v.dtype == jnp.bool_ else v for v in values]
    return [w.astype(v.dtype) for w, v in zip(lax.pmax(wide, names), values, strict=True)]


class MissingCounts(Exception):
    """A model counts batches, and the statistics that it was given have no counts yet."""

    def __init__(self, structure: Any, shapes: Mapping[str, tuple[tuple[int, ...], Any]]):
        super().__init__("the statistics that were given have no counts")
        self.structure, self.shapes = structure, shapes

    def filled(self, stats: Any) -> Any:
        """`stats`, with counts of 0."""
        old = {jax.tree_util.keystr(path): leaf for path, leaf in _leaves(stats)}
        leaves = [
            old[where] if where in old else jnp.zeros(*shape)
            for where, shape in self.shapes.items()
        ]
        return jax.tree.unflatten(self.structure, leaves)


def fitted(function: str, new: Any, old: Any) -> Any:
    """`new`, what the user's function returns, in the containers of `old`, what it was given.

    Raises:
      MissingCounts: `new` has counts that `old` has not.
      ValueError: they differ in other places.
    """
    if _structure(new) == _structure(old):
        return new
    given, returned = (
        {jax.tree_util.keystr(path): (path, leaf) for path, leaf in _leaves(tree)}
        for tree in (old, new)
    )
    if given and list(given) == list(returned):  # a FrozenDict for a dictionary
        return jax.tree.unflatten(_structure(old), [leaf for _, leaf in returned.values()])
    lost, added = ([p for p in a if p not in b] for a, b in ((given, returned), (returned, given)))
    if added and not lost and all(_is_count(where, returned) for where in added):
        shapes = {where: (jnp.shape(v), v.dtype) for where, (_, v) in returned.items()}
        raise MissingCounts(_structure(new), shapes)
    raise ValueError(
        f"{function} must return statistics of the structure that it was given: "
        f"{_difference(lost, added)}. {_advice(function, new, old, lost, added)}"
    )


def _is_count(where: str, leaves: Mapping[str, tuple[Any, Any]]) -> bool:
    layer, name = _named(leaves[where][0])
    beside = {own[1] for path, _ in leaves.values() if (own := _named(path))[0] == layer}
    return name == "count" and {"mean", "var"} <= beside


def _difference(lost: list[str], added: list[str]) -> str:
    """The first path that differs, of each kind."""

    def those(paths: list[str], what: str) -> str:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        were = "were" if more else "was"
        return f"{paths[0] or 'a single array'}{more} {were} {what}"

    parts = [those(lost, "given and not returned")] if lost else []
    parts += [those(added, "returned and not given")] if added else []
    return ", and ".join(parts) or "its containers differ"


def _advice(function: str, new: Any, old: Any, lost: list[str], added: list[str]) -> str:
    name = "batch_stats"
    if isinstance(new, Mapping) and name in new and not (isinstance(old, Mapping) and name in old):
        return f'{function} returned all collections of linen: return updates["{name}"].'
    if isinstance(old, Mapping) and name in old and not (isinstance(new, Mapping) and name in new):
        return (
            f"The statistics given are whole collections of linen: give "
            f'variables["{name}"] in their place.'
        )
    if lost and not added:
        return "Return all statistics, also those of layers that have not updated theirs."
    if added and not lost:
        return "Give it the statistics that this model was initialised with."
    return f'From linen\'s apply(..., mutable=["{name}"]) return updates["{name}"].'


def called(function: Callable[..., T], *args: Any) -> T:
    """function(*args) of the user, whose branches and loops must not mix what has been deferred.

    Raises:
      TypeError: a branch updates statistics and another does not, or a loop carries them.
    """
    try:
        return function(*args)
    except TypeError as error:
        if "jbn._core.deferral" not in str(error) or "structure" not in str(error):
            raise
        raise TypeError(
            "a branch of lax.cond or lax.switch updates statistics that another leaves as they "
            "are, or a loop (lax.scan, while_loop) carries them. Here they are updated after the "
            "step, by the moments of all microbatches and devices, so every path through the "
            "model must update the same ones. To choose between training and inference by a "
            "traced value, normalise outside of the branch, and choose afterwards: "
            "y, stats = jbn.batch_norm(x, params, old, update=jbn.ema(jnp.where(train, 0.99, 1))); "
            "y = jnp.where(train, y, jbn.batch_norm_inference(x, params, old)). Or make the choice "
            "in Python, with one step for each; or pass pool_stats=False to make_train_step, so "
            "that each microbatch updates the statistics in turn."
        ) from error


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=is_waiting)


def is_waiting(value: Any) -> bool:
    """Whether this is a Deferred or an Update."""
    return isinstance(value, _Waiting)


def waits(stats: Any) -> bool:
    """Whether any field of these statistics is a Deferred or an Update."""
    return isinstance(stats, tuple) and any(isinstance(value, _Waiting) for value in stats)


def fixed(stats: Any) -> bool:
    """Whether a layer is to normalise by these statistics in training, too."""
    return waits(stats) and any(isinstance(v, _Waiting) and v.fixed for v in stats)


def _unstack(cell: Any) -> Any:
    """The microbatches' moments as one; before the step all have the same statistics."""
    if isinstance(cell, Deferred):
        return dataclasses.replace(cell, value=cell.value[0])
    stats = jax.tree.map(lambda values: values[0], cell.stats)
    moments = tuple(map(pool, cell.moments))
    return dataclasses.replace(cell, stats=stats, moments=moments, stacked=True)


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
        pooled.update(zip(chosen, pool_by_sums(alike, names) if names else alike, strict=True))
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
