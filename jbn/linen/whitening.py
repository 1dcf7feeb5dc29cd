"""`Whitening`: a Flax linen module over `jbn.whitening`."""

import math
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
from jbn._core.normalize import Params
from jbn._core.running import UpdateRule
from jbn._devices.named_axes import AxisName
from jbn.linen import parts
from jbn.whitening import (
    Method,
    WhiteningStats,
    init_stats,
    whiten,
    whiten_inference,
    zca,
)


class Whitening(nn.Module):
    """Whitening of all features, or of groups of them: `jbn.whitening.whiten` as a module.

    >>> import jax, jax.numpy as jnp, jbn.linen
    >>> x = jax.random.normal(jax.random.key(0), (64, 8))
    >>> layer = jbn.linen.Whitening(group_size=4)
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> print({name: value.shape for name, value in new["batch_stats"].items()})
    {'mean': (8,), 'cov': (2, 4, 4), 'count': (2,)}

    Attributes:
      use_running_average: if True, whiten with the statistics in `batch_stats`. Set it here or in
        the call.
      axis: the feature axis or axes of x; several are taken as one.
      group_size: the number of consecutive features that are whitened together; None for all.
      method: `jbn.whitening.zca()`, or `jbn.whitening.newton_schulz(iterations)`.
      momentum: weight of the old value in the running statistics; the core's `decay`.
      epsilon: is added to the eigenvalues of the covariance, inside the root.
      dtype: of y; by default that of x, scale and bias promoted.
      param_dtype: of scale, coloring and bias.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale, one number a feature.
      coloring: whether to multiply by a learned matrix [C, C] in the place of the scale.
      bias_init: initialiser of the bias.
      scale_init: initialiser of the scale.
      coloring_init: initialiser of the coloring matrix, by default the identity.
      axis_name: share statistics over this named axis of `vmap`, `pmap` or `shard_map`.
      axis_index_groups: as in `jax.lax.psum`.
      update: how a batch enters the running statistics, such as `jbn.cumulative()`; it replaces
        momentum.
      activation: an elementwise function, such as `jax.nn.relu`, which is applied to y last.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    group_size: int | None = None
    method: Method = zca()
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    coloring: bool = False
    bias_init: jax.nn.initializers.Initializer = nn.initializers.zeros
    scale_init: jax.nn.initializers.Initializer = nn.initializers.ones
    coloring_init: jax.nn.initializers.Initializer = _flax.identity_init
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    update: UpdateRule | None = None
    activation: Activation | None = None

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
        """Whitens x; in training also updates `batch_stats`.

        Args:
          x: [N, ..., C].
          use_running_average: if True, whiten with the statistics in `batch_stats`.
          mask: bool, of x's rank, the same for all features. False: the values take no part.
          weights: real and not negative, like `mask`: how much each position counts.
          residual: of x's shape, is added before the activation.

        Returns:
          y, of x's shape. `init` does not update the statistics, and whitens by the initial ones.
        """
        inference = parts.inference_wanted(self, use_running_average)
        x = check.array(x, "x")
        shape = resolve(x.shape, self.axis).feature_shape
        variables = _statistics(self, shape)
        params = _params(self, shape)
        y, stats = _flax.run(
            self,
            (whiten, whiten_inference),
            _flax.Given(x, mask, weights, residual),
            (params, WhiteningStats(*(v.value for v in variables))),
            inference=inference or self.is_initializing(),
            training=("group_size",),
            method=self.method,
            dtype=canonicalize_dtype(x, *params, dtype=self.dtype),
        )
        parts.store(variables, stats)
        return y


# These are functions, not methods, because Flax wraps and records every method of a module.


def _statistics(module: Whitening, shape: tuple[int, ...]) -> list[nn.Variable[Array]]:
    """Declares the variables mean, cov and count."""
    initial = init_stats(shape, group_size=module.group_size)
    return [
        module.variable("batch_stats", name, lambda value=value: value)
        for name, value in initial._asdict().items()
    ]


def _params(module: Whitening, shape: tuple[int, ...]) -> Params:
    """Declares the parameters scale or coloring, and bias."""
    dtype, scale, bias = module.param_dtype, None, None
    if module.coloring:
        size = math.prod(shape)
        scale = module.param("coloring", module.coloring_init, (size, size), dtype)
    elif module.use_scale:
        scale = module.param("scale", module.scale_init, shape, dtype)
    if module.use_bias:
        bias = module.param("bias", module.bias_init, shape, dtype)
    return Params(scale, bias)
