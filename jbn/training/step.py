"""One step of training, the same on one device and on many."""

import functools
from collections.abc import Callable

import optax
from jax import Array

from jbn._core.deferral import MissingCounts, vary
from jbn._devices.named_axes import AxisName, bound_axes, recorded, scope
from jbn.training.accumulation import in_turn, pooled
from jbn.training.checks import (
    check_axes,
    check_function,
    check_microbatches,
    check_optimizer,
    check_replicated,
)
from jbn.training.loss_scale import current_scale
from jbn.training.microbatches import Microbatches, part_key
from jbn.training.state import TrainState
from jbn.training.types import LossFn, Tree
from jbn.training.update import update

StepFn = Callable[[TrainState, Tree], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: AxisName | None = None,
    microbatches: int = 1,
    pool_stats: bool | None = None,
    rng: Array | None = None,
) -> StepFn:
    """Makes one step of training, a pure function to be given to jit, shard_map or pmap.

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
      optimizer: any of Optax's; wrapped in `dynamic_loss_scale` if the model computes in float16.
      axis_name: the axis of the pmap or shard_map that the step runs in. None on one device, and
        under `jit` with sharded arrays, where the batch is the global one.
      microbatches: the number of parts of the batch that go through the model one after the other,
        with one update at the end. Part i holds the examples i, i + microbatches, i + 2
        microbatches, ... so that under `jit` with a sharded batch every device has its share of
        each part.
      pool_stats: whether the running statistics are updated once a step, by the moments of the
        whole batch, even if layers normalise by microbatch or by device. All layers must be jbn's.
        Other state in `stats` comes from the last microbatch; over the devices it is the mean (for
        integers the largest value). False: each microbatch updates the statistics in turn, as the
        layers do by themselves; then layers must be synchronised over `axis_name`. By default True
        if there is something to pool: several microbatches, or an axis_name.
      rng: a key. Each step, microbatch and instance of axis_name draws its own from it.

    Returns:
      A function of a TrainState and a batch, whose leaves are [N, ...]. It returns the new state
      and a dictionary of the metrics of the whole batch, with "loss" and "skipped". The state is
      replicated: out_specs=P().

      A step whose loss or gradient is not finite anywhere, or whose weight is 0, is skipped:
      params, stats and opt_state (but for a loss scale) do not change. `step` counts it, and
      metrics["skipped"] is True.

    Raises:
      NameError: axis_name is not bound.
      TypeError: loss_fn returns something else, or with pool_stats a normalisation is not jbn's,
        or branches do not update the same statistics.
      ValueError: microbatches does not divide the batch; the state varies over axis_name, or so do
        the new statistics without pool_stats; layers share statistics over an axis outside of the
        step that axis_name lacks; or loss_fn returns statistics of another structure.
    """
    check_function("loss_fn", loss_fn, "(params, stats, batch) -> (loss, stats, metrics)")
    check_optimizer(optimizer)
    number = check_microbatches(microbatches)
    pool_stats = (number > 1 or axis_name is not None) if pool_stats is None else pool_stats
    optimizer = optax.with_extra_args_support(optimizer)

    def run(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, Array]]:
        names = scope(axis_name).names
        check_replicated(state, names)
        scale = current_scale(state.opt_state)
        params = vary(state.params, names)  # so that autodiff adds no psum to their gradient
        key = None if rng is None else functools.partial(part_key, rng, state.step, names)
        parts = Microbatches(loss_fn, params, batch, number, names, scale, key)
        sums, stats = (pooled if pool_stats else in_turn)(parts, state.stats)
        return update(optimizer, state, stats, sums, scale)

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, Array]]:
        outside = bound_axes()
        with recorded() as shared:
            try:
                new = run(state, batch)
            except MissingCounts as missing:  # the model counts batches, these statistics do not
                new = run(state._replace(stats=missing.filled(state.stats)), batch)
        check_axes(new, [name for name in shared if name in outside], scope(axis_name).names)
        return new

    return step
