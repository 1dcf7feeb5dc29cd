"""What a user can get wrong, said once and clearly, while tracing."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jbn._axes import Axes
from jbn._sync import bound_axes, varying


def floating(x: ArrayLike, name: str = "x") -> Array:
    """x as an array, of floating point (complex included)."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be floating point; got {x.dtype}, of shape {x.shape}. Convert it first: "
            f"{name}.astype(jnp.float32)."
        )
    return x


def activation(function: Any, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """A hashable function of an array of this shape that does the same in every call, or None."""
    if function is None:
        return None
    if not callable(function):
        raise TypeError(
            f"activation must be a function of an array, such as jax.nn.relu; got {function!r}."
        )
    try:
        hash(function)
    except TypeError:
        raise TypeError(
            f"activation must be hashable, because it is static; got {function!r}."
        ) from None
    return _static(function, shape, np.dtype(dtype))


@functools.lru_cache(maxsize=256)  # does not keep a function for which it raises
def _static(function: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    trace = jax.make_jaxpr(function, return_shape=True)
    program, result = trace(jax.ShapeDtypeStruct(shape, dtype))
    if any(isinstance(value, Tracer) for value in program.consts):
        raise TypeError(
            f"activation must be static, but {function!r} uses a traced value, such as a learned "
            f"slope. Apply it behind the layer: activation(y)."
        )
    if getattr(result, "shape", None) != shape:
        raise ValueError(
            f"activation must be elementwise: it was given an array of shape {shape} and returned "
            f"{getattr(result, 'shape', result)}. Apply it behind the layer: activation(y)."
        )
    return function


def residual(values: ArrayLike | None, x: Array) -> Array | None:
    """What is added to y, of x's shape, or None."""
    if values is None:
        return None
    values = floating(values, "residual")
    if values.shape == x.shape:
        return values
    raise ValueError(
        f"residual is added to y and must have x's shape, {x.shape}; got {values.shape}. Fit it "
        f"first, as the 1x1 convolution of a shortcut does."
    )


def epsilon(value: float) -> float:
    """Epsilon as a Python number >= 0."""
    if isinstance(value, Tracer):
        raise TypeError("epsilon must be a Python number, not a traced value: it is static.")
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(
            f"epsilon must be a number >= 0 that is added to the variance, such as 1e-5; "
            f"got {value!r}."
        )
    return float(value)


def decay(value: float, debias: bool) -> float:
    """Decay in [0, 1], unseen if traced; 1 never takes in anything, so it has no debiased form."""
    if isinstance(value, Tracer):
        return value
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(
            f"decay is the weight of the old value and must lie between 0 and 1, such as 0.99; "
            f"got {value!r}."
        )
    if debias and value == 1:
        raise ValueError("decay=1 cannot be debiased; for equal weights write jbn.cumulative().")
    return float(value)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str) and not math.isnan(float(value))
    except TypeError:
        return False


def features(name: str, values: ArrayLike, axes: Axes) -> Array:
    """`values` as an array, of exactly the feature shape."""
    values = jnp.asarray(values)
    if values.shape != axes.feature_shape:
        axes = axes.whole
        raise ValueError(
            f"{name} has shape {values.shape}, but x, of shape {axes.shape} with feature axis "
            f"{_plain(axes.features)}, needs {axes.feature_shape}. Pass axis= if the features lie "
            f"elsewhere, or make it for {_plain(axes.feature_shape)} features."
        )
    return values


def params(values: Any) -> tuple[Any, Any]:
    """(scale, bias) of a Params, or of any other pair."""
    try:
        if isinstance(values, Mapping):
            raise TypeError
        scale, bias = values
    except (TypeError, ValueError):
        raise TypeError(
            f"params must be jbn.Params(scale, bias), such as jbn.init_params(C); "
            f"got {type(values).__name__}."
        ) from None
    return scale, bias


def stats(values: Any, axes: Axes) -> Any:
    """A RunningStats whose mean, var and count have the feature shape."""
    fields = ("mean", "var", "count")
    if tuple(getattr(values, "_fields", ())) != fields:
        raise TypeError(
            f"stats must be jbn.RunningStats(mean, var, count), such as jbn.init_stats(C); "
            f"got {type(values).__name__}."
        )
    return values._replace(**{f: features(f"stats.{f}", getattr(values, f), axes) for f in fields})


def holds_mean(values: Any, dtype: Any) -> None:
    """Refuses real statistics for complex x."""
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(values.mean):
        raise TypeError(
            f"x is {dtype} but stats.mean is {values.mean.dtype}, which cannot hold its mean. "
            f"Write jbn.init_stats(C, dtype={dtype})."
        )


def reduction_axis(axes: Axes, named_axes: tuple) -> None:
    """Refuses x in which every axis is a feature axis, unless a named axis holds the examples."""
    if not axes.reduction and not named_axes:
        raise ValueError(
            f"x of shape {axes.shape} with feature axis {_plain(axes.features)} has no axis to "
            f"take statistics over. Pass a batch, [N, ..., C] with axis=-1, or name the axis of "
            f"examples of a surrounding vmap, pmap or shard_map: axis_name=."
        )


def groups(value: int, axes: Axes) -> int:
    """How many equal parts to cut the batch into; it must divide the batch."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise TypeError(f"groups must be a number of groups >= 1, such as groups=8; got {value!r}.")
    if not axes.reduction:
        raise ValueError(
            f"groups={value} needs a batch to divide; x of shape {axes.shape} with feature axis "
            f"{_plain(axes.features)} has none."
        )
    batch = axes.shape[axes.reduction[0]]
    if batch % value:
        fitting = [g for g in range(1, batch + 1) if batch % g == 0]
        raise ValueError(
            f"groups={value} does not divide the batch of {batch} in x of shape {axes.shape}: "
            f"take one of {', '.join(map(str, fitting))}, or pad the batch and mask the padding."
        )
    return int(value)


def several_values(axes: Axes, groups: int | None) -> None:
    """Refuses to take the variance of a single value."""
    if axes.size == (groups or 1):
        each = "" if groups is None else f" in each of {groups} groups"
        raise ValueError(
            f"one value per channel: x of shape {axes.shape} with feature axis "
            f"{_plain(axes.features)} has a single value of each feature{each}, so its variance is "
            f"0 and y is just the bias. Use a larger batch, share statistics through axis_name=, "
            f"normalise with running statistics (jbn.batch_norm_inference), or drop the last "
            f"batch of an epoch if it is this small."
        )


def as_replicated_as(old: Array, new: Array) -> None:
    """Refuses statistics of each device's own where those so far are the same on all."""
    axes = varying(new) - varying(old)
    if not axes:
        return
    names = ", ".join(map(repr, sorted(axes, key=str)))
    one = names if len(axes) == 1 else f"({names})"
    raise ValueError(
        f"the statistics of this batch differ along the mesh axes {names} (bound axes: "
        f"{', '.join(map(repr, bound_axes()))}), and those in stats do not: they would leave "
        f"shard_map as if all devices agreed on them. Write axis_name={one} to normalise by the "
        f"whole batch. If every device is to have statistics of its own, say so first, "
        f'stats = jax.lax.pcast(stats, {one}, to="varying"), and let them leave by '
        f"out_specs=P({names}). Under jit with sharded arrays neither is needed."
    )


def participation(
    axes: Axes, mask: ArrayLike | None, weights: ArrayLike | None, dtype: DTypeLike
) -> Array | None:
    """Mask and weights as one array of x's rank: None, bool, or the real type of `dtype`, >= 0."""
    taking_part = None if mask is None else _mask(axes, jnp.asarray(mask))
    if weights is None:
        return taking_part
    weights = _weights(axes, jnp.asarray(weights), jnp.finfo(dtype))
    if taking_part is None:
        return weights
    return jnp.where(taking_part, weights, jnp.zeros_like(weights))


def _mask(axes: Axes, mask: Array) -> Array:
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be bool; got {mask.dtype}. Write mask != 0, or pass real numbers as "
            f"weights=."
        )
    return _broadcastable("mask", mask, axes)


def _weights(axes: Axes, weights: Array, numbers: jnp.finfo) -> Array:
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(
            f"weights must be floating point; got {weights.dtype}. Pass a bool array as mask=, "
            f"and convert others: weights.astype(jnp.float32)."
        )
    weights = _broadcastable("weights", weights, axes).astype(numbers.dtype)
    # A negative or NaN weight counts as none, and so does one that a processor may take for 0
    # anyway. Of the largest, 2^24 still have a finite sum.
    largest = jnp.asarray(numbers.max * 2.0**-24, numbers.dtype)
    return jnp.where(weights >= numbers.tiny, jnp.minimum(weights, largest), jnp.zeros_like(weights))


def _broadcastable(name: str, values: Array, axes: Axes) -> Array:
    shape, ndim = axes.shape, len(axes.shape)
    if values.ndim == ndim and all(n in (1, m) for n, m in zip(values.shape, shape, strict=True)):
        return values
    message = f"{name} of shape {values.shape} does not fit x of shape {shape}"
    if values.ndim < ndim:
        message += (
            f": it needs x's rank, {ndim}, to say which axes it runs along (right-aligned, its "
            f"last axis would choose features, not examples)"
        )
    raise ValueError(
        f"{message}. Each axis must have x's size or 1, such as {axes.per_position} for one value "
        f"per position; from one value per example, write "
        f"{name}.reshape({(-1, *(1,) * (ndim - 1))})."
    )


def _plain(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(values) == 1 else values
