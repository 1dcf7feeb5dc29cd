"""Reads the collectives of every layer out of the compiled programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.collectives.programs import WIDTHS, Mode, compiled
from experiments.common.hlo import Collective, Traffic, collectives, traffic


class Row(NamedTuple):
    """One line of the table: a mode, and a kind of statistics."""

    target: str
    devices: int
    mode: str
    statistics: str
    forward: list[Traffic]  # of each layer
    backward: list[Traffic]  # of each layer
    running: Traffic  # added by the running statistics, in all layers together
    parameters: Traffic  # added by the parameters' gradients, in all layers together


def measure(target: str, devices: Sequence[Any], mode: Mode, statistics: str) -> Row:
    """Compiles programs that each compute more than the last, and subtracts their traffic."""

    def found(part: str) -> list[Collective]:
        return collectives(compiled(part, mode, statistics, devices))

    about = target, len(devices), mode.name, statistics
    if statistics == "inference":
        return Row(*about, by_layer(found("inference")), by_layer([]), traffic([]), traffic([]))
    forward, backward = found("forward"), found("backward")
    both = zip(by_layer(backward), by_layer(forward), strict=True)
    return Row(
        *about,
        by_layer(forward),
        [b.minus(f) for b, f in both],
        traffic(found("statistics")).minus(traffic(forward)),
        traffic(found("parameters")).minus(traffic(backward)),
    )


def by_layer(found: Sequence[Collective]) -> list[Traffic]:
    """Groups the collectives by their layer; the last group has those that name no layer."""
    layers: list[list[Collective]] = [[] for _ in (*WIDTHS, "no layer")]
    for c in found:
        scope = re.search(r"layer(\d+)", c.op_name)
        layers[int(scope[1]) if scope else -1].append(c)
    return [traffic(layer) for layer in layers]


def to_json(row: Row) -> dict[str, Any]:
    """Converts a row to numbers, texts, lists and dictionaries."""
    values = row._asdict()
    for part in ("forward", "backward"):
        values[part] = [t._asdict() for t in values[part]]
    for part in ("running", "parameters"):
        values[part] = values[part]._asdict()
    return values


def from_json(values: dict[str, Any]) -> Row:
    """Inverts `to_json`."""
    layers = {k: [Traffic(**t) for t in values[k]] for k in ("forward", "backward")}
    whole = {k: Traffic(**values[k]) for k in ("running", "parameters")}
    fields: dict[str, Any] = {k: values[k] for k in Row._fields} | layers | whole
    return Row(**fields)
