"""Collectives are read from compiled programs, and docs/collectives.md shows their numbers."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments.collectives import programs, reading, table

pytest.importorskip("tqdm")

import jbn
from experiments.collectives import __main__ as collectives
from experiments.common import hlo
from experiments.common.hlo import Collective, Traffic
from tests import executions

DOCS = pathlib.Path(__file__).parents[2] / "docs"

# Shortened from a program that XLA printed for TPUs; operands are printed by name only.
TPU = """\
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[16,64]{1,0:T(8,128)})->f32[64]}

%add.clone (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%x, %y)
}

ENTRY %main.1_spmd (param: f32[16,64]) -> (f32[64], f32[128], bf16[8]) {
  %get.5 = f32[64]{0:T(128)S(1)} get-tuple-element(%fusion), index=0
  %get.6 = bf16[128]{0:T(256)(128)(2,1)S(1)} get-tuple-element(%fusion), index=1
  %all-reduce.11 = (f32[64]{0:T(128)S(1)}, /*index=1*/bf16[128]{0:T(256)(128)(2,1)S(1)}) \
all-reduce(%get.5, /*index=1*/%get.6), channel_id=6, replica_groups=mesh['axis_0'=4] {'axis_0'}, \
use_global_device_ids=true, to_apply=%add.clone, metadata={op_name="jit(f)/layer0/reduce_sum"}
  %slice.19 = f32[1,64]{1,0:T(1,128)S(1)} slice(%param)
  %collective-permute-start.2 = (f32[1,64]{1,0:T(1,128)S(1)}, f32[1,64]{1,0:T(1,128)S(1)}, \
u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%slice.19), channel_id=3, \
source_target_pairs={{3,0}}, metadata={op_name="jit(f)/layer1/slice"}
  %collective-permute-done.2 = f32[1,64]{1,0:T(1,128)S(1)} \
collective-permute-done(%collective-permute-start.2), metadata={op_name="jit(f)/layer1/slice"}
  ROOT %fusion.9 = f32[64]{0:T(128)} fusion(%all-reduce.11), kind=kLoop, \
metadata={op_name="jit(f)/all-reduce(not one)"}
}
"""
# Shortened from a program for GPUs: it is asynchronous, and operands are printed with their types.
GPU = """\
HloModule jit_f

ENTRY %main (p: f32[3,8]) -> f32[4,3,8] {
  %all-reduce-start = (f32[64]{0}, f32[64]{0}) all-reduce-start(f32[64]{0} %a, f32[64]{0} %b), \
channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %all-reduce-done = (f32[64]{0}, f32[64]{0}) all-reduce-done((f32[64]{0}, f32[64]{0}) \
%all-reduce-start)
  %all-gather-start = (f32[3,8]{1,0}, f32[4,3,8]{2,1,0}) all-gather-start(f32[3,8]{1,0} %p), \
dimensions={0}
  %all-gather-done = f32[4,3,8]{2,1,0} all-gather-done((f32[3,8]{1,0}, f32[4,3,8]{2,1,0}) \
%all-gather-start)
  %ags = ((f32[2]{0}, pred[3]{0}), (f32[8]{0}, pred[12]{0})) all-gather-start(f32[2]{0} %c, \
pred[3]{0} %d), dimensions={0}
  %rs = ((f32[8,2]{1,0}), f32[2,2]{1,0}, u32[]) reduce-scatter-start(f32[8,2]{1,0} %e), \
dimensions={0}, to_apply=%add
  %reduce-scatter-done = f32[2,2]{1,0} reduce-scatter-done(%rs)
  %a2a = (c64[4]{0}, c64[4]{0}) all-to-all(c64[4]{0} %g, c64[4]{0} %h), replica_groups={{0,1}}
}
"""


def test_several_arrays_count_once():
    assert hlo.collectives(TPU) == [
        Collective("all-reduce", 512, 512, "jit(f)/layer0/reduce_sum"),
        Collective("collective-permute", 256, 256, "jit(f)/layer1/slice"),
    ]


def test_asynchronous_operations_count_at_their_start():
    assert hlo.collectives(GPU) == [
        Collective("all-reduce", 512, 512, ""),
        Collective("all-gather", 96, 384, ""),
        Collective("all-gather", 11, 44, ""),
        Collective("reduce-scatter", 64, 16, ""),
        Collective("all-to-all", 64, 64, ""),
    ]


@pytest.mark.parametrize(
    ("shape", "n"),
    [
        ("f32[]", 4),
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("(bf16[3]{0}, pred[5]{0})", 11),
        ("f8e4m3fn[10]", 10),
        ("s4[3]{0}", 2),
        ("c128[2]", 32),
        ("f32[<=16,2]", 128),
        ("f32[0,7]", 0),
        ("(token[], opaque[])", 0),
    ],
)
def test_sizes(shape, n):
    assert hlo.n_bytes(shape) == n


NAMELESS = """\
ENTRY %main (p: f32[2]) -> f32[8] {
  %zero = f32[] constant(0), metadata={op_name="jit(f)"}
  %p = f32[2]{0} parameter(0), metadata={op_name="jit(f)/layer2/stack"}
  %zeros = f32[8]{0} broadcast(%zero), dimensions={}
  %row = f32[8]{0} dynamic-update-slice(%zeros, %p, %zero)
  ROOT %sum = f32[8]{0} all-reduce(%row), to_apply=%add
}
"""


def test_an_operation_without_a_name_takes_that_of_its_operand():
    assert hlo.collectives(NAMELESS) == [Collective("all-reduce", 32, 32, "jit(f)/layer2/stack")]


COMPUTATIONS = """\
%one (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0)
}

ENTRY %two (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %a = f32[4]{0} all-reduce(%p), to_apply=%add
}

%three (q: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} all-reduce(%p), to_apply=%add
}
"""


def test_names_are_those_of_their_own_computation():
    assert [c.sent for c in hlo.collectives(COMPUTATIONS)] == [16, 0]


@pytest.mark.parametrize("check_vma", [True, False])
def test_real_programs(check_vma):
    def f(x):
        with jax.named_scope("layer2"):
            everyone = jax.lax.all_gather(x[0], "batch")
        return jax.lax.psum((x.sum(0), jnp.sin(everyone).sum()), "batch")

    run = jax.shard_map(
        f, mesh=executions.mesh(), in_specs=P("batch"), out_specs=P(), check_vma=check_vma
    )
    text = jax.jit(run).lower(jnp.ones((8, 6))).compile().as_text()
    gather, *sums = hlo.collectives(text)
    assert gather[:3] == ("all-gather", 24, 96)
    assert "layer2" in gather.op_name
    assert {c.kind for c in sums} == {"all-reduce"}
    assert sum(c.sent for c in sums) == 28


def test_traffic_is_subtracted_by_kind():
    a = hlo.traffic([Collective("all-reduce", 8, 8, ""), Collective("all-gather", 1, 4, "")])
    b = hlo.traffic([Collective("all-reduce", 2, 2, "")])
    assert a.minus(b) == Traffic({"all-gather": 1}, 7, 10)


# --- the script ----------------------------------------------------------------------------------


def test_each_mode_compiles_for_the_cpu(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    collectives.main(["--statistics", "inference", "--json", str(out)])
    header, *rows = map(json.loads, out.read_text().splitlines())
    assert header["widths"] == [64, 128, 256]
    assert [row["mode"] for row in rows] == [
        mode.name for mode in programs.MODES if programs.applies(mode, "inference", "cpu")
    ]
    for row in rows:
        assert row["devices"] == 8
        assert not any(layer["counts"] for layer in row["forward"])
    assert "| inference" in capsys.readouterr().out


@pytest.mark.parametrize("mode", programs.MODES[:5], ids=lambda mode: mode.name)
def test_ghost_batches_need_no_collective(mode):
    text = programs.compiled("backward", mode, "ghost", jax.devices())
    assert hlo.collectives(text) == []


@pytest.mark.parametrize("statistics", ["plain", "masked"])
@pytest.mark.parametrize("mode", programs.MODES, ids=lambda mode: mode.name)
def test_a_layer_needs_one_collective_each_way(mode, statistics):
    text = programs.compiled("backward", mode, statistics, jax.devices())
    *layers, elsewhere = reading.by_layer(hlo.collectives(text))
    assert [sum(layer.counts.values()) for layer in layers] == [2, 2, 2]
    assert not elsewhere.counts
    # Forward sends shift, mean, var and, with a mask, the count; backward sends two sums.
    numbers = 5 if statistics == "plain" else 6
    assert [layer.sent for layer in layers] == [4 * numbers * c for c in programs.WIDTHS]


@pytest.mark.parametrize("mode", programs.MODES, ids=lambda mode: mode.name)
def test_a_mask_adds_a_sum_a_channel_to_the_gradients_of_parameters(mode):
    # The bias has a cotangent of its own where a masked value is not finite.
    plain, masked = (
        hlo.traffic(hlo.collectives(programs.compiled("parameters", mode, s, jax.devices())))
        for s in ("plain", "masked")
    )
    assert masked.counts == plain.counts
    counts = 4 * sum(programs.WIDTHS)  # which the forward pass gathers
    assert masked.sent - plain.sent <= counts + 2 * 4 * sum(programs.WIDTHS)


def test_a_layer_under_pmap_needs_one_collective_each_way():
    def layer(x, dy):
        return jax.grad(lambda x: (dy * jbn.normalize(x, axis_name="i")[0]).sum())(x)

    x = jnp.ones((8, 4, 3))
    text = jax.pmap(layer, axis_name="i").lower(x, x).compile().as_text()
    assert [c.kind for c in hlo.collectives(text)] == ["all-gather", "all-reduce"]


def test_a_program_compiles_for_a_pod_that_is_not_here():
    pytest.importorskip("libtpu")
    collectives.prepare()
    devices = collectives.target_devices("v5e:2x2")
    text = programs.compiled("forward", programs.MODES[3], "plain", devices)
    sizes = [(c.kind, c.sent, c.received) for c in hlo.collectives(text)]
    assert sizes == [("all-gather", 12 * c, 48 * c) for c in programs.WIDTHS]


def test_a_target_that_the_compiler_does_not_know():
    pytest.importorskip("libtpu")
    with pytest.raises(SystemExit, match=r"'v5e:99x3'.*v5e:2x2"):
        collectives.main(["--target", "v5e:99x3"])


def test_a_target_without_a_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install libtpu"):
        collectives.main(["--target", "v5e:2x2"])


# --- the table in the docs -----------------------------------------------------------------------


def recorded():
    lines = (DOCS / "collectives.jsonl").read_text().splitlines()
    return [reading.from_json(json.loads(line)) for line in lines[1:]]


def test_the_table_shows_the_recorded_numbers():
    page = (DOCS / "collectives-table.md").read_text()
    assert page.endswith("\n\n" + table.table(recorded()))


def test_each_recorded_layer_has_one_collective_each_way():
    rows = recorded()
    assert {row.target for row in rows} == {"cpu", "v5e:2x2", "v5e:16x16", "v5p:4x4x4", "v6e:16x16"}
    for row in rows:
        needed = 0 if row.statistics in ("ghost", "inference") else 1
        for direction in (row.forward, row.backward):
            *layers, elsewhere = direction
            counts = [sum(layer.counts.values()) for layer in layers]
            assert sum(counts) == 3 * needed, row
            # XLA for TPUs may name the collectives of several layers after one of them.
            assert counts == [needed] * 3 or row.target != "cpu", row
            assert not elsewhere.counts
