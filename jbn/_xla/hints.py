"""Hints that change what a compiler stores, and no value.

Each docstring names the cause, the effect, and the command that measures the effect again.
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
    """Returns `values`, but as new values to the compiler, so that their results are not shared.

    Cause: XLA (jax 0.10 to 0.12) computes equal expressions once and stores the result, even an
    array of x's size that costs one subtraction. Effect: on CPUs each of the two sums of the
    forward pass reads only x, in 0.56 of the time; no array of x's size is stored from the forward
    to the backward pass; on an H100 no mask is stored. Check:
    `python -m experiments.speed --part op`, `--target h100`, and tests/xla.
    """
    return lax.optimization_barrier(values)


def recomputed(function: Callable[..., T]) -> Callable[..., T]:
    """Rematerialises `function`: only its arguments are saved for backward.

    Cause: autodiff saves what each operation needs, such as a float32 xhat of bfloat16 x. Effect:
    x in its own dtype is the only array of its size that is saved. prevent_cse=False lets the
    compiler store what it wants; only autodiff must not. Check: tests/core/test_residuals.py.
    """
    return jax.checkpoint(function, prevent_cse=False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def widened(values: Array, dtype: np.dtype) -> Array:
    """Converts `values` to a wider dtype; bfloat16 to float32 by its bits.

    Cause: XLA drops a conversion to bfloat16 and back, and then stores the float32 sums of a
    residual network, at twice the size. Effect: ResNet-50 on an H100 moves 0.93 of Flax's bytes,
    not 0.97. Check: `python -m experiments.speed --target h100`.
    """
    if values.dtype != jnp.bfloat16 or dtype != jnp.float32:
        return values.astype(dtype)
    bits = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


@widened.defjvp
def _widened_jvp(dtype: np.dtype, primals, tangents):
    return widened(*primals, dtype), tangents[0].astype(dtype)
