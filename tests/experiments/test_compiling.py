"""The benchmark of compiling compares equal programs and reports their sizes and times."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("tqdm")

from experiments.common.counting import equations
from experiments.speed import __main__ as speed
from experiments.speed import compiling
from experiments.speed.compiling import ALL, PHASES, Sizes
from experiments.speed.small_models import FLAX, JBN, MODELS, Program, programs
from tests.tolerance import tol

DEEP = "resnet50"


@pytest.fixture
def one_cpu():
    return jax.devices("cpu")[0]


@pytest.fixture
def promotion():
    """Allows promotion, which Flax needs for bfloat16 in its norm and integers in its pooling."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", ["critic", "nnx"])
@pytest.mark.usefixtures("one_device", "promotion")
def test_both_sides_have_the_same_loss_before_training(name):
    losses = {}
    for library, program in programs(name, "float32").items():
        _, losses[library] = jax.jit(program.function)(*program.arguments())
    assert np.isfinite(losses[FLAX])
    np.testing.assert_allclose(losses[JBN], losses[FLAX], **tol("float32", 1024))


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize("name", [name for name in MODELS if name != DEEP])
def test_both_sides_hold_the_same_parameters_and_as_many_norms_as_the_table_says(name):
    shapes = {
        library: jax.eval_shape(program.arguments)
        for library, program in programs(name, MODELS[name].dtypes[0]).items()
    }
    leaves = {k: jax.tree.leaves(v) for k, v in shapes.items()}
    assert [(a.shape, a.dtype) for a in leaves[JBN]] == [(a.shape, a.dtype) for a in leaves[FLAX]]
    stats = shapes[JBN][1] if name == "layer" else shapes[JBN][0][1]
    assert len(jax.tree.leaves(stats)) == 2 * MODELS[name].norms  # a mean and a variance each


def test_equations_inside_of_calls_and_loops_are_counted():
    def twice(x, _):
        return jnp.sin(jnp.cos(x)), None

    def f(x):
        return jax.jit(jnp.exp)(jax.lax.scan(twice, x, None, length=3)[0])

    jaxpr = jax.make_jaxpr(f)(1.0).jaxpr
    names = [e.primitive.name for e in equations(jaxpr)]
    assert sorted(names) == sorted(["scan", "sin", "cos", *["jit"] * names.count("jit"), "exp"])


def test_sizes_are_those_of_the_program(one_cpu):
    program = Program(lambda x: jnp.sin(x) + jnp.cos(x), tuple)
    found = compiling.stages(program, (jax.ShapeDtypeStruct((8,), jnp.float32),), one_cpu)
    counted = compiling.sizes(found)
    assert counted.equations == 3
    assert counted.operations == 6  # sine, cosine, add; the mesh, the function and its return
    assert counted.lines == len(found.lowered.as_text().splitlines())
    text = found.compiled.as_text()
    instructions = [line for line in text.splitlines() if line.startswith(" ") and " = " in line]
    assert counted.instructions == len(instructions)
    assert set(found.seconds) == {*PHASES, ALL}
    assert found.seconds[ALL] == pytest.approx(sum(found.seconds[phase] for phase in PHASES))


def test_garbage_is_collected_again_after_a_measurement():
    with compiling.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_ratios_are_taken_within_a_round():
    rounds = [dict.fromkeys((*PHASES, ALL), s) for s in (1.0, 2.0, 4.0)]
    twice = [{k: 2 * v for k, v in s.items()} for s in rounds]
    sizes = {JBN: Sizes(3, 4, 5, 6), FLAX: Sizes(1, 2, 5, 3)}
    case = compiling.Case("cpu", "cnn", "float32", 2, {JBN: twice, FLAX: rounds}, sizes)
    assert all(case.ratio(phase) == (2, 2, 2) for phase in (*PHASES, ALL))
    table = compiling.table([case])
    line, mean = (dict(zip(table.header, cells, strict=True)) for cells in table.cells)
    assert line["trace"] == "2.00 (2.00-2.00)"
    assert line["seconds"] == "4.00 : 2.00"
    assert line["equations"] == "3 : 1"
    assert (mean["in all"], mean["operations"], mean["lines"]) == ("2.00", "2.00", "1.00")


@pytest.mark.usefixtures("promotion")
def test_a_run_writes_a_line_for_each_case_and_a_table(tmp_path, capsys):
    arguments = ["--models", "layer", "--rounds", "1", "--out", str(tmp_path)]
    markdown = tmp_path / "table.md"
    assert speed.main(["--part", "compile", *arguments, "--markdown", str(markdown)]) == 0
    _, *lines = map(json.loads, (tmp_path / "compile.jsonl").read_text().splitlines())
    assert [(line["model"], line["dtype"]) for line in lines] == [
        ("layer", "float32"),
        ("layer", "bfloat16"),
    ]
    for line in lines:
        assert {library: len(rounds) for library, rounds in line["seconds"].items()} == {
            FLAX: 1,
            JBN: 1,
        }
        assert all(n > 0 for sizes in line["sizes"].values() for n in sizes.values())
    assert "| layer | bfloat16 | 1 |" in markdown.read_text()
    assert "compile, cpu" in capsys.readouterr().out


def test_compiling_cannot_be_combined_with_another_part(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--part", "compile", "op"])
    assert "invalid choice: 'op'" in capsys.readouterr().err
