"""A compiled program, as text -> its collectives: how many, of which kind, of how many bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "all-to-all",
    "ragged-all-to-all",
)
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")  # f32[8,128]
_NAME = re.compile(r"%[\w.\-]+")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?(%[\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One operation in which devices talk to each other."""

    kind: str  # one of KINDS
    sent: int  # bytes of the operands: what a device contributes
    received: int  # bytes of the results: what a device ends up with
    op_name: str  # where it, or what it sends, is in the traced program: "jit(f)/layer0/psum"


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives of an optimised program, ``jax.jit(f).lower(...).compile().as_text()``.

    An asynchronous operation counts once, at its ``-start``; one that carries several arrays counts
    once, with the bytes of them all; and one inside a loop counts once, however often that runs.
    """
    found = []
    size: dict[str, int] = {}  # of the values of one computation, in bytes
    origin: dict[str, str] = {}  # of these values, an op_name
    for line in hlo_text.splitlines():
        if line.endswith("{") and not line[0].isspace():
            size, origin = {}, {}
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, result, operation, rest = match.groups()
        size[name] = n_bytes(result)
        operands = elements("(" + rest)
        values = [value for operand in operands for value in _NAME.findall(operand)]
        # An operation that XLA has put in the place of another may have lost its name. Names nest,
        # so the longest of the operands' says the most; a constant's may be just "jit(f)".
        inherited = max((origin.get(value, "") for value in values), key=len, default="")
        own = _OP_NAME.search(rest)
        origin[name] = own[1] if own else inherited
        kind = operation.removesuffix("-start")
        if kind not in KINDS:
            continue
        if operation.endswith("-start") and kind != "all-reduce":
            result = elements(result)[1]  # of (operands, results, contexts ...)
        # Some printers repeat the types of the operands, some give their names alone.
        sent = sum(map(n_bytes, operands)) or sum(size.get(value, 0) for value in values)
        found.append(Collective(kind, sent, n_bytes(result), origin[name]))
    return found


def n_bytes(shape: str) -> int:
    """The size of an HLO type, ``f32[8,128]{1,0}`` or a tuple ``(f32[8], bf16[4])`` of such."""
    total = 0
    for dtype, bits, dims in _ARRAY.findall(shape):
        size = 8 if dtype == "pred" else int(bits or 0)
        for n in filter(None, dims.replace("<=", "").split(",")):
            size *= int(n)
        total += -(-size // 8)
    return total


def elements(text: str) -> list[str]:
    """What stands in the first pair of brackets, cut at the commas that no inner brackets hold."""
    parts, depth = [""], 0
    for char in text:
        depth -= char in ")]}"
        if depth == 0 and char == ")":
            break
        if depth == 1 and char == ",":
            parts.append("")
        elif depth:
            parts[-1] += char
        depth += char in "([{"
    return [part.strip() for part in parts]


class Traffic(NamedTuple):
    """What some part of a program says to other devices; parts can be subtracted."""

    counts: dict[str, int]  # number of operations of each kind
    sent: int
    received: int

    def minus(self, other: Traffic) -> Traffic:
        kinds = sorted({*self.counts, *other.counts})
        counts = {k: self.counts.get(k, 0) - other.counts.get(k, 0) for k in kinds}
        counts = {k: n for k, n in counts.items() if n}
        return Traffic(counts, self.sent - other.sent, self.received - other.received)


def traffic(found: Sequence[Collective]) -> Traffic:
    counts = dict(sorted(Counter(c.kind for c in found).items()))
    return Traffic(counts, sum(c.sent for c in found), sum(c.received for c in found))
