"""Deferred updates: the moments of a step's parts are pooled and enter the statistics once.

A batch may be processed in parts: microbatches whose gradients are accumulated, or shares of
devices that normalise on their own. An update from each part would move the running averages
several times a step, and by variances within parts, which are too small. So a step can give its
layers deferred statistics:

    defer(tree)         turns each array into Deferred(value)
    absorb(...)         returns Updates (rule and moments) from a layer with Deferred statistics
    settle(tree, ...)   pools the moments of all parts, and only then applies the rule

A rule may use traced values, such as a decay that comes with the batch. An Update carries them as
data, so that they can leave a scan. If they differ between the parts, each part's rule is applied
to the pooled moments, and the new statistics are the mean of the results.

`batch_stats` may also hold the state of other layers, which read arrays. `chosen` separates them:
it defers what layers of jbn update, and what is named mean, var or cov (with a count beside them),
which it takes for the statistics of a normalisation. All other arrays pass through unchanged.

`jbn.population` needs the moments themselves, and takes the `cells` instead. With
`defer(tree, fixed=True)` layers normalise by the given statistics, as in inference, and still
return the moments of their batch.

Deferred and Update are pytree nodes. Each stands for one array of the tree (a mean, a variance or a
count) and does not need the arrays beside it. So they pass through scan, remat and vmap, and
through any container: tuples of RunningStats, Flax's `batch_stats`, nnx's State.
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
    """The error for a layer that is not jbn's and reads or writes deferred statistics."""


class _Waiting:
    """A value that only a layer of jbn can read; any other use is an error that names its path."""

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
    """One array of the running statistics, which a layer reads and which is updated later."""

    value: Array
    path: str = ""  # of the array in the tree, for error messages
    fixed: bool = False  # whether the layer normalises by these statistics, not by its batch's

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.value.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """An update rule that can leave the scan that traced it, because its traced values are data.

    Attributes:
      values: the traced values that the rule uses, perhaps none.
      function: (stats, moments, *values) -> RunningStats; static.
      ndim: the rank of the statistics in the trace. Further, leading axes come from a scan over
        layers.
    """

    values: tuple[Array, ...]
    function: Callable[..., RunningStats]
    ndim: int

    def __call__(self, stats: RunningStats, moments: Moments) -> RunningStats:
        """Applies the rule to one layer, or to each of several along leading axes."""
        if not self.values:
            return running.absorb(self.function, stats, moments)
        function = self.function
        for _ in range(stats.mean.ndim - self.ndim):
            function = jax.vmap(function)
        return function(stats, moments, *self.values)


@dataclasses.dataclass(frozen=True, eq=False)
class Update(_Waiting):
    """The deferred update of one array of the running statistics.

    Attributes:
      stats: the statistics before the step.
      moments: those of each call of the layer, in order; count, mean and var all of shape [C].
      rules: the rule of each call, with the traced values of this part.
      over: for each call, the program instances that already share these moments.
      field: the field of RunningStats that this array is.
      path: the path of the array in the tree.
      fixed: whether the layer normalised by `stats`.
      stacked: whether the values of the rules have a leading axis of microbatches.
      features: the shape of the layer's own mean, where `stats` has means [G, s, 1], covariances in
        the place of variances, and counts [G, 1, 1], which the layer has as [G]; or None.
    """

    stats: RunningStats
    moments: tuple[Moments, ...]
    rules: tuple[Rule, ...]
    over: tuple[Scope, ...]
    field: str
    path: str = ""
    fixed: bool = False
    stacked: bool = False
    features: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        shape = getattr(self.stats, self.field).shape
        if self.features is None or self.field == "var":
            return shape
        own = self.features if self.field == "mean" else shape[-3:-2]
        return (*shape[:-3], *own)

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return getattr(self.stats, self.field).dtype

    def settled(self) -> RunningStats:
        """Computes the statistics after all calls, one by one, as without deferral."""
        if not (self.stacked and self.traced):
            return self._after(self.rules)
        each = jax.vmap(self._after)(self.rules)  # with the values of each microbatch

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
    Update, ["stats", "moments", "rules"], ["over", "field", "path", "fixed", "stacked", "features"]
)


def _portable(rule: UpdateRule, stats: RunningStats, moments: Moments) -> Rule:
    """Makes a rule that can leave this trace; `stats` and `moments` are examples of arguments."""
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
        values = (jnp.zeros((), jnp.int32),)  # not empty, so that the Rule applies its program
    return Rule(values, _Program(program), ndim)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """A traced rule, as a function of the values that it closes over."""

    program: ClosedJaxpr

    def __call__(self, stats: RunningStats, moments: Moments, *values: Array) -> RunningStats:
        closed = ClosedJaxpr(self.program.jaxpr, list(values[: len(self.program.consts)]))
        args = [
            vary(x, [n for n in aval.manual_axis_type.varying if is_typed(n)])  # as in the trace
            for x, aval in zip((*stats, *moments), self.program.in_avals, strict=True)
        ]
        return RunningStats(*jaxpr_as_fun(closed)(*args))


def defer(tree: T, *, fixed: bool = False, only: Collection[str] | None = None) -> T:
    """Turns every array of a tree of statistics into a Deferred.

    With `fixed`, layers normalise by these statistics, and not by their batch's. With `only`, which
    `chosen` returns, the arrays at all other paths stay arrays.
    """

    def mark(path: Any, value: Array) -> Any:
        where = jax.tree_util.keystr(path)
        if only is not None and where not in only:
            return value
        return Deferred(jnp.asarray(value), where, fixed)

    return jax.tree_util.tree_map_with_path(mark, tree)


def chosen(update: Callable[[Any], Any], stats: Any, *, fixed: bool = False) -> frozenset[str]:
    """Finds the paths of the arrays to defer: those of normalisations, and those jbn updates.

    Args:
      update: the user's function of statistics, which returns the new ones. It is traced only if
        the names of some arrays do not show that they belong to a normalisation.
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
    except Exception:  # it comes again when the function runs with all arrays deferred
        return frozenset(leaves)
    ours = _from_layers(jaxpr, [False] * len(jaxpr.invars))
    return by_name | {where for where, own in zip(places, ours, strict=True) if own}


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_waiting)


def _named(path: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """Splits a path into the path of the layer and the name of the array in it."""
    names = [getattr(e, "key", getattr(e, "name", getattr(e, "idx", None))) for e in path]
    if len(names) > 1 and names[-1] == "value":  # of an nnx.Variable
        names.pop()
    return tuple(names[:-1]), names[-1] if names else None


def _is_statistic(where: str, leaves: Mapping[str, tuple[Any, Any]]) -> bool:
    """Returns whether this array is named mean, var or cov, or is the count beside them.

    A cov is one only beside a mean.
    """
    path, leaf = leaves[where]
    layer, name = _named(path)
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return False
    if name not in ("count", "cov"):
        return name in ("mean", "var")
    beside = {own[1]: v for p, v in leaves.values() if (own := _named(p))[0] == layer}
    if name == "cov":
        return "mean" in beside
    if {"mean", "cov"} <= set(beside):
        return jnp.ndim(leaf) + 2 == jnp.ndim(beside["cov"])
    return {"mean", "var"} <= set(beside) and jnp.shape(beside["var"]) == jnp.shape(leaf)


_MARK = "jbn.running_stats"


def _marked(stats: RunningStats) -> RunningStats:
    """Marks statistics by a name, by which `chosen` finds them in a traced program."""
    if not isinstance(stats.mean, Tracer):
        return stats
    return RunningStats(*(checkpoint_name(v, _MARK) for v in stats))


def _from_layers(jaxpr: Any, given: Sequence[bool]) -> list[bool]:
    """Finds for each result of a program whether it depends on what a layer of jbn updated.

    `given` has the same for its arguments.
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
    """Yields the programs in the parameters of an operation, such as a scan, a branch, a call."""
    for value in params:
        if isinstance(value, tuple | list):
            yield from _programs(value)
        elif hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def read(stats: RunningStats) -> RunningStats:
    """Returns the arrays that a layer reads: as before the step, or after its earlier calls in it.

    Fixed statistics are always those before the step.
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
    given: Any,
    over: Scope,
    features: tuple[int, ...] | None = None,
) -> Any:
    """Applies `running.absorb`, or returns Updates if the statistics `given` are deferred.

    Args:
      rule: as for `running.absorb`.
      stats: `read(given)`.
      moments: of the batch that this call saw.
      given: RunningStats of arrays, Deferred, or the Updates of an earlier call in the same step.
      over: the program instances that share these moments.
      features: as for `Update`; `given` and the Updates are then a tuple of the layer's own.
    """
    new = running.absorb(rule, stats, moments)  # checks rule and result early
    if not waits(given):
        return _marked(new)
    # The count gets the full shape, so that every field has a leading axis such as nn.scan's.
    like = moments.var if features is None else moments.mean
    moments = moments._replace(count=moments.count + jnp.zeros_like(like))
    mine = _portable(rule, lax.stop_gradient(stats), moments)
    earlier = next((v for v in given if isinstance(v, Update)), None)
    if earlier is None:
        calls = (moments,), (mine,), (over,)
    else:
        stats = earlier.stats
        calls = (*earlier.moments, moments), (*earlier.rules, mine), (*earlier.over, over)
    stats = lax.stop_gradient(stats)
    paths = (getattr(value, "path", "") for value in given)
    updates: Any = [  # instead of arrays
        Update(stats, *calls, field, path, fixed(given), features=features)
        for field, path in zip(RunningStats._fields, paths, strict=True)
    ]
    return RunningStats(*updates) if features is None else type(given)(*updates)


def number(steps: Array) -> Array:
    """Returns a layer's number of steps: the array itself, or the one that is deferred."""
    return steps.value if isinstance(steps, Deferred) else steps


def advanced(steps: Array) -> Array:
    """Adds 1 to a layer's number of steps.

    A deferred number increases once a step of training, because every part starts from the same
    number. Where the layer normalises by fixed statistics, it does not increase.
    """
    if isinstance(steps, Deferred):
        return steps if steps.fixed else dataclasses.replace(steps, value=steps.value + 1)
    new = steps + 1
    return checkpoint_name(new, _MARK) if isinstance(new, Tracer) else new


def settle(
    tree: T,
    *,
    stacked: bool = False,
    axis_name: AxisName | None = None,
    deferred: Collection[str] | None = None,
) -> T:
    """Applies each rule once, to the moments of all parts, pooled by count.

    Args:
      tree: `defer(stats)`, as the layers returned it.
      stacked: whether deferred values have a further, leading axis of microbatches.
      axis_name: pool over the program instances of these axes too, unless the layer has done so.
      deferred: the `only` of `defer`.

    Returns:
      A tree of arrays, of the structure of `stats`. An array that no layer updated is unchanged. An
      array that was not deferred, or that depends on traced values of a rule, is the mean over the
      instances of axis_name; for integers it is the largest value.

    Raises:
      TypeError: a deferred leaf came back as an array, because its layer is not jbn's.
    """
    found = cells(tree, stacked=stacked, axis_name=axis_name, deferred=deferred)
    arrays = [_value(cell) for cell in found]
    traced = [i for i, cell in enumerate(found) if isinstance(cell, Update) and cell.traced]
    agreed = _agreed([arrays[i] for i in traced], axis_name)
    for i, value in zip(traced, agreed, strict=True):
        arrays[i] = value
    return jax.tree.unflatten(_structure(tree), arrays)


def _value(cell: Any) -> Array:
    """Computes the new value of one array, deferred or not."""
    if isinstance(cell, Update):
        new = getattr(cell.settled(), cell.field)
        return new if cell.features is None else new.reshape(cell.shape)
    return cell.value if isinstance(cell, Deferred) else cell


def cells(
    tree: Any,
    *,
    stacked: bool = False,
    axis_name: AxisName | None = None,
    deferred: Collection[str] | None = None,
) -> list[Any]:
    """Returns the Update or Deferred of every array, in tree order, with moments of all parts.

    Arguments and errors are those of `settle`. An array that was not deferred stays an array.
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
    """Makes arrays equal on all instances: takes the mean, or for integers the largest value.

    An array that is known to be replicated does not change. One collective takes all means over the
    same axes.
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
    """The error for a model that counts batches, when the given statistics have no counts yet."""

    def __init__(self, structure: Any, shapes: Mapping[str, tuple[tuple[int, ...], Any]]):
        super().__init__("the statistics that were given have no counts")
        self.structure, self.shapes = structure, shapes

    def filled(self, stats: Any) -> Any:
        """Adds counts of 0 to `stats`."""
        old = {jax.tree_util.keystr(path): leaf for path, leaf in _leaves(stats)}
        leaves = [
            old[where] if where in old else jnp.zeros(*shape)
            for where, shape in self.shapes.items()
        ]
        return jax.tree.unflatten(self.structure, leaves)


def fitted(function: str, new: Any, old: Any) -> Any:
    """Puts `new`, which the user's function returned, into the containers of `old`, its argument.

    Raises:
      MissingCounts: `new` has counts that `old` does not have.
      ValueError: they differ in other arrays.
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
    """Names the first lost path and the first added path."""

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
    """Calls the user's function, whose branches and loops must not mix deferred values with others.

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
    """Returns whether this is a Deferred or an Update."""
    return isinstance(value, _Waiting)


def waits(stats: Any) -> bool:
    """Returns whether any field of these statistics is a Deferred or an Update."""
    return isinstance(stats, tuple) and any(isinstance(value, _Waiting) for value in stats)


def fixed(stats: Any) -> bool:
    """Returns whether a layer must normalise by these statistics in training, too."""
    return waits(stats) and any(isinstance(v, _Waiting) and v.fixed for v in stats)


def _unstack(cell: Any) -> Any:
    """Pools the moments of microbatches; their statistics before the step are all the same."""
    if isinstance(cell, Deferred):
        return dataclasses.replace(cell, value=cell.value[0])
    stats = jax.tree.map(lambda values: values[0], cell.stats)
    moments = tuple(map(pool, cell.moments))
    return dataclasses.replace(cell, stats=stats, moments=moments, stacked=True)


def _pool_instances(cells: Sequence[Any], axis_names: tuple[Any, ...]) -> list[Any]:
    """Pools cells over instances; two collectives per scope: counts and means, then variances."""
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
    """Returns the axes over which instances have different moments."""
    return names if over.groups else tuple(n for n in names if n not in over.names)


def _share(m: Moments, over: Scope, names: tuple[Any, ...]) -> Moments:
    """Divides the count by the number of instances that share these moments."""
    if over.groups is None or not set(names) & set(over.names):
        return m
    sizes = {len(group) for group in over.groups}
    size = over.sum(jnp.ones_like(m.count)) if len(sizes) > 1 else sizes.pop()
    return m._replace(count=m.count / size)
