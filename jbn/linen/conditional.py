"""`ConditionalBatchNorm`: Batch Normalization whose scale and bias come with the call."""

from collections.abc import Sequence

import flax.linen as nn
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype
from jax import Array

from jbn import _flax
from jbn._core import check
from jbn._core.affine import Activation
from jbn._core.axes import resolve
from jbn._core.running import UpdateRule
from jbn._devices.named_axes import AxisName
from jbn.conditional import conditional_batch_norm, conditional_batch_norm_inference
from jbn.linen import parts


class ConditionalBatchNorm(nn.Module):
    """Batch Normalization with a scale and a bias for each example, given at the call.

    It is `jbn.conditional.conditional_batch_norm` over `mean` and `var` in `batch_stats`, and has
    no parameters: scale and bias come from another layer, such as an embedding of the class.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, jbn.linen
    >>> class Block(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, label, train):
    ...         scale, bias = jnp.split(nn.Embed(10, 2 * 3)(label), 2, -1)
    ...         norm = jbn.linen.ConditionalBatchNorm(one_plus_scale=True, activation=nn.relu)
    ...         return norm(x, scale, bias, use_running_average=not train)
    >>> x, label = jnp.ones((4, 8, 8, 3)), jnp.array([7, 2, 2, 0])
    >>> variables = Block().init(jax.random.key(0), x, label, train=False)
    >>> y, new = Block().apply(variables, x, label, train=True, mutable=["batch_stats"])
    >>> y.shape, list(new["batch_stats"]["ConditionalBatchNorm_0"])
    ((4, 8, 8, 3), ['mean', 'var'])

    Attributes:
      use_running_average: if True, normalise with the statistics in `batch_stats`. Set it here or
        in the call.
      axis: the feature axis or axes of x.
      momentum: weight of the old value in the running statistics; the core's `decay`.
      epsilon: is added to the variance, inside the root.
      dtype: of y; by default that of x, scale and bias promoted.
      axis_name: share statistics over this named axis of `vmap`, `pmap` or `shard_map`.
      axis_index_groups: as in `jax.lax.psum`.
      one_plus_scale: multiply by 1 + scale, so that a layer that returns 0 changes nothing.
      update: how a batch enters the running statistics, such as `jbn.cumulative()`; it replaces
        momentum, and adds `count` to `batch_stats`. The default is `jbn.ema(momentum)`.
      groups: normalise each of this many equal, consecutive parts of the batch by statistics of its
        own.
      activation: an elementwise function, such as `jax.nn.relu`, which is applied to y last.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    one_plus_scale: bool = False
    update: UpdateRule | None = None
    groups: int | None = None
    activation: Activation | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        scale: Array | None,
        bias: Array | None,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Normalises x; in training also updates `batch_stats`.

        Args:
          x: [N, ..., C].
          scale: [N, C], or of x's rank and broadcasts against x, or [C]; None for 1.
          bias: like `scale`; None for 0.
          use_running_average: if True, normalise with the statistics in `batch_stats`.
          mask: bool, of x's rank, broadcasts against x. False: the value takes no part.
          weights: real and not negative, broadcasts like `mask`.
          residual: of x's shape, is added before the activation.

        Returns:
          y, of x's shape. `init` normalises by the initial statistics, and does not update them.
        """
        inference = parts.inference_wanted(self, use_running_average)
        x = check.floating(x)
        shape = resolve(x.shape, self.axis).feature_shape
        variables = parts.declare_statistics(self, shape, x.dtype, self.dtype, inference=inference)
        y, stats = _flax.run(
            self,
            (conditional_batch_norm, conditional_batch_norm_inference),
            _flax.Given(x, mask, weights, residual),
            (scale, bias, parts.read(variables)),
            inference=inference or self.is_initializing(),
            one_plus_scale=self.one_plus_scale,
            dtype=canonicalize_dtype(x, scale, bias, dtype=self.dtype),
        )
        parts.store(variables, stats)
        return y
