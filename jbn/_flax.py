"""The common part of the modules of linen and of nnx, which accept all that Flax accepts.

The core refuses integer x, one value per feature, and a mask of lower rank than x. Flax computes a
result for them, and so does a module that replaces Flax's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jbn._core import check
from jbn._core.affine import Activation
from jbn._core.axes import resolve
from jbn._core.batch_norm import batch_norm_inference, train
from jbn._core.deferral import absorb, fixed, read
from jbn._core.normalize import Params
from jbn._core.plan import Inputs, Spec, plan
from jbn._core.running import RunningStats, UpdateRule, ema, ema_of_flax
from jbn._core.types import Moments
from jbn._devices.named_axes import AxisName, Scope, scope
from jbn._devices.placement import join


class Layer(NamedTuple):
    """The fields that modules of linen and of nnx have in common, and document."""

    axis: int | Sequence[int]
    momentum: float
    epsilon: float
    update: UpdateRule | None
    axis_name: AxisName | None
    axis_index_groups: Sequence[Sequence[int]] | None
    groups: int | None
    activation: Activation | None

    @classmethod
    def of(cls, module: Any, *, initializing: bool = False) -> "Layer":
        """Reads the fields from a module; `init` of linen has neither named axes nor groups."""
        layer = cls(*(getattr(module, field) for field in cls._fields))
        return layer._replace(axis_name=None, groups=None) if initializing else layer


# How a layer normalises in training: (spec, inputs, old statistics) -> (y, moments of the batch).
Train = Callable[[Spec, Inputs, RunningStats], tuple[Array, Moments]]


class Given(NamedTuple):
    """The arrays of one call."""

    x: Array
    mask: Array | None
    weights: Array | None
    residual: Array | None


def call(
    layer: Layer,
    given: Given,
    params: Params,
    stats: RunningStats,
    *,
    inference: bool,
    dtype: DTypeLike,
    by: Train | None = None,
) -> tuple[Array, RunningStats]:
    """Computes `jbn.batch_norm` or `jbn.batch_norm_inference` for all that Flax accepts.

    Returns y and the statistics, which inference does not change. Without `update` the rule is
    Flax's: the variance of a single value enters, too. `by` normalises in training, in the place of
    the core, unless the statistics are fixed.
    """
    residual, names = given.residual, layer.axis_name
    x = check.floating(_as_float(given.x, dtype))
    affine: Any = {"epsilon": layer.epsilon, "activation": layer.activation, "dtype": dtype}
    if inference:
        affine |= {"axis": layer.axis, "residual": residual}
        return batch_norm_inference(x, params, stats, **affine), stats
    shape, axes = x.shape, resolve(x.shape, layer.axis)
    if not axes.reduction and names in (None, ()):  # a single example is a batch of one
        x, axes = x[None], resolve((1, *x.shape), tuple(i + 1 for i in axes.features))
        residual = None if residual is None else jnp.asarray(residual)[None]
    old = check.stats(_able_to_hold(x, read(stats)), axes)
    spec, inputs = plan(
        x,
        params,
        axis=axes.features,
        mask=_of_rank(given.mask, x.ndim),
        weights=_of_rank(given.weights, x.ndim),
        over=Scope() if names is None else scope(names, layer.axis_index_groups),  # as in Flax
        groups=layer.groups,
        residual=residual,
        **affine,
    )
    rule = ema_of_flax(layer.momentum) if layer.update is None else layer.update
    if by is None or fixed(stats):
        y, moments = train(spec, inputs, old if fixed(stats) else None)
    else:
        y, moments = by(spec, inputs, old)
    y = join(y, x, spec.axes).reshape(shape)
    return y, absorb(rule, old, moments, given=stats, over=spec.over)


def run(
    module: Any,
    functions: tuple[Callable[..., Any], Callable[..., Array]],
    given: Given,
    others: tuple[Any, ...],
    *,
    inference: bool,
    training: Sequence[str] = ("groups",),
    **options: Any,
) -> tuple[Array, Any]:
    """Calls the functions of a variant, for training and for inference, by a module's fields.

    Args:
      module: has the fields axis, epsilon, activation, momentum, update, axis_name,
        axis_index_groups and those of `training`.
      functions: (training, inference); they take x, `others` and keywords.
      given: x, and the arrays that are given by keyword.
      others: the arguments behind x.
      inference: which function.
      training: further fields that only training takes.
      options: further keywords of both.

    Returns:
      y, and the new statistics; None in inference.
    """
    x, mask, weights, residual = given
    train, infer = functions
    options |= {field: getattr(module, field) for field in ("axis", "epsilon", "activation")}
    if inference:
        return infer(x, *others, residual=residual, **options), None
    fields = ("axis_name", "axis_index_groups", *training)
    options |= {field: getattr(module, field) for field in fields}
    if module.axis_name is None:  # as in Flax
        options["axis_index_groups"] = None
    rule = module.update or ema(module.momentum)
    support = {"mask": mask, "weights": weights, "residual": residual}
    return train(x, *others, update=rule, **support, **options)


def identity_init(
    key: Array, shape: Sequence[Any], dtype: Any = None, out_sharding: Any = None
) -> Array:
    """Initialises a coloring matrix, [C, C], with the identity."""
    del key, out_sharding
    return jnp.eye(*shape, dtype=jnp.float32 if dtype is None else dtype)


def _able_to_hold(x: Array, stats: RunningStats) -> RunningStats:
    """Makes the mean of `stats` complex if x is complex."""
    return stats._replace(mean=stats.mean.astype(mean_dtype(stats.mean.dtype, x.dtype)))


def _as_float(x: ArrayLike, dtype: DTypeLike) -> Array:
    """Converts x to a dtype from which y of `dtype` can be computed; half precision stays."""
    x = jnp.asarray(x)
    wide = jnp.finfo(dtype).bits > 32 or not jnp.issubdtype(x.dtype, jnp.inexact)
    # x is real, but the parameters are complex, or dtype=complex64.
    wide |= jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(x)
    return x.astype(jnp.promote_types(x.dtype, dtype)) if wide else x


def refuse_array_as_switch(switch: Any) -> None:
    """Refuses a residual or a mask in the place of `use_running_average`, the second argument."""
    if getattr(switch, "ndim", 0):
        raise TypeError(
            f"use_running_average must be True or False; got an array of shape {switch.shape}. "
            f"Arrays other than x are given by name: layer(x, residual=residual)."
        )


def inference_wanted(switch: Any) -> bool:
    """Converts `use_running_average` to a bool."""
    if isinstance(switch, Tracer | str | bytes):
        kind = "a traced value" if isinstance(switch, Tracer) else repr(switch)
        raise TypeError(
            f"use_running_average must be True or False while tracing; got {kind}. Under jax.jit "
            f"name it in static_argnames, or choose between two calls with jax.lax.cond."
        )
    return bool(switch)


def mean_dtype(real: DTypeLike, *others: DTypeLike | None) -> DTypeLike:
    """Returns the dtype of the running mean: `real`, or complex if one of `others` is complex."""
    if any(d is not None and jnp.issubdtype(d, jnp.complexfloating) for d in others):
        return np.promote_types(real, np.complex64)
    return real


def refuse_loss(
    dtype: DTypeLike | None, x: ArrayLike, scale: ArrayLike | None, bias: ArrayLike | None
) -> None:
    """Refuses a real y of complex numbers, before these are promoted to real ones."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.complexfloating):
        check.output_dtype(dtype, jnp.asarray(x), scale=scale, bias=bias)


def _of_rank(values: ArrayLike | None, ndim: int) -> Array | None:
    """Aligns `values` to the right, as NumPy broadcasts: a mask (C,) chooses features."""
    if values is None:
        return None
    values = jnp.asarray(values)
    return values.reshape((1,) * (ndim - values.ndim) + values.shape)
