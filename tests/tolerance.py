"""The tolerances of the tests, and their sources.

A result is compared with the float64 oracle of the *rounded* input, so its error comes from

1. the rounding of the result to its own dtype: half an ulp, `eps(dtype) / 2` of each element;
2. the computation in float32 (float64 for float64): a sum of n terms with rounding errors of
   random sign is off by about sqrt(n) eps of the magnitude of its terms (Higham & Mary, "A new
   approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019), and the dozen
   operations around the sums add a few eps more;
3. the mean, where it is far from zero: as a number of its dtype it has an error of half an ulp,
   which is `ratio * eps / 2` in units of the standard deviation, ratio = |mean| / std.

For float32, 3. gives 6e-5 at a ratio of 1e3 and 6e-4 at 1e4.
"""

import chex
import jax.numpy as jnp
import numpy as np


def eps(dtype) -> float:
    """Returns the distance from 1 to the next number of the dtype."""
    return float(jnp.finfo(dtype).eps)


def accumulator(dtype):
    """Returns the dtype in which statistics of `dtype` are computed, at least float32."""
    return np.promote_types(np.dtype(dtype), np.float32)


def tol(dtype, n: int, ratio: float = 0.0) -> dict[str, float]:
    """Returns rtol (1. above) and atol for values of magnitude 1 (2. and 3. above)."""
    accurate = eps(accumulator(dtype))
    return {
        "rtol": 0.5 * eps(dtype) * 1.01,  # 1.01: the rounding of an already rounded number
        "atol": accurate * (16 + 2 * n**0.5 + 0.5 * ratio),
    }


def assert_close(actual, desired, dtype, n: int, *, magnitude=None, ratio: float = 0.0):
    """Checks that `actual` is `desired` up to `tol(dtype, n, ratio)`, in units of `magnitude`.

    Args:
      actual: a pytree of arrays.
      desired: a pytree of NumPy float64 arrays from the oracle.
      dtype: the dtype of the result.
      n: the number of terms in the longest sum.
      magnitude: that of the terms summed, where it is not that of the result (a sum that cancels).
      ratio: |mean| / std of the data.
    """
    t = tol(dtype, n, ratio)
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    if magnitude is None:
        finite = desired[np.isfinite(desired)]
        magnitude = float(np.max(np.abs(finite), initial=0.0))
    chex.assert_trees_all_close(actual, desired, rtol=t["rtol"], atol=t["atol"] * magnitude)
