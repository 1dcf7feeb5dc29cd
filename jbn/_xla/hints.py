"""Hints that change what a compiler stores, and no value.

Each says its cause, its effect, and the command by which it is measured again.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

T = TypeVar("T")


def unshared(values: T) -> T:
    """`values`, which the compiler takes for others: what is made of them is made anew.

    Cause: XLA (jax 0.10 to 0.12) finds equal expressions and stores the result for all that use it,
    even an array of x's size that costs one subtraction. Effect: on CPUs each of the two sums of
    the forward pass reads x and nothing else, in 0.56 of the time; no array of x's size waits from
    the forward to the backward pass; on an H100 no mask is stored. Check:
    `python -m experiments.speed --part op`, `--target h100`, and tests/xla.
    """
    return lax.optimization_barrier(values)


def recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, of which a backward pass keeps the arguments and nothing else.

    Cause: autodiff keeps what each operation needs, such as a float32 xhat of bfloat16 x. Effect:
    x in its own dtype is the only array of its size that is kept. prevent_cse=False: the compiler
    may keep what it wants; only autodiff must not. Check: tests/core/test_residuals.py.
    """
    return jax.checkpoint(function, prevent_cse=False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def widened(values: Array, dtype: np.dtype) -> Array:
    """`values` in a wider dtype; from bfloat16 by its bits.

    Cause: XLA knows that a conversion to bfloat16 and back may be dropped, and keeps the float32
    sums of a whole residual network in memory, at twice the size. Effect: ResNet-50 on an H100
    moves 0.93 of Flax's bytes, not 0.97. Check: `python -m experiments.speed --target h100`.
    """
    if values.dtype != jnp.bfloat16 or dtype != jnp.float32:
        return values.astype(dtype)
    bits = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


@widened.defjvp
def _widened_jvp(dtype: np.dtype, primals, tangents):
    return widened(*primals, dtype), tangents[0].astype(dtype)
