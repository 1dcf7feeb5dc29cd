"""experiments.batches: the order of images, equal training for equal groups, and the command."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from experiments.batches import __main__ as batches
from experiments.batches import cases, judging, network, order, report, training
from experiments.images import photos
from experiments.nets.inputs import as_input
from tests.tolerance import assert_close

TINY = cases.Config(parts=(2, 32), orders=("iid",), seeds=(0,), steps=1, judged=1, widths=(8,))


@pytest.fixture(scope="module")
def small():
    sets = photos.painted_stripes(640, 64)
    return photos.half_size(sets.train_images), sets.train_labels


# --- The order of images ------------------------------------------------------------------------

LABELS = np.repeat(np.arange(10, dtype=np.int32), 64)[::-1]


def test_random_steps_have_every_image_once_an_epoch():
    rows = order.image_order(LABELS, 40, "iid", seed=0)
    assert rows.shape == (40, cases.STEP)
    assert sorted(rows[:20].ravel()) == sorted(rows[20:].ravel()) == list(range(640))
    assert (rows != order.image_order(LABELS, 40, "iid", seed=1)).any()


@pytest.mark.parametrize(("name", "n_classes"), [("sorted parts", 4), ("sorted steps", 1)])
def test_sorted_steps_have_runs_of_one_class_and_all_classes_equally_often(name, n_classes):
    rows = order.image_order(LABELS, 20, name, seed=0)
    classes = LABELS[rows].reshape(20, n_classes, -1)
    assert (classes == classes[..., :1]).all()
    assert all(len(set(step)) == n_classes for step in classes[..., 0])
    assert np.bincount(LABELS[rows].ravel()).tolist() == [64] * 10
    assert sorted(rows.ravel()) == list(range(640))  # each class has 64 images


def test_half_size_averages_squares():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    half = photos.half_size(images)
    assert half.shape == (2, 2, 2, 3)
    assert half[1, 0, 1, 2] == int(images[1, :2, 2:, 2].mean())
    assert (photos.half_size(np.full((1, 2, 2, 3), 255, np.uint8)) == 255).all()


# --- The runs -----------------------------------------------------------------------------------


def test_runs_that_are_the_same_run_once():
    config = cases.Config()
    per_seed = {name: cases.settings(config, name) for name in cases.ORDERS}
    assert list(map(len, per_seed.values())) == [14, 14, 5]
    assert len(list(cases.cases(config))) == len(set(cases.cases(config))) == 3 * 33
    tuned = [case.norm for case in cases.tuning_cases(config)]
    assert set(tuned) == {cases.tuned_as(norm) for norm in (*cases.BY_BATCH, *cases.BY_IMAGE)}


def test_renorm_limits_are_those_of_the_paper_in_the_share_of_the_run():
    limits = network.limits(80_000)  # of which the paper's schedule takes one half
    at = [5_000, 15_000, 25_000, 40_000, 80_000]
    d_max = [float(limits["d_max"](jnp.int32(step))) for step in at]
    r_max = [float(limits["r_max"](jnp.int32(step))) for step in at]
    assert d_max == [0, 2.5, 5, 5, 5]
    np.testing.assert_allclose(r_max, [1, 1 + 2 * 10 / 35, 1 + 2 * 20 / 35, 3, 3], rtol=1e-6)


@pytest.mark.usefixtures("cheap_programs")
def test_batch_and_ghost_train_alike_and_differ_in_running_statistics(small):
    """Makes one step of either, and compares the running statistics of the stem's layer."""
    trained = {
        norm: training.train(TINY, cases.Case(norm, 2, "sorted parts", 0), 0.1, *small)
        for norm in ("batch", "ghost")
    }
    (batch, loss), (ghost, other_loss) = trained.values()
    assert_close(loss, other_loss, jnp.float32, 64)
    for a, b in zip(*map(jax.tree.leaves, (batch["params"], ghost["params"])), strict=True):
        assert_close(a, b, jnp.float32, 32 * 64)
    a, b = (v["batch_stats"]["BatchNorm_0"] for v in (batch, ghost))
    assert_close(a["mean"], b["mean"], jnp.float32, 32 * 64)
    assert (a["var"] < b["var"]).all()  # that of pairs lacks the variance between pairs


@pytest.mark.parametrize("norm", cases.BY_IMAGE)
@pytest.mark.usefixtures("cheap_programs")
def test_layers_that_look_at_one_image_do_not_use_the_others(norm, small):
    case = cases.Case(norm, cases.STEP, "iid", 0)
    net = network.network(TINY, case)
    x = as_input(jnp.asarray(small[0][:4]))
    variables = jax.jit(functools.partial(net.init, train=False))(jax.random.key(0), x)
    assert set(variables) == {"params"}

    @jax.jit
    def apply(x):
        return network.logits_and_stats(net, case, variables, x)

    together, stats = apply(x)
    assert stats == {}
    assert_close(apply(x[:1])[0], together[:1], jnp.float32, 64)


@pytest.mark.usefixtures("cheap_programs")
def test_judging_counts_by_running_statistics_and_by_parts(small):
    images, labels = small
    case = cases.Case("ghost", 2, "iid", 0)
    net = network.network(TINY, case)
    variables = net.init(jax.random.key(3), as_input(jnp.asarray(images[:2])), False)
    got = judging.measure(TINY, case, variables, images, labels)
    rows = order.image_order(labels, 1, "iid", judging.TEST_SEED)[0]
    plain = network.network(TINY, cases.Case("batch", 2, "iid", 0))
    x = as_input(jnp.asarray(images[rows]))
    by_pairs = jnp.concatenate(
        [
            plain.apply(variables, x[i : i + 2], True, mutable=["batch_stats"])[0]
            for i in range(0, cases.STEP, 2)
        ]
    )
    by_running = jnp.asarray(plain.apply(variables, x, False))
    for name, logits in (("training", by_pairs), ("inference", by_running)):
        assert got[f"{name}_accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == labels[rows]))


def test_a_summary_has_the_mean_and_the_spread_of_the_seeds():
    rows = [
        {"norm": "ghost", "part": 2, "order": "iid", "seed": seed, "rate": 0.1, "last_loss": 1.0,
         "inference_accuracy": accuracy, "training_accuracy": 0.5}
        for seed, accuracy in enumerate((0.25, 0.5, 0.75))
    ]  # fmt: skip
    (result,) = report.summaries(rows)
    assert (result["inference"], result["inference_spread"]) == (0.5, 0.5)
    assert result["training_spread"] == 0
    assert "ghost     2      50.0%   50.0%" in report.table([result])


# --- The command --------------------------------------------------------------------------------


@pytest.mark.slow  # compiles a program for each normalisation
@pytest.mark.usefixtures("cheap_programs")
def test_smoke(tmp_path, capsys):
    batches.main(["--smoke", "--out", str(tmp_path)])
    header, *rest = map(json.loads, (tmp_path / "batches.jsonl").read_text().splitlines())
    assert header["command"].startswith("python -m experiments.batches --smoke")
    kinds = [row["kind"] for row in rest]
    assert [kinds.count(kind) for kind in ("tuning", "rates", "run", "summary")] == [12, 1, 21, 21]
    rates = next(row for row in rest if row["kind"] == "rates")
    for row in rest:
        if row["kind"] == "run":
            assert row["rate"] == rates[cases.tuned_as(row["norm"])]
            assert 0 <= row["inference_accuracy"] <= 1
    assert (tmp_path / "batches.png").read_bytes().startswith(b"\x89PNG")
    assert "sorted steps  synchronised    32" in capsys.readouterr().out


@pytest.fixture
def best_at_a_tenth(monkeypatch):
    """Replaces training and judging: a network is its learning rate, and the best is 0.1."""

    def train(config, case, rate, images, labels, among=None):
        return rate, 1.0

    def measure(config, case, rate, images, labels):
        return {"inference_accuracy": 0.9 - abs(rate - 0.1), "training_accuracy": 0.5}

    monkeypatch.setattr(batches, "train", train)
    monkeypatch.setattr(batches, "measure", measure)


def test_the_best_rate_is_chosen_and_one_rate_needs_no_choice(tmp_path, best_at_a_tenth):
    argv = ["--smoke", "--out", str(tmp_path), "--orders", "sorted steps", "--rates"]
    batches.main([*argv, "0.3", "0.1", "0.03", "--tag", "three"])
    batches.main([*argv, "0.3", "--tag", "one"])
    for tag, rate, tuning in (("three", 0.1, 18), ("one", 0.3, 0)):
        lines = (tmp_path / f"batches-{tag}.jsonl").read_text().splitlines()
        rows = list(map(json.loads, lines))
        assert [row["kind"] for row in rows] == [
            "header", *["tuning"] * tuning, "rates", *["run"] * 5, *["summary"] * 5
        ]  # fmt: skip
        assert {row["rate"] for row in rows if row["kind"] == "run"} == {rate}


def test_without_images_the_message_says_where_they_are(capsys):
    with pytest.raises(SystemExit):
        batches.main([])
    assert "cifar-10-binary.tar.gz" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: There is no folder nowhere"):
        batches.main(["--data-dir", "nowhere"])
