"""RunningStats, the statistics for inference, and the rules by which batches enter them.

A rule is any function (RunningStats, Moments) -> RunningStats. The built-in ones move the old
statistics towards the batch's by a rate,

    ema(d)                  rate = 1 - d
    ema(d, debias=True)     rate = (1 - d) / (1 - d^t)      the t-th batch
    cumulative()            rate = 1 / t

The debiased average is stored ready to use: its first rate is 1, so the initial value never shows,
and it equals Adam's division of a zero-initialised average by 1 - d^t.

A variance needs two values. If a mask leaves a single value of a feature, this value moves the
mean, and the variance stays.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import DTypeLike

from jbn._core import check
from jbn._core.shift import accumulator
from jbn._core.types import Moments
from jbn._devices.placement import is_explicitly_sharded


class RunningStats(NamedTuple):
    """The statistics of the batches seen so far (the moving averages of Alg. 2 and section 3.1).

    Attributes:
      mean: [C], float32 or float64 (complex for complex x).
      var: [C], float32 or float64.
      count: [C], float32 or float64: the number of batches that have entered the variance of each
        feature. A batch without data or with NaN in a feature does not count there. A single value
        does not count either, because it moves only the mean.
    """

    mean: Array
    var: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (of tuple.count)


UpdateRule = Callable[[RunningStats, Moments], RunningStats]


def init_stats(features: int | Sequence[int], dtype: DTypeLike = jnp.float32) -> RunningStats:
    """Makes mean 0, variance 1 and count 0 for `features` features (a tuple for several axes).

    >>> import jbn
    >>> stats = jbn.init_stats(2)
    >>> print(stats.mean, stats.var, stats.count)
    [0. 0.] [1. 1.] [0. 0.]

    Args:
      features: C.
      dtype: of the mean: float32 or float64, and for complex x complex64 or complex128; variance
        and count are of its real part.

    Raises:
      TypeError: dtype is not floating point, or narrower than float32.
    """
    dtype, features = check.stats_dtype(dtype), check.number_of_features(features)
    real = jnp.finfo(dtype).dtype
    return RunningStats(
        jnp.zeros(features, dtype), jnp.ones(features, real), jnp.zeros(features, real)
    )


def ema(decay: float = 0.99, *, debias: bool = False, unbiased: bool = False) -> UpdateRule:
    """Makes the rule of an exponential moving average, new = decay * old + (1 - decay) * batch.

    `decay` is the weight of the old value: Flax's `momentum`, 1 minus PyTorch's.

    >>> import jax.numpy as jnp, jbn
    >>> batch = jbn.Moments(count=jnp.float32(4), mean=jnp.array([1.0]), var=jnp.array([3.0]))
    >>> jbn.ema(0.9)(jbn.init_stats(1), batch).var  # 0.9 * 1 + 0.1 * 3
    Array([1.2], dtype=float32)
    >>> jbn.ema(0.9, debias=True)(jbn.init_stats(1), batch).var
    Array([3.], dtype=float32)

    Args:
      decay: in [0, 1]; a traced decay is not checked. A schedule needs only one program, which has
        the decay as an argument.
      debias: divide out the weight of the initial value, as Adam and Haiku do: constant batches
        give exactly their statistics from the first step on.
      unbiased: average var * count / (count - 1) (Alg. 2, line 10), as PyTorch does. Weights are
        frequencies here: a weight says how often its value occurs, and the count is the number of
        observations. A batch with a count below 1.5, which is fewer than two observations up to
        rounding, has no such estimate and is left out.

    Returns:
      A rule. It is hashable, and equal to another rule with the same arguments.

    Raises:
      ValueError: decay is not in [0, 1], or is 1 with debias.
    """
    return _Ema(check.decay(decay, debias), bool(debias), bool(unbiased))


def cumulative(*, unbiased: bool = False) -> UpdateRule:
    """Makes the rule of the plain average, with equal weights (PyTorch's `momentum=None`).

    >>> import jax.numpy as jnp, jbn
    >>> stats = jbn.init_stats(1)
    >>> for x in [[1.0], [3.0]], [[5.0], [7.0]]:
    ...     stats = jbn.cumulative()(stats, jbn.moments(jnp.array(x)))
    >>> stats.mean
    Array([4.], dtype=float32)

    Args:
      unbiased: as for `ema`.

    Returns:
      A rule. It is hashable, and equal to another rule with the same arguments.
    """
    return _Cumulative(bool(unbiased))


@dataclasses.dataclass(frozen=True)
class _Ema:
    decay: float
    debias: bool
    unbiased: bool
    single_values: bool = False  # whether the variance of a single value, 0, enters as in Flax

    def __repr__(self) -> str:
        return f"ema({self.decay}, debias={self.debias}, unbiased={self.unbiased})"

    def __call__(self, stats: RunningStats, moments: Moments) -> RunningStats:
        return self.form(stats, moments, *self.numbers)

    @property
    def form(self) -> "_EmaForm":
        """The rule without its decay."""
        return _EmaForm(self.debias, self.unbiased, self.single_values)

    @property
    def numbers(self) -> tuple[float | Array, float | Array]:
        """The numbers (1 - d, log d), in double precision if d is a Python number."""
        decay = self.decay
        if isinstance(decay, Array):  # traced; statistics carry no gradient
            decay = lax.stop_gradient(decay)
            return 1 - decay, jnp.log(decay)
        return 1 - decay, math.log(decay) if decay > 0 else -math.inf


@dataclasses.dataclass(frozen=True)
class _EmaForm:
    """An exponential moving average that takes its decay as an argument of each call."""

    debias: bool
    unbiased: bool
    single_values: bool

    def __call__(
        self,
        stats: RunningStats,
        moments: Moments,
        rate: float | Array,
        log_decay: float | Array,
    ) -> RunningStats:
        if self.debias:
            # 1 - d^t as -expm1(t log d), which keeps its digits for d close to 1.
            t = (stats.count + 1).astype(accumulator(stats.var.dtype))
            rate, log_decay = jnp.asarray(rate, t.dtype), jnp.asarray(log_decay, t.dtype)
            rate = jnp.where(t > 1, rate / -jnp.expm1(t * log_decay), jnp.ones_like(t))
        return _move(stats, moments, rate, self.unbiased, self.single_values)


def ema_of_flax(decay: float) -> UpdateRule:
    """Makes `ema(decay)` as in Flax: the variance of a single value, 0, enters too."""
    return _Ema(check.decay(decay, False), debias=False, unbiased=False, single_values=True)


@dataclasses.dataclass(frozen=True)
class _Cumulative:
    unbiased: bool

    def __repr__(self) -> str:
        return f"cumulative(unbiased={self.unbiased})"

    def __call__(self, stats: RunningStats, moments: Moments) -> RunningStats:
        return _move(stats, moments, 1 / (stats.count + 1), self.unbiased)


def absorb(rule: UpdateRule, stats: RunningStats, moments: Moments) -> RunningStats:
    """Applies `rule` safely: no gradient, no change of type, no empty or non-finite batch.

    The moments must not carry a gradient.

    Raises:
      TypeError: `rule` is not a rule, does not return RunningStats, or returns complex statistics
        in place of real ones.
      ValueError: `rule` returns statistics of another shape.
    """
    if rule is ema or rule is cumulative:
        raise TypeError(f"update is the function that makes a rule: write jbn.{rule.__name__}().")
    if not callable(rule):
        raise TypeError(
            f"update must be a rule (RunningStats, Moments) -> RunningStats, such as "
            f"jbn.ema(0.99) or jbn.cumulative(); got {rule!r}."
        )
    stats = lax.stop_gradient(stats)
    if is_explicitly_sharded(moments.mean):  # over features: the statistics get this sharding
        where = jax.typeof(moments.mean).sharding
        stats = jax.tree.map(lambda values: jax.sharding.reshard(values, where), stats)
    if isinstance(rule, _Ema | _Cumulative):
        constant = not isinstance(getattr(rule, "decay", 0.0), Array)
        if constant and isinstance(moments.mean, Tracer):  # constants make a shorter program
            return _absorb_once_a_shape(rule, stats, moments)
        function, numbers = split(rule)
        return _absorb_once_a_shape(function, stats, moments, *numbers)
    new = rule(stats, moments)
    if not isinstance(new, type(stats)):
        raise TypeError(
            f"the update rule {rule!r} must return jbn.RunningStats(mean, var, count); "
            f"got {type(new).__name__}."
        )
    fields = new._asdict().items()
    new = new._replace(**{f: lax.stop_gradient(jnp.asarray(v)) for f, v in fields})
    for field, value in new._asdict().items():
        if jnp.iscomplexobj(value) and not jnp.iscomplexobj(getattr(stats, field)):
            raise TypeError(
                f"the update rule {rule!r} returned {field} in {value.dtype}, and its imaginary "
                f"part would be lost; expected {getattr(stats, field).dtype}."
            )
        if value.shape not in ((), getattr(stats, field).shape):
            raise ValueError(
                f"the update rule {rule!r} returned {field} of shape {value.shape}; "
                f"expected {getattr(stats, field).shape}."
            )
    return _keep_sound(stats, moments, new, seen=moments)


def for_sets(rule: UpdateRule) -> UpdateRule:
    """Makes the rule for several sets, [sets, C], that applies `rule` to each of them.

    An average does so already, because it treats each number by itself.
    """
    own = isinstance(rule, _Ema | _Cumulative) or rule is ema or rule is cumulative
    return rule if own or not callable(rule) else _ForSets(rule)


@dataclasses.dataclass(frozen=True)
class _ForSets:
    rule: UpdateRule

    def __call__(self, stats: RunningStats, moments: Moments) -> RunningStats:
        return jax.vmap(functools.partial(absorb, self.rule))(stats, moments)


def split(rule: UpdateRule) -> tuple[Callable[..., RunningStats], tuple[Any, ...]]:
    """Splits a rule, so that rule(stats, moments) = function(stats, moments, *numbers).

    The decay of an average is one of the numbers. So a schedule needs only one program, and no
    traced value becomes static.
    """
    return (rule.form, rule.numbers) if isinstance(rule, _Ema) else (rule, ())


@functools.partial(jax.jit, static_argnums=0)
def _absorb_once_a_shape(function, stats: RunningStats, moments: Moments, *numbers) -> RunningStats:
    return function(stats, moments, *numbers)


def _move(
    stats: RunningStats,
    moments: Moments,
    rate: float | Array,
    unbiased: bool,
    single_values: bool = False,
) -> RunningStats:
    """Moves the old statistics towards the batch's by `rate`."""

    def step(old: Array, new: Array) -> Array:
        dtype = accumulator(old.dtype)  # in bfloat16 a rate of 0.001 would move nothing
        old, new = old.astype(dtype), new.astype(dtype)
        moved = lax.add(old, lax.mul(jnp.asarray(rate, dtype), lax.sub(new, old)))
        # At rate 1 take exactly the new value: old + (new - old) would round.
        if isinstance(rate, float | int):
            return new if np.asarray(rate, dtype) == 1 else moved
        return jnp.where(jnp.asarray(rate, dtype) == 1, new, moved)

    var = unbiased_var(moments) if unbiased else moments.var
    mean, var = step(stats.mean, moments.mean), step(stats.var, var)
    new = stats._replace(mean=mean, var=var, count=stats.count + 1)
    return _keep_sound(stats, moments, new, single_values)


# A count below this means fewer than two observations. Weights that were divided by their sum add
# up to 1 - 1e-7 or to 1 + 1e-7 after rounding, and both must give the same result.
_FEW = 1.5


def unbiased_var(moments: Moments) -> Array:
    """Applies Bessel's correction, var * count / (count - 1); infinite where there is none.

    Weights are frequencies: a weight says how often its value occurs, so that the count is the
    number of observations (`fweights` of `numpy.cov`). Where there are fewer than two of them, up
    to rounding, there is no unbiased variance. The factor is at most 3.
    """
    n = moments.count
    several = n >= _FEW
    bessel = n / jnp.where(several, n - 1, jnp.ones_like(n))
    return jnp.where(several, moments.var * bessel, jnp.inf)


def _keep_sound(
    old: RunningStats,
    moments: Moments,
    new: RunningStats,
    single_values: bool = False,
    seen: Sequence[Array] = (),
) -> RunningStats:
    """Chooses `new` where the batch has data and all is finite, else `old`, for each feature.

    `new` must be finite in the dtype of `old`: 1e5 is infinite in float16, and would stay so.
    Where `var` is a covariance, [..., s, s], its s features enter together or not at all.

    A single value moves only the mean, unless `single_values`. Its variance is exactly 0 (the shift
    is the value itself) and its count 1. Many values whose weights add up to 1 have a variance,
    which enters. If they are all equal, it is 0, and they count as a single value.

    `seen` must be finite too. A user's rule may make finite statistics of moments that are not
    finite, so its moments are checked; the rules of jbn never do.
    """
    stored = RunningStats(*(jnp.asarray(n).astype(o.dtype) for n, o in zip(new, old, strict=True)))
    new = stored
    if old.var.shape != old.mean.shape:
        new = jax.tree.map(lambda n, o: jnp.broadcast_to(n, o.shape), stored, old)
        stored, moments = _of_groups(new), _of_groups(moments)
        seen = moments if seen else ()
    sound = lax.ge(stored.var, np.asarray(0, stored.var.dtype))
    for values in (*seen, *stored):
        is_finite = lax.is_finite if jnp.issubdtype(values.dtype, jnp.floating) else jnp.isfinite
        sound = lax.bitwise_and(sound, is_finite(values))
    sound = lax.bitwise_and(sound, moments.count > 0)
    spread = sound if single_values else sound & ~((moments.var == 0) & (moments.count < _FEW))

    chosen = (
        lax.select(jnp.broadcast_to(where, o.shape), jnp.broadcast_to(n, o.shape), o)
        for where, n, o in zip((sound, spread, spread), new, old, strict=True)
    )
    return old._make(chosen)


def _of_groups(values: Any) -> Any:
    """Returns one number for each group of features, [..., 1, 1], in each field.

    It is finite where all are, and 0 where all are; in `var` it is negative if a variance is.
    """

    def largest(v: Array) -> Array:
        return jnp.max(jnp.abs(v), (-2, -1), keepdims=True)

    least = jnp.min(jnp.diagonal(values.var, axis1=-2, axis2=-1), -1)[..., None, None]
    var = jnp.where(least < 0, least, largest(values.var))
    count = largest(jnp.broadcast_to(values.count, values.mean.shape))
    return values._replace(mean=largest(values.mean), var=var, count=count)
