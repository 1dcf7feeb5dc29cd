"""Checks of the arguments while tracing; every error tells the user what to write instead."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jbn._core.axes import Axes, integer
from jbn._core.elementwise import mixes
from jbn._devices.named_axes import bound_axes, varying


def floating(x: ArrayLike, name: str = "x") -> Array:
    """Converts x to an array, which must be floating point (complex included)."""
    x = array(x, name)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be floating point; got {x.dtype}, of shape {x.shape}. Convert it first: "
            f"{name}.astype(jnp.float32)."
        )
    if not _is_signed(x.dtype):
        raise TypeError(
            f"{name} is {x.dtype}, a format for scales that has neither 0 nor a sign. Convert it "
            f"first: {name}.astype(jnp.float32)."
        )
    return x


def array(values: Any, name: str) -> Array:
    """Converts `values` to an array; refuses text, None and containers such as a dictionary."""
    try:
        if values is None:
            raise TypeError
        return jnp.asarray(values)
    except (TypeError, ValueError):
        if hasattr(values, "__jax_array__"):  # its own error says why it is not an array here
            raise
        raise TypeError(
            f"{name} must be an array; got {type(values).__name__}. Write jnp.asarray of numbers."
        ) from None


def _is_signed(dtype: DTypeLike) -> bool:
    return bool(jnp.finfo(dtype).min < 0)


def output_dtype(dtype: DTypeLike | None, x: Array, **others: ArrayLike | None) -> np.dtype:
    """Checks the dtype of y, which must hold a result of x and `others` (scale, bias, residual)."""
    wanted = x.dtype if dtype is None else _dtype("dtype", dtype)
    if dtype is not None and not (jnp.issubdtype(wanted, jnp.inexact) and _is_signed(wanted)):
        raise TypeError(
            f"dtype is that of y, which is floating point; got dtype={wanted}. Pass "
            f"dtype=jnp.float32, or convert y by a rule of your own: round, scale, clip, astype."
        )
    if jnp.iscomplexobj(x):
        if not jnp.issubdtype(wanted, jnp.complexfloating):
            raise TypeError(
                f"x is {x.dtype}, and y of dtype={wanted} would lose the imaginary part. Leave "
                f"dtype out, or take the part that you want of x first: x.real, abs(x)."
            )
        return wanted
    for name, values in others.items():
        if values is not None and jnp.iscomplexobj(values):
            raise TypeError(
                f"{name} is {jnp.asarray(values).dtype} but x is {x.dtype}, and its imaginary part "
                f"would be lost. Make x complex, x.astype(jnp.complex64), or {name} real: "
                f"{name}.real."
            )
    return wanted


def _dtype(name: str, value: Any) -> np.dtype:
    """Converts to a NumPy dtype; Python's float and complex get JAX's default precision."""
    try:
        if isinstance(value, Array | np.ndarray):
            raise TypeError
        if value is None or value in (float, complex):
            value = jax.dtypes.canonicalize_dtype(float if value is None else value)
        return np.dtype(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a dtype, such as jnp.float32; got {_short(value)}."
        ) from None


def params_dtype(value: DTypeLike) -> np.dtype:
    """Checks the dtype of scale, bias or a running mean: floating point (complex included)."""
    dtype = _dtype("dtype", value)
    if not jnp.issubdtype(dtype, jnp.inexact) or not _is_signed(dtype):
        raise TypeError(
            f"parameters and running statistics are floating point, with a sign; got "
            f"dtype={dtype}. Write dtype=jnp.float32."
        )
    return dtype


def stats_dtype(value: DTypeLike) -> np.dtype:
    """Checks the dtype of a running mean: floating point of at least 32 bits."""
    dtype = params_dtype(value)
    _not_narrow("dtype", dtype)
    return dtype


def number_of_features(value: int | Sequence[int]) -> tuple[int, ...]:
    """Converts one number, or one for each feature axis, to the feature shape."""
    shape: tuple[int | None, ...] = (integer(value),)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        shape = tuple(map(integer, value))
    found = tuple(n for n in shape if n is not None and n >= 0)
    if len(found) < len(shape):
        raise TypeError(
            f"features must be a number of features, such as x.shape[-1], or a tuple of them for "
            f"several feature axes; got {_short(value)}."
        )
    return found


def _not_narrow(name: str, dtype: np.dtype) -> None:
    if dtype.itemsize < 4:
        raise TypeError(
            f"{name} is {dtype}, in which small steps of a running average are lost and large "
            f"variances are infinite: training keeps statistics in float32 or float64, whatever "
            f"x is. Write jbn.init_stats(C), or convert what you have: "
            f"jax.tree.map(lambda s: s.astype(jnp.float32), stats). jbn.batch_norm_inference takes "
            f"statistics of any precision."
        )


def activation(function: Any, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Checks that an activation is hashable, static and elementwise on this shape; or None."""
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
    if any(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(function)):
        raise TypeError(
            f"activation must be static, but {_short(function)} holds arrays, such as a learned "
            f"slope. Apply it behind the layer: activation(y)."
        )
    return _static(function, shape, np.dtype(dtype))


@functools.lru_cache(maxsize=256)  # a call that raises is not cached
def _static(function: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    trace = jax.make_jaxpr(function, return_shape=True)
    try:
        program, result = trace(jax.ShapeDtypeStruct(shape, dtype))
    except Exception as error:
        raise TypeError(
            f"activation must be a function of one array that JAX can trace, such as jnp.tanh or "
            f"jax.nn.relu; {_short(function)} raised {type(error).__name__}: {_short(error)}. "
            f"Write it with jax.numpy: jnp.tanh for np.tanh, jnp.where for `if`. A layer with "
            f"parameters of its own comes behind this one."
        ) from error
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
    if not jnp.issubdtype(result.dtype, jnp.inexact) or (
        jnp.iscomplexobj(result) and not jnp.issubdtype(dtype, jnp.complexfloating)
    ):
        raise TypeError(
            f"activation must return floating point, real for real numbers; {function!r} made "
            f"{result.dtype} of {dtype}. Apply it behind the layer: activation(y)."
        )
    if mixes(program.jaxpr):
        raise ValueError(
            f"activation must be elementwise, but in {function!r} an element of the result depends "
            f"on other elements, as in softmax, a sum or a sort. It would see the array with its "
            f"axes cut for groups and devices. Apply it behind the layer: activation(y)."
        )
    return function


def residual(values: ArrayLike | None, x: Array) -> Array | None:
    """Checks that a residual is floating point and of x's shape; or None."""
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
    """Converts epsilon to a Python number >= 0 that float32 can hold."""
    if isinstance(value, Tracer):
        raise TypeError("epsilon must be a Python number, not a traced value: it is static.")
    number = _number(value)
    if number is None or not 0 <= number <= float(np.finfo(np.float32).max):
        raise ValueError(
            f"epsilon must be a number >= 0 that is added to the variance, such as 1e-5; "
            f"got {_short(value)}."
        )
    return number


def decay(value: float, debias: bool) -> float:
    """Checks that decay is in [0, 1], unless it is traced; decay 1 cannot be debiased."""
    if isinstance(value, Tracer):
        return value
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise ValueError(
            f"decay (momentum in the Flax modules) is the weight of the old value and must lie "
            f"between 0 and 1, such as 0.99; got {_short(value)}."
        )
    if debias and number == 1:
        raise ValueError("decay=1 cannot be debiased; for equal weights write jbn.cumulative().")
    return number


def at_least(name: str, value: Any, least: float) -> Any:
    """Checks that `value` is a real number >= `least`, unless it is traced; infinity is one."""
    if isinstance(value, Tracer):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        if value.ndim or not real:
            raise TypeError(
                f"{name} must be a real number, one for all features; got {value.dtype} of shape "
                f"{value.shape}."
            )
        return value
    number = _number(value)
    if number is None or not number >= least:
        got = _short(value) if number is None else f"{number:g}"
        raise ValueError(f"{name} must be a number >= {least:g}; got {got}.")
    return number


def _number(value: Any) -> float | None:
    """Converts a single real number to float; returns None for True, text, a vector and others."""
    if isinstance(value, str | bytes | bytearray | bool):
        return None
    try:
        if np.ndim(value) or getattr(value, "dtype", None) == np.bool_:
            return None
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _short(value: Any) -> str:
    """Prints a value or an error in one line; Python prints no integer of thousands of digits."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except ValueError:
        return f"a {type(value).__name__} of too many digits to print"
    text = " ".join(text.split())
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def features(name: str, values: ArrayLike, axes: Axes) -> Array:
    """Converts `values` to an array, which must have exactly the feature shape."""
    values = array(values, name)
    if values.shape != axes.feature_shape:
        axes = axes.whole
        raise ValueError(
            f"{name} has shape {values.shape}, but x, of shape {axes.shape} with feature axis "
            f"{_plain(axes.features)}, needs {axes.feature_shape}. Pass axis= if the features lie "
            f"elsewhere, or make it for {_plain(axes.feature_shape)} features."
        )
    return values


def params(values: Any) -> tuple[Any, Any]:
    """Takes (scale, bias) from a Params, or from any other pair."""
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


def stats(values: Any, axes: Axes, x: Array | None = None, *, training: bool = False) -> Any:
    """Checks RunningStats: mean, var and count have the feature shape, and dtypes that fit.

    In training no dtype may be narrower than float32. The count may be an integer, because other
    libraries have such counts. With x, `same_field` is checked too.
    """
    fields = ("mean", "var", "count")
    if tuple(getattr(values, "_fields", ())) != fields:
        raise TypeError(
            f"stats must be jbn.RunningStats(mean, var, count), such as jbn.init_stats(C); "
            f"got {type(values).__name__}."
        )
    kinds = {"mean": jnp.inexact, "var": jnp.floating, "count": jnp.number}
    checked = {}
    for name, kind in kinds.items():
        value = checked[name] = features(f"stats.{name}", getattr(values, name), axes)
        if not jnp.issubdtype(value.dtype, kind) or (name == "count" and jnp.iscomplexobj(value)):
            raise TypeError(
                f"stats.{name} must be {'real' if kind is jnp.number else 'floating point'}; got "
                f"{value.dtype}. Write jbn.init_stats(C), or convert it: "
                f"stats.{name}.astype(jnp.float32)."
            )
        if training:
            _not_narrow(f"stats.{name}", value.dtype)
    values = values._replace(**checked)
    if x is not None:
        same_field(values, x, training=training)
    return values


def real_statistic(name: str, value: Array, *, training: bool) -> None:
    """Checks that a statistic is real and, in training, at least float32."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be real floating point; got {value.dtype}.")
    if training:
        _not_narrow(name, value.dtype)


def same_field(values: Any, x: Array, *, training: bool) -> None:
    """Refuses a complex mean for real x, and in training a real mean for complex x."""
    mean, of_complex = values.mean.dtype, jnp.iscomplexobj(values.mean)
    if training and jnp.iscomplexobj(x) and not of_complex:
        raise TypeError(
            f"x is {x.dtype} but stats.mean is {mean}, which cannot hold its mean. "
            f"Write jbn.init_stats(C, dtype={x.dtype})."
        )
    if of_complex and not jnp.iscomplexobj(x):
        raise TypeError(
            f"stats.mean is {mean} but x is {x.dtype}: these are statistics of complex numbers. "
            f"Write x.astype({mean}), or take stats of your own for real x: jbn.init_stats(C)."
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
    """Checks the number of equal parts into which the batch is divided."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"groups must be a Python integer, because it decides shapes; got a traced value, "
            f"{value}. Under jax.jit name it in static_argnames, or close over it."
        )
    number = integer(value)
    if number is None or number < 1:
        raise TypeError(
            f"groups must be a number of groups >= 1, such as groups=8; got {_short(value)}."
        )
    value = number
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
    return value


def several_values(axes: Axes) -> None:
    """Refuses to take the variance of a single value, in each group if there are groups."""
    if axes.size == 1:
        each = "" if axes.group is None else f" in each of {axes.groups} groups"
        axes = axes.whole
        raise ValueError(
            f"one value per channel: x of shape {axes.shape} with feature axis "
            f"{_plain(axes.features)} has a single value of each feature{each}, so its variance is "
            f"0 and y is just the bias. Use a larger batch, share statistics through axis_name=, "
            f"normalise with running statistics (jbn.batch_norm_inference), or drop the last "
            f"batch of an epoch if it is this small."
        )


def as_replicated_as(old: Array, new: Array) -> None:
    """Refuses device-varying new statistics if the old ones are replicated."""
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
    """Joins mask and weights in one array of x's rank: None, bool, or `dtype`'s real type, >= 0."""
    taking_part = None if mask is None else _mask(axes, array(mask, "mask"))
    if weights is None:
        return taking_part
    weights = _weights(axes, array(weights, "weights"), dtype)
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


def _weights(axes: Axes, weights: Array, dtype: DTypeLike) -> Array:
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(
            f"weights must be floating point; got {weights.dtype}. Pass a bool array as mask=, "
            f"and convert others: weights.astype(jnp.float32)."
        )
    numbers = jnp.finfo(dtype)
    weights = _broadcastable("weights", weights, axes).astype(numbers.dtype)
    # A negative or NaN weight counts as 0, and so does a subnormal one, which a processor may take
    # for 0 anyway. `largest` is so small that 2^24 of them have a finite sum.
    largest = jnp.asarray(numbers.max * 2.0**-24, numbers.dtype)
    return jnp.where(
        weights >= numbers.tiny, jnp.minimum(weights, largest), jnp.zeros_like(weights)
    )


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
