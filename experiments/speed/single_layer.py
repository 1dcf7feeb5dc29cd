"""Measures parts op and inference: one layer, beside a copy of its input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from experiments.common import timing
from experiments.nets.layers import BASELINE, PASSES, Case
from experiments.speed import peers
from experiments.speed.cases import COPY, FOLDED, USEFUL, Config, bar
from experiments.speed.peers import Program
from experiments.speed.report import Row


def op(config: Config) -> Iterator[Row]:
    """Measures one layer in training."""
    for shape, dtype, form, which in bar(
        config.shapes, config.dtypes, config.forms, PASSES, about="op"
    ):
        case = Case(shape, dtype, form, which)
        programs = programs_of(config, case) | {COPY: peers.copy_program(case)}
        yield from time_programs("op", case, programs, config)


def inference(config: Config) -> Iterator[Row]:
    """Measures one layer with its running statistics, and folded into an affine map."""
    for shape, dtype, form in bar(config.shapes, config.dtypes, config.forms, about="inference"):
        case = Case(shape, dtype, form, "inference")
        programs = programs_of(config, case)
        programs |= {FOLDED: peers.folded_program(case), COPY: peers.copy_program(case)}
        yield from time_programs("inference", case, programs, config)


def programs_of(config: Config, case: Case) -> dict[str, Program]:
    return {name: peers.PEERS[name].program(case) for name in config.libraries}


def time_programs(
    part: str, case: Case, programs: Mapping[str, Program], config: Config
) -> list[Row]:
    """Times programs that compute the same layer; returns their rows."""
    samples = timing.interleave({name: p.run for name, p in programs.items()}, config.rounds)
    itemsize = jnp.dtype(case.dtype).itemsize
    about = part, "x".join(map(str, case.shape)), case.dtype, case.form, case.which
    rows = []
    for name, program in programs.items():
        useful = 2 if name == COPY else USEFUL[case.form, case.which]
        row = Row(*about, name, **times(samples, name), **analysis(program, case.elements))
        row = row._replace(bandwidth=useful * itemsize * case.elements / samples.median(name))
        if COPY in programs:
            row = row._replace(of_copy=useful / 2 * samples.ratio(COPY, name).median)
        rows.append(row)
    return rows


def times(samples: timing.Samples, name: str) -> dict[str, Any]:
    """Returns the fields of a row that hold times."""
    fields: dict[str, Any] = {"seconds": samples.median(name)}
    if BASELINE in samples.seconds:
        ratio = samples.ratio(name, BASELINE)
        fields |= {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
    return fields


def analysis(program: Program, elements: int | None = None) -> dict[str, Any]:
    """Returns the fields of a row from XLA: bytes accessed, an element, and temporaries."""
    if program.compiled is None:
        return {}
    cost = program.compiled.cost_analysis() or {}  # None: on some platforms XLA does not count
    memory = program.compiled.memory_analysis()
    fields: dict[str, Any] = {}
    if elements and cost.get("bytes accessed", 0) > 0:
        fields["accessed"] = cost["bytes accessed"] / elements
    if memory is not None:
        fields["temporaries"] = memory.temp_size_in_bytes
    return fields
