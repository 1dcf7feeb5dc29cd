"""Reads the collectives and the kernels, and their bytes, out of a compiled program's text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
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


class Instruction(NamedTuple):
    """One line of a program, ``%name = result operation(operands), attributes``."""

    name: str
    result: str  # its type
    operation: str
    operands: list[str]  # names; some printers add types
    attributes: str  # all text after the first bracket

    @property
    def values(self) -> list[str]:
        """The names of the operands."""
        return [value for operand in self.operands for value in _NAME.findall(operand)]


class Collective(NamedTuple):
    """One operation in which devices communicate."""

    kind: str  # one of KINDS
    sent: int  # bytes of the operands, which a device contributes
    received: int  # bytes of the results, which a device gets
    op_name: str  # its place, or its operand's, in the traced program: "jit(f)/layer0/psum"


def collectives(hlo_text: str) -> list[Collective]:
    """Lists the collectives of an optimised program, ``jax.jit(f).lower(...).compile().as_text()``.

    An asynchronous operation counts once, at its ``-start``. An operation on several arrays counts
    once, with the bytes of all of them. An operation inside a loop counts once, however often the
    loop runs.
    """
    found = []
    for computation in computations(hlo_text).values():
        size: dict[str, int] = {}  # bytes of each value of the computation
        origin: dict[str, str] = {}  # op_name of each value
        for i in computation:
            size[i.name] = n_bytes(i.result)
            # An operation that replaces another may have lost its name: it inherits an operand's.
            # Names nest, so the longest is the most precise; a constant's may be just "jit(f)".
            inherited = max((origin.get(value, "") for value in i.values), key=len, default="")
            own = _OP_NAME.search(i.attributes)
            origin[i.name] = own[1] if own else inherited
            kind = i.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            result = i.result
            if i.operation.endswith("-start") and kind != "all-reduce":
                result = elements(result)[1]  # in (operands, results, contexts ...)
            # Some printers repeat the types of the operands, some print their names only.
            sent = sum(map(n_bytes, i.operands)) or sum(size.get(v, 0) for v in i.values)
            found.append(Collective(kind, sent, n_bytes(result), origin[i.name]))
    return found


# --- Kernels -------------------------------------------------------------------------------------

# Operations that move no bytes: they name values that exist already.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "opt-barrier",
}
_PARTS = {"slice", "dynamic-slice", "gather"}  # read of their first operand only what they return
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=(%[\w.\-]+)")
_RUNS_OTHERS = {"call", "while"}
_ENTRY = "ENTRY"


class Kernel(NamedTuple):
    """One step of a program: a fusion, a call of a library, a copy ..."""

    name: str
    operation: str
    read: int  # bytes
    written: int

    @property
    def moved(self) -> int:
        return self.read + self.written


def kernels(hlo_text: str) -> list[Kernel]:
    """Lists the steps of an optimised program, each with the bytes of its operands and its results.

    These bytes move if nothing stays in a cache from one step to the next. If a step reads only
    slices of an operand, only the slices count, as in XLA's own cost analysis. Asynchronous copies
    into on-chip memory, which TPUs make ahead of a step, are not steps. The steps inside a loop
    count once, however often the loop runs.
    """
    return list(_kernels(_ENTRY, computations(hlo_text)))


def _kernels(computation: str, found: dict[str, list[Instruction]]) -> Iterator[Kernel]:
    size: dict[str, int] = {}
    for i in found.get(computation, []):
        size[i.name] = n_bytes(i.result)
        called = _CALLED.search(i.attributes)
        if i.operation in _FREE or i.operation.endswith(("-start", "-done")):
            continue
        if i.operation in _RUNS_OTHERS and called:
            yield from _kernels(called[1], found)
            continue
        reads = [size.get(v, 0) for v in i.values]
        if i.operation == "fusion" and called:
            parts = _parts_read(found.get(called[1], []))
            reads = [min(n, parts.get(k, n)) for k, n in enumerate(reads)]
        elif i.operation in _PARTS:
            reads[0] = min(reads[0], size[i.name])
        yield Kernel(i.name, i.operation, sum(reads), size[i.name])


def _parts_read(fusion: Sequence[Instruction]) -> dict[int, int]:
    """Maps the index of a parameter to the bytes read, if a fusion reads only slices of it."""
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for i in fusion:
        for position, value in enumerate(i.values):
            users.setdefault(value, []).append((i, position))

    def read(value: str) -> int | None:
        total = 0
        for user, position in users.get(value, []):
            if user.operation == "bitcast":
                more = read(user.name)
            else:
                is_part = user.operation in _PARTS and position == 0
                more = n_bytes(user.result) if is_part else None
            if more is None:
                return None
            total += more
        return total

    parameters = {i.name: int(i.operands[0]) for i in fusion if i.operation == "parameter"}
    return {n: part for name, n in parameters.items() if (part := read(name)) is not None}


def computations(hlo_text: str) -> dict[str, list[Instruction]]:
    """Maps each computation's name to its instructions; "ENTRY" is where a program starts."""
    found: dict[str, list[Instruction]] = {}
    own: list[Instruction] = []
    for line in hlo_text.splitlines():
        if line.endswith("{") and not line[0].isspace():
            own = found.setdefault(line.split()[0], [])
        elif match := _INSTRUCTION.match(line):
            name, result, operation, rest = match.groups()
            own.append(Instruction(name, result, operation, elements("(" + rest), rest))
    return found


# --- Text ----------------------------------------------------------------------------------------


def n_bytes(shape: str) -> int:
    """Returns the bytes of an HLO type, ``f32[8,128]{1,0}`` or a tuple ``(f32[8], bf16[4])``."""
    total = 0
    for dtype, bits, dims in _ARRAY.findall(shape):
        size = 8 if dtype == "pred" else int(bits or 0)
        for n in filter(None, dims.replace("<=", "").split(",")):
            size *= int(n)
        total += -(-size // 8)
    return total


def elements(text: str) -> list[str]:
    """Splits the text in the first pair of brackets at the commas outside of inner brackets."""
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
    """The communication of some part of a program; parts can be subtracted."""

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
