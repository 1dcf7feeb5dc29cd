"""Inception runs follow their recipes, learn, resume, use devices and processes, and report."""

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.inception import curves as inception_curves
from experiments.inception import jobs, notebook, programs

pytest.importorskip("grain")
pytest.importorskip("tqdm")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("PIL")

from PIL import Image

from experiments.common import checkpoints
from experiments.inception import __main__ as inception
from experiments.inception import figures as inception_figures
from experiments.inception import report as inception_report
from experiments.inception.recipes import (
    ENSEMBLE,
    FINAL_SHARE,
    INITS,
    RATES,
    RECIPES,
    REMARKS,
    SCALES,
    TABLE,
    hyperparameters,
    network,
    optimizer,
)
from experiments.inception.runs import Options, Run
from tests import processes

ROOT = Path(__file__).parents[2]
SMOKE = SCALES["smoke"]


def command(*argv, out):
    inception.main([*map(str, argv), "--dataset", "smoke", "--out", str(out)])


def measurements(out, kind=None):
    [path] = out.glob("*/measurements.jsonl")
    return notebook.lines(path, kind)


def last_state(out, name="BN-x5"):
    """Returns the state in the newest checkpoint of the only run in a folder."""
    [folder] = out.glob("*/checkpoints")
    run = Run(name, TABLE[name], SMOKE, SMOKE.rate, 0)
    network = run.recipe.of_network(), SMOKE.of_network()
    made = programs.program(*network, 10, Options(devices=1))
    hyper = hyperparameters(run.recipe, SMOKE, SMOKE.rate)
    fresh = made.start(jax.random.key(1), {k: np.float32(v) for k, v in hyper.items()})
    with checkpoints.manager(folder) as manager:
        return checkpoints.resume(manager, fresh)


# --- Recipes ------------------------------------------------------------------------------------


def test_recipes_are_the_papers():
    plain, base, x5, x30 = (TABLE[k] for k in ("Inception", "BN-Baseline", "BN-x5", "BN-x30"))
    assert base == plain._replace(batch_norm=True)  # "same as Inception with BN"
    assert (plain.dropout, plain.lrn, plain.shuffle, plain.distortion) == (
        0.4, True, "fixed-shards", "full")  # fmt: skip
    assert (x5.rate, x30.rate) == (5, 30)
    assert x30 == x5._replace(rate=30)
    assert (x5.dropout, x5.lrn, x5.weight_decay, x5.decay_speed) == (0, False, 1 / 5, 6)
    assert (x5.shuffle, x5.distortion) == ("within-shard", "reduced")
    assert TABLE["BN-x5-Sigmoid"] == x5._replace(sigmoid=True)
    assert TABLE["Inception-x5"] == plain._replace(rate=5, share=1 / 5)
    assert TABLE["Inception-Sigmoid"] == plain._replace(sigmoid=True, share=1 / 5)


@pytest.mark.parametrize("name", REMARKS)
def test_a_remark_changes_one_thing(name):
    changed = {f for f in REMARKS[name]._fields
               if getattr(REMARKS[name], f) != getattr(TABLE["BN-x5"], f)}  # fmt: skip
    # A run whose rate decays as slowly as the baseline's also has as many steps.
    assert len(changed) == 1 or changed == {"decay_speed", "share"}


def test_the_init_recipes_have_the_kernels_of_flax():
    kernel = jax.random.key(0), (3, 3, 64, 64)
    for name, recipe in INITS.items():
        assert recipe._replace(init=1.0) == TABLE[name.split(",")[0]]
        ours = network(recipe, SCALES["cifar10"]).kernel_init(*kernel)
        np.testing.assert_allclose(ours, nn.Conv(64, (3, 3)).kernel_init(*kernel), rtol=1e-6)


@pytest.mark.parametrize("name", ENSEMBLE)
def test_a_member_of_the_ensemble_is_almost_bn_x30(name):
    changed = set(ENSEMBLE[name]._asdict().items()) ^ set(TABLE["BN-x30"]._asdict().items())
    assert len(changed) == 2  # one field, old and new


def test_the_rate_decays_as_documented():
    scale = SCALES["cifar10"]
    params = {"readout": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    grads = jax.tree.map(lambda p: 2.0 * p, params)
    for recipe, speed in ((TABLE["Inception"], 1), (TABLE["BN-x5"], 6)):
        tx = optimizer(**hyperparameters(recipe, scale, rate=0.01))
        state = tx.init(params)
        updates, state = tx.update(grads, state, params)
        decay = scale.weight_decay * recipe.weight_decay
        # The kernel decays, the bias does not.
        rate = 0.01 * recipe.rate
        chex.assert_trees_all_close(
            updates["readout"],
            {"kernel": jnp.full(2, -rate * (2 + decay)), "bias": jnp.full(2, -rate * 2)},
            rtol=1e-6,
        )
        second, _ = tx.update(grads, state, params)
        fell = FINAL_SHARE ** (speed / scale.steps)
        expected = -rate * fell * 2 * (1 + 0.9)  # momentum
        chex.assert_trees_all_close(second["readout"]["bias"], jnp.full(2, expected), rtol=1e-5)


def test_one_program_serves_rates_and_schedules():
    networks = {recipe.of_network() for recipe in RATES.values()}
    assert len(networks) == 2
    assert TABLE["BN-x5"].of_network() == TABLE["BN-x30"].of_network()
    assert TABLE["BN-x5"].of_network() != TABLE["BN-Baseline"].of_network()


@pytest.mark.parametrize("name", TABLE)
def test_networks_have_what_the_recipe_says(name):
    recipe = TABLE[name]
    net = network(recipe, SMOKE)
    assert (net.norm is not None, net.lrn, net.dropout) == (
        recipe.batch_norm, recipe.lrn, recipe.dropout)  # fmt: skip
    x = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(lambda k: net.init(k, x, train=False), jax.random.key(0))
    assert ("batch_stats" in variables) == recipe.batch_norm


def test_larger_initial_kernels():
    x, key = jnp.zeros((2, 32, 32, 3)), jax.random.key(0)

    def std(recipe):
        params = network(recipe, SMOKE).init(key, x, train=False)["params"]
        return np.std(params["ConvUnit_0"]["Conv_0"]["kernel"])

    stds = std(TABLE["BN-x30"]), std(ENSEMBLE["BN-x30, larger init"])
    np.testing.assert_allclose(stds[1] / stds[0], 2, rtol=1e-6)


# --- Choice of runs -----------------------------------------------------------------------------


def parsed(*argv):
    seeds = [] if "--seeds" in argv else ["--seeds", "0"]
    return inception.parser().parse_args([*argv, *seeds])


def test_runs_come_a_whole_table_at_a_time():
    chosen = inception.runs(parsed("table", "--seeds", "0", "1"))
    assert [run.name for run in chosen] == [*TABLE, *TABLE]
    assert [run.seed for run in chosen] == [0] * len(TABLE) + [1] * len(TABLE)


def test_the_table_has_three_seeds_and_all_else_one():
    chosen = inception.runs(inception.parser().parse_args(["ensemble", "table"]))
    seeds = {name: [run.seed for run in chosen if run.name == name] for name in RECIPES}
    assert all(seeds[name] == [0, 1, 2] for name in TABLE)
    assert all(seeds[name] == [0] for name in ENSEMBLE)


def test_a_search_is_of_the_baseline():
    chosen = inception.runs(parsed("search"))
    assert {run.name for run in chosen} == {"Inception"}
    assert tuple(run.rate for run in chosen) == inception.SEARCH
    assert len({run.folder for run in chosen}) == len(chosen)


def test_a_run_that_is_named_twice_runs_once():
    assert len(inception.runs(parsed("BN-x5", "table"))) == len(TABLE)


def test_every_run_has_a_folder_of_its_own():
    folders = {
        Run(name, r, SMOKE, 0.01, seed).folder for name, r in RECIPES.items() for seed in (0, 1)
    }
    assert len(folders) == 2 * len(RECIPES)


def test_jobs_share_the_steps():
    chosen = inception.runs(parsed("table", "--seeds", "0", "1", "2"))
    hands = jobs.deal(chosen, 2)
    assert sorted([*hands[0], *hands[1]], key=str) == sorted(chosen, key=str)
    loads = [sum(run.steps for run in hand) for hand in hands]
    assert max(loads) < 1.2 * min(loads)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["BN-x7"], "there is no 'BN-x7'. Expected search, table"),
        (["table"], "no images. Expected --data-dir DIR"),
        (["--dataset", "smoke", "--steps", "0"], "--steps 0. Expected 1 or more"),
        (["--dataset", "smoke", "--devices", "3"], "cannot be spread over 3 devices"),
        (["--dataset", "smoke", "--statistics", "ghost", "--ghost-batch", "5"],
         "--ghost-batch 5 does not divide"),
        (["--dataset", "smoke", "--rate", "0"], "--rate 0.0. Expected a number above 0"),
        (["--dataset", "smoke", "--seeds", "-1"], "--seeds [-1]"),
        (["search", "--dataset", "smoke", "--rate", "1"], "leave out --rate"),
        (["--dataset", "smoke", "--auto", "--jobs", "2"], "leave out --jobs and --devices"),
        (["report"], "neither runs nor a file"),
        (["--dataset", "smoke", "--num-processes", "2"], "needs --coordinator"),
        (["--dataset", "cifar"], "invalid choice: 'cifar'"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(argv, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        inception.main([*argv, "--out", str(tmp_path)])
    said = f"{capsys.readouterr().err} {stop.value}"
    assert message in said.replace("\n", " ")
    assert not list(tmp_path.glob("*/measurements.jsonl"))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        inception.main(["--data-dir", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


def test_help_names_every_recipe(capsys):
    with pytest.raises(SystemExit):
        inception.main(["--help"])
    said = "".join(capsys.readouterr().out.split())
    assert all("".join(name.split()) in said for name in RECIPES)


# --- A run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of BN-x5 from beginning to end."""
    out = tmp_path_factory.mktemp("whole")
    command("BN-x5", "--devices", 1, "--steps", 60, "--tensorboard", out=out)
    return out


def test_a_run_records_its_header_measurements_and_end(whole):
    header, *_ = measurements(whole, "header")
    assert header["run"] == "BN-x5"
    assert header["command"].startswith("python -m experiments.inception BN-x5")
    assert header["steps"] == 12
    assert header["of_network"] == SMOKE.numbers() | {"modules": ["3c"]}
    assert [row["step"] for row in measurements(whole, "measurement")] == [7, 12]
    [end] = measurements(whole, "end")
    assert not end["diverged"]
    assert {"top1", "top5", "loss", "top1_population", "top5_population"} <= set(end)
    assert 0 <= end["top1"] <= end["top5"] <= 1
    assert list(whole.glob("*/tensorboard/events*"))


def test_a_run_learns(tmp_path):
    command("BN-x5", "--devices", 1, "--steps", 3000, out=tmp_path)
    losses = [row["train_loss"] for row in measurements(tmp_path, "measurement")]
    assert losses[-1] < 1.5 < np.log(10)  # the loss of chance
    [end] = measurements(tmp_path, "end")
    assert end["top1"] > 0.3  # chance is 0.1


def test_a_resumed_run_ends_like_one_never_stopped(whole, tmp_path):
    for stop in (["--stop-after", 5], []):
        command("BN-x5", "--devices", 1, "--steps", 60, *stop, out=tmp_path)
    kinds = [row["kind"] for row in measurements(tmp_path)]
    assert kinds.count("header") == 2  # the resumed run writes a second one
    by_step = {row["step"]: row for row in measurements(tmp_path, "measurement")}
    expected = measurements(whole, "measurement")[-1]
    assert by_step[12]["top1"] == expected["top1"]
    assert by_step[12]["loss"] == expected["loss"]
    assert measurements(tmp_path, "end") == measurements(whole, "end")
    chex.assert_trees_all_equal(last_state(tmp_path), last_state(whole))


def test_measurements_after_the_checkpoint_are_made_again(tmp_path):
    command("BN-x5", "--devices", 1, "--steps", 60, "--stop-after", 5, out=tmp_path)
    [path] = tmp_path.glob("*/measurements.jsonl")
    later = {"kind": "measurement", "step": 7, "top1": 1.0}
    # The last line is incomplete, as if the run had been killed while writing.
    path.write_text(path.read_text() + json.dumps(later) + "\n" + '{"kind": "meas')
    command("BN-x5", "--devices", 1, "--steps", 60, out=tmp_path)
    assert [row["step"] for row in measurements(tmp_path, "measurement")] == [7, 12]


def test_a_run_that_has_ended_is_not_repeated(whole):
    [path] = whole.glob("*/measurements.jsonl")
    before = path.read_bytes(), path.stat().st_mtime_ns
    command("BN-x5", "--devices", 1, "--steps", 60, out=whole)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--steps", 90], "baseline_steps=60, and not 90"), (["--bfloat16"], "bfloat16=False")],
)
def test_a_run_with_other_options_does_not_take_the_folder(whole, argv, message):
    with pytest.raises(SystemExit, match=message):
        command("BN-x5", "--devices", 1, "--steps", 60, *argv, out=whole)


def test_several_jobs_share_the_runs(tmp_path):
    command("BN-x5", "Inception", "report", "--steps", 5, "--jobs", 2, out=tmp_path)
    assert len(list(tmp_path.glob("job-*.log"))) == 2
    assert len(list(tmp_path.glob("*/measurements.jsonl"))) == 2
    assert (tmp_path / "inception-table.md").is_file()


def test_a_job_that_fails_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"job 0 failed; .*job-0.log says why"):
        inception.main(["BN-x5", "--data-dir", str(tmp_path / "nowhere"), "--jobs", "2",
                        "--out", str(tmp_path)])  # fmt: skip
    assert not (tmp_path / "job-1.log").exists()  # one run leaves nothing for another job


def test_a_run_that_diverges_says_so_and_ends(tmp_path):
    command("Inception-x5", "--devices", 1, "--rate", 1e8, "--steps", 800, out=tmp_path)
    [end] = measurements(tmp_path, "end")
    assert end["diverged"]
    assert end["step"] < 160
    assert "top1_population" not in end


def one_step(name="BN-x5", **options):
    """Returns the loss of a step on fixed images, and the state after it."""
    recipe = TABLE[name]
    made = programs.program(recipe.of_network(), SMOKE, 10, Options(**options))
    hyper = hyperparameters(recipe, SMOKE, SMOKE.rate)
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8),
             "label": np.arange(16, dtype=np.int32) % 10}  # fmt: skip
    with jax.set_mesh(made.mesh):
        start = made.start(jax.random.key(0), {k: np.float32(v) for k, v in hyper.items()})
        state, metrics = made.step(start, made.place(batch), jax.random.key(1))
    return float(metrics["loss"]), jax.device_get(state)


@pytest.fixture(scope="module")
def on_one_device():
    return one_step(devices=1)


def test_two_devices_compute_the_same_as_one(on_one_device):
    loss, state = on_one_device
    two_loss, two = one_step(devices=2)
    assert two_loss == pytest.approx(loss, rel=1e-5)
    chex.assert_trees_all_close(two.stats, state.stats, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(two.params, state.params, rtol=1e-3, atol=1e-4)


def test_local_statistics_are_ghost_batches_of_each_device(on_one_device):
    ghost_loss, ghost = one_step(devices=1, statistics="ghost", ghost_batch=8)
    local_loss, local = one_step(devices=2, statistics="local")
    assert local_loss == pytest.approx(ghost_loss, rel=1e-5)
    chex.assert_trees_all_close(local.stats, ghost.stats, rtol=1e-4, atol=1e-5)
    assert abs(ghost_loss / on_one_device[0] - 1) > 1e-4  # unlike statistics of the whole batch


def test_bfloat16_is_for_the_layers(on_one_device):
    loss, state = one_step(devices=1, bfloat16=True)
    assert loss == pytest.approx(on_one_device[0], rel=0.05)
    assert loss != on_one_device[0]
    chex.assert_trees_all_equal_dtypes(state, on_one_device[1])


def test_auxiliary_heads_add_to_the_loss(on_one_device):
    loss, state = one_step(devices=1, auxiliary=True)
    assert loss > 1.2 * on_one_device[0]
    assert "AuxiliaryHead_0" in state.params


def test_ties_count_as_wrong():
    scores = jnp.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [jnp.inf] * 3, [jnp.nan] * 3])
    ranks = programs.rank(scores, jnp.zeros(4, jnp.int32))
    assert ranks[:2].tolist() == [1, 3]
    assert (ranks[2:] > 5).all()


def test_a_network_of_nans_is_never_right():
    class Broken:
        @staticmethod
        def apply(variables, x, train):
            return jnp.full((len(x), 10), jnp.nan)

    batch = {"image": jnp.zeros((4, 32, 32, 3), jnp.uint8), "label": jnp.arange(4),
             "mask": jnp.array([True, True, True, False])}  # fmt: skip
    judged = programs.make_judge(Broken())({}, {}, batch)
    assert (judged["top1"].total, judged["top1"].weight) == (0, 3)
    assert judged["top5"].total == 0


# --- A tree of JPEGs, several processes ---------------------------------------------------------


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """A small ImageNet of three classes, each with its own colour, and images of many sizes."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 5)):
        for label, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
            folder = root / part / wnid
            folder.mkdir(parents=True)
            for i in range(n):
                height, width = rng.integers(70, 120, 2)
                pixels = rng.integers(0, 120, (height, width, 3), np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f"{wnid}_{i}.JPEG")
    return root


SMALL = ("--dataset", "imagenet", "--size", 32, "--width", 1 / 32, "--batch", 8,
         "--modules", "3c", "--evaluations", 3)  # fmt: skip


def python(*runs, devices=1):
    """Runs the command with each of `runs` in a process of its own, with `devices` devices."""
    # Without optimisation, because compiling takes longer than running.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    commands = [[sys.executable, "-m", "experiments.inception", *map(str, run)] for run in runs]
    return processes.outputs(commands, cwd=ROOT, env=environment)


def two_processes(*argv):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = "--coordinator", f"localhost:{port}", "--num-processes", 2, "--process-id"
    return python(*((*argv, *cluster, i) for i in range(2)), devices=2)


def test_two_processes_that_resume_train_like_one_process(jpegs, tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    run = "BN-x5", *SMALL, "--steps", 40, "--data-dir", jpegs
    python((*run, "--workers", 1, "--out", one), devices=2)
    two_processes(*run, "--out", several, "--stop-after", 3)
    two_processes(*run, "--out", several)
    ends = [measurements(out, "end")[0] for out in (one, several)]
    assert [end["step"] for end in ends] == [8, 8]
    for name in ("loss", "loss_population"):  # only the order of the images in a batch differs
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-3)
    [path] = several.glob("*/measurements.jsonl")
    assert len(notebook.lines(path, "header")) == 2


def test_two_programs_do_not_write_to_one_folder(tmp_path):
    in_use = pytest.raises(ValueError, match="run is in use: another program")
    first, second, third = (notebook.alone(tmp_path / "run") for _ in range(3))
    with first, in_use, second:
        pass
    with third:
        pass


# --- The report ---------------------------------------------------------------------------------


def write_run(out, name, seed, accuracies, *, rate=0.01, every=10, **end):
    """Writes the file that a run would have left."""
    folder = out / Run(name, RECIPES[name], SMOKE, rate, seed).folder
    folder.mkdir(parents=True)
    recipe = RECIPES[name]._asdict()
    rows = [{"kind": "header", "run": name, "seed": seed, "rate": rate, "recipe": recipe}]
    rows += [{"kind": "measurement", "step": every * (i + 1), "top1": a}
             for i, a in enumerate(accuracies)]  # fmt: skip
    rows += [{"kind": "end", "step": every * len(accuracies), "top1": accuracies[-1]} | end]
    (folder / "measurements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def finished_runs(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "Inception", seed, [0.2, 0.4, 0.5, 0.6 + 0.1 * seed])
        write_run(tmp_path, "BN-x5", seed, [0.5, 0.7, 0.65], every=2, top1_population=0.68)
    write_run(tmp_path, "Inception", 0, [0.3, 0.2], rate=0.1)
    write_run(tmp_path, "Inception", 0, [0.5, 0.9], rate=0.03)
    write_run(tmp_path, "Inception-x5", 0, [0.1], diverged=True)
    write_run(tmp_path, "Inception-Sigmoid", 0, [0.1, 0.1])
    write_run(tmp_path, "BN at x10", 0, [0.3, 0.6])
    write_run(tmp_path, "Inception at x10", 0, [0.3, 0.1])
    write_run(tmp_path, "Inception, LeCun init", 0, [0.1, 0.2, 0.3])
    write_run(tmp_path, "Inception, LeCun init", 0, [0.1, 0.4, 0.2], rate=0.03)
    write_run(tmp_path, "BN-x5, LeCun init", 0, [0.3, 0.4], every=1)
    return tmp_path


def test_steps_are_compared_seed_by_seed(finished_runs):
    curves = inception_curves.read(inception_curves.collect(finished_runs))
    assert inception_curves.chosen_rate(curves) == 0.01
    found = {r.name: r for r in inception_curves.results(curves, TABLE)}
    assert found["Inception"].steps_to == [40, 40]
    # An accuracy of 0.7 is above the baseline's 0.6 of one seed and equals its 0.7 of the other.
    assert found["BN-x5"].steps_to == [4, 4]
    assert found["BN-x5"].shares == [0.1, 0.1]
    assert found["BN-x5"].first_rate == pytest.approx(0.05)
    assert found["BN-x5"].final_population == [0.68, 0.68]
    assert found["Inception-x5"].diverged == 1
    assert found["Inception-Sigmoid"].steps_to == [np.inf]


def test_the_report_has_both_tables_and_figures(finished_runs):
    page = inception_report.report(finished_runs)
    assert "| BN-x5 | 0.05 | 4 | 10.0 % | 2.1 million | 6.8 % |" in page
    assert "| BN-x5 | 70.0 % | 65.0 % | 68.0 % | 2 | 73.0 % |" in page
    assert "| Inception-Sigmoid | 0.01 | never | never | - | - |" in page
    assert "| Inception-Sigmoid | 10.0 % |" in page
    assert "diverged in 1 of 1" in page
    assert page.count("| 0.1 | 0 | 30.0 % | 20.0 % |") == 1  # the search
    assert "made with 0.01, but 0.03 is better for the baseline" in page
    # All are compared with the baseline at the better of its two rates.
    assert "| Inception, LeCun init | 0.01 | never | never |" in page
    assert "| Inception, LeCun init | 0.03 | 20 | 100.0 % |" in page
    assert "| BN-x5, LeCun init | 0.05 | 2 | 10.0 % |" in page
    for name in ("figure2.png", "band.png"):
        with Image.open(finished_runs / name) as image:
            assert image.width > 500


def test_the_band_is_of_means_over_the_seeds(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(inception_figures, "save", lambda figure, _: drawn.append(figure))
    inception_figures.band(tmp_path / "band.png", {"BN": ([0.1, 0.01, 0.1], [0.2, 0.5, 0.4])}, 10)
    [line] = drawn[0].axes[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[0.01, 50], [0.1, 30]])


def test_the_report_can_be_made_of_the_one_file(finished_runs, tmp_path_factory):
    page = inception_report.report(finished_runs)
    other = tmp_path_factory.mktemp("copy")
    text = (finished_runs / inception_curves.NUMBERS).read_text()
    (other / inception_curves.NUMBERS).write_text(text)
    assert inception_report.report(other) == page


def test_the_documentation_shows_the_recorded_numbers(tmp_path):
    shown = Path(__file__).parents[2] / "docs/experiments/inception"
    shutil.copy(shown / inception_curves.NUMBERS, tmp_path)
    page = (shown / "inception-table.md").read_text(encoding="utf-8")
    assert inception_report.report(tmp_path) == page
    text = (shown.parent / "inception.md").read_text(encoding="utf-8")
    for heading in ("The paper's comparison", "The baseline's learning rate", "One change to"):
        assert text.count(f'start-after: "## {heading}') == 1  # where an included table begins
        assert f"## {heading}" in page


def test_a_report_without_a_finished_baseline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither runs nor a file"):
        inception_report.report(tmp_path)
    write_run(tmp_path, "BN-x5", 0, [0.5])
    write_run(tmp_path, "Inception", 0, [0.5])
    [path] = tmp_path.glob("Inception*/measurements.jsonl")
    path.write_text(path.read_text().replace('"end"', '"measurement"'))  # it has not ended
    with pytest.raises(ValueError, match="No run of Inception"):
        inception_report.report(tmp_path)


@pytest.mark.parametrize(
    ("values", "shown"),
    [([], "-"), ([0.5, 0.5], "50.0 %"), ([0.4, 0.6], "50.0 % (40.0 % to 60.0 %)"),
     ([np.inf], "never"), ([0.5, np.inf], "1 of 2 seeds")],
)  # fmt: skip
def test_spread(values, shown):
    assert inception_report.spread(values, inception_report.percent) == shown
