"""A training run that can be killed, which tests/experiments/test_checkpoints.py starts.

python -m tests.experiments.interrupted FOLDER NET DEVICES STEPS KILL_AT
"""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.common import checkpoints
from jbn import training
from tests import nets
from tests.executions import AXIS, mesh


def run(folder, net, devices, steps, kill_at=None):
    """Trains up to step `steps`, from the newest checkpoint if any; returns (first step, state)."""
    optimizer = training.dynamic_loss_scale(optax.sgd(0.1, momentum=0.9), growth_interval=3)
    params, stats, loss_fn = nets.BUILD[net](None, jnp.float32)
    step = jax.jit(training.make_train_step(loss_fn, optimizer, microbatches=2), donate_argnums=0)
    where = mesh((devices,))
    with jax.set_mesh(where), checkpoints.manager(folder, every=2) as manager:
        state = jax.device_put(training.init(params, stats, optimizer), NamedSharding(where, P()))
        state = checkpoints.resume(manager, state)
        first = int(state.step)
        for i in range(first, steps):
            batch = jax.device_put(nets.batch(i, 16, np.float32), NamedSharding(where, P(AXIS)))
            state, _ = step(state, batch)
            checkpoints.save(manager, state)
            if i + 1 == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    return first, state


if __name__ == "__main__":
    folder, net, *numbers = sys.argv[1:]
    run(folder, net, *map(int, numbers))
