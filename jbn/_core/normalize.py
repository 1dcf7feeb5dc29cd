"""(x, scale, bias) -> (y, moments): the transform of Algorithm 1 with its derivative."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jbn._core import check
from jbn._core.affine import (
    Activation,
    affine,
    displaced,
    expanded,
    harmless,
    location,
    transform,
    where_data,
)
from jbn._core.derivative import Known, Saved, Tangents, differential, keep
from jbn._core.moments import measure
from jbn._core.plan import Inputs, Spec, plan
from jbn._core.pooling import restore, restore_pooled
from jbn._core.types import Moments, ShiftedMoments
from jbn._devices import placement
from jbn._devices.named_axes import AxisName, scope
from jbn._xla.checkpoint import named
from jbn._xla.hints import recomputed
from jbn._xla.materialize import materialize


class Params(NamedTuple):
    """The learned affine map of Batch Normalization, y = scale * xhat + bias (Alg. 1).

    Attributes:
      scale: [C], the paper's gamma; None for 1.
      bias: [C], the paper's beta; None for 0.
    """

    scale: Array | None
    bias: Array | None


def init_params(features: int | Sequence[int], dtype: DTypeLike = jnp.float32) -> Params:
    """Makes scale 1 and bias 0 for `features` features (a tuple for several feature axes).

    >>> import jbn
    >>> jbn.init_params(2)
    Params(scale=Array([1., 1.], dtype=float32), bias=Array([0., 0.], dtype=float32))
    """
    dtype, features = check.params_dtype(dtype), check.number_of_features(features)
    return Params(jnp.ones(features, dtype), jnp.zeros(features, dtype))


def normalize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    groups: int | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Moments]:
    """Normalises every feature of x by the moments of x itself (Alg. 1).

        mean = E[x],  var = E[(x - mean)^2],  y = scale (x - mean) / sqrt(var + epsilon) + bias
        y = activation(y + residual)    if given

    >>> import jax.numpy as jnp, jbn
    >>> y, m = jbn.normalize(jnp.array([[1.0], [3.0]]))
    >>> print(y.round(3), m.mean)
    [[-1.]
     [ 1.]] [2.]

    Args:
      x: [N, ..., C], floating point.
      scale: [C], or None for 1.
      bias: [C], or None for 0.
      axis: the feature axis or axes, C.
      epsilon: is added to the variance, inside the root.
      mask: bool, of x's rank, broadcasts against x. False: the value takes no part in the moments,
        and is normalised by the moments of the other values.
      weights: real and not negative, broadcasts like `mask`. Zero is the same as masked; a
        negative or NaN weight counts as zero.
      axis_name: take the moments over these named axes (of vmap, pmap, shard_map) as well.
      axis_index_groups: as in `jax.lax.psum`.
      groups: normalise each of this many equal, consecutive parts of the batch by its own moments.
      activation: an elementwise function, such as `jax.nn.relu`.
      residual: of x's shape, is added before the activation.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, and the moments. Both are differentiable in x, scale and bias to any order,
      masked positions included. A masked value changes no other value and no other gradient; where
      it is not finite, xhat is 0. A feature without data gives its bias. For activation and
      residual together one array is saved for backward: the residual, or y if the activation is
      `jax.nn.relu`. No mask and no sum is saved.

    Raises:
      NameError: no vmap, pmap or shard_map binds axis_name.
      TypeError: x or residual is not floating point, dtype cannot hold y, mask is not bool, or
        activation is no function of JAX.
      ValueError: axis, scale, bias, mask, weights, groups or residual do not fit x's shape, epsilon
        < 0, or activation changes the shape or mixes elements.
    """
    x = check.floating(x)
    spec, inputs = plan(
        x,
        (scale, bias),
        axis=axis,
        epsilon=epsilon,
        mask=mask,
        weights=weights,
        over=scope(axis_name, axis_index_groups),
        groups=groups,
        activation=activation,
        residual=residual,
        dtype=dtype,
    )
    y, m = normalized(spec, inputs)
    return placement.join(y, x, spec.axes), m


def normalized(spec: Spec, inputs: Inputs, *, pooled: bool = False) -> tuple[Array, Moments]:
    """Computes y, of the planned x's shape, and the moments; `pooled` pools those of all groups."""
    if not isinstance(inputs.x, Tracer):
        return _as_one_program(spec, pooled, inputs)
    residual, weights = inputs.residual, inputs.weights
    if residual is not None and weights is not None:
        # Rematerialised, so that the residual (often saved anyway) is saved for backward, no mask.
        clean = recomputed(harmless)
        inputs = inputs._replace(residual=clean(residual, residual, weights))
    y, m = _normalize(spec, inputs)
    if not pooled:
        return y, restore(m, spec.axes)
    # These moments are for running statistics, which carry no gradient.
    return y, restore_pooled(jax.lax.stop_gradient(m), spec.axes, weights is not None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _as_one_program(spec: Spec, pooled: bool, inputs: Inputs) -> tuple[Array, Moments]:
    """Runs an eager call of `normalized` as one program."""
    return normalized(spec, inputs, pooled=pooled)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(spec: Spec, inputs: Inputs) -> tuple[Array, ShiftedMoments]:
    y, known = _forward(spec, inputs)
    return y, known.moments


# This and `differential` are not inlined: layers of equal shape are then traced, differentiated and
# lowered once per program.
@functools.partial(jax.jit, static_argnums=0)
def _forward(spec: Spec, inputs: Inputs) -> tuple[Array, Known]:
    x, scale, bias, weights, residual, measured = inputs
    # The moments have a name: a checkpoint policy can save them, and rematerialise only y.
    m = named(measure(spec.of_moments, x, weights)) if measured is None else measured
    scale, bias = expanded(scale, bias, spec.axes, m.var.dtype)
    if weights is not None:
        scale = where_data(m.count, scale)  # without data y is the bias
    mean, rstd = location(m.mean, m.var, spec.epsilon)
    # A copy of the shift: else the compiler stores the x - shift of the sums for this pass.
    shift, mean, rstd = materialize(m.shift, mean, rstd)
    at = affine(shift, mean, rstd, scale, bias)
    y = transform(displaced(x, weights, at), at.a, at.c, residual)
    return (y if spec.activation is None else spec.activation(y)).astype(spec.dtype), Known(m, at)


@_normalize.defjvp
def _normalize_jvp(spec: Spec, primals, tangents):
    (inputs,), (along,) = primals, tangents
    y, known = _forward(spec, inputs)
    saved = Saved(inputs.x, inputs.weights, keep(spec, y, inputs.residual))
    dx = placement.alongside(along.x, inputs.x)  # weights and the shift are constants
    direction = Tangents(dx, along.scale, along.bias, along.residual)
    dy, dmean, dvar = differential(spec, saved, known, direction)
    m = known.moments
    dm = ShiftedMoments(jnp.zeros_like(m.shift), jnp.zeros_like(m.count), dmean, dvar)
    return (y, m), (dy, dm)
