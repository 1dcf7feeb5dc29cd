"""experiments.whitening runs, and its measurements say what the guide says."""

import pytest

from experiments.whitening import __main__ as whitening
from experiments.whitening import cost, state


@pytest.mark.slow
def test_the_command_prints_both_tables(capsys):
    whitening.main(["--smoke"])
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
