"""Sums of bfloat16 without a shift: sums over blocks are exact, and the shift is applied later.

A bfloat16 has 8 significant bits, its square 16. The sum of up to 128 squares of one magnitude has
23, and float32 holds 24. A shift is needed against cancellation, which happens to values of one
magnitude: if magnitudes differ, the variance is not small beside the squared mean, and nothing is
lost. So sums of x and x^2 over blocks of at most 128 values have all digits that matter. For a
shift c, a bfloat16 number near the mean, the sums of x - c and (x - c)^2 follow exactly from them.

The sums need nothing that depends on x. So a compiler can fuse them into the convolution that
computes x, and x is never read for them: XLA does so on TPUs.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jbn._core.axes import Axes
from jbn._core.types import ShiftedMoments

LIMIT = 128  # the sum of so many squares, of 16 bits each, has 23 bits


def block(axes: Axes) -> tuple[int, ...]:
    """Chooses the axes that a block consists of; none if no choice is useful."""
    if not all(isinstance(axes.shape[i], int) for i in axes.reduction):  # a size of jax.export
        return ()
    choices = itertools.chain.from_iterable(
        itertools.combinations(axes.reduction, n) for n in range(1, len(axes.reduction) + 1)
    )
    sizes = {chosen: math.prod(axes.shape[i] for i in chosen) for chosen in choices}
    fitting = {chosen: size for chosen, size in sizes.items() if 16 <= size <= LIMIT}
    return max(fitting, key=lambda chosen: fitting[chosen], default=())


def moments(
    x: Array, axes: Axes, inner: tuple[int, ...], by_shift: Callable[[Array], ShiftedMoments]
) -> ShiftedMoments:
    """Computes the moments of bfloat16 x by blocks; on CPUs by shift.

    Cause: XLA for CPUs is slow at some reductions over blocks. Effect: 10 times slower there if a
    block is the batch axis. On a TPU v5e ResNet-50 moves 1.005 of Flax's bytes by blocks, and 1.13
    by shift. Check: `python -m experiments.speed --target v5e --part step`.
    """
    by_blocks = functools.partial(moments_by_blocks, axes=axes, inner=inner)
    return lax.platform_dependent(x, cpu=by_shift, default=by_blocks)


def moments_by_blocks(x: Array, axes: Axes, inner: tuple[int, ...]) -> ShiftedMoments:
    """Computes the moments of bfloat16 x in float32; the shift is the mean, rounded to bfloat16."""
    n = math.prod(axes.shape[i] for i in inner)
    wide = x.astype(jnp.float32)
    # One barrier for both sums, else XLA for GPUs reads x once for each. The sums drop the axes of
    # the block, else XLA for TPUs writes the sums twice.
    sums = jnp.sum(wide, inner), jnp.sum(wide * wide, inner)
    first, second = lax.optimization_barrier(sums)
    left = [i for i in range(x.ndim) if i not in inner]
    outer = tuple(left.index(i) for i in axes.reduction if i not in inner)

    def per_feature(sums: Array) -> Array:
        return jnp.expand_dims(sums, inner)

    def mean_of(sums: Array) -> Array:
        return per_feature(jnp.sum(sums, outer, keepdims=True)) / axes.size

    # Rounded to bfloat16 by reduce_precision: XLA drops a conversion to bfloat16 and back.
    shift = lax.reduce_precision(mean_of(first), exponent_bits=8, mantissa_bits=7)
    shift = jnp.where(jnp.isfinite(shift), shift, jnp.zeros_like(shift))
    c = jnp.squeeze(shift, inner)
    rest = first - n * c
    mean = mean_of(rest)
    mean_square = mean_of((second - c * first) - c * rest)
    var = jnp.maximum(mean_square - mean * mean, 0)
    # As for other dtypes, var is inf if squares overflow, and y is then the bias.
    overflow = jnp.isinf(per_feature(jnp.max(second, outer, keepdims=True)))
    count = jnp.full((1,) * x.ndim, axes.size, jnp.float32)
    return ShiftedMoments(shift, count, mean, jnp.where(overflow, jnp.inf, var))
