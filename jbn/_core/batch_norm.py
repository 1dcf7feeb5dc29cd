"""The composition of all parts: batch_norm for training, batch_norm_inference for inference."""

import functools
from collections.abc import Sequence

import jax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jbn._core import check
from jbn._core.affine import Activation, expanded, location, transform
from jbn._core.deferral import absorb, fixed, read, waits
from jbn._core.moments import measure
from jbn._core.normalize import Params, normalized
from jbn._core.plan import Inputs, Spec, plan, plan_inference
from jbn._core.pooling import restore_pooled
from jbn._core.running import RunningStats, UpdateRule, ema
from jbn._core.shift import accumulator
from jbn._core.types import Moments
from jbn._devices.named_axes import AxisName, scope
from jbn._devices.placement import join
from jbn._xla.hints import recomputed


def batch_norm(
    x: ArrayLike,
    params: Params,
    stats: RunningStats,
    *,
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
    """Batch Normalization in training: by the batch's own statistics (Alg. 1).

        y     = scale * (x - mean) / sqrt(var + epsilon) + bias,   mean, var of this batch
        y     = activation(y + residual)                           if given
        stats = update(stats, Moments(count, mean, var))

    Before a nonlinearity, as in section 3.2: `batch_norm(conv(x), ..., activation=jax.nn.relu)`,
    with no bias in the convolution.

    >>> import jax.numpy as jnp, jbn
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, stats = jbn.batch_norm(x, jbn.init_params(2), jbn.init_stats(2), update=jbn.ema(0.5))
    >>> print(y.round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(stats.mean, stats.var)
    [ 1. 10.] [ 1.  50.5]

    Args:
      x: [N, ..., C], floating point. Half precision is reduced in float32.
      params: scale and bias, [C] each.
      stats: the running statistics so far, [C] each, in float32 or float64; the mean is complex for
        complex x.
      axis: the feature axis or axes, C; statistics are taken over all other axes, so for images
        [N, H, W, C] over examples and locations (section 3.2).
      epsilon: is added to the variance, inside the root.
      update: how the batch enters the running statistics: `ema`, `cumulative`, or any function
        (RunningStats, Moments) -> RunningStats.
      mask: bool, of x's rank, broadcasts against x. False: the value takes no part in the
        statistics, and is normalised by those of the other values, as in Flax. It may be NaN: where
        it is not finite, y is the bias.
      weights: real and not negative, broadcasts like `mask`. Zero is the same as masked; a
        negative or NaN weight counts as zero.
      axis_name: share statistics over these named axes (of vmap, pmap, shard_map). Under `jit`
        with sharded arrays leave it out: x is the global array there.
      axis_index_groups: as in `jax.lax.psum`.
      groups: normalise each of this many equal, consecutive parts of the batch by statistics of its
        own ("ghost" batches). The running statistics take in those of the whole batch: the mean of
        all values, and the variance within and between the groups.
      activation: an elementwise function of JAX, such as `jax.nn.relu`; not softmax.
      residual: of x's shape, is added before the activation, as at the end of a residual block.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, and the updated statistics, of the types of `stats`. Statistics carry no
      gradient. A feature in which the batch has no data, or a NaN or infinity, keeps its old
      statistics; a NaN makes y NaN in the whole feature, an infinity only in its place. A feature
      whose new statistics would be infinite in the dtype of `stats` also keeps its old ones. If a
      mask leaves a single value (count 1, variance 0), its mean enters, but the old variance stays,
      and the batch is not counted. Where squares of x overflow, y is the bias. For activation and
      residual together one array is saved for backward: the residual, or y if the activation is
      `jax.nn.relu`. No mask and no sum is saved.

    Raises:
      NameError: no vmap, pmap or shard_map binds axis_name.
      TypeError: x or residual is not floating point, dtype cannot hold y, mask is not bool,
        activation is no function of JAX, stats are narrower than float32, or an argument is of
        another kind, or traced where it must be static.
      ValueError: axis, params, stats, mask, weights, groups or residual do not fit x's shape;
        epsilon < 0; activation changes the shape or mixes elements; x has one value per feature;
        or, in a shard_map with check_vma, device-varying statistics would be taken for replicated
        ones.

    PyTorch's `momentum` is 1 - decay, and its running variance is the unbiased one:
    `update=jbn.ema(0.9, unbiased=True)` is its default. Flax's default is `update=jbn.ema(0.99)`.
    """
    x = check.floating(x)
    spec, inputs = plan(
        x,
        check.params(params),
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
    old = check.stats(read(stats), spec.axes, x, training=True)
    y, m = train(spec, inputs, fixed_statistics(spec, old, stats))
    return finish(x, spec, y, m, old, stats, update)


def batch_norm_inference(
    x: ArrayLike,
    params: Params,
    stats: RunningStats,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Batch Normalization at inference: by the running statistics (Alg. 2, line 11).

        y = scale * (x - stats.mean) / sqrt(stats.var + epsilon) + bias
        y = activation(y + residual)    if given

    >>> import jax.numpy as jnp, jbn
    >>> stats = jbn.init_stats(1)._replace(mean=jnp.array([1.0]), var=jnp.array([4.0]))
    >>> jbn.batch_norm_inference(jnp.array([[5.0]]), jbn.init_params(1), stats, epsilon=0)
    Array([[2.]], dtype=float32)

    Args:
      x: [..., C], floating point. A single example is fine.
      params: scale and bias, [C] each.
      stats: the running statistics, [C] each, of any precision.
      axis: the feature axis or axes, C.
      epsilon: as in training.
      activation: as in training.
      residual: as in training.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, by one affine map per feature. It is differentiable in x, params and stats;
      for x in 32 or 64 bits and without `activation` by jax.experimental.jet as well.

    Raises:
      TypeError: x or residual is not floating point, dtype cannot hold y, activation is no function
        of JAX, or an argument is of another kind.
      ValueError: axis, params, stats or residual do not fit x's shape, epsilon < 0, or activation
        changes the shape or mixes elements.
    """
    x = check.floating(x)
    spec, inputs = plan_inference(
        x,
        check.params(params),
        axis=axis,
        epsilon=epsilon,
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    return infer(spec, inputs, check.stats(read(stats), spec.axes, x))


def train(spec: Spec, inputs: Inputs, given: RunningStats | None = None) -> tuple[Array, Moments]:
    """Computes y, of the planned x's shape, and the moments of the batch, pooled over all groups.

    y is normalised by the moments of the batch or of its group, or by the statistics `given`.
    """
    if given is None:
        return normalized(spec, inputs, pooled=True)
    check.same_field(given, inputs.x, training=False)
    m = jax.lax.stop_gradient(measure(spec.of_moments, inputs.x, inputs.weights))
    moments = restore_pooled(m, spec.axes, counts_differ=inputs.weights is not None)
    return infer(spec, inputs, given), moments


def fixed_statistics(spec: Spec, old: RunningStats, stats: RunningStats) -> RunningStats | None:
    """Returns `old`, the arrays of `stats`, if a layer normalises by them in training, too.

    Otherwise None, and the batch must have several values.
    """
    if fixed(stats):
        return old
    if not spec.over.names:
        check.several_values(spec.axes)
    return None


def finish(
    x: Array,
    spec: Spec,
    y: Array,
    m: Moments,
    old: RunningStats,
    stats: RunningStats,
    update: UpdateRule,
) -> tuple[Array, RunningStats]:
    """Returns y in x's shape, and the new statistics.

    Args:
      x: as the user gave it.
      spec: of the planned x.
      y: of the planned x's shape.
      m: the moments of the batch.
      old: the arrays of `stats`, checked.
      stats: as the user gave them.
      update: the rule.
    """
    if not waits(stats):
        check.as_replicated_as(old.mean, m.mean)
    return join(y, x, spec.axes), absorb(update, old, m, given=stats, over=spec.over)


def infer(spec: Spec, inputs: Inputs, stats: RunningStats) -> Array:
    """Computes y, of the planned x's shape, normalised by `stats`."""
    x, scale, bias, _, residual, _ = inputs
    return _infer(spec, x, stats.mean, stats.var, scale, bias, residual)


@functools.partial(jax.jit, static_argnums=0)
def _infer(spec: Spec, x, mean, var, scale, bias, residual) -> Array:
    def run(x, mean, var, scale, bias, residual):
        x = x.astype(accumulator(x.dtype))
        var = var.astype(accumulator(var.dtype))  # epsilon may be none of float16
        mean, rstd = location(mean.astype(x.dtype), var, spec.epsilon)
        y = transform(x - mean, scale.astype(x.dtype) * rstd, bias.astype(x.dtype), residual)
        return (y if spec.activation is None else spec.activation(y)).astype(spec.dtype)

    scale, bias = expanded(scale, bias, spec.axes, accumulator(x.dtype))
    if x.dtype != accumulator(x.dtype) or spec.activation is not None:
        # x is saved for backward in x's dtype, and not the activation's input. In all other cases
        # this gains nothing, and jax.experimental.jet does not support jax.checkpoint.
        run = recomputed(run)
    return run(x, spec.axes.expand(mean), spec.axes.expand(var), scale, bias, residual)
