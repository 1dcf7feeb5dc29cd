"""`Whitening`: a Flax nnx module over `jbn.whitening`."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer
from jax import Array

from jbn import _flax
from jbn._core import check
from jbn._core.affine import Activation
from jbn._core.normalize import Params
from jbn._core.running import UpdateRule
from jbn._devices.named_axes import AxisName
from jbn.nnx.parts import inference_wanted, store
from jbn.whitening import (
    Method,
    WhiteningStats,
    init_stats,
    whiten,
    whiten_inference,
    zca,
)


class Whitening(nnx.Module):
    """Whitening of all features, or of groups of them: `jbn.whitening.whiten` as a module.

    >>> import jax, jbn.nnx
    >>> from flax import nnx
    >>> layer = jbn.nnx.Whitening(8, group_size=4, rngs=nnx.Rngs(0))
    >>> y = layer(jax.random.normal(jax.random.key(0), (64, 8)))
    >>> print(layer.mean.shape, layer.cov.shape, layer.count.shape)
    (8,) (2, 4, 4) (2,)

    Args:
      num_features: C, the size of x's feature axis.
      use_running_average: if True, whiten with the stored statistics; `train()` and `eval()`
        switch it.
      axis: the feature axis of x.
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
      rngs: draws one key for the scale or coloring, then one for the bias.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        group_size: int | None = None,
        method: Method = zca(),
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        coloring: bool = False,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        scale_init: Initializer = nnx.initializers.ones_init(),
        coloring_init: Initializer = _flax.identity_init,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        update: UpdateRule | None = None,
        activation: Activation | None = None,
        rngs: nnx.Rngs,
    ):
        stats = init_stats(num_features, group_size=group_size)
        self.mean, self.cov, self.count = map(nnx.BatchStat, stats)
        square = (num_features, num_features)
        self.scale = self.coloring = self.bias = nnx.data(None)
        if coloring:
            self.coloring = nnx.Param(coloring_init(rngs.params(), square, param_dtype))
        elif use_scale:
            self.scale = nnx.Param(scale_init(rngs.params(), (num_features,), param_dtype))
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (num_features,), param_dtype))
        self.use_running_average, self.dtype = use_running_average, dtype
        self.axis, self.group_size, self.method = axis, group_size, method
        self.momentum, self.epsilon, self.update = momentum, epsilon, update
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups
        self.activation = activation

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Whitens x; in training also updates the stored statistics.

        Args:
          x: [N, ..., C].
          use_running_average: if True, whiten with the stored statistics; overrides the
            constructor's.
          mask: bool, of x's rank, the same for all features. False: the values take no part.
          weights: real and not negative, like `mask`: how much each position counts.
          residual: of x's shape, is added before the activation.

        Returns:
          y, of x's shape.
        """
        inference = inference_wanted(self, use_running_average)
        x = check.array(x, "x")
        variables = self.mean, self.cov, self.count
        stats = WhiteningStats(*(v.get_value() for v in variables))
        own: tuple[Any, Any] = (self.scale if self.coloring is None else self.coloring, self.bias)
        params = Params(*(None if p is None else p[...] for p in own))
        y, stats = _flax.run(
            self,
            (whiten, whiten_inference),
            _flax.Given(x, mask, weights, residual),
            (params, stats),
            inference=inference,
            training=("group_size",),
            method=self.method,
            dtype=dtypes.canonicalize_dtype(x, *params, dtype=self.dtype),
        )
        store(variables, stats)
        return y
