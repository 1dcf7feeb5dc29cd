"""`BatchRenorm` with the fields, defaults and variables of sbx's, as CrossQ uses it."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jbn import _flax, renorm
from jbn.linen.parts import inference_wanted
from jbn.linen.renorm import BatchRenorm as _BatchRenorm
from jbn.linen.renorm import renormalized


class BatchRenorm(_BatchRenorm):
    """Batch Renormalization in the place of `sbx.common.jax_layers.BatchRenorm`.

    Change one import, `from jbn.linen.crossq import BatchRenorm`; its variables are the same: scale
    and bias in `params`; mean, var, r_max, d_max and steps in `batch_stats`. It is
    `jbn.linen.BatchRenorm` with r_max = 3, d_max = 5, 100,000 steps of Batch Normalization, and
    epsilon = 0.001, as in CrossQ (Bhatt et al. 2024, arXiv 1902.05605).

    >>> import jax, jax.numpy as jnp
    >>> from jbn.linen.crossq import BatchRenorm
    >>> variables = BatchRenorm().init(jax.random.key(0), jnp.ones((4, 2)), False)
    >>> print(sorted(variables["batch_stats"]))
    ['d_max', 'mean', 'r_max', 'steps', 'var']

    sbx adds epsilon to the variance of the batch divided by r^2, and leaves it out of the standard
    deviation that d is multiplied by. Here y is that of the paper, scale (r xhat + d) + bias. The
    two differ by terms of the order of epsilon / var. Where var = 0, y of sbx leaves d out, and its
    derivative is NaN.

    Attributes:
      r_max: the first value of the variable r_max, which holds what is used.
      d_max: as r_max.
      warmup_steps: the number of steps of Batch Normalization.

    All other attributes are those of `jbn.linen.BatchNorm`.
    """

    epsilon: float = 0.001
    r_max: float | Array | renorm.Schedule = 3.0
    d_max: float | Array | renorm.Schedule = 5.0
    warmup_steps: int = 100_000

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
        given = _flax.Given(x, mask, weights, residual)
        if inference and not self.is_initializing():
            return renormalized(self, given, renorm.Clips(1, 0), inference=True)
        r_max, d_max = (
            self.variable("batch_stats", name, jnp.asarray, first, jnp.float32).value
            for name, first in (("r_max", self.r_max), ("d_max", self.d_max))
        )
        clips = renorm.Clips(r_max, d_max, self.warmup_steps)
        return renormalized(self, given, clips, inference=inference)
