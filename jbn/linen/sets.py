"""`SplitBatchNorm`: Batch Normalization with several sets of statistics."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype
from jax import Array

from jbn import _flax
from jbn._core import check
from jbn._core.affine import Activation
from jbn._core.axes import resolve
from jbn._core.running import UpdateRule
from jbn._devices.named_axes import AxisName
from jbn.linen import parts
from jbn.sets import (
    Index,
    names_of,
    number_of,
    split_batch_norm,
    split_batch_norm_inference,
)


class SplitBatchNorm(nn.Module):
    """Batch Normalization with several sets of statistics, one of which each example belongs to.

    It is `jbn.sets.split_batch_norm` over `mean` and `var`, [sets, C], in `batch_stats`, and scale
    and bias, [sets, C] or, if they are shared, [C].

    >>> import jax, jax.numpy as jnp, jbn.linen
    >>> layer = jbn.linen.SplitBatchNorm(sets=("clean", "adversarial"), momentum=0.5)
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> variables = layer.init(jax.random.key(0), x, "clean", use_running_average=True)
    >>> y, new = layer.apply(
    ...     variables, x, "adversarial", use_running_average=False, mutable=["batch_stats"]
    ... )
    >>> print(new["batch_stats"]["mean"])
    [[ 0.  0.]
     [ 1. 10.]]

    Attributes:
      sets: their names, or their number.
      use_running_average: if True, normalise with the statistics in `batch_stats`. Set it here or
        in the call.
      axis: the feature axis or axes of x.
      momentum: weight of the old value in the running statistics; the core's `decay`.
      epsilon: is added to the variance, inside the root.
      dtype: of y; by default that of x, scale and bias promoted.
      param_dtype: of scale and bias.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      bias_init: initialiser of the bias.
      scale_init: initialiser of the scale.
      axis_name: share the statistics of each set over this named axis.
      axis_index_groups: as in `jax.lax.psum`.
      share_params: whether all sets have one scale and one bias, [C].
      update: how a batch enters the running statistics of its set; it replaces momentum, and adds
        `count` to `batch_stats`. The default is `jbn.ema(momentum)`.
      groups: normalise each of this many equal, consecutive parts of the batch by statistics of its
        own, in each set.
      activation: an elementwise function, such as `jax.nn.relu`, which is applied to y last.
    """

    sets: int | Sequence[str]
    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: jax.nn.initializers.Initializer = nn.initializers.zeros_init()
    scale_init: jax.nn.initializers.Initializer = nn.initializers.ones_init()
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    share_params: bool = False
    update: UpdateRule | None = None
    groups: int | None = None
    activation: Activation | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        index: Index,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Normalises x by its set; in training also updates the set in `batch_stats`.

        Args:
          x: [N, ..., C].
          index: a name or a number, a traced integer, or integers [N], one for each example.
          use_running_average: if True, normalise with the statistics in `batch_stats`.
          mask: bool, of x's rank, broadcasts against x. False: the value takes no part.
          weights: real and not negative, broadcasts like `mask`.
          residual: of x's shape, is added before the activation.

        Returns:
          y, of x's shape. `init` normalises by the initial statistics, and does not update them.
        """
        inference = parts.inference_wanted(self, use_running_average)
        x = check.floating(x)
        shape = (number_of(self.sets), *resolve(x.shape, self.axis).feature_shape)
        params = parts.declare_params(self, shape[1:] if self.share_params else shape)
        affine = (p.dtype for p in params if p is not None)
        variables = parts.declare_statistics(
            self, shape, x.dtype, self.dtype, *affine, inference=inference
        )
        y, stats = _flax.run(
            self,
            (split_batch_norm, split_batch_norm_inference),
            _flax.Given(x, mask, weights, residual),
            (params, parts.read(variables), index),
            inference=inference or self.is_initializing(),
            names=names_of(self.sets),
            dtype=canonicalize_dtype(x, *params, dtype=self.dtype),
        )
        parts.store(variables, stats)
        return y
