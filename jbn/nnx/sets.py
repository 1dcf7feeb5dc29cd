"""`SplitBatchNorm`: Batch Normalization with several sets of statistics."""

from collections.abc import Sequence

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
from jbn.nnx.parts import WithStatistics, inference_wanted, read, store
from jbn.sets import (
    Index,
    names_of,
    number_of,
    split_batch_norm,
    split_batch_norm_inference,
)


class SplitBatchNorm(WithStatistics):
    """Batch Normalization with several sets of statistics, one of which each example belongs to.

    It is `jbn.sets.split_batch_norm` over the `nnx.BatchStat`s `mean` and `var`, [sets, C], and the
    `nnx.Param`s `scale` and `bias`, [sets, C] or, if they are shared, [C].

    >>> import jax.numpy as jnp, jbn.nnx
    >>> from flax import nnx
    >>> layer = jbn.nnx.SplitBatchNorm(2, ("clean", "adversarial"), momentum=0.5, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]), "adversarial")
    >>> print(layer.mean[...])
    [[ 0.  0.]
     [ 1. 10.]]

    Args:
      num_features: C, the size of x's feature axis.
      sets: their names, or their number.
      use_running_average: if True, normalise with the stored statistics; `train()` and `eval()`
        switch it.
      axis: the feature axis of x.
      momentum: weight of the old value in the running statistics; the core's `decay`.
      epsilon: is added to the variance, inside the root.
      dtype: of y; by default that of x, scale and bias promoted. For complex x set a complex dtype:
        the mean is then complex, too.
      param_dtype: of scale and bias.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      bias_init: initialiser of the bias.
      scale_init: initialiser of the scale.
      axis_name: share the statistics of each set over this named axis.
      axis_index_groups: as in `jax.lax.psum`.
      rngs: draws one key for the scale, then one for the bias.
      share_params: whether all sets have one scale and one bias, [C].
      update: how a batch enters the running statistics of its set; it replaces momentum, and adds a
        `count`. The default is `jbn.ema(momentum)`.
      groups: normalise each of this many equal, consecutive parts of the batch by statistics of its
        own, in each set.
      activation: an elementwise function, such as `jax.nn.relu`, which is applied to y last.
    """

    def __init__(
        self,
        num_features: int,
        sets: int | Sequence[str],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        scale_init: Initializer = nnx.initializers.ones_init(),
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        rngs: nnx.Rngs,
        share_params: bool = False,
        update: UpdateRule | None = None,
        groups: int | None = None,
        activation: Activation | None = None,
    ):
        features = check.number_of_features(num_features)
        self.sets = names_of(sets) or number_of(sets)
        self.make_statistics((number_of(sets), *features), dtype, param_dtype)
        shape = features if share_params else self.mean.shape

        def param(used: bool, init: Initializer) -> nnx.Param | None:
            return nnx.Param(init(rngs.params(), shape, param_dtype)) if used else None

        self.scale, self.bias = param(use_scale, scale_init), param(use_bias, bias_init)
        self.use_running_average, self.axis = use_running_average, axis
        self.momentum, self.epsilon, self.dtype = momentum, epsilon, dtype
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups
        self.update = update
        self.groups = groups
        self.activation = activation

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
        """Normalises x by its set; in training also updates the stored statistics of the set.

        Args:
          x: [N, ..., C].
          index: a name or a number, a traced integer, or integers [N], one for each example.
          use_running_average: if True, normalise with the stored statistics; overrides the
            constructor's.
          mask: bool, of x's rank, broadcasts against x. False: the value takes no part.
          weights: real and not negative, broadcasts like `mask`.
          residual: of x's shape, is added before the activation.

        Returns:
          y, of x's shape.
        """
        inference = inference_wanted(self, use_running_average)
        x = check.floating(x)
        variables = self.statistics(counts=not inference)
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        y, stats = _flax.run(
            self,
            (split_batch_norm, split_batch_norm_inference),
            _flax.Given(x, mask, weights, residual),
            (Params(scale, bias), read(variables), index),
            inference=inference,
            names=names_of(self.sets),
            dtype=dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
        )
        store(variables, stats)
        return y
