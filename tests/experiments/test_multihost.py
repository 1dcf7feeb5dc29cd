"""Two processes of two devices each, as on a cluster, compute what one process does."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from experiments.multihost import __main__ as multihost
from experiments.multihost import processes, training
from tests.tolerance import eps

STEPS = 6
# 240 images are summed in another order, and a few steps of SGD with momentum carry this on.
CLOSE = {"rtol": 1e3 * eps("float32"), "atol": 1e3 * eps("float32")}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The final state of each of the two processes, by mode."""
    out = tmp_path_factory.mktemp("multihost")
    said = processes.launch(2, 2, STEPS, out)
    assert "process 1 of 2: 2 of 4 devices" in said[1]
    return {mode: [processes.read(out, mode, i) for i in range(2)] for mode in training.MODES}


@pytest.mark.parametrize("mode", training.MODES)
def test_processes_agree_bit_for_bit(two_processes, mode):
    for ours, theirs in zip(*two_processes[mode], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("mode", "devices"), [("shard_map", 4), ("jit", 1)], ids=str)
def test_two_processes_compute_the_same_as_one(two_processes, mode, devices):
    mesh = jax.make_mesh(
        (devices,), (training.AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    state = training.train(mesh, mode, STEPS)
    for ours, one in zip(two_processes[mode][0], jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, one, **CLOSE)


def test_a_failing_process_is_shown(tmp_path):
    with pytest.raises(RuntimeError, match=r"--- process 0\n[\s\S]*missing is no folder"):
        processes.launch(1, 1, 0, tmp_path / "missing")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--num-processes 2", "--num-processes needs --coordinator HOST:PORT"),
        (
            "--coordinator a:1 --num-processes 2 --process-id 2",
            "--process-id must be 0 to 1; got 2",
        ),
        ("--processes 7", "processes x devices must divide 120"),
    ],
)
def test_wrong_arguments_are_explained(argv, message, capsys):
    with pytest.raises(SystemExit):
        multihost.main(argv.split())
    assert message in capsys.readouterr().err
