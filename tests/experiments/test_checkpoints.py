"""A run that is killed and resumed ends as one that was never stopped."""

import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import checkpoints
from jbn import training
from tests import nets
from tests.experiments import interrupted
from tests.tolerance import eps

STEPS, KILL_AT = 8, 5
# 16 examples are summed in another order, and a few steps carry the difference on.
CLOSE = {"rtol": 1e3 * eps("float32"), "atol": 1e3 * eps("float32")}


def killed(folder):
    """Starts a run on four devices that is killed in the middle, by SIGKILL."""
    arguments = [str(folder), "core", "4", str(STEPS), str(KILL_AT)]
    process = subprocess.run(
        [sys.executable, "-m", "tests.experiments.interrupted", *arguments],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ,  # with as many devices as here
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_killed_run_ends_like_one_never_stopped(tmp_path):
    killed(tmp_path / "killed")
    first, expected = interrupted.run(tmp_path / "whole", "core", 4, STEPS)
    assert first == 0
    for devices in (4, 2):
        copy = shutil.copytree(tmp_path / "killed", tmp_path / str(devices))
        first, state = interrupted.run(copy, "core", devices, STEPS)
        assert first in (2, 4)  # the save of step 4 may not have been complete
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(state)} == {devices}
        state, whole = jax.tree.map(np.asarray, (state, expected))
        if devices == 4:
            chex.assert_trees_all_equal(state, whole)
        else:
            chex.assert_trees_all_close(state, whole, **CLOSE)
    with checkpoints.manager(tmp_path / "whole") as manager:
        assert manager.all_steps() == [4, 6, 8]  # the newest three


@pytest.mark.parametrize("net", nets.BUILD)
def test_every_kind_of_state_comes_back(net, tmp_path):
    params, stats, _ = nets.BUILD[net](None, jnp.float32)
    fresh = training.init(params, stats, training.dynamic_loss_scale(optax.adam(0.1)))
    saved = jax.tree.map(lambda leaf: leaf + 3, fresh)
    with checkpoints.manager(tmp_path) as manager:
        assert checkpoints.resume(manager, fresh) is fresh  # there is no checkpoint yet
        assert checkpoints.save(manager, saved)
        restored = checkpoints.resume(manager, fresh)
    chex.assert_trees_all_equal(restored, saved)


# Orbax never awaits the coroutines that read the other arrays, so that Python warns of them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_another_model_is_refused(tmp_path):
    state = training.init(jnp.ones(3), (), optax.sgd(0.1))
    with checkpoints.manager(tmp_path) as manager:
        checkpoints.save(manager, state)
        with pytest.raises(ValueError, match=r"(?i)shape"):
            checkpoints.resume(manager, state._replace(params=jnp.ones(4)))
    gc.collect()  # so that the warnings come here and not in a later test
