"""Training steps over Optax: the same numbers on one device and on many, in one pass or in parts.

The loss of a batch is total / weight. Both add up, over microbatches and over devices, and so does
the gradient of the total; division comes last. So a step is right by construction wherever it runs:

    total, weight, gradient of the total        of every microbatch, on every device
    psum of all three                           one collective
    gradient / weight  ->  Optax  ->  params

The moments of the Batch Normalization layers are pooled in the same manner before they enter the
running statistics (see `jbn._deferred`), so these move once a step, by the whole batch.

A model is any function of (params, stats, batch): Flax linen, Flax nnx, or the core alone.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from jbn._axes import integer
from jbn._deferred import (
    MissingCounts,
    called,
    chosen,
    defer,
    fitted,
    is_typed,
    is_waiting,
    settle,
    vary,
)
from jbn._export import serializable
from jbn._shift import accumulator
from jbn._sync import AxisName, bound_axes, recorded, scope, varying

__all__ = [
    "TrainState",
    "init",
    "Mean",
    "make_train_step",
    "evaluate",
    "decay_mask",
    "dynamic_loss_scale",
    "LossScaleState",
]

Tree = Any  # of arrays


class TrainState(NamedTuple):
    """All that a training step takes in and hands back; a checkpoint of it resumes the training.

    Attributes:
      step: [], int32: how many steps have been made, skipped ones included.
      params: what the optimizer changes, such as linen's `params` or nnx's State of Param.
      stats: the running statistics, such as linen's `batch_stats`, nnx's State of BatchStat, or a
        tree of jbn.RunningStats. Other layers may keep their state here, too.
      opt_state: Optax's.
    """

    step: Array
    params: Tree
    stats: Tree
    opt_state: Tree


class Mean(NamedTuple):
    """A weighted mean that is not divided yet: such means of parts add up to that of the whole.

    Attributes:
      total: the sum of weight * value over the examples.
      weight: the sum of the weights; for a mask, how many examples take part.
    """

    total: Array
    weight: Array


LossFn = Callable[..., tuple[Any, Tree, Mapping[str, Any]]]
StepFn = Callable[[TrainState, Tree], tuple[TrainState, dict[str, Array]]]


def init(params: Tree, stats: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    >>> import jax.numpy as jnp, jbn.training, optax
    >>> params = {"kernel": jnp.ones((2, 3)), "norm": jbn.init_params(3)}
    >>> state = jbn.training.init(params, jbn.init_stats(3), optax.sgd(0.1))
    >>> print(state.step, state.stats.mean)
    0 [0. 0. 0.]
    """
    return TrainState(jnp.zeros((), jnp.int32), params, stats, _optimizer(optimizer).init(params))


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName | None = None,
    microbatches: int = 1,
    pool_stats: bool | None = None,
    rng: Array | None = None,
) -> StepFn:
    """One step of training, as a pure function to be given to jit, shard_map or pmap.

        step(state, batch) -> (state, metrics)

    >>> import jax, jax.numpy as jnp, jbn.training, optax
    >>> def loss_fn(params, stats, batch):
    ...     y, stats = jbn.batch_norm(batch["x"] @ params["kernel"], params["norm"], stats)
    ...     return jnp.mean((y - batch["y"]) ** 2), stats, {}
    >>> params = {"kernel": jnp.eye(2), "norm": jbn.init_params(2)}
    >>> optimizer = optax.sgd(0.1)
    >>> state = jbn.training.init(params, jbn.init_stats(2), optimizer)
    >>> step = jax.jit(jbn.training.make_train_step(loss_fn, optimizer), donate_argnums=0)
    >>> batch = {"x": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "y": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
    >>> state, metrics = step(state, batch)
    >>> print(state.stats.mean, metrics["skipped"])
    [0.02 0.04] False

    Args:
      loss_fn: (params, stats, batch) -> (loss, stats, metrics); with `rng` it takes a key as fourth
        argument. The loss is the mean over the batch's examples, [], or a `Mean`, for batches with
        masks or of uneven size. Metrics are a dictionary of such values, perhaps empty.
      optimizer: any of Optax's; in `dynamic_loss_scale`, if the model computes in float16.
      axis_name: of the pmap or shard_map that the step runs in. None on one device, and under `jit`
        with sharded arrays, where the batch is the global one.
      microbatches: how many parts of the batch go through the model one after the other, with one
        update at the end. Part i holds the examples i, i + microbatches, i + 2 microbatches, ...
        so that under `jit` with a sharded batch every device has its share of each part.
      pool_stats: whether the running statistics are updated once a step, by the moments of the
        whole batch, also where layers normalise by microbatch or by device; it takes layers of
        jbn's. Other state in `stats` is as the last microbatch returns it, and the mean (of
        integers the largest value) over the devices. False: each microbatch updates them in turn,
        as the layers do by themselves; then layers must be synchronised over `axis_name`. By
        default True where there is something to pool: several microbatches, or an axis_name.
      rng: a key. Each step, microbatch and instance of axis_name draws its own from it.

    Returns:
      A function of a TrainState and a batch, whose leaves are [N, ...]. It returns the new state
      and the metrics, by their names, of the whole batch; with "loss" and "skipped". The state is
      the same on all devices: out_specs=P().

      A step whose loss or gradient is not finite anywhere, or whose weight is 0, is skipped:
      params, stats and opt_state stay as they were. `step` counts it, and metrics["skipped"] says
      so.

    Raises:
      NameError: axis_name is not bound.
      TypeError: loss_fn returns something else, or with pool_stats a normalisation is not jbn's,
        or branches do not update the same statistics.
      ValueError: microbatches does not divide the batch; the state varies over axis_name, or so do
        the new statistics without pool_stats; layers share statistics over an axis outside of the
        step that axis_name lacks; or loss_fn returns statistics of another structure.
    """
    _function("loss_fn", loss_fn, "(params, stats, batch) -> (loss, stats, metrics)")
    _optimizer(optimizer)
    number = integer(microbatches)
    if number is None:
        raise TypeError(
            f"microbatches must be an integer, such as 4: how many parts of the batch go through "
            f"the model one after the other; got {microbatches!r}."
        )
    if number < 1:
        raise ValueError(f"microbatches must be at least 1; got {number}.")
    microbatches = number
    pool_stats = (microbatches > 1 or axis_name is not None) if pool_stats is None else pool_stats
    optimizer = optax.with_extra_args_support(optimizer)

    def run(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, Array]]:
        names = scope(axis_name).names
        _check_replicated(state, names)
        scale = _loss_scale(state.opt_state)
        params = vary(state.params, names)  # so that no psum hides in their gradient

        def arguments(i: Array | int) -> tuple[Any, ...]:
            args = (_microbatch(batch, i, microbatches),)
            return args if rng is None else (*args, _key(rng, state.step, i, names))

        def part(i: Array | int, stats: Tree) -> tuple[_Sums, Tree]:
            sums, new_stats = _differentiate(loss_fn, params, stats, arguments(i), scale)
            if not pool_stats:
                _check_synchronised(new_stats, names)
            return sums, new_stats

        if pool_stats:
            given = vary(state.stats, names)
            only = chosen(lambda v: loss_fn(params, _own(v), *arguments(0))[1], given)
            stats = defer(state.stats, only=only)
            sums, stats = _accumulate(part, params, stats, microbatches, pool=True, names=names)
            sums = _summed(sums, names)
            stats = settle(stats, stacked=microbatches > 1, axis_name=names or None, deferred=only)
        else:
            sums, stats = _accumulate(
                part, params, state.stats, microbatches, pool=False, names=names
            )
            sums = _summed(sums, names)
        return _update(optimizer, state, stats, sums, scale)

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, Array]]:
        outside = bound_axes()
        with recorded() as shared:
            try:
                new = run(state, batch)
            except MissingCounts as missing:  # statistics of a model that did not count, so far
                new = run(state._replace(stats=missing.filled(state.stats)), batch)
        _check_axes(new, [name for name in shared if name in outside], scope(axis_name).names)
        return new

    return step


class LossScaleState(NamedTuple):
    """Of `dynamic_loss_scale`.

    Attributes:
      scale: [], float32: the factor of the loss.
      good_steps: [], int32: finite steps since the scale last changed.
      inner: the state of the optimizer within.
    """

    scale: Array
    good_steps: Array
    inner: Tree


serializable(TrainState, Mean, LossScaleState)


def dynamic_loss_scale(
    optimizer: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    growth_interval: int = 2000,
    factor: float = 2.0,
    minimum: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps float16 gradients from vanishing: for `make_train_step`, which finds it in opt_state.

    The loss is multiplied by a scale, and the gradients are divided by it, in float32. A step whose
    gradients overflow is skipped and divides the scale by `factor`; `growth_interval` finite steps
    in a row multiply it. Of a skipped step the scale is all that is kept.

    >>> import jax.numpy as jnp, jbn.training, optax
    >>> optimizer = jbn.training.dynamic_loss_scale(optax.sgd(0.1), initial=1024)
    >>> print(optimizer.init({"kernel": jnp.ones(2)}).scale)
    1024.0

    Args:
      optimizer: receives the gradients proper.
      initial: the first scale.
      growth_interval: how many finite steps make the scale grow.
      factor: by which it grows and shrinks; a power of 2 rounds nothing.
      minimum: below which it does not shrink.

    Returns:
      An optimizer. bfloat16 has float32's range and does not need it.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Tree) -> LossScaleState:
        return LossScaleState(jnp.float32(initial), jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Tree, state: Any, params: Tree = None, *, finite: Array | None = None, **extra: Any
    ) -> tuple[Tree, LossScaleState]:
        finite = _all_finite(updates) if finite is None else finite
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grows = good_steps >= growth_interval
        scale = jnp.where(
            finite, jnp.where(grows, state.scale * factor, state.scale), state.scale / factor
        )
        scale = jnp.clip(scale, minimum, 2.0**126)  # finite in float32
        return updates, LossScaleState(scale, jnp.where(grows, 0, good_steps), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluate(
    metric_fn: Callable[[Tree, Tree, Any], Mapping[str, Any]],
    state: TrainState,
    batches: Iterable[Tree],
) -> dict[str, Any]:
    """The weighted means of metrics over a data set, exact for batches of any sizes.

    >>> import jax.numpy as jnp, jbn.training, optax
    >>> def metric_fn(params, stats, batch):
    ...     y = jbn.batch_norm_inference(batch, params, stats, epsilon=0)
    ...     return {"mean": y.mean()}
    >>> state = jbn.training.init(jbn.init_params(1), jbn.init_stats(1), optax.sgd(0.1))
    >>> batches = [jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[6.0]])]
    >>> jbn.training.evaluate(metric_fn, state, batches)
    {'mean': 3.0}

    Args:
      metric_fn: (params, stats, batch) -> a dictionary of values of `Mean`, or of plain means over
        the batch, which then weigh as much as the batch has examples. It is compiled once for each
        shape of a batch; pass the same function each time. Batches sharded over devices are fine.
      state: of which params and stats are used.
      batches: any iterable; the last one may be smaller. Pad batches that must fill all devices,
        and return `Mean((values * mask).sum(), mask.sum())`.

    Returns:
      The metrics by name, as Python numbers (NumPy arrays where they have a shape), summed in
      float64.

    Raises:
      ValueError: there is no batch.
    """
    _function("metric_fn", metric_fn, "(params, stats, batch) -> {name: value}")
    if not isinstance(state, TrainState):
        raise TypeError(
            f"state must be a jbn.training.TrainState, such as jbn.training.init returns; got "
            f"{type(state).__name__}."
        )
    sums: dict[str, Mean] | None = None
    previous = None
    for batch in batches:
        current = _measure(metric_fn, state.params, state.stats, batch)
        if previous is not None:  # while the device works on this one
            sums = _add(sums, previous)
        previous = current
    if previous is None:
        raise ValueError("batches is empty: there is nothing to take a mean of.")
    return {name: _quotient(m) for name, m in _add(sums, previous).items()}


@functools.partial(jax.jit, static_argnums=0)
def _measure(metric_fn: Any, params: Tree, stats: Tree, batch: Tree) -> dict[str, Mean]:
    examples = next((jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)), 1)

    def weighted(name: str, value: Any) -> Mean:
        mean = _as_mean(f"metric {name!r}", value)
        if isinstance(value, Mean):
            return mean
        return Mean(mean.total * examples, mean.weight * examples)

    metrics = metric_fn(params, stats, batch)
    return {name: weighted(name, value) for name, value in metrics.items()}


def _add(sums: dict[str, Mean] | None, new: dict[str, Mean]) -> dict[str, Mean]:
    new = jax.tree.map(np.float64, jax.device_get(new))
    return new if sums is None else jax.tree.map(np.add, sums, new)


def _quotient(mean: Mean) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN where nothing has weight
        value = mean.total / mean.weight
    return value if np.ndim(value) else float(value)


def decay_mask(params: Tree) -> Tree:
    """True where weight decay is of use: everywhere but in what is named `scale` or `bias`.

    Before a normalisation the size of a kernel only sets its effective learning rate, and decay
    keeps that up; the scale and bias after it have no such part, and neither have other biases.

    >>> import jax.numpy as jnp, jbn.training, optax
    >>> params = {"conv": {"kernel": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}
    >>> jbn.training.decay_mask(params)
    {'conv': {'kernel': True}, 'norm': {'scale': False}}
    >>> optimizer = optax.adamw(1e-3, weight_decay=1e-2, mask=jbn.training.decay_mask)

    Args:
      params: linen's `params`, nnx's State of Param, or a tree with jbn.Params.

    Returns:
      A tree of the same structure, of bools.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path) not in ("scale", "bias"), params
    )


def _name(path: tuple[Any, ...]) -> str | None:
    """The innermost name in a path; not that of the array within an nnx.Variable."""
    for entry in reversed(path):
        name = getattr(entry, "key", getattr(entry, "name", None))
        if isinstance(name, str) and name != "value":
            return name
    return None


def _function(name: str, value: Any, signature: str) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be a function {signature}; got {type(value).__name__}.")


def _optimizer(value: Any) -> optax.GradientTransformation:
    """An optimizer of Optax, and not the function that makes one, or another argument."""
    if not (hasattr(value, "init") and hasattr(value, "update")):
        name = getattr(value, "__name__", type(value).__name__)
        raise TypeError(
            f"optimizer must be one of Optax's, such as optax.sgd(0.1), called with its "
            f"arguments; got {name}."
        )
    return value


class _Sums(NamedTuple):
    """What adds up, over microbatches and devices."""

    grads: Tree  # of the total
    loss: Mean
    metrics: dict[str, Mean]


def _own(stats: Tree) -> Tree:
    """A copy whose nnx Variables are of this trace, and so can be written."""
    return jax.tree.map(lambda v: v, stats)


def _summed(sums: _Sums, names: tuple[Any, ...]) -> _Sums:
    """Over the devices."""
    return lax.psum(vary(sums, names), names) if names else sums


def _differentiate(
    loss_fn: LossFn, params: Tree, stats: Tree, args: tuple[Tree, ...], scale: Array | None
) -> tuple[_Sums, Tree]:
    """One microbatch: what adds up, and the statistics that the layers return."""

    def total(params: Tree) -> tuple[Array, tuple[Mean, Tree, dict[str, Mean]]]:
        loss, new_stats, metrics = _checked(called(loss_fn, params, _own(stats), *args))
        own = loss.total if scale is None else loss.total * scale.astype(loss.total.dtype)
        return own, (loss, new_stats, metrics)

    grads, (loss, new_stats, metrics) = jax.grad(total, has_aux=True)(params)
    new_stats = fitted("loss_fn", new_stats, stats)
    # float32 at least: small gradients must not be lost in a large sum.
    grads = jax.tree.map(lambda g: g.astype(accumulator(g.dtype)), grads)
    return _Sums(grads, *lax.stop_gradient((loss, metrics))), new_stats


def _accumulate(
    part: Callable[[Any, Tree], tuple[_Sums, Tree]],
    params: Tree,
    stats: Tree,
    microbatches: int,
    *,
    pool: bool,
    names: tuple[Any, ...],
) -> tuple[_Sums, Tree]:
    """The sums of all microbatches, and what these made of the statistics.

    With `pool`, every microbatch starts from the same statistics, and all that they say is returned
    along a leading axis; of what is not deferred only the last. Otherwise they update them in turn.
    """
    if microbatches == 1:
        return part(0, stats)
    leaves, structure = jax.tree.flatten(stats, is_leaf=is_waiting)
    later = [is_waiting(leaf) for leaf in leaves]  # to be pooled

    def body(carry: tuple[Tree, Tree], i: Array) -> tuple[tuple[Tree, Tree], Tree]:
        grads, old = carry
        sums, new = part(i, stats if pool else old)
        grads = jax.tree.map(jnp.add, grads, sums.grads)
        said, kept = _divided(jax.tree.leaves(new, is_leaf=is_waiting), later)
        if pool:  # of the types that the carry has
            kept = [jnp.asarray(v, o.dtype) for v, o in zip(kept, others, strict=True)]
            kept = vary(kept, names)
        return (grads, kept if pool else new), (sums.loss, sums.metrics, said)

    def zeros(p: Array) -> Array:
        return jnp.zeros_like(p, accumulator(p.dtype))

    others = vary([jnp.asarray(v) for v in _divided(leaves, later)[1]], names)
    carry = jax.tree.map(zeros, params), others if pool else stats
    (grads, last), (loss, metrics, said) = lax.scan(body, carry, jnp.arange(microbatches))
    loss, metrics = jax.tree.map(lambda values: jnp.sum(values, 0), (loss, metrics))
    if pool:
        last = jax.tree.unflatten(structure, _joined(said, last, later))
    return _Sums(grads, loss, metrics), last


def _divided(leaves: list[Any], first: list[bool]) -> tuple[list[Any], list[Any]]:
    pairs = list(zip(leaves, first, strict=True))
    return [v for v, own in pairs if own], [v for v, own in pairs if not own]


def _joined(said: list[Any], kept: list[Any], first: list[bool]) -> list[Any]:
    """The inverse of `_divided`."""
    said_, kept_ = iter(said), iter(kept)
    return [next(said_ if own else kept_) for own in first]


def _update(
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    stats: Tree,
    sums: _Sums,
    scale: Array | None,
) -> tuple[TrainState, dict[str, Array]]:
    """Divides, and takes the step unless something is not finite; the same on all devices."""
    weight = sums.loss.weight
    divisor = jnp.where(weight > 0, weight, jnp.ones_like(weight))
    if scale is not None:
        divisor = divisor * scale
    grads = jax.tree.map(
        lambda g, p: (g / divisor.astype(g.dtype)).astype(p.dtype), sums.grads, state.params
    )
    finite = _all_finite((sums.loss, grads))
    taken = finite & (weight > 0)
    loss = _divide(sums.loss)
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params, value=loss, finite=finite
    )
    params = optax.apply_updates(state.params, updates)
    new = params, stats, opt_state
    old = state.params, state.stats, _with_loss_scale(state.opt_state, opt_state)
    chosen = jax.tree.map(functools.partial(_choose, taken), new, old)
    metrics = {name: _divide(mean) for name, mean in sums.metrics.items()}
    metrics |= {"loss": loss, "skipped": ~taken}
    if scale is not None:
        metrics["loss_scale"] = scale
    return TrainState(state.step + 1, *chosen), metrics


def _choose(condition: Array, new: Array, old: Array) -> Array:
    # The new dtype: the statistics of the first complex batch are complex.
    return jnp.where(condition, new, old if new.dtype == old.dtype else old.astype(new.dtype))


def _all_finite(tree: Tree) -> Array:
    return functools.reduce(jnp.logical_and, (jnp.isfinite(x).all() for x in jax.tree.leaves(tree)))


def _divide(mean: Mean) -> Array:
    return mean.total / mean.weight.astype(mean.total.dtype)


def _microbatch(batch: Tree, i: Array | int, microbatches: int) -> Tree:
    """The examples i, i + microbatches, ...: of every device, where the batch lies on several."""
    if microbatches == 1:
        return batch

    def part(path: Any, x: Array) -> Array:
        n = jnp.shape(x)[0] if jnp.ndim(x) else 0
        if n == 0 or n % microbatches:
            raise ValueError(
                f"microbatches={microbatches} must divide the number of examples; the batch's "
                f"leaf {jax.tree_util.keystr(path) or 'itself'} has the shape {jnp.shape(x)}."
            )
        x = jnp.reshape(x, (n // microbatches, microbatches, *x.shape[1:]))
        return lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)

    return jax.tree_util.tree_map_with_path(part, batch)


def _key(rng: Array, step: Array, i: Array | int, names: tuple[Any, ...]) -> Array:
    """A key of this step, microbatch and device."""
    key = jax.random.fold_in(jax.random.fold_in(rng, step), i)
    return jax.random.fold_in(key, lax.axis_index(names)) if names else key


def _checked(returned: Any) -> tuple[Mean, Tree, dict[str, Mean]]:
    """What loss_fn returned, with every number as a Mean."""
    if not isinstance(returned, tuple) or len(returned) != 3:
        what = (
            f"a tuple of {len(returned)}" if isinstance(returned, tuple) else repr(type(returned))
        )
        raise TypeError(
            f"loss_fn must return (loss, stats, metrics); got {what}. Without metrics write "
            f"return loss, stats, {{}}."
        )
    loss, stats, metrics = returned
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"the metrics that loss_fn returns must be a dictionary, perhaps empty; got "
            f"{type(metrics).__name__}."
        )
    reserved = {"loss", "skipped", "loss_scale"} & set(metrics)
    if reserved:
        raise ValueError(
            f"the metrics {sorted(reserved)} are the step's own: name yours otherwise."
        )
    loss = _as_mean("the loss", loss)
    if loss.total.shape or loss.weight.shape:
        raise ValueError(
            f"the loss must be the mean over the batch, of shape (); got total and weight of "
            f"shapes {loss.total.shape} and {loss.weight.shape}. Write losses.mean(), or "
            f"jbn.training.Mean((losses * mask).sum(), mask.sum())."
        )
    return loss, stats, {name: _as_mean(f"metric {name!r}", v) for name, v in metrics.items()}


def _as_mean(name: str, value: Any, weight: float = 1.0) -> Mean:
    total, weights = value if isinstance(value, Mean) else (value, jnp.float32(weight))
    return Mean(_real(name, total), lax.stop_gradient(_real(f"the weight of {name}", weights)))


def _real(name: str, value: Any) -> Array:
    """`value` in at least float32."""
    value = jnp.asarray(value)
    if jnp.iscomplexobj(value):
        raise TypeError(f"{name} must be real; got {value.dtype}.")
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    return value.astype(accumulator(value.dtype) if floating else jnp.float32)


def _varying_leaves(tree: Tree, names: tuple[Any, ...]) -> list[str]:
    """Where in the tree the arrays are that differ between devices, as far as JAX knows."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, leaf in leaves if varying(leaf) & set(names)]


def _check_replicated(state: TrainState, names: tuple[Any, ...]) -> None:
    for path in _varying_leaves(state, names):
        raise ValueError(
            f"state{path} varies over axis_name={names}: every device must hold the same state. "
            f"Give shard_map in_specs=(P(), P({names[0]!r})) for (state, batch)."
        )


def _check_synchronised(stats: Tree, names: tuple[Any, ...]) -> None:
    for path in _varying_leaves(stats, names):
        raise ValueError(
            f"the new statistics at {path} differ between the devices of axis_name={names}: the "
            f"layer normalises on each device alone. Give the layer axis_name too, or leave out "
            f"pool_stats=False."
        )


def _check_axes(new: Tree, shared: list[Any], names: tuple[Any, ...]) -> None:
    """Refuses layers that share statistics over an axis over which the step adds up nothing."""
    for name in shared:
        if name in names or lax.axis_size(name) == 1:
            continue
        if is_typed(name) and not _varying_leaves(new, (name,)):
            continue  # JAX knows that all devices do the same step
        wanted = (*names, name) if names else name
        raise ValueError(
            f"layers share their statistics over axis_name={name!r}, which is bound outside of "
            f"the step, but the step adds up gradients over "
            f"{'axis_name=' + repr(names) if names else 'no axis'}: the parameters of the devices "
            f"would drift apart. Write make_train_step(..., axis_name={wanted!r})."
        )


def _is_loss_scale(node: Any) -> bool:
    return isinstance(node, LossScaleState)


def _loss_scale(opt_state: Tree) -> Array | None:
    found = [n for n in jax.tree.leaves(opt_state, is_leaf=_is_loss_scale) if _is_loss_scale(n)]
    if len(found) > 1:
        raise ValueError(
            f"opt_state has {len(found)} loss scales: wrap the whole optimizer once, "
            f"dynamic_loss_scale(optax.chain(...))."
        )
    return found[0].scale if found else None


def _with_loss_scale(old: Tree, new: Tree) -> Tree:
    """The old state of an optimizer, with the new scale."""

    def merge(old: Any, new: Any) -> Any:
        return new._replace(inner=old.inner) if _is_loss_scale(old) else old

    return jax.tree.map(merge, old, new, is_leaf=_is_loss_scale)
