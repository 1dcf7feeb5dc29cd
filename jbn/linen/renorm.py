"""`BatchRenorm`: Batch Renormalization, with the arguments and variables of `BatchNorm`."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jbn import _flax, renorm
from jbn._core.deferral import advanced
from jbn.linen.batch_norm import BatchNorm, normalized
from jbn.linen.parts import inference_wanted


class BatchRenorm(BatchNorm):
    """Batch Renormalization: `jbn.renorm.batch_renorm` with the variables of `jbn.linen.BatchNorm`.

    `batch_stats` also has `steps`, the number of training steps, which the schedules take. `init`
    computes Batch Normalization and makes no step.

    >>> import jax, jax.numpy as jnp, jbn.linen
    >>> x = jnp.array([[1.0], [3.0]])
    >>> layer = jbn.linen.BatchRenorm(r_max=3, d_max=1.5)
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> print(y.round(3), new["batch_stats"]["steps"])
    [[0.5]
     [2.5]] 1

    Attributes:
      r_max: as for `jbn.renorm.batch_renorm`: a number, or a function of the number of steps. By
        default the paper's schedule.
      d_max: as r_max.
      warmup_steps: the number of steps of Batch Normalization before r_max and d_max are used.

    All other attributes are those of `jbn.linen.BatchNorm`.
    """

    r_max: float | Array | renorm.Schedule = renorm.R_MAX
    d_max: float | Array | renorm.Schedule = renorm.D_MAX
    warmup_steps: int = 0

    @nn.compact
    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Normalises x; in training also updates `batch_stats`.

        Arguments and result are those of `jbn.linen.BatchNorm`.
        """
        inference = inference_wanted(self, use_running_average)
        clips = renorm.Clips(self.r_max, self.d_max, self.warmup_steps)
        given = _flax.Given(x, mask, weights, residual)
        return renormalized(self, given, clips, inference=inference)


def renormalized(
    module: BatchNorm, given: _flax.Given, clips: renorm.Clips, *, inference: bool
) -> Array:
    """Normalises x, with the variables of the module and its number of steps."""
    if inference and not module.is_initializing():  # variables of `BatchNorm` are enough
        return normalized(module, given, inference=True)
    steps = module.variable("batch_stats", "steps", jnp.zeros, (), jnp.int32)
    by = functools.partial(renorm.train, clips, steps.value)
    y = normalized(module, given, inference=inference, by=by)
    if not module.is_initializing():
        steps.value = advanced(steps.value)
    return y
