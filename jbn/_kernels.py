"""Which kernel takes the sums over the batch: XLA's own, unless another was enabled and fits.

A kernel is an object with `usable`, `sums`, `pair` and `spread`, such as the module
`jbn.native`, whose documentation says what they compute.
"""

from typing import Any

from jax import Array

from jbn._axes import Axes

_kernel: Any = None


def use(kernel: Any) -> None:
    """From now on `kernel`, where it fits; None for XLA's own everywhere."""
    global _kernel
    _kernel = kernel


def suited(axes: Axes, x: Array, weights: Array | None, named_axes: tuple) -> Any:
    """The kernel for the sums over all axes of x but the last; None for XLA's."""
    plain = axes.features == (len(axes.shape) - 1,) and axes.group is None and weights is None
    if _kernel is None or not plain or named_axes or 0 in x.shape or not _kernel.usable(x):
        return None
    return _kernel
