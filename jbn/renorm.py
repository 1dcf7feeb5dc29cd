"""Batch Renormalization (Ioffe 2017, arXiv 1702.03275): training by almost the running statistics.

    r = clip(sigma_B / sigma, 1 / r_max, r_max)     sigma_B, mean_B: of the batch
    d = clip((mean_B - mean) / sigma, -d_max, d_max)    sigma, mean: running, before this batch
    y = scale ((x - mean_B) / sigma_B r + d) + bias

r and d are constants in the derivative; mean_B and sigma_B are not. With r_max = 1 and d_max = 0
this is Batch Normalization. The wider the clips, the closer y is to that of inference, in which
examples do not depend on each other.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from jbn._core import batch_norm as core
from jbn._core import check, running
from jbn._core.affine import Activation, expanded, location, where_data
from jbn._core.axes import integer
from jbn._core.deferral import advanced, is_waiting, number, read
from jbn._core.export import serializable
from jbn._core.moments import measure
from jbn._core.normalize import Params, normalized
from jbn._core.plan import Inputs, Spec, plan
from jbn._core.running import RunningStats, UpdateRule, ema
from jbn._core.shift import accumulator
from jbn._core.types import Moments, ShiftedMoments
from jbn._devices.named_axes import AxisName, scope
from jbn._xla.checkpoint import named
from jbn._xla.materialize import materialize

__all__ = [
    "RenormStats",
    "init_stats",
    "Schedule",
    "piecewise_linear",
    "R_MAX",
    "D_MAX",
    "batch_renorm",
    "batch_renorm_inference",
    "ema_of_std",
]

Schedule = Callable[[Array], ArrayLike]


class RenormStats(NamedTuple):
    """The running statistics of a layer, and its number of steps.

    Attributes:
      mean: [C], as in `jbn.RunningStats`.
      var: [C], as in `jbn.RunningStats`.
      count: [C], the number of batches that have entered, as in `jbn.RunningStats`.
      steps: [], int32: the number of training steps so far, which schedules of the clips take.
    """

    mean: Array
    var: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (of tuple.count)
    steps: Array

    @property
    def running(self) -> RunningStats:
        """The running statistics alone, as `jbn.batch_norm` takes them."""
        return RunningStats(self.mean, self.var, self.count)


serializable(RenormStats)


def init_stats(features: int | Sequence[int], dtype: DTypeLike = jnp.float32) -> RenormStats:
    """Makes mean 0, variance 1, count 0 and step 0; arguments and errors as for `jbn.init_stats`.

    For a layer that was trained by Batch Normalization, write
    `RenormStats(*stats, steps=jnp.int32(0))`.

    >>> from jbn import renorm
    >>> renorm.init_stats(2).steps
    Array(0, dtype=int32)
    """
    return RenormStats(*running.init_stats(features, dtype), jnp.zeros((), jnp.int32))


def piecewise_linear(steps: Sequence[float], values: Sequence[float]) -> Schedule:
    """Makes a schedule through the points (step, value), constant outside of them.

    >>> from jbn import renorm
    >>> r_max = renorm.piecewise_linear((5_000, 40_000), (1, 3))  # of the paper, also renorm.R_MAX
    >>> [float(r_max(step)) for step in (0, 5_000, 22_500, 40_000, 10**6)]
    [1.0, 1.0, 2.0, 3.0, 3.0]

    Args:
      steps: increasing numbers of steps >= 0.
      values: one finite number for each.

    Returns:
      A function of the number of steps. It is hashable, and equal to another schedule with the same
      points.

    Raises:
      ValueError: steps do not increase, or there are not as many values.
    """
    points = tuple(check.at_least("each of steps", step, 0) for step in _numbers("steps", steps))
    levels = tuple(_numbers("values", values))
    if len(points) != len(levels) or not points:
        raise ValueError(
            f"a schedule needs one value for each step; got {len(points)} steps and "
            f"{len(levels)} values: piecewise_linear((5_000, 40_000), (1, 3))."
        )
    if any(b <= a for a, b in itertools.pairwise(points)):
        raise ValueError(
            f"steps must increase; got {points}. For a jump write the next step: "
            f"piecewise_linear((999, 1_000), (1, 3)), or warmup_steps=1_000 of the layer."
        )
    return _PiecewiseLinear(points, levels)


@dataclasses.dataclass(frozen=True)
class _PiecewiseLinear:
    steps: tuple[float, ...]
    values: tuple[float, ...]

    def __repr__(self) -> str:
        return f"piecewise_linear({self.steps}, {self.values})"

    def __call__(self, steps: ArrayLike) -> Array:
        # A sum of ramps; jnp.interp (jax 0.12) would be some fifty operations and a loop.
        steps = jnp.asarray(steps, jnp.float32)
        value = jnp.asarray(self.values[0], jnp.float32)
        points = itertools.pairwise(zip(self.steps, self.values, strict=True))
        for (start, old), (end, new) in points:
            share = lax.clamp(0.0, (steps - start) / (end - start), 1.0)
            value = value + (new - old) * share
        return value


def _numbers(name: str, values: Any) -> list[float]:
    """Converts a sequence of finite numbers to a list."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = [np.nan]
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{name} of a schedule must be a sequence of finite numbers, such as (5_000, 40_000); "
            f"got {values!r}."
        )
    return numbers


R_MAX: Schedule = piecewise_linear((5_000, 40_000), (1, 3))  # section 4 of the paper
D_MAX: Schedule = piecewise_linear((5_000, 25_000), (0, 5))


def batch_renorm(
    x: ArrayLike,
    params: Params,
    stats: RenormStats,
    *,
    r_max: float | Array | Schedule = R_MAX,
    d_max: float | Array | Schedule = D_MAX,
    warmup_steps: int = 0,
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
) -> tuple[Array, RenormStats]:
    """Batch Renormalization in training (Algorithm 1 of arXiv 1702.03275).

        sigma_B = sqrt(var + epsilon)          mean, var of this batch
        sigma   = sqrt(stats.var + epsilon)    before this batch
        r       = clip(sigma_B / sigma, 1 / r_max, r_max)
        d       = clip((mean - stats.mean) / sigma, -d_max, d_max)
        y       = scale * ((x - mean) / sigma_B * r + d) + bias

    The derivative goes through mean and sigma_B, and takes r and d for constants.

    >>> import jax.numpy as jnp, jbn
    >>> from jbn import renorm
    >>> x = jnp.array([[1.0], [3.0]])
    >>> stats = renorm.init_stats(1)  # mean 0, variance 1
    >>> y, new = renorm.batch_renorm(x, jbn.init_params(1), stats, r_max=3, d_max=1.5)
    >>> print(y.round(3), new.steps)
    [[0.5]
     [2.5]] 1

    Args:
      x: as for `jbn.batch_norm`, as are all arguments that are not named here.
      params: scale and bias, [C] each.
      stats: the running statistics, and the number of steps so far.
      r_max: at least 1; infinity does not clip. Or a function of the number of steps, [] int32,
        such as `piecewise_linear(...)` or a schedule of Optax. By default the paper's: from 1 at
        step 5,000 to 3 at step 40,000. What is traced is not checked; below 1 it counts as 1.
      d_max: at least 0, as r_max. By default from 0 at step 5,000 to 5 at step 25,000.
      warmup_steps: before this step r_max is 1 and d_max is 0. CrossQ (Bhatt et al. 2024, arXiv
        1902.05605) takes r_max=3, d_max=5, warmup_steps=100_000, epsilon=1e-3.
      axis: the feature axis or axes, C.
      epsilon: is added to both variances, inside the root.
      update: how the batch enters the statistics: a rule of jbn, `ema_of_std(...)`, or any function
        (RunningStats, Moments) -> RunningStats.
      mask: False: the value takes no part in the statistics.
      weights: zero is the same as masked.
      axis_name: share statistics over these named axes.
      axis_index_groups: as in `jax.lax.psum`.
      groups: each of this many parts of the batch has an r and a d of its own.
      activation: an elementwise function of JAX.
      residual: of x's shape, is added before the activation.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, and the new statistics, which carry no gradient. `steps` increases by 1 in
      every step, so that schedules keep in time with that of the learning rate. mean, var and
      count do not change where a batch is empty or not finite, as for `jbn.batch_norm`. Without
      data, and where squares of x overflow, y is the bias. A masked value that is not finite gives
      scale d + bias. For complex x d_max limits the modulus of d.

    Raises:
      NameError: as for `jbn.batch_norm`.
      TypeError: stats are not RenormStats, a schedule is no function that JAX can trace, or as for
        `jbn.batch_norm`.
      ValueError: r_max < 1, d_max < 0 or warmup_steps < 0, also at one of some steps of a schedule;
        or as for `jbn.batch_norm`.

    With the numbers r_max = 1 and d_max = 0 it is `jbn.batch_norm`, bit for bit: the same program.
    Where a schedule or the warm-up gives 1 and 0, all is the same up to the last bits; on CPUs y
    and the statistics are the same bit for bit. With both infinite, y is that of
    `batch_renorm_inference` by the given statistics. The paper and Keras average the standard
    deviation: see `ema_of_std`.
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
    stats = _checked(stats)
    clips = Clips(r_max, d_max, warmup_steps)
    y, new = _step(x, spec, inputs, stats, clips, update)
    return y, RenormStats(*new, advanced(stats.steps))


def _step(
    x: Array, spec: Spec, inputs: Inputs, stats: RenormStats, clips: "Clips", update: UpdateRule
) -> tuple[Array, RunningStats]:
    """Computes y and the new statistics; fixed ones normalise as in `batch_norm`."""
    old = check.stats(read(stats.running), spec.axes, x, training=True)
    if core.fixed_statistics(spec, old, stats.running) is None:
        y, m = train(clips, stats.steps, spec, inputs, old)
    else:
        y, m = core.train(spec, inputs, old)
    return core.finish(x, spec, y, m, old, stats.running, update)


def batch_renorm_inference(
    x: ArrayLike, params: Params, stats: RenormStats | RunningStats, **options: Any
) -> Array:
    """Batch Renormalization at inference: `jbn.batch_norm_inference` by the running statistics.

        y = scale * (x - stats.mean) / sqrt(stats.var + epsilon) + bias

    >>> import jax.numpy as jnp, jbn
    >>> from jbn import renorm
    >>> stats = renorm.init_stats(1)._replace(mean=jnp.array([1.0]), var=jnp.array([4.0]))
    >>> renorm.batch_renorm_inference(jnp.array([[5.0]]), jbn.init_params(1), stats, epsilon=0)
    Array([[2.]], dtype=float32)

    Args:
      x: [..., C], floating point.
      params: scale and bias, [C] each.
      stats: the running statistics; or `stats.running`, without the number of steps.
      **options: the keyword arguments of `jbn.batch_norm_inference`: axis, epsilon, activation,
        residual, dtype.

    Returns:
      y, of x's shape.

    Raises:
      TypeError, ValueError: as for `jbn.batch_norm_inference`.
    """
    stats = stats.running if isinstance(stats, RenormStats) else stats
    return core.batch_norm_inference(x, params, stats, **options)


def ema_of_std(decay: float = 0.99, *, epsilon: float, debias: bool = False) -> UpdateRule:
    """Makes the rule that averages the standard deviation, as the paper and Keras do.

        sqrt(new.var + epsilon) = decay sqrt(old.var + epsilon) + (1 - decay) sqrt(var + epsilon)

    The state still holds a variance, so that inference needs no other formula. It is at most that
    of `jbn.ema`, because a mean of roots is at most the root of the mean.

    >>> import jax.numpy as jnp, jbn
    >>> from jbn import renorm
    >>> batch = jbn.Moments(count=jnp.float32(4), mean=jnp.array([1.0]), var=jnp.array([9.0]))
    >>> renorm.ema_of_std(0.5, epsilon=0)(jbn.init_stats(1), batch).var  # (0.5 * 1 + 0.5 * 3)^2
    Array([4.], dtype=float32)

    Args:
      decay: the weight of the old value, as for `jbn.ema`.
      epsilon: that of the layer.
      debias: as for `jbn.ema`.

    Returns:
      A rule for `update`. It is hashable, and equal to another rule with the same arguments.

    Raises:
      ValueError: decay is not in [0, 1], or is 1 with debias; or epsilon < 0.

    `BatchNormalization(renorm=True)` of Keras 2 has renorm_mean and renorm_stddev, which are `mean`
    and `sqrt(var + epsilon)` here. It starts them at 0 and 1, that is with var = 1 - epsilon.
    """
    return _EmaOfStd(check.decay(decay, debias), check.epsilon(epsilon), bool(debias))


@dataclasses.dataclass(frozen=True)
class _EmaOfStd:
    decay: float
    epsilon: float
    debias: bool

    def __repr__(self) -> str:
        return f"ema_of_std({self.decay}, epsilon={self.epsilon}, debias={self.debias})"

    def __call__(self, stats: RunningStats, moments: Moments) -> RunningStats:
        return running.absorb(self._moved, stats, moments)  # leaves unsound batches out

    def _moved(self, stats: RunningStats, moments: Moments) -> RunningStats:
        def std(var: Array) -> Array:
            return lax.sqrt(var + self.epsilon)

        rule = ema(self.decay, debias=self.debias)
        stats = stats._replace(var=std(stats.var))
        new = rule(stats, moments._replace(var=std(moments.var)))
        var = lax.square(new.var) - self.epsilon
        return new._replace(var=jnp.maximum(var, 0.0))  # rounding may make a small one negative


# The internal functions, also of the Flax modules.


class Clips(NamedTuple):
    """The limits of r and d, as the user gives them."""

    r_max: float | Array | Schedule
    d_max: float | Array | Schedule
    warmup_steps: int = 0

    def at(self, steps: Array, dtype: DTypeLike) -> tuple[Array, Array] | None:
        """Computes (r_max, d_max) at this step; None where they never are other than (1, 0)."""
        warmup = _steps(self.warmup_steps)
        limits = _limit("r_max", self.r_max, 1, steps), _limit("d_max", self.d_max, 0, steps)
        if all(isinstance(limit, float) for limit in limits) and limits == (1.0, 0.0):
            return None

        def chosen(limit: float | Array, least: int) -> Array:
            value, neutral = jnp.asarray(limit, dtype), jnp.asarray(least, dtype)
            return jnp.where((steps >= warmup) & (value >= neutral), value, neutral)  # not NaN

        return chosen(limits[0], 1), chosen(limits[1], 0)


def train(
    clips: Clips, steps: Array, spec: Spec, inputs: Inputs, old: RunningStats
) -> tuple[Array, Moments]:
    """Computes y, of the planned x's shape, and the moments of the batch, pooled over all groups.

    `old` and `steps`, which may be deferred, are those before this batch.
    """
    limits = clips.at(number(steps), jnp.finfo(accumulator(inputs.x.dtype)).dtype)
    return core.train(spec, inputs) if limits is None else _train(spec, inputs, old, *limits)


@functools.partial(jax.jit, static_argnums=0)  # an eager call runs one program
def _train(
    spec: Spec, inputs: Inputs, old: RunningStats, r_max: Array, d_max: Array
) -> tuple[Array, Moments]:
    m = named(measure(spec.of_moments, inputs.x, inputs.weights))
    r, d = lax.stop_gradient(correction(spec, m, old, r_max, d_max))
    if inputs.weights is not None:
        d = where_data(m.count, d)
    scale, bias = expanded(inputs.scale, inputs.bias, spec.axes, m.mean.dtype)
    scale, bias = scale.astype(m.mean.dtype), bias.astype(m.mean.dtype)
    # scale (r xhat + d) + bias, as one affine map of xhat. Stored, so that the pass over x compiles
    # as in Batch Normalization: else last bits of y differ where r = 1 and d = 0.
    scale, bias = materialize(scale * r.astype(scale.dtype), bias + scale * d)
    inputs = inputs._replace(scale=scale, bias=bias, measured=m)
    return normalized(spec, inputs, pooled=True)


def correction(
    spec: Spec, m: ShiftedMoments, old: RunningStats, r_max: Array, d_max: Array
) -> tuple[Array, Array]:
    """Computes r and d; r is 1 where xhat is 0, and d is 0 where squares of x overflow."""
    mean, var = (spec.axes.expand(v) for v in (old.mean, old.var))
    mean, rstd = location(mean.astype(m.mean.dtype), var.astype(m.var.dtype), spec.epsilon)
    _, own = location(m.mean, m.var, spec.epsilon)
    r = lax.real(rstd) / lax.real(own) if jnp.iscomplexobj(own) else rstd / own
    d = ((m.shift - mean) + m.mean) * rstd  # exact where the batch's mean is near the running one
    r = jnp.where(own == 0, 1.0, r)  # xhat is 0 there
    d = jnp.where(m.var == jnp.inf, 0.0, d)
    return jnp.clip(r, 1 / r_max, r_max), _clipped(d, d_max)


def _clipped(d: Array, d_max: Array) -> Array:
    """Limits the modulus of d, which for real d is clip(d, -d_max, d_max)."""
    if not jnp.iscomplexobj(d):
        return jnp.clip(d, -d_max, d_max)
    size = jnp.abs(d)
    return d * jnp.where(size > d_max, d_max / size, 1.0).astype(d.dtype)


def _steps(number: Any) -> int:
    """Converts a number of steps to an integer that int32 can hold."""
    steps = integer(number)
    if steps is None or steps < 0:
        raise ValueError(
            f"warmup_steps must be a whole number of steps >= 0, such as 100_000; got {number!r}."
        )
    return min(steps, np.iinfo(np.int32).max)


def _limit(name: str, given: float | Array | Schedule, least: int, steps: Array) -> float | Array:
    """Returns a number or the value of a schedule, checked as far as it is known while tracing."""
    if not callable(given):
        return check.at_least(name, given, least)
    _check_schedule(name, given, least)
    return _value(name, given, least, steps)


def _check_schedule(name: str, schedule: Schedule, least: int) -> None:
    """Calls a schedule at some steps, so that most errors are found while tracing."""
    if isinstance(schedule, _PiecewiseLinear):
        for step, value in zip(schedule.steps, schedule.values, strict=True):
            check.at_least(f"{name} at step {step:g}", value, least)
        return
    with jax.ensure_compile_time_eval():
        for step in (0, 1_000, 1_000_000):
            _value(f"{name} at step {step}", schedule, least, jnp.asarray(step, jnp.int32))


def _value(name: str, schedule: Schedule, least: int, steps: Array) -> float | Array:
    try:
        value = schedule(steps)
    except Exception as error:
        raise TypeError(
            f"{name.split()[0]} must be a number or a function of the number of steps, [] int32, "
            f"that JAX can trace, such as renorm.piecewise_linear((5_000, 40_000), (1, 3)); "
            f"{schedule!r} raised {type(error).__name__}: {error}. Write jnp.where for `if`."
        ) from error
    return check.at_least(name, value, least)


def _checked(stats: Any) -> RenormStats:
    """Checks that these are RenormStats with one number of steps."""
    if tuple(getattr(stats, "_fields", ())) != RenormStats._fields:
        raise TypeError(
            f"stats must be jbn.renorm.RenormStats(mean, var, count, steps), such as "
            f"jbn.renorm.init_stats(C); got {type(stats).__name__}. From jbn.RunningStats write "
            f"RenormStats(*stats, steps=jnp.int32(0))."
        )
    steps = check.array(number(stats.steps), "stats.steps")
    if steps.ndim or not jnp.issubdtype(steps.dtype, jnp.integer):
        raise TypeError(
            f"stats.steps must be one integer, such as jnp.int32(0); got {steps.dtype} of shape "
            f"{steps.shape}."
        )
    return stats if is_waiting(stats.steps) else stats._replace(steps=steps)
