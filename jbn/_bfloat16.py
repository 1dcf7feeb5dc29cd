"""The sums of bfloat16 need no K: in blocks they are exact, and a shift can come afterwards.

A bfloat16 has 8 significant bits, its square 16. The sum of up to 128 squares of one magnitude has
23, and float32 holds 24. Cancellation, the reason for K, is an affair of values of one magnitude:
where magnitudes differ the variance is not small beside the squared mean, and nothing is lost. So
sums of x and x^2 over blocks of at most 128 values have all digits that matter, and from these
follow, exactly again, the sums of x - c and (x - c)^2 for a bfloat16 number c near the mean.

Nothing has to be known of x before it is summed. A compiler can then take the sums where x is
made, in the convolution before the layer, and x is never read for them: XLA does so on TPUs.
"""

import itertools
import math

import jax.numpy as jnp
from jax import Array, lax

from jbn._axes import Axes

LIMIT = 128  # squares of 16 bits whose sum has 23


def block(axes: Axes) -> tuple[int, ...]:
    """The axes whose product is the size of a block; none if they make no useful block."""
    if not all(isinstance(axes.shape[i], int) for i in axes.reduction):  # of jax.export
        return ()
    choices = itertools.chain.from_iterable(
        itertools.combinations(axes.reduction, n) for n in range(1, len(axes.reduction) + 1)
    )
    sizes = {chosen: math.prod(axes.shape[i] for i in chosen) for chosen in choices}
    fitting = {chosen: size for chosen, size in sizes.items() if 16 <= size <= LIMIT}
    return max(fitting, key=lambda chosen: fitting[chosen], default=())


def shifted_moments(x: Array, axes: Axes, inner: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """(c, E[x - c], var) of bfloat16 x, in float32, c near the mean."""
    n = math.prod(axes.shape[i] for i in inner)
    wide = x.astype(jnp.float32)
    sums = jnp.sum(wide, inner, keepdims=True), jnp.sum(wide * wide, inner, keepdims=True)
    # Together, else XLA for GPUs reads x for each of them.
    first, second = lax.optimization_barrier(sums)

    def mean_of(sums: Array) -> Array:
        return jnp.sum(sums, axes.reduction, keepdims=True) / axes.size

    # Rounded to bfloat16, by other means than a conversion there and back, which XLA drops.
    center = lax.reduce_precision(mean_of(first), exponent_bits=8, mantissa_bits=7)
    center = jnp.where(jnp.isfinite(center), center, jnp.zeros_like(center))
    shifted = first - n * center
    mean = mean_of(shifted)
    mean_square = mean_of((second - center * first) - center * shifted)
    var = jnp.maximum(mean_square - mean * mean, 0)
    # As for other dtypes: squares that overflow leave var = inf, and y is then the bias.
    overflow = jnp.isinf(jnp.max(second, axes.reduction, keepdims=True))
    return center, mean, jnp.where(overflow, jnp.inf, var)
