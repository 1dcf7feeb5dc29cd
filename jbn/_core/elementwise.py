"""A test on the jaxpr whether a function of an array mixes its elements, as softmax does.

Each value of the jaxpr that depends on the input has a note for each of its axes: which part of
which input axis this axis holds, and from which index on. An operation mixes if it combines several
elements (a sum, a sort, a product of matrices) or moves them (a transpose, a roll). If a note
cannot describe the result (of a loop, an indexed read), the function counts as elementwise: no
function is refused that may be elementwise.
"""

import math
from typing import Any, NamedTuple

from jax.extend.core import Literal


class _Along(NamedTuple):
    """The elements along one axis, row-major: `parts` of input axes, from index `start` on.

    A part (axis, low, high) counts index // low % (high // low) of an input axis of at least `high`
    elements; (None, 1, n) is n copies.
    """

    parts: tuple[tuple[int | None, int, int], ...]
    start: int = 0

    @property
    def of_input(self) -> bool:
        return any(axis is not None for axis, _, _ in self.parts)


_Note = tuple[_Along, ...] | str | None  # None: does not depend on the input
_MIXED, _UNKNOWN = "mixed", "unknown"

_ALONG_AN_AXIS = {
    "sort", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "fft", "top_k",
    "approx_top_k",
}  # fmt: skip
_BETWEEN_DEVICES = {
    "psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant",
    "ppermute", "all_to_all", "reduce_scatter",
}  # fmt: skip
_MOVES = {
    "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "reshape", "slice", "concatenate",
    "pad",
}  # fmt: skip
_LOOPS = {"while", "scan"}


def mixes(jaxpr: Any) -> bool:
    """Returns whether an element of the only result depends on other elements of the argument."""
    shape = jaxpr.invars[0].aval.shape
    if not all(isinstance(n, int) for n in shape):  # a dimension of jax.export
        return False
    same = tuple(_Along(_axis(i, n)) for i, n in enumerate(shape))
    (note,) = _follow(jaxpr, [same])
    return note not in (None, _UNKNOWN, same)


def _axis(i: int | None, n: int) -> tuple[tuple[int | None, int, int], ...]:
    return ((i, 1, n),) if n > 1 else ()


def _follow(jaxpr: Any, notes: list[_Note]) -> list[_Note]:
    """Derives the notes of a jaxpr's results from the notes of its arguments."""
    known: dict[Any, _Note] = dict(zip(jaxpr.invars, notes, strict=True))

    def read(atom: Any) -> _Note:
        return None if isinstance(atom, Literal) else known.get(atom)

    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        results = [None] * len(eqn.outvars) if not any(given) else _apply(eqn, given)
        known.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn: Any, given: list[_Note]) -> list[_Note]:
    """Derives the notes of an operation's results; one operand at least depends on the input."""
    everywhere = len(eqn.outvars)
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):  # an inner function
        inner = eqn.params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if eqn.primitive.name not in _LOOPS and len(getattr(inner, "invars", ())) == len(given):
            return _follow(inner, given)
    if "branches" in eqn.params and not any(note == _MIXED for note in given[1:]):
        branches = [_follow(b.jaxpr, given[1:]) for b in eqn.params["branches"]]
        return [_same(list(notes)) for notes in zip(*branches, strict=True)]
    if _MIXED in given or eqn.primitive.name in _BETWEEN_DEVICES:
        return [_MIXED] * everywhere
    if _UNKNOWN in given or eqn.primitive.name in _LOOPS:
        return [_UNKNOWN] * everywhere
    return [_one(eqn, given)] * everywhere


def _one(eqn: Any, given: list[Any]) -> _Note:
    """Derives the note of an operation's result from the notes of the operands alone."""
    name, params, shape = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    note = next(n for n in given if n is not None)

    def of_input(axes: Any) -> bool:
        return any(note[i].of_input for i in axes)

    if name in _ALONG_AN_AXIS:
        keys = ("dimension", "axis", "dimensions", "reduction_dimension")
        axes = next((params[k] for k in keys if k in params), len(note) - 1)
        return _MIXED if of_input([axes] if isinstance(axes, int) else axes) else _UNKNOWN
    if name == "dot_general":
        contracted = params["dimension_numbers"][0]
        pairs = zip(given, contracted, strict=False)
        mixed = any(n is not None and any(n[i].of_input for i in axes) for n, axes in pairs)
        return _MIXED if mixed else _UNKNOWN
    if name.startswith(("reduce_window", "select_and")) or name == "conv_general_dilated":
        window = params.get("window_dimensions", ())
        return _MIXED if of_input(i for i, n in enumerate(window) if n > 1) else _UNKNOWN
    if name.startswith(("reduce_", "arg")) and "axes" in params:
        axes = params["axes"]
        rest = tuple(n for i, n in enumerate(note) if i not in axes)
        return _MIXED if of_input(axes) else rest
    if name in _MOVES:
        return _moved(eqn, given, note)
    operands = zip(eqn.invars, given, strict=True)
    if all(n is None or atom.aval.shape == shape for atom, n in operands):
        return _same(given)
    return _UNKNOWN


def _moved(eqn: Any, given: list[Any], note: Any) -> _Note:
    """Derives the note of the result of an operation that moves elements."""
    name, params, shape = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    if name == "transpose":
        return tuple(note[i] for i in params["permutation"])
    if name == "broadcast_in_dim":
        at = dict(zip(map(int, params["broadcast_dimensions"]), note, strict=True))
        copies = tuple(_Along(_axis(None, n)) for n in shape)
        return tuple(at[i] if i in at and at[i].parts else copy for i, copy in enumerate(copies))
    if name == "squeeze":
        return tuple(n for i, n in enumerate(note) if i not in params["dimensions"])
    if name == "reshape":
        return _reshaped(note, eqn.invars[0].aval.shape, shape)
    if name == "slice":
        if params["strides"] and any(n != 1 for n in params["strides"]):
            return _UNKNOWN
        starts = params["start_indices"]
        return tuple(n._replace(start=n.start + s) for n, s in zip(note, starts, strict=True))
    if name == "concatenate":
        return _concatenated(eqn, given, params["dimension"])
    if name == "pad":
        if given[0] is None or any(interior for _, _, interior in params["padding_config"]):
            return _UNKNOWN
        low = (n for n, _, _ in params["padding_config"])
        return tuple(n._replace(start=n.start - k) for n, k in zip(note, low, strict=True))
    return _UNKNOWN


def _same(notes: list[_Note]) -> _Note:
    """Joins the notes of values that are combined element by element."""
    found = {n for n in notes if n is not None}
    if len(found) < 2:
        return found.pop() if found else None
    return _UNKNOWN if _UNKNOWN in found and _MIXED not in found else _MIXED


def _concatenated(eqn: Any, given: list[Any], dimension: int) -> _Note:
    notes, at = [], 0
    for atom, note in zip(eqn.invars, given, strict=True):
        if note is not None:
            along = note[dimension]
            if not along.of_input:  # copies next to copies
                size = eqn.outvars[0].aval.shape[dimension]
                along = _Along(_axis(None, size))
            else:
                along = along._replace(start=along.start - at)
            notes.append((*note[:dimension], along, *note[dimension + 1 :]))
        at += atom.aval.shape[dimension]
    return _same(notes)


def _reshaped(note: Any, old: tuple[int, ...], new: tuple[int, ...]) -> _Note:
    """Distributes the parts, in order, over the new axes; divides a part that is too large."""
    whole = (
        math.prod(high // low for _, low, high in along.parts) == n and along.start == 0
        for along, n in zip(note, old, strict=True)
    )
    if not all(whole):
        return _UNKNOWN
    parts = [part for along in note for part in along.parts]
    result = []
    for n in new:
        taken = []
        while n > 1:
            axis, low, high = parts.pop(0)
            size = high // low
            if size > n:
                if size % n:
                    return _UNKNOWN
                parts.insert(0, (axis, low, low * (size // n)))
                low, size = low * (size // n), n
            elif n % size:
                return _UNKNOWN
            before = taken[-1] if taken else (axis, 0, 0)
            if before[0] == axis and before[1] == high:  # two adjacent parts of one axis
                taken[-1] = (axis, low, before[2])
            else:
                taken.append((axis, low, high))
            n //= size
        result.append(_Along(tuple(taken)))
    return tuple(result)
