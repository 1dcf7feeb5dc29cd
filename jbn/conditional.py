"""Conditional Batch Normalization: scale and bias come with the call, one for each example.

    y[n] = activation(scale[n] (x[n] - mean) / sqrt(var + epsilon) + bias[n] + residual[n])

Mean and variance are those of the whole batch, as in `jbn.batch_norm`, and so are the running
statistics. The learned part is outside: an embedding of the class (de Vries et al. 2017, arXiv
1707.00683; Dumoulin et al. 2017, arXiv 1610.07629), a projection of the noise vector (BigGAN,
Brock et al. 2019, arXiv 1809.11096), FiLM (Perez et al. 2018, arXiv 1709.07871), or for each place
of an image a convolution of its segmentation (SPADE, Park et al. 2019, arXiv 1903.07291).

One number per example and feature is a vector that broadcasts, as in the core, whose derivative
rule holds as it is. If scale or bias differ between the places of an example, they are as large as
x. Then the core normalises x without them, and what multiplies and adds to the result is
rematerialised, so that a backward pass keeps x, scale, bias and residual as they were given.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jbn._core import check
from jbn._core.affine import Activation, expanded, harmless, transform
from jbn._core.axes import Axes
from jbn._core.batch_norm import finish, fixed_statistics, infer, train
from jbn._core.deferral import read
from jbn._core.normalize import normalized
from jbn._core.plan import Inputs, Spec, plan, plan_inference
from jbn._core.running import RunningStats, UpdateRule, ema
from jbn._core.shift import accumulator, active
from jbn._core.types import Moments
from jbn._devices.named_axes import AxisName, scope
from jbn._devices.placement import alongside, divide
from jbn._sums.xla import XlaSums
from jbn._xla.checkpoint import checkpoint_policy
from jbn._xla.hints import recomputed

__all__ = ["conditional_batch_norm", "conditional_batch_norm_inference"]


def conditional_batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    stats: RunningStats,
    *,
    one_plus_scale: bool = False,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    update: UpdateRule = ema(0.99),
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    groups: int | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, RunningStats]:
    """Batch Normalization in training, with a scale and a bias for each example.

        y     = scale * (x - mean) / sqrt(var + epsilon) + bias,   mean, var of this batch
        y     = activation(y + residual)                           if given
        stats = update(stats, Moments(count, mean, var))

    >>> import jax.numpy as jnp, jbn
    >>> from jbn.conditional import conditional_batch_norm
    >>> x, scale = jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [5.0]])
    >>> y, stats = conditional_batch_norm(x, scale, None, jbn.init_stats(1))
    >>> print(y.round(3))
    [[-2.]
     [ 5.]]

    Args:
      x: [N, ..., C], floating point.
      scale: [N, C], one for each example, where N is the size of the first axis of x that is not a
        feature axis; or of x's rank, and broadcasts against x, such as [N, 1, 1, C], or [N, H, W,
        C] for one at each place; or [C], the same for all. None for 1. An array of x's rank always
        has x's axes: for x of [C, N] and axis=0 it is [C, N].
      bias: like `scale`; None for 0.
      stats: the running statistics so far, [C] each.
      one_plus_scale: multiply by 1 + scale, as SPADE and most code for FiLM and BigGAN do. The sum
        is not stored, and is exact in half precision, too.
      axis: the feature axis or axes, C.
      epsilon: is added to the variance, inside the root.
      update: how the batch enters the running statistics.
      mask: bool, of x's rank, broadcasts against x. False: the value takes no part in the
        statistics. It may be NaN, and so may its scale and bias, which then count as 0.
      weights: real and not negative, broadcasts like `mask`.
      axis_name: share statistics over these named axes (of vmap, pmap, shard_map) as well. Scale
        and bias are those of this instance.
      axis_index_groups: as in `jax.lax.psum`.
      groups: normalise each of this many equal, consecutive parts of the batch by statistics of its
        own.
      activation: an elementwise function of JAX, such as `jax.nn.relu`.
      residual: of x's shape, is added before the activation.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, and the updated statistics, both as from `jbn.batch_norm`. y is
      differentiable in x, scale, bias and residual to any order. A backward pass keeps no array of
      x's size but x and, where they have it, scale, bias and residual, each in its own dtype.

    Raises:
      NameError, TypeError: as `jbn.batch_norm`; TypeError also for a scale or bias that is not
        floating point, or complex for real x.
      ValueError: as `jbn.batch_norm`; scale or bias do not fit x's shape.
    """
    x = check.floating(x)
    spec, inputs = plan(
        x,
        (None, None),
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        weights=weights,
        over=scope(axis_name, axis_index_groups),
        groups=groups,
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    inputs = _conditioned(spec, inputs, x, scale, bias)
    old = check.stats(read(stats), spec.axes, x, training=True)
    fixed = fixed_statistics(spec, old, stats)
    y, m = _modulated(spec, bool(one_plus_scale), inputs, fixed)
    return finish(x, spec, y, m, old, stats, update)


def conditional_batch_norm_inference(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    stats: RunningStats,
    *,
    one_plus_scale: bool = False,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Conditional Batch Normalization at inference, by the running statistics.

        y = scale * (x - stats.mean) / sqrt(stats.var + epsilon) + bias
        y = activation(y + residual)    if given

    >>> import jax.numpy as jnp, jbn
    >>> from jbn.conditional import conditional_batch_norm_inference
    >>> x, bias = jnp.array([[1.0], [3.0]]), jnp.array([[10.0], [20.0]])
    >>> y = conditional_batch_norm_inference(x, None, bias, jbn.init_stats(1), epsilon=0)
    >>> print(y)
    [[11.]
     [23.]]

    Args:
      x: [..., C], floating point. A single example is fine.
      scale: as in training.
      bias: as in training.
      stats: the running statistics, [C] each, of any precision.
      one_plus_scale: as in training.
      axis: the feature axis or axes, C.
      epsilon: as in training.
      activation: as in training.
      residual: as in training.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, differentiable in x, scale, bias, residual and stats.

    Raises:
      TypeError, ValueError: as `jbn.batch_norm_inference`; scale or bias are not floating point, or
        do not fit x's shape.
    """
    x = check.floating(x)
    spec, inputs = plan_inference(
        x,
        (None, None),
        axis=axis,
        epsilon=epsilon,
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    inputs = _conditioned(spec, inputs, x, scale, bias)
    stats = check.stats(read(stats), spec.axes, x)
    return _by_statistics(spec, bool(one_plus_scale), inputs, stats)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _modulated(
    spec: Spec, one_plus_scale: bool, inputs: Inputs, given: RunningStats | None
) -> tuple[Array, Moments]:
    """Computes y, of the planned x's shape, and the moments of the batch, pooled over all groups.

    y is normalised by the moments of the batch or of its group, or by the statistics `given`.
    """
    if given is not None or _small(spec.axes, inputs):
        x, scale, bias, _ = _ready(spec, one_plus_scale, inputs)
        own = Inputs(x, scale, bias, inputs.weights, inputs.residual)
        return train(spec._replace(sums=XlaSums()), own, given)  # kernels take no such scale

    def run(inputs: Inputs) -> tuple[Array, Moments]:
        x, scale, bias, residual = _ready(spec, one_plus_scale, inputs)
        plain = spec._replace(activation=None, dtype=np.dtype(accumulator(x.dtype)))
        xhat, m = normalized(plain, Inputs(x, weights=inputs.weights), pooled=True)
        y = transform(xhat, scale, bias, residual)
        return (y if spec.activation is None else spec.activation(y)).astype(spec.dtype), m

    # The policy saves the moments: the backward pass computes y again, but no sum over the batch,
    # and it sends them to no device a second time.
    return jax.checkpoint(run, policy=checkpoint_policy, prevent_cse=False)(inputs)


def _small(axes: Axes, inputs: Inputs) -> bool:
    """Returns whether scale and bias are a few numbers for each example, and not of x's size."""
    given = [v.shape for v in (inputs.scale, inputs.bias) if v is not None]
    places = axes.reduction[1:] or axes.reduction
    return all(shape[i] == 1 for shape in given for i in places)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_statistics(spec: Spec, one_plus_scale: bool, inputs: Inputs, stats: RunningStats) -> Array:
    def run(inputs: Inputs, stats: RunningStats) -> Array:
        x, scale, bias, residual = _ready(spec, one_plus_scale, inputs)
        return infer(spec, Inputs(x, scale, bias, None, residual), stats)

    return recomputed(run)(inputs, stats)


def _ready(spec: Spec, one_plus_scale: bool, inputs: Inputs) -> tuple[Array, Any, Any, Any]:
    """Returns (x, scale, bias, residual): scale and bias in x's accumulator, as they are used.

    At masked positions they and the residual become 0 where they are not finite.
    """
    x, scale, bias, weights, residual, _ = inputs
    dtype, plus = accumulator(x.dtype), one_plus_scale and scale is not None
    if residual is not None:
        residual = harmless(residual, residual, weights)
    if weights is not None and _small(spec.axes, inputs):  # for each example, not for each place
        weights = jnp.any(active(weights), spec.axes.reduction[1:], keepdims=True)
    scale, bias = (v if v is None else harmless(v, v, weights) for v in (scale, bias))
    scale, bias = (v.astype(dtype) for v in expanded(scale, bias, spec.axes, dtype))
    return x, scale + np.asarray(1, dtype) if plus else scale, bias, residual


def _conditioned(
    spec: Spec, inputs: Inputs, x: Array, scale: ArrayLike | None, bias: ArrayLike | None
) -> Inputs:
    """Adds scale and bias to the inputs, with the axes of the planned x."""
    axes = spec.axes.whole
    found = {"scale": _fitting("scale", scale, axes), "bias": _fitting("bias", bias, axes)}
    check.output_dtype(spec.dtype, x, **found)
    for name, values in found.items():
        if values is not None:
            found[name] = divide(alongside(values, x), spec.axes)
    return inputs._replace(**found)


def _fitting(name: str, values: ArrayLike | None, axes: Axes) -> Array | None:
    """Checks scale or bias, and gives it x's rank."""
    if values is None:
        return None
    values = check.floating(values, name)
    shape, ndim = axes.shape, len(axes.shape)
    if values.ndim == ndim and _broadcasts(values.shape, shape):
        return values
    if values.shape == axes.feature_shape:
        return axes.expand(values)
    first = axes.reduction[:1]
    rows = tuple(shape[i] for i in (*first, *axes.features))
    if values.ndim == len(rows) < ndim and _broadcasts(values.shape, rows):
        return axes.expand_examples(values)
    each = tuple(n if i in (*first, *axes.features) else 1 for i, n in enumerate(shape))
    features = ", ".join(map(str, axes.features))
    examples = f"{rows}, a row for each example, " if len(rows) < ndim else ""
    raise ValueError(
        f"{name} of shape {values.shape} does not fit x of shape {shape} with the feature axis "
        f"{features}. It has the shape {examples}or x's rank and broadcasts against x, such as "
        f"{each}, or {axes.feature_shape} for the same in all examples."
    )


def _broadcasts(shape: Sequence[int], against: Sequence[int]) -> bool:
    return all(n in (1, m) for n, m in zip(shape, against, strict=True))
