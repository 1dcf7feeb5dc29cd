"""The end of a step: divides the sums, and applies or skips Optax's update."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jbn.training.loss_scale import all_finite, with_new_scale
from jbn.training.mean import divide
from jbn.training.microbatches import Sums
from jbn.training.state import TrainState
from jbn.training.types import Tree


def update(
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    stats: Tree,
    sums: Sums,
    scale: Array | None,
) -> tuple[TrainState, dict[str, Array]]:
    """Divides the sums, and applies the update unless it must be skipped; alike on all devices.

    Args:
      optimizer: Optax's.
      state: the state before the step.
      stats: the new running statistics.
      sums: the sums over all microbatches and devices.
      scale: the scale of the loss, [], float32; None without one.

    Returns:
      The state after the step, and the metrics of the whole batch.
    """
    weight = sums.loss.weight
    divisor = jnp.where(weight > 0, weight, jnp.ones_like(weight))
    if scale is not None:
        divisor = divisor * scale
    grads = jax.tree.map(
        lambda g, p: (g / divisor.astype(g.dtype)).astype(p.dtype), sums.grads, state.params
    )
    finite = all_finite((sums.loss, grads))
    taken = finite & (weight > 0)
    loss = divide(sums.loss)
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params, value=loss, finite=finite
    )
    params = optax.apply_updates(state.params, updates)
    new = params, stats, opt_state
    old = state.params, state.stats, with_new_scale(state.opt_state, opt_state)
    chosen = jax.tree.map(functools.partial(_choose, taken), new, old)
    metrics = {name: divide(mean) for name, mean in sums.metrics.items()}
    metrics |= {"loss": loss, "skipped": ~taken}
    if scale is not None:
        metrics["loss_scale"] = scale
    return TrainState(state.step + 1, *chosen), metrics


def _choose(condition: Array, new: Array, old: Array) -> Array:
    # Take the new dtype: the first complex batch makes the statistics complex.
    return jnp.where(condition, new, old if new.dtype == old.dtype else old.astype(new.dtype))
