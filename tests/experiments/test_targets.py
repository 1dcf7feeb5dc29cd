"""ResNets have their usual sizes, kernels are read from a program, and the table shows them."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.common import compilers
from experiments.nets import resnet
from experiments.targets import programs, reading, table

pytest.importorskip("tqdm")

import jbn.linen
from experiments.common import hlo
from experiments.common.hlo import Kernel
from experiments.targets import command as targets

# --- ResNet-18 and ResNet-50 ---------------------------------------------------------------------


def shapes(make, **slots):
    net = make(**slots)
    x = jnp.zeros((2, 224, 224, 3))
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), x, True))
    logits = jax.eval_shape(lambda v: net.apply(v, x, False), variables)
    return variables, logits


@pytest.mark.parametrize(
    ("make", "parameters", "features"),
    [(resnet.ResNet18, 11_689_512, 4_800), (resnet.ResNet50, 25_557_032, 26_560)],
)
def test_resnets_have_the_usual_number_of_parameters(make, parameters, features):
    variables, logits = shapes(make)
    count = sum(v.size for v in jax.tree.leaves(variables["params"]))
    assert count == parameters
    assert sum(v.size for v in jax.tree.leaves(variables["batch_stats"])) == 2 * features
    assert logits.shape == (2, 1000)


def test_half_precision_is_for_the_layers_only():
    variables, logits = shapes(resnet.ResNet50, dtype=jnp.bfloat16)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32


def test_the_stride_is_in_the_3x3():
    block = resnet.BottleneckBlock(4, stride=2)
    x = jnp.zeros((2, 8, 8, 3))
    outputs = []

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Conv):
            outputs.append((context.module.kernel_size, y.shape))
        return y

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: block.init(jax.random.key(0), x))
    assert outputs == [
        ((1, 1), (2, 8, 8, 4)),
        ((3, 3), (2, 4, 4, 4)),
        ((1, 1), (2, 4, 4, 16)),
        ((1, 1), (2, 4, 4, 16)),
    ]


def test_fused_is_the_same_network():
    """Compares output, statistics and gradient of a block with a projection and one without."""
    net = functools.partial(resnet.ResNet, (4,), (2,), block=resnet.BottleneckBlock)
    x, dy = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(8, 8, 8, 3), (8, 10)]))
    variables = jax.jit(functools.partial(net().init, train=True))(jax.random.key(2), x)
    # A zero scale would hide the inner half of every block.
    variables = jax.tree.map(lambda v: jnp.where(v == 0, 0.5, v), variables)

    @functools.partial(jax.jit, static_argnums=0)
    def run(slots, variables):
        def output(params):
            given = {**variables, "params": params}
            model = net(norm=slots[0], fused=slots[1])
            return model.apply(given, x, True, mutable=["batch_stats"])

        y, pull, stats = jax.vjp(output, variables["params"], has_aux=True)
        return y, stats, pull(dy)

    plain = run((jbn.linen.BatchNorm, False), variables)
    fused = run((jbn.linen.BatchNorm, True), variables)
    # Rounding grows in a dozen layers that each divide by the standard deviation of a few values.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), plain, fused)


# --- Kernels, read out of a program --------------------------------------------------------------

# Shortened from a program for an H100: a slice of x, sums over x minus the slice, a copy.
PROGRAM = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[64,8]{1,0})->f32[8]{0}}

%region_0 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused_slice (param_0: bf16[64,8]) -> f32[1,8] {
  %param_0 = bf16[64,8]{1,0} parameter(0)
  %bitcast.1 = bf16[8,8,8]{2,1,0} bitcast(%param_0)
  %slice.1 = bf16[1,1,8]{2,1,0} slice(%bitcast.1), slice={[4:5], [2:3], [0:8]}
  %slice.2 = bf16[1,8]{1,0} slice(%param_0), slice={[9:10], [0:8]}
  %bitcast.2 = bf16[1,8]{1,0} bitcast(%slice.1)
  %maximum.1 = bf16[1,8]{1,0} maximum(%bitcast.2, %slice.2)
  ROOT %convert.1 = f32[1,8]{1,0} convert(%maximum.1)
}

%fused_reduce (param_0: f32[1,8], param_1: bf16[64,8]) -> (f32[8], bf16[64,8]) {
  %param_1 = bf16[64,8]{1,0} parameter(1)
  %convert.2 = f32[64,8]{1,0} convert(%param_1)
  %slice.3 = bf16[1,8]{1,0} slice(%param_1), slice={[0:1], [0:8]}
  %param_0 = f32[1,8]{1,0} parameter(0)
  %broadcast.1 = f32[64,8]{1,0} broadcast(%param_0), dimensions={0,1}
  %subtract.1 = f32[64,8]{1,0} subtract(%convert.2, %broadcast.1)
  %constant_1 = f32[] constant(0)
  %reduce.1 = f32[8]{0} reduce(%subtract.1, %constant_1), dimensions={0}, to_apply=%region_0
  ROOT %tuple.1 = (f32[8]{0}, bf16[64,8]{1,0}) tuple(%reduce.1, %param_1)
}

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %negate.1 = f32[8]{0} negate(%p)
}

ENTRY %main.1 (x: bf16[64,8]) -> f32[8] {
  %x = bf16[64,8]{1,0} parameter(0), metadata={op_name="x"}
  %fusion.1 = f32[1,8]{1,0} fusion(%x), kind=kLoop, calls=%fused_slice
  %fusion.2 = (f32[8]{0}, bf16[64,8]{1,0}) fusion(%fusion.1, %x), kind=kInput, calls=%fused_reduce
  %get-tuple-element.1 = f32[8]{0} get-tuple-element(%fusion.2), index=0
  %copy-start.1 = (f32[8]{0}, f32[8]{0:S(1)}, u32[]) copy-start(%get-tuple-element.1)
  %copy-done.1 = f32[8]{0:S(1)} copy-done(%copy-start.1)
  %call.1 = f32[8]{0} call(%copy-done.1), to_apply=%body
  %cudnn.1 = (f32[8]{0}, u8[16]{0}) custom-call(%call.1), custom_call_target="__cudnn$convForward"
  %get-tuple-element.2 = f32[8]{0} get-tuple-element(%cudnn.1), index=0
  ROOT %copy.1 = f32[8]{0} copy(%get-tuple-element.2)
}
"""


def test_kernels_are_what_a_program_launches():
    assert hlo.kernels(PROGRAM) == [
        Kernel("%fusion.1", "fusion", 16 + 16, 32),  # two rows of x, and not all of it
        Kernel("%fusion.2", "fusion", 32 + 1024, 32 + 1024),  # a slice of x, and all of it
        Kernel("%negate.1", "negate", 32, 32),
        Kernel("%cudnn.1", "custom-call", 32, 32 + 16),
        Kernel("%copy.1", "copy", 32, 32),
    ]


def test_kernels_of_a_real_program():
    def f(x):
        return x[3:4] + 1, x.sum(0)

    text = jax.jit(f).lower(jnp.ones((64, 8))).compile().as_text()
    found = hlo.kernels(text)
    # Sums in two steps also store what is between them. If x were counted twice, it would be 4096.
    assert 32 + 64 * 8 * 4 <= sum(k.read for k in found) < 32 + 64 * 8 * 4 + 200
    assert 2 * 32 <= sum(k.written for k in found) < 2 * 32 + 200


# --- The script ----------------------------------------------------------------------------------


@jax.numpy_dtype_promotion("standard")  # as Flax's layer needs
def test_every_row_compiles_for_the_cpu(tmp_path, capsys):
    markdown, out = tmp_path / "table.md", tmp_path / "rows.jsonl"
    arguments = ["--quick", "--batch", "4", "--markdown", str(markdown), "--json", str(out)]
    rows = targets.main([*arguments, "--dtype", "bfloat16"])
    header, *lines = map(json.loads, out.read_text().splitlines())
    assert header["compilers"]["jax"] == jax.__version__
    assert [line["library"] for line in lines] == [
        *["flax.linen", "jbn"] * 3,
        *["flax.linen", "jbn drop-in", "jbn"],
        *["jbn, policy", "jbn, policy per block", "jbn, policy, both"],
    ]
    assert all(row.kernels and row.moved > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "4x7x7x2048, BN+add+relu" in printed
    assert markdown.read_text().endswith("\n\n" + printed)


def row(library, moved, temporaries, elements):
    about = "h100", "op", "2x3", "float32", "bn_relu"
    return reading.Row(*about, library, 7, moved, temporaries, 1.5, elements)


def test_ratios_are_over_flax():
    rows = [row("flax.linen", 2000, 1000, 100), row("jbn", 1500, 400, 100)]
    *_, line = table.table(rows).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["2x3, BN+relu", "float32", "jbn", "7", "15.00 B/element", "0.750",
                     "4.00 B/element", "0.400", "1.5 s"]  # fmt: skip


def test_a_few_vectors_have_no_ratio():
    rows = [row("flax.linen", 2000, 3, 100), row("jbn", 1500, 9, 100)]
    assert table.table(rows).splitlines()[-1].count(" - |") == 1


@pytest.mark.parametrize(("name", "command"), [("h100", r"jax\[cuda12\]"), ("v5e", "libtpu")])
def test_a_target_without_a_compiler(name, command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"target {name}.*pip install .?{command}"):
        targets.main(["--target", name])


@pytest.mark.parametrize("name", ["v5e", "h100"])
@jax.numpy_dtype_promotion("standard")
def test_the_layer_moves_no_more_than_flax_on_another_device(name):
    """Compiles the layer and its ReLU, which must need no temporaries of x's size."""
    pytest.importorskip("libtpu" if name == "v5e" else "jax_plugins.xla_cuda12")
    compilers.prepare()
    on = compilers.device(name)
    shape = (28, 28, 512)
    found = [p for p in programs.op(128, [shape], ["bfloat16"]) if p.form == "bn_relu"]
    flax, own = (reading.measure(name, on, program) for program in found)
    assert own.moved <= 1.02 * flax.moved  # sums of blocks are 1 %
    assert own.temporaries < own.elements
