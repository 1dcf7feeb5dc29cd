"""`ConditionalBatchNorm`: Batch Normalization whose scale and bias come with the call."""

from collections.abc import Sequence

from flax.nnx.nn import dtypes
from flax.typing import Dtype
from jax import Array

from jbn import _flax
from jbn._core import check
from jbn._core.affine import Activation
from jbn._core.running import UpdateRule
from jbn._devices.named_axes import AxisName
from jbn.conditional import conditional_batch_norm, conditional_batch_norm_inference
from jbn.nnx.parts import WithStatistics, inference_wanted, read, store


class ConditionalBatchNorm(WithStatistics):
    """Batch Normalization with a scale and a bias for each example, given at the call.

    It is `jbn.conditional.conditional_batch_norm` over the `nnx.BatchStat`s `mean` and `var`, and
    has no parameters: scale and bias come from another layer, such as an embedding of the class.

    >>> import jax.numpy as jnp, jbn.nnx
    >>> from flax import nnx
    >>> embed, norm = nnx.Embed(10, 6, rngs=nnx.Rngs(0)), jbn.nnx.ConditionalBatchNorm(3)
    >>> scale, bias = jnp.split(embed(jnp.array([7, 2, 2, 0])), 2, -1)
    >>> norm(jnp.ones((4, 8, 8, 3)), scale, bias).shape
    (4, 8, 8, 3)

    Args:
      num_features: C, the size of x's feature axis.
      use_running_average: if True, normalise with the stored statistics; `train()` and `eval()`
        switch it.
      axis: the feature axis of x.
      momentum: weight of the old value in the running statistics; the core's `decay`.
      epsilon: is added to the variance, inside the root.
      dtype: of y; by default that of x, scale and bias promoted. For complex x set a complex dtype:
        the mean is then complex, too.
      axis_name: share statistics over this named axis of `vmap`, `pmap` or `shard_map`.
      axis_index_groups: as in `jax.lax.psum`.
      one_plus_scale: multiply by 1 + scale, so that a layer that returns 0 changes nothing.
      update: how a batch enters the running statistics, such as `jbn.cumulative()`; it replaces
        momentum, and adds a `count`. The default is `jbn.ema(momentum)`.
      groups: normalise each of this many equal, consecutive parts of the batch by statistics of its
        own.
      activation: an elementwise function, such as `jax.nn.relu`, which is applied to y last.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        axis_name: AxisName | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        one_plus_scale: bool = False,
        update: UpdateRule | None = None,
        groups: int | None = None,
        activation: Activation | None = None,
    ):
        self.make_statistics(check.number_of_features(num_features), dtype)
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.one_plus_scale = one_plus_scale
        self.update = update
        self.groups = groups
        self.activation = activation

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
        """Normalises x; in training also updates the stored statistics.

        Args:
          x: [N, ..., C].
          scale: [N, C], or of x's rank and broadcasts against x, or [C]; None for 1.
          bias: like `scale`; None for 0.
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
        y, stats = _flax.run(
            self,
            (conditional_batch_norm, conditional_batch_norm_inference),
            _flax.Given(x, mask, weights, residual),
            (scale, bias, read(variables)),
            inference=inference,
            one_plus_scale=self.one_plus_scale,
            dtype=dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype),
        )
        store(variables, stats)
        return y
