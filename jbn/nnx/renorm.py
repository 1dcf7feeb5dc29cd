"""`BatchRenorm`: Batch Renormalization, with the arguments and variables of `BatchNorm`."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jbn import _flax, renorm
from jbn._core.deferral import advanced
from jbn._core.plan import Inputs, Spec
from jbn._core.running import RunningStats
from jbn._core.types import Moments
from jbn.nnx.batch_norm import BatchNorm
from jbn.nnx.parts import store


class BatchRenorm(BatchNorm):
    """Batch Renormalization: `jbn.renorm.batch_renorm` with the variables of `jbn.nnx.BatchNorm`.

    A further `nnx.BatchStat`, `steps`, is the number of training steps, which the schedules take.

    >>> import jax.numpy as jnp, jbn.nnx
    >>> from flax import nnx
    >>> layer = jbn.nnx.BatchRenorm(1, r_max=3, d_max=1.5, rngs=nnx.Rngs(0))
    >>> print(layer(jnp.array([[1.0], [3.0]])).round(3), layer.steps[...])
    [[0.5]
     [2.5]] 1

    Args:
      num_features: C, the size of x's feature axis.
      r_max: as for `jbn.renorm.batch_renorm`: a number, or a function of the number of steps. By
        default the paper's schedule.
      d_max: as r_max.
      warmup_steps: the number of steps of Batch Normalization before r_max and d_max are used.
      rngs: draws one key for the scale, then one for the bias.
      **options: all other arguments of `jbn.nnx.BatchNorm`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float | Array | renorm.Schedule = renorm.R_MAX,
        d_max: float | Array | renorm.Schedule = renorm.D_MAX,
        warmup_steps: int = 0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_features, rngs=rngs, **options)
        self.r_max = r_max
        self.d_max = d_max
        self.warmup_steps = warmup_steps
        self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def _by(self) -> _flax.Train:
        return self._train

    def _train(self, spec: Spec, inputs: Inputs, old: RunningStats) -> tuple[Array, Moments]:
        clips = renorm.Clips(self.r_max, self.d_max, self.warmup_steps)
        steps = self.steps.get_value()
        store([self.steps], [advanced(steps)])
        return renorm.train(clips, steps, spec, inputs, old)
