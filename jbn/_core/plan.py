"""Arguments -> (Spec, Inputs): all checks of x, y, scale, bias, mask and groups.

`Spec` holds the static configuration, and is the key of JAX's caches; `Inputs` holds the arrays.
The functions that take these two check nothing again. The caller has converted x by
`check.floating`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jbn._core import check
from jbn._core.affine import Activation
from jbn._core.axes import Axes, resolve
from jbn._core.shift import accumulator
from jbn._core.types import ShiftedMoments
from jbn._devices import placement
from jbn._devices.named_axes import Scope
from jbn._sums.choose import choose
from jbn._sums.protocol import Batch, Sums
from jbn._sums.xla import XlaSums


class Spec(NamedTuple):
    """The static part of one call: hashable, and equal for calls that run the same program.

    Attributes:
      axes: the axes of x, with an axis for the groups if there are any.
      over: the program instances that share statistics.
      sums: the implementation of the sums over the batch.
      epsilon: is added to the variance.
      activation: is applied to y; or None.
      dtype: of y.
    """

    axes: Axes
    over: Scope = Scope()
    sums: Sums = XlaSums()
    epsilon: float = 0.0
    activation: Activation | None = None
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def of_moments(self) -> "Spec":
        """The part that moments depend on; layers with the same part share the program."""
        return Spec(self.axes, self.over, self.sums)


class Inputs(NamedTuple):
    """The arrays of one call.

    Attributes:
      x: [N, ..., C], or with groups [groups, N / groups, ..., C].
      scale: [C], or None for 1.
      bias: [C], or None for 0.
      weights: of x's rank, broadcast against x: bool, or real and not negative; None for 1.
      residual: of x's shape, or None.
      measured: the moments of x if the caller has measured them, else None. Then scale and bias may
        have their shape, (1, ..., C), one number for each group if there are groups.
    """

    x: Array
    scale: Array | None = None
    bias: Array | None = None
    weights: Array | None = None
    residual: Array | None = None
    measured: ShiftedMoments | None = None


def plan_moments(
    x: Array,
    *,
    axis: int | Sequence[int],
    over: Scope,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    groups: int | None,
) -> tuple[Spec, Inputs]:
    """Checks the arguments of `moments`; with groups, x and weights get an axis of groups."""
    axes = resolve(x.shape, axis)
    check.reduction_axis(axes, over.names)
    weights = check.participation(axes, mask, weights, accumulator(x.dtype))
    weights = None if weights is None else placement.alongside(weights, x)
    if groups is None:
        return Spec(axes, over, choose(Batch(axes, x, weights), over)), Inputs(x, weights=weights)
    split = axes.split(check.groups(groups, axes))
    x = placement.divide(x, split)
    weights = None if weights is None else placement.divide(weights, split)
    return Spec(split, over), Inputs(x, weights=weights)


def plan(
    x: Array,
    params: tuple[ArrayLike | None, ArrayLike | None],
    *,
    axis: int | Sequence[int],
    over: Scope,
    mask: ArrayLike | None,
    weights: ArrayLike | None,
    groups: int | None,
    **affine: Any,
) -> tuple[Spec, Inputs]:
    """Checks the arguments of `normalize`; `affine` are those of `plan_inference`."""
    spec, inputs = plan_moments(x, axis=axis, over=over, mask=mask, weights=weights, groups=groups)
    return _with_affine(spec, inputs, x, params, **affine)


def plan_inference(
    x: Array,
    params: tuple[ArrayLike | None, ArrayLike | None],
    *,
    axis: int | Sequence[int],
    **affine: Any,
) -> tuple[Spec, Inputs]:
    """Checks the arguments of `batch_norm_inference`; `affine` goes to `_with_affine`."""
    return _with_affine(Spec(resolve(x.shape, axis)), Inputs(x), x, params, **affine)


def _with_affine(
    spec: Spec,
    inputs: Inputs,
    x: Array,
    params: tuple[ArrayLike | None, ArrayLike | None],
    *,
    epsilon: float,
    activation: Activation | None,
    residual: ArrayLike | None,
    dtype: DTypeLike | None,
) -> tuple[Spec, Inputs]:
    axes, (scale, bias) = spec.axes, params
    activation = check.activation(activation, inputs.x.shape, accumulator(x.dtype))
    residual = check.residual(residual, x)
    scale = None if scale is None else check.features("scale", scale, axes)
    bias = None if bias is None else check.features("bias", bias, axes)
    dtype = check.output_dtype(dtype, x, scale=scale, bias=bias, residual=residual)
    if residual is not None:
        residual = placement.divide(residual, axes)
    spec = spec._replace(epsilon=check.epsilon(epsilon), activation=activation, dtype=dtype)
    return spec, inputs._replace(scale=scale, bias=bias, residual=residual)
