"""Saves and restores a whole training state with Orbax, so that a run can stop at any step.

A `jbn.training.TrainState` holds all that a step needs, running statistics, optimizer state and
loss scale included. So a run that is killed and resumed ends as if it had never stopped: bit for
bit on the same devices, to rounding on other ones. The program must make each batch from nothing
but the number of the step::

    with checkpoints.manager(folder) as manager:
        state = checkpoints.resume(manager, state)  # unchanged if there is no checkpoint yet
        for i in range(int(state.step), steps):
            state, metrics = step(state, batch(i))
            checkpoints.save(manager, state)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jbn.training import TrainState


def manager(folder: str | Path, *, every: int = 1, keep: int = 3) -> ocp.CheckpointManager:
    """Makes a manager that keeps the newest checkpoints of a folder; close it, or use it in `with`.

    Args:
      folder: created if it is missing. Several processes must all see the same folder.
      every: the number of steps from one checkpoint of `save` to the next.
      keep: how many checkpoints to keep.
    """
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
    return ocp.CheckpointManager(Path(folder).resolve(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState) -> bool:
    """Saves the state in the background, if its step is one of those to be saved.

    The arrays are copied before this function returns, so they may be donated. Only a complete
    checkpoint counts: `resume` ignores one that was being written when the program died.
    """
    return manager.save(int(state.step), args=ocp.args.StandardSave(state))


def resume(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """Returns the newest checkpoint, on devices as `state` is; `state` itself if there is none.

    Args:
      manager: the manager of the folder.
      state: a fresh state of the same model and optimizer. Its devices and shardings may differ
        from those of the run that saved the checkpoint.

    Raises:
      ValueError: the checkpoint is of another model or optimizer; Orbax says what differs.
    """
    manager.wait_until_finished()
    newest = manager.latest_step()
    if newest is None:
        return state
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    restored: Any = manager.restore(newest, args=ocp.args.StandardRestore(like))
    return restored
