"""Checkpoints of a whole training state with Orbax: stop anywhere, go on anywhere.

A `jbn.training.TrainState` holds all that a step needs, running statistics, optimizer state and
loss scale included. So a run that is killed and resumed ends as if it had never stopped: bit for
bit on the same devices, to rounding on others. What a program must add is a batch that depends on
nothing but the number of the step::

    with checkpoints.manager(folder) as manager:
        state = checkpoints.resume(manager, state)  # as it is, if there is no checkpoint yet
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
    """Of the checkpoints in a folder, of which it keeps the newest; close it, or use it in `with`.

    Args:
      folder: made if it is missing. With several processes, one that all of them see.
      every: of how many steps `save` saves one.
      keep: how many checkpoints stay.
    """
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
    return ocp.CheckpointManager(Path(folder).resolve(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState) -> bool:
    """Saves the state, if its step is one to be saved, while training goes on.

    The arrays are copied before this returns, so they may be donated. A checkpoint counts once it
    is complete: one that was being written when the program died is not seen again.
    """
    return manager.save(int(state.step), args=ocp.args.StandardSave(state))


def resume(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The newest checkpoint, placed on devices as `state` is; `state` itself if there is none.

    Args:
      manager: of the folder.
      state: a fresh state of the same model and optimizer. Its devices and shardings may be others
        than those of the run that saved the checkpoint.

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
