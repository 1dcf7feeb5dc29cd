"""TrainState, the state that a training step takes and returns, and its initial value."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from jbn.training.checks import check_optimizer
from jbn.training.types import Tree


class TrainState(NamedTuple):
    """The state that a training step takes and returns; a checkpoint of it resumes the training.

    Attributes:
      step: [], int32: the number of steps so far, skipped steps included.
      params: the arrays that the optimizer changes, such as linen's `params` or nnx's State of
        Param.
      stats: the running statistics, such as linen's `batch_stats`, nnx's State of BatchStat, or a
        tree of jbn.RunningStats. Other layers may keep their state here, too.
      opt_state: the state of Optax's optimizer.
    """

    step: Array
    params: Tree
    stats: Tree
    opt_state: Tree


def init(params: Tree, stats: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """Makes the state before the first step.

    >>> import jax.numpy as jnp, jbn.training, optax
    >>> params = {"kernel": jnp.ones((2, 3)), "norm": jbn.init_params(3)}
    >>> state = jbn.training.init(params, jbn.init_stats(3), optax.sgd(0.1))
    >>> print(state.step, state.stats.mean)
    0 [0. 0. 0.]
    """
    check_optimizer(optimizer)
    return TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))
