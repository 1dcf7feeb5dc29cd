"""experiments.crossq summarises what it recorded; where sbx is installed, it trains with both."""

import importlib.util
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import jbn.linen.crossq
from experiments.common.records import Records
from experiments.crossq import __main__ as crossq
from experiments.crossq import layers, report, training, units, updates

needs_sbx = pytest.mark.skipif(
    importlib.util.find_spec("sbx") is None, reason="pip install -e '.[experiments,crossq]'"
)


def write_curves(folder, returns):
    """Writes curves: `returns` has a [seeds, evaluations] for each warm-up and layer."""
    with Records(folder / "curves.jsonl") as records:
        for (warmup, layer), seeds in returns.items():
            for seed, each in enumerate(seeds):
                steps = [100 * (i + 1) for i in range(len(each))]
                records.write("curve", seed=seed, warmup=warmup, layer=layer, steps=steps,
                              returns=each)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Records as the parts write them, of two warm-ups and two seeds."""
    close = {"sbx": [[-1000, -300, -150], [-900, -180, -130]],
             "jbn": [[-950, -250, -140], [-940, -190, -150]]}  # fmt: skip
    far = {"sbx": close["sbx"], "jbn": [[-950, -900, -900], [-940, -910, -900]]}
    write_curves(tmp_path, {
        **{(1000, layer): seeds for layer, seeds in close.items()},
        **{(5, layer): seeds for layer, seeds in far.items()},
    })  # fmt: skip
    with Records(tmp_path / "updates.jsonl") as records:
        for name in ("BN", "renorm"):
            for variant in updates.VARIANTS:
                for seed in (0, 1):
                    size = {"sbx": 0.0, "control": 1e-7, "jbn": 1e-6}[variant] * (1 + seed)
                    records.write("updates", name=name, seed=seed, variant=variant,
                                  differences=[size, 2 * size, 4 * size])  # fmt: skip
    return tmp_path


def test_curves_are_summarised_over_the_seeds(folder):
    rows = report.read(folder)
    first = report.curve_summaries(rows)[0]
    assert (first["warmup"], first["layer"], first["seeds"]) == (1000, "sbx", 2)
    means = [-1450 / 3, -1210 / 3]
    assert first["mean"] == pytest.approx(np.mean(means))
    assert first["spread"] == pytest.approx(np.std(means, ddof=1))
    assert first["last"] == -140
    assert first["solved"] == [300, 200]
    assert report.curve_summaries(rows)[3]["solved"] == [math.inf] * 2


def test_evaluations_outside_the_spread_are_counted(folder):
    rows = report.read(folder)
    assert report.outside(rows, 1000) == (0, 3)
    assert report.outside(rows, 5) == (2, 3)


def test_the_largest_difference_over_the_seeds_counts(folder):
    summaries = report.update_summaries(report.read(folder))
    assert [(s["name"], s["variant"]) for s in summaries[:2]] == [("BN", "control"), ("BN", "jbn")]
    np.testing.assert_allclose(summaries[1]["worst"], [2e-6, 4e-6, 8e-6])


def test_the_first_step_that_is_not_finite_is_in_the_table():
    found = {(7, "sbx"): 651, (7, "jbn"): None}
    rows = [{"seed": seed, "layer": layer, "not_finite_at": at}
            for (seed, layer), at in found.items()]  # fmt: skip
    assert report.tables({"finite": rows}).splitlines()[1].split("  ")[-2:] == [
        "NaN at 651",
        "finite",
    ]


def test_the_report_needs_no_sbx(folder, capsys):
    crossq.main(["--part", "report", "--out", str(folder)])
    text = capsys.readouterr().out
    assert "2 of 3" in text
    assert "update 3" in text
    assert "8.0e-06" in text
    assert (folder / "crossq.png").read_bytes().startswith(b"\x89PNG")


def test_without_sbx_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"sbx is not installed.*\[experiments,crossq\]"):
        crossq.main(["--part", "curves"])


def test_trainings_that_are_compared_follow_each_other():
    first, second, third, *_ = training.cases(training.Config(warmups=(9, 5), seeds=(4, 6)))
    assert (first, second) == ((4, 9, "sbx"), (4, 9, "jbn"))
    assert third == (4, 5, "sbx")


def test_changed_parameters_differ_in_their_last_bits():
    params = {"a": jnp.linspace(1, 2, 50), "b": jnp.float32(3)}
    new = updates.changed(params, 2.0**-23, jax.random.key(0))
    relative = np.asarray(new["a"]) / np.asarray(params["a"]) - 1
    assert 0 < abs(relative).max() <= 2.0**-22
    assert {*np.sign(relative)} >= {-1, 1}
    np.testing.assert_array_equal(updates.changed(params, 0.0, jax.random.key(0))["a"], params["a"])


@needs_sbx
@pytest.mark.filterwarnings("default")  # of other libraries
def test_sbx_gets_the_layer_and_its_own_back():
    from sbx.crossq import policies

    theirs = policies.BatchRenorm
    with layers.using("jbn", epsilon=0.5):
        assert isinstance(policies.BatchRenorm(), jbn.linen.crossq.BatchRenorm)
        assert policies.BatchRenorm().epsilon == 0.5
    with layers.using("sbx"):
        assert isinstance(policies.BatchRenorm(), theirs)
    assert policies.BatchRenorm is theirs


@needs_sbx
@pytest.mark.slow
def test_smoke(tmp_path):
    """Runs in a process of its own: sbx promotes dtypes and ranks, which the tests forbid."""
    command = [sys.executable, "-m", "experiments.crossq", "--smoke", "--out", str(tmp_path)]
    environment = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "crossq.png").is_file()
    rows = report.read(tmp_path)
    assert rows["header"][0]["sbx-rl"]
    assert [r["layer"] for r in rows["curve"]] == ["sbx", "jbn"] * 2
    for summary in report.update_summaries(rows):
        if summary["name"].startswith("BN"):  # the same formula: rounding, and its growth
            assert summary["worst"].max() < 1e-4
    assert rows["cost"][0]["sbx"] > 0
    assert [r["layer"] for r in rows["finite"]] == ["sbx", "jbn"] * 2
    groups = rows["units"][: len(units.GROUPS)]
    assert sum(r["units"] for r in groups) == groups[0]["of"] == 2 * crossq.SMOKE.width
