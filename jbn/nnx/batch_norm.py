"""`BatchNorm`: Flax nnx's BatchNorm with jbn's statistics and derivatives."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax import Array

from jbn import _flax
from jbn._core import check, deferral
from jbn._core.affine import Activation
from jbn._core.normalize import Params
from jbn._core.running import UpdateRule
from jbn._devices.named_axes import AxisName
from jbn.nnx.parts import WithStatistics, inference_wanted, read, store

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class BatchNorm(nnx.BatchNorm, WithStatistics):
    """Batch Normalization: `flax.nnx.BatchNorm` over `jbn.batch_norm`.

    It is a subclass of Flax's class, with all its arguments, variables and dtype rules. The page
    "Semantics" of the documentation lists the differences (exact variance at any offset, masks,
    batches with NaN).

    >>> import jax.numpy as jnp, jbn.nnx
    >>> from flax import nnx
    >>> layer = jbn.nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> print(layer.mean[...])
    [ 1. 10.]

    Args:
      num_features: C, the size of x's feature axis.
      use_running_average: if True, normalise with the stored statistics; `train()` and `eval()`
        switch it.
      axis: the feature axis of x.
      momentum: weight of the old value in the running statistics; the core's `decay`.
      epsilon: is added to the variance, inside the root.
      dtype: of y; by default that of x, scale and bias promoted. For complex x set a complex dtype
        here or in `param_dtype`: the mean is then complex from the start. Otherwise it becomes
        complex with the first batch: a `scan` over steps refuses that, and `jit` compiles twice.
      param_dtype: of scale and bias.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      bias_init: initialiser of the bias.
      scale_init: initialiser of the scale.
      axis_name: share statistics over this named axis of `vmap`, `pmap` or `shard_map`.
      axis_index_groups: as in `jax.lax.psum`.
      use_fast_variance: accepted and without effect: jbn's variance is fast and exact.
      promote_dtype: promotes `(x, mean, var, scale, bias)`, given `dtype=`. The statistics still
        keep their own dtype: in half precision they would shift every output.
      rngs: draws one key for the scale, then one for the bias.
      bias_metadata: metadata of the bias's `nnx.Param`.
      scale_metadata: metadata of the scale's `nnx.Param`.
      update: how a batch enters the running statistics, such as `jbn.ema(0.9, debias=True)` or
        `jbn.cumulative()`; it replaces momentum, and adds a `count` to the module's
        `nnx.BatchStat`s, also when it is set on an existing layer. The default is Flax's rule:
        `jbn.ema(momentum)`, but the variance of a single value, 0, enters too.
      groups: normalise each of this many equal, consecutive parts of the batch by statistics of its
        own; the stored statistics are of the whole batch.
      activation: an elementwise function, such as `jax.nn.relu`, which is applied to y last. As
        part of the layer it costs the backward pass no memory.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
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
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
        update: UpdateRule | None = None,
        groups: int | None = None,
        activation: Activation | None = None,
    ):
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,  # pyright: ignore[reportArgumentType]  (Flax says str, takes more)
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )
        self.update = update
        self.groups = groups
        self.activation = activation
        mean = _flax.mean_dtype(jnp.float32, dtype, param_dtype)
        if mean != jnp.float32:
            self.mean = nnx.BatchStat(jnp.zeros(num_features, mean))

    def __call__(
        self,
        x: Array,
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
        weights: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """Normalises x; in training also updates the stored statistics.

        Args:
          x: [N, ..., C].
          use_running_average: if True, normalise with the stored statistics; overrides the
            constructor's.
          mask: bool, broadcasts against x. False: the value takes no part.
          weights: real and not negative, broadcasts against x: how much each value counts.
          residual: of x's shape, is added before the activation.

        Returns:
          y, of x's shape.
        """
        inference = inference_wanted(self, use_running_average)
        x = check.array(x, "x")
        variables = self.statistics(counts=not inference)
        stats = read(variables)
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        mean, var, _ = deferral.read(stats)
        dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)  # Flax's error comes first
        _flax.refuse_loss(self.dtype, x, scale, bias)
        x, _, _, scale, bias = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
        params = Params(scale, bias)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        if not inference and mask is not None and check.array(mask, "mask").dtype != jnp.bool_:
            raise ValueError(f"mask must be bool; got {jnp.asarray(mask).dtype}.")
        layer, given = _flax.Layer.of(self), _flax.Given(x, mask, weights, residual)
        options: Any = {"inference": inference, "dtype": dtype, "by": self._by()}
        y, stats = _flax.call(layer, given, params, stats, **options)
        if not inference:
            store(variables, stats)
        return y

    def _by(self) -> _flax.Train | None:
        """Returns what normalises in training in the place of the core, in a subclass."""
        return None
