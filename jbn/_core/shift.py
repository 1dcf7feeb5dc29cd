"""The shift, a constant per feature that is subtracted from x before any sum.

Rounding causes an error of about eps (1 + (shift - mean)^2 / var) in the variance, so the shift has
to be within a few standard deviations of the mean (docs/mathematics). Most values are: at most
1/t^2 of them are further away than t standard deviations (Chebyshev). The shift is the median of
seven values from different places of different examples. So neither one odd place in every example
(a token, a border, a row and a column) nor a few odd examples are the majority. (If an example has
eight places or fewer, one place is enough: an odd place is then so large a part of the batch that
it is within three standard deviations of the mean.)
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from jbn._core.axes import Axes
from jbn._xla.materialize import materialize
from jbn._xla.rows import rows
from jbn._xla.select import replaced

_DRAWS = 7  # three of them may be odd
# Pairs to put in order, one after the other, and which results are needed; the median of seven is
# then in the middle. A sort, or a count of smaller values, takes longer to compile and to run.
_MEDIAN = (
    *((0, 5, "both"), (0, 3, "both"), (1, 6, "both"), (2, 4, "both"), (0, 1, "larger")),
    *((3, 5, "both"), (2, 6, "both"), (2, 3, "larger"), (3, 6, "smaller"), (4, 5, "smaller")),
    *((1, 4, "both"), (1, 3, "larger"), (3, 4, "smaller")),
)
# The order of the draws differs from axis to axis, so that no row or column holds two draws.
_STRIDES = (1, 3, 2, 5, 4, 6)
# The place of a draw in its seventh of the weight. The offsets differ: in a batch of 7 n examples
# of equal length, equal offsets would draw the same place of every example.
_OFFSETS = (0.37, 0.71, 0.13, 0.59, 0.29, 0.83, 0.47)


def shift_for(x: Array, weights: Array | None, axes: Axes) -> Array:
    """Chooses a shift for each feature, near its mean, from the values that one device has.

    The shift is a value of x that takes part (0 if there is none), and not an average, so that a
    constant channel becomes exactly 0. The result of Batch Normalization does not depend on the
    shift, so it carries no gradient.
    """
    if axes.size == 0:
        return jnp.zeros(axes.per_feature, accumulator(x.dtype))
    drawn = _rows(x, axes) if weights is None else _weighted_rows(x, weights, axes)
    dtype = accumulator(x.dtype)
    shift = _median([row.astype(dtype) for row in drawn])
    # A shift of half an ulp of the largest x or more (1e31 for float32) could overflow x - shift.
    info, size = jnp.finfo(shift.dtype), lax.abs(shift)
    shift = replaced(shift, lax.ge(size, np.asarray(info.max * info.eps / 4, size.dtype)), 0.0)
    return materialize(shift)[0]


def _median(rows: list[Array]) -> Array:
    """Computes the median of the draws; for complex draws, of the real and imaginary parts."""
    if jnp.iscomplexobj(rows[0]):
        return lax.complex(_median([r.real for r in rows]), _median([r.imag for r in rows]))
    rows = list(rows)
    for i, j, needed in _MEDIAN:
        pair = rows[i], rows[j]
        if needed != "larger":
            rows[i] = lax.min(*pair)
        if needed != "smaller":
            rows[j] = lax.max(*pair)
    return rows[len(rows) // 2]


def _index(n: int, order: int, draw: int) -> int:
    """Returns the index of a draw along the `order`-th reduction axis, of size n."""
    if not isinstance(n, int):  # a dimension of jax.export
        return 0
    middle = _DRAWS // 2
    place = ((draw - middle) * _STRIDES[order % len(_STRIDES)] + middle) % _DRAWS
    return _places(n)[place] if _are_several(n) else n * (2 * place + 1) // (2 * _DRAWS)


def _are_several(n: int) -> bool:
    """Returns whether seven draws fit on an axis of size n with other values between them."""
    return isinstance(n, int) and n >= 2 * _DRAWS


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@functools.lru_cache
def _places(n: int) -> range:
    """Returns the indices of seven draws along an axis of size n.

    The stride is a prime below a seventh of n that does not divide n. If sequences of equal length
    were flattened into this axis, hardly any two draws are then at the same place of a sequence.
    """
    stride = n // _DRAWS - 1
    while stride > 1 and (n % stride == 0 or not _is_prime(stride)):
        stride -= 1
    start = (n - (_DRAWS - 1) * stride) // 2
    return range(start, start + (_DRAWS - 1) * stride + 1, stride)


def _rows(x: Array, axes: Axes) -> list[Array]:
    """Returns the draws for values of equal weight."""
    if len(axes.reduction) == 1 and _are_several(axes.size):  # two operations instead of seven
        first, places = axes.reduction[0], _places(axes.size)
        drawn = lax.slice_in_dim(x, places.start, places.stop, places.step, first)
        return list(lax.split(drawn, (1,) * _DRAWS, first))
    where = [
        {i: _index(axes.shape[i], order, draw) for order, i in enumerate(axes.reduction)}
        for draw in range(_DRAWS)
    ]
    return rows(x, axes, where)


def _weighted_rows(x: Array, weights: Array, axes: Axes) -> list[Array]:
    """Returns draws at equal shares of the weight, for each feature; 0 where every weight is 0.

    So a value is drawn in proportion to its weight. A value of tiny weight may be far from all
    other values without an effect on the variance, and must not become the shift.
    """
    varying = [i for i in axes.reduction if weights.shape[i] != 1]
    kept = [i for i in range(len(axes.shape)) if i not in axes.reduction and weights.shape[i] != 1]
    rows = weights.transpose(
        *varying, *kept, *(i for i in range(len(axes.shape)) if i not in (*varying, *kept))
    )
    sizes = [weights.shape[i] for i in varying]
    rows = rows.reshape(math.prod(sizes), *(weights.shape[i] for i in kept))
    chosen, found = _draw(rows.astype(jnp.float32) if rows.dtype == jnp.bool_ else rows)
    index: dict[int, Array] = dict(zip(varying, jnp.unravel_index(chosen, sizes), strict=True))
    where: list[dict[int, Any]] = [
        {
            i: index[i][draw] if i in index else _index(axes.shape[i], order, draw)
            for order, i in enumerate(axes.reduction)
        }
        for draw in range(_DRAWS)
    ]
    if kept:
        drawn = [_row_by_feature(x, at, kept, axes) for at in where]
    else:  # the same indices for all features
        zero = jnp.zeros((), jnp.int32)
        starts = [[jnp.asarray(at.get(i, zero), jnp.int32) for i in range(x.ndim)] for at in where]
        drawn = [lax.dynamic_slice(x, start, axes.per_feature) for start in starts]
    there = jnp.expand_dims(found, [i for i in range(len(axes.shape)) if i not in kept])
    return [jnp.where(there, row, jnp.zeros_like(row)) for row in drawn]


def _row_by_feature(x: Array, at: dict[int, Any], kept: list[int], axes: Axes) -> Array:
    """Reads x at these indices of the reduction axes, which may differ along the axes `kept`."""
    places = []
    for i, n in enumerate(axes.per_feature):
        if i in at:
            place = jnp.asarray(at[i], jnp.int32)
            place = jnp.broadcast_to(place, [axes.shape[j] for j in kept])
            place = jnp.expand_dims(place, [j for j in range(x.ndim) if j not in kept])
        else:
            place = lax.broadcasted_iota(jnp.int32, [n if j == i else 1 for j in range(x.ndim)], i)
        places.append(jnp.broadcast_to(place, axes.per_feature))
    return x.at[tuple(places)].get(mode="clip")


def _draw(weights: Array) -> tuple[Array, Array]:
    """Draws rows by their weights, [rows, ...].

    Returns the indices, [draws, ...], and whether there is any weight, [...]. A draw finds first
    the block and then the row in it: a running sum over all rows would cost as much as the sums
    over x.
    """
    n, rest = weights.shape[0], weights.shape[1:]
    length = math.isqrt(n - 1) + 1 if isinstance(n, int) and n > 1024 else n
    blocks = -(-n // length)
    if blocks * length != n:
        weights = jnp.pad(weights, [(0, blocks * length - n)] + [(0, 0)] * len(rest))
    weights = weights.reshape(blocks, length, *rest)
    # Made of scalars: a function that XLA partitions must not hold a constant array.
    share = lax.concatenate(
        [
            lax.full((1, *(1 for _ in rest)), (draw + offset) / _DRAWS, weights.dtype)
            for draw, offset in enumerate(_OFFSETS)
        ],
        0,
    )
    block, within, found = _quantile(jnp.sum(weights, 1)[None], share)
    chosen = jnp.take_along_axis(
        weights, jnp.expand_dims(block, 1), 0, mode="clip"
    )  # [draws, length, ...]
    row, _, _ = _quantile(chosen, within)
    return block * length + row, found[0]


def _quantile(weights: Array, share: Array) -> tuple[Array, Array, Array]:
    """Finds the index at which a share of the weight is reached.

    Returns (index, share within it, whether there is weight). The weights, [draws or 1, n, ...],
    are rounded to whole numbers, whose running sums are exact: a value of weight 0, or of a
    millionth of the largest weight, is never found.
    """
    n = weights.shape[1]
    bits = 30 - n.bit_length() if isinstance(n, int) else 8
    largest = jnp.max(weights, 1, keepdims=True)
    some = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    whole = (weights / some * 2**bits).astype(jnp.int32)
    sums = jnp.cumsum(whole, 1)
    total = sums[:, -1]
    target = (share * total.astype(share.dtype)).astype(jnp.int32)
    target = jnp.clip(target, 0, jnp.maximum(total - 1, 0))
    reached = jnp.sum(sums <= jnp.expand_dims(target, 1), 1, dtype=jnp.int32)
    index = jnp.minimum(reached, n - 1)
    at = jnp.expand_dims(index, 1)
    own = jnp.take_along_axis(jnp.broadcast_to(whole, (len(share), *whole.shape[1:])), at, 1)
    upper = jnp.take_along_axis(jnp.broadcast_to(sums, (len(share), *sums.shape[1:])), at, 1)
    before = (target - (upper - own)[:, 0]).astype(share.dtype)
    within = before / jnp.maximum(own[:, 0], 1).astype(share.dtype)
    return index, within, total > 0


def accumulator(dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype of sums over values of `dtype`, at least float32."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def active(weights: Array) -> Array:
    """Returns where a value takes part: the mask itself, or where weights are positive."""
    return weights if weights.dtype == jnp.bool_ else weights > 0
