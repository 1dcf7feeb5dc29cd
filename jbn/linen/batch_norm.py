"""`BatchNorm`: Flax linen's BatchNorm with jbn's statistics and derivatives."""

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import Array

from jbn import _flax
from jbn._core import check
from jbn._core.affine import Activation
from jbn._core.axes import resolve
from jbn._core.running import UpdateRule
from jbn.linen import parts


class BatchNorm(nn.BatchNorm):
    """Batch Normalization: `flax.linen.BatchNorm` over `jbn.batch_norm`.

    It is a subclass of Flax's class, with all its arguments, variables and dtype rules. The page
    "Semantics" of the documentation lists the differences (exact variance at any offset, masks,
    batches with NaN).

    >>> import jax, jax.numpy as jnp, jbn.linen
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> layer = jbn.linen.BatchNorm(momentum=0.5)
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> y, new = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> print(new["batch_stats"]["mean"])
    [ 1. 10.]

    Attributes:
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
      axis_name: share statistics over this named axis of `vmap`, `pmap` or `shard_map`.
      axis_index_groups: as in `jax.lax.psum`.
      use_fast_variance: accepted and without effect: jbn's variance is fast and exact.
      force_float32_reductions: if False, the statistics are stored in `param_dtype`. They are
        computed in float32 all the same, and a feature whose new statistics would be infinite in
        `param_dtype` keeps the old ones.
      update: how a batch enters the running statistics, such as `jbn.ema(0.9, debias=True)` or
        `jbn.cumulative()`; it replaces momentum, and adds `count` to `batch_stats`. The default is
        Flax's rule: `jbn.ema(momentum)`, but the variance of a single value, 0, enters too.
      groups: normalise each of this many equal, consecutive parts of the batch by statistics of its
        own; those in `batch_stats` are of the whole batch. `init` ignores it.
      activation: an elementwise function, such as `jax.nn.relu`, which is applied to y last. As
        part of the layer it costs the backward pass no memory.
    """

    update: UpdateRule | None = None
    groups: int | None = None
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
        """Normalises x; in training also updates `batch_stats`.

        Args:
          x: [N, ..., C].
          use_running_average: if True, normalise with the statistics in `batch_stats`.
          mask: bool, broadcasts against x. False: the value takes no part.
          weights: real and not negative, broadcasts against x: how much each value counts.
          residual: of x's shape, is added before the activation.

        Returns:
          y, of x's shape. `init` does not update the statistics, and ignores `axis_name`; for
          complex x, parameters or y it makes the mean complex.
        """
        inference = parts.inference_wanted(self, use_running_average)
        return normalized(self, _flax.Given(x, mask, weights, residual), inference=inference)


def normalized(
    module: BatchNorm,
    given: _flax.Given,
    *,
    inference: bool,
    by: _flax.Train | None = None,
) -> Array:
    """Normalises x, with the variables of the module; `by` replaces the core in training steps.

    A function, not a method, because Flax wraps and records every method of a module.
    """
    x, initializing = check.array(given.x, "x"), module.is_initializing()
    shape = resolve(x.shape, module.axis).feature_shape
    real = jnp.float32 if module.force_float32_reductions else module.param_dtype
    affine = module.param_dtype if module.use_scale or module.use_bias else None
    variables = parts.declare_statistics(
        module, shape, x.dtype, module.dtype, affine, inference=inference, dtype=real
    )
    params = parts.declare_params(module, shape)
    dtype = canonicalize_dtype(x, *params, dtype=module.dtype)
    layer = _flax.Layer.of(module, initializing=initializing)
    mask = None if inference or given.mask is None else jnp.asarray(given.mask, bool)
    y, stats = _flax.call(
        layer,
        given._replace(x=x, mask=mask),
        params,
        parts.read(variables),
        inference=inference,
        dtype=dtype,
        by=None if initializing else by,
    )
    if not (inference or initializing):
        parts.store(variables, stats)
    return y
