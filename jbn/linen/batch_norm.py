"""`BatchNorm`: Flax linen's BatchNorm with jbn's statistics and derivatives."""

from collections.abc import Callable
from typing import Any

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
from jbn._core.running import RunningStats, UpdateRule


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
        inference = inference_wanted(self, use_running_average)
        return normalized(self, _flax.Given(x, mask, weights, residual), inference=inference)


# These are functions, not methods, because Flax wraps and records every method of a module.


def inference_wanted(module: BatchNorm, use_running_average: bool | None) -> bool:
    """Chooses between the field and the argument of the call."""
    _flax.refuse_array_as_switch(use_running_average)
    return _flax.inference_wanted(
        nn.merge_param("use_running_average", module.use_running_average, use_running_average)
    )


def normalized(
    module: BatchNorm,
    given: _flax.Given,
    *,
    inference: bool,
    by: _flax.Train | None = None,
) -> Array:
    """Normalises x, with the variables of the module; `by` replaces the core in training steps."""
    given = given._replace(x=check.array(given.x, "x"))
    x, initializing = given.x, module.is_initializing()
    shape = resolve(x.shape, module.axis).feature_shape
    counts = module.update is not None and (module.is_initializing() or not inference)
    variables = _statistics(module, shape, x.dtype, counts)
    params = _params(module, shape)
    dtype = canonicalize_dtype(x, *params, dtype=module.dtype)
    mean, var, *count = (v.value for v in variables)
    stats = RunningStats(mean, var, *(count or [jnp.zeros(var.shape, jnp.float32)]))
    layer = _flax.Layer.of(module, initializing=initializing)
    mask = None if inference or given.mask is None else jnp.asarray(given.mask, bool)
    given, by = given._replace(mask=mask), None if initializing else by
    y, stats = _flax.call(layer, given, params, stats, inference=inference, dtype=dtype, by=by)
    if not (inference or initializing):
        for variable, value in zip(variables, stats, strict=False):
            variable.value = value
    return y


def _statistics(
    module: BatchNorm, shape: tuple[int, ...], x: Dtype, counts: bool
) -> list[nn.Variable[Array]]:
    """Declares the variables for x of a dtype: mean, var and, if batches are counted, count.

    A new count starts at 0.
    """
    dtype = jnp.float32 if module.force_float32_reductions else module.param_dtype
    affine = module.param_dtype if module.use_scale or module.use_bias else None
    mean = _flax.mean_dtype(dtype, x, module.dtype, affine)
    initial: dict[str, tuple[Callable[..., Array], Any]]
    initial = {"mean": (jnp.zeros, mean), "var": (jnp.ones, jnp.finfo(dtype).dtype)}
    if counts:
        initial["count"] = (jnp.zeros, jnp.float32)  # half precision could not count
    return [
        module.variable("batch_stats", name, init, shape, dtype)
        for name, (init, dtype) in initial.items()
    ]


def _params(module: BatchNorm, shape: tuple[int, ...]) -> Params:
    """Declares the parameters scale and bias, drawn in this order as in Flax."""

    def param(name: str, used: bool, init: jax.nn.initializers.Initializer) -> Array | None:
        return module.param(name, init, shape, module.param_dtype) if used else None

    return Params(
        param("scale", module.use_scale, module.scale_init),
        param("bias", module.use_bias, module.bias_init),
    )
