"""The speed benchmark times and compares equal programs, and notices what became slower."""

import functools
import json
import math
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from experiments.nets import layers, resnet
from experiments.speed import cases, dispatch, single_layer

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tqdm")

from experiments.common import timing
from experiments.nets.layers import BASELINE, Case
from experiments.nets.steps import SLOTS, Network
from experiments.speed import __main__ as speed
from experiments.speed import peers
from experiments.speed import report as speed_report
from experiments.speed.report import Row

# --- Timing --------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round():
    # Every round is twice as slow as the one before, for both: the ratio is 1/2 in each.
    samples = timing.Samples({"a": [1.0, 2.0, 4.0, 8.0], "b": [2.0, 4.0, 8.0, 16.0]})
    assert samples.ratio("a", "b") == (0.5, 0.5, 0.5)
    assert samples.median("a") == 3.0


def test_quartiles_of_ratios():
    samples = timing.Samples({"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [1.0] * 5})
    assert samples.ratio("a", "b") == timing.Ratio(3.0, 2.0, 4.0)


def test_geometric_mean():
    assert timing.geometric_mean([0.5, 2.0]) == pytest.approx(1)
    assert timing.geometric_mean([1.0, 2.0, 4.0]) == pytest.approx(2)
    with pytest.raises(ValueError, match="needs values"):
        timing.geometric_mean([])
    with pytest.raises(ValueError, match=r"above 0; got \[1.0, 0.0\]"):
        timing.geometric_mean([1.0, 0.0])


def test_competitors_take_turns():
    calls = []
    competitors = {name: lambda name=name: (calls.append(name), time.sleep(2e-4)) for name in "abc"}
    samples = timing.interleave(competitors, rounds=4, at_least=1e-4)
    assert {name: len(s) for name, s in samples.seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(s >= 2e-4 for seconds in samples.seconds.values() for s in seconds)
    assert len({"".join(timing.shuffled("abc", i)) for i in range(20)}) > 1
    # The first calls measure how long a call takes; after them each is called twice a round.
    assert [calls[-24 + i] == calls[-23 + i] for i in range(0, 24, 2)] == [True] * 12
    for i in range(4):
        assert sorted(calls[-24 + 6 * i : -18 + 6 * i or None]) == list("aabbcc")


def test_short_calls_are_repeated():
    assert timing.calls_for(lambda: time.sleep(1e-3), at_least=1e-4) == 1
    assert timing.calls_for(lambda: None, at_least=1e-3) > 100


def test_the_process_restarts_with_its_environment(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, sys\nfrom experiments.common import timing\n"
        "timing.restart_with_environment('script', sys.argv[1:])\n"
        "print(os.environ['MALLOC_MMAP_MAX_'], os.environ['MALLOC_TOP_PAD_'], sys.argv[1:], "
        "'jax' in sys.modules)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    env = {k: v for k, v in os.environ.items() if k not in timing.ENVIRONMENT}
    env |= {"PYTHONPATH": path, "MALLOC_TOP_PAD_": "7"}  # what the user has set stays
    command = [sys.executable, "-m", "script", "--a", "b c"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    if sys.platform == "linux":
        assert run.stdout == "0 7 ['--a', 'b c'] False\n"


# --- The programs that are compared --------------------------------------------------------------


@pytest.fixture
def lenient():
    """Allows dtype and rank promotion, which the code of other libraries needs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("form", layers.FORMS)
@pytest.mark.filterwarnings("default")  # of other libraries
def test_libraries_compute_the_same(form, lenient):
    """Compares y and the gradient of x, the two results that all libraries have in common."""
    found = {}
    for name, peer in peers.installed().items():
        if name == "torch":
            y, _, _, (dx, *_) = peer.program(Case((4, 3, 3, 8), form=form)).run()
            found[name] = [a.detach().numpy() for a in (y, dx)]
        else:
            y, _, (_, dx, _) = peer.program(Case((4, 3, 3, 8), form=form)).run()
            found[name] = [np.asarray(y), np.asarray(dx)]
        if name in ("torch", "equinox"):
            found[name] = [np.moveaxis(a, 1, -1) for a in found[name]]
    assert {BASELINE, "flax.nnx", "jbn"} <= set(found)
    for results in found.values():
        for got, want in zip(results, found[BASELINE], strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_running_statistics_are_the_same():
    case = Case((64, 8), which="forward")
    _, linen = peers.PEERS[BASELINE].program(case).run()
    _, core = peers.PEERS["jbn"].program(case).run()
    np.testing.assert_allclose(linen["mean"], core.mean, atol=1e-6)
    np.testing.assert_allclose(linen["var"], core.var, atol=1e-5)


def test_folded_inference_is_inference():
    case = Case((4, 3, 3, 8), form="bn_add_relu", which="inference")
    plain = peers.PEERS["jbn"].program(case).run()
    np.testing.assert_allclose(peers.folded_program(case).run(), plain, atol=1e-5)


def test_results_have_the_half_precision_of_x(lenient):
    for name in (BASELINE, "flax.nnx", "jbn"):
        y, _, (_, dx, _) = peers.PEERS[name].program(Case((16, 8), "bfloat16")).run()
        assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16), name


def test_the_copy_moves_every_element():
    case = Case((16, 8))
    np.testing.assert_array_equal(peers.copy_program(case).run(), -layers.data(case).x)


# --- Rows, tables, regressions -------------------------------------------------------------------


def row(library, ratio, case="8x4", form="bn", dtype="float32"):
    about = "op", case, dtype, form, "forward+backward", library
    return Row(*about, 1e-3 * ratio, ratio, 0.9 * ratio, 1.1 * ratio)


def test_means_are_geometric_and_by_group():
    rows = [row(BASELINE, 1.0), row("jbn", 0.25), row("jbn", 1.0, case="16x4"), row("torch", 3.0)]
    rows.append(row("jbn", 0.7, form="bn_relu"))
    means = speed_report.group_means(rows)
    assert means["op / forward+backward / float32 / bn / jbn"] == pytest.approx(0.5)
    assert means["op / forward+backward / float32 / bn_relu / jbn"] == pytest.approx(0.7)
    assert means["op / forward+backward / float32 / bn / torch"] == pytest.approx(3.0)
    assert len(means) == 3
    assert set(speed_report.jbn_means(rows)) == {g for g in means if g.endswith("jbn")}


def test_a_regression_is_noticed(tmp_path):
    path = tmp_path / "baseline.json"
    means = [row("jbn", 0.5), row("jbn", 0.6, form="bn_relu")]
    speed_report.write_baseline(path, means, command="c", measured={"batch": 1})
    assert json.loads(path.read_text())["command"] == "c"
    then = speed_report.read_baseline(path, {"batch": 1})
    same = [row("jbn", 0.57), row("jbn", 0.6, form="bn_relu")]  # 14 % slower
    assert speed_report.check(path, then, same, 0.15)[0] == 0
    slower = [row("jbn", 0.58), row("jbn", 0.6, form="bn_relu")]  # 16 %
    status, said = speed_report.check(path, then, slower, 0.15)
    assert status == 1
    assert "SLOWER: op / forward+backward / float32 / bn / jbn: 0.500 -> 0.580" in said
    assert "bn_relu" not in said
    # One slow shape among fast ones, and another library that is slow, are no regression.
    spread = [row("jbn", 0.25), row("jbn", 0.9, case="9x4"), row("torch", 9.0)]
    status, said = speed_report.check(path, then, spread, 0.15)
    assert status == 0
    assert "Not measured in this run: op / forward+backward / float32 / bn_relu / jbn" in said


def test_a_comparison_without_common_groups_is_refused(tmp_path):
    path = tmp_path / "baseline.json"
    speed_report.write_baseline(path, [row("jbn", 0.5)], measured={"batch": 1})
    then = speed_report.read_baseline(path, {"batch": 1})
    with pytest.raises(ValueError, match=r"no group that this run measured.*--update"):
        speed_report.check(path, then, [row("jbn", 0.5, dtype="bfloat16")], 0.15)
    with pytest.raises(ValueError, match="do not compare"):
        speed_report.read_baseline(path, {"batch": 2})
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"not a file of ratios.*--update"):
        speed_report.read_baseline(path, {"batch": 1})


def test_tables_have_a_line_a_case_and_a_column_a_library():
    rows = [
        row(BASELINE, 1.0),
        row("jbn", 0.5),
        row("torch", 12.0),
        row("jbn", 0.7, form="bn_relu"),
    ]
    rows[1] = rows[1]._replace(of_copy=0.5, accessed=52.0)
    table, means = speed_report.tables(rows)
    assert table.title == "op, forward+backward, float32"
    assert table.header == ["case", "form", "flax.linen [ms]", "jbn", "torch", "of copy",
                            "bytes/element"]  # fmt: skip
    assert table.cells[0] == ["8x4", "bn", "1", "0.50 (0.45-0.55)", "12 (11-13)", "50% : -",
                              "52.0 : -"]  # fmt: skip
    assert table.cells[1][3:] == ["0.70 (0.63-0.77)", "-", "-", "-"]
    assert means.cells[0][-2:] == ["0.50", "12.00"]
    text = speed_report.markdown_table(table)
    assert text.count("\n") == 6
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1
    assert speed_report.terminal_table(table).row_count == 2


def test_a_row_says_how_much_of_the_copy_it_reaches():
    """Times a layer that takes four times as long as the copy and moves four times as much."""
    case = Case((64, 8))
    slow = peers.Program(lambda: time.sleep(4e-3)), peers.Program(lambda: time.sleep(1e-3))
    programs = dict(zip((BASELINE, cases.COPY), slow, strict=True))
    found = single_layer.time_programs("op", case, programs, cases.Config(rounds=5))
    assert found[0].of_copy == pytest.approx(1, rel=0.3)  # sleeping is not exact
    assert found[1].of_copy == pytest.approx(1)
    assert found[1].ratio == pytest.approx(0.25, rel=0.3)
    assert found[0].bandwidth == pytest.approx(8 * 4 * 512 / 4e-3, rel=0.3)


# --- Command line --------------------------------------------------------------------------------


def test_shapes():
    shapes = cases.shapes_of(["resnet50"], batch=4)
    assert (4, 112, 112, 64) in shapes
    assert cases.MLP_SHAPE in shapes
    assert len(shapes) == len(set(shapes)) == 13
    assert cases.shapes_of(["some", "3x5"], 4) == [*cases.SOME_SHAPES, (3, 5)]
    for name in ("big", "3", "3x0x2", "3xx2", "-3x2"):
        with pytest.raises(ValueError, match=rf"--shapes {name} is not a shape.*32x56x56x64"):
            cases.shapes_of([name], 4)
    with pytest.raises(ValueError, match="one value a channel"):
        cases.shapes_of(["1x5"], 4)


def test_the_shapes_are_those_of_resnet50():
    found = set()

    def record(call, args, kwargs, context):
        if isinstance(context.module, linen.BatchNorm):
            found.add(args[0].shape)
        return call(*args, **kwargs)

    with linen.intercept_methods(record):
        Network("ResNet-50", resnet.ResNet50, 224, 2).training(SLOTS[BASELINE])
    assert found == {(2, *shape) for shape in cases.RESNET50_SHAPES}


def test_mistakes_are_explained(tmp_path):
    with pytest.raises(SystemExit, match=r"error: there is no file .*--update"):
        speed.main(["--check", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match=r"error: .*Is a directory"):
        speed.main(["--markdown", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):  # to `experiments.targets`, which has no such target
        speed.main(["--target=none"])
    with pytest.raises(SystemExit, match=r"error: --library jbm: expected some of .*jbn"):
        speed.main(["--target", "cpu", "--quick", "--library", "jbm"])
    with pytest.raises(SystemExit, match="error: --shapes x is not a shape"):
        speed.main(["--shapes", "x"])
    for name, install in peers.missing().items():
        with pytest.raises(SystemExit, match=f"error: {name} cannot run here.*{install}"):
            speed.main(["--libraries", name])
    with pytest.raises(SystemExit, match=r"cuDNN cannot run here.*another machine"):
        speed.main(["--libraries", "torch without cuDNN"])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder and the JSON lines of a run of the parts that are quick enough for a test."""
    out = tmp_path_factory.mktemp("speed")
    argv = ["--quick", "--libraries", BASELINE, "jbn", "--part", "op", "inference", "step"]
    argv += ["--out", str(out), "--markdown", str(out / "t.md"), "--update", str(out / "b.json")]
    assert speed.main(argv) == 0
    lines = [json.loads(line) for line in (out / "speed.jsonl").read_text().splitlines()]
    return out, lines


def test_a_run_writes_numbers_tables_and_a_figure(quick):
    out, (header, *rows) = quick
    assert header["command"].startswith("python -m experiments.speed --quick")
    assert header["versions"]["jax"] == jax.__version__
    assert {r["part"] for r in rows} == {"op", "inference", "step"}
    libraries = {BASELINE, "jbn", "jbn drop-in", cases.COPY, cases.FOLDED}
    assert {r["library"] for r in rows} == libraries
    assert {r["quantity"] for r in rows} >= {*layers.PASSES, "inference", "step"}
    assert all(r["low"] <= r["ratio"] <= r["high"] for r in rows)
    assert all(r["seconds"] > 0 for r in rows if r["quantity"] != "temporaries")
    assert all(r["ratio"] == 1 for r in rows if r["library"] == BASELINE)
    of_step = [r for r in rows if r["part"] == "step"]
    assert len(of_step) == 6
    of_memory = {r["library"]: r for r in of_step if r["quantity"] == "temporaries"}
    bytes_of = {name: r["temporaries"] for name, r in of_memory.items()}
    # Numbers are written with six digits.
    ratio = pytest.approx(bytes_of["jbn"] / bytes_of[BASELINE], rel=5e-6)
    assert of_memory["jbn"]["ratio"] == ratio
    of_op = [r for r in rows if r["part"] == "op" and r["library"] == "jbn"]
    assert all(math.isclose(r["bandwidth"] * r["seconds"] / 4 / n, useful, rel_tol=1e-4)
               for r, useful, n in zip(of_op, (3, 8) * 2, [8 * 8 * 8 * 32] * 2 + [256 * 128] * 2,
                                       strict=True))  # fmt: skip
    assert "geometric means" in (out / "t.md").read_text()
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_compared_with_the_one_before(quick):
    out, _ = quick
    groups = json.loads((out / "b.json").read_text())["groups"]
    libraries = [group.split(" / ")[-1] for group in groups]
    assert all(name.startswith("jbn") for name in libraries)
    assert libraries.count("jbn") == 5  # op forward and both, inference, step: time and memory


def test_the_exit_status_says_whether_it_got_slower(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ratios.json"
    argv = ["--libraries", BASELINE, "jbn", "--out", str(tmp_path)]
    for ratio, option, status in ((0.5, "--update", 0), (0.55, "--check", 0), (0.6, "--check", 1)):
        rows = [row(BASELINE, 1.0), row("jbn", ratio)]
        monkeypatch.setattr(speed, "measure", lambda *_, rows=rows: rows)
        assert speed.main([*argv, option, str(path)]) == status
    assert "SLOWER" in capsys.readouterr().out
    assert speed.main([*argv, "--check", str(path), "--tolerance", "0.25"]) == 0


def test_dispatch_of_layers():
    case = Case((8, 4), form="bn_relu")
    names = BASELINE, "jbn"
    stages = {name: functools.partial(dispatch.layer_stages, name, case) for name in names}
    rows = list(dispatch.time_stages(("8x4", "float32", "bn_relu"), stages, rounds=1, compiled=1))
    assert [r.quantity for r in rows] == [q for q in dispatch.STAGES for _ in names]
    found = {(r.quantity, r.library): r.seconds for r in rows}
    for name in names:
        parts = [found[q, name] for q in ("trace+lower", "compile")]
        assert min(parts) > 0
        assert found["trace+lower+compile", name] == pytest.approx(sum(parts))


@pytest.mark.parametrize("compiled", [0, 1])
def test_networks_are_compiled_in_the_last_rounds(compiled):
    asked = []

    def stage(seconds, compile):
        asked.append(compile)
        return dispatch.Stages(seconds, 10 * seconds if compile else None)

    stages = {BASELINE: functools.partial(stage, 2.0), "jbn": functools.partial(stage, 1.0)}
    rows = list(dispatch.time_stages(("net", "float32", "-"), stages, rounds=2, compiled=compiled))
    assert asked == [False] * 4 + [bool(compiled)] * 2
    quantities = list(dispatch.STAGES) if compiled else ["trace+lower"]
    assert [(r.quantity, r.library, r.ratio) for r in rows] == [
        (quantity, *result) for quantity in quantities for result in ((BASELINE, 1.0), ("jbn", 0.5))
    ]
