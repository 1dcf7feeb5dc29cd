"""Means of metrics over a data set: sums on the device, added in float64 on the host."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn.training.checks import check_function
from jbn.training.mean import Mean, as_mean
from jbn.training.state import TrainState
from jbn.training.types import Tree


def evaluate(
    metric_fn: Callable[[Tree, Tree, Any], Mapping[str, Any]],
    state: TrainState,
    batches: Iterable[Tree],
) -> dict[str, Any]:
    """Takes the weighted means of metrics over a data set, exact for batches of any sizes.

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
        the batch, whose weight is then the number of examples. It is compiled once for each shape
        of a batch; pass the same function each time. Batches sharded over devices are fine.
      state: its params and stats are used.
      batches: any iterable; the last one may be smaller. Pad batches that must fill all devices,
        and return `Mean((values * mask).sum(), mask.sum())`.

    Returns:
      The metrics by name, as Python numbers (NumPy arrays where they have a shape), summed in
      float64.

    Raises:
      ValueError: there is no batch.
    """
    check_function("metric_fn", metric_fn, "(params, stats, batch) -> {name: value}")
    if not isinstance(state, TrainState):
        raise TypeError(
            f"state must be a jbn.training.TrainState, such as jbn.training.init returns; got "
            f"{type(state).__name__}."
        )
    sums: dict[str, Mean] | None = None
    previous = None
    for batch in batches:
        current = _measure(metric_fn, state.params, state.stats, batch)
        if previous is not None:  # added while the device computes the current one
            sums = _add(sums, previous)
        previous = current
    if previous is None:
        raise ValueError("batches is empty: there is nothing to take a mean of.")
    return {name: _quotient(m) for name, m in _add(sums, previous).items()}


@functools.partial(jax.jit, static_argnums=0)
def _measure(metric_fn: Any, params: Tree, stats: Tree, batch: Tree) -> dict[str, Mean]:
    examples = next((jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)), 1)

    def weighted(name: str, value: Any) -> Mean:
        mean = as_mean(f"metric {name!r}", value)
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
