"""Batch Normalization with several sets of statistics in one layer.

Batches from different distributions need statistics of their own: domains (Chang et al. 2019, arXiv
1906.03950), clean and adversarial images (AdvProp, Xie et al. 2020, arXiv 1911.09665), tasks, the
steps of an unrolled network (Cooijmans et al. 2017, arXiv 1603.09025). So the state has a leading
axis of k sets, and each call says which set its examples belong to:

    a name or a Python integer       known while tracing
    a traced integer, []             one set for the whole call
    integers, [N]                    one set for each example

Examples of one set never move the statistics of another: those stay bit for bit as they are.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jbn._core import check
from jbn._core.affine import Activation
from jbn._core.axes import Axes, integer, resolve
from jbn._core.batch_norm import finish, fixed_statistics, infer, train
from jbn._core.by_set import (
    Sets,
    infer_by_set,
    moments_by_set,
    normalized_by_set,
    pooled_by_set,
)
from jbn._core.deferral import read
from jbn._core.normalize import Params
from jbn._core.plan import Inputs, Spec, plan, plan_inference
from jbn._core.running import RunningStats, UpdateRule, ema, for_sets
from jbn._core.shift import accumulator
from jbn._core.types import Moments
from jbn._devices.named_axes import AxisName, scope
from jbn._devices.placement import collect, is_explicitly_sharded

__all__ = ["Index", "init_params", "init_stats", "split_batch_norm", "split_batch_norm_inference"]

Index = str | int | ArrayLike


def init_params(
    sets: int | Sequence[str], features: int | Sequence[int], dtype: DTypeLike = jnp.float32
) -> Params:
    """Makes scale 1 and bias 0 for each of several sets, [sets, C].

    >>> from jbn import sets
    >>> sets.init_params(("clean", "adversarial"), 3).scale.shape
    (2, 3)

    Args:
      sets: their number, or their names.
      features: C, or a tuple for several feature axes.
      dtype: of the parameters.

    Raises:
      TypeError: sets is neither a number nor names, or as from `jbn.init_params`.
      ValueError: there is no set, or two have one name.
    """
    shape = (number_of(sets), *check.number_of_features(features))
    dtype = check.params_dtype(dtype)
    return Params(jnp.ones(shape, dtype), jnp.zeros(shape, dtype))


def init_stats(
    sets: int | Sequence[str], features: int | Sequence[int], dtype: DTypeLike = jnp.float32
) -> RunningStats:
    """Makes mean 0, variance 1 and count 0 for each of several sets, [sets, C].

    >>> from jbn import sets
    >>> sets.init_stats(2, 3).mean.shape
    (2, 3)

    Args:
      sets: their number, or their names.
      features: C, or a tuple for several feature axes.
      dtype: as for `jbn.init_stats`.

    Raises:
      TypeError: sets is neither a number nor names, or as from `jbn.init_stats`.
      ValueError: there is no set, or two have one name.
    """
    shape = (number_of(sets), *check.number_of_features(features))
    dtype = check.stats_dtype(dtype)
    real = jnp.finfo(dtype).dtype
    return RunningStats(jnp.zeros(shape, dtype), jnp.ones(shape, real), jnp.zeros(shape, real))


def split_batch_norm(
    x: ArrayLike,
    params: Params,
    stats: RunningStats,
    index: Index,
    *,
    names: Sequence[str] | None = None,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    update: UpdateRule = ema(0.99),
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    groups: int | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, RunningStats]:
    """Batch Normalization in training, by the batch's statistics in the set of each example.

        y        = scale[s] * (x - mean_s) / sqrt(var_s + epsilon) + bias[s],   s = index
        stats[s] = update(stats[s], Moments(count_s, mean_s, var_s))

    mean_s and var_s are those of the examples of set s in this batch. With one set for the call
    this is `jbn.batch_norm` with that set's params and stats; with an index per example, for each
    set, `jbn.batch_norm` of its examples alone.

    >>> import jax.numpy as jnp, jbn
    >>> from jbn import sets
    >>> x = jnp.array([[1.0], [3.0], [10.0], [50.0]])
    >>> params, stats = sets.init_params(3, 1), sets.init_stats(3, 1)
    >>> index = jnp.array([0, 0, 1, 1])
    >>> y, stats = sets.split_batch_norm(x, params, stats, index, update=jbn.ema(0.5))
    >>> print(y[:, 0].round(3), stats.mean[:, 0])
    [-1.  1. -1.  1.] [ 1. 15.  0.]

    Args:
      x: [N, ..., C], floating point.
      params: scale and bias, [sets, C] each, or [C] for all sets.
      stats: the running statistics so far, [sets, C] each.
      index: the set: a Python integer from 0 on, a name of `names`, a traced integer, or integers
        [N], one for each example, where N is the size of the first axis of x that is not a feature
        axis. An array may hold integers outside of 0 to sets - 1, such as -1 for padding: these
        examples belong to no set.
      names: of the sets, in the order of their index.
      axis: the feature axis or axes, C.
      epsilon: is added to the variance, inside the root.
      update: how the batch enters the running statistics of its sets. A function of your own is
        given the statistics and moments of one set, [C], at a time.
      mask: bool, of x's rank, broadcasts against x. False: the value takes no part in the
        statistics, and is normalised by those of its set.
      weights: real and not negative, broadcasts like `mask`.
      axis_name: share the statistics of each set over these named axes (of vmap, pmap, shard_map).
        One set for the call has to be the same on all instances. If each instance has one example
        of a set of its own, give it a batch axis: x[None] and index[None].
      axis_index_groups: as in `jax.lax.psum`.
      groups: normalise each of this many equal, consecutive parts of the batch by statistics of its
        own, in each set.
      activation: an elementwise function of JAX, such as `jax.nn.relu`.
      residual: of x's shape, is added before the activation.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, and the updated statistics. The statistics of a set without an example in
      this batch stay bit for bit as they are. y is 0, before residual and activation, for examples
      of no set. They take no part in any statistics, and have no gradient. y is differentiable in
      x, scale, bias and residual to any order.

    An index per example costs one pass over x for the moments and one for y, and work on arrays
    [N, sets, C]; where x has no further axes that is as much as `sets` passes. A backward pass
    keeps x, and vectors [sets, C]. Over named axes one collective serves all sets, each way.

    Raises:
      NameError, TypeError: as `jbn.batch_norm`; TypeError also for an index that is no integer.
      ValueError: as `jbn.batch_norm`; params or stats are not those of several sets; a Python
        integer is outside of 0 to sets - 1; a name is unknown; index is not of shape [] or [N].
    """
    x = check.floating(x)
    axes = resolve(x.shape, axis)
    old = _checked_stats(read(stats), axes, x, training=True)
    sets = _checked_sets(params, len(old.mean), index, names, axes)
    each = sets.member.ndim == 2
    spec, inputs = plan(
        x,
        (None, None) if each else (sets.scale, sets.bias),
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        weights=weights,
        over=scope(axis_name, axis_index_groups),
        groups=None if each else groups,  # for `_train_each` they are sets
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    run = _train_each if each else _train_one
    y, m = run(spec, inputs, sets, groups, fixed_statistics(spec, old, stats))
    return finish(x, spec, y, m, old, stats, for_sets(update))


def split_batch_norm_inference(
    x: ArrayLike,
    params: Params,
    stats: RunningStats,
    index: Index,
    *,
    names: Sequence[str] | None = None,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Batch Normalization at inference, by the running statistics of the set of each example.

        y = scale[s] * (x - stats.mean[s]) / sqrt(stats.var[s] + epsilon) + bias[s],   s = index

    >>> import jax.numpy as jnp
    >>> from jbn import sets
    >>> stats = sets.init_stats(("photo", "sketch"), 1)
    >>> stats = stats._replace(mean=jnp.array([[1.0], [5.0]]))
    >>> x, params = jnp.array([[5.0], [5.0]]), sets.init_params(2, 1)
    >>> y = sets.split_batch_norm_inference(x, params, stats, jnp.array([0, 1]), epsilon=0)
    >>> print(y[:, 0])
    [4. 0.]

    Args:
      x: [N, ..., C], floating point. A single example is fine.
      params: scale and bias, [sets, C] each, or [C] for all sets.
      stats: the running statistics, [sets, C] each, of any precision.
      index: the set of the call, or of each example, as in training.
      names: of the sets, in the order of their index.
      axis: the feature axis or axes, C.
      epsilon: as in training.
      activation: as in training.
      residual: as in training.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape; 0, before residual and activation, for examples of no set.

    Raises:
      TypeError, ValueError: as in training.
    """
    x = check.floating(x)
    axes = resolve(x.shape, axis)
    stats = _checked_stats(read(stats), axes, x)
    sets = _checked_sets(params, len(stats.mean), index, names, axes)
    each = sets.member.ndim == 2
    spec, inputs = plan_inference(
        x,
        (None, None) if each else (sets.scale, sets.bias),
        axis=axis,
        epsilon=epsilon,
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    if not each:
        return infer(spec, inputs, _row(stats, sets.member))
    check.output_dtype(spec.dtype, x, scale=sets.scale, bias=sets.bias)
    return infer_by_set(spec, inputs, sets, stats)


# One set for the call. `own`, [sets], is true for this set alone, and nowhere if there is none.


def _train_one(
    spec: Spec, inputs: Inputs, sets: Sets, groups: int | None, given: RunningStats | None
) -> tuple[Array, Moments]:
    """Computes y and the moments, [sets, C]; sets other than that of the batch have no data."""
    del groups  # they are in spec
    y, m = train(spec, inputs, None if given is None else _row(given, sets.member))
    return y, _in_row(m._replace(count=m.count + jnp.zeros_like(m.var)), sets.member)


@jax.jit
def _row(tree: Any, own: Array) -> Any:
    """Takes the row of the set from each array, [sets, C] -> [C]; the first if there is none."""
    return jax.tree.map(lambda v: lax.dynamic_index_in_dim(v, jnp.argmax(own), 0, False), tree)


@jax.jit
def _in_row(tree: Any, own: Array) -> Any:
    """Puts each array into the row of the set, [C] -> [sets, C]; the other rows are 0."""

    def place(v: Array) -> Array:
        return jnp.where(own.reshape(-1, *(1 for _ in v.shape)), v[None], jnp.zeros_like(v[None]))

    return jax.tree.map(place, tree)


@jax.jit
def _params_of(params: Params, own: Array, like: Array) -> Params:
    """Takes scale and bias of the set, [C]; both are 0 if there is none. `like` is [C]."""
    some = jnp.any(own)
    scale, bias = _row(params, own)
    scale = jnp.ones_like(like) if scale is None else scale
    scale, bias = jax.tree.map(lambda v: jnp.where(some, v, jnp.zeros_like(v)), (scale, bias))
    return Params(scale, bias)


# A set for each example.


def _train_each(
    spec: Spec, inputs: Inputs, sets: Sets, groups: int | None, given: RunningStats | None
) -> tuple[Array, Moments]:
    """Computes y and the moments of the batch in each set, [sets, C]."""
    number = sets.member.shape[1]
    check.output_dtype(spec.dtype, inputs.x, scale=sets.scale, bias=sets.bias)
    if not len(sets.member):  # an empty batch: no set has data, and y has no values
        none = init_stats(number, spec.axes.feature_shape, accumulator(inputs.x.dtype))
        y = infer_by_set(spec, inputs, sets, none)
        return y, Moments(none.count, none.mean, jnp.zeros_like(none.var))
    if given is not None:
        m = moments_by_set(spec, inputs, sets.member)
        return infer_by_set(spec, inputs, sets, given), pooled_by_set(m, number)
    if groups is not None:
        groups = check.groups(groups, spec.axes)
        if not spec.over.names:
            check.several_values(spec.axes.split(groups))
        sets = _in_groups(sets, groups)
    y, m = normalized_by_set(spec, inputs, sets)
    return y, pooled_by_set(m, number)


def _in_groups(sets: Sets, groups: int) -> Sets:
    """Makes a set of its own, [groups * sets, C], for the examples of each group in each set."""
    member, scale, bias = sets
    own = jnp.repeat(jnp.eye(groups, dtype=bool), len(member) // groups, 0)  # [N, groups]
    member = (own[:, :, None] & member[:, None]).reshape(len(member), -1)
    scale, bias = jax.tree.map(lambda v: jnp.concatenate([v] * groups), (scale, bias))
    return Sets(member, scale, bias)


def _member(index: int | Array, sets: int) -> Array:
    """Returns whether the call, [sets], or each example, [N, sets], belongs to a set."""
    if isinstance(index, int):
        return jnp.arange(sets) == index
    if index.ndim and is_explicitly_sharded(index):
        index = collect(index)
    own = jnp.arange(sets, dtype=index.dtype)
    return index[..., None] == own.reshape(*(1 for _ in index.shape), -1)


# Checks of the arguments.


def _checked_sets(
    params: Any, number: int, index: Any, names: Sequence[str] | None, axes: Axes
) -> Sets:
    """Checks params and index.

    For an index per example, member is [N, sets], and scale and bias are [sets, C] or None. For one
    set, member is [sets], and scale and bias are those of this set, [C].
    """
    params = _checked_params(params, number, axes)
    index = _checked_index(index, number, names, axes)
    member = _member(index, number)
    if isinstance(index, int):
        return Sets(member, *_row(params, member))
    if index.ndim == 0:
        return Sets(member, *_params_of(params, member, jnp.ones(axes.feature_shape)))
    return Sets(member, *params)


def number_of(sets: Any) -> int:
    """Returns the number of sets, from it or from their names."""
    number = integer(sets)
    if number is None:
        if isinstance(sets, str) or not isinstance(sets, Sequence):
            sets = [None]
        if not all(isinstance(name, str) for name in sets):
            raise TypeError(
                f"sets is the number of sets, or their names, such as 2 or ('clean', "
                f"'adversarial'); got {sets!r}."
            )
        if len(set(sets)) < len(sets):
            raise ValueError(f"sets has a name twice: {tuple(sets)}.")
        number = len(sets)
    if number < 1:
        raise ValueError(f"sets={sets!r} makes no set: a layer has at least one.")
    return number


def names_of(sets: int | Sequence[str]) -> tuple[str, ...] | None:
    """Returns the names of the sets, or None for their number."""
    return tuple(sets) if isinstance(sets, Sequence) else None


def _checked_stats(stats: Any, axes: Axes, x: Array, *, training: bool = False) -> RunningStats:
    """Checks statistics of several sets, [sets, *C] in each field."""
    if tuple(getattr(stats, "_fields", ())) != RunningStats._fields:
        return check.stats(stats, axes)  # raises
    arrays = {name: check.array(v, f"stats.{name}") for name, v in stats._asdict().items()}
    shapes = {v.shape for v in arrays.values()}
    shape = arrays["mean"].shape
    if len(shapes) > 1 or len(shape) != 1 + len(axes.feature_shape) or not shape[0]:
        raise ValueError(
            f"stats of several sets are [sets, {', '.join(map(str, axes.feature_shape))}] in each "
            f"field; got {', '.join(str(v.shape) for v in arrays.values())}. Write "
            f"jbn.sets.init_stats(sets, C)."
        )
    stats = stats._replace(**arrays)
    check.stats(jax.tree.map(lambda v: v[0], stats), axes, x, training=training)
    return stats


def _checked_params(params: Any, sets: int, axes: Axes) -> Params:
    """Checks scale and bias, [sets, C] or [C] each, and makes them [sets, C]."""
    found = dict(zip(Params._fields, check.params(params), strict=True))
    whole = (sets, *axes.feature_shape)
    for name, values in found.items():
        if values is None:
            continue
        values = check.array(values, name)
        if values.shape not in (whole, whole[1:]):
            raise ValueError(
                f"{name} of {sets} sets has the shape {whole}, or {whole[1:]} where they share it; "
                f"got {values.shape}. Write jbn.sets.init_params(sets, C)."
            )
        found[name] = jnp.broadcast_to(values, whole)
    return Params(**found)


def _checked_index(index: Any, sets: int, names: Sequence[str] | None, axes: Axes) -> int | Array:
    """Converts a name or a static index to a Python integer; others are arrays, [] or [N]."""
    if names is not None and (isinstance(names, str) or len(names) != sets):
        raise ValueError(f"names={names!r} must name each of the {sets} sets of stats.")
    if isinstance(index, str):
        if names is None or index not in names:
            known = "names= is not given" if names is None else f"the names are {tuple(names)}"
            raise ValueError(f"index={index!r} is not the name of a set: {known}.")
        return list(names).index(index)
    number = integer(index)
    if number is not None:
        if not 0 <= number < sets:
            raise ValueError(
                f"index={number} is out of range: there are {sets} sets, 0 to {sets - 1}. Examples "
                f"of no set, such as padding, have an index per example: -1 in an array [N]."
            )
        return number
    index = check.array(index, "index")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"index says the set of the call or of each example, by integers or a name; got "
            f"{index.dtype}. Write index.astype(jnp.int32)."
        )
    examples = tuple(axes.shape[i] for i in axes.reduction[:1])
    if index.shape not in ((), examples) or index.ndim > 1:
        raise ValueError(
            f"index has the shape (), one set for the call, or {examples or '[N]'}, one for each "
            f"example of x, of shape {axes.shape}; got {index.shape}."
        )
    return index.astype(jnp.int32) if jnp.iinfo(index.dtype).bits < 32 else index
