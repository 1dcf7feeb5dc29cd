"""experiments.whitening runs, and its measurements say what the guide says."""

import numpy as np
import pytest

from experiments.common.records import Records
from experiments.images.digits import bundled_digits
from experiments.whitening import __main__ as whitening
from experiments.whitening import comparison, cost, figures, state, warning
from experiments.whitening.networks import from_bits, sigmoids
from experiments.whitening.training import Data, Task, order


@pytest.mark.slow
def test_the_command_prints_both_tables(capsys):
    whitening.main(["--smoke", "--part", "cost", "state"])
    text = capsys.readouterr().out
    assert "| 32 | 16 | zca |" in text
    assert "| 32 | all | newton_schulz(5) |" in text
    assert "| falls | 8 |" in text


def test_groups_of_s_features_take_about_10_s_operations_an_element():
    rows = {(r.group, r.method): r for r in cost.measure(32, 1, positions=4096)}
    one = rows[0, "batch_norm"].flops
    for size in (16, 32):
        assert 9 * size < rows[size, "zca"].flops - one < 12 * size


def test_the_mean_covariance_is_closer_than_the_mean_matrix():
    row = state.measure("none", 24, seeds=1, steps=300)
    assert row.covariance < 0.2
    assert row.matrix > 4 * row.covariance


def test_a_comparison_writes_every_run_and_draws_them(tmp_path):
    data = Data(*bundled_digits())
    task = Task(sigmoids, from_bits, 200, 40, 20, 20, (1.0, 3.0))
    with Records(tmp_path / "runs.jsonl") as records:
        results = comparison.compare(task, data, (0, 1), records, rounds=1)
    assert [r.layer for r in results] == ["none", "each feature", "groups", "all features"]
    for r in results:
        assert np.shape([run.accuracies for run in r.runs]) == (2, 2)
        assert r.rate in task.rates
    ends = {r.layer: np.mean([run.settled for run in r.runs]) for r in results}
    assert ends["each feature"] > 0.6  # 40 steps
    text = comparison.table(task, results)
    assert text.count("\n") == 5
    figures.accuracies(tmp_path / "accuracy.png", "mnist", task.chunk, results)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_steps_to_a_goal():
    assert comparison.first_step([0.1, 0.5, 0.4], 10, 0.5) == 20
    assert comparison.first_step([0.1, 0.4], 10, 0.5) is None


def test_an_epoch_uses_every_image_once():
    task = comparison.TASKS["mnist"]._replace(batch=5)
    rows = order(np.arange(10, 20), task, 4, 0)
    assert sorted(rows[:2].ravel()) == sorted(rows[2:].ravel()) == list(range(10, 20))


def test_the_bias_grows_where_the_gradient_ignores_the_statistics(tmp_path):
    curves = warning.curves(Data(*bundled_digits()), 200)
    for c in curves:
        if c.ignored:
            assert c.bias[-1] > 0.3
        else:
            assert c.bias[-1] < 1e-4
        if c.trained == "bias":  # the next normalisation takes the bias away
            np.testing.assert_allclose(c.loss, c.loss[0], rtol=1e-4)
    ends = {(c.kind, c.ignored): c.loss[-1] for c in curves if c.trained == "all"}
    assert all(ends[kind, False] < ends[kind, True] for kind in warning.KINDS)
    assert warning.table(curves).count("\n") == 13
    figures.warning(tmp_path / "warning.png", curves)


def test_cifar_needs_a_folder(capsys):
    with pytest.raises(SystemExit):
        whitening.main(["--part", "cifar"])
    assert "--cifar10-dir DIR" in capsys.readouterr().err
